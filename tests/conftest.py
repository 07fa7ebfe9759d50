from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
torch.manual_seed(0)  # for what test modules draw while they are imported


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
