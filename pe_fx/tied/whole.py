"""A tie whose source is no part of what is saved or loaded: its values would be in no state_dict, and nothing would miss them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import nn

from pe_fx.errors import PeFxError

Sources = Mapping[str, Sequence[tuple[nn.Module, str]]]
"""By a text of each tie, the modules and the names of the parameters that it reads."""


def check_saved(sources: Sources, destination: Any) -> None:
    """Raises `PeFxError` where the module whose `state_dict` is being made lacks one of the sources.

    >>> check_saved({"fc2.weight ← fc1.weightᵀ": [(nn.Linear(2, 2), "weight")]}, {})  # none is being made
    """
    callers = [frame.f_locals["self"] for frame in _frames(nn.Module.state_dict) if frame.f_locals["destination"] is destination]
    _check(sources, callers[-1:])  # each module calls itself on its children: the outermost is the whole


def check_loaded(sources: Sources) -> None:
    """Raises `PeFxError` where the module whose `load_state_dict` runs lacks one of the sources.

    >>> check_loaded({"fc2.weight ← fc1.weightᵀ": [(nn.Linear(2, 2), "weight")]})  # none runs
    """
    _check(sources, [frame.f_locals["self"] for frame in _frames(nn.Module.load_state_dict)][:1])


def _frames(method: Any) -> Iterator[FrameType]:
    """The calls of a method that are running, innermost first: PyTorch tells no hook of which module the whole is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is method.__code__:
            yield frame
        frame = frame.f_back


def _check(sources: Sources, roots: Sequence[nn.Module]) -> None:
    for root in roots:
        held = set(root.modules())
        for text, read in sources.items():
            for source in (source for source, _ in read if source not in held):
                raise PeFxError(
                    f"{text}: its source, a {type(source).__name__}, is no part of this {type(root).__name__}, so that its values are in "
                    "no state_dict. Save and load the whole model; before layers are exchanged or taken out, pe_fx.untie(model)"
                )
