"""Which site takes which rows of a weight: only what is asked for and allowed takes anything, and what is left is free for the others."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_equals_twin, assert_hit, assert_idempotent, assert_miss, linear, ties, weight
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pe_fx
from pe_fx import Plan, checkpoint
from pe_fx.graph.flow import Flow
from pe_fx.passes import Mlp
from pe_fx.ties import Block, Miss, Site, Tie

D, H = 8, 12
X = torch.randn(2, 5, D)

VALUES, OUT, DOWN = "i.weight[16:24] ← i.weight[8:16]ᵀ", "o.weight ← i.weight[0:8]ᵀ", "f.weight ← i.weight[36:48]ᵀ"
OUT_FROZEN = "o.weight is frozen, i.weight is trained: set requires_grad alike"


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)


def parallel() -> Net:
    """Attention and gated unit side by side, as in PaLM: one weight makes q, k, v, gate and up."""

    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v, gate, up = m.i(x).split([D, D, D, H, H], -1)
        return x + m.o(attended(q, k, v)) + m.f(F.silu(gate) * up)

    return Net(forward, i=linear(D, 3 * D + 2 * H), o=linear(D, D), f=linear(H, D))


def assert_ties(model: nn.Module, *expected: str, **options: Any) -> Plan:
    """Exactly these ties, of whatever kinds; the model computes what its dense twin does, tied and untied again."""
    plan = pe_fx.plan(model, X, **options)
    assert sorted(ties(plan)) == sorted(expected), f"{plan}\n{plan.explain()}"
    assert Plan.from_json(plan.to_json()) == plan
    tied = pe_fx.apply(model, plan)
    assert_equals_twin(model, tied, plan, X)
    assert sum(parameter.numel() for parameter in tied.parameters()) == plan.params_after
    torch.testing.assert_close(pe_fx.untie(tied)(X), tied(X))
    return plan


# ---- rows of one weight


def test_two_patterns_share_a_weight() -> None:
    plan = assert_ties(parallel(), VALUES, OUT, DOWN)
    assert [site.kind for site in plan.sites] == ["attention", "glu"]


OPTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"rules": ["glu"]}, (DOWN,)),
    ({"rules": ["attention"]}, (VALUES, OUT)),
    ({"exclude": ["o"]}, (DOWN,)),
    ({"exclude": ["f.*"]}, (VALUES, OUT)),
    ({"include": ["f"]}, (DOWN,)),
    ({"rules": ["mlp"]}, ()),
]


@pytest.mark.parametrize(("options", "expected"), OPTIONS, ids=str)
def test_what_was_not_asked_for_takes_nothing(options: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert_ties(parallel(), *expected, **options)


def test_what_is_refused_takes_nothing() -> None:
    model = parallel()
    model.o.weight.requires_grad_(False)
    plan = assert_ties(model, VALUES, DOWN)
    assert [miss.reason for miss in plan.misses] == [OUT_FROZEN]


@pytest.mark.parametrize("mix", ["none", "signed"])
def test_stages_of_both_kinds_leave_the_gates(mix: str) -> None:
    """Of the second block's fused weight two rules tie rows away, and what is between them stays."""
    model = nn.Sequential(parallel(), parallel())
    plan = pe_fx.plan(model, X, share=("attention", "glu"), mix=mix, gain=mix == "signed")
    assert sorted(str(tie.into) for tie in plan.ties if tie.target == "1.i.weight") == [
        f"1.i.weight[{rows}]" for rows in ("0:8", "16:24", "36:48", "8:16")
    ]
    tied = pe_fx.apply(model, plan)
    assert_equals_twin(model, tied, plan, X)
    assert sum(parameter.numel() for parameter in tied[1].i.parameters() if parameter.dim() == 2) == H * D


def test_a_weight_with_several_runs_of_kept_rows_is_saved_and_loaded(tmp_path: Path) -> None:
    build = lambda: nn.Sequential(parallel(), parallel())  # noqa: E731
    tied = pe_fx.transform(build(), X, share=("glu",))
    again = pe_fx.apply(build(), Plan.from_json(pe_fx.plan(build(), X, share=("glu",)).to_json()))
    again.load_state_dict(tied.state_dict())
    assert torch.equal(again(X), tied(X))
    checkpoint.save(tied, tmp_path / "tied.safetensors")
    loaded = checkpoint.load(tmp_path / "tied.safetensors", build())
    assert torch.equal(loaded(X), tied(X))
    dense = pe_fx.untie(loaded)
    assert {name: value.shape for name, value in dense.state_dict().items()} == {n: v.shape for n, v in build().state_dict().items()}
    torch.testing.assert_close(dense(X), tied(X))


def test_parts_of_a_parameter_applied_one_by_one() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v, gate, up = (F.linear(x, part) for part in m.w.split([D, D, D, H, H]))
        return F.linear(attended(q, k, v), m.o) + F.linear(F.silu(gate) * up, m.f)

    net = Net(forward, w=weight(3 * D + 2 * H, D), o=weight(D, D), f=weight(D, H))
    assert_ties(net, "w[16:24] ← w[8:16]ᵀ", "o ← w[0:8]ᵀ", "f ← w[36:48]ᵀ")


def test_columns_in_another_order() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        up, v, gate, k, q = (x @ m.w).split([H, D, H, D, D], -1)
        return attended(q, k, v) @ m.o + (F.silu(gate) * up) @ m.f

    net = Net(forward, w=weight(D, 3 * D + 2 * H), o=weight(D, D), f=weight(H, D))
    assert_ties(net, "w[:, 12:20] ← w[:, 32:40]ᵀ", "o ← w[:, 40:48]ᵀ", "f ← w[:, 0:12]ᵀ")


def test_two_attentions_in_one_weight() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        first, second = m.i(x).chunk(2, -1)
        return m.o1(attended(*first.chunk(3, -1))) + m.o2(attended(*second.chunk(3, -1)))

    net = Net(forward, i=linear(D, 6 * D), o1=linear(D, D), o2=linear(D, D))
    values = ["i.weight[16:24] ← i.weight[8:16]ᵀ", "i.weight[40:48] ← i.weight[32:40]ᵀ"]
    assert_hit(net, X, *values, "o1.weight ← i.weight[0:8]ᵀ", "o2.weight ← i.weight[24:32]ᵀ", kind="attention")


def test_two_gated_units_in_one_weight() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        gate1, up1, up2, gate2 = m.i(x).chunk(4, -1)
        return m.f1(F.silu(gate1) * up1) + m.f2(up2 * F.gelu(gate2))

    net = Net(forward, i=linear(D, 4 * H), f1=linear(H, D), f2=linear(H, D))
    assert_hit(net, X, "f1.weight ← i.weight[12:24]ᵀ", "f2.weight ← i.weight[24:36]ᵀ", kind="glu")


def test_rows_that_are_read_elsewhere() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v, gate, up = m.i(x).split([D, D, D, H, H], -1)
        return x + m.o(attended(q, k, v)) + m.f(F.silu(gate) * up) + up.mean(-1, keepdim=True)

    net = Net(forward, i=linear(D, 3 * D + 2 * H), o=linear(D, D), f=linear(H, D))
    plan = assert_ties(net, VALUES, OUT)
    assert plan.explain() == ". (glu): the value between i.weight[36:48] and f.weight is read elsewhere too: getitem_4 by mean"


def test_rows_that_two_patterns_want() -> None:
    """Gated by values of its own, a unit works with the keys: they are the source of the values already."""

    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v, gate = m.i(x).chunk(4, -1)
        return m.o(attended(q, k, v)) + m.f(F.silu(gate) * k)

    net = Net(forward, i=linear(D, 4 * D), o=linear(D, D), f=linear(D, D))
    plan = assert_ties(net, VALUES, OUT)
    assert "between i.weight[8:16] and f.weight is read elsewhere too: transpose_1 by scaled_dot_product_attention" in plan.explain()


# ---- a feed-forward layer whose first matrix is rows of a weight

UP = "f.weight ← i.weight[24:36]ᵀ"


def ungated(*between: nn.Module, last: Callable[[Net, Tensor, Tensor], Tensor] = lambda m, x, h: m.f(h)) -> Net:
    """Attention and feed-forward layer side by side, as in ViT-22B: one weight makes q, k, v and what is hidden."""

    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v, hidden = m.i(x).split([D, D, D, H], -1)
        return x + m.o(attended(q, k, v)) + last(m, x, m.between(F.gelu(hidden)))

    parts = {"i": linear(D, 3 * D + H), "o": linear(D, D), "f": linear(H, D), "between": nn.Sequential(*between)}
    return Net(forward, **parts)


@pytest.mark.parametrize("between", [(), (nn.Dropout(0.0),), (nn.LayerNorm(H), nn.Tanh())], ids=["act", "dropout", "norm"])
def test_attention_and_feed_forward_in_one_weight(between: tuple[nn.Module, ...]) -> None:
    model = ungated(*between)
    plan = assert_ties(model, VALUES, OUT, UP)
    assert [site.kind for site in plan.sites] == ["attention", "mlp"]
    assert_idempotent(model, X)


def test_their_outputs_in_one_weight() -> None:
    """As in the single-stream blocks of Flux: the columns of the last weight are of attention and of the feed-forward layer."""

    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v, hidden = m.i(x).split([D, D, D, H], -1)
        return x + m.out(torch.cat([attended(q, k, v), F.gelu(hidden)], -1))

    net = Net(forward, i=linear(D, 3 * D + H), out=linear(D + H, D))
    assert_ties(net, VALUES, "out.weight[:, 0:8] ← i.weight[0:8]ᵀ", "out.weight[:, 8:20] ← i.weight[24:36]ᵀ")


@pytest.mark.parametrize("rules", [["mlp"], ["attention"]])
def test_one_of_them_alone(rules: list[str]) -> None:
    assert_ties(ungated(), *([UP] if rules == ["mlp"] else [VALUES, OUT]), rules=rules)


@pytest.mark.parametrize("options", [{"mix": "signed", "gain": True}, {"mix": "fitted"}, {"init": "mean"}], ids=str)
def test_they_are_mixed_and_started_as_others_are(options: dict[str, Any]) -> None:
    model = ungated()
    plan = pe_fx.plan(model, X, **{key: value for key, value in options.items() if key != "init"})
    assert len(plan.ties) == 3
    tied = pe_fx.transform(model, X, **options)
    torch.testing.assert_close(pe_fx.untie(tied)(X), tied(X))


def test_both_halves_of_a_weight_and_a_weight_that_runs_twice() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        for _ in range(2):
            first, second = m.i(x).chunk(2, -1)
            x = x + m.f(first.relu()) + m.g(second.tanh())
        return x

    net = Net(forward, i=linear(D, 2 * H), f=linear(H, D), g=linear(H, D))
    assert_hit(net, X, "f.weight ← i.weight[0:12]ᵀ", "g.weight ← i.weight[12:24]ᵀ", kind="mlp")


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (lambda m, x, h: m.f(h) + h.mean(-1, keepdim=True), r"between i\.weight\[24:36\] and f\.weight is read elsewhere too: .* by mean"),
        (lambda m, x, h: m.f(h + h.flip(-1)), r"channels of i\.weight\[24:36\] are combined with one another before f\.weight"),
        (lambda m, x, h: m.f(h.flip(-1)), r"channels of i\.weight\[24:36\] reach f\.weight in another order"),
        (lambda m, x, h: m.f(h) + F.linear(x, m.i.weight[24:32]), r"i\.weight\[24:36\] is used a second time, not with f\.weight"),
        (lambda m, x, h: m.f(h) + F.linear(torch.ones(H), m.f.weight), r"f\.weight is used a second time, not with i\.weight\[24:36\]"),
        (lambda m, x, h: m.f(h) + m.f.weight.sum(), r"f\.weight is read by add too"),
    ],
    ids=["read elsewhere", "combined", "another order", "rows used again", "last used again", "read"],
)
def test_rows_that_are_no_first_matrix(last: Callable[[Net, Tensor, Tensor], Tensor], reason: str) -> None:
    plan = assert_ties(ungated(last=last), VALUES, OUT)
    assert [miss.kind for miss in plan.misses] == ["mlp"]
    assert re.search(reason, plan.misses[0].reason), plan.explain()


def test_values_that_are_averaged_are_no_hidden_ones() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.i(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    assert_ties(Net(forward, i=linear(D, 3 * D), o=linear(D, D)), rules=["mlp"])


@pytest.mark.parametrize("joined", [lambda a, b: a.sigmoid() * b.tanh(), lambda a, b: a.relu() + b.relu()], ids=["gated", "added"])
def test_rows_that_are_joined_are_no_first_matrix(joined: Callable[[Tensor, Tensor], Tensor]) -> None:
    net = Net(lambda m, x: m.f(joined(*m.i(x).chunk(2, -1))), i=linear(D, 2 * H), f=linear(H, D))
    assert not pe_fx.plan(net, X).sites


def test_rows_without_a_nonlinearity() -> None:
    net = Net(lambda m, x: m.f((y := m.i(x))[..., :H]) + y[..., H:].relu(), i=linear(D, H + D), f=linear(H, D))
    assert not pe_fx.plan(net, X).sites


def in_halves(first: nn.Module, last: nn.Module, *between: nn.Module) -> Net:
    """Half of what the first layer makes goes to the last one."""
    between_ = nn.Sequential(nn.GELU(), *between)
    return Net(lambda m, x: m.last(m.between((y := m.first(x))[:, :H])) + y[:, H:].sum(), first=first, last=last, between=between_)


IMAGE = torch.randn(2, D, 4, 4)


@pytest.mark.parametrize("between", [(), (nn.Conv2d(H, H, 3, padding=1, groups=H),)], ids=["act", "depthwise"])
def test_half_of_a_1x1_convolution(between: tuple[nn.Module, ...]) -> None:
    net = in_halves(nn.Conv2d(D, 2 * H, 1), nn.Conv2d(H, D, 1), *between)
    assert_hit(net, IMAGE, "last.weight ← first.weight[0:12]ᵀ", kind="mlp")


@pytest.mark.parametrize(
    ("first", "last", "between"),
    [
        (nn.Conv2d(D, 2 * H, 3, padding=1), nn.Conv2d(H, D, 1), ()),
        (nn.Conv2d(D, 2 * H, 1, groups=2), nn.Conv2d(H, D, 1), ()),
        (nn.Conv2d(D, 2 * H, 1), nn.Conv2d(H, D, 3, padding=1), ()),
        (nn.Conv2d(D, 2 * H, 1), nn.Conv2d(H, D, 1), (nn.Conv2d(H, H, 3, padding=1),)),
    ],
    ids=["first", "in groups", "last", "between"],
)
def test_half_of_a_convolution_that_is_no_matrix(first: nn.Module, last: nn.Module, between: tuple[nn.Module, ...]) -> None:
    assert not pe_fx.plan(in_halves(first, last, *between), IMAGE).sites


def test_half_of_each_expert() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        hidden, other = torch.einsum("btd,efd->betf", x, m.w).chunk(2, -1)
        return torch.einsum("betf,edf->btd", hidden.relu(), m.v) + other.mean((1, 3))[..., None]

    net = Net(forward, w=weight(3, 2 * H, D), v=weight(3, D, H))
    assert_hit(net, X, "v ← w[:, 0:12]ᵀ", kind="mlp")


def test_rows_that_are_read_twice_over() -> None:
    net = Net(
        lambda m, x: m.f((y := m.i(x))[..., :H].relu().repeat_interleave(2, -1)) + y[..., H:].sum(-1, keepdim=True),
        i=linear(D, 3 * H),
        f=linear(2 * H, D),
    )
    assert_miss(net, X, r"channels of i\.weight\[0:12\] reach f\.weight in another order")


def test_rows_that_are_no_rectangle() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = torch.einsum("btd,efd->btef", x, m.w).flatten(-2)
        return m.f(y[..., :H].relu()) + y[..., H:].sum(-1, keepdim=True)

    net = Net(forward, w=weight(3, 10, D), f=linear(H, D))
    assert not pe_fx.plan(net, X).sites


# ---- whole weights


def chain() -> nn.Sequential:
    return nn.Sequential(linear(D, 16), nn.ReLU(), linear(16, D), nn.ReLU(), linear(D, 16))


def frozen(model: nn.Sequential) -> None:
    model[0].weight.requires_grad_(False)


def parametrized(model: nn.Sequential) -> None:
    parametrize.register_parametrization(model[0], "weight", nn.Identity())


@pytest.mark.parametrize(
    ("change", "reason"),
    [(frozen, "0.weight is frozen, 2.weight is trained"), (parametrized, "0.parametrizations.weight.original is param")],
)
def test_a_weight_that_its_first_partner_cannot_have_goes_to_the_second(change: Callable[[nn.Sequential], None], reason: str) -> None:
    model = chain()
    change(model)
    plan = assert_ties(model, "4.weight ← 2.weightᵀ")
    assert reason in plan.explain()


def test_a_partner_of_another_dtype() -> None:
    net = Net(lambda m, x: m.c(m.b(m.a(x.bfloat16()).float().relu()).relu()), a=linear(D, 16).bfloat16(), b=linear(16, D), c=linear(D, 16))
    plan = assert_ties(net, "c.weight ← b.weightᵀ")
    assert "b.weight is float32, a.weight is bfloat16" in plan.explain()


def test_a_target_registered_twice_is_a_source() -> None:
    model = chain()
    model[4].other = linear(16, D)
    model[4].other.weight = model[2].weight
    plan = pe_fx.plan(model, X)
    assert ties(plan) == ["4.weight ← 2.weightᵀ"]
    assert "2.weight is one parameter registered in 2 places" in plan.explain()
    assert torch.equal(pe_fx.apply(model, plan)[4].weight, model[2].weight.mT)


def test_an_excluded_weight_leaves_its_partner() -> None:
    assert_hit(chain(), X, "4.weight ← 2.weightᵀ", kind="mlp", exclude=["0"])
    assert_hit(chain(), X, "2.weight ← 0.weightᵀ", kind="mlp")


def output_before_a_layer() -> Net:
    layers = {name: linear(D, D) for name in ("q", "k", "v", "o", "fc")}
    return Net(lambda m, x: m.fc(m.o(attended(m.q(x), m.k(x), m.v(x))).relu()), **layers)


def test_an_output_projection_that_stays_dense_may_begin_a_pair() -> None:
    assert_ties(output_before_a_layer(), "v.weight ← k.weightᵀ", "o.weight ← q.weightᵀ")
    assert_ties(output_before_a_layer(), "fc.weight ← o.weightᵀ", rules=["mlp"])
    assert_ties(output_before_a_layer(), "fc.weight ← o.weightᵀ", exclude=["q"])
    model = output_before_a_layer()
    model.q.weight.requires_grad_(False)
    assert_ties(model, "v.weight ← k.weightᵀ", "fc.weight ← o.weightᵀ")


def nested() -> Net:
    layers = {"o1": linear(D, 16), "i1": linear(16, 4), "i2": linear(4, 16), "o2": linear(16, D)}
    return Net(lambda m, x: m.o2(m.i2(m.i1(m.o1(x).relu()).relu()).relu()), **layers)


def test_a_pattern_that_stays_dense_is_still_a_step_to_the_one_around_it() -> None:
    assert_ties(nested(), "i2.weight ← i1.weightᵀ", "o2.weight ← o1.weightᵀ")
    assert_ties(nested(), "o2.weight ← o1.weightᵀ", exclude=["i1"])
    model = nested()
    model.i1.weight.requires_grad_(False)
    assert_ties(model, "o2.weight ← o1.weightᵀ")


def test_a_gate_that_was_not_asked_for_is_no_mlp() -> None:
    net = Net(lambda m, x: x * m.b(m.a(x.mean(1, keepdim=True)).relu()).sigmoid(), a=linear(D, 4), b=linear(4, D))
    assert_ties(net, "b.weight ← a.weightᵀ", rules=["squeeze_excite"])
    assert_ties(net, rules=["mlp", "attention", "glu", "bottleneck"])


# ---- rules of one's own that do not ask


@dataclasses.dataclass(frozen=True)
class Fixed:
    kind: str
    tie: Tie

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        yield Site(self.kind, "", (self.tie.source, self.tie.target), (self.tie,))


FC1, FC2 = Block.whole("0.weight", (16, D)), Block.whole("2.weight", (D, 16))
FIRST = Fixed("first", Tie(FC1, FC2, transposed=True))


@pytest.mark.parametrize("second", [Fixed("second", FIRST.tie), Fixed("second", Tie(FC2, FC1, transposed=True))], ids=["again", "back"])
def test_two_rules_that_tie_the_same_weights(second: Fixed) -> None:
    plan = assert_ties(chain(), "0.weight ← 2.weightᵀ", rules=[FIRST, second, Mlp()])
    assert [miss.reason for miss in plan.misses if miss.kind == "second"] == [
        f"{second.tie.into} belongs to another site already (the model)"
    ]


def test_a_tie_that_is_refused_leaves_the_other_way_round() -> None:
    model = chain()
    model[4].other = linear(D, 16)
    model[4].other.weight = model[0].weight
    plan = pe_fx.plan(model, X, rules=[FIRST, Mlp()])
    assert ties(plan) == ["2.weight ← 0.weightᵀ"]
    assert "(first): 0.weight is one parameter registered in 2 places" in plan.explain()


def test_two_rules_that_divide_a_weight_along_two_dimensions() -> None:
    rows = Tie(FC1.narrowed(0, range(4)), FC2.narrowed(1, range(4)), transposed=True)
    columns = Tie(FC1.narrowed(0, range(4, 16)).narrowed(1, range(4)), FC2.narrowed(1, range(4, 16)).narrowed(0, range(4)), transposed=True)
    plan = assert_ties(chain(), str(rows), rules=[Fixed("rows", rows), Fixed("columns", columns)])
    assert "a weight is divided along one dimension only" in plan.explain()


def test_a_reason_says_what_helps() -> None:
    model = nn.Sequential(linear(D, 16), nn.ReLU(), linear(16, D))
    parametrized(model)
    assert_miss(model, X, r"remove the parametrization first \(torch.nn.utils.parametrize.remove_parametrizations\)")
    parametrize.remove_parametrizations(model[0], "weight")
    frozen(model)
    assert_miss(model, X, "set requires_grad alike")
    model[0].weight.requires_grad_(True)
    assert_hit(model, X, "2.weight ← 0.weightᵀ", kind="mlp")
