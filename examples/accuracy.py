"""`python examples/accuracy.py`: what tying costs, and which variant costs least, measured by training on real data.

The tasks and their variants are those of `accuracy_tasks.py`. Each variant of a task is trained from the same start (a tied model is
made from the initial dense one), on the same batches, for several lengths, at the learning rate that is best for it at that length:
rates are tried with seeds of their own, first a factor of 1.5 apart, until the best one has worse neighbours on both sides, a factor of
the square root of 1.5 away; then the seeds that are reported run at that rate. Every run is a row of `examples/accuracy.csv`; the
command goes on where it stopped. On a GPU the nets train side by side (`accuracy_gpu.py`). `--summary` writes the page
`examples/accuracy.md` of what the file holds and draws the plots.

    python examples/accuracy.py --tasks vit resnet --seeds 5
    python examples/accuracy.py --tasks lm --steps 300 1000 --variants dense 'tied*'
    python examples/accuracy.py --tasks lm --scale 4 --device cuda     # four times as wide and deep, rates divided by four
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fnmatch
import functools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accuracy_tasks import TASKS, Digits, Groups, Text, Variant, groups_of, loss_of, tied_as
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import pe_fx

Row = dict[str, str]

STEP = 1.5**0.5
SEARCHING = 1000
"""Seeds from here on are those with which learning rates are searched."""


@dataclass(frozen=True)
class Run:
    """`place`: how many times the task's learning rate is multiplied by the square root of 1.5."""

    task: str
    variant: str
    place: int
    steps: int
    seed: int
    scale: int = 1

    @property
    def lr(self) -> float:
        return TASKS[self.task].lr * STEP**self.place / self.scale

    @property
    def key(self) -> tuple[str, ...]:
        return (self.task, self.variant, f"{self.lr:.2e}", str(self.steps), str(self.seed), str(self.scale))


KEY = ("task", "variant", "lr", "steps", "seed", "scale")
COLUMNS = (*KEY, "params", "multiply_adds", "score", "curve", "versions", "date")


def rate(step: int, steps: int) -> float:
    """What multiplies the learning rate: 5 % warm-up, then a cosine to nothing."""
    warm = max(3.0, 0.05 * steps)
    return (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))


# ------------------------------------------------------------------------------------------------------------------- a run


def variant_of(task: str, name: str) -> Variant:
    return next(variant for variant in TASKS[task].variants if variant.name == name)


@functools.cache
def data_of(task: str, device: str, scale: int) -> Text | Digits:
    return TASKS[task].data(torch.device(device), scale)


@functools.cache
def plan_for(task: str, name: str, scale: int) -> pe_fx.Plan | None:
    variant = variant_of(task, name)
    if variant.options is None:
        return None
    return pe_fx.plan(TASKS[task].build(**variant.size, scale=scale), sample_of(task, scale), **variant.options)


@functools.cache
def multiply_adds(task: str, name: str, scale: int) -> int:
    """Of a forward pass of one row."""
    model = start_of(task, name, scale, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(sample_of(task, scale)[:1])
    return int(counter.get_total_flops()) // 2


def sample_of(task: str, scale: int) -> torch.Tensor:
    data = data_of(task, "cpu", scale)
    return data.batch(data.rows(0, 1)[0, :2])[0]


def start_of(task: str, name: str, scale: int, seed: int) -> nn.Module:
    """The variant's net before the first step."""
    variant, plan = variant_of(task, name), plan_for(task, name, scale)
    torch.manual_seed(seed)
    return tied_as(variant, TASKS[task].build(**variant.size, scale=scale), plan)


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass
class Course:
    """A training: AdamW, clipped gradients, warm-up and cosine. `scores` after each tenth of the steps, and each step's loss."""

    lr: float
    steps: int
    seed: int
    scores: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def run(self, model: nn.Module, data: Text | Digits, groups: Groups | None = None, loss: Loss = loss_of, name: str = "") -> Course:
        """With a progress bar, where it has a name. `groups`: as of `groups_of`."""
        made = [{"params": own, "lr": self.lr * times, "weight_decay": decay} for own, times, decay in groups or groups_of(None, model)]
        optimizer = torch.optim.AdamW(made, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, self.steps))
        for step, rows in enumerate(tqdm(data.rows(self.seed, self.steps), name, leave=False, disable=not name), 1):
            model.train()
            optimizer.zero_grad()
            value = loss(model, *data.batch(rows))
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            self.losses.append(value.item())
            if step * 10 % self.steps < 10:
                self.scores.append(score(model, data))
        return self


@torch.no_grad()
def score(model: nn.Module, data: Text | Digits) -> float:
    model.eval()
    return data.score(model).item()


def row_of(run: Run, model: nn.Module, curve: Sequence[float], device: str) -> Row:
    row = dict(zip(KEY, run.key, strict=True)) | {"params": str(count(model)), "score": f"{curve[-1]:.4f}"}
    row |= {"multiply_adds": str(multiply_adds(run.task, run.variant, run.scale))}
    row |= {"curve": json.dumps([round(value, 4) for value in curve])}
    return row | {"versions": f"torch {torch.__version__}, {device}", "date": datetime.date.today().isoformat()}


def work(run: Run) -> Row:
    torch.set_num_threads(1)
    model = start_of(run.task, run.variant, run.scale, run.seed)
    groups = groups_of(variant_of(run.task, run.variant), model)
    course = Course(run.lr, run.steps, run.seed).run(model, data_of(run.task, "cpu", run.scale), groups)
    return row_of(run, model, course.scores, "cpu")


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class Study:
    """What is to be known: of these variants of a task at these lengths, so many `seeds` each at the best rate."""

    task: str
    variants: tuple[Variant, ...]
    steps: tuple[int, ...]
    seeds: int
    searching: int
    scale: int = 1

    def wanted(self, rows: Iterable[Row]) -> list[Run]:
        """The runs that come next, given those that are done."""
        done: dict[tuple[str, ...], float] = {}
        for row in rows:
            score = float(row["score"])
            loss = score if TASKS[self.task].lower_is_better else -score
            done[tuple(row[name] for name in KEY)] = math.inf if math.isnan(loss) else loss
        return [run for steps in self.steps for variant in self.variants for run in self._next(variant, steps, done) if run.key not in done]

    def _next(self, variant: Variant, steps: int, done: dict[tuple[str, ...], float]) -> list[Run]:
        seeds = range(SEARCHING, SEARCHING + self.searching)

        def runs(place: int, seeds: Iterable[int]) -> list[Run]:
            return [Run(self.task, variant.name, place, steps, seed, self.scale) for seed in seeds]

        losses = {}
        for place in range(-24, 25):
            keys = [run.key for run in runs(place, seeds)]
            if all(key in done for key in keys):
                losses[place] = statistics.mean(done[key] for key in keys)
        start = round(math.log(variant.lr, STEP))
        places = {start - 2, start, start + 2}
        if places <= set(losses):
            best = min(losses, key=lambda place: losses[place])
            places = {best + 2} if best == max(losses) else {best - 2} if best == min(losses) else {best - 1, best + 1}
            if places <= set(losses):
                return runs(best, range(self.seeds))
        return [run for place in sorted(places) for run in runs(place, seeds)]


def run_all(studies: Sequence[Study], path: Path, run_some: Callable[[Callable[[], list[Run]]], Iterator[Row]]) -> None:
    """`run_some` yields rows in any order, and asks for what is wanted whenever it has something free."""
    rows = read_rows(path)

    def wanted() -> list[Run]:
        runs = [run for study in studies for run in study.wanted(rows)]
        progress.total = len(rows) - before + len(runs)
        return runs

    before = len(rows)
    with path.open("w", newline="", encoding="utf-8") as file, tqdm(unit="run") as progress:  # without the row that a kill may have cut
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        for row in run_some(wanted):
            rows.append(row)
            writer.writerow(row)
            file.flush()
            progress.set_postfix_str(f"{row['task']}, {row['variant']}, {row['steps']} steps")
            progress.update()


def on_cores(jobs: int) -> Callable[[Callable[[], list[Run]]], Iterator[Row]]:
    """Runs in so many processes."""

    def run_some(wanted: Callable[[], list[Run]]) -> Iterator[Row]:
        futures: dict[Future[Row], Run] = {}
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            while True:
                todo = [run for run in wanted() if run not in futures.values()]
                futures |= {pool.submit(work, run): run for run in todo[: 2 * jobs - len(futures)]}
                if not futures:
                    return
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    del futures[future]
                    yield future.result()

    return run_some


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if all(row.get(column) is not None for column in COLUMNS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", default=["*"], metavar="GLOB", help="only variants whose name matches one of these")
    parser.add_argument("--steps", nargs="+", type=int, help="training lengths (default: the task's own)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each variant that are reported (default: 5)")
    parser.add_argument("--searching", type=int, default=2, metavar="SEEDS", help="runs at each learning rate that is tried (default: 2)")
    parser.add_argument("--scale", type=int, default=1, help="times as wide and deep, times the batch, rates divided by it (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: 2; on a GPU 3 of each variant)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="on a GPU, begin no run after so many")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("accuracy.csv"), metavar="CSV")
    parser.add_argument("--summary", action="store_true", help="write the page and the plots of what the CSV holds, and stop")
    options = parser.parse_args()
    if options.summary:
        from accuracy_summary import page, plot
        from tables import rows_of

        scaled = rows_of(options.out.with_name("at_scale.csv"))
        options.out.with_suffix(".md").write_text(page(read_rows(options.out), scaled), encoding="utf-8")
        plot(read_rows(options.out), options.out.with_suffix(".png"))
        return

    def chosen(variant: Variant) -> bool:
        return any(fnmatch.fnmatchcase(variant.name, glob) for glob in options.variants)

    studies = [
        Study(
            name,
            tuple(filter(chosen, TASKS[name].variants)),
            tuple(options.steps or TASKS[name].steps),
            options.seeds,
            options.searching,
            options.scale,
        )
        for name in options.tasks
    ]
    if options.device == "cpu":
        run_some: Any = on_cores(options.jobs or 2)
    else:
        from accuracy_gpu import side_by_side

        run_some = side_by_side(studies, options.device, options.jobs or 3, options.seconds)
    run_all(studies, options.out, run_some)


if __name__ == "__main__":
    main()
