"""pe_fx: one matrix where two were, in any PyTorch model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pe_fx.api import apply, plan, transform
    from pe_fx.compiled.ledger import commit, pending
    from pe_fx.errors import CaptureError, NoSitesWarning, PeFxError
    from pe_fx.tied.twin import untie, verify
    from pe_fx.ties import Plan

__all__ = ["CaptureError", "NoSitesWarning", "PeFxError", "Plan", "apply", "commit", "pending", "plan", "transform", "untie", "verify"]

_HOMES = {
    "api": ("apply", "plan", "transform"),
    "errors": ("CaptureError", "NoSitesWarning", "PeFxError"),
    "compiled.ledger": ("commit", "pending"),
    "ties": ("Plan",),
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
