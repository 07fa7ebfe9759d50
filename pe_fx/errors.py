"""What pe_fx raises and warns with."""

from __future__ import annotations

from collections.abc import Iterable


class PeFxError(Exception):
    """Every error of pe_fx; its text names the weights and shapes and says what to do."""


class CaptureError(PeFxError):
    """The model's graph could not be captured with the inputs given or derived."""


class NoSitesWarning(UserWarning):
    """Nothing in the model could be tied, so it was left as it is."""


def check_one_of(option: str, value: str, valid: Iterable[str]) -> None:
    """Raises `PeFxError` for a value that the option does not take."""
    if value not in tuple(valid):
        raise PeFxError(f"{option}={value!r} is unknown; choose from {', '.join(map(repr, valid))}")


def first_line(error: Exception) -> str:
    """
    >>> first_line(ValueError("too long\\nby far"))
    'ValueError: too long'
    """
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
