"""Where a model holds its parameters, and which ties these forbid, whatever the graph says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from pe_fx.tied.weight import Tied, before_tied, tied_weights_in
from pe_fx.ties import Entry, Tie

_BEFORE = "transform the model, then trace it"
ONCE = "transform the model once, with all its rules (pe_fx.untie undoes one)"


class Owner(NamedTuple):
    """A parameter, or the value that stands for it in a graph; its first name; its module; in how many places it is held; and, after
    an earlier transform, the weight that it is what is left of, and one that is tied to it."""

    parameter: Tensor
    name: str
    module: nn.Module | None = None
    places: int = 1
    left_of: str = ""
    read_by: str = ""


def owners_in(model: nn.Module) -> dict[str, Owner]:
    """The owner of every parameter, under each of its names."""
    every = list(model.named_modules(remove_duplicate=False))
    modules = [(path, module) for path, module in every if module._parameters]
    places = Counter(id(parameter) for module in {module for _, module in modules} for parameter in module._parameters.values())
    is_tied = any(isinstance(module, Tied) for _, module in every)
    ties = tied_weights_in(model) if is_tied else ()
    views = {(id(module), name): full for full, _, _, weight in ties for module, name in weight.sources}
    first: dict[int, str] = {}
    owners = {}
    for path, module in modules:
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{attribute}" if path else attribute
                was, key = before_tied(module, attribute), id(parameter)
                left_of, read_by = was if was != attribute else "", views.get((id(module), attribute), "")
                owners[name] = Owner(parameter, first.setdefault(key, name), module, places[key], left_of, read_by)
    return owners


def forbidden(tie: Tie, owners: Mapping[str, Owner]) -> str | None:
    """Why the weights themselves forbid a tie; None where they do not."""
    target, source = owners.get(tie.target), owners.get(tie.source)
    if target is None or source is None:
        return None
    for name, owner in ((tie.target, target), (tie.source, source)):
        if (reason := unfit(owner)) is not None:
            return f"{name} {reason}"
    if target.read_by:
        return f"{tie.target} is the source of {target.read_by}, by an earlier transform: {ONCE}"
    if target.places > 1:
        return f"{tie.target} is one parameter registered in {target.places} places: tied here, it would be untied there"
    a, b = target.parameter, source.parameter
    if a.requires_grad != b.requires_grad:
        frozen, trained = (tie.target, tie.source) if b.requires_grad else (tie.source, tie.target)
        return f"{frozen} is frozen, {trained} is trained: set requires_grad alike"
    if a.dtype != b.dtype:
        return f"{tie.target} is {_dtype(a.dtype)}, {tie.source} is {_dtype(b.dtype)}"
    if a.device != b.device:
        return f"{tie.target} is on {a.device}, {tie.source} on {b.device}"
    return None


def unfit(owner: Owner) -> str | None:
    """Why a parameter can be in no tie at all."""
    if isinstance(owner.module, nn.utils.parametrize.ParametrizationList):
        return "is parametrized: remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
    if owner.left_of:
        return f"is what an earlier transform left of {owner.left_of}: {ONCE}"
    if isinstance(owner.module, fx.GraphModule):
        return f"is held by a GraphModule itself, which every copy rebuilds from its graph: {_BEFORE}"
    return None


def unfit_entry(entry: Entry, modules: Mapping[str, nn.Module]) -> str | None:
    """Why an entry block cannot be treated, whatever the graph says: it is done to modules that the block calls."""
    around = [path for path in modules if path == "" or f"{entry.block}.".startswith(f"{path}.")]
    if any(isinstance(modules[path], fx.GraphModule) for path in around):
        return f"it changes what the module {entry.block or 'as a whole'} computes, which this GraphModule does not call: {_BEFORE}"
    for name in (entry.block, entry.conv1, *entry.convs, *entry.norms):
        if name not in modules:
            return f"{name}, a module that it treats, is missing"
    return None


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
