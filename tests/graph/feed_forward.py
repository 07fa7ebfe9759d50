"""The feed-forward that the tests of capture write their models around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import Net, linear
from torch import Tensor

X = torch.randn(3, 5, 8)
TIE = "fc2.weight ← fc1.weightᵀ"


def mlp(forward: Callable[..., Any], **members: Any) -> Net:
    return Net(forward, fc1=linear(8, 16), fc2=linear(16, 8), **members)


def plain(m: Net, x: Tensor) -> Tensor:
    return m.fc2(m.fc1(x).relu())
