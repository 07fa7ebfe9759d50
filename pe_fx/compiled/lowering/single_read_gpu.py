"""The single-read operation as a Triton kernel.

Each program takes some of the hidden units, a few at a time: it loads their rows of W, multiplies them by x, applies the unit, and
adds the same rows, still in registers, to its part of the result. Rows, weights and the unit are written out in the source.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pe_fx.compiled.lowering.single_read_plain import are_layers, plain
from pe_fx.compiled.lowering.unit import source

HEADER = '''
import triton
import triton.language as tl


@triton.jit
def pe_log1p(x):
    """By the rounding error of 1 + x, which is exact."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * x / (y - 1))


@triton.jit
def pe_expm1(x):
    y = tl.exp(x)
    small = x * (1 + x * (0.5 + x * (0.16666667 + x * 0.041666668)))
    return tl.where(tl.abs(x) < 0.1, small, y - 1)
'''


SIZES = ("HEIGHT", "NEGATED", "WIDTH", "PADDED", "BLOCK", "TURNS", "STAGES")


class Tuning(NamedTuple):
    """Hidden units that a program takes at a time, its warps, how many loads are under way, and programs per multiprocessor."""

    block: int
    warps: int
    stages: int
    programs: int


def tuning_of(rows: int, width: int, weights: int, dtype: torch.dtype) -> Tuning:
    """For x of (rows, width) and so many weights: the best, or near it, of those measured on an H200 (examples/tune.csv)."""
    element = power_of_two(width) * weights * dtype.itemsize
    if power_of_two(width) >= 4096:
        return Tuning(max(1, 32768 // element), 8, 4 if rows == 1 else 3, 1)
    return Tuning(max(1, 8192 // element), 4, 4, 2)


WIDEST = {1: 4096, 2: 4096, 3: 768, 4: 768}


SHARED_MEMORY = 100_000
"""Bytes of a multiprocessor that the loads under way take at most."""


def pays(device: torch.device, rows: int, width: int, height: int, weights: int, dtype: torch.dtype) -> bool:
    """Whether it is faster than two products.

    Measured on an H200 in bf16 at widths of 768 to 4096 and 1 to 8 rows. More rows, or wider ones, need more registers than there are.
    """
    if not 512 <= width <= WIDEST.get(rows, 0) or torch.version.cuda is None:
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.major >= 8 and properties.shared_memory_per_block_optin >= SHARED_MEMORY)


def power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def splits_of(device: torch.device, rows: int, width: int, weights: int, dtype: torch.dtype) -> int:
    """How many programs share the hidden units."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * tuning_of(rows, width, weights, dtype).programs


def single_read(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], negated: int, unit: str, splits: int) -> Tensor:
    if not are_layers(x, weights, biases):
        return plain(x, weights, biases, negated, unit, splits)
    return launch(x, weights, biases, negated, unit, splits, tuning_of(x.shape[0], x.shape[1], len(weights), x.dtype))


def launch(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], negated: int, unit: str, splits: int, tuning: Tuning) -> Tensor:
    rows, width = x.shape
    out = torch.empty((splits, rows, width), dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    pointers = [each.contiguous() for each in (x, *weights, *biases) if each is not None]
    kernel = compiled(unit, rows, tuple(bias is not None for bias in biases), negated > 0)
    height = weights[-1].shape[0]
    sizes = {"HEIGHT": height, "NEGATED": negated, "WIDTH": width, "PADDED": power_of_two(width)}
    loop = {"BLOCK": tuning.block, "TURNS": -(-height // (splits * tuning.block)), "STAGES": tuning.stages}
    kernel[(splits,)](*pointers, out, **sizes, **loop, num_warps=tuning.warps)
    return out


@functools.cache
def compiled(unit: str, rows: int, biased: tuple[bool, ...], signed: bool) -> Any:
    """The kernel, in a module of its own, since Triton reads source files."""
    from torch._inductor.codecache import PyCodeCache

    return PyCodeCache.load(kernel_source(unit, rows, biased, signed)).kernel


def kernel_source(unit: str, rows: int, biased: tuple[bool, ...], signed: bool) -> str:
    """`biased`: which of the weights have a bias."""
    each = range(len(biased))
    names = [f"w{i}" for i in each] + [f"bias{i}" for i in each if biased[i]]
    lines = [
        HEADER,
        "",
        "@triton.jit",
        f"def kernel(x, {', '.join(names)}, out, {', '.join(f'{size}: tl.constexpr' for size in SIZES)}):",
        "    column = tl.arange(0, PADDED)",
        "    inside = column < WIDTH",
    ]
    for row in range(rows):
        lines.append(f"    x_{row} = tl.load(x + {row} * WIDTH + column, inside, other=0.0).to(tl.float32)[None, :]")
        lines.append(f"    total_{row} = tl.zeros([PADDED], tl.float32)")
    lines += [
        "    for turn in tl.range(0, TURNS, num_stages=STAGES):",
        "        index = (turn * tl.num_programs(0) + tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)",
        "        there = index < HEIGHT",
        "        place = index.to(tl.int64)[:, None] * WIDTH + column[None, :]",
        "        mask = there[:, None] & inside[None, :]",
    ]
    lines += [f"        v{i} = tl.load(w{i} + place, mask, other=0.0).to(tl.float32)" for i in each]
    lines += [f"        c{i} = tl.load(bias{i} + index, there, other=0.0).to(tl.float32)" for i in each if biased[i]]
    if signed:
        lines.append("        sign = tl.where(index < NEGATED, -1.0, 1.0)")
    for row in range(rows):
        for i in each:
            value = f"tl.sum(v{i} * x_{row}, 1)" + f" + c{i}" * biased[i]
            lines.append(f"        {'abcdefgh'[i]}_{row} = {value}")
        for name, expression in source(unit, "triton", f"_{row}"):
            lines.append(f"        {name} = {expression}")
            result = name
        lines.append(f"        h_{row} = tl.where(there, {result}, 0.0)" + " * sign" * signed)  # 0 * inf is not 0
        lines.append(f"        total_{row} += tl.sum(v{each[-1]} * h_{row}[:, None], 0)")
    lines += [f"    tl.store(out + (tl.program_id(0) * {rows} + {row}) * WIDTH + column, total_{row}, inside)" for row in range(rows)]
    return "\n".join(lines) + "\n"
