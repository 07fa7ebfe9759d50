"""A tie whose source is no part of what is saved or loaded: its values would be in no state_dict, and nothing would miss them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    Another module than the source may hold its parameter, after layers were exchanged: as good, as long as that stays.
    """
    around = [frame.f_locals["self"] for frame in _frames(nn.Module.state_dict) if frame.f_locals["destination"] is destination]

    def is_inside(source: nn.Module, name: str) -> bool:
        parameter = source._parameters.get(name)
        return any(parameter is each for module in around for each in module.parameters())  # as a rule, in one that is near

    return {name: Outside(text) for name, text in _lacking(sources, around, is_inside)}


def check_loaded(sources: Sources, assign: bool) -> None:
    """Raises `PeFxError` where the module whose `load_state_dict` runs lacks one of the sources. `assign`: parameters are exchanged.

    >>> check_loaded({"weight": [(nn.Linear(2, 2), "weight")]}, False)  # none runs
    """
    whole = [frame.f_locals["self"] for frame in _frames(nn.Module.load_state_dict)][:1]

    def is_inside(source: nn.Module, name: str) -> bool:
        wanted = source if assign else source._parameters.get(name)
        return any(wanted is each for module in whole for each in (module.modules() if assign else module.parameters()))

    for _, text in _lacking(sources, whole, is_inside):
        raise PeFxError(text)


def _frames(method: Any) -> Iterator[FrameType]:
    """The calls of a method that are running, innermost first: PyTorch tells no hook of which module the whole is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is method.__code__:
            yield frame
        frame = frame.f_back


def _lacking(sources: Sources, around: Sequence[nn.Module], is_inside: Callable[[nn.Module, str], bool]) -> Iterator[tuple[str, str]]:
    """The tied weights of which a source is not inside the outermost of the modules, each with a sentence about it."""
    for name, read in sources.items() if around else ():
        for source, attribute in read:
            if not is_inside(source, attribute):
                yield (
                    name,
                    f"{name} is tied to the {attribute} of a {type(source).__name__}, which is no part of this "
                    f"{type(around[-1]).__name__}: its values are in no state_dict of it. Save and load the whole model; before layers are "
                    "exchanged or taken out, pe_fx.untie(model)",
                )
