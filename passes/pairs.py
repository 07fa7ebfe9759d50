"""What the rules for two weights in a row have in common: the closed region from one weight to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pe_fx.flow import Channels, Flow, Op, Weight, arriving, channels_along, varying_axes
from pe_fx.ops import Kind
from pe_fx.ties import Block, Miss, Site, Tie

_HARMLESS = {Kind.VIEW, Kind.POINTWISE, Kind.NONLINEAR, Kind.PRODUCT, Kind.NORM, Kind.POOL, Kind.CONV, Kind.SOFTMAX, Kind.REDUCE}


@dataclass(frozen=True)
class Pair:
    """Two weights in a row: everything that leaves `first` goes to `second`, and `second` gets nothing else."""

    first: Op
    second: Op
    region: tuple[Op, ...]

    @property
    def weights(self) -> tuple[Weight, Weight]:
        assert self.first.weight is not None and self.second.weight is not None
        return self.first.weight, self.second.weight

    @property
    def names(self) -> tuple[str, str]:
        first, second = self.weights
        return first.name, second.name

    @property
    def is_transposed(self) -> bool:
        first, second = self.weights
        return first.matrix == second.matrix[::-1]

    @property
    def is_bottleneck(self) -> bool:
        """Whether 1x1 convolutions enclose something that looks beyond one position."""
        spatial = any(op.kind in (Kind.CONV, Kind.MATMUL, Kind.ATTEND) for op in self.region)
        return spatial and all(weight.is_convolution for weight in self.weights)


def pairs(flow: Flow) -> Iterator[Pair]:
    """Every pair of matrix weights that no site has claimed, in dataflow order."""
    for first in flow.ops:
        if _is_matrix(first) and first not in flow.carriers and not _is_claimed(flow, first):
            second = following(flow, first)
            if second is not None and not _is_claimed(flow, second):
                yield Pair(first, second, tuple(flow.between(first, second)))


def entry_pairs(flow: Flow) -> Iterator[Pair]:
    """Bottlenecks whose input is of another width than their output: the first blocks of stages."""
    for pair in pairs(flow):
        first, second = pair.weights
        differs = first.outputs == second.inputs and first.inputs != second.outputs
        if differs and pair.is_bottleneck and _would_fit_otherwise(flow, pair) and _reader_obstacle(flow, pair) is None:
            yield pair


def following(flow: Flow, first: Op) -> Op | None:
    """The next matrix weight that everything from `first` must go through, past sites already found."""
    for op in flow.enclosed(first):
        if op.is_projection and op not in flow.carriers:
            return op if _is_matrix(op) else None
    return None


def match_pairs(flow: Flow, kind: str, accept: Callable[[Pair], bool]) -> Iterator[Site | Miss]:
    """A site for every pair that `accept` takes and that can be tied; a pair that runs several times is one."""
    seen: set[tuple[str, str]] = set()
    for pair in pairs(flow):
        if pair.names in seen or not pair.is_transposed or not accept(pair):
            continue
        seen.add(pair.names)
        reason = obstacle(flow, pair)
        if reason is None:
            flow.carriers.update(op for name in pair.names for op in flow.readers[name])
            yield Site(kind, common_module(pair.names), pair.names, (tie(*pair.weights),))
        else:
            yield Miss(kind, common_module(pair.names), pair.names, reason)


def obstacle(flow: Flow, pair: Pair) -> str | None:
    """Why a pair of fitting shapes cannot be tied, if so."""
    first, second = pair.weights
    if first.name == second.name:
        return f"{first.name} is both weights"
    states = flow.trace(pair.first, pair.second)
    state = arriving(states, pair.second)
    reason = _channel_obstacle(pair, state)
    if reason is None and not state.activations:
        reason = f"no nonlinearity stands between {first.name} and {second.name}: tied, they would be one symmetric map"
    return reason or _reader_obstacle(flow, pair)


def _channel_obstacle(pair: Pair, state: Channels) -> str | None:
    first, second = pair.weights
    if state.tags is None:
        return f"between {first.name} and {second.name} the value passes {state.lost}"
    axis = pair.second.in_axis % state.tags.dim()
    if varying_axes(state.tags) != [axis]:
        return f"{second.name} works on another axis than the one that {first.name} makes, or a reshape between them mixes it"
    arrived = channels_along(state.tags, axis)
    straight = arrived == list(range(first.outputs))
    if not straight and not (state.mixed and arrived is not None and len(set(arrived)) == second.inputs):
        return f"the hidden channels of {first.name} reach {second.name} in another order"
    return None


def _reader_obstacle(flow: Flow, pair: Pair) -> str | None:
    """Ties hold wherever a weight is read: every reader must be in this same pair."""
    first, second = pair.weights
    for weight, other in ((first, second), (second, first)):
        for reader in flow.readers[weight.name]:
            if reader.weight is None or reader.weight.name != weight.name:
                return f"{weight.name} is read by {reader.name} too ({reader.node.name})"
            partner = following(flow, reader) if weight is first else _preceding(flow, reader)
            if partner is None or partner.weight is None or partner.weight.name != other.name:
                with_whom = f", there with {partner.weight.name}" if partner is not None and partner.weight is not None else ""
                return f"{weight.name} is used a second time{with_whom}, not with {other.name}"
    return None


def _preceding(flow: Flow, second: Op) -> Op | None:
    """The weight whose `following` is `second`."""
    source = flow.feeder(second.inputs[0]) if second.inputs else None
    while source is not None and (not _is_matrix(source) or following(flow, source) is not second):
        source = flow.feeder(source.inputs[0]) if source.inputs else None
    return source


def tie(source: Weight, target: Weight, of: Block | None = None, into: Block | None = None) -> Tie:
    """`target ← sourceᵀ`, or `into ← ofᵀ` for parts of them, in the parameters' own layouts."""
    axes = (min(target.out_dim, target.in_dim), max(target.out_dim, target.in_dim))
    return Tie(into or target.block, of or source.block, transposed=source.out_dim == target.out_dim, axes=axes)


def common_module(names: tuple[str, ...]) -> str:
    """The innermost module that holds all of the parameters.

    >>> common_module(("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"))
    'blocks.0.mlp'
    """
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for atoms in zip(*paths, strict=False):
        if len(set(atoms)) > 1:
            break
        common.append(atoms[0])
    return ".".join(common)


def near_misses(flow: Flow) -> Iterator[Miss]:
    """What looks like a pair but is none, among the weights that no site has claimed."""
    seen: set[tuple[str, str]] = set()
    for first in flow.ops:
        if first.weight is None or first in flow.carriers:
            continue
        for second, closed in _successors(flow, first):
            assert second.weight is not None
            names = (first.weight.name, second.weight.name)
            if names in seen or names[0] == names[1]:
                continue
            pair = Pair(first, second, tuple(flow.between(first, second)) if closed else ())
            reason = _near_reason(flow, pair, closed)
            if reason is not None:
                seen.add(names)
                kind = "bottleneck" if first.weight.is_convolution and (pair.is_bottleneck or not _is_matrix(first) or not _is_matrix(second)) else "mlp"
                yield Miss(kind, common_module(names), names, reason)


def _successors(flow: Flow, first: Op) -> Iterator[tuple[Op, bool]]:
    """The next weights after `first`, and whether all of it goes there and nothing else."""
    plain = _is_matrix(first)

    def has_weight(op: Op) -> bool:
        return op.weight is not None and (op.is_projection or (op.kind is Kind.CONV and not op.is_depthwise and not plain))

    for op in flow.enclosed(first):
        if has_weight(op) and op not in flow.carriers:
            yield op, True
            return
    if not plain:
        return
    inside = {kind for kind in _HARMLESS if kind is not Kind.CONV}
    for op in flow.forward(first, inside, lambda op: has_weight(op) or not flow.dominates(first, op)):
        if has_weight(op) and flow.dominates(first, op):
            yield op, False


def _near_reason(flow: Flow, pair: Pair, closed: bool) -> str | None:
    first, second = pair.weights
    fits = first.outputs == second.inputs and first.inputs == second.outputs
    claimed = [name for name in pair.names if name in flow.claimed]
    if len(claimed) == 2:
        return None
    shapes = f"{second.name} is {second.block.shape}, {first.name} is {first.block.shape}"
    if not _is_matrix(pair.first) or not _is_matrix(pair.second):
        if claimed or not closed:
            return None
        guilty = first if not _is_matrix(pair.first) else second
        if guilty.groups > 1:
            return f"{guilty.name} is a convolution in {guilty.groups} groups: only ungrouped 1x1 convolutions are tied"
        size = "x".join(map(str, guilty.kernel))
        return f"{guilty.name} is a {size} convolution: only 1x1 convolutions are tied" if fits else None
    if claimed:
        if closed and fits and obstacle(flow, pair) is None:
            return f"{claimed[0]} belongs to another site already ({flow.claimed[claimed[0]] or 'the model'})"
        return None
    if not fits:
        return f"{shapes}: not transposes of each other" if closed and _would_fit_otherwise(flow, pair) else None
    if closed:
        return obstacle(flow, pair)
    return f"the value between {first.name} and {second.name} is read elsewhere too: {_leak(flow, pair)}"


def _would_fit_otherwise(flow: Flow, pair: Pair) -> bool:
    state = arriving(flow.trace(pair.first, pair.second), pair.second)
    return bool(state.activations) and _channel_obstacle(pair, state) is None


def _leak(flow: Flow, pair: Pair) -> str:
    """Where the hidden value goes beside the second weight."""
    inside = {pair.first, *flow.between(pair.first, pair.second)}
    for op in sorted(inside, key=lambda op: op.index):
        if op in flow.results:
            return f"{op.node.name} is returned"
        for user in flow.users[op]:
            if user not in inside and user is not pair.second:
                return f"{op.node.name} by {user.node.name}"
    return "an output"


def _is_matrix(op: Op) -> bool:
    return op.is_projection and op.weight is not None and op.weight.is_matrix and op.weight.block.is_whole


def _is_claimed(flow: Flow, op: Op) -> bool:
    return op.weight is not None and op.weight.name in flow.claimed
