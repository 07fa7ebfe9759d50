"""`python examples/convert.py`: from a trained dense model to a tied one, in a few steps.

Trains a dense model first (or reads one, `--checkpoint FILE`), ties it in three ways, and trains each on for a few steps with the
dense model as teacher: half of the loss is the cross entropy, half the divergence from the teacher's predictions. Beside them the dense
model itself trains on as long. Every one does so at several learning rates, and the one with the least loss on what it was trained on
counts. Prints a table, draws the curves, and writes the best tied model with its plan: `pe_fx.checkpoint.load(file, dense model)`
reads it. Takes a few minutes on two CPU cores for the digits.

    python examples/convert.py                      # a small ViT on scikit-learn's handwritten digits
    python examples/convert.py --task lm            # a byte-level language model on the standard library's text
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accuracy import Course, Loss, count, data_of, score
from accuracy_tasks import TASKS, Digits, Text, loss_of
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import pe_fx
from pe_fx import checkpoint
from pe_fx.ties import table

STARTS: dict[str, dict[str, Any]] = {
    "signed, mean of both": {"mix": "signed", "init": "mean"},
    "signed, W fitted": {"mix": "signed", "init": "fit"},
    "order and W fitted": {"mix": "fitted", "init": "fit"},
}
DENSE = "dense, trained on"


@dataclass(frozen=True)
class Settings:
    """How long the dense model is trained and at which rate, for how long each is trained on, and at which rates those are tried."""

    lr: float
    steps: int
    further: int
    dense_rates: Sequence[float]
    tied_rates: Sequence[float]


SETTINGS = {
    "vit": Settings(3e-3, 420, 60, (2e-4, 5e-4, 1e-3), (5e-4, 1e-3, 2e-3)),
    "lm": Settings(9e-3, 1000, 200, (2e-3, 3e-3, 4.5e-3, 6e-3), (7e-3, 1e-2, 1.4e-2)),
}


@dataclass(frozen=True)
class Result:
    """A model that was trained on: its learning rate, its mean loss in the last tenth, and its scores, the first before any step."""

    name: str
    model: nn.Module
    lr: float
    loss: float
    scores: list[float]


def taught(model: nn.Module, inputs: Tensor, targets: Tensor, teacher: nn.Module) -> Tensor:
    """Half the cross entropy, half what the predictions diverge from the teacher's."""
    logits = model(inputs)
    with torch.no_grad():
        wanted = teacher(inputs).log_softmax(-1)
    divergence = functional.kl_div(logits.log_softmax(-1).flatten(0, -2), wanted.flatten(0, -2), reduction="batchmean", log_target=True)
    return (functional.cross_entropy(logits.flatten(0, -2), targets.flatten()) + divergence) / 2


def train_on(name: str, start: nn.Module, lr: float, data: Text | Digits, seed: int, steps: int, loss: Loss) -> Result:
    model = copy.deepcopy(start)
    before = score(model, data)
    course = Course(lr, steps, seed).run(model, data, loss=loss, name=f"{name}, {lr:.1e}")
    last = course.losses[-max(1, steps // 10) :]
    return Result(name, model, lr, sum(last) / len(last), [before, *course.scores])


def convert(task: str, settings: Settings, file: Path | None, seed: int, batches: int) -> tuple[nn.Module, list[Result]]:
    """The dense model as it was before, and what came of each start at its best rate."""
    data = data_of(task, "cpu", 1)
    torch.manual_seed(seed)
    dense = TASKS[task].build()
    if file is None:
        Course(settings.lr, settings.steps, seed).run(dense, data, name=f"dense, {settings.steps} steps")
    else:
        dense = checkpoint.load(file, dense)
    dense.eval()
    calibration = [data.batch(rows)[0] for rows in data.rows(seed + 1000, batches)]
    starts = {DENSE: dense}
    for name, options in tqdm(STARTS.items(), "tie and fit"):
        seen: dict[str, Any] = {"calibration": calibration} if options["init"] == "fit" else {}
        starts[name] = pe_fx.transform(dense, calibration[0][:2], **options, **seen)
    results = []
    for name, start in starts.items():
        rates: Sequence[float] = settings.tied_rates
        loss: Loss = functools.partial(taught, teacher=dense)
        if start is dense:
            rates, loss = settings.dense_rates, loss_of
        tried = [train_on(name, start, lr, data, seed + 2000, settings.further, loss) for lr in rates]
        results.append(min(tried, key=lambda result: result.loss))
    return dense, results


def plot(results: Sequence[Result], steps: int, unit: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for result in results:
        places = [steps * i / (len(result.scores) - 1) for i in range(len(result.scores))]
        axes.plot(places, result.scores, label=f"{result.name}, {count(result.model):,} parameters", marker=".")
    axes.set(xlabel="further steps", ylabel=unit)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=SETTINGS, default="vit")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="the dense model's weights, instead of training it first")
    parser.add_argument("--steps", type=int, help="of the dense model")
    parser.add_argument("--further", type=int, help="steps of each after that")
    parser.add_argument("--calibration", type=int, default=16, metavar="BATCHES", help="that ties are fitted to (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("tied.safetensors"), metavar="FILE", help="where the tied model goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the models are small
    given = {name: value for name in ("steps", "further") if (value := getattr(options, name)) is not None}
    settings = replace(SETTINGS[options.task], **given)
    unit = TASKS[options.task].unit
    dense, results = convert(options.task, settings, options.checkpoint, options.seed, options.calibration)
    rows = [
        (result.name, f"{count(result.model):,}", f"{result.lr:.1e}", f"{result.scores[0]:.3f}", f"{result.scores[-1]:.3f}")
        for result in results
    ]
    print(table(("start", "parameters", "learning rate", f"{unit}, before", f"after {settings.further} steps"), rows))
    plot(results, settings.further, unit, options.out.with_suffix(".png"))
    best = min((result for result in results if result.name != DENSE), key=lambda result: result.loss)
    checkpoint.save(best.model, options.out)
    read = checkpoint.load(options.out, TASKS[options.task].build())
    assert all(torch.equal(value, best.model.state_dict()[name]) for name, value in read.state_dict().items())
    print(f"\n{best.name}: {options.out}, {count(read):,} parameters of {count(dense):,}; curves: {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
