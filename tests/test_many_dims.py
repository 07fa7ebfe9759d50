"""Weights of three dimensions and more: heads apart, `[d, h, k]`, and experts in one tensor, `[e, d, f]`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Net, assert_equals_twin, assert_hit, assert_idempotent, assert_miss, linear, ties, weight
from torch import Tensor, einsum, nn, tensordot
from torch.nn import functional as F

import pe_fx
import pe_fx.checkpoint

D, H, K = 8, 2, 4
E, HIDDEN = 3, 12
X = torch.randn(2, 5, D)
BY_EXPERT = torch.randn(E, 5, D)
BATCHES = torch.randn(2, E, 5, D)

VARIANTS: list[dict[str, Any]] = [{}, {"mix": "signed", "gain": True}]
variants = pytest.mark.parametrize("options", VARIANTS, ids=["plain", "signed and scaled"])

Apply = Callable[[Tensor, Tensor], Tensor]


def heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (H, K)).transpose(1, 2)


def joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def out_of_heads(y: Tensor, w: Tensor) -> Tensor:
    return einsum("bhtk,hkd->btd", y, w)


def attention(into: Apply, out: Apply, shape: tuple[int, ...] = (D, H, K), last: tuple[int, ...] = (H, K, D)) -> Net:
    """Attention with weights q, k, v of one shape, applied by `into`, and o, applied by `out`: to (batch, heads, tokens, channels)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = (into(x, w) for w in (m.q, m.k, m.v))
        return out(F.scaled_dot_product_attention(q, k, v), m.o)

    return Net(forward, q=weight(*shape), k=weight(*shape), v=weight(*shape), o=weight(*last))


def by_einsum() -> Net:
    return attention(lambda x, w: einsum("btd,dhk->bhtk", x, w), out_of_heads)


FORMS: dict[str, Callable[[], Net]] = {
    "einsum": by_einsum,
    "heads first": lambda: attention(lambda x, w: einsum("btd,hdk->bthk", x, w).transpose(1, 2), out_of_heads, (H, D, K)),
    "heads last": lambda: attention(
        lambda x, w: einsum("btd,dkh->bhtk", x, w), lambda y, w: einsum("bhtk,kdh->btd", y, w), (D, K, H), (K, D, H)
    ),
    "output with its heads second": lambda: attention(
        lambda x, w: einsum("btd,dhk->bhtk", x, w), lambda y, w: einsum("bhtk,khd->btd", y, w), last=(K, H, D)
    ),
    "no arrow": lambda: attention(lambda x, w: einsum("btd,dhk", x, w).transpose(2, 3), out_of_heads),
    "ellipsis": lambda: attention(
        lambda x, w: einsum("...d,dhk->...hk", x, w).transpose(1, 2), lambda y, w: einsum("...hk,hkd->...d", y.transpose(1, 2), w)
    ),
    "view": lambda: attention(lambda x, w: heads(x @ w.view(D, H * K)), lambda y, w: joined(y) @ w.view(H * K, D)),
    "flatten": lambda: attention(lambda x, w: heads(x @ w.flatten(1)), lambda y, w: joined(y) @ w.flatten(0, 1)),
    "linear": lambda: attention(
        lambda x, w: heads(F.linear(x, w.flatten(0, 1))), lambda y, w: F.linear(joined(y), w.flatten(1)), (H, K, D), (D, H, K)
    ),
    "tensordot": lambda: attention(lambda x, w: tensordot(x, w, 1).transpose(1, 2), lambda y, w: tensordot(y.transpose(1, 2), w, 2)),
    "tensordot of named axes": lambda: attention(
        lambda x, w: tensordot(x, w, dims=([2], [1])).transpose(1, 2), lambda y, w: tensordot(y, w, dims=([1, 3], [0, 1])), (H, D, K)
    ),
    "matmul for each head": lambda: attention(lambda x, w: x[:, None] @ w, out_of_heads, (H, D, K)),
}


@pytest.mark.parametrize("form", FORMS)
@variants
def test_heads_apart(form: str, options: dict[str, Any]) -> None:
    net = FORMS[form]()
    made = pe_fx.plan(net, X, **options)
    assert [(tie.target, tie.source) for tie in made.ties] == [("v", "k"), ("o", "q")], made.explain()
    assert not made.misses
    tied = pe_fx.apply(net, made)
    assert_equals_twin(net, tied, made, X)
    assert pe_fx.verify(tied, X)
    net.load_state_dict(pe_fx.untie(tied).state_dict())
    assert pe_fx.Plan.from_json(made.to_json()) == made


def test_what_is_tied_to_what() -> None:
    tied = assert_hit(by_einsum(), X, "v ← kᵀ", "o ← qᵀ", kind="attention")
    assert torch.equal(tied.o, tied.q.permute(1, 2, 0))
    assert torch.equal(tied.v.reshape(D, H * K), tied.k.reshape(D, H * K).t())
    first = assert_hit(FORMS["heads first"](), X, "v ← kᵀ", "o ← qᵀ", kind="attention")
    assert torch.equal(first.o, first.q.transpose(1, 2))
    assert torch.equal(first.v.transpose(1, 2).reshape(H * K, D), first.k.transpose(1, 2).reshape(H * K, D).t())


def test_idempotent() -> None:
    assert_idempotent(by_einsum(), X)


def test_dense_general() -> None:
    """A layer ported from JAX: kernel and bias have the shape of the features."""

    class DenseGeneral(nn.Module):
        def __init__(self, axes: int, *shape: int) -> None:
            super().__init__()
            self.axes, self.kernel, self.bias = axes, weight(*shape), nn.Parameter(torch.zeros(shape[axes:]))

        def forward(self, x: Tensor) -> Tensor:
            return tensordot(x, self.kernel, self.axes) + self.bias

    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = (part(x).transpose(1, 2) for part in (m.query, m.key, m.value))
        return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))

    parts = {name: DenseGeneral(1, D, H, K) for name in ("query", "key", "value")}
    net = Net(forward, **parts, out=DenseGeneral(2, H, K, D))
    assert_hit(net, X, "value.kernel ← key.kernelᵀ", "out.kernel ← query.kernelᵀ", kind="attention")


def attend(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    return out_of_heads(F.scaled_dot_product_attention(q, k, v), o)


FUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[int, ...], str]] = {
    "in front": (lambda x, w: einsum("btd,cdhk->cbhtk", x, w), (3, D, H, K), "qkv[{0}:{1}]"),
    "second": (lambda x, w: einsum("btd,dchk->bcthk", x, w).transpose(2, 3).unbind(1), (D, 3, H, K), "qkv[:, {0}:{1}]"),
    "within each head": (lambda x, w: einsum("btd,dhk->bhtk", x, w).chunk(3, -1), (D, H, 3 * K), "qkv[:, :, {2}:{3}]"),
    "by a view": (lambda x, w: map(heads, (x @ w.flatten(1)).chunk(3, -1)), (D, 3, H, K), "qkv[:, {0}:{1}]"),
    "taken apart": (lambda x, w: [einsum("btd,dhk->bhtk", x, part) for part in w.unbind(1)], (D, 3, H, K), "qkv[:, {0}:{1}]"),
}


@pytest.mark.parametrize("form", FUSED)
def test_one_weight_for_queries_keys_and_values(form: str) -> None:
    make, shape, block = FUSED[form]
    net = Net(lambda m, x: attend(*make(x, m.qkv), m.o), qkv=weight(*shape), o=weight(H, K, D))
    q, k, v = (block.format(i, i + 1, K * i, K * (i + 1)) for i in range(3))
    for options in VARIANTS:
        made = pe_fx.plan(net, X, **options)
        assert [(str(tie.into), str(tie.of)) for tie in made.ties] == [(v, k), ("o", q)], made.explain()
        assert_equals_twin(net, pe_fx.apply(net, made), made, X)


def test_grouped_queries() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q = einsum("btd,dgrk->bgrtk", x, m.q)
        k, v = (einsum("btd,dgk->bgtk", x, w)[:, :, None].expand(-1, -1, 2, -1, -1) for w in (m.k, m.v))
        return einsum("bgrtk,grkd->btd", F.scaled_dot_product_attention(q, k, v), m.o)

    square = Net(forward, q=weight(D, H, 2, K), k=weight(D, H, K), v=weight(D, H, K), o=weight(H, 2, K, D))
    assert_hit(square, X, "v ← kᵀ", "o ← qᵀ", kind="attention")
    narrow = Net(forward, q=weight(D, 1, 2, K), k=weight(D, 1, K), v=weight(D, 1, K), o=weight(1, 2, K, D))
    assert_hit(narrow, X, "o ← qᵀ", kind="attention")
    assert "not transposes" in pe_fx.plan(narrow, X).explain()


def test_heads_interleaved_before_the_output() -> None:
    for out in (
        lambda y, w: y.permute(0, 2, 3, 1).flatten(2) @ w.flatten(0, 1),
        lambda y, w: einsum("btkh,hkd->btd", y.permute(0, 2, 3, 1), w),
    ):
        net = attention(lambda x, w: einsum("btd,dhk->bhtk", x, w), out)
        made = pe_fx.plan(net, X)
        assert ties(made) == ["v ← kᵀ"]
        assert "the channels of the values reach o in another order" in made.explain()


def test_values_of_half_a_head() -> None:
    """No block of the parameter holds the channels of a role."""
    net = Net(
        lambda m, x: F.scaled_dot_product_attention(*(x @ m.qkv.flatten(1)).split((D, D, D), -1)) @ m.o,
        qkv=weight(D, 4, 6),
        o=weight(D, D),
    )
    assert_miss(net, X, "neither the queries nor the keys of .* are made by one matrix", kind="attention", weights=("qkv",))


def test_a_view_of_a_tied_weight_needs_its_order() -> None:
    net = attention(lambda x, w: einsum("btd,dhk->bhtk", x, w), lambda y, w: joined(y) @ w.view(-1).view(H * K, D))
    assert_hit(net, X, "v ← kᵀ", "o ← qᵀ", kind="attention")
    assert {tie.target: tie.contiguous for tie in pe_fx.plan(net, X).ties} == {"v": False, "o": True}
    assert not any(tie.contiguous for tie in pe_fx.plan(FORMS["view"](), X).ties)


# ---- experts


def experts(forward: Callable[..., Tensor], **others: Any) -> Net:
    return Net(forward, **({"a": weight(E, D, HIDDEN), "b": weight(E, HIDDEN, D)} | others))


def up(x: Tensor, w: Tensor) -> Tensor:
    return einsum("btd,edf->btef", x, w)


EXPERTS: dict[str, tuple[Callable[[], Net], Tensor]] = {
    "summed": (lambda: experts(lambda m, x: einsum("btef,efd->btd", up(x, m.a).relu(), m.b)), X),
    "scored": (
        lambda: experts(lambda m, x: einsum("btef,efd,bte->btd", up(x, m.a).relu(), m.b, m.g(x).softmax(-1)), g=linear(D, E)),
        X,
    ),
    "scored afterwards": (
        lambda: experts(
            lambda m, x: (einsum("btef,efd->bted", up(x, m.a).relu(), m.b) * m.g(x).softmax(-1)[..., None]).sum(2), g=linear(D, E)
        ),
        X,
    ),
    "each its own tokens": (lambda: experts(lambda m, x: einsum("betf,efd->betd", einsum("betd,edf->betf", x, m.a).relu(), m.b)), BATCHES),
    "ellipsis": (lambda: experts(lambda m, x: einsum("...tf,...fd->...td", einsum("...td,...df->...tf", x, m.a).relu(), m.b)), BY_EXPERT),
    "bmm": (lambda: experts(lambda m, x: torch.bmm(torch.bmm(x, m.a).relu(), m.b)), BY_EXPERT),
    "baddbmm": (
        lambda: experts(
            lambda m, x: torch.baddbmm(m.d, torch.baddbmm(m.c, x, m.a).relu(), m.b), c=torch.randn(E, 1, HIDDEN), d=torch.randn(E, 1, D)
        ),
        BY_EXPERT,
    ),
    "matmul": (lambda: experts(lambda m, x: x.unsqueeze(1).matmul(m.a).relu() @ m.b), X),
    "weight first": (lambda: experts(lambda m, x: m.b @ (m.a @ x.mT).relu(), a=weight(E, HIDDEN, D), b=weight(E, D, HIDDEN)), BY_EXPERT),
    "experts second": (
        lambda: experts(lambda m, x: einsum("btef,efd->btd", einsum("btd,def->btef", x, m.a).relu(), m.b), a=weight(D, E, HIDDEN)),
        X,
    ),
    "hidden channels first": (
        lambda: experts(lambda m, x: einsum("btef,fed->btd", up(x, m.a).relu(), m.b), b=weight(HIDDEN, E, D)),
        X,
    ),
    "one weight for every batch": (
        lambda: Net(
            lambda m, x: torch.bmm(torch.bmm(x, m.a.expand(2, -1, -1)).relu(), m.b.unsqueeze(0).repeat(2, 1, 1)),
            a=weight(D, HIDDEN),
            b=weight(HIDDEN, D),
        ),
        X,
    ),
    "joined by a linear layer": (
        lambda: experts(lambda m, x: F.linear(up(x, m.a).relu().flatten(2), m.b), b=weight(D, E * HIDDEN)),
        X,
    ),
}


@pytest.mark.parametrize("form", EXPERTS)
@variants
def test_experts(form: str, options: dict[str, Any]) -> None:
    make, x = EXPERTS[form]
    net = make()
    made = pe_fx.plan(net, x, **options)
    assert [(site.kind, tie.target, tie.source) for site in made.sites for tie in site.ties] == [("mlp", "b", "a")], made.explain()
    tied = pe_fx.apply(net, made)
    assert_equals_twin(net, tied, made, x)
    assert pe_fx.verify(tied, x)
    assert pe_fx.Plan.from_json(made.to_json()) == made


GATED: dict[str, tuple[Callable[[], Net], Tensor, str]] = {
    "summed": (
        lambda: experts(lambda m, x: einsum("btef,efd->btd", F.silu(up(x, m.g)) * up(x, m.a), m.b), g=weight(E, D, HIDDEN)),
        X,
        "b ← aᵀ",
    ),
    "scored": (
        lambda: experts(
            lambda m, x: einsum("btef,efd,bte->btd", F.silu(up(x, m.g)) * up(x, m.a), m.b, m.r(x).softmax(-1)),
            g=weight(E, D, HIDDEN),
            r=linear(D, E),
        ),
        X,
        "b ← aᵀ",
    ),
    "each its own tokens": (
        lambda: experts(
            lambda m, x: einsum("betf,efd->betd", F.silu(einsum("betd,edf->betf", x, m.g)) * einsum("betd,edf->betf", x, m.a), m.b),
            g=weight(E, D, HIDDEN),
        ),
        BATCHES,
        "b ← aᵀ",
    ),
    "fused": (
        lambda: experts(lambda m, x: torch.bmm(swiglu(*torch.bmm(x, m.a).chunk(2, -1)), m.b), a=weight(E, D, 2 * HIDDEN)),
        BY_EXPERT,
        "b ← a[:, :, 12:24]ᵀ",
    ),
    "fused, interleaved": (
        lambda: experts(
            lambda m, x: torch.bmm(swiglu(*torch.bmm(x, m.a).unflatten(-1, (-1, 2)).unbind(-1)), m.b), a=weight(E, D, 2 * HIDDEN)
        ),
        BY_EXPERT,
        "b ← a[:, :, 1:2+3:4+5:6+…]ᵀ",
    ),
}


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


@pytest.mark.parametrize("form", GATED)
def test_gated_experts(form: str) -> None:
    make, x, expected = GATED[form]
    assert_hit(make(), x, expected, kind="glu")


@pytest.mark.parametrize(
    "changed", [lambda h: h.flip(0), lambda h: h.flip(-1), lambda h: h.roll(1, 0)], ids=["experts", "channels", "rolled"]
)
def test_hidden_values_in_another_order(changed: Callable[[Tensor], Tensor]) -> None:
    net = experts(lambda m, x: torch.bmm(changed(torch.bmm(x, m.a).relu()), m.b))
    assert_miss(net, BY_EXPERT, "hidden channels of a reach b in another order")


@pytest.mark.parametrize("path", [None, [0, 2, 0, 1], [0, 1, 0, 1]])
def test_whatever_the_order_in_which_einsum_multiplies(path: list[int] | None) -> None:
    """With opt_einsum installed, torch.einsum writes one into the graph."""

    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = torch.ops.aten.einsum("end,edh->enh", [x, m.a]).relu()
        result: Tensor = torch.ops.aten.einsum("enh,ehd,en->nd", [hidden, m.b, x.mean(-1).softmax(0)], path=path)
        return result

    assert_hit(Net(forward, a=weight(E, D, HIDDEN), b=weight(E, HIDDEN, D)), BY_EXPERT, "b ← aᵀ", kind="mlp")


def test_experts_interleaved() -> None:
    net = experts(lambda m, x: up(x, m.a).relu().mT.flatten(-2) @ m.b.flatten(0, 1))
    assert_miss(net, X, "hidden channels of a reach b in another order")


def test_experts_without_a_nonlinearity() -> None:
    assert_miss(experts(lambda m, x: torch.bmm(torch.bmm(x, m.a), m.b)), BY_EXPERT, "no nonlinearity")


def test_experts_read_elsewhere() -> None:
    def forward(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        h = up(x, m.a).relu()
        return einsum("btef,efd->btd", h, m.b), h

    assert_miss(experts(forward), X, "read elsewhere too: relu is returned")


def test_a_view_that_mixes_the_inputs_of_a_weight() -> None:
    net = Net(lambda m, x: (x @ m.a.flatten(1)).relu() @ m.b.reshape(D, -1).t(), a=weight(D, E, HIDDEN), b=weight(HIDDEN, E, D))
    assert_miss(net, X, "b is applied through t, which rearranges it", weights=("b",))


def test_a_matrix_of_each_expert_and_one_of_all() -> None:
    net = Net(lambda m, x: F.linear(torch.bmm(x, m.a).relu(), m.b), a=weight(E, D, HIDDEN), b=weight(D, HIDDEN))
    assert not pe_fx.plan(net, BY_EXPERT).sites


# ---- what else is done with a tie


def test_start_from_the_mean() -> None:
    net = by_einsum()
    k, v = net.k.detach().clone(), net.v.detach().clone()
    tied = pe_fx.transform(net, X, init="mean")
    torch.testing.assert_close(tied.k.reshape(D, D), (k.reshape(D, D) + v.reshape(D, D).t()) / 2)
    again = pe_fx.transform(pe_fx.untie(tied), X, init="mean")
    torch.testing.assert_close(again.v, tied.v)
    signed = pe_fx.transform(net, X, mix="signed", gain=0.5)
    back = pe_fx.transform(pe_fx.untie(signed), X, mix="signed", gain=0.5, init="mean")
    torch.testing.assert_close(back.v, signed.v)


def test_start_anew() -> None:
    """The standard deviation is that of what a weight is applied to."""
    wide = attention(lambda x, w: einsum("btd,dhk->bhtk", x, w), out_of_heads, (64, 8, 8), (8, 8, 64))
    tied = pe_fx.transform(wide, torch.randn(1, 3, 64), init="reset")
    assert all(abs(w.std() * 8 - 1) < 0.1 for w in (tied.q, tied.k, tied.v, tied.o))


def test_plans_of_before_are_read() -> None:
    made = pe_fx.plan(experts(lambda m, x: torch.bmm(torch.bmm(x, m.a).relu(), m.b)), BY_EXPERT)
    body = json.loads(made.to_json())
    assert all(tie.pop("spread") is None for site in body["sites"] for tie in site["ties"])
    assert pe_fx.Plan.from_json(json.dumps(body)) == made


@pytest.mark.parametrize(
    "spread",
    [
        [[[0], [1]], [[1, 2], [0]]],
        [[[0], [1, 1, 2]], [[1, 2], [0]]],
        [[[0], [1, 3]], [[1, 2], [0]]],
        [[[0, 1], [2]], [[1, 2], [0]]],
        [[[0], [2, 1]], [[1, 2], [0]]],
    ],
)
def test_damaged_plans_are_refused(spread: Any) -> None:
    body = json.loads(pe_fx.plan(by_einsum(), X).to_json())
    body["sites"][0]["ties"][0]["spread"] = spread
    with pytest.raises(pe_fx.PeFxError, match="this plan is damaged: v ← kᵀ cannot be a tie"):
        pe_fx.Plan.from_json(json.dumps(body))


def test_saved_and_loaded(tmp_path: Path) -> None:
    tied = pe_fx.transform(by_einsum(), X, mix="signed", gain=True)
    pe_fx.checkpoint.save(tied, tmp_path / "tied.safetensors")
    loaded = pe_fx.checkpoint.load(tmp_path / "tied.safetensors", by_einsum())
    assert torch.equal(loaded(X), tied(X))


def test_compiled() -> None:
    """The backend ties what `transform` does."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.experts(m.attention(x))

    parts = {"attention": by_einsum(), "experts": EXPERTS["scored"][0]()}
    net = Net(forward, **parts)
    made = pe_fx.plan(net, X, mix="signed")
    tied = pe_fx.apply(net, made)
    try:
        compiled = torch.compile(net, backend="pe_fx", options={"mix": "signed"})
        torch.testing.assert_close(compiled(X), tied(X))
        compiled(X).square().mean().backward()
        assert net.attention.o.grad is None
        assert set(ties(pe_fx.pending(net))) == set(ties(made))
        pe_fx.commit(net)
        torch.testing.assert_close(net(X), tied(X))
    finally:
        torch.compiler.reset()
