"""Where channels go: numbers sent through operations, views understood by running them."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pe_fx.graph.operation import Op, factors, product_labels, shape_of
from pe_fx.graph.ops import Kind, base_name, value_of
from pe_fx.graph.tags import along, channels_in, expand_along, lazy, lies_along, listed, nothing_in, remembered, shrunk, varying_axes
from pe_fx.graph.views import call, moved
from pe_fx.graph.walks import reached
from pe_fx.ties import Shape


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


def held(state: Channels | None) -> Sequence[int] | None:
    """All channels of the origin that a value holds, sorted; None where it holds anything else (beside padding), or mixtures of them."""
    return None if state is None or state.mixed else channels_in(state.tags)


def held_in_sums(states: Mapping[Op, Channels], value: Op) -> Sequence[int] | None:
    """As `held`, of a value that may also hold sums of the origin's channels: all that are in them."""
    if not states[value].blended:
        return held(states[value])
    ways = reached(value, lambda op: [source for source in op.inputs if source in states] if states[op].blended else [])
    parts = [held(states[op]) for op in ways if not states[op].blended and 0 not in op.shape]
    return held(states[value]) if None in parts else listed(sorted({channel for part in parts for channel in part or ()}))


def arriving(states: dict[Op, Channels], op: Op) -> Channels:
    """What arrives at the value operand of the projection `op`."""
    for source in op.inputs:
        if source in states:
            return states[source]
    return Channels(None, lost="nothing of it arrives")


_ENTRYWISE = {Kind.POINTWISE, Kind.NONLINEAR, Kind.PRODUCT, Kind.SOFTMAX}
_PADS = ("pad", "constant_pad_nd")


@remembered
def _fresh(shape: Shape, axis: int, index: int) -> Tensor:
    """The tags of channels that are the mixture of others, made by the operation of this index."""
    return expand_along(torch.arange(1.0, shape[axis] + 1, dtype=torch.float64) + 2.0**24 * (index + 1), shape, axis)


def transfer(op: Op, states: dict[Op, Channels], carriers: Container[Op], loosely: bool) -> Channels:
    known = [states[source] for source in op.inputs if source in states]
    if not known:
        return Channels(None, lost="nothing of it")
    if all(state.tags is None for state in known) or (len(op.inputs) == 1 and _keeps(op, known[0])):
        return known[0]
    carrying = [state for state in known if state.tags is not None and not state.uniform]
    activations, mixed, blended = 0, False, False
    for state in known:
        mixed |= state.mixed
    for state in carrying:
        activations = max(activations, state.activations)
        blended |= state.blended
    if op.kind in _ENTRYWISE:
        return _elementwise(op, states, activations, mixed, loosely)

    def keep(tags: Any) -> Channels:
        return Channels(tags, activations, mixed, not carrying, "", blended)

    def lost(by: str) -> Channels:
        return Channels(None, lost=by)

    if op in carriers and op.kind in (Kind.MATMUL, Kind.ATTEND):
        tags = _carried(op, states)
        return lost(f"the product {op.node.name}") if tags is None else Channels(tags, activations + 1, mixed, blended=blended)
    if op.name in _PADS and isinstance(known[0].tags, Tensor):
        if _padded_axes(op).isdisjoint(varying_axes(known[0].tags)):  # padding that widens other axes belongs to the channels it pads
            tags = _resampled(known[0].tags, op.shape)
            return lost(op.name) if tags is None else keep(tags)
        if any(isinstance(fill, (int, float)) and fill for fill in (*op.node.args[2:], op.node.kwargs.get("value"))):
            return lost(f"{op.name} of channels")
    if op.kind is Kind.VIEW:
        if any(state.tags is None for state in known):
            return next(state for state in known if state.tags is None)
        tags = moved(op, {source: states[source].tags for source in op.inputs if source in states})
        return lost(f"{op.name}, whose order of channels could not be followed") if tags is None else keep(tags)
    first = next(states[source] for source in op.inputs if source in states)
    if first.tags is None or not isinstance(first.tags, Tensor):
        return lost(first.lost or op.name)
    if op.kind is Kind.NORM:
        is_normalised = op.operands[0] in states  # or else it is the scale
        return keep(first.tags) if is_normalised and first.tags.shape == op.shape else lost(op.name)
    if op.kind is Kind.POOL or op.is_depthwise:
        value, several = _first(value_of(op.node))
        shape = shape_of(value)
        if not _pooled_axes(op.name, len(shape)).isdisjoint(varying_axes(first.tags)):
            return lost(f"{op.name} over the hidden axis")
        tags = _resampled(first.tags, shape)
        return lost(f"{op.name} over another axis") if tags is None else keep((tags, nothing_in(shape)) if several else tags)
    if op.kind is Kind.REDUCE:
        value, several = _first(value_of(op.node))
        shape = shape_of(value)
        tags = _reduced(op, first.tags, shape)
        if tags is None and op.name == "sum" and len(shape) < first.tags.dim():  # a rotation written out adds pairs of channels
            pairs = _reduced(op, first.tags, shape, adding=True)
            if pairs is not None and varying_axes(pairs):
                return Channels(pairs, activations, mixed, blended=True)
        if tags is None and not several:
            return Channels(nothing_in(shape), uniform=True, lost=f"{op.name} over channels")
        return lost(f"{op.name} over channels") if tags is None else keep((tags, nothing_in(shape)) if several else tags)
    if op.kind is Kind.CONV or (op.is_projection and op in carriers):
        if op.weight is None or not lies_along(first.tags, op.in_axis):
            return lost(f"{op.name} over another axis")
        return Channels(_fresh(op.shape, op.out_axis, op.index), activations + (op in carriers), True)
    if op.is_projection and loosely and op.in_axis % len(op.shape) not in varying_axes(first.tags):
        tags = _resampled(first.tags, op.shape)
        return lost(op.name) if tags is None else keep(tags)
    if op.is_projection:
        return lost(f"{op.weight.name}" if op.weight else "an unnamed weight")
    if op.kind is Kind.WRITE:  # what is written into memory that held something else is what is read from there
        tags = _written(op, states)
        return lost("a write in place to a part of it") if tags is None else keep(tags)
    return lost(f"{op.name or op.node.name}, an operation that pe_fx does not follow")


def _keeps(op: Op, state: Channels) -> bool:
    """Whether an operation on one value changes nothing of what that holds."""
    return op.kind is Kind.POINTWISE and isinstance(state.tags, Tensor) and state.tags.shape == op.shape


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
    harmful = [source for source in others if source in states and not _constant_along(source.shape, best)]  # others modulate
    added = [source for source in harmful if not product or source not in multiplied]
    if added and not loosely:
        return Channels(None, lost=states[added[0]].lost)
    if product:
        factors_ = sum(source in tagged and not _constant_along(tuple(tagged[source][0].shape), best) for source in multiplied if source)
        return Channels(best, activations + (factors_ > 1 or bool(harmful)), mixed, blended=blended)
    return Channels(best, activations, kept.mixed and mixed, blended=blended)


def _constant_along(shape: Shape, tags: Tensor) -> bool:
    """Whether a value of this shape is broadcast along the axes on which the channels lie."""
    offset = tags.dim() - len(shape)
    return all(axis < offset or shape[axis - offset] == 1 for axis in varying_axes(tags))


def _carried(op: Op, states: dict[Op, Channels]) -> Tensor | None:
    """The channels of the values that attention averages."""
    labels = product_labels(op)
    if labels is None:
        return None
    for names, value in reversed(list(zip(labels[:2], factors(op), strict=True))):
        tags = states[value].tags if value is not None and value in states else None
        if isinstance(tags, Tensor) and not tags.is_complex() and tags.dim() == len(names):
            if op.kind is Kind.ATTEND and tags.shape[-3:-2] not in ((), op.shape[-3:-2]):  # grouped queries: heads share their values
                tags = shrunk(tags, keep=tags.dim() - 3).repeat_interleave(op.shape[-3] // tags.shape[-3], -3)
            averaged = _averaged(tags, names, labels[2], op.shape)
            if averaged is not None:
                return averaged
    return None


@remembered
def _averaged(tags: Tensor, names: str, result: str, shape: Shape) -> Tensor | None:
    """The tags of a factor of a product, whose axes are labelled as those of the result; None where channels are summed."""
    tags = lazy(tags)
    for axis, label in reversed(list(enumerate(names))):
        if label in result:
            continue
        largest = tags.select(axis, 0) if tags.stride(axis) == 0 else tags.amax(axis)
        if tags.stride(axis) != 0 and not bool(((tags == largest.unsqueeze(axis)) | (tags == 0)).all()):
            return None
        tags = largest
    kept = [label for label in names if label in result]
    tags = tags.permute([kept.index(label) for label in result if label in kept])
    for axis, label in enumerate(result):
        if label not in kept:
            tags = tags.unsqueeze(axis)
    try:
        return tags.expand(shape)
    except RuntimeError:
        return None


def _written(op: Op, states: dict[Op, Channels]) -> Tensor | None:
    """The tags of memory that held something else and to which a value is written: at other positions of axes that hold no channels, or
    into a part of these."""
    node: Any = op.node
    memory = op.operands[0]
    while memory is not None and memory.kind is Kind.WRITE:
        memory = memory.operands[0]
    before, written = (states[source].tags if source in states else None for source in (op.operands[0], op.inputs[-1]))
    if memory in states or not isinstance(written, Tensor) or not isinstance(before, Tensor | None):
        return None
    chosen: set[int] = set()
    if op.name == "overwritten":
        steps = [node.args[1].args[0]]
        while steps[-1] is not node.args[0] and base_name(steps[-1]) in ("slice", "narrow", "select"):
            steps.append(steps[-1].args[0])
        if steps.pop() is not node.args[0]:
            return None
        plain = _resampled(written, op.shape) if before is None else None
        return plain if plain is not None else _replayed(steps[::-1], before, written, op.shape)
    if op.name == "index_put":
        chosen = {axis for axis, index in enumerate(node.args[1]) if index is not None}
    elif op.name == "index_copy":
        chosen = {node.args[1] % len(op.shape)}
    if before is not None or len(chosen) > 1:
        return None
    return _resampled(written, op.shape) if chosen.isdisjoint(varying_axes(written)) else None


def _replayed(steps: Sequence[Any], before: Tensor | None, written: Tensor, shape: Shape) -> Tensor | None:
    """The tags of memory after the same write; none where that would take long, or goes by what only the model's run will tell."""
    arguments = [argument for step in steps for argument in (*step.args[1:], *step.kwargs.values())]
    if math.prod(shape) > 2**20 or not all(isinstance(argument, int) for argument in arguments):
        return None
    memory = torch.zeros(shape, dtype=torch.float64) if before is None else before.expand(shape).clone()
    part = memory
    for step in steps:
        part = call(step.target, (part, *step.args[1:]), step.kwargs)
    part.copy_(written)
    return lazy(memory)


def _padded_axes(op: Op) -> set[int]:
    """The axes that padding widens or narrows; its amounts are given from the last axis on."""
    amounts: Any = op.node.args[1]
    return {len(op.shape) - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}


def _first(value: Any) -> tuple[Any, bool]:
    """The first of several results, such as the largest entries and where they are."""
    several = isinstance(value, (tuple, list))
    return (value[0] if several else value), several


def _pooled_axes(name: str, rank: int) -> set[int]:
    """The axes over which a pooling or depthwise convolution looks: the last ones, as many as its name says."""
    digits = [int(mark[0]) for mark in re.findall(r"[123]d", name)]
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
    return along(tags.expand(shape), varying)


def _reduced(op: Op, tags: Tensor, shape: Shape, adding: bool = False) -> Tensor | None:
    """The tags without the axes that are reduced; None where channels lie along these, but where they are added up: one stands for all."""
    place = 2 if "norm" in op.name else 1
    dims = op.node.kwargs.get("dim", op.node.args[place] if len(op.node.args) > place else None)
    if isinstance(dims, int):
        dims = (dims,)
    if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        return None
    axes = {int(dim) % tags.dim() for dim in dims}  # type: ignore[arg-type]
    if not (adding or axes.isdisjoint(varying_axes(tags))):
        return None
    keepdim = len(shape) == tags.dim()
    for axis in sorted(axes, reverse=True):
        tags = tags.narrow(axis, 0, 1) if keepdim else tags.select(axis, 0)
    return tags if tuple(tags.shape) == shape else None
