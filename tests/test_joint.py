"""Joint attention: streams with weights of their own, joined along the sequence; and outputs joined along the channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_equals_twin, assert_hit, assert_idempotent, linear, ties
from torch import Tensor, nn

import pe_fx

D, H = 8, 16
X, C = torch.randn(2, 6, D), torch.randn(2, 4, D)
STREAMS = ("q", "k", "v", "o", "aq", "ak", "av", "ao")
TIES = ("v.weight ← k.weightᵀ", "av.weight ← ak.weightᵀ", "o.weight ← q.weightᵀ", "ao.weight ← aq.weightᵀ")

hit = partial(assert_hit, kind="attention")


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def averaged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


def joint(ends: Callable[[Net, Tensor], Any], core: Callable[..., Tensor] = averaged, names: tuple[str, ...] = STREAMS) -> Net:
    """Two streams, the second one with weights of its own as far as they are named."""

    def forward(m: Net, x: Tensor, c: Tensor) -> Any:
        apart = [(m.get_submodule(part)(x), m.get_submodule(f"a{part}" if f"a{part}" in names else part)(c)) for part in "qkv"]
        return ends(m, core(*(torch.cat([heads(a), heads(b)], 2) for a, b in apart)))

    return Net(forward, **{name: linear(D, D) for name in names})


def parted(m: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    return m.o(y[:, :6]), m.ao(y[:, 6:])


@pytest.mark.parametrize("core", [averaged, by_hand], ids=lambda core: core.__name__)
@pytest.mark.parametrize(
    "ends",
    [parted, lambda m, y: m.o(y.split([6, 4], 1)[0]) + m.ao(y.split([6, 4], 1)[1]).mean(1, keepdim=True)],
    ids=["slices", "split"],
)
def test_two_streams(ends: Callable[[Net, Tensor], Any], core: Callable[..., Tensor]) -> None:
    hit(joint(ends, core), (X, C), *TIES)


def test_stream_whose_output_is_dropped() -> None:
    """The last block of Stable Diffusion 3."""
    names = tuple(name for name in STREAMS if name != "ao")
    hit(joint(lambda m, y: m.o(y[:, :6]), names=names), (X, C), *TIES[:3])


def test_streams_that_share_their_queries() -> None:
    """Both outputs use its transpose."""
    hit(joint(parted, names=tuple(name for name in STREAMS if name != "aq")), (X, C), *TIES[:3], "ao.weight ← q.weightᵀ")


def test_streams_that_share_their_output() -> None:
    made = pe_fx.plan(joint(lambda m, y: m.o(y), names=STREAMS[:-1]), (X, C))
    assert set(ties(made)) == set(TIES[:2])
    reason = "the output projection could use the weight of the queries in several ways: q.weight, o.weight, aq.weight"
    assert reason in made.explain()


def test_streams_that_meet_again_before_the_output() -> None:
    made = pe_fx.plan(joint(lambda m, y: (m.o(y[:, :6]), m.ao(y[:, 4:]))), (X, C))
    assert set(ties(made)) == set(TIES[:2])
    assert made.misses


def test_streams_that_are_read_together_too() -> None:
    made = pe_fx.plan(joint(lambda m, y: (*parted(m, y), y.mean())), (X, C))
    assert set(ties(made)) == set(TIES[:2])


def test_blocks_one_after_another() -> None:
    """The last one's output is the only projection that all of the first one's values go through."""

    def forward(m: Net, x: Tensor, c: Tensor) -> Tensor:
        for block in m.blocks:
            x, c = (value + new for value, new in zip((x, c), block(x, c), strict=True))
        return m.head(torch.cat([x, c], 1))

    net = Net(forward, blocks=nn.ModuleList(joint(parted) for _ in range(2)), head=linear(D, D))
    hit(net, (X, C), *(f"blocks.{i}.{tie.replace('← ', f'← blocks.{i}.')}" for i in range(2) for tie in TIES))


def test_streams_of_other_widths() -> None:
    def forward(m: Net, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (torch.cat([heads(m.get_submodule(part)(x)), heads(m.get_submodule(f"a{part}")(c))], 2) for part in "qkv")
        y = averaged(q, k, v)
        return m.o(y[:, :6]), m.ao(y[:, 6:])

    net = Net(forward, **{name: linear(D, D) for name in "qkvo"}, **{f"a{name}": linear(12, D) for name in "qkv"}, ao=linear(D, 12))
    hit(net, (X, torch.randn(2, 4, 12)), TIES[0], *TIES[2:])


@pytest.mark.parametrize("options", [{}, {"mix": "signed", "gain": True}], ids=["plain", "signed"])
def test_streams_with_options(options: dict[str, Any]) -> None:
    net = joint(parted)
    made = pe_fx.plan(net, (X, C), **options)
    assert pe_fx.Plan.from_json(made.to_json()) == made
    tied = pe_fx.apply(net, made)
    assert_equals_twin(net, tied, made, (X, C))
    for got, expected in zip(pe_fx.untie(tied)(X, C), tied(X, C), strict=True):
        torch.testing.assert_close(got, expected)


def test_idempotent() -> None:
    assert_idempotent(joint(parted), (X, C))
    assert_idempotent(parallel("mlp"), X)


# ---- outputs of attention and of what runs beside it, in one weight


def parallel(kind: str, order: tuple[str, str] = ("attention", "hidden"), core: Callable[..., Tensor] = averaged, dim: int = -1) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (D,))
        parts = {"attention": core(*(heads(m.get_submodule(part)(y)) for part in "qkv"))}
        if kind == "glu":
            gate, up = m.up(y).chunk(2, -1)
            parts["hidden"] = F.silu(gate) * up
        else:
            parts["hidden"] = F.gelu(m.up(y))
        return x + m.out(torch.cat([parts[name] for name in order], dim))

    return Net(forward, **{name: linear(D, D) for name in "qkv"}, up=linear(D, 2 * H if kind == "glu" else H), out=linear(D + H, D))


@pytest.mark.parametrize("options", [{}, {"mix": "signed", "gain": True}], ids=["plain", "signed"])
@pytest.mark.parametrize("core", [averaged, by_hand], ids=lambda core: core.__name__)
@pytest.mark.parametrize(("kind", "source"), [("mlp", "up.weight"), ("glu", "up.weight[16:32]")])
def test_output_of_parallel_branches(kind: str, source: str, core: Callable[..., Tensor], options: dict[str, Any]) -> None:
    net = parallel(kind, core=core)
    made = pe_fx.plan(net, X)
    assert [(site.kind, *map(str, site.ties)) for site in made.sites] == [
        ("attention", "v.weight ← k.weightᵀ", "out.weight[:, 0:8] ← q.weightᵀ"),
        (kind, f"out.weight[:, 8:24] ← {source}ᵀ"),
    ]
    made = pe_fx.plan(net, X, **options)
    tied = pe_fx.apply(net, made)
    assert_equals_twin(net, tied, made, X)
    torch.testing.assert_close(pe_fx.untie(tied)(X), tied(X))


def test_output_of_parallel_branches_in_another_order() -> None:
    made = pe_fx.plan(parallel("mlp", ("hidden", "attention")), X)
    assert set(ties(made)) == {"v.weight ← k.weightᵀ", "out.weight[:, 16:24] ← q.weightᵀ", "out.weight[:, 0:16] ← up.weightᵀ"}


def test_joined_values_without_attention_are_no_output_of_branches() -> None:
    """The 1x1 convolution after joined feature maps, or a linear layer after them, belongs to none of them."""
    net = Net(lambda m, x: m.out(torch.cat([m.a(x).relu(), x], -1)), a=linear(D, H), out=linear(D + H, D))
    assert not pe_fx.plan(net, X).sites


@pytest.mark.parametrize("left", ["attention", "mlp"])
def test_one_branch_alone(left: str) -> None:
    net = parallel("mlp")
    made = pe_fx.plan(net, X, rules=(left,))
    assert {site.kind for site in made.sites} == {left}
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)
