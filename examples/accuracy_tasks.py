"""What `accuracy.py` trains: three tasks on data that every installation has, and their variants.

"lm" is a byte-level language model (GPT-style) on the text of Python's standard library; "vit" and "resnet" are a small ViT and a
bottleneck ResNet on scikit-learn's handwritten digits.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import ResNet, VisionTransformer
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn import functional

import pe_fx
from pe_fx.tied.weight import tied_weights_in

Batch = tuple[Tensor, Tensor]
Net = Callable[[Tensor], Tensor]
DECAY = 0.05

# ------------------------------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        after: Tensor = x + self.proj(y.transpose(1, 2).flatten(2))
        change: Tensor = self.down(functional.gelu(self.up(self.norm2(after))))
        return after + change


class Bytes(nn.Module):
    """A causal language model over bytes. Weights start at a standard deviation of 1 / sqrt(inputs)."""

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


# ------------------------------------------------------------------------------------------------------------------ variants


@dataclass(frozen=True)
class Variant:
    """How a model is tied: the options of `pe_fx.transform`, None for not at all; `size` changes the constructor's arguments.

    `pairs`: two neighbouring blocks share all matrices. `rank`: each tied layer has a correction of so low a rank beside it.
    `tied_lr` and `tied_decay` multiply the learning rate and the weight decay of the matrices to which something is tied.
    """

    name: str
    options: dict[str, Any] | None = None
    size: dict[str, Any] = field(default_factory=dict)
    pairs: bool = False
    rank: int = 0
    tied_lr: float = 1.0
    tied_decay: float = 1.0
    lr: float = 1.0  # where the search begins, beside the task's own


SIGNED: dict[str, Any] = {"mix": "signed"}
ACROSS: dict[str, Any] = {"across": ["mlp"]}


def transformer(width: int, corrected: dict[int, int], shallow: int) -> tuple[Variant, ...]:
    """`width`: at which a signed net has the dense one's parameters; `corrected`: by rank, at which it has as many as with corrections;
    `shallow`: at which a dense net of half the depth has the dense one's parameters."""
    half = {"depth": 2}
    return (
        Variant("dense"),
        Variant("tied", {}, lr=1.5),
        Variant("tied, signed", SIGNED, lr=1.5),
        Variant("dense, half as deep", None, half),
        Variant("dense, pairs share", None, pairs=True),
        Variant("tied across blocks", ACROSS, lr=1.5),
        Variant("tied across blocks, signed", SIGNED | ACROSS, lr=1.5),
        Variant("tied, signed, wider", SIGNED, {"width": width}, lr=1.5),
        Variant("dense, pairs share, wider", None, {"width": width}, pairs=True),
        Variant("dense, half as deep, wider", None, half | {"width": shallow}),
        Variant("tied, signed, pairs share", SIGNED, pairs=True, lr=1.5),
        Variant("FFN only, signed", SIGNED | {"rules": ["mlp"]}, lr=1.5),
        Variant("attention only, signed", SIGNED | {"rules": ["attention"]}),
        *(Variant(f"tied, signed, corrected by rank {rank}", SIGNED, rank=rank, lr=1.5) for rank in corrected),
        *(Variant(f"tied, signed, width {wider}", SIGNED, {"width": wider}, lr=1.5) for wider in corrected.values()),
        *(Variant(f"tied, signed, tied weights' rate x {times}", SIGNED, tied_lr=times) for times in (0.67, 1.5, 2.25)),
        *(Variant(f"tied, signed, tied weights' decay x {times}", SIGNED, tied_decay=times, lr=1.5) for times in (0.0, 0.5, 2.0)),
    )


BOTTLENECK = (
    Variant("dense"),
    Variant("tied", {}),
    Variant("tied, signed", SIGNED),
    Variant("tied, one W a block", {"share": ()}),
    Variant("tied, one W a block, signed", SIGNED | {"share": ()}),
    Variant("tied, slice", {"entry": "slice"}),
    Variant("tied, slice, signed", SIGNED | {"entry": "slice"}),
    Variant("tied, expand", {"entry": "expand"}),
    Variant("tied, expand, signed", SIGNED | {"entry": "expand"}),
    Variant("dense, fewer blocks", None, {"layers": (2, 2, 1)}),
    Variant("dense, narrower", None, {"channels": (12, 24, 48)}),
)


class Corrected(nn.Module):
    """A layer and a correction of low rank beside it, which starts at nothing."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        rows, columns = layer.weight.shape  # type: ignore[union-attr, misc]
        self.layer, self.down, self.up = layer, nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows, bias=False)
        nn.init.normal_(self.down.weight, std=columns**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.up(self.down(x))
        return y


def tied_as(variant: Variant, model: nn.Module, plan: pe_fx.Plan | None) -> nn.Module:
    """The dense model as the variant has it."""
    if plan is not None:
        model = pe_fx.apply(model, plan)
    blocks: list[nn.Module] = list(model.blocks) if variant.pairs or variant.rank else []  # type: ignore[arg-type, union-attr]
    for first, second in zip(blocks[::2], blocks[1::2], strict=False) if variant.pairs else ():
        for name, module in first.named_modules():
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2:
                    setattr(second.get_submodule(name), parameter_name, parameter)
    if variant.rank:
        for full, module, name, _ in list(tied_weights_in(model)):
            if name == "weight" and not hasattr(module, "weight_kept"):
                model.set_submodule(full.removesuffix(".weight"), Corrected(module, variant.rank))
    return model


Groups = Sequence[tuple[list[nn.Parameter], float, float]]
"""Parameters with what multiplies the learning rate, and the weight decay."""


def groups_of(variant: Variant | None, model: nn.Module) -> Groups:
    """All in one, but where the variant treats tied matrices otherwise."""
    sources = {id(parameter) for _, _, _, weight in tied_weights_in(model) for parameter in weight.parameters}
    every = list(model.parameters())
    if variant is None or not sources or variant.tied_lr == variant.tied_decay == 1:
        return [(every, 1.0, DECAY)]
    tied, rest = ([parameter for parameter in every if (id(parameter) in sources) is is_tied] for is_tied in (True, False))
    return [(tied, variant.tied_lr, DECAY * variant.tied_decay), (rest, 1.0, DECAY)]


# -------------------------------------------------------------------------------------------------------------------- tasks


class Text:
    """The standard library's modules, without its tests; every tenth file is for validation. A row is where 128 bytes begin."""

    def __init__(self, device: torch.device, scale: int, context: int = 128) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(path for path in root.rglob("*.py") if not {"site-packages", "test", "tests"}.intersection(path.parts))
        parts = [files[i::10] for i in range(10)]
        self.held, self.read = (
            torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in some)), dtype=torch.uint8).to(device)
            for some in (parts[0], sorted(path for part in parts[1:] for path in part))
        )
        self.size = 16 * scale
        self.window = torch.arange(context + 1, device=device)
        self.tests = self._starts(self.held, 0, 8, 64).to(device)

    def _starts(self, stream: Tensor, seed: int, steps: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(stream) - len(self.window), (steps, size), generator=generator)

    def rows(self, seed: int, steps: int) -> Tensor:
        return self._starts(self.read, seed, steps, self.size)

    def batch(self, rows: Tensor, stream: Tensor | None = None) -> Batch:
        block = (self.read if stream is None else stream)[rows[:, None] + self.window].long()
        return block[:, :-1], block[:, 1:]

    def score(self, model: Net) -> Tensor:
        return torch.stack([loss_of(model, *self.batch(rows, self.held)) for rows in self.tests]).mean()


class Digits:
    """scikit-learn's digits, 8x8 pixels from -1 to 1, a quarter of them for the test. A row is an image."""

    def __init__(self, device: torch.device, _: int) -> None:
        bunch = load_digits()
        images = torch.tensor(bunch.images, dtype=torch.float32, device=device)[:, None] / 8 - 1
        labels = torch.tensor(bunch.target, device=device)
        read, held = train_test_split(torch.arange(len(labels)), test_size=0.25, stratify=bunch.target, random_state=0)
        self.images, self.labels = images[read], labels[read]
        self.tests = images[held], labels[held]

    def rows(self, seed: int, steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = len(self.labels) // 64 * 64
        epochs = [torch.randperm(len(self.labels), generator=generator)[:size] for _ in range(-(-steps * 64 // size))]
        return torch.cat(epochs).view(-1, 64)[:steps]

    def batch(self, rows: Tensor) -> Batch:
        return self.images[rows], self.labels[rows]

    def score(self, model: Net) -> Tensor:
        images, labels = self.tests
        right: Tensor = (model(images).argmax(1) == labels).float().mean()
        return 100 * right


@dataclass(frozen=True)
class Task:
    """`data` has the rows that a seed draws for each step, the batch of such rows, and what a model scores on what is held out.

    The search for each variant's learning rate begins at `lr`, or as much higher as the variant says.
    """

    build: Callable[..., nn.Module]
    data: type[Text] | type[Digits]
    variants: tuple[Variant, ...]
    steps: tuple[int, ...]
    lr: float
    unit: str
    lower_is_better: bool


def loss_of(model: Net, inputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def bytes_model(width: int = 96, depth: int = 4, scale: int = 1) -> nn.Module:
    return Bytes(width=width * scale, depth=depth * scale, heads=4 * scale, context=128)


def vit(width: int = 64, depth: int = 4, scale: int = 1) -> nn.Module:
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": width * scale, "depth": depth * scale, "num_heads": 4}
    model: nn.Module = VisionTransformer(**shape, num_classes=10, weight_init="moco")
    return model


def resnet(channels: Sequence[int] = (16, 32, 64), layers: Sequence[int] = (3, 3, 2), scale: int = 1) -> nn.Module:
    widths = tuple(width * scale for width in channels)
    model: nn.Module = ResNet(Bottleneck, layers=tuple(layers), channels=widths, num_classes=10, in_chans=1)
    # 8x8 pixels have no room for the 7x7 stem with stride 2 and for a fourth stage
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    model.layer4 = nn.Identity()
    return model


TASKS = {
    "lm": Task(bytes_model, Text, transformer(132, {8: 100, 16: 104}, 132), (300, 1000, 3000), 9e-3, "nats per byte", True),
    "vit": Task(vit, Digits, transformer(88, {8: 68, 16: 72}, 88), (105, 420, 1680), 3e-3, "% accuracy", False),
    "resnet": Task(resnet, Digits, BOTTLENECK, (105, 420, 1680), 3e-3, "% accuracy", False),
}
