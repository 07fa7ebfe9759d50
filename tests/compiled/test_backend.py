"""torch.compile(model, backend="pe_fx"): what is tied in the graphs, when, and that it trains as a tied model does."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import MODELS, gpt2
from oracle import assert_equals_twin, linear
from torch import Tensor, nn
from torch._inductor import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import l1_unstructured
from torch.utils.checkpoint import checkpoint

import pe_fx
import pe_fx.compiled.backend
from pe_fx import CaptureError, NoSitesWarning, PeFxError
from pe_fx.compiled.ledger import Ledger, ledger
from pe_fx.graph.inputs import as_arguments, tensors_in
from pe_fx.ties import Block, Plan, Site, Tie

X = torch.randn(4, 8)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    vars(X).clear()  # Dynamo marks a tensor whose size was another one before
    yield
    torch.compiler.reset()


@pytest.fixture
def unlowered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs run as they are after tying, without Inductor; returns their code."""
    seen: list[str] = []

    def record(gm: torch.fx.GraphModule, *_: Any) -> Callable[..., Any]:
        seen.append(gm.code)
        return gm.forward

    monkeypatch.setattr(pe_fx.compiled.backend, "lower", record)
    return seen


def mlp(width: int = 16) -> nn.Sequential:
    return nn.Sequential(linear(8, width), nn.GELU(), linear(width, 8))


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="pe_fx", options=options or None)


def train(model: Callable[..., Any], parameters: list[nn.Parameter], x: Any, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4)  # by less, rounding alone would decide where gradients vanish
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(**x) if isinstance(x, dict) else model(x)
        (y if isinstance(y, Tensor) else y.logits).square().mean().backward()
        optimizer.step()
    return optimizer


def assert_agree(model: nn.Module, other: nn.Module, tolerance: float = 1e-4) -> None:
    """All parameters of `other` are, up to rounding, those of `model`."""
    parameters = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        expected = parameters[name].detach()
        assert float((parameter.detach() - expected).norm() / expected.norm()) < tolerance, name


# ---- lowered by Inductor


IS_2_11 = torch.__version__ < "2.12"
WRONG_IN_2_11 = pytest.mark.skipif(IS_2_11, reason="the Inductor of torch 2.11 gives a dense ConvNeXt wrong gradients on the CPU")


@pytest.mark.parametrize("name", ["deit", "resnet", pytest.param("convnext", marks=WRONG_IN_2_11), "gpt2"])
def test_trains_as_the_tied_model(name: str) -> None:
    """20 AdamW steps: the backend on the dense model, Inductor on the tied one, and the tied one without a compiler."""
    build: Callable[[], nn.Module] = gpt2 if name == "gpt2" else MODELS[name].build
    dense, x = build().train(), MODELS[name].inputs
    if name == "resnet":  # in float32 rounding alone moves a dense one, which Inductor compiled, by 4e-3
        dense, x = dense.double(), x.double()
    tied = pe_fx.transform(dense, x)
    eager, inductor = copy.deepcopy(tied), copy.deepcopy(tied)
    if name == "gpt2":  # dropout draws other numbers in compiled graphs
        for model in (dense, eager, inductor):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
    optimizer = train(compiled(dense), list(dense.parameters()), x, 20)
    train(torch.compile(inductor), list(inductor.parameters()), x, 20)
    train(eager, list(eager.parameters()), x, 20)
    assert_agree(eager, inductor)
    whole = {tie.target for tie in pe_fx.pending(dense).ties if tie.into.is_whole}
    assert whole
    for target, parameter in dense.named_parameters():
        assert (parameter not in optimizer.state) == (target in whole), target
    expected = pe_fx.plan(build(), x)
    committed = pe_fx.commit(dense)
    assert sorted(map(str, committed.ties)) == sorted(map(str, expected.ties))
    assert_agree(dense, eager)
    dense.eval()
    eager.eval()
    eager.load_state_dict(dense.state_dict())  # what training left of the outputs is as small as the rounding
    run = (lambda m: m(**x).logits) if isinstance(x, dict) else (lambda m: m(x))
    torch.testing.assert_close(run(dense), run(eager))


def test_weights_of_a_tied_graph_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph reads static inputs in their place and copies the others in every run."""

    def record(fixed: int) -> Any:
        static.append(torch._guards.TracingContext.get().fw_metadata.static_input_indices)
        return find(fixed)

    static: list[list[int]] = []
    find = compile_fx.get_static_input_idxs
    monkeypatch.setattr(compile_fx, "get_static_input_idxs", record)
    model = nn.Sequential(linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), linear(16, 8))
    compiled(model)(X)  # ties
    torch.compiler.reset()
    torch.compile(model)(X)
    pe_fx_s, inductor_s = static
    assert pe_fx_s == inductor_s
    assert len(inductor_s) >= 6, "all parameters"


def test_an_absent_source_stays_where_it_is(monkeypatch: pytest.MonkeyPatch, unlowered: list[str]) -> None:
    model = mlp()
    compiled(model)(X)
    seen: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(pe_fx.compiled.backend, "lower", lambda gm, *_: seen.append(gm) or gm.forward)
    compiled(model[2])(torch.ones(2, 16))
    assert set(dict(seen[0].named_parameters())) <= set(seen[0]._param_name_to_source)


def test_found_by_name() -> None:
    assert "pe_fx" in torch.compiler.list_backends()
    model = mlp()
    y = compiled(model)(X)
    twin = nn.Sequential(model[0], nn.GELU(), copy.deepcopy(model[2]))
    with torch.no_grad():
        twin[2].weight.copy_(model[0].weight.t())
    torch.testing.assert_close(y, twin(X))


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"dynamic": True}, {"fullgraph": True}, {}])
def test_modes_and_arguments_of_compile(options: dict[str, Any]) -> None:
    model = mlp()
    run = torch.compile(model, backend="pe_fx", **options)
    ys = [run(x) for x in (X, X[:3], X[:2])]
    pe_fx.commit(model)
    torch.testing.assert_close(torch.cat(ys), model(torch.cat((X, X[:3], X[:2]))))


def test_autocast_and_accumulated_gradients() -> None:
    """Half precision in the products alone: gradients as near to float64 as the eager tied model's, and twice those of one batch."""
    model = mlp(32)
    exact = pe_fx.transform(model, X).double()
    eager = pe_fx.transform(model, X)
    exact(X.double()).square().sum().backward()
    run = compiled(model)
    for _ in range(2):
        with torch.autocast(X.device.type, dtype=torch.bfloat16):
            loss = run(X).float().square().sum()
        loss.backward()
    with torch.autocast(X.device.type, dtype=torch.bfloat16):
        loss = eager(X).float().square().sum()
    loss.backward()
    wanted = exact.get_parameter("0.weight").grad
    error, reference = ((grad.double() - wanted).norm() for grad in (model[0].weight.grad / 2, eager.get_parameter("0.weight").grad))
    assert error < 1.1 * reference + 1e-6 * wanted.norm()
    assert model[2].weight.grad is None


def test_activation_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.body, x, use_reentrant=False)
            return x + y

    model = Checkpointed()
    tied = pe_fx.transform(model, X)
    compiled(model)(X).square().sum().backward()
    tied(X).square().sum().backward()
    assert model.body[2].weight.grad is None
    torch.testing.assert_close(model.body[0].weight.grad, tied.get_parameter("body.0.weight").grad)


def test_channels_last() -> None:
    model = MODELS["resnet"].build().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    tied = pe_fx.transform(model, x)
    compiled(model)(x).square().sum().backward()
    tied(x).square().sum().backward()
    for name, parameter in tied.named_parameters():
        got, expected = model.get_parameter(name).grad, parameter.grad
        assert float((got - expected).norm()) < 1e-3 * float(expected.norm()) + 1e-4, name


@pytest.mark.parametrize("copied", [False, True])
def test_what_transform_left_dense_stays_dense(unlowered: list[str], copied: bool) -> None:
    model = nn.Sequential(mlp(), nn.Tanh(), mlp())
    tied = pe_fx.transform(model, X, exclude=["0"])
    tied = copy.deepcopy(tied) if copied else tied
    torch.testing.assert_close(compiled(tied)(X), tied(X))
    assert not pe_fx.pending(tied).sites
    if not copied:
        torch.compiler.reset()
        torch.testing.assert_close(compiled(tied[0])(X), tied[0](X))  # a graph that holds nothing tied


def test_options_tie_more_of_a_tied_model(unlowered: list[str]) -> None:
    tied = pe_fx.transform(nn.Sequential(mlp(), nn.Tanh(), mlp()), X, exclude=["0"])
    compiled(tied, rules=["mlp"])(X)
    assert [str(tie) for tie in pe_fx.pending(tied).ties] == ["0.2.weight ← 0.0.weightᵀ"]


def test_a_graph_refuses_weights_of_another_mix(unlowered: list[str]) -> None:
    model = nn.Sequential(OrderedDict(first=mlp(), act=nn.Tanh(), last=mlp()))  # by another name, another mix
    compiled(model, mix="signed")(X)
    compiled(model.first, mix="signed")(X)
    with pytest.raises(PeFxError, match="decided otherwise"):  # Dynamo takes the graph of the first block for the last
        compiled(model.last, mix="signed")(X)


def test_blocks_alike_share_a_graph_also_when_they_are_mixed(unlowered: list[str]) -> None:
    model = nn.Sequential(mlp(), nn.Tanh(), mlp())
    compiled(model, mix="signed")(X)
    compiled(model[0], mix="signed")(X)
    y = compiled(model[2], mix="signed")(X)
    assert len(unlowered) == 2
    pe_fx.commit(model)
    torch.testing.assert_close(model[2](X), y)


def test_variants_of_a_tied_model_train_as_eager() -> None:
    tied = pe_fx.transform(nn.Sequential(mlp(), nn.Tanh(), mlp()), X, mix="signed", gain=True)
    eager = copy.deepcopy(tied)
    train(compiled(tied), list(tied.parameters()), X, 5)
    train(eager, list(eager.parameters()), X, 5)
    assert_agree(eager, tied)


def test_a_tied_model_is_lowered_alone() -> None:
    tied = pe_fx.transform(mlp(), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoSitesWarning)
        y = compiled(tied)(X)
    torch.testing.assert_close(y, tied(X))
    assert not pe_fx.commit(tied).sites


# ---- which ties


def test_a_parametrized_weight_is_no_more_tied_than_by_transform(unlowered: list[str]) -> None:
    model = mlp()
    register_parametrization(model[2], "weight", Doubled())
    assert not pe_fx.plan(model, X).ties
    with pytest.warns(NoSitesWarning):
        torch.testing.assert_close(compiled(model)(X), model(X))
    assert not pe_fx.pending(model).ties


def test_ties_are_those_of_transform_and_wait_for_commit(unlowered: list[str]) -> None:
    model = MODELS["vit"].build()
    x = MODELS["vit"].inputs
    plan = pe_fx.plan(model, x)
    y = compiled(model)(x)
    held = pe_fx.pending(model)
    assert sorted(map(str, held.ties)) == sorted(map(str, plan.ties))
    assert held.params_after == plan.params_after
    assert float((model(x) - y).detach().abs().max()) > 1e-3, "the model itself is as it was"
    dense = copy.deepcopy(model)
    committed = pe_fx.commit(model)
    torch.testing.assert_close(model(x), y)
    assert_equals_twin(dense, model, committed, x)
    assert Plan.from_json(committed.to_json()) == committed


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_tied_as_by_transform(name: str, unlowered: list[str]) -> None:
    inputs = MODELS[name].inputs
    args, kwargs = as_arguments(inputs)
    model = MODELS[name].build().eval()
    plan = pe_fx.plan(model, inputs)
    y = compiled(model)(*args, **kwargs)
    assert set(map(str, pe_fx.commit(model).ties)) == set(map(str, plan.ties))
    torch.testing.assert_close(tensors_in(model(*args, **kwargs)), tensors_in(y))


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(8, 16), linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            h = self.fc1(x).relu()
        y: Tensor = self.fc2(h.float())
        return y


class Attending(nn.Module):
    """PyTorch's own attention is one function in Dynamo's graph."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return y


class Shifted(nn.Module):
    """What a module keeps in a buffer or in an attribute is no input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(8, 16), linear(16, 8)
        self.register_buffer("shift", torch.randn(16))
        self.table = torch.randn(16)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x, self.fc1.weight, self.shift).relu()
        return nn.functional.linear(h + self.table, self.fc2.weight)


class Written(nn.Module):
    """Assignment to a part of a tensor is one function, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = linear(8, 16), linear(16, 8), linear(8, 16), linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        g = torch.zeros_like(h)
        g[:, 0:] = h
        x = self.fc2(g)
        h = nn.functional.gelu(self.fc3(x))
        h[:, 1:] = h[:, :-1].flip(-1)  # here channels change their places
        y: Tensor = self.fc4(h)
        return y


class Chosen(nn.Module):
    """Rows of a table, chosen by the tokens, are added to hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(8, 16), linear(16, 8)
        self.table = nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h.add_(self.table[(x[..., 0] > 0).long()])
        y: Tensor = self.fc2(h.relu())
        return y


class Taught(nn.Module):
    """The tied weight is read without gradients first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(linear(8, 16), nn.GELU(), linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.body(x)
        y: Tensor = self.body(x) - target.tanh()
        return y


@pytest.mark.parametrize("build", [Cast, Attending, Shifted, Written, Chosen, Taught])
def test_dynamos_own_ways_to_write_a_graph(build: Callable[[], nn.Module], unlowered: list[str]) -> None:
    model, x = build(), torch.randn(3, 5, 8)
    plan = pe_fx.plan(model, x)
    y = compiled(model)(x)
    assert plan.ties
    y.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert pe_fx.commit(model).ties == plan.ties
    torch.testing.assert_close(model(x), y)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:  # of a weight tied in part, some rows are left, under another name
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


def test_a_graph_that_cannot_be_read_is_compiled_as_it_is(
    unlowered: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> Any:
        raise CaptureError("not to be read")

    monkeypatch.setattr(pe_fx.compiled.backend, "capture", refuse)
    model = mlp()
    with caplog.at_level(logging.WARNING, "pe_fx"), pytest.warns(NoSitesWarning):
        y = compiled(model)(X)
    assert "compiled without new ties: not to be read" in caplog.text
    torch.testing.assert_close(y, model(X))


def test_options_choose_rules_and_modules(unlowered: list[str]) -> None:
    model = MODELS["vit"].build()
    compiled(model, rules=["mlp"], exclude=["blocks.0.*"])(MODELS["vit"].inputs)
    assert [str(tie) for tie in pe_fx.pending(model).ties] == ["blocks.1.mlp.fc2.weight ← blocks.1.mlp.fc1.weightᵀ"]


def test_signed_ties(unlowered: list[str]) -> None:
    model = mlp()
    y = compiled(model, mix="signed")(X)
    torch.testing.assert_close(y, pe_fx.transform(model, X, mix="signed")(X))
    assert [str(tie) for tie in pe_fx.commit(model).ties] == ["2.weight ← ±0.weightᵀ"]
    torch.testing.assert_close(model(X), y)


def test_stages_share(unlowered: list[str]) -> None:
    build, x = MODELS["resnet"].build, MODELS["resnet"].inputs
    alone, shared = build(), build()
    compiled(alone, share=())(x)
    compiled(shared)(x)
    assert pe_fx.pending(shared).params_after < pe_fx.pending(alone).params_after
    assert pe_fx.pending(shared).params_after == pe_fx.plan(build(), x).params_after


@pytest.mark.parametrize(
    "options",
    [
        {"share": {"mlp": 2, "attention": 2}},
        {"rules": (), "share": {"mlp": 2, "attention": 2}},
        {"rules": ["mlp"], "share": {"attention": "all"}, "mix": "signed"},
    ],
    ids=["tied", "shared", "both"],
)
def test_groups_are_those_of_transform(options: dict[str, Any], unlowered: list[str]) -> None:
    model, x = MODELS["vit"].build(), MODELS["vit"].inputs
    plan = pe_fx.plan(model, x, **options)
    dense = copy.deepcopy(model)
    y = compiled(model, **options)(x)
    committed = pe_fx.commit(model)
    assert sorted(map(str, committed.ties)) == sorted(map(str, plan.ties))
    assert committed.params_after == plan.params_after
    torch.testing.assert_close(model(x), y)
    assert_equals_twin(dense, model, committed, x)


def test_what_is_shared_trains_as_by_transform() -> None:
    model = nn.Sequential(mlp(), nn.LayerNorm(8), mlp())
    shared = pe_fx.transform(model, X, rules=(), share={"mlp": 2})
    run = compiled(model, rules=(), share={"mlp": 2})
    train(run, list(model.parameters()), X, 3)
    train(shared, list(shared.parameters()), X, 3)
    assert_agree(model, shared)
    assert model[2][0].weight.grad is model[2][2].weight.grad is None


def test_every_graph_holds_the_first_ties(unlowered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompiled for another mode and other shapes, without matching again."""
    model = mlp()
    model.insert(1, nn.Dropout())
    run = compiled(model)
    run(X)
    before = pe_fx.pending(model)
    monkeypatch.setattr(pe_fx.compiled.backend, "plan", None)
    model.eval()
    for x in (X, X[:3], X[:2]):
        y = run(x)
        assert "transpose" in unlowered[-1]
    assert pe_fx.pending(model) == before
    pe_fx.commit(model)
    torch.testing.assert_close(model(X[:2]), y)


def test_a_weight_is_decided_by_the_first_graph_that_reads_it(unlowered: list[str]) -> None:
    """Seen alone first, fc2 stays dense even where a later graph holds the pair."""
    model = mlp()
    compiled(model[2])(torch.randn(2, 16))
    with pytest.warns(NoSitesWarning):
        compiled(model)(X)
    assert not pe_fx.pending(model).sites


def test_a_tied_weight_stays_tied_where_its_source_is_absent(unlowered: list[str]) -> None:
    model = mlp()
    compiled(model)(X)
    alone = compiled(model[2])(torch.ones(2, 16))
    pe_fx.commit(model)
    torch.testing.assert_close(alone, model[2](torch.ones(2, 16)))


def test_absent_source_through_inductor() -> None:
    model = mlp()
    compiled(model)(X)
    hidden = torch.ones(2, 16)
    compiled(model[2])(hidden).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, torch.ones(16, 8) * 2)
    assert model[2].weight.grad is None


class Packed(nn.Module):
    """Its v rows are read from the k rows of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = linear(16, 48), linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return y


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.whole = linear(8, 16), linear(16, 8), mlp()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x).relu()
        torch._dynamo.graph_break()
        y: Tensor = self.whole(self.fc2(hidden))
        return y


def test_a_pair_split_by_a_graph_break_is_logged(unlowered: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model = Broken()
    with caplog.at_level(logging.WARNING, "pe_fx"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NoSitesWarning)
        y = compiled(model)(X)
    assert "graph break" in caplog.text
    assert "test_backend.py" in caplog.text
    assert [str(tie) for tie in pe_fx.pending(model).ties] == ["whole.2.weight ← whole.0.weightᵀ"]
    pe_fx.commit(model)
    torch.testing.assert_close(model(X), y)


def test_frozen_and_shared_weights_are_left_alone(unlowered: list[str]) -> None:
    frozen = mlp()
    frozen[2].weight.requires_grad_(False)
    twice = nn.Sequential(*mlp(), nn.GELU(), linear(8, 16))
    twice[4].weight = twice[0].weight
    with pytest.warns(NoSitesWarning):
        compiled(frozen)(X)
    assert not pe_fx.pending(frozen).sites
    reset = torch.compile(twice, backend="pe_fx")
    y = reset(X)
    plan = pe_fx.plan(twice, X)
    assert sorted(map(str, pe_fx.pending(twice).ties)) == sorted(map(str, plan.ties))
    if pe_fx.pending(twice).sites:
        pe_fx.commit(twice)
    torch.testing.assert_close(twice(X), y)


def assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return model


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "assigned": assigned,
}


@pytest.mark.parametrize("include", [["0*"], ["none"]], ids=["some tied", "none tied"])
@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.filterwarnings("ignore::pe_fx.NoSitesWarning")
def test_what_transform_left_dense_stays_so(kind: str, include: list[str], unlowered: list[str]) -> None:
    model = COPIES[kind](pe_fx.transform(nn.Sequential(mlp(), mlp()), X, include=include))
    compiled(model[1])(X)
    assert unlowered
    assert not pe_fx.pending(model).sites


def test_models_of_one_class_share_a_graph_but_not_their_ties(unlowered: list[str]) -> None:
    """Dynamo does not ask the backend again for a second model of the same code."""
    first, second = mlp(), mlp()
    compiled(first)(X)
    y = compiled(second)(X)
    assert len(unlowered) == 1
    pe_fx.commit(second)
    torch.testing.assert_close(second(X), y)
    assert pe_fx.pending(first).sites


def test_a_graph_refuses_weights_that_were_decided_otherwise(unlowered: list[str]) -> None:
    hidden = torch.ones(2, 16)
    alone, paired = mlp(), mlp()
    compiled(alone[2])(hidden)
    compiled(paired)(X)
    with pytest.raises(PeFxError, match="decided otherwise"):
        compiled(paired[2])(hidden)
    torch.compiler.reset()
    compiled(paired)(X)
    compiled(paired[2])(hidden)
    with pytest.raises(PeFxError, match="decided otherwise"):
        compiled(alone[2])(hidden)


def test_a_graph_refuses_weights_that_were_decided_since_it_ran_with_them(unlowered: list[str]) -> None:
    hidden = torch.ones(2, 16)
    alone, later = mlp(), mlp()
    for model in (alone, later):
        compiled(model[2])(hidden)
    assert len(unlowered) == 1
    compiled(later)(X)
    with pytest.raises(PeFxError, match="decided otherwise"):
        compiled(later[2])(hidden)


def test_a_graph_asks_the_ledger_once_for_the_same_weights(unlowered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Parameter] = []
    ties_of = Ledger.ties_of

    def counted(ledger: Ledger, weight: nn.Parameter) -> frozenset[Tie]:
        asked.append(weight)
        return ties_of(ledger, weight)

    monkeypatch.setattr(Ledger, "ties_of", counted)
    run = compiled(mlp())
    for _ in range(3):
        run(X)
    assert len(asked) == 1


# ---- commit


def test_commit_takes_what_compile_returned_and_what_holds_the_model(unlowered: list[str]) -> None:
    for wrap in (lambda model, run: run, lambda model, run: model, lambda model, run: nn.ModuleDict({"inside": model})):
        model = mlp()
        run = compiled(model)
        y = run(X)
        plan = pe_fx.commit(wrap(model, run))
        assert len(plan.ties) == 1
        torch.testing.assert_close(model(X), y)
        torch.testing.assert_close(run(X), y)


def test_commit_says_that_no_graph_was_compiled(unlowered: list[str]) -> None:
    model, other = mlp(), mlp()
    compiled(model)(X)
    torch.compile(other, backend="eager")(X)
    for never in (mlp(), other, copy.deepcopy(model)):
        with pytest.raises(
            PeFxError, match=r'no graph that backend="pe_fx" compiled has read the weights of this Sequential: run .* once before'
        ):
            pe_fx.commit(never)


def test_commit_says_that_nothing_was_tied(unlowered: list[str]) -> None:
    model = nn.Sequential(linear(8, 16), nn.GELU(), linear(16, 4))
    with pytest.warns(NoSitesWarning):
        compiled(model)(X)
    with pytest.raises(PeFxError, match="nothing is tied in the graphs that were compiled of this model"):
        pe_fx.commit(model)


@pytest.mark.parametrize("part", [0, 2])
def test_commit_of_a_part_that_has_one_end_of_a_tie(part: int, unlowered: list[str]) -> None:
    model = mlp()
    compiled(model)(X)
    with pytest.raises(PeFxError, match="this Linear has only one of the two: commit the model that was compiled as a whole"):
        pe_fx.commit(model[part])


def test_commit_part_by_part_and_again(unlowered: list[str]) -> None:
    model = nn.Sequential(mlp(), nn.Tanh(), mlp())
    run = compiled(model)
    y = run(X)
    assert len(pe_fx.commit(model[0]).ties) == 1
    torch.testing.assert_close(run(X), y)
    assert [str(tie) for tie in pe_fx.commit(model).ties] == ["2.2.weight ← 2.0.weightᵀ"]
    torch.testing.assert_close(model(X), y)
    assert not pe_fx.commit(model).ties


def test_commit_of_a_function(unlowered: list[str]) -> None:
    model = mlp()
    run = torch.compile(lambda x: model(x), backend="pe_fx")
    y = run(X)
    with pytest.raises(PeFxError, match="no module but a function"):
        pe_fx.commit(run)
    pe_fx.commit(model)
    torch.testing.assert_close(model(X), y)


def test_what_was_committed_can_be_untied_and_compiled_again(unlowered: list[str]) -> None:
    model = mlp()
    y = compiled(model)(X)
    pe_fx.commit(model)
    dense = pe_fx.untie(model)
    torch.testing.assert_close(compiled(dense)(X), y)
    assert len(pe_fx.commit(dense).ties) == 1


def test_transform_instead_of_commit(unlowered: list[str]) -> None:
    model = mlp()
    run = compiled(model)
    y = run(X)
    pe_fx.transform(model, X, inplace=True)
    torch.testing.assert_close(run(X), y)
    assert not pe_fx.pending(model).ties


def test_reset_forgets(unlowered: list[str]) -> None:
    model = mlp()
    compiled(model)(X)
    torch.compiler.reset()
    assert not pe_fx.pending(model).sites


def test_the_ledger_keeps_no_weight_alive() -> None:
    fc1, fc2 = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(4, 8))
    tie = Tie(Block.whole("fc2", (4, 8)), Block.whole("fc1", (8, 4)), transposed=True)
    book = Ledger()
    book.record([Site("mlp", "", ("fc1", "fc2"), (tie,))], {"fc1": fc1, "fc2": fc2})
    alive = [weakref.ref(fc1), weakref.ref(fc2)]
    del fc1, fc2
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_compiled_code_keeps_no_model_alive(unlowered: list[str]) -> None:
    model = mlp()
    run = compiled(model)
    run(X)
    assert len(pe_fx.pending(model).ties) == 1
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, run
    gc.collect()
    assert all(weight() is None for weight in weights)


def test_a_compilation_that_fails_decides_nothing() -> None:
    model = mlp()
    with pytest.raises(Exception, match="no_such_entry"):
        compiled(model, inductor={"no_such_entry": 1})(X)
    assert not pe_fx.pending(model).ties


def test_a_pass_of_the_inductor_configuration_still_runs() -> None:
    seen: list[int] = []

    class Count(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(len(graph.nodes))

        def uuid(self) -> Any:
            return None

    with torch._inductor.config.patch(joint_custom_pre_pass=Count()):
        compiled(mlp())(X)
    assert seen


def test_weights_of_another_model_are_not_decided(unlowered: list[str]) -> None:
    model = mlp()
    compiled(model)(X)
    assert all(ledger.is_decided(parameter) for parameter in model.parameters())
    assert not any(ledger.is_decided(parameter) for parameter in mlp().parameters())


# ---- the model is changed between runs


def tied(model: nn.Sequential, x: Tensor) -> Tensor:
    return nn.functional.gelu(model[0](x)) @ model[0].weight + model[2].bias


def static(model: nn.Module) -> Any:
    """Compiled anew for every shape."""
    return torch.compile(model, backend="pe_fx", dynamic=False)


def renew(model: nn.Sequential, place: int) -> None:
    model[place].weight = nn.Parameter(torch.randn_like(model[place].weight))


def overwritten(model: nn.Sequential) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    model.double().float()
    torch.__future__.set_overwrite_module_params_on_conversion(False)


FOLLOWED: dict[str, Callable[[nn.Sequential], object]] = {
    "source": lambda model: renew(model, 0),
    "source, assigned": lambda model: model.load_state_dict({"0.weight": torch.randn(16, 8)}, strict=False, assign=True),
    "source, its data": lambda model: setattr(model[0].weight, "data", torch.randn(16, 8)),
    "source, its module": lambda model: model.__setitem__(0, linear(8, 16)),
    "all": assigned,
    "all, converted": overwritten,
    "all, frozen": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("batches", [(4,), (3,), (4, 3)], ids=["old graph", "new graph", "both"])
@pytest.mark.parametrize("change", FOLLOWED)
def test_all_graphs_follow_the_model(change: str, batches: tuple[int, ...], unlowered: list[str]) -> None:
    model = mlp()
    run = static(model)
    run(X)
    FOLLOWED[change](model)
    for batch in batches:
        x = torch.randn(batch, 8)
        torch.testing.assert_close(run(x), tied(model, x))
    x = torch.randn(5, 8)
    expected = tied(model, x)
    pe_fx.commit(model)
    torch.testing.assert_close(model(x), expected)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def prune(*places: int) -> Callable[[nn.Sequential], object]:
    return lambda model: [l1_unstructured(model[place], "weight", 0.5) for place in places]


def parametrize(*places: int) -> Callable[[nn.Sequential], object]:
    return lambda model: [register_parametrization(model[place], "weight", Doubled()) for place in places]


REFUSED: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "target": (lambda model: renew(model, 2), "2.weight was replaced since"),
    "target, its module": (lambda model: model.__setitem__(2, linear(16, 8)), "2.weight was replaced since"),
    "source pruned": (prune(0), "0.weight is not where it was"),
    "target pruned": (prune(2), "2.weight is not where it was"),
    "both pruned": (prune(0, 2), "2.weight is not where it was"),
    "source parametrized": (parametrize(0), "0.weight is not where it was"),
    "both parametrized": (parametrize(0, 2), "2.weight is not where it was"),
    "source frozen": (lambda model: model[0].weight.requires_grad_(False), "0.weight is frozen, 2.weight is trained"),
    "target frozen": (lambda model: model[2].weight.requires_grad_(False), "2.weight is frozen, 0.weight is trained"),
}


@pytest.mark.parametrize("batch", [4, 3], ids=["old graph", "new graph"])
@pytest.mark.parametrize("change", REFUSED)
def test_what_ties_cannot_follow_is_refused(change: str, batch: int, unlowered: list[str]) -> None:
    model = mlp()
    run = static(model)
    run(X)
    act, sentence = REFUSED[change]
    act(model)
    with pytest.raises(Exception, match=f"(?s)compiled graphs hold 2.weight ← 0.weightᵀ, but {sentence}.*torch.compiler.reset"):
        run(torch.randn(batch, 8))
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoSitesWarning)
        y = run(X)
    if pe_fx.pending(model).ties:
        pe_fx.commit(model)
    torch.testing.assert_close(y, model(X))


def test_commit_refuses_a_target_that_was_replaced(unlowered: list[str]) -> None:
    model = mlp()
    compiled(model)(X)
    renew(model, 2)
    with pytest.raises(PeFxError, match=r"2\.weight was replaced since"):
        pe_fx.commit(model)


@pytest.mark.parametrize("place", [0, 2])
def test_a_second_model_of_the_same_code_whose_weight_was_replaced(place: int, unlowered: list[str]) -> None:
    """Its graph was compiled for the first one, so that nothing tells where its weights live."""
    first, second = mlp(), mlp()
    static(first)(X)
    static(second)(X)
    assert len(unlowered) == 1
    renew(second, place)
    gc.collect()
    for x in (X, X[:3]):
        with pytest.raises(Exception, match=f"{place}.weight .*torch.compiler.reset"):
            static(second)(x)
    static(first)(X)


@pytest.mark.parametrize(
    "change", [lambda model: renew(model, 0), lambda model: model.__setitem__(0, linear(8, 16))], ids=["weight", "module"]
)
def test_an_absent_source_that_was_replaced(change: Callable[[nn.Sequential], None], unlowered: list[str]) -> None:
    """A graph that holds the old one must not run; one that is compiled since holds the new one."""
    model, hidden = mlp(), torch.ones(2, 16)
    compiled(model)(X)
    alone = static(model[2])
    alone(hidden)
    change(model)
    with pytest.raises(PeFxError, match="decided otherwise"):
        alone(hidden)
    torch.compiler.reset()
    compiled(model)(X)
    change(model)
    torch.testing.assert_close(alone(hidden), hidden @ model[0].weight + model[2].bias)


def test_blocks_that_change_places_keep_their_ties(unlowered: list[str]) -> None:
    model = nn.Sequential(mlp(), nn.Tanh(), nn.Dropout(), mlp()).eval()
    run = static(model)
    run(X)
    model[0], model[3] = model[3], model[0]
    del model[2]
    for x in (X, X[:3]):
        torch.testing.assert_close(run(x), tied(model[2], tied(model[0], x).tanh()))


def test_first_layers_that_change_places(unlowered: list[str]) -> None:
    """The ties go with the modules, as those of a tied model do; the graph at hand ties by place, and refuses."""
    model = nn.Sequential(mlp(), nn.Tanh(), mlp())
    run = static(model)
    run(X)
    first, last = model[0][0], model[2][0]
    model[0][0], model[2][0] = last, first
    with pytest.raises(PeFxError, match="decided otherwise"):
        run(X)
    y = run(X[:3])
    pe_fx.commit(model)
    assert model[0][2].weight.data_ptr() == first.weight.data_ptr()
    torch.testing.assert_close(model(X[:3]), y)


def test_functional_call(unlowered: list[str]) -> None:
    """With parameters it is another model, tied like this one; with plain tensors in their places no tie can be decided."""
    model = mlp()
    run = static(model)
    run(X)
    other = mlp()
    names = {f"_orig_mod.{name}": parameter for name, parameter in other.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(run, names, (X,)), tied(other, X))
    with pytest.raises(Exception, match=r"compiled graphs hold .* functional_call"):
        torch.func.functional_call(run, {name: value.detach() for name, value in names.items()}, (X,))
    torch.testing.assert_close(run(X), tied(model, X))


def test_options_that_differ_are_refused(unlowered: list[str]) -> None:
    model = mlp()
    y = compiled(model, rules=["mlp"])(X)
    torch.testing.assert_close(compiled(model)(X), y)
    with pytest.raises(Exception, match=r"compiled with options=\{'rules': \['mlp'\]\}, this one with options=\{'exclude': \['\*'\]\}"):
        compiled(model, exclude=["*"])(X)


def test_a_later_graph_that_writes_to_a_tied_weight_is_refused(unlowered: list[str]) -> None:
    model = mlp()
    compiled(model)(X)

    @torch.compile(backend="pe_fx")
    def halve() -> None:
        with torch.no_grad():
            model[2].weight.view(-1).mul_(0.5)

    with pytest.raises(Exception, match=r"mul_ writes to 2\.weight, which is tied to another weight"):
        halve()


def test_a_write_to_a_tied_weight_is_told_once(unlowered: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    run = static(model)
    train(run, list(model.parameters()), X, 2)
    model.double().float()
    run(X)
    assert "written" not in caplog.text
    model.load_state_dict(model.state_dict())
    run(X)
    run(X)
    assert caplog.text.count("do not read was written to, as by load_state_dict: they hold 2.weight ← 0.weightᵀ") == 1


def test_a_weight_that_reads_itself_is_not_kept_alive(unlowered: list[str]) -> None:
    model = Packed()
    run = static(model)
    run(torch.randn(2, 5, 16))
    assert any(tie.target == tie.source for tie in pe_fx.pending(model).ties)
    weight = weakref.ref(model.qkv.weight)
    del model, run
    gc.collect()
    assert weight() is None


def test_threads_share_a_graph(unlowered: list[str]) -> None:
    models = [mlp() for _ in range(4)]
    compiled(models[0])(X)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: compiled(models[k % 4])(X), range(64)))
    assert [len(pe_fx.pending(model).ties) for model in models] == [1, 1, 1, 1]


# ---- what a forward asks of a tied weight


class Viewed(nn.Module):
    """Its second weight is read as if it were contiguous."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.checkpointed = linear(8, 16), linear(16, 8), checkpointed

    def body(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.fc1(x).relu(), self.fc2.weight.view(-1).view(8, 16), self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return y


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_weight_that_is_viewed_is_tied_through_inductor(checkpointed: bool) -> None:
    model = Viewed(checkpointed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.fc2.weight.copy_(model.fc1.weight.t())
    y, expected = compiled(model)(X), twin(X)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(model.fc1.weight.grad, twin.fc1.weight.grad + twin.fc2.weight.grad.t())
    assert len(pe_fx.pending(model).ties) == 1


def test_a_graph_that_fails_when_it_is_tied_is_compiled_as_it_was(
    monkeypatch: pytest.MonkeyPatch, unlowered: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, lower = mlp(), pe_fx.compiled.backend.lower

    def fail(gm: torch.fx.GraphModule, *args: Any, **options: Any) -> Any:
        if "transpose" in gm.code:
            raise ValueError("nothing transposed")
        return lower(gm, *args, **options)

    monkeypatch.setattr(pe_fx.compiled.backend, "lower", fail)
    with caplog.at_level(logging.WARNING, "pe_fx"):
        y = compiled(model)(X)
    torch.testing.assert_close(y, model(X))
    assert "compiled without new ties, since it failed with them: ValueError: nothing transposed" in caplog.text
    assert not pe_fx.pending(model).ties


def test_a_later_graph_that_fails_when_it_is_tied_is_refused(monkeypatch: pytest.MonkeyPatch, unlowered: list[str]) -> None:
    model = mlp()
    compiled(model)(X)

    def fail(gm: torch.fx.GraphModule, *_: Any) -> Any:
        raise RuntimeError("not to be lowered" if "transpose" in gm.code else "dense")

    monkeypatch.setattr(pe_fx.compiled.backend, "lower", fail)
    with pytest.raises(Exception, match="not to be lowered"):
        compiled(model)(X[:3])


@torch.library.custom_op("pe_fx_test::first_row", mutates_args=())
def first_row(weight: Tensor) -> Tensor:
    """Like many kernels, it takes for granted that its operand is contiguous."""
    return weight.as_strided((weight.shape[1],), (1,)).clone()


@first_row.register_fake
def _(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[1])


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "view of a slice": lambda weight: weight[:4].view(-1),
    "view of a product": lambda weight: (weight * 2).view(16, 8),
    "as_strided": lambda weight: weight.as_strided((8,), (1,)),
    "kernel": lambda weight: torch.ops.pe_fx_test.first_row(weight),
    "linear": lambda weight: nn.functional.linear(torch.ones(2, 16), weight),
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_in_later_graphs_find_the_memory_that_they_expect(reader: str, unlowered: list[str]) -> None:
    model, read = mlp(), READERS[reader]
    compiled(model)(X)
    got = torch.compile(lambda: read(model[2].weight), backend="pe_fx")()
    torch.testing.assert_close(got, read(model[0].weight.t().contiguous()))
    assert ("contiguous" in unlowered[-1]) == (reader != "linear")


# ---- bad input


def test_unknown_option() -> None:
    with pytest.raises(Exception, match=r"option 'rule' is unknown .* rules, share, across, include, exclude, mix, mode, inductor"):
        compiled(mlp(), rule=["mlp"])(X)


def test_wrong_rule() -> None:
    with pytest.raises(Exception, match="rules='mlps' is unknown"):
        compiled(mlp(), rules=["mlps"])(X)


def test_nothing_to_tie_warns_once(unlowered: list[str]) -> None:
    model = nn.Sequential(linear(8, 16), nn.GELU(), linear(16, 4))
    with pytest.warns(NoSitesWarning):
        y = compiled(model)(X)
    compiled(nn.Sequential(linear(8, 16), nn.GELU(), linear(16, 4)), rules=["mlp"])(X)
    torch.testing.assert_close(y, model(X))


def test_a_rule_that_fails_leaves_the_graph_as_it_was(unlowered: list[str], caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        kind = "failing"

        def match(self, flow: Any) -> Iterator[Any]:
            for op in flow.ops:
                if op.name == "gelu":
                    raise RuntimeError("no such thing")
            yield from ()

    model = mlp()
    with caplog.at_level(logging.ERROR, "pe_fx"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NoSitesWarning)
        y = compiled(model, rules=[Failing()])(X)
    assert "no such thing" in caplog.text
    assert "matching failed at input_2" in caplog.text or "matching failed at gelu" in caplog.text
    torch.testing.assert_close(y, model(X))


# ---- distributed


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_of_a_tied_model(process_group: None) -> None:
    tied = pe_fx.transform(mlp(), X)
    expected = copy.deepcopy(tied)
    run = compiled(nn.parallel.DistributedDataParallel(tied))
    run(X).square().sum().backward()
    expected(X).square().sum().backward()
    for ours, theirs in zip(tied.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_ddp_of_a_dense_model_is_compiled_inside(process_group: None) -> None:
    """Compiled first, the model is one graph, and the weight tied away has to be allowed to get no gradient."""
    model = mlp()
    tied = pe_fx.transform(model, X)
    run = nn.parallel.DistributedDataParallel(compiled(model), find_unused_parameters=True)
    for _ in range(2):
        run(X).square().sum().backward()
    tied(X).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, 2 * tied.get_parameter("0.weight").grad)
    assert not model[2].weight.grad.any() if model[2].weight.grad is not None else True
