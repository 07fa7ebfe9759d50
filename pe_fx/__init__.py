"""pe_fx: one matrix where two were, in any PyTorch model."""

from pe_fx.api import apply, plan, transform
from pe_fx.errors import CaptureError, NoSitesWarning, PeFxError
from pe_fx.ledger import commit
from pe_fx.ties import Plan
from pe_fx.twin import untie, verify

__all__ = ["CaptureError", "NoSitesWarning", "PeFxError", "Plan", "apply", "commit", "plan", "transform", "untie", "verify"]
