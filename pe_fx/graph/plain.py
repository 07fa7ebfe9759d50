"""A captured graph made plain: regions inlined, composed calls opened, writes in place spelled out."""

from __future__ import annotations

import contextlib
import inspect
import logging
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pe_fx.errors import CaptureError
from pe_fx.graph.ops import KINDS, Kind, base_name, is_in_place, keeps_order, may_alias, value_of
from pe_fx.graph.walks import reached

log = logging.getLogger(__name__)


def plain(gm: fx.GraphModule) -> fx.Graph:
    """A copy of the graph with autocast, no_grad and checkpoint regions (operators that call one subgraph) inlined, functions made
    of several operations, such as `F.multi_head_attention_forward`, opened, and gated units, joined outputs of attention and
    feed-forward, and writes in place spelled out."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    result = _copy_into(graph, gm, values)
    graph.output(result)
    _spell_out_glu(graph)
    _spell_out_joined_outputs(graph)
    _spell_out_writes(graph)
    return graph


def _copy_into(graph: fx.Graph, gm: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
    for node in gm.graph.nodes:
        if node.op == "output":
            return fx.node.map_arg(node.args[0], values.__getitem__)
        if node in values:
            continue
        region = _region(gm, node) or _opened(node)
        if region is not None:
            body, operands = region
            inner = dict(
                zip(body.graph.find_nodes(op="placeholder"), [fx.node.map_arg(o, values.__getitem__) for o in operands], strict=True)
            )
            values[node] = _copy_into(graph, body, inner)
        elif node.target is operator.getitem and not isinstance(values[node.args[0]], fx.Node):
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    raise CaptureError("a graph without an output node")


REGIONS = (
    *("wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast", "invoke_subgraph"),
    *("tag_activation_checkpoint", "wrap_activation_checkpoint"),
)
"""Operators that call their subgraph once and as it is."""


def _region(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, list[Any]] | None:
    """The body and its operands, where `node` calls exactly one subgraph exactly once."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or str(node.target) not in REGIONS:
        return None
    bodies = [
        (i, getattr(gm, str(a.target)))
        for i, a in enumerate(node.args)
        if isinstance(a, fx.Node) and a.op == "get_attr" and isinstance(getattr(gm, str(a.target), None), fx.GraphModule)
    ]
    if len(bodies) != 1:
        return None
    position, body = bodies[0]
    operands = list(node.args[position + 1 :])
    return (body, operands) if len(operands) == len(body.graph.find_nodes(op="placeholder")) else None


def _is_composed(node: fx.Node) -> bool:
    """Whether a call does what takes several operations: a Python function that is none itself, `x[i] = y`, or `x[i]` by a tensor."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return any(isinstance(value_of(index), Tensor) for index in node.all_input_nodes[1:])
    if node.target is operator.setitem:
        return True
    in_vmap = str(getattr(node.target, "__module__", "")).startswith("torch._functorch")  # a step of it, which crashes torch 2.11 alone
    return inspect.isfunction(node.target) and base_name(node) not in KINDS and not in_vmap


def _opened(node: fx.Node) -> tuple[fx.GraphModule, list[Any]] | None:
    """What a composed call does, as a graph of operations, and its operands."""
    if not _is_composed(node):
        return None
    function: Any = node.target
    operands = node.all_input_nodes

    def call(*values: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), dict(zip(operands, values, strict=True)).__getitem__)
        return function(*args, **kwargs)

    values = [value_of(operand) for operand in operands]
    fake_mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), contextlib.nullcontext())
    try:
        with fake_mode:  # of copies, since it may write to them
            body = make_fx(call, pre_dispatch=True)(*(value.clone() if isinstance(value, Tensor) else value for value in values))
    except Exception:  # whatever a function does that is not made for fake values
        log.debug("%s was not opened", node.format_node(), exc_info=True)
        return None
    for inner in body.graph.nodes:
        inner.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    return body, list(operands)


def _spell_out_glu(graph: fx.Graph) -> None:
    """glu(x) as what it stands for: the first half of x times the sigmoid of the second."""
    for node in list(graph.nodes):
        if not node.op.startswith("call") or base_name(node) != "glu":
            continue
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
        halves = value_of(node.args[0]).chunk(2, dim)
        with graph.inserting_before(node):
            chunks = graph.call_function(torch.chunk, (node.args[0], 2, dim))
            first, second = (graph.call_function(operator.getitem, (chunks, i)) for i in (0, 1))
            gate = graph.call_function(torch.sigmoid, (second,))
            product = graph.call_function(torch.mul, (first, gate))
        chunks.meta["val"] = halves
        for new, value in ((first, halves[0]), (second, halves[1]), (gate, halves[1]), (product, value_of(node))):
            new.meta["val"] = value
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def _spell_out_joined_outputs(graph: fx.Graph) -> None:
    """linear(cat(attention, hidden), W) as what it stands for: an output projection and the second half of a feed-forward, added."""
    for node in list(graph.nodes):
        joined = node.args[0] if node.op == "call_function" and base_name(node) == "linear" else None
        if not isinstance(joined, fx.Node) or joined.op != "call_function" or base_name(joined) not in ("cat", "concat"):
            continue
        _, weight, *bias = node.args
        parts: Any = joined.args[0]
        dim: Any = joined.kwargs.get("dim", joined.args[1] if len(joined.args) > 1 else 0)
        rank = len(value_of(joined).shape)
        if not isinstance(weight, fx.Node) or dim % rank != rank - 1 or not any(map(_is_averaged, parts)):
            continue
        total: fx.Node | None = None
        start = 0
        with graph.inserting_before(node):
            for part in parts:
                width = value_of(part).shape[-1]
                columns = _call_like(graph, node, torch.narrow, (weight, 1, start, width), value_of(weight).narrow(1, start, width))
                product = _call_like(graph, node, nn.functional.linear, (part, columns, *(bias if total is None else ())), value_of(node))
                total = product if total is None else _call_like(graph, node, torch.add, (total, product), value_of(node))
                start += width
        assert total is not None
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def _call_like(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
    """A new call that stands for a part of `node`."""
    new = graph.call_function(target, args)
    new.meta = {**node.meta, "val": value}
    return new


_ENTRYWISE = (Kind.VIEW, Kind.POINTWISE, Kind.NONLINEAR, Kind.PRODUCT, Kind.NORM, Kind.SOFTMAX)


def _is_averaged(value: fx.Node) -> bool:
    """Whether attention made a value."""

    def kind(node: fx.Node) -> Kind | None:
        return KINDS.get(base_name(node)) if node.op.startswith("call") else None

    def before(node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes if kind(node) in _ENTRYWISE else []

    products = [node for node in reached(value, before) if kind(node) in (Kind.ATTEND, Kind.MATMUL)]
    maps = (found for product in products for operand in product.all_input_nodes for found in reached(operand, before))
    return any(kind(node) is Kind.ATTEND for node in products) or any(kind(node) is Kind.SOFTMAX for node in maps)


def overwritten(value: Any, by: Any) -> Any:
    """Stands in a captured graph for what a value holds after an operation wrote to a part of it, or to it in another shape."""
    raise NotImplementedError


def _spell_out_writes(graph: fx.Graph) -> None:
    """After a write in place, whoever reads the rest of that memory under another name reads `overwritten`.

    Who reads the very value that was written reads the operation's result: `flow.live_operands` sees to that.
    """
    order: dict[fx.Node, float] = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(order):
        if not (node.op.startswith("call") and is_in_place(node) and isinstance(node.args[0], fx.Node)):
            continue
        chain = memory_chain(node.args[0])
        same = {value for value in chain if written_whole(value, node)}
        stale = set(chain) - same
        if chain[-1] in same:  # all of it was written, and all that was made of it before
            stale |= {value for value in _aliases(chain[-1]) if order[value] < order[node]} - set(chain)
        for value in sorted(stale, key=order.__getitem__):
            readers = [user for user in value.users if order[user] > order[node]]
            if not readers or not isinstance(value_of(value), Tensor):
                continue
            with graph.inserting_after(node):
                if value in chain and written_whole(value, node, reshaped=True):
                    new = graph.call_function(torch.reshape, (node, tuple(value_of(value).shape)))
                else:
                    new = graph.call_function(overwritten, (value, node))
            new.meta["val"] = value_of(value)
            order[new] = order[node] + 0.5
            for reader in readers:
                reader.replace_input_with(value, new)


def written_whole(value: fx.Node, by: fx.Node, reshaped: bool = False) -> bool:
    """Whether an operation in place wrote all of `value`, which its first operand is or is made of, in the same shape (or any)."""
    current = by.args[0]
    while current is not value and isinstance(current, fx.Node) and keeps_order(current):
        current = current.args[0]
    old, new = value_of(value), value_of(by)
    if current is not value or not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return current is value
    return old.numel() == new.numel() if reshaped else old.shape == new.shape


def memory_chain(value: fx.Node) -> list[fx.Node]:
    """The value, what it is a view of, and so on to the value in whose memory all of them lie."""
    chain = [value]
    while may_alias(chain[-1]) and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    return chain


def _aliases(value: fx.Node) -> set[fx.Node]:
    """Whatever is made of the value and may lie in its memory."""
    return set(reached(value, lambda made: (user for user in made.users if may_alias(user) and user.args[0] is made))) - {value}
