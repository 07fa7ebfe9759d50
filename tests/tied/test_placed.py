"""Weights that are placed only while their module runs, and sources on another device than their tied layer."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from census import TRANSFORMERS, built
from diffusers.hooks import apply_group_offloading
from models import MODELS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pe_fx
from pe_fx import PeFxError, Plan

CPU = torch.device("cpu")
X = torch.randn(6, 8)
FAMILIES = [*MODELS, *(f"hf/{name}" for name in TRANSFORMERS)]
READ_FROM_OUTSIDE = {"beit", "eva", "torchvision_vit"}
"""Modules that read weights of their children, whose hooks then do not run: accelerate cannot offload the dense models either."""
every_family = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def _tied(name: str) -> tuple[Plan, nn.Module, Any]:
    model, inputs = built(name) if name.startswith("hf/") else (MODELS[name].build(), MODELS[name].inputs)
    plan = pe_fx.plan(model, inputs)
    return plan, pe_fx.apply(model, plan, inplace=True).eval(), inputs


def tied_model(name: str) -> tuple[Plan, nn.Module, Any]:
    plan, model, inputs = _tied(name)
    return plan, copy.deepcopy(model), inputs


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    value: Tensor = getattr(result, "logits", result)
    return value


def mlp(**options: Any) -> nn.Module:
    bias = options.pop("bias", True)
    return pe_fx.transform(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=bias)), X, **options)


@every_family
def test_every_name_is_a_parameter(name: str) -> None:
    _, tied, _ = tied_model(name)
    for full, parameter in tied.named_parameters():
        owner, _, attribute = full.rpartition(".")
        assert getattr(tied.get_submodule(owner), attribute) is tied.get_parameter(full) is parameter


@every_family
def test_offloaded_by_accelerate(name: str, tmp_path: Path) -> None:
    _, tied, inputs = tied_model(name)
    if name in READ_FROM_OUTSIDE:
        tied = pe_fx.untie(tied)
        with pytest.raises((AssertionError, RuntimeError)):
            torch.testing.assert_close(outputs(accelerate.cpu_offload(copy.deepcopy(tied), CPU), inputs), outputs(tied, inputs))
        return
    expected = outputs(tied, inputs)
    on_cpu = accelerate.cpu_offload(copy.deepcopy(tied), execution_device=CPU)
    assert {parameter.device.type for parameter in on_cpu.parameters()} == {"meta"}
    torch.testing.assert_close(outputs(on_cpu, inputs), expected, rtol=1e-6, atol=1e-6)
    on_disk = accelerate.disk_offload(tied, tmp_path / "offloaded", execution_device=CPU)
    for _ in range(2):
        torch.testing.assert_close(outputs(on_disk, inputs), expected, rtol=1e-6, atol=1e-6)


@every_family
def test_built_without_memory_then_loaded(name: str, tmp_path: Path) -> None:
    plan, tied, inputs = tied_model(name)
    expected = outputs(tied, inputs)
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({key: value.clone().contiguous() for key, value in tied.state_dict().items()}, file, {"format": "pt"})
    with accelerate.init_empty_weights():
        empty = pe_fx.apply(built(name)[0] if name.startswith("hf/") else MODELS[name].build(), plan, inplace=True).eval()
    for key, buffer in tied.named_buffers():  # those that no file holds, such as rotary tables
        if key not in tied.state_dict():
            set_module_tensor_to_device(empty, key, CPU, value=buffer)
    assert all(parameter.is_meta for parameter in empty.parameters())
    plain = copy.deepcopy(empty)
    plain.load_state_dict(tied.state_dict(), assign=True)
    torch.testing.assert_close(outputs(plain, inputs), expected, rtol=1e-6, atol=1e-6)
    getattr(empty, "tie_weights", lambda: None)()
    names = dict.fromkeys(key.partition(".")[0] for key in empty.state_dict())
    split = {key: "disk" if i % 2 and key in empty._modules else "cpu" for i, key in enumerate(names)}
    for device_map in ({"": "cpu"},) if name in READ_FROM_OUTSIDE else ({"": "cpu"}, split):
        loaded = accelerate.load_checkpoint_and_dispatch(
            copy.deepcopy(empty), str(file), device_map=device_map, offload_folder=tmp_path / "offloaded"
        )
        torch.testing.assert_close(outputs(loaded, inputs), expected, rtol=1e-6, atol=1e-6)


def test_set_module_tensor_to_device_on_what_is_left_of_a_weight() -> None:
    _, tied, inputs = tied_model("vit")
    expected = outputs(tied, inputs)
    qkv = tied.get_submodule("blocks.0.attn.qkv")
    value, shape = qkv.weight_kept.detach().clone(), qkv.weight.shape
    set_module_tensor_to_device(qkv, "weight_kept", "meta")
    assert qkv.weight.is_meta
    assert qkv.weight.shape == shape
    set_module_tensor_to_device(qkv, "weight_kept", "cpu", value=value)
    assert torch.equal(outputs(tied, inputs), expected)
    with pytest.raises(ValueError, match="does not have a parameter"):
        set_module_tensor_to_device(tied.get_submodule("blocks.0.mlp.fc2"), "weight", "cpu", value=torch.ones(32, 128))


def test_gradients_through_an_offloaded_source() -> None:
    """They are lost, as those of any parameter that is offloaded; those of the layer's own are right."""
    tied = mlp()
    offloaded = accelerate.cpu_offload(copy.deepcopy(tied), execution_device=CPU)
    x = X.clone().requires_grad_()
    y = X.clone().requires_grad_()
    offloaded(x).square().sum().backward()
    tied(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_the_sources_hook_places_it(bias: bool) -> None:
    tied = mlp(bias=bias)
    expected = outputs(tied, X)
    offloaded = accelerate.cpu_offload(tied, execution_device=CPU)
    torch.testing.assert_close(outputs(offloaded, X), expected)
    assert offloaded[0].weight.is_meta  # as it was found
    remove_hook_from_submodules(offloaded)


GROUPS: dict[str, dict[str, Any]] = {
    "leaf": {"offload_type": "leaf_level"},
    "leaf, on disk": {"offload_type": "leaf_level", "on_disk": True},
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "block, on disk": {"offload_type": "block_level", "num_blocks_per_group": 1, "on_disk": True},
}


@pytest.mark.parametrize("how", GROUPS)
@pytest.mark.parametrize("share", [(), ("mlp",)], ids=["each", "shared"])
def test_offloaded_in_groups_by_diffusers(how: str, share: tuple[str, ...], tmp_path: Path) -> None:
    block = lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))  # noqa: E731
    tied = pe_fx.transform(nn.Sequential(block(), block(), block()), X, share=share)
    expected = outputs(tied, X)
    options = dict(GROUPS[how])
    folder = {"offload_to_disk_path": str(tmp_path)} if options.pop("on_disk", False) else {}
    apply_group_offloading(tied, onload_device=CPU, offload_device=CPU, **options, **folder)
    for _ in range(2):
        torch.testing.assert_close(outputs(tied, X), expected)


def test_a_source_without_values_is_refused() -> None:
    tied = mlp()
    set_module_tensor_to_device(tied, "0.weight", "meta")
    with pytest.raises(PeFxError, match=r"weight ← 0\.weightᵀ: its source, a Linear, is on the meta device.*untie"):
        tied[2].weight.sum()


def test_a_source_on_another_device_is_moved() -> None:
    tied = mlp()
    with FakeTensorMode() as fake:
        for layer, device in ((tied[0], "cuda:0"), (tied[2], "cuda:1")):
            for name, parameter in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(fake.from_tensor(parameter).to(device)))
        assert tied[2].weight.device == torch.device("cuda:1")
        assert tied[2](torch.ones(2, 16, device="cuda:1")).device == torch.device("cuda:1")


def test_a_model_on_the_meta_device_as_a_whole() -> None:
    tied = mlp().to("meta")
    assert tied(X.to("meta")).shape == (6, 8)
