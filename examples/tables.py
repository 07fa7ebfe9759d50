"""Tables, in CSV files and in Markdown, for the scripts beside this file."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def rows_of(path: Path) -> list[dict[str, str]]:
    """What a CSV file holds, nothing where there is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, *rows: Mapping[str, Any]) -> None:
    """Adds rows of the same columns to a CSV file, which begins with the first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def machine(device: str) -> str:
    """What a device is called in the tables."""
    import torch

    threads = torch.get_num_threads()
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} core{'s' * (threads > 1)}"


def made_by(device: str) -> dict[str, str]:
    """The last columns of a row: where and when it was measured."""
    import torch

    return {"card": machine(device), "versions": f"torch {torch.__version__}", "date": datetime.date.today().isoformat()}


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """
    >>> print(markdown(("model", "step"), [("gpt2", "0.93")]))
    | model | step |
    | --- | --- |
    | gpt2 | 0.93 |
    """
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))
