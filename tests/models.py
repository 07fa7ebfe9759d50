"""The table of models: tiny variants of real architectures, their inputs, and what the plan must find in them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import transformers
from oracle import Inputs
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.mlp_mixer import MlpMixer
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import Bottleneck
from torch import nn

import pe_fx
from pe_fx import Plan


@dataclass(frozen=True)
class Model:
    """`build` draws new random weights each time. `sites` and `saved` are worked out by hand from the architecture."""

    build: Callable[[], nn.Module]
    inputs: Inputs
    sites: dict[str, int]
    saved: int


@dataclass(frozen=True)
class Prepared:
    """A dense model, its plan and the tied model, for tests that may change them: every one gets its own copy."""

    dense: nn.Module
    plan: Plan
    tied: nn.Module
    inputs: Inputs


def prepared(name: str) -> Prepared:
    dense, plan, tied = _planned(name)
    return Prepared(copy.deepcopy(dense), plan, copy.deepcopy(tied), MODELS[name].inputs)


@functools.cache
def _planned(name: str) -> tuple[nn.Module, Plan, nn.Module]:
    model = MODELS[name]
    dense = model.build()
    plan = pe_fx.plan(dense, model.inputs)
    return dense, plan, pe_fx.apply(dense, plan)


def _timm(name: str, size: int, sites: dict[str, int], saved: int, **options: Any) -> Model:
    return _image(lambda: timm.create_model(name, pretrained=False, num_classes=7, **options), size, sites, saved)


def _drawn(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Values for every parameter: many models begin with a head, a norm or a layer scale of zeros, and so hide what is behind it."""

    def drawn() -> nn.Module:
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(noise if parameter.dim() < 2 else parameter + noise / parameter[0].numel() ** 0.5)
        return model

    return drawn


def _image(build: Callable[[], nn.Module], size: int, sites: dict[str, int], saved: int) -> Model:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), device="cpu")  # whatever was drawn before
    images = images.to(torch.get_default_device())
    return Model(_drawn(build), images, sites, saved)


def _text(build: Callable[[], nn.Module], sites: dict[str, int], saved: int) -> Model:
    return Model(_drawn(build), {"input_ids": torch.arange(24).reshape(2, 12)}, sites, saved)


def _regnet() -> nn.Module:
    return RegNet(RegNetCfg(w0=8, wa=8.0, wm=2.0, depth=8, group_size=8, se_ratio=0.25), num_classes=7)


def _efficientnet() -> nn.Module:
    blocks = [["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r3_k3_s2_e6_c8_se0.25"], ["ir_r2_k5_s2_e6_c16_se0.25"]]
    return EfficientNet(decode_arch_def(blocks), num_classes=7, num_features=32, stem_size=8, act_layer=nn.SiLU)


def _mobilenetv3() -> nn.Module:
    blocks = decode_arch_def(
        [["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r3_k3_s2_e4_c8_nre"], ["ir_r2_k5_s1_e4_c16_se0.25"], ["cn_r1_k1_s1_c32"]]
    )
    return MobileNetV3(blocks, num_classes=7, num_features=32, stem_size=8, act_layer=nn.Hardswish)


def _mixer() -> nn.Module:
    return MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=32, num_classes=7)


_TEXT = {"vocab_size": 50, "tie_word_embeddings": False}
_ENCODER = _TEXT | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}


def gpt2(**options: Any) -> nn.Module:
    config = _TEXT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | options))


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_ENCODER))


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, use_cache=False, **_ENCODER))


def _torchvision_vit() -> nn.Module:
    size = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    return torchvision.models.VisionTransformer(num_classes=7, **size)


_VIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}
_BLOCKS = {"attention": 2, "mlp": 2}
_V_AND_PROJ = 2 * 32 * 32

MODELS: dict[str, Model] = {
    "vit": _timm("vit_tiny_patch16_224", 32, _BLOCKS, 2 * (_V_AND_PROJ + 32 * 128), **_VIT),
    "deit": _timm("deit_tiny_distilled_patch16_224", 32, _BLOCKS, 2 * (_V_AND_PROJ + 32 * 128), **_VIT),
    "beit": _timm("beit_base_patch16_224", 32, _BLOCKS, 2 * (_V_AND_PROJ + 32 * 128), **_VIT),
    "eva": _timm("eva02_tiny_patch14_224", 28, {"attention": 2, "glu": 2}, 2 * (_V_AND_PROJ + 32 * 85), **_VIT | {"img_size": 28}),
    "swin": _timm(
        "swin_tiny_patch4_window7_224",
        32,
        {"attention": 3, "mlp": 3},
        (2 * 16 * 16 + 16 * 64) + 2 * (_V_AND_PROJ + 32 * 128),
        img_size=32,
        embed_dim=16,
        depths=(1, 2),
        num_heads=(2, 4),
        window_size=4,
    ),
    # every first block is an entry, whose last weight is the W of those that follow
    "resnet": _timm("resnet50", 64, {"bottleneck": 3}, 2 * (4 * 16 + 8 * 32 + 16 * 64), layers=(2, 2, 2, 1), channels=(4, 8, 16, 32)),
    "resnext": _timm(
        "resnext50_32x4d",
        64,
        {"bottleneck": 2},
        2 * (4 * 16 + 8 * 32),
        layers=(2, 2, 1, 1),
        channels=(4, 8, 16, 32),
        cardinality=2,
        base_width=32,
    ),
    "regnet": _image(
        _regnet,
        64,
        {"squeeze_excite": 8, "bottleneck": 4},
        (8 * 8 + 16 * 2 + 32 * 4 + 2 * 32 * 8 + 64 * 8 + 2 * 64 * 16) + 4 * 32 * 32 + 4 * 64 * 64,
    ),
    "convnext": _timm("convnext_atto", 32, {"mlp": 4}, 2 * 8 * 32 + 2 * 16 * 64, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    # gates; the two residual blocks of 8 channels share one W; the second of 16
    "efficientnet": _image(
        _efficientnet,
        32,
        {"squeeze_excite": 6, "bottleneck": 3},
        (8 * 2 + 96 * 4 + 3 * 48 * 2 + 96 * 4) + 3 * 8 * 48 + 16 * 96,
    ),
    "mobilenetv3": _image(_mobilenetv3, 32, {"squeeze_excite": 3, "bottleneck": 3}, (8 * 2 + 32 * 8 + 64 * 16) + 3 * 8 * 32 + 16 * 64),
    # 16 tokens, mixed by 16 hidden units
    "mixer": _image(_mixer, 32, {"mlp": 4}, 2 * (16 * 16 + 32 * 128)),
    "gpt2": _text(gpt2, _BLOCKS, 2 * (_V_AND_PROJ + 32 * 128)),
    "bert": _text(_bert, _BLOCKS, 2 * (_V_AND_PROJ + 32 * 64)),
    # grouped queries: v is not square
    "llama": _text(_llama, {"attention": 2, "glu": 2}, 2 * (32 * 32 + 32 * 64)),
    "torchvision_vit": _image(_torchvision_vit, 32, _BLOCKS, 2 * (_V_AND_PROJ + 32 * 64)),
}

TINY = {
    "vit": _timm("vit_tiny_patch16_224", 32, {"attention": 1, "mlp": 1}, _V_AND_PROJ + 32 * 128, **_VIT | {"depth": 1}),
    "resnet": _image(lambda: nn.Sequential(nn.Conv2d(3, 32, 4, 4), Bottleneck(32, 8), Bottleneck(32, 8)), 32, {"bottleneck": 2}, 3 * 256),
}
"""Smaller still, for what takes long."""
