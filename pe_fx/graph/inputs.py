"""Example inputs in every form: a tensor, a tuple or a dict, and the tensors that they hold."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def as_arguments(example_inputs: ExampleInputs, model: nn.Module | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments.

    >>> as_arguments({"x": 1})
    ((), {'x': 1})

    A dict is one positional argument where the model's forward takes such, and not what is in it.
    """
    if isinstance(example_inputs, Mapping):
        one = model is not None and _takes(model, example_inputs) and not _takes(model, **example_inputs)
        return ((example_inputs,), {}) if one else ((), dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _takes(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def enumerate_tensors(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """The tensors among positional and keyword arguments, with their places.

    >>> import torch
    >>> [name for name, _ in enumerate_tensors((([torch.ones(1)], 2), {"mask": torch.ones(1)}))]
    ['0.0', 'mask']
    """
    args, kwargs = arguments
    return [*_places("", args), *_places("", kwargs)]


def _places(prefix: str, values: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(values, Tensor):
        yield prefix, values
    elif isinstance(values, (Mapping, tuple, list)):
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _places(f"{prefix}.{key}".lstrip("."), value)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor that a value of any type holds.

    >>> import torch
    >>> len(tensors_in({"a": torch.ones(1), "b": (torch.ones(2), None)}))
    2
    """
    return list(_tensors(value, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, (str, bytes, int, float, type(None), nn.Module)):
        seen.add(id(value))
        if isinstance(value, Mapping):
            children = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            children = list(value)
        else:
            slots = [name for cls in type(value).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
            children = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
        for child in children:
            yield from _tensors(child, seen)


def _names(slots: str | Iterable[str]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
