"""Tied models in the tools that people train and ship with."""

from __future__ import annotations

import copy
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import onnx
import onnxruntime
import pytest
import timm
import torch
import transformers
from accelerate.state import AcceleratorState
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import pe_fx
from pe_fx import PeFxError, checkpoint

DRAWN = torch.Generator().manual_seed(0)  # other modules draw theirs while they are imported
X = torch.randn(6, 8, generator=DRAWN)
IMAGE = torch.randn(2, 3, 32, 32, generator=DRAWN)
TOKENS = {"input_ids": torch.arange(24).reshape(2, 12)}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def vit(width: int = 32) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=width, num_heads=2, num_classes=7)


def bert() -> nn.Module:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **size))


def gpt2() -> nn.Module:
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **size))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Trainer leaves settings for accelerate in the environment and in the process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)


INPUTS: dict[Callable[[], nn.Module], Any] = {mlp: X, vit: IMAGE, bert: TOKENS, gpt2: TOKENS}


@functools.cache
def _tied(build: Callable[[], nn.Module]) -> nn.Module:
    return pe_fx.transform(build(), INPUTS[build])


def tied(build: Callable[[], nn.Module]) -> nn.Module:
    return copy.deepcopy(_tied(build))


def same(a: nn.Module, b: nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# ---- transformers


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    """Twenty steps on sentences of one word each, whose label is whether the word is even."""
    words = torch.arange(16)
    rows = [{"input_ids": word.expand(12), "labels": word.expand(12) if model.config.model_type == "gpt2" else word % 2} for word in words]
    settings = {"learning_rate": 1e-2, "max_steps": 20, "save_steps": 10, "logging_steps": 5, "per_device_train_batch_size": 8}
    arguments = transformers.TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **settings, **options)
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows)


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("build", [bert, gpt2])
def test_trainer_trains_saves_and_resumes(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = tied(build)
    first = trainer(model, tmp_path)
    first.train()
    assert losses(first)[-1] < 0.9 * losses(first)[0]
    assert pe_fx.verify(model, TOKENS)
    resumed = tied(build)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert same(resumed, model)
    assert same(checkpoint.load(tmp_path / "checkpoint-20" / "model.safetensors", tied(build)), model)


def test_trainer_with_torch_compile(tmp_path: Path) -> None:
    torch.compiler.reset()
    assert_trains_alike(gpt2, lambda model: None, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")


def test_trainer_with_our_backend(tmp_path: Path) -> None:
    """accelerate has a closed list of backends, so that the model comes to Trainer compiled."""
    torch.compiler.reset()
    assert_trains_alike(bert, lambda model: model.compile(backend="pe_fx"), tmp_path)
    with pytest.raises(ValueError, match="PE_FX"):
        trainer(tied(bert), tmp_path, torch_compile=True, torch_compile_backend="pe_fx")


def assert_trains_alike(build: Callable[[], nn.Module], change: Callable[[nn.Module], None], folder: Path, **options: Any) -> None:
    """As an eager model does, without dropout, for which compiled code draws other numbers."""
    found = []
    for name, compiled in (("eager", False), ("compiled", True)):
        model = tied(build)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if compiled:
            change(model)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        trained = trainer(model, folder / name, save_strategy="no", **(options if compiled else {}))
        trained.train()
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs) is compiled
        found.append(losses(trained))
    assert found[1] == pytest.approx(found[0], rel=0.02)


# ---- accelerate


def test_accelerate(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = tied(mlp)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

    def step() -> dict[str, Tensor]:
        accelerator.backward(model(X).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    first = step()
    accelerator.save_state(str(tmp_path / "state"))
    second = step()
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, second[name]) for name, value in step().items())
    accelerator.save_model(model, str(tmp_path / "model"))
    assert same(checkpoint.load(tmp_path / "model" / "model.safetensors", tied(mlp)), model)


# ---- timm


def test_ema_steps_every_matrix_once() -> None:
    model = tied(vit)
    averaged = ModelEmaV3(model, decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    averaged.update(model)
    for name, parameter in averaged.module.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.5)
    block = averaged.module.blocks[0].mlp
    assert torch.equal(block.fc2.weight, block.fc1.weight.t())


def test_optimizer_with_layer_decay() -> None:
    dense, model = vit(), tied(vit)

    def scales(of: nn.Module) -> dict[str, tuple[float, float]]:
        optimizer = create_optimizer_v2(of, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
        names = {id(parameter): name for name, parameter in of.named_parameters()}
        listed = [(names[id(p)], (group["lr_scale"], group["weight_decay"])) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(name for name, _ in listed) == sorted(names.values()), "every parameter once"
        return dict(listed)

    expected = scales(dense)
    found = scales(model)
    assert len(found) < len(expected)
    assert found == {name: expected[name.removesuffix("_kept")] for name in found}
    assert len({scale for scale, _ in found.values()}) > 2


# ---- export


every_variant = pytest.mark.parametrize("options", [{}, {"mix": "signed", "gain": 0.5}], ids=["plain", "signed"])


@every_variant
def test_export_saved_and_loaded(options: dict[str, Any]) -> None:
    model = pe_fx.transform(vit(), IMAGE, **options).eval()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (IMAGE,)), file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert loaded.state_dict.keys() == model.state_dict().keys()
    torch.testing.assert_close(loaded.module()(IMAGE), model(IMAGE))


@every_variant
def test_onnx_holds_each_matrix_once(options: dict[str, Any], tmp_path: Path) -> None:
    build = functools.partial(vit, width=128)  # the exporter's optimizer copies matrices of less than 8 KB
    model = pe_fx.transform(build(), IMAGE, **options).eval()
    path = tmp_path / "tied.onnx"
    torch.onnx.export(model, (IMAGE,), path, dynamo=True, external_data=False, verbose=False)
    initializers = onnx.load(path).graph.initializer
    held = [tuple(tensor.dims) for tensor in initializers]
    assert sum(sorted(shape) == [128, 512] for shape in held) == 2  # W of each block's mlp
    assert sum(sorted(shape) == [128, 256] for shape in held) == 2  # rows of q and k of each attention
    assert not any(sorted(shape) in ([128, 128], [128, 384]) for shape in held)
    assert sum(len(tensor.raw_data) for tensor in initializers) < 1.01 * sum(value.nbytes for value in model.state_dict().values())
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(IMAGE), atol=1e-5, rtol=1e-4)


def test_files_of_deit_small_take_little_more_than_half(tmp_path: Path) -> None:
    model = timm.create_model("deit_small_patch16_224").eval()
    dense = sum(value.nbytes for value in model.state_dict().values())  # no dense file is smaller
    tied = pe_fx.transform(model)
    checkpoint.save(tied, tmp_path / "tied.safetensors")
    torch.onnx.export(tied, (torch.randn(1, 3, 224, 224),), tmp_path / "tied.onnx", dynamo=True, external_data=False, verbose=False)
    assert (tmp_path / "tied.safetensors").stat().st_size < 0.53 * dense
    assert (tmp_path / "tied.onnx").stat().st_size < 0.53 * dense


@every_variant
def test_jit_trace_follows_the_source(options: dict[str, Any]) -> None:
    model = pe_fx.transform(mlp(), X, **options).eval()
    traced = torch.jit.trace(model, X)
    assert {name for name, _ in traced.named_parameters()} == {name for name, _ in model.named_parameters()}
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    with torch.no_grad():
        for scripted in (traced, loaded):  # the trace and the model hold the same tensor
            dict(scripted.named_parameters())["0.weight"].mul_(2)
    torch.testing.assert_close(traced(X), model(X))
    torch.testing.assert_close(loaded(X), model(X))


def test_jit_script_is_refused() -> None:
    with pytest.raises(PeFxError, match=r"torch\.jit\.script cannot follow.*torch\.jit\.trace"):
        torch.jit.script(tied(mlp))
