"""The models of the sweep: how each is built, and with which inputs it is planned and verified."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision import models as vision  # type: ignore[import-untyped]

SMALL = (96, 112, 128)
"""Image sizes to verify at: a graph's ties do not depend on the size, the time does."""
LARGEST = 5e8
"""The most parameters that a model may have that is built in memory."""


@dataclass
class Built:
    """A model with inputs that fit it; `how` says how it was built."""

    model: nn.Module
    inputs: Any
    how: str


@dataclass
class Entry:
    """A model of a set: its family, ways to build it for planning, in the order in which they are tried, and for verifying."""

    family: str
    candidates: Callable[[], Iterator[Built]]
    verifiable: Callable[[int, Built], Built | None]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' * (len(text) > 300)}"


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def moved(inputs: Any, device: str) -> Any:
    """The inputs, whose tensors may lie in lists, tuples and dicts, on another device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: moved(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(moved(value, device) for value in inputs)
    return inputs


def entry(
    build: Callable[..., nn.Module],
    size: Sequence[int],
    family: str,
    shallow: Sequence[Mapping[str, Any]] = (),
    resized: Callable[[int], Mapping[str, Any]] = lambda size: {},
) -> Entry:
    """The entry of a model of images that a function of a library makes.

    `shallow` are options that make the model small, `resized` those that make it fit another image size.
    """
    images = torch.randn(2, *size)

    def candidates() -> Iterator[Built]:
        with contextlib.suppress(Exception):  # constructors that compute with their weights; built in memory next
            yield Built(on_meta(build), images.to("meta"), "meta")
        yield Built(build(), images, "memory")

    def verifiable(limit: int, planned: Built) -> Built | None:
        fits = count(planned.model) <= limit
        for options in ({},) if fits else shallow:
            for side in (*(side for side in SMALL if side < size[-1]), None):
                small = images if side is None else images[:, :, :side, :side]
                for extra in ({},) if side is None else ({}, resized(side)):
                    with contextlib.suppress(Exception):  # options that the constructor, or sizes that the model, does not take
                        model = on_meta(lambda: build(**options, **extra))  # noqa: B023
                        if count(model) <= limit:
                            model.eval()(small.to("meta"))
                            return Built(build(**options, **extra), small, "full" if fits else "shallow")
        return Built(build(), images, "full") if fits else None

    return Entry(family, candidates, verifiable)


TIMM_SHALLOW = (
    {"depth": 2},
    {"depths": (1, 1, 1, 1)},
    {"depths": (2, 2, 2, 2)},
    {"layers": (1, 1, 1, 1)},
    {"depth": 4},
    {"depths": (2, 2, 2)},
    {"num_layers": 2},
)


class BuildError(Exception):
    """No configuration and no inputs were found with which the model runs."""


def small_entry(
    family: str,
    builds: Mapping[str, Callable[[], nn.Module]],
    variants: Callable[[Any], Iterator[Iterator[dict[str, Any]]]],
) -> Entry:
    """The entry of an architecture of which the first of some builds is taken that runs with any inputs.

    `variants` yields, for a model, variants of inputs, each a number of alternatives that may fit.
    """

    def candidates() -> Iterator[Built]:
        errors: list[str] = []
        what = "options"
        for how, build in builds.items():
            try:
                if count(on_meta(build)) > LARGEST:
                    continue
                model = build().eval()
            except Exception as error:
                errors.append(f"{how}: {one_line(error)}")
                continue
            what = "inputs"
            fitting = False
            for variant in variants(model):
                inputs = _fitting(model, variant, errors)
                if inputs is not None:
                    fitting = True
                    yield Built(model, inputs, how)
            if fitting:
                return
        raise BuildError(f"no {what} fit: {'; '.join(dict.fromkeys(errors))}")

    return Entry(family, candidates, lambda limit, planned: planned if count(planned.model) <= limit else None)


def _fitting(model: nn.Module, variant: Iterator[dict[str, Any]], errors: list[str]) -> dict[str, Any] | None:
    """The first of the inputs with which the model runs."""
    for inputs in variant:
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:
            errors.append(f"{', '.join(inputs)}: {one_line(error)}")
        else:
            return inputs
    return None


def alternatives(values: Mapping[str, Iterable[Any]], limit: int) -> Iterator[dict[str, Any]]:
    """
    >>> list(alternatives({"ids": [1], "mask": [None, 2]}, limit=60))
    [{'ids': 1, 'mask': None}, {'ids': 1, 'mask': 2}]
    """
    for chosen in itertools.islice(itertools.product(*map(list, values.values())), limit):
        yield dict(zip(values, chosen, strict=True))


def timm_names() -> list[str]:
    return list(timm.list_models())


def timm_entry(name: str) -> Entry:
    configuration = timm.get_pretrained_cfg(name)
    module = inspect.getmodule(timm.model_entrypoint(name))
    return entry(
        lambda **options: timm.create_model(name, pretrained=False, **options),
        configuration.input_size if configuration is not None else (3, 224, 224),
        module.__name__.rpartition(".")[2] if module else "",
        TIMM_SHALLOW,
        lambda side: {"img_size": side},
    )


def torchvision_names() -> list[str]:
    return [name for module in (vision, vision.segmentation, vision.detection) for name in vision.list_models(module=module)]


def torchvision_entry(name: str) -> Entry:
    """Detectors are given images and, for train mode, what is to be found in them."""
    builder = vision.get_model_builder(name)
    family = builder.__module__.rpartition(".")[2]
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if "init_weights" in inspect.signature(builder).parameters:
        options["init_weights"] = False
    if ".detection." in builder.__module__:
        found = {"boxes": torch.tensor([[10.0, 20.0, 90.0, 120.0]]), "labels": torch.tensor([1])}
        found |= {"masks": torch.ones(1, 128, 160, dtype=torch.uint8), "keypoints": torch.ones(1, 17, 3)}
        inputs = [torch.rand(3, 128, 160) for _ in range(2)], [dict(found) for _ in range(2)]
        small = options | ({"min_size": 128, "max_size": 160} if "ssd" not in name else {})
        built = Built(builder(**small), inputs, "memory")
        return Entry(family, lambda: iter([built]), lambda limit, planned: planned if count(planned.model) <= limit else None)
    side = 299 if name == "inception_v3" else 224
    return entry(lambda **extra: builder(**options, **extra), (3, side, side), family, resized=lambda side: {"image_size": side})
