"""The single-read operation in plain operations: what it means, and what is exported."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pe_fx.compiled.lowering.unit import evaluate


def plain(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], negated: int, unit: str, splits: int) -> Tensor:
    """`Σⱼ ±wⱼ unit(u₀ⱼ·x + b₀ⱼ, …)` over the rows of the last weight, in plain operations.

    >>> x, weight = torch.randn(2, 4), torch.randn(8, 4)
    >>> parts = torch.ops.pe_fx.single_read(x, [weight], [None], 0, "t0=maximum(a,0.0)", 1)
    >>> torch.testing.assert_close(parts.sum(0), (x @ weight.t()).relu() @ weight)

    x: (rows, d); weights: (h, d) each, the last of which is read for both uses; biases: (h) or None; the first `negated` hidden units
    count as their negative. Float32, float16 or bfloat16, all alike. Returned is (splits, rows, d) in float32: sums over some of the
    hidden units each, to be added by who reads them, so that the addition is fused with what follows, and always in one order.
    """
    values = [
        functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        for weight, bias in zip(weights, biases, strict=True)
    ]
    hidden = evaluate(unit, values)
    hidden = torch.cat([-hidden[:, :negated], hidden[:, negated:]], 1)
    whole = hidden @ weights[-1].float()
    return torch.cat([whole[None], whole.new_zeros(splits - 1, *whole.shape)])


def are_layers(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> bool:
    """Whether all shapes fit, which compiled kernels take for granted."""
    height, width = weights[-1].shape[0], x.shape[1]
    biases_fit = all(bias.shape == (height,) for bias in biases if bias is not None)
    return biases_fit and all(weight.shape == (height, width) for weight in weights)
