"""Pairs whose first matrix is a part of a weight: what else the weight makes goes elsewhere, as in a parallel block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from pe_fx.graph.channels import arriving
from pe_fx.graph.flow import Flow
from pe_fx.graph.operation import Op
from pe_fx.graph.tags import channels_along, channels_in
from pe_fx.passes.pairs import Pair, common_module, could_make, is_open, leak, reader_obstacle, tie
from pe_fx.ties import Block, Miss, Site


@dataclass(frozen=True)
class Part(Pair):
    """`second` gets nothing but these output channels of `first`, of which there are more, by a nonlinearity."""

    channels: Sequence[int]
    blended: bool

    @property
    def blocks(self) -> tuple[Block, Block]:
        first, second = self.weights
        return first.of_channels(self.channels), second.block


def match_parts(flow: Flow, kind: str) -> Iterator[Site | Miss]:
    """A site for every part of a weight whose channels go to a weight of their own and nowhere else; one that runs several times is one."""
    groups: dict[tuple[Block, Block], list[Part]] = {}
    for op in flow.ops:
        if (part := _part_before(flow, op)) is not None:
            groups.setdefault(part.blocks, []).append(part)
    for (of, into), group in groups.items():
        names = of.name, into.name
        reason = next((reason for part in group if (reason := _obstacle(flow, part)) is not None), None) or reader_obstacle(flow, group)
        if reason is not None:
            yield Miss(kind, common_module(names), names, reason)
        else:
            first, second = group[0].weights
            site = Site(kind, common_module(names), names, (tie(first, second, of),))
            flow.applied[site] = (of, into)
            yield site


def _part_before(flow: Flow, second: Op) -> Part | None:
    """The part by its shape: all that `second` gets was cut out of the output of one weight."""
    if second.weight is None or not is_open(flow, second) or not second.inputs:
        return None
    first = flow.feeder(second.inputs[0])
    if first is None or first.weight is None or not first.is_projection:
        return None
    if not could_make(first, second) or first.weight.outputs == second.weight.inputs:
        return None  # at once, since most do not
    end = arriving(flow.trace(first, second), second)
    channels = None if end.tags is None or end.uniform else channels_along(end.tags, second.in_axis)
    if channels is None or not end.activations or not _are_cut_out(flow, first, second, set(channels)):
        return None
    fits = first.weight.is_part(channels) and second.weight.mirrors(first.weight, len(channels))
    return Part(first, second, flow.between(first, second), channels, end.blended) if fits else None


def _are_cut_out(flow: Flow, first: Op, second: Op, channels: set[int]) -> bool:
    """Whether all that `second` gets is made of one view of what `first` makes, or of a function of that, with these channels alone."""
    states = flow.trace(first, second)
    op = flow.dominator(second)
    while op is not None and op is not first:
        tags = states[op].tags
        alone = isinstance(tags, Tensor) and set(channels_in(tags) or ()) == channels
        if alone and all(len(step.inputs) == 1 for step in (*flow.between(first, op), op)):
            return True
        op = flow.dominator(op)
    return False


def _obstacle(flow: Flow, part: Part) -> str | None:
    of, into = part.blocks
    if part.blended:
        return f"the hidden channels of {of} are combined with one another before {into}"
    if list(part.channels) != sorted(set(part.channels)):
        return f"the hidden channels of {of} reach {into} in another order"
    if (where := leak(flow, part.first, part.second, part.channels)) is not None:
        return f"the value between {of} and {into} is read elsewhere too: {where}"
    return None
