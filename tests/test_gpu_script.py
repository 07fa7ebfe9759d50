"""What `examples/gpu.py` decides without a GPU; CI runs all of it with `--dry-run`."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
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
        ("tests.csv", "test,outcome\nt::one,passed\n", "tests", False),
    ],
)
def test_a_second_call_leaves_out_what_is_there(
    name: str, text: str, step: str, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from gpu import is_done

    (tmp_path / name).write_text(text, encoding="utf-8")
    assert is_done(step, tmp_path) is done


def test_a_row_for_each_test_as_it_ends(tmp_path: Path) -> None:
    """A run that is cut off loses no test, and the next one goes on."""
    (tmp_path / "tested.txt").write_text("test_it.py::test_a", encoding="utf-8")
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): pass\ndef test_c(): assert not 'a reason'\n", encoding="utf-8")
    paths = {"PYTHONPATH": str(EXAMPLES), "PE_FX_TESTS": str(tmp_path / "tests.csv"), "PE_FX_TESTED": str(tmp_path / "tested.txt")}
    command = [sys.executable, "-m", "pytest", "-p", "gpu_tests", "-p", "no:cacheprovider", "-p", "no:xdist", "test_it.py"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run(command, cwd=tmp_path, env=inherited | paths, capture_output=True, check=False)
    with (tmp_path / "tests.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["test"], row["outcome"]) for row in rows] == [("test_it.py::test_b", "passed"), ("test_it.py::test_c", "failed")]
    assert "a reason" in rows[1]["message"]
