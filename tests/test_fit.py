"""W₂ = c Wᵀ Π T: ties fitted to a trained model, and W by least squares on what runs through it."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import MODELS
from oracle import Net, assert_equals_twin, assert_idempotent, blocks, linear, mlp, weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import pe_fx
from pe_fx import PeFxError, checkpoint
from pe_fx.distributed import tensor_parallel_plan
from pe_fx.tied.moments import moments_of
from pe_fx.tied.weight import tied_weights_in
from pe_fx.ties import Block, Order, Tie

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
FITTED: dict[str, Any] = {"mix": "fitted", "init": "fit"}


def related(model: nn.Module, target: str, source: str, factor: float = 0.5) -> nn.Module:
    """`target` is `source` transposed, its rows in another order, with signs and a factor."""
    with torch.no_grad():
        of, into = model.get_parameter(source), model.get_parameter(target)
        rows = of[torch.randperm(len(of))] * factor * torch.randn(len(of)).sign().view(-1, *[1] * (of.dim() - 1))
        into.copy_(rows.transpose(0, 1))
    return model


def trained(depth: int = 2, act: Callable[[], nn.Module] = nn.GELU) -> nn.Module:
    """Residual blocks that have learned something, so that some units count more than others."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(8, 32, act()) for _ in range(depth)), linear(8, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.mse_loss(model(X), torch.stack([X[:, 0] * X[:, 1], X[:, 2].sin(), X[:, 3].abs(), X[:, 4]], 1)).backward()
        optimizer.step()
    return model


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(width), linear(width, hidden), act, linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def distance(model: nn.Module, other: nn.Module, x: Tensor = X) -> float:
    with torch.no_grad():
        return float((model(x) - other(x)).square().mean())


# ---- what is found


@pytest.mark.parametrize("calibration", [None, [X], [X[:32], X[32:]]], ids=["weights", "one batch", "two"])
def test_what_is_related_is_recovered(calibration: Any) -> None:
    dense = related(mlp(), "2.weight", "0.weight")
    tied = pe_fx.transform(dense, X, **FITTED, calibration=calibration)
    torch.testing.assert_close(tied(X), dense(X))
    torch.testing.assert_close(tied[0].weight, dense[0].weight)
    assert str(tied[2]) == "TiedLinear(in_features=16, out_features=8, bias=True, weight ← ±0.weightᵀ)"


def attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def gate(m: Net, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def matrices(m: Net, x: Tensor) -> Tensor:
    return (x @ m.a).relu() @ m.b


RELATED: dict[str, tuple[Callable[[], nn.Module], Tensor, list[tuple[str, str]]]] = {
    "attention": (
        lambda: Net(attention, **{name: linear(8, 8) for name in ("q", "k", "v", "proj")}),
        X.view(4, 16, 8),
        [("v.weight", "k.weight"), ("proj.weight", "q.weight")],
    ),
    "gated": (lambda: Net(gate, gate=linear(8, 16), up=linear(8, 16), down=linear(16, 8)), X, [("down.weight", "up.weight")]),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 1)),
        X.view(1, 8, 8, 8),
        [("5.weight", "0.weight")],
    ),
}


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "calibrated"])
@pytest.mark.parametrize("name", RELATED)
def test_every_kind_of_site(name: str, calibrated: bool) -> None:
    build, x, pairs = RELATED[name]
    dense = build()
    for target, source in pairs:
        related(dense, target, source)
    tied = pe_fx.transform(dense, x, **FITTED, calibration=[x] if calibrated else None)
    assert sum(parameter.numel() for parameter in tied.parameters()) < sum(parameter.numel() for parameter in dense.parameters())
    torch.testing.assert_close(tied(x), dense(x))


def test_weights_that_are_no_layers() -> None:
    """Applied from the right, where the hidden units are the columns of the source."""
    dense = Net(matrices, a=weight(8, 16), b=weight(16, 8))
    with torch.no_grad():
        dense.b.copy_(-2 * dense.a.t()[torch.randperm(16)])
    tied = pe_fx.transform(dense, X, **FITTED, calibration=[X])
    torch.testing.assert_close(tied(X), dense(X))


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_on_every_model(name: str) -> None:
    """What the weights of each are multiplied with is seen, whatever operation it is that applies them."""
    model, inputs = MODELS[name].build(), MODELS[name].inputs
    plan = pe_fx.plan(model, inputs, mix="fitted", calibration=[inputs])
    tied = pe_fx.apply(model, plan, init="fit", calibration=[inputs])
    assert all((tie.order is not None) == (tie.channels is not None) for tie in plan.ties)
    with torch.no_grad():
        for tie in plan.ties:
            model.get_parameter(tie.source).copy_(pe_fx.untie(tied).get_parameter(tie.source))
    assert_equals_twin(model, tied, plan, inputs, 1e-3)


def test_a_trained_model_changes_least_with_a_fitted_order() -> None:
    dense = trained()
    fitted, *others, kept = [
        distance(dense, pe_fx.transform(dense, X, **options))
        for options in (
            FITTED | {"calibration": [X]},
            {"mix": "signed", "init": "fit", "calibration": [X]},
            {"mix": "signed", "init": "mean"},
            {"mix": "signed", "init": "keep"},
        )
    ]
    assert fitted < 0.5 * min(others)
    assert others[0] < kept


def test_calibration_helps_where_inputs_are_uneven() -> None:
    dense, x = trained(), X * torch.tensor([3.0] * 2 + [0.01] * 6)
    seen = pe_fx.transform(dense, x, **FITTED, calibration=[x])
    blind = pe_fx.transform(dense, x, **FITTED)
    assert distance(dense, seen, x) < 0.5 * distance(dense, blind, x)


def test_mean_and_keep_take_the_fitted_order() -> None:
    dense = related(mlp(), "2.weight", "0.weight", factor=2.0)
    for init in ("keep", "mean"):
        tied = pe_fx.transform(dense, X, mix="fitted", init=init)
        torch.testing.assert_close(tied(X), dense(X))


def test_the_gain_is_part_of_the_factor() -> None:
    dense = related(mlp(), "2.weight", "0.weight", factor=3.0)
    tied = pe_fx.transform(dense, X, **FITTED, gain=0.2)
    torch.testing.assert_close(tied(X), dense(X))
    (tie,) = pe_fx.plan(dense, X, mix="fitted", gain=0.2).ties
    assert tie.order is not None
    assert tie.order.factor == pytest.approx(15)


def test_a_fixed_mix_has_its_source_fitted() -> None:
    """Where no direction counts more than another, to the average in proportion to what the weights' own sizes allow."""
    dense = mlp()
    with torch.no_grad():
        dense[2].weight.mul_(dense[0].weight.norm() / dense[2].weight.norm())
    tied, mean = (pe_fx.transform(dense, X, mix="signed", init=init) for init in ("fit", "mean"))
    torch.testing.assert_close(tied[0].weight, mean[0].weight)


@pytest.mark.parametrize("mix", ["none", "signed", "fitted"])
def test_the_source_is_the_least_squares_solution(mix: str) -> None:
    """Against the normal equations, written out, with the moments computed by hand."""
    dense, damping = mlp(4), 0.1
    plan = pe_fx.plan(dense, X, mix=mix, calibration=[X] if mix == "fitted" else None)
    tied = pe_fx.apply(dense, plan, init="fit", calibration=[X])
    hidden = dense[0](X).detach().requires_grad_()
    out = dense[2](dense[1](hidden))
    (gradient,) = torch.autograd.grad(out, hidden, drawn := torch.randn(out.shape, generator=torch.Generator().manual_seed(0)))

    def moment(rows: Tensor) -> Tensor:
        mean = (rows.t() @ rows / len(rows)).double()
        return mean + damping * mean.diagonal().mean() * torch.eye(len(mean))

    with torch.no_grad():
        sides = [(moment(gradient), moment(X)), (moment(drawn), moment(dense[1](hidden)))]
    unit = torch.eye(32, dtype=torch.float64).view(32, 4, 8)
    reads = [unit, torch.stack([_read(plan, dense, basis) for basis in unit])]
    lhs, rhs = torch.zeros(32, 32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    for (left, right), made, layer in zip(sides, reads, (dense[0], dense[2]), strict=True):
        weighed = (left @ made @ right).flatten(1)
        lhs += weighed @ made.flatten(1).t()
        rhs += weighed @ layer.weight.detach().double().flatten()
    torch.testing.assert_close(tied[0].weight.double(), torch.linalg.solve(lhs, rhs).view(4, 8), rtol=1e-3, atol=1e-4)


def _read(plan: pe_fx.Plan, dense: nn.Module, source: Tensor) -> Tensor:
    """The tied weight that comes of a source."""
    model = pe_fx.apply(copy.deepcopy(dense).double(), plan)
    with torch.no_grad():
        model[0].weight.copy_(source)
        return model[2].weight.clone()


def test_all_sites_of_a_stage_count() -> None:
    """One W for three blocks: nearest to all of them, and not to the first alone."""
    dense = trained(3)
    shared = {"share": ("mlp",), "calibration": [X]}
    fit = pe_fx.transform(dense, X, **FITTED, **shared)
    keep = pe_fx.transform(dense, X, mix="fitted", **shared)
    assert sum(parameter.numel() for name, parameter in fit.named_parameters() if "up.weight" in name) == 8 * 32
    assert distance(dense, fit) < 0.9 * distance(dense, keep)


# ---- what is seen


def _by_hand(vectors: Tensor) -> Tensor:
    vectors = vectors.reshape(-1, vectors.shape[-1])
    return vectors.t() @ vectors / len(vectors)


IMAGES = X.view(1, 8, 8, 8)
SEEN: dict[str, tuple[nn.Module, Tensor, Tensor, list[int], list[int]]] = {
    "linear": (nn.Linear(8, 4), X, X, [0, 1, 2, 3, 4, 5, 6, 7], [0, 8, 16, 24]),
    "a vector": (nn.Linear(8, 4), X[0], X[0], [*range(8)], [0, 8, 16, 24]),
    "of rows": (Conv1D(4, 8), X.view(4, 16, 8), X, [0, 4, 8, 12, 16, 20, 24, 28], [0, 1, 2, 3]),
    "einsum": (Net(lambda m, x: torch.einsum("bd,hkd->bhk", x, m.weight), weight=weight(2, 2, 8)), X, X, [*range(8)], [0, 8, 16, 24]),
    "from the left": (
        Net(lambda m, x: m.weight @ x, weight=weight(4, 8)),
        X.view(4, 8, 16),
        X.view(4, 8, 16).mT,
        [*range(8)],
        [0, 8, 16, 24],
    ),
    "a convolution": (nn.Conv2d(8, 4, 1, stride=2), IMAGES, IMAGES[:, :, ::2, ::2].movedim(1, -1), [*range(8)], [0, 8, 16, 24]),
    "channels last": (nn.Conv2d(8, 4, 1).to(memory_format=torch.channels_last), IMAGES, IMAGES.movedim(1, -1), [*range(8)], [0, 8, 16, 24]),
}


@pytest.mark.parametrize("name", SEEN)
def test_moments_of_inputs_and_of_gradients(name: str) -> None:
    model, x, vectors, inputs, outputs = SEEN[name]
    moments = moments_of(model, ["weight"], [x, x])
    seen = moments.along("weight", torch.tensor(inputs))
    assert seen is not None
    torch.testing.assert_close(seen, _by_hand(vectors))
    gradients = moments.along("weight", torch.tensor(outputs))
    assert gradients is not None
    assert gradients.shape == (4, 4)
    assert bool((gradients.diagonal() > 0).all())


def test_rows_of_a_fused_weight_have_gradients_of_their_own() -> None:
    model = Net(lambda m, x: m.both(x).chunk(2, -1)[0] + 0 * m.both(x).chunk(2, -1)[1], both=linear(8, 4))
    moments = moments_of(model, ["both.weight"], [X])
    used, unused = (moments.along("both.weight", torch.tensor(rows)) for rows in ([0, 8], [16, 24]))
    assert used is not None
    assert unused is not None
    assert bool(used.any())
    assert not bool(unused.any())


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(), nn.Linear(16, 8))
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    pe_fx.transform(model, X, **FITTED, calibration=[X])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mode_comes_back_after_an_error() -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pe_fx.transform(model, X, **FITTED, calibration=[torch.randn(2, 3)])
    assert model.training
    assert not model[0]._forward_hooks


def test_same_batches_same_fit() -> None:
    dense = trained()
    plans = [pe_fx.plan(dense, X, mix="fitted", calibration=[X]) for _ in range(2)]
    assert plans[0] == plans[1]
    one, other = (pe_fx.apply(dense, plan, init="fit", calibration=[X]) for plan in plans)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    whole = pe_fx.transform(dense, X, **FITTED, calibration=iter([X]))  # read once
    assert torch.equal(whole(X), one(X))


def test_frozen_weights_are_fitted_too() -> None:
    dense = trained().requires_grad_(False)
    tied = pe_fx.transform(dense, X, **FITTED, calibration=[X])
    assert distance(dense, tied) < distance(dense, pe_fx.transform(dense, X))
    assert not any(parameter.requires_grad for parameter in tied.parameters())


def test_half_precision() -> None:
    dense = related(mlp(), "2.weight", "0.weight").to(torch.bfloat16)
    tied = pe_fx.transform(dense, X.bfloat16(), **FITTED, calibration=[X.bfloat16()])
    assert tied[2].weight.dtype is torch.bfloat16
    torch.testing.assert_close(tied(X.bfloat16()), dense(X.bfloat16()), rtol=0.05, atol=0.05)


# ---- the tie itself


@pytest.mark.parametrize("size", [1, 2, 7, 32_768, 32_769])
def test_an_order_is_kept_as_text(size: int) -> None:
    places, signs = torch.randperm(size).tolist(), (torch.randint(2, (size,)) * 2 - 1).tolist()
    order = Order.of(places, signs, 0.25)
    assert (list(order.places), list(order.signs), order.factor) == (places, signs, 0.25)
    assert len(order.code) <= 3 * size + 4 if size <= 32_768 else 6 * size


@pytest.mark.parametrize("order", [("AAAA",), ("?",), ("AAACAA==", float("nan")), ("AAACAA==", 0.0), ("AAAEAA==",)], ids=str)
def test_a_text_that_is_no_order(order: tuple[Any, ...]) -> None:
    with pytest.raises(PeFxError, match="is no order of a tie"):
        Order(*order)


def test_an_order_fits_its_tie() -> None:
    into, of = Block.whole("b", (4, 3)), Block.whole("a", (3, 4))
    with pytest.raises(PeFxError, match="its order has 2 entries"):
        Tie(into, of, True, channels=0, order=Order.of([0, 1], [1, 1]))
    with pytest.raises(PeFxError, match="names no dimension"):
        Tie(into, of, True, order=Order.of([0, 1, 2], [1, 1, 1]))


def test_a_damaged_plan_says_so() -> None:
    text = pe_fx.plan(mlp(4), X, mix="fitted").to_json()
    (tie,) = pe_fx.Plan.from_json(text).ties
    assert tie.order is not None
    with pytest.raises(PeFxError, match="damaged"):
        pe_fx.Plan.from_json(text.replace(tie.order.code, tie.order.code[:-4] + "////"))


def test_plans_without_orders_are_read() -> None:
    plan = pe_fx.plan(mlp(), X)
    assert pe_fx.Plan.from_json(plan.to_json().replace(', "order": null', "")) == plan


def fitted(dense: nn.Module | None = None) -> nn.Module:
    return pe_fx.transform(dense or mlp(), X, **FITTED)


def test_moved_cast_copied_and_pickled() -> None:
    tied = fitted()
    for other in (copy.deepcopy(tied), pickle.loads(pickle.dumps(tied)), copy.deepcopy(tied).to(torch.bfloat16).double().float()):
        torch.testing.assert_close(other(X), tied(X), rtol=0.05, atol=0.05)
        assert pe_fx.verify(other, X)


def test_casts_leave_the_factor_as_it_was() -> None:
    tied = fitted()
    factor = (tied[2].weight.norm() / tied[0].weight.norm()).item()
    tied.to(torch.bfloat16).double()
    assert (tied[2].weight.norm() / tied[0].weight.norm()).item() == pytest.approx(factor, rel=1e-6)


def test_made_on_the_meta_device() -> None:
    tied = fitted()
    with torch.device("meta"):
        empty = pe_fx.apply(mlp(), tied[2].tied_weights["weight"].plan)
    assert empty(X.to("meta")).is_meta
    empty.to_empty(device="cpu").load_state_dict(tied.state_dict())
    assert torch.equal(empty(X), tied(X))


def test_a_file_brings_its_orders(tmp_path: Path) -> None:
    tied = fitted(trained())
    checkpoint.save(tied, tmp_path / "tied.safetensors")
    assert torch.equal(checkpoint.load(tmp_path / "tied.safetensors", trained())(X), tied(X))
    assert torch.equal(checkpoint.load(tmp_path / "tied.safetensors", copy.deepcopy(tied))(X), tied(X))
    with pytest.raises(PeFxError, match="is tied otherwise than the model"):
        checkpoint.load(tmp_path / "tied.safetensors", pe_fx.transform(trained(), X))


def test_a_state_dict_remembers_the_order() -> None:
    one, other = fitted(), fitted()
    with pytest.raises(RuntimeError, match=r"2 was saved with another order or other signs \(mix\)"):
        one.load_state_dict(other.state_dict())
    copy.deepcopy(one).load_state_dict(one.state_dict())


def test_twice_is_once() -> None:
    assert_idempotent(mlp(), X, mix="fitted")


def test_untied_and_fitted_again() -> None:
    tied = fitted(trained())
    again = fitted(pe_fx.untie(tied))
    torch.testing.assert_close(again(X), tied(X))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    tied = fitted()
    program = torch.export.export(tied, (X,), strict=strict)
    torch.testing.assert_close(program.module()(X), tied(X))


@pytest.mark.parametrize("backend", ["inductor", "pe_fx"])
def test_compiled(backend: str) -> None:
    torch.compiler.reset()
    tied = fitted(trained())
    compiled = torch.compile(copy.deepcopy(tied), backend=backend, fullgraph=True)
    for model in (tied, compiled):
        model(X).square().mean().backward()
    torch.testing.assert_close(compiled(X), tied(X))
    for own, other in zip(tied.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X[:1]), tied(X[:1]))


@pytest.mark.parametrize("name", ["vit", "resnet", "llama"])
def test_it_lies_in_memory_as_a_plain_tie(name: str) -> None:
    """So that a model that views its weight can do so either way."""
    model, inputs = MODELS[name].build(), MODELS[name].inputs
    plain, other = (dict(_tied_values(pe_fx.transform(model, inputs, mix=mix))) for mix in ("none", "fitted"))
    assert plain.keys() == other.keys()
    assert {name: value.is_contiguous() for name, value in plain.items()} == {name: value.is_contiguous() for name, value in other.items()}


def _tied_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for full, module, name, _ in tied_weights_in(model):
        yield full, getattr(module, name)


def test_blocks_alike_are_one_function() -> None:
    """So that what was compiled for one block runs for the next."""
    tied = fitted(trained(3))
    functions = {tied[i].down.tied_weights["weight"].assemble for i in range(3)}
    assert len(functions) == 1


def test_tensor_parallel_replicates_it() -> None:
    dense = mlp()
    plan = pe_fx.plan(dense, X, mix="fitted")
    assert tensor_parallel_plan(pe_fx.apply(dense, plan), plan) == {}


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": [X]}, "calibration is for mix='fitted' and init='fit' alone"),
        (FITTED | {"calibration": []}, "calibration holds no batch"),
        (FITTED | {"calibration": [X * float("nan")]}, "0.weight is multiplied with, or a gradient there, is not finite"),
    ],
    ids=["without use", "empty", "not finite"],
)
def test_wrong_calibration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeFxError, match=message):
        pe_fx.transform(mlp(), X, **options)


def test_a_weight_that_no_batch_reaches() -> None:
    dense = Net(lambda m, x, flag: m.b(m.a(x)) if flag else x * m.c, a=mlp(), b=mlp(), c=torch.ones(8))
    plan = pe_fx.plan(dense, (X, True))
    with pytest.raises(PeFxError, match=r"nothing, or no gradient, was seen at the products with a.0.weight.*exclude=\['a.0.weight'\]"):
        pe_fx.apply(dense, plan, init="fit", calibration=[(X, False)])


def test_weights_without_values() -> None:
    with torch.device("meta"):
        dense = mlp()
    for options in ({"mix": "fitted"}, {"init": "fit"}):
        with pytest.raises(PeFxError, match=r"0.weight has no values here"):
            pe_fx.transform(dense, X.to("meta"), **options)
    dense = mlp()
    nn.init.constant_(dense[2].weight, float("inf"))
    with pytest.raises(PeFxError, match=r"2.weight holds values that are not finite"):
        pe_fx.transform(dense, X, mix="fitted")


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(PeFxError, match=r"pip install 'pe_fx\[fit\]'"):
        pe_fx.transform(mlp(), X, mix="fitted")
    pe_fx.transform(mlp(), X, mix="signed", init="fit")


def test_graphs_have_no_values() -> None:
    torch.compiler.reset()
    with pytest.raises(Exception, match="mix='fitted' is decided by values"):
        torch.compile(mlp(), backend="pe_fx", options={"mix": "fitted"})(X)


def test_weights_of_nothing() -> None:
    """Zeros have no direction: they are kept where the source may be, and cost nothing."""
    dense = blocks(1)
    nn.init.zeros_(dense.blocks[0][2].weight)
    tied = pe_fx.transform(dense, X, **FITTED, calibration=[X])
    assert pe_fx.verify(tied, X)
