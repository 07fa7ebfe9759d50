"""The page and the plot of what `accuracy.py` measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy import SEARCHING, Row
from accuracy_tasks import TASKS
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats
from tables import markdown

COLORS = {"dense": "black", "tied across": "tab:purple", "tied, signed": "tab:blue", "tied": "tab:red"}
"""Of variants whose names begin so."""

INTRODUCTION = """\
# What tying costs in accuracy

This page is written by `python examples/accuracy.py --summary` from [accuracy.csv](accuracy.csv), as the plots are.

`python examples/accuracy.py` trains dense and tied models, and their rivals, from the same start, on the same batches, each at a learning
rate of its own: with two seeds that are not reported rates are tried, a factor of 1.5 and then of its square root apart, until the best
has worse neighbours; then five other seeds run at that rate. `lm` is a GPT-style model of bytes (width 96, 4 blocks) on the text of
Python's standard library, `vit` and `resnet` are small models on scikit-learn's digits. The numbers are a direction, not a promise. The
paper reports 78.8 % tied against 79.9 % dense (DeiT-S, ImageNet-1k, 600 epochs).

![Loss by parameters and by multiply-adds, of each variant at each length](accuracy.png)"""

LEARNED = """\
## In short, for these small models and short trainings

All from `lm`, seed by seed, ± the 95 % interval of five seeds, where not said otherwise.

- **A tie wants a higher rate, for the whole net**: 1.5 times dense's (1.3e-2 beside 9.0e-3 at 1,000 and 3,000 steps). Raised for the tied
  matrices alone, by 2.25, it ends 0.040 ± 0.014 behind at 1,000; lowered for them to 0.67 while all else is raised it is no worse there
  (-0.006 ± 0.011) and better at 300 (-0.062 ± 0.035). So there is no group of parameters to make: multiply the rate that is best for the
  dense net by 1.5. Weight decay stays: twice as much on tied matrices is better by 0.008 ± 0.004 at 1,000 steps and by 0.000 ± 0.011 at
  3,000 (three seeds), none is worse, by 0.012 ± 0.014 and 0.019 ± 0.018.
- **Signs are worth more than anything else**: signed ties are ahead of plain ones by 0.120 ± 0.082 after 300 steps, 0.148 ± 0.049 after
  1,000 and 0.031 ± 0.014 after 3,000, at no parameter and no multiply-add.
- **Beside dense**, a signed net with 57 % of the parameters is 0.004 ± 0.060 behind after 300 steps, 0.023 ± 0.012 after 1,000, and 0.037
  ± 0.003 after 3,000; a plain one 0.124 ± 0.036, 0.171 ± 0.038 and 0.068 ± 0.013. Attention costs least: where it alone is tied, 0.005 ±
  0.017 and 0.003 ± 0.009 after 1,000 and 3,000; feed-forward layers alone 0.036 ± 0.024 and 0.021 ± 0.010, for twice the parameters.
- **Across blocks** (each feed-forward layer's second matrix is the next block's first, transposed; signed) it is level with dense after
  1,000 steps (-0.002 ± 0.013) and ahead of ties within a block by 0.025 ± 0.025; after 3,000 steps it is as good as these (-0.002 ± 0.009).
- **Rivals of the same size**: after 1,000 steps half as many dense blocks are as good (0.000 ± 0.023 beside signed) at half the
  multiply-adds; neighbours that share all matrices are 0.017 ± 0.027 behind it. After 3,000 steps signed ties are ahead of the former by
  0.020 ± 0.007, and 0.009 ± 0.012 of the latter, as they are at scale; a plain tie is behind both, by 0.012 ± 0.012 and 0.022 ± 0.021.
- **A correction of low rank** beside each tie is no better than the same parameters spent on width: rank 8 and 16 are 0.014 ± 0.019 and
  0.013 ± 0.036 behind widths of 100 and 104 after 1,000 steps, 0.012 ± 0.017 and 0.005 ± 0.014 after 3,000 (three seeds).
- **At dense's size**, wider signed ties are ahead of dense by 0.063 ± 0.019 after 1,000 steps and by 0.022 ± 0.008 after 3,000, at 1.9
  times the multiply-adds. A dense net that is wider and half as deep is ahead by 0.055 ± 0.008 after 1,000, at the same multiply-adds,
  and 0.004 ± 0.013 behind after 3,000; one whose neighbours share all matrices, wider, 0.035 ± 0.010 ahead and 0.001 ± 0.013 behind. The
  wider signed net is ahead of these two by 0.026 ± 0.013 and 0.024 ± 0.014 after 3,000.
- **A third of the parameters** (35 %: signed ties, shared in pairs) cost 0.083 ± 0.013 after 1,000 steps, 0.101 ± 0.007 after 3,000.
- **On the digits** no ViT is worse than dense by more than five seeds can tell: after 105, 420 and 1,680 steps plain ties +2.4 ± 7.6, +0.5
  ± 1.0 and +0.2 ± 1.3 %, signed ones +3.2 ± 2.6, +0.8 ± 1.0 and -0.3 ± 0.9 %, half as deep +4.6 ± 5.2, -0.6 ± 1.8 and -0.5 ± 1.4 %, signed
  and shared in pairs (27 % of the parameters) -4.8 ± 5.5, +0.8 ± 1.3 and +0.5 ± 0.6 %.
- **ResNets**, at the same lengths: plain ties that share a W through a stage are the only ones behind dense, by 0.9 ± 1.1, 0.6 ± 0.7 and
  0.5 ± 0.4 %; signed -0.2 ± 0.8, 0.0 ± 0.3 and 0.0 ± 0.4 %, signed with `slice` (56 % of the parameters) +0.2 ± 0.7, 0.0 ± 0.4 and +0.1 ±
  0.3 %, with `expand` +0.3 ± 1.1, +0.2 ± 0.4 and +0.3 ± 0.4 %. Of dense ones of that size fewer blocks are as good (+0.1 ± 1.1, -0.2 ± 0.5,
  +0.1 ± 0.7 %), a narrower net is behind (by 0.8 ± 0.5, 0.5 ± 0.6, 0.6 ± 0.5 %).
- **Signs on the digits** make the ResNet whose ties share a W better by 0.7 ± 0.7, 0.6 ± 0.7 and 0.4 ± 0.6 % (0.6 ± 0.3 over the three
  lengths together), one with a W for each block by 0.2 ± 0.2 % after 1,680 steps; else, with `slice` and `expand`, and in a ViT, they
  change nothing that five seeds can tell.

So: where training is short or multiply-adds are what is scarce, make the net shallower. Where it is long, and weights, optimizer state or
traffic are scarce, tie, with `mix="signed"` and 1.5 times the rate; then spend what that saves on width, not on corrections. Share
between blocks on top where size counts above all. The plain tie is the default since it is the paper's: signs are better beyond doubt in
the language model and nowhere worse, but not better beyond doubt on both tasks.

Left out: on the digits, corrections, other widths, rates and decays, since the language model settled them; of `lm` at 3,000 steps three
of these. `lm` ran on an H200, but three seeds of seven variants at 3,000 steps on a CPU; the digits on both. At
3,000 steps the search read the standard library of Python 3.12, all seeds that of 3.11."""

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


EVERY = """\
## Every variant

The mean of five seeds; the mean difference to dense, seed by seed, ± its 95 % interval; the learning rate. In parentheses the best mean of
the search, and its rate, where no other seeds ran. Multiply-adds are those of one row (128 bytes, one image), without attention's own.
Of `lm` at 3,000 steps the seeds read another text than the search did: compare them, and what is in parentheses, each among themselves."""

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
    return "\n\n".join((INTRODUCTION, LEARNED, at_scale(scaled), EVERY, summary(rows), DIGITS)) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """For each task and scale a table in Markdown: a line for each variant, a column for each training length."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], int(row["scale"])), []).append(row)
    return "\n\n".join(
        _table(name, scale, groups[name, scale]) for name, scale in sorted(groups, key=lambda key: (list(TASKS).index(key[0]), key[1]))
    )


class Scores:
    """What was reached: by the seeds that are reported, and in the search for the rate."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.reported: dict[tuple[str, int], dict[str, float]] = {}
        self.rates: dict[tuple[str, int], float] = {}
        self.tried: dict[tuple[str, int], dict[float, list[float]]] = {}
        for row in rows:
            place, score, lr = (row["variant"], int(row["steps"])), float(row["score"]), float(row["lr"])
            if int(row["seed"]) < SEARCHING:
                self.reported.setdefault(place, {})[row["seed"]] = score
                self.rates[place] = lr
            else:
                self.tried.setdefault(place, {}).setdefault(lr, []).append(score)

    def difference(self, variant: str, base: str, steps: int) -> list[float]:
        """To another variant, seed by seed."""
        own, other = (self.reported.get((name, steps), {}) for name in (variant, base))
        return [own[seed] - other[seed] for seed in own if seed in other]

    def found(self, variant: str, steps: int, lower_is_better: bool) -> tuple[float, float] | None:
        """The best mean of the search, and its rate."""
        tried = self.tried.get((variant, steps), {})
        most = max(map(len, tried.values()), default=0)
        means = [(statistics.mean(scores), lr) for lr, scores in tried.items() if len(scores) == most]
        return (min if lower_is_better else max)(means, default=None)


def _table(name: str, scale: int, rows: Sequence[Row]) -> str:
    lengths = sorted({int(row["steps"]) for row in rows})
    scores = Scores(rows)
    lines = []
    for variant in TASKS[name].variants:
        own = [row for row in rows if row["variant"] == variant.name]
        if own:
            cells = [_cell(scores, variant.name, length, TASKS[name].lower_is_better) for length in lengths]
            lines.append((variant.name, f"{int(own[0]['params']):,}", f"{int(own[0]['multiply_adds']) / 1e6:.1f}", *cells))
    header = ("variant", "parameters", "M multiply-adds", *(f"{length:,} steps" for length in lengths))
    versions = " and ".join(dict.fromkeys(row["versions"] for row in rows))
    title = f"`{name}`{f', scale {scale}' if scale > 1 else ''}, {TASKS[name].unit} ({versions}):"
    return f"{title}\n\n{markdown(header, lines)}"


def _cell(scores: Scores, variant: str, steps: int, lower_is_better: bool) -> str:
    place = variant, steps
    if place not in scores.reported:
        found = scores.found(variant, steps, lower_is_better)
        return "" if found is None else f"({found[0]:.3f} at {found[1]:.1e})"
    own = scores.reported[place]
    pairs = scores.difference(variant, "dense", steps)
    few = f" ({len(own)} seeds)" if len(own) != 5 else ""
    difference = "" if variant == "dense" or not pairs else f"; {interval(pairs)}"
    return f"{statistics.mean(own.values()):.3f}{few}{difference}; {scores.rates[place]:.1e}"


def interval(values: Sequence[float]) -> str:
    """The mean and half its 95 % interval, by Student's t.

    >>> interval([1.0, 2.0, 3.0]), interval([-1.5])
    ('+2.000 ± 2.484', '-1.500')
    """
    mean, n = statistics.mean(values), len(values)
    half = "" if n < 2 else f" ± {stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n):.3f}"
    return f"{mean:+.3f}{half}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """The language model's loss against parameters and against multiply-adds, at each length that is finished; the line is the front."""
    rows = [row for row in rows if (row["task"], row["scale"]) == ("lm", "1")]
    scores = Scores(rows)
    lengths = sorted({steps for _, steps in scores.reported})
    names = [variant.name for variant in TASKS["lm"].variants if "'" not in variant.name]  # the others are one net, trained otherwise
    axes: Any
    figure = Figure(figsize=(14, 4.5 * len(lengths)), layout="constrained")
    for row, steps in zip(figure.subplots(len(lengths), 2, squeeze=False, sharey="row"), lengths, strict=True):
        for axes, column, title in zip(row, ("params", "multiply_adds"), ("parameters", "multiply-adds of 128 bytes"), strict=True):
            points = []
            for number, name in enumerate(names, 1):
                if (name, steps) in scores.reported:
                    size = float(next(each[column] for each in rows if each["variant"] == name))
                    own = list(scores.reported[name, steps].values())
                    color = color_of(name)
                    error = statistics.stdev(own) / math.sqrt(len(own)) if len(own) > 1 else 0
                    axes.errorbar(size, statistics.mean(own), error, fmt="o", color=color, capsize=2, elinewidth=0.8, markersize=4)
                    side = 5 if number % 2 else -5
                    style = {"textcoords": "offset points", "fontsize": 9, "color": color, "ha": "left" if number % 2 else "right"}
                    axes.annotate(str(number), (size, statistics.mean(own)), (side, 1), **style)
                    points.append((size, statistics.mean(own)))
            front = [(x, y) for x, y in sorted(points) if all(y < other for size, other in points if size <= x and (size, other) != (x, y))]
            axes.step(*zip(*front, strict=True), where="post", color="gray", linewidth=0.8, linestyle=":")
            axes.set(title=f"{steps:,} steps", xlabel=title)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("nats per byte")
    handles = [Line2D([], [], marker="o", linestyle="", color=color_of(name), label=f"{i}  {name}") for i, name in enumerate(names, 1)]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def color_of(name: str) -> str:
    return next((color for start, color in COLORS.items() if name.startswith(start)), "tab:gray")
