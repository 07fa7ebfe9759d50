"""Adapters of PEFT on tied models: `import pe_fx.peft`, and what would cut a tie, or merge into both uses of one W, is an error."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from pe_fx.errors import PeFxError
from pe_fx.tied.weight import tied_weights_in


def check_merge(tuner: BaseTuner) -> None:
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
    adapter is added to one use alone. Not seen is `layer.merge()`, called on one layer by hand.
    """
    shared = _in_ties(tuner.model)
    for name, layer in tuner.model.named_modules():
        if isinstance(layer, BaseTunerLayer) and id(layer.get_base_layer()) in shared:
            raise PeFxError(
                f"the adapter of {name} cannot be merged, since its weight is tied: merged, it would change the other use, too. "
                "pe_fx.untie(model).merge_and_unload() gives a dense model that computes the same"
            )


def check_copies(model: nn.Module) -> None:
    """Raises `PeFxError` where PEFT trains a copy of a module (`modules_to_save`) whose weight is one of a tie: the other stays behind.

    >>> check_copies(nn.Linear(2, 2))
    """
    shared = _in_ties(model)
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and any(id(inner) in shared for inner in wrapper.original_module.modules()):
            raise PeFxError(
                f"{name} is in modules_to_save, and its weight in a tie: the copy that is trained would not be tied. "
                "Leave it out, or take pe_fx.untie(model)"
            )


def _in_ties(model: nn.Module) -> set[int]:
    """The modules that hold a tied weight or the source of one."""
    found = set()
    for _, module, _, weight in tied_weights_in(model):
        found |= {id(module), *(id(source) for source, _ in weight.sources)}
    return found


_check_merge_allowed = BaseTuner._check_merge_allowed


_inject_adapter = BaseTuner.inject_adapter


def _checked(self: BaseTuner) -> None:
    check_merge(self)
    _check_merge_allowed(self)


def _injected(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    _inject_adapter(self, model, *args, **kwargs)
    check_copies(model)


BaseTuner._check_merge_allowed = _checked
BaseTuner.inject_adapter = _injected
