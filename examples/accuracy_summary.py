"""The page and the plot of what `accuracy.py` measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from accuracy import Row
from accuracy_tasks import TASKS
from matplotlib.figure import Figure
from scipy import stats
from tables import markdown

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

INTRODUCTION = """\
# What tying costs in accuracy

This page is written by `python examples/accuracy.py --summary` from [accuracy.csv](accuracy.csv), as the plot is.

`python examples/accuracy.py` trains dense and tied models from the same start, on the same batches, with one recipe a task; each run is
a row. `lm` is a GPT-style model of bytes (width 96, 4 blocks) on the text of Python's standard library, `vit` and `resnet` are small
models on scikit-learn's digits. One width, one recipe for all: the numbers are a direction, not a promise. The paper reports 78.8 % tied
against 79.9 % dense (DeiT-S, ImageNet-1k, 600 epochs).

![Score by training length: dense, tied and signed ties](accuracy.png)"""

LEARNED = """\
## In short, for these small models and short trainings

- A plain tie of the FFN is what costs, 0.106 nats per byte after 300 steps; signed, it costs 0.019. Tied attention alone costs nothing that
  five seeds could tell.
- All tied, the distance to dense after 300 and 1,000 steps is 0.097 ± 0.026 and 0.227 ± 0.057 for plain ties, 0.017 ± 0.016 and
  0.105 ± 0.008 for signed ones: signs close four fifths, then half of it. After 3,000 it is 0.049 and 0.033 (one seed).
- At equal parameters a wider net of signed ties (width 132 instead of 96, 1.9 times the multiply-adds) is better than the dense one at
  every length: by 0.045 ± 0.020 after 300 steps, by 0.039 after 1,000 (two seeds) and by 0.048 after 3,000 (one seed). With plain ties it
  is worse, by 0.036 ± 0.012 after 300.
- A dense net of half the depth, with as many parameters as the tied one and half its multiply-adds, was as good as signed ties after
  300 steps, better after 1,000 (1.672 against 1.734) and about as good after 3,000 (1.335 against 1.340); always better than plain ties.
- A dense model trained for 300 steps, then tied and trained for 60 more, does best as the mean of both matrices (`init="mean"`), signed;
  signed ties trained from the start are better; the first matrix alone (`init="keep"`) is lost at once (one seed).
- Since these runs the order P is alike in all blocks that have a W of their own (they share kernels then): five seeds of the signed
  variant after 300 steps came to 2.315 instead of 2.317, seed by seed 0.002 ± 0.007 less.
- Gains do not pay beside signs. One signed W for all blocks, a quarter of the parameters, beats plain ties after 300 steps.
- On digits, after 420 steps, no variant is worse than dense by more than three seeds can tell; `slice` and the deeper and wider signed ViTs
  start slowly, `expand` does not.

So: tie FFNs first, with `mix="signed"`, and give the parameters that this saves to a wider net where you can afford the multiply-adds; tie
attention, too; share a W between blocks where size counts above all. The plain tie is the default since it is the paper's."""

DIGITS = """\
## Handwritten digits

`python examples/train_digits.py` (scikit-learn's digits, 3 seeds, the run that drew [digits.png](digits.png); 22 November 2026, torch 2.15,
2 CPU cores; ± is the standard deviation over the seeds, one test image is 0.22 %):

| model | variant | parameters | optimizer bytes | test accuracy |
| --- | --- | --- | --- | --- |
| ViT | dense | 202,698 | 1,621,840 | 96.30 ± 1.61 % |
| ViT | tied | 104,394 (52 %) | 835,376 | 96.44 ± 0.44 % |
| ResNet | dense | 220,234 | 1,762,132 | 98.74 ± 0.26 % |
| ResNet | tied, `keep` | 176,202 (80 %) | 1,409,848 | 98.22 ± 0.22 % |
| ResNet | tied, `slice` | 124,234 (56 %) | 994,072 | 98.22 ± 0.44 % |
| ResNet | tied, `expand` | 131,338 (60 %) | 1,050,968 | 98.89 ± 0.22 % |"""


AT_SCALE = """\
## At scale

`python examples/at_scale.py` on an NVIDIA H200 (26 November 2026, torch 2.11, bf16): the same language model, width 384 and 8 blocks, 4,096
bytes a step of the source of all packages installed there; nats per byte of files held out. Every net of a table read the same batches. At
4,751 steps each variant has three learning rates, the small study's best divided by 4 and one step of 1.5 to either side; at 12,751 steps
and another seed, one or two of them. One seed each: differences below 0.005 or so decide nothing.

- With half of dense's parameters a signed tie is 0.004 and 0.012 behind it, and ahead of the rivals of its size: by 0.018 and 0.013 of a
  net half as deep (at half the multiply-adds), by 0.013 and 0.010 of one whose neighbouring blocks share all matrices.
- A wider signed net with 0.95 of dense's parameters is ahead of it by 0.008 and 0.011, at 1.8 times the multiply-adds.
- The best rate of a signed tie is 1.5 times dense's here, too; half as deep and shared in pairs, the highest rate tried was the best."""


def at_scale(rows: Sequence[Row]) -> str:
    """A table for each training length: the best score of each variant, and each rate's."""
    parts = [AT_SCALE]
    for steps in dict.fromkeys(row["steps"] for row in rows):
        own = [row for row in rows if row["steps"] == steps]
        dense = min(float(row["score"]) for row in own if row["variant"] == "dense")
        lines = []
        for variant in dict.fromkeys(row["variant"] for row in own):
            scores = {float(row["lr"]): float(row["score"]) for row in own if row["variant"] == variant}
            params = next(row["params"] for row in own if row["variant"] == variant)
            rates = ", ".join(f"{score:.4f} at {lr:.4f}" for lr, score in sorted(scores.items()))
            lines.append((variant, f"{int(params):,}", f"{min(scores.values()):.4f}", f"{min(scores.values()) - dense:+.4f}", rates))
        seeds = " and ".join(sorted({row["seed"] for row in own}))
        parts += [
            f"{int(steps):,} steps, seed {seeds}:",
            markdown(("variant", "parameters", "best", "to dense", "by learning rate"), lines),
        ]
    return "\n\n".join(parts)


def page(rows: Sequence[Row], scaled: Sequence[Row]) -> str:
    return "\n\n".join((INTRODUCTION, LEARNED, at_scale(scaled), "## Every variant", summary(rows), DIGITS)) + "\n"


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
    title = f"`{name}`{f', scale {scale}' if scale > 1 else ''}: {TASKS[name].unit} after so many steps, the mean of (n) seeds; then the"
    lines = []
    scores = {(row["variant"], int(row["steps"]), row["seed"]): float(row["score"]) for row in rows}
    for variant in TASKS[name].variants:
        own = [row for row in rows if row["variant"] == variant.name]
        base = "pretrained, dense" if variant.pretrained else "dense"
        if own:
            cells = [_cell(scores, variant.name, base, length) for length in lengths]
            before = [float(row["before"]) for row in own if row["before"]]
            note = f" (before: {statistics.mean(before):.3f})" if before else ""
            lines.append((variant.name + note, f"{int(own[0]['params']):,}", *cells))
    header = ("variant", "parameters", *(f"{length:,}" for length in lengths))
    return f"{title}\nmean difference to dense, seed by seed, ± its 95 % interval:\n\n{markdown(header, lines)}"


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
