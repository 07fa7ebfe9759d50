"""Attention: keys and values share one matrix, queries and output projection the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pe_fx.flow import Channels, Flow, Op, Weight, arriving, channels_along, channels_in, expand_along, factors, product_labels, varying_axes
from pe_fx.ops import Kind
from pe_fx.passes.pairs import common_module, tie
from pe_fx.ties import Block, Miss, Site, Tie

_SCORES = {Kind.VIEW, Kind.POINTWISE, Kind.PRODUCT, Kind.NONLINEAR, Kind.NORM}


@dataclass(frozen=True)
class Attention:
    """`v.weight ← k.weightᵀ` where square, `proj.weight ← q.weightᵀ` where the shapes are transposes, each by itself.

    q, k and v may be separate weights, rows of one (also interleaved per head), or any mixture. Source: arXiv 2401.16438,
    `Q = W_q x, K = W_kv x, V = W_kvᵀ x, out = W_qᵀ a`.
    """

    kind: str = "attention"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        seen: set[tuple[str, ...]] = set()
        for core in _cores(flow):
            roles = _roles(flow, core)
            if roles is None:
                continue
            names = roles.names
            if names in seen or any(name in flow.claimed for name in names):
                continue
            seen.add(names)
            yield from _tie(flow, self.kind, core, roles)


@dataclass(frozen=True)
class Core:
    """Where attention happens: its operands, and the product that averages the values."""

    q: Op | None
    k: Op | None
    v: Op | None
    mix: Op


@dataclass(frozen=True)
class Part:
    """A projection and the output channels of it that play one role."""

    op: Op
    weight: Weight
    channels: tuple[int, ...]

    @property
    def block(self) -> Block:
        return self.weight.of_channels(self.channels)

    @property
    def matrix(self) -> tuple[int, int]:
        return len(self.channels), self.weight.inputs


@dataclass(frozen=True)
class Roles:
    q: Part
    k: Part
    v: Part | None
    proj: Part | None

    @property
    def parts(self) -> list[Part]:
        return [part for part in (self.q, self.k, self.v, self.proj) if part is not None]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.weight.name for part in self.parts))


def _cores(flow: Flow) -> Iterator[Core]:
    for op in flow.ops:
        if op.kind is Kind.ATTEND:
            yield Core(*op.operands[:3], mix=op)
        elif op.kind is Kind.SOFTMAX:
            scores = _score_product(flow, op)
            mix = _value_product(flow, op)
            if scores is not None and mix is not None:
                yield Core(*scores, *mix)


def _score_product(flow: Flow, softmax: Op) -> tuple[Op, Op] | None:
    """q and k: the factors of the product under the softmax, told apart by the axis that the softmax normalises."""
    for product in sorted(flow.backward(softmax, _SCORES, lambda op: op.kind is Kind.MATMUL), key=lambda op: op.index):
        labels = product_labels(product)
        pair = factors(product)
        if labels is None or pair[0] is None or pair[1] is None:
            continue
        for mine, other, k, q in ((labels[1], labels[0], pair[1], pair[0]), (labels[0], labels[1], pair[0], pair[1])):
            own = [axis for axis, label in enumerate(labels[2]) if label in mine and label not in other]
            if own and _axis_at(flow, product, own[-1], softmax) == _softmax_axis(softmax):
                return q, k
    return None


def _softmax_axis(softmax: Op) -> int | None:
    axis = softmax.node.kwargs.get("dim", softmax.node.args[1] if len(softmax.node.args) > 1 else -1)
    return axis % len(softmax.shape) if isinstance(axis, int) else None


def _axis_at(flow: Flow, product: Op, axis: int, softmax: Op) -> int | None:
    """Where an axis of the product lies in the softmax's operand."""
    size = product.shape[axis]
    tags = expand_along(torch.arange(1.0, size + 1, dtype=torch.float64), product.shape, axis)
    source = softmax.inputs[0]
    state = Channels(tags) if source is product else flow.trace(product, softmax, tags=tags, joins=True).get(source)
    if state is None or state.tags is None:
        return None
    axes = varying_axes(state.tags)
    return axes[0] if len(axes) == 1 else (axis if size == 1 else None)


def _value_product(flow: Flow, softmax: Op) -> tuple[Op, Op] | None:
    """v and the product that averages it."""
    for product in flow.forward(softmax, _SCORES, lambda op: op.kind is Kind.MATMUL):
        for factor in factors(product):
            if factor is not None and factor is not softmax and not flow.reaches(softmax, factor):
                return factor, product
    return None


def _roles(flow: Flow, core: Core) -> Roles | None:
    q, k, v = (_part(flow, value) for value in (core.q, core.k, core.v))
    if q is None or k is None:
        return None
    return Roles(q, k, v, _output(flow, core, v))


def _part(flow: Flow, value: Op | None) -> Part | None:
    """The projection that makes a value, and which of its channels are in it."""
    source = flow.feeder(value) if value is not None else None
    if value is None or source is None or not source.is_projection or source.weight is None or not source.weight.is_matrix:
        return None
    channels = channels_in(flow.trace(source, value)[value].tags)
    return None if channels is None else Part(source, source.weight, tuple(channels))


def _output(flow: Flow, core: Core, v: Part | None) -> Part | None:
    """The next projection after the averaged values, if it works on their channels."""
    if v is None:
        return None
    for op in flow.inevitable(core.mix):
        if not op.is_projection:
            continue
        if op.weight is None or not op.weight.is_matrix:
            return None
        end = arriving(flow.trace(v.op, op, carriers=(core.mix,)), op)
        arrived = channels_along(end.tags, op.in_axis) if end.tags is not None else None
        if arrived is None:
            return None
        return Part(op, op.weight, tuple(range(op.weight.outputs)))
    return None


def _tie(flow: Flow, kind: str, core: Core, roles: Roles) -> Iterator[Site | Miss]:
    ties: list[Tie] = []
    misses: list[Miss] = []
    halves = [(roles.k, roles.v, "values", "keys"), (roles.q, roles.proj, "the output projection", "queries")]
    for source, target, what, whose in halves:
        if target is None:
            reason: str | None = f"{what} cannot use the weight of the {whose}, {source.block}: no projection of their own was found"
            weights: tuple[str, ...] = (source.weight.name,)
        else:
            reason = _half_obstacle(flow, roles, source, target)
            weights = tuple(dict.fromkeys((source.weight.name, target.weight.name)))
        if reason is not None:
            misses.append(Miss(kind, common_module(weights), weights, reason))
            if target is roles.proj:  # it may yet be the end of a pattern around this one
                roles = dataclasses.replace(roles, proj=None)
        elif target is not None:
            ties.append(tie(source.weight, target.weight, source.block, target.block))
    flow.carriers.update({core.mix, *(part.op for part in roles.parts)})
    if ties:
        yield Site(kind, common_module(roles.names), roles.names, tuple(ties))
    yield from misses


def _half_obstacle(flow: Flow, roles: Roles, source: Part, target: Part) -> str | None:
    if source.matrix != target.matrix[::-1]:
        return f"{target.block} is {target.matrix}, {source.block} is {source.matrix}: not transposes of each other"
    if any(target.block.overlaps(part.block) for part in roles.parts if part is not target):
        return f"{target.block} serves two roles in one attention"
    for part in (source, target):
        for reader in flow.readers[part.weight.name]:
            if reader.weight is None or reader.weight.name != part.weight.name:
                return f"{part.weight.name} is read by {reader.name} too ({reader.node.name})"
    return None
