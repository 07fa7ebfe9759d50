"""How Dynamo reads a tied weight: as the module itself does, and with little to check before each call."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import pe_fx
from pe_fx.errors import PeFxError
from pe_fx.tied.weight import Tied

X = torch.randn(3, 8)
IMAGE = torch.randn(1, 3, 8, 8)


def mlp(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16, **options), nn.GELU(), nn.Linear(16, 8, **options))


def vit() -> nn.Module:
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=4)


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.parametrize("options", [{}, {"mix": "signed", "gain": 0.5}, {"mix": "fitted"}, {"share": ("mlp", "attention")}], ids=str)
def test_what_is_compiled_reads_the_same(options: dict[str, Any]) -> None:
    """Whole weights and parts, in one order or another; the second sources of shared ones."""
    tied = pe_fx.transform(vit(), IMAGE, **options)
    assert torch.equal(compiled(tied)(IMAGE), tied(IMAGE))


def test_without_another_parameter_in_the_module() -> None:
    tied = pe_fx.transform(mlp(bias=False), X)
    assert torch.equal(compiled(tied)(X), tied(X))


def test_a_source_that_is_replaced_is_followed() -> None:
    tied = pe_fx.transform(mlp(), X)
    run = compiled(tied)
    run(X)
    tied[0].weight = nn.Parameter(torch.randn(16, 8))
    assert torch.equal(run(X), tied(X))


def test_a_copy_reads_its_own_source() -> None:
    tied = pe_fx.transform(mlp(), X)
    run = compiled(tied)
    run(X)
    copied = copy.deepcopy(tied)
    with torch.no_grad():
        copied[0].weight.zero_()
    assert torch.equal(torch.compile(copied, backend="eager", fullgraph=True)(X), copied(X))
    assert not torch.equal(run(X), copied(X))


def test_a_source_that_is_gone_is_refused() -> None:
    tied = pe_fx.transform(mlp(), X)
    run = torch.compile(tied, backend="eager")
    run(X)
    weight = tied[0]._parameters.pop("weight")
    tied[0].weight = weight.detach().clone()
    with pytest.raises(PeFxError, match="is no parameter any more"):
        run(X)


def test_little_is_checked() -> None:
    """Before each call, of a tied weight: where it is, how it is read, and that it and its source are in their places."""
    tied = pe_fx.transform(vit(), IMAGE)
    compiled(tied)(IMAGE)
    (entry,) = _debug_get_cache_entry_list(tied.forward.__code__)
    found = re.findall(r"source=(\S+), ", str(entry.guard_manager))
    ties = sum(len(module.tied_weights) for module in tied.modules() if isinstance(module, Tied))
    assert 4 * ties <= sum("tied_weights" in source for source in found) <= 6 * ties
