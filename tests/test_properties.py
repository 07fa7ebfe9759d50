"""Random networks of random blocks: what must be tied is, what must not be is not, and every rewrite equals its dense twin."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from oracle import assert_equals_twin
from torch import Tensor, nn
from torch.nn import functional as F

import pe_fx
from pe_fx.passes.variants import MIXES

WIDTH, TOKENS = 8, 6
EXAMPLES = int(os.environ.get("PE_FX_EXAMPLES", "50"))

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "square": lambda h: h * h,
    "softmax": lambda h: h.softmax(-1),
    "in_place": lambda h: h.relu_(),
}
HARMLESS = {
    "nothing": lambda h: h,
    "dropout": lambda h: F.dropout(h, 0.1, True),
    "norm": lambda h: F.layer_norm(h, h.shape[-1:]),
    "heads": lambda h: h.unflatten(-1, (2, -1)).transpose(1, 2).transpose(1, 2).flatten(-2),
    "tokens": lambda h: h.flatten(0, 1).view(-1, TOKENS, h.shape[-1]),
    "split": lambda h: torch.cat(h.chunk(2, -1), -1),
    "roll": lambda h: h.roll(1, 1),
    "depthwise": lambda h: F.conv1d(h.mT, torch.ones(h.shape[-1], 1, 3, dtype=h.dtype), padding=1, groups=h.shape[-1]).mT,
    "rms": lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
}
BREAKING = {
    "flip": lambda h: h.flip(-1),
    "shuffle": lambda h: h.unflatten(-1, (2, -1)).mT.flatten(-2),
    "mean": lambda h: h.mean(-1, keepdim=True).expand_as(h).contiguous(),  # for an activation in place may follow
}
FORMS = ("linear", "functional", "matmul", "einsum", "conv", "addmm")


@dataclass(frozen=True)
class Spec:
    """One block; `is_site` says whether its two weights must be tied or must not."""

    form: str = "linear"
    hidden: int = 16
    activation: str | None = "relu"
    before: str = "nothing"
    after: str = "nothing"
    leak: bool = False
    residual: bool = True
    frozen: bool = False
    calls: int = 1

    @property
    def is_site(self) -> bool:
        in_order = {self.before, self.after}.isdisjoint(BREAKING) or self.before == self.after == "flip"
        return self.activation is not None and in_order and not self.leak and not self.frozen

    @property
    def kind(self) -> str:
        return "bottleneck" if self.form == "conv" and "depthwise" in (self.before, self.after) else "mlp"


class Block(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        shapes = ((spec.hidden, WIDTH), (WIDTH, spec.hidden))
        if spec.form in ("matmul", "einsum", "addmm"):
            shapes = (shapes[0][::-1], shapes[1][::-1])
        if spec.form == "conv":
            shapes = ((*shapes[0], 1), (*shapes[1], 1))
        self.first, self.second = (nn.Parameter(torch.randn(shape) / 4) for shape in shapes)
        self.second.requires_grad_(not spec.frozen)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        match self.spec.form:
            case "matmul":
                return x @ weight
            case "einsum":
                return torch.einsum("bnc,cd->bnd", x, weight)
            case "addmm":
                return torch.addmm(torch.zeros(weight.shape[1], dtype=x.dtype), x.flatten(0, 1), weight).view(*x.shape[:2], -1)
            case "conv":
                return F.conv1d(x.mT, weight).mT
        return F.linear(x, weight)

    def once(self, x: Tensor) -> Tensor:
        change = HARMLESS | BREAKING
        h = change[self.spec.before](self.apply_weight(x, self.first))
        if self.spec.activation is not None:
            h = ACTIVATIONS[self.spec.activation](h)
        y = self.apply_weight(change[self.spec.after](h), self.second)
        return y + h[..., :WIDTH] if self.spec.leak else y

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.spec.calls):
            x = x + self.once(x) if self.spec.residual else F.layer_norm(x, (WIDTH,)) + x.tanh() * self.once(x)
        return x


changes = st.sampled_from([*HARMLESS] * 3 + [*BREAKING])
specs = st.builds(
    Spec,
    form=st.sampled_from(FORMS),
    hidden=st.sampled_from((8, 12, 16)),
    activation=st.sampled_from([*ACTIVATIONS, None]),
    before=changes,
    after=changes,
    leak=st.sampled_from((False, False, False, True)),
    residual=st.booleans(),
    frozen=st.sampled_from((False, False, False, True)),
    calls=st.sampled_from((1, 1, 2)),
)


@pytest.mark.parametrize("part", range(4))
def test_random_networks(part: int) -> None:
    @seed(part)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],
    )
    @given(
        blocks=st.lists(specs, min_size=1, max_size=4),
        share=st.sampled_from(((), ("mlp",))),
        mix=st.sampled_from(MIXES),
        gain=st.booleans(),
    )
    def check(blocks: list[Spec], share: tuple[str, ...], mix: str, gain: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(*map(Block, blocks)).double()
        before = copy.deepcopy(model.state_dict())
        x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)

        plan = pe_fx.plan(model, x, share=share, mix=mix, gain=gain)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        tied = {site.weights: site.kind for site in plan.sites}
        expected_sites = {(f"{i}.first", f"{i}.second"): spec.kind for i, spec in enumerate(blocks) if spec.is_site}
        assert tied == expected_sites, f"{plan}\n{plan.explain()}"
        assert pe_fx.Plan.from_json(plan.to_json()) == plan

        result = pe_fx.apply(model, plan)
        assert sum(parameter.numel() for parameter in result.parameters()) == plan.params_after
        if plan.sites:
            assert_equals_twin(model, result, plan, x)
            dense = pe_fx.untie(result)
            torch.manual_seed(0)
            expected = result(x)
            torch.manual_seed(0)
            torch.testing.assert_close(dense(x), expected)

    check()
