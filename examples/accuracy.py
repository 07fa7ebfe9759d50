"""`python examples/accuracy.py`: what tying costs, and which variant costs least, measured by training on real data.

Three tasks on data that every Python installation has: "lm", a byte-level language model (GPT-style) on the text of Python's
standard library; "vit" and "resnet", a small ViT and a bottleneck ResNet on scikit-learn's handwritten digits. Each variant of a
task is trained from the same start (a tied model is made from the initial dense one), on the same batches, with the same
schedule, for several lengths; all variants of a task share one recipe. Writes a row per run to `examples/accuracy.csv` and goes
on where it stopped; `--summary` prints the tables of what the file holds and draws the plot.

On a GPU `--scale 4` makes the language model four times as wide and deep, with batches four times as large.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

COLUMNS = ("task", "variant", "steps", "seed", "params", "score", "curve", "versions")
Batch = tuple[Tensor, Tensor]


# ------------------------------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Bytes(nn.Module):
    """A causal language model over bytes. Weights start at a standard deviation of 1 / sqrt(inputs)."""

    def __init__(self, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, width // 24) for _ in range(depth)))
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


# -------------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Variant:
    """A model (`size` for the constructor) and how it is tied, None for not at all."""

    name: str
    options: dict[str, Any] | None = None
    size: dict[str, int] = field(default_factory=dict)


BOTH = {"mix": "signed", "gain": True}
COMMON = (
    Variant("dense"),
    Variant("tied", {}),
    Variant("tied, signed", {"mix": "signed"}),
    Variant("tied, gain", {"gain": True}),
    Variant("tied, signed + gain", BOTH),
)
TRANSFORMER = (
    *COMMON,
    Variant("FFN only", {"rules": ["mlp"]}),
    Variant("attention only", {"rules": ["attention"]}),
    Variant("FFN only, signed + gain", {"rules": ["mlp"]} | BOTH),
    Variant("attention only, signed + gain", {"rules": ["attention"]} | BOTH),
    Variant("one W for all blocks", {"share": ("mlp", "attention")}),
    Variant("one W for all blocks, signed + gain", {"share": ("mlp", "attention")} | BOTH),
)
