"""Attention: keys and values share one matrix, queries and output projection the other."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pe_fx.graph.channels import arriving, held, held_in_sums
from pe_fx.graph.flow import Flow, source_along
from pe_fx.graph.operation import Op, Weight
from pe_fx.graph.ops import Kind
from pe_fx.graph.tags import channels_along, channels_in, numbered, shrunk, varying_axes
from pe_fx.graph.walks import reached
from pe_fx.passes.cores import Core, Operand, cores, mixes_heads, own_channels, query_axis, unnormalised
from pe_fx.passes.pairs import common_module, misuse, tie
from pe_fx.ties import Block, Miss, Site, Tie

_APPLYING = {Kind.PROJECTION, Kind.CONV, Kind.MATMUL, Kind.OTHER}
_ONE_VALUE = {Kind.VIEW, Kind.NONLINEAR, Kind.NORM}
_ONWARDS = {Kind.VIEW, Kind.POINTWISE, Kind.PRODUCT, Kind.NONLINEAR, Kind.NORM}


Use = tuple[str, Block, str]


@dataclass(frozen=True)
class Attention:
    """`v.weight ← k.weightᵀ` where square, `proj.weight ← q.weightᵀ` where the shapes are transposes, each by itself.

    q, k and v may be separate weights, rows of one (also interleaved per head), or any mixture; streams that are joined along the
    sequence have their own, and are tied each by itself. What rotates, masks, caches or joins them is no obstacle, whatever its origin.
    Products of the three without a softmax, as in linear attention, are told as misses.
    Source: arXiv 2401.16438, `Q = W_q x, K = W_kv x, V = W_kvᵀ x, out = W_qᵀ a`.
    """

    kind: str = "attention"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        found = [(core, _roles(flow, core)) for core in cores(flow)]
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
        for mix, values in unnormalised(flow, [core for core, _ in found]):
            names = _makers_of_all(flow, values)
            if names and names not in seen and claimed.isdisjoint(names):
                seen.add(names)
                reason = f"{mix.node.name} multiplies three values without a softmax: only attention by one is tied"
                yield Miss(self.kind, common_module(names), names, f"{reason} ({', '.join(names)})")


@dataclass(frozen=True)
class Part:
    """A projection, the output channels of it that play one role, and the positions that hold its values (None for all).

    `in_order`: whether the values' channels arrive as they lie.
    """

    op: Op
    weight: Weight
    channels: Sequence[int]
    positions: frozenset[int] | None = None
    in_order: bool = True

    @functools.cached_property
    def block(self) -> Block:
        return self.weight.of_channels(self.channels)

    @property
    def matrix(self) -> tuple[int, int]:
        return len(self.channels), self.weight.inputs

    def mirrors(self, other: Part) -> bool:
        """Whether its matrix has the shape of the other's transpose."""
        return self.matrix == other.matrix[::-1] and self.block.numel == other.block.numel

    def meets(self, other: Part) -> bool:
        """Whether both have values at the same positions."""
        return self.positions is None or other.positions is None or not self.positions.isdisjoint(other.positions)


@dataclass(frozen=True)
class Half:
    """What may be tied to what: values to keys, or output projections to queries; several where streams are joined or values added."""

    sources: tuple[Part, ...]
    targets: tuple[Part, ...]
    whose: str
    what: str

    @functools.cached_property
    def fitting(self) -> list[tuple[Part, Part]]:
        couples = [(source, target) for source in self.sources for target in self.targets]
        if len(couples) == 1:  # should it not fit, that is said
            return couples
        return [(source, target) for source, target in couples if source.mirrors(target) and source.meets(target)]

    @functools.cached_property
    def couples(self) -> list[tuple[Part, Part]]:
        """Of those that fit, the ones of which neither fits another as well."""
        counts = Counter(part for couple in self.fitting for part in couple)
        return [couple for couple in self.fitting if counts[couple[0]] == counts[couple[1]] == 1]

    @property
    def contested(self) -> list[Part]:
        settled = [part for couple in self.couples for part in couple]
        return [part for part in dict.fromkeys(part for couple in self.fitting for part in couple) if part not in settled]


@dataclass(frozen=True)
class Roles:
    """The projections behind one attention. Those that modulate what others make are among them."""

    q: tuple[Part, ...] = ()
    k: tuple[Part, ...] = ()
    v: tuple[Part, ...] = ()
    proj: tuple[Part, ...] = ()

    @property
    def is_known(self) -> bool:
        return bool(self.q or self.k)

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.q + self.k + self.v + self.proj

    @functools.cached_property
    def halves(self) -> tuple[Half, Half]:
        return Half(self.k, self.v, "keys", "values"), Half(self.q, self.proj, "queries", "the output projection")

    @functools.cached_property
    def uses(self) -> list[tuple[Part, Use]]:
        """What each part is used for: its role, its block, and for values and output projections the weight that they can be tied to."""
        found: list[tuple[Part, Use]] = []
        for half in self.halves:
            partners = {target: source.weight.name for source, target in half.couples}
            found += [(part, (half.whose, part.block, "")) for part in half.sources]
            found += [(part, (half.what, part.block, partners.get(part, ""))) for part in half.targets]
        return found

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.weight.name for part in self.parts))


def _roles(flow: Flow, core: Core) -> Roles:
    if core.q is None:
        return Roles()
    q, k, v = (_parts(flow, operand, core.mix) for operand in (core.q, core.k, core.v))
    if max(map(len, (q, k, v))) > 1:  # streams that are joined have positions of their own
        q, k, v = (_placed(flow, operand, parts) for operand, parts in ((core.q, q), (core.k, k), (core.v, v)))
    return Roles(q, k, v, _outputs(flow, core, q, v)) if q or k else Roles()


def _makers(flow: Flow, core: Core) -> tuple[str, ...]:
    """The weights behind an attention whose queries and keys are no matrix times a value; none where it is no near miss."""
    if core.q is None:
        k, v = _parts(flow, core.k, core.mix), _parts(flow, core.v, core.mix)
        fits = len(k) == len(v) == 1 and k[0].matrix == v[0].matrix[::-1] and not k[0].block.overlaps(v[0].block)
        return Roles(k=k, v=v).names if fits else ()
    values = [operand.value for operand in core.operands]
    makers = [op for value in values for op in ([value] if _applies(value) else flow.backward(value, _ONE_VALUE, _applies, _adds_constant))]
    return tuple(dict.fromkeys(name for op in makers for name in ([op.weight.name] if op.weight is not None else op.parameters)))


def _makers_of_all(flow: Flow, values: Sequence[Op]) -> tuple[str, ...]:
    """The weights that make these values, one matrix each, where one of them has the shape of another's transpose."""
    parts = []
    for value in values:
        makers = flow.makers(value)
        channels = held(flow.trace(makers[0], value)[value]) if len(makers) == 1 and makers[0].is_projection else None
        if channels is None or makers[0].weight is None or not makers[0].weight.is_matrix:
            return ()
        parts.append(Part(makers[0], makers[0].weight, channels))
    fits = any(a.matrix == b.matrix[::-1] for a, b in itertools.combinations(parts, 2))
    return tuple(dict.fromkeys(part.weight.name for part in parts)) if fits else ()


def _applies(op: Op) -> bool:
    return bool(op.parameters) and op.kind in _APPLYING


def _adds_constant(op: Op) -> bool:
    return op.kind is Kind.POINTWISE and len(op.inputs) == 1


def _unknown(core: Core, names: tuple[str, ...]) -> str:
    if core.q is None:
        return f"{core.mix.node.name} averages by a softmax that is not of queries times keys: {', '.join(names)}"
    return f"neither the queries nor the keys of {core.mix.node.name} are made by one matrix alone: {', '.join(names)}"


def _parts(flow: Flow, operand: Operand | None, mix: Op) -> tuple[Part, ...]:
    """The projections that make a value, alone or side by side, and which of their channels are in it."""
    if operand is None:
        return ()
    source = flow.feeder(operand.value)
    alone = _part(flow, source, operand) if source is not None else None
    if alone is not None:
        return (alone,)
    makers = [op for op in flow.makers(operand.value) if op.is_projection and _serves_attention_only(flow, op, mix)]
    return tuple(part for op in makers if (part := _part(flow, op, operand)) is not None)


def _part(flow: Flow, source: Op, operand: Operand) -> Part | None:
    if not source.is_projection or source.weight is None or not source.weight.is_matrix:
        return None
    states = flow.trace(source, operand.value)
    tags, channels = states[operand.value].tags, held_in_sums(states, operand.value)
    if channels is None or not source.weight.is_part(channels):
        return None
    if _differ_along(tags, operand.axis):  # a matrix along the positions, unless none is behind it
        behind = source_along(source, _ONE_VALUE | {Kind.POINTWISE})
        part = _before_positions_are_mixed(flow, behind, operand) if behind is not None else None
        if part is not None:
            return part
    return Part(source, source.weight, channels)


def _placed(flow: Flow, operand: Operand | None, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The same parts with the positions that hold their values."""
    if operand is None:
        return parts
    tags = {part: flow.trace(part.op, operand.value)[operand.value].tags for part in parts}
    return tuple(
        dataclasses.replace(part, positions=_positions_in(tags[part], operand.axis)) if isinstance(tags[part], Tensor) else part
        for part in parts
    )


def _before_positions_are_mixed(flow: Flow, source: Op, operand: Operand) -> Part | None:
    if not source.is_projection or source.weight is None or not source.weight.is_matrix:
        return None
    state = flow.trace(source, operand.value, loosely=True)[operand.value]
    channels = held(state)
    return None if channels is None or _differ_along(state.tags, operand.axis) else Part(source, source.weight, channels)


def _differ_along(tags: Tensor, axis: int) -> bool:
    """Whether other channels stand at other positions of an axis, and not the same ones at some of them."""
    if axis % tags.dim() not in varying_axes(tags):
        return False
    largest = shrunk(tags).amax(axis, keepdim=True)
    return not bool(((shrunk(tags) == largest) | (shrunk(tags) == 0)).all())


def _positions_in(tags: Tensor, axis: int) -> frozenset[int] | None:
    """Where along an axis a value holds channels of its origin; None for everywhere."""
    small = shrunk(tags, keep=axis % tags.dim()).movedim(axis, 0).flatten(1).amax(1)
    return None if bool((small > 0).all()) else frozenset(small.nonzero().flatten().tolist())


def _serves_attention_only(flow: Flow, source: Op, mix: Op) -> bool:
    """Whether what an operation makes meets neither a residual stream nor another weight on the ways into attention or past it."""
    large = ((value, op) for value, op in flow.joining(source, mix) if value.shape == op.shape)
    if any(flow.modulates(source, op) and not _is_like(flow, value, source) for value, op in large):
        return False
    ways = set(reached(source, lambda op: () if op is mix else flow.users[op])) - {source, mix}
    return not any(op.weight is not None and not op.is_depthwise and _meets_channels(flow, source, op) for op in ways)


def _is_like(flow: Flow, value: Op, source: Op) -> bool:
    """Whether a value is made by matrices of the same shape as that of `source`, as the values of another layer are."""
    makers = flow.makers(value)
    alike = [op for op in makers if op.is_projection and op.weight and source.weight and op.weight.matrix == source.weight.matrix]
    return bool(makers) and alike == makers


def _meets_channels(flow: Flow, source: Op, op: Op) -> bool:
    tags = arriving(flow.trace(source, op, loosely=True), op).tags
    return isinstance(tags, Tensor) and op.in_axis % tags.dim() in varying_axes(tags)


def _outputs(flow: Flow, core: Core, q: tuple[Part, ...], v: tuple[Part, ...]) -> tuple[Part, ...]:
    """The next projections after the averaged values that work on their channels; several where streams part."""
    if core.v is None:
        return ()
    found = _next_projection(flow, core, {part.op for part in q + v})
    if found is not None:
        part = _output(flow, core, v, found)
        if part is not None and len(q) > 1:
            part = dataclasses.replace(part, positions=_queries_at(flow, core, found))
        return () if part is None else (part,)
    if len(q) < 2:
        return ()
    ends = list(flow.forward(core.mix, _ONWARDS, lambda op: op.kind not in _ONWARDS))
    where = {end: _queries_at(flow, core, end) for end in ends}
    parts = []
    for end in ends:
        positions = where[end]
        others = [where[other] for other in ends if other is not end]
        if positions is None or any(other is None or not positions.isdisjoint(other) for other in others) or not end.is_projection:
            continue
        part = _output(flow, core, v, end)
        if part is not None:
            parts.append(dataclasses.replace(part, positions=positions))
    return tuple(parts)


def _next_projection(flow: Flow, core: Core, own: set[Op]) -> Op | None:
    """The first one that everything from the averaged values goes through, before they are added to what queries and values are made of.

    These themselves may be added.
    """

    def meets_stream(op: Op) -> bool:
        if op.kind is not Kind.POINTWISE or not flow.modulates(core.mix, op):
            return False
        added = (flow.makers(value) for value, at in flow.joining(core.mix, op) if at is op)
        return not all(makers and own.issuperset(makers) for makers in added)

    for op in flow.inevitable(core.mix):
        if op.is_projection:  # no stream of its own may have left the way before
            return None if any(between.is_projection for between in flow.between(core.mix, op)) else op
        if op.kind in (Kind.REDUCE, Kind.POOL) or meets_stream(op):
            return None
    return None


def _output(flow: Flow, core: Core, v: tuple[Part, ...], op: Op) -> Part | None:
    """The projection, if the values' channels arrive at it, and at which of its input channels."""
    if core.v is None or op.weight is None or not op.weight.is_matrix:
        return None
    value = core.v.value
    for tags in [_channels_at(flow, part, value) for part in v] or [own_channels(core)]:
        end = arriving(flow.trace(value, op, tags=tags, carriers=(core.mix,)), op)
        if not isinstance(end.tags, Tensor):
            continue
        arrived = channels_along(end.tags, op.in_axis)
        if arrived is not None:
            return Part(op, op.weight, range(op.weight.outputs), in_order=_is_in_order(arrived))
    return None


def _channels_at(flow: Flow, part: Part, value: Op) -> Any:
    tags = flow.trace(part.op, value)[value].tags
    return tags if isinstance(tags, Tensor) else flow.trace(part.op, value, loosely=True)[value].tags


def _is_in_order(channels: Sequence[int]) -> bool:
    """Whether channels that arrive once each do so in order; those of values that several heads share arrive as often."""
    return isinstance(channels, range) or len(set(channels)) < len(channels) or list(channels) == sorted(channels)


def _queries_at(flow: Flow, core: Core, end: Op) -> frozenset[int] | None:
    """The positions of the queries that an operation reads the averaged values of; None where that cannot be told."""
    axis = query_axis(flow, core)
    if axis is None:
        return None
    states = flow.trace(core.mix, end, tags=numbered(core.mix.shape, axis))
    found = [channels_in(states[source].tags) for source in end.inputs if source in states]
    return None if not found or any(one is None for one in found) else frozenset(index for one in found for index in one or ())


def _averages_channels(flow: Flow, core: Core, v: Part) -> bool:
    """Whether the average goes over the values' own channels, as in cross-covariance attention."""
    if core.v is None:
        return False
    tags = flow.trace(v.op, core.v.value, loosely=True)[core.v.value].tags
    return isinstance(tags, Tensor) and _differ_along(tags, core.v.axis)


def _tie(flow: Flow, kind: str, core: Core, roles: Roles, uses: dict[Op, set[Use]], made: set[Tie]) -> Iterator[Site | Miss]:
    ties: list[Tie] = []
    misses: list[Miss] = []
    refused: set[Part] = set()

    def miss(parts: Sequence[Part], reason: str) -> None:
        weights = tuple(dict.fromkeys(part.weight.name for part in parts)) or roles.names
        misses.append(Miss(kind, common_module(weights), weights, reason))
        refused.update(parts)

    for half in roles.halves:
        if not half.sources:
            miss(half.targets, f"the {half.whose} of {core.mix.node.name} are not made by one weight alone")
        elif not half.targets:
            crossed = half.sources == roles.q and any(_averages_channels(flow, core, part) for part in roles.v)
            why = f"{core.mix.node.name} averages over channels, not over positions" if crossed else "no projection of their own was found"
            for source in half.sources:
                miss([source], f"{half.what} cannot use the weight of the {half.whose}, {source.block}: {why}")
        elif not half.fitting:
            miss((*half.sources, *half.targets), _shapes(half.sources[0], half.targets[0]))
        elif half.contested:
            blocks = ", ".join(dict.fromkeys(str(part.block) for part in half.contested))
            miss(half.contested, f"{half.what} could use the weight of the {half.whose} in several ways: {blocks}")
        for source, target in half.couples:
            if (reason := _half_obstacle(flow, roles, source, target, uses)) is not None:
                miss([source, target], reason)
            else:
                ties.append(tie(source.weight, target.weight, source.block, target.block))
    proj = tuple(part for part in roles.proj if part not in refused)  # the others may yet be the end of a pattern around this one
    roles = dataclasses.replace(roles, proj=proj)
    flow.carry((core.mix, *(part.op for part in roles.parts)))
    flow.carry(op for part in roles.parts[:1] for op in flow.between(part.op, core.mix) if mixes_heads(op))
    ties = [tie for tie in ties if tie not in made]  # another attention may use the same keys and values
    made.update(ties)
    if ties:
        site = Site(kind, common_module(roles.names), roles.names, tuple(ties))
        flow.applied[site] = tuple(part.block for part in roles.parts)
        yield site
    yield from misses


def _shapes(source: Part, target: Part) -> str:
    return f"{target.block} is {target.matrix}, {source.block} is {source.matrix}: not transposes of each other"


def _half_obstacle(flow: Flow, roles: Roles, source: Part, target: Part, uses: dict[Op, set[Use]]) -> str | None:
    if not source.mirrors(target):
        return _shapes(source, target)
    if any(target.block.overlaps(part.block) for part in roles.parts if part is not target):
        return f"{target.block} serves two roles in one attention"
    if not target.in_order:
        return f"the channels of the values reach {target.block} in another order"
    for part in (source, target):
        if (reason := misuse(flow, part.weight)) is not None:
            return reason
    own = {use for _, use in roles.uses}
    readers = [reader for reader in flow.readers[target.weight.name] if reader.weight and reader.weight.block.overlaps(target.block)]
    if any(reader not in uses or not {use for use in uses[reader] if use[1].overlaps(target.block)} <= own for reader in readers):
        return f"{target.block} is used a second time, in another role or with other weights"
    return None
