"""Where channels go: numbers sent through operations, views understood by running them."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from pe_fx.capture import value_of
from pe_fx.operation import Op, factors, is_floating, number, product_labels, shape_of
from pe_fx.ops import RESHAPES, Kind, writes
from pe_fx.ties import Shape

Remembered = TypeVar("Remembered", bound=Callable[..., Any])
_caches: list[Any] = []


def remembered(function: Remembered) -> Remembered:
    """Called again with equal arguments, the very same tags among them, the function returns the very same result.

    Blocks of one form are traced once. What is remembered is forgotten when `tracing` ends.
    """
    cached: Any = functools.lru_cache(maxsize=512)(function)
    _caches.append(cached)
    return cached  # type: ignore[no-any-return]


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Tags are small tensors on the CPU, whatever the default device.

    On a busy machine threads spend ten times as long waiting for one another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    elsewhere = torch.get_default_device().type != "cpu"
    try:
        with torch.device("cpu") if elsewhere else contextlib.nullcontext():  # this mode costs time in every call
            yield
    finally:
        torch.set_num_threads(threads)
        for cached in _caches:
            cached.cache_clear()


@dataclass(frozen=True)
class Channels:
    """Which channel of the traced origin stands at each position of a value.

    `tags` holds channel number + 1 (0: a channel of something else) in the value's shape, two of them as one complex number where
    the value is complex; a tuple of such tensors for an operation with several results, or None where the channels were mixed;
    `lost` then says by what.
    `uniform`: one number for all channels (their mean, their norm), and so the same along them wherever it is broadcast.
    `activations` counts the nonlinearities passed. `mixed`: a convolution over channels was passed, since which the tags are its own.
    `blended`: channels were combined with others of the origin, as in x + x.flip(-1); the tags name one of each.
    """

    tags: Any
    activations: int = 0
    mixed: bool = False
    uniform: bool = False
    lost: str = ""
    blended: bool = False


def arriving(states: dict[Op, Channels], op: Op) -> Channels:
    """What arrives at the value operand of the projection `op`."""
    for source in op.inputs:
        if source in states:
            return states[source]
    return Channels(None, lost="nothing of it arrives")


@remembered
def channels_along(tags: Any, axis: int) -> Sequence[int] | None:
    """The channel at each position of `axis`; None where it depends on the other axes too, is not of the origin, or is a pair.

    >>> channels_along(torch.tensor([[3.0, 1.0], [3.0, 0.0]]), 1)
    (2, 0)
    """
    if not isinstance(tags, Tensor) or tags.is_complex():
        return None
    flat = _shrink(tags, keep=axis % tags.dim()).movedim(axis, -1)
    flat = flat.reshape(-1, flat.shape[-1])
    largest = flat.amax(0)
    if not bool(((flat == largest) | (flat == 0)).all()) or not bool((largest > 0).all()):
        return None
    return _listed(largest.long() - 1)


@remembered
def channels_in(tags: Any) -> Sequence[int] | None:
    """All channels of the origin that a value holds, sorted; None where it holds anything else (beside padding)."""
    if not isinstance(tags, Tensor) or tags.is_complex():
        return None
    present = torch.unique(_shrink(tags)).long() - 1  # type: ignore[no-untyped-call]
    if present[0] < -1 or present[-1] < 0:
        return None
    return _listed(present[present >= 0])


def _listed(numbers: Tensor) -> Sequence[int]:
    """The numbers, as a range where they are consecutive: those are compared at no cost."""
    found = numbers.tolist()
    consecutive = range(found[0], found[0] + len(found)) if found else range(0)
    return consecutive if found == list(consecutive) else tuple(found)


@remembered
def varying_axes(tags: Tensor) -> tuple[int, ...]:
    """The axes along which the tags differ.

    >>> varying_axes(torch.arange(3.0).expand(2, 3))
    (1,)
    """
    small = _shrink(_lazy(tags))
    return tuple(axis for axis in range(small.dim()) if small.shape[axis] > 1 and not _repeats(small, axis))


def lies_along(tags: Tensor, axis: int) -> bool:
    """Whether the channels lie on this axis and on no other.

    >>> lies_along(torch.arange(3.0).expand(2, 3), -1)
    True
    """
    axis %= tags.dim()
    return varying_axes(tags) == ((axis,) if tags.shape[axis] > 1 else ())


@remembered
def numbered(shape: Shape, axis: int) -> Tensor:
    """The tags of channels that lie in order along one axis.

    >>> numbered((2, 3), 1)
    tensor([[1., 2., 3.],
            [1., 2., 3.]], dtype=torch.float64)
    """
    return expand_along(torch.arange(1.0, shape[axis] + 1, dtype=torch.float64), shape, axis)


@remembered
def _fresh(shape: Shape, axis: int, index: int) -> Tensor:
    """The tags of channels that are the mixture of others, made by the operation of this index."""
    return expand_along(torch.arange(1.0, shape[axis] + 1, dtype=torch.float64) + 2.0**24 * (index + 1), shape, axis)


@remembered
def nothing_in(shape: Shape) -> Tensor:
    """The tags of a value that holds no channel of the origin."""
    return torch.zeros(1, dtype=torch.float64).expand(shape)


def expand_along(values: Tensor, shape: Shape, axis: int) -> Tensor:
    """`values` along `axis`, the same at all other positions, in no memory."""
    view = [1] * len(shape)
    view[axis] = -1
    return values.view(view).expand(shape)


def transfer(op: Op, states: dict[Op, Channels], carriers: set[Op], loosely: bool) -> Channels:
    known = [states[source] for source in op.inputs if source in states]
    carrying = [state for state in known if state.tags is not None and not state.uniform]
    activations, mixed, blended = 0, False, False
    for state in known:
        mixed |= state.mixed
    for state in carrying:
        activations = max(activations, state.activations)
        blended |= state.blended
    keep = functools.partial(Channels, activations=activations, mixed=mixed, uniform=not carrying, blended=blended)
    lost = functools.partial(Channels, None)
    if not known:
        return lost(lost="nothing of it")
    if all(state.tags is None for state in known):
        return known[0]
    if op in carriers and op.kind in (Kind.MATMUL, Kind.ATTEND):
        tags = _carried(op, states)
        return lost(lost=f"the product {op.node.name}") if tags is None else Channels(tags, activations + 1, mixed, blended=blended)
    if op.name in ("pad", "constant_pad_nd") and isinstance(known[0].tags, Tensor):
        if _padded_axes(op).isdisjoint(varying_axes(known[0].tags)):  # padding that widens other axes belongs to the channels it pads
            tags = _resampled(known[0].tags, op.shape)
            return lost(lost=op.name) if tags is None else keep(tags)
        if any(isinstance(fill, (int, float)) and fill for fill in (*op.node.args[2:], op.node.kwargs.get("value"))):
            return lost(lost=f"{op.name} of channels")
    if op.kind is Kind.VIEW:
        if any(state.tags is None for state in known):
            return next(state for state in known if state.tags is None)
        tags = moved(op, states)
        return lost(lost=f"{op.name}, whose order of channels could not be followed") if tags is None else keep(tags)
    if op.kind in (Kind.POINTWISE, Kind.NONLINEAR, Kind.PRODUCT, Kind.SOFTMAX):
        return _elementwise(op, states, activations, mixed, loosely)
    first = next(states[source] for source in op.inputs if source in states)
    if first.tags is None or not isinstance(first.tags, Tensor):
        return lost(lost=first.lost or op.name)
    if op.kind is Kind.NORM:
        is_normalised = op.operands[0] in states  # or else it is the scale
        return keep(first.tags) if is_normalised and first.tags.shape == op.shape else lost(lost=op.name)
    if (op.kind is Kind.POOL or op.is_depthwise) and not _pooled_axes(op).isdisjoint(varying_axes(first.tags)):
        return lost(lost=f"{op.name} over the hidden axis")
    if op.kind is Kind.POOL or op.is_depthwise:
        tags = _resampled(first.tags, op.shape)
        return lost(lost=f"{op.name} over another axis") if tags is None else keep(tags)
    if op.kind is Kind.REDUCE:
        if isinstance(value := value_of(op.node), (tuple, list)):  # the largest and where it is
            tags = _reduced(op, first.tags, shape_of(value[0]))
            return lost(lost=f"{op.name} over channels") if tags is None else keep((tags, nothing_in(shape_of(value[0]))))
        tags = _reduced(op, first.tags, op.shape)
        if tags is None and isinstance(value_of(op.node), Tensor):
            return Channels(nothing_in(op.shape), uniform=True, lost=f"{op.name} over channels")
        return lost(lost=f"{op.name} over channels") if tags is None else keep(tags)
    if op.kind is Kind.CONV or (op.is_projection and op in carriers):
        if op.weight is None or not lies_along(first.tags, op.in_axis):
            return lost(lost=f"{op.name} over another axis")
        return Channels(_fresh(op.shape, op.out_axis, op.index), activations + (op in carriers), True)
    if op.is_projection and loosely and op.in_axis % len(op.shape) not in varying_axes(first.tags):
        tags = _resampled(first.tags, op.shape)
        return lost(lost=op.name) if tags is None else keep(tags)
    if op.is_projection:
        return lost(lost=f"{op.weight.name}" if op.weight else "an unnamed weight")
    if op.name == "overwritten":
        return lost(lost="a write in place to a part of it")
    return lost(lost=f"{op.name or op.node.name}, an operation that pe_fx does not follow")


def _elementwise(op: Op, states: dict[Op, Channels], activations: int, mixed: bool, loosely: bool) -> Channels:
    tagged: dict[Op, tuple[Tensor, Channels]] = {}
    others: list[Op] = []
    for source in op.inputs:
        state = states.get(source)
        if state is None or state.tags is None:
            others.append(source)
        elif not isinstance(state.tags, Tensor):
            return Channels(None, lost=op.name)
        elif not state.uniform:
            tagged[source] = (state.tags, state)
    if not tagged:
        known = [states[source] for source in op.inputs if source in states]
        uniform = next((state for state in known if state.tags is not None), known[0])
        return Channels(nothing_in(op.shape), uniform=not others, lost=uniform.lost)
    try:
        wide = [(tags if tags.shape == op.shape else tags.expand(op.shape), state) for tags, state in tagged.values()]
    except RuntimeError:
        return Channels(None, lost=op.name)
    best, kept = wide[0]
    blended = any(state.blended for _, state in wide)
    if len(wide) > 1 and not all(tags is best for tags, _ in wide):
        axes = [varying_axes(tags) for tags, _ in wide]
        full = max(axes, key=len)
        aligned = [(tags, state) for (tags, state), own in zip(wide, axes, strict=True) if own == full]
        if any(own and own != full for own in axes):
            return Channels(None, lost=f"{op.name}, which combines channels in different orders")
        best, kept = next(((tags, state) for tags, state in aligned if not state.mixed), aligned[0])
        blended = blended or any(not (tags is best or state.mixed or torch.equal(tags, best)) for tags, state in aligned)
    chosen_by = op.operands[0] if op.name == "where" else None
    if op.kind is Kind.SOFTMAX or (op.kind is Kind.NONLINEAR and (op.name != "where" or chosen_by in states)):
        return Channels(best, activations + 1, mixed, blended=blended)
    product = op.kind is Kind.PRODUCT
    multiplied = op.operands[1:] if op.name in ("addcmul", "addcdiv") else op.operands  # the first is a summand there
    harmful = [source for source in others if not _constant_along(source.shape, best)] if others else []
    added = [source for source in harmful if not product or source not in multiplied]
    if added and not loosely:
        why = next((states[source].lost for source in added if source in states), "")
        return Channels(None, lost=why or f"{op.name} with a value from elsewhere")
    if product:
        factors_ = sum(source in tagged and not _constant_along(tuple(tagged[source][0].shape), best) for source in multiplied if source)
        inside = any(source in states for source in harmful)
        return Channels(best, activations + (factors_ > 1 or inside), mixed, blended=blended)
    return Channels(best, activations, kept.mixed and mixed, blended=blended)


def _constant_along(shape: Shape, tags: Tensor) -> bool:
    """Whether a value of this shape is broadcast along the axes on which the channels lie."""
    offset = tags.dim() - len(shape)
    return all(axis < offset or shape[axis - offset] == 1 for axis in varying_axes(tags))


def moved(op: Op, states: dict[Op, Channels]) -> Any:
    """Runs a view on the tags; None where it fails, or where it goes by positions that only the model's run will tell."""
    if any(isinstance(value, FakeTensor) and not is_floating(value) for value in map(value_of, op.node.all_input_nodes[1:])):
        return None
    changes_type = any(isinstance(argument, torch.dtype) for argument in (*op.node.args, *op.node.kwargs.values()))
    if op.name in RESHAPES and op.operands[0] in states and not changes_type:
        return _reshaped(states[op.operands[0]].tags, op.shape)
    if op.name == "roll" and op.operands[0] in states and _rolled_axes(op).isdisjoint(varying_axes(states[op.operands[0]].tags)):
        return states[op.operands[0]].tags
    order = iter(op.operands)

    def tags_of(node: fx.Node) -> Any:
        source = next(order)
        if source is not None and source in states:
            return states[source].tags
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            return number(value)
        return nothing_in(shape_of(value)) if is_floating(value) else value

    args, kwargs = fx.node.map_arg((op.node.args, op.node.kwargs), tags_of)
    try:
        hash((args, kwargs))
    except TypeError:  # a slice, before Python 3.12
        result = _viewed.__wrapped__(op.node.target, args, kwargs)  # type: ignore[attr-defined]
    else:
        result = _viewed(op.node.target, args, kwargs)
    return result if shape_of(result) == op.shape else None


@remembered
def _viewed(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if writes(target):  # to the shape of its operand, which others share
        args, kwargs = pytree.tree_map_only(Tensor, lambda tags: tags.view_as(tags), (args, kwargs))
    for copied in (False, True):  # a view that expanded tags refuse may need a copy
        if copied:
            args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))
        with contextlib.suppress(RuntimeError, TypeError, IndexError, NotImplementedError):
            return pytree.tree_map(_lazy, call(target, args, kwargs))
    return None


@remembered
def _reshaped(tags: Any, shape: Shape) -> Tensor | None:
    """The tags in another shape; where they repeat along axes that are reshaped by themselves, still in no memory.

    >>> _reshaped(torch.arange(2.0)[:, None, None].expand(2, 3, 4), (2, 12)).stride()
    (1, 0)
    """
    if not isinstance(tags, Tensor) or tags.numel() != math.prod(shape):
        return None
    small = list(shape)
    for old, new in _regrouped(tags.shape, shape) if tags.numel() else ():
        if all(tags.stride(axis) == 0 or tags.shape[axis] == 1 for axis in old):
            for axis in old:
                tags = tags.narrow(axis, 0, 1)
            for axis in new:
                small[axis] = 1
    return _lazy(tags.reshape(small)).expand(shape)


def _regrouped(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The shortest runs of axes that hold as many entries in both shapes.

    >>> list(_regrouped((2, 3, 4), (6, 2, 2)))
    [(range(0, 2), range(0, 1)), (range(2, 3), range(1, 3))]
    """
    i = j = 0
    while i < len(old) or j < len(new):
        first, second = i, j
        entries = others = 1
        while entries != others or (i, j) == (first, second):
            if j == len(new) or (entries <= others and i < len(old)):
                entries *= old[i]
                i += 1
            else:
                others *= new[j]
                j += 1
        yield range(first, i), range(second, j)


def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a graph's call of a function or of a tensor method."""
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


def _carried(op: Op, states: dict[Op, Channels]) -> Tensor | None:
    """The channels of the values that attention averages."""
    labels = product_labels(op)
    if labels is None:
        return None
    for names, value in reversed(list(zip(labels[:2], factors(op), strict=True))):
        tags = states[value].tags if value is not None and value in states else None
        if not isinstance(tags, Tensor) or tags.is_complex() or tags.dim() != len(names):
            continue
        summed = [axis for axis, label in enumerate(names) if label not in labels[2]]
        tags = _lazy(tags)
        for axis in reversed(summed):
            if tags.stride(axis) == 0:
                tags = tags.select(axis, 0)
                continue
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


def _padded_axes(op: Op) -> set[int]:
    """The axes that padding widens or narrows; its amounts are given from the last axis on."""
    amounts: Any = op.node.args[1]
    return {len(op.shape) - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}


def _rolled_axes(op: Op) -> set[int]:
    """The axes along which a roll moves entries: all, where it names none."""
    dims: Any = op.node.kwargs.get("dims", op.node.args[2] if len(op.node.args) > 2 else ())
    rank = len(op.shape)
    return {dim % rank for dim in ((dims,) if isinstance(dims, int) else dims)} or set(range(rank))


def _pooled_axes(op: Op) -> set[int]:
    """The axes over which a pooling or depthwise convolution looks: the last ones, as many as its name says."""
    rank = len(op.shape)
    digits = [int(mark[0]) for mark in re.findall(r"[123]d", op.name)]
    return set(range(rank - digits[0] if digits else 2, rank))


@remembered
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


def _reduced(op: Op, tags: Tensor, shape: Shape) -> Tensor | None:
    place = 2 if "norm" in op.name else 1
    dims = op.node.kwargs.get("dim", op.node.args[place] if len(op.node.args) > place else None)
    if isinstance(dims, int):
        dims = (dims,)
    if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        return None
    axes = {int(dim) % tags.dim() for dim in dims}  # type: ignore[arg-type]
    if not axes.isdisjoint(varying_axes(tags)):
        return None
    keepdim = len(shape) == tags.dim()
    for axis in sorted(axes, reverse=True):
        tags = tags.narrow(axis, 0, 1) if keepdim else tags.select(axis, 0)
    return tags if tuple(tags.shape) == shape else None


def _lazy(tags: Tensor) -> Tensor:
    """The same tags, repetitions held in no memory even where an operation had to write them out."""
    if any(stride == 0 and size > 1 for stride, size in zip(tags.stride(), tags.shape, strict=True)):
        return tags
    small = tags
    for axis in range(tags.dim()):
        if small.shape[axis] > 1 and _repeats(small, axis):
            small = small.narrow(axis, 0, 1)
    return small.expand(tags.shape)


def _repeats(tags: Tensor, axis: int) -> bool:
    return torch.equal(tags, tags.narrow(axis, 0, 1).expand_as(tags))  # stops at the first difference


def _shrink(tags: Tensor, keep: int = -1) -> Tensor:
    """The tags without the repetitions that expand() made: stride 0 costs nothing to hold, but much to compare."""
    for axis in range(tags.dim()):
        if axis != keep and tags.stride(axis) == 0 and tags.shape[axis] > 1:
            tags = tags.narrow(axis, 0, 1)
    return tags
