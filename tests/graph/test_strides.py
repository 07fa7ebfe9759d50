"""A tied weight is a transposed matrix: where a model views its weight as only one row by row can be viewed, it is such a one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_equals_twin, assert_hit, linear, weight
from torch import Tensor, fx, nn

import pe_fx
import pe_fx.checkpoint

X = torch.randn(3, 5, 8)
IMAGE = torch.randn(2, 8, 6, 6)
Read = Callable[[Tensor], Tensor]

VIEWS: dict[str, Read] = {
    "view": lambda w: w.view(-1).view(8, 16),
    "view_as": lambda w: w.view_as(torch.empty(128)).view(8, 16),
    "view of other rows": lambda w: w.view(4, 32).view(8, 16),
    "view of a copy": lambda w: w.clone().view(-1).view(8, 16),
    "contiguous, where it is": lambda w: w.contiguous().view(-1).view(8, 16),  # which no graph shows
    "view of a product": lambda w: (2 * w).view(-1).view(8, 16),
    "flattened and back, twice": lambda w: w.view(-1).view(4, 32).view(-1).view(8, 16),
}
OTHERS: dict[str, Read] = {
    "as it is": lambda w: w,
    "reshape": lambda w: w.reshape(-1).reshape(8, 16),
    "rows in groups": lambda w: w.view(2, 4, 16).view(8, 16),
    "columns in groups": lambda w: w.view(8, 4, 4).view(8, 16),
}


def mlp(read: Read) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        return F.linear(m.a(x).relu(), read(m.b.weight), m.b.bias)

    return Net(forward, a=linear(8, 16), b=linear(16, 8))


def contiguous(model: nn.Module, inputs: Tensor = X, **options: object) -> list[bool]:
    return [tie.contiguous for tie in pe_fx.plan(model, inputs, **options).ties]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VIEWS)
def test_viewed(name: str) -> None:
    model = mlp(VIEWS[name])
    tied = assert_hit(model, X, "b.weight ← a.weightᵀ", kind="mlp")
    assert contiguous(model) == [True]
    assert tied.b.weight.is_contiguous()
    assert pe_fx.verify(tied, X)
    model.load_state_dict(pe_fx.untie(tied).state_dict())
    assert torch.allclose(model(X), tied(X), atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_read_in_ways_that_any_matrix_can_be(name: str) -> None:
    model = mlp(OTHERS[name])
    tied = assert_hit(model, X, "b.weight ← a.weightᵀ", kind="mlp")
    assert contiguous(model) == [False]
    assert tied.b.weight.data_ptr() == tied.a.weight.data_ptr()  # no copy


def test_only_the_layer_that_is_viewed() -> None:
    assert contiguous(nn.Sequential(mlp(VIEWS["view"]), mlp(OTHERS["as it is"]))) == [True, False]


def test_bare_parameters() -> None:
    net = Net(lambda m, x: F.linear(F.gelu(F.linear(x, m.w1)), m.w2.view(-1).view(8, 16)), w1=weight(16, 8), w2=weight(8, 16))
    assert_hit(net, X, "w2 ← w1ᵀ", kind="mlp")


def test_a_kernel() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return F.conv2d(m.a(x).relu(), m.b.weight.view(-1).view(8, 16, 1, 1))

    net = Net(forward, a=nn.Conv2d(8, 16, 1), b=nn.Conv2d(16, 8, 1))
    assert_hit(net, IMAGE, "b.weight ← a.weightᵀ", kind="mlp")


def test_parts_that_are_put_together_are_a_copy_already() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, m.qkv.weight.view(-1).view(24, 8)).chunk(3, -1)
        return m.proj(F.scaled_dot_product_attention(q, k, v))

    net = Net(forward, qkv=nn.Linear(8, 24, bias=False), proj=linear(8, 8))
    assert contiguous(net) == [False, False]
    assert_hit(net, X, "proj.weight ← qkv.weight[0:8]ᵀ", "qkv.weight[16:24] ← qkv.weight[8:16]ᵀ", kind="attention")


@pytest.mark.parametrize("options", [{"mix": "signed"}, {"gain": True}, {"mix": "signed", "gain": True}], ids=str)
def test_variants(options: dict[str, object]) -> None:
    model = mlp(VIEWS["view"])
    plan = pe_fx.plan(model, X, **options)  # type: ignore[arg-type]
    assert_equals_twin(model, pe_fx.apply(model, plan), plan, X)


def test_a_plan_keeps_it() -> None:
    model = mlp(VIEWS["view"])
    plan = pe_fx.plan(model, X)
    assert pe_fx.Plan.from_json(plan.to_json()) == plan
    assert pe_fx.apply(model, pe_fx.Plan.from_json(plan.to_json()))(X).shape == X.shape


def test_plans_that_do_not_say() -> None:
    plan = pe_fx.plan(mlp(OTHERS["as it is"]), X)
    body = json.loads(plan.to_json())
    for site in body["sites"]:
        for tie in site["ties"]:
            assert tie.pop("contiguous") is False
    assert pe_fx.Plan.from_json(json.dumps(body)) == plan


def test_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    tied = pe_fx.transform(mlp(VIEWS["view"]), X)
    pe_fx.checkpoint.save(tied, tmp_path / "tied.safetensors")
    loaded = pe_fx.checkpoint.load(tmp_path / "tied.safetensors", mlp(VIEWS["view"]))
    assert torch.equal(loaded(X), tied(X))


def test_graphs() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linear(8, 16), linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.a(x).relu(), self.b.weight.view(-1).view(8, 16), self.b.bias)

    model = Viewed()
    traced = fx.symbolic_trace(model)
    assert torch.allclose(pe_fx.transform(traced, X)(X), pe_fx.transform(model, X)(X))
    given: list[tuple[fx.GraphModule, list[Tensor]]] = []
    torch.compile(model, backend=lambda gm, inputs: given.append((gm, inputs)) or gm.forward)(X)  # type: ignore[func-returns-value]
    (gm, inputs), *_ = given
    plan = pe_fx.plan(gm)
    assert [tie.contiguous for tie in plan.ties] == [True]
    assert torch.allclose(pe_fx.apply(gm, plan)(*inputs)[0], pe_fx.transform(model, X)(X))
