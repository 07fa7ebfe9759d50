"""Sites share their matrices with so many neighbours, tied, or as they are and each matrix with its like."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_equals_twin, assert_hit, assert_idempotent, blocks, linear, mlp, ties, weight
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pe_fx
from pe_fx import PeFxError, Plan, checkpoint
from pe_fx.graph.flow import Flow
from pe_fx.ties import Block, Miss, Site, Tie

X = torch.randn(2, 3, 8)
PAIRS = {"mlp": 2}
UNTIED: dict[str, Any] = {"rules": (), "share": PAIRS}


def chain(*members: nn.Module) -> nn.Module:
    """Residual blocks."""

    def forward(m: Net, x: Tensor) -> Tensor:
        for block in m.blocks:
            x = x + block(x)
        return x

    return Net(forward, blocks=nn.ModuleList(members))


def matrices(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


# ---- tied


def test_a_tied_stage_is_cut_into_groups_the_last_of_which_may_be_smaller() -> None:
    assert_hit(
        chain(*(mlp() for _ in range(5))),
        X,
        "blocks.0.2.weight ← blocks.0.0.weightᵀ",
        "blocks.1.0.weight ← blocks.0.0.weight",
        "blocks.1.2.weight ← blocks.0.0.weightᵀ",
        "blocks.2.2.weight ← blocks.2.0.weightᵀ",
        "blocks.3.0.weight ← blocks.2.0.weight",
        "blocks.3.2.weight ← blocks.2.0.weightᵀ",
        "blocks.4.2.weight ← blocks.4.0.weightᵀ",
        kind="mlp",
        share=PAIRS,
    )


@pytest.mark.parametrize("mix", ["none", "signed"])
def test_a_tie_that_is_shared_in_pairs_is_a_quarter(mix: str) -> None:
    dense = chain(*(mlp() for _ in range(4)))
    tied = pe_fx.transform(dense, X, share=PAIRS, mix=mix)
    assert 4 * matrices(tied) == matrices(dense)
    assert_equals_twin(dense, tied, pe_fx.plan(dense, X, share=PAIRS, mix=mix), X)


def test_each_block_of_a_group_is_mixed_by_a_seed_of_its_own() -> None:
    made = pe_fx.plan(blocks(4), X, share=PAIRS, mix="signed").ties
    assert len({tie.seed for tie in made if tie.transposed}) == 4


class Bottleneck(nn.Module):
    def __init__(self, inputs: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(*sides, k, padding=k // 2) for *sides, k in ((inputs, 4, 1), (4, 4, 3), (4, 16, 1)))
        self.short = nn.Conv2d(inputs, 16, 1) if inputs != 16 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(x).relu()).relu()) + self.short(x)


def test_the_first_block_of_a_stage_counts_as_one_of_its_group() -> None:
    net = nn.Sequential(Bottleneck(8), *(Bottleneck() for _ in range(3)))
    made = pe_fx.plan(net, torch.randn(2, 8, 5, 5), share={"bottleneck": 2}, entry="slice")
    assert ties(made) == [
        "0.conv1.weight ← 0.conv3.weight[0:8]ᵀ",
        "1.conv1.weight ← 0.conv3.weightᵀ",
        "1.conv3.weight ← 0.conv3.weight",
        "2.conv3.weight ← 2.conv1.weightᵀ",
        "3.conv1.weight ← 2.conv1.weight",
        "3.conv3.weight ← 2.conv1.weightᵀ",
    ]
    assert pe_fx.verify(pe_fx.apply(net, made), torch.randn(2, 8, 5, 5))


# ---- shared without being tied


def test_neighbours_share_each_matrix_and_keep_what_else_they_have() -> None:
    dense = chain(*(mlp() for _ in range(5)))
    tied = assert_hit(
        dense,
        X,
        "blocks.1.0.weight ← blocks.0.0.weight",
        "blocks.1.2.weight ← blocks.0.2.weight",
        "blocks.3.0.weight ← blocks.2.0.weight",
        "blocks.3.2.weight ← blocks.2.2.weight",
        kind="mlp",
        **UNTIED,
    )
    assert {f"blocks.{i}.{layer}.bias" for i in range(5) for layer in (0, 2)} <= set(tied.state_dict())


def test_it_is_the_dense_model_whose_layers_hold_the_same_parameter() -> None:
    dense = chain(*(mlp() for _ in range(4)))
    tied = pe_fx.transform(dense, X, **UNTIED)
    for i in (1, 3):
        for layer in (0, 2):
            dense.blocks[i][layer].weight = dense.blocks[i - 1][layer].weight
    for model in (dense, tied):
        model(X).square().sum().backward()
    torch.testing.assert_close(tied(X), dense(X))
    expected = {name: parameter.grad for name, parameter in dense.named_parameters()}
    assert {name for name, _ in tied.named_parameters()} == expected.keys()
    for name, parameter in tied.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(8, 16), linear(8, 16), linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Of `groups` heads of keys and values for four of queries; `fused`: by one weight."""

    def __init__(self, groups: int = 4, fused: bool = False) -> None:
        super().__init__()
        self.sizes = (8, 2 * groups, 2 * groups)
        names = ("qkv",) if fused else ("q", "k", "v")
        for name, size in zip(names, (sum(self.sizes),) if fused else self.sizes, strict=True):
            setattr(self, name, linear(8, size))
        self.proj = linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.sizes, -1) if hasattr(self, "qkv") else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class Encoder(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


EVERY: dict[str, tuple[str, Callable[[], nn.Module], list[str]]] = {
    "gated": ("glu", Unit, ["gate.weight", "up.weight", "down.weight"]),
    "attention": ("attention", Attention, ["q.weight", "k.weight", "v.weight", "proj.weight"]),
    "grouped queries": ("attention", lambda: Attention(2), ["q.weight", "k.weight", "v.weight", "proj.weight"]),
    "one weight": ("attention", lambda: Attention(fused=True), ["qkv.weight", "proj.weight"]),
    "one weight, grouped": ("attention", lambda: Attention(2, fused=True), ["qkv.weight", "proj.weight"]),
    "PyTorch's": ("attention", lambda: Encoder(8, 2, batch_first=True), ["in_proj_weight", "out_proj.weight"]),
}


@pytest.mark.parametrize("case", EVERY)
def test_every_matrix_of_a_site_is_shared(case: str) -> None:
    kind, build, names = EVERY[case]
    net = chain(build(), build(), build())
    expected = [f"blocks.1.{name} ← blocks.0.{name}" for name in names]
    assert_hit(net, X, *expected, kind=kind, rules=(), share={kind: 2})
    assert pe_fx.plan(net, X, rules=(), share={kind: 2}).explain() == "no misses"


def test_bottlenecks_that_are_not_tied_share_both_convolutions() -> None:
    net = nn.Sequential(Bottleneck(), Bottleneck(), Bottleneck())
    expected = [f"{i}.{conv}.weight ← 0.{conv}.weight" for i in (1, 2) for conv in ("conv1", "conv3")]
    assert_hit(net, torch.randn(2, 16, 5, 5), *expected, kind="bottleneck", rules=(), share=("bottleneck",))


class Parallel(nn.Module):
    """Attention and a gated unit whose first matrices are rows of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.proj, self.down = linear(8, 24 + 32), linear(8, 8), linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate, up = self.inner(x).split([8, 8, 8, 16, 16], -1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(attended) + self.down(F.silu(gate) * up)


def test_rows_of_a_weight_that_another_kind_reads_are_left_alone() -> None:
    net = chain(Parallel(), Parallel())
    rows = ["blocks.1.inner.weight[0:24] ← blocks.0.inner.weight[0:24]", "blocks.1.proj.weight ← blocks.0.proj.weight"]
    tied = assert_hit(net, X, *rows, kind="attention", rules=(), share=("attention",))
    assert tied.blocks[1].inner.weight_kept.shape == (32, 8)


def test_each_kind_is_tied_or_shared_by_itself() -> None:
    net = chain(Attention(), mlp(), Attention(), mlp())
    made = pe_fx.plan(net, X, rules=["mlp"], share={"attention": 2})
    shared = [f"blocks.2.{name}.weight ← blocks.0.{name}.weight" for name in ("q", "k", "v", "proj")]
    assert ties(made) == [*shared, "blocks.1.2.weight ← blocks.1.0.weightᵀ", "blocks.3.2.weight ← blocks.3.0.weightᵀ"]
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


def test_sharing_takes_no_rows_that_are_tied() -> None:
    net = chain(Parallel(), Parallel())
    made = pe_fx.plan(net, X, rules=["glu"], share={"attention": 2, "glu": 2})
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)
    assert {site.kind for site in made.sites} == {"attention", "glu"}


def layers(*own: int) -> nn.Module:
    """Attentions one after another, and which keys and values each of them uses."""

    def forward(m: Net, x: Tensor) -> Tensor:
        for q, i, proj in zip(m.q, own, m.proj, strict=True):
            parts = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, m.k[i], m.v[i]))
            x = x + proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x

    counts = {"q": len(own), "k": max(own) + 1, "v": max(own) + 1, "proj": len(own)}
    return Net(forward, **{name: nn.ModuleList(linear(8, 8) for _ in range(count)) for name, count in counts.items()})


@pytest.mark.parametrize("share", [{"attention": 2}, {"attention": 3}, {"attention": "all"}], ids=str)
def test_keys_and_values_that_layers_have_in_common_are_shared_once(share: Any) -> None:
    net = layers(0, 0, 1, 1)
    made = pe_fx.plan(net, X, rules=(), share=share)
    assert len(ties(made)) == len(set(ties(made))) >= 4
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


def test_a_matrix_that_is_shared_already_is_no_source() -> None:
    """The third layer has the keys of the second, which are those of the first now."""
    net = layers(0, 1, 1, 2)
    made = pe_fx.plan(net, X, rules=(), share={"attention": 2})
    assert {tie.target for tie in made.ties} == {"q.1.weight", "k.1.weight", "v.1.weight", "proj.1.weight"}
    assert "k.1.weight belongs to another site already" in made.explain()
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


class SharedQK:
    """Keys are made by the matrix of the queries."""

    kind = "shared_qk"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        for i in (0, 1):
            q, k = (Block.whole(f"{name}.{i}.weight", (8, 8)) for name in ("q", "k"))
            yield Site(self.kind, "", (q.name, k.name), (Tie(into=k, of=q, transposed=False),))


def test_what_another_rule_ties_is_not_shared() -> None:
    net = layers(0, 1)
    made = pe_fx.plan(net, X, rules=[SharedQK()], share={"attention": 2})
    assert ties(made) == ["k.0.weight ← q.0.weight", "k.1.weight ← q.1.weight"]
    assert "q.1.weight belongs to another site already" in made.explain()
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


# ---- what the option takes


@pytest.mark.parametrize("rules", [["mlp"], ()], ids=["tied", "shared"])
def test_a_name_alone_means_all(rules: Any) -> None:
    plans = [pe_fx.plan(blocks(3), X, rules=rules, share=share) for share in (["mlp"], {"mlp": None}, {"mlp": "all"}, {"mlp": 3})]
    assert len({str(plan) for plan in plans}) == 1
    assert plans[0].options["share"] == {"mlp": "all"}
    assert {site.stage for site in plans[0].sites} == {"blocks.0.0.weight"}


def test_groups_of_one_share_nothing() -> None:
    assert ties(pe_fx.plan(blocks(3), X, share={"mlp": 1})) == ties(pe_fx.plan(blocks(3), X))
    assert not pe_fx.plan(blocks(3), X, rules=(), share={"mlp": 1}).sites


def test_by_default_bottlenecks_share_where_they_are_tied() -> None:
    net, x = nn.Sequential(Bottleneck(), Bottleneck()), torch.randn(2, 16, 5, 5)
    assert pe_fx.plan(net, x).options["share"] == {"bottleneck": "all"}
    assert len(pe_fx.plan(net, x).ties) == 3
    assert pe_fx.plan(net, x, rules=["mlp"]).options["share"] == {}
    assert not pe_fx.plan(net, x, rules=["mlp"]).sites


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ({"mlp": 0}, r"share=\{'mlp': 0\}: 0 is no number of neighbours; give 2 or more, or 'all'"),
        ({"mlp": "two"}, "'two' is no number of neighbours"),
        ({"mlp": True}, "True is no number of neighbours"),
        ({"mlp": 2.0}, "2.0 is no number of neighbours"),
        ({"mlps": 2}, "share='mlps' is unknown; choose from .*'mlp'"),
        ("mlp", r"share=\('mlp',\), or have a size for each: share=\{'mlp': 2\}"),
    ],
)
def test_wrong_values(share: Any, message: str) -> None:
    with pytest.raises(PeFxError, match=message):
        pe_fx.plan(blocks(2), X, share=share)


def test_the_warning_names_the_call_with_its_groups() -> None:
    with pytest.warns(pe_fx.NoSitesWarning, match=r"pe_fx.plan\(model, example_inputs, rules=\(\), share=\{'mlp': 2\}\)"):
        pe_fx.transform(chain(mlp(), mlp(12)), X, **UNTIED)


# ---- what ends a group


def frozen(net: nn.Module) -> None:
    net.blocks[1][0].weight.requires_grad_(False)


def frozen_last(net: nn.Module) -> None:
    net.blocks[1][2].weight.requires_grad_(False)


def parametrized(net: nn.Module) -> None:
    parametrize.register_parametrization(net.blocks[1][2], "weight", nn.Identity())


def held_twice(net: nn.Module) -> None:
    net.blocks[1].again = net.blocks[1][0].weight


def other_shape(net: nn.Module) -> None:
    net.blocks[1] = mlp(12)


ENDS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "shape": (other_shape, r"blocks.1.0.weight is \(12, 8\), blocks.0.0.weight is \(16, 8\): only matrices of one shape are shared"),
    "frozen": (frozen, "blocks.1.0.weight is frozen, blocks.0.0.weight is trained"),
    "frozen last": (frozen_last, "blocks.1.2.weight is frozen, blocks.0.2.weight is trained"),
    "parametrized": (parametrized, "is parametrized"),
    "held twice": (held_twice, "is one parameter registered in 2 places"),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_group_ends_where_a_neighbour_differs_and_a_miss_says_why(case: str) -> None:
    change, reason = ENDS[case]
    net = chain(*(mlp() for _ in range(4)))
    change(net)
    made = pe_fx.plan(net, X, **UNTIED)
    assert not any(tie.target.startswith("blocks.1.") or tie.source.startswith("blocks.0.") for tie in made.ties)
    assert "blocks.3.0.weight ← blocks.2.0.weight" in ties(made) or case == "held twice"
    pe_fx.apply(net, made)
    miss = next(miss for miss in made.misses if re.search(reason, miss.reason))
    assert (miss.kind, miss.name) == ("mlp", "blocks.1")


def test_what_is_frozen_alike_is_shared() -> None:
    net = chain(*(mlp() for _ in range(4)))
    for i in (0, 1):
        net.blocks[i].requires_grad_(False)
    assert_hit(net, X, *(f"blocks.{i + 1}.{n}.weight ← blocks.{i}.{n}.weight" for i in (0, 2) for n in (0, 2)), kind="mlp", **UNTIED)


def test_a_site_that_cannot_be_tied_can_be_shared() -> None:
    """A frozen matrix beside a trained one, in both."""
    net = chain(mlp(), mlp())
    for block in net.blocks:
        block[0].weight.requires_grad_(False)
    assert not pe_fx.plan(net, X).sites
    assert_hit(net, X, *(f"blocks.1.{n}.weight ← blocks.0.{n}.weight" for n in (0, 2)), kind="mlp", **UNTIED)


def test_another_dtype_ends_a_group() -> None:
    net = Net(lambda m, x: m.b(m.a(x).double()), a=mlp(), b=mlp().double())
    made = pe_fx.plan(net, X, **UNTIED)
    assert not made.sites
    assert "b.0.weight is float64, a.0.weight is float32" in made.explain()


def test_rows_in_another_order_end_a_group() -> None:
    class Reversed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            v, k, q = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in self.qkv(x).split(self.sizes, -1))
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    made = pe_fx.plan(chain(Attention(fused=True), Reversed(fused=True)), X, rules=(), share={"attention": 2})
    assert not made.sites
    assert "blocks.1.qkv.weight and what goes with it are not arranged as blocks.0.qkv.weight is" in made.explain()


def test_two_towers_do_not_share_with_each_other() -> None:
    net = Net(lambda m, x: m.a(x) + m.b(x), a=chain(mlp(), mlp()), b=chain(mlp(), mlp()))
    made = pe_fx.plan(net, X, **UNTIED)
    assert len(made.ties) == 4
    assert all(tie.source[0] == tie.target[0] for tie in made.ties)
    assert not made.misses


def test_include_chooses_who_shares() -> None:
    made = pe_fx.plan(blocks(4), X, include=["blocks.1*", "blocks.2*"], **UNTIED)
    assert ties(made) == ["blocks.2.0.weight ← blocks.1.0.weight", "blocks.2.2.weight ← blocks.1.2.weight"]


# ---- the plan, and what reads it


OPTIONS: dict[str, dict[str, Any]] = {
    "tied": {"share": PAIRS},
    "signed": {"share": PAIRS, "mix": "signed", "gain": 0.5},
    "shared": UNTIED,
    "shared by all": {"rules": (), "share": ("mlp",)},
}
every_way = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@every_way
def test_twice_is_once(options: dict[str, Any]) -> None:
    """Also where the last group is smaller, and its only block has the shape of all."""
    assert_idempotent(blocks(5), X, **options)


@every_way
def test_json_untie_and_verify(options: dict[str, Any]) -> None:
    dense = blocks(5)
    made = pe_fx.plan(dense, X, **options)
    again = Plan.from_json(made.to_json())
    assert (again, again.options) == (made, made.options)
    tied = pe_fx.apply(dense, again)
    assert sum(parameter.numel() for parameter in tied.parameters()) == made.params_after
    assert pe_fx.verify(tied, X)
    twin = pe_fx.untie(tied)
    torch.testing.assert_close(twin(X), tied(X))
    blocks(5).load_state_dict(twin.state_dict())
    assert torch.equal(copy.deepcopy(tied)(X), tied(X))


def test_a_plan_of_before_has_a_list() -> None:
    body = json.loads(pe_fx.plan(blocks(2), X, share=["mlp"]).to_json())
    body["options"]["share"] = ["mlp"]
    old = Plan.from_json(json.dumps(body))
    assert old.options["share"] == ("mlp",)
    assert pe_fx.verify(pe_fx.apply(blocks(2), old), X)


@every_way
def test_checkpoints(options: dict[str, Any], tmp_path: Path) -> None:
    tied = pe_fx.transform(blocks(5), X, **options)
    checkpoint.save(tied, tmp_path / "tied.safetensors")
    loaded = checkpoint.load(tmp_path / "tied.safetensors", blocks(5))
    assert torch.equal(loaded(X), tied(X))
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in tied.named_parameters()}


@every_way
def test_export(options: dict[str, Any]) -> None:
    tied = pe_fx.transform(blocks(3), X, **options)
    program = torch.export.export(tied, (X,))
    torch.testing.assert_close(program.module()(X), tied(X))
    assert set(program.state_dict) == set(tied.state_dict())


def test_mean_is_that_of_the_group() -> None:
    dense = blocks(3)
    shared = pe_fx.transform(dense, X, init="mean", **UNTIED)
    for layer in (0, 2):
        own = [block[layer].weight for block in dense.blocks]
        torch.testing.assert_close(shared.blocks[0][layer].weight, (own[0] + own[1]) / 2)
        assert torch.equal(shared.blocks[2][layer].weight, own[2])


def test_reset_knows_the_inputs_of_a_weight_whatever_its_layout() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return F.gelu(F.gelu(x @ m.a0) @ m.b0 @ m.a1) @ m.b1

    net = Net(forward, a0=weight(8, 512), b0=weight(512, 8), a1=weight(8, 512), b1=weight(512, 8))
    shared = pe_fx.transform(net, X, init="reset", **UNTIED)
    assert float(shared.a0.detach().std()) == pytest.approx(8**-0.5, rel=0.1)
    assert float(shared.b0.detach().std()) == pytest.approx(512**-0.5, rel=0.1)
