"""Where the source of a tied weight is: on its layer's device, on another one, or kept elsewhere while its own module does not run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def placed(parameter: Tensor, module: nn.Module, attribute: str, beside: Tensor | None) -> Tensor | None:
    """A source's parameter, where the tied layer's own parameters are (`beside`, one of them); None where nothing says what it holds.

    >>> layer = nn.Linear(2, 3)
    >>> placed(layer.weight, layer, "weight", layer.bias) is layer.weight
    True

    Hooks of accelerate (`cpu_offload`, `disk_offload`, `device_map`) keep a module's weights on the meta device while it does not run,
    those of diffusers (group offloading, leaf by leaf) put anything there: the source's own hook places it for this read.
    """
    hooks = _hooks(module, parameter)
    for hook in hooks:
        hook.pre_forward(module)
    if hooks:
        given = module._parameters[attribute]
        assert given is not None
        parameter = given.view_as(given)  # keeps what the hook takes away again
    for hook in reversed(hooks):
        hook.post_forward(module, None)
    if parameter.is_meta and beside is not None and not beside.is_meta:
        return None
    return parameter if beside is None or beside.device == parameter.device else parameter.to(beside.device)


def _hooks(module: nn.Module, parameter: Tensor) -> list[Any]:
    """Those that place a module's weights before it runs, by the attributes in which the two libraries keep them."""
    own = vars(module)
    if parameter.is_meta and "_hf_hook" in own:
        return [own["_hf_hook"]]
    return list(own["_diffusers_hook"].hooks.values()) if "_diffusers_hook" in own else []
