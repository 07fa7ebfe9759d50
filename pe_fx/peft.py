"""Adapters of PEFT on tied models: `import pe_fx.peft`, and what would cut a tie, or write to both uses of one W, is an error."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, UntypedStorage, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pe_fx.errors import PeFxError
from pe_fx.tied.partners import outside_ties
from pe_fx.tied.weight import Tied, TiedWeight, tied_weights_in


def check_merge(layer: BaseTunerLayer, name: str = "") -> None:
    """Raises `PeFxError` where an adapter would be merged into a matrix that has two uses.

    >>> import peft, torch, pe_fx
    >>> tied = pe_fx.transform(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)))
    >>> model = peft.get_peft_model(tied, peft.LoraConfig(r=2, target_modules=["2"]))
    >>> model.merge_and_unload()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    pe_fx.errors.PeFxError: the adapter of 2 cannot be merged, since its weight is tied: ...
    >>> pe_fx.untie(model).merge_and_unload()[2]
    Linear(in_features=8, out_features=4, bias=True)

    An adapter changes one use of a matrix W; merged, it would change W for the other use, too. Training is not affected: the
    adapter is added to one use alone.
    """
    if not outside_ties(layer.get_base_layer()):
        raise PeFxError(
            f"the adapter of {name or layer.get_base_layer()} cannot be merged, since its weight is tied: merged, it would change the "
            "other use, too. pe_fx.untie(model).merge_and_unload() gives a dense model that computes the same"
        )


def check_copies(model: nn.Module) -> None:
    """Raises `PeFxError` where PEFT trains a copy of one side of a tie (`modules_to_save`, LN tuning): the other would stay behind.

    >>> check_copies(nn.Linear(2, 2))
    """
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper | BaseTunerLayer):
            original = wrapper.get_base_layer() if isinstance(wrapper, BaseTunerLayer) else wrapper.original_module
            inside = set(original.modules())
            ties = [(tied, source) for _, tied, _, weight in tied_weights_in(model) for source, _ in weight.sources]
            cut = any((tied in inside) != (source in inside) for tied, source in ties)
            if cut and any(_is_copy(module, original) for module in wrapper.modules()):
                raise PeFxError(
                    f"PEFT would train a copy of {name} (modules_to_save, LN tuning), whose weight is in a tie: the copy would not be "
                    "tied. Leave it out, or take pe_fx.untie(model)"
                )


def check_targets(model: nn.Module, parameters: Collection[str]) -> None:
    """Raises `PeFxError` where `target_parameters` name a tied weight, which PEFT would pass over, since it is no parameter.

    >>> check_targets(nn.Linear(2, 2), ["weight"])
    """
    for full, _, _, weight in tied_weights_in(model):
        if any(f".{full}".endswith(f".{parameter}") for parameter in parameters):
            raise PeFxError(
                f"{full} ← {weight.text} is no parameter, as target_parameters must be: name its module in target_modules, or take "
                "pe_fx.untie(model)"
            )


def _is_copy(module: nn.Module, original: nn.Module) -> bool:
    if module is original or type(module) is not type(original):
        return False
    new, old = dict(module.named_parameters()), dict(original.named_parameters())
    return new.keys() == old.keys() and all(
        new[name].shape == old[name].shape and (new[name].is_meta or torch.equal(new[name], old[name])) for name in new
    )


def _sources(weights: list[TiedWeight]) -> list[Tensor]:
    parameters = [source._parameters.get(name) for weight in weights for source, name in weight.sources]
    return [parameter for parameter in parameters if parameter is not None]


@contextmanager
def _sealed(weights: list[TiedWeight]) -> Iterator[None]:
    """Refuses to write to the sources of ties, and to what a tied weight was put together in when it was read."""
    storages: weakref.WeakSet[UntypedStorage] = weakref.WeakSet(source.untyped_storage() for source in _sources(weights))

    def refuse(written: object) -> None:
        if isinstance(written, Tensor) and written.untyped_storage() in storages:
            raise PeFxError(
                "this adapter would rewrite the weight of a layer that it is added to (to start from a part of it, as PiSSA does), and "
                "that weight is in a tie: the other use would change, too. Initialise it otherwise, leave the layers out that are in a "
                "tie (pe_fx.outside_ties tells), or take pe_fx.untie(model)"
            )

    def noting(assemble: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*parts: Tensor | None) -> Tensor:
            read = assemble(*parts)
            storages.add(read.untyped_storage())
            return read

        return noted

    before = [weight.assemble for weight in weights]
    for weight in weights:
        weight.assemble = noting(weight.assemble)
    try:
        with _Operations(refuse), _Attributes(refuse):
            yield
    finally:
        for weight, assemble in zip(weights, before, strict=True):
            weight.assemble = assemble


class _Operations(TorchDispatchMode):
    """Shows what operations write to."""

    def __init__(self, written: Callable[[object], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written = written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = func._schema.arguments
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | (kwargs or {})
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written(given.get(argument.name))
        return func(*args, **(kwargs or {}))


class _Attributes(TorchFunctionMode):
    """Shows whose data is set, which is no operation."""

    def __init__(self, written: Callable[[object], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written = written

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            self.written(args[0])
        return func(*args, **(kwargs or {}))


def _injected(inject: Callable[..., None], self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Adds adapters, or leaves the model as it was."""
    check_targets(model, getattr(self.peft_config[adapter_name], "target_parameters", None) or ())
    weights = [weight for _, _, _, weight in tied_weights_in(model)]
    children = [(module, dict(module._modules)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if not any(isinstance(module, BaseTunerLayer) for module, _ in children):
        for source in _sources(weights):
            source.requires_grad_(False)  # as PEFT does next, by then maybe to a tied weight, which is no leaf
    try:
        with _sealed(weights):
            inject(self, model, adapter_name, *args, **kwargs)
        check_copies(model)
    except Exception:
        for module, before in children:
            module._modules.clear()
            module._modules.update(before)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def _allowed(allow: Callable[..., None], self: BaseTuner) -> None:
    """Before the first layer is merged."""
    for name, layer in self.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            check_merge(layer, name)
    allow(self)


def _merged(merge: Callable[..., None], self: BaseTunerLayer, *args: Any, **kwargs: Any) -> None:
    """By hand, or by a layer that merges in its forward."""
    check_merge(self)
    merge(self, *args, **kwargs)


def _replaced(
    replace: Callable[..., None], self: BaseTuner, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
) -> None:
    """PEFT sets the weight of a layer that it lays bare to that layer's weight."""
    if isinstance(new_module, Tied) and isinstance(child, BaseTunerLayer) and new_module is child.get_base_layer():
        setattr(parent, child_name, new_module)
    else:
        replace(self, parent, child_name, new_module, child)


def _wrap(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Puts `wrapper` around every definition of a method, in a class and in those derived from it."""
    method = vars(cls).get(name)
    if method is not None:
        setattr(cls, name, functools.wraps(method)(lambda *args, **kwargs: wrapper(method, *args, **kwargs)))
    derived: type
    for derived in cls.__subclasses__():
        _wrap(derived, name, wrapper)


_wrap(BaseTuner, "inject_adapter", _injected)
_wrap(BaseTuner, "_replace_module", _replaced)
_wrap(BaseTuner, "_check_merge_allowed", _allowed)
_wrap(BaseTunerLayer, "merge", _merged)
