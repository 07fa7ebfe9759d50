"""Tags: small tensors of numbers that are sent through operations in place of a value's channels."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pe_fx.graph.threads import one_thread
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
    """Tags are small tensors on the CPU, whatever the default device, and nothing is garbage before the end.

    A collection of garbage looks through the graph, the model and whatever else is held, of which nothing goes: in a deep net it would
    be half of the time.
    """
    collects = gc.isenabled()
    elsewhere = torch.get_default_device().type != "cpu"
    gc.disable()
    try:
        with one_thread(), torch.device("cpu") if elsewhere else contextlib.nullcontext():  # this mode costs time in every call
            yield
    finally:
        if collects:
            gc.enable()
        for cached in _caches:
            cached.cache_clear()


@remembered
def channels_along(tags: Any, axis: int) -> Sequence[int] | None:
    """The channel at each position of `axis`; None where it depends on the other axes too, is not of the origin, or is a pair.

    >>> channels_along(torch.tensor([[3.0, 1.0], [3.0, 0.0]]), 1)
    (2, 0)
    """
    if not isinstance(tags, Tensor) or tags.is_complex():
        return None
    flat = shrunk(tags, keep=axis % tags.dim()).movedim(axis, -1)
    flat = flat.reshape(-1, flat.shape[-1])
    largest = flat.amax(0)
    if not bool(((flat == largest) | (flat == 0)).all()) or not bool((largest > 0).all()):
        return None
    return listed((largest.long() - 1).tolist())


@remembered
def channels_in(tags: Any) -> Sequence[int] | None:
    """All channels of the origin that a value holds, sorted; None where it holds anything else (beside padding)."""
    if not isinstance(tags, Tensor) or tags.is_complex() or not tags.numel():
        return None
    present = torch.unique(shrunk(tags)).long() - 1  # type: ignore[no-untyped-call]
    if present[0] < -1 or present[-1] < 0:
        return None
    return listed(present[present >= 0].tolist())


def listed(numbers: list[int]) -> Sequence[int]:
    """The numbers, as a range where they are consecutive: those are compared at no cost."""
    consecutive = range(numbers[0], numbers[0] + len(numbers)) if numbers else range(0)
    return consecutive if numbers == list(consecutive) else tuple(numbers)


def varying_axes(tags: Tensor) -> tuple[int, ...]:
    """The axes along which the tags differ.

    >>> varying_axes(torch.arange(3.0).expand(2, 3))
    (1,)
    """
    known: tuple[int, ...] | None = tags.__dict__.get("varying")
    return _found_to_vary(tags) if known is None else known


def along(tags: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The same tags, of which it is known that they differ along these axes."""
    tags.__dict__["varying"] = axes
    return tags


@remembered
def _found_to_vary(tags: Tensor) -> tuple[int, ...]:
    small = shrunk(lazy(tags))
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
def nothing_in(shape: Shape) -> Tensor:
    """The tags of a value that holds no channel of the origin."""
    return torch.zeros((), dtype=torch.float64).expand(shape)


def expand_along(values: Tensor, shape: Shape, axis: int) -> Tensor:
    """`values`, which differ, along `axis`, the same at all other positions, in no memory."""
    view = [1] * len(shape)
    view[axis] = -1
    return along(values.view(view).expand(shape), (axis % len(shape),) if len(values) > 1 else ())


def lazy(tags: Tensor) -> Tensor:
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


def shrunk(tags: Tensor, keep: int = -1) -> Tensor:
    """The tags without the repetitions that expand() made: stride 0 costs nothing to hold, but much to compare."""
    strides = tags.stride()
    sizes = [1 if stride == 0 and axis != keep else size for axis, (size, stride) in enumerate(zip(tags.shape, strides, strict=True))]
    return tags if 0 in tags.shape else tags.as_strided(sizes, strides)
