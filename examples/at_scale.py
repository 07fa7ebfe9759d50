"""`python examples/at_scale.py`: the learning study on one GPU, wider, deeper and longer; all nets side by side, on the same batches.

Byte-level language models of `accuracy.py` on the text of every Python package that is installed. Each variant is trained at the
best learning rate of the small study, divided by how many times wider the net is, and at one step (1.5 times) to either side.
The nets take every step together: each one's whole step (forward, backward, clipping, AdamW, in bf16) is one CUDA graph on a stream
of its own, so that many small nets fill one GPU. A row for each net is written to the CSV after each tenth of the training.

    python examples/at_scale.py --steps 20000
    python examples/at_scale.py --seconds 240        # as many steps as fit; the schedule follows the clock
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accuracy import count
from accuracy_tasks import Bytes, loss_of
from torch import Tensor, nn
from tqdm import tqdm

import pe_fx

SMALL_WIDTH = 96
STEP = 1.5
CONTEXT = 128


@dataclass(frozen=True)
class Kind:
    """A variant: options of `pe_fx.transform` (None: dense), its size beside that of dense, and the small study's learning rate."""

    name: str
    lr: float
    options: dict[str, Any] | None = None
    wider: float = 1.0
    depth: float = 1.0
    pairs: bool = False


KINDS = (
    Kind("dense", 9e-3),
    Kind("tied, signed", 1.4e-2, {"mix": "signed"}),
    Kind("tied, signed, wider", 1.4e-2, {"mix": "signed"}, wider=132 / 96),
    Kind("dense, half as deep", 9e-3, depth=0.5),
    Kind("dense, blocks shared in pairs", 9e-3, pairs=True),
)


def build(kind: Kind, width: int, depth: int) -> nn.Module:
    heads = width // 32
    model = Bytes(round(width * kind.wider / heads) * heads, max(1, round(depth * kind.depth)), heads, CONTEXT)
    blocks: list[Any] = list(model.blocks)
    if kind.pairs:
        for first, second in zip(blocks[::2], blocks[1::2], strict=False):
            for name in ("qkv", "proj", "up", "down"):
                getattr(second, name).weight = getattr(first, name).weight
    if kind.options is None:
        return model
    return pe_fx.transform(model, torch.zeros(2, CONTEXT, dtype=torch.long), **kind.options)


@dataclass
class Net:
    """A model that trains, its optimizer, and what it scored so far."""

    kind: Kind
    lr: float
    model: nn.Module
    device: torch.device
    curve: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.to(self.device)
        cuda = self.device.type == "cuda"
        rate: Any = torch.tensor(self.lr, device=self.device) if cuda else self.lr
        self.optimizer = torch.optim.AdamW(self.model.parameters(), rate, weight_decay=0.05, betas=(0.9, 0.95), fused=cuda, capturable=cuda)
        for block in self.model.blocks if cuda else ():  # type: ignore[union-attr]  # all blocks of one size share what is compiled
            block.compile(backend="inductor" if self.kind.options is None else "pe_fx")
        self.stream = torch.cuda.Stream() if cuda else None  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = loss_of(self.model, inputs, targets)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()

    def capture(self, inputs: Tensor, targets: Tensor) -> None:
        """Compiles the step and records it as a CUDA graph; the weights are afterwards as before."""
        if self.stream is None:
            return
        start = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.step(inputs, targets)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step(inputs, targets)
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), start, strict=True):
                parameter.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        torch.cuda.synchronize()

    def run(self, inputs: Tensor, targets: Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr * rate)
            else:
                group["lr"] = self.lr * rate
        if self.graph is None:
            self.step(inputs, targets)
        else:
            self.graph.replay()


class Text:
    """The source of all packages and of the standard library; every tenth file is for validation."""

    def __init__(self, device: torch.device, limit: int, batch: int, seed: int) -> None:
        roots = {Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")}
        files = sorted({path for root in roots for path in root.rglob("*.py") if path.is_file()})
        held, read = bytearray(), bytearray()
        for i, path in enumerate(files[:: max(1, len(files) * 12_000 // limit)]):
            (held if i % 10 == 0 else read).extend(path.read_bytes())
        self.held, self.read = (torch.frombuffer(part, dtype=torch.uint8).to(device) for part in (held, read))
        self.batch, self.device = batch, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, stream: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(stream) - CONTEXT - 1, (rows, 1), generator=generator, device=self.device)
        block = stream[starts + torch.arange(CONTEXT + 1, device=self.device)].long()
        return block[:, :-1], block[:, 1:]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.draw(self.read, self.batch, self.generator)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]
    def score(self, model: nn.Module, rows: int) -> float:
        generator = torch.Generator(self.device).manual_seed(0)
        losses = []
        for _ in range(8):
            with torch.autocast(self.device.type, torch.bfloat16):
                losses.append(loss_of(model, *self.draw(self.held, rows, generator)))
        return torch.stack(losses).float().mean().item()


def rate(progress: float) -> float:
    """5 % warm-up, then a cosine to nothing."""
    return progress / 0.05 if progress < 0.05 else 0.5 + 0.5 * math.cos(math.pi * (progress - 0.05) / 0.95)


COLUMNS = (
    "variant",
    "width",
    "depth",
    "batch",
    "lr",
    "seed",
    "params",
    "steps",
    "done",
    "score",
    "curve",
    "text",
    "card",
    "versions",
    "date",
)


def write(
    path: Path, nets: list[Net], options: argparse.Namespace, steps: int, progress: float, text: Text, before: list[list[str]]
) -> None:
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(before)
        for net in nets:
            score = f"{net.curve[-1]:.4f}" if net.curve else ""
            curve = json.dumps([round(value, 4) for value in net.curve])
            size = [net.kind.name, options.width, options.depth, options.batch, f"{net.lr:.2e}", options.seed, count(net.model)]
            made = [f"{len(text.read) / 1e6:.0f} MB", card, f"torch {torch.__version__}", datetime.date.today().isoformat()]
            writer.writerow([*size, steps, f"{progress:.3f}", score, curve, *made])


def train(nets: list[Net], text: Text, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    inputs, targets = (each.clone() for each in next(text.batches()))
    for net in tqdm(nets, desc="compile", leave=False):
        net.capture(inputs, targets)
    before = list(csv.reader(options.out.open(encoding="utf-8")))[1:] if options.out.exists() else []
    print(f"READY {len(nets)} nets, text of {len(text.read) / 1e6:.0f} MB", flush=True)
    progress, elapsed, step, scored = 0.0, 0.0, 0, 0
    last = time.monotonic()
    with tqdm(total=100, unit="%", leave=False) as bar:
        while progress < 1:
            batch = next(text.batches())
            inputs.copy_(batch[0])
            targets.copy_(batch[1])
            for net in nets:
                with torch.cuda.stream(net.stream) if net.stream else nullcontext():
                    if net.stream:
                        net.stream.wait_stream(torch.cuda.default_stream())
                    net.run(inputs, targets, rate(progress))
            if cuda:
                for stream in (net.stream for net in nets if net.stream):
                    torch.cuda.default_stream().wait_stream(stream)
                if step % 10 == 0:
                    torch.cuda.synchronize()
            step += 1
            now = time.monotonic()
            elapsed += min(now - last, 1.0)  # it may be stopped for a while
            last = now
            progress = min(1.0, step / options.steps if options.steps else elapsed / options.seconds)
            if int(progress * 10) > scored:
                scored = int(progress * 10)
                for net in nets:
                    net.curve.append(text.score(net.model, options.batch))
                write(options.out, nets, options, step, progress, text, before)
                last = time.monotonic()
                bar.set_postfix_str(f"{step} steps; " + " ".join(f"{net.curve[-1]:.3f}" for net in nets))
                bar.update(int(progress * 100) - bar.n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help=f"rows of {CONTEXT} bytes (default: 32)")
    parser.add_argument("--steps", type=int, help="(default: --seconds)")
    parser.add_argument("--seconds", type=float, default=240, help="of training, where --steps is not given (default: 240)")
    every = [f"{kind.name}:{place}" for kind in KINDS for place in (-1, 0, 1)]
    parser.add_argument(
        "--nets", nargs="+", default=every, metavar="NAME:STEP", help="each with steps beside the small study's learning rate"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=int, default=300_000_000, help="about so many bytes of text (default: 300 MB)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("at_scale.csv"), metavar="CSV")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 100
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    text = Text(torch.device(options.device), options.text, options.batch, options.seed)
    kinds = {kind.name: kind for kind in KINDS}
    nets = []
    for name, _, place in (net.rpartition(":") for net in options.nets):
        torch.manual_seed(options.seed)
        lr = kinds[name].lr * SMALL_WIDTH / options.width * STEP ** int(place)
        nets.append(Net(kinds[name], lr, build(kinds[name], options.width, options.depth), torch.device(options.device)))
    train(nets, text, options)


if __name__ == "__main__":
    main()
