"""Example inputs, made of what a model tells about itself: what its forward takes, its configuration, its first layer."""

from __future__ import annotations

import contextlib
import enum
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pe_fx.graph.inputs import ExampleInputs

IMAGE_SIZES = (224, 64, 32, 256, 128, 96, 160, 192, 288, 384, 448, 512)
CUBES = (64, 32, 96, 128)
LENGTHS = (64, 16, 1024, 16000)
BATCH, FRAMES = 2, 16

SETTINGS = {  # what configurations call a thing
    "configuration": ("config", "cfg", "pretrained_cfg"),
    "image": ("image_size", "img_size", "input_size", "crop_size", "sample_size"),
    "channels": ("num_channels", "in_channels", "in_chans"),
    "patch": ("patch_size",),
    "vocabulary": ("vocab_size",),
    "rate": ("sampling_rate", "sample_rate"),
    "bins": ("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "feature_projection_input_dim"),
    "context": ("cross_attention_dim", "joint_attention_dim"),
    "frames": ("max_source_positions", "max_length"),
}


def derive_inputs(model: nn.Module) -> Iterator[ExampleInputs]:
    """Inputs that may fit, the likeliest first.

    >>> next(derive_inputs(nn.Linear(3, 5))).shape
    torch.Size([2, 3])
    """
    make = _Maker(model)
    takes = inspect.signature(model.forward).parameters
    yield from (make.random(BATCH, *value) for value in make.settings("image") if isinstance(value, tuple | list) and len(value) == 3)
    if takes.keys() >= {"images", "targets"}:
        yield make.detection()
    variants = list(dict.fromkeys(_variants(takes)))
    for names in variants:
        yield from make.named(names, {})
    if not variants:
        yield from make.for_first_layer()


def _variants(takes: Mapping[str, inspect.Parameter]) -> Iterator[tuple[str, ...]]:
    """Which of the inputs whose names say what they are may go together: text, images or sound, and one of these beside text; or
    several that must be given."""
    must = [name for name, own in takes.items() if own.default is own.empty and own.kind is own.POSITIONAL_OR_KEYWORD]
    if len(must) > 1 and all(name in _MAKERS for name in must):
        yield tuple(must)
    required = [name for name in must if name in _SURE]
    text = [name for name in ("input_ids",) if name in takes]
    media = [name for name in ("pixel_values", "input_values", "input_features") if name in takes]
    first = [text] if text else [[name] for name in media]
    beside = [name for name in ("attention_mask", "decoder_input_ids") if name in takes]
    for chosen in (*first, *([*one, name] for name in beside for one in first), *([*text, name] for name in media if text)):
        yield tuple(name for name in _SURE if name in (*required, *chosen))


class _Maker:
    """Makes tensors for a model, on its device and in its dtype. The caller's random state stays as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.generator = torch.Generator().manual_seed(0)
        self.holders = list(_holders(model))
        self.dummies = self._dummies()

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu").to(self.like)

    def ids_below(self, limit: int) -> Tensor:
        return torch.randint(limit, (BATCH, 16), generator=self.generator, device="cpu").to(self.like.device)

    def settings(self, what: str) -> Iterator[Any]:
        """What is set under one of a thing's names, by the model and its own configuration before what is within."""
        return (value for holder in self.holders for name in SETTINGS[what] if (value := _get(holder, name)) is not None)

    def numbers(self, what: str) -> list[int]:
        return list(dict.fromkeys(value for value in self.settings(what) if type(value) is int))

    def _dummies(self) -> dict[str, Any]:
        """transformers' inputs for tests, where forward takes them."""
        with contextlib.suppress(Exception):  # a property of a user's model may raise anything
            dummies = self.model.dummy_inputs
            if isinstance(dummies, Mapping) and inspect.signature(self.model.forward).parameters.keys() >= dummies.keys():
                return {key: value.to(self.like.device) if isinstance(value, Tensor) else value for key, value in dummies.items()}
        return {}

    # ---- by name

    def named(self, names: Sequence[str], given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """All ways to add inputs of these names to those given."""
        if not names:
            yield {**(self.dummies if given.keys() & self.dummies.keys() else {}), **given}
            return
        for value in _MAKERS[names[0]](self, given):
            yield from self.named(names[1:], {**given, names[0]: value})

    def ids(self, given: Mapping[str, Any]) -> Iterator[Tensor]:
        if "input_ids" in self.dummies:
            yield self.dummies["input_ids"]
        embeddings = [module.num_embeddings for module in self.model.modules() if isinstance(module, nn.Embedding)]
        yield self.ids_below(next(iter((*self.numbers("vocabulary"), *embeddings)), 2))

    def decoder_ids(self, given: Mapping[str, Any]) -> Iterator[Tensor]:
        return iter([given["input_ids"]]) if "input_ids" in given else self.ids(given)

    def mask(self, given: Mapping[str, Any]) -> Iterator[Tensor]:
        if "input_ids" in given:
            yield torch.ones_like(given["input_ids"])

    def images(self, given: Mapping[str, Any]) -> Iterator[Tensor]:
        channels = self._channels()
        return (self.random(_rows(given), channels, *size) for size in self._image_sizes())

    def sound(self, given: Mapping[str, Any]) -> Iterator[Tensor]:
        if self.numbers("bins"):
            yield from self.spectra(given)
        for length in dict.fromkeys((*self.numbers("rate"), 16000)):
            yield self.random(_rows(given), length)
            yield self.random(_rows(given), 1, length)

    def spectra(self, given: Mapping[str, Any]) -> Iterator[Tensor]:
        frames = [number for length in self.numbers("frames") for number in (2 * length, length)]
        for bins, length in itertools.product(dict.fromkeys((*self.numbers("bins"), 80)), dict.fromkeys((*frames, 128))):
            yield self.random(_rows(given), bins, length)
            yield self.random(_rows(given), length, bins)

    def steps(self, given: Mapping[str, Any]) -> Iterator[Tensor]:
        yield self.like.new_ones(_rows(given))

    def context(self, given: Mapping[str, Any]) -> Iterator[Tensor]:
        return (self.random(_rows(given), 16, width) for width in self.numbers("context"))

    def _channels(self) -> int:
        first = next((module.in_channels for module in self.model.modules() if isinstance(module, nn.Conv2d)), None)
        return next(iter(self.numbers("channels")), 3) if first is None else first

    def _image_sizes(self) -> list[tuple[int, int]]:
        """Those that are set; else such as patches fill."""
        told = [_height_and_width(value) for value in (*self.settings("image"), *_crops(self.model))]
        guesses = [(-(-size // patch) * patch,) * 2 for patch in (*self.numbers("patch"), 1) for size in IMAGE_SIZES]
        return list(dict.fromkeys(filter(None, (*told, *guesses))))

    # ---- by what else is known

    def detection(self) -> ExampleInputs:
        """Images of any size in a list, and what is to be found in each, as torchvision's detectors take them."""
        height, width = size = (128, 160)
        whole = {"labels": torch.ones(1, dtype=torch.long), "masks": torch.ones(1, *size, dtype=torch.uint8)}
        found = {"boxes": torch.tensor([[0.1, 0.2, 0.6, 0.9]]) * torch.tensor([width, height] * 2), "keypoints": torch.ones(1, 17, 3)}
        target = {key: value.to(self.like.device) for key, value in whole.items()} | {
            key: value.to(self.like) for key, value in found.items()
        }
        return [self.random(self._channels(), *size).sigmoid() for _ in range(BATCH)], [dict(target) for _ in range(BATCH)]

    def for_first_layer(self) -> Iterator[Tensor]:
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                yield self.random(BATCH, module.in_features)
                yield self.random(BATCH, 16, module.in_features)
            elif isinstance(module, nn.Conv1d):
                yield from (self.random(BATCH, module.in_channels, length) for length in LENGTHS)
            elif isinstance(module, nn.Conv2d):
                yield from self.images({})
            elif isinstance(module, nn.Conv3d):
                sizes = [*((FRAMES, *size) for size in self._image_sizes()), *((side,) * 3 for side in CUBES)]
                yield from (self.random(BATCH, module.in_channels, *size) for size in sizes)
            elif isinstance(module, nn.Embedding):
                yield self.ids_below(module.num_embeddings)
            else:
                continue
            return


_SURE: dict[str, Callable[[_Maker, Mapping[str, Any]], Iterator[Tensor]]] = {  # what forward calls an input
    "input_ids": _Maker.ids,
    "attention_mask": _Maker.mask,
    "decoder_input_ids": _Maker.decoder_ids,
    "pixel_values": _Maker.images,
    "input_values": _Maker.sound,
    "input_features": _Maker.spectra,
}
_MAKERS = _SURE | {  # likewise, where it must be given others beside it
    "sample": _Maker.images,
    "image1": _Maker.images,
    "image2": _Maker.images,
    "timestep": _Maker.steps,
    "encoder_hidden_states": _Maker.context,
}


def _rows(given: Mapping[str, Any]) -> int:
    return next((len(value) for value in given.values() if isinstance(value, Tensor)), BATCH)


def _holders(model: nn.Module) -> Iterator[Any]:
    """Who may tell of sizes: the model, its configurations and those within, then likewise its modules."""
    seen: set[int] = set()
    for module in model.modules():
        waiting: list[Any] = [module]
        for holder in waiting:
            if id(holder) not in seen:
                seen.add(id(holder))
                yield holder
                inner = {} if holder is module else holder if isinstance(holder, Mapping) else getattr(holder, "__dict__", {})
                waiting += [value for name in SETTINGS["configuration"] if (value := _get(holder, name)) is not None]
                waiting += [value for name, value in inner.items() if str(name).endswith(("_config", "_cfg"))]


def _get(holder: Any, name: str) -> Any:
    with contextlib.suppress(Exception):  # a property of a user's model may raise anything
        return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _height_and_width(size: Any) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    sides = (size, size) if isinstance(size, int) else tuple(size)[-2:] if isinstance(size, tuple | list) else ()
    sides = sides * 2 if len(sides) == 1 else sides
    return sides if len(sides) == 2 and all(type(side) is int and side > 0 for side in sides) else None


def _crops(model: nn.Module) -> Iterator[Any]:
    """What the images were cut to on which torchvision's weights for such a model were trained."""
    known = vars(sys.modules.get(type(model).__module__, sys)).values()
    classes: list[Any] = [each for each in known if isinstance(each, enum.EnumMeta)]
    weights = [member for each in classes for member in each]
    return (getattr(getattr(member, "transforms", None), "keywords", {}).get("crop_size") for member in weights)
