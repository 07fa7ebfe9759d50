"""Plan to graph: every read of a tied weight becomes an expression of its source."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from pe_fx.errors import PeFxError
from pe_fx.graph.ops import value_of
from pe_fx.graph.views import call
from pe_fx.tied.layouts import axis_of, by_target, compare_shapes, kept_ranges, layout_of
from pe_fx.tied.weight import View
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
    # where it is first read, since autograd comes late to what is made early; but before grad mode or autocast may be another
    places = {name: min((*users, switch), key=known.__getitem__) for name, users in readers.items()}
    for name, place in sorted(places.items(), key=lambda item: known[item[1]]):
        with gm.graph.inserting_before(place):
            dense: Any = layout_of(targets[name], targets, kept).assemble(stored(name), [stored(tie.source) for tie in targets[name]])
        for reader in readers[name]:
            reader.replace_input_with(nodes[name], dense.node)
    _record_values([node for node in gm.graph.nodes if node not in known])
    gm.graph.lint()
    gm.recompile()


def _record_values(nodes: list[fx.Node]) -> None:
    """Gives new nodes the fake values that Dynamo gave the others, so that the graph can be read again."""
    with torch.no_grad():
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
            node.meta["example_value"] = call(node.target, args, kwargs)
