"""Transformers architectures, built small from their configuration classes, with inputs that fit.

The rules below shrink every configuration alike, by what its fields' names say; `OVERRIDES` holds what they leave inconsistent.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from zoo import Entry, alternatives, small_entry

import pe_fx.transformers  # noqa: F401  # else the first model that is tied imports it, and its row says that tying takes as long

HEADS = (
    "MODEL",
    "MODEL_FOR_PRETRAINING",
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_MULTIMODAL_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_CTC",
    "MODEL_FOR_TEXT_TO_WAVEFORM",
    "MODEL_FOR_IMAGE_CLASSIFICATION",
    "MODEL_FOR_BACKBONE",
    "MODEL_FOR_SEMANTIC_SEGMENTATION",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION",
    "MODEL_FOR_OBJECT_DETECTION",
    "MODEL_FOR_DEPTH_ESTIMATION",
    "MODEL_FOR_KEYPOINT_DETECTION",
    "MODEL_FOR_KEYPOINT_MATCHING",
    "MODEL_FOR_POSE_ESTIMATION",
    "MODEL_FOR_IMAGE_MATTING",
)
LENGTH, DECODER_LENGTH, VOCABULARY, WIDTH = 16, 8, 128, 64
COUNTS = (  # what a key that matches is set to, at most
    (r"vocab_size$|^n_tokens$", VOCABULARY),
    (r"heads$|(^|_)n_head$", 4),
    (r"(^|_)(n|num)_(\w*_)?(layers?|blocks?)$|(encoder|decoder)_layers$|^depth$|_depth$|^layers$", 2),
    (r"experts?$", 4),
    (r"experts_per_tok(en)?$|top_?k(_experts?)?$|^(n_group|topk_group)$|experts_top_k", 2),
    (r"first_k_dense_replace$", 1),
    (r"max_(\w+_)?position(s|_embeddings)$|^n_(ctx|positions)$", 512),
    (r"(relative_attention_)?num_buckets$", 32),
)
WIDTHS = (
    (r"^(qk_rope_head_dim|qk_nope_head_dim)$", 8),
    (r"head_dim$|head_size$|d_head$|^d_kv$|^attention_key_size$|kv_channels$", 16),
    (r"intermediate|ffn|feed_?forward|^d_ff$|mlp_(dim|hidden)|^d_inner$|^inner_dim$", 2 * WIDTH),
    (r"hidden_(size|dim)$|^d_model$|^n_embd$|embed_dim$|^dim$|projection_dim$|embedding_size$|_dim$|lora_rank$|lru_width$", WIDTH),
)
FIXED: dict[str, Any] = {
    "use_cache": False,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
SERIES: dict[str, Any] = {"prediction_length": 8, "context_length": 32, "lags_sequence": [1, 2, 3], "num_time_features": 1}
OVERRIDES: dict[str, dict[str, Any]] = {  # where the rules above make a configuration that is inconsistent or not small
    "autoformer": SERIES,
    "ctrl": {"n_embd": 64, "dff": 128},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 128, "hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "flaubert": {"emb_dim": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "informer": SERIES,
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [32, 32], "num_hashes": 1, "is_decoder": False},
    "time_series_transformer": SERIES,
    "xlm": {"emb_dim": 64},
}


@dataclass(frozen=True)
class Scale:
    """How much a configuration is shrunk."""

    how: str
    widths: bool
    images: bool


SCALES = (Scale("small", True, True), Scale("shallow", False, True), Scale("shallow, full images", False, False))


def names() -> list[str]:
    return [name for name in CONFIG_MAPPING_NAMES if _class_names(name)]


def _class_names(model_type: str) -> list[str]:
    found = []
    for head in HEADS:
        names = getattr(modeling_auto, f"{head}_MAPPING_NAMES", {}).get(model_type, ())
        found += [names] if isinstance(names, str) else list(names)
    return found


def entry(name: str) -> Entry:
    model_class = getattr(transformers, _class_names(name)[0])
    configuration_class = type(AutoConfig.for_model(name))

    def build(scale: Scale) -> Any:
        return model_class(configuration_class(**shrunk(configuration_class(), scale) | OVERRIDES.get(name, {})))

    builds = {scale.how: functools.partial(build, scale) for scale in SCALES}
    return small_entry(configuration_class.__module__.split(".")[-2], builds, inputs_for)


def shrunk(configuration: Any, scale: Scale) -> dict[str, Any]:
    """The fields of a configuration that make it small, and its sub-configurations made small likewise."""
    fields = _fields(configuration)
    hierarchical = any(isinstance(value, (list, tuple)) and re.search(r"depths|heads|hidden_sizes|widths", key) for key, value in fields)
    rules = COUNTS if hierarchical or not scale.widths else COUNTS + WIDTHS
    result: dict[str, Any] = {}
    special = itertools.count(1)
    layers = {value for key, value in fields if re.search(r"(layers?|depth)$", key) and type(value) is int}
    values = dict(fields)
    for key, value in fields:
        if key in FIXED:
            result[key] = FIXED[key]
        elif hasattr(value, "model_type") and hasattr(value, "to_dict"):
            default = type(value)()
            own = {name: part for name, part in _fields(value) if getattr(default, name, None) != part}
            result[key] = type(value)(**own | shrunk(value, scale))
        elif re.search(r"(token_id|token_index|token_idx)$", key) and type(value) is int:
            result[key] = min(next(special), value)
        elif key in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            result[key] = [kinds[0], kinds[-1]]
        elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            if re.search(r"depths|(^|_)layers$|num_blocks|layer_depth", key):
                result[key] = type(value)(min(item, 2) for item in value)
            elif len(value) in layers and len(value) > 4:
                result[key] = type(value)(value[:2])
        elif type(value) is int:
            if key == "image_size" and scale.images:
                patch = values.get("patch_size", 16)
                result[key] = min(value, 4 * max(patch if isinstance(patch, int) else 16, 16))
            else:
                limit = _limit(key, values, rules)
                if limit is not None and value > limit:
                    result[key] = limit
        elif key == "rope_parameters" and isinstance(value, dict) and "rope_theta" in value and scale.widths:
            result[key] = value | {"mrope_section": [2, 3, 3]}
    return result


def _limit(key: str, values: Mapping[str, Any], rules: Sequence[tuple[str, int]]) -> int | None:
    """The most that a field may be; where queries are grouped, two of them share keys and values."""
    limit = next((limit for pattern, limit in rules if re.search(pattern, key)), None)
    heads = next((values[name] for name in ("num_attention_heads", "num_heads", "n_heads") if isinstance(values.get(name), int)), 0)
    return 2 if limit is not None and re.search(r"(key_value|kv)_heads$", key) and values[key] < heads else limit


def _fields(configuration: Any) -> list[tuple[str, Any]]:
    """A configuration's own fields; those that every configuration has only where they are about tokens."""
    cls = type(configuration)
    names = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else list(inspect.signature(cls).parameters)
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)} if dataclasses.is_dataclass(PreTrainedConfig) else set()
    renamed = getattr(cls, "attribute_map", {})
    names = [name for name in names if name.endswith("token_id") or (name not in common and name not in renamed)]
    names = [name for name in names if not name.startswith("_")]
    return [(name, getattr(configuration, name)) for name in names if getattr(configuration, name, None) is not None]


def _first(configuration: Any, *names: str, default: Any = None) -> Any:
    """The first of the attributes that the configuration, or one of its sub-configurations, has."""
    parts = [configuration, *(value for _, value in _fields(configuration) if hasattr(value, "model_type"))]
    for part, name in itertools.product(parts, names):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return default


def inputs_for(model: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """Variants of inputs, images and audio beside text first; each a number of alternatives that may fit."""
    configuration = model.config
    parameters = inspect.signature(model.forward).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [*required, model.main_input_name]
    if "past_values" in required:
        names += [
            name for name in ("past_time_features", "past_observed_mask", "future_values", "future_time_features") if name in parameters
        ]
    if "decoder_input_ids" in parameters and getattr(configuration, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    media = [name for name in ("pixel_values", "image_grid_thw", "input_features", "input_values") if name in parameters]
    text = [name for name in ("input_ids", "visual_feats", "visual_pos") if name in parameters]
    mask = [name for name in ("attention_mask", "decoder_attention_mask") if name in parameters]
    variants = (names + text + media, names + text, names, names + text + mask)
    for chosen in {tuple(dict.fromkeys(variant)): None for variant in variants}:
        yield alternatives({name: _values(name, configuration) for name in chosen}, limit=60)


def _values(name: str, configuration: Any) -> Iterator[Any]:
    """Values that an input of this name may have."""
    if name.endswith("input_ids"):
        yield from _token_ids(configuration, DECODER_LENGTH if name.startswith("decoder") else LENGTH)
    elif name in ("pixel_values", "images", "pixel_values_images"):
        yield from _images(configuration)
    elif name == "pixel_attention_mask":
        yield torch.ones(2, _first(configuration, "num_patches", default=LENGTH), dtype=torch.long)
    elif name == "spatial_shapes":
        yield torch.full((2, 2), int(_first(configuration, "num_patches", default=LENGTH) ** 0.5))
    elif name == "image_grid_thw":
        yield torch.tensor([[1, 4, 4]] * 2)
    elif name in ("pixel_values_videos",):
        yield torch.randn(2, _first(configuration, "num_frames", "frames", default=4), 3, *_image_size(configuration))
    elif name == "input_features":
        if hasattr(configuration, "audio_config"):
            yield torch.randn(2, 1, 1001, _first(configuration, "num_mel_bins", default=64))
        bins = _first(
            configuration, "feature_projection_input_dim", "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", default=80
        )
        for frames in (2 * _first(configuration, "max_source_positions", default=64), 128):
            yield torch.randn(2, bins, frames)
            yield torch.randn(2, frames, bins)
    elif name == "input_values":
        length = _first(configuration, "max_length", default=64)
        yield torch.randn(2, length, _first(configuration, "num_mel_bins", default=80))
        yield torch.randn(2, 16000)
        yield torch.randn(2, 1, 16000)
    elif name == "bbox":
        yield torch.randint(0, 10, (2, LENGTH, 4)).sort(-1).values
    elif name == "past_values":
        length = _first(configuration, "context_length", default=32)
        lags = _first(configuration, "lags_sequence", default=[0])
        yield torch.randn(2, length + max(lags))
        yield torch.randn(2, length, _first(configuration, "num_input_channels", default=1))
    elif name in ("past_time_features", "future_time_features", "past_observed_mask", "future_values"):
        yield from _series(name, configuration)
    elif name.endswith("mask") or name.endswith("masks"):
        yield torch.ones(2, DECODER_LENGTH if name.startswith("decoder") else LENGTH, dtype=torch.long)
    elif name in ("inputs", "inputs_embeds", "hidden_states", "visual_embeds", "visual_feats", "encoder_hidden_states"):
        width = _first(configuration, "visual_feat_dim", "visual_embedding_dim", "d_model", "hidden_size", default=WIDTH)
        yield torch.randn(2, LENGTH, width)
    elif name == "visual_pos":
        yield torch.rand(2, LENGTH, 4)
    elif name in ("input_points",):
        yield torch.rand(2, 1, 2, 2) * 32
    elif name.endswith("ids"):
        yield torch.zeros(2, LENGTH, dtype=torch.long)
    else:
        yield None


def _token_ids(configuration: Any, length: int) -> Iterator[Tensor]:
    """Ordinary tokens; where there are image or audio tokens, also with a number of those in front."""
    ids = torch.randint(VOCABULARY // 2, VOCABULARY - 1, (2, length), generator=torch.Generator().manual_seed(0))
    special = _first(configuration, "image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
    if type(special) is int:
        for number in (16, 17, 4, 1, 64, 256, 8, 32):
            yield torch.cat((torch.full((2, number), special), ids), 1)
    yield ids
    yield ids % 8 + 2


def _image_size(configuration: Any) -> tuple[int, int]:
    size = _first(configuration, "image_size", "img_size", "input_size", default=64)
    height, width = (size[-2], size[-1]) if isinstance(size, (list, tuple)) and len(size) > 1 else (size, size)
    return (height, width) if isinstance(height, int) and isinstance(width, int) else (64, 64)


def _images(configuration: Any) -> Iterator[Tensor]:
    """Images as such, as patches, and as videos."""
    channels = _first(configuration, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    frames, patches, patch = (_first(configuration, name) for name in ("temporal_patch_size", "num_patches", "patch_size"))
    if isinstance(frames, int) and isinstance(patch, int):
        yield torch.randn(32, channels * frames * patch**2)
    if isinstance(patches, int) and isinstance(patch, int):
        yield torch.randn(2, patches, channels * patch**2)
    sizes = list(dict.fromkeys((_image_size(configuration), (64, 64), (224, 224))))
    for size in sizes:
        yield torch.randn(2, channels, *size)
    yield torch.randn(2, _first(configuration, "num_frames", "frames_per_clip", default=4), channels, *sizes[0])
    yield torch.randn(2, 1, channels, *sizes[0])


def _series(name: str, configuration: Any) -> Iterator[Tensor]:
    past = _first(configuration, "context_length", default=32) + max(_first(configuration, "lags_sequence", default=[0]))
    length = past if name.startswith("past") else _first(configuration, "prediction_length", default=8)
    if name.endswith("features"):
        yield torch.randn(2, length, max(_first(configuration, "num_time_features", default=1), 1))
    else:
        yield torch.ones(2, length)
