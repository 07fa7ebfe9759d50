"""A tied layer that is read through a copy made part by part: it follows the copy where its source is in it, else it is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import pe_fx
from pe_fx import PeFxError

X = torch.randn(6, 8)
REFUSED = "read by a copy of its module that was made part by part.*functional_call"


def mlp() -> nn.Module:
    return pe_fx.transform(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Linear(8, 3)), X)


class Values(nn.Module):
    """Attention whose output layer has another width: all that can be tied is in the one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


def replica(module: nn.Module) -> nn.Module:
    """As nn.DataParallel makes one: a copy of the dict, and tensors in place of parameters."""
    other: Any = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        other._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        setattr(other, name, None if parameter is None else 2 * parameter)
    return other


def clone(module: nn.Module) -> nn.Module:
    """As libraries for meta-learning make one: other tensors among the parameters."""
    other: Any = module.__new__(type(module))
    other.__dict__ = module.__dict__.copy()
    other._parameters = {name: parameter if parameter is None else 2 * parameter for name, parameter in module._parameters.items()}
    other._modules = {name: child if child is None else clone(child) for name, child in module._modules.items()}
    return other


def with_own_parameters(module: nn.Module) -> nn.Module:
    """By copy.copy, module for module, then other parameters."""
    other = copy.copy(module)
    other._modules = {name: None if child is None else with_own_parameters(child) for name, child in module._modules.items()}
    other._parameters = {name: p if p is None else nn.Parameter(2 * p.detach()) for name, p in module._parameters.items()}
    return other


WAYS = [replica, clone, with_own_parameters]
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
def test_a_source_in_another_module_is_refused(way: Any) -> None:
    with pytest.raises(PeFxError, match=REFUSED):
        way(mlp())(X)


@every_way
@pytest.mark.parametrize("options", [{}, {"mix": "signed"}, {"gain": 0.5}], ids=str)
def test_a_source_in_the_module_itself_is_the_copys(way: Any, options: dict[str, Any]) -> None:
    tied = pe_fx.transform(Values(), X[:, None], **options)
    assert next(name for name, _ in tied.named_parameters()) == "qkv.weight_kept"
    expected = copy.deepcopy(tied)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(way(tied)(X[:, None]), expected(X[:, None]))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_compiled_copy_is_refused_too(compiled: bool) -> None:
    model = clone(mlp())
    with pytest.raises(Exception, match="made part by part"):
        (torch.compile(model, backend="eager") if compiled else model)(X)


def test_copies_that_are_right() -> None:
    tied = mlp()
    whole = copy.deepcopy(tied)
    with torch.no_grad():
        whole[0].weight.zero_()
    assert not whole[2].weight.any()
    assert tied[2].weight.any()
    shallow = copy.copy(tied[2])  # the same parameters, as any module's
    assert torch.equal(shallow.weight, tied[2].weight)


def test_functional_call_and_vmap_follow_the_parameters() -> None:
    tied = mlp()
    doubled = {name: 2 * parameter for name, parameter in tied.named_parameters()}
    expected = copy.deepcopy(tied)
    expected.load_state_dict(doubled)
    torch.testing.assert_close(functional_call(tied, doubled, X), expected(X))
    models = [tied, expected]
    parameters, buffers = torch.func.stack_module_state(models)
    together = torch.vmap(lambda p, b: functional_call(tied, (p, b), X))(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([model(X) for model in models]))


def test_ties_go_with_the_last_reference_to_a_model() -> None:
    tied = mlp()
    alive = weakref.ref(tied[2])
    gc.disable()
    try:
        del tied
        assert alive() is None  # no circle keeps its memory until the collector runs
    finally:
        gc.enable()
