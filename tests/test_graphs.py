"""Graphs as input: from symbolic_trace, from torch.export, from Dynamo; and the rules as torch.fx passes."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_equals_twin, assert_miss, dense_twin, linear, ties
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import pe_fx
from pe_fx import PeFxError, Plan, TiePass
from pe_fx.passes import DEFAULT_RULES

X = torch.randn(2, 5, 8)
IMAGE = torch.randn(2, 16, 6, 6)


def mlp() -> nn.Module:
    return nn.Sequential(linear(8, 16), nn.GELU(), linear(16, 8))


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(8, 12), linear(8, 12), linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = linear(8, 24), linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        q, k, v = qkv[..., :8], qkv[..., 8:16], qkv[..., 16:]
        return self.proj(F.scaled_dot_product_attention(q, k, v))


def bottleneck() -> nn.Module:
    layers = [nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 16, 1)]
    return nn.Sequential(*layers)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.attention, self.glu = mlp(), Attention(), Glu()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attention(x)) + self.glu(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "mlp": (mlp, X, ["2.weight ← 0.weightᵀ"]),
    "glu": (Glu, X, ["down.weight ← up.weightᵀ"]),
    "attention": (Attention, X, ["proj.weight ← qkv.weight[0:8]ᵀ", "qkv.weight[16:24] ← qkv.weight[8:16]ᵀ"]),
    "bottleneck": (bottleneck, IMAGE, ["5.weight ← 0.weightᵀ"]),
    "squeeze_excite": (SqueezeExcite, IMAGE, ["expand.weight ← reduce.weightᵀ"]),
}

every_kind = pytest.mark.parametrize("kind", MODELS)


def symbolic(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def exported(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(model, (x,)).module()


def dynamo(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """What a torch.compile backend is given: a graph whose weights are placeholders, and its arguments."""
    seen: list[tuple[fx.GraphModule, list[Any]]] = []

    def record(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append((gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=record, fullgraph=True)(x)
    ((gm, inputs),) = seen
    return gm, inputs


def assert_lints(gm: fx.GraphModule) -> None:
    assert isinstance(gm, fx.GraphModule)
    gm.graph.lint()
    gm.recompile()


# ---- graphs that hold their weights


@every_kind
@pytest.mark.parametrize("trace", [symbolic, exported])
def test_graph_module(trace: Callable[[nn.Module, Tensor], fx.GraphModule], kind: str) -> None:
    build, x, expected = MODELS[kind]
    gm = trace(build(), x)
    plan = pe_fx.plan(gm, x)
    assert sorted(ties(plan)) == expected
    assert {site.kind for site in plan.sites} == {kind}
    tied = pe_fx.transform(gm, x)
    assert_lints(tied)
    assert sum(p.numel() for p in tied.parameters()) == plan.params_after
    if trace is symbolic:  # what export made has one mode only
        assert_equals_twin(gm, tied, plan, x)
    else:
        torch.testing.assert_close(tied(x), dense_twin(gm, plan)(x))
    assert sorted(ties(pe_fx.plan(gm, x))) == expected, "the caller's graph is another one"


@every_kind
@pytest.mark.parametrize("trace", [symbolic, exported])
def test_graph_module_gradients(trace: Callable[[nn.Module, Tensor], fx.GraphModule], kind: str) -> None:
    build, x, _ = MODELS[kind]
    model = build()
    tied = pe_fx.transform(model, x)
    gm = pe_fx.transform(trace(model, x), x)
    stored = dict(gm.named_parameters())
    assert set(stored) == set(dict(tied.named_parameters()))
    for each in (gm, tied):
        each(x).square().sum().backward()
    for name, parameter in tied.named_parameters():
        torch.testing.assert_close(stored[name].grad, parameter.grad)


@every_kind
def test_symbolic_trace_of_a_tied_model(kind: str) -> None:
    build, x, _ = MODELS[kind]
    tied = pe_fx.transform(build(), x).eval()
    gm = fx.symbolic_trace(tied)
    torch.testing.assert_close(gm(x), tied(x))
    assert sum(p.numel() for p in gm.parameters()) == sum(p.numel() for p in tied.parameters())


def test_symbolic_graph_keeps_its_nodes() -> None:
    gm = symbolic(mlp(), X)
    tied = pe_fx.transform(gm, X)
    assert [node.op for node in tied.graph.nodes] == [node.op for node in gm.graph.nodes]
    assert tied.get_submodule("2").weight.shape == (8, 16)


def test_inputs_of_an_exported_graph_need_not_be_given() -> None:
    assert ties(pe_fx.plan(exported(mlp(), X))) == ["2.weight ← 0.weightᵀ"]


def test_inplace_on_a_graph_module() -> None:
    gm = symbolic(mlp(), X)
    assert pe_fx.transform(gm, X, inplace=True) is gm
    assert "2.weight" not in gm.state_dict()


class Holder(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) / columns**0.5)


class Functional(nn.Module):
    """Weights that the graph reads itself; those of the attention are rows of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.qkv, self.proj = Holder(16, 8), Holder(8, 16), Holder(24, 8), Holder(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(F.gelu(F.linear(x, self.a.weight)), self.b.weight)
        q, k, v = F.linear(x, self.qkv.weight).chunk(3, -1)
        return F.linear(F.scaled_dot_product_attention(q, k, v), self.proj.weight)


def pickled(gm: fx.GraphModule) -> fx.GraphModule:
    try:
        pickle.dumps(fx.symbolic_trace(Functional()))
    except AttributeError:
        pytest.skip("torch 2.11 pickles no graph")
    copied: fx.GraphModule = pickle.loads(pickle.dumps(gm))
    return copied


def rebuilt(gm: fx.GraphModule) -> fx.GraphModule:
    gm = copy.deepcopy(gm)
    return fx.GraphModule(gm, gm.graph)


@pytest.mark.parametrize("mix", ["none", "signed"])
@pytest.mark.parametrize(
    ("trace", "again"),
    [
        (symbolic, copy.deepcopy),
        (symbolic, pickled),
        (symbolic, rebuilt),
        (symbolic, lambda gm: rebuilt(pickled(gm))),
        (symbolic, lambda gm: fx.symbolic_trace(copy.deepcopy(gm))),
        (exported, copy.deepcopy),  # no exported graph can be pickled
        (exported, rebuilt),
    ],
    ids=["deepcopy", "pickle", "rebuilt", "pickled and rebuilt", "traced", "exported deepcopy", "exported rebuilt"],
)
def test_weights_that_a_graph_reads_stay_tied_in_copies(
    trace: Callable[[nn.Module, Tensor], fx.GraphModule], again: Callable[[fx.GraphModule], fx.GraphModule], mix: str
) -> None:
    tied = pe_fx.transform(trace(Functional(), X), X, mix=mix)
    assert list(tied.state_dict()) == ["a.weight", "qkv.weight_kept"]
    copied = again(tied)
    assert_lints(copied)
    assert sorted(copied.state_dict()) == ["a.weight", "qkv.weight_kept"]
    with torch.no_grad():
        for gm in (tied, copied):
            for parameter in gm.parameters():
                parameter.mul_(1.5)
    for gm in (tied, copied):
        gm(X).square().sum().backward()
    torch.testing.assert_close(copied(X), tied(X), rtol=1e-4, atol=1e-4)
    for name, parameter in copied.named_parameters():
        torch.testing.assert_close(parameter.grad, dict(tied.named_parameters())[name].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pe_fx.untie(copied)(X), tied(X), rtol=1e-4, atol=1e-4)


def test_symbolic_trace_of_a_tied_model_that_reads_weights_itself() -> None:
    tied = pe_fx.transform(Functional(), X)
    gm = fx.symbolic_trace(tied)
    with torch.no_grad():
        tied.a.weight.mul_(2)
    torch.testing.assert_close(gm(X), tied(X))
    assert pe_fx.verify(gm, X)


def test_weights_that_a_graph_module_holds_itself() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8, 16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.gelu(F.linear(x, self.a)), self.b)

    gm = symbolic(Bare(), X)
    plan = pe_fx.plan(Bare(), X)
    message = "[ab] is held by a GraphModule itself.*transform the model, then trace it"
    assert re.search(message, pe_fx.plan(gm, X).explain())
    with pytest.raises(PeFxError, match=message):
        pe_fx.apply(gm, plan, inplace=True)
    assert set(gm.state_dict()) == {"a", "b"}


@pytest.mark.parametrize("entry", ["slice", "expand"])
def test_entry_of_a_graph_module(entry: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = bottleneck()
            self.body[0] = nn.Conv2d(8, 4, 1)
            self.shortcut = nn.Conv2d(8, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.body(x) + self.shortcut(x))

    model = nn.Sequential(Residual())
    gm = symbolic(model, IMAGE[:, :8])
    message = rf"entry='{entry}' does not apply: it changes what the module .* transform the model, then trace it"
    assert_miss(gm, IMAGE[:, :8], message, kind="bottleneck", entry=entry)
    assert not any("entry=" in miss.reason for miss in pe_fx.plan(gm, IMAGE[:, :8]).misses)
    made = pe_fx.plan(model, IMAGE[:, :8], entry=entry)  # as the reason has it
    symbolic(pe_fx.apply(model, made), IMAGE[:, :8])
    with pytest.raises(PeFxError, match=message):
        pe_fx.apply(gm, made)


def test_a_class_made_for_one_module_goes_with_it() -> None:
    def build() -> nn.Module:
        class Local(nn.Linear): ...

        return nn.Sequential(linear(8, 16), nn.GELU(), Local(16, 8))

    tied = pe_fx.transform(build(), X)
    classes = [weakref.ref(cls) for cls in type(tied[2]).__mro__ if "Local" in cls.__name__]
    assert len(classes) == 2
    del tied
    for _ in range(2):  # first what was derived, then what it was derived from
        gc.collect()
    assert [ref() for ref in classes] == [None, None]


# ---- graphs whose weights are placeholders


def name_of(gm: fx.GraphModule, arguments: list[Any], model: nn.Module) -> dict[str, str]:
    """The graph's placeholders by the model's parameter names."""
    first = {id(p): name for name, p in model.named_parameters()}
    placeholders = gm.graph.find_nodes(op="placeholder")
    pairs = zip(placeholders, arguments, strict=True)
    return {first[id(value)]: node.name for node, value in pairs if id(value) in first}


@every_kind
def test_dynamo_graph(kind: str) -> None:
    build, x, expected = MODELS[kind]
    model = build()
    gm, arguments = dynamo(model, x)
    names = name_of(gm, arguments, model)
    plan = pe_fx.plan(gm)
    for name in sorted(names, key=len, reverse=True):
        expected = [text.replace(f"{name}[", f"{names[name]}[").replace(f"{name}ᵀ", f"{names[name]}ᵀ") for text in expected]
        expected = [text.replace(f"{name} ", f"{names[name]} ") for text in expected]
    assert sorted(ties(plan)) == sorted(expected)
    tied = pe_fx.apply(gm, plan)
    assert_lints(tied)
    assert [n.name for n in tied.graph.find_nodes(op="placeholder")] == [n.name for n in gm.graph.find_nodes(op="placeholder")]
    twin = dense_twin(model, renamed(plan, {placeholder: name for name, placeholder in names.items()}))
    x = x.clone()
    model.zero_grad()
    got, wanted = tied(*arguments)[0], twin(x)
    torch.testing.assert_close(got, wanted)
    got.square().sum().backward()
    wanted.square().sum().backward()
    whole = {tie.target for tie in plan.ties if tie.into.is_whole}
    for name, placeholder in names.items():
        assert (model.get_parameter(name).grad is None) == (placeholder in whole), name


def renamed(plan: Plan, names: dict[str, str]) -> Plan:
    text = plan.to_json()
    for placeholder, name in names.items():
        text = text.replace(f'"{placeholder}"', f'"{name}"')
    return Plan.from_json(text)


@every_kind
def test_dynamo_graph_gradients(kind: str) -> None:
    """The source's gradient is the sum over all its uses."""
    build, x, _ = MODELS[kind]
    model = build()
    tied = pe_fx.transform(model, x)
    gm, arguments = dynamo(model, x)
    pe_fx.transform(gm, inplace=True)(*arguments)[0].square().sum().backward()
    tied(x).square().sum().backward()
    for name, parameter in tied.named_parameters():
        gradient = model.get_parameter(name.removesuffix("_kept")).grad
        assert gradient is not None, name
        torch.testing.assert_close(gradient[: len(parameter)], parameter.grad)
        assert not gradient[len(parameter) :].any(), "rows that are tied away get nothing"


def test_dynamo_graph_twice_is_once() -> None:
    gm, _ = dynamo(mlp(), X)
    pe_fx.transform(gm, inplace=True)
    code = gm.code
    assert not pe_fx.plan(gm).sites
    assert not TiePass()(gm).modified
    assert gm.code == code


def test_plan_of_another_dynamo_graph() -> None:
    gm, _ = dynamo(mlp(), X)
    code = gm.code
    with pytest.raises(PeFxError, match=r"does not fit this graph: .* is missing"):
        pe_fx.apply(gm, pe_fx.plan(dynamo(Glu(), X)[0]), inplace=True)
    assert gm.code == code


def test_dynamo_graph_of_other_shapes() -> None:
    gm, _ = dynamo(mlp(), X)
    code = gm.code
    other, _ = dynamo(nn.Sequential(linear(8, 12), nn.GELU(), linear(12, 8)), X)
    with pytest.raises(PeFxError, match=r"\(12, 8\)"):
        pe_fx.apply(gm, pe_fx.plan(other), inplace=True)
    assert gm.code == code


# ---- passes


@every_kind
@pytest.mark.parametrize("trace", [symbolic, exported])
def test_one_rule_as_a_pass(trace: Callable[[nn.Module, Tensor], fx.GraphModule], kind: str) -> None:
    build, x, _ = MODELS[kind]
    gm = trace(build(), x)
    before = sum(p.numel() for p in gm.parameters())
    (rule,) = [rule for rule in DEFAULT_RULES if rule.kind == kind]
    result = TiePass([rule], x)(gm)
    assert result.modified
    assert result.graph_module is gm
    assert_lints(gm)
    assert sum(p.numel() for p in gm.parameters()) < before
    again = TiePass([rule], x)(gm)
    assert not again.modified
    assert again.graph_module is gm


@every_kind
def test_other_rules_as_a_pass_modify_nothing(kind: str) -> None:
    build, x, _ = MODELS[kind]
    gm = symbolic(build(), x)
    before = copy.deepcopy(gm.state_dict())
    result = TiePass([rule for rule in DEFAULT_RULES if rule.kind != kind], x)(gm)
    assert not result.modified
    assert list(gm.state_dict()) == list(before)


def test_dynamo_graph_in_a_pass() -> None:
    gm, arguments = dynamo(mlp(), X)
    result = TiePass(["mlp"])(gm)
    assert result.modified
    assert not TiePass(["mlp"])(gm).modified
    gm(*arguments)


@pytest.mark.parametrize("trace", [symbolic, exported])
def test_pass_manager(trace: Callable[[nn.Module, Tensor], fx.GraphModule]) -> None:
    gm = trace(Layer(), X)
    expected = pe_fx.transform(gm, X)
    result = PassManager([TiePass([kind], X) for kind in ("attention", "glu", "mlp")], run_checks_after_each_pass=True)(gm)
    assert result.modified
    assert set(result.graph_module.state_dict()) == set(expected.state_dict())
    torch.testing.assert_close(result.graph_module(X), expected(X))


def test_pass_manager_runs_to_a_fixed_point() -> None:
    gm = symbolic(Layer(), X)
    manager = PassManager([TiePass(example_inputs=X)], steps=5)
    assert manager(gm).modified
    assert not manager(gm).modified


def test_sharing_pass() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = bottleneck()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.body(x))

    alone, shared = (symbolic(nn.Sequential(Residual(), Residual()), IMAGE) for _ in range(2))
    TiePass(example_inputs=IMAGE)(alone)
    TiePass(example_inputs=IMAGE, share=("bottleneck",))(shared)
    assert "1.body.0.weight" in alone.state_dict()
    assert "1.body.0.weight" not in shared.state_dict()
    assert pe_fx.verify(shared, IMAGE)
    pairs = symbolic(nn.Sequential(*(Residual() for _ in range(3))), IMAGE)
    TiePass([], IMAGE, share={"bottleneck": 2})(pairs)
    assert [name for name in pairs.state_dict() if name.endswith("body.0.weight")] == ["0.body.0.weight", "2.body.0.weight"]


def test_wrong_rule_in_a_pass() -> None:
    with pytest.raises(PeFxError, match="rules='mlps' is unknown"):
        TiePass(["mlps"], X).call(symbolic(mlp(), X))
