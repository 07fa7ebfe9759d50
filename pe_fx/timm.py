"""Tied twins of timm's models: importing this module registers `NAME_pe` beside every NAME, and the paper's own models.

>>> import timm
>>> import pe_fx.timm
>>> model = timm.create_model("vit_tiny_patch16_224_pe", img_size=32, depth=1, num_classes=10, rules="mlp")
>>> model.blocks[0].mlp.fc2
TiedLinear(in_features=768, out_features=192, bias=True, weight ← blocks.0.mlp.fc1.weightᵀ)

timm's scripts import it by `--device-modules pe_fx.timm` and pass options by `--model-kwargs rules=mlp include=blocks.*`.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

try:
    import timm
    from timm.models import DefaultCfg, get_arch_pretrained_cfgs, load_pretrained, model_entrypoint, register_model
except ImportError as error:
    raise ImportError(f"pe_fx.timm needs timm ({error}): pip install 'pe_fx[timm]'") from error

import pe_fx
from pe_fx.text import sizes_in
from pe_fx.tied.held import held_plan
from pe_fx.tied.weight import tied_weights_in

__all__ = ["register"]

OPTIONS = tuple(
    name for name, parameter in inspect.signature(pe_fx.transform).parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)
LISTS = ("rules", "across", "include", "exclude")

PAPER: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_pe_small": ("deit_small_patch16_224", {}),
    "resnet50_pe1": ("resnet50", {"entry": "slice"}),
    "resnet50_pe2": ("resnet50", {"entry": "slice", "include": ("layer3.*", "layer4.*")}),
}
"""The models of arXiv 2401.16438: what each is tied from, and how."""

default_cfgs: dict[str, Any] = {}
"""The pretrained configurations of the twins, where `register_model` looks for them."""


def register(dense: str, twin: str | None = None, **options: Any) -> None:
    """Registers a tied twin of a model that timm has, by default under the name `DENSE_pe`.

    >>> register("resnet18", "resnet18_gated", rules="squeeze_excite")
    >>> timm.is_model("resnet18_gated")
    True

    `timm.create_model(twin, ...)` takes the arguments of the dense model and the options of `pe_fx.transform`, of which `options`
    gives other defaults. Nothing is built before that. Lists of names may be written with commas, as on a command line:
    `include="layer3.*,layer4.*"`, `share="mlp=2,attention"`.

    With `pretrained=True` the dense weights are loaded, then tied as `init` says; from a folder or a repository of the hub that
    holds a tied model, the tied ones. A checkpoint of the dense model that is loaded into the twin is tied, too.
    """
    twin = twin or f"{dense}_pe"
    cfgs = {name.partition(".")[2]: cfg for name, cfg in get_arch_pretrained_cfgs(dense).items()}
    if cfgs:
        default_cfgs[twin] = DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=any(cfg.has_weights for cfg in cfgs.values()))
    register_model(_entrypoint(dense, twin, options))


def __getattr__(name: str) -> Any:
    """The entry point of a twin, which timm expects where it is registered."""
    if timm.models.is_model_in_modules(name, "timm"):
        return model_entrypoint(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _entrypoint(dense: str, twin: str, defaults: Mapping[str, Any]) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = {**defaults, **{name: kwargs.pop(name) for name in OPTIONS if name in kwargs}}
        return _create(dense, twin, pretrained, kwargs, {name: _listed(name, value) for name, value in options.items()})

    create.__name__ = create.__qualname__ = twin
    create.__doc__ = f"{dense}, tied."
    return create


def _listed(name: str, value: Any) -> Any:
    if name == "share" and isinstance(value, str):
        return sizes_in(value)
    return tuple(filter(None, value.split(","))) if name in LISTS and isinstance(value, str) else value


def _create(dense: str, twin: str, pretrained: bool, kwargs: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    cfg = kwargs.get("pretrained_cfg")
    holds_tied = pretrained and isinstance(cfg, Mapping) and bool(cfg.get("source"))  # the folder's own file named the twin
    model: Any = _tied(model_entrypoint(dense)(pretrained=pretrained and not holds_tied, **kwargs), kwargs, options)
    model.pretrained_cfg["architecture"] = twin
    init = options.get("init", "keep")
    model.register_load_state_dict_pre_hook(functools.partial(_tie_dense_weights, dense=dense, kwargs=kwargs, init=init))
    if holds_tied:
        load_pretrained(
            model,
            pretrained_cfg=model.pretrained_cfg,
            num_classes=getattr(model, "num_classes", 0),
            in_chans=kwargs.get("in_chans", 3),
            cache_dir=kwargs.get("cache_dir"),
        )
    return model  # type: ignore[no-any-return]


def _tied(model: Any, kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    return pe_fx.transform(model, _image(model, kwargs), **{**options, "inplace": True})


def _image(model: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """An input for a model that is not of its configuration's size; else it is derived."""
    if "img_size" not in kwargs and "in_chans" not in kwargs:
        return None
    channels, *size = model.pretrained_cfg["input_size"]
    size = kwargs.get("img_size", size)
    height, width = (size, size) if isinstance(size, int) else size
    like = next(model.parameters())
    return torch.zeros(2, kwargs.get("in_chans", channels), height, width, dtype=like.dtype, device=like.device)


def _tie_dense_weights(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    *_: Any,
    dense: str,
    kwargs: Mapping[str, Any],
    init: str,
) -> None:
    """Before weights are loaded: those of the dense model become those of the tied one."""
    if prefix or not _is_dense(model, state_dict):
        return
    plan = held_plan(model)
    assert plan is not None
    with torch.random.fork_rng(enabled=init != "reset"):
        if plan.entries:  # the modules that they changed are not in the model any more
            classes = {"num_classes": model.num_classes} if hasattr(model, "num_classes") else {}
            twin = model_entrypoint(dense)(pretrained=False, **{**kwargs, **classes})
        else:
            twin = pe_fx.untie(model)
        missing, unexpected = twin.load_state_dict(state_dict, strict=False)
        tied = pe_fx.apply(twin, plan, init=init, inplace=True).state_dict()
    kept = {name: state_dict[name] for name in unexpected}  # for the load itself to judge, as what is missing
    state_dict.clear()
    state_dict.update({name: value for name, value in tied.items() if name not in missing} | kept)


def _is_dense(model: nn.Module, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether every weight that the model has tied away, as a whole or in part, is there as a whole."""
    tied = [name for name, *_ in tied_weights_in(model)]
    return bool(tied) and all(name in state_dict for name in tied)


def _register_all() -> None:
    for name in sorted(set(timm.list_models()) - set(timm.list_models(module="timm"))):
        if not timm.is_model(f"{name}_pe"):
            register(name)
    for name, (dense, options) in PAPER.items():
        if not timm.is_model(name):
            register(dense, name, **options)


_register_all()
