"""The table of models: tiny variants of real architectures, each with its inputs and what the plan must find in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import transformers
from oracle import Inputs
from torch import nn


@dataclass(frozen=True)
class Model:
    """`sites`: how many of which kind the plan holds. `build` draws new random weights each time."""

    build: Callable[[], nn.Module]
    inputs: Inputs
    sites: dict[str, int]


def _timm(name: str, size: int, sites: dict[str, int], **options: Any) -> Model:
    return Model(lambda: timm.create_model(name, pretrained=False, num_classes=7, **options), torch.randn(2, 3, size, size), sites)


def _text(build: Callable[[], nn.Module], sites: dict[str, int]) -> Model:
    return Model(build, {"input_ids": torch.arange(24).reshape(2, 12) % 50}, sites)


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=50, use_cache=False))


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50, max_position_embeddings=16
        )
    )


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            vocab_size=50,
            max_position_embeddings=16,
            use_cache=False,
        )
    )


def _torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=7
    )


def _regnet() -> nn.Module:
    config = timm.models.regnet.RegNetCfg(w0=8, wa=8.0, wm=2.0, depth=5, group_size=8, se_ratio=0.25)
    return timm.models.regnet.RegNet(config, num_classes=7)


def _efficientnet() -> nn.Module:
    blocks = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e6_c8_se0.25"], ["ir_r2_k5_s2_e6_c16_se0.25"]]
    decoded = timm.models._efficientnet_builder.decode_arch_def(blocks)
    return timm.models.efficientnet.EfficientNet(decoded, num_classes=7, num_features=32, stem_size=8, act_layer=nn.SiLU)


def _mobilenetv3() -> nn.Module:
    blocks = [["ds_r1_k3_s2_e1_c8_se0.25_nre"], ["ir_r2_k3_s2_e4_c8_nre"], ["ir_r2_k5_s1_e4_c16_se0.25"], ["cn_r1_k1_s1_c32"]]
    decoded = timm.models._efficientnet_builder.decode_arch_def(blocks)
    return timm.models.mobilenetv3.MobileNetV3(decoded, num_classes=7, num_features=32, stem_size=8, act_layer=nn.Hardswish)


def _mixer() -> nn.Module:
    return timm.models.mlp_mixer.MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=32, num_classes=7)


MODELS: dict[str, Model] = {
    "vit": _timm("vit_tiny_patch16_224", 32, {}, img_size=32, embed_dim=32, depth=2, num_heads=4),
    "deit": _timm("deit_tiny_distilled_patch16_224", 32, {}, img_size=32, embed_dim=32, depth=2, num_heads=4),
    "beit": _timm("beit_base_patch16_224", 32, {}, img_size=32, embed_dim=32, depth=2, num_heads=4),
    "eva": _timm("eva02_tiny_patch14_224", 28, {}, img_size=28, embed_dim=32, depth=2, num_heads=4),
    "swin": _timm("swin_tiny_patch4_window7_224", 32, {}, img_size=32, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4),
    "resnet": _timm("resnet50", 32, {}, layers=(2, 2, 1, 1), channels=(8, 8, 8, 8)),
    "resnext": _timm("resnext50_32x4d", 32, {}, layers=(2, 1, 1, 1), channels=(8, 8, 8, 8), cardinality=2, base_width=32),
    "regnet": Model(_regnet, torch.randn(2, 3, 32, 32), {}),
    "convnext": _timm("convnext_atto", 32, {}, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "efficientnet": Model(_efficientnet, torch.randn(2, 3, 32, 32), {}),
    "mobilenetv3": Model(_mobilenetv3, torch.randn(2, 3, 32, 32), {}),
    "mixer": Model(_mixer, torch.randn(2, 3, 32, 32), {}),
    "gpt2": _text(_gpt2, {}),
    "bert": _text(_bert, {}),
    "llama": _text(_llama, {}),
    "torchvision_vit": Model(_torchvision_vit, torch.randn(2, 3, 32, 32), {}),
}
