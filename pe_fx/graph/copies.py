"""Copies of models in which no module is the model's own, whatever the classes of its modules and what they hold."""

from __future__ import annotations

import contextlib
import copy
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pe_fx.errors import PeFxError, first_line

Memo = dict[int, Any]
"""As in `copy.deepcopy`: what stands in the copy for the object of an id."""

StandIn = Callable[[Any], Any]
"""What stands in the copy for an object that refuses to be copied; None where nothing may."""

_MOST = 1000
"""Objects in one attribute that may refuse: some are made anew at every try."""


def copied(model: nn.Module, known: Mapping[int, Any] | None = None, *, lend: bool = False) -> nn.Module:
    """A deep copy that shares no module with the model.

    >>> import threading
    >>> model = nn.Sequential(nn.Linear(4, 8))
    >>> model.lock = threading.Lock()
    >>> other = copied(model)
    >>> other[0].weight is model[0].weight, other.lock is model.lock
    (False, True)

    A module whose class has a `__deepcopy__` of its own is copied by that where another module comes of it that holds the copies
    of the modules in this one; a class that gives back the module itself, lest copies multiply it, or builds a new one is passed
    over, and the module copied attribute by attribute. `known` is a memo to begin with: what stands for which object.

    What `copy.deepcopy` refuses is shared where a run leaves nothing behind in it, as in a lock, and a tensor with a history copied
    without that. Anything else is a `PeFxError` that says where it sits; in a copy that only lives to be looked at (`lend`), it is
    shared, and nothing is freed when the copy goes.
    """
    places = modules_in(model)
    by_hand = {module for module in places if not _copies_itself(type(module))}
    stand_in = _itself if lend else _harmless
    while True:
        memo: Memo = dict(known or {})
        memo |= {id(module): _shell(module, lend) for module in by_hand}
        for module, place in reversed(places.items()):  # what is inside comes first
            if module in by_hand:
                _fill(memo[id(module)], module, memo, place, stand_in)
            else:
                _deep(module, memo, place, stand_in)
        astray = {module for module in places if module not in by_hand and not _holds_copies(module, memo)}
        if not astray:
            result: nn.Module = memo[id(model)]
            return result
        by_hand |= astray


def by_attributes(module: nn.Module, memo: Memo) -> nn.Module:
    """A `__deepcopy__` for classes that have another one, which they must not use: the copy has the same class and attributes."""
    shell = memo[id(module)] = _shell(module)
    _fill(shell, module, memo, type(module).__name__, _harmless)
    return shell


def state_of(module: nn.Module) -> dict[str, Any] | None:
    """The attributes that the module's class gives to who copies or pickles it; None where it gives something else, or nothing."""
    with contextlib.suppress(Exception):  # a class may refuse to be pickled
        state: Any = module.__getstate__()  # type: ignore[no-untyped-call]
        if isinstance(state, dict) and "_parameters" in state:
            return state
    return None


def modules_in(model: nn.Module) -> dict[nn.Module, str]:
    """Every module of a model with its path; those in plain lists and dicts, too, with their holder's."""
    places = {module: path for path, module in model.named_modules()}
    waiting = list(places)
    for module in waiting:
        for leaf in pytree.tree_leaves(dict(vars(module))):
            new = [inner for inner in leaf.modules() if inner not in places] if isinstance(leaf, nn.Module) and leaf not in places else []
            places |= dict.fromkeys(new, places[module])
            waiting += new
    return places


def _copies_itself(cls: type) -> bool:
    own = getattr(cls, "__deepcopy__", None)
    if own is not None:
        return own is not by_attributes
    return any(getattr(cls, name) is not getattr(object, name) for name in ("__reduce__", "__reduce_ex__"))


def _holds_copies(module: nn.Module, memo: Memo) -> bool:
    """Whether the module that stands for this one is another, and holds what stands for the modules in this one."""
    made = memo.get(id(module))
    return isinstance(made, nn.Module) and made is not module and [*made.modules()] == [memo.get(id(each)) for each in module.modules()]


def _shell(module: nn.Module, lend: bool = False) -> nn.Module:
    cls = type(module)
    if lend and hasattr(cls, "__del__"):  # what it would free is the module's
        keeping = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__del__": lambda self: None}
        cls = type(cls.__name__, (cls,), keeping)
    shell: nn.Module = object.__new__(cls)
    return shell


def _fill(shell: nn.Module, module: nn.Module, memo: Memo, place: str, stand_in: StandIn) -> None:
    state = state_of(module)
    attributes: dict[str, Any] = nn.Module.__getstate__(module) if state is None else state  # type: ignore[no-untyped-call]
    new = {name: _deep(value, memo, f"{place}.{name}".lstrip("."), stand_in) for name, value in attributes.items()}
    try:
        (nn.Module if state is None else type(shell)).__setstate__(shell, new)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever a class does to make itself anew
        raise PeFxError(_refusal(module, module, place, error)) from error


def _deep(value: Any, memo: Memo, place: str, stand_in: StandIn) -> Any:
    known = len(memo)
    for _ in range(_MOST):
        try:
            return copy.deepcopy(value, memo)
        except Exception as error:  # whatever a class does to say that it cannot be copied
            refusing = _refusing(error)
            new = stand_in(refusing)
            if new is None:
                raise PeFxError(_refusal(refusing, value, place, error)) from error
        while len(memo) > known:  # what was half made
            memo.popitem()
        memo[id(refusing)] = new
        known += 1
    raise PeFxError(f"{place or 'the model'} makes a new {type(refusing).__name__}, which cannot be copied, whenever it is copied")


def _refusing(error: Exception) -> Any:
    """What `copy.deepcopy` stopped at, which the innermost of its calls tells."""
    calls = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is copy.deepcopy.__code__]
    return calls[-1].f_locals["x"]


def _refusal(refusing: Any, value: Any, place: str, error: Exception) -> str:
    what = place or "the model"
    what += "" if refusing is value else f" holds a {type(refusing).__name__}, which"
    return (
        f"{what} cannot be copied ({first_line(error)}): take it off the model before, "
        "or have the model itself changed, inplace=True, which copies nothing"
    )


def _itself(refusing: Any) -> Any:
    harmless = _harmless(refusing)
    return harmless if harmless is not None or isinstance(refusing, nn.Module) else refusing


def _harmless(refusing: Any) -> Any:
    if isinstance(refusing, Tensor) and not refusing.is_leaf:
        viewed = refusing._base
        return None if viewed is not None and viewed.is_leaf else refusing.detach().clone()  # a view must follow what it views
    is_lock = hasattr(refusing, "acquire") and hasattr(refusing, "release")
    return refusing if is_lock or isinstance(refusing, types.ModuleType) else None
