"""What a tied weight is read as outside of compiled graphs: a tensor that refuses to be written.

It is a view of its source, or computed from it: what is written to it would change the source's own layer, too, or be lost, and a
hook on it would never be called again. PyTorch has no read-only tensors; this subclass overrides the methods that write. It takes no
part in `__torch_function__`, so that operations cost what they do on a Tensor, and return one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pe_fx.errors import PeFxError, first_line


class ReadOnly(Tensor):
    """
    >>> weight = read_only(torch.ones(2, 3), "fc2.weight")
    >>> weight.mul_(2)
    Traceback (most recent call last):
    pe_fx.errors.PeFxError: fc2.weight is tied: mul_ would be lost, or change its source with it. Change its source, or pe_fx.untie(model)
    >>> (weight * 2).mul_(2).tolist()
    [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]

    Not seen are operations that PyTorch calls with it as one argument of several: `torch.add(a, b, out=weight)`,
    `torch._foreach_mul_([weight], 2)`, and what writes into its memory past PyTorch.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    tied_name: str
    is_view: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        return self if self.is_view and requires_grad == self.requires_grad else _refuse(self, "requires_grad_")


def read_only(value: Tensor, name: str, is_view: bool = False) -> Tensor:
    """`value`, a tied weight of this name or a view of one, as a tensor that refuses writes; itself where it is more than a plain
    tensor or is being traced."""
    # a mode, as of make_fx or a fake tensor, does not know the subclass; private, tried with 2.11 and 2.14
    if type(value) is not Tensor or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():  # type: ignore[attr-defined, no-untyped-call]
        return value
    marked = value.as_subclass(ReadOnly)
    marked.tied_name, marked.is_view = name, is_view
    return marked


def _refuse(value: ReadOnly, what: str) -> Any:
    raise PeFxError(
        f"{value.tied_name} is tied: {what} would be lost, or change its source with it. Change its source, or pe_fx.untie(model)"
    )


def _writer(name: str) -> Callable[..., Any]:
    def method(self: ReadOnly, *args: Any, **kwargs: Any) -> Any:
        _refuse(self, name)

    return method


def _viewer(of: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: ReadOnly, *args: Any, **kwargs: Any) -> Any:
        try:
            result = of(self, *args, **kwargs)
        except RuntimeError as error:  # above all, that it is not contiguous
            raise PeFxError(
                f"{self.tied_name} is tied, and laid out as its source: {first_line(error)}. Or take pe_fx.untie(model)"
            ) from error
        memory = self.untyped_storage().data_ptr()

        def marked(part: Any) -> Any:
            aliases = isinstance(part, Tensor) and part.untyped_storage().data_ptr() == memory
            return read_only(part, self.tied_name, is_view=True) if aliases else part

        return type(result)(map(marked, result)) if isinstance(result, (tuple, list)) else marked(result)

    return method


def _attribute(name: str) -> property:
    of: Any = getattr(Tensor, name)
    return property(_viewer(of.__get__), lambda self, value: _refuse(self, f"setting its {name}"))


_UNHARMFUL = {"requires_grad_", "share_memory_"}
_IN_PLACE = {name for name in dir(Tensor) if name.endswith("_") and not name.endswith("__")} - _UNHARMFUL
_OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
_VIEWS = (
    "__getitem__ chunk detach diagonal expand flatten movedim narrow permute ravel reshape select split squeeze swapaxes swapdims t "
    "transpose unbind unflatten unsqueeze view view_as"
)

for _name in _IN_PLACE | _OPERATORS | _HOOKS | {"__setitem__"}:
    setattr(ReadOnly, _name, _writer(_name))
for _name in _VIEWS.split():
    setattr(ReadOnly, _name, _viewer(getattr(Tensor, _name)))
for _name in ("data", "T", "mT", "H", "mH", "requires_grad", "grad"):
    setattr(ReadOnly, _name, _attribute(_name))
