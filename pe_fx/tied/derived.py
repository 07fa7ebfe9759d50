"""Subclasses made at run time, for single modules, that pickle and deepcopy as any other."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from pe_fx.errors import PeFxError
from pe_fx.graph.copies import by_attributes, state_of

Steps = tuple[tuple[type, tuple[str, ...]], ...]

_classes: weakref.WeakValueDictionary[tuple[type, Steps], type] = weakref.WeakValueDictionary()
"""Those in use: a class that was made for one module, or in a function, goes with it."""


class Derived:
    """Mixed into a module's own class by `derive`. `dense_class` is the class before, `derivation` how to make this one."""

    dense_class: type
    derivation: tuple[type, Steps]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """`type(module)(...)`, as tools make a module like another one, makes one of the class before."""
        self.__class__ = self.dense_class  # type: ignore[assignment]
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def attributes(cls, names: tuple[str, ...]) -> dict[str, Any]:
        """What the subclass gets for `names`."""
        return {}

    __deepcopy__ = by_attributes

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = state_of(self)  # type: ignore[arg-type]
        if state is None:
            raise PeFxError(
                f"{self.dense_class.__name__} says itself what of it is pickled, without what pe_fx has changed in it: "
                "pickle pe_fx.untie(model), or its state_dict"
            )
        return _rebuild, self.derivation, state


def derive(cls: type, mixin: type[Derived], names: Iterable[str] = ()) -> type:
    """The subclass of `cls` with `mixin` before it. It counts as part of the module of `cls`: torch.fx takes it for a leaf alike.

    >>> class Loud(Derived): pass
    >>> derive(nn.Linear, Loud)
    <class 'torch.nn.modules.linear.LoudLinear'>
    """
    base, steps = getattr(cls, "derivation", (cls, ()))
    return _derived(base, (*steps, (mixin, tuple(sorted(names)))))


def _derived(base: type, steps: Steps) -> type:
    if not steps:
        return base
    known = _classes.get((base, steps))
    if known is not None:
        return known
    mixin, names = steps[-1]
    before = _derived(base, steps[:-1])
    body = {"__module__": base.__module__, "__doc__": mixin.__doc__, "dense_class": before, "derivation": (base, steps)}
    try:
        derived = type(f"{mixin.__name__}{before.__name__}", (mixin, before), body | mixin.attributes(names))  # type: ignore[attr-defined]
    except Exception as error:  # whatever the class does in __init_subclass__
        raise PeFxError(f"{base.__name__} cannot be subclassed, as a module with a tied weight must be: {error}") from error
    _classes[base, steps] = derived
    return derived


def _rebuild(base: type, steps: Steps) -> nn.Module:
    module: nn.Module = object.__new__(_derived(base, steps))
    return module
