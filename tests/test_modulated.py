"""What joins in from elsewhere modulates, whatever its origin and dtype; a rival is only what another matrix that fits has made."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_equals_twin, assert_hit, assert_idempotent, assert_miss, linear, ties
from torch import Tensor, nn

import pe_fx

D, H = 8, 16
X, MASK = torch.randn(2, 6, D), torch.ones(2, 6, 1)
TIE = "b.weight ← a.weightᵀ"

hit = partial(assert_hit, kind="mlp")

Forward = Callable[..., Tensor]


def ffn(forward: Forward, **members: nn.Module | Tensor) -> Net:
    return Net(forward, **{"a": linear(D, H), "b": linear(H, D), **members})


def film(m: Net, x: Tensor, c: Tensor) -> Tensor:
    scale, shift = m.m(c).chunk(2, -1)
    return x + m.b(F.silu(m.a(x) * (1 + scale) + shift))


# ---- hits: the hidden value of a feed-forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x, mask: x + m.b(m.a(x * mask).relu() * mask) * mask,
        lambda m, x, mask: x + m.b(m.a(x).relu().masked_fill(mask == 0, 0.0)),
        lambda m, x, mask: x + m.b(torch.where(mask > 0, m.a(x).relu(), torch.zeros(()))),
    ],
    ids=["product", "masked_fill", "where"],
)
def test_padding_mask(forward: Forward, dtype: torch.dtype) -> None:
    hit(ffn(forward), (X, MASK.to(dtype)), TIE)


def test_condition_that_scales_and_shifts() -> None:
    hit(ffn(film, m=linear(3, 2 * H)), (X, torch.randn(2, 6, 3)), TIE)
    hit(ffn(film, m=linear(3, 2 * H)), (X, torch.randn(2, 1, 3)), TIE)


def test_input_added_to_the_hidden_value() -> None:
    hit(ffn(lambda m, x, y: m.b(m.a(x).relu() + y)), (X, torch.randn(2, 6, H)), TIE)


def test_hidden_value_scaled_by_the_input() -> None:
    hit(ffn(lambda m, x: m.b(m.a(x).relu() * x.mean(-1, keepdim=True))), X, TIE)


def test_low_rank_update_beside_the_weight() -> None:
    """As an adapter that is not merged: its second matrix is as high, and not as wide."""
    net = ffn(lambda m, x: m.b((m.a(x) + m.up(m.down(x))).relu()), down=linear(D, 2), up=linear(2, H))
    hit(net, X, TIE)


def test_gated_unit_with_a_condition() -> None:
    net = ffn(lambda m, x, c: m.b(F.silu(m.g(x)) * m.a(x) * (1 + m.m(c))), g=linear(D, H), m=linear(3, H))
    assert_hit(net, (X, torch.randn(2, 6, 3)), TIE, kind="glu")


def test_gated_unit_with_an_update_of_low_rank() -> None:
    net = ffn(lambda m, x: m.b(F.silu(m.g(x)) * (m.a(x) + m.up(m.down(x)))), g=linear(D, H), down=linear(D, 2), up=linear(2, H))
    assert_hit(net, X, TIE, kind="glu")


@pytest.mark.parametrize("swish", [nn.SiLU(), lambda h: h * h.sigmoid(), lambda h: h.sigmoid() * h], ids=["module", "product", "swapped"])
def test_swish_after_a_gated_unit(swish: Callable[[Tensor], Tensor]) -> None:
    """A Conformer's convolution module, whose activation is written out or not."""

    def forward(m: Net, x: Tensor) -> Tensor:
        value, gate = m.up(x).chunk(2, 1)
        return m.down(swish(m.norm(m.depthwise(value * gate.sigmoid()))))

    net = Net(
        forward,
        up=nn.Conv1d(D, 2 * H, 1),
        depthwise=nn.Conv1d(H, H, 3, padding=1, groups=H),
        norm=nn.BatchNorm1d(H),
        down=nn.Conv1d(H, D, 1),
    )
    assert_hit(net, torch.randn(2, D, 6), "down.weight ← up.weight[0:16]ᵀ", kind="glu")


@pytest.mark.parametrize("net", [ffn(film, m=linear(3, 2 * H))])
def test_idempotent(net: nn.Module) -> None:
    assert_idempotent(net, (X, torch.randn(2, 6, 3)))


# ---- hits: attention


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def attention(change: Callable[..., tuple[Tensor, Tensor, Tensor]], **members: nn.Module | Tensor) -> Net:
    def forward(m: Net, x: Tensor, *others: Tensor) -> Tensor:
        q, k, v = change(m, heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), *others)
        return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return Net(forward, **{name: linear(D, D) for name in "qkvo"}, **members)


def rotary(m: Net, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    angles = positions[:, None] * torch.ones(4)

    def turned(z: Tensor) -> Tensor:
        return z * angles.cos() + torch.cat((-z[..., 2:], z[..., :2]), -1) * angles.sin()

    return turned(q), turned(k), v


SITE = ("v.weight ← k.weightᵀ", "o.weight ← q.weightᵀ")


@pytest.mark.parametrize("positions", [torch.arange(6), torch.arange(6.0)], ids=["integers", "floats"])
def test_rotary_positions_from_outside(positions: Tensor) -> None:
    assert_hit(attention(rotary), (X, positions), *SITE, kind="attention")


def test_rotary_positions_from_a_learned_projection() -> None:
    net = attention(lambda m, q, k, v, p: rotary(m, q, k, v, m.p(p).squeeze(-1)), p=linear(3, 1))
    assert_hit(net, (X, torch.randn(6, 3)), *SITE, kind="attention")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_masked_values(dtype: torch.dtype) -> None:
    net = attention(lambda m, q, k, v, mask: (q, k * mask[:, None], v * mask[:, None]))
    assert_hit(net, (X, MASK.to(dtype)), *SITE, kind="attention")


def test_low_rank_updates_of_queries_and_values() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, v = m.q(x) + m.q2(m.q1(x)), m.v(x) + m.v2(m.v1(x))
        return m.o(F.scaled_dot_product_attention(heads(q), heads(m.k(x)), heads(v)).transpose(1, 2).flatten(2))

    low = {"q1": linear(D, 2), "q2": linear(2, D), "v1": linear(D, 2), "v2": linear(2, D)}
    assert_hit(Net(forward, **{name: linear(D, D) for name in "qkvo"}, **low), X, *SITE, kind="attention")


def test_values_of_the_first_layer_mixed_into_those_of_the_next() -> None:
    """What the first layer made serves it, too: the next one's own values are those that it makes alone."""

    def forward(m: Net, x: Tensor) -> Tensor:
        first = None
        for layer in m.layers:
            q, k, v = (heads(part(x)) for part in layer[:3])
            first = v if first is None else first
            x = x + layer[3](F.scaled_dot_product_attention(q, k, v.lerp(first, 0.3)).transpose(1, 2).flatten(2))
        return x

    net = Net(forward, layers=nn.ModuleList(nn.ModuleList(linear(D, D) for _ in range(4)) for _ in range(3)))
    expected = [
        tie for i in range(3) for tie in (f"layers.{i}.2.weight ← layers.{i}.1.weightᵀ", f"layers.{i}.3.weight ← layers.{i}.0.weightᵀ")
    ]
    assert_hit(net, X, *expected, kind="attention")


# ---- misses: a rival, a stream, a gate


def test_two_matrices_that_fit() -> None:
    reason = r"b\.weight could use the weight of any of a\.weight, c\.weight"
    for forward in (lambda m, x: m.b((m.a(x) + m.c(x)).relu()), lambda m, x: m.b(m.a(x).relu() + m.c(x).tanh())):
        assert_miss(ffn(forward, c=linear(D, H)), X, reason, weights=("a.weight", "c.weight", "b.weight"))


def test_condition_as_wide_as_the_model() -> None:
    reason = r"b\.weight could use the weight of any of m\.weight, a\.weight"
    assert_miss(ffn(film, m=linear(D, 2 * H)), (X, torch.randn(2, 6, D)), reason)


def test_two_values_that_fit() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        v = heads(m.v(x)) + 0.5 * heads(m.w(x))
        return m.o(F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), v).transpose(1, 2).flatten(2))

    plan = pe_fx.plan(Net(forward, **{name: linear(D, D) for name in "qkvwo"}), X)
    assert ties(plan) == ["o.weight ← q.weightᵀ"]
    assert "values could use the weight of the keys in several ways: k.weight, v.weight, w.weight" in plan.explain()


def test_residual_stream_is_no_modulation() -> None:
    """What follows the sum is the next block, though the shapes fit."""
    net = Net(lambda m, x: m.c(F.gelu(x + m.b(m.a(x).relu()))), a=linear(D, H), b=linear(H, D), c=linear(D, H))
    assert ties(pe_fx.plan(net, X)) == [TIE]
    net = Net(lambda m, x: m.c((x + m.b(x)).relu()), b=linear(D, D), c=linear(D, D))
    assert not pe_fx.plan(net, X).ties


@pytest.mark.parametrize("gate", [lambda m, x: m.g(x.mean(1, keepdim=True)), lambda m, x: m.g(x)], ids=["pooled", "at each position"])
def test_gate_is_no_partner_of_the_next_weight(gate: Forward) -> None:
    net = Net(lambda m, x: m.o((y := m.c(x.mT).mT) * gate(m, y).sigmoid()), c=nn.Conv1d(D, D, 3, padding=1), g=linear(D, D), o=linear(D, D))
    assert not pe_fx.plan(net, X).ties


def test_gate_made_of_a_condition_is_no_partner_of_the_next_weight() -> None:
    net = Net(lambda m, x, c: m.o(x * m.g(c).sigmoid()), g=linear(D, D), o=linear(D, D))
    assert not pe_fx.plan(net, (X, torch.randn(2, 1, D))).ties


def test_modulated_value_that_is_read_elsewhere() -> None:
    net = ffn(lambda m, x, mask: (h := m.a(x).relu() * mask, m.b(h)))
    assert_miss(net, (X, MASK), r"the value between a\.weight and b\.weight is read elsewhere too")


def test_value_joined_beside_the_channels() -> None:
    net = Net(lambda m, x, y: m.b(torch.cat((m.a(x).relu(), y), -1)), a=linear(D, H), b=linear(H + 3, D))
    assert not pe_fx.plan(net, (X, torch.randn(2, 6, 3))).ties


def test_residual_stream_is_no_query() -> None:
    """The queries are what the blocks before have added up: the last of these fits, and is no projection of theirs."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = x + m.b(x.tanh())
        y = F.scaled_dot_product_attention(heads(x), heads(m.k(x)), heads(m.v(x)))
        return x + m.o(y.transpose(1, 2).flatten(2))

    plan = pe_fx.plan(Net(forward, **{name: linear(D, D) for name in "bkvo"}), X)
    assert ties(plan) == ["v.weight ← k.weightᵀ"]
    assert re.search("the queries of .* are not made by one weight alone", plan.explain())


def test_queries_that_a_residual_block_makes() -> None:
    """As GCViT's global queries: the block's last weight fits, but the queries are a stream to which it adds."""

    def forward(m: Net, x: Tensor, y: Tensor) -> Tensor:
        y = y + m.b(m.c(y.mT).mT.relu())
        return m.o(F.scaled_dot_product_attention(heads(y), heads(m.k(x)), heads(m.v(x))).transpose(1, 2).flatten(2))

    net = Net(forward, c=nn.Conv1d(D, D, 3, padding=1), **{name: linear(D, D) for name in "bkvo"})
    assert ties(pe_fx.plan(net, (X, torch.randn(2, 6, D)))) == ["v.weight ← k.weightᵀ"]


def test_unknown_operation_beside_a_modulation() -> None:
    net = ffn(lambda m, x, mask: m.b((m.a(x) * mask).cumsum(-1).relu()))
    assert_miss(net, (X, MASK), r"between a\.weight and b\.weight the value passes cumsum")


# ---- memory that is written and read back


class Cached(nn.Module):
    """Attention with a static cache."""

    def __init__(self, write: Callable[..., Tensor]) -> None:
        super().__init__()
        self.write = write
        for name in "qkvo":
            setattr(self, name, linear(D, D))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, 2, 10, 4))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k, v = heads(self.q(x)), self.write(self.keys, heads(self.k(x)), at), self.write(self.values, heads(self.v(x)), at)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def by_position(memory: Tensor, new: Tensor, at: Tensor) -> Tensor:
    memory[:, :, at] = new
    return memory


def by_slice(memory: Tensor, new: Tensor, at: Tensor) -> Tensor:
    memory[:, :, : new.shape[2]] = new
    return memory[:, :, : new.shape[2]]


def by_slice_into_all(memory: Tensor, new: Tensor, at: Tensor) -> Tensor:
    memory[:, :, : new.shape[2]] = new
    return memory


def in_other_heads(memory: Tensor, new: Tensor, at: Tensor) -> Tensor:
    memory[:, [1, 0], : new.shape[2]] = new
    return memory


@pytest.mark.parametrize(
    "write",
    [
        by_position,
        by_slice,
        by_slice_into_all,
        lambda memory, new, at: memory.index_copy_(2, at, new),
        lambda memory, new, at: memory.index_copy(2, at, new),
        lambda memory, new, at: torch.cat((memory, new), 2),
    ],
    ids=["positions", "slice", "slice into all", "index_copy_", "index_copy", "joined"],
)
def test_what_is_written_into_a_cache_is_read(write: Callable[..., Tensor]) -> None:
    net, inputs = Cached(write), (X, torch.arange(6))
    with torch.no_grad():
        plan = pe_fx.plan(net, inputs)
    assert ties(plan) == list(SITE)
    net.requires_grad_(False)  # a buffer that was written to is no leaf
    assert_equals_twin(net, pe_fx.apply(net, plan), plan, inputs)


def test_cache_in_another_order() -> None:
    with torch.no_grad():
        plan = pe_fx.plan(Cached(in_other_heads), (X, torch.arange(6)))
    assert ties(plan) == ["o.weight ← q.weightᵀ"]
    assert "the keys of" in plan.explain()


def test_keys_and_values_of_earlier_steps() -> None:
    net = attention(lambda m, q, k, v, keys, values: (q, torch.cat((keys, k), 2), torch.cat((values, v), 2)))
    assert_hit(net, (X, torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)), *SITE, kind="attention")
