"""Checkpoints: what is written, what is read back, and what is refused."""

from __future__ import annotations

import argparse
import copy
import functools
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

import pe_fx
from pe_fx import PeFxError, checkpoint
from pe_fx.tied.held import held_plan

DRAWN = torch.Generator().manual_seed(0)  # other modules draw theirs while they are imported
ROWS = torch.randn(4, 8, generator=DRAWN)
IMAGE = torch.randn(2, 3, 32, 32, generator=DRAWN)
TOKENS = torch.arange(24).reshape(2, 12)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.BatchNorm1d(8))


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=7)


def resnet() -> nn.Module:
    return ResNet(Bottleneck, layers=(3, 2, 1, 1), channels=(8, 16, 16, 16), stem_width=8, num_classes=7)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16))


def tie(build: Callable[[], nn.Module], inputs: Tensor | None = None, **options: Any) -> nn.Module:
    """A tied model of other values than any that the test builds itself."""
    return copy.deepcopy(_tied(build, inputs, tuple(options.items())))


@functools.cache
def _tied(build: Callable[[], nn.Module], inputs: Tensor | None, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return pe_fx.transform(build(), inputs, **dict(options))


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    a_state, b_state = a.state_dict(), b.state_dict()
    assert list(a_state) == list(b_state)
    assert all(torch.equal(value, b_state[name]) and value.dtype == b_state[name].dtype for name, value in a_state.items())
    assert [type(module) for module in a.modules()] == [type(module) for module in b.modules()]


# ---- tied file -> dense constructor

BUILDS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "mlp": (mlp, ROWS, {}),
    "glu, a weight in no tie": (Gated, ROWS, {}),
    "vit, rows of a weight": (vit, IMAGE, {}),
    "resnet, keep": (resnet, IMAGE, {}),
    "resnet, slice": (resnet, IMAGE, {"entry": "slice"}),
    "resnet, expand": (resnet, IMAGE, {"entry": "expand"}),
    "gpt2, tied embeddings": (gpt2, TOKENS, {}),
    "vit, signed": (vit, IMAGE, {"mix": "signed", "gain": 0.5}),
    "resnet, signed": (resnet, IMAGE, {"entry": "expand", "mix": "signed", "gain": True}),
}


@pytest.mark.parametrize("case", BUILDS)
def test_a_tied_file_ties_a_dense_model(case: str, tmp_path: Path) -> None:
    build, inputs, options = BUILDS[case]
    tied = tie(build, inputs, **options)
    checkpoint.save(tied, tmp_path / "tied.safetensors")
    dense = build()
    before = copy.deepcopy(dense)
    loaded = checkpoint.load(tmp_path / "tied.safetensors", dense)
    assert_equal(loaded, tied)
    assert str(checkpoint.read_plan(tmp_path / "tied.safetensors")) == str(held_plan(loaded))
    assert_equal(dense, before)
    checkpoint.load(tmp_path / "tied.safetensors", dense, inplace=True)
    assert_equal(dense, tied)
    again = checkpoint.load(tmp_path / "tied.safetensors", tie(build, inputs, **options))
    assert_equal(again, tied)


def test_dtypes_and_buffers_are_kept(tmp_path: Path) -> None:
    tied = tie(mlp).to(torch.bfloat16)
    tied(torch.randn(4, 8, dtype=torch.bfloat16))  # moves the statistics
    checkpoint.save(tied, tmp_path / "tied.safetensors")
    values = load_file(tmp_path / "tied.safetensors")
    assert values.keys() == tied.state_dict().keys()
    assert values["3.num_batches_tracked"].item() == 1
    assert {value.dtype for value in values.values()} == {torch.bfloat16, torch.int64}
    assert_equal(checkpoint.load(tmp_path / "tied.safetensors", mlp().to(torch.bfloat16)), tied)
    assert checkpoint.load(tmp_path / "tied.safetensors", mlp())[0].weight.dtype is torch.float32  # the model's own, as load_state_dict


def test_shared_tensors_are_written_once(tmp_path: Path) -> None:
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    checkpoint.save(model, tmp_path / "dense.safetensors")
    assert "lm_head.weight" not in load_file(tmp_path / "dense.safetensors")
    loaded = checkpoint.load(tmp_path / "dense.safetensors", gpt2())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert_equal(loaded, model)


class Slices(nn.Module):
    """Buffers that lie in one another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("all", torch.randn(6))
        self.register_buffer("some", self.all[2:4])
        self.register_buffer("none", torch.empty(0))


def test_overlapping_tensors(tmp_path: Path) -> None:
    model = Slices()
    checkpoint.save(model, tmp_path / "dense.safetensors")
    assert_equal(checkpoint.load(tmp_path / "dense.safetensors", Slices()), model)


def test_metadata(tmp_path: Path) -> None:
    checkpoint.save(tie(mlp), tmp_path / "tied.safetensors", metadata={"epoch": "3"})
    with safe_open(tmp_path / "tied.safetensors", framework="pt") as file:
        assert file.metadata()["epoch"] == "3"
        assert file.metadata()["format"] == "pt"
    plan = checkpoint.read_plan(tmp_path / "tied.safetensors")
    assert plan == pe_fx.plan(mlp())
    checkpoint.save(mlp(), tmp_path / "dense.safetensors")
    assert checkpoint.read_plan(tmp_path / "dense.safetensors") is None


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    tied = tie(mlp)
    checkpoint.save(torch.compile(tied), tmp_path / "tied.safetensors")
    assert_equal(checkpoint.load(tmp_path / "tied.safetensors", mlp()), tied)


# ---- the plan that a tied model holds


def test_the_plan_is_held() -> None:
    model = vit()
    plan = pe_fx.plan(model, IMAGE)
    tied = pe_fx.apply(model, plan)
    assert held_plan(tied) == plan
    assert held_plan(copy.deepcopy(tied)) == plan
    assert copy.deepcopy(plan) is plan
    assert held_plan(pickle.loads(pickle.dumps(tied))) == plan
    assert held_plan(model) is None
    assert held_plan(pe_fx.untie(tied)) is None


@pytest.mark.parametrize("entry", ["keep", "slice", "expand"])
def test_the_plan_of_a_stage_is_held(entry: str) -> None:
    model = resnet()
    plan = pe_fx.plan(model, IMAGE, entry=entry)
    assert held_plan(pe_fx.apply(model, plan)) == plan


def test_two_transforms_make_one_plan(tmp_path: Path) -> None:
    first = pe_fx.transform(vit(), IMAGE, rules=["attention"])
    tied = pe_fx.transform(first, IMAGE, rules=["mlp"])
    held = held_plan(tied)
    both = pe_fx.plan(vit(), IMAGE)
    assert held is not None
    assert set(held.ties) == set(both.ties)
    assert (held.shapes, held.params_before, held.params_after) == (both.shapes, both.params_before, both.params_after)
    checkpoint.save(tied, tmp_path / "tied.safetensors")
    assert_equal(checkpoint.load(tmp_path / "tied.safetensors", vit()), tied)


@pytest.mark.parametrize("entry", ["slice", "expand"])
def test_a_tied_part_of_a_larger_model(entry: str, tmp_path: Path) -> None:
    whole = nn.ModuleDict({"backbone": tie(resnet, IMAGE, entry=entry), "head": nn.Linear(7, 3)})
    checkpoint.save(whole, tmp_path / "whole.safetensors")
    assert_equal(checkpoint.load(tmp_path / "whole.safetensors", nn.ModuleDict({"backbone": resnet(), "head": nn.Linear(7, 3)})), whole)
    checkpoint.save(whole["backbone"], tmp_path / "part.safetensors")
    assert_equal(checkpoint.load(tmp_path / "part.safetensors", resnet()), whole["backbone"])


def test_blocks_that_are_left_out(tmp_path: Path) -> None:
    tied = tie(vit, IMAGE)
    tied.blocks = nn.Sequential(*tied.blocks[1:])
    checkpoint.save(tied, tmp_path / "short.safetensors")
    dense = vit()
    dense.blocks = dense.blocks[:1]
    assert_equal(checkpoint.load(tmp_path / "short.safetensors", dense), tied)


def test_a_tie_that_leads_out_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(PeFxError, match=r"weight is tied to 0\.weight, which is no part of this model"):
        checkpoint.save(tie(mlp)[2], tmp_path / "part.safetensors")
    assert not list(tmp_path.iterdir())


# ---- dense file -> tied model, tied model -> dense file


@pytest.mark.parametrize("init", ["keep", "mean"])
@pytest.mark.parametrize("build", [vit, resnet])
def test_a_dense_file_fills_a_tied_model(build: Callable[[], nn.Module], init: str, tmp_path: Path) -> None:
    dense = build()
    checkpoint.save(dense, tmp_path / "dense.safetensors")
    loaded = checkpoint.load(tmp_path / "dense.safetensors", tie(build, IMAGE), init=init)
    assert_equal(loaded, pe_fx.transform(dense, IMAGE, init=init))


def test_a_dense_file_fills_a_dense_model(tmp_path: Path) -> None:
    dense = mlp()
    checkpoint.save(dense, tmp_path / "dense.safetensors")
    assert_equal(checkpoint.load(tmp_path / "dense.safetensors", mlp()), dense)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_state_dicts_by_torch_save(key: str | None, tmp_path: Path) -> None:
    dense, tied = vit(), tie(vit, IMAGE)
    for model, name in ((dense, "dense.pth"), (tied, "tied.pth")):
        torch.save(model.state_dict() if key is None else {key: model.state_dict(), "epoch": 3}, tmp_path / name)
    assert_equal(checkpoint.load(tmp_path / "tied.pth", tie(vit, IMAGE)), tied)
    assert_equal(checkpoint.load(tmp_path / "dense.pth", vit()), dense)
    assert_equal(checkpoint.load(tmp_path / "dense.pth", tie(vit, IMAGE)), pe_fx.transform(dense, IMAGE))
    with pytest.raises(PeFxError, match=r"it lacks blocks\.0\.attn\.proj\.weight"):
        checkpoint.load(tmp_path / "tied.pth", vit())


def test_the_options_of_timms_train_py_beside_the_weights(tmp_path: Path) -> None:
    dense = mlp()
    torch.save({"state_dict": dense.state_dict(), "args": argparse.Namespace(lr=0.1, layers=[1, 2])}, tmp_path / "last.pth.tar")
    assert_equal(checkpoint.load(tmp_path / "last.pth.tar", mlp()), dense)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("key", [None, "state_dict"])
def test_a_state_dict_of_another_mix(key: str | None, inplace: bool, tmp_path: Path) -> None:
    signed, plain = tie(mlp, ROWS, mix="signed"), tie(mlp, ROWS)
    torch.save(signed.state_dict() if key is None else {key: signed.state_dict()}, tmp_path / "signed.pth")
    before = copy.deepcopy(plain)
    with pytest.raises(PeFxError, match=r"signed\.pth does not fit this Sequential: 2 has another order or other signs \(mix\)"):
        checkpoint.load(tmp_path / "signed.pth", plain, inplace=inplace)
    assert_equal(plain, before)
    assert_equal(checkpoint.load(tmp_path / "signed.pth", tie(mlp, ROWS, mix="signed")), signed)


FORMS = ("model.safetensors", "model.pt", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")


@pytest.mark.parametrize("name", FORMS)
def test_every_form_keeps_values_mix_and_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD", 10_000)
    tied = tie(vit, IMAGE, mix="signed", gain=0.5)
    checkpoint.save(tied, tmp_path / name, metadata={"epoch": "3"})
    found = checkpoint.read(tmp_path / name)
    assert (found.plan, found.metadata["epoch"]) == (held_plan(tied), "3")
    assert_equal(checkpoint.load(tmp_path / name, vit()), tied)
    assert (len(list(tmp_path.iterdir())) > 3) == name.endswith(checkpoint.INDEX)
    with pytest.raises(PeFxError, match=r"does not fit this VisionTransformer: .* has another order or other signs|only one of them has"):
        checkpoint.load(tmp_path / name, tie(vit, IMAGE))


@pytest.mark.parametrize("name", [name for name in FORMS if name != "model.pt"])
def test_other_libraries_read_every_form(name: str, tmp_path: Path) -> None:
    dense = gpt2()
    dense.config.save_pretrained(tmp_path)
    checkpoint.save(dense, tmp_path / name)
    assert_equal(transformers.GPT2LMHeadModel.from_pretrained(tmp_path), dense)


def test_a_file_by_torch_save_has_every_name(tmp_path: Path) -> None:
    dense = gpt2()
    checkpoint.save(dense, tmp_path / "dense.pt")
    gpt2().load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True), strict=True)


def test_files_of_an_index_are_put_in_place_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD", 100)
    path = tmp_path / "model.safetensors.index.json"
    checkpoint.save(mlp(), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    written: list[object] = []

    def fail_late(*args: Any, **options: Any) -> None:
        written.append(args)
        if len(written) == 3:
            raise ValueError("disk")

    monkeypatch.setattr("safetensors.torch.save_file", fail_late)
    with pytest.raises(PeFxError, match=r"model-00003-of-.*cannot hold this model"):
        checkpoint.save(mlp(), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


INDICES = {
    "text": "no",
    "a list": "[1]",
    "no map": "{}",
    "another folder": '{"weight_map": {"x": "../model.safetensors"}}',
    "a number": '{"weight_map": {"x": 3}}',
}


@pytest.mark.parametrize("case", INDICES)
def test_damaged_indices(case: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(INDICES[case])
    with pytest.raises(PeFxError, match=r"model.safetensors.index.json is no index of files beside it"):
        checkpoint.load(tmp_path / "model.safetensors.index.json", mlp())


# ---- tied file -> dense file, without a model


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("name", ["tied.safetensors", "tied.pt"])
@pytest.mark.parametrize("case", BUILDS)
def test_a_tied_file_is_untied(case: str, name: str, with_model: bool, tmp_path: Path) -> None:
    build, inputs, options = BUILDS[case]
    tied = tie(build, inputs, **options)
    checkpoint.save(tied, tmp_path / name, metadata={"epoch": "3"})
    made = checkpoint.untie(tmp_path / name, tmp_path / "dense.pt", model=build() if with_model else None)
    assert made == held_plan(tied)
    found = checkpoint.read(tmp_path / "dense.pt")
    assert (found.plan, found.metadata) == (None, {"format": "pt", "epoch": "3"})
    twin = pe_fx.untie(tied)
    assert_equal(checkpoint.load(tmp_path / "dense.pt", pe_fx.untie(tie(build, inputs, **options))), twin)
    storages = [value.untyped_storage().data_ptr() for value in found.values.values() if value.numel()]
    shared = len(storages) - len(set(storages))
    both_names = with_model or name.endswith(".pt")
    assert shared == (both_names and case == "gpt2, tied embeddings"), "a tensor of the file that is part of another one"


def test_dtypes_stay_whatever_the_models_own(tmp_path: Path) -> None:
    checkpoint.save(tie(mlp).to(torch.bfloat16), tmp_path / "tied.safetensors")
    for model in (None, mlp()):
        checkpoint.untie(tmp_path / "tied.safetensors", tmp_path / "dense.safetensors", model=model)
        assert load_file(tmp_path / "dense.safetensors")["2.weight"].dtype is torch.bfloat16


def test_a_plan_apart_from_its_weights(tmp_path: Path) -> None:
    tied, plan = tie(mlp, ROWS, mix="signed"), pe_fx.plan(mlp(), ROWS, mix="signed")
    torch.save(tied.state_dict(), tmp_path / "tied.pt")
    file, to = tmp_path / "tied.pt", tmp_path / "dense.pt"
    with pytest.raises(PeFxError, match=r"tied.pt has no plan in its metadata.*give the plan"):
        checkpoint.untie(file, to)
    with pytest.raises(PeFxError, match=r"tied.pt: 2.weight has another order or other signs \(mix\) there than in the plan"):
        checkpoint.untie(file, to, plan=pe_fx.plan(mlp(), ROWS))
    checkpoint.untie(file, to, plan=plan)
    assert_equal(checkpoint.load(to, mlp()), pe_fx.untie(tied))


def test_what_cannot_be_untied(tmp_path: Path) -> None:
    def untied(values: dict[str, Tensor], **options: Any) -> None:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file(values, tmp_path / "odd.safetensors", metadata=metadata)
        checkpoint.untie(tmp_path / "odd.safetensors", tmp_path / "dense.safetensors", **options)

    file = tied_file(tmp_path)
    values = load_file(file)
    rest = {name: value for name, value in values.items() if name != "0.weight"}
    with pytest.raises(PeFxError, match=r"lacks 0.weight, as its plan says\. .*give the model"):
        untied(rest)
    with pytest.raises(PeFxError, match=r"does not fit this Sequential: it lacks 0.weight"):
        untied(rest, model=mlp())
    with pytest.raises(PeFxError, match=r"has 0.weight as \(17, 8\), not \(16, 8\)"):
        untied({**values, "0.weight": torch.ones(17, 8)})
    with pytest.raises(PeFxError, match=r"is dense: it holds 2.weight"):
        untied({**values, "2.weight": torch.ones(8, 16)})
    with pytest.raises(PeFxError, match="has its plan in it: give no other"):
        checkpoint.untie(file, tmp_path / "dense.safetensors", plan=pe_fx.plan(mlp()))
    with pytest.raises(PeFxError, match="plan does not fit this VisionTransformer"):
        checkpoint.untie(file, tmp_path / "dense.safetensors", model=vit())
    assert not (tmp_path / "dense.safetensors").exists()


def test_an_untied_file_is_what_timm_loads(tmp_path: Path) -> None:
    dense = pe_fx.untie(tie(vit, IMAGE))
    checkpoint.save(dense, tmp_path / "dense.safetensors")
    options = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
    assert_equal(timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "dense.safetensors"), **options), dense)


def test_an_untied_folder_is_what_transformers_loads(tmp_path: Path) -> None:
    tied = tie(gpt2, TOKENS)
    dense = pe_fx.untie(tied)
    dense.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert_equal(loaded, dense)
    torch.testing.assert_close(loaded.eval()(TOKENS).logits, tied.eval()(TOKENS).logits)


# ---- what is refused


def tied_file(folder: Path) -> Path:
    checkpoint.save(tie(mlp), folder / "tied.safetensors")
    return folder / "tied.safetensors"


def changed(folder: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Rewrites the tied file."""
    path = tied_file(folder)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    values = load_file(path)
    change(values, metadata)
    save_file(values, path, metadata=metadata)


def cut(size: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = tied_file(folder)
        path.write_bytes(path.read_bytes()[:size])

    return write


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (cut(0), "is no safetensors file, or a damaged one"),
    "cut in the header": (cut(100), "is no safetensors file, or a damaged one"),
    "cut in the values": (cut(-1), "is no safetensors file, or a damaged one"),
    "text": (lambda folder: tied_file(folder).write_text("not at all"), "is no safetensors file"),
    "missing": (lambda folder: changed(folder, lambda values, _: values.pop("2.bias")), r"Sequential: it lacks 2\.bias$"),
    "unexpected": (lambda folder: changed(folder, lambda values, _: values.update(x=torch.ones(2))), "it has x, which the model has not"),
    "shape": (
        lambda folder: changed(folder, lambda values, _: values.update({"2.bias": torch.ones(9)})),
        r"2\.bias is \(9,\), in the model \(8,\)",
    ),
    "kind": (
        lambda folder: changed(folder, lambda values, _: values.update({"2.bias": torch.ones(8, dtype=torch.int64)})),
        r"2\.bias is torch\.int64, in the model torch\.float32",
    ),
    "many": (lambda folder: changed(folder, lambda values, _: values.clear()), "and 5 more"),
    "plan is no plan": (lambda folder: changed(folder, lambda _, metadata: metadata.update(pe_fx_plan="{}")), "not a plan"),
    "plan of the future": (
        lambda folder: changed(folder, lambda _, metadata: metadata.update(pe_fx_plan='{"pe_fx_plan": 99}')),
        "schema version 99",
    ),
    "plan without ties": (
        lambda folder: changed(folder, lambda _, metadata: metadata.pop("pe_fx_plan")),
        r"it lacks 2\.weight",
    ),
    "of another model": (lambda folder: checkpoint.save(tie(vit, IMAGE), folder / "tied.safetensors"), "plan does not fit this Sequential"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_loaded(case: str, inplace: bool, tmp_path: Path) -> None:
    write, message = REFUSED[case]
    write(tmp_path)
    model = mlp()
    before = copy.deepcopy(model)
    with pytest.raises(PeFxError, match=message) as caught:
        checkpoint.load(tmp_path / "tied.safetensors", model, inplace=inplace)
    assert str(tmp_path / "tied.safetensors") in str(caught.value)
    assert_equal(model, before)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 cut short", b"anything", pickle.dumps(mlp()), pickle.dumps([1, 2])],
    ids=["empty", "zip", "text", "module", "pickle"],
)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(PeFxError, match=r"model\.pth is no checkpoint of weights alone"):
        checkpoint.load(tmp_path / "model.pth", mlp())


def test_an_unknown_init(tmp_path: Path) -> None:
    with pytest.raises(PeFxError, match="init='bogus' is unknown; choose from 'keep', 'mean', 'fit', 'reset'"):
        checkpoint.load(tied_file(tmp_path), mlp(), init="bogus")


def test_a_list_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(PeFxError, match="holds no weights by name, but a list"):
        checkpoint.load(tmp_path / "list.pth", mlp())


def test_a_model_tied_otherwise(tmp_path: Path) -> None:
    checkpoint.save(tie(vit, IMAGE), tmp_path / "tied.safetensors")
    model = tie(vit, IMAGE, rules=("mlp",))
    before = copy.deepcopy(model)
    with pytest.raises(PeFxError, match=r"tied otherwise.* only one of them has blocks\.\d\.attn"):
        checkpoint.load(tmp_path / "tied.safetensors", model, inplace=True)
    assert_equal(model, before)


def test_a_model_on_the_meta_device(tmp_path: Path) -> None:
    path = tied_file(tmp_path)
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(PeFxError, match="to_empty"):
        checkpoint.load(path, model, inplace=True)
    assert not any("Tied" in type(module).__name__ for module in model.modules())
    with pytest.raises(PeFxError, match=r"0\.weight is .*Parameter on the meta device"):
        checkpoint.save(model, path)


def test_one_tensor_in_the_model_that_is_two_in_the_file(tmp_path: Path) -> None:
    state = dict(gpt2().state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, tmp_path / "two.pth")
    with pytest.raises(PeFxError, match=r"(lm_head|wte)\.weight is one with another tensor in the model"):
        checkpoint.load(tmp_path / "two.pth", gpt2())


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "nowhere.safetensors", mlp())
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        checkpoint.save(mlp(), tmp_path / "nowhere" / "tied.safetensors")


class Counter(nn.Linear):
    def get_extra_state(self) -> object:
        return {"steps": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_state_that_is_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(PeFxError, match="_extra_state is a dict: a file of weights holds dense tensors"):
        checkpoint.save(Counter(2, 2), tmp_path / "counter.safetensors")
    assert not list(tmp_path.iterdir())


# ---- written as a whole or not at all


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tied_file(tmp_path)
    old = path.read_bytes()

    def interrupted(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(mlp(), path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tied_file(tmp_path)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"tied\.safetensors cannot be written: .*File too large"):
            checkpoint.save(nn.Linear(64, 64), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_compiled_model_is_filled(tmp_path: Path) -> None:
    tied, dense = tie(mlp, ROWS), mlp()
    checkpoint.save(tied, tmp_path / "tied.safetensors")
    checkpoint.save(dense, tmp_path / "dense.safetensors")
    assert_equal(checkpoint.load(tmp_path / "tied.safetensors", torch.compile(mlp()))._orig_mod, tied)
    filled = checkpoint.load(tmp_path / "dense.safetensors", torch.compile(tied))
    assert torch.equal(filled._orig_mod[0].weight, dense[0].weight)


@pytest.mark.parametrize("entry", ["slice", "expand"])
def test_a_dense_file_does_not_fit_changed_modules(entry: str, tmp_path: Path) -> None:
    checkpoint.save(resnet(), tmp_path / "dense.safetensors")
    with pytest.raises(PeFxError, match=f"entry='{entry}' has changed modules.*pe_fx.apply"):
        checkpoint.load(tmp_path / "dense.safetensors", tie(resnet, IMAGE, entry=entry))


# ---- size


def test_tied_deit_s_takes_at_most_053_of_the_dense_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        dense = timm.create_model("deit_small_patch16_224")
    plan = pe_fx.plan(dense)
    dense.to_empty(device="cpu")
    tied = pe_fx.apply(dense, plan)
    sizes = []
    for model in (dense, tied):
        checkpoint.save(model, tmp_path / "deit.safetensors")
        sizes.append((tmp_path / "deit.safetensors").stat().st_size)
        assert 0 <= sizes[-1] - sum(value.nbytes for value in model.state_dict().values()) < 100_000
    assert sizes[1] <= 0.53 * sizes[0]


class Tower(nn.Module):
    """Two names for one matrix, and a buffer that no file has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.down.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.scale
        y: Tensor = self.head(x + self.down(self.up(x).relu()))
        return y


@pytest.mark.parametrize("mix", ["none", "signed"])
def test_built_without_values(tmp_path: Path, mix: str) -> None:
    """What builds the model in place of the model: no weight of it ever has memory, but those of the file."""
    tokens = torch.arange(7)[None]
    tied = pe_fx.transform(Tower(), tokens, mix=mix)
    checkpoint.save(tied, tmp_path / "tied.safetensors")
    built: list[Tower] = []

    def build() -> Tower:
        built.append(Tower())
        assert all(parameter.is_meta for parameter in built[-1].parameters())
        return built[-1]

    loaded = checkpoint.load(tmp_path / "tied.safetensors", build)
    assert loaded is built[0]
    assert torch.equal(loaded(tokens), tied(tokens))
    assert loaded.head.weight is loaded.embedding.weight
    assert [parameter.requires_grad for parameter in loaded.parameters()] == [parameter.requires_grad for parameter in tied.parameters()]
    loaded(tokens).sum().backward()
    assert loaded.up.weight.grad is not None
    assert not any(parameter.is_meta for parameter in Tower().parameters())  # what is built afterwards has values


def test_built_without_values_in_its_own_dtype(tmp_path: Path) -> None:
    checkpoint.save(Tower().to(torch.float64), tmp_path / "dense.safetensors")
    loaded = checkpoint.load(tmp_path / "dense.safetensors", Tower)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_what_is_built_must_fit(tmp_path: Path) -> None:
    checkpoint.save(nn.Linear(4, 4), tmp_path / "other.safetensors")
    with pytest.raises(PeFxError, match="does not fit this Tower"):
        checkpoint.load(tmp_path / "other.safetensors", Tower)
    assert not any(parameter.is_meta for parameter in Tower().parameters())
