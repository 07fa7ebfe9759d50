"""Gated linear units: down(act(gate(x)) * up(x)) holds `up` and uses it as `down` too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pe_fx.flow import Channels, Flow, Op, arriving, channels_along, channels_in
from pe_fx.ops import Kind
from pe_fx.passes.pairs import common_module, tie
from pe_fx.ties import Miss, Site

_BEFORE_DOWN = {Kind.POINTWISE, Kind.NONLINEAR, Kind.NORM, Kind.VIEW}


@dataclass(frozen=True)
class Glu:
    """`down.weight ← up.weightᵀ`, gate and up being two weights or two halves of one.

    The factor that passed an activation is the gate. Source: the feed-forward tie of arXiv 2401.16438, on the linear branch.
    """

    kind: str = "glu"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        seen: set[str] = set()
        for down in flow.ops:
            if down.weight is None or not down.is_projection or down.weight.name in seen or down.weight.name in flow.claimed:
                continue
            found = _match_down(flow, down, self.kind)
            if found is not None:
                seen.add(down.weight.name)
                yield found


def _match_down(flow: Flow, down: Op, kind: str) -> Site | Miss | None:
    product = next(flow.backward(down, _BEFORE_DOWN, lambda op: op.kind is Kind.PRODUCT), None)
    if product is None or down.weight is None or len(product.inputs) != 2:
        return None
    branches = [_branch(flow, factor, product) for factor in product.inputs]
    if branches[0] is None or branches[1] is None:
        return None
    (first, a), (second, b) = branches
    if _origin(first) is not _origin(second) or not all(flow.post_dominates(down, op) for op in (first, second)):
        return None
    names = tuple(dict.fromkeys((first.weight.name, second.weight.name, down.weight.name)))  # type: ignore[union-attr]
    if any(name in flow.claimed for name in names):
        return None
    if first is second and not set(channels_in(a.tags) or ()).isdisjoint(channels_in(b.tags) or ()):
        return None
    if a.activations == b.activations:
        if first is second or not _fits(second, channels_in(b.tags), down):
            return None
        which = "both factors" if a.activations else "neither factor"
        return Miss(kind, common_module(names), names, f"{which} before {down.weight.name} passed an activation: gate and up cannot be told apart")
    up, state = (second, b) if a.activations > b.activations else (first, a)
    channels = channels_in(state.tags)
    if channels is None or not _fits(up, channels, down):
        return None
    arrived = _at_down(flow, product, down, state)
    if arrived is None or sorted(set(arrived)) != channels or len(arrived) != len(channels):
        return Miss(kind, common_module(names), names, f"the channels of {up.weight.name} do not reach {down.weight.name} one to one")  # type: ignore[union-attr]
    for op in (first, second, down):
        readers = {reader.weight.name if reader.weight else reader.name for reader in flow.readers[op.weight.name]}  # type: ignore[union-attr]
        if readers != {op.weight.name}:  # type: ignore[union-attr]
            return Miss(kind, common_module(names), names, f"{op.weight.name} is read by another operation too")  # type: ignore[union-attr]
    flow.carriers.update((first, second, down))
    block = up.weight.of_channels(channels)  # type: ignore[union-attr]
    return Site(kind, common_module(names), names, (tie(up.weight, down.weight, block),))


def _origin(op: Op) -> Op | None:
    """What a weight is applied to, before elementwise operations on it alone."""
    source = op.inputs[0] if op.inputs else None
    while source is not None and source.kind in (Kind.POINTWISE, Kind.NONLINEAR) and len(source.inputs) == 1:
        source = source.inputs[0]
    return source


def _branch(flow: Flow, factor: Op, product: Op) -> tuple[Op, Channels] | None:
    """The weight that makes a factor, and its channels there."""
    source = flow.feeder(factor)
    if source is None or not source.is_projection or source.weight is None or not source.weight.is_matrix:
        return None
    state = flow.trace(source, product).get(factor)
    return None if state is None or state.tags is None else (source, state)


def _fits(up: Op, channels: list[int] | None, down: Op) -> bool:
    assert up.weight is not None and down.weight is not None
    return channels is not None and down.weight.matrix == (up.weight.inputs, len(channels))


def _at_down(flow: Flow, product: Op, down: Op, state: Channels) -> list[int] | None:
    tags = state.tags.expand(product.shape)
    end = arriving(flow.trace(product, down, tags=tags), down)
    return channels_along(end.tags, down.in_axis) if end.tags is not None else None
