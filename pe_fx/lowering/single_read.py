"""`Wᵀ F(W x)` with W read once: each of its rows makes a hidden unit's value and is then multiplied by it at once.

With few rows of x a feed-forward layer takes as long as reading its weights does. A tied one has half as many, but two matrix
products read them twice. One operation computes both: `pe_fx::single_read`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pe_fx.lowering import single_read_cpu, single_read_gpu
from pe_fx.lowering.unit import evaluate

NAME = "pe_fx::single_read"
torch.library.define(NAME, "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? signs, str unit, int splits) -> Tensor")


def plain(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], signs: Tensor | None, unit: str, splits: int) -> Tensor:
    """`Σⱼ wⱼ signsⱼ unit(u₀ⱼ·x + b₀ⱼ, …)` over the rows of the last weight, in plain operations.

    >>> x, weight = torch.randn(2, 4), torch.randn(8, 4)
    >>> parts = torch.ops.pe_fx.single_read(x, [weight], [None], None, "t0=maximum(a,0.0)", 1)
    >>> torch.testing.assert_close(parts.sum(0), (x @ weight.t()).relu() @ weight)

    x: (rows, d); weights: (h, d) each, the last of which is read for both uses; biases: (h) or None; signs: (h), a factor for each
    hidden unit. Float32, float16 or bfloat16, all alike. Returned is (splits, rows, d) in float32: sums over some of the hidden
    units each, to be added by who reads them, so that the addition is fused with what follows, and always in the same order.
    """
    values = [
        functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        for weight, bias in zip(weights, biases, strict=True)
    ]
    hidden = evaluate(unit, values)
    if signs is not None:
        hidden = hidden * signs.float()
    whole = hidden @ weights[-1].float()
    return torch.cat([whole[None], whole.new_zeros(splits - 1, *whole.shape)])


def fake(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], signs: Tensor | None, unit: str, splits: int) -> Tensor:
    return x.new_empty((splits, *x.shape), dtype=torch.float32)


def no_gradient(ctx: Any, gradient: Tensor) -> None:
    """Without this, PyTorch would warn and go on with no gradient."""
    raise NotImplementedError(f"{NAME} has no gradient")


torch.library.register_fake(NAME, fake)
torch.library.register_autograd(NAME, no_gradient)
torch.library.impl(NAME, "CompositeExplicitAutograd", plain)
torch.library.impl(NAME, "CPU", single_read_cpu.single_read)
torch.library.impl(NAME, "CUDA", single_read_gpu.single_read)
