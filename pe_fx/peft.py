"""Adapters of PEFT on tied models: `import pe_fx.peft`, and a merge that would be wrong is an error."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from pe_fx.errors import PeFxError
from pe_fx.tied import Tied


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
    tied = [module for module in tuner.model.modules() if isinstance(module, Tied)]
    shared = {id(module) for module in tied}
    shared |= {id(source) for module in tied for weight in module.tied_weights.values() for source, _ in weight.sources}
    for name, layer in tuner.model.named_modules():
        if isinstance(layer, BaseTunerLayer) and id(layer.get_base_layer()) in shared:
            raise PeFxError(
                f"the adapter of {name} cannot be merged, since its weight is tied: merged, it would change the other use, too. "
                "pe_fx.untie(model).merge_and_unload() gives a dense model that computes the same"
            )


_check_merge_allowed = BaseTuner._check_merge_allowed


def _checked(self: BaseTuner) -> None:
    check_merge(self)
    _check_merge_allowed(self)


BaseTuner._check_merge_allowed = _checked
