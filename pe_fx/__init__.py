"""pe_fx: one matrix where two were, in any PyTorch model.

>>> import timm
>>> import torch
>>> import pe_fx
>>> model = timm.create_model("deit_small_patch16_224")
>>> tied = pe_fx.transform(model)  # a copy; inplace=True changes the model itself
>>> count = lambda model: sum(parameter.numel() for parameter in model.parameters())
>>> assert (count(model), count(tied)) == (22_050_664, 11_433_832)
>>> assert isinstance(tied, timm.models.VisionTransformer)

`Wᵀ F(W x)` can stand for `W₂ F(W₁ x)`. `transform` finds where, by following the data through the model's graph, and ties the weights:
fewer parameters, gradients and optimizer state at the same number of multiply-adds. A tied weight is a view of another one and has no
name of its own in the state_dict; every other name stays, and so do the model's class and forward.

    plan(model)          what transform would do: a Plan, to be printed, explained (`.explain()`) and kept (`.to_json()`)
    transform(model)     the tied model
    apply(model, plan)   a model tied by a plan made earlier, say to load a checkpoint
    verify(model)        a tied model against its dense twin: outputs and gradients
    untie(model)         that twin, in the original architecture's own names
    commit(model)        after `torch.compile(model, backend="pe_fx")`: ties the model as its compiled graphs are tied
    pending(model)       the plan that commit would carry out
    TiePass()            the rules as a pass of torch.fx
    outside_ties(layer)  whether a layer can be exchanged or converted by itself

What cannot be done raises `PeFxError` (`CaptureError`: no graph) and leaves the model as it was; `NoSitesWarning`: nothing to tie.
By their own names are imported: `pe_fx.checkpoint` (files), `pe_fx.distributed` (FSDP2, tensor parallel), `pe_fx.timm` (tied twins of
timm's models), `pe_fx.transformers` (`from_pretrained`, `save_pretrained`), `pe_fx.peft`, `pe_fx.diff` (what changed, as a tree or a page)
and `pe_fx.passes` (the rules). The command `pe-fx` shows plans and differences.

Source: O. C. Koyun, B. U. Töreyin, arXiv 2401.16438.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pe_fx.api import apply, plan, transform
    from pe_fx.compiled.fx_pass import TiePass
    from pe_fx.compiled.ledger import commit, pending
    from pe_fx.errors import CaptureError, NoSitesWarning, PeFxError
    from pe_fx.tied.partners import outside_ties
    from pe_fx.tied.twin import untie, verify
    from pe_fx.ties import Plan

__all__ = [
    "CaptureError",
    "NoSitesWarning",
    "PeFxError",
    "Plan",
    "TiePass",
    "apply",
    "commit",
    "outside_ties",
    "pending",
    "plan",
    "transform",
    "untie",
    "verify",
]

_HOMES = {
    "api": ("apply", "plan", "transform"),
    "errors": ("CaptureError", "NoSitesWarning", "PeFxError"),
    "compiled.fx_pass": ("TiePass",),
    "compiled.ledger": ("commit", "pending"),
    "ties": ("Plan",),
    "tied.partners": ("outside_ties",),
    "tied.twin": ("untie", "verify"),
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: `pe-fx --help` need not wait for torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"pe_fx.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
