"""Tied twins in timm's registry, and timm's own tools on them."""

from __future__ import annotations

import copy
import csv
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

import pe_fx
import pe_fx.timm
from pe_fx.passes.attention import Attention
from pe_fx.tied.weight import Tied
from pe_fx.ties import Site

SIZES = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = "vit_tiny_patch16_224"
RESNET_SIZES = {"layers": (2, 2, 1, 1), "channels": (4, 8, 8, 8)}
TIED_AWAY = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.proj", "mlp.fc2")}


def vit(name: str = f"{VIT}_pe", **options: Any) -> nn.Module:
    return timm.create_model(name, **{**SIZES, **options})


def resnet(name: str = "resnet50_pe", **options: Any) -> nn.Module:
    return timm.create_model(name, **{**RESNET_SIZES, **options})


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tied_names(model: nn.Module) -> set[str]:
    return {f"{path}.{name}" for path, module in model.named_modules() if isinstance(module, Tied) for name in module.tied_weights}


# The registry


def test_each_model_has_a_twin_and_is_what_it_was() -> None:
    twins = set(timm.list_models(module="timm"))
    dense = {name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("timm.models.")}
    assert {f"{name}_pe" for name in dense} | {"vit_pe_small", "resnet50_pe1", "resnet50_pe2"} <= twins
    assert not any(name.endswith("_pe_pe") for name in twins)
    assert not any(isinstance(module, Tied) for module in timm.create_model(VIT, **SIZES).modules())
    assert timm.models.model_entrypoint(VIT).__module__ == "timm.models.vision_transformer"


def test_only_its_own_import_registers_and_that_builds_no_model_and_overwrites_none() -> None:
    code = """
import sys, warnings
import pe_fx.api
assert "timm" not in sys.modules
import timm
from torch import nn

warnings.simplefilter("error")
nn.Module.__init__ = None
before = set(timm.list_models()), set(timm.list_pretrained()), {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
import pe_fx.timm
assert before[0] < set(timm.list_models())
assert before[1] < set(timm.list_pretrained())
assert all(timm.models.model_entrypoint(name) is entry for name, entry in before[2].items())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_twin_has_the_pretrained_configurations_of_the_dense_model() -> None:
    assert f"{VIT}_pe.augreg_in21k" in timm.list_pretrained(f"{VIT}_pe")
    tagged = timm.get_pretrained_cfg(f"{VIT}_pe.augreg_in21k")
    assert (tagged.hf_hub_id, tagged.tag) == ("timm/vit_tiny_patch16_224.augreg_in21k", "augreg_in21k")
    twin, dense = (timm.create_model(f"{name}.augreg_in21k", **SIZES).pretrained_cfg for name in (f"{VIT}_pe", VIT))
    assert twin == dense | {"architecture": f"{VIT}_pe"}
    assert vit().default_cfg is not None
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model(f"{VIT}_pe.nonsense")


@pytest.mark.parametrize(("name", "parameters"), [("vit_pe_small", 11_433_832), ("resnet50_pe1", 14_813_736), ("resnet50_pe2", 15_458_344)])
def test_the_models_of_the_paper(name: str, parameters: int) -> None:
    assert count(timm.create_model(name)) == parameters


def test_what_cannot_be_tied_is_left_dense_with_a_warning() -> None:
    with pytest.warns(pe_fx.NoSitesWarning):
        model = timm.create_model("resnet18_pe", channels=(4, 4, 4, 4))
    assert tied_names(model) == set()


def test_a_model_of_ones_own_gets_a_twin() -> None:
    @timm.models.register_model
    def tiny_model_of_a_test(pretrained: bool = False, **options: Any) -> nn.Module:
        return timm.create_model(VIT, **SIZES, **options)

    pe_fx.timm.register("tiny_model_of_a_test", "tiny_model_tied", rules="mlp")
    assert tied_names(timm.create_model("tiny_model_tied")) == {f"blocks.{i}.mlp.fc2.weight" for i in (0, 1)}


# Options


def test_options_of_transform_are_options_of_create_model() -> None:
    assert tied_names(vit()) == TIED_AWAY | {f"blocks.{i}.attn.qkv.weight" for i in (0, 1)}
    assert tied_names(vit(rules="mlp")) == {f"blocks.{i}.mlp.fc2.weight" for i in (0, 1)}
    assert tied_names(vit(rules="mlp,attention", exclude="blocks.0.*,*.qkv.*")) == {"blocks.1.mlp.fc2.weight"}
    assert tied_names(vit(rules="", share="mlp=2")) == {f"blocks.1.mlp.{name}.weight" for name in ("fc1", "fc2")}
    shared = resnet()
    assert count(resnet(share=())) > count(shared) > count(resnet(entry="slice"))
    with pytest.raises(pe_fx.PeFxError, match="entry='wide' is unknown"):
        resnet(entry="wide")


def test_init_is_applied_to_the_dense_weights() -> None:
    torch.manual_seed(0)
    dense = timm.create_model(VIT, **SIZES)
    torch.manual_seed(0)
    mean = vit(init="mean")
    fc1, fc2 = dense.blocks[0].mlp.fc1.weight, dense.blocks[0].mlp.fc2.weight
    torch.testing.assert_close(mean.blocks[0].mlp.fc1.weight, (fc1 + fc2.t()) / 2)


def test_size_and_channels_are_those_of_the_model() -> None:
    """Neither is what the configuration says, from which inputs would be derived."""
    assert tied_names(vit(img_size=(48, 80), in_chans=5)) >= TIED_AWAY
    assert tied_names(vit(img_size=48)) >= TIED_AWAY
    assert count(resnet(in_chans=1)) < count(timm.create_model("resnet50", in_chans=1, **RESNET_SIZES))
    assert vit(img_size=(48, 80), in_chans=5)(torch.randn(1, 5, 48, 80)).shape == (1, 1000)


def test_drop_path_and_classes() -> None:
    model = vit(drop_path_rate=0.5, num_classes=3)
    assert model.blocks[1].drop_path1.drop_prob == 0.5
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


# What timm does with a model


def test_classifier() -> None:
    model = vit(num_classes=3)
    assert model.get_classifier() is model.head
    before = model.blocks[0].mlp.fc2.weight
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert torch.equal(model.blocks[0].mlp.fc2.weight, before)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 32)


@pytest.mark.parametrize("build", [vit, resnet])
def test_grad_checkpointing_gives_the_same_gradients(build: Any) -> None:
    model = build(num_classes=3)
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("build", "dense"), [(vit, VIT), (resnet, "resnet50")])
def test_features_only_is_tied_and_computes_what_its_dense_twin_does(build: Any, dense: str) -> None:
    model = build(features_only=True, out_indices=(0, 1)).eval()
    whole = timm.create_model(dense, features_only=True, out_indices=(0, 1), **(SIZES if build is vit else RESNET_SIZES)).eval()
    assert tied_names(model)
    assert model.feature_info.channels() == whole.feature_info.channels()
    whole.load_state_dict(pe_fx.untie(model).state_dict())
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(images), whole(images))


def test_a_copy_and_a_pickle_are_twins_too() -> None:
    model = vit()
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.load_state_dict(weights)
        assert torch.equal(again.blocks[0].mlp.fc2.weight, weights["blocks.0.mlp.fc1.weight"].t())


def test_ema_steps_each_weight_once() -> None:
    """The average of the tied model is that of its dense twin: a weight that counted twice would be ahead."""
    model = vit(num_classes=3)
    averages = ModelEmaV3(model, decay=0.5), ModelEmaV3(pe_fx.untie(model), decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        for average, of in zip(averages, (model, pe_fx.untie(model)), strict=True):
            average.update(of)
    tied, dense = pe_fx.untie(averages[0].module).state_dict(), averages[1].module.state_dict()
    torch.testing.assert_close(tied, dense)
    assert not torch.equal(dense["blocks.0.mlp.fc1.weight"], model.blocks[0].mlp.fc1.weight)


# Weights


def drawn(name: str, **options: Any) -> nn.Module:
    model = timm.create_model(name, **options)
    for value in model.state_dict().values():
        value.copy_(torch.randn(value.shape))
    return model


def test_pretrained_loads_dense_weights_and_ties_them(tmp_path: Path) -> None:
    dense = drawn(VIT, num_classes=5, **SIZES)
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    overlay = {"file": str(tmp_path / "dense.pth"), "num_classes": 5}
    model = vit(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    expected = pe_fx.transform(dense, torch.randn(1, 3, 32, 32)).state_dict()
    assert_same(model, expected)
    other_head = vit(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=9, init="mean")
    assert other_head.head.weight.shape == (9, 32)
    assert_same(other_head.norm, dense.norm.state_dict())
    fc1, fc2 = dense.blocks[0].mlp.fc1.weight, dense.blocks[0].mlp.fc2.weight
    torch.testing.assert_close(other_head.blocks[0].mlp.fc1.weight, (fc1 + fc2.t()) / 2)


def assert_same(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("entry", ["keep", "slice", "expand"])
def test_a_checkpoint_of_either_kind_is_told_apart(entry: str, tmp_path: Path) -> None:
    tied = drawn("resnet50_pe", entry=entry, num_classes=5, **RESNET_SIZES)
    torch.save({"state_dict": tied.state_dict()}, tmp_path / "tied.pth.tar")
    assert_same(resnet(entry=entry, num_classes=5, checkpoint_path=tmp_path / "tied.pth.tar"), tied.state_dict())

    dense = drawn("resnet50", num_classes=5, **RESNET_SIZES)
    torch.save({"state_dict": dense.state_dict()}, tmp_path / "dense.pth.tar")
    model = resnet(entry=entry, num_classes=5, checkpoint_path=tmp_path / "dense.pth.tar")
    expected = pe_fx.transform(dense, torch.randn(1, 3, 64, 64), entry=entry).state_dict()
    drawn_anew = ("widen", "downsample") if entry == "expand" else ()
    given, loaded = (
        {k: v for k, v in state.items() if not any(part in k for part in drawn_anew)} for state in (expected, model.state_dict())
    )
    torch.testing.assert_close(loaded, given, rtol=0, atol=0)


def test_dense_weights_are_tied_after_the_classifier_was_replaced() -> None:
    model = vit(num_classes=3)
    model.reset_classifier(5)
    dense = drawn(VIT, num_classes=5, **SIZES)
    model.load_state_dict(dense.state_dict())
    assert_same(model, pe_fx.transform(dense, torch.randn(1, 3, 32, 32)).state_dict())


def test_dense_weights_are_tied_after_the_size_and_the_pooling_were_changed() -> None:
    model, dense = vit(num_classes=3), drawn(VIT, num_classes=5, **SIZES)
    for net in (model, dense):
        net.reset_classifier(5, global_pool="avg")
        net.set_input_size(48)
    state = torch.get_rng_state()
    model.load_state_dict(dense.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(model, pe_fx.transform(dense, torch.randn(1, 3, 48, 48)).state_dict())


@pytest.mark.parametrize("entry", ["slice", "expand"])
def test_dense_weights_are_tied_without_random_numbers(entry: str) -> None:
    model, dense = resnet(entry=entry), timm.create_model("resnet50", **RESNET_SIZES)
    state = torch.get_rng_state()
    model.load_state_dict(dense.state_dict(), strict=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.conv1.weight, dense.conv1.weight)


def test_dense_weights_without_a_classifier() -> None:
    model, dense = vit(num_classes=3), drawn(VIT, num_classes=5, **SIZES)
    head = model.head.weight.clone()
    body = {name: value for name, value in dense.state_dict().items() if not name.startswith("head.")}
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        model.load_state_dict(body)
    model.load_state_dict(body, strict=False)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, dense.blocks[0].mlp.fc1.weight)


class ValueOnly:
    """Attention, of which only v is tied: rows of a weight whose name stays."""

    kind = "value"

    def match(self, flow: Any) -> Iterator[Any]:
        for site in Attention().match(flow):
            if isinstance(site, Site):
                yield replace(site, kind=self.kind, ties=tuple(tie for tie in site.ties if not tie.into.is_whole))


def test_where_only_rows_are_tied_the_shape_tells() -> None:
    options = {"rules": [ValueOnly()]}
    tied, dense = drawn(f"{VIT}_pe", **SIZES, **options), drawn(VIT, **SIZES)
    assert tied_names(tied) == {f"blocks.{i}.attn.qkv.weight" for i in (0, 1)}
    model = vit(**options)
    model.load_state_dict(tied.state_dict())
    assert_same(model, tied.state_dict())
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight_kept"], dense.blocks[0].attn.qkv.weight[:64])


def test_weights_of_another_twin_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks.0.attn.proj.weight"):
        vit().load_state_dict(vit(rules="mlp").state_dict())


def test_a_folder_for_the_hub_holds_the_tied_model(tmp_path: Path) -> None:
    model = drawn(f"{VIT}_pe", num_classes=5, rules="mlp", **SIZES)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same(again, model.state_dict())
    assert tied_names(again) == tied_names(model)


# timm's training


def test_timms_task_trains_compiled_with_ema_and_goes_on(tmp_path: Path) -> None:
    """The parts of timm's train.py, in its order: task, optimizer, EMA, compile, saver; then from the saver's file."""
    task_module = pytest.importorskip("timm.task")
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])

    def prepared() -> tuple[Any, torch.optim.Optimizer]:
        model = timm.create_model("vit_pe_small", num_classes=3, **SIZES | {"depth": 1})
        task = task_module.ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        return task, create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=1e-2)

    def steps(task: Any, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            task(images, labels)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()

    task, optimizer = prepared()
    task.setup_ema(decay=0.5)
    task.compile(backend="pe_fx")
    steps(task, optimizer)
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), task=task)
    saver.save_checkpoint(0, metric=1.0)
    again, its_optimizer = prepared()
    file = str(tmp_path / "last.pth.tar")
    assert task_module.resume_task_checkpoint(again, file, optimizer=its_optimizer, log_info=False) == 1
    again.setup_ema(decay=0.5)
    task_module.load_task_ema_checkpoint(again, file)
    for one in ((task, optimizer), (again, its_optimizer)):
        steps(*one)
    for ema in (False, True):
        ours, theirs = (one.get_checkpoint_state(ema=ema) for one in (task, again))
        key = "state_dict_ema" if ema else "state_dict"
        torch.testing.assert_close(dict(theirs[key]), dict(ours[key]), rtol=1e-4, atol=1e-5)
        assert "blocks.0.mlp.fc2.weight" not in ours[key]


@pytest.mark.skipif("TIMM_TRAIN" not in os.environ, reason="TIMM_TRAIN is not the path of timm's train.py, which no package holds")
def test_timms_unmodified_train_py(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in (0, 1):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for number in range(4):
                noise = draw.integers(0, 128, (32, 32, 3), dtype=np.uint8) + np.uint8(120 * label)
                Image.fromarray(noise).save(tmp_path / split / str(label) / f"{number}.png")
    command = [sys.executable, os.environ["TIMM_TRAIN"], str(tmp_path), "--output", str(tmp_path / "output"), "--experiment", "run"]
    command += ["--device=cpu", "--device-modules=pe_fx.timm", "--model=vit_pe_small", "--torchcompile=pe_fx", "--model-ema"]
    command += ["--num-classes=2", "--img-size=32", "--batch-size=4", "--workers=0"]
    command += ["--opt=adamw", "--warmup-epochs=0", "--epochs=2"]
    command += ["--model-kwargs", *(f"{name}={value}" for name, value in SIZES.items()), "rules=mlp,attention"]
    subprocess.run(command, check=True)
    run = tmp_path / "output" / "run"
    subprocess.run([*command, "--resume", str(run / "last.pth.tar"), "--epochs", "3"], check=True)
    with (run / "summary.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file) if row["epoch"] != "epoch"] == ["0", "1", "2"]
    state = torch.load(run / "last.pth.tar", weights_only=False)
    assert TIED_AWAY.isdisjoint(state["state_dict"])
    assert TIED_AWAY.isdisjoint(state["state_dict_ema"])
    assert len(state["optimizer"]["state"]) == len(state["state_dict"])
    vit("vit_pe_small", num_classes=2, checkpoint_path=run / "last.pth.tar")
