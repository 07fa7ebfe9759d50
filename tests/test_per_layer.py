"""Tools that go through a model layer by layer: they exchange layers, rewrite weights, or credit each layer with its own gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import pe_fx
from pe_fx import PeFxError
from pe_fx.tied.weight import Tied

DRAWN = torch.Generator().manual_seed(0)  # other modules draw theirs while they are imported
X = torch.randn(6, 32, generator=DRAWN)
IMAGE = torch.randn(3, 3, 32, 32, generator=DRAWN)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=32)


INPUTS: dict[Callable[[], nn.Module], Tensor] = {mlp: X, vit: IMAGE}
FREE = {mlp: ["4"], vit: ["head"]}
each_model = pytest.mark.parametrize("build", [mlp, vit])


@functools.cache
def _tied(build: Callable[[], nn.Module]) -> nn.Module:
    return pe_fx.transform(build(), INPUTS[build]).eval()


def tied(build: Callable[[], nn.Module] = mlp) -> Any:
    return copy.deepcopy(_tied(build))


# ---- layers are exchanged


@each_model
def test_outside_ties_are_the_layers_that_can_be_exchanged(build: Callable[[], nn.Module]) -> None:
    model = tied(build)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert [name for name, module in linear.items() if pe_fx.outside_ties(module, name)] == FREE[build]
    assert all(map(pe_fx.outside_ties, pe_fx.untie(model).modules()))
    assert not pe_fx.outside_ties(model), "nor is what holds a tie"


def test_outside_ties_follows_copies_and_shared_parameters() -> None:
    model = copy.deepcopy(tied())
    alias = nn.Linear(32, 64)
    alias.weight = model[0].weight
    assert not pe_fx.outside_ties(alias)
    assert not pe_fx.outside_ties(model[0])
    alone = copy.deepcopy(model[0])
    assert pe_fx.outside_ties(alone)
    del model
    assert pe_fx.outside_ties(nn.Linear(32, 64))


def float8(model: nn.Module, free: Callable[[nn.Module, str], bool]) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(model, module_filter_fn=free, config=Float8LinearConfig(emulate=True))


def int8(model: nn.Module, free: Callable[[nn.Module, str], bool]) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=free)
    return model


def qat(step: str, model: nn.Module, free: Callable[[nn.Module, str], bool]) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model, QATConfig(IntxWeightOnlyConfig(), step="prepare"), filter_fn=free)
    if step == "convert":
        quantize_(model, QATConfig(IntxWeightOnlyConfig(), step="convert"), filter_fn=free)
    return model


@each_model
@pytest.mark.parametrize(
    "convert",
    [float8, int8, functools.partial(qat, "prepare"), functools.partial(qat, "convert")],
    ids=["float8", "int8", "qat", "qat_int8"],
)
def test_torchao_converts_what_is_outside_ties(convert: Any, build: Callable[[], nn.Module]) -> None:
    pytest.importorskip("torchao")

    def free(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and pe_fx.outside_ties(module, name)

    model, twin = tied(build), pe_fx.untie(tied(build))
    before = {name: (module, type(getattr(module, "weight", None))) for name, module in model.named_modules()}
    converted = convert(model, free)
    after = {name: (module, type(getattr(module, "weight", None))) for name, module in converted.named_modules()}
    changed = [name for name in before if after.get(name) != before[name]]
    assert changed == FREE[build]
    expected = convert(twin, lambda module, name: name in FREE[build])
    torch.testing.assert_close(converted(INPUTS[build]), expected(INPUTS[build]))


def test_int8_of_the_dense_twin() -> None:
    pytest.importorskip("torchao")
    model = tied()
    dense = int8(pe_fx.untie(model), lambda module, name: isinstance(module, nn.Linear))
    assert "Int8Tensor" in type(dense[2].weight.data).__name__
    torch.testing.assert_close(dense(X), model(X), atol=0.03, rtol=0.03)


def test_int8_of_a_tied_matrix_is_refused() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(PeFxError, match=r"weight ← 0\.weightᵀ: the source cannot be viewed any more .*Quantize pe_fx\.untie"):
        int8(tied(), lambda module, name: isinstance(module, nn.Linear))


def test_layers_of_the_class_of_a_tied_one_are_ordinary() -> None:
    """As tools make them: `type(layer)(...)`."""
    made = type(tied()[2])(3, 4, bias=False)
    assert type(made) is nn.Linear
    assert made.weight.shape == (4, 3)
    block = pe_fx.transform(timm.create_model("resnet26"), entry="expand", rules=["bottleneck"]).layer2[0]
    made = type(block)(16, 4)
    assert type(made) is timm.models.resnet.Bottleneck
    assert made(torch.ones(1, 16, 4, 4)).shape == (1, 16, 4, 4)


# ---- weights become values


def conv() -> nn.Module:
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.conv3 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 1)
            self.norm1, self.norm3 = nn.BatchNorm2d(4), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm3(self.conv3(self.conv2(self.norm1(self.conv1(x)).relu()).relu())) + x

    return pe_fx.transform(Bottleneck(), torch.randn(2, 8, 4, 4)).eval()


PRUNED = r"is computed from weight_orig and weight_mask, as under pruning"
OF_A_SOURCE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "l1": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), PRUNED),
    "structured": (lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, 0), PRUNED),
    "global": (lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.5), PRUNED),
    "weight_norm": (nn.utils.weight_norm, "is computed from weight_g and weight_v, as under"),
    "spectral_norm": (nn.utils.spectral_norm, "is computed from weight_orig and weight_u and weight_v, as under"),
    "parametrized": (lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()), "is parametrized: remove that"),
    "parametrized_norm": (parametrizations.weight_norm, "is parametrized: remove that"),
    "orthogonal": (parametrizations.orthogonal, "is parametrized: remove that"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("change", "text"), OF_A_SOURCE.values(), ids=OF_A_SOURCE)
def test_a_source_that_is_no_parameter_any_more(change: Callable[[nn.Module], Any], text: str) -> None:
    model = tied()
    change(model[0])
    with pytest.raises(
        PeFxError, match=rf"weight ← 0\.weightᵀ: the weight of its source, .*Linear, is no parameter.* {text}.*pe_fx\.untie"
    ):
        model(X)
    dense = pe_fx.untie(tied())
    change(dense[0])
    assert dense(X).shape == X.shape


def test_a_pruned_source_is_read_again_once_pruning_is_made_permanent() -> None:
    model = tied()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.remove(model[0], "weight")
    assert torch.equal(model[2].weight, model[0].weight.t())
    assert (model[2].weight == 0).sum() == 32 * 32


def test_fsdp1_with_flat_parameters_names_what_to_do() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrap = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
        torch.testing.assert_close(wrap(tied(), use_orig_params=True)(X), tied()(X))
        with pytest.raises(PeFxError, match=r"was taken out of it\. FSDP1 does that unless use_orig_params=True.*fully_shard"):
            wrap(tied(), use_orig_params=False)(X)
    finally:
        dist.destroy_process_group()


def test_a_source_whose_weight_another_layer_has_taken_names_what_to_do() -> None:
    """As layers for quantized weights are made."""
    model = tied()
    taken = nn.Linear(32, 64)
    taken.weight = model[0].weight
    del model[0].weight
    model[0] = taken
    with pytest.raises(PeFxError, match=r"was taken out of it.*pe_fx\.untie.*pe_fx\.outside_ties"):
        model(X)


@pytest.mark.parametrize(("build", "layer"), [(mlp, "2"), (vit, "blocks.0.attn.qkv"), (vit, "blocks.1.mlp.fc2")])
@pytest.mark.parametrize("change", [prune.identity, functools.partial(prune.l1_unstructured, amount=0.5)], ids=["identity", "l1"])
def test_pruning_a_tied_weight_is_refused(change: Callable[..., Any], build: Callable[[], nn.Module], layer: str) -> None:
    model = tied(build)
    before = set(dir(model.get_submodule(layer)))
    with pytest.raises(PeFxError, match=r"weight is tied: it cannot be registered as weight_orig.*pe_fx\.untie"):
        change(model.get_submodule(layer), "weight")
    assert set(dir(model.get_submodule(layer))) == before
    assert isinstance(model.get_submodule(layer), Tied)


def test_folding_a_norm_into_a_tied_weight_is_refused() -> None:
    model = conv()
    with pytest.raises(PeFxError, match=r"weight ← conv1\.weightᵀ is tied, and can be neither set nor deleted.*pe_fx\.untie"):
        fuse_conv_bn_eval(model.conv3, model.norm3)
    with pytest.raises(PeFxError, match=r"weight ← 0\.weightᵀ is tied, and can be neither set nor deleted.*pe_fx\.untie"):
        fuse_linear_bn_eval(tied()[2], nn.BatchNorm1d(32).eval())
    dense = pe_fx.untie(model)
    x = torch.randn(2, 8, 4, 4)
    expected = dense(x)
    dense.conv3, dense.norm3 = fuse_conv_bn_eval(dense.conv3, dense.norm3), nn.Identity()
    torch.testing.assert_close(dense(x), expected)


# ---- gradients by layer


@each_model
def test_gradients_of_each_sample(build: Callable[[], nn.Module]) -> None:
    """Of W, with both of its uses; hooks on layers (Opacus, BackPACK) see its first use alone."""
    model, x = tied(build), INPUTS[build]
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample[None],)).square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        model.zero_grad()
        model(x[i : i + 1]).square().mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, atol=1e-6, rtol=1e-4)


@each_model
def test_hooks_on_a_parameter_see_the_gradient_of_all_uses_once(build: Callable[[], nn.Module]) -> None:
    model, seen = tied(build), {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: seen.setdefault(name, []).append(parameter.grad.clone()))
        parameter.register_hook(lambda gradient, name=name: seen.setdefault(name, []).append(gradient.clone()))
    model(INPUTS[build]).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert len(seen[name]) == 2
        for gradient in seen[name]:
            torch.testing.assert_close(gradient, parameter.grad)
