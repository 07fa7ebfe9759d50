"""Feed-forward layers of few rows read their tied weight once: where, and that the result is the same."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import Net, Recorder, linear
from torch import Tensor, fx, nn
from torch.nn import functional

import pe_fx
from pe_fx.compiled.dynamo import CustomGraphPass
from pe_fx.compiled.lowering import once, single_read_cpu, single_read_gpu
from pe_fx.compiled.lowering.nodes import new_node
from pe_fx.compiled.lowering.single_read import OPERATION
from pe_fx.tied.assembly import Mix

X = torch.randn(1, 3, 64)

pytestmark = pytest.mark.filterwarnings("ignore::pe_fx.NoSitesWarning")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kernel in (single_read_cpu, single_read_gpu):
        monkeypatch.setattr(kernel, "pays", lambda device, rows, *_: 0 < rows <= 4)
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch.compiler.reset()


def run(
    model: nn.Module, x: Tensor = X, autocast: bool = False, grad: bool = False, dynamic: bool = False, **options: Any
) -> tuple[Tensor, int]:
    """What the compiled model gives, and how many single reads its graphs have."""
    recorder = Recorder()
    inductor = options.pop("inductor", {}) | {"post_grad_custom_post_pass": recorder}
    compiled = torch.compile(model, backend="pe_fx", dynamic=dynamic, options=options | {"inductor": inductor})
    with torch.set_grad_enabled(grad), torch.autocast(X.device.type, torch.bfloat16, enabled=autocast):
        y = compiled(x)
    if grad:
        y.float().sum().backward()
    return y, sum(len(graph.find_nodes(op="call_function", target=OPERATION)) for graph in recorder.graphs)


def mlp(*act: nn.Module, bias: bool = True) -> nn.Module:
    return nn.Sequential(linear(64, 256, bias), *(act or [nn.GELU()]), linear(256, 64, bias))


def gated(bias: bool = False) -> nn.Module:
    return Net(
        lambda self, x: self.down(functional.silu(self.gate(x)) * self.up(x)),
        gate=linear(64, 256, bias),
        up=linear(64, 256, bias),
        down=linear(256, 64, bias),
    )


EVERY: dict[str, Any] = {
    "gelu": mlp,
    "tanh": lambda: mlp(nn.GELU("tanh"), bias=False),
    "several": lambda: mlp(nn.Hardswish(), nn.ELU(), nn.Softplus(), nn.LeakyReLU(), nn.Mish(), nn.ReLU6()),
    "gated": gated,
    "gated, biases": lambda: gated(bias=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"mix": "signed"}, {"mix": "signed", "gain": 0.7}], ids=["plain", "signed", "scaled"])
@pytest.mark.parametrize("build", EVERY.values(), ids=EVERY)
def test_reads_once_and_equals(build: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    tied = pe_fx.transform(build(), X, **options).to(dtype)
    x = X.to(dtype)
    expected = copy.deepcopy(tied).double()(x.double())
    made, count = run(tied, x)
    assert count == 1
    assert made.dtype is dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(made.double(), expected, **tolerance)


@pytest.mark.parametrize("options", [{}, {"mix": "signed", "gain": 0.7}], ids=["plain", "scaled"])
def test_under_autocast(options: dict[str, Any]) -> None:
    tied = pe_fx.transform(mlp(), X, **options)
    made, count = run(tied, autocast=True)
    assert count == 1
    torch.testing.assert_close(made.double(), copy.deepcopy(tied).double()(X.double()), rtol=0.03, atol=0.03)


def test_a_dense_model_that_the_backend_ties() -> None:
    model = nn.Sequential(mlp(), mlp())
    expected = pe_fx.transform(model, X)(X)
    made, count = run(model, rules=["mlp"])
    assert count == 2
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_blocks_alike_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mix is found by running a weight's views, which takes as long as the weight is large."""
    seen: list[fx.Node] = []
    found = once._mix
    monkeypatch.setattr(once, "_mix", lambda chain, origin, turned: (seen.append(origin), found(chain, origin, turned))[1])
    _, count = run(pe_fx.transform(nn.Sequential(mlp(), mlp(), mlp()), X, mix="signed"))
    assert count == 3
    assert len(seen) == 1


def test_whatever_the_default_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = once._mix

    def elsewhere(*args: Any) -> Any:
        with torch.device("meta"):
            return found(*args)

    monkeypatch.setattr(once, "_mix", elsewhere)
    tied = pe_fx.transform(mlp(), X, mix="signed")
    assert run(tied)[1] == 1
    with X.device:  # as set_default_device: one graph, nevertheless
        assert run(tied)[1] == 1


class SumOfProducts(CustomGraphPass):
    """What Inductor makes of the matrix products of one row on a GPU, with coordinate descent tuning (mode "max-autotune")."""

    def __call__(self, graph: fx.Graph) -> None:
        aten = torch.ops.aten
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            with graph.inserting_before(node):
                x, matrix = node.args
                product = new_node(
                    graph, node, aten.mul.Tensor, *(new_node(graph, node, aten.unsqueeze.default, *of) for of in ((x, 2), (matrix, 0)))
                )
                node.replace_all_uses_with(new_node(graph, node, aten.sum.dim_IntList, product, [1]))
            graph.erase_node(node)

    def uuid(self) -> Any:
        return None


def test_products_of_one_row_that_inductor_has_written_out() -> None:
    tied = pe_fx.transform(gated(), X)
    made, count = run(tied, X[:, :1], inductor={"joint_custom_pre_pass": SumOfProducts()})
    assert count == 1
    torch.testing.assert_close(made, tied(X[:, :1]), rtol=1e-4, atol=1e-5)


def assert_twice(model: nn.Module, x: Tensor = X, **how: Any) -> None:
    made, count = run(model, x, **how)
    assert count == 0
    torch.testing.assert_close(made, model(x), rtol=1e-4, atol=1e-5)


def test_many_rows() -> None:
    assert_twice(pe_fx.transform(mlp(), X), torch.randn(5, 64))


def test_dynamic_rows() -> None:
    assert_twice(pe_fx.transform(mlp(), X), torch.randn(3, 64), dynamic=True)


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.Sigmoid()], ids=repr)
def test_where_a_gradient_is_needed(act: nn.Module) -> None:
    """ReLU and Sigmoid keep their result for it."""
    assert_twice(pe_fx.transform(mlp(act), X), grad=True)


def test_turned_off() -> None:
    assert_twice(pe_fx.transform(mlp(), X), single_read=False)


def test_a_long_way_between_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind residuals, a layer's input is made of all layers before it: that is not followed to its end."""
    monkeypatch.setattr(once, "LARGEST", 4)
    assert_twice(pe_fx.transform(mlp(), X))


def test_two_weights() -> None:
    assert_twice(mlp(), rules=["attention"])


def test_one_square_weight_without_transpose() -> None:
    """W F(W x) is no tie."""
    assert_twice(Net(lambda self, x: self.a(self.a(x).relu()), a=linear(64, 64)), rules=["attention"])


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: self.down((h := self.up(x)).relu()) + h.sum(), "is read by"),
        (lambda self, x: self.down(self.up(x).softmax(-1)), "amax|is of another shape|not among"),
        (lambda self, x: self.down(self.up(x).relu() * self.scale), "is no value of theirs|is of another shape"),
        (lambda self, x: self.down(self.up(x).cumsum(-1).relu()), "cumsum"),
    ],
    ids=["read elsewhere", "softmax", "a factor for each unit", "mixes units"],
)
def test_more_than_a_unit(forward: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Net(forward, up=linear(64, 256), down=linear(256, 64), scale=torch.randn(256))
    model.down = Net(lambda self, h: functional.linear(h, model.up.weight.t()))
    with caplog.at_level(logging.INFO, "pe_fx"):
        assert_twice(model, rules=["attention"])
    assert any("reads its weight twice" in record.message for record in caplog.records)
    assert re.search(reason, caplog.text)


def test_gate_of_another_input() -> None:
    model = Net(
        lambda self, x: self.down(self.gate(x + 1).sigmoid() * self.up(x)), gate=linear(64, 256), up=linear(64, 256), down=nn.Identity()
    )
    model.down = Net(lambda self, h: functional.linear(h, model.up.weight.t()))
    assert_twice(model, rules=["attention"])


SIGNED = Mix(0, 1, 4, 64, 64)
FLOAT8 = torch.float8_e4m3fn


def outer(x: Tensor, matrix: Tensor, **dtype: Any) -> Tensor:
    """The matrix product, written out."""
    return (x.unsqueeze(2) * matrix.unsqueeze(0)).sum(1, **dtype)


NO_PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the second in higher precision": lambda x, w: functional.linear((x.bfloat16() @ w.t().bfloat16()).float().tanh(), w.t()),
    "the first in higher precision": lambda x, w: functional.linear((x @ w.t()).tanh().bfloat16(), w.t().bfloat16()),
    "a weight cut off": lambda x, w: (x @ w.t()).tanh() @ w.int().float(),
    "a weight rounded": lambda x, w: (x @ w.t()).tanh() @ w.to(FLOAT8).float(),
    "a mixed weight cut off": lambda x, w: functional.linear((x @ w.t()).tanh(), SIGNED(w.t()).int().float()),
    "a mixed weight of another sign": lambda x, w: functional.linear((x @ w.t()).tanh(), SIGNED(w.t().abs())),
    "a mixed weight that is scaled by an entry": lambda x, w: functional.linear((x @ w.t()).tanh(), SIGNED(w.t() * w[:1, :1])),
    "hidden values rounded": lambda x, w: (x @ w.t()).to(FLOAT8).float() @ w,
    "hidden values in float64": lambda x, w: ((x @ w.t()).double().abs() * 1e-60).sqrt().float() @ w * 1e30,
    "no transpose": lambda x, w: (x @ w.permute(0, -1)).tanh() @ w,
    "no transpose, counted from the end": lambda x, w: (x @ w.permute(-2, -1)).tanh() @ w,
    "a bias for all": lambda x, w: torch.addmm(x[0, :1], x, w.t()).tanh() @ w,
    "hidden values read elsewhere": lambda x, w: (h := (x @ w.t()).tanh()) @ w + h,
    "written out, of one column": lambda x, w: outer(outer(x[:, :1], w.t()).tanh(), w),
    "written out, of three dimensions": lambda x, w: outer(outer(x.expand(64, 64, 64), w.t()).tanh(), w),
    "written out, of two dtypes": lambda x, w: outer(outer(x.bfloat16(), w.t()).tanh(), w),
    "written out, summed in float64": lambda x, w: outer(outer(x, w.t()).tanh(), w, dtype=torch.float64),
}


@pytest.mark.parametrize("layer", NO_PAIRS.values(), ids=NO_PAIRS)
def test_what_is_like_it(layer: Callable[[Tensor, Tensor], Tensor], caplog: pytest.LogCaptureFixture) -> None:
    x, weight = (each.bfloat16().float() for each in (torch.randn(1, 64), torch.randn(64, 64) / 8))
    made, count = run(Net(lambda self, x: layer(x, self.weight), weight=weight), x)
    assert count == 0
    expected = layer(x, weight)
    assert made.dtype is expected.dtype
    torch.testing.assert_close(made, expected, rtol=0.02, atol=0.02)
    assert "is left out" not in caplog.text


def test_generates_the_same_in_a_loop() -> None:
    """As when a sequence is decoded: one row at a time, in turns with a longer prompt."""
    tied = pe_fx.transform(mlp(), X)
    compiled = torch.compile(tied, backend="pe_fx", dynamic=False)
    with torch.no_grad():
        for rows in (7, 1, 1, 7):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), tied(x), rtol=1e-4, atol=1e-5)
