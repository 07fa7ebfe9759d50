"""W₂ = g S P Wᵀ: the tied output channels in another order, with other signs, and scaled by learned factors."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import MODELS
from oracle import Net, assert_equals_twin, assert_idempotent, blocks, linear, mlp
from torch import nn

import pe_fx
from pe_fx.tied.assembly import Mix
from pe_fx.ties import Block, Tie

X = torch.randn(2, 3, 8)

VARIANTS: list[dict[str, Any]] = [{"mix": "signed"}, {"gain": True}, {"mix": "signed", "gain": 0.5}, {"mix": "fitted", "gain": 0.5}]
every_variant = pytest.mark.parametrize("options", VARIANTS, ids=["signed", "gain", "both", "fitted"])


# ---- the permutation


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 12, 64, 97, 384])
def test_mix_is_a_signed_permutation(size: int) -> None:
    numbers = torch.arange(1, size + 1)
    for seed in range(5):
        mix = Mix.drawn(0, 1, (size, 4), seed)
        mixed = mix(torch.stack([numbers] * 4, 1))
        assert torch.equal(mixed[:, 0], -mixed[:, 3])
        assert torch.equal(mixed[:, 2], mixed[:, 3])
        assert sorted(mixed[:, 3].abs().tolist()) == numbers.tolist()
        assert int((mixed[:, 3] < 0).sum()) == size // 2
        assert Mix.drawn(0, 1, (size, 4), seed) == mix


def test_mixes_are_the_same_for_ever() -> None:
    """Files that were written keep their meaning."""
    mixes = [Mix.drawn(0, 1, (size, 8), seed) for size, seed in ((768, 0), (576, 1), (97, 3), (64, 4_000_000_000))]
    assert [mix.hands for mix in mixes] == [24, 18, 1, 8]


def test_a_seed_belongs_to_its_weight() -> None:
    every = {tie.target: tie.seed for tie in pe_fx.plan(blocks(3), X, mix="signed").ties}
    some = {tie.target: tie.seed for tie in pe_fx.plan(blocks(3), X, mix="signed", exclude=["blocks.0"]).ties}
    assert some == {name: every[name] for name in some}
    assert len(some) == 2


def test_blocks_alike_are_mixed_alike_unless_they_share_one_matrix() -> None:
    own = pe_fx.plan(blocks(3), X, mix="signed").ties
    shared = [tie for tie in pe_fx.plan(blocks(3), X, mix="signed", share=("mlp",)).ties if tie.channels is not None]
    assert (len(own), len({tie.seed for tie in own})) == (3, 1)
    assert (len(shared), len({tie.seed for tie in shared})) == (3, 3)


def test_seeds_differ() -> None:
    assert {Mix.drawn(0, 1, (384, 4), seed).hands for seed in range(100)} == {16, 24}


def test_any_axis() -> None:
    weight = torch.randn(6, 4, 1, 1)
    assert torch.equal(Mix(1, 0, 2, 4, 6)(weight, 4), Mix(0, 1, 2, 4, 6)(weight.transpose(0, 1), 4).transpose(0, 1))


# ---- models


def test_the_formula() -> None:
    tied = pe_fx.transform(mlp(), X, mix="signed", gain=0.5)
    plan = pe_fx.plan(mlp(), X, mix="signed", gain=0.5)
    assert [str(tie) for tie in plan.ties] == ["2.weight ← gain · ±0.weightᵀ"]
    assert torch.equal(tied[2].weight_gain, torch.full((8,), 0.5))
    with torch.no_grad():
        tied[2].weight_gain.copy_(torch.arange(8.0))
    mixed = Mix.drawn(0, 1, (8, 16), plan.ties[0].seed)(tied[0].weight.t())
    assert torch.equal(tied[2].weight, torch.arange(8.0)[:, None] * mixed)
    assert str(tied[2]) == "TiedLinear(in_features=16, out_features=8, bias=True, weight ← gain · ±0.weightᵀ)"


@every_variant
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_twin(name: str, options: dict[str, Any]) -> None:
    model, inputs = MODELS[name].build(), MODELS[name].inputs
    plan = pe_fx.plan(model, inputs, **options)
    assert {site.kind: 0 for site in plan.sites}.keys() == MODELS[name].sites.keys()
    assert pe_fx.Plan.from_json(plan.to_json()) == plan
    tied = pe_fx.apply(model, plan)
    assert sum(parameter.numel() for parameter in tied.parameters()) == plan.params_after
    assert_equals_twin(model, tied, plan, inputs, 1e-3)


@every_variant
@pytest.mark.parametrize("entry", ["keep", "slice", "expand"])
def test_stages(entry: str, options: dict[str, Any]) -> None:
    """Readers of a shared W are as they were; the first block's input channels are mixed, its output is W itself and not scaled."""
    from timm.models.resnet import Bottleneck, ResNet

    model = ResNet(Bottleneck, layers=(3, 2, 1, 1), channels=(8, 16, 16, 16), num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    plan = pe_fx.plan(model, images, entry=entry, **options)
    tied = pe_fx.apply(model, plan)
    assert pe_fx.verify(tied, images)
    assert sum(parameter.numel() for parameter in tied.parameters()) == plan.params_after
    for site in plan.sites:
        for tie in site.ties:
            reads = tie.target == site.weights[0]
            is_mixed = "mix" in options and (site.entry is not None or not reads)
            if options.get("mix") == "fitted":  # a weight that is widened has no values to fit an order to
                assert (tie.order is not None) == (is_mixed and (site.entry is None or entry == "slice"))
            else:
                assert (tie.seed is not None) == is_mixed
            assert (tie.gain is not None) == ("gain" in options and not reads)


@every_variant
def test_untie_and_load_into_the_dense_model(options: dict[str, Any]) -> None:
    dense = blocks(2)
    tied = pe_fx.transform(dense, X, **options)
    twin = pe_fx.untie(tied)
    torch.testing.assert_close(twin(X), tied(X))
    blocks(2).load_state_dict(twin.state_dict())


@every_variant
def test_checkpoint_with_its_plan(options: dict[str, Any]) -> None:
    plan = pe_fx.plan(blocks(2), X, **options)
    tied = pe_fx.apply(blocks(2), plan)
    file = io.BytesIO()
    torch.save(tied.state_dict(), file)
    file.seek(0)
    fresh = pe_fx.apply(blocks(2), pe_fx.Plan.from_json(plan.to_json()))
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(X), tied(X))
    assert torch.equal(copy.deepcopy(tied)(X), tied(X))


@every_variant
@pytest.mark.parametrize(
    "model", [mlp(), Net(lambda m, x: F.linear(F.linear(x, m.a).relu(), m.b), a=torch.randn(8, 8), b=torch.randn(8, 8))]
)
def test_twice_is_once(model: nn.Module, options: dict[str, Any]) -> None:
    assert_idempotent(model, X, **options)


def test_mixing_frees_the_jacobian_from_symmetry() -> None:
    model = nn.Sequential(linear(8, 16), nn.GELU(), linear(16, 8))
    for mix, symmetric in (("none", True), ("signed", False)):
        jacobian = torch.autograd.functional.jacobian(pe_fx.transform(model, X, mix=mix), torch.randn(8))
        assert torch.allclose(jacobian, jacobian.T, atol=1e-6) is symmetric


@every_variant
def test_mean_undoes_the_variant_before_it_averages(options: dict[str, Any]) -> None:
    tied = pe_fx.transform(mlp(), X, **options)
    again = pe_fx.transform(pe_fx.untie(tied), X, init="mean", **options)
    torch.testing.assert_close(again(X), tied(X))


def test_a_state_dict_remembers_the_mix() -> None:
    """Names and shapes are those of a plain tie."""
    plain, signed = pe_fx.transform(blocks(1), X), pe_fx.transform(blocks(1), X, mix="signed")
    file = io.BytesIO()
    torch.save(signed.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with pytest.raises(RuntimeError, match=r"blocks.0.2 was saved with another order or other signs \(mix\)"):
        plain.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"blocks.0.2 was saved with another order"):
        signed.load_state_dict(plain.state_dict())
    copy.deepcopy(signed).load_state_dict(saved)


def test_a_state_dict_of_other_ties_is_told_as_such() -> None:
    def build() -> Net:
        weights = {name: torch.randn(8, 8) for name in "abcd"}
        return Net(lambda m, x: ((x @ m.a).relu() @ m.b @ m.c).relu() @ m.d, **weights)

    both, one = pe_fx.transform(build(), X), pe_fx.transform(build(), X, include=["a"])
    assert (set(both.tied_weights), set(one.tied_weights)) == ({"b", "d"}, {"b"})
    with pytest.raises(RuntimeError, match="was saved with other weights tied, or other parts of them, than here"):
        one.load_state_dict(both.state_dict())


def test_a_gain_of_the_models_own_stays() -> None:
    model = mlp()
    model[2].register_parameter("weight_gain", nn.Parameter(torch.ones(3)))
    assert torch.equal(pe_fx.untie(pe_fx.transform(model, X)).get_parameter("2.weight_gain"), torch.ones(3))


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": "random"}, "mix='random' is unknown; choose from 'none', 'signed', 'fitted'"),
        ({"gain": "yes"}, "gain='yes' must be True, False or the number"),
        ({"gain": float("nan")}, "gain=nan must be"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pe_fx.PeFxError, match=message):
        pe_fx.transform(mlp(), X, **options)


def test_a_tie_without_channels_has_no_variant() -> None:
    block = Block.whole("w", (4, 4))
    with pytest.raises(pe_fx.PeFxError, match="names no dimension"):
        Tie(block, block, True, seed=0)


def test_a_name_that_is_taken() -> None:
    model = mlp()
    model[2].register_parameter("weight_gain", nn.Parameter(torch.ones(3)))
    with pytest.raises(pe_fx.PeFxError, match=r"2.weight_gain"):
        pe_fx.transform(model, X, gain=True)
