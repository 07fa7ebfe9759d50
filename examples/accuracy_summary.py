"""Tables and the plot of what `accuracy.py` measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from accuracy import TASKS, Row
from matplotlib.figure import Figure
from scipy import stats

COLORS = {
    "dense": "black",
    "dense, half as deep": "gray",
    "tied": "tab:red",
    "tied, signed": "tab:blue",
    "tied, signed, wider": "tab:cyan",
    "FFN only, signed": "tab:green",
    "tied, expand": "tab:orange",
    "tied, expand, signed": "tab:purple",
}


def summary(rows: Sequence[Row]) -> str:
    """For each task and scale a table in Markdown: a line for each variant, a column for each training length."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], int(row["scale"])), []).append(row)
    return "\n\n".join(
        _table(name, scale, groups[name, scale]) for name, scale in sorted(groups, key=lambda key: (list(TASKS).index(key[0]), key[1]))
    )


def _table(name: str, scale: int, rows: Sequence[Row]) -> str:
    lengths = sorted({int(row["steps"]) for row in rows})
    lines = [
        f"`{name}`{f', scale {scale}' if scale > 1 else ''}: {TASKS[name].unit} after so many steps, the mean of (n) seeds; then the mean",
        "difference to dense, seed by seed, ± its 95 % interval:",
        "",
        "| variant | parameters | " + " | ".join(f"{length:,}" for length in lengths) + " |",
        "| --- " * (len(lengths) + 2) + "|",
    ]
    scores = {(row["variant"], int(row["steps"]), row["seed"]): float(row["score"]) for row in rows}
    for variant in TASKS[name].variants:
        own = [row for row in rows if row["variant"] == variant.name]
        base = "pretrained, dense" if variant.pretrained else "dense"
        if own:
            cells = [_cell(scores, variant.name, base, length) for length in lengths]
            before = [float(row["before"]) for row in own if row["before"]]
            note = f" (before: {statistics.mean(before):.3f})" if before else ""
            lines.append(f"| {variant.name}{note} | {int(own[0]['params']):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(scores: Mapping[tuple[str, int, str], float], variant: str, base: str, length: int) -> str:
    own = {seed: score for (name, steps, seed), score in scores.items() if (name, steps) == (variant, length)}
    if not own:
        return ""
    mean = f"{statistics.mean(own.values()):.3f}"
    pairs = [score - scores[base, length, seed] for seed, score in own.items() if (base, length, seed) in scores]
    return f"{mean} ({len(own)})" if variant == base or not pairs else f"{mean} ({len(own)}); {interval(pairs)}"


def interval(values: Sequence[float]) -> str:
    """The mean and half its 95 % interval, by Student's t.

    >>> interval([1.0, 2.0, 3.0]), interval([-1.5])
    ('+2.000 ± 2.484', '-1.500')
    """
    mean, n = statistics.mean(values), len(values)
    half = "" if n < 2 else f" ± {stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n):.3f}"
    return f"{mean:+.3f}{half}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Score by training length, one panel a task; every run is a point, the line goes through the means."""
    rows = [row for row in rows if row["scale"] == "1"]
    names = [name for name in TASKS if any(row["task"] == name for row in rows)]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for variant, color in COLORS.items():
            own = [(int(row["steps"]), float(row["score"])) for row in rows if (row["task"], row["variant"]) == (name, variant)]
            if own:
                lengths = sorted({length for length, _ in own})
                means = [statistics.mean(score for length, score in own if length == wanted) for wanted in lengths]
                axes.plot(lengths, means, color=color, label=variant, linestyle="--" if variant.startswith("dense") else "-")
                axes.plot(*zip(*own, strict=True), ".", color=color, alpha=0.5)
        axes.set(title=name, xlabel="training steps", ylabel=TASKS[name].unit, xscale="log")
        lengths = sorted({int(row["steps"]) for row in rows if row["task"] == name})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
