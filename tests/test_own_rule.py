"""examples/own_rule.py: a rule that is none of ours is planned, tied, verified and refused as ours are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pe_fx

EXAMPLES = Path(__file__).parent.parent / "examples"


class Attention(nn.Module):
    def __init__(self, width: int = 16, keys: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, keys), nn.Linear(width, keys)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        k, v = (part(x).repeat(1, 1, q.shape[-1] // self.k.out_features) for part in (self.k, self.v))
        return functional.scaled_dot_product_attention(q, k, v)


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    import own_rule

    return own_rule.SharedQK()


def test_queries_and_keys_share_one_matrix(rule: Any) -> None:
    model, x = nn.Sequential(Attention(), Attention()), torch.randn(2, 5, 16)
    tied = pe_fx.transform(model, x, rules=[rule])
    assert isinstance(tied[1], Attention)
    assert torch.equal(tied[1].k.weight, tied[1].q.weight)
    assert sorted(model.state_dict().keys() - tied.state_dict().keys()) == ["0.k.weight", "1.k.weight"]
    assert pe_fx.verify(tied, x)


def test_an_attention_that_runs_twice_is_one_site(rule: Any) -> None:
    shared = Attention()
    plan = pe_fx.plan(nn.Sequential(shared, shared), torch.randn(2, 5, 16), rules=[rule])
    assert [str(tie) for tie in plan.ties] == ["0.k.weight ← 0.q.weight"]


def test_other_shapes_are_a_miss(rule: Any) -> None:
    plan = pe_fx.plan(Attention(keys=8), torch.randn(2, 5, 16), rules=[rule])
    assert [(miss.kind, miss.reason) for miss in plan.misses] == [("shared_qk", "q.weight and k.weight are no two matrices of one shape")]


def test_what_forbids_other_ties_forbids_this_one(rule: Any) -> None:
    model = Attention()
    model.k.weight.requires_grad_(False)
    plan = pe_fx.plan(model, torch.randn(2, 5, 16), rules=[rule])
    assert not plan.sites
    assert "k.weight is frozen" in plan.misses[0].reason


def test_it_runs_beside_the_default_rules(rule: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import own_rule

    own_rule.main()
    assert "4 sites (2 shared_qk, 2 mlp)" in capsys.readouterr().out


def test_the_readme_shows_it() -> None:
    source = (EXAMPLES / "own_rule.py").read_text()
    shown = source[source.index("class SharedQK") : source.index("\n\n\ndef main")]
    assert shown in (EXAMPLES.parent / "README.md").read_text()
