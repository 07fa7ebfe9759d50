"""`python examples/accuracy.py`: what tying costs, and which variant costs least, measured by training on real data.

Three tasks on data that every installation has: "lm", a byte-level language model (GPT-style) on the text of Python's standard
library; "vit" and "resnet", a small ViT and a bottleneck ResNet on scikit-learn's handwritten digits. Each variant of a task is
trained from the same start (a tied model is made from the initial dense one), on the same batches, with the same recipe, for
several lengths. Every run is a row of `examples/accuracy.csv`; the command goes on where it stopped. `--summary` writes the page
`examples/accuracy.md` of what the file holds and draws the plot.

    python examples/accuracy.py --tasks vit resnet --seeds 5
    python examples/accuracy.py --tasks lm --steps 300 1000 --variants dense 'tied*'
    python examples/accuracy.py --tasks lm --scale 4 --device cuda     # four times as wide and deep
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fnmatch
import functools
import json
import multiprocessing
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import ResNet, VisionTransformer
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import pe_fx

Row = dict[str, str]
Batch = tuple[Tensor, Tensor]


# ------------------------------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        after: Tensor = x + self.proj(y.transpose(1, 2).flatten(2))
        change: Tensor = self.down(functional.gelu(self.up(self.norm2(after))))
        return after + change


class Bytes(nn.Module):
    """A causal language model over bytes. Weights start at a standard deviation of 1 / sqrt(inputs)."""

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


# ------------------------------------------------------------------------------------------------------------------ variants


@dataclass(frozen=True)
class Variant:
    """How a model is tied: the options of `pe_fx.transform`, None for not at all; `size` changes the constructor's arguments.

    `pretrained`: the dense model is trained first, for as many steps; then it is tied and trained for a fifth of them.
    """

    name: str
    options: dict[str, Any] | None = None
    size: dict[str, int] = field(default_factory=dict)
    pretrained: bool = False


SIGNED: dict[str, Any] = {"mix": "signed"}
BOTH: dict[str, Any] = {"mix": "signed", "gain": 0.5}
COMMON = (
    Variant("dense"),
    Variant("tied", {}),
    Variant("tied, signed", SIGNED),
    Variant("tied, gain", {"gain": 0.5}),
    Variant("tied, signed + gain", BOTH),
)


def transformer(width: int) -> tuple[Variant, ...]:
    """`width` is that at which a tied model has as many parameters as the dense one."""
    return (
        *COMMON,
        Variant("FFN only", {"rules": ["mlp"]}),
        Variant("FFN only, signed", {"rules": ["mlp"]} | SIGNED),
        Variant("attention only", {"rules": ["attention"]}),
        Variant("attention only, signed", {"rules": ["attention"]} | SIGNED),
        Variant("one W for all blocks", {"share": ("mlp", "attention")}),
        Variant("one W for all blocks, signed", {"share": ("mlp", "attention")} | SIGNED),
        Variant("dense, half as deep", None, {"depth": 2}),
        Variant("tied, twice as deep", {}, {"depth": 8}),
        Variant("tied, signed, twice as deep", SIGNED, {"depth": 8}),
        Variant("tied, wider", {}, {"width": width}),
        Variant("tied, signed, wider", SIGNED, {"width": width}),
    )


PRETRAINED = (
    Variant("pretrained, dense", None, pretrained=True),
    Variant("pretrained, keep", {"init": "keep"}, pretrained=True),
    Variant("pretrained, mean", {"init": "mean"}, pretrained=True),
    Variant("pretrained, signed, keep", SIGNED | {"init": "keep"}, pretrained=True),
    Variant("pretrained, signed, mean", SIGNED | {"init": "mean"}, pretrained=True),
)
BOTTLENECK = (
    *COMMON,
    Variant("tied, one W a block", {"share": ()}),
    Variant("tied, one W a block, signed", {"share": ()} | SIGNED),
    *(Variant(f"tied, {entry}", {"entry": entry}) for entry in ("slice", "expand")),
    *(Variant(f"tied, {entry}, signed", {"entry": entry} | SIGNED) for entry in ("slice", "expand")),
)


# -------------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """`data` gives the batches of a seed and what a model scores."""

    build: Callable[..., nn.Module]
    data: Callable[[str, int], tuple[Callable[[int], Iterator[Batch]], Callable[[nn.Module], float]]]
    variants: tuple[Variant, ...]
    steps: tuple[int, ...]
    lr: float
    unit: str


def text(device: str, scale: int, context: int = 128) -> tuple[Callable[[int], Iterator[Batch]], Callable[[nn.Module], float]]:
    """The standard library's modules, without its tests; every tenth file is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not {"site-packages", "test", "tests"}.intersection(path.parts))
    parts = [files[i::10] for i in range(10)]
    held, read = (
        torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in some)), dtype=torch.uint8).to(device)
        for some in (parts[0], sorted(path for part in parts[1:] for path in part))
    )

    def draw(stream: Tensor, count: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(stream) - context - 1, (count, 1), generator=generator)
        rows = stream[(starts + torch.arange(context + 1)).to(device)].long()
        return rows[:, :-1], rows[:, 1:]

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield draw(read, 16 * scale, generator)

    def score(model: nn.Module) -> float:
        generator = torch.Generator().manual_seed(0)
        losses = [loss_of(model, *draw(held, 64, generator)) for _ in range(8)]
        return torch.stack(losses).mean().item()

    return batches, score


def digits(device: str, scale: int) -> tuple[Callable[[int], Iterator[Batch]], Callable[[nn.Module], float]]:
    """scikit-learn's digits, 8x8 pixels from -1 to 1, a quarter of them for the test."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32, device=device)[:, None] / 8 - 1
    labels = torch.tensor(bunch.target, device=device)
    read, held = train_test_split(torch.arange(len(labels)), test_size=0.25, stratify=bunch.target, random_state=0)

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(read), generator=generator)[: len(read) // 64 * 64].view(-1, 64):
                yield images[read[rows]], labels[read[rows]]

    def score(model: nn.Module) -> float:
        right: float = (model(images[held]).argmax(1) == labels[held]).float().mean().item()
        return 100 * right

    return batches, score


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def bytes_model(width: int = 96, depth: int = 4, scale: int = 1) -> nn.Module:
    return Bytes(width=width * scale, depth=depth * scale, heads=4 * scale, context=128)


def vit(width: int = 64, depth: int = 4, scale: int = 1) -> nn.Module:
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": width * scale, "depth": depth * scale, "num_heads": 4}
    model: nn.Module = VisionTransformer(**shape, num_classes=10, weight_init="moco")
    return model


def resnet(scale: int = 1) -> nn.Module:
    channels = tuple(width * scale for width in (16, 32, 64))
    model: nn.Module = ResNet(Bottleneck, layers=(3, 3, 2), channels=channels, num_classes=10, in_chans=1)
    # 8x8 pixels have no room for the 7x7 stem with stride 2 and for a fourth stage
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    model.layer4 = nn.Identity()
    return model


TASKS = {
    "lm": Task(bytes_model, text, (*transformer(132), *PRETRAINED), (300, 1000, 3000), 6e-3, "nats per byte"),
    "vit": Task(vit, digits, transformer(88), (105, 420, 1260), 3e-3, "% accuracy"),
    "resnet": Task(resnet, digits, BOTTLENECK, (105, 420), 2e-3, "% accuracy"),
}


# --------------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    task: str
    variant: str
    steps: int
    seed: int
    scale: int = 1

    @property
    def key(self) -> tuple[str, ...]:
        return (self.task, self.variant, str(self.steps), str(self.seed), str(self.scale))


KEY = ("task", "variant", "steps", "seed", "scale")
COLUMNS = (*KEY, "params", "params_dense", "score", "before", "curve", "versions", "date")


def train(model: nn.Module, task: Task, batches: Iterator[Batch], steps: int, score: Callable[[nn.Module], float]) -> list[float]:
    """AdamW, 5 % warm-up and a cosine schedule; returns the score after each tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.lr, total_steps=steps, pct_start=max(0.05, 3 / steps), cycle_momentum=False
    )
    curve = []
    for step, (inputs, targets) in zip(range(1, steps + 1), batches, strict=False):
        model.train()
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, inputs, targets))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step * 10 % steps < 10:
            curve.append(evaluate(model, score))
    return curve


@torch.no_grad()
def evaluate(model: nn.Module, score: Callable[[nn.Module], float]) -> float:
    model.eval()
    return score(model)


@functools.cache
def data_of(task: str, device: str, scale: int) -> tuple[Callable[[int], Iterator[Batch]], Callable[[nn.Module], float]]:
    return TASKS[task].data(device, scale)


def work(run: Run, device: str) -> Row:
    torch.set_num_threads(1)
    task = TASKS[run.task]
    variant = next(variant for variant in task.variants if variant.name == run.variant)
    batches, score = data_of(run.task, device, run.scale)
    torch.manual_seed(run.seed)
    stream = batches(run.seed)
    model = task.build(**variant.size, scale=run.scale).to(device)
    dense = count(model)
    before: list[float] = []
    steps = run.steps
    if variant.pretrained:
        train(model, task, stream, steps, score)
        task, steps = replace(task, lr=task.lr / 4), steps // 5
    if variant.options is not None:
        model = pe_fx.transform(model, next(batches(0))[0][:2], **variant.options)
    if variant.pretrained:
        before.append(evaluate(model, score))
    curve = train(model, task, stream, steps, score)
    row = dict(zip(KEY, run.key, strict=True))
    row |= {"params": str(count(model)), "params_dense": str(dense), "score": f"{curve[-1]:.4f}"}
    row |= {"before": "".join(f"{value:.4f}" for value in before), "curve": json.dumps([round(value, 4) for value in curve])}
    return row | {"versions": f"torch {torch.__version__}, {device}", "date": datetime.date.today().isoformat()}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if all(row.get(column) is not None for column in COLUMNS)]


def run_all(runs: Sequence[Run], path: Path, device: str, jobs: int) -> None:
    rows = read_rows(path)
    done = {tuple(row[name] for name in KEY) for row in rows}
    todo = [run for run in runs if run.key not in done]
    context = multiprocessing.get_context("spawn")
    with (
        path.open("w", newline="", encoding="utf-8") as file,  # without the row that a kill may have cut
        ProcessPoolExecutor(jobs, context) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run") as progress,
    ):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        futures: dict[Future[Row], Run] = {pool.submit(work, run, device): run for run in todo}
        for future in as_completed(futures):
            writer.writerow(future.result())
            file.flush()
            run = futures[future]
            progress.set_postfix_str(f"{run.task}, {run.variant}, {run.steps} steps")
            progress.update()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", default=["*"], metavar="GLOB", help="only variants whose name matches one of these")
    parser.add_argument("--steps", nargs="+", type=int, help="training lengths (default: the task's own)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: 3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=1, help="times as wide and deep, times the batch (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("accuracy.csv"), metavar="CSV")
    parser.add_argument("--summary", action="store_true", help="write the page and the plot of what the CSV holds, and stop")
    options = parser.parse_args()
    if options.summary:
        from accuracy_summary import page, plot
        from tables import rows_of

        scaled = rows_of(options.out.with_name("at_scale.csv"))
        options.out.with_suffix(".md").write_text(page(read_rows(options.out), scaled), encoding="utf-8")
        plot(read_rows(options.out), options.out.with_suffix(".png"))
        return
    runs = [
        Run(name, variant.name, steps, seed, options.scale)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for name in options.tasks
        for steps in options.steps or TASKS[name].steps
        for variant in TASKS[name].variants
        if any(fnmatch.fnmatchcase(variant.name, glob) for glob in options.variants)
    ]
    run_all(runs, options.out, options.device, options.jobs)


if __name__ == "__main__":
    main()
