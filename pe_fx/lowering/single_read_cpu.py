"""The single-read operation in C++ with OpenMP, by the compiler that Inductor uses on the CPU.

Each thread takes its share of the hidden units, a few at a time: it multiplies their rows of W by x, applies the unit, and adds the
same rows, still in its cache, to its own sum in float32. The sums are then added in the order of the threads. W may be stored the
other way round, as in the layers of GPT-2: then a hidden unit has a column of what is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pe_fx.lowering.unit import source

TYPES = {torch.float32: "float", torch.bfloat16: "at::BFloat16", torch.float16: "at::Half"}
MOST_ROWS = 32
"""Of more, PyTorch's matrix products are faster by far; each number of rows is compiled apart."""

HEADER = """
#include <torch/csrc/inductor/cpp_prefix.h>

using Weight = {weight};
using Vec = at::vec::Vectorized<float>;
constexpr int64_t rows = {rows}, lanes = Vec::size();
constexpr int64_t tile = lanes >= 16 ? 4 : 2;  // rows of x at a time
"""

COMMON = """
constexpr int64_t taken_from(int64_t from) { return rows - from < tile ? rows - from : tile; }

static inline Vec load(const float* from) { return Vec::loadu(from); }
static inline Vec load(const at::BFloat16* from) { Vec to; at::vec::load_fp32_from_bf16(from, to); return to; }
static inline Vec load(const at::Half* from) { Vec to; at::vec::load_fp32_from_fp16(from, to); return to; }
"""

ROWS = """
// As many hidden units at a time as have their sums for all of `tile` in registers.
constexpr int64_t block = rows < tile ? 4 * tile / rows : 4;

template <int64_t units>
constexpr int64_t place(int64_t unit, int64_t row) { return unit * rows + row; }

// Asks for what lies `ahead`, once for each line of the cache. With many rows of x, memory is not what takes the time.
static inline void ask(const Weight* weight, int64_t ahead, int64_t column) {
    if (rows <= tile && column * sizeof(Weight) % 64 == 0) __builtin_prefetch(weight + ahead + column, 0, 2);
}

// Products of the hidden units' rows of W with the rows of x.
template <int64_t units, int64_t from = 0>
static inline void read(const Weight* weight, const float* x, float* value, int64_t width, int64_t) {
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
        value[place<units>(unit, from + row)] = sum;
    }
    if constexpr (from + taken < rows) read<units, from + taken>(weight, x, value, width, 0);
}

// Adds the same rows of W, times the hidden units' results.
template <int64_t units, int64_t from = 0>
static inline void write(const Weight* weight, const float* hidden, float* total, int64_t width, int64_t) {
    constexpr int64_t taken = taken_from(from);
    const int64_t whole = width / lanes * lanes;
    Vec factor[units][taken];
    #pragma GCC unroll 32
    for (int64_t i = 0; i < units * taken; i++) factor[i / taken][i % taken] = Vec(hidden[place<units>(i / taken, from + i % taken)]);
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
                total[row * width + column] += hidden[place<units>(unit, row)] * static_cast<float>(weight[unit * width + column]);
    if constexpr (from + taken < rows) write<units, from + taken>(weight, hidden, total, width, 0);
}
"""

COLUMNS = """
// As many hidden units at a time as have their values for all of `tile` in registers.
constexpr int64_t block = lanes * (rows < tile ? 2 * tile : tile);

template <int64_t units>
constexpr int64_t place(int64_t unit, int64_t row) { return row * units + unit; }

// Products of the hidden units' columns with the rows of x; lines are far from each other, so that each is asked for some ahead.
template <int64_t units, int64_t from = 0>
static inline void read(const Weight* weight, const float* x, float* value, int64_t width, int64_t height) {
    constexpr int64_t taken = taken_from(from), vectors = units / lanes;
    Vec sums[taken][vectors];
    #pragma GCC unroll 32
    for (int64_t i = 0; i < taken * vectors; i++) sums[i / vectors][i % vectors] = Vec(0);
    for (int64_t column = 0; column < width; column++) {
        const Weight* line = weight + column * height;
        if (from == 0 && column + 8 < width)
            for (size_t byte = 0; byte < units * sizeof(Weight); byte += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(line + 8 * height) + byte);
        #pragma GCC unroll 32
        for (int64_t vector = 0; vector < vectors; vector++) {
            const Vec weights = load(line + vector * lanes);
            #pragma GCC unroll 32
            for (int64_t row = 0; row < taken; row++)
                sums[row][vector] = at::vec::fmadd(Vec(x[(from + row) * width + column]), weights, sums[row][vector]);
        }
    }
    #pragma GCC unroll 32
    for (int64_t i = 0; i < taken * vectors; i++)
        sums[i / vectors][i % vectors].store(value + place<units>(i % vectors * lanes, from + i / vectors));
    if constexpr (from + taken < rows) read<units, from + taken>(weight, x, value, width, height);
}

// Adds the same columns, times the hidden units' results.
template <int64_t units, int64_t from = 0>
static inline void write(const Weight* weight, const float* hidden, float* total, int64_t width, int64_t height) {
    constexpr int64_t taken = taken_from(from), vectors = units / lanes;
    Vec factor[taken][vectors];
    #pragma GCC unroll 32
    for (int64_t i = 0; i < taken * vectors; i++)
        factor[i / vectors][i % vectors] = Vec::loadu(hidden + place<units>(i % vectors * lanes, from + i / vectors));
    for (int64_t column = 0; column < width; column++) {
        Vec sums[taken];
        #pragma GCC unroll 32
        for (int64_t row = 0; row < taken; row++) sums[row] = Vec(0);
        #pragma GCC unroll 32
        for (int64_t vector = 0; vector < vectors; vector++) {
            const Vec weights = load(weight + column * height + vector * lanes);
            #pragma GCC unroll 32
            for (int64_t row = 0; row < taken; row++) sums[row] = at::vec::fmadd(factor[row][vector], weights, sums[row]);
        }
        #pragma GCC unroll 32
        for (int64_t row = 0; row < taken; row++)
            total[(from + row) * width + column] += at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sums[row]);
    }
    if constexpr (from + taken < rows) write<units, from + taken>(weight, hidden, total, width, height);
}

// The last few hidden units, one by one.
template <>
inline void read<1>(const Weight* weight, const float* x, float* value, int64_t width, int64_t height) {
    std::fill(value, value + rows, 0.0f);
    for (int64_t column = 0; column < width; column++)
        for (int64_t row = 0; row < rows; row++) value[row] += x[row * width + column] * static_cast<float>(weight[column * height]);
}

template <>
inline void write<1>(const Weight* weight, const float* hidden, float* total, int64_t width, int64_t height) {
    for (int64_t column = 0; column < width; column++)
        for (int64_t row = 0; row < rows; row++) total[row * width + column] += hidden[row] * static_cast<float>(weight[column * height]);
}
"""

STEP = """
// Multiplies or adds a number for each hidden unit.
template <int64_t units, typename Operation>
static inline void each(float* value, const Weight* number, Operation operation) {{
    for (int64_t unit = 0; unit < units; unit++)
        for (int64_t row = 0; row < rows; row++)
            value[place<units>(unit, row)] = operation(value[place<units>(unit, row)], static_cast<float>(number[unit]));
}}

template <int64_t units>
static inline void step(const float* x, {pointers}, float* total, int64_t width, int64_t height, int64_t first) {{
    constexpr int64_t padded = (units * rows + lanes - 1) / lanes * lanes;
    float value[{weights}][padded] = {{}}, hidden[padded];
{values}
    for (int64_t place = 0; place < padded; place += lanes) {{
{unit}
    }}
{signs}
    write<units>({last}, hidden, total, width, height);
}}

extern "C" void kernel(
    const float* x, {pointers}, float* totals, float* out, int64_t height, int64_t width, int64_t splits, int64_t threads) {{
    const int64_t size = rows * width;
    constexpr int64_t few = {few};
    #pragma omp parallel num_threads(threads)
    {{
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        float* total = totals + thread * size;
        std::fill(total, total + size, 0.0f);
        const int64_t blocks = height / block, begin = blocks * thread / team * block, end = blocks * (thread + 1) / team * block;
        for (int64_t first = begin; first < end; first += block) step<block>(x, {names}, total, width, height, first);
        if (thread == team - 1) {{
            int64_t first = end;
            for (; first + few <= height; first += few) step<few>(x, {names}, total, width, height, first);
            for (; first < height; first++) step<1>(x, {names}, total, width, height, first);
        }}
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


def single_read(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], signs: Tensor | None, unit: str, splits: int) -> Tensor:
    from pe_fx.lowering.single_read import plain

    (rows, width), height = x.shape, weights[-1].shape[0]
    numbers = [each for each in (*biases, signs) if each is not None]
    tensors = [*weights, *numbers]
    stored = {layout_of(weight) for weight in weights}
    alike = all(each.dtype == x.dtype for each in tensors)
    shaped = all(each.shape == (height, width) for each in weights) and all(each.shape == (height,) for each in numbers)
    if not (x.dtype in TYPES and alike and shaped and stored in ({"rows"}, {"columns"}) and 0 < rows <= MOST_ROWS):
        return plain(x, weights, biases, signs, unit, splits)
    kernel = compiled(unit, x.dtype, stored.pop(), rows, len(weights), (*(bias is not None for bias in biases), signs is not None))
    threads = torch.get_num_threads()
    totals, out = x.new_empty((threads, rows, width), dtype=torch.float32), x.new_empty((splits, rows, width), dtype=torch.float32)
    kernel(x.float().contiguous(), *weights, *(each.contiguous() for each in numbers), totals, out, height, width, splits, threads)
    return out


def layout_of(weight: Tensor) -> str:
    return "rows" if weight.is_contiguous() else "columns" if weight.t().is_contiguous() else ""


@functools.cache
def compiled(unit: str, dtype: torch.dtype, layout: str, rows: int, weights: int, given: tuple[bool, ...]) -> Callable[..., None]:
    """The kernel, a function of tensors and numbers."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    tensors = weights + sum(given)
    types = ["const float*", *[f"const {TYPES[dtype]}*"] * tensors, "float*", "float*", *["int64_t"] * 4]
    kernel: Callable[..., None] = CppPythonBindingsCodeCache.load_pybinding(types, kernel_source(unit, dtype, layout, rows, weights, given))
    return kernel


def kernel_source(unit: str, dtype: torch.dtype, layout: str, rows: int, weights: int, given: tuple[bool, ...]) -> str:
    """`given`: which weights have a bias, and whether there are signs."""
    *biased, signed = given
    names = [f"w{i}" for i in range(weights)] + [f"bias{i}" for i in range(weights) if biased[i]] + ["signs"] * signed
    places = [f"w{i} + first" + " * width" * (layout == "rows") for i in range(weights)]
    values, lines = [], []
    for i in range(weights):
        values.append(f"    read<units>({places[i]}, x, value[{i}], width, height);")
        if biased[i]:
            values.append(f"    each<units>(value[{i}], bias{i} + first, std::plus<float>());")
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
        signs="    each<units>(hidden, signs + first, std::multiplies<float>());" * signed,
        last=places[-1],
        few="1" if layout == "rows" else "lanes",
    )
    return HEADER.format(weight=TYPES[dtype], rows=rows) + COMMON + (ROWS if layout == "rows" else COLUMNS) + step
