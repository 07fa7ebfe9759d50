from __future__ import annotations

import pytest
import torch

torch.manual_seed(0)  # for what test modules draw while they are imported


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
