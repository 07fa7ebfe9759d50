"""Which parameter an operation applies, and which view of it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from pe_fx.graph.capture import Captured
from pe_fx.graph.operation import Op, Weight, factors, is_floating, is_tensor, product_labels, shape_of
from pe_fx.graph.ops import KINDS, RESHAPES, Kind, base_name, value_of
from pe_fx.graph.tags import channels_along, channels_in, numbered, varying_axes
from pe_fx.graph.views import moved
from pe_fx.graph.walks import reached
from pe_fx.ties import Block, Shape

_STATIC_KINDS = {Kind.POINTWISE, Kind.PRODUCT, Kind.NORM, Kind.REDUCE, Kind.NONLINEAR, Kind.CONSTANT}
_IDENTITIES = (
    "contiguous",
    "clone",
    "alias",
    "detach",
    "to",
    "to_copy",
    "type",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "double",
    "lift_fresh",
)


class Static:
    """What is computed from parameters and constants alone."""

    def __init__(self, captured: Captured) -> None:
        self._names = captured.weights
        self._cache: dict[fx.Node, frozenset[fx.Node]] = {}

    def sources(self, node: fx.Node) -> frozenset[fx.Node]:
        """The parameter nodes that a value is computed from."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._cache:
                stack.pop()
                continue
            if current in self._names:
                self._cache[current] = frozenset((current,))
                continue
            is_constant = not current.op.startswith("call") or KINDS.get(base_name(current)) is Kind.CONSTANT
            if is_constant or not is_floating(value_of(current)):  # an index carries no weight
                self._cache[current] = frozenset()
                continue
            waiting = [operand for operand in current.all_input_nodes if operand not in self._cache]
            if waiting:
                stack += waiting
            else:
                self._cache[current] = frozenset().union(*(self._cache[operand] for operand in current.all_input_nodes))
        return self._cache[node]

    def parameters(self, node: fx.Node) -> list[str]:
        return sorted(self._names[source] for source in self.sources(node))

    def name(self, node: fx.Node) -> str:
        return self._names[node]


def attach_weight(op: Op, operands: list[fx.Node], static: Static) -> None:
    """Finds the weight operand of a linear, a convolution or a matrix product, and what it is a view of."""
    checked = op.operands[1:2] if "grouped_mm" in op.name else op.operands[1:]  # expert offsets come from the values
    if (op.kind is Kind.CONV or (op.kind is Kind.PROJECTION and op.name != "addmm")) and any(checked):
        op.kind = Kind.OTHER  # a weight or bias made from the input
        return
    if op.kind is Kind.CONV:
        _attach_kernel(op, operands, static)
        return
    if op.name == "linear":
        position, out_label, in_label = 1, 0, 1
        op.operands = op.operands[:1]
    elif op.name != "addmm" and op.kind is Kind.PROJECTION:  # grouped_mm(x, W of every expert, offsets)
        position, out_label, in_label = 1, 2, 1
        op.operands = op.operands[:1]
    elif op.kind is Kind.PROJECTION:  # addmm(bias, x, W)
        if op.operands[0] is not None or op.operands[1] is None or op.operands[2] is not None:
            op.kind = Kind.OTHER
            return
        position, out_label, in_label = 2, 1, 0
        op.operands = (op.operands[1],)
    else:
        labels = product_labels(op)
        pair = factors(op)
        if labels is None or len(pair) < 2 or (pair[0] is None) == (pair[1] is None):
            return
        position = 0 if pair[0] is None else 1
        names, value_names, result = labels[position], labels[1 - position], labels[2]
        inner = [label for label in names if label in value_names and label not in result]
        outer = [label for label in names if label in result and label not in value_names]
        node = operands[position + (op.name == "baddbmm")]
        weight_rank = len(shape_of(value_of(node)))
        names = names[-weight_rank:] if op.name != "einsum" else names
        if len(inner) != 1 or len(outer) != 1 or len(names) != 2:
            return
        value = pair[1 - position]
        weight = _view_of_parameter(node, names.index(outer[0]), names.index(inner[0]), static)
        if weight is None or value is None:
            return
        op.kind, op.weight, op.operands = Kind.PROJECTION, weight, (value,)
        op.in_axis = value_names.index(inner[0]) - len(value_names)
        op.out_axis = result.index(outer[0]) - len(result)
        return
    op.weight = _view_of_parameter(operands[position], out_label, in_label, static)


def _attach_kernel(op: Op, operands: list[fx.Node], static: Static) -> None:
    op.operands = op.operands[:1]
    kernel = shape_of(value_of(operands[1]))
    spatial = len(kernel) - 2
    op.in_axis = op.out_axis = -1 - spatial
    transposed = op.name.startswith("conv_transpose") or (op.name == "convolution" and op.node.args[6:7] == (True,))
    place = 8 if op.name == "convolution" else 6
    groups = op.node.kwargs.get("groups", op.node.args[place] if len(op.node.args) > place else 1)
    if not isinstance(groups, int):
        return
    op.groups = groups
    out_label, in_label = (1, 0) if transposed else (0, 1)
    op.weight = _view_of_parameter(operands[1], out_label, in_label, static, kernel[2:], groups)
    if op.weight is not None and op.weight.is_matrix and not transposed:
        op.kind = Kind.PROJECTION


def _view_of_parameter(node: fx.Node, out_label: int, in_label: int, static: Static, kernel: Shape = (), groups: int = 1) -> Weight | None:
    shape = shape_of(value_of(node))
    sources = static.sources(node)
    if node in sources:
        block = Block.whole(static.name(node), shape)
        return Weight(block, out_label, in_label, range(shape[out_label]), kernel, groups)
    main = [source for source in sources if math.prod(shape_of(value_of(source))) >= math.prod(shape)]
    if len(main) != 1:
        return None
    parameter = main[0]
    full = shape_of(value_of(parameter))
    positions = _positions(node, parameter, full) if len(sources) == 1 else None
    if positions is not None:
        return _from_positions(positions, static.name(parameter), full, shape, out_label, in_label, kernel, groups)
    if full != shape:
        return None
    block = Block.whole(static.name(parameter), full)
    return Weight(block, out_label, in_label, range(full[out_label]), kernel, groups, _stranger(node, parameter, static))


def _positions(node: fx.Node, parameter: fx.Node, full: Shape) -> list[Tensor] | None:
    """For each dimension of the parameter, its position at each entry of `node`; None if `node` is no view of it."""
    chain: list[fx.Node] = []
    current = node
    while current is not parameter:
        kind = KINDS.get(base_name(current)) if current.op.startswith("call") else None
        if len(current.all_input_nodes) != 1 or not (kind is Kind.VIEW or base_name(current) in _IDENTITIES):
            return None
        chain.append(current)
        current = current.all_input_nodes[0]
    found = []
    for dim in range(len(full)):
        tags: Any = numbered(full, dim)
        for step in reversed(chain):
            if KINDS[base_name(step)] is not Kind.VIEW:
                continue
            op = Op(
                0,
                step,
                base_name(step),
                Kind.VIEW,
                shape_of(value_of(step)),
                (origin := Op(0, step.all_input_nodes[0], "", Kind.INPUT, (), ()),),
            )
            tags = moved(op, {origin: tags})
            if tags is None:
                return None
        found.append(tags)
    return found


def _from_positions(
    positions: list[Tensor], name: str, full: Shape, shape: Shape, out_label: int, in_label: int, kernel: Shape, groups: int
) -> Weight | None:
    axes = [varying_axes(tags) for tags in positions]
    if any(len(own) > 1 for own in axes):
        return None
    dims = {label: [dim for dim, own in enumerate(axes) if own == (label,)] for label in (out_label, in_label)}
    for label in dims:
        if not dims[label] and shape[label] == 1:
            dims[label] = [dim for dim, own in enumerate(axes) if not own and dim not in (d for o in dims.values() for d in o)][:1]
    if any(len(found) != 1 for found in dims.values()):
        return None
    out_dim, in_dim = dims[out_label][0], dims[in_label][0]
    rows = channels_along(positions[out_dim], out_label)
    columns = channels_along(positions[in_dim], in_label)
    if rows is None or not isinstance(columns, range):
        return None
    block = Block.whole(name, full).narrowed(out_dim, rows).narrowed(in_dim, columns)
    for dim, tags in enumerate(positions):
        if dim not in (out_dim, in_dim):
            held = channels_in(tags)
            if held is None:
                return None
            block = block.narrowed(dim, held)
    return Weight(block, out_dim, in_dim, rows, kernel, groups)


def _stranger(node: fx.Node, parameter: fx.Node, static: Static) -> str:
    """The first operation between `parameter` and `node` that does more than standardise, by name.

    It may neither reorder entries nor leave some out, and what it scales or shifts by must be the same for a row or for all.
    """
    if not _reaches_entrywise(node, parameter):
        return "a mean of it"
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        name = base_name(current) if current.op.startswith("call") else ""
        kind = KINDS.get(name)
        if name and ((kind not in _STATIC_KINDS and name not in (*RESHAPES, "expand", "expand_as")) or name == "where"):
            return name
        for operand in current.all_input_nodes:
            sources = static.sources(operand)
            if kind in (Kind.PRODUCT, Kind.POINTWISE) and parameter not in sources and _varies_by_entry(operand, parameter):
                return name
            if operand not in seen and sources and operand is not parameter:
                seen.add(operand)
                stack.append(operand)
    return ""


def _reaches_entrywise(node: fx.Node, parameter: fx.Node) -> bool:
    """Whether a way leads from each entry of the parameter to `node`, past no reduction."""

    def operands(current: fx.Node) -> list[fx.Node]:
        reduces = not current.op.startswith("call") or KINDS.get(base_name(current)) is Kind.REDUCE
        return [] if reduces else current.all_input_nodes

    return parameter in reached(node, operands)


def _varies_by_entry(operand: fx.Node, parameter: fx.Node) -> bool:
    """Whether a value has as many entries as the parameter: a mask, or what is added to each of them."""
    return is_tensor(value_of(operand)) and math.prod(shape_of(value_of(operand))) >= math.prod(shape_of(value_of(parameter))) > 1
