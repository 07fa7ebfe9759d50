"""The parameter counts of the paper, and of the authors' code."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from torch import nn

import pe_fx

STAGES_3_AND_4 = ["layer3.*", "layer4.*"]
IMAGES = torch.randn(2, 3, 64, 64)

# options, all parameters
RESNET50: list[tuple[dict[str, Any], int]] = [
    ({"rules": ()}, 25_557_032),
    ({"entry": "slice"}, 14_813_736),
    ({"entry": "slice", "include": STAGES_3_AND_4}, 15_458_344),
    ({"entry": "keep"}, 18_282_536),
    ({"entry": "keep", "include": STAGES_3_AND_4}, 18_741_288),
    ({"entry": "expand"}, 14_882_152),
    ({"entry": "expand", "include": STAGES_3_AND_4}, 15_515_176),
    ({"share": ()}, 21_919_784),
]


@functools.cache
def built(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_count(model: nn.Module, inputs: torch.Tensor, expected: int, without_classifier: int, **options: Any) -> None:
    plan = pe_fx.plan(model, inputs, **options)
    tied = pe_fx.apply(model, plan)
    assert plan.params_before == count(model)
    assert plan.params_after == expected
    assert count(tied) == expected
    assert expected - count(tied.get_classifier()) == without_classifier
    assert tied.eval()(inputs).shape == (len(inputs), 1000)


@pytest.mark.parametrize(("options", "expected"), RESNET50, ids=lambda value: str(value).replace("'", ""))
def test_resnet50(options: dict[str, Any], expected: int) -> None:
    assert_count(built("resnet50"), IMAGES, expected, expected - 2_049_000, **options)


def test_deit_small() -> None:
    model = built("deit_small_patch16_224")
    assert count(model) == 22_050_664
    assert_count(model, torch.randn(1, 3, 224, 224), 11_433_832, 11_048_832)
