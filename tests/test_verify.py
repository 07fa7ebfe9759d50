"""pe_fx.verify and the tests' own oracle: both pass on right models and fail on planted errors."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Inputs, Net, assert_equals_twin, linear
from torch import Tensor, nn

import pe_fx
from pe_fx import Plan
from pe_fx.tied.twin import Comparison, Report

X = torch.randn(3, 5, 8)
IMAGE = torch.randn(2, 8, 6, 6)


def mlp() -> nn.Sequential:
    return nn.Sequential(linear(8, 16), nn.GELU(), nn.Dropout(0.2), linear(16, 8))


def glu() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        gate, up = m.up(x).chunk(2, -1)
        return m.down(F.silu(gate) * up)

    return Net(forward, up=linear(8, 32), down=linear(16, 8))


def bottleneck(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, width, 1)
    )


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "mlp": (mlp, X),
    "glu": (glu, X),
    "encoder": (encoder, X),
    "bottleneck": (bottleneck, IMAGE),
    "stage": (lambda: nn.Sequential(bottleneck(), bottleneck()), IMAGE),
}


@pytest.mark.parametrize("name", MODELS)
def test_right_models_pass(name: str) -> None:
    build, x = MODELS[name]
    report = pe_fx.verify(pe_fx.transform(build(), x), x)
    assert report, str(report)
    assert "NOT" not in str(report)


@pytest.mark.parametrize("init", ["mean", "reset"])
def test_other_inits_pass(init: str) -> None:
    assert pe_fx.verify(pe_fx.transform(mlp(), X, init=init), X)


def test_passes_after_training() -> None:
    tied = pe_fx.transform(encoder(), X)
    optimizer = torch.optim.SGD(tied.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        tied(X).square().mean().backward()
        optimizer.step()
    assert pe_fx.verify(tied, X)


def test_keyword_inputs_and_several_outputs() -> None:
    net = Net(lambda m, x, scale: {"y": m.fc2(m.fc1(x).relu()) * scale, "x": [x + 1]}, fc1=linear(8, 16), fc2=linear(16, 8))
    inputs = {"x": X, "scale": torch.tensor(2.0)}
    assert pe_fx.verify(pe_fx.transform(net, inputs), inputs)


def test_inputs_are_derived_where_left_out() -> None:
    assert pe_fx.verify(pe_fx.transform(mlp()))


def test_report_names_every_comparison() -> None:
    text = str(pe_fx.verify(pe_fx.transform(mlp(), X), X))
    assert all(word in text for word in ("train", "eval", "outputs", "gradients"))


def test_dense_model_is_refused() -> None:
    with pytest.raises(pe_fx.PeFxError, match=r"transform"):
        pe_fx.verify(mlp(), X)


class TrainOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, training: bool) -> Tensor:
        ctx.training = training
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        assert ctx.training, "make sure to use model.train()"
        return gradient, None


def test_backward_that_raises_in_eval_mode() -> None:
    net = Net(lambda m, x: TrainOnly.apply(m.inner(x), m.training), inner=pe_fx.transform(mlp(), X))
    report = pe_fx.verify(net, X)
    assert report
    assert [(c.mode, c.quantity) for c in report.comparisons] == [("train", "outputs"), ("train", "gradients"), ("eval", "outputs")]
    raised = "eval: no gradients compared, since the dense twin's backward raises AssertionError: make sure to use model.train()"
    assert report.notes == (raised,)
    assert str(report).endswith(raised)


def test_backward_that_raises_in_the_tied_model_alone() -> None:
    net = Net(lambda m, x: TrainOnly.apply(m.inner(x), not hasattr(m.inner[3], "tied_weights")), inner=pe_fx.transform(mlp(), X))
    with pytest.raises(AssertionError, match="make sure to use"):
        pe_fx.verify(net, X)


def test_no_gradient_reaches_what_is_tied() -> None:
    net = Net(lambda m, x: m.scale * m.inner(x).detach(), inner=pe_fx.transform(mlp(), X), scale=torch.randn(8))
    report = pe_fx.verify(net, X)
    assert report.notes == ("train: no gradient reaches a tied weight", "eval: no gradient reaches a tied weight")
    assert not pe_fx.verify(net.inner, X).notes


def test_a_model_with_random_numbers_of_its_own_seed() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(next(seeds)))
        return m.inner(x + noise) if m.training else m.inner(x)

    seeds = itertools.count()
    net = Net(forward, inner=pe_fx.transform(mlp(), X))
    report = pe_fx.verify(net, X)
    assert report
    assert {comparison.mode for comparison in report.comparisons} == {"eval"}
    assert report.notes[0].startswith("train: not compared, since two runs of the dense twin differ by")


def test_a_model_that_returns_positions_alone() -> None:
    net = Net(lambda m, x: m.inner(x).argmax(-1), inner=pe_fx.transform(mlp(), X))
    report = pe_fx.verify(net, X)
    assert not report
    assert report.notes == tuple(f"{mode}: not compared, since the model returns no floating-point tensor" for mode in ("train", "eval"))
    assert "nothing could be compared" in str(report)


def test_a_model_that_returns_nan_alone() -> None:
    def forward(m: Net, x: Tensor, hide: Tensor) -> Tensor:
        return m.o((m.q(x) @ m.k(x).mT).masked_fill(hide, float("-inf")).softmax(-1) @ m.v(x))

    inputs = (X, torch.ones(5, 5, dtype=torch.bool))
    tied = pe_fx.transform(Net(forward, **{name: linear(8, 8) for name in "qkvo"}), inputs)
    report = pe_fx.verify(tied, inputs)
    assert not report
    assert report.notes == tuple(f"{mode}: not compared, since the dense twin returns no finite number" for mode in ("train", "eval"))


def test_a_model_that_returns_nothing() -> None:
    net = Net(lambda m, x: m.inner(x)[:0], inner=pe_fx.transform(mlp(), X))
    report = pe_fx.verify(net, X)
    assert not report
    assert "nothing could be compared" in str(report)


def test_gradients_that_are_nan_alone() -> None:
    net = Net(lambda m, x: m.inner(x) + 0 * (0 * m.inner(x)).sqrt(), inner=pe_fx.transform(mlp(), X).eval())
    report = pe_fx.verify(net, X)
    assert {comparison.quantity for comparison in report.comparisons} == {"outputs"}
    assert report.notes[1] == "eval: no gradients compared, since no finite one reaches a tied weight"


def test_infinity_hides_no_error() -> None:
    net = Net(lambda m, x: (x.masked_fill(x > 0, float("inf")), m.inner(x)), inner=pe_fx.transform(mlp(), X))
    assert pe_fx.verify(net, X)
    planted(net.inner[3], **weight_of(lambda m, w: w.flip(0)))
    assert all(comparison.error > 0.1 for comparison in pe_fx.verify(net, X).comparisons)


def test_no_tolerance_is_none() -> None:
    assert pe_fx.verify(pe_fx.transform(mlp(), X), X, tolerance=0.0).tolerance == 0
    exact = Report((Comparison("eval", "outputs", "", 0.0),), 0.0)
    assert exact
    assert not dataclasses.replace(exact, comparisons=(Comparison("eval", "outputs", "output 0", 1e-9),))


def test_the_model_is_not_touched() -> None:
    tied = pe_fx.transform(bottleneck(), IMAGE).eval()
    before = {name: value.clone() for name, value in tied.state_dict().items()}
    state = torch.get_rng_state()
    pe_fx.verify(tied, IMAGE)
    assert all(torch.equal(value, before[name]) for name, value in tied.state_dict().items())
    assert all(parameter.grad is None for parameter in tied.parameters())
    assert not tied.training
    assert torch.equal(state, torch.get_rng_state())


# ---- planted errors


def planted(module: nn.Module, **members: Any) -> None:
    """Gives one module a class of its own with these members; copies keep it."""
    base = type(module)
    module.__class__ = type(f"Planted{base.__name__}", (base,), {"__reduce_ex__": object.__reduce_ex__, **members})


def weight_of(change: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Any]:
    def weight(self: nn.Module) -> Tensor:
        inherited = next(vars(cls)["weight"] for cls in type(self).__mro__[1:] if "weight" in vars(cls))
        return change(self, inherited.fget(self))

    return {"weight": property(weight)}


def forward_of(change: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Any]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return change(self, nn.Linear.forward(self, x))  # type: ignore[arg-type]

    return {"forward": forward}


class DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


ERRORS: dict[str, dict[str, Any]] = {
    "weight detaches": weight_of(lambda m, w: w.detach()),
    "weight is flipped": weight_of(lambda m, w: w.flip(0)),
    "weight's rows are rolled": weight_of(lambda m, w: w.roll(1, 0)),
    "weight is scaled a little": weight_of(lambda m, w: 1.001 * w),
    "weight is rounded": weight_of(lambda m, w: w.bfloat16().float()),
    "weight's gradient is doubled": weight_of(lambda m, w: DoubledGradient.apply(w)),
    "weight is wrong in training only": weight_of(lambda m, w: -w if m.training else w),
    "weight is wrong in eval only": weight_of(lambda m, w: w if m.training else -w),
    "weight is one row off": weight_of(lambda m, w: torch.cat((w[:1].detach(), w[1:]))),
    "forward adds something": forward_of(lambda m, y: y + 0.01),
    "forward detaches": forward_of(lambda m, y: y.detach() + 0 * y),
    "forward makes nan": forward_of(lambda m, y: y * float("nan")),
}


def assert_both_fail(dense: nn.Module, tied: nn.Module, plan: Plan, inputs: Inputs) -> None:
    report = pe_fx.verify(tied, inputs)
    assert not report, str(report)
    assert "NOT equal" in str(report)
    with pytest.raises(AssertionError, match=r"train|eval"):
        assert_equals_twin(dense, tied, plan, inputs)


@pytest.mark.parametrize("error", ERRORS)
def test_planted_in_a_linear(error: str) -> None:
    dense = mlp()
    plan = pe_fx.plan(dense, X)
    tied = pe_fx.apply(dense, plan)
    planted(tied[3], **ERRORS[error])
    assert_both_fail(dense, tied, plan, X)


def test_planted_in_a_convolution() -> None:
    dense = bottleneck()
    plan = pe_fx.plan(dense, IMAGE)
    tied = pe_fx.apply(dense, plan)
    planted(tied[5], **weight_of(lambda m, w: w.detach()))
    assert_both_fail(dense, tied, plan, IMAGE)


def test_planted_in_a_fused_weight() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        return m.proj(F.scaled_dot_product_attention(q, k, v))

    dense = Net(forward, qkv=linear(8, 24), proj=linear(8, 8))
    plan = pe_fx.plan(dense, X)
    tied = pe_fx.apply(dense, plan)
    planted(tied.qkv, **weight_of(lambda m, w: torch.cat((w[8:16], w[:8], w[16:]))))
    assert_both_fail(dense, tied, plan, X)


def test_copy_that_shares_no_source() -> None:
    dense = mlp()
    plan = pe_fx.plan(dense, X)
    tied = pe_fx.apply(dense, plan)
    stale = copy.deepcopy(tied)[0].weight.detach().t()
    planted(tied[3], **weight_of(lambda m, w: stale + 0 * w))
    with torch.no_grad():
        tied[0].weight.add_(0.1)
        dense[0].weight.add_(0.1)
    assert_both_fail(dense, tied, plan, X)


# ---- the oracle alone: what only the plan tells


def changed(plan: Plan, **fields: Any) -> Plan:
    (site,) = plan.sites
    (tie,) = site.ties
    return dataclasses.replace(plan, sites=(dataclasses.replace(site, ties=(dataclasses.replace(tie, **fields),)),))


def test_oracle_sees_a_missing_transpose() -> None:
    dense = nn.Sequential(linear(8, 8), nn.ReLU(), linear(8, 8))
    plan = pe_fx.plan(dense, X)
    wrong = changed(plan, transposed=False)
    assert_equals_twin(dense, pe_fx.apply(dense, wrong), wrong, X)
    with pytest.raises(AssertionError, match=r"train output"):
        assert_equals_twin(dense, pe_fx.apply(dense, wrong), plan, X)


def test_oracle_sees_the_wrong_rows() -> None:
    dense = glu()
    plan = pe_fx.plan(dense, X)
    (tie,) = plan.ties
    wrong = changed(plan, of=tie.of.narrowed(0, range(16)))
    with pytest.raises(AssertionError, match=r"train output"):
        assert_equals_twin(dense, pe_fx.apply(dense, wrong), plan, X)


def test_oracle_sees_a_weight_that_stayed() -> None:
    dense = mlp()
    with pytest.raises(AssertionError, match=r"3\.weight"):
        assert_equals_twin(dense, copy.deepcopy(dense), pe_fx.plan(dense, X), X)


def test_oracle_sees_rows_that_stayed() -> None:
    dense = encoder()
    plan = pe_fx.plan(dense, X)
    fewer = dataclasses.replace(
        plan, sites=tuple(dataclasses.replace(site, ties=site.ties[1:]) if site.kind == "attention" else site for site in plan.sites)
    )
    with pytest.raises(AssertionError, match=r"in_proj_weight"):
        assert_equals_twin(dense, pe_fx.apply(dense, fewer), plan, X)


def test_oracle_sees_another_initial_value() -> None:
    dense = mlp()
    plan = pe_fx.plan(dense, X)
    tied = pe_fx.apply(dense, plan)
    with torch.no_grad():
        tied[0].weight.add_(0.01)
    with pytest.raises(AssertionError, match=r"train output"):
        assert_equals_twin(dense, tied, plan, X)


def test_oracle_sees_other_buffers() -> None:
    dense = bottleneck()
    plan = pe_fx.plan(dense, IMAGE)
    tied = pe_fx.apply(dense, plan)
    tied[1].running_mean.add_(1)
    with pytest.raises(AssertionError, match=r"buffer"):
        assert_equals_twin(dense, tied, plan, IMAGE)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_that_runs_in_one_mode_alone(mode: str) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        if m.training is not (mode == "train"):
            raise ValueError("labels are missing")
        return m.down(F.gelu(m.up(x)))

    model = Net(forward, up=linear(8, 16), down=linear(16, 8)).train(mode == "train")
    report = pe_fx.verify(pe_fx.transform(model, X), X)
    other = {"train": "eval", "eval": "train"}[mode]
    assert report
    assert {comparison.mode for comparison in report.comparisons} == {mode}
    assert report.notes == (f"{other}: not compared, since the dense twin does not run in it: ValueError: labels are missing",)


def test_a_model_that_does_not_run_raises_its_own_error() -> None:
    tied = pe_fx.transform(mlp(), X)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pe_fx.verify(tied, torch.randn(3, 9))
