"""What the rules for two weights in a row have in common: the closed region from one weight to the next."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from pe_fx.graph.channels import Channels, arriving
from pe_fx.graph.flow import Flow, taken_by
from pe_fx.graph.operation import Op, Weight
from pe_fx.graph.ops import Kind
from pe_fx.graph.tags import channels_along, channels_in, lies_along, remembered
from pe_fx.graph.walks import reached
from pe_fx.ties import Block, FarMiss, Miss, Site, Tie

_HARMLESS = {Kind.VIEW, Kind.POINTWISE, Kind.NONLINEAR, Kind.PRODUCT, Kind.NORM, Kind.POOL, Kind.CONV, Kind.SOFTMAX, Kind.REDUCE}
_ACTIVATING = {Kind.NONLINEAR, Kind.PRODUCT, Kind.SOFTMAX, Kind.MATMUL, Kind.ATTEND}
_CHANGELESS = {Kind.VIEW, Kind.POINTWISE, Kind.NORM}
_MIXING = {Kind.PROJECTION, Kind.CONV, Kind.MATMUL, Kind.ATTEND}
_ENTRYWISE = {Kind.POINTWISE, Kind.NONLINEAR, Kind.PRODUCT, Kind.WRITE}


@dataclass(frozen=True)
class Pair:
    """Two weights in a row: everything that leaves `first` goes to `second`, and `second` gets nothing else."""

    first: Op
    second: Op
    region: tuple[Op, ...]

    @property
    def weights(self) -> tuple[Weight, Weight]:
        assert self.first.weight is not None
        assert self.second.weight is not None
        return self.first.weight, self.second.weight

    @property
    def blocks(self) -> tuple[Block, Block]:
        """The matrices: what is used of the weights."""
        first, second = self.weights
        return first.block, second.block

    @property
    def names(self) -> tuple[str, str]:
        first, second = self.weights
        return first.name, second.name

    @property
    def is_transposed(self) -> bool:
        first, second = self.weights
        return second.mirrors(first)

    @property
    def is_bottleneck(self) -> bool:
        """Whether 1x1 convolutions enclose something that looks beyond one position."""
        spatial = any(op.kind in (Kind.CONV, Kind.MATMUL, Kind.ATTEND) for op in self.region)
        return spatial and all(weight.is_convolution for weight in self.weights)


def pairs(flow: Flow) -> tuple[Pair, ...]:
    """Every pair of matrix weights that no site has claimed, in dataflow order."""
    return _pairs(flow, flow.progress)


@remembered
def _pairs(flow: Flow, progress: tuple[int, ...]) -> tuple[Pair, ...]:
    free = [op for op in flow.ops if _is_matrix(op) and _may_end(flow, op) and not _is_claimed(flow, op)]
    found = [(first, second) for first in free for second in following(flow, first) if not _is_claimed(flow, second)]
    return tuple(Pair(first, second, flow.between(first, second)) for first, second in found)


def entry_pairs(flow: Flow) -> Iterator[Pair]:
    """Bottlenecks whose input is of another width than their output: the first blocks of stages."""
    for pair in pairs(flow):
        first, second = pair.weights
        differs = first.outputs == second.inputs and first.inputs != second.outputs
        if differs and pair.is_bottleneck and _would_fit_otherwise(flow, pair) and reader_obstacle(flow, [pair]) is None:
            yield pair


def following(flow: Flow, first: Op) -> Iterator[Op]:
    """The next matrix weight that everything from `first` must go through; past sites already found, and such as are not tied.

    What joins in from elsewhere modulates, unless another matrix that fits made it.
    """
    for op in flow.inevitably_applied(first):
        if op.is_projection and _may_end(flow, op):
            if (_is_matrix(op) or _is_part_of_output(op)) and _reaches_alone(flow, first, op):
                yield op
            if op not in flow.carriers:
                return


def rivals(flow: Flow, start: Op, second: Op) -> list[Op]:
    """The matrices that could be the partner of `second` as well: what they make joins in on the way from `start`."""
    makers = dict.fromkeys(op for value, _ in flow.joining(start, second) for op in flow.makers(value))
    return [op for op in makers if could_make(op, second)]


def could_make(op: Op, second: Op) -> bool:
    """Whether an operation applies a weight of which all or some rows are as wide as the weight of `second` has outputs, and as many."""
    first, other = op.weight, second.weight
    if first is None or other is None:
        return False
    as_wide = first.inputs * first.groups // first.parts == other.outputs // other.parts
    return first.name != other.name and as_wide and first.outputs >= other.inputs


def _reaches_alone(flow: Flow, first: Op, second: Op) -> bool:
    if flow.dominates(first, second):
        return True
    return _is_modulated(flow, first, second) and not _arriving(flow, first, second).lost and not rivals(flow, first, second)


def _is_modulated(flow: Flow, first: Op, second: Op) -> bool:
    """Whether `first` fits `second`, and what joins in from elsewhere between them does so entry by entry."""
    if not Pair(first, second, ()).is_transposed:
        return False
    joins = dict.fromkeys(op for _, op in flow.joining(first, second))
    return all(op.kind in _ENTRYWISE and not flow.modulates(first, op) for op in joins)


def _arriving(flow: Flow, first: Op, second: Op) -> Channels:
    return arriving(flow.trace(first, second), second)


def match_pairs(flow: Flow, kind: str, accept: Callable[[Pair], bool]) -> Iterator[Site | Miss]:
    """A site for every pair that `accept` takes and that can be tied; a pair that runs several times is one.

    What is found is one step to the pairs around it: the search is repeated until it finds no more.
    """
    done: set[tuple[str, str]] = set()
    found = True
    while found:
        found = False
        groups: dict[tuple[str, str], list[Pair]] = {}
        for pair in pairs(flow):
            if pair.is_transposed and accept(pair):
                groups.setdefault(pair.names, []).append(pair)
        for names, group in groups.items():
            if names in done or any(flow.owner(weight.block) for weight in group[0].weights):
                continue
            done.add(names)
            reason = _group_obstacle(flow, group)
            if reason is not None:
                yield Miss(kind, common_module(names), names, reason)
            elif (made := tie(*group[0].weights)) not in flow.found:
                found = True
                yield Site(kind, common_module(names), names, (made,))


def obstacle(flow: Flow, pair: Pair) -> str | None:
    """Why a pair of fitting shapes cannot be tied, as far as this use of it says."""
    first, second = pair.weights
    if first.name == second.name:
        return f"{first.name} is both weights"
    state = _arriving(flow, pair.first, pair.second)
    reason = _channel_obstacle(pair, state)
    if reason is None and not state.activations:
        reason = f"no nonlinearity stands between {first.name} and {second.name}: tied, they would be one symmetric map"
    return reason


def _group_obstacle(flow: Flow, group: list[Pair]) -> str | None:
    """Why a pair that runs once or several times cannot be tied."""
    reasons = (reason for pair in group if (reason := obstacle(flow, pair)) is not None)
    return next(reasons, None) or reader_obstacle(flow, group)


def _channel_obstacle(pair: Pair, state: Channels) -> str | None:
    first, second = pair.weights
    if state.tags is None or state.uniform:
        return f"between {first.name} and {second.name} the value passes {state.lost}"
    if not lies_along(state.tags, pair.second.in_axis):
        return f"{second.name} works on another axis than the one that {first.name} makes, or a reshape between them mixes it"
    arrived = channels_along(state.tags, pair.second.in_axis)
    straight = arrived == range(first.outputs) and first.is_straight and second.is_straight
    if state.blended:
        return f"the hidden channels of {first.name} are combined with one another before {second.name}"
    if not straight and not (state.mixed and arrived is not None and len(set(arrived)) == second.inputs):
        return f"the hidden channels of {first.name} reach {second.name} in another order"
    return None


def misuse(flow: Flow, weight: Weight) -> str | None:
    """Whether a weight is read for more than to multiply with it as it is; ties hold wherever it is read."""
    if weight.opaque:
        return f"{weight.name} is applied through {weight.opaque}, not as it is: if it is parametrized, remove the parametrization first"
    for reader in flow.readers[weight.name]:
        if reader.weight is None or reader.weight.name != weight.name or reader.parameters.count(weight.name) > 1:
            return f"{weight.name} is read by {reader.name} too ({reader.node.name})"
    return None


def reader_obstacle(flow: Flow, group: Sequence[Pair]) -> str | None:
    """Every use of either matrix must be in this same pair."""
    first, second = group[0].blocks
    uses = {first: {pair.first for pair in group}, second: {pair.second for pair in group}}
    for weight, block, other in zip(group[0].weights, (first, second), (second, first), strict=True):
        if (reason := misuse(flow, weight)) is not None:
            return reason
        for reader in flow.readers[block.name]:
            if reader not in uses[block] and (reader.weight is None or reader.weight.block.overlaps(block)):
                partner = next(following(flow, reader) if block is first else map(flow.feeder, reader.inputs), None)
                there = f", there with {partner.weight.name}" if partner is not None and partner.weight is not None else ""
                return f"{block} is used a second time{there}, not with {other}"
    return None


def tie(source: Weight, target: Weight, of: Block | None = None, into: Block | None = None) -> Tie:
    """`target ← sourceᵀ`, or `into ← ofᵀ` for parts of them, in the parameters' own layouts."""
    of, into = of or source.block, into or target.block
    dims = (*target.out_dims, *target.in_dims)
    if len(dims) == 2 and {*source.out_dims, *source.in_dims} == {*dims}:
        return Tie(into, of, source.out_dims == target.out_dims, (min(dims), max(dims)), channels=dims[0])
    hidden, channels = to = target.spread(target.in_dims)
    own = source.spread(source.out_dims)
    origin = dict(zip(hidden + channels, own[0] + own[1], strict=False))
    moved = [dim for dim in origin if origin[dim] != dim]
    keeps = len(channels) == 1 and len(into.shape) == len(of.shape) and all(into.shape[dim] == of.shape[origin[dim]] for dim in origin)
    if keeps and (not moved or (len(moved) == 2 and channels[0] in moved)):
        first, second = sorted(moved or (hidden[-1], channels[0]))
        return Tie(into, of, bool(moved), (first, second), channels=channels[0])
    return Tie(into, of, True, channels=channels[0], spread=(to, own))


def common_module(names: tuple[str, ...]) -> str:
    """The innermost module that holds all of the parameters; of one alone, the module around its owner.

    >>> common_module(("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")), common_module(("blocks.0.attn.qkv.weight",))
    ('blocks.0.mlp', 'blocks.0.attn')
    """
    depth = -1 if len(set(names)) > 1 else -2
    paths = [name.split(".")[:depth] for name in names]
    common = []
    for atoms in zip(*paths, strict=False):
        if len(set(atoms)) > 1:
            break
        common.append(atoms[0])
    return ".".join(common)


def near_misses(flow: Flow) -> Iterator[Miss]:
    """What looks like a pair but is none, where at least one of the weights is in no site."""
    seen: set[tuple[str, ...]] = set()
    for first in flow.ops:
        if first.weight is None:
            continue
        candidates = [(pair, reason) for pair, closed in _candidates(flow, first) if (reason := _near_reason(flow, pair, closed))]
        for pair, reason in candidates:
            names = _contenders(flow, pair) + pair.names[1:]
            if names not in seen:
                seen.add(names)
                matrices = [_is_matrix(op) for op in (pair.first, pair.second)]
                kernels = all(weight.is_convolution for weight in pair.weights) and not all(matrices)
                kind = "bottleneck" if pair.is_bottleneck or kernels else "mlp"
                yield (Miss if any(matrices) else FarMiss)(kind, common_module(names), names, reason)


def _candidates(flow: Flow, first: Op) -> Iterator[tuple[Pair, bool]]:
    """The next weights after `first`, and whether all of it goes there.

    Those beside which something joins in from elsewhere only where the shapes fit, and the channels were activated, or lost.
    """
    is_free = _is_matrix(first) and not _is_claimed(flow, first)

    def is_near(op: Op, closed: bool) -> bool:
        if flow.dominates(first, op):
            return True
        if not (is_free and op.is_projection and _is_modulated(flow, first, op)):
            return False
        state = _arriving(flow, first, op)
        if closed and not state.lost:
            return state.activations > 0
        return bool(state.activations or state.lost) and not _is_one_of_streams(flow, first, op)

    seen: set[Op] = set()
    for op in flow.inevitably_applied(first):
        if op.weight is not None and not op.is_depthwise and is_near(op, True):
            seen.add(op)
            yield Pair(first, op, flow.between(first, op)), True
        if op.is_projection:
            break
    if not is_free or any(op.is_projection for op in seen):
        return
    for op in flow.forward(first, _HARMLESS, lambda op: op.is_projection):
        if op.weight is not None and op not in seen and not _is_claimed(flow, op) and is_near(op, False):
            pair = Pair(first, op, ())
            yield dataclasses.replace(pair, region=flow.between(first, op)) if pair.is_transposed else pair, False


def _is_one_of_streams(flow: Flow, first: Op, second: Op) -> bool:
    """Whether what joins in before `second` was made of the same values as what `first` works on."""

    def made_of(value: Op) -> set[Op]:
        return set(reached(value, operator.attrgetter("inputs")))

    joined = (value for value, op in flow.joining(first, second) if value.shape == op.shape)
    return any(not made_of(first).isdisjoint(made_of(value)) for value in joined)


def _near_reason(flow: Flow, pair: Pair, closed: bool) -> str | None:
    first, second = pair.weights
    claimed = [(weight.block, site) for weight in pair.weights if (site := flow.owner(weight.block)) is not None]
    if first.name == second.name or len(claimed) == 2:
        return None
    if not _is_matrix(pair.first) or not (_is_matrix(pair.second) or _is_part_of_output(pair.second)):
        return None if claimed else _kernel_reason(pair)
    if claimed:
        is_loser = closed and pair.is_transposed and flow.dominates(pair.first, pair.second) and obstacle(flow, pair) is None
        block, site = claimed[0]
        return f"{block} {taken_by(site)}" if is_loser else None
    if not flow.spare.isdisjoint((pair.first, pair.second)):
        return None  # a pattern of its own, that was not asked for or refused
    if not pair.is_transposed:
        shapes = f"{second.name} is {second.block.shape}, {first.name} is {first.block.shape}"
        return f"{shapes}: not transposes of each other" if closed and (_leads_back(pair) or _would_fit_otherwise(flow, pair)) else None
    if len(contenders := _contenders(flow, pair)) > 1:
        return f"{second.name} could use the weight of any of {', '.join(contenders)}: what they make is joined before it"
    if closed:
        return _group_obstacle(flow, [pair])
    return f"the value between {first.name} and {second.name} is read elsewhere too: {leak(flow, pair.first, pair.second)}"


def _contenders(flow: Flow, pair: Pair) -> tuple[str, ...]:
    """The weights that could be the partner of the second one, in order: the first, and what makes values that join in."""
    ops = sorted([pair.first, *rivals(flow, pair.first, pair.second)], key=lambda op: op.index)
    return tuple(dict.fromkeys(op.weight.name for op in ops if op.weight is not None))


def _kernel_reason(pair: Pair) -> str | None:
    """A convolution at one end that would be tied, were it 1x1 and ungrouped."""
    first, second = pair.weights
    guilty = first if not _is_matrix(pair.first) else second
    widths = [weight.inputs * weight.groups for weight in (first, second)]
    if first.outputs != widths[1] or second.outputs != widths[0]:
        return None
    if guilty.groups > 1:
        return f"{guilty.name} is a convolution in {guilty.groups} groups: only ungrouped 1x1 convolutions are tied"
    if guilty.kernel and max(guilty.kernel) > 1:
        return f"{guilty.name} is a {'x'.join(map(str, guilty.kernel))} convolution: only 1x1 convolutions are tied"
    if guilty.block.is_whole:
        return f"{guilty.name} is a transposed convolution: only linear layers and ordinary 1x1 convolutions are tied"
    return f"{guilty.block} is only a part of {guilty.name}: only whole weights are paired"


def _would_fit_otherwise(flow: Flow, pair: Pair) -> bool:
    if not any(op.kind in _ACTIVATING or op in flow.carriers for op in pair.region):
        return False  # at once, since there are many
    state = _arriving(flow, pair.first, pair.second)
    return bool(state.activations) and _channel_obstacle(pair, state) is None


def _leads_back(pair: Pair) -> bool:
    """Whether a pair returns to the width that it came from, though what is between, no matrix, changed the channels' number: maxout."""
    first, second = pair.weights
    kinds = {op.kind for op in pair.region if not op.is_depthwise}
    is_changed = first.outputs != second.inputs and not _CHANGELESS.issuperset(kinds)
    return first.inputs == second.outputs and is_changed and kinds.isdisjoint(_MIXING)


def leak(flow: Flow, first: Op, second: Op, channels: Collection[int] | None = None) -> str | None:
    """Where the values between two weights go beside the second; of the first, only those channels count that are given."""
    others = set() if channels is None else set(range(first.shape[first.out_axis])).difference(channels)

    def counts(op: Op) -> bool:
        tags = flow.trace(first, op)[op].tags if others else None
        held = channels_in(tags) if isinstance(tags, Tensor) else None
        return held is None or not others.issuperset(held)

    on_the_way = {first, *flow.between(first, second)}
    queue = sorted(on_the_way, key=lambda op: op.index)
    for op in queue:
        if not counts(op):
            continue
        if op in flow.results:
            return f"{op.node.name} is returned"
        for user in flow.users[op]:
            if user is second or user in on_the_way:
                continue
            if not others or user.kind is not Kind.VIEW:
                return f"{op.node.name} by {user.node.name}"
            on_the_way.add(user)  # whoever reads what counts of it
            queue.append(user)
    return None


def _is_matrix(op: Op) -> bool:
    return op.is_projection and op.weight is not None and op.weight.is_whole_matrix


def _is_part_of_output(op: Op) -> bool:
    """Whether a matrix is what some of a weight's input channels meet: attention has its output projection in the others."""
    if not op.is_projection or op.weight is None or not op.weight.is_matrix:
        return False
    divided = op.weight.block.divided
    return bool(divided) and {*op.weight.in_dims}.issuperset(divided)


def is_open(flow: Flow, op: Op) -> bool:
    """Whether a pattern may end at an operation: with a matrix that no site has claimed."""
    return (_is_matrix(op) or _is_part_of_output(op)) and _may_end(flow, op) and not _is_claimed(flow, op)


def _is_claimed(flow: Flow, op: Op) -> bool:
    return op.weight is not None and flow.owner(op.weight.block) is not None


def _may_end(flow: Flow, op: Op) -> bool:
    return op not in flow.carriers or op in flow.spare
