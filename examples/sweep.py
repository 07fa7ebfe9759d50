"""`python examples/sweep.py --set timm`: plans, ties and verifies every model of a library, one CSV row for each.

Sets: timm (all of `timm.list_models()`), torchvision (classification, segmentation and detection), transformers (every
architecture that has a configuration class, built small), diffusers (every class in `diffusers.models`, built small) and paper (the
models of the paper's tables that timm lacks). All weights are random; nothing is downloaded. Every model runs in a process of its own
with a time limit, two at a time. Rows are appended as they come: call it again and it goes on where it
stopped, `--retry-errors` and `--again` do some models once more, and `--summary` writes the page `examples/sweep.md`.

    python examples/sweep.py --plan-only                       # graphs and sites only, a few seconds per model
    python examples/sweep.py --set timm --filter 'vit_*' --again
    python examples/sweep.py --set diffusers --retry-errors
    python examples/sweep.py --summary

Models are planned on the meta device, so that their weights are never allocated; those that cannot be built there, and all of
transformers and diffusers, are built in memory. What is verified has at most `--max-params` parameters: the model, or else a shallow
variant where the constructor takes a depth; on small images where the model takes them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fnmatch
import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import zoo
import zoo_paper
from torch.utils._pytree import tree_map_only
from tqdm import tqdm
from zoo import Built, Entry

import pe_fx
from pe_fx.api import plan as make_plan  # imported before anything is timed: `pe_fx.plan` would import at its first call
from pe_fx.graph.capture import capture
from pe_fx.tied.rewrite_modules import check_fits
from pe_fx.ties import Plan

LIBRARIES = {
    "timm": ("zoo", "timm_"),
    "torchvision": ("zoo", "torchvision_"),
    "transformers": ("zoo_transformers", ""),
    "diffusers": ("zoo_diffusers", ""),
    "paper": ("zoo_paper", ""),
}
"""For each the module that knows its models, imported when it is asked for, and what the names of its two functions begin with."""
COLUMNS = (
    *("library", "model", "family", "params", "params_tied", "sites", "misses", "nodes", "capture_s", "match_s", "rewrite_s"),
    *("built", "inputs", "verified", "worst_error", "peak_mb", "error", "versions", "date"),
)
NOT_VERIFIED = "plan only"
Row = dict[str, str]


def names_of(library: str) -> list[str]:
    module, prefix = LIBRARIES[library]
    names: list[str] = getattr(importlib.import_module(module), f"{prefix}names")()
    return names


def entry_of(library: str, name: str) -> Entry:
    module, prefix = LIBRARIES[library]
    entry: Entry = getattr(importlib.import_module(module), f"{prefix}entry")(name)
    return entry


# ---------------------------------------------------------------------------------------------------------------- one model


def work(key: str, *, plan_only: bool, max_params: int) -> Row:
    """One model's row; an error ends up in it with the stage at which it came."""
    row = new_row(key)
    stage = ["build"]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry = entry_of(row["library"], row["model"])
            row["family"] = entry.family
            built, plan = planned(entry, row, stage)
            if plan_only or not plan.sites:
                row["verified"] = NOT_VERIFIED if plan_only else "no sites"
            else:
                verify(entry, built, plan, row, stage, max_params)
    except Exception as error:
        row["error"] = f"{stage[0]}: {described(error)}"
    row["peak_mb"] = str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    return row


def new_row(key: str, error: str = "") -> Row:
    library, _, name = key.partition("/")
    package = zoo_paper.PACKAGES.get(name, library)
    versions = f"{package} {importlib.metadata.version(package)}, torch {torch.__version__.partition('+')[0]}"
    filled = {"library": library, "model": name, "error": error, "versions": versions, "date": datetime.date.today().isoformat()}
    return dict.fromkeys(COLUMNS, "") | filled


def planned(entry: Entry, row: Row, stage: list[str]) -> tuple[Built, Plan]:
    """The first of the model's candidates that can be captured, and its plan."""
    first: pe_fx.CaptureError | None = None
    for _, built in zip(range(4), entry.candidates(), strict=False):
        stage[0] = "capture"
        gc.collect()  # neither part is to pay for what was left by the one before
        start = time.perf_counter()
        try:
            captured = capture(built.model, built.inputs)
        except pe_fx.CaptureError as error:
            first = first or error
            continue
        stage[0] = "plan"
        capture_s = time.perf_counter() - start
        gc.collect()
        start = time.perf_counter()
        plan = make_plan(built.model, captured)
        match_s = time.perf_counter() - start
        row |= {"built": built.how, "inputs": ", ".join(built.inputs) if isinstance(built.inputs, dict) else ""}
        row |= {"params": str(plan.params_before), "params_tied": str(plan.params_after), "nodes": str(len(captured.graph.nodes))}
        row |= {"capture_s": f"{capture_s:.2f}", "match_s": f"{match_s:.3f}"}
        row |= {"sites": counted(site.kind for site in plan.sites), "misses": counted(reason_class(miss.reason) for miss in plan.misses)}
        return built, plan
    assert first is not None
    raise first


def verify(entry: Entry, planned: Built, plan: Plan, row: Row, stage: list[str], max_params: int) -> None:
    stage[0] = "build"
    built = entry.verifiable(max_params, planned)
    if built is None:
        row["verified"] = "too large"
        return
    stage[0] = "rewrite"
    try:
        check_fits(built.model, plan)
    except pe_fx.PeFxError:  # of another depth or, where weights go over positions, for smaller images
        plan = make_plan(built.model, built.inputs)
        if not plan.sites:
            row["verified"] = "too large"
            return
    gc.collect()
    start = time.perf_counter()
    tied = pe_fx.apply(built.model, plan, inplace=True)
    row["rewrite_s"] = f"{time.perf_counter() - start:.3f}"
    stage[0] = "verify"
    disturb(tied)
    report = pe_fx.verify(tied, built.inputs)
    row["verified"] = "shallow" if built.how == "shallow" else "full"
    if not report:  # a batch norm of two values, say, makes much of rounding; in float64 that vanishes, and a wrong tie does not
        row["verified"] = "float64"
        report = pe_fx.verify(tied.double(), tree_map_only(torch.Tensor, as_double, built.inputs))
    row["worst_error"] = f"{report.worst:.1e}"
    if not report:
        row["verified"] = "NOT equal"


def as_double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def disturb(model: torch.nn.Module) -> None:
    """Random values everywhere: a norm that starts at zero would hide its whole block from the comparison."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn_like(parameter))


def counted(things: Iterable[str]) -> str:
    return json.dumps(dict(Counter(things).most_common()), ensure_ascii=False)


def reason_class(reason: str) -> str:
    """A miss's reason without the names and numbers of its model.

    >>> reason_class("a.0.fc2.weight is (64, 256), a.0.fc1.weight is (128, 64): not transposes of each other")
    '… is (…), … is (…): not transposes of each other'
    """
    text = re.sub(r"\[[\d:, +…]*\]", "", reason)
    text = re.sub(r"\((?:\d+, ?)*\d*\)", "(…)", text)
    text = re.sub(r"\S*\w\.\w[^\s,:]*", "…", text)
    text = re.sub(r"\b\d+ (groups|places)", r"… \1", text)
    return re.sub(r"(?<=[a-z])_+\d+\b", "", text)


def described(error: BaseException) -> str:
    """An error with its cause and the places that raised them."""
    text = f"{zoo.one_line(error)} [{_place(error)}]"
    return text if error.__cause__ is None else f"{text} caused by {zoo.one_line(error.__cause__)} [{_place(error.__cause__)}]"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "torch/_" not in frame.filename and "torch/export" not in frame.filename]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in inside[-2:])


# --------------------------------------------------------------------------------------------------------------- all models


def child(key: str, options: argparse.Namespace, connection: Connection) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    connection.send(work(key, plan_only=options.plan_only, max_params=int(options.max_params)))
    connection.close()


def run(key: str, options: argparse.Namespace) -> Row:
    """The row of one model, made by a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(key, options, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(options.timeout):
            return new_row(key, f"time: over {options.timeout:g} s")
        row: Row = receiver.recv()
        return row
    except EOFError:
        process.join()
        return new_row(key, f"crash: exit {process.exitcode}")
    finally:
        process.kill()
        process.join()


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV; a last one that was cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if all(row.get(column) is not None for column in COLUMNS)]


def write_rows(path: Path, rows: Sequence[Row], mode: str) -> None:
    with path.open(mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)


def rewrite_rows(path: Path, rows: Sequence[Row]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write_rows(temporary, rows, "w")
    temporary.replace(path)


def key_of(row: Row) -> str:
    return f"{row['library']}/{row['model']}"


def is_done(row: Row, options: argparse.Namespace) -> bool:
    if options.again:
        return False
    if row["error"]:
        return not options.retry_errors
    return bool(options.plan_only or row["verified"] != NOT_VERIFIED)


def sweep(options: argparse.Namespace) -> None:
    libraries = LIBRARIES if options.set == "all" else (options.set,)
    keys = [f"{library}/{name}" for library in libraries for name in names_of(library)]
    keys = [key for key in keys if any(fnmatch.fnmatchcase(key.partition("/")[2], glob) for glob in options.filter)]
    earlier = read_rows(options.out)
    redo = {key_of(row) for row in earlier if not is_done(row, options)} & set(keys)
    kept = [row for row in earlier if key_of(row) not in redo]
    rewrite_rows(options.out, kept)
    todo = sorted(set(keys) - {key_of(row) for row in kept}, key=keys.index)
    multiprocessing.set_forkserver_preload(["sweep", *{LIBRARIES[library][0] for library in libraries}])
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(keys), initial=len(keys) - len(todo), smoothing=0.1) as progress:
        futures: dict[Future[Row], str] = {pool.submit(run, key, options): key for key in todo}
        try:
            for future in as_completed(futures):
                row = future.result()
                write_rows(options.out, [row], "a")
                failed += bool(row["error"])
                progress.set_postfix_str(f"{failed} errors, last {futures[future]}")
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    rewrite_rows(options.out, sorted(read_rows(options.out), key=lambda row: (row["library"], row["model"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=(*LIBRARIES, "all"), default="all", help="which models (default: all)")
    parser.add_argument("--filter", nargs="+", default=["*"], metavar="GLOB", help="only models whose name matches one of these")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default: 2)")
    parser.add_argument("--timeout", type=float, default=900, metavar="SECONDS", help="per model (default: 900)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("sweep.csv"), metavar="CSV", help="where the rows go")
    parser.add_argument("--retry-errors", action="store_true", help="do again the models that failed")
    parser.add_argument("--again", action="store_true", help="do again all models chosen")
    parser.add_argument("--plan-only", action="store_true", help="no verification")
    parser.add_argument("--max-params", type=float, default=100e6, help="the largest model to verify (default: 100e6)")
    parser.add_argument("--summary", action="store_true", help="write the page of what the CSV holds, beside it, and stop")
    options = parser.parse_args()
    if options.summary:
        from sweep_summary import page

        options.out.with_suffix(".md").write_text(page(read_rows(options.out)), encoding="utf-8")
    else:
        sweep(options)


if __name__ == "__main__":
    main()
