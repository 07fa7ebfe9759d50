"""down(act(gate(x)) * up(x)): down holds up, transposed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_equals_twin, assert_hit, assert_idempotent, assert_miss, every_parametrization, linear, ties, weight
from torch import Tensor, nn

import pe_fx

hit = partial(assert_hit, kind="glu")
miss = partial(assert_miss, kind="glu")

D, H = 8, 12
X = torch.randn(2, 5, D)
TIE = "down.weight ← up.weightᵀ"


def swiglu(forward: Callable[..., object] | None = None, **members: nn.Module | Tensor) -> Net:
    default = {"gate": linear(D, H), "up": linear(D, H), "down": linear(H, D)}
    return Net(forward or (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x))), **{**default, **members})


def fused(forward: Callable[..., object], **members: nn.Module | Tensor) -> Net:
    return Net(forward, **{"up": linear(D, 2 * H), "down": linear(H, D), **members})


# ---- hits: gate and up apart


@pytest.mark.parametrize("act", [F.silu, F.gelu, F.relu, torch.sigmoid, torch.tanh], ids=lambda act: act.__name__)
def test_activations(act: Callable[[Tensor], Tensor]) -> None:
    hit(swiglu(lambda m, x: m.down(act(m.gate(x)) * m.up(x))), X, TIE)


def test_depthwise_convolution_before_down() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.down(m.conv((F.silu(m.gate(x)) * m.up(x)).mT).mT)

    hit(swiglu(forward, conv=nn.Conv1d(H, H, 3, padding=1, groups=H)), X, TIE)
    miss(swiglu(forward, conv=nn.Conv1d(H, H, 1, groups=2)), X, "2 groups", weights=["conv.weight"])


def test_factors_in_the_other_order() -> None:
    hit(swiglu(lambda m, x: m.down(m.up(x) * F.silu(m.gate(x)))), X, TIE)


def test_up_runs_first() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        up = m.up(x)
        return m.down(F.silu(m.gate(x)) * up)

    hit(swiglu(forward), X, TIE)


def test_in_place() -> None:
    hit(swiglu(lambda m, x: m.down(F.silu(m.gate(x), inplace=True).mul_(m.up(x)))), X, TIE)


def test_swish_written_out() -> None:
    hit(swiglu(lambda m, x: m.down((g := m.gate(x)) * torch.sigmoid(g) * m.up(x))), X, TIE)


def test_no_bias_dropout_and_norm_before_down() -> None:
    net = swiglu(
        lambda m, x: m.down(m.norm(F.dropout(F.silu(m.gate(x)) * m.up(x), 0.3))),
        gate=linear(D, H, False),
        up=linear(D, H, False),
        down=linear(H, D, False),
        norm=nn.LayerNorm(H),
    )
    hit(net, X, TIE)


def test_flattened_tokens() -> None:
    hit(swiglu(lambda m, x: m.down((F.silu(m.gate(x)) * m.up(x)).reshape(-1, H)).view(x.shape)), X, TIE)


def test_functional_with_bare_parameters() -> None:
    net = swiglu(
        lambda m, x: F.linear(F.silu(F.linear(x, m.gate)) * F.linear(x, m.up), m.down),
        gate=weight(H, D),
        up=weight(H, D),
        down=weight(D, H),
    )
    hit(net, X, "down ← upᵀ")


def test_matmul_with_weights_in_by_out() -> None:
    net = swiglu(lambda m, x: (F.silu(x @ m.gate) * (x @ m.up)) @ m.down, gate=weight(D, H), up=weight(D, H), down=weight(H, D))
    hit(net, X, "down ← upᵀ")


def test_einsum() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        gate, up = torch.einsum("bnd,hd->bnh", x, m.gate), torch.einsum("bnd,hd->bnh", x, m.up)
        return torch.einsum("bnh,dh->bnd", F.gelu(gate) * up, m.down)

    hit(swiglu(forward, gate=weight(H, D), up=weight(H, D), down=weight(D, H)), X, "down ← upᵀ")


def test_1x1_convolutions() -> None:
    net = swiglu(gate=nn.Conv2d(D, H, 1), up=nn.Conv2d(D, H, 1), down=nn.Conv2d(H, D, 1))
    hit(net, torch.randn(2, D, 4, 4), TIE)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("norm", [rms, standardised])
def test_norm_written_out_before_down(norm: Callable[[Tensor], Tensor]) -> None:
    hit(swiglu(lambda m, x: m.down(m.scale * norm(F.silu(m.gate(x)) * m.up(x)).to(x.dtype)), scale=torch.randn(H)), X, TIE)
    hit(swiglu(lambda m, x: m.down(norm(norm(F.silu(m.gate(x)) * m.up(x))))), X, TIE)


# ---- hits: gate and up in one weight


def test_chunk() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        gate, up = m.up(x).chunk(2, -1)
        return m.down(F.silu(gate) * up)

    tied = hit(fused(forward), X, "down.weight ← up.weight[12:24]ᵀ")
    assert tied.state_dict()["up.weight"].shape == (2 * H, D)


def test_chunk_gate_second() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        up, gate = m.up(x).chunk(2, -1)
        return m.down(up * F.gelu(gate))

    hit(fused(forward), X, "down.weight ← up.weight[0:12]ᵀ")


def test_torch_glu() -> None:
    hit(fused(lambda m, x: m.down(F.glu(m.up(x)))), X, "down.weight ← up.weight[0:12]ᵀ")


def test_split_sizes_and_slices() -> None:
    hit(fused(lambda m, x: m.down(F.silu((y := m.up(x))[..., :H]) * y[..., H:])), X, "down.weight ← up.weight[12:24]ᵀ")


def test_interleaved_rows() -> None:
    net = fused(lambda m, x: m.down(F.silu((y := m.up(x).unflatten(-1, (H, 2)))[..., 0]) * y[..., 1]))
    rows = "+".join(f"{i}:{i + 1}" for i in (1, 3, 5))
    hit(net, X, f"down.weight ← up.weight[{rows}+…]ᵀ")


def experts(forward: Callable[[Net, Callable[[Tensor, Tensor, Tensor], Tensor], Tensor], Tensor]) -> Net:
    """Four experts, each token sent to one of them; weights (experts, in, out) and biases (experts, out)."""

    def routed(m: Net, x: Tensor) -> Tensor:
        expert, order = m.router(x).argmax(-1).sort()
        ends = torch.arange(1, 5) * 3

        def apply(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
            return F.grouped_mm(x, matrix, offs=ends.int()) + bias[expert]

        return forward(m, apply, x[order])

    members = {"up": weight(4, D, 2 * H), "up_bias": weight(4, 2 * H), "down": weight(4, H, D), "down_bias": weight(4, D)}
    return Net(routed, router=linear(D, 4), **members)


TOKENS = torch.randn(12, D)


def test_experts_with_interleaved_channels_and_biases() -> None:
    def forward(m: Net, apply: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        y = apply(x, m.up, m.up_bias)
        gate, up = y[:, ::2].clamp(max=7), y[:, 1::2].clamp(-7, 7)
        return apply((up + 1) * (gate * torch.sigmoid(1.7 * gate)), m.down, m.down_bias)

    hit(experts(forward), TOKENS, "down ← up[:, :, 1:2+3:4+5:6+…]ᵀ")


def test_expert_chosen_by_the_hidden_value() -> None:
    def forward(m: Net, apply: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        gate, up = apply(x, m.up, m.up_bias).chunk(2, -1)
        hidden = F.silu(gate) * up
        return apply(hidden * m.table[hidden.argmax(-1)], m.down, m.down_bias)

    net = experts(forward)
    net.table = weight(H, H)
    miss(net, TOKENS, r"read elsewhere too: mul_1 by argmax")


def test_fused_weight_in_by_out() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        gate, up = (x @ m.up).chunk(2, -1)
        return (F.silu(gate) * up) @ m.down

    hit(fused(forward, up=weight(D, 2 * H), down=weight(H, D)), X, "down ← up[:, 12:24]ᵀ")


def test_weight_chunked_before_use() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        gate, up = m.up.chunk(2)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), m.down)

    hit(fused(forward, up=weight(2 * H, D), down=weight(D, H)), X, "down ← up[12:24]ᵀ")


def test_fused_1x1_convolution_with_depthwise_between() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        gate, up = m.dw(m.up(x)).chunk(2, 1)
        return m.down(F.gelu(gate) * up)

    net = fused(forward, up=nn.Conv2d(D, 2 * H, 1), dw=nn.Conv2d(2 * H, 2 * H, 3, padding=1, groups=2 * H), down=nn.Conv2d(H, D, 1))
    hit(net, torch.randn(2, D, 4, 4), "down.weight ← up.weight[12:24]ᵀ")


def test_stack_and_share() -> None:
    net = nn.Sequential(swiglu(), swiglu())
    hit(net, X, "0.down.weight ← 0.up.weightᵀ", "1.down.weight ← 1.up.weightᵀ")
    hit(net, X, "0.down.weight ← 0.up.weightᵀ", "1.up.weight ← 0.up.weight", "1.down.weight ← 0.up.weightᵀ", share=("glu",))


def test_block_that_runs_twice_is_one_site() -> None:
    hit(Net(lambda m, x: m.block(m.block(x)), block=swiglu()), X, "block.down.weight ← block.up.weightᵀ")


def test_inside_a_transformer_block_beside_attention() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = x + m.attn(x, x, x, need_weights=False)[0]
        return x + m.mlp(m.norm(x))

    net = Net(forward, attn=nn.MultiheadAttention(D, 2, batch_first=True), norm=nn.LayerNorm(D), mlp=swiglu())
    made = pe_fx.plan(net, X)
    assert [(site.kind, site.name) for site in made.sites] == [("attention", "attn"), ("glu", "mlp")]
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


@pytest.mark.parametrize("net", [swiglu(), fused(lambda m, x: m.down(F.glu(m.up(x))))], ids=["apart", "fused"])
def test_idempotent(net: nn.Module) -> None:
    assert_idempotent(net, X)


# ---- misses


def test_both_activated() -> None:
    net = swiglu(lambda m, x: m.down(F.silu(m.gate(x)) * F.silu(m.up(x))))
    miss(net, X, r"both factors.*activation", weights=("down.weight",))


def test_neither_activated() -> None:
    miss(swiglu(lambda m, x: m.down(m.gate(x) * m.up(x))), X, r"neither factor.*activation", weights=("down.weight",))


def test_norm_is_no_activation() -> None:
    net = swiglu(lambda m, x: m.down(m.norm(m.gate(x)) * m.up(x)), norm=nn.LayerNorm(H))
    miss(net, X, r"neither factor", weights=("down.weight",))


def test_values_of_several_uses_joined() -> None:
    """Each expert's linear by itself."""

    def parallel(x: Tensor, weights: Tensor) -> Tensor:
        return torch.cat([F.linear(part, weights[i]) for i, part in enumerate(x.split((2, 3)))])

    def forward(m: Net, x: Tensor) -> Tensor:
        gate, up = parallel(x, m.up).chunk(2, -1)
        return parallel(F.silu(gate) * up, m.down)

    net = Net(forward, up=weight(2, 2 * H, D), down=weight(2, D, H))
    miss(net, torch.randn(5, D), "up is applied in 2 parts that are joined before down", weights=("up", "down"))


def test_gate_over_positions() -> None:
    """Spatial gating: the second half of the channels passes a linear over tokens."""

    def forward(m: Net, x: Tensor) -> Tensor:
        u, v = F.gelu(m.up(x)).chunk(2, -1)
        return m.down(u * m.tokens(m.norm(v).mT).mT)

    net = fused(forward, tokens=linear(5, 5), norm=nn.LayerNorm(H))
    miss(net, X, r"passes tokens\.weight, which works along another axis", weights=("down.weight",))


def test_product_scaled_by_the_input() -> None:
    net = swiglu(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x) * m.scale(x).sigmoid()), scale=linear(D, 1))
    hit(net, X, TIE)


def test_product_scaled_over_positions() -> None:
    net = swiglu(lambda m, x: m.down((h := F.silu(m.gate(x)) * m.up(x)) * h.softmax(-2)))
    assert not any(found.kind == "glu" for found in pe_fx.plan(net, X).sites)


def test_norm_that_is_returned() -> None:
    def forward(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(m.gate(x)) * m.up(x)
        size = hidden.pow(2).mean(-1, keepdim=True)
        return m.down(hidden * size.rsqrt()), size

    miss(swiglu(forward), X, r"is returned", weights=("up.weight", "down.weight"))


def test_shapes_not_transposed() -> None:
    found = miss(swiglu(down=linear(H, 6)), X, r"not transposes", weights=("up.weight", "down.weight"))
    assert "(6, 12)" in found.reason
    assert "(12, 8)" in found.reason


def test_up_read_elsewhere() -> None:
    net = swiglu(lambda m, x: m.down(F.silu(m.gate(x)) * (u := m.up(x))) + u.mean(-1, keepdim=True))
    miss(net, X, r"read elsewhere|read by", weights=("up.weight", "down.weight"))


def test_hidden_returned() -> None:
    net = swiglu(lambda m, x: (m.down(h := F.silu(m.gate(x)) * m.up(x)), h))
    miss(net, X, r"returned|read elsewhere", weights=("up.weight", "down.weight"))


@pytest.mark.parametrize("frozen", ["up", "down"])
def test_frozen_beside_trained(frozen: str) -> None:
    net = swiglu()
    net.get_submodule(frozen).weight.requires_grad_(False)
    miss(net, X, rf"{frozen}\.weight is frozen")


def test_frozen_gate_is_no_obstacle() -> None:
    net = swiglu()
    net.gate.weight.requires_grad_(False)
    hit(net, X, TIE)


@pytest.mark.parametrize("part", ["up", "down"])
@every_parametrization
def test_parametrized(register: Callable[[nn.Module], object], part: str) -> None:
    net = swiglu()
    register(net.get_submodule(part))
    made = pe_fx.plan(net, X)
    assert not made.sites
    assert any("parametri" in found.reason for found in made.misses), made.explain()


def test_another_dtype() -> None:
    net = swiglu(lambda m, x: m.down((F.silu(m.gate(x)) * m.up(x)).bfloat16()))
    net.down.bfloat16()
    miss(net, X, r"bfloat16", weights=("up.weight", "down.weight"))


@pytest.mark.parametrize("part", ["up", "down"])
def test_shared_with_an_embedding(part: str) -> None:
    net = Net(lambda m, x, i: (m.glu(x), m.embedding(i)), glu=swiglu(), embedding=nn.Embedding(4, 4))
    owner = net.glu.get_submodule(part)
    net.embedding = nn.Embedding(*owner.weight.shape)
    net.embedding.weight = owner.weight
    miss(net, (X, torch.tensor([1, 2])), r"embedding|registered")


@pytest.mark.parametrize("part", ["up", "down"])
def test_read_by_a_penalty(part: str) -> None:
    net = swiglu(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)).sum() + m.get_submodule(part).weight.square().sum())
    miss(net, X, rf"{part}\.weight is read by")


def test_up_used_twice_with_different_partners() -> None:
    net = swiglu(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)) + m.other(F.silu(m.gate2(x)) * m.up(x + 1)), gate2=linear(D, H), other=linear(H, D)
    )
    made = pe_fx.plan(net, X)
    assert not any(tie.source == "up.weight" for tie in made.ties)
    assert any("up.weight is" in found.reason for found in made.misses), made.explain()


def test_hidden_channels_in_another_order() -> None:
    net = swiglu(lambda m, x: m.down((F.silu(m.gate(x)) * m.up(x)).flip(-1)))
    miss(net, X, r"one to one|order", weights=("up.weight", "down.weight"))


def test_down_over_another_axis() -> None:
    net = swiglu(lambda m, x: m.down((F.silu(m.gate(x)) * m.up(x)).transpose(1, 2)))
    made = pe_fx.plan(net, torch.randn(2, H, D))
    assert not made.sites
    assert any("down.weight" in found.weights for found in made.misses), made.explain()


def test_reshape_that_mixes() -> None:
    net = swiglu(lambda m, x: m.down((F.silu(m.gate(x)) * m.up(x)).transpose(1, 2).reshape(x.shape[0], x.shape[1], H)))
    made = pe_fx.plan(net, X)
    assert not made.sites
    assert any("down.weight" in found.weights for found in made.misses), made.explain()


def test_gate_and_up_of_different_inputs() -> None:
    net = swiglu(lambda m, x, y: m.down(F.silu(m.gate(y)) * m.up(x)))
    made = pe_fx.plan(net, (X, torch.randn(2, 5, D)))
    assert_equals_twin(net, pe_fx.apply(net, made), made, (X, torch.randn(2, 5, D)))


@pytest.mark.parametrize("size", [1, 3])
def test_swish_of_a_sum_of_convolutions(size: int) -> None:
    """Every way to it leads through the first convolution, whose channels are mixed since."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.first(x)
        y = m.left(h.relu()) + m.right(h)
        return m.last(y * y.sigmoid())

    left, right = (nn.Conv2d(D, D, 3, padding=1) for _ in range(2))
    net = Net(forward, first=nn.Conv2d(D, D, size, padding=size // 2), left=left, right=right, last=nn.Conv2d(D, D, 3, padding=1))
    assert not pe_fx.plan(net, torch.randn(2, D, 4, 4)).ties


@pytest.mark.parametrize("part", ["up", "down"])
def test_grouped_1x1(part: str) -> None:
    members = {"gate": nn.Conv2d(D, H, 1), "up": nn.Conv2d(D, H, 1), "down": nn.Conv2d(H, D, 1)}
    before = members[part]
    members[part] = nn.Conv2d(before.in_channels, before.out_channels, 1, groups=2)
    made = pe_fx.plan(swiglu(**members), torch.randn(2, D, 4, 4))
    assert not made.sites
    assert any(f"{part}.weight" in found.reason and "groups" in found.reason for found in made.misses), made.explain()


def test_names_of_the_site() -> None:
    (site,) = pe_fx.plan(swiglu(), X).sites
    assert (site.kind, set(site.weights)) == ("glu", {"gate.weight", "up.weight", "down.weight"})
    assert ties(pe_fx.plan(swiglu(), X)) == [TIE]
