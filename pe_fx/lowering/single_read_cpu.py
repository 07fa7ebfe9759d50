"""The single-read operation in C++ with OpenMP, by the compiler that Inductor uses."""

from __future__ import annotations

from torch import Tensor


def single_read(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], signs: Tensor | None, unit: str, splits: int) -> Tensor:
    from pe_fx.lowering.single_read import plain

    return plain(x, weights, biases, signs, unit, splits)
