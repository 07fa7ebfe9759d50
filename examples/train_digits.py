"""`python examples/train_digits.py`: dense and tied models, trained side by side on handwritten digits.

A small ViT and a small ResNet of timm learn scikit-learn's digits (8x8 pixels, 10 classes), each as it is and tied by
`pe_fx.transform`. Prints parameters, the optimizer's memory and the test accuracy after the last epoch (mean ± standard
deviation over the seeds), and plots the accuracy per epoch. Takes under five minutes on two CPU cores, with `--quick` half a
minute.

All variants of a model get one recipe (AdamW, warm-up and cosine schedule), and for each seed the same batches and the same
start: the tied models are made from the initial dense one. The ViT starts from Xavier's initialisation, q, k and v each by itself
(timm's "moco"), with a learned gain per channel of its branches (LayerScale) from 0.2: of the few recipes tried, on another random
split, the one with which dense and tied both did well. From timm's default, a standard deviation of 0.02, the tie learns more
slowly. The ResNet starts as timm makes it: its norms take out the scale.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import ResNet, VisionTransformer
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from tqdm import tqdm

import pe_fx
from pe_fx.ties import table

BATCH = 64
QUICK_EPOCHS = 2


@dataclass(frozen=True)
class Digits:
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order; the rest that fills no batch is left out."""
        order = torch.randperm(len(self), generator=generator)
        for rows in order[: len(self) // BATCH * BATCH].to(self.labels.device).view(-1, BATCH):
            yield self.images[rows], self.labels[rows]


@dataclass(frozen=True)
class Recipe:
    """A model, the tied variants of it by name with their `entry`, and how all of them are trained."""

    name: str
    build: Callable[[], nn.Module]
    entries: dict[str, str]
    epochs: int
    lr: float

    def variants(self, example: Tensor) -> dict[str, nn.Module]:
        dense = self.build().to(example.device)
        return {"dense": dense} | {name: pe_fx.transform(dense, example, entry=entry) for name, entry in self.entries.items()}


@dataclass
class Learner:
    """One model in training, and what was measured on it."""

    model: nn.Module
    lr: float
    steps: int
    accuracies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, self.lr, total_steps=self.steps, pct_start=0.1, cycle_momentum=False
        )

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def optimizer_bytes(self) -> int:
        return sum(value.nbytes for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor))

    def learn(self, images: Tensor, labels: Tensor) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(self.model(images), labels))
        self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def test(self, digits: Digits) -> None:
        self.model.eval()
        right = self.model(digits.images).argmax(1) == digits.labels
        self.accuracies.append(100 * right.float().mean().item())


Runs = dict[str, list[Learner]]
"""For each variant of a model, one learner per seed."""


def vit() -> nn.Module:
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
    model: nn.Module = VisionTransformer(**shape, num_classes=10, init_values=0.2, weight_init="moco")
    return model


def resnet() -> nn.Module:
    model: nn.Module = ResNet(Bottleneck, layers=(2, 2, 2), channels=(16, 32, 64), num_classes=10, in_chans=1)
    # 8x8 pixels have no room for the 7x7 stem with stride 2 and for a fourth stage.
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    model.layer4 = nn.Identity()
    return model


RECIPES = (
    Recipe("ViT", vit, {"tied": "keep"}, epochs=20, lr=5e-3),
    Recipe("ResNet", resnet, {"tied": "keep", "tied, slice": "slice", "tied, expand": "expand"}, epochs=10, lr=2e-3),
)


def load(device: str) -> tuple[Digits, Digits]:
    """The training and the test set, pixels from -1 to 1."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None] / 8 - 1
    labels = torch.tensor(digits.target, device=device)
    parts = train_test_split(torch.arange(len(labels)), test_size=0.25, stratify=digits.target, random_state=0)
    train, test = (Digits(images[rows], labels[rows]) for rows in parts)
    return train, test


def train_side_by_side(recipe: Recipe, train: Digits, test: Digits, seed: int, epochs: int, progress: tqdm[None]) -> dict[str, Learner]:
    torch.manual_seed(seed)
    steps = epochs * (len(train) // BATCH)
    learners = {name: Learner(model, recipe.lr, steps) for name, model in recipe.variants(train.images[:2]).items()}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for images, labels in train.batches(generator):
            for learner in learners.values():
                learner.learn(images, labels)
        for learner in learners.values():
            learner.test(test)
        progress.set_postfix({name: f"{learner.accuracies[-1]:.1f} %" for name, learner in learners.items()}, refresh=False)
        progress.update()
    return learners


def train_all(device: str, seeds: int, epochs: int | None) -> dict[str, Runs]:
    train, test = load(device)
    lengths = {recipe.name: epochs or recipe.epochs for recipe in RECIPES}
    results: dict[str, Runs] = {}
    with tqdm(total=seeds * sum(lengths.values()), unit="epoch") as progress:
        for recipe in RECIPES:
            runs = results[recipe.name] = {}
            for seed in range(seeds):
                progress.set_description(f"{recipe.name}, seed {seed}")
                for name, learner in train_side_by_side(recipe, train, test, seed, lengths[recipe.name], progress).items():
                    runs.setdefault(name, []).append(learner)
    return results


def report(results: dict[str, Runs]) -> str:
    rows = []
    for model, runs in results.items():
        dense = runs["dense"][0]
        for variant, learners in runs.items():
            first = learners[0]
            rows.append(
                (
                    model,
                    variant,
                    f"{first.parameters:,} ({first.parameters / dense.parameters:.0%})",
                    f"{first.optimizer_bytes:,}",
                    spread([learner.accuracies[-1] for learner in learners]),
                )
            )
    return table(("model", "variant", "parameters", "optimizer bytes", "test accuracy"), rows)


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} %"


def plot(results: dict[str, Runs], path: Path) -> None:
    """Per model one panel: the mean over the seeds, and in a lighter shade the range."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True)
    for axes, (model, runs) in zip(panels, results.items(), strict=True):
        for color, (variant, learners) in zip(("black", "tab:red", "tab:blue", "tab:green"), runs.items(), strict=False):
            curves = torch.tensor([learner.accuracies for learner in learners])
            epochs = range(1, curves.shape[1] + 1)
            label = f"{variant}, {learners[0].parameters / 1000:.0f} k parameters"
            axes.plot(epochs, curves.mean(0), color=color, label=label, linestyle="--" if variant == "dense" else "-")
            axes.fill_between(epochs, curves.amin(0), curves.amax(0), color=color, alpha=0.12, linewidth=0)
        axes.set(title=model, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    last = [learner.accuracies[-1] for runs in results.values() for learners in runs.values() for learner in learners]
    panels[0].set(ylabel="test accuracy, %", ylim=(max(0, min(last) - 15), 100))
    figure.savefig(path, dpi=150)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def main() -> None:
    lengths = ", ".join(f"{recipe.epochs} for the {recipe.name}" for recipe in RECIPES)
    parser = argparse.ArgumentParser(description="Trains dense and tied models side by side on handwritten digits.")
    parser.add_argument("--epochs", type=positive, help=f"default: {lengths}")
    parser.add_argument("--seeds", type=positive, default=3, help="how many runs each model gets (default: 3)")
    parser.add_argument("--plot", type=Path, default=Path("digits.png"), help="where the plot goes (default: digits.png)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one, else cpu")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs and one seed, to see that it runs")
    args = parser.parse_args()
    if not args.plot.parent.is_dir():
        parser.error(f"--plot: there is no directory {args.plot.parent}")
    # The tensors are too small to share: threads would mostly wait for each other.
    torch.set_num_threads(1)
    if args.quick:
        args.seeds, args.epochs = 1, QUICK_EPOCHS
    results = train_all(args.device, args.seeds, args.epochs)
    print(report(results))
    plot(results, args.plot)
    print(f"\nPlot: {args.plot}")


if __name__ == "__main__":
    main()
