"""What must hold for every tied model, on the table of tests/models.py."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import MODELS, TINY, Model, gpt2, prepared
from oracle import Inputs, assert_equals_twin, positions
from torch import Tensor, nn

import pe_fx
from pe_fx import Plan

every_model = pytest.mark.parametrize("name", MODELS)


def outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's one output (transformers: its logits), random operations drawing the same numbers every time."""
    torch.manual_seed(0)
    y = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    y = y.logits if hasattr(y, "logits") else y
    return y


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return inputs.to(dtype) if isinstance(inputs, Tensor) else inputs


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def read(model: nn.Module, name: str) -> Tensor:
    """A weight as the model uses it, stored or computed."""
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def assert_tied(model: nn.Module, plan: Plan) -> None:
    """Whatever happens to the stored weights happens to those tied to them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    for tie in plan.ties:
        target, source = positions(tie)
        assert torch.equal(read(model, tie.target).reshape(-1)[target], read(model, tie.source).reshape(-1)[source]), str(tie)


def assert_same(model: nn.Module, expected: nn.Module, inputs: Inputs, tolerance: float = 1e-6) -> None:
    for training in (True, False):
        got, wanted = (outputs(copy.deepcopy(m).train(training), inputs) for m in (model, expected))
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def randomized(model: nn.Module) -> nn.Module:
    """Other values than those any model was built with, as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


@every_model
def test_sites_and_saving(name: str) -> None:
    m = prepared(name)
    assert Counter(site.kind for site in m.plan.sites) == MODELS[name].sites, m.plan.explain()
    assert m.plan.params_before == count(m.dense)
    assert m.plan.params_before - m.plan.params_after == MODELS[name].saved
    assert count(m.tied) == m.plan.params_after


@every_model
def test_equals_the_dense_twin(name: str) -> None:
    m = prepared(name)
    assert_equals_twin(m.dense, m.tied, m.plan, m.inputs)


@every_model
def test_verify(name: str) -> None:
    m = prepared(name)
    report = pe_fx.verify(m.tied, m.inputs)
    assert report.worst < 1e-4, str(report)


@every_model
def test_no_key_changes_but_tied_names_go(name: str) -> None:
    m = prepared(name)
    gone = {tie.target for tie in m.plan.ties}
    shapes = {key: value.shape for key, value in m.tied.state_dict().items()}
    for key, value in m.dense.state_dict().items():
        if key not in gone:
            assert shapes.pop(key) == value.shape
    partly = {key: m.dense.get_parameter(key.removesuffix("_kept")).numel() for key in shapes}
    assert {key.removesuffix("_kept") for key in partly} <= gone
    assert all(key.endswith("_kept") for key in partly)
    assert all(shapes[key].numel() < size for key, size in partly.items())
    assert len(list(m.tied.named_parameters(remove_duplicate=False))) == len(list(m.tied.parameters()))


@every_model
def test_class_and_modes(name: str) -> None:
    m = prepared(name)
    assert type(m.tied) is type(m.dense)
    assert [path for path, _ in m.tied.named_modules()] == [path for path, _ in m.dense.named_modules()]
    for training in (False, True):
        assert m.tied.train(training) is m.tied
        assert all(module.training is training for module in m.tied.modules())


@every_model
def test_deepcopy(name: str) -> None:
    m = prepared(name)
    twin = copy.deepcopy(m.tied)
    assert_same(twin, m.tied, m.inputs)
    before = {key: value.clone() for key, value in m.tied.state_dict().items()}
    assert_tied(twin, m.plan)
    assert all(torch.equal(value, before[key]) for key, value in m.tied.state_dict().items())


@every_model
def test_pickle(name: str) -> None:
    m = prepared(name)
    twin = pickle.loads(pickle.dumps(m.tied))
    assert type(twin) is type(m.tied)
    assert_same(twin, m.tied, m.inputs)
    assert_tied(twin, m.plan)


@every_model
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(name: str, assign: bool) -> None:
    m = prepared(name)
    trained = randomized(copy.deepcopy(m.tied))
    m.tied.load_state_dict(trained.state_dict(), assign=assign)
    assert_same(m.tied, trained, m.inputs)
    assert_tied(m.tied, m.plan)


@every_model
def test_safetensors(name: str, tmp_path: Path) -> None:
    m = prepared(name)
    trained = randomized(copy.deepcopy(m.tied))
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "tied.safetensors")
    m.tied.load_state_dict(safetensors.torch.load_file(tmp_path / "tied.safetensors"))
    assert_same(m.tied, trained, m.inputs)


@every_model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 3e-2)], ids=["float64", "bfloat16"])
def test_dtype(name: str, dtype: torch.dtype, tolerance: float) -> None:
    m = prepared(name)
    moved, twin = m.tied.eval().to(dtype), pe_fx.untie(m.tied).eval().to(dtype)
    inputs = cast(m.inputs, dtype)
    assert {read(moved, tie.target).dtype for tie in m.plan.ties} == {dtype}
    got, expected = outputs(moved, inputs), outputs(twin, inputs)
    assert got.dtype == expected.dtype
    assert (got - expected).norm().item() < tolerance * expected.norm().item()
    assert_tied(moved, m.plan)


@every_model
def test_export(name: str) -> None:
    m = prepared(name)
    args, kwargs = ((), m.inputs) if isinstance(m.inputs, dict) else ((m.inputs,), {})
    program = torch.export.export(m.tied.eval(), args, kwargs)
    assert {key: value.shape for key, value in program.named_parameters()} == {key: p.shape for key, p in m.tied.named_parameters()}
    torch.testing.assert_close(outputs(program.module(), m.inputs), outputs(m.tied, m.inputs), rtol=1e-4, atol=1e-5)


@every_model
def test_transform_twice_is_once(name: str) -> None:
    m = prepared(name)
    twice = pe_fx.transform(m.tied, m.inputs)
    assert list(twice.state_dict()) == list(m.tied.state_dict())
    assert [type(module) for module in twice.modules()] == [type(module) for module in m.tied.modules()]
    assert_same(twice, m.tied, m.inputs, 0)


@every_model
def test_plan_through_json_on_a_fresh_model(name: str) -> None:
    m = prepared(name)
    plan = Plan.from_json(m.plan.to_json())
    assert plan == m.plan
    fresh = pe_fx.apply(MODELS[name].build(), plan)
    fresh.load_state_dict(randomized(m.tied).state_dict())
    assert_same(fresh, m.tied, m.inputs)


@every_model
def test_untied_weights_load_into_the_dense_model(name: str) -> None:
    m = prepared(name)
    dense, fresh = pe_fx.untie(randomized(m.tied)), MODELS[name].build()
    assert [type(module) for module in dense.modules()] == [type(module) for module in fresh.modules()]
    assert [key for key, _ in dense.named_parameters()] == [key for key, _ in fresh.named_parameters()]
    fresh.load_state_dict(dense.state_dict(), strict=True)
    assert_same(fresh, m.tied, m.inputs, 1e-5)


@every_model
def test_one_step_of_adamw(name: str) -> None:
    m = prepared(name)
    before = {key: p.detach().clone() for key, p in m.tied.named_parameters()}
    optimizer = torch.optim.AdamW(m.tied.parameters(), lr=0.01, weight_decay=0.1)
    outputs(m.tied, m.inputs).square().sum().backward()
    optimizer.step()
    reached = 0
    for key, parameter in m.tied.named_parameters():
        if parameter.grad is not None:
            reached += parameter.numel()
            step = parameter.grad / (parameter.grad.abs() + 1e-8)
            torch.testing.assert_close(parameter, before[key] * (1 - 0.01 * 0.1) - 0.01 * step, rtol=1e-4, atol=1e-6)
    states = optimizer.state_dict()["state"].values()
    assert sum(state["exp_avg"].numel() for state in states) == reached
    assert reached <= m.plan.params_after
    assert_tied(m.tied, m.plan)


# ---- torch.compile


def assert_compiles(model: Model, eager: nn.Module, backend: str) -> None:
    torch._dynamo.reset()
    compiled = copy.deepcopy(eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = outputs(torch.compile(compiled, backend=backend, fullgraph=True), model.inputs)
        got.square().sum().backward()
    expected = outputs(eager, model.inputs)
    expected.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    largest = max(float(p.grad.norm()) for p in eager.parameters() if p.grad is not None)
    for (key, mine), (_, theirs) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), key
        if mine.grad is not None:
            assert float((mine.grad - theirs.grad).norm()) <= 1e-4 * float(theirs.grad.norm()) + 1e-6 * largest, key


@every_model
def test_compile(name: str) -> None:
    has_dropout = isinstance(MODELS[name].inputs, dict)  # whose random numbers are others when compiled
    assert_compiles(MODELS[name], prepared(name).tied.train(not has_dropout), "aot_eager")


@pytest.mark.parametrize("name", TINY)
def test_compile_with_inductor(name: str) -> None:
    model = TINY[name]
    tied = pe_fx.transform(dense := model.build(), model.inputs)
    assert count(dense) - count(tied) == model.saved
    assert_compiles(model, tied, "inductor")


# ---- sharing that the model has by itself


def test_tied_word_embeddings_stay_tied() -> None:
    inputs = MODELS["gpt2"].inputs
    dense: Any = gpt2(tie_word_embeddings=True)
    plan = pe_fx.plan(dense, inputs)
    tied: Any = pe_fx.apply(dense, plan)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert plan.params_before - plan.params_after == MODELS["gpt2"].saved
    assert count(tied) == plan.params_after
    assert_equals_twin(dense, tied, plan, inputs)
