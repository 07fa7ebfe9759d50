"""Whether a module is one side of a tie: what tools that change layer by layer must leave alone."""

from __future__ import annotations

from torch import nn

from pe_fx.tied.weight import Tied, living


def in_tie(module: nn.Module) -> bool:
    """Whether one of the module's own weights is tied, or is what another is tied to.

    >>> import pe_fx
    >>> tied = pe_fx.transform(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 4)))
    >>> [in_tie(layer) for layer in tied]
    [True, False, True, False]

    A module that shares its parameter with such a source counts as one.
    """
    if isinstance(module, Tied):
        return True
    own = {id(parameter) for parameter in module._parameters.values() if parameter is not None}
    weights = [weight for tied in list(living) if isinstance(tied, Tied) for weight in tied.tied_weights.values()]
    return any(source is module or id(source._parameters.get(name)) in own for weight in weights for source, name in weight.sources)


def outside_ties(module: nn.Module, name: str = "") -> bool:
    """Whether a layer can be exchanged or converted by itself. A filter for tools that go from layer to layer, such as torchao's.

    >>> import pe_fx
    >>> tied = pe_fx.transform(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 4)))
    >>> [name for name, layer in tied.named_modules() if isinstance(layer, nn.Linear) and pe_fx.outside_ties(layer, name)]
    ['3']

    `convert_to_float8_training(tied, module_filter_fn=pe_fx.outside_ties)` converts all other layers.
    """
    return not any(map(in_tie, module.modules()))
