"""Modules whose weights are views of another module's weight.

A tied module is a subclass of its own class with a property in place of the parameter. The source is held without being
registered, so that every weight has exactly one name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pe_fx.derived import Derived, derive
from pe_fx.errors import PeFxError
from pe_fx.ties import Plan, Ranges, Shape


@dataclass(frozen=True)
class View:
    """A part of a stored tensor: `ranges` of each dimension (None: all of it), then dimensions `swap` exchanged, then `reshape`d.

    Written with methods alone, so that it runs on tensors and on torch.fx proxies.
    """

    ranges: tuple[Ranges | None, ...]
    swap: tuple[int, int] | None = None
    reshape: Shape | None = None

    def __call__(self, stored: Tensor) -> Tensor:
        part = stored
        for dim, ranges in enumerate(self.ranges):
            if ranges is not None:
                part = _joined([part.narrow(dim, start, stop - start) for start, stop in ranges], dim)
        if self.swap is not None:
            part = part.transpose(*self.swap)
        return part if self.reshape is None else part.reshape(self.reshape)


@dataclass(frozen=True)
class Piece:
    """Positions start to stop of a part (None: all of it); part -1 is what the module itself stores."""

    part: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Layout:
    """How a dense weight is put together along `axis`.

    >>> layout = Layout(0, (Piece(0),), (View((((0, 2),), None), swap=(0, 1)),))
    >>> layout.assemble(None, [torch.ones(4, 3)]).shape
    torch.Size([3, 2])
    """

    axis: int
    pieces: tuple[Piece, ...]
    views: tuple[View, ...]

    def assemble(self, own: Tensor | None, sources: Sequence[Tensor]) -> Tensor:
        parts = [view(source) for view, source in zip(self.views, sources, strict=True)]
        pieces = []
        for piece in self.pieces:
            part = own if piece.part < 0 else parts[piece.part]
            assert part is not None
            pieces.append(part if piece.stop is None else part.narrow(self.axis, piece.start, piece.stop - piece.start))
        return _joined(pieces, self.axis)


@dataclass
class TiedWeight:
    """One tied weight of a module: its layout, and the modules and names of the parameters that it is a view of.

    `plan` is what tied it, `name` its name there.
    """

    layout: Layout
    sources: list[tuple[nn.Module, str]]
    text: str
    plan: Plan
    name: str
    order: list[str] = field(default_factory=list)

    def dense(self, owner: nn.Module, name: str) -> Tensor:
        return self.layout.assemble(owner._parameters.get(name), [stored(module, attribute) for module, attribute in self.sources])


def stored(module: nn.Module, name: str) -> Tensor:
    """The parameter itself, past the property that may stand before it."""
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


class Tied(Derived):
    """A module with weights that are views; `tied_weights` says which, and of what."""

    tied_weights: dict[str, TiedWeight]

    @classmethod
    def attributes(cls, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: _property(name) for name in names}

    def extra_repr(self) -> str:
        ties = ", ".join(f"{name} ← {weight.text}" for name, weight in self.tied_weights.items())
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, {ties}" if own else ties

    def __prepare_scriptable__(self) -> Any:
        raise PeFxError("torch.jit.script cannot follow a tied weight to its source: use torch.jit.trace, or script pe_fx.untie(model)")


def _property(name: str) -> property:
    def dense(self: Any) -> Tensor:
        tied: TiedWeight = self.tied_weights[name]
        try:
            return tied.dense(self, name)
        except NotImplementedError as error:  # a quantized tensor
            raise PeFxError(f"{name} ← {tied.text}: the source cannot be viewed any more ({error}). Quantize pe_fx.untie(model)") from error

    return property(dense, doc=f"The dense {name}, computed from what it is tied to.")


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
    module.__class__ = derive(dense_class, Tied, tied_weights)  # type: ignore[assignment]


def untie_weights(module: nn.Module, dense: dict[str, Tensor]) -> None:
    """Gives a tied module ordinary parameters with these values, and its own class."""
    assert isinstance(module, Tied)
    weights: dict[str, TiedWeight] = module.__dict__.pop("tied_weights")
    module.__class__ = module.dense_class  # type: ignore[assignment]
    for name, weight in weights.items():
        trained = weight.sources[0][0]._parameters[weight.sources[0][1]]
        module._parameters[name] = nn.Parameter(dense[name].contiguous(), requires_grad=trained is None or trained.requires_grad)
    for name in next(iter(weights.values())).order:
        module._parameters[name] = module._parameters.pop(name)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
