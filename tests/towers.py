"""Graphs as large as those of the largest models, put together without a model."""

from __future__ import annotations

from pe_fx.diff import Graph, Node, Operand

OPS = ("layer_norm", "linear", "softmax", "matmul", "linear", "add", "layer_norm", "linear", "gelu", "linear", "add")
NORM, FC1, FC2, ADD = 0, 7, 9, 10


def tower(blocks: int, *, tied: bool, flat: bool = False) -> Graph:
    """Blocks of eleven operations, in two modules each or, flat, in none; tied, fc2 of each applies the transpose of its fc1."""
    nodes = {"x": Node("x", "input", "input", "", (), (), "", (1, 8), "float32")}
    modules, parameters = {"": "Tower", "blocks": "Sequential"}, {}
    last = "x"
    for block in range(blocks):
        skip = last
        for place, op in enumerate(OPS):
            module = f"blocks.{block}.{'attn' if place <= 5 else 'mlp'}"
            operands: tuple[Operand, ...] = ()
            if op == "linear":
                source = FC1 if tied and place == FC2 else place
                name = f"{module}.{source}.weight"
                parameters[name] = (8, 8)
                operands = (Operand("{0}" if source == place else "{0}ᵀ", (name,), (8, 8)),)
                module = f"{module}.{place}"
            id = f"{op}_{block}_{place}"
            inputs = (last, skip) if op == "add" else (last,)
            nodes[id] = Node(id, op, "other", "" if flat else module, operands, inputs, "", (1, 8), "float32")
            modules[module] = "Block"
            skip = id if place == 5 else skip
            last = id
    return Graph(nodes, modules, parameters, "tower")
