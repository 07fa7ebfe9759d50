"""A state_dict holds the source of every tied weight in it, whatever way a layer writes its own; else it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import pe_fx
from pe_fx import PeFxError, checkpoint

X = torch.randn(6, 8)
OUTSIDE = r"weight is tied to the weight of a Linear, which is no part of this .*pe_fx\.untie\(model\)"


def mlp(linear: type[nn.Linear] = nn.Linear, **options: Any) -> nn.Module:
    return pe_fx.transform(nn.Sequential(linear(8, 16), nn.GELU(), linear(16, 8), nn.Linear(8, 3)).eval(), X, **options)


def fx_quantized(model: nn.Module) -> nn.Module:
    mapping = get_default_qconfig_mapping().set_module_name("2", None)
    prepared = prepare_fx(model, mapping, (X,))
    prepared(X)
    converted: nn.Module = convert_fx(prepared)
    return converted


def exchanged(model: Any) -> nn.Module:
    model[0] = nn.Linear(8, 16)
    return model


TAKEN_OUT: dict[str, Callable[[Any], nn.Module]] = {
    "sliced": lambda model: model[1:],
    "exchanged": exchanged,
    "dynamic quantization": lambda model: quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8),
    "FX quantization": fx_quantized,
    "the layer alone": lambda model: model[2],
    "a copy of the layer": lambda model: copy.deepcopy(model[2]),
}


@pytest.mark.parametrize("how", TAKEN_OUT)
def test_without_its_source_it_is_neither_saved_nor_loaded(how: str, tmp_path: Path) -> None:
    model = TAKEN_OUT[how](mlp())
    with pytest.raises(PeFxError, match=OUTSIDE):
        torch.save(model.state_dict(), tmp_path / "file.pt")
    with pytest.raises(PeFxError, match=OUTSIDE):
        copy.deepcopy(model.state_dict())
    tensors = {key: value for key, value in model.state_dict().items() if not key.startswith("0.")}  # of which some are quantized
    with pytest.raises(ValueError, match=r"weight` is invalid, .*Outside"):
        safetensors.torch.save_file(tensors, tmp_path / "file.safetensors")
    state = TAKEN_OUT[how](pe_fx.untie(mlp())).state_dict()
    with pytest.raises(PeFxError, match=OUTSIDE):
        model.load_state_dict(state, strict=False)
    with pytest.raises(PeFxError):
        checkpoint.save(model, tmp_path / "file.safetensors")


def test_what_a_part_holds_can_be_listed() -> None:
    assert list(mlp()[2].state_dict()) == ["bias", "weight"]  # as tools do, to see whether there is anything


def test_another_module_that_holds_the_very_parameter_is_as_good() -> None:
    tied = mlp()
    other = nn.Linear(8, 16)
    other.weight = tied[0].weight
    tied[0] = other
    state = tied.state_dict()
    assert "2.weight" not in state
    assert tied.load_state_dict(state)
    with pytest.raises(PeFxError, match=OUTSIDE):
        tied.load_state_dict(state, assign=True)  # would exchange it there, and not here


def test_a_part_that_holds_both_is_saved() -> None:
    tied = nn.ModuleDict({"a": mlp(), "b": nn.Linear(2, 2)})
    part = tied["a"]
    assert sorted(part.state_dict()) == ["0.bias", "0.weight", "2.bias", "3.bias", "3.weight"]
    assert part.load_state_dict(part.state_dict())
    assert sorted(tied.state_dict(prefix="x.")) == sorted(f"x.{name}" for name in tied.state_dict())


class Around(nn.Module):
    """Its state_dict holds that of a model which is no submodule of it, as a trainer's may."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"], self.steps = model, 3

    def get_extra_state(self) -> Any:
        return self.__dict__["model"].state_dict()

    def set_extra_state(self, state: Any) -> None:
        self.__dict__["model"].load_state_dict(state)


def test_a_model_within_what_another_one_saves() -> None:
    around = Around(mlp())
    assert around.load_state_dict(around.state_dict())


# Layers that write and read their own entries


class OwnSave(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "bias"):
            destination[prefix + name] = getattr(self, name) if keep_vars else getattr(self, name).detach()


class OwnLoad(nn.Linear):
    """Reads an older format, too: a weight that was kept as a 1x1 kernel."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if state_dict[prefix + "weight"].dim() == 4:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"].flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class OwnBoth(OwnSave):
    """Nothing of nn.Module's is left."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str], errors: list[str]
    ) -> None:
        for name in ("weight", "bias"):
            if prefix + name not in state_dict:
                missing.append(prefix + name)
            elif name in self._parameters:
                with torch.no_grad():
                    getattr(self, name).copy_(state_dict[prefix + name])


class Attention(nn.Module):
    def __init__(self, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.qkv, self.proj = linear(8, 24), linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


@pytest.mark.parametrize("options", [{}, {"mix": "signed", "gain": True}], ids=["plain", "gain"])
@pytest.mark.parametrize(("linear", "assign"), [(OwnSave, False), (OwnSave, True), (OwnLoad, False), (OwnLoad, True), (OwnBoth, False)])
def test_layers_that_write_and_read_their_own_entries(
    linear: type[nn.Linear], options: dict[str, Any], assign: bool, tmp_path: Path
) -> None:
    for build, x in ((lambda: nn.Sequential(linear(8, 16), nn.GELU(), linear(16, 8)), X), (lambda: Attention(linear), X[:, None])):
        plan = pe_fx.plan(build(), x, **options)
        saved, fresh = pe_fx.apply(build(), plan), pe_fx.apply(build(), plan)
        with torch.no_grad():
            for parameter in saved.parameters():
                parameter.copy_(torch.randn_like(parameter))
        state = saved.state_dict()
        assert set(state) == {name for name, _ in saved.named_parameters()}
        assert not set(state) & {tie.target for tie in plan.ties}
        fresh.load_state_dict(state, assign=assign)
        torch.testing.assert_close(fresh(x), saved(x), rtol=0, atol=0)
        checkpoint.save(saved, tmp_path / "file.safetensors")
        torch.testing.assert_close(checkpoint.load(tmp_path / "file.safetensors", build())(x), saved(x), rtol=0, atol=0)
        dense = build()
        dense.load_state_dict(pe_fx.untie(saved).state_dict())
        torch.testing.assert_close(dense(x), saved(x))
        for left in (name for name in state if name.endswith(("_kept", "_gain"))):
            with pytest.raises(RuntimeError, match=f"Missing key.*{left}"):
                fresh.load_state_dict({name: value for name, value in state.items() if name != left})
        if linear is not OwnBoth:
            with pytest.raises(RuntimeError, match="Unexpected key"):
                fresh.load_state_dict({**state, f"{next(iter(state)).rpartition('.')[0]}.other": torch.ones(1)})
