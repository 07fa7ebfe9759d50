"""PEFT: an adapter on a tied model is the one on its dense twin, or an error that leaves the model as it was."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import peft
import pytest
import timm
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

import pe_fx
import pe_fx.peft
from pe_fx import PeFxError
from pe_fx.tied.weight import Tied

DRAWN = torch.Generator().manual_seed(0)  # other modules draw theirs while they are imported
X = torch.randn(6, 16, generator=DRAWN)
IMAGE = torch.randn(2, 3, 32, 32, generator=DRAWN)
SEQUENCE = torch.randn(2, 5, 16, generator=DRAWN)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


SOURCE, TARGET = "layers.0.fc1", "layers.0.fc2"


@functools.cache
def _tied() -> nn.Module:
    torch.manual_seed(0)
    return pe_fx.transform(Net(), X)


def tied() -> nn.Module:
    return copy.deepcopy(_tied())


@functools.cache
def vit() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=7)
    return pe_fx.transform(model, IMAGE).eval()


def adapt(model: nn.Module, config: peft.PeftConfig, **options: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, copy.deepcopy(config), **options)


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients once every trained parameter was moved, as by training."""
    generator = torch.Generator().manual_seed(2)
    trained = {name: parameter for name, parameter in sorted(model.named_parameters()) if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    torch.manual_seed(3)
    output = model(x)
    output.square().mean().backward()
    return {"output": output.detach()} | {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}


def assert_same_adapter(model: nn.Module, x: Tensor, config: peft.PeftConfig, **options: Any) -> Any:
    """As the same adapter does on the dense twin, from the start and after training."""
    adapted, twin = (adapt(each, config, **options) for each in (copy.deepcopy(model), pe_fx.untie(model)))
    torch.manual_seed(3)
    start = adapted(x)
    torch.manual_seed(3)
    torch.testing.assert_close(start, twin(x))
    torch.testing.assert_close(run(adapted, x), run(twin, x))
    return adapted


def assert_refused(model: nn.Module, config: peft.PeftConfig, text: str = "") -> None:
    """... and the model is as it was."""
    modules = dict(model.named_modules())
    weights = {name: (parameter, parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    with pytest.raises(PeFxError, match=rf"(?s){text}.*pe_fx\.untie"):
        adapt(model, config)
    assert dict(model.named_modules()) == modules
    assert [name for name, _ in model.named_parameters()] == list(weights)
    for name, parameter in model.named_parameters():
        before, value, trained = weights[name]
        assert parameter is before
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == trained


# ---- every kind of adapter that PEFT has

OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 16},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "LILY": {"r": 2, "stride_A": 1, "num_B": 2},
    "MISS": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 4},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "UNILORA": {"r": 2, "theta_d_length": 16},
    "VBLORA": {"r": 2, "vector_length": 4, "num_vectors": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 16},
}
OTHER_MODELS = {"ADAPTION_PROMPT", "POLY", "SHADOW", "TRAINABLE_TOKENS", "XLORA"}
"""What adapts embeddings or transformers alone, or takes other inputs."""

KINDS = [kind.value for kind, cls in PEFT_TYPE_TO_TUNER_MAPPING.items() if issubclass(cls, BaseTuner) and kind.value not in OTHER_MODELS]


def config_of(kind: str, targets: list[str]) -> peft.PeftConfig:
    options = OPTIONS.get(kind, {}) | {"target_modules": targets}
    if kind == "IA3":
        options["feedforward_modules"] = [target for target in targets if target == TARGET]
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**options)


@pytest.mark.parametrize("targets", [[SOURCE], [TARGET], [SOURCE, TARGET]], ids=["source", "target", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(kind: str, targets: list[str]) -> None:
    config = config_of(kind, targets)
    base = tied()
    if kind == "LN_TUNING":
        return assert_refused(base, config, "would train a copy of layers.0")
    if kind == "GLORA" and TARGET in targets:
        adapt(pe_fx.untie(base), config)
        with pytest.raises(ValueError, match="TiedLinear"):  # PEFT asks for the very class
            adapt(base, config)
        return None
    model = assert_same_adapter(base, X, config)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(PeFxError, match=rf"the adapter of {targets[0]} cannot be merged.*pe_fx\.untie"):
            merge()
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    with pytest.raises(PeFxError, match=r"cannot be merged.*pe_fx\.untie"):
        layer.merge()
    unloaded = model.unload()
    assert isinstance(unloaded.get_submodule(TARGET), Tied)
    assert torch.equal(unloaded.get_submodule(TARGET).weight, unloaded.get_submodule(SOURCE).weight.t())
    torch.testing.assert_close(unloaded(X), base(X))
    return None


def test_no_kind_is_forgotten() -> None:
    assert len(KINDS) > 15
    assert {"LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "LN_TUNING"} <= set(KINDS)


def test_mixed_kinds() -> None:
    outputs = []
    for base in (pe_fx.untie(tied()), tied()):
        torch.manual_seed(1)
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["fc1", "fc2"], init_lora_weights=False), mixed=True)
        model.add_adapter("other", peft.LoHaConfig(target_modules=["fc2"], init_weights=False))
        model.set_adapter(["default", "other"])
        outputs.append(model.eval()(X))
    torch.testing.assert_close(*outputs)
    with pytest.raises(PeFxError, match="cannot be merged"):
        model.merge_and_unload()
    torch.testing.assert_close(model.unload()(X), tied()(X))


# ---- how a LoRA starts

Lora = functools.partial(peft.LoraConfig, r=4)
WRITES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": getattr(peft.tuners.lora.config, "KasaConfig", lambda: None)()},
}


@pytest.mark.parametrize("module", [SOURCE, TARGET], ids=["source", "target"])
@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in WRITES.items() if None not in options.values()])
def test_a_start_that_rewrites_a_weight_in_a_tie_is_refused(options: dict[str, Any], module: str) -> None:
    assert_refused(tied(), Lora(target_modules=[module], **options), "this adapter would rewrite the weight")


@pytest.mark.parametrize("module", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_start_that_rewrites_rows_is_refused(module: str) -> None:
    config = Lora(target_modules=[f"blocks.1.{module}"], init_lora_weights="pissa")
    assert_refused(copy.deepcopy(vit()), config, "this adapter would rewrite the weight")


def test_a_start_that_rewrites_another_weight() -> None:
    assert_same_adapter(tied(), X, Lora(target_modules=["head"], init_lora_weights="pissa"))


def test_a_start_that_rewrites_a_signed_weight_is_refused() -> None:
    model = pe_fx.transform(Net(), X, mix="signed", gain=0.5)  # its value is put together anew with each read
    assert_refused(model, Lora(target_modules=[TARGET], init_lora_weights="olora"), "this adapter would rewrite the weight")


def test_what_peft_refuses_leaves_the_model_as_it_was() -> None:
    model = tied()
    with pytest.raises(ValueError, match="not found"):
        adapt(model, Lora(target_modules=["nowhere"]))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_a_start_that_writes_to_no_base(start: Any) -> None:
    assert_same_adapter(tied(), X, Lora(target_modules=["fc1", "fc2"], init_lora_weights=start))


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_lora(options: dict[str, Any]) -> None:
    config = functools.partial(Lora, init_lora_weights=False, **options)
    assert_same_adapter(tied(), X, config(target_modules=["fc1", "fc2"]))
    assert_same_adapter(vit(), IMAGE, config(target_modules=["qkv", "proj", "fc1", "fc2"]))


def test_convolutions() -> None:
    """PEFT makes a convolution of the adapted layer's own class."""
    model = pe_fx.transform(timm.create_model("resnet26", num_classes=7), torch.randn(1, 3, 64, 64)).eval()
    for config in (peft.LoraConfig, peft.LoHaConfig):
        assert_same_adapter(model, torch.randn(2, 3, 64, 64), config(r=2, target_modules=["conv1", "conv3"]))


def test_another_adapter_saved_and_loaded(tmp_path: Any) -> None:
    model = adapt(tied(), Lora(target_modules=["fc1", "fc2"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    for base in (tied(), pe_fx.untie(tied())):
        for low in (False, True):
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low).eval()
            loaded.load_adapter(tmp_path, "second")
            loaded.set_adapter("second")
            torch.testing.assert_close(loaded(X), model(X))
            with loaded.disable_adapter():
                torch.testing.assert_close(loaded(X), tied()(X))


# ---- what is named by parameters, copied, repeated


def test_target_parameters() -> None:
    config = functools.partial(Lora, target_modules=[], init_lora_weights=False)
    assert_same_adapter(tied(), X, config(target_parameters=[f"{SOURCE}.weight"]))
    for named in (["fc2.weight"], ["fc1.weight", "fc2.weight"]):
        assert_refused(tied(), config(target_parameters=named), r"layers.0.fc2.weight ← layers.0.fc1.weightᵀ is no parameter")
    assert_refused(copy.deepcopy(vit()), config(target_parameters=["attn.qkv.weight"]), "qkv.weight ← .* is no parameter")


@pytest.mark.parametrize("saved", [SOURCE, TARGET], ids=["source", "target"])
def test_a_copy_of_one_side_of_a_tie_is_refused(saved: str) -> None:
    config = Lora(target_modules=["head"], modules_to_save=[saved])
    assert_refused(tied(), config, f"would train a copy of {saved}")
    assert adapt(pe_fx.untie(tied()), config)(X).shape == X.shape


def test_a_copy_of_both_sides_of_a_tie_is_tied() -> None:
    model = adapt(tied(), Lora(target_modules=["head"], modules_to_save=["layers.0"]))
    run(model, X)
    copied = model.base_model.model.layers[0].modules_to_save["default"]
    assert torch.equal(copied.fc2.weight, copied.fc1.weight.t())
    assert not torch.equal(copied.fc1.weight, tied().layers[0].fc1.weight)


def test_layer_norms_are_tuned_beside_ties() -> None:
    assert_same_adapter(vit(), IMAGE, peft.LNTuningConfig(target_modules=["norm1", "norm2"]))


def test_layers_that_are_repeated() -> None:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"num_hidden_layers": 2}

    config = Lora(target_modules=["fc1", "fc2"], layer_replication=[[0, 2], [0, 2]], init_lora_weights=False)
    with warnings.catch_warnings(action="ignore"):
        model = assert_same_adapter(pe_fx.transform(Named(), X), X, config)
    layers = model.base_model.model.layers
    assert len(layers) == 4
    assert layers[2].fc1.get_base_layer().weight is layers[0].fc1.get_base_layer().weight
    assert torch.equal(layers[2].fc2.get_base_layer().weight, layers[0].fc2.get_base_layer().weight)


def test_an_attention_that_merges_in_its_forward_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    model = pe_fx.transform(Attention(), SEQUENCE)
    assert_refused(model, Lora(target_modules=["attn"]), "neither set nor deleted")


# ---- merging


@pytest.mark.parametrize("safe", [False, True])
def test_lora_of_a_tied_model_is_merged_into_its_dense_twin(safe: bool) -> None:
    model = adapt(tied(), Lora(target_modules=["fc1", "fc2", "head"], init_lora_weights=False))
    expected = model(X)
    merged = pe_fx.untie(model).merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(X), expected)
    assert not any(isinstance(module, Tied) for module in merged.modules())


def test_merging_into_another_matrix_of_a_tied_model() -> None:
    model = adapt(tied(), Lora(target_modules=["head"], init_lora_weights=False))
    expected = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_merging_into_a_matrix_that_shares_its_parameter_with_a_source_is_refused() -> None:
    model = tied()
    model.head = nn.Linear(16, 32)
    model.head.weight = model.layers[0].fc1.weight
    adapted = adapt(model, Lora(target_modules=["head"], init_lora_weights=False))
    with pytest.raises(PeFxError, match="the adapter of head cannot be merged"):
        adapted.merge_and_unload()


def test_lora_trains_beside_a_frozen_tied_matrix() -> None:
    model = adapt(tied(), Lora(target_modules=["fc1", "fc2"]))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    history = []
    for _ in range(20):
        loss = (model(X) - 1).square().mean()
        history.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert history[-1] < 0.7 * history[0]
    state = tied().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.unload().state_dict().items())
