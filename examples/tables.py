"""Tables, in CSV files and in Markdown, for the scripts beside this file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path


def rows_of(path: Path) -> list[dict[str, str]]:
    """What a CSV file holds, nothing where there is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """
    >>> print(markdown(("model", "step"), [("gpt2", "0.93")]))
    | model | step |
    | --- | --- |
    | gpt2 | 0.93 |
    """
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))
