"""What `examples/gpu.py` decides without a GPU; CI runs all of it with `--dry-run`."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "text", "step", "done"),
    [
        ("once.csv", "kind,us\nmlp,1.0\n", "once", True),
        ("once.csv", "kind,us\n", "once", False),
        ("once.csv", "kind,us\nmlp,1.0\n", "tune", False),
        ("learning.csv", "variant\ndense\n", "learn", False),
        ("bench.csv", "model\ngpt2\n", "bench", False),
    ],
)
def test_a_second_call_leaves_out_what_is_there(
    name: str, text: str, step: str, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from gpu import is_done

    (tmp_path / name).write_text(text, encoding="utf-8")
    assert is_done(step, tmp_path) is done
