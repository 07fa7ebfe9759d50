"""Where a parameter has gone that a tie reads."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def whereabouts(module: nn.Module, name: str) -> str:
    """What became of a module's parameter, and what to do about it, as the end of a sentence.

    >>> print(whereabouts(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "weight"))
    is parametrized: remove that, and parametrize pe_fx.untie(model)
    """
    if parametrize.is_parametrized(module, name):
        return "is parametrized: remove that, and parametrize pe_fx.untie(model)"
    made_of = " and ".join(other for other in (*module._parameters, *module._buffers) if other.startswith(f"{name}_"))
    if made_of:
        return f"is computed from {made_of}, as under pruning, weight_norm or spectral_norm: remove that, and do it to pe_fx.untie(model)"
    return (
        "was taken out of it. FSDP1 does that unless use_orig_params=True, FSDP2 (pe_fx.distributed.fully_shard) does not; tools that put "
        "other layers in place of these do: take pe_fx.untie(model), or leave the layers in ties out (pe_fx.outside_ties)"
    )
