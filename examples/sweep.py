"""`python examples/sweep.py --set timm --out sweep.csv`: plans, ties and verifies every model of a library, one CSV row for each.

Sets: timm (all of `timm.list_models()`), torchvision (classification, segmentation and detection) and transformers (every
architecture that has a configuration class, built small). All weights are random; nothing is downloaded. Every model runs in a
process of its own with a time limit, two at a time. Rows are appended as they come: call it again and it goes on where it
stopped, `--retry-errors` does the failed ones again, and `--summary sweep.csv` prints what was found.

    python examples/sweep.py --set all --plan-only                       # graphs and sites only, a few seconds per model
    python examples/sweep.py --set timm --filter 'vit_*' --jobs 4
    python examples/sweep.py --set transformers --retry-errors

Models are planned on the meta device, so that their weights are never allocated; those that cannot be built there, and all of
transformers, are built in memory. What is verified has at most `--max-params` parameters: the model, or else a shallow variant
where the constructor takes a depth.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import fnmatch
import gc
import inspect
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

import pe_fx
from pe_fx.capture import capture
from pe_fx.ties import Plan, table

LIBRARIES = ("timm", "torchvision", "transformers")
COLUMNS = (
    "library",
    "model",
    "family",
    "params",
    "params_tied",
    "sites",
    "misses",
    "capture_s",
    "match_s",
    "rewrite_s",
    "built",
    "inputs",
    "verified",
    "worst_error",
    "peak_mb",
    "error",
)
NOT_VERIFIED = "plan only"
Row = dict[str, str]


# ---------------------------------------------------------------------------------------------------------------- models


@dataclass
class Built:
    """A model with inputs that fit it; `how` says how it was built."""

    model: nn.Module
    inputs: Any
    how: str


@dataclass
class Entry:
    """A model of a set: its family, ways to build it for planning, in the order in which they are tried, and for verifying."""

    family: str
    candidates: Callable[[], Iterator[Built]]
    verifiable: Callable[[int, Built], Built | None]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def moved(inputs: Any, device: str) -> Any:
    """The inputs, whose tensors may lie in lists, tuples and dicts, on another device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: moved(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(moved(value, device) for value in inputs)
    return inputs


def constructed(build: Callable[..., nn.Module], inputs: Any, shallow: Sequence[Mapping[str, Any]], family: str) -> Entry:
    """The entry of a model that a function of a library makes."""

    def candidates() -> Iterator[Built]:
        with contextlib.suppress(Exception):  # constructors that compute with their weights; built in memory next
            yield Built(on_meta(build), moved(inputs, "meta"), "meta")
        yield Built(build(), inputs, "memory")

    def verifiable(limit: int, planned: Built) -> Built | None:
        if count(planned.model) <= limit:
            return Built(build(), inputs, "full")
        for options in shallow:
            with contextlib.suppress(Exception):  # an option that this constructor does not take
                if count(on_meta(lambda options=options: build(**options))) <= limit:  # type: ignore[misc]
                    return Built(build(**options), inputs, "shallow")
        return None

    return Entry(family, candidates, verifiable)


# ------------------------------------------------------------------------------------------------------------------ timm

SHALLOW = (
    {"depth": 2},
    {"depths": (1, 1, 1, 1)},
    {"depths": (2, 2, 2, 2)},
    {"layers": (1, 1, 1, 1)},
    {"depth": 4},
    {"depths": (2, 2, 2)},
    {"num_layers": 2},
)


def timm_names() -> list[str]:
    import timm

    return list(timm.list_models())


def timm_entry(name: str) -> Entry:
    import timm

    configuration = timm.get_pretrained_cfg(name)
    size = configuration.input_size if configuration is not None else (3, 224, 224)
    family = inspect.getmodule(timm.model_entrypoint(name))
    return constructed(
        lambda **options: timm.create_model(name, pretrained=False, **options),
        torch.randn(2, *size),
        SHALLOW,
        family.__name__.rpartition(".")[2] if family else "",
    )


# ----------------------------------------------------------------------------------------------------------- torchvision


def torchvision_names() -> list[str]:
    from torchvision import models  # type: ignore[import-untyped]

    return [name for module in (models, models.segmentation, models.detection) for name in models.list_models(module=module)]


def torchvision_entry(name: str) -> Entry:
    from torchvision import models  # type: ignore[import-untyped]

    builder = models.get_model_builder(name)
    family = builder.__module__.rpartition(".")[2]
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if ".detection." not in builder.__module__:
        inputs = torch.randn(2, 3, *[299 if name == "inception_v3" else 224] * 2)
        return constructed(lambda **shallow: builder(**options, **shallow), inputs, (), family)
    return constructed(lambda **shallow: builder(**options, **shallow).backbone, torch.randn(2, 3, 320, 320), (), family + ", backbone")


# ---------------------------------------------------------------------------------------------------------- transformers

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


def transformers_names() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return [name for name in CONFIG_MAPPING_NAMES if _class_names(name)]


def _class_names(model_type: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    found = []
    for head in HEADS:
        names = getattr(modeling_auto, f"{head}_MAPPING_NAMES", {}).get(model_type, ())
        found += [names] if isinstance(names, str) else list(names)
    return found


def transformers_entry(name: str) -> Entry:
    import transformers
    from transformers import AutoConfig

    model_class = getattr(transformers, _class_names(name)[0])
    configuration_class = type(AutoConfig.for_model(name))

    def build(scale: Scale) -> Any:
        return model_class(configuration_class(**shrunk(configuration_class(), scale) | OVERRIDES.get(name, {})))

    def candidates() -> Iterator[Built]:
        errors: list[str] = []
        for scale in SCALES:
            try:
                if count(on_meta(lambda scale=scale: build(scale))) > 5e8:  # type: ignore[misc]
                    continue
                model = build(scale).eval()
            except Exception as error:
                errors.append(f"{scale.how}: {_line(error)}")
                continue
            fitting = False
            for variant in transformers_inputs(model):
                inputs = _fitting(model, variant, errors)
                if inputs is not None:
                    fitting = True
                    yield Built(model, inputs, scale.how)
            if fitting:
                return
        raise BuildError("; ".join(dict.fromkeys(errors)))

    def verifiable(limit: int, planned: Built) -> Built | None:
        return planned if count(planned.model) <= limit else None

    return Entry(configuration_class.__module__.split(".")[-2], candidates, verifiable)


def _fitting(model: nn.Module, variant: Iterator[dict[str, Any]], errors: list[str]) -> dict[str, Any] | None:
    """The first of the inputs with which the model runs."""
    for inputs in variant:
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:
            errors.append(f"{', '.join(inputs)}: {_line(error)}")
        else:
            return inputs
    return None


class BuildError(Exception):
    """No configuration and no inputs were found with which the model runs."""


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
    from transformers import PreTrainedConfig

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


def transformers_inputs(model: Any) -> Iterator[Iterator[dict[str, Any]]]:
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
        yield _alternatives(chosen, configuration)


def _alternatives(names: Sequence[str], configuration: Any) -> Iterator[dict[str, Any]]:
    for values in itertools.islice(itertools.product(*(list(_values(name, configuration)) for name in names)), 60):
        yield dict(zip(names, values, strict=True))


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


# ---------------------------------------------------------------------------------------------------------------- worker

ENTRIES: dict[str, Callable[[str], Entry]] = {"timm": timm_entry, "torchvision": torchvision_entry, "transformers": transformers_entry}
NAMES: dict[str, Callable[[], list[str]]] = {"timm": timm_names, "torchvision": torchvision_names, "transformers": transformers_names}


def work(key: str, *, plan_only: bool, max_params: int) -> Row:
    """One model's row; an error ends up in it with the stage at which it came."""
    library, _, name = key.partition("/")
    row = dict.fromkeys(COLUMNS, "") | {"library": library, "model": name}
    stage = ["build"]
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry = ENTRIES[library](name)
            row["family"] = entry.family
            built, plan = planned(entry, row, stage)
            verify_model(entry, built, plan, row, stage, max_params, plan_only)
    except Exception as error:
        row["error"] = f"{stage[0]}: {described(error)}"
    row["peak_mb"] = str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    return row


def planned(entry: Entry, row: Row, stage: list[str]) -> tuple[Built, Plan]:
    """The first of the model's candidates that can be planned, and its plan."""
    first: pe_fx.CaptureError | None = None
    for number, built in enumerate(entry.candidates()):
        stage[0] = "plan"
        start, capture_s = time.perf_counter(), [0.0]
        try:
            with timed_capture(capture_s):
                plan = pe_fx.plan(built.model, built.inputs)
        except pe_fx.CaptureError as error:
            stage[0] = "capture"
            first = first or error
            if number == 3:
                break
            continue
        total = time.perf_counter() - start
        inputs = ", ".join(built.inputs) if isinstance(built.inputs, dict) else ""
        row |= {"built": built.how, "inputs": inputs, "params": str(plan.params_before), "params_tied": str(plan.params_after)}
        row |= {"capture_s": f"{capture_s[0]:.2f}", "match_s": f"{total - capture_s[0]:.3f}"}
        row |= {"sites": counted(site.kind for site in plan.sites), "misses": counted(reason_class(miss.reason) for miss in plan.misses)}
        row["params"] = str(count(built.model))
        return built, plan
    assert first is not None
    raise first


def verify_model(entry: Entry, planned: Built, plan: Plan, row: Row, stage: list[str], max_params: int, plan_only: bool) -> None:
    if plan_only or not plan.sites:
        row["verified"] = NOT_VERIFIED if plan_only else "no sites"
        return
    stage[0] = "build"
    built = entry.verifiable(max_params, planned)
    if built is None:
        row["verified"] = "too large"
        return
    stage[0] = "rewrite"
    if built.how == "shallow":
        plan = pe_fx.plan(built.model, moved(built.inputs, "cpu"))
    start = time.perf_counter()
    tied = pe_fx.apply(built.model, plan, inplace=True)
    row["rewrite_s"] = f"{time.perf_counter() - start:.3f}"
    stage[0] = "verify"
    gc.collect()
    disturb(tied)
    report = pe_fx.verify(tied, built.inputs)
    row["worst_error"] = f"{report.worst:.1e}"
    row["verified"] = ("shallow" if built.how == "shallow" else "full") if report else "NOT equal"


def disturb(model: nn.Module) -> None:
    """Random values everywhere: a norm that starts at zero would hide its whole block from the comparison."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn_like(parameter))


@contextlib.contextmanager
def timed_capture(seconds: list[float]) -> Iterator[None]:
    """Writes into `seconds` how long the capture within `pe_fx.plan` takes."""

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return capture(*args)
        finally:
            seconds[0] = time.perf_counter() - start

    with mock.patch("pe_fx.api.capture", timed):
        yield


def counted(things: Iterator[str] | Sequence[str]) -> str:
    return json.dumps(dict(Counter(things).most_common()))


def reason_class(reason: str) -> str:
    """A miss's reason without the names and numbers of its model.

    >>> reason_class("a.0.fc2.weight is (64, 256), a.0.fc1.weight is (128, 64): not transposes of each other")
    '… is (…), … is (…): not transposes of each other'
    """
    text = re.sub(r"\[[\d:, +…]*\]", "", reason)
    text = re.sub(r"\((?:\d+, ?)*\d*\)", "(…)", text)
    text = re.sub(r"\S*\w\.\w[^\s,:]*", "…", text)
    text = re.sub(r"\b\d+ (groups|places)", r"… \1", text)
    return re.sub(r"(?<=[a-z])_+\d+\b", "", text)


def described(error: BaseException) -> str:
    """An error with its cause and the places that raised them."""
    text = f"{_line(error)} [{_place(error)}]"
    return text if error.__cause__ is None else f"{text} caused by {_line(error.__cause__)} [{_place(error.__cause__)}]"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' * (len(text) > 300)}"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "torch/_" not in frame.filename and "torch/export" not in frame.filename]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in inside[-2:])


# ----------------------------------------------------------------------------------------------------------------- sweep


def run(key: str, options: argparse.Namespace) -> Row:
    """The row of one model, made by a process of its own."""
    library, _, name = key.partition("/")
    command = [sys.executable, __file__, "--worker", key, "--max-params", str(options.max_params)]
    command += ["--plan-only"] if options.plan_only else []
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=options.timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return dict.fromkeys(COLUMNS, "") | {"library": library, "model": name, "error": f"time: over {options.timeout:g} s"}
    try:
        row: Row = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        last = " ".join(errors.split())[-300:]
        return dict.fromkeys(COLUMNS, "") | {"library": library, "model": name, "error": f"crash: exit {process.returncode}: {last}"}
    return row


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV; a last one that was cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if all(row.get(column) is not None for column in COLUMNS)]


def write_rows(path: Path, rows: Sequence[Row], mode: str) -> None:
    with path.open(mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)


def is_done(row: Row, options: argparse.Namespace) -> bool:
    if row["error"]:
        return not options.retry_errors
    return bool(options.plan_only or row["verified"] != NOT_VERIFIED)


def sweep(options: argparse.Namespace) -> None:
    libraries = LIBRARIES if options.set == "all" else (options.set,)
    keys = [f"{library}/{name}" for library in libraries for name in NAMES[library]() if fnmatch.fnmatchcase(name, options.filter)]
    if options.list:
        listed = set(options.list.read_text(encoding="utf-8").split())
        keys = [key for key in keys if key in listed]
    earlier = read_rows(options.out)
    redo = {f"{row['library']}/{row['model']}" for row in earlier if not is_done(row, options)} & set(keys)
    kept = [row for row in earlier if f"{row['library']}/{row['model']}" not in redo]
    temporary = options.out.with_name(options.out.name + ".tmp")
    write_rows(temporary, kept, "w")
    temporary.replace(options.out)
    present = {f"{row['library']}/{row['model']}" for row in kept}
    todo = [key for key in keys if key not in present]
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(keys), initial=len(keys) - len(todo), smoothing=0.1) as progress:
        futures: dict[Future[Row], str] = {pool.submit(run, key, options): key for key in todo}
        try:
            for future in as_completed(futures):
                row = future.result()
                write_rows(options.out, [row], "a")
                failed += bool(row["error"])
                progress.set_postfix_str(f"{failed} errors, last {futures[future]}")
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def summary(path: Path) -> str:
    """Per library the number of models by outcome; then the misses by reason and the errors, most frequent first."""
    rows = read_rows(path)
    by_library: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_library[row["library"]].append(row)
    outcomes = [
        (
            library,
            str(len(own)),
            str(sum(bool(row["params"]) for row in own)),
            str(sum(row["sites"] not in ("", "{}") for row in own)),
            str(sum(row["verified"] in ("full", "shallow") for row in own)),
            str(sum(row["verified"] == "NOT equal" for row in own)),
            str(sum(bool(row["error"]) for row in own)),
            f"{max((float(row['worst_error']) for row in own if row['worst_error']), default=0.0):.0e}",
        )
        for library, own in by_library.items()
    ]
    parts = [table(("library", "models", "planned", "with sites", "verified", "NOT equal", "errors", "worst error"), outcomes)]
    reasons: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows:
        own = json.loads(row["misses"] or "{}")
        reasons.update(own)
        models.update(own.keys())
    if reasons:
        parts.append(
            table(("misses", "models", "reason"), [(f"{n:,}", str(models[reason]), reason) for reason, n in reasons.most_common()])
        )
    errors = Counter(re.sub(r"\d+", "…", row["error"])[:120] for row in rows if row["error"])
    if errors:
        parts.append(table(("models", "error"), [(str(n), error) for error, n in errors.most_common()]))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=(*LIBRARIES, "all"), default="all", help="which models (default: all)")
    parser.add_argument("--filter", default="*", metavar="GLOB", help="only models whose name matches")
    parser.add_argument("--list", type=Path, metavar="FILE", help="only models in this file, one library/name a line")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default: 2)")
    parser.add_argument("--timeout", type=float, default=900, metavar="SECONDS", help="per model (default: 900)")
    parser.add_argument("--out", type=Path, default=Path("sweep.csv"), metavar="CSV", help="where the rows go (default: sweep.csv)")
    parser.add_argument("--retry-errors", action="store_true", help="do again the models that failed")
    parser.add_argument("--plan-only", action="store_true", help="no verification")
    parser.add_argument("--max-params", type=float, default=100e6, help="the largest model to verify (default: 100e6)")
    parser.add_argument("--summary", type=Path, metavar="CSV", help="print a table of what this file holds, and stop")
    parser.add_argument("--worker", metavar="KEY", help="print one model's row as JSON, and stop: library/name")
    options = parser.parse_args()
    if options.summary:
        print(summary(options.summary))
    elif options.worker:
        row = work(options.worker, plan_only=options.plan_only, max_params=int(options.max_params))
        print(json.dumps(row), flush=True)
        os._exit(0)
    else:
        sweep(options)


if __name__ == "__main__":
    main()
