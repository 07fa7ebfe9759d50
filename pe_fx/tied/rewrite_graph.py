"""Plan to graph: every read of a tied weight becomes an expression of its source."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from pe_fx.errors import PeFxError
from pe_fx.graph.ops import base_name, is_in_place, may_alias, value_of, writes
from pe_fx.graph.views import call
from pe_fx.tied.assembly import View
from pe_fx.tied.layouts import axis_of, by_target, compare_shapes, kept_ranges, layout_of
from pe_fx.ties import Plan


def rewrite_graph(gm: fx.GraphModule, plan: Plan, weights: Mapping[str, fx.Node] | None = None) -> None:
    """Ties, in place, a graph whose weights are placeholders: every read of a tied weight becomes an expression of its source.

    `weights` says which node the plan's names mean; by default the placeholder of that name. The placeholders stay, so that the
    caller's arguments still fit; a weight that is tied away as a whole is not read any more.
    Raises `PeFxError` where the plan names weights that the graph does not have.
    """
    nodes = {node.name: node for node in gm.graph.find_nodes(op="placeholder")} if weights is None else weights
    compare_shapes(plan, {name: tuple(getattr(value_of(node), "shape", ())) for name, node in nodes.items()}, "graph")
    if plan.entries:
        raise PeFxError("entry='slice' and 'expand' change modules; a graph whose weights are placeholders has none: use entry='keep'")
    if any(tie.gain is not None for tie in plan.ties):
        raise PeFxError("gain=True adds parameters; a graph whose weights are placeholders can have none: transform the model instead")
    if any(tie.order is not None for tie in plan.ties):
        raise PeFxError("mix='fitted' keeps tensors; a graph whose weights are placeholders has none: transform the model instead")
    targets = by_target(plan.ties)
    kept = {name: kept_ranges(ties) for name, ties in targets.items()}
    tracer = fx.proxy.GraphAppendingTracer(gm.graph)
    known = {node: i for i, node in enumerate(gm.graph.nodes)}

    @functools.cache
    def stored(name: str) -> Any:
        weight: Any = fx.Proxy(nodes[name], tracer)
        ranges = kept.get(name)
        return View((*[None] * axis_of(targets[name]), ranges))(weight) if ranges else weight

    switch = next((node for node in gm.graph.nodes if node.op == "call_function" and value_of(node) is None), gm.graph.output_node())
    readers = {name: list(nodes[name].users) for name in targets if nodes[name].users}
    for name in readers:
        if (writer := _writer(nodes[name])) is not None:
            raise PeFxError(
                f"{writer} writes to {name}, which is tied to another weight, {targets[name][0].text()}: write to that one instead"
            )
    # where it is first read, since autograd comes late to what is made early; but before grad mode or autocast may be another
    places = {name: min((*users, switch), key=known.__getitem__) for name, users in readers.items()}
    for name, place in sorted(places.items(), key=lambda item: known[item[1]]):
        with gm.graph.inserting_before(place):
            dense: Any = layout_of(targets[name], targets, kept).assemble(stored(name), [stored(tie.source) for tie in targets[name]])
        _record_values([node for node in gm.graph.nodes if node not in known and value_of(node) is None])
        in_order = [reader for reader in readers[name] if _needs_order(reader, nodes[name], value_of(dense.node))]
        for reader in readers[name]:
            reader.replace_input_with(nodes[name], dense.node)
        if in_order:
            with gm.graph.inserting_after(dense.node):
                copied = gm.graph.call_method("contiguous", (dense.node,))
            _record_values([copied])
            for reader in in_order:
                reader.replace_input_with(dense.node, copied)
    gm.graph.lint()
    gm.recompile()


def _writer(weight: fx.Node) -> fx.Node | None:
    """What writes to a weight, be it through a view of it."""
    waiting = [weight]
    for node in waiting:
        for user in node.users:
            if is_in_place(user) and user.args[:1] == (node,):
                return user
            if may_alias(user):
                waiting.append(user)
    return None


def _needs_order(reader: fx.Node, weight: fx.Node, dense: Any) -> bool:
    """Whether the reader of a weight, or of a view of it, needs the weight's own order in memory, as `view` does, instead of `dense`'s."""
    values = {weight: dense}
    waiting = [reader]
    while waiting:
        node = waiting.pop()
        if _goes_by_memory(node):
            return True
        if node.op.startswith("call") and not writes(node.target) and all(each in values for each in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            try:
                with torch.no_grad():
                    values[node] = call(node.target, args, kwargs)
            except Exception:  # "view size is not compatible with input tensor's size and stride", by several names
                return True
            if _strides(values[node]) != _strides(value_of(node)):
                waiting += node.users
    return False


def _goes_by_memory(node: fx.Node) -> bool:
    """Whether what an operation does depends on strides: `as_strided`, and kernels of others, which may count on those they saw."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return all(each.op != "get_attr" for each in node.all_input_nodes)  # those that run a subgraph do not
    is_operator = isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    return (is_operator and not str(node.target).startswith(("aten.", "prims."))) or base_name(node) == "as_strided"


def _strides(value: Any) -> list[Any]:
    return [each.stride() for each in pytree.tree_leaves(value) if isinstance(each, torch.Tensor)]


def _record_values(nodes: list[fx.Node]) -> None:
    """Gives new nodes the fake values that Dynamo gave the others, so that the graph can be read again."""
    with torch.no_grad():
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
            node.meta["example_value"] = call(node.target, args, kwargs)
