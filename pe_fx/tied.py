"""Modules whose weights are views of another module's weight.

A tied module is a subclass of its own class with a property in place of the parameter. The source is held without being
registered, so that every weight has exactly one name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pe_fx.ties import Ranges, Shape


@dataclass(frozen=True)
class View:
    """A part of a stored tensor, its dimensions `axes` swapped where `transposed`, in the given shape."""

    ranges: tuple[Ranges, ...]
    transposed: bool
    axes: tuple[int, int]
    shape: Shape

    def __call__(self, stored: Tensor) -> Tensor:
        part = stored
        for dim, ranges in enumerate(self.ranges):
            if ranges != ((0, stored.shape[dim]),):
                part = _take(part, dim, ranges)
        if self.transposed:
            part = part.transpose(*self.axes)
        return part if len(self.shape) == part.dim() else part.reshape(self.shape)


@dataclass(frozen=True)
class Layout:
    """How a dense weight is put together along `axis`: (part, start, stop), part -1 being what the module itself stores.

    >>> view = View((((0, 2),), ((0, 3),)), True, (0, 1), (3, 2))
    >>> Layout(0, ((0, 0, 3),), (view,)).assemble(None, [torch.ones(2, 3)]).shape
    torch.Size([3, 2])
    """

    axis: int
    pieces: tuple[tuple[int, int, int], ...]
    views: tuple[View, ...]

    def assemble(self, own: Tensor | None, sources: Sequence[Tensor]) -> Tensor:
        parts = [view(source) for view, source in zip(self.views, sources, strict=True)]
        pieces = []
        for index, start, stop in self.pieces:
            part = own if index < 0 else parts[index]
            assert part is not None
            pieces.append(part if start == 0 and stop == part.shape[self.axis] else part.narrow(self.axis, start, stop - start))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)


@dataclass
class TiedWeight:
    """One tied weight of a module: its layout, and the modules and names of the parameters that it is a view of."""

    layout: Layout
    sources: list[tuple[nn.Module, str]]
    text: str
    order: list[str] = field(default_factory=list)

    def dense(self, owner: nn.Module, name: str) -> Tensor:
        return self.layout.assemble(owner._parameters.get(name), [stored(module, attribute) for module, attribute in self.sources])


def stored(module: nn.Module, name: str) -> Tensor:
    """The parameter itself, past the property that may stand before it."""
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


class Tied:
    """What tied modules have in common; `tied_weights` says which of their weights are views, and of what."""

    tied_weights: dict[str, TiedWeight]
    dense_class: type[nn.Module]

    def extra_repr(self) -> str:
        ties = ", ".join(f"{name} ← {weight.text}" for name, weight in self.tied_weights.items())
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, {ties}" if own else ties

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.dense_class, tuple(sorted(self.tied_weights))), self.__getstate__()  # type: ignore[attr-defined]


@functools.cache
def tied_class(dense_class: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """The subclass of `dense_class` in which `names` are views.

    >>> tied_class(nn.Linear, frozenset({"weight"}))
    <class 'torch.nn.modules.linear.TiedLinear'>
    """
    body: dict[str, Any] = {name: _property(name) for name in names}
    body |= {"__module__": dense_class.__module__, "dense_class": dense_class, "__doc__": f"{dense_class.__name__} with tied {', '.join(sorted(names))}."}
    return type(f"Tied{dense_class.__name__}", (Tied, dense_class), body)


def _property(name: str) -> property:
    def dense(self: Any) -> Tensor:
        weight: Tensor = self.tied_weights[name].dense(self, name)
        return weight

    return property(dense, doc=f"The dense {name}, computed from what it is tied to.")


def _rebuild(dense_class: type[nn.Module], names: Iterable[str]) -> nn.Module:
    cls = tied_class(dense_class, frozenset(names))
    return cls.__new__(cls)


def tie_weight(module: nn.Module, name: str, weight: TiedWeight, kept: nn.Parameter | None) -> None:
    """Turns `module.<name>` into a view; of the parameter only `kept` stays, if anything."""
    weight.order = list(module._parameters)
    if kept is None:
        del module._parameters[name]
    else:
        module._parameters[name] = kept
    tied_weights = {**getattr(module, "tied_weights", {}), name: weight}
    dense_class = module.dense_class if isinstance(module, Tied) else type(module)
    module.__dict__["tied_weights"] = tied_weights
    module.__class__ = tied_class(dense_class, frozenset(tied_weights))


def untie_weights(module: nn.Module, dense: dict[str, Tensor]) -> None:
    """Gives a tied module ordinary parameters with these values, and its own class."""
    assert isinstance(module, Tied)
    weights: dict[str, TiedWeight] = module.__dict__.pop("tied_weights")
    module.__class__ = module.dense_class
    for name, weight in weights.items():
        trained = weight.sources[0][0]._parameters[weight.sources[0][1]]
        module._parameters[name] = nn.Parameter(dense[name].contiguous(), requires_grad=trained is None or trained.requires_grad)
    for name in next(iter(weights.values())).order:
        module._parameters[name] = module._parameters.pop(name)


def _take(tensor: Tensor, dim: int, ranges: Ranges) -> Tensor:
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
