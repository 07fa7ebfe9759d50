"""across: each site is tied to the matrix of the next one, the last to the first's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_equals_twin, assert_idempotent, linear, ties
from torch import Tensor, nn

import pe_fx
from pe_fx import PeFxError, checkpoint
from pe_fx.distributed import units

X = torch.randn(2, 5, 8)


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = linear(8, hidden), linear(hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return y


def tower(*hidden: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*map(Block, hidden))


def assert_ring(model: nn.Module, expected: Sequence[str], **options: Any) -> nn.Module:
    plan = pe_fx.plan(model, X, across=["mlp"], **options)
    assert ties(plan) == list(expected)
    tied = pe_fx.apply(model, plan)
    assert_equals_twin(model, tied, plan, X)
    assert sum(parameter.numel() for parameter in tied.parameters()) == plan.params_after
    assert pe_fx.verify(tied, X)
    assert pe_fx.Plan.from_json(plan.to_json()) == plan
    return tied


RING = ["0.down.weight ← 1.up.weightᵀ", "1.down.weight ← 2.up.weightᵀ", "2.down.weight ← 0.up.weightᵀ"]


def test_three_blocks() -> None:
    tied = assert_ring(tower(16, 16, 16), RING)
    assert torch.equal(tied[2].down.weight, tied[0].up.weight.t())
    assert_idempotent(tied, X)


@pytest.mark.parametrize("options", [{"mix": "signed"}, {"mix": "signed", "gain": True}, {"mix": "none", "gain": 0.5}])
def test_mixed_and_scaled(options: dict[str, Any]) -> None:
    plan = pe_fx.plan(tower(16, 16), X, across=["mlp"], **options)
    assert [tie.source for tie in plan.ties] == ["1.up.weight", "0.up.weight"]
    tied = pe_fx.apply(tower(16, 16), plan)
    assert pe_fx.verify(tied, X)
    torch.testing.assert_close(pe_fx.untie(tied)(X), tied(X))


def test_as_many_parameters_as_without() -> None:
    model = tower(16, 16, 16)
    assert pe_fx.plan(model, X, across=["mlp"]).params_after == pe_fx.plan(model, X).params_after


def test_the_mean_is_of_what_shares_a_matrix() -> None:
    model = tower(16, 16)
    tied = pe_fx.transform(model, X, across=["mlp"], init="mean")
    torch.testing.assert_close(tied[1].up.weight, (model[1].up.weight + model[0].down.weight.t()) / 2)


def test_another_shape_ends_a_ring() -> None:
    two_rings = [
        "0.down.weight ← 1.up.weightᵀ",
        "1.down.weight ← 0.up.weightᵀ",
        "2.down.weight ← 3.up.weightᵀ",
        "3.down.weight ← 2.up.weightᵀ",
    ]
    assert_ring(tower(16, 16, 12, 12), two_rings)


def test_one_alone_stays_as_it_is() -> None:
    assert_ring(tower(16), ["0.down.weight ← 0.up.weightᵀ"])
    assert_ring(tower(16, 12), ["0.down.weight ← 0.up.weightᵀ", "1.down.weight ← 1.up.weightᵀ"])


def test_frozen_blocks_are_passed_over() -> None:
    model = tower(16, 16, 16)
    model[1].requires_grad_(False)
    assert_ring(model, ["0.down.weight ← 2.up.weightᵀ", "1.down.weight ← 1.up.weightᵀ", "2.down.weight ← 0.up.weightᵀ"])


def test_other_kinds_stay_within_their_sites() -> None:
    model = nn.Sequential(*tower(16, 16), *tower(16, 16))
    assert ties(pe_fx.plan(model, X, across=["glu"])) == [f"{i}.down.weight ← {i}.up.weightᵀ" for i in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"across": "mlp"}, r"across=\('mlp',\)"),
        ({"across": ["ffn"]}, "across='ffn' is unknown"),
        ({"across": ["mlp"], "share": {"mlp": 2}}, "'mlp' is in share and in across"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeFxError, match=message):
        pe_fx.plan(tower(16, 16), X, **options)


def test_saved_exported_and_in_one_unit(tmp_path: Path) -> None:
    tied = pe_fx.transform(tower(16, 16), X, across=["mlp"], mix="signed")
    checkpoint.save(tied, tmp_path / "ring.safetensors")
    assert torch.equal(checkpoint.load(tmp_path / "ring.safetensors", tower(16, 16))(X), tied(X))
    torch.testing.assert_close(torch.export.export(tied, (X,)).module()(X), tied(X))
    assert [set(unit) for unit in units(tied, list(tied))] == [set(tied)]


def test_the_backend_ties_as_transform_does() -> None:
    torch.compiler.reset()
    model = tower(16, 16)
    compiled = torch.compile(model, backend="pe_fx", options={"across": ["mlp"]})
    tied = pe_fx.transform(model, X, across=["mlp"])
    torch.testing.assert_close(compiled(X), tied(X))
    assert ties(pe_fx.commit(model)) == ["0.down.weight ← 1.up.weightᵀ", "1.down.weight ← 0.up.weightᵀ"]
