"""W₂ F(W₁ x) becomes Wᵀ F(W x)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_equals_twin, assert_hit, assert_idempotent, assert_miss, every_parametrization, linear, ties, weight
from torch import Tensor, nn

import pe_fx

hit = partial(assert_hit, kind="mlp")
miss = partial(assert_miss, kind="mlp")

X = torch.randn(3, 5, 8)
IMAGE = torch.randn(2, 8, 6, 6)


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(linear(8, 16), *between, linear(16, 8))


def pair(forward: Callable[..., object]) -> Net:
    return Net(forward, fc1=linear(8, 16), fc2=linear(16, 8))


class Conv1D(nn.Module):
    """transformers' Conv1D: addmm with an (in, out) weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = weight(inputs, outputs)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


# ---- hits: written forms


@pytest.mark.parametrize(
    "act",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(inplace=True), nn.Hardswish(), nn.Tanh(), nn.PReLU(), nn.Softplus()],
    ids=lambda act: repr(act).lower(),
)
def test_activations(act: nn.Module) -> None:
    hit(mlp(act), X, "2.weight ← 0.weightᵀ")


def test_relu_squared() -> None:
    hit(pair(lambda m, x: m.fc2(F.relu(m.fc1(x)) ** 2)), X, "fc2.weight ← fc1.weightᵀ")


def test_norm_written_out() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = F.relu(m.fc1(x))
        return m.fc2(hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5))

    hit(pair(forward), X, "fc2.weight ← fc1.weightᵀ")


def test_gelu_written_out() -> None:
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    hit(pair(lambda m, x: m.fc2(gelu(m.fc1(x)))), X, "fc2.weight ← fc1.weightᵀ")


def test_swish_written_out() -> None:
    hit(pair(lambda m, x: m.fc2((h := m.fc1(x)) * h.sigmoid())), X, "fc2.weight ← fc1.weightᵀ")


@pytest.mark.parametrize(
    "relu", [lambda h: h * (h > 0), lambda h: h.masked_fill(h < 0, 0), lambda h: h.where(h > 0, 0.1 * h)], ids=["mask", "fill", "where"]
)
def test_relu_by_comparison(relu: Callable[[Tensor], Tensor]) -> None:
    hit(pair(lambda m, x: m.fc2(relu(m.fc1(x)))), X, "fc2.weight ← fc1.weightᵀ")


def test_no_bias() -> None:
    hit(nn.Sequential(linear(8, 16, False), nn.GELU(), linear(16, 8, False)), X, "2.weight ← 0.weightᵀ")


def test_narrow_middle() -> None:
    hit(nn.Sequential(linear(8, 4), nn.ReLU(), linear(4, 8)), X, "2.weight ← 0.weightᵀ")


@pytest.mark.parametrize("width", [1, 8])
def test_middle_of_one(width: int) -> None:
    hit(nn.Sequential(linear(width, 1), nn.ReLU(), linear(1, width)), torch.randn(3, width), "2.weight ← 0.weightᵀ")


def test_square() -> None:
    hit(nn.Sequential(linear(8, 8), nn.ReLU(), linear(8, 8)), X, "2.weight ← 0.weightᵀ")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_1x1_convolutions(dims: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    x = torch.randn(2, 8, *[4] * dims)
    hit(nn.Sequential(conv(8, 16, 1), nn.GELU(), conv(16, 8, 1)), x, "2.weight ← 0.weightᵀ")


@pytest.mark.parametrize(
    "rearranged",
    [
        lambda w: torch.cat((w[3:], w[:3])),
        lambda w: w[[1, 0, *range(2, 12)]],
        lambda w: F.layer_norm(w.flip(0), w.shape[1:]),
        lambda w: 2 * w.view(2, 6, 8).transpose(0, 1).reshape(12, 8),
    ],
    ids=["cat", "index", "standardised", "scaled"],
)
def test_rows_of_a_bare_parameter_rearranged(rearranged: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda m, x: F.linear(F.relu(F.linear(x, rearranged(m.a))), m.b), a=weight(12, 8), b=weight(8, 12))
    miss(net, torch.randn(3, 8), "a is applied through", weights=("a",))


def test_functional_linear_with_bare_parameters() -> None:
    net = Net(lambda m, x: F.linear(F.gelu(F.linear(x, m.a)), m.b), a=weight(16, 8), b=weight(8, 16))
    hit(net, X, "b ← aᵀ")


def test_matmul_with_weights_in_by_out() -> None:
    hit(Net(lambda m, x: (x @ m.a).relu() @ m.b, a=weight(8, 16), b=weight(16, 8)), X, "b ← aᵀ")


def test_matmul_with_transposed_weights() -> None:
    hit(Net(lambda m, x: (x @ m.a.t()).relu() @ m.b.mT, a=weight(16, 8), b=weight(8, 16)), X, "b ← aᵀ")


def test_tensordot() -> None:
    net = Net(lambda m, x: torch.tensordot(torch.tensordot(x, m.a, 1).relu(), m.b, 1), a=weight(8, 16), b=weight(16, 8))
    hit(net, X, "b ← aᵀ")


def test_weight_scaled_before_use() -> None:
    net = Net(lambda m, x: F.linear(F.linear(x, 0.5 * m.a).relu(), 2 * m.b), a=weight(16, 8), b=weight(8, 16))
    hit(net, X, "b ← aᵀ")


def test_weights_dtype_read() -> None:
    hit(pair(lambda m, x: m.fc2(m.fc1(x.to(m.fc1.weight.dtype)).relu().to(m.fc2.weight.dtype))), X, "fc2.weight ← fc1.weightᵀ")


def test_checkpointed() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda y: m.fc2(m.fc1(y).relu()), x, use_reentrant=False)

    hit(pair(forward), X, "fc2.weight ← fc1.weightᵀ")


def test_weight_times_value() -> None:
    net = Net(lambda m, x: m.b @ (m.a @ x).relu(), a=weight(16, 8), b=weight(8, 16))
    hit(net, torch.randn(3, 8, 5), "b ← aᵀ")


def test_linear_and_matmul_mixed_need_no_transpose() -> None:
    hit(Net(lambda m, x: m.fc(x).relu() @ m.w, fc=linear(8, 16), w=weight(16, 8)), X, "w ← fc.weight")


def test_linear_and_1x1_convolution_mixed() -> None:
    net = Net(lambda m, x: m.conv(m.fc(x).relu().permute(0, 3, 1, 2)), fc=linear(8, 16), conv=nn.Conv2d(16, 8, 1))
    hit(net, torch.randn(2, 4, 4, 8), "conv.weight ← fc.weightᵀ")


def test_hf_conv1d() -> None:
    hit(nn.Sequential(Conv1D(8, 16), nn.GELU(), Conv1D(16, 8)), X, "2.weight ← 0.weightᵀ")


def test_einsum_with_2d_weights() -> None:
    net = Net(lambda m, x: torch.einsum("bnh,dh->bnd", torch.einsum("bnd,hd->bnh", x, m.a).relu(), m.b), a=weight(16, 8), b=weight(8, 16))
    hit(net, X, "b ← aᵀ")


def test_einsum_with_weights_in_by_out() -> None:
    net = Net(
        lambda m, x: torch.einsum("...h,hd->...d", torch.einsum("...d,dh->...h", x, m.a).relu(), m.b), a=weight(8, 16), b=weight(16, 8)
    )
    hit(net, X, "b ← aᵀ")


def test_weight_kept_as_1x1_kernel_and_squeezed() -> None:
    net = Net(lambda m, x: F.linear(F.gelu(F.linear(x, m.a[:, :, 0])), m.b.flatten(1)), a=weight(16, 8, 1), b=weight(8, 16, 1))
    hit(net, X, "b ← aᵀ")


# ---- hits: what may stand between


@pytest.mark.parametrize(
    "between",
    [
        (nn.GELU(), nn.Dropout(0.5)),
        (nn.Dropout(0.5), nn.ReLU(), nn.Identity()),
        (nn.LayerNorm(16), nn.GELU()),
        (nn.GELU(), nn.LayerNorm(16)),
        (nn.ReLU(), nn.RMSNorm(16)),
    ],
    ids=["dropout after", "dropout before", "norm before", "norm after", "rms norm after"],
)
def test_between(between: tuple[nn.Module, ...]) -> None:
    hit(mlp(*between), X, f"{len(between) + 1}.weight ← 0.weightᵀ")


def test_batch_norm_between() -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6(inplace=True), nn.Conv2d(16, 8, 1))
    hit(net, IMAGE, "3.weight ← 0.weightᵀ")


def test_depthwise_convolution_between_linears() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.fc1(x).transpose(1, 2).unflatten(2, (4, 4))
        return m.fc2(F.gelu(m.dw(h)).flatten(2).transpose(1, 2))

    hit(
        Net(forward, fc1=linear(8, 16), dw=nn.Conv2d(16, 16, 3, padding=1, groups=16), fc2=linear(16, 8)),
        torch.randn(2, 16, 8),
        "fc2.weight ← fc1.weightᵀ",
    )


def test_reshape_of_other_dimensions_between() -> None:
    net = pair(lambda m, x: m.fc2(m.fc1(x).relu().reshape(-1, 16)).view(x.shape))
    hit(net, X, "fc2.weight ← fc1.weightᵀ")


def test_hidden_dimension_split_into_heads_and_joined_again() -> None:
    net = pair(lambda m, x: m.fc2(m.fc1(x).unflatten(-1, (4, 4)).transpose(1, 2).relu().transpose(1, 2).flatten(2)))
    hit(net, X, "fc2.weight ← fc1.weightᵀ")


def test_channels_first_norm_between() -> None:
    net = pair(lambda m, x: m.fc2(F.gelu(F.instance_norm(m.fc1(x).transpose(1, 2))).transpose(1, 2)))
    hit(net, X, "fc2.weight ← fc1.weightᵀ")


def test_learned_scale_between() -> None:
    net = Net(lambda m, x: m.fc2(m.scale * m.fc1(x).relu() + 1), fc1=linear(8, 16), fc2=linear(16, 8), scale=torch.rand(16))
    hit(net, X, "fc2.weight ← fc1.weightᵀ")


def test_residual_around() -> None:
    hit(pair(lambda m, x: x + m.fc2(m.fc1(x).relu())), X, "fc2.weight ← fc1.weightᵀ")


def test_residual_inside_the_region() -> None:
    hit(pair(lambda m, x: m.fc2((h := m.fc1(x)) + h.relu())), X, "fc2.weight ← fc1.weightᵀ")


def test_autocast_region() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.fc2(m.fc1(x).relu()).float()

    made = pe_fx.plan(pair(forward), X)
    assert ties(made) == ["fc2.weight ← fc1.weightᵀ"]


# ---- hits: several


def test_stack() -> None:
    net = nn.Sequential(*(mlp(nn.GELU()) for _ in range(3)))
    hit(net, X, *(f"{i}.2.weight ← {i}.0.weightᵀ" for i in range(3)))


def test_middle_weight_of_three_belongs_to_the_first_pair() -> None:
    made = pe_fx.plan(nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 8), nn.ReLU(), linear(8, 16)), X)
    assert ties(made) == ["2.weight ← 0.weightᵀ"]
    assert any({"2.weight", "4.weight"} == set(miss.weights) and "another site" in miss.reason for miss in made.misses)


def test_block_that_runs_twice_is_one_site() -> None:
    block = mlp(nn.GELU())
    net = Net(lambda m, x: m.block(m.block(x) + x), block=block)
    hit(net, X, "block.2.weight ← block.0.weightᵀ")


def test_block_registered_twice_is_one_site() -> None:
    block = mlp(nn.GELU())
    hit(nn.Sequential(block, block), X, "0.2.weight ← 0.0.weightᵀ")


def test_both_frozen_is_a_site() -> None:
    hit(mlp(nn.ReLU()).requires_grad_(False), X, "2.weight ← 0.weightᵀ")


def test_both_in_double_precision() -> None:
    hit(mlp(nn.ReLU()).double(), X.double(), "2.weight ← 0.weightᵀ")


def test_inputs_as_keywords() -> None:
    hit(pair(lambda m, x, scale: m.fc2(m.fc1(x).relu()) * scale), {"x": X, "scale": 2.0}, "fc2.weight ← fc1.weightᵀ")


def test_include_and_exclude() -> None:
    net = nn.Sequential(*(mlp(nn.GELU()) for _ in range(3)))
    assert ties(pe_fx.plan(net, X, include=["1*"])) == ["1.2.weight ← 1.0.weightᵀ"]
    assert ties(pe_fx.plan(net, X, exclude=["1*"])) == ["0.2.weight ← 0.0.weightᵀ", "2.2.weight ← 2.0.weightᵀ"]


def test_share_uses_one_weight_for_the_stack() -> None:
    net = nn.Sequential(*(mlp(nn.GELU()) for _ in range(3)))
    tied = hit(
        net,
        X,
        "0.2.weight ← 0.0.weightᵀ",
        "1.0.weight ← 0.0.weight",
        "1.2.weight ← 0.0.weightᵀ",
        "2.0.weight ← 0.0.weight",
        "2.2.weight ← 0.0.weightᵀ",
        share=("mlp",),
    )
    assert [name for name in tied.state_dict() if name.endswith("weight")] == ["0.0.weight"]


def test_counts() -> None:
    made = pe_fx.plan(mlp(nn.GELU()), X)
    assert (made.params_before, made.params_after) == (2 * 128 + 24, 128 + 24)


def test_transform_keeps_names_class_and_mode() -> None:
    net = mlp(nn.GELU()).eval()
    tied = pe_fx.transform(net, X)
    assert list(tied.state_dict()) == ["0.weight", "0.bias", "2.bias"]
    assert type(tied) is nn.Sequential
    assert isinstance(tied[2], nn.Linear)
    assert not tied.training
    assert "2.weight" in net.state_dict()


def test_transform_in_place() -> None:
    net = mlp(nn.GELU())
    assert pe_fx.transform(net, X, inplace=True) is net
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.bias"]


def test_init_mean() -> None:
    net = mlp(nn.GELU())
    tied = pe_fx.transform(net, X, init="mean")
    torch.testing.assert_close(tied[0].weight, (net[0].weight + net[2].weight.t()) / 2)
    made = pe_fx.plan(net, X)
    with torch.no_grad():
        net[0].weight.copy_(tied[0].weight)
    assert_equals_twin(net, tied, made, X)


@pytest.mark.parametrize(
    "net",
    [
        mlp(nn.GELU()),
        nn.Sequential(Conv1D(8, 16), nn.GELU(), Conv1D(16, 8)),
        Net(lambda m, x: (x @ m.a).relu() @ m.b, a=weight(8, 16), b=weight(16, 8)),
        nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 8), nn.ReLU(), linear(8, 16), nn.ReLU(), linear(16, 8)),
    ],
    ids=["linear", "conv1d", "bare", "chain of four"],
)
def test_idempotent(net: nn.Module) -> None:
    assert_idempotent(net, X)


def test_idempotent_with_a_dense_weight_left_after_the_pair() -> None:
    assert_idempotent(nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 8), nn.ReLU(), linear(8, 16)), X)


def test_idempotent_where_shared() -> None:
    assert_idempotent(nn.Sequential(*(mlp(nn.GELU()) for _ in range(3))), X, share=("mlp",))


# ---- misses


def test_no_nonlinearity() -> None:
    miss(nn.Sequential(linear(8, 16), linear(16, 8)), X, r"no nonlinearity", weights=("0.weight", "1.weight"))


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.RMSNorm(16)], ids=["LayerNorm", "RMSNorm"])
def test_norm_is_no_nonlinearity(norm: nn.Module) -> None:
    miss(mlp(norm), X, r"no nonlinearity", weights=("0.weight", "2.weight"))


def test_batch_norm_is_no_nonlinearity() -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1))
    miss(net, IMAGE, r"no nonlinearity", weights=("0.weight", "2.weight"))


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer_norm(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("norm", [rms_norm, layer_norm, lambda x: F.normalize(x, dim=-1)], ids=["rms", "layer", "l2"])
def test_hand_written_norm_is_no_nonlinearity(norm: Callable[[Tensor], Tensor]) -> None:
    miss(pair(lambda m, x: m.fc2(norm(m.fc1(x)))), X, r"no nonlinearity", weights=("fc1.weight", "fc2.weight"))


@pytest.mark.parametrize(
    "between",
    [lambda h: h * 2 + 1, lambda h: F.dropout(h, 0.5), lambda h: h.float().contiguous().clone(), lambda h: -h / 3],
    ids=["affine", "dropout", "cast", "negate"],
)
def test_affine_is_no_nonlinearity(between: Callable[[Tensor], Tensor]) -> None:
    miss(pair(lambda m, x: m.fc2(between(m.fc1(x)))), X, r"no nonlinearity")


def test_depthwise_convolution_is_no_nonlinearity() -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1))
    miss(net, IMAGE, r"no nonlinearity", kind="bottleneck")


def test_shapes_not_transposed() -> None:
    net = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 12))
    found = miss(net, X, r"not transposes", weights=("0.weight", "2.weight"))
    assert "(16, 8)" in found.reason
    assert "(12, 16)" in found.reason


OTHER_COUNTS: dict[str, Callable[[Tensor], Tensor]] = {  # of hidden channels, of which 16 are made
    "maxout": lambda h: torch.maximum(*h.chunk(2, -1)),
    "maxout over an axis": lambda h: h.unflatten(-1, (2, 8)).amax(-2),
    "halves added": lambda h: sum(h.chunk(2, -1)).relu(),  # type: ignore[union-attr]
    "the largest": lambda h: h.topk(8).values,
    "pooled": lambda h: F.max_pool1d(h, 2),
    "some by index": lambda h: h.index_select(-1, torch.arange(0, 16, 2)).relu(),
    "both signs": lambda h: torch.cat([h.relu(), (-h).relu()], -1),
    "padded": lambda h: F.pad(h.relu(), (0, 4)),
}


@pytest.mark.parametrize("name", OTHER_COUNTS)
def test_back_to_the_same_width_with_more_or_fewer_hidden_channels(name: str) -> None:
    between = OTHER_COUNTS[name]
    width = between(torch.zeros(1, 1, 16)).shape[-1]
    net = Net(lambda m, x: m.fc2(between(m.fc1(x))), fc1=linear(8, 16), fc2=linear(width, 8))
    miss(net, X, r"not transposes of each other", weights=("fc1.weight", "fc2.weight"))


def test_patches_merged_between_linears_are_no_near_miss() -> None:
    net = Net(
        lambda m, x: m.fc2(m.norm(m.fc1(x).flatten(1).unflatten(1, (2, 32)))), fc1=linear(8, 16), fc2=linear(32, 8), norm=nn.LayerNorm(32)
    )
    assert not pe_fx.plan(net, torch.randn(3, 4, 8)).misses


def test_hidden_read_before_the_activation() -> None:
    net = pair(lambda m, x: m.fc2((h := m.fc1(x)).relu()) + h.mean(-1, keepdim=True))
    miss(net, X, r"read elsewhere|used elsewhere", weights=("fc1.weight", "fc2.weight"))


def test_hidden_read_after_the_activation() -> None:
    net = pair(lambda m, x: m.fc2(h := m.fc1(x).relu()) * h.sum(-1, keepdim=True))
    miss(net, X, r"read elsewhere", weights=("fc1.weight", "fc2.weight"))


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: ((h := m.fc1(x)), m.fc2(h.relu())), lambda m, x: {"y": m.fc2(h := m.fc1(x).relu()), "hidden": h}],
    ids=["before", "after"],
)
def test_hidden_returned(forward: Callable[..., object]) -> None:
    miss(pair(forward), X, r"read elsewhere.*returned|returned", weights=("fc1.weight", "fc2.weight"))


def test_hidden_read_through_indices() -> None:
    net = pair(lambda m, x: m.fc2(h := m.fc1(x).relu()) + m.embedding(h.argmax(-1)))
    net.embedding = nn.Embedding(16, 8)
    miss(net, X, r"read elsewhere", weights=("fc1.weight", "fc2.weight"))


def test_hidden_read_through_a_mask() -> None:
    net = pair(lambda m, x: m.fc2(h := m.fc1(x).relu()) * (h > 0).any(-1, keepdim=True))
    miss(net, X, r"read elsewhere", weights=("fc1.weight", "fc2.weight"))


@pytest.mark.parametrize("frozen", ["0", "2"])
def test_frozen_beside_trained(frozen: str) -> None:
    net = mlp(nn.ReLU())
    net.get_submodule(frozen).weight.requires_grad_(False)
    miss(net, X, rf"{frozen}\.weight is frozen", weights=("0.weight", "2.weight"))


@pytest.mark.parametrize("position", [0, 2])
@every_parametrization
def test_parametrized(register: Callable[[nn.Module], object], position: int) -> None:
    net = mlp(nn.ReLU())
    register(net[position])
    found = miss(net, X, r"parametri[sz]")
    assert any(name.startswith(f"{position}.") for name in found.weights)


def test_old_style_weight_norm() -> None:
    net = mlp(nn.ReLU())
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net[0])
    made = pe_fx.plan(net, X)
    assert not made.sites
    assert made.misses


def test_another_dtype() -> None:
    net = pair(lambda m, x: m.fc2(m.fc1(x).relu().bfloat16()))
    net.fc2.bfloat16()
    miss(net, X, r"bfloat16.*float32|float32.*bfloat16", weights=("fc1.weight", "fc2.weight"))


@pytest.mark.parametrize("shared", ["fc1", "fc2"])
def test_shared_with_an_embedding(shared: str) -> None:
    net = Net(lambda m, x, i: (m.fc2(m.fc1(x).relu()), m.emb(i)), fc1=linear(8, 16), fc2=linear(16, 8), emb=nn.Embedding(4, 4))
    rows, columns = net.get_submodule(shared).weight.shape
    net.emb = nn.Embedding(rows, columns)
    net.emb.weight = net.get_submodule(shared).weight
    miss(net, (X, torch.tensor([1, 2])), rf"{shared}\.weight is read by embedding too|{shared}\.weight .*registered")


@pytest.mark.parametrize("read", ["fc1", "fc2"])
def test_read_by_a_penalty_added_to_the_output(read: str) -> None:
    net = pair(lambda m, x: m.fc2(m.fc1(x).relu()).sum() + m.get_submodule(read).weight.square().sum())
    miss(net, X, rf"{read}\.weight is read by")


@pytest.mark.parametrize("read", ["fc1", "fc2"])
def test_read_by_a_penalty_returned_beside_the_output(read: str) -> None:
    net = pair(lambda m, x: (m.fc2(m.fc1(x).relu()), m.get_submodule(read).weight.square().sum()))
    miss(net, X, rf"{read}\.weight is read by|{read}\.weight is returned")


def test_used_twice_with_different_partners() -> None:
    net = Net(
        lambda m, x: m.b(m.a(x).relu()) + m.c(m.a(2 * x).relu()),
        a=linear(8, 16),
        b=linear(16, 8),
        c=linear(16, 8),
    )
    miss(net, X, r"a\.weight is used a second time.*c\.weight", weights=("a.weight", "b.weight"))


def test_second_weight_used_twice_with_different_partners() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()) + m.b(m.c(2 * x).relu()), a=linear(8, 16), b=linear(16, 8), c=linear(8, 16))
    miss(net, X, r"b\.weight is used a second time.*c\.weight", weights=("a.weight", "b.weight"))


def test_second_use_without_a_nonlinearity() -> None:
    net = pair(lambda m, x: m.fc2(m.fc1(x).relu()) + m.fc2(m.fc1(x + 1)))
    assert not pe_fx.plan(net, X).sites


def test_one_weight_for_both() -> None:
    net = Net(lambda m, x: F.linear(F.linear(x, m.w).relu(), m.w), w=weight(8, 8))
    assert not pe_fx.plan(net, X).sites


def test_already_tied_by_hand_is_left_alone() -> None:
    net = Net(lambda m, x: F.linear(F.linear(x, m.w).relu(), m.w.t()), w=weight(16, 8))
    assert not pe_fx.plan(net, X).sites


@pytest.mark.parametrize("grouped", [0, 2])
def test_grouped_1x1(grouped: int) -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    net[grouped] = nn.Conv2d(net[grouped].in_channels, net[grouped].out_channels, 1, groups=2)
    made = pe_fx.plan(net, IMAGE)
    assert not made.sites
    assert any(f"{grouped}.weight" in miss.reason and "groups" in miss.reason for miss in made.misses), made.explain()


@pytest.mark.parametrize("wide", [0, 2])
def test_k_by_k_end(wide: int) -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    net[wide] = nn.Conv2d(net[wide].in_channels, net[wide].out_channels, 3, padding=1)
    made = pe_fx.plan(net, IMAGE)
    assert not made.sites
    assert any(f"{wide}.weight is a 3x3 convolution" in miss.reason for miss in made.misses), made.explain()


def test_reshape_that_mixes_the_hidden_dimension() -> None:
    net = pair(lambda m, x: m.fc2(m.fc1(x).relu().transpose(1, 2).reshape(x.shape[0], x.shape[1], 16)))
    miss(net, X, r"reshape|another axis|another order|another", weights=("fc1.weight", "fc2.weight"))


def test_hidden_channels_in_another_order() -> None:
    net = pair(lambda m, x: m.fc2(m.fc1(x).relu().unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2)))
    miss(net, X, r"another order", weights=("fc1.weight", "fc2.weight"))


def test_hidden_channels_flipped() -> None:
    miss(pair(lambda m, x: m.fc2(m.fc1(x).relu().flip(-1))), X, r"another order", weights=("fc1.weight", "fc2.weight"))


def test_rows_of_the_weight_in_another_order() -> None:
    net = Net(lambda m, x: F.linear(F.linear(x, m.a.flip(0)).relu(), m.b), a=weight(16, 8), b=weight(8, 16))
    assert not pe_fx.plan(net, X).sites


@pytest.mark.parametrize(
    "pool", [partial(F.avg_pool1d, kernel_size=3, stride=1, padding=1), partial(F.adaptive_max_pool1d, output_size=16)]
)
def test_pooling_over_the_hidden_dimension(pool: Callable[[Tensor], Tensor]) -> None:
    net = pair(lambda m, x: m.fc2(pool(m.fc1(x).relu())))
    miss(net, X, "pool.* over the hidden axis", weights=("fc1.weight", "fc2.weight"))


def test_part_of_a_weight() -> None:
    net = Net(lambda m, x: F.linear(F.linear(x, m.a[:16]).relu(), m.b), a=weight(20, 8), b=weight(8, 16))
    miss(net, X, r"part of a|not transposes")


@pytest.mark.parametrize("between", ["cumsum", "sort"])
def test_operation_that_is_not_followed(between: str) -> None:
    net = pair(lambda m, x: m.fc2(h if isinstance(h := getattr(m.fc1(x).relu(), between)(-1), Tensor) else h[0]))
    miss(net, X, rf"passes {between}", weights=("fc1.weight", "fc2.weight"))


def test_linear_over_tokens() -> None:
    net = Net(lambda m, x: m.tokens(m.channels(x).relu().transpose(1, 2)), channels=linear(8, 16), tokens=linear(16, 8))
    miss(net, torch.randn(2, 16, 8), r"another axis", weights=("channels.weight", "tokens.weight"))


def test_softmax_over_tokens_is_a_nonlinearity_that_keeps_the_pair() -> None:
    hit(pair(lambda m, x: m.fc2(m.fc1(x).softmax(1))), X, "fc2.weight ← fc1.weightᵀ")


def test_untouched_where_nothing_is_found() -> None:
    net = nn.Sequential(linear(8, 16), linear(16, 8))
    with pytest.warns(pe_fx.NoSitesWarning, match="no nonlinearity"):
        same = pe_fx.transform(net, X)
    assert list(same.state_dict()) == list(net.state_dict())


def test_second_use_on_a_constant() -> None:
    net = Net(lambda m, x: m.fc2(m.fc1(x).relu()) + m.fc2(m.start), fc1=linear(8, 16), fc2=linear(16, 8), start=torch.randn(16))
    miss(net, X, "fc2.weight is used a second time, not with fc1.weight")


def test_row_of_a_table_that_the_input_chooses() -> None:
    """Behind the choice begins a value of its own, also for a depthwise convolution."""

    def forward(m: Net, x: Tensor) -> Tensor:
        chosen = m.table[m.choice(x).argmax(-1)]
        return m.fc2(m.fc1(m.depthwise(chosen.mT).mT).relu())

    depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
    net = Net(forward, table=torch.randn(4, 8), choice=linear(8, 4), depthwise=depthwise, fc1=linear(8, 16), fc2=linear(16, 8))
    hit(net, X, "fc2.weight ← fc1.weightᵀ")


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_weight_or_bias_made_from_the_input(part: str) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = F.linear(x, m.a).relu()
        return F.linear(h, m.b * h.mean()) if part == "weight" else F.linear(h, m.b, h.mean((0, 1))[:8])

    made = pe_fx.plan(Net(forward, a=weight(16, 8), b=weight(8, 16)), X)
    assert not made.sites


def test_as_many_tokens_as_a_mask_selects() -> None:
    net = pair(lambda m, x: m.fc2(F.layer_norm(m.fc1(x[x[..., 0] > 0]).relu(), (16,))))
    assert ties(pe_fx.plan(net, X)) == ["fc2.weight ← fc1.weightᵀ"]


def test_reshape_by_as_many_tokens_as_a_mask_selects() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.fc1(x[x[:, 0] > 0]).relu()
        return m.fc2(h.view(16, h.shape[0]).t())

    miss(pair(forward), X[0], "another axis")


def test_part_of_the_hidden_value_overwritten_from_elsewhere() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.fc1(x).relu()
        h[:, 0] = m.other(x)[:, 0]
        return m.fc2(h)

    net = Net(forward, fc1=linear(8, 16), fc2=linear(16, 8), other=linear(8, 16))
    assert not pe_fx.plan(net, X).ties
