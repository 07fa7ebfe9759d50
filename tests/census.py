"""The real models of census.json, whose true sites were worked out from their source code and never from a graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from oracle import Inputs
from torch import nn

# {model: {"required": pairs, "allowed": pairs}}; a pair of one name is two parts of one weight
CENSUS = json.loads((Path(__file__).parent / "census.json").read_text())

TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100}
IMAGE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
IDS = {"input_ids": torch.arange(1, 33).reshape(2, 16)}
PIXELS = {"pixel_values": torch.randn(2, 3, 64, 64)}


def transformers_model(kind: str, task: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind + task)(getattr(transformers, f"{kind}Config")(**options))


GROUPED = TEXT | {"num_key_value_heads": 2}
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "bert": (transformers_model("Bert", "ForMaskedLM", TEXT), IDS | {"attention_mask": torch.ones(2, 16, dtype=torch.long)}),
    "albert": (transformers_model("Albert", "ForMaskedLM", TEXT | {"embedding_size": 32}), IDS),
    "gpt2": (transformers_model("GPT2", "LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}), IDS),
    "opt": (transformers_model("OPT", "ForCausalLM", TEXT | {"ffn_dim": 128, "word_embed_proj_dim": 64}), IDS),
    "llama": (transformers_model("Llama", "ForCausalLM", GROUPED), IDS),
    "gemma2": (transformers_model("Gemma2", "ForCausalLM", GROUPED | {"head_dim": 16}), IDS),
    "mixtral": (transformers_model("Mixtral", "ForCausalLM", GROUPED | {"num_local_experts": 4}), IDS),
    "t5": (
        transformers_model(
            "T5",
            "ForConditionalGeneration",
            {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100, "decoder_start_token_id": 0},
        ),
        IDS | {"decoder_input_ids": torch.arange(1, 17).reshape(2, 8)},
    ),
    "dinov2": (transformers_model("Dinov2", "ForImageClassification", IMAGE), PIXELS),
    "swin": (
        transformers_model(
            "Swin", "ForImageClassification", {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
        ),
        PIXELS,
    ),
    "segformer": (
        transformers_model(
            "Segformer",
            "ForSemanticSegmentation",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64], "decoder_hidden_size": 64},
        ),
        PIXELS,
    ),
}


def built(key: str) -> tuple[nn.Module, Inputs]:
    source, name = key.split("/")
    if source == "hf":
        build, inputs = TRANSFORMERS[name]
        return build(), inputs
    if source == "tv":
        return torchvision.models.get_model(name, weights=None), torch.zeros(2, 3, 224, 224)
    model = timm.create_model(name, pretrained=False)
    return model, torch.zeros(2, *model.pretrained_cfg["input_size"])
