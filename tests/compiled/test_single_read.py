"""`Wᵀ F(W x)` as one operation: what it computes, what counts as F, and what its two kernels are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from pe_fx.compiled.lowering import single_read_cpu, single_read_gpu
from pe_fx.compiled.lowering.single_read_plain import plain
from pe_fx.compiled.lowering.unit import NoUnit, evaluate, lines_of, source, unit_between

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RELU = "t0=maximum(a,0.0)"
GELU = "t0=mul(a,0.5);t1=mul(a,0.7071067811865476);t2=erf(t1);t3=add(t2,1.0);t4=mul(t0,t3)"
SWIGLU = "t0=neg(a);t1=exp(t0);t2=add(t1,1.0);t3=div(a,t2);t4=mul(t3,b)"
SPECIAL = (-torch.inf, -90.0, -5.0, -0.7, 0.0, 0.05, 2.5, 90.0, torch.inf, torch.nan)


def single_read(*args: Any) -> Tensor:
    result: Tensor = torch.ops.pe_fx.single_read(*args)
    return result


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(rows: int, width: int, height: int, weights: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor, int]:
    """x, weights, a bias, and how many hidden units are negated; results are of about the size of 1."""
    matrices = [torch.randn(height, width).div(max(width, 1) ** 0.5).to(dtype) for _ in range(weights)]
    return torch.randn(rows, width).to(dtype), matrices, torch.randn(height).to(dtype), height // 2


def exact(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], negated: int, function: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """In float64; and the size of the terms that make up each sum, of which rounding is a fraction whatever they add up to."""
    values = [functional.linear(x.double(), w.double(), None if b is None else b.double()) for w, b in zip(weights, biases, strict=True)]
    hidden = function(*values)
    hidden[:, :negated] *= -1
    return hidden @ weights[-1].double(), (1 + hidden.abs()) @ weights[-1].double().abs()


def close(found: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    """As close as sums in float32 are: sixteen roundings of each term."""
    value, terms = wanted
    error = (found.double() - value).abs()
    assert (error <= 1e-6 * terms).all(), f"{(error / terms).max().item():.1e} of the terms' size"


# What it computes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(0, 100), height=st.integers(0, 300), splits=st.integers(1, 3), count=st.integers(1, 2), turned=st.booleans())
def test_against_float64(
    threads: None, dtype: torch.dtype, rows: int, width: int, height: int, splits: int, count: int, turned: bool
) -> None:
    torch.set_num_threads(count)
    x, weights, bias, negated = drawn(rows, width, height, 1, dtype)
    if turned:
        weights = [weight.t().contiguous().t() for weight in weights]
    parts = single_read(x, weights, [bias], negated, GELU, splits)
    assert parts.shape == (splits, rows, width)
    assert parts.dtype == torch.float32
    close(parts.sum(0), exact(x, weights, [bias], negated, functional.gelu))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [0, 1, 2])
def test_two_weights(dtype: torch.dtype, turned: int) -> None:
    """As many of them are stored the other way round."""
    x, weights, bias, _ = drawn(3, 50, 241, 2, dtype)
    weights = [weight.t().contiguous().t() if i < turned else weight for i, weight in enumerate(weights)]
    close(
        single_read(x, weights, [None, bias], 0, SWIGLU, 1)[0],
        exact(x, weights, [None, bias], 0, lambda a, b: functional.silu(a) * b),
    )


@pytest.mark.parametrize("rows", [0, single_read_cpu.MOST_ROWS, single_read_cpu.MOST_ROWS + 1, 100])
def test_any_number_of_rows(rows: int) -> None:
    x, weights, _, _ = drawn(rows, 20, 30, 1, torch.float32)
    close(single_read(x, weights, [None], 0, RELU, 1)[0], exact(x, weights, [None], 0, torch.relu))


def test_other_dtypes_go_the_plain_way() -> None:
    x, weights, bias, _ = drawn(2, 20, 30, 1, torch.bfloat16)
    mixed = [weight.float() for weight in weights]
    close(single_read(x, mixed, [bias], 0, RELU, 1)[0], exact(x, mixed, [bias], 0, torch.relu))


@pytest.mark.parametrize("kernel", [single_read_cpu, single_read_gpu])
def test_what_is_no_matrix_of_this_width_is_an_error(kernel: Any) -> None:
    x, weights, bias, _ = drawn(2, 20, 30, 1, torch.float32)
    with pytest.raises(RuntimeError, match="shape"):
        kernel.single_read(x[:, :19], weights, [None], 0, RELU, 1)
    with pytest.raises(RuntimeError, match="size"):
        kernel.single_read(x, weights, [bias[:29]], 0, RELU, 1)


def test_the_same_each_time_with_two_threads(threads: None) -> None:
    torch.set_num_threads(2)
    x, weights, bias, _ = drawn(2, 300, 1000, 1, torch.float32)
    first = single_read(x, weights, [bias], 0, GELU, 1)
    assert all(torch.equal(first, single_read(x, weights, [bias], 0, GELU, 1)) for _ in range(10))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_goes_through(wrong: float) -> None:
    x, weights, _, _ = drawn(2, 40, 50, 1, torch.float32)
    x[1, 3] = wrong
    args = (x, weights, [None], 0, RELU, 1)
    assert single_read(*args)[0, 0].isfinite().all()
    assert not single_read(*args)[0, 1].isfinite().any()
    torch.testing.assert_close(single_read(*args), plain(*args), equal_nan=True)


def test_a_gradient_is_refused() -> None:
    x, weights, _, _ = drawn(2, 20, 30, 1, torch.float32)
    for each in (x, weights[0]):
        y = single_read(x.detach(), [w.detach() for w in weights], [None], 0, RELU, 1)
        assert not y.requires_grad
        each.requires_grad_()
        with pytest.raises(NotImplementedError, match="no gradient"):
            single_read(x, weights, [None], 0, RELU, 1).sum().backward()
        each.requires_grad_(False)


# The operation in PyTorch


@pytest.mark.parametrize("splits", [1, 2])
def test_is_an_operation_by_the_rules(splits: int) -> None:
    x, weights, bias, negated = drawn(2, 20, 30, 2, torch.float32)
    torch.library.opcheck(torch.ops.pe_fx.single_read.default, (x, weights, [bias, None], negated, SWIGLU, splits))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(30, 20))

    def forward(self, x: Tensor) -> Tensor:
        return single_read(x, [self.weight], [None], 0, GELU, 1).sum(0)


def test_an_exported_program_decomposes_to_plain_operations() -> None:
    layer, x = Layer(), torch.randn(2, 20)
    program = torch.export.export(layer, (x,)).run_decompositions({torch.ops.pe_fx.single_read.default: plain})
    calls = program.graph.find_nodes(op="call_function", target=torch.ops.pe_fx.single_read.default)
    assert not calls
    assert program.graph.find_nodes(op="call_function", target=aten.erf.default)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_is_compiled_by_inductor() -> None:
    layer, x = Layer(), torch.randn(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer)(x), layer(x))


# What counts as F


def between(act: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> str:
    """The unit of a layer with this activation, as Inductor sees it."""

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return act(x @ weight.t()) @ weight

    traced = make_fx(layer, decomposition_table=select_decomp_table(), tracing_mode="fake")
    graph = traced(torch.randn(3, 4, dtype=dtype), torch.randn(6, 4, dtype=dtype)).graph
    product, last = graph.find_nodes(op="call_function", target=aten.mm.default)
    unit, inside = unit_between({product: "a"}, last.args[0], 6)
    assert all(isinstance(node, fx.Node) and node not in (product, last) for node in inside)
    return unit


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky": nn.LeakyReLU(0.1),
    "squared": lambda a: a.relu().square(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "quick_gelu": lambda a: a * torch.sigmoid(1.702 * a),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardtanh": nn.Hardtanh(),
    "elu": nn.ELU(),
    "selu": nn.SELU(),
    "softplus": nn.Softplus(),
    "mish": nn.Mish(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "cubed": lambda a: a**3,
    "steps": lambda a: (a > 0).float() + (a > 1).float(),
    "masked": lambda a: a * (a >= 0),
    "larger": lambda a: torch.maximum(a, 1 - a) - torch.minimum(a, 2 * a),
    "less": lambda a: 1 / (2 + a.abs()) + torch.where(a < -1, 2.0, 3.0),
    "root": lambda a: (a * a + 1).sqrt().sub(1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    """In PyTorch and in C++, at the ends of the range and in between."""
    unit, function = between(ACTIVATIONS[name]), ACTIVATIONS[name]
    values = torch.tensor(SPECIAL)[:, None]
    torch.testing.assert_close(evaluate(unit, [values[1:-2].double()]), function(values[1:-2].double()).double())
    one = torch.ones(1, 1)
    torch.testing.assert_close(single_read(values, [one], [None], 0, unit, 1)[0], evaluate(unit, [values]), equal_nan=True)
    x, weights, _, _ = drawn(10, 33, 21, 1, torch.float32)
    close(single_read(x, weights, [None], 0, unit, 1)[0], exact(x, weights, [None], 0, lambda a: function(a).double()))


def test_in_half_precision_casts_fall_away() -> None:
    unit = between(nn.GELU(), torch.bfloat16)
    assert [name for _, name, _ in lines_of(unit)] == [name for _, name, _ in lines_of(between(nn.GELU()))]


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda a: a.softmax(-1), "of another shape"),
        (lambda a: a * torch.ones(6), "of another shape"),
        (lambda a: a * a.mean(), "of another shape"),
        (lambda a: a.cumsum(-1), "not among the functions"),
        (lambda a: functional.dropout(a, 0.5), "not among the functions|no value of theirs"),
        (lambda a: a.flip(-1), "not among the functions"),
        (lambda a: a.clamp_min(float("-inf")), "has no literal"),
        (lambda a: (a > 0) * (a < 1) * a, "no floating-point number"),
    ],
)
def test_near_misses(act: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(NoUnit, match=reason):
        between(act)


def test_a_factor_for_each_channel() -> None:
    def layer(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        return (x @ weight.t()).relu().mul(factor) @ weight

    given = torch.randn(3, 4), torch.randn(6, 4), torch.randn(6)
    graph = make_fx(layer, decomposition_table=select_decomp_table(), tracing_mode="fake")(*given).graph
    product, last = graph.find_nodes(op="call_function", target=aten.mm.default)
    with pytest.raises(NoUnit, match="factor_1 is no value of theirs"):
        unit_between({product: "a"}, last.args[0], 6)


def test_a_hidden_value_that_is_read_elsewhere() -> None:
    def layer(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (x @ weight.t()).relu()
        return hidden.square() @ weight, hidden

    graph = make_fx(layer, decomposition_table=select_decomp_table(), tracing_mode="fake")(torch.randn(3, 4), torch.randn(6, 4)).graph
    product, last = graph.find_nodes(op="call_function", target=aten.mm.default)
    with pytest.raises(NoUnit, match="is read by output"):
        unit_between({product: "a"}, last.args[0], 6)


@pytest.mark.parametrize(
    ("unit", "wanted"),
    [
        ("t0=maximum(0.0,a)", [0.0, 3.0, torch.nan]),
        ("t0=minimum(a,-1.0)", [-2.0, -1.0, torch.nan]),
        ("t0=sub(1.0,a)", [3.0, -2.0, torch.nan]),
        ("t0=div(-6.0,a)", [3.0, -2.0, torch.nan]),
        ("t0=gt(a,1e-05);t1=where(t0,2.0,-0.5)", [-0.5, 2.0, -0.5]),
        ("t0=le(-2.0,a);t1=where(t0,a,1.0)", [-2.0, 3.0, 1.0]),
        ("t0=neg(a);t1=maximum(a,t0)", [2.0, 3.0, torch.nan]),
    ],
)
def test_literals_on_either_side(unit: str, wanted: list[float]) -> None:
    values = torch.tensor([[-2.0], [3.0], [torch.nan]])
    torch.testing.assert_close(evaluate(unit, [values]), torch.tensor(wanted)[:, None], equal_nan=True)
    result = single_read(values, [torch.ones(1, 1)], [None], 0, unit, 1)[0]
    torch.testing.assert_close(result, torch.tensor(wanted)[:, None], equal_nan=True)


@pytest.mark.parametrize("unit", ["", "a", "t0=a", "t0=system(a)", "t0=mul(a,0.5);", "t0=mul(a, b)", "x=mul(a,b)"])
def test_anything_else_is_no_unit(unit: str) -> None:
    with pytest.raises(ValueError, match="is no line of a unit"):
        source(unit, "cpp")


# The Triton kernel, without a GPU


def run(code: str, **environment: str) -> str:
    """What a Python of its own prints."""
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


INTERPRETED = """
import json
import torch
from pe_fx.compiled.lowering import single_read_gpu
from pe_fx.compiled.lowering.single_read_plain import plain

torch.manual_seed(0)
found = []
units = json.loads('UNITS')
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for number, unit in enumerate(units):
        rows, width, height = (1, 2, 3)[number % 3], (16, 13, 20)[number % 3], (9, 16, 7)[number % 3]
        weights = [torch.randn(height, width).to(dtype) for _ in range(2 if "b" in unit.replace("abs", "") else 1)]
        bias, negated = torch.randn(height).to(dtype), height // 2
        args = (torch.randn(rows, width).to(dtype), weights, [bias, None][: len(weights)], negated, unit, 3)
        tuning = single_read_gpu.Tuning(2, 4, 1, 1)
        one, two = single_read_gpu.launch(*args, tuning).sum(0), plain(*args).sum(0)
        found.append(((one - two).abs().max() / two.abs().max()).item())
infinite = (torch.tensor([[-torch.inf], [torch.inf]]), [torch.ones(1, 1)], [None], 0, "t0=maximum(a,0.0);t1=minimum(t0,6.0)", 3)
print(json.dumps([found, single_read_gpu.launch(*infinite, tuning).sum(0).flatten().tolist()]))
"""


def test_triton_computes_the_same() -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")
    units = [GELU, RELU, SWIGLU, *(between(ACTIVATIONS[name]) for name in ("elu", "mish", "hardswish", "gelu_tanh", "larger", "steps"))]
    found, of_infinite = json.loads(run(INTERPRETED.replace("UNITS", json.dumps(units)), TRITON_INTERPRET="1"))
    assert len(found) == 3 * len(units)
    assert max(found) < 1e-5
    assert of_infinite == [0, 6]  # nothing comes of the hidden units that fill the last block up


HOPPER = """
import re, subprocess, tempfile
import torch
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pe_fx.compiled.lowering import single_read_gpu

rows, width, height = ROWS, 4096, 16384
tuning = single_read_gpu.tuning_of(rows, width, 1, torch.DTYPE)
kernel = single_read_gpu.compiled("UNIT", rows, (True,), False)
sizes = dict(HEIGHT=height, NEGATED=0, WIDTH=width, PADDED=width, BLOCK=tuning.block, STAGES=tuning.stages)
sizes["TURNS"] = -(-height // (132 * tuning.programs * tuning.block))
names = kernel.arg_names
types = {name: "constexpr" if name in sizes else "*fp32" if name == "out" else "TYPE" for name in names}
aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name not in sizes}
code = ASTSource(kernel, types, {(names.index(name),): size for name, size in sizes.items()}, aligned)
binary = triton.compile(code, target=GPUTarget("cuda", 90, 32), options={"num_warps": tuning.warps})
tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(binary.asm["cubin"])
    file.flush()
    report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
print(re.search(r"STACK:(\\d+)", report)[1], re.search(r"LOCAL:(\\d+)", report)[1])
"""


@pytest.mark.parametrize(("dtype", "pointer"), [("bfloat16", "*bf16"), ("float32", "*fp32")])
@pytest.mark.parametrize("rows", [1, 2])
def test_triton_keeps_all_in_registers_on_hopper(rows: int, dtype: str, pointer: str) -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")
    code = HOPPER.replace("UNIT", GELU).replace("ROWS", str(rows)).replace("DTYPE", dtype).replace("TYPE", pointer)
    assert run(code).split() == ["0", "0"]
