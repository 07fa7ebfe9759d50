"""The models of diffusers (transformers, UNets, autoencoders, ControlNets), built small from their constructors' defaults, with inputs.

The rules below shrink every constructor's defaults alike, by what their names say; `OVERRIDES` holds what they leave inconsistent.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin, models
from torch import nn
from zoo import Entry, alternatives, small_entry

LENGTH, SIDE, FRAMES, WIDTH, HEADS, HEAD, CHANNELS = 16, 8, 2, 64, 4, 16, 32
COUNTS = (  # what an option that matches is set to, at most
    (r"vocab_size$|codebook_size$|num_vq_embeddings$|num_embeds_ada_norm$|num_sequence_classes$", 128),
    (r"layers_per(_\w+)?_block$", 1),
    (r"(^|_)(n|num)_?(\w+_)?(layers?|blocks?)$|^nlayers$|_layers$|(^|_)depth$", 2),
    (r"experts$", 4),
    (r"^(sample|image|target)_(size|width|height)$|^resolution$", SIDE),
    (r"^sample_frames$|^video_length$|^full_chunk_limit$", FRAMES),
    (r"text_seq_length$|text_len(_t5)?$|max_sequence_length$|^num_embeddings$|^targets_length$|^min_sequence_length$", LENGTH),
    (r"^pos_embed_max_size$", 2 * SIDE),
)
WIDTHS = (
    (r"(kv|key_value)(_attention)?_heads$", 2),
    (r"heads$", HEADS),
    (r"head_dim$|dim_heads?$|^d_kv$", HEAD),
    (r"ffn?_(\w+_)?dim(_a)?$|ffn_hidden_size$|intermediate_(size|dim)$|^d_ff$", 2 * WIDTH),
    (r"^(ch|channels|multiple_of|(decoder_)?base_dim|base_channels|(encoder|decoder)_(dim|channels)|hidden_channels)$", CHANNELS),
    (r"^z_dim$", 16),
    (r"_dim(_t5|2|_a)?$|hidden_size$|_features$|model_channels$|caption_channels$|(trans|proj)_channels?$|^dim$|^d_model$", WIDTH),
)
OVERRIDES: dict[str, dict[str, Any]] = {  # where a default is none, or the rules above make options that do not fit each other
    "DreamLiteTransformer2DModel": {"in_channels": 64, "cross_attention_dim": 64},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "caption_channels": [64, 64], "llama_layers": [0, 1]},
    "HunyuanDiT2DControlNetModel": {"in_channels": 4, "patch_size": 2},
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2},
    "LatteTransformer3DModel": {
        **{"in_channels": 4, "out_channels": 8, "patch_size": 2, "cross_attention_dim": 64, "caption_channels": 64},
        **{"num_embeds_ada_norm": 100, "norm_type": "ada_norm_single", "activation_fn": "gelu-approximate"},
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 2},
    "OmniGenTransformer2DModel": {"pad_token_id": 0},
    "Transformer2DModel": {"in_channels": 64, "cross_attention_dim": 64},
    "TransformerTemporalModel": {"in_channels": 64},
    "UNetSpatioTemporalConditionModel": {"projection_class_embeddings_input_dim": 3 * WIDTH},
    "WanVACETransformer3DModel": {"vace_layers": [0, 1]},
}
GIVEN = (  # inputs that are optional by the signature and needed all the same
    *("timestep", "timesteps", "encoder_hidden_states", "encoder_hidden_states_mask", "encoder_attention_mask", "pooled_projections"),
    *("img_ids", "txt_ids", "guidance", "class_labels", "img_shapes", "num_frames", "height", "width", "image_rotary_emb"),
    *("text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size", "style", "added_cond_kwargs"),
    *("encoder_hidden_states_llama3", "pooled_embeds", "image_embeddings", "global_hidden_states", "rotary_embedding", "controlnet_cond"),
    *("control_hidden_states", "audio_num_frames", "text_encoder_layers", "padding_mask"),
)


def names() -> list[str]:
    found = {name: getattr(models, name) for name in dir(models)}
    return [name for name, value in found.items() if isinstance(value, type) and issubclass(value, ModelMixin) and value is not ModelMixin]


def entry(name: str) -> Entry:
    cls = getattr(models, name)
    scales = {"small": COUNTS + WIDTHS, "shallow": COUNTS}
    builds = {how: functools.partial(_build, cls, rules) for how, rules in scales.items()}
    return small_entry(cls.__module__.rpartition(".")[2], builds, inputs_for)


def _build(cls: type[nn.Module], rules: Sequence[tuple[str, int]]) -> nn.Module:
    return cls(**shrunk(cls, rules) | OVERRIDES.get(cls.__name__, {}))


def shrunk(cls: type, rules: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """The options of a constructor that make its model small."""
    result: dict[str, Any] = {}
    for name, option in inspect.signature(cls).parameters.items():
        value = option.default
        if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            result[name] = type(value)(_small_series(name, value, rules))
        elif type(value) is int:
            result[name] = min(value, next((limit for pattern, limit in rules if re.search(pattern, name)), value))
    return result


def _small_series(name: str, values: Sequence[int], rules: Sequence[tuple[str, int]]) -> Sequence[int]:
    """The values of an option that has one for each stage, or each axis."""
    if re.search(r"layers_per|num_layers|num_blocks|depths$", name):
        return [min(value, 1) for value in values]
    if rules is COUNTS:
        return values
    if re.search(r"axes_dim|rope_(axes_)?dim", name):
        axis = HEAD // len(values) // 2 * 2  # an even number for each, in all those of a head
        return [HEAD - axis * (len(values) - 1), *[axis] * (len(values) - 1)]
    if name.endswith("channels"):
        return [value // max(math.gcd(*values) // CHANNELS, 1) for value in values]  # multiples of the norms' groups
    return [min(value, HEADS) for value in values] if name.endswith("heads") else values


def inputs_for(model: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """Variants of inputs, the fullest first; each a number of alternatives that may fit."""
    parameters = inspect.signature(model.forward).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    given = [name for name in GIVEN if name in parameters]
    unmasked = [name for name in given if "mask" not in name]
    for chosen in dict.fromkeys(tuple(dict.fromkeys(required + more)) for more in (given, unmasked, [])):
        made = alternatives({name: _values(name, model.config, parameters) for name in chosen}, limit=200)
        yield ({name: value for name, value in inputs.items() if value is not None} for inputs in made)


def _values(name: str, options: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Any]:
    """Values that an input of this name may have; `options` are those of the constructor, `given` what `forward` takes."""
    if name in ("timestep", "timesteps", "r_timestep", "timestep_r", "timestep_ratio", "sigma", "t", "fps"):
        yield torch.tensor([1.0, 3.0])
    elif name == "guidance":
        yield torch.ones(2) if options.get("guidance_embeds") else None
    elif name == "class_labels":
        yield torch.tensor([0, 1]) if options.get("num_embeds_ada_norm") else None
    elif name == "padding_mask":
        yield torch.zeros(1, 1, SIDE, SIDE)
    elif "mask" in name:
        yield torch.ones(2, LENGTH, dtype=torch.bool)
        yield torch.ones(2, LENGTH)
    elif name == "img_shapes":
        yield [[(1, 4, 4)]] * 2
    elif name in ("num_frames", "audio_num_frames"):
        yield LENGTH if name.startswith("audio") else 1
    elif name in ("height", "width"):
        yield 4
    elif name in ("original_size", "target_size", "crop_coords"):
        yield torch.tensor([[8 * SIDE, 8 * SIDE]] * 2)
    elif name == "text_lens":
        yield torch.tensor([LENGTH, LENGTH])
    elif name in ("style", "prior_token_drop"):
        yield torch.tensor([0, 0])
        yield torch.tensor([False, True])
    elif name == "image_meta_size":
        yield torch.rand(12)
    elif name == "added_time_ids":
        yield torch.rand(2, 3)
    elif name == "added_cond_kwargs":
        yield {"text_embeds": torch.randn(2, WIDTH), "time_ids": torch.rand(2, 6)} if options.get("addition_embed_type") else None
    elif name in ("image_rotary_emb", "rotary_embedding"):
        yield None
        yield torch.rand(LENGTH, HEAD), torch.rand(LENGTH, HEAD)
        yield torch.polar(torch.ones(LENGTH, HEAD // 2), torch.rand(LENGTH, HEAD // 2))
    elif name in ("img_ids", "txt_ids", "position_ids"):
        axes = next((len(value) for key, value in options.items() if "axes" in key and isinstance(value, (list, tuple))), 3)
        yield torch.zeros(LENGTH, axes)
        yield torch.zeros(2, LENGTH, axes)
        yield torch.zeros(2 * LENGTH, axes)
    elif name in ("visual_rope_pos", "text_rope_pos"):
        yield torch.arange(LENGTH) if name.startswith("text") else (torch.arange(FRAMES), torch.arange(SIDE // 2), torch.arange(SIDE // 2))
    elif re.search(r"ids?$", name):
        yield torch.randint(0, 100, (2, LENGTH))
    elif name == "text_encoder_layers":
        yield [torch.randn(2, LENGTH, _width(options, "text_encoder_dim"))] * 4
    elif re.match(r"pooled|global|image_embeddings|clip_text_pooled", name):
        yield torch.randn(2, _width(options, "pooled", "text_dim2", "global", "cross_attention_dim"))
        yield torch.randn(2, 1, _width(options, "global"))
    elif re.match(r"encoder_hidden_states|audio_encoder|text|prompt|clip|proj|context|llm|cap|inputs_embeds", name):
        width = _width(options, "joint", "text", "caption", "context", "cross_attention_dim", "encoder_hid", "cond")
        yield torch.randn(2, LENGTH, width) if not name.startswith(("proj", "clip")) else torch.randn(2, width)
        yield torch.randn(2, LENGTH, 2, width)
    else:
        yield from _samples(name, options, given)


def _width(options: Mapping[str, Any], *parts: str) -> int:
    """The first of the options that has one of the parts in its name and is a width."""
    for part in parts:
        for key, value in options.items():
            if part in key and type(value) is int and re.search(r"_dim|_channels|_size|_features", key):
                return value
    return WIDTH


def _samples(name: str, options: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Any]:
    """Latent images, as such and as tokens; latent videos; images, videos and sounds."""
    keys = ["in_channels", "in_visual_dim", "input_channels", "io_channels", "audio_channels", "num_channels", "embedding_dim"]
    if name == "controlnet_cond":
        keys = ["conditioning_channels", *keys]
    if name == "control_hidden_states":
        keys = ["vace_in_channels"]
    if name in ("latents", "z", "mel", "hidden_states"):
        keys += ["latent_channels", "latent_dim", "mel_bins", "num_mels", "condition_hidden_dim"]
    if name == "audio_hidden_states":
        keys = ["audio_in_channels"]
    found = [options[key] for key in keys if type(options.get(key)) is int][: 2 if name == "controlnet_cond" else 1]
    sides = (2 * SIDE if name == "sample" else SIDE, 4 * SIDE, 8 * SIDE)  # an autoencoder makes little of much, its norms need some
    tokens = {"img_ids", "img_shapes", "num_frames", "position_ids"} & set(given)
    for channels in found or (3, 1, 4, WIDTH):
        if tokens:
            yield torch.randn(2, LENGTH, channels)
        for side in sides:
            yield torch.randn(2, channels, side, side)
            for frames in (FRAMES, 5):
                yield torch.randn(2, channels, frames, side, side)
            yield torch.randn(2, FRAMES, channels, side, side)
        yield torch.randn(2, FRAMES, SIDE, SIDE, channels)
        yield torch.randn(2, LENGTH, channels)
        yield torch.randn(2, channels, LENGTH)
        yield torch.randn(2, channels, 2048)
        yield torch.randn(2, channels)
