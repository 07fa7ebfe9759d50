"""A tie whose source is no part of what is saved or loaded: its values would be in no state_dict, and nothing would miss them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

from torch import nn

from pe_fx.errors import PeFxError

Sources = Mapping[str, Sequence[tuple[nn.Module, str]]]
"""By the name of each tied weight, the modules and the names of the parameters that it reads."""


class Outside:
    """Stands in a state_dict for a tied weight whose source is not in it: what it holds can be listed, but not used or saved.

    >>> Outside("fc2.weight ← fc1.weightᵀ: its source is elsewhere").shape
    Traceback (most recent call last):
    pe_fx.errors.PeFxError: fc2.weight ← fc1.weightᵀ: its source is elsewhere
    """

    def __init__(self, text: str) -> None:
        self.__dict__["text"] = text

    def __getattr__(self, name: str) -> NoReturn:
        raise PeFxError(self.__dict__["text"])

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise PeFxError(self.__dict__["text"])

    def __repr__(self) -> str:
        return f"<{self.__dict__['text']}>"


def outside_saved(sources: Sources, destination: Any) -> dict[str, Outside]:
    """The tied weights whose sources are no part of the module whose `state_dict` is being made.

    >>> outside_saved({"weight": [(nn.Linear(2, 2), "weight")]}, {})  # none is being made
    {}
    """
    callers = [frame.f_locals["self"] for frame in _frames(nn.Module.state_dict) if frame.f_locals["destination"] is destination]
    return _outside(sources, callers[-1:], by_module=False)  # each module calls itself on its children: the outermost is the whole


def check_loaded(sources: Sources, assign: bool) -> None:
    """Raises `PeFxError` where the module whose `load_state_dict` runs lacks one of the sources. `assign`: parameters are exchanged.

    >>> check_loaded({"weight": [(nn.Linear(2, 2), "weight")]}, False)  # none runs
    """
    roots = [frame.f_locals["self"] for frame in _frames(nn.Module.load_state_dict)]
    for outside in _outside(sources, roots[:1], by_module=assign).values():
        raise PeFxError(repr(outside).strip("<>"))


def _frames(method: Any) -> Iterator[FrameType]:
    """The calls of a method that are running, innermost first: PyTorch tells no hook of which module the whole is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is method.__code__:
            yield frame
        frame = frame.f_back


def _outside(sources: Sources, roots: Sequence[nn.Module], by_module: bool) -> dict[str, Outside]:
    """Another module than the source may hold its parameter, after layers were exchanged: as good, as long as that stays."""
    found = {}
    for root in roots:
        held = {id(each) for each in (root.modules() if by_module else root.parameters())}
        for name, read in sources.items():
            for source, attribute in read:
                if id(source if by_module else source._parameters.get(attribute)) not in held:
                    found[name] = Outside(
                        f"{name} is tied to the {attribute} of a {type(source).__name__}, which is no part of this {type(root).__name__}: "
                        "its values are in no state_dict of it. Save and load the whole model; before layers are exchanged or taken out, "
                        "pe_fx.untie(model)"
                    )
    return found
