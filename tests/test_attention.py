"""Keys and values share one matrix, queries and output projection the other."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_equals_twin, assert_hit, assert_idempotent, assert_miss, linear, ties, weight
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pe_fx

hit = partial(assert_hit, kind="attention")
miss = partial(assert_miss, kind="attention")

Core = Callable[[Tensor, Tensor, Tensor], Tensor]

D, HEADS, HEAD = 8, 2, 4
X = torch.randn(2, 5, D)
MEMORY = torch.randn(2, 7, D)

FUSED = ("qkv.weight[16:24] ← qkv.weight[8:16]ᵀ", "proj.weight ← qkv.weight[0:8]ᵀ")
SEPARATE = ("v.weight ← k.weightᵀ", "out.weight ← q.weightᵀ")


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * HEAD**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (value.flatten(0, 1) for value in (q, k, v))
    mixed = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) / HEAD**0.5, dim=-1), v)
    return mixed.unflatten(0, (-1, HEADS))


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).mul(HEAD**-0.5).softmax(-1), v)


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys times queries, normalised over the keys' axis."""
    scores = (k @ q.transpose(-2, -1)).softmax(-2)
    return scores.transpose(-2, -1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = torch.full((q.shape[-2], k.shape[-2]), float("-inf")).triu(1)
    return (q @ k.transpose(-2, -1) / HEAD**0.5 + causal).softmax(-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return F.dropout((q @ k.mT).masked_fill(causal, -1e4).softmax(-1), 0.5) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


CORES = [sdpa, by_hand, by_bmm, by_einsum, transposed, masked, filled, causal]


def fused(core: Core = sdpa, **members: nn.Module | Tensor) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4).unbind(0)
        return m.proj(joined(core(q, k, v)))

    return Net(forward, **{"qkv": linear(D, 3 * D), "proj": linear(D, D), **members})


def separate(core: Core = sdpa, **members: nn.Module | Tensor) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(joined(core(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))))

    return Net(forward, **{"q": linear(D, D), "k": linear(D, D), "v": linear(D, D), "out": linear(D, D), **members})


# ---- hits: how softmax(q kᵀ) v is written


@pytest.mark.parametrize("core", CORES, ids=lambda core: core.__name__)
def test_separate(core: Core) -> None:
    hit(separate(core), X, *SEPARATE)


@pytest.mark.parametrize("core", [sdpa, by_hand, by_bmm, by_einsum], ids=lambda core: core.__name__)
def test_fused_qkv(core: Core) -> None:
    hit(fused(core), X, *FUSED)


def test_relative_position_bias() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
        return m.out(joined((q @ k.mT + m.table[m.index]).softmax(-1) @ v))

    net = Net(forward, q=linear(D, D), k=linear(D, D), v=linear(D, D), out=linear(D, D), table=torch.randn(9))
    net.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5) + 4)
    hit(net, X, *SEPARATE)


def test_mask_as_input() -> None:
    def forward(m: Net, x: Tensor, mask: Tensor) -> Tensor:
        return m.out(joined(F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), attn_mask=mask)))

    net = Net(forward, q=linear(D, D), k=linear(D, D), v=linear(D, D), out=linear(D, D))
    hit(net, {"x": X, "mask": torch.ones(5, 5, dtype=torch.bool).tril()}, *SEPARATE)


def test_as_many_images_as_a_mask_selects() -> None:
    def forward(m: Net, x: Tensor, kept: Tensor) -> Tensor:
        x = x[kept]
        q, k, v = (part(x).view(x.shape[0], 5, HEADS, HEAD).transpose(1, 2) for part in (m.q, m.k, m.v))
        return m.out(sdpa(q, k, v).transpose(1, 2).reshape(x.shape[0], 5, D))

    net = Net(forward, q=linear(D, D), k=linear(D, D), v=linear(D, D), out=linear(D, D))
    hit(net, (X, torch.tensor([True, False])), *SEPARATE)


def test_one_head_without_reshape() -> None:
    net = Net(
        lambda m, x: m.out(by_hand(m.q(x), m.k(x), m.v(x))),
        q=linear(D, D),
        k=linear(D, D),
        v=linear(D, D),
        out=linear(D, D),
    )
    hit(net, X, *SEPARATE)


def test_norm_on_queries_and_keys() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.norm_q(heads(m.q(x))), m.norm_k(heads(m.k(x))), heads(m.v(x))
        return m.out(joined(sdpa(q, k, v)))

    members = {"norm_q": nn.LayerNorm(HEAD), "norm_k": nn.RMSNorm(HEAD)}
    hit(Net(forward, q=linear(D, D), k=linear(D, D), v=linear(D, D), out=linear(D, D), **members), X, *SEPARATE)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def turned_apart(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As GPT-J and many ports have it."""
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


def turned_by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def turned_by_columns(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Flux has it: the columns of a rotation matrix for each pair."""
    pairs, turn = x.unflatten(-1, (-1, 1, 2)), torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))
    return (turn[..., 0] * pairs[..., 0] + turn[..., 1] * pairs[..., 1]).flatten(-2)


def turned_by_a_sum(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Kandinsky has it."""
    pairs, turn = x.unflatten(-1, (-1, 1, 2)), torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))
    return (turn * pairs).sum(-1).flatten(-2)


def turned_as_far_as_they_go(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The part that is not turned is empty."""
    first, second, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), -1)


def turned_in_memory(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    result = torch.empty_like(x)
    result[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
    result[..., 1::2] = x[..., ::2] * sin + x[..., 1::2] * cos
    return result


TURNS = [turned_apart, turned_by_halves, turned_by_columns, turned_by_a_sum, turned_as_far_as_they_go, turned_in_memory]


@pytest.mark.parametrize("turned", TURNS, ids=lambda turned: turned.__name__)
def test_rotary_embedding_written_out(turned: Callable[..., Tensor]) -> None:
    angles = torch.arange(5)[:, None] / 10.0 ** torch.arange(HEAD // 2)

    def rotary(x: Tensor) -> Tensor:
        return turned(x, angles.cos(), angles.sin())

    hit(separate(lambda q, k, v: sdpa(rotary(q), rotary(k), v)), X, *SEPARATE)
    hit(fused(lambda q, k, v: by_hand(rotary(q), rotary(k), v)), X, *FUSED)


@pytest.mark.parametrize("rotate", [rotate_half, rotate_pairs], ids=["halves", "pairs"])
def test_rotary_embedding(rotate: Callable[[Tensor], Tensor]) -> None:
    def rotary(x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] / 10.0 ** torch.arange(HEAD)
        return x * angles.cos() + rotate(x) * angles.sin()

    hit(separate(lambda q, k, v: sdpa(rotary(q), rotary(k), v)), X, *SEPARATE)


def rotated(x: Tensor) -> Tensor:
    """A rotary embedding by complex numbers."""
    angles = torch.arange(x.shape[-2])[:, None] / 10.0 ** torch.arange(HEAD // 2)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def rotated_by_parts(x: Tensor) -> Tensor:
    """The same with real and imaginary parts in the two halves of a head, turned back by the conjugate."""
    turned = (torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones(HEAD // 2), torch.arange(HEAD // 2) / 3)).conj()
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("rotary", [rotated, rotated_by_parts])
def test_rotary_embedding_by_complex_numbers(rotary: Callable[[Tensor], Tensor]) -> None:
    hit(separate(lambda q, k, v: sdpa(rotary(q), rotary(k), v)), X, *SEPARATE)
    hit(fused(lambda q, k, v: by_hand(rotary(q), rotary(k), v)), X, *FUSED)


def test_two_channels_as_one_absolute_value() -> None:
    def absolute(x: Tensor) -> Tensor:
        return torch.view_as_complex(x.unflatten(-1, (-1, 2))).abs().repeat(1, 1, 1, 2)

    net = separate(lambda q, k, v: sdpa(q, k, absolute(v)))
    hit(net, X, "out.weight ← q.weightᵀ")
    assert "values cannot use the weight of the keys, k.weight: no projection of their own was found" in pe_fx.plan(net, X).explain()


def test_rotary_embedding_on_part_of_each_head() -> None:
    def rotary(x: Tensor) -> Tensor:
        turned, passed = x[..., :2], x[..., 2:]
        angle = torch.arange(x.shape[-2])[:, None] * torch.ones(2)
        return torch.cat((turned * angle.cos() + rotate_half(turned) * angle.sin(), passed), -1)

    hit(fused(lambda q, k, v: sdpa(rotary(q), rotary(k), v)), X, *FUSED)


def test_norm_and_gate_before_the_output() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(m.norm(F.dropout(joined(sdpa(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))), 0.1)))

    net = Net(forward, q=linear(D, D), k=linear(D, D), v=linear(D, D), out=linear(D, D), norm=nn.LayerNorm(D))
    hit(net, X, *SEPARATE)


# ---- hits: where q, k and v come from


def test_fused_chunked() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        return m.proj(joined(sdpa(heads(q), heads(k), heads(v))))

    hit(Net(forward, qkv=linear(D, 3 * D), proj=linear(D, D)), X, *FUSED)


def test_fused_sliced_in_another_order() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.qkv(x)
        v, q, k = y[..., :D], y[..., D : 2 * D], y[..., 2 * D :]
        return m.proj(joined(sdpa(heads(q), heads(k), heads(v))))

    net = Net(forward, qkv=linear(D, 3 * D), proj=linear(D, D))
    hit(net, X, "qkv.weight[0:8] ← qkv.weight[16:24]ᵀ", "proj.weight ← qkv.weight[8:16]ᵀ")


def test_fused_rows_interleaved_per_head() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).unflatten(-1, (HEADS, 3 * HEAD)).transpose(1, 2).split(HEAD, -1)
        return m.proj(joined(sdpa(q, k, v)))

    net = Net(forward, qkv=linear(D, 3 * D), proj=linear(D, D))
    tied = hit(net, X, "qkv.weight[8:12+20:24] ← qkv.weight[4:8+16:20]ᵀ", "proj.weight ← qkv.weight[0:4+12:16]ᵀ")
    assert tied.state_dict()["qkv.weight_kept"].shape == (16, D)


def test_fused_weight_in_by_out() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = (x @ m.qkv).chunk(3, -1)
        return joined(sdpa(heads(q), heads(k), heads(v))) @ m.proj

    net = Net(forward, qkv=weight(D, 3 * D), proj=weight(D, D))
    hit(net, X, "qkv[:, 16:24] ← qkv[:, 8:16]ᵀ", "proj ← qkv[:, 0:8]ᵀ")


def test_fused_weight_chunked_before_use() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = (heads(F.linear(x, part)) for part in m.qkv.chunk(3))
        return F.linear(joined(sdpa(q, k, v)), m.proj)

    net = Net(forward, qkv=weight(3 * D, D), proj=weight(D, D))
    hit(net, X, "qkv[16:24] ← qkv[8:16]ᵀ", "proj ← qkv[0:8]ᵀ")


def test_q_and_fused_kv() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        k, v = m.kv(x).unflatten(-1, (2, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        return m.proj(joined(sdpa(heads(m.q(x)), k, v)))

    net = Net(forward, q=linear(D, D), kv=linear(D, 2 * D), proj=linear(D, D))
    hit(net, X, "kv.weight[8:16] ← kv.weight[0:8]ᵀ", "proj.weight ← q.weightᵀ")


def test_fused_kv_of_spatially_reduced_tokens() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        reduced = m.norm(m.sr(x.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2))
        k, v = heads(m.kv(reduced).chunk(2, -1)[0]), heads(m.kv(reduced).chunk(2, -1)[1])
        return m.proj(joined(sdpa(heads(m.q(x)), k, v)))

    net = Net(forward, q=linear(D, D), kv=linear(D, 2 * D), proj=linear(D, D), sr=nn.Conv2d(D, D, 2, 2), norm=nn.LayerNorm(D))
    hit(net, torch.randn(2, 16, D), "kv.weight[8:16] ← kv.weight[0:8]ᵀ", "proj.weight ← q.weightᵀ")


def test_fused_qk_and_v() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k = m.qk(x).unflatten(-1, (2, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        return m.proj(joined(sdpa(q, k, heads(m.v(x)))))

    net = Net(forward, qk=linear(D, 2 * D), v=linear(D, D), proj=linear(D, D))
    hit(net, X, "v.weight ← qk.weight[8:16]ᵀ", "proj.weight ← qk.weight[0:8]ᵀ")


def test_1x1_convolutions() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = (value.flatten(2).unflatten(1, (HEADS, HEAD)).transpose(2, 3) for value in m.qkv(x).chunk(3, 1))
        return m.proj(sdpa(q, k, v).transpose(2, 3).flatten(1, 2).unflatten(2, (3, 3)))

    hit(Net(forward, qkv=nn.Conv2d(D, 3 * D, 1), proj=nn.Conv2d(D, D, 1)), torch.randn(2, D, 3, 3), *FUSED)


def test_grouped_queries_tie_the_output_only() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        k, v = (heads(m.k(x), 1).repeat_interleave(2, 1), heads(m.v(x), 1).repeat_interleave(2, 1))
        return m.out(joined(sdpa(heads(m.q(x)), k, v)))

    net = Net(forward, q=linear(D, D), k=linear(D, HEAD), v=linear(D, HEAD), out=linear(D, D))
    hit(net, X, "out.weight ← q.weightᵀ")
    misses = pe_fx.plan(net, X).misses
    assert any({"k.weight", "v.weight"} == set(found.weights) and "(4, 8)" in found.reason for found in misses)


def test_grouped_queries_expanded() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        k, v = (heads(p(x), 1)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for p in (m.k, m.v))
        return m.out(joined(sdpa(heads(m.q(x)), k, v)))

    hit(Net(forward, q=linear(D, D), k=linear(D, HEAD), v=linear(D, HEAD), out=linear(D, D)), X, "out.weight ← q.weightᵀ")


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_queries_by_sdpa(groups: int) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        k, v = heads(m.k(x), groups), heads(m.v(x), groups)
        return m.out(joined(F.scaled_dot_product_attention(heads(m.q(x), 4), k, v, enable_gqa=True)))

    inner = groups * D // 4
    hit(Net(forward, q=linear(D, D), k=linear(D, inner), v=linear(D, inner), out=linear(D, D)), X, "out.weight ← q.weightᵀ")


def test_sdpa_without_heads() -> None:
    net = Net(
        lambda m, x: m.out(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))),
        q=linear(D, D),
        k=linear(D, D),
        v=linear(D, D),
        out=linear(D, D),
    )
    hit(net, X, *SEPARATE)
    hit(net, X[0], *SEPARATE)


def test_multi_query_with_inner_width_above_the_model_s() -> None:
    net = separate(by_hand, q=linear(D, 16), k=linear(D, 16), v=linear(D, 16), out=linear(16, D))
    hit(net, X, "out.weight ← q.weightᵀ")


def test_cross_attention() -> None:
    def forward(m: Net, x: Tensor, memory: Tensor) -> Tensor:
        return m.out(joined(sdpa(heads(m.q(x)), heads(m.k(memory)), heads(m.v(memory)))))

    net = Net(forward, q=linear(D, D), k=linear(D, D), v=linear(D, D), out=linear(D, D))
    hit(net, (X, MEMORY), *SEPARATE)


def test_keys_read_positions_that_values_do_not() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        positioned = x + m.position
        return m.out(joined(sdpa(heads(m.q(positioned)), heads(m.k(positioned)), heads(m.v(x)))))

    net = Net(forward, q=linear(D, D), k=linear(D, D), v=linear(D, D), out=linear(D, D), position=torch.randn(5, D))
    hit(net, X, *SEPARATE)


def test_windows_and_rolls() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        rolled = x.roll((-1, -1), (1, 2))
        windows = rolled.unflatten(2, (2, 2)).unflatten(1, (2, 2)).transpose(2, 3).reshape(-1, 4, D)
        q, k, v = m.qkv(windows).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        y = m.proj(joined(by_hand(q, k, v)))
        return y.view(-1, 2, 2, 2, 2, D).transpose(2, 3).reshape(x.shape).roll((1, 1), (1, 2))

    hit(Net(forward, qkv=linear(D, 3 * D), proj=linear(D, D)), torch.randn(2, 4, 4, D), *FUSED)


def test_depthwise_convolution_on_keys_and_values() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        k, v = (conv(value.transpose(1, 2)).transpose(1, 2) for conv, value in ((m.pool_k, m.k(x)), (m.pool_v, m.v(x))))
        return m.out(joined(sdpa(heads(m.q(x)), heads(k), heads(v))))

    pools = {name: nn.Conv1d(D, D, 3, padding=1, groups=D) for name in ("pool_k", "pool_v")}
    hit(Net(forward, q=linear(D, D), k=linear(D, D), v=linear(D, D), out=linear(D, D), **pools), X, *SEPARATE)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first: bool) -> None:
    net = Net(lambda m, x: m.attn(x, x, x, need_weights=False)[0], attn=nn.MultiheadAttention(D, HEADS, batch_first=batch_first))
    tied = hit(
        net,
        X,
        "attn.in_proj_weight[16:24] ← attn.in_proj_weight[8:16]ᵀ",
        "attn.out_proj.weight ← attn.in_proj_weight[0:8]ᵀ",
    )
    assert tied.state_dict()["attn.in_proj_weight_kept"].shape == (2 * D, D)


def test_multihead_attention_with_weights_returned() -> None:
    net = Net(lambda m, x: m.attn(x, x, x), attn=nn.MultiheadAttention(D, HEADS, dropout=0.2, batch_first=True))
    hit(net, X, "attn.in_proj_weight[16:24] ← attn.in_proj_weight[8:16]ᵀ", "attn.out_proj.weight ← attn.in_proj_weight[0:8]ᵀ")


def test_multihead_cross_attention() -> None:
    net = Net(lambda m, x, y: m.attn(x, y, y, need_weights=False)[0], attn=nn.MultiheadAttention(D, HEADS, batch_first=True))
    hit(net, (X, MEMORY), "attn.in_proj_weight[16:24] ← attn.in_proj_weight[8:16]ᵀ", "attn.out_proj.weight ← attn.in_proj_weight[0:8]ᵀ")


def test_multihead_attention_with_keys_of_another_width() -> None:
    attn = nn.MultiheadAttention(D, HEADS, kdim=6, vdim=6, batch_first=True)
    net = Net(lambda m, x, y: m.attn(x, y, y, need_weights=False)[0], attn=attn)
    hit(net, (X, torch.randn(2, 7, 6)), "attn.out_proj.weight ← attn.q_proj_weightᵀ")


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_multihead_attention_with_a_token_added_to_keys_and_values(option: str) -> None:
    attn = nn.MultiheadAttention(D, HEADS, batch_first=True, **{option: True})
    net = Net(lambda m, x: m.attn(x, x, x, need_weights=False)[0], attn=attn)
    hit(net, X, "attn.in_proj_weight[16:24] ← attn.in_proj_weight[8:16]ᵀ", "attn.out_proj.weight ← attn.in_proj_weight[0:8]ᵀ")


def test_key_padding_mask() -> None:
    net = Net(lambda m, x, mask: m.attn(x, x, x, key_padding_mask=mask)[0], attn=nn.MultiheadAttention(D, HEADS, batch_first=True))
    mask = torch.arange(5).expand(2, 5) > 3
    hit(net, (X, mask), "attn.in_proj_weight[16:24] ← attn.in_proj_weight[8:16]ᵀ", "attn.out_proj.weight ← attn.in_proj_weight[0:8]ᵀ")


@pytest.mark.parametrize("core", [sdpa, by_hand])
def test_one_query(core: Core) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(joined(core(heads(m.q(x[:, :1])), heads(m.k(x)), heads(m.v(x)))))

    hit(Net(forward, q=linear(D, D), k=linear(D, D), v=linear(D, D), out=linear(D, D)), X, *SEPARATE)
    hit(separate(core), torch.randn(1, 1, D), *SEPARATE)


@pytest.mark.parametrize("key", [[-2], torch.tensor([HEADS])], ids=["list", "tensor"])
def test_fused_cut_by_constant_positions(key: object) -> None:
    """One key and one value for all queries, as rows of one weight."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.qkv(x).unflatten(-1, (HEADS + 2, HEAD))
        q, k, v = y[..., :-2, :], y[..., key, :], y.index_select(-2, torch.tensor([HEADS + 1]))
        k, v = (part.expand_as(q).transpose(1, 2) for part in (k, v))
        return m.proj(joined(sdpa(q.transpose(1, 2), k, v)))

    net = Net(forward, qkv=linear(D, D + 2 * HEAD), proj=linear(D, D))
    hit(net, X, "proj.weight ← qkv.weight[0:8]ᵀ")
    reasons = [found.reason for found in pe_fx.plan(net, X).misses]
    assert reasons == ["qkv.weight[12:16] is (4, 8), qkv.weight[8:12] is (4, 8): not transposes of each other"]


def picked(positions: Callable[[Net], Tensor]) -> Net:
    """Queries are the fused weight's channels at positions that a tensor holds."""

    def forward(m: Net, x: Tensor, *given: Tensor) -> Tensor:
        y = m.qkv(x)
        q, k, v = y[..., given[0] if given else positions(m)], y[..., D : 2 * D], y[..., 2 * D :]
        return m.proj(joined(sdpa(heads(q), heads(k), heads(v))))

    net = Net(forward, qkv=linear(D, 3 * D), proj=linear(D, D))
    net.register_buffer("positions", torch.arange(D))
    return net


def written(m: Net) -> Tensor:
    positions = torch.tensor(list(range(D)))
    positions[0] = D - 1
    return positions


@pytest.mark.parametrize("positions", [lambda m: m.positions, written, None], ids=["buffer", "written", "input"])
def test_positions_that_may_be_others_when_the_model_runs(positions: Callable[[Net], Tensor] | None) -> None:
    net = picked(positions or written)
    made = pe_fx.plan(net, X if positions else (X, torch.arange(D)))
    assert ties(made) == ["qkv.weight[16:24] ← qkv.weight[8:16]ᵀ"]
    assert "the queries of scaled_dot_product_attention are not made by one weight alone" in made.explain()


def test_positions_in_another_order() -> None:
    hit(picked(lambda m: torch.tensor([1, 0, *range(2, D)])), X, *FUSED)


def test_output_gated_by_the_input() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(joined(sdpa(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))) * m.gate(x).sigmoid())

    hit(Net(forward, **{name: linear(D, D) for name in ("q", "k", "v", "out", "gate")}), X, *SEPARATE)


def test_bare_parameters_of_one_module() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = x + joined(sdpa(heads(x @ m.q), heads(x @ m.k), heads(x @ m.v))) @ m.o
        return x + (x @ m.a).relu() @ m.b

    net = Net(forward, q=weight(D, D), k=weight(D, D), v=weight(D, D), o=weight(D, D), a=weight(D, 16), b=weight(16, D))
    made = pe_fx.plan(net, X)
    assert set(ties(made)) == {"v ← kᵀ", "o ← qᵀ", "b ← aᵀ"}
    tied = pe_fx.apply(net, made)
    assert list(tied.state_dict()) == ["q", "k", "a"]
    assert_equals_twin(net, tied, made, X)


def test_transformer_encoder_layer() -> None:
    net = nn.TransformerEncoderLayer(D, HEADS, 16, batch_first=True)
    made = pe_fx.plan(net, X)
    assert sorted(ties(made)) == [
        "linear2.weight ← linear1.weightᵀ",
        "self_attn.in_proj_weight[16:24] ← self_attn.in_proj_weight[8:16]ᵀ",
        "self_attn.out_proj.weight ← self_attn.in_proj_weight[0:8]ᵀ",
    ]
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


def test_transformer_decoder_layer() -> None:
    net = nn.TransformerDecoderLayer(D, HEADS, 16, batch_first=True)
    made = pe_fx.plan(net, (X, MEMORY))
    assert [(site.kind, site.name) for site in made.sites] == [("attention", "self_attn"), ("attention", "multihead_attn"), ("mlp", "")]
    assert_equals_twin(net, pe_fx.apply(net, made), made, (X, MEMORY))


def test_attention_that_runs_twice_is_one_site() -> None:
    hit(Net(lambda m, x: m.attn(m.attn(x)), attn=separate()), X, "attn.v.weight ← attn.k.weightᵀ", "attn.out.weight ← attn.q.weightᵀ")


def test_stored_rows_of_a_fused_weight() -> None:
    net = fused()
    tied = pe_fx.transform(net, X)
    torch.testing.assert_close(tied.state_dict()["qkv.weight_kept"], net.qkv.weight[: 2 * D].detach())
    torch.testing.assert_close(tied.qkv.weight[2 * D :], net.qkv.weight[D : 2 * D].t())
    torch.testing.assert_close(tied.proj.weight, net.qkv.weight[:D].t())
    assert tied.qkv.bias.shape == (3 * D,)


def test_init_mean_of_a_fused_weight() -> None:
    net = fused()
    tied = pe_fx.transform(net, X, init="mean")
    q, k, v = net.qkv.weight.detach().chunk(3)
    expected = torch.cat(((q + net.proj.weight.detach().t()) / 2, (k + v.t()) / 2))
    torch.testing.assert_close(tied.state_dict()["qkv.weight_kept"], expected)


def test_share_uses_one_pair_of_weights_for_the_stack() -> None:
    net = nn.Sequential(separate(), separate())
    hit(
        net,
        X,
        "0.v.weight ← 0.k.weightᵀ",
        "0.out.weight ← 0.q.weightᵀ",
        "1.k.weight ← 0.k.weight",
        "1.v.weight ← 0.k.weightᵀ",
        "1.q.weight ← 0.q.weight",
        "1.out.weight ← 0.q.weightᵀ",
        share=("attention",),
    )


def test_share_of_fused_weights() -> None:
    net = nn.Sequential(fused(), fused())
    tied = pe_fx.transform(net, X, share=("attention",))
    assert [name for name in tied.state_dict() if "weight" in name] == ["0.qkv.weight_kept"]
    made = pe_fx.plan(net, X, share=("attention",))
    assert_equals_twin(net, tied, made, X)


@pytest.mark.parametrize(
    "net", [fused(), separate(), nn.TransformerEncoderLayer(D, HEADS, 16, batch_first=True)], ids=["fused", "separate", "encoder layer"]
)
def test_idempotent(net: nn.Module) -> None:
    assert_idempotent(net, X)


def test_idempotent_where_only_the_output_is_tied() -> None:
    assert_idempotent(separate(by_hand, q=linear(D, 16), k=linear(D, 16), v=linear(D, 16), out=linear(16, D)), X)


# ---- misses


NO_SOFTMAX: dict[str, Core] = {
    "none": lambda q, k, v: q @ k.mT @ v,
    "sigmoid": lambda q, k, v: (q @ k.mT).sigmoid() @ v,
    "squared relu": lambda q, k, v: (q @ k.mT).relu().square() @ v,
    "decay": lambda q, k, v: (q @ k.mT * 0.9) @ v,
    "linear": lambda q, k, v: F.elu(q) @ (F.elu(k).mT @ v),
    "linear, normed": lambda q, k, v: q.relu() @ (k.relu().mT @ v) / (q.relu() * k.relu().sum(-2, keepdim=True)).sum(-1, keepdim=True),
    "linear, by einsum": lambda q, k, v: torch.einsum("bhnc,bhcd->bhnd", q, torch.einsum("bhnc,bhnd->bhcd", k, v)),
}


@pytest.mark.parametrize("name", NO_SOFTMAX)
def test_no_softmax(name: str) -> None:
    reason = r"multiplies three values without a softmax: only attention by one is tied"
    miss(separate(NO_SOFTMAX[name]), X, reason, weights=("q.weight", "k.weight", "v.weight"))
    miss(fused(NO_SOFTMAX[name]), X, reason + r" \(qkv\.weight\)$")


def test_no_softmax_where_no_shapes_fit() -> None:
    wide = {name: linear(D, 16) for name in "qkv"}
    assert not pe_fx.plan(separate(NO_SOFTMAX["linear"], **wide, out=linear(16, D)), X).misses


def test_a_softmax_of_which_the_products_are_known_is_told_once() -> None:
    assert not pe_fx.plan(separate(by_hand), X).misses


def test_softmax_of_the_keys_alone() -> None:
    """Factorised attention: q (softmax(k)ᵀ v)."""
    reason = r"averages by a softmax that is not of queries times keys: k\.weight, v\.weight"
    miss(separate(lambda q, k, v: q @ (k.softmax(-2).mT @ v)), X, reason, weights=("k.weight", "v.weight"))
    miss(fused(lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v)), X, r"softmax that is not of queries times keys: qkv\.weight$")
    assert not pe_fx.plan(separate(lambda q, k, v: q @ (k.softmax(-2).mT @ v), v=linear(D, 16), out=linear(16, D)), X).misses


def test_average_over_channels_leaves_the_output() -> None:
    """Cross-covariance attention: the output's channels are those of the queries, and the values' are averaged."""
    net = separate(lambda q, k, v: ((F.normalize(q.mT, dim=-1) @ F.normalize(k.mT, dim=-1).mT).softmax(-1) @ v.mT).mT)
    hit(net, X, "v.weight ← k.weightᵀ")
    assert "out" not in str(pe_fx.plan(net, X).ties)
    assert re.search(r"output projection .* q\.weight: matmul_1 averages over channels, not over positions", pe_fx.plan(net, X).explain())


def test_attention_without_weights_is_no_miss() -> None:
    assert not pe_fx.plan(Net(lambda m, x: m.out(by_hand(x, x, x)), out=linear(D, D)), X).misses


def test_softmax_over_the_queries_does_not_swap_roles() -> None:
    made = pe_fx.plan(separate(lambda q, k, v: (q @ k.mT).softmax(-2) @ v), X)
    assert set(ties(made)) <= set(SEPARATE)


def test_square_is_needed_for_the_values() -> None:
    net = separate(by_hand, q=linear(D, 4), k=linear(D, 4), v=linear(D, 4), out=linear(4, 6))
    found = miss(net, X, r"not transposes|not square", weights=("k.weight", "v.weight"))
    assert "(4, 8)" in found.reason


def test_output_of_another_width() -> None:
    net = separate(out=linear(D, 6))
    made = pe_fx.plan(net, X)
    assert ties(made) == ["v.weight ← k.weightᵀ"]
    assert any({"q.weight", "out.weight"} == set(found.weights) and "(6, 8)" in found.reason for found in made.misses)


def test_values_of_another_width() -> None:
    made = pe_fx.plan(separate(v=linear(D, 16), out=linear(16, D)), X)
    assert ties(made) == []
    assert {frozenset(found.weights) for found in made.misses if found.kind == "attention"} == {
        frozenset(("k.weight", "v.weight")),
        frozenset(("q.weight", "out.weight")),
    }


def test_site_of_one_fused_weight_is_named_by_the_module_around_it() -> None:
    attn = Net(lambda m, x: joined(sdpa(*map(heads, m.qkv(x).chunk(3, -1)))), qkv=linear(D, 3 * D))
    made = pe_fx.plan(Net(lambda m, x: m.attn(x), attn=attn), X)
    assert [(site.name, site.weights) for site in made.sites] == [("attn", ("attn.qkv.weight",))]
    assert "qkv.weight[16:24] ← qkv.weight[8:16]ᵀ" in str(made)


def test_no_output_projection() -> None:
    net = Net(lambda m, x: joined(sdpa(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))), q=linear(D, D), k=linear(D, D), v=linear(D, D))
    made = pe_fx.plan(net, X)
    assert ties(made) == ["v.weight ← k.weightᵀ"]
    assert any("q.weight" in found.weights and "output projection" in found.reason for found in made.misses)


@pytest.mark.parametrize(("frozen", "left"), [("v", "out.weight ← q.weightᵀ"), ("q", "v.weight ← k.weightᵀ")])
def test_frozen_beside_trained_leaves_the_other_tie(frozen: str, left: str) -> None:
    net = separate()
    net.get_submodule(frozen).weight.requires_grad_(False)
    made = pe_fx.plan(net, X)
    assert ties(made) == [left]
    assert any(f"{frozen}.weight is frozen" in found.reason for found in made.misses)


@pytest.mark.parametrize("register", [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm])
def test_parametrized(register: Callable[[nn.Module], object]) -> None:
    net = separate()
    register(net.v)
    made = pe_fx.plan(net, X)
    assert not any("v" in str(tie) for tie in made.ties)
    assert any("parametri" in found.reason for found in made.misses), made.explain()


def test_read_by_a_penalty_leaves_the_other_tie() -> None:
    added = Net(lambda m, x: m.attn(x).sum() + m.attn.v.weight.square().sum(), attn=separate())
    returned = Net(lambda m, x: (m.attn(x), m.attn.out.weight.square().sum()), attn=separate())
    for net, read, left in ((added, "v", "attn.out.weight ← attn.q.weightᵀ"), (returned, "out", "attn.v.weight ← attn.k.weightᵀ")):
        made = pe_fx.plan(net, X)
        assert ties(made) == [left]
        assert any(f"attn.{read}.weight is read by" in found.reason for found in made.misses), made.explain()


@pytest.mark.parametrize("made", ["strided", "added", "joined"])
def test_values_that_no_matrix_alone_makes_leave_the_output(made: str) -> None:
    """As in PVT, whose values are a strided convolution, and where values of another layer are added."""

    def forward(m: Net, x: Tensor) -> Tensor:
        k, v = m.k(x), m.v(x)
        match made:
            case "strided":
                k, v = F.avg_pool1d(k.mT, 2).mT, m.other(x.mT).mT
            case "added":
                v = v + 0.5 * m.v2(x)
            case "joined":
                k, v = torch.cat((k, k), 1), torch.cat((v, m.v2(x)), 1)
        return m.out(joined(sdpa(heads(m.q(x)), heads(k), heads(v))))

    names = ("q", "k", "v", "v2", "out")
    net = Net(forward, other=nn.Conv1d(D, D, 2, 2), **{name: linear(D, D) for name in names})
    hit(net, torch.randn(2, 4, D), "out.weight ← q.weightᵀ")
    reason = "no projection of their own was found" if made == "strided" else r"in several ways: k\.weight, v\.weight, v2\.weight"
    assert re.search(reason, pe_fx.plan(net, torch.randn(2, 4, D)).explain())


@pytest.mark.parametrize("core", [sdpa, by_hand, by_einsum], ids=lambda core: core.__name__)
def test_queries_of_a_learned_token(core: Core) -> None:
    """Values, though they depend on no input."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(joined(core(heads(m.q(m.token.expand(len(x), -1, -1))), heads(m.k(x)), heads(m.v(x)))))

    hit(Net(forward, token=weight(1, 1, D), **{name: linear(D, D) for name in ("q", "k", "v", "out")}), X, *SEPARATE)


@pytest.mark.parametrize("length", [3, 6], ids=["shorter", "square"])
def test_keys_and_values_shortened_by_a_matrix_along_the_positions(length: int) -> None:
    """Linformer. The matrices along the positions are neither keys nor values."""

    def forward(m: Net, x: Tensor) -> Tensor:
        k, v = (torch.einsum("bnd,nk->bkd", value, weight) for value, weight in ((m.k(x), m.pk), (m.v(x), m.pv)))
        return m.out(joined(by_hand(heads(m.q(x)), heads(k), heads(v))))

    net = Net(forward, pk=weight(6, length), pv=weight(6, length), **{name: linear(D, D) for name in ("q", "k", "v", "out")})
    hit(net, torch.randn(2, 6, D), *SEPARATE)


def test_value_weight_shared_with_an_embedding() -> None:
    net = Net(lambda m, i: m.attn(m.embedding(i)), attn=separate(), embedding=nn.Embedding(D, D))
    net.attn.v.weight = net.embedding.weight
    made = pe_fx.plan(net, torch.arange(10).view(2, 5) % D)
    assert not any("embedding" in str(tie) or "attn.v" in str(tie) for tie in made.ties)
    assert any("embedding" in found.reason for found in made.misses), made.explain()


def test_values_read_elsewhere_too() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        v = m.v(x)
        return m.out(joined(sdpa(heads(m.q(x)), heads(m.k(x)), heads(v)))) + m.lepe(v.transpose(1, 2)).transpose(1, 2)

    net = Net(forward, q=linear(D, D), k=linear(D, D), v=linear(D, D), out=linear(D, D), lepe=nn.Conv1d(D, D, 3, padding=1, groups=D))
    made = pe_fx.plan(net, X)
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


def test_weight_used_by_two_attentions_with_different_partners() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        a = joined(sdpa(heads(m.q(x)), heads(m.k(x)), heads(m.v(x))))
        b = joined(sdpa(heads(m.q2(x)), heads(m.k2(x)), heads(m.v(x))))
        return m.out(a) + m.out2(b)

    net = Net(forward, **{name: linear(D, D) for name in ("q", "k", "v", "out", "q2", "k2", "out2")})
    made = pe_fx.plan(net, X)
    assert not any(tie.target == "v.weight" for tie in made.ties)
    assert any("v.weight" in found.weights and "v.weight" in found.reason for found in made.misses), made.explain()


def test_keys_and_values_of_one_weight_already() -> None:
    net = Net(
        lambda m, x: m.out(joined(sdpa(heads(m.q(x)), heads(kv := m.kv(x)), heads(kv)))), q=linear(D, D), kv=linear(D, D), out=linear(D, D)
    )
    hit(net, X, "out.weight ← q.weightᵀ")


def test_queries_and_keys_of_one_weight() -> None:
    net = Net(
        lambda m, x: m.out(joined(sdpa(heads(qk := m.qk(x)), heads(qk), heads(m.v(x))))), qk=linear(D, D), v=linear(D, D), out=linear(D, D)
    )
    made = pe_fx.plan(net, X)
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


def test_output_over_another_axis() -> None:
    net = Net(
        lambda m, x: m.out(joined(sdpa(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))).transpose(1, 2)),
        q=linear(D, D),
        k=linear(D, D),
        v=linear(D, D),
        out=linear(D, D),
    )
    made = pe_fx.plan(net, torch.randn(2, D, D))
    assert ties(made) == ["v.weight ← k.weightᵀ"]
    assert any("out.weight" in found.weights or "q.weight" in found.weights for found in made.misses), made.explain()


def test_grouped_1x1_values() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(1, (HEADS, HEAD)).transpose(2, 3) for p in (m.q, m.k, m.v))
        return m.out(sdpa(q, k, v).transpose(2, 3).flatten(1, 2))

    net = Net(forward, q=nn.Conv1d(D, D, 1), k=nn.Conv1d(D, D, 1), v=nn.Conv1d(D, D, 1, groups=2), out=nn.Conv1d(D, D, 1))
    made = pe_fx.plan(net, torch.randn(2, D, 5))
    assert not any("v.weight" in str(tie) for tie in made.ties)
    assert any("k.weight" in found.weights for found in made.misses), made.explain()


def test_scores_bounded_by_a_constant() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)).softmax(-1) @ v

    assert sorted(ties(pe_fx.plan(separate(attend), X))) == sorted(SEPARATE)


def test_rotation_from_a_table() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        turn = m.table(torch.arange(x.shape[1]))[:, None].repeat(1, 1, HEAD).mT.mT
        q, k = (heads(part(x)) * turn.transpose(0, 1) for part in (m.q, m.k))
        return m.out(joined(sdpa(q, k, heads(m.v(x)))))

    net = Net(forward, table=torch.nn.Embedding(X.shape[1], 1), **{name: linear(D, D) for name in ("q", "k", "v", "out")})
    assert sorted(ties(pe_fx.plan(net, X))) == sorted(SEPARATE)
