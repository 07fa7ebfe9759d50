"""examples/convert.py: from a dense model to a tied checkpoint, in a run of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pe_fx import checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    import convert

    return convert


def test_it_ends_with_a_tied_checkpoint(convert: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tied.safetensors"
    convert.main(["--steps", "20", "--further", "10", "--calibration", "2", "--out", str(file)])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*convert.STARTS, convert.DENSE))
    assert (tmp_path / "tied.png").stat().st_size > 10_000
    plan = checkpoint.read_plan(file)
    assert plan is not None
    tied = checkpoint.load(file, convert.TASKS["vit"].build())
    assert convert.count(tied) == plan.params_after < plan.params_before


def test_from_a_file(convert: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    checkpoint.save(convert.TASKS["vit"].build(), tmp_path / "dense.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "dense.safetensors"), "--further", "10", "--calibration", "1"]
    convert.main([*arguments, "--out", str(tmp_path / "tied.safetensors")])
    assert checkpoint.read_plan(tmp_path / "tied.safetensors") is not None
