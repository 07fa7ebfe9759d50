"""x * sigmoid(W₂ F(W₁ pool(x))) becomes x * sigmoid(Wᵀ F(W pool(x)))."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_equals_twin, assert_hit, assert_idempotent, assert_miss, every_parametrization, linear, ties, weight
from torch import Tensor, nn

import pe_fx

hit = partial(assert_hit, kind="squeeze_excite")
miss = partial(assert_miss, kind="squeeze_excite")

C, R = 16, 4
X = torch.randn(2, C, 5, 5)
TIE = "expand.weight ← reduce.weightᵀ"


def gate(forward: Callable[..., object], **members: nn.Module | Tensor) -> Net:
    return Net(forward, **{"reduce": nn.Conv2d(C, R, 1), "expand": nn.Conv2d(R, C, 1), **members})


def default(m: Net, x: Tensor) -> Tensor:
    return x * m.expand(F.relu(m.reduce(x.mean((2, 3), keepdim=True)), inplace=True)).sigmoid()


# ---- hits


def test_convolutions() -> None:
    hit(gate(default), X, TIE)


@pytest.mark.parametrize("last", [F.hardsigmoid, torch.tanh, lambda y: F.relu6(y + 3) / 6], ids=["hardsigmoid", "tanh", "relu6"])
def test_gates(last: Callable[[Tensor], Tensor]) -> None:
    hit(gate(lambda m, x: last(m.expand(F.silu(m.reduce(F.adaptive_avg_pool2d(x, 1))))) * x), X, TIE)


def test_linears_on_the_pooled_vector() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1).view(x.shape[0], C)
        return x * m.expand(m.reduce(pooled).relu()).sigmoid().view(x.shape[0], C, 1, 1).expand_as(x)

    hit(gate(forward, reduce=linear(C, R), expand=linear(R, C)), X, TIE)


def test_linears_in_a_sequential() -> None:
    net = Net(
        lambda m, x: x * m.fc(m.pool(x).flatten(1))[:, :, None, None],
        pool=nn.AdaptiveAvgPool2d(1),
        fc=nn.Sequential(linear(C, R, False), nn.ReLU(inplace=True), linear(R, C, False), nn.Sigmoid()),
    )
    hit(net, X, "fc.2.weight ← fc.0.weightᵀ")


def test_bare_parameters() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return x * (x.mean((-2, -1)) @ m.reduce).relu().mm(m.expand).sigmoid()[..., None, None]

    hit(gate(forward, reduce=weight(C, R), expand=weight(R, C)), X, "expand ← reduceᵀ")


def test_norm_between() -> None:
    net = gate(lambda m, x: x * m.expand(m.bn(m.reduce(x.mean((2, 3), keepdim=True))).relu()).sigmoid(), bn=nn.BatchNorm2d(R))
    hit(net, X, TIE)


def test_channels_last_tokens() -> None:
    net = gate(lambda m, x: x * m.expand(m.reduce(x.mean(1, keepdim=True)).relu()).sigmoid(), reduce=linear(C, R), expand=linear(R, C))
    hit(net, torch.randn(2, 5, C), TIE)


def test_in_place_product() -> None:
    net = gate(lambda m, x: (2 * x).mul_(m.expand(F.relu(m.reduce(x.mean((2, 3), keepdim=True)))).sigmoid_()))
    hit(net, X, TIE)


def test_one_plus_gate() -> None:
    hit(gate(lambda m, x: x * (1 + m.expand(m.reduce(x.mean((2, 3), keepdim=True)).relu()).tanh())), X, TIE)


def test_ends_a_residual_branch() -> None:
    net = Net(lambda m, x: x + m.se(m.conv(x).relu()), conv=nn.Conv2d(C, C, 3, padding=1), se=gate(default))
    hit(net, X, "se.expand.weight ← se.reduce.weightᵀ")


def test_beside_the_block_it_gates() -> None:
    net = Net(
        lambda m, x: x + m.se(m.conv3(m.conv2(m.conv1(x).relu()).relu())),
        conv1=nn.Conv2d(C, 8, 1),
        conv2=nn.Conv2d(8, 8, 3, padding=1),
        conv3=nn.Conv2d(8, C, 1),
        se=gate(default),
    )
    made = pe_fx.plan(net, X)
    assert set(ties(made)) == {"se.expand.weight ← se.reduce.weightᵀ", "conv3.weight ← conv1.weightᵀ"}
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


def test_channel_attention_on_average_and_maximum_runs_twice() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        average, maximum = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * (m.expand(m.reduce(average).relu()) + m.expand(m.reduce(maximum).relu())).sigmoid()

    hit(gate(forward), X, TIE)


def test_two_gates() -> None:
    hit(nn.Sequential(gate(default), gate(default)), X, *(f"{i}.expand.weight ← {i}.reduce.weightᵀ" for i in range(2)))


def test_rule_chosen_alone() -> None:
    hit(gate(default), X, TIE, rules=["squeeze_excite"])
    assert not pe_fx.plan(gate(default), X, rules=["mlp"]).sites


def test_idempotent() -> None:
    assert_idempotent(gate(default), X)


# ---- not a gate


def test_pooled_head_is_an_mlp() -> None:
    net = gate(lambda m, x: m.expand(m.reduce(x.mean((2, 3))).relu()), reduce=linear(C, R), expand=linear(R, C))
    assert_hit(net, X, TIE, kind="mlp")


# ---- misses


def test_no_nonlinearity() -> None:
    miss(gate(lambda m, x: x * m.expand(m.reduce(x.mean((2, 3), True))).sigmoid()), X, r"no nonlinearity", weights=("reduce.weight",))


def test_norm_is_no_nonlinearity() -> None:
    net = gate(lambda m, x: x * m.expand(m.bn(m.reduce(x.mean((2, 3), True)))).sigmoid(), bn=nn.BatchNorm2d(R))
    miss(net, X, r"no nonlinearity", weights=("reduce.weight", "expand.weight"))


def test_shapes_not_transposed() -> None:
    net = Net(
        lambda m, x: m.conv(x) * m.expand(m.reduce(x.mean((2, 3), True)).relu()).sigmoid(),
        conv=nn.Conv2d(C, 8, 3, padding=1),
        reduce=nn.Conv2d(C, R, 1),
        expand=nn.Conv2d(R, 8, 1),
    )
    made = pe_fx.plan(net, X)
    assert not made.sites
    assert any("not transposes" in found.reason and "reduce.weight" in found.weights for found in made.misses), made.explain()


def test_hidden_read_elsewhere() -> None:
    net = gate(lambda m, x: (x * m.expand(h := m.reduce(x.mean((2, 3), True)).relu()).sigmoid(), h))
    made = pe_fx.plan(net, X)
    assert not made.sites
    assert any("returned" in found.reason for found in made.misses), made.explain()


@pytest.mark.parametrize("frozen", ["reduce", "expand"])
def test_frozen_beside_trained(frozen: str) -> None:
    net = gate(default)
    net.get_submodule(frozen).weight.requires_grad_(False)
    miss(net, X, rf"{frozen}\.weight is frozen", weights=("reduce.weight", "expand.weight"))


@pytest.mark.parametrize("end", ["reduce", "expand"])
@every_parametrization
def test_parametrized(register: Callable[[nn.Module], object], end: str) -> None:
    net = gate(default)
    register(net.get_submodule(end))
    made = pe_fx.plan(net, X)
    assert not made.sites
    assert any("parametri" in found.reason for found in made.misses), made.explain()


def test_another_dtype() -> None:
    net = gate(lambda m, x: x * m.expand(m.reduce(x.mean((2, 3), True)).relu().bfloat16()).sigmoid())
    net.expand.bfloat16()
    miss(net, X, r"bfloat16", weights=("reduce.weight", "expand.weight"))


@pytest.mark.parametrize("end", ["reduce", "expand"])
def test_read_by_a_penalty(end: str) -> None:
    net = Net(lambda m, x: m.se(x).sum() + m.se.get_submodule(end).weight.abs().sum(), se=gate(default))
    miss(net, X, rf"{end}\.weight is read by")


def test_reduce_used_twice_with_different_partners() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        average, maximum = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * (m.expand(m.reduce(average).relu()) + m.other(m.reduce(maximum).relu())).sigmoid()

    miss(gate(forward, other=nn.Conv2d(R, C, 1)), X, r"reduce\.weight is used a second time")


@pytest.mark.parametrize("end", ["reduce", "expand"])
def test_grouped(end: str) -> None:
    net = gate(default)
    before = net.get_submodule(end)
    setattr(net, end, nn.Conv2d(before.in_channels, before.out_channels, 1, groups=2))
    made = pe_fx.plan(net, X)
    assert not made.sites
    assert any(f"{end}.weight" in found.reason and "groups" in found.reason for found in made.misses), made.explain()
