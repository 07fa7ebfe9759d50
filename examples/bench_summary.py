"""The rows of `bench.csv`, and the page `bench.md` that is made of them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from tables import markdown, rows_of

Row = dict[str, str]

KEY = ("device", "dtype", "mode", "model", "batch", "variant")
COLUMNS = (
    *KEY,
    *("rounds", "step", "forward", "backward", "optimizer", "gpu", "compile"),
    *("weights_mb", "gradients_mb", "state_mb", "peak_mb", "kernels"),
    *("torch", "date"),
)
SHOWN = {  # the columns of the page's tables; one that no row of a table fills is left out
    "mode": "mode",
    "model": "model",
    "batch": "batch",
    "variant": "variant",
    "step": "step",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "gpu": "kernels' time",
    "compile": "compile",
    "weights_mb": "weights, MB",
    "gradients_mb": "gradients, MB",
    "state_mb": "optimizer state, MB",
    "peak_mb": "peak of a step, MB",
    "kernels": "kernels",
}

INTRODUCTION = """\
# Training steps, memory and time to compile

This page is written by `python examples/bench.py --summary` from [bench.csv](bench.csv).

`python examples/bench.py` takes steps (forward, backward, AdamW) of several variants in turns, in one process. Times are ratios to the
dense model with Inductor, in medians over the rounds. "Dense, pe_fx" is the untouched model with `backend="pe_fx"`, which ties it in
the graph. Bytes of gradients are what DDP sends in each step. Images have 224x224 pixels, gpt2 reads 128 tokens; bf16 is autocast.
Weights start at random; nothing is downloaded."""

NOTES: Mapping[tuple[str, str], str] = {  # what was learned from the rows of a device and dtype
    ("CPU, 1 core", "fp32"): """\
Small batches, other load on the machine's second core: two runs differed by up to 0.05 for DeiT-S and 0.15 for ResNet50;
`tied, pe_fx` with `keep` came to 0.97, 0.98, 1.01 and 1.01.

- At so small a batch on a CPU the step's time hardly changes; weights, gradients and optimizer state do.
- `expand` takes longer: the authors' first blocks widen the stage's whole input by a depthwise 3x3 convolution, BatchNorm and GELU, and
  their first 1x1 convolution then reads two or four times as many channels (at 1.003 times the dense multiply-adds; `slice` needs 0.912).
  A profile shows both: the kernels that Inductor generates take 1.25 times as long as the dense model's, the backward passes of 1x1
  convolutions of stride one 1.35 times.
- Signed and fitted ties put W together anew in each step; it is written once, in the order in memory of its source. That work grows with
  the weight, not with the batch: at batch 4 DeiT-S takes 1.02 (signed), 1.03 (fitted) and 1.10 (signed, with gains) times as long as
  with plain ties.
- Compiling DeiT-S with signed ties took 1.11 times the processor time of plain ones (with gains 1.17): blocks alike are mixed alike, so
  that each shape of weight is a few kernels more, and no more.
- Compiling took 0.88 (DeiT-S), 1.00 (ResNet50 `keep`) and 0.94 (`slice`) of the time that Inductor took for the dense model where plain
  ties went through pe_fx, and 0.85 and 0.93 where the dense model did, matching included (`--compilations 3`; 2 for `slice`); 0.93 to
  1.03 for the others (one compilation each). `expand`, with its additional operations, took 1.23.""",
    ("NVIDIA H200", "bf16"): """\
`python examples/gpu.py`, steps `bench` and `once`; gpt2 reads 1,024 tokens. `kernels' time` is what the GPU is busy for in a step, beside
the dense model's: the step's own time where nothing waits for launches. "Peak of a step" comes on top of weights and optimizer state. In
mode `reduce-overhead` forward and backward are CUDA graphs, and AdamW is fused; `default` has PyTorch's own AdamW (all parameters at
once). The longest kernels of each row are in [kernels.csv](kernels.csv).

- The processor launched 600 to 850 kernels a step in some 20 ms, so all small steps in `default` wait for it: there the number of
  kernels counts, and the parts of a step are those of the launches. Three runs differed: DeiT-S at batch 128 0.98, 1.02
  and 0.96, at 8 0.98, 0.92 and 0.94 (wanted were 0.97 and 0.85), ResNet50 `keep` 1.04 and 1.10.
- Busy for less: DeiT-S 0.99 at batch 128 and 0.90 at 8, GPT-2 0.96 and 0.86, ResNet50 0.99 (`keep`) and 0.90 (`slice`). Peak memory is
  at most dense's but for `expand` and fitted ties.
- AdamW: 0.55 to 0.92 of dense's time, for 0.52 (DeiT-S) to 0.72 (ResNet50 `keep`) of the parameters.
- With CUDA graphs ResNet50 takes 1.00 (`keep`) and 0.91 (`slice`), DeiT-S at batch 8 0.99 to 1.03 in three runs and GPT-2 with one row
  0.97 to 0.99, forward 1.22 to 1.39. The dense models, tied by the backend alone, take 0.99 and 0.96, forward 1.13. The graphs themselves
  are busy for 0.93 and 0.92: what is added lies before their launch, where torch.compile checks its guards, of which a tied model has more
  with torch 2.11 (that version has a short cut for modules, which a property closes; on a CPU core checks take 2.4 times the dense
  model's there, and 1.08 times with torch 2.14). They can be left out:
  `torch.compiler.set_stance("default", skip_guard_eval_unsafe=True)` makes it 0.05 and 0.06 ms with torch 2.14.
- Signed ties beside plain ones, at the smallest batches: GPT-2 1.01 in both modes, DeiT-S 1.01 with CUDA graphs and 1.06 without, where
  it waits for the launch of 18 kernels more. Fitted ties, DeiT-S, 1.07 and 1.13: their orders are read by index, 96 kernels more.
- `expand` is busy 1.37 times as long (a step 1.13): what is added are its depthwise convolutions, 3.7 ms a step, which have one output
  for each repeated channel. (With several outputs a channel cuDNN ran a kernel for each channel: 6.7 times as long.)""",
}

READ_ONCE = """\
## W read once

A feed-forward layer of few rows, and the decoding of one token: how many times as fast as the dense one through Inductor, in medians over
rounds in turns ([once.csv](once.csv) has microseconds, and errors against float64). "Tied" is Inductor's code for a tied layer, which
reads W twice; "single read", the backend's."""

READ_ONCE_NOTES: Mapping[str, str] = {
    "NVIDIA H200": """\
`python examples/gpu.py`, steps `once` and `tune`; every way as a CUDA graph over so many weights that they do not fit the cache. The
kernel's sizes are the best of those that `tune` measured ([tune.csv](tune.csv)). It is used where it pays: at widths of 512 to 4,096 for
one or two rows, to 768 for three and four; with more, the graph stays as it is. (Here it was forced up to a product of rows and width
of 16,384; beyond, "single read" is the tied layer.) At one row of width 4,096, 134 MB in 39.0 us are 3.4 TB/s, of the 4.3 that a copy
moves; with more rows the arithmetic takes longer than the reading. `max-autotune` chose its kernels while other processes used the
GPU.""",
    "CPU, 2 cores": """\
`OMP_NUM_THREADS=2 python examples/bench_once.py --rows 1 4 --rounds 31` (and 1) on two cores of a Xeon with AVX-512, with nothing else
running. At width 4,096 and one row, four runs on one core gave 1.62 to 1.86. It is used for up to 16 rows (4 in bfloat16), from 768x3,072
weights on. The decoders have random weights and a cache of 256 positions; only their feed-forward layers are tied.""",
}

PLANNING = """\
## Planning

Planning costs little beside capture, and grows with the graph (`python examples/bench_plan.py --repeats 3`, medians of processor time in
turns, 27 November 2026, torch 2.14.1, the same machine): matching takes 2.8 % of the capture on DeiT-S and 2.6 % on ResNet50. Beside a
ViT of 24 layers, one of 96 has 3.9 times the nodes and takes 3.8 times the seconds and 4.0 times the function calls; one of 288 layers
(9,525 nodes) has 11.7 times the nodes and takes 10.2 times the seconds and 11.8 times the calls. Meanwhile Python's garbage collection
waits: it would look through all graphs that are held, and take half of the seconds at 288 layers."""


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Into the CSV, in the place of rows of the same measurement."""
    merged = {tuple(row[column] for column in KEY): row for row in (*rows_of(path), *rows)}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())


WAYS = {
    "tied, inductor": "tied",
    "tied, single read": "single read",
    "dense, max-autotune": "max-autotune",
    "kernel, best tuning": "best sizes",
}


def read_once(rows: Sequence[Row]) -> str:
    """For each card and dtype a table: a line for each layer and number of rows, a column for each way."""
    parts = [READ_ONCE]
    for card, dtype in dict.fromkeys((row["card"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["card"], row["dtype"]) == (card, dtype)]
        ways = [way for way in WAYS if any(row["way"] == way for row in own)]
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for row in own:
            place = row["kind"], f"{int(row['width']):,}", f"{int(row['height']):,}", row["rows"]
            found.setdefault(place, {})[row["way"]] = f"{float(row['faster_than_dense']):.2f}"
        lines = [(*place, *(values.get(way, "") for way in ways)) for place, values in found.items()]
        made = f"{card}, {dtype.removeprefix('torch.')}; {own[0]['versions']}, {own[0]['date']}."
        table = markdown(("layer", "width", "hidden", "rows", *(WAYS[way] for way in ways)), lines)
        parts += [f"### {made}", table, READ_ONCE_NOTES.get(card, "")]
    return "\n\n".join(filter(None, parts))


def page(rows: Sequence[Row], once: Sequence[Row]) -> str:
    """A table for each device and dtype, with what was learned from it; and one of layers that read their weight once."""
    parts = [INTRODUCTION]
    for device, dtype in dict.fromkeys((row["device"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["device"], row["dtype"]) == (device, dtype)]
        versions, rounds, dates = (" and ".join(dict.fromkeys(row[column] for row in own)) for column in ("torch", "rounds", "date"))
        parts += [f"## {device}, {dtype}", f"torch {versions}; {rounds} rounds; {dates.replace('/', ' to ')}.", markdown(*shown(own))]
        if note := NOTES.get((device, dtype)):
            parts.append(note)
    return "\n\n".join((*parts, read_once(once), PLANNING)) + "\n"


def shown(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of a table."""
    columns = [column for column in SHOWN if any(row[column] not in ("", "default") for row in rows)]
    return [SHOWN[column] for column in columns], [[row[column] for column in columns] for row in rows]
