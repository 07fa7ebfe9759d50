"""Whether `backend="pe_fx"` ties in Dynamo's graphs what `pe_fx.transform` ties:  python examples/backend_ties.py --set timm

Of every family of a library's models one is drawn by chance and compiled in train mode. Its graphs run as they are, without Inductor,
since only the ties are compared. Models of timm and torchvision run on the meta device.
"""

from __future__ import annotations

import argparse
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import zoo
from sweep import LIBRARIES, entry_of, read_rows
from torch import fx
from tqdm import tqdm

import pe_fx
import pe_fx.compiled.backend
from pe_fx.graph.inputs import as_arguments


def unlowered(gm: fx.GraphModule, *_: Any) -> Callable[..., Any]:
    return gm.forward


def too_slow(*_: Any) -> None:
    raise TimeoutError("too slow")


def compared(entry: zoo.Entry) -> str:
    """What differs, in one line; nothing where nothing does."""
    built = next(entry.candidates())
    model = built.model.train()
    planned = set(map(str, pe_fx.plan(model, built.inputs).ties))
    torch.compiler.reset()
    args, kwargs = as_arguments(built.inputs)
    with torch.no_grad():
        torch.compile(model, backend="pe_fx")(*args, **kwargs)
    tied = set(map(str, pe_fx.pending(model).ties))
    parts = [("not by the backend", planned - tied), ("by the backend alone", tied - planned)]
    return "; ".join(f"{len(ties)} {where}, such as {min(ties)}" for where, ties in parts if ties)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=LIBRARIES, default="timm", help="which models (default: timm)")
    parser.add_argument("--families", type=int, metavar="N", help="as many families, drawn by chance (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-params", type=float, default=150e6, help="the largest model (default: 150e6)")
    parser.add_argument("--timeout", type=int, default=180, metavar="SECONDS", help="per model (default: 180)")
    options = parser.parse_args()

    families: dict[str, list[str]] = {}
    for row in read_rows(Path(__file__).with_name("sweep.csv")):
        if row["library"] == options.set and not row["error"] and float(row["params"]) <= options.max_params:
            families.setdefault(row["family"], []).append(row["model"])
    chance = random.Random(options.seed)
    drawn = chance.sample(sorted(families), min(options.families or len(families), len(families)))

    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_slow)
    alike = 0
    for family in tqdm(drawn, unit="model"):
        name = chance.choice(families[family])
        signal.alarm(options.timeout)
        try:
            with mock.patch.object(pe_fx.compiled.backend, "lower", unlowered):
                difference = compared(entry_of(options.set, name))
        except Exception as error:
            difference = zoo.one_line(error)
        finally:
            signal.alarm(0)
        alike += not difference
        if difference:
            tqdm.write(f"{name}: {difference}")
    print(f"{alike} of {len(drawn)} models alike")


if __name__ == "__main__":
    main()
