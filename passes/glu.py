"""Gated linear units: down(act(gate(x)) * up(x)) holds `up` and uses it as `down` too."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pe_fx.graph.channels import Channels, arriving, held
from pe_fx.graph.flow import Flow, source_along
from pe_fx.graph.operation import Op, Weight
from pe_fx.graph.ops import Kind
from pe_fx.graph.tags import channels_along
from pe_fx.passes.pairs import common_module, could_make, leak, misuse, rivals, tie
from pe_fx.ties import Block, Miss, Site

_ELEMENTWISE = {Kind.POINTWISE, Kind.NONLINEAR}
_JOINED = {Kind.VIEW, Kind.NONLINEAR}
_BEFORE_DOWN = {Kind.POINTWISE, Kind.NONLINEAR, Kind.NORM, Kind.VIEW}

Unit = tuple[Block, Block, Block]
"""What makes the two factors, and what is applied to their product."""


@dataclass(frozen=True)
class Glu:
    """`down.weight ← up.weightᵀ`, gate and up being two weights or two halves of one.

    The factor that passed more activations is the gate. Source: the feed-forward tie of arXiv 2401.16438, on the linear branch.
    """

    kind: str = "glu"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        found = [(op, product) for op in flow.ops if op.weight is not None and (product := _product_before(flow, op)) is not None]
        units = [unit for op, product in found if (unit := _unit(flow, product, op)) is not None]
        yield from _in_parts(flow, self.kind, found)
        uses: dict[Op, set[Unit]] = {}
        for unit in units:
            for op in (unit.first.op, unit.second.op, unit.last):
                uses.setdefault(op, set()).add(unit.blocks)
        seen: set[Unit] = set()
        for unit in units:
            if unit.blocks in seen:
                continue
            seen.add(unit.blocks)
            reason = _obstacle(flow, unit, uses)
            name = common_module(unit.names)
            if reason is None:
                site = Site(self.kind, name, unit.names, (tie(unit.up.weight, unit.down, unit.up.block),))
                flow.applied[site] = unit.blocks
                yield site
            else:
                yield Miss(self.kind, name, unit.names, reason)


@dataclass(frozen=True)
class _Branch:
    """A factor of the product: the weight that makes it, and its channels there."""

    op: Op
    weight: Weight
    state: Channels

    @property
    def channels(self) -> Sequence[int]:
        return held(self.state) or ()

    @property
    def block(self) -> Block:
        return self.weight.of_channels(self.channels) if self.weight.is_matrix else self.weight.block


@dataclass(frozen=True)
class _Unit:
    """The pattern by shape alone."""

    first: _Branch
    second: _Branch
    product: Op
    last: Op
    down: Weight
    across: Op | None

    @functools.cached_property
    def blocks(self) -> Unit:
        return self.first.block, self.second.block, self.down.block

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.first.weight.name, self.second.weight.name, self.down.name)))

    @property
    def up(self) -> _Branch:
        return self.second if self.first.state.activations > self.second.state.activations else self.first


def _unit(flow: Flow, product: Op, last: Op) -> _Unit | None:
    """The product before `last`, if its factors are two projections of one value, one of them activated.

    A factor may have passed a weight along another axis since.
    """
    if last.weight is None or last.is_depthwise or len(product.inputs) != 2:
        return None
    feeders = [source for factor in product.inputs if (source := _feeder(flow, factor, last)) is not None]
    if len(feeders) != 2:
        return None
    early, late = sorted(feeders, key=lambda op: op.index)
    across = late if late is not early and source_along(late, _BEFORE_DOWN) is early else None
    sources = [early if source is across else source for source in feeders]
    if len({source_along(source, _ELEMENTWISE) for source in sources}) > 1:
        return None
    first, second = (
        _branch(flow, factor, product, source, across is not None) for factor, source in zip(product.inputs, sources, strict=True)
    )
    if first is None or second is None:
        return None
    if last.weight.name in (first.weight.name, second.weight.name):
        return None  # tied already
    if first.op is second.op and not set(first.channels).isdisjoint(second.channels):
        return None  # x * sigmoid(x) is one activation, not a gate
    if len(first.channels) != len(second.channels):
        return None  # one number for many channels, such as an expert's weight, scales them
    return _Unit(first, second, product, last, last.weight, across)


def _feeder(flow: Flow, factor: Op, last: Op) -> Op | None:
    """What makes a factor: the weight that all ways lead through, or else the only one that fits `last`."""
    feeder = flow.feeder(factor)
    if feeder is not None and held(flow.trace(feeder, factor)[factor]) is not None:
        return feeder
    fitting = _fitting(flow, factor, last)
    return fitting[0] if len(fitting) == 1 else None


def _fitting(flow: Flow, value: Op, last: Op) -> list[Op]:
    return [op for op in flow.makers(value) if could_make(op, last)]


def _product_before(flow: Flow, last: Op) -> Op | None:
    """The first product of two values as wide on the way to `last`, past what shifts or scales it by numbers of its own, as a norm
    written out does.

    Past an activation that is written out, as in h * sigmoid(h), and past values that no matrix that would fit has made, too.
    """
    found: Op | None = None
    op = last.inputs[0] if last.inputs else None
    while op is not None and (op.kind in _BEFORE_DOWN | {Kind.PRODUCT} or op.is_depthwise):
        wide = [source for source in op.inputs if len(op.inputs) == 1 or _size(source, last.in_axis) == _size(op, last.in_axis)]
        if len(wide) > 1:
            found = op if op.kind is Kind.PRODUCT else found
            wide = _carrying(flow, op, wide, last)
        op = wide[0] if len(wide) == 1 else None
    return found


def _carrying(flow: Flow, op: Op, wide: list[Op], last: Op) -> list[Op]:
    """Of several operands, those that may have brought the channels of a product."""
    before = flow.dominator(op)
    if before in wide and op.kind is not Kind.PRODUCT:
        return []  # the sum of a residual block
    if before is not None and flow.is_function(op, before):
        return [before]
    return [source for source in wide if _fitting(flow, source, last)]


def _size(op: Op, axis: int) -> int:
    """The size along an axis counted from the right, 1 where it is broadcast."""
    return op.shape[axis] if len(op.shape) >= -axis else 1


def _branch(flow: Flow, factor: Op, product: Op, source: Op, loosely: bool) -> _Branch | None:
    if source.weight is None:
        return None
    state = flow.trace(source, product, loosely=loosely).get(factor)
    channels = held(state)
    is_factor = channels is not None and source.weight.is_part(channels)
    return _Branch(source, source.weight, state) if is_factor and state is not None else None


def _in_parts(flow: Flow, kind: str, found: Iterable[tuple[Op, Op]]) -> Iterator[Miss]:
    """Units whose gate and values come joined from several uses of one weight, such as each expert's part of it."""
    seen: set[tuple[str, ...]] = set()
    for last, product in found:
        down = last.weight
        assert down is not None
        ups = [op.weight for op in flow.backward(product, _JOINED, lambda op: op.weight is not None) if op.weight is not None]
        names = tuple(dict.fromkeys((*(up.name for up in ups), down.name)))
        fits = all(up.matrix == (2 * down.inputs, down.outputs) for up in ups)
        if len(ups) > 1 and len(names) == 2 and fits and names not in seen:
            seen.add(names)
            joined = f"{names[0]} is applied in {len(ups)} parts that are joined before {down.name}"
            yield Miss(kind, common_module(names), names, f"{joined}: only a weight applied at once is tied")


def _obstacle(flow: Flow, unit: _Unit, uses: dict[Op, set[Unit]]) -> str | None:
    up, down, block = unit.up.weight, unit.down, unit.up.block
    weights = (unit.first.weight, unit.second.weight, down)
    for weight in weights:
        if weight.groups > 1 or not weight.is_matrix:
            return f"{weight.name} is no plain matrix but a convolution with {weight.kernel} kernel and {weight.groups} groups"
    if not down.mirrors(up, len(unit.up.channels)):
        return f"{down.name} is {down.matrix}, {block} is {(len(unit.up.channels), up.inputs)}: not transposes of each other"
    if unit.across is not None:
        name = unit.across.weight.name if unit.across.weight is not None else unit.across.node.name
        return f"a factor before {down.name} passes {name}, which works along another axis: it is no gate of single positions"
    if unit.first.state.activations == unit.second.state.activations:
        which = "both factors" if unit.first.state.activations else "neither factor"
        return f"{which} before {down.name} passed an activation: gate and up cannot be told apart"
    for branch in sorted((unit.first, unit.second), key=lambda branch: branch is not unit.up):
        if (where := leak(flow, branch.op, unit.last, branch.channels)) is not None:
            return f"the value between {branch.block} and {down.name} is read elsewhere too: {where}"
    tags = unit.up.state.tags.expand(unit.product.shape)
    end = arriving(flow.trace(unit.product, unit.last, tags=tags), unit.last)
    arrived = channels_along(end.tags, unit.last.in_axis)
    own = (unit.first.op, unit.second.op)
    if unit.up.state.blended or end.blended:
        return f"the hidden channels of {up.name} are combined with one another before {down.name}"
    if arrived != unit.up.channels:
        return f"the hidden channels of {up.name} reach {down.name} in another order"
    if others := [op.weight.name for op in rivals(flow, unit.product, unit.last) if op.weight is not None and op not in own]:
        return f"{down.name} could use the weight of any of {', '.join((up.name, *others))}: what they make is joined before it"
    for weight, part in zip(weights, unit.blocks, strict=True):
        if (reason := misuse(flow, weight)) is not None:
            return reason
        for reader in flow.readers[weight.name]:
            if reader.weight is not None and reader.weight.block.overlaps(part):
                there = {blocks for blocks in uses.get(reader, ()) if any(map(part.overlaps, blocks))}
                if there != {unit.blocks}:
                    return f"{part} is used a second time, not with {', '.join(name for name in unit.names if name != weight.name)}"
    return None
