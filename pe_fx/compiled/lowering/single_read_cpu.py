"""The single-read operation in C++ with OpenMP, by the compiler that Inductor uses."""

from __future__ import annotations

import torch
from torch import Tensor


def single_read(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], negated: int, unit: str, splits: int) -> Tensor:
    from pe_fx.compiled.lowering.single_read import plain

    return plain(x, weights, biases, negated, unit, splits)


def pays(device: torch.device, rows: int, width: int, height: int, weights: int, dtype: torch.dtype) -> bool:
    """Whether it is faster than two products."""
    return 0 < rows <= 4


def splits_of(device: torch.device, rows: int, width: int, weights: int, dtype: torch.dtype) -> int:
    return 1
