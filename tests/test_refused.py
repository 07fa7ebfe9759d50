"""What looks like a site and is none: values written, read or reordered where it is easily overlooked, weights not applied as they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_hit, assert_miss, linear, ties, weight
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import prune

import pe_fx

D, H = 8, 16
X = torch.randn(3, 5, D)
TIE = "fc2.weight ← fc1.weightᵀ"
Forward = Callable[[Net, Tensor], Any]


def mlp(forward: Forward, **members: nn.Module | Tensor) -> Net:
    return Net(forward, fc1=linear(D, H), fc2=linear(H, D), **members)


def glu(forward: Forward) -> Net:
    return Net(forward, gate=linear(D, H), up=linear(D, H), down=linear(H, D))


def bare(forward: Forward) -> Net:
    return Net(forward, a=weight(H, D), b=weight(D, H), left=weight(H, 2), right=weight(2, D))


def heads(value: Tensor) -> Tensor:
    return value.unflatten(-1, (2, -1)).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((heads(q) @ heads(k).mT).softmax(-1) @ heads(v)).transpose(1, 2).flatten(-2)


def named(**forwards: Forward) -> Any:
    return pytest.mark.parametrize("forward", [pytest.param(forward, id=name) for name, forward in forwards.items()])


# ---- written in place


def changes_in_a_slice(m: Net, x: Tensor) -> Tensor:
    h = m.fc1(x).relu().clone()
    h[:, 0] = h[:, 1].flip(-1)
    return m.fc2(h)


def activates_in_a_slice(m: Net, x: Tensor) -> Tensor:
    h = m.fc1(x)
    h[:, 1:].relu_()
    return m.fc2(h[:, 0])


@named(changes_in_a_slice=changes_in_a_slice, activates_in_a_slice=activates_in_a_slice)
def test_a_value_written_in_part(forward: Forward) -> None:
    assert_miss(mlp(forward), X, "passes a write in place to a part of it")


def test_a_value_overwritten_in_another_order() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.fc1(x).relu().clone()
        h[:] = h.flip(-1)
        return m.fc2(h)

    assert_miss(mlp(forward), X, "another order")


def test_an_activation_of_a_copy() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.fc1(x)
        h.flip(1).relu_()
        return m.fc2(h)

    assert_miss(mlp(forward), X, "no nonlinearity")


def test_an_earlier_view_of_what_is_written() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.fc1(x).relu().clone()
        seen = h.transpose(1, 2)
        h.copy_(h.flip(-1))
        return m.fc2(seen.transpose(1, 2))

    assert_miss(mlp(forward), X, "passes a write in place to a part of it")


def test_keys_beside_a_gate_activated_in_place_are_not_the_gate() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        both = m.both(x)
        gate = both[..., D:]
        gate.sigmoid_()
        return m.proj(attended(m.q(x), both[..., :D], m.v(x)) * gate)

    net = Net(forward, q=linear(D, D), both=linear(D, 2 * D), v=linear(D, D), proj=linear(D, D))
    assert ties(pe_fx.plan(net, X)) == ["proj.weight ← q.weightᵀ"]


class Pairs(nn.Module):
    def __init__(self, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.changes = (first, second)
        self.blocks = nn.ModuleList(nn.ModuleList([linear(D, H), linear(H, D)]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for (fc1, fc2), change in zip(self.blocks, self.changes, strict=True):  # type: ignore[misc]
            x = x + fc2(change(fc1(x)))
        return x


def unsqueezes_in_place(h: Tensor) -> Tensor:
    h.unsqueeze_(1)
    return h.relu().squeeze(1)


def transposes_in_place(h: Tensor) -> Tensor:
    h.transpose_(1, 2)
    return h.relu().transpose(1, 2)


@pytest.mark.parametrize("first", [unsqueezes_in_place, transposes_in_place], ids=lambda first: first.__name__)
def test_a_view_in_place_changes_no_other_block(first: Callable[[Tensor], Tensor]) -> None:
    expected = [f"blocks.{i}.1.weight ← blocks.{i}.0.weightᵀ" for i in range(2)]
    assert_hit(Pairs(first, torch.relu), X, *expected, kind="mlp")
    assert_hit(Pairs(torch.relu, first), X, *expected, kind="mlp")


# ---- another order, or several at once


@named(
    sum=lambda m, x: m.fc2((h := m.fc1(x).relu()) + h.roll(1, -1)),
    sum_the_other_way=lambda m, x: m.fc2((h := m.fc1(x).relu()).roll(1, -1) + h),
    difference=lambda m, x: m.fc2((h := m.fc1(x).relu()) - h.roll(1, -1)),
    product=lambda m, x: m.fc2((h := m.fc1(x).relu()) * h.flip(-1)),
)
def test_channels_combined_with_others(forward: Forward) -> None:
    assert_miss(mlp(forward), X, "combined with one another before fc2.weight")


def test_a_sum_of_the_hidden_value_with_its_square() -> None:
    assert_hit(mlp(lambda m, x: m.fc2((h := m.fc1(x).relu()) + h * h)), X, TIE, kind="mlp")


def test_channels_combined_in_a_gated_unit() -> None:
    net = glu(lambda m, x: m.down(m.gate(x).sigmoid() * ((up := m.up(x)) + up.roll(1, -1))))
    assert_miss(net, X, "combined with one another before down.weight", kind="glu")


def test_padding_that_shifts_channels() -> None:
    assert_miss(mlp(lambda m, x: m.fc2(F.pad(m.fc1(x).relu(), (1, -1)))), X, "another order")
    assert_hit(mlp(lambda m, x: m.fc2(F.pad(m.fc1(x).relu(), (0, 0, 1, -1)))), X, TIE, kind="mlp")


def test_strides_by_hand() -> None:
    net = Net(lambda m, x: m.fc2(m.fc1(x).relu().as_strided((1, H), (64, 1))), fc1=nn.Conv1d(D, H, 1), fc2=linear(H, D))
    assert_miss(net, torch.randn(2, D, 4), "as_strided, an operation that pe_fx does not follow")


# ---- read elsewhere


@dataclass(slots=True)
class Slots:
    hidden: Tensor


@named(
    rows_of_a_table=lambda m, x: m.fc2(h := m.fc1(x).relu()) + m.table[h.argmax(-1)],
    random_bits=lambda m, x: m.fc2((h := m.fc1(x)).relu()) + torch.bernoulli(h.sigmoid()).mean(-1, keepdim=True),
    scale_of_a_norm=lambda m, x: F.layer_norm(m.fc2(h := m.fc1(x).relu()), (D,), weight=h.mean((0, 1))[:D]),
    returned_in_slots=lambda m, x: (m.fc2(h := m.fc1(x).relu()), Slots(h)),
    returned_in_a_deque=lambda m, x: (m.fc2(h := m.fc1(x).relu()), deque([h])),
    another_attention=lambda m, x: m.fc2(h := m.fc1(x).relu()) + flex_attention(*[heads(h[..., :D])] * 3).transpose(1, 2).flatten(-2),
)
def test_hidden_value_read_elsewhere(forward: Forward) -> None:
    assert_miss(mlp(forward, table=weight(H, D)).requires_grad_(False), X, "is read elsewhere too")


def test_hidden_value_kept_in_a_buffer() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.fc1(x).relu()
        y = m.fc2(h) + m.memory[:D]
        m.memory.copy_(h.detach().mean((0, 1)))
        return y

    net = mlp(forward)
    net.register_buffer("memory", torch.zeros(H))
    assert_miss(net, X, "read elsewhere too: relu by detach")


def test_output_that_scales_a_norm() -> None:
    net = mlp(lambda m, x: F.batch_norm(x.mT, None, None, weight=m.fc2(m.fc1(x[0, :1]).relu())[0], training=True))
    assert_hit(net, X, TIE, kind="mlp")


# ---- subgraphs


def test_a_block_before_an_operator_with_a_subgraph() -> None:
    net = mlp(lambda m, x: flex_attention(*[heads(x + m.fc2(m.fc1(x).relu()))] * 3)).requires_grad_(False)
    assert ties(pe_fx.plan(net, X)) == [TIE]


def test_the_body_of_a_loop() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        def step(carried: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            after = carried.roll(1, -1) + row @ m.w
            return after, after.tanh()

        return m.fc2(scan(step, torch.zeros(5, H), x)[1])

    assert not pe_fx.plan(Net(forward, w=weight(D, H), fc2=linear(H, D)), X).sites


# ---- no nonlinearity


@named(
    padding_mask=lambda m, x: m.fc2(torch.where(torch.ones(3, 5, 1) > 0, m.fc1(x), 0.0)),
    dropout_by_hand=lambda m, x: m.fc2(torch.where(torch.rand_like(h := m.fc1(x)) > 0.2, h / 0.8, 0.0)),
    scaled_and_added=lambda m, x: m.fc2(torch.addcmul(h := m.fc1(x), h, m.scale)),
    finite=lambda m, x: m.fc2(m.fc1(x).nan_to_num()),
)
def test_nothing_nonlinear_in_between(forward: Forward) -> None:
    assert_miss(mlp(forward, scale=weight(H)), X, "no nonlinearity stands between")


def test_a_choice_by_the_value_itself() -> None:
    assert_hit(mlp(lambda m, x: m.fc2(torch.where((h := m.fc1(x)) > 0, h, 0.1 * h))), X, TIE, kind="mlp")


def test_a_masked_gate_is_no_activation() -> None:
    net = glu(lambda m, x: m.down(torch.where(torch.ones(3, 5, 1) > 0, m.gate(x), 0.0) * m.up(x)))
    assert_miss(net, X, "neither factor before down.weight passed an activation", kind="glu")


# ---- weights that are not applied as they are


@named(
    its_own_bias=lambda m, x: F.linear(F.linear(x, m.a).relu(), m.b, m.b.square().sum(1)),
    its_mean=lambda m, x: F.linear(F.linear(x, m.a).relu(), m.b.mean(1, keepdim=True).expand(D, H)),
    half_of_it=lambda m, x: F.linear(F.linear(x, torch.where(torch.arange(H)[:, None] < D, m.a, 0.0)).relu(), m.b),
    with_an_adapter=lambda m, x: F.linear(F.linear(x, m.a + m.left @ m.right).relu(), m.b),
)
def test_a_weight_read_in_another_way(forward: Forward) -> None:
    assert_miss(bare(forward), X, r"^[ab] is (read by|applied through)")


def test_pruned_layers() -> None:
    net = nn.Sequential(linear(D, H), nn.ReLU(), linear(H, D))
    for layer in (net[0], net[2]):
        prune.random_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]
    assert_miss(net, X, "applied through mul")


# ---- attention


def test_a_classifier_behind_pooled_attention_is_no_output_projection() -> None:
    net = Net(lambda m, x: m.head(attended(m.q(x), m.k(x), m.v(x)).mean(1)), **{name: linear(D, D) for name in ("q", "k", "v", "head")})
    assert ties(pe_fx.plan(net, X)) == ["v.weight ← k.weightᵀ"]


def test_attentions_that_share_keys_and_values() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        k, v = m.k(x), m.v(x)
        y = x + m.out1(attended(m.q1(x), k, v))
        return y + m.out2(attended(m.q2(y), k, v))

    net = Net(forward, **{name: linear(D, D) for name in ("q1", "q2", "k", "v", "out1", "out2")})
    expected = ["out1.weight ← q1.weightᵀ", "out2.weight ← q2.weightᵀ", "v.weight ← k.weightᵀ"]
    tied = assert_hit(net, X, *expected, kind="attention")
    assert not pe_fx.plan(tied, X).sites


def test_attentions_that_share_all_but_their_outputs() -> None:
    def forward(m: Net, x: Tensor, y: Tensor) -> Tensor:
        return m.out1(attended(m.q(x), m.k(x), m.v(x))) + m.out2(attended(m.q(y), m.k(x), m.v(x)))

    net = Net(forward, **{name: linear(D, D) for name in ("q", "k", "v", "out1", "out2")})
    expected = ["out1.weight ← q.weightᵀ", "out2.weight ← q.weightᵀ", "v.weight ← k.weightᵀ"]
    tied = assert_hit(net, (X, X + 1), *expected, kind="attention")
    assert not pe_fx.plan(tied, (X, X + 1)).sites


# ---- models that hold activations


def test_a_model_that_kept_an_activation() -> None:
    net = nn.Sequential(linear(D, H), nn.ReLU(), linear(H, D))
    kept: dict[str, Tensor] = {}
    net.kept = kept  # type: ignore[assignment]
    net[1].register_forward_hook(lambda module, inputs, output: kept.__setitem__("hidden", output))
    net(X)
    assert ties(pe_fx.plan(net, X)) == ["2.weight ← 0.weightᵀ"]


def test_the_largest_over_positions() -> None:
    assert_hit(mlp(lambda m, x: m.fc2(m.fc1(x).relu().max(1).values)), X, TIE, kind="mlp")
