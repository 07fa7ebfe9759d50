"""examples/accuracy.py: a run is a row, the same run gives the same row; rates are searched until the best one has worse neighbours."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    import accuracy

    return accuracy


@pytest.mark.parametrize(
    ("task", "variant", "params"),
    [
        ("vit", "tied across blocks, signed", 103_882),
        ("vit", "tied, signed, pairs share", 54_730),
        ("vit", "tied, signed, corrected by rank 8", 118_218),
        ("resnet", "tied, expand", 143_434),
    ],
)
def test_a_run(accuracy: Any, task: str, variant: str, params: int) -> None:
    row = accuracy.work(accuracy.Run(task, variant, 0, 20, 0))
    assert set(row) == set(accuracy.COLUMNS)
    assert int(row["params"]) == params
    assert len(json.loads(row["curve"])) == 10


def test_a_run_is_reproducible(accuracy: Any) -> None:
    rows = [accuracy.work(accuracy.Run("vit", "tied", 0, 20, seed)) for seed in (0, 0, 1)]
    assert rows[0] == rows[1]
    assert rows[0]["curve"] != rows[2]["curve"]


def test_training_learns(accuracy: Any) -> None:
    scores = json.loads(accuracy.work(accuracy.Run("resnet", "tied, signed", 0, 40, 0))["curve"])
    assert scores[-1] > 50 > scores[0]


@pytest.mark.parametrize(("task", "name"), [("vit", "tied, signed, tied weights' rate x 1.5"), ("resnet", "tied, slice")])
def test_a_seat_takes_the_same_steps(accuracy: Any, task: str, name: str) -> None:
    """Run after run, in a net that has trained before."""
    from accuracy_gpu import side_by_side

    study = accuracy.Study(task, (accuracy.variant_of(task, name),), (20,), 2, 1)
    runs = [accuracy.Run(task, name, 0, 20, seed) for seed in (0, 1)]
    done: list[Any] = []
    run_some = side_by_side([study], "cpu", 1, 1000)
    done.extend(run_some(lambda: [run for run in runs if run.key not in {tuple(row[name] for name in accuracy.KEY) for row in done}]))
    assert sorted(done, key=lambda row: row["seed"]) == [accuracy.work(run) for run in runs]


def test_across_blocks(accuracy: Any) -> None:
    model = accuracy.start_of("vit", "tied across blocks", 1, 0)
    for i, block in enumerate(model.blocks):
        torch.testing.assert_close(block.mlp.fc2.weight, model.blocks[(i + 1) % 4].mlp.fc1.weight.t())


def rows_by(accuracy: Any, study: Any, score: Callable[[Any], float], most: int = 200) -> list[dict[str, str]]:
    """What a study asks for, one run after the other."""
    rows: list[dict[str, str]] = []
    while wanted := study.wanted(rows):
        assert len(rows) < most
        rows.append(dict(zip(accuracy.KEY, wanted[0].key, strict=True)) | {"score": str(score(wanted[0]))})
    return rows


@pytest.mark.parametrize("best", [-9, -1, 0, 5, 8])
def test_the_best_rate_has_worse_neighbours(accuracy: Any, best: int) -> None:
    study = accuracy.Study("lm", (accuracy.variant_of("lm", "dense"),), (10,), 3, 2)
    rows = rows_by(accuracy, study, lambda run: abs(run.place - best))
    reported = [row for row in rows if int(row["seed"]) < accuracy.SEARCHING]
    assert {row["lr"] for row in reported} == {accuracy.Run("lm", "dense", best, 10, 0).key[2]}
    assert [row["seed"] for row in reported] == ["0", "1", "2"]
    tried = {float(row["lr"]) for row in rows}
    assert min(tried) < float(reported[0]["lr"]) < max(tried)


def test_a_run_that_diverges_is_the_worst(accuracy: Any) -> None:
    study = accuracy.Study("vit", (accuracy.variant_of("vit", "dense"),), (10,), 1, 1)
    rows = rows_by(accuracy, study, lambda run: float("nan") if run.place > 0 else 50 + run.place)
    assert rows[-1]["lr"] == accuracy.Run("vit", "dense", 0, 10, 0).key[2]


def test_what_is_done_is_not_done_again(accuracy: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    study = accuracy.Study("vit", (accuracy.variant_of("vit", "dense"),), (10,), 1, 1)
    ran: list[Any] = []

    def run_some(wanted: Any, most: int) -> Any:
        while (runs := wanted()) and len(ran) < most:
            ran.append(runs[0])
            row = dict.fromkeys(accuracy.COLUMNS, "") | dict(zip(accuracy.KEY, runs[0].key, strict=True))
            yield row | {"score": str(-abs(runs[0].place))}

    accuracy.run_all([study], path, lambda wanted: run_some(wanted, 3))
    accuracy.run_all([study], path, lambda wanted: run_some(wanted, 100))
    assert len(ran) == len(set(ran)) == len(accuracy.read_rows(path)) == 6


def test_in_processes(accuracy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    command = ["accuracy.py", "--tasks", "vit", "--variants", "dense", "--steps", "10", "--seeds", "1", "--searching", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", "--out", str(out)])
    accuracy.main()
    seeds = [row["seed"] for row in accuracy.read_rows(out)]
    assert seeds[-1] == "0"
    assert len(seeds) >= 6
