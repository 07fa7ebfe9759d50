"""examples/accuracy.py: a run is a row, the same run gives the same row, and what is done is not done again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    import accuracy

    return accuracy


@pytest.mark.parametrize(("task", "variant"), [("vit", "tied, signed"), ("resnet", "tied, expand"), ("lm", "pretrained, signed, mean")])
def test_a_run(accuracy: Any, task: str, variant: str) -> None:
    run = accuracy.Run(task, variant, 20, 0)
    row = accuracy.work(run, "cpu")
    assert set(row) == set(accuracy.COLUMNS)
    assert int(row["params"]) < int(row["params_dense"])
    assert len(json.loads(row["curve"])) == (4 if variant.startswith("pretrained") else 10)
    assert bool(row["before"]) == variant.startswith("pretrained")


def test_a_run_is_reproducible(accuracy: Any) -> None:
    rows = [accuracy.work(accuracy.Run("vit", "tied", 20, seed), "cpu") for seed in (0, 0, 1)]
    assert rows[0] == rows[1]
    assert rows[0]["curve"] != rows[2]["curve"]


def test_training_learns(accuracy: Any) -> None:
    scores = json.loads(accuracy.work(accuracy.Run("resnet", "tied, signed", 40, 0), "cpu")["curve"])
    assert scores[-1] > 50 > scores[0]


def test_what_is_done_is_not_done_again(accuracy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        """Runs in this process what a pool would run elsewhere."""

        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def submit(self, work: Any, run: Any, device: str) -> Any:
            ran.append(run.variant)
            future = accuracy.Future()
            future.set_result(dict.fromkeys(accuracy.COLUMNS, "") | dict(zip(accuracy.KEY, run.key, strict=True)))
            return future

    ran: list[str] = []
    monkeypatch.setattr(accuracy, "ProcessPoolExecutor", Here)
    path = tmp_path / "rows.csv"
    accuracy.run_all([accuracy.Run("vit", "dense", 10, 0)], path, "cpu", 1)
    accuracy.run_all([accuracy.Run("vit", "dense", 10, 0), accuracy.Run("vit", "tied", 10, 0)], path, "cpu", 1)
    assert ran == ["dense", "tied"]
    assert [row["variant"] for row in accuracy.read_rows(path)] == ["dense", "tied"]


def test_summary_and_plot(accuracy: Any, tmp_path: Path) -> None:
    import accuracy_summary

    with (EXAMPLES / "accuracy.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    text = accuracy_summary.summary(rows)
    assert text.count("| dense |") == len({row["task"] for row in rows})
    accuracy_summary.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
