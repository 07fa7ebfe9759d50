"""The dataflow view that passes read: operations of known kinds, the weights they apply, and where channels go.

Only values that depend on the model's inputs are part of the flow. What is computed from parameters and constants alone (a
chunk of `in_proj_weight`, a standardised kernel, a rotary table) is folded into the operation that uses it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import string
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pe_fx.capture import Captured, value_of
from pe_fx.ops import KINDS, SHAPE_OF_SECOND, Kind, base_name, is_in_place, is_pure_move
from pe_fx.ties import Block, Shape, length

_STATIC_KINDS = {Kind.VIEW, Kind.POINTWISE, Kind.PRODUCT, Kind.NORM, Kind.REDUCE, Kind.NONLINEAR, Kind.CONSTANT}


@dataclass(frozen=True)
class Weight:
    """The parameter behind a weight operand.

    `rows[i]` is the position along the parameter's dimension `out_dim` that holds output channel i; `in_dim` is the dimension
    of the input channels. `kernel` is the spatial extent of a convolution, () for a linear. `computed`: the operand is not a
    view of the parameter but calculated from it (weight standardisation). `opaque`: calculated from it by something else, named.
    """

    block: Block
    out_dim: int
    in_dim: int
    rows: tuple[int, ...]
    kernel: Shape = ()
    groups: int = 1
    computed: bool = False
    opaque: str = ""

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def outputs(self) -> int:
        return len(self.rows)

    @property
    def inputs(self) -> int:
        return length(self.block.ranges[self.in_dim])

    @property
    def matrix(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def is_straight(self) -> bool:
        """Whether output channel i is the parameter's row i."""
        return self.rows == tuple(range(self.outputs))

    @property
    def is_convolution(self) -> bool:
        return bool(self.kernel)

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies each position by one matrix: a linear or an ungrouped 1x1 convolution."""
        return math.prod(self.kernel) == 1 and self.groups == 1

    def of_channels(self, channels: Iterable[int]) -> Block:
        """The part of the parameter that makes these output channels."""
        return self.block.narrowed(self.out_dim, (self.rows[channel] for channel in channels))


@dataclass(eq=False)
class Op:
    """An operation on values. `operands` are its tensor arguments in order, None where one is no value of the flow."""

    index: int
    node: fx.Node
    name: str
    kind: Kind
    shape: Shape
    operands: tuple[Op | None, ...]
    parameters: tuple[str, ...] = ()
    weight: Weight | None = None
    in_axis: int = -1
    out_axis: int = -1

    @property
    def inputs(self) -> tuple[Op, ...]:
        return tuple(op for op in self.operands if op is not None)

    @property
    def is_projection(self) -> bool:
        return self.kind is Kind.PROJECTION

    @property
    def is_depthwise(self) -> bool:
        return self.weight is not None and self.weight.groups > 1 and self.weight.groups == self.weight.outputs

    @property
    def stride(self) -> tuple[int, ...]:
        """A convolution's stride along each spatial axis."""
        stride = self.node.kwargs.get("stride", self.node.args[3] if len(self.node.args) > 3 else 1)
        steps = (stride,) if isinstance(stride, int) else tuple(stride)  # type: ignore[arg-type]
        spatial = len(self.shape) - 2
        return steps * spatial if len(steps) == 1 else steps  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"<{self.index} {self.node.name} {self.kind.name} {self.shape}>"


@dataclass(frozen=True)
class Channels:
    """Which channel of the traced origin stands at each position of a value.

    `tags` holds channel number + 1 (0: a channel of something else) in the value's shape, a tuple of such tensors for an
    operation with several results, or None where the channels were mixed; `lost` then says by what.
    `uniform`: one number for all channels (their mean, their norm), and so the same along them wherever it is broadcast.
    `activations` counts the nonlinearities passed. `mixed`: a convolution over channels was passed, since which the tags are its own.
    """

    tags: Any
    activations: int = 0
    mixed: bool = False
    uniform: bool = False
    lost: str = ""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tags are small tensors: on a busy machine threads spend ten times as long waiting for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Flow:
    """The operations of a captured graph, in order, with their dominance relations."""

    def __init__(self, captured: Captured) -> None:
        self.ops: list[Op] = []
        self.readers: dict[str, list[Op]] = {}
        self.claimed: dict[str, str] = {}
        self.carriers: set[Op] = set()
        self._of_node: dict[fx.Node, Op] = {}
        self._build(captured)
        self._dominance()

    # ---- construction

    def claim(self, weights: Iterable[str], site: str) -> None:
        """From here on these weights belong to `site`."""
        self.claimed.update(dict.fromkeys(weights, site))

    def _build(self, captured: Captured) -> None:
        static = _Static(captured)
        latest: dict[fx.Node, fx.Node] = {}
        output = next(iter(captured.graph.find_nodes(op="output")))
        resolved: dict[fx.Node, list[fx.Node]] = {}
        for node in captured.graph.nodes:
            resolved[node] = _in_order(node, latest)
            if node.op.startswith("call") and is_in_place(node) and isinstance(node.args[0], fx.Node):
                _rename_written(node, latest)
        live = _ancestors(output, resolved)
        for node in captured.graph.nodes:
            if node not in live or node is output:
                continue
            operands = resolved[node]
            if not self._is_value(node, operands, captured):
                continue
            op = self._op(node, operands, static)
            self.ops.append(op)
            self._of_node[node] = op
            read = (name for operand in operands if operand not in self._of_node for name in static.parameters(operand))
            op.parameters = tuple(dict.fromkeys(read))
            for name in op.parameters:
                self.readers.setdefault(name, []).append(op)
        self.results = [self._of_node[node] for node in resolved[output] if node in self._of_node]
        returned = Op(len(self.ops), output, "the output", Kind.OTHER, (), ())
        for node in resolved[output]:
            for name in static.parameters(node) if node not in self._of_node else ():
                self.readers.setdefault(name, []).append(returned)
        self.users: dict[Op, list[Op]] = {op: [] for op in self.ops}
        for op in self.ops:
            for source in dict.fromkeys(op.inputs):
                self.users[source].append(op)

    def _is_value(self, node: fx.Node, operands: list[fx.Node], captured: Captured) -> bool:
        if node.op == "placeholder":
            return node in captured.inputs and _is_floating(value_of(node))
        if not _is_tensor(value_of(node)):
            return False
        kind = KINDS.get(base_name(node)) if node.op.startswith("call") else None
        if kind in (Kind.PROJECTION, Kind.CONV, Kind.LOOKUP):
            return True
        return kind is not Kind.CONSTANT and any(operand in self._of_node for operand in operands)

    def _op(self, node: fx.Node, operands: list[fx.Node], static: _Static) -> Op:
        name = base_name(node) if node.op.startswith("call") else ""
        kind = KINDS.get(name, Kind.OTHER) if name else Kind.INPUT
        values = tuple(self._of_node.get(operand) for operand in operands)
        if name in SHAPE_OF_SECOND:
            values = (values[0], *[None] * (len(values) - 1))
        if kind is Kind.PRODUCT and sum(value is not None for value in values) == 1:
            kind = Kind.POINTWISE  # a scale
        op = Op(len(self.ops), node, name, kind, _shape(value_of(node)), values)
        if kind in (Kind.PROJECTION, Kind.CONV, Kind.MATMUL):
            _attach_weight(op, operands, static)
        return op

    def _dominance(self) -> None:
        entry, leave = -1, len(self.ops)
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(range(entry, leave + 1))
        for op in self.ops:
            graph.add_edges_from((source.index, op.index) for source in op.inputs)
            if not op.inputs:
                graph.add_edge(entry, op.index)
        graph.add_edges_from((op.index, leave) for op in self.results)
        self._idom = nx.immediate_dominators(graph, entry)
        self._ipdom = nx.immediate_dominators(graph.reverse(copy=False), leave)
        self._intervals = _intervals(self._idom, entry)
        self._post_intervals = _intervals(self._ipdom, leave)
        self._feeders: dict[int, Op | None] = {entry: None}
        for op in self.ops:
            own = op.kind in (Kind.PROJECTION, Kind.LOOKUP) or (op.kind is Kind.CONV and not op.is_depthwise)
            self._feeders[op.index] = op if own else self._feeders[self._idom[op.index]]

    # ---- structure

    def dominates(self, first: Op, second: Op) -> bool:
        """Whether every way from the inputs to `second` leads through `first`."""
        return _encloses(self._intervals, first.index, second.index)

    def post_dominates(self, second: Op, first: Op) -> bool:
        """Whether every way from `first` to the outputs leads through `second`."""
        return _encloses(self._post_intervals, second.index, first.index)

    def feeder(self, op: Op) -> Op | None:
        """The nearest operation with a weight that every way to `op` leads through (itself, if it has one)."""
        return self._feeders[op.index]

    def inevitable(self, op: Op) -> Iterator[Op]:
        """The operations after `op` that every way to the outputs leads through, nearest first."""
        index = self._ipdom.get(op.index)
        while index is not None and index < len(self.ops):
            yield self.ops[index]
            following = self._ipdom.get(index)
            index = None if following == index else following

    def enclosed(self, op: Op) -> Iterator[Op]:
        """As `inevitable`, as long as nothing enters from elsewhere."""
        for after in self.inevitable(op):
            if not self.dominates(op, after):
                return
            yield after

    def between(self, start: Op, end: Op) -> list[Op]:
        """The operations on the ways from `start` to `end`, both left out, in order."""
        back: set[Op] = set()
        stack = [end]
        while stack:
            for source in stack.pop().inputs:
                if source.index > start.index and source not in back:
                    back.add(source)
                    stack.append(source)
        derived = {start}
        for op in sorted(back, key=lambda op: op.index):
            if any(source in derived for source in op.inputs):
                derived.add(op)
        return sorted(derived - {start}, key=lambda op: op.index)

    def reaches(self, start: Op, end: Op) -> bool:
        seen, stack = {start}, [start]
        while stack:
            for user in self.users[stack.pop()]:
                if user is end:
                    return True
                if user.index < end.index and user not in seen:
                    seen.add(user)
                    stack.append(user)
        return False

    def forward(self, start: Op, through: Collection[Kind], until: Callable[[Op], bool]) -> Iterator[Op]:
        """The first operations after `start` for which `until` holds, on ways through operations of the kinds `through`."""
        seen, stack = {start}, [start]
        while stack:
            for user in self.users[stack.pop()]:
                if user in seen:
                    continue
                seen.add(user)
                if until(user):
                    yield user
                elif user.kind in through:
                    stack.append(user)

    def backward(self, start: Op, through: Collection[Kind], until: Callable[[Op], bool]) -> Iterator[Op]:
        """As `forward`, towards the inputs."""
        seen, stack = {start}, [start]
        while stack:
            for source in stack.pop().inputs:
                if source in seen:
                    continue
                seen.add(source)
                if until(source):
                    yield source
                elif source.kind in through:
                    stack.append(source)

    # ---- where channels go

    def trace(
        self, start: Op, end: Op, *, tags: Tensor | None = None, carriers: Collection[Op] = (), joins: bool = False
    ) -> dict[Op, Channels]:
        """Follows the output channels of `start` through every operation up to and with `end`; maps each to what it then holds.

        Views are understood by running them on the tags. `carriers` are matrix products through which the second factor's
        channels pass (attention's weighted mean of values). Where `joins`, sums with values from elsewhere are followed too.
        """
        if tags is None:
            tags = expand_along(torch.arange(1.0, start.shape[start.out_axis] + 1, dtype=torch.float64), start.shape, start.out_axis)
        states = {start: Channels(tags)}
        passing = self.carriers.union(carriers)
        for op in (*self.between(start, end), end) if end is not start else ():
            states[op] = _transfer(op, states, passing, joins)
        return states


def source_along(op: Op, through: Collection[Kind]) -> Op | None:
    """What `op` is applied to, before operations of the kinds `through` on that one value."""
    source = op.inputs[0] if op.inputs else None
    while source is not None and source.kind in through and len(set(source.inputs)) == 1:
        source = source.inputs[0]
    return source


def arriving(states: dict[Op, Channels], op: Op) -> Channels:
    """What arrives at the value operand of the projection `op`."""
    for source in op.inputs:
        if source in states:
            return states[source]
    return Channels(None, lost="nothing of it arrives")


def channels_along(tags: Any, axis: int) -> list[int] | None:
    """The channel at each position of `axis`; None where it depends on the other axes too or is not of the origin.

    >>> channels_along(torch.tensor([[3.0, 1.0], [3.0, 0.0]]), 1)
    [2, 0]
    """
    if not isinstance(tags, Tensor):
        return None
    flat = _shrink(tags, keep=axis % tags.dim()).movedim(axis, -1)
    flat = flat.reshape(-1, flat.shape[-1])
    largest = flat.amax(0)
    if not bool(((flat == largest) | (flat == 0)).all()) or not bool((largest > 0).all()):
        return None
    return [int(value) - 1 for value in largest.tolist()]


def channels_in(tags: Any) -> list[int] | None:
    """All channels of the origin that a value holds, sorted; None where it holds anything else (beside padding)."""
    if not isinstance(tags, Tensor):
        return None
    present = [int(value) for value in torch.unique(_shrink(tags)).tolist()]
    return [value - 1 for value in present if value] if min(present) >= 0 and max(present) > 0 else None


def varying_axes(tags: Tensor) -> list[int]:
    """The axes along which the tags differ.

    >>> varying_axes(torch.arange(3.0).expand(2, 3))
    [1]
    """
    small = _shrink(_lazy(tags))
    return [axis for axis in range(small.dim()) if small.shape[axis] > 1 and not bool((small == small.narrow(axis, 0, 1)).all())]


def lies_along(tags: Tensor, axis: int) -> bool:
    """Whether the channels lie on this axis and on no other.

    >>> lies_along(torch.arange(3.0).expand(2, 3), -1)
    True
    """
    axis %= tags.dim()
    return varying_axes(tags) == ([axis] if tags.shape[axis] > 1 else [])


def expand_along(values: Tensor, shape: Shape, axis: int) -> Tensor:
    """`values` along `axis`, the same at all other positions, in no memory."""
    view = [1] * len(shape)
    view[axis] = -1
    return values.view(view).expand(shape)


def product_labels(op: Op) -> tuple[str, str, str] | None:
    """A matrix product as einsum labels of its two factors and its result."""
    if op.name == "einsum":
        equation = op.node.args[0]
        if not isinstance(equation, str) or "->" not in equation:
            return None
        left, result = equation.replace(" ", "").split("->")
        terms = left.split(",")
        if len(terms) != 2:
            return None
        spelled = [
            _spelled_out(term, None if factor is None else len(factor.shape)) for term, factor in zip(terms, factors(op), strict=True)
        ]
        return spelled[0], spelled[1], _spelled_out(result, len(op.shape))
    if op.name == "tensordot":
        return _tensordot_labels(op)
    rank = len(op.shape)
    ranks = [rank if factor is None else len(factor.shape) for factor in factors(op)]
    if op.name in ("mv", "addbmm") or len(ranks) < 2 or min(ranks) < 2:
        return None
    batch = "".join(chr(ord("A") + axis) for axis in range(rank - 2))
    return batch[rank - ranks[0] :] + "mk", batch[rank - ranks[1] :] + "kn", batch + "mn"


def _tensordot_labels(op: Op) -> tuple[str, str, str]:
    left, right = (len(_shape(value_of(argument))) for argument in op.node.args[:2])  # type: ignore[arg-type]
    dims: Any = op.node.args[2:4] or (op.node.kwargs.get("dims", 2),)
    pairs = (range(-dims[0], 0), range(dims[0])) if isinstance(dims[0], int) else dims if len(dims) == 2 else dims[0]
    first, second = string.ascii_lowercase[:left], list(string.ascii_uppercase[:right])
    for a, b in zip(*pairs, strict=True):
        second[b] = first[a]
    summed = {first[a] for a in pairs[0]}
    return first, "".join(second), "".join(label for label in (*first, *second) if label not in summed)


def _spelled_out(term: str, rank: int | None) -> str:
    """An einsum term with letters for its ellipsis, the same counted from the right.

    >>> _spelled_out("...ij", 4)
    'YZij'
    """
    hidden = 0 if rank is None else rank - len(term.replace("...", ""))
    return term.replace("...", "".join(chr(ord("Z") - hidden + 1 + i) for i in range(hidden)))


def factors(op: Op) -> tuple[Op | None, ...]:
    """The two factors of a matrix product; of fused attention, the last product's: the attention map (none) and the values."""
    if op.kind is Kind.ATTEND:
        return None, op.operands[2]
    return op.operands[1:3] if op.name == "baddbmm" else op.operands[:2]


# ---- transfer of channels through one operation


def _transfer(op: Op, states: dict[Op, Channels], carriers: set[Op], joins: bool) -> Channels:
    known = [states[source] for source in op.inputs if source in states]
    carrying = [state for state in known if state.tags is not None and not state.uniform]
    activations = max((state.activations for state in carrying), default=0)
    mixed = any(state.mixed for state in known)
    keep = functools.partial(Channels, activations=activations, mixed=mixed, uniform=not carrying)
    lost = functools.partial(Channels, None)
    if not known:
        return lost(lost="nothing of it")
    if all(state.tags is None for state in known):
        return known[0]
    if op in carriers and op.kind in (Kind.MATMUL, Kind.ATTEND):
        tags = _carried(op, states)
        return lost(lost=f"the product {op.node.name}") if tags is None else Channels(tags, activations + 1, mixed)
    if op.name in ("pad", "constant_pad_nd") and isinstance(known[0].tags, Tensor):
        tags = _resampled(known[0].tags, op.shape)  # padding that widens other axes belongs to the channels it pads
        if tags is not None:
            return keep(tags)
    if op.kind is Kind.VIEW:
        if any(state.tags is None for state in known):
            return next(state for state in known if state.tags is None)
        tags = _moved(op, states)
        return lost(lost=f"{op.name}, whose order of channels could not be followed") if tags is None else keep(tags)
    if op.kind in (Kind.POINTWISE, Kind.NONLINEAR, Kind.PRODUCT, Kind.SOFTMAX):
        return _elementwise(op, states, activations, mixed, joins)
    first = next(states[source] for source in op.inputs if source in states)
    if first.tags is None or not isinstance(first.tags, Tensor):
        return lost(lost=first.lost or op.name)
    if op.kind is Kind.NORM:
        return keep(first.tags) if first.tags.shape == op.shape else lost(lost=op.name)
    if (op.kind is Kind.POOL or op.is_depthwise) and not _pooled_axes(op).isdisjoint(varying_axes(first.tags)):
        return lost(lost=f"{op.name} over the hidden axis")
    if op.kind is Kind.POOL or op.is_depthwise:
        tags = _resampled(first.tags, op.shape)
        return lost(lost=f"{op.name} over another axis") if tags is None else keep(tags)
    if op.kind is Kind.REDUCE:
        tags = _reduced(op, first.tags)
        if tags is None and isinstance(value_of(op.node), Tensor):
            return Channels(torch.zeros(1, dtype=torch.float64).expand(op.shape), uniform=True, lost=f"{op.name} over channels")
        return lost(lost=f"{op.name} over channels") if tags is None else keep(tags)
    if op.kind is Kind.CONV or (op.is_projection and op in carriers):
        if op.weight is None or not lies_along(first.tags, op.in_axis):
            return lost(lost=f"{op.name} over another axis")
        fresh = torch.arange(1.0, op.shape[op.out_axis] + 1, dtype=torch.float64) + 2.0**24 * (op.index + 1)
        return Channels(expand_along(fresh, op.shape, op.out_axis), activations + (op in carriers), True)
    if op.is_projection:
        return lost(lost=f"{op.weight.name}" if op.weight else "an unnamed weight")
    return lost(lost=f"{op.name or op.node.name}, an operation that pe_fx does not follow")


def _elementwise(op: Op, states: dict[Op, Channels], activations: int, mixed: bool, joins: bool) -> Channels:
    tagged: list[tuple[Tensor, Channels]] = []
    others: list[Op] = []
    for source in op.inputs:
        state = states.get(source)
        if state is None or state.tags is None:
            others.append(source)
        elif not isinstance(state.tags, Tensor):
            return Channels(None, lost=op.name)
        elif not state.uniform:
            tagged.append((state.tags, state))
    if not tagged:
        known = [states[source] for source in op.inputs if source in states]
        uniform = next((state for state in known if state.tags is not None), known[0])
        return Channels(torch.zeros(1, dtype=torch.float64).expand(op.shape), uniform=not others, lost=uniform.lost)
    try:
        wide = [(tags.expand(op.shape), state) for tags, state in tagged]
    except RuntimeError:
        return Channels(None, lost=op.name)
    best, kept = wide[0]
    if len(wide) > 1 and not all(tags is tagged[0][0] for tags, _ in tagged):
        axes = [varying_axes(tags) for tags, _ in wide]
        full = max(axes, key=len)
        aligned = [(tags, state) for (tags, state), own in zip(wide, axes, strict=True) if own == full]
        if any(own and own != full for own in axes):
            return Channels(None, lost=f"{op.name}, which combines channels in different orders")
        best, kept = next(((tags, state) for tags, state in aligned if not state.mixed), aligned[0])
    if op.kind in (Kind.NONLINEAR, Kind.SOFTMAX):
        return Channels(best, activations + 1, mixed)
    harmful = [source for source in others if not _constant_along(source.shape, best)] if others else []
    if op.kind is Kind.PRODUCT:
        factors_ = sum(not _constant_along(tuple(tags.shape), best) for tags, _ in tagged)
        inside = any(source in states for source in harmful)
        return Channels(best, activations + (factors_ > 1 or inside), mixed)
    if harmful and not joins:
        why = next((states[source].lost for source in harmful if source in states), "")
        return Channels(None, lost=why or f"{op.name} with a value from elsewhere")
    return Channels(best, activations, kept.mixed and mixed)


def _constant_along(shape: Shape, tags: Tensor) -> bool:
    """Whether a value of this shape is broadcast along the axes on which the channels lie."""
    offset = tags.dim() - len(shape)
    return all(axis < offset or shape[axis - offset] == 1 for axis in varying_axes(tags))


def _moved(op: Op, states: dict[Op, Channels]) -> Any:
    """Runs a view on the tags."""
    order = iter(op.operands)

    def tags_of(node: fx.Node) -> Any:
        source = next(order)
        if source is not None and source in states:
            return states[source].tags
        value = value_of(node)
        return torch.zeros(1, dtype=torch.float64).expand(value.shape) if isinstance(value, Tensor) else value

    args, kwargs = fx.node.map_arg((op.node.args, op.node.kwargs), tags_of)
    for copied in (False, True):  # a view that expanded tags refuse may need a copy
        if copied:
            args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))
        with contextlib.suppress(RuntimeError, TypeError, IndexError, NotImplementedError):
            result = _call(op.node.target, args, kwargs)
            return pytree.tree_map(_lazy, result) if _shape(result) == op.shape else None
    return None


def _call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


def _carried(op: Op, states: dict[Op, Channels]) -> Tensor | None:
    """The channels of the values that attention averages."""
    labels = product_labels(op)
    if labels is None:
        return None
    for names, value in reversed(list(zip(labels[:2], factors(op), strict=True))):
        tags = states[value].tags if value is not None and value in states else None
        if not isinstance(tags, Tensor) or tags.dim() != len(names):
            continue
        summed = [axis for axis, label in enumerate(names) if label not in labels[2]]
        tags = _lazy(tags)
        for axis in reversed(summed):
            largest = tags.amax(axis)
            if not bool(((tags == largest.unsqueeze(axis)) | (tags == 0)).all()):
                break
            tags = largest
        else:
            summed = []
        if summed:
            continue
        kept = [label for label in names if label in labels[2]]
        tags = tags.permute([kept.index(label) for label in labels[2] if label in kept])
        for axis, label in enumerate(labels[2]):
            if label not in kept:
                tags = tags.unsqueeze(axis)
        try:
            return tags.expand(op.shape)
        except RuntimeError:
            return None
    return None


def _pooled_axes(op: Op) -> set[int]:
    """The axes over which a pooling or depthwise convolution looks: the last ones, as many as its name says."""
    rank = len(op.shape)
    digits = [int(mark[0]) for mark in re.findall(r"[123]d", op.name)]
    return set(range(rank - digits[0] if digits else 2, rank))


def _resampled(tags: Tensor, shape: Shape) -> Tensor | None:
    """The tags of a value that grew or shrank along axes on which no channels lie."""
    if tags.dim() != len(shape):
        return None
    varying = varying_axes(tags)
    for axis, size in enumerate(shape):
        if axis not in varying:
            tags = tags.narrow(axis, 0, 1)
        elif tags.shape[axis] != size:
            return None
    return tags.expand(shape)


def _reduced(op: Op, tags: Tensor) -> Tensor | None:
    dims = op.node.kwargs.get("dim", op.node.args[1] if len(op.node.args) > 1 else None)
    if isinstance(dims, int):
        dims = (dims,)
    if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        return None
    axes = {int(dim) % tags.dim() for dim in dims}  # type: ignore[arg-type]
    if not axes.isdisjoint(varying_axes(tags)):
        return None
    keepdim = len(op.shape) == tags.dim()
    for axis in sorted(axes, reverse=True):
        tags = tags.amax(axis, keepdim=keepdim)
    return tags if tuple(tags.shape) == op.shape else None


def _lazy(tags: Tensor) -> Tensor:
    """The same tags, repetitions held in no memory even where an operation had to write them out."""
    if any(stride == 0 and size > 1 for stride, size in zip(tags.stride(), tags.shape, strict=True)):
        return tags
    small = tags
    for axis in range(tags.dim()):
        first = small.narrow(axis, 0, 1) if small.shape[axis] > 1 else small
        if first is not small and bool((small == first).all()):
            small = first
    return small.expand(tags.shape)


def _shrink(tags: Tensor, keep: int = -1) -> Tensor:
    """The tags without the repetitions that expand() made: stride 0 costs nothing to hold, but much to compare."""
    for axis in range(tags.dim()):
        if axis != keep and tags.stride(axis) == 0 and tags.shape[axis] > 1:
            tags = tags.narrow(axis, 0, 1)
    return tags


# ---- weights


class _Static:
    """What is computed from parameters and constants alone."""

    def __init__(self, captured: Captured) -> None:
        self._names = captured.weights
        self._cache: dict[fx.Node, frozenset[fx.Node]] = {}

    def sources(self, node: fx.Node) -> frozenset[fx.Node]:
        """The parameter nodes that a value is computed from."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._cache:
                stack.pop()
                continue
            if current in self._names:
                self._cache[current] = frozenset((current,))
                continue
            is_constant = not current.op.startswith("call") or KINDS.get(base_name(current)) is Kind.CONSTANT
            if is_constant or not _is_floating(value_of(current)):  # an index carries no weight
                self._cache[current] = frozenset()
                continue
            waiting = [operand for operand in current.all_input_nodes if operand not in self._cache]
            if waiting:
                stack += waiting
            else:
                self._cache[current] = frozenset().union(*(self._cache[operand] for operand in current.all_input_nodes))
        return self._cache[node]

    def parameters(self, node: fx.Node) -> list[str]:
        return sorted(self._names[source] for source in self.sources(node))

    def name(self, node: fx.Node) -> str:
        return self._names[node]


def _attach_weight(op: Op, operands: list[fx.Node], static: _Static) -> None:
    """Finds the weight operand of a linear, a convolution or a matrix product, and what it is a view of."""
    if op.kind is Kind.CONV:
        _attach_kernel(op, operands, static)
        return
    if op.name == "linear":
        position, out_label, in_label = 1, 0, 1
        op.operands = op.operands[:1]
    elif op.name != "addmm" and op.kind is Kind.PROJECTION:  # grouped_mm(x, W of every expert, offsets)
        position, out_label, in_label = 1, 2, 1
        op.operands = op.operands[:1]
    elif op.kind is Kind.PROJECTION:  # addmm(bias, x, W)
        if op.operands[1] is None or op.operands[2] is not None:
            op.kind = Kind.MATMUL
            return
        position, out_label, in_label = 2, 1, 0
        op.operands = (op.operands[1],)
    else:
        labels = product_labels(op)
        pair = factors(op)
        if labels is None or len(pair) < 2 or (pair[0] is None) == (pair[1] is None):
            return
        position = 0 if pair[0] is None else 1
        names, value_names, result = labels[position], labels[1 - position], labels[2]
        inner = [label for label in names if label in value_names and label not in result]
        outer = [label for label in names if label in result and label not in value_names]
        node = operands[position + (op.name == "baddbmm")]
        weight_rank = len(_shape(value_of(node)))
        names = names[-weight_rank:] if op.name != "einsum" else names
        if len(inner) != 1 or len(outer) != 1 or len(names) != 2:
            return
        value = pair[1 - position]
        weight = _view_of_parameter(node, names.index(outer[0]), names.index(inner[0]), static)
        if weight is None or value is None:
            return
        op.kind, op.weight, op.operands = Kind.PROJECTION, weight, (value,)
        op.in_axis = value_names.index(inner[0]) - len(value_names)
        op.out_axis = result.index(outer[0]) - len(result)
        return
    op.weight = _view_of_parameter(operands[position], out_label, in_label, static)


def _attach_kernel(op: Op, operands: list[fx.Node], static: _Static) -> None:
    op.operands = op.operands[:1]
    kernel = _shape(value_of(operands[1]))
    spatial = len(kernel) - 2
    op.in_axis = op.out_axis = -1 - spatial
    transposed = op.name.startswith("conv_transpose") or (op.name == "convolution" and op.node.args[6:7] == (True,))
    place = 8 if op.name == "convolution" else 6
    groups = op.node.kwargs.get("groups", op.node.args[place] if len(op.node.args) > place else 1)
    if not isinstance(groups, int):
        return
    out_label, in_label = (1, 0) if transposed else (0, 1)
    op.weight = _view_of_parameter(operands[1], out_label, in_label, static, kernel[2:], groups)
    if op.weight is not None and op.weight.is_matrix and not transposed:
        op.kind = Kind.PROJECTION


def _view_of_parameter(node: fx.Node, out_label: int, in_label: int, static: _Static, kernel: Shape = (), groups: int = 1) -> Weight | None:
    shape = _shape(value_of(node))
    sources = static.sources(node)
    if node in sources:
        block = Block.whole(static.name(node), shape)
        return Weight(block, out_label, in_label, tuple(range(shape[out_label])), kernel, groups)
    main = [source for source in sources if math.prod(_shape(value_of(source))) >= math.prod(shape)]
    if len(main) != 1:
        return None
    parameter = main[0]
    full = _shape(value_of(parameter))
    positions = _positions(node, parameter, full) if len(sources) == 1 else None
    if positions is not None:
        return _from_positions(positions, static.name(parameter), full, shape, out_label, in_label, kernel, groups)
    if full != shape:
        return None
    block = Block.whole(static.name(parameter), full)
    return Weight(block, out_label, in_label, tuple(range(full[out_label])), kernel, groups, True, _stranger(node, parameter))


def _positions(node: fx.Node, parameter: fx.Node, full: Shape) -> list[Tensor] | None:
    """For each dimension of the parameter, its position at each entry of `node`; None if `node` is no view of it."""
    chain: list[fx.Node] = []
    current = node
    while current is not parameter:
        kind = KINDS.get(base_name(current)) if current.op.startswith("call") else None
        if len(current.all_input_nodes) != 1 or not (kind is Kind.VIEW or base_name(current) in _IDENTITIES):
            return None
        chain.append(current)
        current = current.all_input_nodes[0]
    found = []
    for dim, size in enumerate(full):
        tags: Any = expand_along(torch.arange(1.0, size + 1, dtype=torch.float64), full, dim)
        for step in reversed(chain):
            if KINDS[base_name(step)] is not Kind.VIEW:
                continue
            op = Op(
                0,
                step,
                base_name(step),
                Kind.VIEW,
                _shape(value_of(step)),
                (origin := Op(0, step.all_input_nodes[0], "", Kind.INPUT, (), ()),),
            )
            tags = _moved(op, {origin: Channels(tags)})
            if tags is None:
                return None
        found.append(tags)
    return found


_IDENTITIES = (
    "contiguous",
    "clone",
    "alias",
    "detach",
    "to",
    "to_copy",
    "type",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "double",
    "lift_fresh",
)


def _from_positions(
    positions: list[Tensor], name: str, full: Shape, shape: Shape, out_label: int, in_label: int, kernel: Shape, groups: int
) -> Weight | None:
    axes = [varying_axes(tags) for tags in positions]
    if any(len(own) > 1 for own in axes):
        return None
    dims = {label: [dim for dim, own in enumerate(axes) if own == [label]] for label in (out_label, in_label)}
    for label in dims:
        if not dims[label] and shape[label] == 1:
            dims[label] = [dim for dim, own in enumerate(axes) if not own and dim not in (d for o in dims.values() for d in o)][:1]
    if any(len(found) != 1 for found in dims.values()):
        return None
    out_dim, in_dim = dims[out_label][0], dims[in_label][0]
    rows = channels_along(positions[out_dim], out_label)
    columns = channels_along(positions[in_dim], in_label)
    if rows is None or columns is None or columns != list(range(full[in_dim])):
        return None
    block = Block.whole(name, full).narrowed(out_dim, rows)
    for dim, tags in enumerate(positions):
        if dim not in (out_dim, in_dim):
            held = channels_in(tags)
            if held is None:
                return None
            block = block.narrowed(dim, held)
    return Weight(block, out_dim, in_dim, tuple(rows), kernel, groups)


def _stranger(node: fx.Node, parameter: fx.Node) -> str:
    """The first operation between `parameter` and `node` that does more than standardise, by name."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op.startswith("call") and KINDS.get(base_name(current)) not in _STATIC_KINDS:
            return base_name(current)
        for operand in current.all_input_nodes if current is not parameter else ():
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return ""


# ---- graph helpers


def _in_order(node: fx.Node, latest: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """The nodes among a call's arguments in order, repeated where they are, each as last written."""
    found: list[fx.Node] = []

    def note(operand: fx.Node) -> fx.Node:
        current = operand
        while current in latest:
            current = latest[current]
        found.append(current)
        return operand

    fx.node.map_arg((node.args, node.kwargs), note)
    return found


def _rename_written(node: fx.Node, latest: dict[fx.Node, fx.Node]) -> None:
    """From here on, who reads what an in-place operation wrote to reads its result."""
    written: Any = node.args[0]
    while isinstance(written, fx.Node):
        latest[written] = node
        moves = written.op.startswith("call") and is_pure_move(written)
        written = written.args[0] if moves else None


def _ancestors(node: fx.Node, operands: dict[fx.Node, list[fx.Node]]) -> set[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        for operand in operands[stack.pop()]:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return seen


def _shape(value: Any) -> Shape:
    if isinstance(value, (list, tuple)):
        return (len(value),)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_tensor(value: Any) -> bool:
    return any(map(_is_tensor, value)) if isinstance(value, (list, tuple)) else isinstance(value, Tensor)


def _is_floating(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_floating, value))
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _intervals(parents: dict[int, int], root: int) -> dict[int, tuple[int, int]]:
    """Entry and exit times in the tree of immediate dominators: one encloses another exactly where it dominates it."""
    children: dict[int, list[int]] = {}
    for node, parent in parents.items():
        if node != root and parent is not None:
            children.setdefault(parent, []).append(node)
    entered: dict[int, int] = {}
    intervals: dict[int, tuple[int, int]] = {}
    clock = 0
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        clock += 1
        if done:
            intervals[node] = (entered[node], clock)
            continue
        entered[node] = clock
        stack.append((node, True))
        stack += [(child, False) for child in children.get(node, ())]
    return intervals


def _encloses(intervals: dict[int, tuple[int, int]], outer: int, inner: int) -> bool:
    if outer not in intervals or inner not in intervals:
        return False
    return intervals[outer][0] <= intervals[inner][0] and intervals[inner][1] <= intervals[outer][1]
