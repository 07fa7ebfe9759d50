"""Training steps, dense and tied, through Inductor and through the backend pe_fx:  python examples/bench.py

For each model several variants take steps in turns in one process: dense with Inductor, tied with Inductor, tied with backend
"pe_fx", the same with signs, fitted orders or learned gains, and dense with backend "pe_fx", which ties it in the graph. Printed
are medians as ratios to the first variant; bytes of parameters, gradients (what DDP sends per step) and optimizer state; on a GPU
the peak memory of a step and its number of kernels. The rows go to `examples/bench.csv`, in the place of those of the same
measurement; `--summary` writes the page `examples/bench.md` of what the file holds.

    python examples/bench.py --models deit_small resnet50_keep --rounds 5
    python examples/bench.py --device cuda --batch 128
    python examples/bench.py --summary
"""

from __future__ import annotations

import argparse
import copy
import datetime
import fnmatch
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import transformers
from bench_summary import COLUMNS, Row, page, shown, write_rows
from tables import machine, rows_of
from torch import Tensor, nn
from tqdm import tqdm

import pe_fx
from pe_fx.ties import table

Sample = Callable[[int], Tensor]


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224)


def tokens(batch: int, length: int = 128) -> Tensor:
    return torch.randint(50_257, (batch, length))


class Decoder(nn.Module):
    """GPT-2 with its published sizes, from its configuration."""

    def __init__(self) -> None:
        super().__init__()
        configuration = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
        self.model = transformers.GPT2LMHeadModel(configuration)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids).logits
        return logits


@dataclass
class Subject:
    """A model to measure, its inputs, the options of `pe_fx.transform`, and the batch on the CPU."""

    build: Callable[[], nn.Module]
    sample: Sample = images
    batch: int = 2
    options: dict[str, Any] = field(default_factory=dict)


def resnet50(entry: str) -> Subject:
    return Subject(functools.partial(timm.create_model, "resnet50"), batch=4, options={"entry": entry})


SUBJECTS = {
    "deit_small": Subject(functools.partial(timm.create_model, "deit_small_patch16_224"), batch=4),
    "vit_base": Subject(functools.partial(timm.create_model, "vit_base_patch16_224")),
    "resnet50_keep": resnet50("keep"),
    "resnet50_slice": resnet50("slice"),
    "resnet50_expand": resnet50("expand"),
    "convnext_tiny": Subject(functools.partial(timm.create_model, "convnext_tiny"), batch=4),
    "gpt2": Subject(Decoder, tokens),
}


class Clock:
    """Marks points in time: CUDA events on a GPU, else the wall clock."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Seconds between the marks."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


PARTS = ("forward", "backward", "optimizer")


class Kernel(NamedTuple):
    """All runs of one kernel in a step."""

    name: str
    calls: int
    microseconds: float


@dataclass
class Variant:
    """One way to train a model."""

    name: str
    model: nn.Module
    backend: str
    inputs: Tensor
    autocast: bool
    mode: str | None = None
    fused: bool | None = None

    def __post_init__(self) -> None:
        self.compiled = torch.compile(self.model, backend=self.backend, mode=self.mode)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=self.fused)
        self.spans: list[list[float]] = []
        self.device = self.inputs.device.type

    def loss(self) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.compiled(self.inputs).float().square().mean()
        return loss

    def steps(self, count: int = 1, skipped: int = 0) -> None:
        """Takes so many steps, one behind the other; the first ones are not counted."""
        clocks = [self.step() for _ in range(count)]
        self.spans += [clock.spans() for clock in clocks[skipped:]]

    def step(self) -> Clock:
        clock = Clock(self.device == "cuda")
        clock.mark()
        loss = self.loss()
        clock.mark()
        torch.autograd.backward(loss)
        clock.mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.mark()
        return clock

    def compile(self) -> float:
        """Seconds of the first step, which compiles, beyond those of the second."""
        start = time.perf_counter()
        self.step().spans()
        middle = time.perf_counter()
        self.step().spans()
        return 2 * middle - start - time.perf_counter()

    def median(self, *parts: str) -> float:
        return statistics.median(sum(spans[PARTS.index(part)] for part in parts or PARTS) for spans in self.spans)

    def bytes(self) -> dict[str, int]:
        """Of parameters, of the gradients that one step leaves, and of the optimizer's state."""
        torch.autograd.backward(self.loss())
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.optimizer.zero_grad(set_to_none=True)
        state = sum(value.nbytes for held in self.optimizer.state.values() for value in held.values() if isinstance(value, Tensor))
        return {"weights": sum(p.nbytes for p in self.model.parameters()), "gradients": gradients, "state": state}

    def peak(self) -> int:
        """Bytes that a step takes at most, beside those of weights and optimizer state. Of a GPU only."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step().spans()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self) -> list[Kernel]:
        """What one step runs on the GPU, the longest first; neither memory copied nor set."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.step().spans()
        events = [event for event in profile.key_averages() if event.device_type.name == "CUDA" and not event.is_user_annotation]
        found = [Kernel(event.key, event.count, event.self_device_time_total) for event in events if not event.key.startswith("Mem")]
        return sorted(found, key=lambda kernel: -kernel.microseconds)


RECIPES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "dense, inductor": ("inductor", None),
    "tied, pe_fx": ("pe_fx", {}),
    "tied, inductor": ("inductor", {}),
    "dense, pe_fx": ("pe_fx", None),
    "signed, pe_fx": ("pe_fx", {"mix": "signed"}),
    "fitted, pe_fx": ("pe_fx", {"mix": "fitted"}),
    "signed + gain, pe_fx": ("pe_fx", {"mix": "signed", "gain": True}),
}
"""Backend and options of `pe_fx.transform`, None for the model as it is."""


def built(recipe: str, subject: Subject, dense: nn.Module, inputs: Tensor) -> tuple[nn.Module, str]:
    """The recipe's model, made from the dense one, and its backend."""
    backend, options = RECIPES[recipe]
    return copy.deepcopy(dense) if options is None else pe_fx.transform(dense, inputs, **subject.options | options), backend


def recipes_of(subject: Subject, globs: Sequence[str]) -> list[str]:
    """Those that fit the subject; the first comes always."""
    first, *others = RECIPES
    if subject.options.get("entry", "keep") != "keep":  # it changes modules, which a graph does not have
        others.remove("dense, pe_fx")
    return [first, *(name for name in others if any(fnmatch.fnmatchcase(name, glob) for glob in globs))]


def measure(name: str, device: str, batch: int | None, autocast: bool, rounds: int, compilations: int, globs: Sequence[str]) -> list[Row]:
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    dense = subject.build().to(device)
    inputs = subject.sample(batch or subject.batch).to(device)
    variants = [Variant(recipe, *built(recipe, subject, dense, inputs), inputs, autocast) for recipe in recipes_of(subject, globs)]
    seconds: list[list[float]] = [[] for _ in variants]
    for i, variant in tqdm(list(enumerate(variants)) * compilations, desc=f"{name}: compile", leave=False):
        if i == 0:
            torch.compiler.reset()
        seconds[i].append(variant.compile())
    for _ in tqdm(range(rounds), desc=f"{name}: steps", leave=False):
        for variant in variants:
            variant.steps()
    first = variants[0]
    rows = []
    for i, variant in enumerate(variants):
        row = row_of(name, variant, first)
        row["compile"] = f"{statistics.median(a / b for a, b in zip(seconds[i], seconds[0], strict=True)):.2f}"
        if device == "cuda":
            row |= of_kernels(variant.kernels(), first.kernels()) | {"peak_mb": f"{variant.peak() / 1e6:.0f}"}
        rows.append(row)
    return rows


def row_of(name: str, variant: Variant, first: Variant) -> Row:
    """What the variant's steps took, beside those of the first variant, with which it took them in turns."""
    row = dict.fromkeys(COLUMNS, "")
    row |= {"device": machine(variant.device), "dtype": "bf16" if variant.autocast else "fp32", "mode": variant.mode or "default"}
    row |= {"model": name, "batch": str(variant.inputs.shape[0]), "variant": variant.name, "rounds": str(len(variant.spans))}
    row |= {"torch": torch.__version__.partition("+")[0], "date": datetime.date.today().isoformat()}
    row["step"] = f"{statistics.median(a / b for a, b in zip(map(sum, variant.spans), map(sum, first.spans), strict=True)):.2f}"
    row |= {part: f"{variant.median(part) / first.median(part):.2f}" for part in PARTS}
    row |= {f"{key}_mb": f"{value / 1e6:.1f}" for key, value in variant.bytes().items()}
    return row


def of_kernels(kernels: Sequence[Kernel], others: Sequence[Kernel]) -> Row:
    """How many there are, and how long they take beside the others: what is left where the GPU need not wait for launches."""
    times = [sum(kernel.microseconds for kernel in some) for some in (kernels, others)]
    return {"kernels": str(sum(kernel.calls for kernel in kernels)), "gpu": f"{times[0] / times[1]:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--variants", nargs="+", default=["*"], metavar="GLOB", help="beside dense with Inductor (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="default: a small one that suits two CPU cores")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16 is autocast; default: bf16 on a GPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compilations", type=int, default=1, help="how often each variant is compiled, in turns; the ratio is the median")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("bench.csv"), help="where the rows go")
    parser.add_argument("--summary", action="store_true", help="write the page of what the CSV holds, beside it, and stop")
    options = parser.parse_args()
    if options.summary:
        once = rows_of(options.csv.with_name("once.csv"))
        options.csv.with_suffix(".md").write_text(page(rows_of(options.csv), once), encoding="utf-8")
        return
    torch._inductor.config.force_disable_caches = True  # compile times are to be compared
    autocast = options.dtype == "bf16" or (options.dtype is None and options.device == "cuda")
    print(f"torch {torch.__version__}, {machine(options.device)}; ratios to the first variant, medians of {options.rounds} rounds in turns")
    torch.compile(nn.Linear(4, 4).to(options.device))(torch.ones(2, 4, device=options.device)).sum().backward()  # loads the compiler
    for name in options.models:
        rows = measure(name, options.device, options.batch, autocast, options.rounds, options.compilations, options.variants)
        print("\n" + table(*shown(rows)), flush=True)
        write_rows(options.csv, rows)


if __name__ == "__main__":
    main()
