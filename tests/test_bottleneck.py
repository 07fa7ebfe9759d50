"""W₁ᵀ G(W₂ x) around a spatial convolution becomes Wᵀ G(W x)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_equals_twin, assert_hit, assert_idempotent, assert_miss, every_parametrization, ties
from torch import Tensor, nn

import pe_fx

hit = partial(assert_hit, kind="bottleneck")
miss = partial(assert_miss, kind="bottleneck")

X = torch.randn(2, 16, 6, 6)
TIE = "conv3.weight ← conv1.weightᵀ"


def conv(inputs: int, outputs: int, kernel: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)


class Bottleneck(nn.Module):
    """ResNet's block."""

    def __init__(self, width: int = 16, mid: int = 8, **conv2: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, mid), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = conv(mid, mid, 3, **conv2), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = conv(mid, width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + x)


class Gate(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, width: int, mid: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, mid, 1), nn.Conv2d(mid, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)), inplace=True)).sigmoid()


class StdConv2d(nn.Conv2d):
    """A convolution whose kernel is standardised per output channel."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-6).sqrt(), self.bias, self.stride, self.padding, 1, self.groups)


class NormConv2d(nn.Conv2d):
    """The same, written with batch_norm as timm does."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, 1, self.groups)


def three(*between: nn.Module, width: int = 16, mid: int = 8) -> nn.Sequential:
    return nn.Sequential(conv(width, mid), *between, conv(mid, width))


# ---- hits


def test_resnet() -> None:
    hit(Bottleneck(), X, TIE)


def test_grouped_3x3() -> None:
    hit(Bottleneck(groups=4), X, TIE)


def test_dilated_3x3() -> None:
    net = Bottleneck()
    net.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
    hit(net, X, TIE)


def test_strided_3x3_without_shortcut() -> None:
    hit(nn.Sequential(conv(16, 8), nn.ReLU(), conv(8, 8, 3, stride=2), nn.ReLU(), conv(8, 16)), X, "4.weight ← 0.weightᵀ")


def test_one_nonlinearity_is_enough() -> None:
    hit(nn.Sequential(conv(16, 8), conv(8, 8, 3), nn.ReLU(), conv(8, 16)), X, "3.weight ← 0.weightᵀ")


def test_biases_stay() -> None:
    net = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1))
    tied = hit(net, X, "3.weight ← 0.weightᵀ")
    assert [name for name in tied.state_dict() if name.endswith("bias")] == ["0.bias", "2.bias", "3.bias"]


def test_one_dimension() -> None:
    net = nn.Sequential(nn.Conv1d(16, 8, 1), nn.GELU(), nn.Conv1d(8, 8, 5, padding=2), nn.GELU(), nn.Conv1d(8, 16, 1))
    hit(net, torch.randn(2, 16, 9), "4.weight ← 0.weightᵀ")


def test_three_dimensions() -> None:
    net = nn.Sequential(nn.Conv3d(16, 8, 1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 16, 1))
    hit(net, torch.randn(1, 16, 3, 3, 3), "4.weight ← 0.weightᵀ")


def test_functional() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return F.conv2d(F.relu_(F.conv2d(F.relu_(F.conv2d(x, m.a)), m.b, padding=1)), m.c)

    hit(Net(forward, a=torch.randn(8, 16, 1, 1), b=torch.randn(8, 8, 3, 3), c=torch.randn(16, 8, 1, 1)), X, "c ← aᵀ")


def test_channels_last() -> None:
    hit(Bottleneck().to(memory_format=torch.channels_last), X.to(memory_format=torch.channels_last), TIE)


def inverted(gate: bool) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = F.silu(m.bn1(m.expand(x)), inplace=True)
        y = F.silu(m.bn2(m.depthwise(y)), inplace=True)
        return x + m.bn3(m.project(m.gate(y)))

    return Net(
        forward,
        expand=conv(8, 16),
        bn1=nn.BatchNorm2d(16),
        depthwise=conv(16, 16, 3, groups=16),
        bn2=nn.BatchNorm2d(16),
        gate=Gate(16, 4) if gate else nn.Identity(),
        project=conv(16, 8),
        bn3=nn.BatchNorm2d(8),
    )


def test_inverted_depthwise() -> None:
    hit(inverted(gate=False), torch.randn(2, 8, 6, 6), "project.weight ← expand.weightᵀ")


def test_inverted_with_gate_inside() -> None:
    net, x = inverted(gate=True), torch.randn(2, 8, 6, 6)
    made = pe_fx.plan(net, x)
    assert {site.kind: [str(tie) for tie in site.ties] for site in made.sites} == {
        "bottleneck": ["project.weight ← expand.weightᵀ"],
        "squeeze_excite": ["gate.expand.weight ← gate.reduce.weightᵀ"],
    }
    assert_equals_twin(net, pe_fx.apply(net, made), made, x)


def test_gate_inside_is_no_obstacle_where_its_rule_is_off() -> None:
    hit(inverted(gate=True), torch.randn(2, 8, 6, 6), "project.weight ← expand.weightᵀ", rules=["bottleneck"])


def test_gate_after_the_block_is_no_obstacle() -> None:
    net = Net(lambda m, x: x + m.gate(m.block(x)), block=three(nn.ReLU(), conv(8, 8, 3), nn.ReLU()), gate=Gate(16, 4))
    made = pe_fx.plan(net, X)
    assert ties(made) == ["gate.expand.weight ← gate.reduce.weightᵀ", "block.4.weight ← block.0.weightᵀ"]


@pytest.mark.parametrize("cls", [StdConv2d, NormConv2d])
def test_weight_standardisation(cls: type[nn.Conv2d]) -> None:
    net = nn.Sequential(cls(16, 8, 1), nn.ReLU(), cls(8, 8, 3, padding=1), nn.ReLU(), cls(8, 16, 1))
    hit(net, X, "4.weight ← 0.weightᵀ")


def test_attention_inside() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.conv1(x).relu()
        q, k, v = (value.flatten(2).transpose(1, 2).unsqueeze(1) for value in m.qkv(h).chunk(3, 1))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, h.shape[2:])
        return x + m.conv3(m.bn(y).relu())

    net = Net(forward, conv1=conv(16, 8), qkv=conv(8, 24), bn=nn.BatchNorm2d(8), conv3=conv(8, 16))
    made = pe_fx.plan(net, X)
    assert sorted(ties(made)) == ["conv3.weight ← conv1.weightᵀ", "qkv.weight[16:24] ← qkv.weight[8:16]ᵀ"]
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


def test_two_spatial_convolutions() -> None:
    hit(three(nn.ReLU(), conv(8, 8, 3), nn.ReLU(), conv(8, 8, 3), nn.ReLU()), X, "6.weight ← 0.weightᵀ")


def test_spatial_separable_convolutions() -> None:
    between = (nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), nn.Conv2d(8, 8, (3, 1), padding=(1, 0)))
    hit(three(nn.ReLU(), *between, nn.ReLU()), X, "5.weight ← 0.weightᵀ")


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(2)], ids=repr)
def test_pooling_between(pool: nn.Module) -> None:
    hit(three(nn.ReLU(), conv(8, 8, 3), nn.ReLU(), pool), X, "5.weight ← 0.weightᵀ")


def test_block_that_runs_twice_is_one_site() -> None:
    hit(Net(lambda m, x: m.block(m.block(x)), block=Bottleneck()), X, "block.conv3.weight ← block.conv1.weightᵀ")


def test_unshared_stack() -> None:
    hit(nn.Sequential(Bottleneck(), Bottleneck()), X, *(f"{i}.{TIE.replace('← ', f'← {i}.')}" for i in range(2)), share=())


@pytest.mark.parametrize(("net", "channels"), [(Bottleneck(), 16), (inverted(gate=True), 8)], ids=["resnet", "mbconv"])
def test_idempotent(net: nn.Module, channels: int) -> None:
    assert_idempotent(net, torch.randn(2, channels, 6, 6))


# ---- misses


def test_no_nonlinearity() -> None:
    miss(three(conv(8, 8, 3)), X, r"no nonlinearity", weights=("0.weight", "2.weight"))


def test_norms_are_no_nonlinearity() -> None:
    miss(three(nn.BatchNorm2d(8), conv(8, 8, 3), nn.BatchNorm2d(8)), X, r"no nonlinearity", weights=("0.weight", "4.weight"))


def test_shapes_not_transposed() -> None:
    net = nn.Sequential(conv(16, 8), nn.ReLU(), conv(8, 8, 3), nn.ReLU(), conv(8, 12))
    found = miss(net, X, r"not transposes", weights=("0.weight", "4.weight"))
    assert "(8, 16, 1, 1)" in found.reason
    assert "(12, 8, 1, 1)" in found.reason


def test_middle_changes_width() -> None:
    net = nn.Sequential(conv(16, 8), nn.ReLU(), conv(8, 12, 3), nn.ReLU(), conv(12, 16))
    miss(net, X, r"not transposes", weights=("0.weight", "4.weight"))


@pytest.mark.parametrize("place", ["before", "after"])
def test_hidden_read_elsewhere(place: str) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.conv1(x)
        a = h.relu()
        return m.conv3(m.conv2(a).relu()) + (h if place == "before" else a).mean(1, keepdim=True)

    miss(
        Net(forward, conv1=conv(16, 8), conv2=conv(8, 8, 3), conv3=conv(8, 16)),
        X,
        r"read elsewhere",
        weights=("conv1.weight", "conv3.weight"),
    )


def test_hidden_returned() -> None:
    net = Net(lambda m, x: (m.conv3(m.conv2(h := m.conv1(x).relu()).relu()), h), conv1=conv(16, 8), conv2=conv(8, 8, 3), conv3=conv(8, 16))
    miss(net, X, r"returned", weights=("conv1.weight", "conv3.weight"))


@pytest.mark.parametrize("frozen", ["conv1", "conv3"])
def test_frozen_beside_trained(frozen: str) -> None:
    net = Bottleneck()
    net.get_submodule(frozen).weight.requires_grad_(False)
    miss(net, X, rf"{frozen}\.weight is frozen", weights=("conv1.weight", "conv3.weight"))


@pytest.mark.parametrize("end", ["conv1", "conv3"])
@every_parametrization
def test_parametrized(register: Callable[[nn.Module], object], end: str) -> None:
    net = Bottleneck()
    register(net.get_submodule(end))
    made = pe_fx.plan(net, X)
    assert not made.sites
    assert any("parametri" in found.reason for found in made.misses), made.explain()


def test_another_dtype() -> None:
    net = Net(lambda m, x: m.conv3(m.conv2(m.conv1(x).relu()).relu().bfloat16()), conv1=conv(16, 8), conv2=conv(8, 8, 3), conv3=conv(8, 16))
    net.conv3.bfloat16()
    miss(net, X, r"bfloat16", weights=("conv1.weight", "conv3.weight"))


@pytest.mark.parametrize("end", ["conv1", "conv3"])
def test_read_by_a_penalty(end: str) -> None:
    net = Net(lambda m, x: m.block(x).sum() + m.block.get_submodule(end).weight.square().sum(), block=Bottleneck())
    miss(net, X, rf"{end}\.weight is read by")


def test_used_twice_with_different_partners() -> None:
    net = Net(
        lambda m, x: m.c(m.b(m.a(x).relu()).relu()) + m.e(m.d(m.a(-x).relu()).relu()),
        a=conv(16, 8),
        b=conv(8, 8, 3),
        c=conv(8, 16),
        d=conv(8, 8, 3),
        e=conv(8, 16),
    )
    miss(net, X, r"a\.weight is used a second time.*e\.weight", weights=("a.weight", "c.weight"))


@pytest.mark.parametrize("end", ["conv1", "conv3"])
def test_grouped_1x1(end: str) -> None:
    net = Bottleneck()
    before = net.get_submodule(end)
    setattr(net, end, conv(before.in_channels, before.out_channels, groups=2))
    made = pe_fx.plan(net, X)
    assert not made.sites
    assert any(f"{end}.weight" in found.reason and "groups" in found.reason for found in made.misses), made.explain()


@pytest.mark.parametrize("end", ["conv1", "conv3"])
def test_k_by_k_end(end: str) -> None:
    net = Bottleneck()
    before = net.get_submodule(end)
    setattr(net, end, conv(before.in_channels, before.out_channels, 3))
    made = pe_fx.plan(net, X)
    assert not made.sites
    assert any(f"{end}.weight is a 3x3 convolution" in found.reason for found in made.misses), made.explain()


def test_strided_1x1_is_a_matrix_all_the_same() -> None:
    hit(nn.Sequential(conv(16, 8, stride=2), nn.ReLU(), conv(8, 8, 3), nn.ReLU(), conv(8, 16)), X, "4.weight ← 0.weightᵀ")


def test_basic_block_is_no_bottleneck() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()) + x, a=conv(16, 16, 3), b=conv(16, 16, 3))
    assert not pe_fx.plan(net, X).sites


def test_channel_shuffle_before_the_end() -> None:
    net = three(nn.ReLU(), conv(8, 8, 3, groups=8), nn.ReLU(), nn.ChannelShuffle(2))
    miss(net, X, r"another order", weights=("0.weight", "5.weight"))


def test_space_to_depth_mixes_positions_into_channels() -> None:
    net = nn.Sequential(conv(16, 8), nn.ReLU(), conv(8, 2, 3), nn.PixelUnshuffle(2), nn.ReLU(), conv(8, 16))
    assert not pe_fx.plan(net, X).sites


@pytest.mark.parametrize("end", [0, 4])
def test_transposed_convolution_end(end: int) -> None:
    net = nn.Sequential(conv(16, 8), nn.ReLU(), conv(8, 8, 3), nn.ReLU(), conv(8, 16))
    net[end] = nn.ConvTranspose2d(net[end].in_channels, net[end].out_channels, 1)
    made = pe_fx.plan(net, X)
    assert made.sites or any("transpose" in found.reason for found in made.misses), made.explain()
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


def test_pairs_without_a_matrix_are_counted() -> None:
    """The blocks of a ResNet18 are no near misses."""
    block = Net(lambda m, x: x + m.conv2(m.conv1(x).relu()), conv1=nn.Conv2d(8, 8, 3, padding=1), conv2=nn.Conv2d(8, 8, 3, padding=1))
    made = pe_fx.plan(nn.Sequential(block, nn.ReLU(), copy.deepcopy(block)), torch.randn(2, 8, 6, 6))
    assert (made.misses, made.far_misses) == ((), 2)
    assert made.explain() == "no misses\n2 pairs of convolutions, neither of them 1x1 and ungrouped, are left as they are"
    again = pe_fx.Plan.from_json(made.to_json())
    assert again.far_misses == 2
