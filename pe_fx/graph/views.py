"""Views: where they move tags, found by running them, or without a run where that is known."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from pe_fx.graph.operation import Op, is_floating, number, shape_of
from pe_fx.graph.ops import RESHAPES, value_of, writes
from pe_fx.graph.tags import lazy, nothing_in, remembered, varying_axes
from pe_fx.ties import Shape

Tags = Mapping[Op | None, Any]
"""The tags of those operands that are followed."""


def moved(op: Op, tags: Tags) -> Any:
    """The tags of a view's result; None where it fails, or where it goes by positions that only the model's run will tell."""
    if any(isinstance(value, FakeTensor) and not is_floating(value) for value in map(value_of, op.node.all_input_nodes[1:])):
        return None
    result = _KNOWN[op.name](op, tags) if op.name in _KNOWN else None
    if result is None:
        result = _run(op, tags)
    return result if shape_of(result) == op.shape else None


def _run(op: Op, tags: Tags) -> Any:
    args, kwargs = _arguments(op, tags)
    try:
        hash((args, kwargs))
    except TypeError:  # a slice, before Python 3.12
        return _viewed.__wrapped__(op.node.target, args, kwargs)  # type: ignore[attr-defined]
    return _viewed(op.node.target, args, kwargs)


def _arguments(op: Op, tags: Tags) -> tuple[Any, Any]:
    """The arguments of a call, with tags in place of values."""
    args, kwargs = op.node.args, op.node.kwargs
    if len(op.operands) == 1 and isinstance(args[0], fx.Node) and op.operands[0] in tags:  # as most are
        return (tags[op.operands[0]], *args[1:]), kwargs
    order = iter(op.operands)

    def tags_of(node: fx.Node) -> Any:
        source = next(order)
        if source in tags:
            return tags[source]
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            return number(value)
        return nothing_in(shape_of(value)) if is_floating(value) else value

    mapped: tuple[Any, Any] = fx.node.map_arg((args, kwargs), tags_of)
    return mapped


@remembered
def _viewed(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if writes(target):  # to the shape of its operand, which others share
        args, kwargs = pytree.tree_map_only(Tensor, lambda tags: tags.view_as(tags), (args, kwargs))
    for copied in (False, True):  # a view that expanded tags refuse may need a copy
        if copied:
            args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))
        with contextlib.suppress(RuntimeError, TypeError, IndexError, NotImplementedError):
            return pytree.tree_map(lazy, call(target, args, kwargs))
    return None


def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a graph's call of a function or of a tensor method."""
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------- without a run


def _reshape(op: Op, tags: Tags) -> Tensor | None:
    own = tags.get(op.operands[0])
    reinterprets = any(isinstance(argument, torch.dtype) for argument in (*op.node.args, *op.node.kwargs.values()))
    return _reshaped(own, op.shape) if isinstance(own, Tensor) and not reinterprets else None


@remembered
def _reshaped(tags: Tensor, shape: Shape) -> Tensor | None:
    """The tags in another shape; where they repeat along axes that are reshaped by themselves, still in no memory.

    >>> _reshaped(torch.arange(2.0)[:, None, None].expand(2, 3, 4), (2, 12)).stride()
    (1, 0)
    """
    if tags.numel() != math.prod(shape):
        return None
    small = list(shape)
    for old, new in _regrouped(tags.shape, shape) if tags.numel() else ():
        if all(tags.stride(axis) == 0 or tags.shape[axis] == 1 for axis in old):
            for axis in old:
                tags = tags.narrow(axis, 0, 1)
            for axis in new:
                small[axis] = 1
    return lazy(tags.reshape(small)).expand(shape)


@remembered
def _joined(parts: tuple[Tensor, ...], axis: int, is_new: bool, shape: Shape) -> Tensor | None:
    """The tags of what was joined along an axis, in no memory along those on which all parts repeat; None where they do not fit."""
    axis %= len(shape)
    parts = tuple(tags.unsqueeze(axis) for tags in parts) if is_new else parts
    if any(tags.dim() != len(shape) for tags in parts):
        return None
    others = [other for other in range(len(shape)) if other != axis]
    repeated = [other for other in others if all(tags.stride(other) == 0 and tags.shape[other] == shape[other] for tags in parts)]
    for other in repeated:
        parts = tuple(tags.narrow(other, 0, 1) for tags in parts)
    with contextlib.suppress(RuntimeError):
        joined = torch.cat(parts, axis)
        if all(other in repeated or joined.shape[other] == size for other, size in enumerate(shape)):
            return lazy(joined).expand(shape)
    return None


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


def _roll(op: Op, tags: Tags) -> Tensor | None:
    own = tags.get(op.operands[0])
    return own if isinstance(own, Tensor) and _rolled_axes(op).isdisjoint(varying_axes(own)) else None


def _rolled_axes(op: Op) -> set[int]:
    """The axes along which a roll moves entries: all, where it names none."""
    dims: Any = op.node.kwargs.get("dims", op.node.args[2] if len(op.node.args) > 2 else ())
    rank = len(op.shape)
    return {dim % rank for dim in ((dims,) if isinstance(dims, int) else dims)} or set(range(rank))


def _join(op: Op, tags: Tags) -> Tensor | None:
    nodes = op.node.args[0] if op.node.args else None
    if not isinstance(nodes, (list, tuple)) or len(nodes) != len(op.operands):
        return None
    axis: Any = op.node.kwargs.get("dim", op.node.args[1] if len(op.node.args) > 1 else 0)
    parts = tuple(
        tags[source] if source in tags else nothing_in(shape_of(value_of(node)))  # type: ignore[arg-type]
        for node, source in zip(nodes, op.operands, strict=True)
    )
    return _joined(parts, axis, op.name == "stack", op.shape)


_KNOWN: dict[str, Callable[[Op, Tags], Tensor | None]] = {
    **dict.fromkeys(RESHAPES, _reshape),
    "roll": _roll,
    "cat": _join,
    "stack": _join,
}
