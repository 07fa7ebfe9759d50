"""Attention: keys and values share one matrix, queries and output projection the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pe_fx.graph.channels import arriving
from pe_fx.graph.flow import Flow
from pe_fx.graph.operation import Op, Weight, factors, product_labels
from pe_fx.graph.ops import Kind
from pe_fx.graph.tags import channels_along, channels_in, numbered, varying_axes
from pe_fx.passes.pairs import common_module, misuse, tie
from pe_fx.ties import Block, Miss, Site, Tie

_APPLYING = {Kind.PROJECTION, Kind.CONV, Kind.MATMUL, Kind.OTHER}
_ONE_VALUE = {Kind.VIEW, Kind.NONLINEAR, Kind.NORM}
_SCORES = {Kind.VIEW, Kind.POINTWISE, Kind.PRODUCT, Kind.NONLINEAR, Kind.NORM}


Use = tuple[str, Block, str]


@dataclass(frozen=True)
class Attention:
    """`v.weight ← k.weightᵀ` where square, `proj.weight ← q.weightᵀ` where the shapes are transposes, each by itself.

    q, k and v may be separate weights, rows of one (also interleaved per head), or any mixture. Source: arXiv 2401.16438,
    `Q = W_q x, K = W_kv x, V = W_kvᵀ x, out = W_qᵀ a`.
    """

    kind: str = "attention"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        found = [(core, _roles(flow, core)) for core in _cores(flow)]
        uses: dict[Op, set[Use]] = {}
        for _, roles in found:
            for part, use in roles.uses:
                uses.setdefault(part.op, set()).add(use)
        seen: set[tuple[object, ...]] = set()
        claimed = set(flow.claimed)  # by other rules: attentions may share keys and values
        made: set[Tie] = set()
        for core, roles in found:
            names = () if roles.is_known else _makers(flow, core)
            blocks = tuple(part.block for part in roles.parts)
            if (blocks or names) in seen:
                continue
            seen.add(blocks or names)
            if roles.is_known:
                yield from _tie(flow, self.kind, core, roles, uses, made)
            elif names and claimed.isdisjoint(names):
                yield Miss(self.kind, common_module(names), names, _unknown(core, names))


@dataclass(frozen=True)
class Core:
    """Where attention happens: its operands, and the product that averages the values.

    Without q, `k` is under the softmax by itself, and not in a product with queries.
    """

    q: Op | None
    k: Op | None
    v: Op | None
    mix: Op


@dataclass(frozen=True)
class Part:
    """A projection and the output channels of it that play one role."""

    op: Op
    weight: Weight
    channels: Sequence[int]

    @functools.cached_property
    def block(self) -> Block:
        return self.weight.of_channels(self.channels)

    @property
    def matrix(self) -> tuple[int, int]:
        return len(self.channels), self.weight.inputs


@dataclass(frozen=True)
class Roles:
    q: Part | None
    k: Part | None
    v: Part | None
    proj: Part | None

    @property
    def is_known(self) -> bool:
        return self.q is not None or self.k is not None

    @property
    def parts(self) -> list[Part]:
        return [part for part in (self.q, self.k, self.v, self.proj) if part is not None]

    @functools.cached_property
    def uses(self) -> list[tuple[Part, Use]]:
        """What each part is used for: its role, its block, and for values and output projections the weight that they can be tied to."""
        k, q = ("" if part is None else part.weight.name for part in (self.k, self.q))
        found = [(self.q, "queries", ""), (self.k, "keys", ""), (self.v, "values", k), (self.proj, "output", q)]
        return [(part, (role, part.block, partner)) for part, role, partner in found if part is not None]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.weight.name for part in self.parts))


def _cores(flow: Flow) -> Iterator[Core]:
    for op in flow.ops:
        if op.kind is Kind.ATTEND:
            yield Core(op.operands[0], op.operands[1], op.operands[2], op)
        elif op.kind is Kind.SOFTMAX:
            averaged = _value_product(flow, op)
            if averaged is not None:
                q, k = _score_product(flow, op, *averaged) or (None, op)
                yield Core(q, k, v=averaged[1], mix=averaged[2])


def _value_product(flow: Flow, softmax: Op) -> tuple[Op, Op, Op] | None:
    """The attention map as it meets the values, the values, and their product."""
    for product in flow.forward(softmax, _SCORES, lambda op: op.kind is Kind.MATMUL, _mixes_heads):
        pair = factors(product)
        for weights, values in (pair, pair[::-1]):
            if weights is not None and values is not None and values is not softmax and not flow.reaches(softmax, values):
                return weights, values, product
    return None


def _score_product(flow: Flow, softmax: Op, weights: Op, values: Op, mix: Op) -> tuple[Op, Op] | None:
    """q and k: the factors of the product under the softmax. The keys lie along the axis over which the values are averaged."""
    labels = product_labels(mix)
    names = labels[0 if factors(mix)[0] is weights else 1] if labels is not None else ""
    averaged = [axis for axis, label in enumerate(names) if labels is not None and label not in labels[2]]
    for product in sorted(flow.backward(softmax, _SCORES, lambda op: op.kind is Kind.MATMUL, _mixes_heads), key=lambda op: op.index):
        terms = product_labels(product)
        first, second = factors(product)
        if terms is None or first is None or second is None or len(averaged) != 1:
            continue
        for mine, other, k, q in ((terms[1], terms[0], second, first), (terms[0], terms[1], first, second)):
            own = [axis for axis, label in enumerate(terms[2]) if label in mine and label not in other]
            if own and _axis_at(flow, product, own[-1], weights) == averaged[0]:
                return q, k
    return None


def _mixes_heads(op: Op) -> bool:
    """Whether a weight only mixes the attention maps of several heads ("talking heads")."""
    return (
        op.is_projection and op.weight is not None and op.weight.is_matrix and op.weight.inputs == op.weight.outputs and len(op.shape) > 3
    )


def _axis_at(flow: Flow, product: Op, axis: int, value: Op) -> int | None:
    """Where an axis of the product lies in a value made from it."""
    size = product.shape[axis]
    state = flow.trace(product, value, tags=numbered(product.shape, axis), loosely=True)[value]
    axes = varying_axes(state.tags) if isinstance(state.tags, torch.Tensor) else ()
    return axes[0] if len(axes) == 1 else (axis if size == 1 else None)


def _roles(flow: Flow, core: Core) -> Roles:
    q, k, v = (_part(flow, value) for value in (core.q, core.k, core.v))
    return Roles(None, None, None, None) if core.q is None or (q is None and k is None) else Roles(q, k, v, _output(flow, core, v))


def _makers(flow: Flow, core: Core) -> tuple[str, ...]:
    """The weights behind an attention whose queries and keys are no matrix times a value; none where it is no near miss."""
    if core.q is None:
        k, v = _part(flow, core.k), _part(flow, core.v)
        fits = k is not None and v is not None and k.matrix == v.matrix[::-1] and not k.block.overlaps(v.block)
        return Roles(None, k, v, None).names if fits else ()
    values = [value for value in (core.q, core.k, core.v) if value is not None]
    makers = [op for value in values for op in ([value] if _applies(value) else flow.backward(value, _ONE_VALUE, _applies, _adds_constant))]
    return tuple(dict.fromkeys(name for op in makers for name in ([op.weight.name] if op.weight is not None else op.parameters)))


def _applies(op: Op) -> bool:
    return bool(op.parameters) and op.kind in _APPLYING


def _adds_constant(op: Op) -> bool:
    return op.kind is Kind.POINTWISE and len(op.inputs) == 1


def _unknown(core: Core, names: tuple[str, ...]) -> str:
    if core.q is None:
        return f"{core.mix.node.name} averages by a softmax that is not of queries times keys: {', '.join(names)}"
    return f"neither the queries nor the keys of {core.mix.node.name} are made by one matrix alone: {', '.join(names)}"


def _part(flow: Flow, value: Op | None) -> Part | None:
    """The projection that makes a value, and which of its channels are in it."""
    source = flow.feeder(value) if value is not None else None
    if value is None or source is None or not source.is_projection or source.weight is None or not source.weight.is_matrix:
        return None
    channels = channels_in(flow.trace(source, value)[value].tags)
    return None if channels is None else Part(source, source.weight, channels)


def _output(flow: Flow, core: Core, v: Part | None) -> Part | None:
    """The next projection after the averaged values, if it works on their channels."""
    if v is None:
        return None
    for op in flow.inevitable(core.mix):
        if op.kind in (Kind.REDUCE, Kind.POOL):
            return None
        if not op.is_projection:
            continue
        if op.weight is None or not op.weight.is_matrix:
            return None
        end = arriving(flow.trace(v.op, op, carriers=(core.mix,)), op)
        arrived = channels_along(end.tags, op.in_axis) if end.tags is not None else None
        if arrived is None:
            return None
        return Part(op, op.weight, range(op.weight.outputs))
    return None


def _averages_channels(flow: Flow, core: Core, v: Part) -> bool:
    """Whether the average goes over the values' own channels, as in cross-covariance attention."""
    labels = product_labels(core.mix)
    for value, names in zip(factors(core.mix), labels[:2] if labels is not None else (), strict=False):
        if value is core.v and value is not None and labels is not None:
            return any(names[axis] not in labels[2] for axis in varying_axes(flow.trace(v.op, value)[value].tags))
    return False


def _tie(flow: Flow, kind: str, core: Core, roles: Roles, uses: dict[Op, set[Use]], made: set[Tie]) -> Iterator[Site | Miss]:
    ties: list[Tie] = []
    misses: list[Miss] = []
    halves = [(roles.k, roles.v, "values", "keys"), (roles.q, roles.proj, "the output projection", "queries")]
    for source, target, what, whose in halves:
        reason: str | None
        if source is None:
            reason = f"the {whose} of {core.mix.node.name} are not made by one weight alone"
        elif target is None:
            crossed = source is roles.q and roles.v is not None and _averages_channels(flow, core, roles.v)
            why = f"{core.mix.node.name} averages over channels, not over positions" if crossed else "no projection of their own was found"
            reason = f"{what} cannot use the weight of the {whose}, {source.block}: {why}"
        else:
            reason = _half_obstacle(flow, roles, source, target, uses)
        if reason is not None:
            weights = tuple(dict.fromkeys(part.weight.name for part in (source, target) if part is not None)) or roles.names
            misses.append(Miss(kind, common_module(weights), weights, reason))
            if target is roles.proj:  # it may yet be the end of a pattern around this one
                roles = dataclasses.replace(roles, proj=None)
        elif source is not None and target is not None:
            ties.append(tie(source.weight, target.weight, source.block, target.block))
    flow.carriers.update({core.mix, *(part.op for part in roles.parts)})
    flow.carriers.update(op for part in roles.parts[:1] for op in flow.between(part.op, core.mix) if _mixes_heads(op))
    ties = [tie for tie in ties if tie not in made]  # another attention may use the same keys and values
    made.update(ties)
    if ties:
        yield Site(kind, common_module(roles.names), roles.names, tuple(ties))
    yield from misses


def _half_obstacle(flow: Flow, roles: Roles, source: Part, target: Part, uses: dict[Op, set[Use]]) -> str | None:
    if source.matrix != target.matrix[::-1]:
        return f"{target.block} is {target.matrix}, {source.block} is {source.matrix}: not transposes of each other"
    if any(target.block.overlaps(part.block) for part in roles.parts if part is not target):
        return f"{target.block} serves two roles in one attention"
    for part in (source, target):
        if (reason := misuse(flow, part.weight)) is not None:
            return reason
    own = {use for _, use in roles.uses}
    readers = [reader for reader in flow.readers[target.weight.name] if reader.weight and reader.weight.block.overlaps(target.block)]
    if any(reader not in uses or not {use for use in uses[reader] if use[1].overlaps(target.block)} <= own for reader in readers):
        return f"{target.block} is used a second time, in another role or with other weights"
    return None
