"""Gated linear units: down(act(gate(x)) * up(x)) holds `up` and uses it as `down` too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pe_fx.flow import Channels, Flow, Op, Weight, arriving, channels_along, channels_in
from pe_fx.ops import Kind
from pe_fx.passes.pairs import common_module, misuse, tie
from pe_fx.ties import Miss, Site

_BEFORE_DOWN = {Kind.POINTWISE, Kind.NONLINEAR, Kind.NORM, Kind.VIEW}


@dataclass(frozen=True)
class Glu:
    """`down.weight ← up.weightᵀ`, gate and up being two weights or two halves of one.

    The factor that passed more activations is the gate. Source: the feed-forward tie of arXiv 2401.16438, on the linear branch.
    """

    kind: str = "glu"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        units = {op: unit for op in flow.ops if (unit := _unit(flow, op)) is not None}
        seen: set[tuple[str, ...]] = set()
        for unit in units.values():
            if unit.names in seen or any(name in flow.claimed for name in unit.names):
                continue
            seen.add(unit.names)
            reason = _obstacle(flow, unit, units)
            name = common_module(unit.names)
            if reason is not None:
                yield Miss(self.kind, name, unit.names, reason)
                continue
            flow.carriers.update(op for weight in unit.names for op in flow.readers[weight])
            block = unit.up.weight.of_channels(unit.channels)
            yield Site(self.kind, name, unit.names, (tie(unit.up.weight, unit.down, block),))


@dataclass(frozen=True)
class _Branch:
    """A factor of the product: the weight that makes it, and its channels there."""

    op: Op
    weight: Weight
    state: Channels


@dataclass(frozen=True)
class _Unit:
    """The pattern by shape alone."""

    first: _Branch
    second: _Branch
    product: Op
    last: Op
    down: Weight

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.first.weight.name, self.second.weight.name, self.down.name)))

    @property
    def up(self) -> _Branch:
        return self.second if self.first.state.activations > self.second.state.activations else self.first

    @property
    def channels(self) -> list[int]:
        return channels_in(self.up.state.tags) or []


def _unit(flow: Flow, last: Op) -> _Unit | None:
    if not last.is_projection or last.weight is None:
        return None
    product = next(flow.backward(last, _BEFORE_DOWN, lambda op: op.kind is Kind.PRODUCT), None)
    if product is None or len(product.inputs) != 2:
        return None
    first, second = (_branch(flow, factor, product) for factor in product.inputs)
    if first is None or second is None or _origin(first.op) is not _origin(second.op):
        return None
    if not flow.post_dominates(last, first.op) or not flow.post_dominates(last, second.op):
        return None
    own = [set(channels_in(branch.state.tags) or ()) for branch in (first, second)]
    if first.op is second.op and not own[0].isdisjoint(own[1]):
        return None  # x * sigmoid(x) is one activation, not a gate
    unit = _Unit(first, second, product, last, last.weight)
    fits = last.weight.matrix == (unit.up.weight.inputs, len(unit.channels))
    return unit if fits and last.weight.name not in (first.weight.name, second.weight.name) else None


def _branch(flow: Flow, factor: Op, product: Op) -> _Branch | None:
    source = flow.feeder(factor)
    if source is None or not source.is_projection or source.weight is None or not source.weight.is_matrix:
        return None
    state = flow.trace(source, product).get(factor)
    return None if state is None or state.tags is None else _Branch(source, source.weight, state)


def _origin(op: Op) -> Op | None:
    """What a weight is applied to, before elementwise operations on it alone."""
    source = op.inputs[0] if op.inputs else None
    while source is not None and source.kind in (Kind.POINTWISE, Kind.NONLINEAR) and len(source.inputs) == 1:
        source = source.inputs[0]
    return source


def _obstacle(flow: Flow, unit: _Unit, units: dict[Op, _Unit]) -> str | None:
    if unit.first.state.activations == unit.second.state.activations:
        which = "both factors" if unit.first.state.activations else "neither factor"
        return f"{which} before {unit.down.name} passed an activation: gate and up cannot be told apart"
    tags = unit.up.state.tags.expand(unit.product.shape)
    end = arriving(flow.trace(unit.product, unit.last, tags=tags), unit.last)
    arrived = channels_along(end.tags, unit.last.in_axis)
    if arrived is None or sorted(arrived) != unit.channels:
        return f"the channels of {unit.up.weight.name} do not reach {unit.down.name} one to one"
    for weight in (unit.first.weight, unit.second.weight, unit.down):
        if (reason := misuse(flow, weight)) is not None:
            return reason
    for reader in flow.readers[unit.down.name]:
        if reader not in units or units[reader].names != unit.names:
            return f"{unit.down.name} is used a second time, not with {unit.up.weight.name}"
    return None
