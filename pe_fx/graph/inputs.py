"""What inputs a model takes: given as a tensor, a tuple or a dict, or derived from the model."""

from __future__ import annotations

import contextlib
import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def as_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """
    >>> as_arguments({"x": 1})
    ((), {'x': 1})
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


IMAGE_SIZES = (224, 64, 32, 256, 128, 96, 160, 192, 288, 384, 448, 512)
LENGTHS = (64, 16, 1024, 16000)


def derive_inputs(model: nn.Module) -> Iterator[ExampleInputs]:
    """Inputs that may fit, the likeliest first: timm's `pretrained_cfg`, transformers' `dummy_inputs`, the first layer's shape.

    >>> next(derive_inputs(nn.Linear(3, 5))).shape
    torch.Size([2, 3])
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it is

    def random_like(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(like)

    configuration = getattr(model, "pretrained_cfg", None)
    if isinstance(configuration, Mapping) and "input_size" in configuration:
        yield random_like(2, *configuration["input_size"])
    with contextlib.suppress(Exception):  # a property of a user's model may raise anything
        dummy = model.dummy_inputs
        if isinstance(dummy, Mapping):
            inputs = {key: value.to(like.device) if isinstance(value, Tensor) else value for key, value in dummy.items()}
            takes = inspect.signature(model.forward).parameters
            yield inputs
            if "attention_mask" in takes:  # some make none for themselves while they are traced
                inputs = {"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs
                yield inputs
            if "pixel_values" in takes and takes.keys() >= dummy.keys():  # text and images
                first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
                for size in IMAGE_SIZES:
                    yield inputs | {"pixel_values": random_like(len(inputs["input_ids"]), first.in_channels, size, size)}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield random_like(2, module.in_features)
            yield random_like(2, 16, module.in_features)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            for size in LENGTHS if isinstance(module, nn.Conv1d) else IMAGE_SIZES:
                yield random_like(2, module.in_channels, *[size] * len(module.kernel_size))
        elif isinstance(module, nn.Embedding):
            yield torch.randint(module.num_embeddings, (2, 16), generator=generator, device="cpu").to(like.device)
        else:
            continue
        return


def enumerate_tensors(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """The tensors among positional and keyword arguments, with their places.

    >>> [name for name, _ in enumerate_tensors(((torch.ones(1), 2), {"mask": torch.ones(1)}))]
    ['0', 'mask']
    """
    args, kwargs = arguments
    named = [*((str(i), value) for i, value in enumerate(args)), *kwargs.items()]
    return [(name, value) for name, value in named if isinstance(value, Tensor)]


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor that a value of any type holds.

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
