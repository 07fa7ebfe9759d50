"""What planning costs beside capture, and how it grows with depth:  python examples/bench_plan.py

Prints, for DeiT-S and ResNet50, the median time of matching (everything that `pe_fx.plan` does after the graph is captured) as a
share of the capture, and for vision transformers of 24, 96 and 288 layers (10,000 nodes) how their matching grows, in processor
seconds and in function calls. All are measured in turns in one process, so that the ratios hold on a noisy machine.
"""

from __future__ import annotations

import argparse
import cProfile
import statistics
import time
from collections.abc import Callable

import timm
from torch import nn
from tqdm import tqdm

import pe_fx
from pe_fx.graph.capture import Captured, capture
from pe_fx.ties import table


def vit(depth: int) -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", depth=depth, embed_dim=64, num_heads=2)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "deit_small_patch16_224": lambda: timm.create_model("deit_small_patch16_224"),
    "resnet50": lambda: timm.create_model("resnet50"),
    "vit, 24 layers": lambda: vit(24),
    "vit, 96 layers": lambda: vit(96),
    "vit, 288 layers": lambda: vit(288),
}


def seconds(function: Callable[[], object]) -> float:
    """Of the processor: other load on the machine does not count."""
    start = time.process_time()
    function()
    return time.process_time() - start


def function_calls(model: nn.Module, captured: Captured) -> int:
    """Work that no other load on the machine disturbs."""
    profile = cProfile.Profile()
    profile.runcall(pe_fx.plan, model, captured)
    return sum(entry.callcount for entry in profile.getstats())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    models = {name: build() for name, build in MODELS.items()}
    graphs = {name: capture(model) for name, model in models.items()}
    for name, graph in graphs.items():
        pe_fx.plan(models[name], graph)
    captures: dict[str, list[float]] = {name: [] for name in models}
    matches: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(options.repeats), desc="rounds"):
        for name, model in models.items():
            captures[name].append(seconds(lambda model=model: capture(model)))  # type: ignore[misc]
            matches[name].append(seconds(lambda name=name, model=model: pe_fx.plan(model, graphs[name])))  # type: ignore[misc]
    rows = [
        (name, f"{len(graphs[name].graph.nodes):,}", f"{100 * statistics.median(matches[name]) / statistics.median(captures[name]):.1f} %")
        for name in models
    ]
    print(table(("model", "nodes", "matching / capture"), rows) + "\n")
    first = "vit, 24 layers"
    calls = {name: function_calls(models[name], graphs[name]) for name in models if name.startswith("vit")}
    for name in calls:
        growth = statistics.median(deep / shallow for deep, shallow in zip(matches[name], matches[first], strict=True))
        nodes = len(graphs[name].graph.nodes) / len(graphs[first].graph.nodes)
        called = calls[name] / calls[first]
        print(f"{name}: {nodes:.2f} times the nodes, {growth:.2f} times the seconds, {called:.2f} times the function calls")


if __name__ == "__main__":
    main()
