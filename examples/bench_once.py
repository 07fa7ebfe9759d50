"""Layers that read their tied weight once:  python examples/bench_once.py

One feed-forward layer of few rows as dense through Inductor, tied through Inductor, and tied through the backend pe_fx, in turns; then
decoding, one token at a time, of two language models with random weights, one like GPT-2 (its published sizes) and one like Llama (gated;
width 2,048, 8 blocks). Printed is how many times as fast as dense each is, in medians over the rounds; `--csv` has the rows.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tables import append, made_by, markdown
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import pe_fx

Call = Callable[[], Any]
Row = dict[str, str]


@dataclass(frozen=True)
class Layer:
    """A feed-forward layer, by its sizes; the rows with which it is measured, and those with which Inductor tries everything."""

    kind: str
    width: int
    height: int
    rows: tuple[int, ...]
    autotuned: tuple[int, ...] = ()


LAYERS = (
    Layer("mlp", 4096, 16384, (1, 2, 4, 8, 16, 32), (1, 4)),
    Layer("gated", 4096, 11008, (1, 2, 4), (1,)),
    Layer("mlp", 1024, 4096, (1, 2, 4, 8)),
    Layer("mlp", 768, 3072, (1, 4, 8)),
    Layer("mlp", 2048, 8192, (1, 2, 4)),
)
TINY = (Layer("mlp", 48, 96, (1, 2)), Layer("gated", 48, 64, (1,)))


def dense_mlp(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, last: Tensor) -> Tensor:
    return functional.linear(functional.gelu(functional.linear(x, up, bias)), down, last)


def tied_mlp(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, last: Tensor) -> Tensor:
    return functional.linear(functional.gelu(functional.linear(x, up, bias)), up.t(), last)


def dense_gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)


def tied_gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), up.t())


FUNCTIONS: Mapping[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "mlp": (dense_mlp, tied_mlp),
    "gated": (dense_gated, tied_gated),
}


def weights_of(layer: Layer, device: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """So many sets of weights that together they fit no cache of a GPU; on a CPU, one."""
    sets = 1 if device == "cpu" else max(2, 300_000_000 // (layer.height * layer.width * 4))

    def made() -> dict[str, Tensor]:
        names = ["up"] if layer.kind == "mlp" else ["gate", "up"]
        made = {name: torch.randn(layer.height, layer.width, device=device, dtype=dtype) / layer.width**0.5 for name in names}
        made["down"] = torch.randn(layer.width, layer.height, device=device, dtype=dtype) / layer.height**0.5
        if layer.kind == "mlp":
            made["bias"] = torch.randn(layer.height, device=device, dtype=dtype)
            made["last"] = torch.randn(layer.width, device=device, dtype=dtype)
        return made

    return [made() for _ in range(sets)]


@dataclass
class Case:
    """A layer with so many rows, and the ways to compute it: their names, a call of each for every set of weights, and its error."""

    layer: Layer
    rows: int
    dtype: torch.dtype
    sets: list[dict[str, Tensor]]
    calls: dict[str, Call]
    errors: dict[str, float]

    def measured(self, rounds: int) -> list[Row]:
        times = microseconds(list(self.calls.values()), rounds)
        found = []
        for way, each in zip(self.calls, times, strict=True):
            faster = statistics.median(a / b for a, b in zip(times[0], each, strict=True))
            layer = {"kind": self.layer.kind, "width": str(self.layer.width), "height": str(self.layer.height)}
            layer |= {"rows": str(self.rows), "dtype": str(self.dtype), "way": way}
            error = f"{self.errors[way]:.1e}" if way in self.errors else ""
            figures = {"us": f"{statistics.median(each) / len(self.sets):.2f}", "faster_than_dense": f"{faster:.3f}", "error": error}
            found.append(layer | figures | made_by(self.sets[0]["up"].device.type))
        return found


def case(layer: Layer, rows: int, dtype: torch.dtype, sets: list[dict[str, Tensor]]) -> Case:
    """Compiled, each way compared with float64."""
    torch._dynamo.config.recompile_limit = 1000
    dense, tied = FUNCTIONS[layer.kind]
    x = torch.randn(rows, layer.width, device=sets[0]["up"].device, dtype=dtype)
    ways: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {"dense, inductor": (dense, {"backend": "inductor"})}
    ways |= {"tied, inductor": (tied, {"backend": "inductor"}), "tied, single read": (tied, {"backend": "pe_fx"})}
    if rows in layer.autotuned and x.is_cuda:
        ways["dense, max-autotune"] = dense, {"mode": "max-autotune-no-cudagraphs"}
    made = Case(layer, rows, dtype, sets, {}, {})
    with torch.no_grad():
        for way, (function, how) in ways.items():
            compiled: Any = torch.compile(function, dynamic=False, **how)
            exact = function(x.double(), **{name: value.double() for name, value in sets[0].items()})
            made.errors[way] = ((compiled(x, **sets[0]).double() - exact).norm() / exact.norm()).item()
            made.calls[way] = graphed(functools.partial(on_each, compiled, x, sets), x.is_cuda)
    return made


@torch.no_grad()
def on_each(compiled: Callable[..., Any], x: Tensor, sets: Sequence[Mapping[str, Tensor]]) -> None:
    for each in sets:
        compiled(x, **each)


def graphed(call: Call, cuda: bool) -> Call:
    """On a GPU, the call as a CUDA graph, which keeps alive what the call reads."""
    call()
    if not cuda:
        return call
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return lambda held=call: graph.replay()  # type: ignore[misc]


def microseconds(calls: Sequence[Call], rounds: int) -> list[list[float]]:
    """Of each call, in turns."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call in zip(found, calls, strict=True):
            if torch.cuda.is_available():
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
                call()
                events[0].record()
                for _ in range(3):
                    call()
                events[1].record()
                torch.cuda.synchronize()
                times.append(events[0].elapsed_time(events[1]) * 1000 / 3)
            else:
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e6)
    return found


# ------------------------------------------------------------------------------------------------------------------ decoding


class Block(nn.Module):
    """A decoder's block that keeps the keys and values of all positions, and is given one more."""

    def __init__(self, width: int, height: int, heads: int, length: int, gated: bool) -> None:
        super().__init__()
        self.heads, self.gated = heads, gated
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=not gated) for _ in range(4))
        self.up, self.down = nn.Linear(width, height, bias=not gated), nn.Linear(height, width, bias=not gated)
        self.gate = nn.Linear(width, height, bias=False) if gated else nn.Identity()
        self.keys, self.values = (nn.Buffer(torch.zeros(1, heads, length, width // heads)) for _ in range(2))

    def forward(self, x: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (made.view(1, 1, self.heads, -1).transpose(1, 2) for made in (self.q(y), self.k(y), self.v(y)))
        keys, values = self.keys.index_copy(2, place, k), self.values.index_copy(2, place, v)
        y = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        hidden = functional.silu(self.gate(y)) * self.up(y) if self.gated else functional.gelu(self.up(y))
        z: Tensor = x + self.down(hidden)
        return z


class Decoder(nn.Module):
    """The logits behind one token. The cache stays as it is: each call takes as long as a step of decoding does."""

    def __init__(self, words: int, width: int, height: int, heads: int, depth: int, gated: bool, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width, height, heads, length, gated) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, token: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(token)
        for block in self.blocks:
            x = block(x, place, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits


DECODERS = {"like GPT-2": (50257, 768, 3072, 12, 12, False), "like Llama": (32000, 2048, 5632, 16, 8, True)}
TINY_DECODERS = {"tiny": (100, 64, 128, 4, 2, True)}


def decoding(name: str, sizes: Sequence[Any], device: str, dtype: torch.dtype, rounds: int, length: int = 256) -> list[Row]:
    """A token of each way in turns."""
    torch.manual_seed(0)
    words, width, height, heads, depth, gated = sizes
    dense = Decoder(words, width, height, heads, depth, gated, length).to(device, dtype).eval()
    inputs = torch.zeros(1, 1, dtype=torch.long, device=device), torch.tensor([length // 2], device=device)
    given = (*inputs, torch.arange(length, device=device)[None, None, None] <= inputs[1])
    tied = pe_fx.transform(dense, given, rules=["mlp", "glu"])
    ways = {"dense, inductor": (dense, "inductor"), "tied, inductor": (tied, "inductor"), "tied, single read": (tied, "pe_fx")}
    calls = []
    with torch.no_grad():
        for model, backend in ways.values():
            compiled = torch.compile(model, backend=backend, dynamic=False)
            calls.append(graphed(torch.no_grad()(functools.partial(compiled, *given)), device == "cuda"))
        times = microseconds(calls, rounds)
    found = []
    for way, each in zip(ways, times, strict=True):
        faster = statistics.median(a / b for a, b in zip(times[0], each, strict=True))
        shape = {"kind": f"decoding, {name}", "width": str(width), "height": str(height), "rows": "1", "dtype": str(dtype), "way": way}
        found.append(shape | {"us": f"{statistics.median(each):.2f}", "faster_than_dense": f"{faster:.3f}", "error": ""} | made_by(device))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--rows", type=int, nargs="+", help="only these numbers of rows")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--csv", type=Path, help="adds the rows here")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    rows: list[Row] = []
    for layer in tqdm(TINY if options.tiny else LAYERS, desc="layers", leave=False):
        sets = weights_of(layer, options.device, dtype)
        for count in layer.rows:
            if not options.rows or count in options.rows:
                rows += case(layer, count, dtype, sets).measured(options.rounds)
    for name, sizes in tqdm((TINY_DECODERS if options.tiny else DECODERS).items(), desc="decoding", leave=False):
        rows += decoding(name, sizes, options.device, dtype, options.rounds)
    shown = ("kind", "width", "height", "rows", "dtype", "way", "faster_than_dense", "error")
    print(markdown(shown, [[row[column] for column in shown] for row in rows]))
    if options.csv:
        append(options.csv, *rows)


if __name__ == "__main__":
    main()
