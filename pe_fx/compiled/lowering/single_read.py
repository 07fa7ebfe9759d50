"""`Wᵀ F(W x)` with W read once: each of its rows makes a hidden unit's value and is then multiplied by it at once.

With few rows of x a feed-forward layer takes as long as reading its weights does. A tied one has half as many, but two matrix
products read them twice. One operation computes both: `pe_fx::single_read`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pe_fx.compiled.lowering import single_read_cpu, single_read_gpu
from pe_fx.compiled.lowering.single_read_plain import plain

NAME = "pe_fx::single_read"
torch.library.define(NAME, "(Tensor x, Tensor[] weights, Tensor?[] biases, int negated, str unit, int splits) -> Tensor")


def fake(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], negated: int, unit: str, splits: int) -> Tensor:
    return x.new_empty((splits, *x.shape), dtype=torch.float32)


def no_gradient(ctx: Any, gradient: Tensor) -> None:
    """Without this, PyTorch would warn and go on with no gradient."""
    raise NotImplementedError(f"{NAME} has no gradient")


torch.library.register_fake(NAME, fake)
torch.library.register_autograd(NAME, no_gradient)
torch.library.impl(NAME, "CompositeExplicitAutograd", plain)
torch.library.impl(NAME, "CPU", single_read_cpu.single_read)
torch.library.impl(NAME, "CUDA", single_read_gpu.single_read)

OPERATION = torch.ops.pe_fx.single_read.default
