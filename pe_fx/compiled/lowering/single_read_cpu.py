"""The single-read operation in C++ with OpenMP, by the compiler that Inductor uses on the CPU.

Each thread takes its share of the hidden units, a few at a time: it multiplies their rows of W by x, applies the unit, and adds the
same rows, still in its cache, to its own sum in float32. The sums are then added in the order of the threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pe_fx.compiled.lowering.single_read_plain import are_layers, plain
from pe_fx.compiled.lowering.unit import source

TYPES = {torch.float32: "float", torch.bfloat16: "at::BFloat16", torch.float16: "at::Half"}
MOST_ROWS = 32
"""More go the plain way: each number of rows is compiled apart, and its code grows with them."""

HEADER = """
#include <torch/csrc/inductor/cpp_prefix.h>

using Weight = {weight};
using Vec = at::vec::Vectorized<float>;
constexpr int64_t rows = {rows}, lanes = Vec::size();
constexpr int64_t tile = lanes >= 16 ? 4 : 2;  // rows of x at a time
constexpr int64_t block = rows < tile ? 4 * tile / rows : 4;  // hidden units at a time: sums for all of both stay in registers
"""

FUNCTIONS = """
constexpr int64_t taken_from(int64_t from) { return rows - from < tile ? rows - from : tile; }

static inline Vec load(const float* from) { return Vec::loadu(from); }
static inline Vec load(const at::BFloat16* from) { Vec to; at::vec::load_fp32_from_bf16(from, to); return to; }
static inline Vec load(const at::Half* from) { Vec to; at::vec::load_fp32_from_fp16(from, to); return to; }

// Asks for what lies `ahead`, once for each line of the cache. With many rows of x, memory is not what takes the time.
static inline void ask(const Weight* weight, int64_t ahead, int64_t column) {
    if (rows <= tile && column * sizeof(Weight) % 64 == 0) __builtin_prefetch(weight + ahead + column, 0, 2);
}

// Products of the hidden units' rows of W with the rows of x.
template <int64_t units, int64_t from = 0>
static inline void read(const Weight* weight, const float* x, float* value, int64_t width) {
    constexpr int64_t taken = taken_from(from);
    const int64_t whole = width / lanes * lanes;
    Vec sums[units][taken];
    #pragma GCC unroll 32
    for (int64_t i = 0; i < units * taken; i++) sums[i / taken][i % taken] = Vec(0);
    for (int64_t column = 0; column < whole; column += lanes) {
        Vec given[taken];
        #pragma GCC unroll 32
        for (int64_t row = 0; row < taken; row++) given[row] = Vec::loadu(x + (from + row) * width + column);
        #pragma GCC unroll 32
        for (int64_t unit = 0; unit < units; unit++) {
            const Vec weights = load(weight + unit * width + column);
            if (unit >= units / 2) ask(weight, (units + unit) * width, column);
            #pragma GCC unroll 32
            for (int64_t row = 0; row < taken; row++) sums[unit][row] = at::vec::fmadd(weights, given[row], sums[unit][row]);
        }
    }
    #pragma GCC unroll 32
    for (int64_t i = 0; i < units * taken; i++) {
        const int64_t unit = i / taken, row = i % taken;
        float sum = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sums[unit][row]);
        for (int64_t column = whole; column < width; column++)
            sum += static_cast<float>(weight[unit * width + column]) * x[(from + row) * width + column];
        value[unit * rows + from + row] = sum;
    }
    if constexpr (from + taken < rows) read<units, from + taken>(weight, x, value, width);
}

// Adds the same rows of W, times the hidden units' results.
template <int64_t units, int64_t from = 0>
static inline void write(const Weight* weight, const float* hidden, float* total, int64_t width) {
    constexpr int64_t taken = taken_from(from);
    const int64_t whole = width / lanes * lanes;
    Vec factor[units][taken];
    #pragma GCC unroll 32
    for (int64_t i = 0; i < units * taken; i++) factor[i / taken][i % taken] = Vec(hidden[i / taken * rows + from + i % taken]);
    for (int64_t column = 0; column < whole; column += lanes) {
        Vec sums[taken];
        #pragma GCC unroll 32
        for (int64_t row = 0; row < taken; row++) sums[row] = Vec::loadu(total + (from + row) * width + column);
        #pragma GCC unroll 32
        for (int64_t unit = 0; unit < units; unit++) {
            const Vec weights = load(weight + unit * width + column);
            if (unit < units / 2) ask(weight, (units + unit) * width, column);
            #pragma GCC unroll 32
            for (int64_t row = 0; row < taken; row++) sums[row] = at::vec::fmadd(factor[unit][row], weights, sums[row]);
        }
        #pragma GCC unroll 32
        for (int64_t row = 0; row < taken; row++) sums[row].store(total + (from + row) * width + column);
    }
    for (int64_t unit = 0; unit < units; unit++)
        for (int64_t row = from; row < from + taken; row++)
            for (int64_t column = whole; column < width; column++)
                total[row * width + column] += hidden[unit * rows + row] * static_cast<float>(weight[unit * width + column]);
    if constexpr (from + taken < rows) write<units, from + taken>(weight, hidden, total, width);
}

template <int64_t units>
static inline void add(float* value, const Weight* bias) {
    for (int64_t unit = 0; unit < units; unit++)
        for (int64_t row = 0; row < rows; row++) value[unit * rows + row] += static_cast<float>(bias[unit]);
}
"""

STEP = """
template <int64_t units>
static inline void step(const float* x, {pointers}, float* total, int64_t width, int64_t first, int64_t negated) {{
    constexpr int64_t padded = (units * rows + lanes - 1) / lanes * lanes;
    float value[{weights}][padded] = {{}}, hidden[padded];
{values}
    for (int64_t place = 0; place < padded; place += lanes) {{
{unit}
    }}
    for (int64_t unit = 0; unit < units && first + unit < negated; unit++)
        for (int64_t row = 0; row < rows; row++) hidden[unit * rows + row] *= -1;
    write<units>({last} + first * width, hidden, total, width);
}}

extern "C" void kernel(
    const float* x, {pointers}, float* totals, float* out, int64_t height, int64_t width, int64_t negated, int64_t splits,
    int64_t threads) {{
    const int64_t size = rows * width;
    #pragma omp parallel num_threads(threads)
    {{
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        float* total = totals + thread * size;
        std::fill(total, total + size, 0.0f);
        const int64_t end = height * (thread + 1) / team;
        int64_t first = height * thread / team;
        for (; first + block <= end; first += block) step<block>(x, {names}, total, width, first, negated);
        for (; first < end; first++) step<1>(x, {names}, total, width, first, negated);
        #pragma omp barrier
        #pragma omp for nowait
        for (int64_t place = 0; place < size; place++) {{
            float sum = totals[place];
            for (int64_t other = 1; other < team; other++) sum += totals[other * size + place];
            out[place] = sum;
        }}
    }}
    std::fill(out + size, out + splits * size, 0.0f);
}}
"""


def single_read(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], negated: int, unit: str, splits: int) -> Tensor:
    (rows, width), height = x.shape, weights[-1].shape[0]
    tensors = [*weights, *(bias for bias in biases if bias is not None)]
    alike = all(each.dtype == x.dtype for each in tensors)
    stored = all(each.is_contiguous() for each in tensors)
    if not (x.dtype in TYPES and alike and are_layers(x, weights, biases) and stored and 0 < rows <= MOST_ROWS and vectorized()):
        return plain(x, weights, biases, negated, unit, splits)
    kernel = compiled(unit, x.dtype, rows, tuple(bias is not None for bias in biases))
    threads = torch.get_num_threads()
    totals, out = x.new_empty((threads, rows, width), dtype=torch.float32), x.new_empty((splits, rows, width), dtype=torch.float32)
    kernel(x.float().contiguous(), *tensors, totals, out, height, width, negated, splits, threads)
    return out


def pays(device: torch.device, rows: int, width: int, height: int, weights: int, dtype: torch.dtype) -> bool:
    """Whether this is at least as fast as the matrix products, with one weight or two."""
    # Measured on a Xeon with AVX-512 and AMX, one and two threads, with GELU, against Inductor's code for the two products, at widths of
    # 768, 1024 and 4096 with four times as many hidden units and 1, 2, 4, 8 and 16 rows. These are the most rows at which no median was
    # slower. In bfloat16, products of more rows are AMX's. Nothing smaller was measured.
    most = {torch.float32: 16, torch.float16: 16, torch.bfloat16: 4}.get(dtype, 0)
    return 0 < rows <= most and width * height >= 768 * 3072 and vectorized()


def splits_of(device: torch.device, rows: int, width: int, weights: int, dtype: torch.dtype) -> int:
    """The threads' sums are added here."""
    return 1


# Both of Inductor's own parts that are used:


@functools.cache
def vectorized() -> bool:
    """Whether PyTorch has vectors for this processor."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return bool(pick_vec_isa())


@functools.cache
def compiled(unit: str, dtype: torch.dtype, rows: int, biased: tuple[bool, ...]) -> Callable[..., None]:
    """The kernel, a function of tensors and numbers."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    tensors = len(biased) + sum(biased)
    types = ["const float*", *[f"const {TYPES[dtype]}*"] * tensors, "float*", "float*", *["int64_t"] * 5]
    kernel: Callable[..., None] = CppPythonBindingsCodeCache.load_pybinding(types, kernel_source(unit, dtype, rows, biased))
    return kernel


def kernel_source(unit: str, dtype: torch.dtype, rows: int, biased: tuple[bool, ...]) -> str:
    """`biased`: which of the weights have a bias."""
    weights = len(biased)
    names = [f"w{i}" for i in range(weights)] + [f"bias{i}" for i in range(weights) if biased[i]]
    values, lines = [], []
    for i in range(weights):
        values.append(f"    read<units>(w{i} + first * width, x, value[{i}], width);")
        if biased[i]:
            values.append(f"    add<units>(value[{i}], bias{i} + first);")
        lines.append(f"        const Vec {'abcdefgh'[i]} = Vec::loadu(value[{i}] + place);")
    for name, expression in source(unit, "cpp"):
        lines.append(f"        const Vec {name} = {expression};")
    lines.append(f"        {name}.store(hidden + place);")
    step = STEP.format(
        pointers=", ".join(f"const Weight* {name}" for name in names),
        names=", ".join(names),
        weights=weights,
        values="\n".join(values),
        unit="\n".join(lines),
        last=f"w{weights - 1}",
    )
    return HEADER.format(weight=TYPES[dtype], rows=rows) + FUNCTIONS + step
