"""Tests run on the CPU, whatever else a machine has; `PE_FX_DEVICE=cuda pytest tests/compiled` on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if device := os.environ.get("PE_FX_DEVICE"):
    torch.set_default_device(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
torch.manual_seed(0)  # for what test modules draw while they are imported


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
