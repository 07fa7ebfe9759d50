"""plan, transform and apply: their options, their errors, and what they leave as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from oracle import Net, assert_hit, linear, ties
from torch import Tensor, nn

import pe_fx
from pe_fx import CaptureError, NoSitesWarning, PeFxError, Plan
from pe_fx.graph.flow import Flow
from pe_fx.passes import Mlp
from pe_fx.ties import Miss, Site, Tie

X = torch.randn(3, 8)


def mlp(hidden: int = 16, width: int = 8) -> nn.Sequential:
    return nn.Sequential(linear(width, hidden), nn.GELU(), linear(hidden, width))


def two() -> nn.Sequential:
    return nn.Sequential(mlp(), mlp(12))


TIES = ["0.2.weight ← 0.0.weightᵀ", "1.2.weight ← 1.0.weightᵀ"]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any("Tied" in type(module).__name__ for module in model.modules())


# ---- options that are wrong

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rule": ({"rules": ["mlps"]}, "rules='mlps' is unknown.*'attention'.*'mlp'"),
    "rule alone": ({"rules": "mlps"}, "rules='mlps' is unknown"),
    "rule object": ({"rules": [42]}, "42 is neither.*mlp.*kind.*match"),
    "shared kind": ({"share": ("stages",)}, "share='stages' is unknown.*'bottleneck'"),
    "entry": ({"entry": "cut"}, "entry='cut' is unknown.*'keep', 'slice', 'expand'"),
    "share as a string": ({"share": "mlp"}, r"share='mlp'.*share=\('mlp',\)"),
    "include as a string": ({"include": "layer3.*"}, r"include='layer3\.\*'.*include=\['layer3\.\*'\]"),
    "exclude as a string": ({"exclude": "head"}, r"exclude='head'.*exclude=\['head'\]"),
}


@pytest.mark.parametrize("function", [pe_fx.plan, pe_fx.transform])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(function: Callable[..., Any], case: str) -> None:
    options, message = WRONG[case]
    model = mlp()
    before = state(model)
    with pytest.raises(PeFxError, match=message):
        function(model, X, **options)
    assert_untouched(model, before)


def test_wrong_init() -> None:
    model = mlp()
    before = state(model)
    message = "init='zeros' is unknown; choose from 'keep', 'mean', 'fit', 'reset'"
    with pytest.raises(PeFxError, match=message):
        pe_fx.transform(model, X, init="zeros", inplace=True)
    with pytest.raises(PeFxError, match=message):
        pe_fx.apply(model, pe_fx.plan(model, X), init="zeros", inplace=True)
    assert_untouched(model, before)


# ---- rules


def gate_and_mlp() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.fc2(m.fc1(x).relu())
        return m.down(torch.nn.functional.silu(m.gate(x)) * m.up(x))

    return Net(forward, fc1=linear(8, 16), fc2=linear(16, 8), gate=linear(8, 12), up=linear(8, 12), down=linear(12, 8))


@pytest.mark.parametrize("rules", ["mlp", ["mlp"], ("mlp",), [Mlp()]], ids=str)
def test_rules_by_name_and_as_objects(rules: Any) -> None:
    assert_hit(gate_and_mlp(), X, "fc2.weight ← fc1.weightᵀ", kind="mlp", rules=rules)


def test_rules_are_all_on_by_default() -> None:
    assert sorted(ties(pe_fx.plan(gate_and_mlp(), X))) == ["down.weight ← up.weightᵀ", "fc2.weight ← fc1.weightᵀ"]


def test_no_rules_no_sites() -> None:
    made = pe_fx.plan(gate_and_mlp(), X, rules=())
    assert not made.sites
    assert made.params_after == made.params_before


class SecondOnly:
    """A custom rule: mlp pairs of the second block alone, under a kind of its own."""

    kind = "second"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        for found in Mlp().match(flow):
            if isinstance(found, Site) and found.name == "1":
                yield dataclasses.replace(found, kind=self.kind)


def test_custom_rule() -> None:
    assert_hit(two(), X, TIES[1], kind="second", rules=[SecondOnly()])


def test_custom_rule_beside_default_ones_comes_first() -> None:
    made = pe_fx.plan(two(), X, rules=["mlp", SecondOnly()])
    assert {site.name: site.kind for site in made.sites} == {"0": "mlp", "1": "second"}


# ---- include and exclude

GLOBS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "name": ({"include": ["0"]}, TIES[:1]),
    "below a name": ({"include": ["0.*"]}, TIES[:1]),
    "weight": ({"include": ["1.2.weight"]}, TIES[1:]),
    "several": ({"include": ["0", "1.*"]}, TIES),
    "character class": ({"include": ["[1-9]"]}, TIES[1:]),
    "nothing": ({"include": ["2.*"]}, []),
    "exclude": ({"exclude": ["0"]}, TIES[1:]),
    "exclude wins": ({"include": ["*"], "exclude": ["1.*"]}, TIES[:1]),
    "case matters": ({"include": ["BODY.*"]}, []),
}


@pytest.mark.parametrize("case", GLOBS)
def test_globs(case: str) -> None:
    options, expected = GLOBS[case]
    made = pe_fx.plan(two(), X, **options)
    assert ties(made) == expected
    assert all(made.options[key] == tuple(value) for key, value in options.items())


def test_globs_hold_for_misses() -> None:
    net = nn.Sequential(nn.Sequential(linear(8, 16), nn.Identity(), linear(16, 8)), nn.ReLU(), mlp())
    assert "nonlinearity" in pe_fx.plan(net, X).explain()
    assert pe_fx.plan(net, X, include=["2.*"]).misses == ()


# ---- init


def test_keep_is_the_sources_own_value() -> None:
    model = mlp()
    tied = pe_fx.transform(model, X)
    assert torch.equal(tied[0].weight, model[0].weight)
    assert torch.equal(tied[2].weight, model[0].weight.t())


def test_mean_of_both() -> None:
    model = mlp()
    tied = pe_fx.transform(model, X, init="mean")
    torch.testing.assert_close(tied[0].weight, (model[0].weight + model[2].weight.t()) / 2)
    assert torch.equal(tied[2].weight, tied[0].weight.t())
    assert torch.equal(tied[2].bias, model[2].bias)


def test_mean_of_all_that_share_one() -> None:
    model = nn.Sequential(mlp(), mlp())
    tied = pe_fx.transform(model, X, init="mean", share=("mlp",))
    mean = (model[0][0].weight + model[0][2].weight.t() + model[1][0].weight + model[1][2].weight.t()) / 4
    torch.testing.assert_close(tied[0][0].weight, mean)
    assert torch.equal(tied[1][2].weight, tied[0][0].weight.t())


@pytest.mark.parametrize("transposed", [False, True], ids=["(out, in)", "(in, out)"])
def test_reset_keeps_the_scale(transposed: bool) -> None:
    """From 8 inputs to 256 outputs: whatever the layout, a standard deviation of 1 / sqrt(8)."""
    linear = torch.nn.functional.linear
    a, b = torch.full((8, 256), 9.0), torch.full((256, 8), 9.0)
    if transposed:
        model = Net(lambda m, x: (x @ m.a).relu() @ m.b, a=a, b=b)
    else:
        model = Net(lambda m, x: linear(linear(x, m.a).relu(), m.b), a=a.T.contiguous(), b=b.T.contiguous())
    tied = pe_fx.transform(model, X, init="reset")
    assert tied.a.std().item() == pytest.approx(8**-0.5, rel=0.1)
    assert torch.equal(tied.b, tied.a.t())


# ---- inputs


def test_inputs_that_do_not_fit() -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(CaptureError, match=r"Sequential could not be captured.*\(3, 9\)") as caught:
        pe_fx.transform(model, torch.randn(3, 9), inplace=True)
    assert "check that model(*example_inputs) runs" in str(caught.value)
    assert_untouched(model, before)


def test_inputs_that_were_derived_and_do_not_fit() -> None:
    model = Net(lambda m, x, y: m.mlp(x + y), mlp=mlp())
    with pytest.raises(CaptureError, match=r"derived[\s\S]*pass example_inputs, a tensor, a tuple of positional or a dict"):
        pe_fx.plan(model)


def test_no_derivable_inputs() -> None:
    with pytest.raises(CaptureError, match="no example inputs can be derived for Net: pass example_inputs"):
        pe_fx.plan(Net(lambda m, x: x @ m.a, a=torch.randn(8, 16)))


def test_errors_are_of_one_family() -> None:
    assert issubclass(CaptureError, PeFxError)
    assert issubclass(NoSitesWarning, UserWarning)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(nn.Identity(), m)], ids=["itself", "inside"])
def test_script_module(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = wrap(torch.jit.trace(mlp(), X))
    with pytest.raises(CaptureError, match=r"ScriptModule.*before torch\.jit"):
        pe_fx.plan(model, X)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(nn.Identity(), m)], ids=["itself", "inside"])
def test_compiled_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(CaptureError, match="is compiled: transform the model first"):
        pe_fx.plan(wrap(torch.compile(mlp())), X)


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.GELU(), nn.Linear(16, 8))
    with pytest.raises(CaptureError, match="0 has uninitialised lazy parameters: run the model once"):
        pe_fx.plan(model, X)
    model(X)
    assert ties(pe_fx.plan(model, X)) == ["2.weight ← 0.weightᵀ"]


# ---- a plan applied to another model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (mlp(12), r"0\.weight is \(12, 8\) here, \(16, 8\) in the plan; 2\.weight is \(8, 12\) here, \(8, 16\) in the plan"),
        (nn.Sequential(nn.Identity(), mlp()), r"0\.weight \(16, 8\) is missing; 2\.weight \(8, 16\) is missing"),
        (nn.Sequential(linear(8, 16), nn.GELU(), linear(16, 4)), r"this Sequential: 2\.weight is \(4, 16\) here, \(8, 16\) in the plan\."),
    ],
    ids=["shapes", "names", "one of two"],
)
def test_plan_of_another_model(other: nn.Module, message: str, inplace: bool) -> None:
    other = copy.deepcopy(other)
    before = state(other)
    with pytest.raises(PeFxError, match=message):
        pe_fx.apply(other, pe_fx.plan(mlp(), X), inplace=inplace)
    assert_untouched(other, before)


def frozen(model: nn.Sequential) -> None:
    model[0].weight.requires_grad_(False)


def half(model: nn.Sequential) -> None:
    model[2].half()


def read_elsewhere(model: nn.Sequential) -> None:
    model[1].other = linear(16, 8)
    model[1].other.weight = model[2].weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (frozen, r"0\.weight is frozen, 2\.weight is trained"),
        (half, r"2\.weight is float16, 0\.weight is float32"),
        (read_elsewhere, r"2\.weight is one parameter registered in 2 places"),
    ],
    ids=["frozen", "dtype", "registered twice"],
)
def test_apply_refuses_what_plan_leaves_alone(change: Callable[[nn.Sequential], None], message: str) -> None:
    plan = pe_fx.plan(mlp(), X)
    model = mlp()
    change(model)
    before = state(model)
    with pytest.raises(PeFxError, match=message):
        pe_fx.apply(model, plan, inplace=True)
    assert_untouched(model, before)


def test_two_modules_of_the_plan_are_one_here() -> None:
    plan = pe_fx.plan(nn.Sequential(mlp(), mlp()), X)
    model = nn.Sequential(*[mlp()] * 2)
    before = state(model)
    with pytest.raises(PeFxError, match=r"[01]\.2\.weight and [01]\.2\.weight are one parameter here"):
        pe_fx.apply(model, plan, inplace=True)
    assert_untouched(model, before)


class Registered(nn.Linear):
    def __init_subclass__(cls, *, name: str) -> None: ...


def test_class_that_cannot_be_subclassed() -> None:
    model = nn.Sequential(linear(8, 16), nn.GELU(), Registered(16, 8))
    before = state(model)
    with pytest.raises(PeFxError, match=r"Registered cannot be subclassed.*'name'"):
        pe_fx.transform(model, X, init="mean", inplace=True)
    assert_untouched(model, before)


def test_plan_applied_twice() -> None:
    model = mlp()
    plan = pe_fx.plan(model, X)
    tied = pe_fx.apply(model, plan)
    before = state(tied)
    with pytest.raises(PeFxError, match=r"2\.weight \(8, 16\) is missing.*dense model"):
        pe_fx.apply(tied, plan, inplace=True)
    assert list(state(tied)) == list(before)
    assert pe_fx.verify(tied, X)


def with_ties(plan: Plan, *second: Tie) -> Plan:
    """The plan with other ties in its second site."""
    sites = plan.sites[0], dataclasses.replace(plan.sites[1], ties=second)
    return dataclasses.replace(plan, sites=sites)


BROKEN: dict[str, Callable[[Plan, Tie], Plan]] = {
    "two ties for one weight": lambda plan, tie: with_ties(plan, tie, tie),
    "source is tied away": lambda plan, tie: with_ties(plan, tie, dataclasses.replace(tie, into=tie.of, of=tie.into)),
    "weight that no shape is given for": lambda plan, tie: with_ties(
        plan, dataclasses.replace(tie, into=dataclasses.replace(tie.into, name="1.9.weight"))
    ),
    "shapes that do not fit each other": lambda plan, tie: with_ties(plan, dataclasses.replace(tie, transposed=False)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_inconsistent_plan(case: str) -> None:
    model = two()
    before = state(model)
    plan = pe_fx.plan(model, X)
    with pytest.raises(PeFxError, match=r"1\.\d\.weight"):
        pe_fx.apply(model, BROKEN[case](plan, plan.ties[1]), inplace=True)
    assert_untouched(model, before)


@pytest.mark.parametrize("block", ["into", "of"])
def test_a_tie_of_another_full_shape(block: str) -> None:
    plan = pe_fx.plan(mlp(), X)
    (site,) = plan.sites
    (tie,) = site.ties
    changed = dataclasses.replace(getattr(tie, block), full_shape=(17, 17))
    damaged = dataclasses.replace(site, ties=(dataclasses.replace(tie, **{block: changed}),))
    with pytest.raises(PeFxError, match=r"[02]\.weight is \(\d+, \d+\).*\(17, 17\)"):
        pe_fx.apply(mlp(), dataclasses.replace(plan, sites=(damaged,)))


# ---- tied weights, set and deleted


def attention() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        return m.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v))

    return Net(forward, qkv=linear(8, 24), proj=linear(8, 8))


def test_what_is_left_of_a_partly_tied_weight_is_a_parameter_like_others() -> None:
    x = torch.randn(2, 5, 8)
    dense = attention()
    tied = pe_fx.transform(dense, x)
    assert list(dict(tied.qkv.named_parameters())) == ["weight_kept", "bias"]  # in the place of the weight: an optimizer's order
    for name, parameter in tied.named_parameters():
        owner, _, attribute = name.rpartition(".")
        assert getattr(tied.get_submodule(owner), attribute) is tied.get_parameter(name) is parameter
    tied.qkv.weight_kept = nn.Parameter(torch.ones(16, 8))
    assert torch.equal(tied.proj.weight, torch.ones(8, 8))
    tied.load_state_dict(pe_fx.transform(attention(), x).state_dict(), assign=True)
    assert pe_fx.verify(tied, x)
    assert list(pe_fx.untie(tied).state_dict()) == list(dense.state_dict())


@pytest.mark.parametrize("value", [nn.Parameter(torch.ones(24, 8)), torch.ones(24, 8), None], ids=["parameter", "tensor", "None"])
def test_a_tied_weight_is_neither_set_nor_deleted(value: nn.Parameter | Tensor | None) -> None:
    x = torch.randn(2, 5, 8)
    tied = pe_fx.transform(attention(), x)
    before = tied(x)
    for module, text in ((tied.qkv, r"weight ← qkv\.weight\[8:16\]ᵀ"), (tied.proj, r"weight ← qkv\.weight\[0:8\]ᵀ")):
        for change in (
            lambda m: setattr(m, "weight", value),
            lambda m: delattr(m, "weight"),
            lambda m: m.register_buffer("weight", torch.ones(1)),
            lambda m: m.register_parameter("weight", None),
        ):
            with pytest.raises(PeFxError, match=f"{text} is tied, and can be neither set nor deleted"):
                change(module)
    assert torch.equal(tied(x), before)


# ---- JSON


@pytest.mark.parametrize("text", ["", "rubbish", "[]", "42", "null", "{}", '{"sites": []}'])
def test_json_that_is_no_plan(text: str) -> None:
    with pytest.raises(PeFxError, match="not a plan"):
        Plan.from_json(text)


def test_json_of_another_version() -> None:
    body = json.loads(pe_fx.plan(mlp(), X).to_json()) | {"pe_fx_plan": 999}
    with pytest.raises(PeFxError, match=r"version 999.*make the plan anew"):
        Plan.from_json(json.dumps(body))


def test_json_of_version_1() -> None:
    """Signed weights lay row by row then, whether a model needed that or not."""
    old = {mix: json.loads(pe_fx.plan(mlp(), X, mix=mix).to_json()) | {"pe_fx_plan": 1} for mix in ("none", "signed")}
    contiguous = {mix: [tie.contiguous for tie in Plan.from_json(json.dumps(body)).ties] for mix, body in old.items()}
    assert contiguous == {"none": [False], "signed": [True]}
    tied = pe_fx.apply(mlp(), Plan.from_json(json.dumps(old["signed"])))
    assert tied[2].weight.is_contiguous()
    assert pe_fx.verify(tied, X)


def dropped(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body.pop(key)


def in_tie(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda body: change(body["sites"][0]["ties"][0])


ENTRY = {"block": "0", "conv1": "0.0", "convs": ["0.1"], "norms": [], "width": 4, "out": 8, "stride": [1, 1]}

DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no sites": dropped("sites"),
    "no shapes": dropped("shapes"),
    "no counts": dropped("params_after"),
    "site without ties": lambda body: body["sites"][0].pop("ties"),
    "site with an unknown field": lambda body: body["sites"][0].update(colour="red"),
    "tie without a source": lambda body: body["sites"][0]["ties"][0].pop("of"),
    "sites are no list": lambda body: body.update(sites=5),
    "shapes are a list": lambda body: body.update(shapes=[]),
    "ranges are no list": lambda body: body["sites"][0]["ties"][0]["of"].update(ranges="all"),
    "counts are text": lambda body: body.update(params_before="many"),
    "sites are an object": lambda body: body.update(sites={}),
    "kind is a number": lambda body: body["sites"][0].update(kind=3),
    "a shape is text": lambda body: body["shapes"].update({"0.weight": "16x8"}),
    "ranges past the end": in_tie(lambda tie: tie["of"].update(ranges=[[[100, 116]], [[0, 8]]])),
    "ranges that overlap": in_tie(lambda tie: tie["of"].update(ranges=[[[0, 10], [4, 10]], [[0, 8]]])),
    "ranges of too few dimensions": in_tie(lambda tie: tie["of"].update(ranges=[[[0, 16]]])),
    "a range of three": in_tie(lambda tie: tie["of"].update(ranges=[[[0, 8, 16]], [[0, 8]]])),
    "another shape of the source": in_tie(lambda tie: tie["of"].update(full_shape=[48, 8])),
    "axes past the end": in_tie(lambda tie: tie.update(axes=[0, 5])),
    "one axis": in_tie(lambda tie: tie.update(axes=[0])),
    "axes that are negative": in_tie(lambda tie: tie.update(axes=[-1, 0])),
    "channels past the end": in_tie(lambda tie: tie.update(channels=7)),
    "seed is text": in_tie(lambda tie: tie.update(seed="x")),
    "gain is no number": in_tie(lambda tie: tie.update(gain=float("nan"))),
    "transposed is text": in_tie(lambda tie: tie.update(transposed="no")),
    "an unknown entry": lambda body: body["sites"][0].update(entry=ENTRY | {"treatment": "fold"}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_json(case: str) -> None:
    body = json.loads(pe_fx.plan(mlp(), X).to_json())
    DAMAGED[case](body)
    with pytest.raises(PeFxError, match="damaged"):
        Plan.from_json(json.dumps(body))


@pytest.mark.parametrize("options", [{}, {"share": ("mlp",)}, {"include": ["0.*"]}, {"rules": ["glu"]}], ids=str)
def test_json_round_trip(options: dict[str, Any]) -> None:
    plan = pe_fx.plan(nn.Sequential(mlp(), mlp(), linear(8, 8)), X, **options)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert (again.options, str(again), again.explain()) == (plan.options, str(plan), plan.explain())


# ---- nothing to tie


def test_no_sites_warns_and_leaves_the_model() -> None:
    model = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4))
    before = state(model)
    with pytest.warns(NoSitesWarning, match=r"Sequential can be tied.*not transposes.*explain"):
        result = pe_fx.transform(model, X)
    assert_untouched(model, before)
    assert_untouched(result, before)
    assert result is not model


def warned(model: nn.Module, *inputs: Any, **options: Any) -> str:
    with pytest.warns(NoSitesWarning) as caught:
        pe_fx.transform(model, *inputs, **options)
    return str(caught[0].message)


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, "pe_fx.plan(model, example_inputs)"),
        ({"include": ["0", "1.*"], "gain": 0}, "pe_fx.plan(model, example_inputs, include=['0', '1.*'], gain=0)"),
        ({"rules": ("mlp",), "share": (), "entry": "slice"}, "pe_fx.plan(model, example_inputs, rules=('mlp',), share=(), entry='slice')"),
        ({"rules": [Mlp()], "init": "mean"}, "pe_fx.plan(model, example_inputs, rules=rules)"),
    ],
    ids=str,
)
def test_no_sites_names_the_call_that_says_why(options: dict[str, Any], call: str) -> None:
    model = Net(lambda m, x: m.b(m.a(x + 1).relu()), a=linear(8, 16), b=linear(16, 4))
    model = nn.Sequential(model, nn.Sequential(linear(4, 6), nn.Identity(), linear(6, 4)))
    text = warned(model, X, **options)
    assert "can be tied (2 near misses: no nonlinearity stands between 1.0.weight and 1.2.weight" in text
    assert text.endswith(f", …); print({call}.explain()) shows them")
    made = eval(call, {"pe_fx": pe_fx, "model": model, "example_inputs": X, "rules": options.get("rules")})
    assert len(made.misses) == 2
    assert made.misses[0].reason in text


def test_no_sites_without_inputs() -> None:
    model = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4))
    reason = "2.weight is (4, 16), 0.weight is (16, 8): not transposes of each other"
    assert warned(model) == f"nothing in this Sequential can be tied (1 near miss: {reason}); print(pe_fx.plan(model).explain()) shows it"


def test_no_sites_and_no_near_miss() -> None:
    call = "pe_fx.plan(model, example_inputs, rules=['glu'])"
    expected = f"nothing in this Sequential can be tied, and nothing comes near it: {call} has no near miss"
    assert warned(mlp(), X, rules=["glu"]) == expected


def test_no_sites_inplace() -> None:
    model = nn.Sequential(linear(8, 16))
    with pytest.warns(NoSitesWarning):
        assert pe_fx.transform(model, X, inplace=True) is model


def test_transforming_twice_does_not_warn() -> None:
    tied = pe_fx.transform(mlp(), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pe_fx.transform(tied, X)


# ---- what stays as it was


class Model(nn.Module):
    """Everything that plan and transform must leave alone, in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(8, 16), linear(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)
        self.note = ["kept"]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        random.random()
        numpy.random.rand()
        return self.dropout(self.fc2(self.fc1(self.norm(x)).relu()))


def test_plan_touches_nothing() -> None:
    model = Model()
    before, tensors = state(model), [*model.parameters(), *model.buffers()]
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    pe_fx.plan(model, X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(numpy.random.get_state())) == states[1:]
    assert_untouched(model, before)
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_transform_draws_no_random_numbers() -> None:
    model = Model()
    states = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    pe_fx.transform(model, X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(numpy.random.get_state())) == states[1:]


def test_transform_leaves_the_original() -> None:
    model = Model()
    before = state(model)
    tied = pe_fx.transform(model, X)
    assert_untouched(model, before)
    with torch.no_grad():
        tied.fc1.weight.zero_()
    assert_untouched(model, before)
    assert [key for key in before if key not in tied.state_dict()] == ["fc2.weight"]
    assert type(tied) is Model
    assert tied.note == ["kept"]
    assert isinstance(tied.fc2, nn.Linear)


def test_inplace_is_the_model_itself() -> None:
    model = Model()
    kept = {name: parameter for name, parameter in model.named_parameters() if name != "fc2.weight"}
    modules = list(model.modules())
    assert pe_fx.transform(model, X, inplace=True) is model
    assert dict(model.named_parameters()) == kept
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert pe_fx.verify(model, X)


@pytest.mark.parametrize("inplace", [False, True])
def test_modes_stay(inplace: bool) -> None:
    model = Model()
    model.norm.eval()
    tied = pe_fx.transform(model, X, inplace=inplace)
    assert [path for path, module in tied.named_modules() if not module.training] == ["norm"]


def test_requires_grad_stays() -> None:
    model = Model()
    model.norm.requires_grad_(False)
    model.fc1.weight.requires_grad_(False)
    model.fc2.weight.requires_grad_(False)
    tied = pe_fx.transform(model, X)
    assert [name for name, p in tied.named_parameters() if p.requires_grad] == ["fc1.bias", "fc2.bias"]
    assert not tied.fc2.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    tied = pe_fx.transform(mlp().to(dtype), X.to(dtype))
    assert {p.dtype for p in tied.parameters()} == {dtype}
    assert tied(X.to(dtype)).dtype == dtype


def test_device_stays() -> None:
    with torch.device("meta"):
        model = mlp()
    tied = pe_fx.transform(model, X.to("meta"))
    assert "2.weight" not in tied.state_dict()
    assert {tensor.device.type for tensor in (tied[2].weight, *tied.parameters())} == {"meta"}
    tied.to_empty(device="cpu")
    assert tied(X).shape == X.shape


def test_hooks_stay() -> None:
    model = mlp()
    calls: list[str] = []
    model[2].register_forward_pre_hook(lambda m, args: calls.append("before"))
    model[2].register_forward_hook(lambda m, args, result: calls.append("after"))
    model.register_forward_hook(lambda m, args, result: calls.append("model"))
    tied = pe_fx.transform(model, X)
    calls.clear()
    tied(X)
    assert calls == ["before", "after", "model"]


def test_hooks_of_the_original_do_not_run() -> None:
    model = mlp()
    model.register_forward_hook(lambda m, args, result: pytest.fail("ran") if not torch.compiler.is_compiling() else None)
    pe_fx.plan(model, X)


def test_inputs_stay() -> None:
    x = X.clone()
    pe_fx.transform(nn.Sequential(nn.Hardtanh(0, 1, inplace=True), mlp()), x)
    assert torch.equal(x, X)


def test_no_grad_and_inference_mode_of_the_caller() -> None:
    with torch.no_grad():
        tied = pe_fx.transform(mlp(), X)
    assert all(parameter.requires_grad for parameter in tied.parameters())
    assert pe_fx.verify(tied, X)


# ---- what is printed


def test_print_plan() -> None:
    text = str(pe_fx.plan(two(), X))
    assert re.search(r"0 +mlp +0\.weight, 2\.weight +\(16, 8\), \(8, 16\) +2\.weight ← 0\.weightᵀ +128\n", text)
    assert re.search(r"1 +mlp +0\.weight, 2\.weight +\(12, 8\), \(8, 12\) +2\.weight ← 0\.weightᵀ +96\n", text)
    assert text.endswith("2 sites; 492 → 268 parameters (54.5 %)")


def test_print_plan_without_sites() -> None:
    text = str(pe_fx.plan(nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4)), X))
    assert "0 sites; 212 → 212 parameters (100.0 %); 1 near miss" in text
    assert "plan.explain()" in text


def test_print_tied_model() -> None:
    text = str(pe_fx.transform(two(), X))
    assert "(2): TiedLinear(in_features=16, out_features=8, bias=True, weight ← 0.0.weightᵀ)" in text
    assert "(0): Linear(in_features=8, out_features=16, bias=True)" in text
    assert "weight ← 1.0.weightᵀ" in text


def test_print_partly_tied_model() -> None:
    text = str(pe_fx.transform(nn.TransformerEncoderLayer(8, 2, 16), torch.randn(2, 3, 8)))
    assert "in_proj_weight ← in_proj_weight[8:16]ᵀ" in text.replace("self_attn.", "")
    assert "weight ← self_attn.in_proj_weight[0:8]ᵀ" in text
    assert "weight ← linear1.weightᵀ" in text


def test_explain() -> None:
    model = nn.Sequential(nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4)), nn.Sequential(linear(4, 6), nn.Identity(), linear(6, 4)))
    lines = pe_fx.plan(model, X).explain().splitlines()
    assert "0 (mlp): 0.2.weight is (4, 16), 0.0.weight is (16, 8): not transposes of each other" in lines
    assert any(line.startswith("1 (mlp): no nonlinearity stands between 1.0.weight and 1.2.weight") for line in lines)
    assert pe_fx.plan(mlp(), X).explain() == "no misses"


def test_public_names() -> None:
    assert all(hasattr(pe_fx, name) for name in pe_fx.__all__)
    assert {"plan", "transform", "apply", "untie", "verify", "Plan", "PeFxError", "CaptureError", "NoSitesWarning"} <= set(pe_fx.__all__)


# ---- cost


def test_planning_makes_no_second_copy_of_the_weights() -> None:
    code = """
import resource, torch, pe_fx
from torch import nn
block = lambda width: nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pe_fx.plan(block(8))
model = nn.Sequential(*(block(2048) for _ in range(3)))
before = peak()
assert len(pe_fx.plan(model).sites) == 3
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 0.2
