"""`python examples/gpu.py`: everything that only a GPU can tell, in one command of at most nine minutes.

    tests   the backend, its lowering and how tied models are trained, on the GPU
    bench   training steps in bf16, dense and tied, through Inductor and through the backend pe_fx
    once    a feed-forward layer of few rows that reads its tied weight once, beside the dense one
    tune    the same kernel with other block sizes, warps and pipeline stages
    learn   the learning study (accuracy.py)

All that is to be timed compiles at once, in processes of their own, while the nets train; then each of them has the GPU to itself in
its turn, all else stopped; then the tests run beside the nets. Rows go to CSV files in `--out` as soon as they are measured, and a
second call leaves out what is there. `--dry-run` runs every step with tiny sizes on the CPU, Triton's kernels in its interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tables import append, made_by, rows_of

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("tests", "bench", "once", "tune", "learn")
NEEDED = {"tests": ("pytest", "xdist", "timm", "hypothesis"), "bench": ("timm", "transformers"), "learn": ("sklearn", "timm")}

MODELS = ("deit_small@128", "resnet50_expand@128", "gpt2@8", "resnet50_keep@128", "deit_small@8", "resnet50_slice@128", "gpt2@1")
TUNERS = 3
GRAPHS = "+graphs"
"""Behind a case: each variant's forward and backward as CUDA graphs (mode "reduce-overhead"), and a fused AdamW."""
GPT2_TOKENS = 1024

MLP = "t0=mul(a,0.5);t1=mul(a,0.7071067811865476);t2=erf(t1);t3=add(t2,1.0);t4=mul(t0,t3)"
GATED = "t0=neg(a);t1=exp(t0);t2=add(t1,1.0);t3=div(a,t2);t4=mul(t3,b)"


# ------------------------------------------------------------------------------------------------------------------ in children


@dataclass
class Turn:
    """A child's place in the order of the measurements."""

    work: Path
    name: str
    ready_by: float

    @property
    def time_left(self) -> float:
        return self.ready_by - time.time()

    def wait(self) -> None:
        """Says that all is compiled, and waits for the GPU."""
        (self.work / f"{self.name}.ready").touch()
        while not (self.work / f"{self.name}.go").exists():
            time.sleep(0.05)


def bench(case: str, turn: Turn, out: Path, dry: bool) -> None:
    """One model's variants, each compiled, then steps in turns."""
    import torch
    from bench import SUBJECTS, Subject, Variant, built, of_kernels, recipes_of, row_of, tokens

    case, _, chosen = case.partition(":")
    graphs = case.endswith(GRAPHS)
    name, batch = case.removesuffix(GRAPHS).split("@")
    if dry:
        import timm

        build = functools.partial(timm.create_model, "vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2)
        subject = Subject(build)
    else:
        subject = SUBJECTS[name]
    device = "cpu" if dry else "cuda"
    sample = functools.partial(tokens, length=GPT2_TOKENS) if name == "gpt2" else subject.sample
    inputs = sample(int(batch)).to(device)
    torch.manual_seed(0)
    dense = subject.build().to(device)
    recipes = recipes_of(subject, [f"{start}*" for start in chosen.split("|")])
    variants: list[Variant] = []
    longest = 0.0
    how: dict[str, Any] = {"mode": "reduce-overhead", "fused": True} if graphs else {}
    for title in recipes:
        if variants and turn.time_left < longest / 2:
            print(f"{case}: no time left to compile {title}", flush=True)
            break
        start = time.time()
        model, backend = built(title, subject, dense, inputs[:1])
        variant = Variant(title, model.to(device), backend, inputs, autocast=True, **how)
        variant.steps(4 if graphs else 2)
        variant.spans.clear()
        longest = max(longest, time.time() - start)
        print(f"{case}: {title} compiled in {time.time() - start:.0f} s", flush=True)
        variants.append(variant)
        if not dry:
            torch.cuda.empty_cache()
    turn.wait()
    end = time.time() + 12
    for i in range(16):
        for variant in variants:
            variant.steps(1 if dry else 4, 0 if dry or i else 2)
        if i > 1 and time.time() > end:
            break
    first = variants[0]
    kernels = [] if dry else [variant.kernels() for variant in variants]
    for i, variant in enumerate(variants):
        row = row_of(name, variant, first)
        if not dry:
            row |= of_kernels(kernels[i], kernels[0])
            for kernel in kernels[i][:12]:
                place = {column: row[column] for column in ("device", "mode", "model", "batch", "variant")}
                append(out / "kernels.csv", place | {"kernel": kernel.name[:90], "calls": kernel.calls, "us": f"{kernel.microseconds:.0f}"})
            if not graphs:  # they keep their memory
                row["peak_mb"] = f"{variant.peak() / 1e6:.0f}"
        append(out / "bench.csv", row)


def once(turn: Turn, out: Path, dry: bool) -> None:
    """Each layer as dense, tied with two reads, and tied with one; and the kernel alone with the best tuning of those tried."""
    import torch
    from bench_once import DECODERS, LAYERS, TINY, TINY_DECODERS, case, decoding, graphed, weights_of

    from pe_fx.compiled.lowering import single_read_gpu

    if not dry:
        single_read_gpu.pays = lambda device, rows, width, *_: rows * width <= 16384  # measured where it is not used, too
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    cases = []
    for layer in TINY if dry else LAYERS:
        sets = weights_of(layer, device, dtype)
        cases += [case(layer, rows, dtype, sets) for rows in layer.rows if turn.time_left > 15]
    turn.wait()
    best = best_tunings(out)
    for each in cases:
        if (tuning := best.get((each.layer, each.rows))) is not None:
            x = torch.randn(each.rows, each.layer.width, device=device, dtype=dtype)
            each.calls["kernel, best tuning"] = graphed(kernel_calls(each.layer, each.sets, x, tuning), not dry)
        append(out / "once.csv", *each.measured(2 if dry else 25))
    for name, sizes in (TINY_DECODERS if dry else DECODERS).items():
        append(out / "once.csv", *decoding(name, sizes, device, dtype, 2 if dry else 25))


def kernel_calls(layer: Any, sets: Sequence[Mapping[str, Any]], x: Any, tuning: Any) -> Callable[[], None]:
    """The kernel alone, on each set of weights in turn; what its programs found is not added up."""
    import torch

    from pe_fx.compiled.lowering.single_read_gpu import launch

    processors = torch.cuda.get_device_properties(0).multi_processor_count if x.is_cuda else 2
    unit = MLP if layer.kind == "mlp" else GATED

    def call() -> None:
        for each in sets:
            weights = [each["up"]] if layer.kind == "mlp" else [each["gate"], each["up"]]
            launch(x, weights, [each.get("bias"), None][: len(weights)], 0, unit, processors * tuning.programs, tuning)

    return call


def best_tunings(out: Path) -> dict[tuple[Any, int], Any]:
    """Of what `tune` has measured."""
    from bench_once import LAYERS, TINY

    from pe_fx.compiled.lowering.single_read_gpu import Tuning

    best: dict[tuple[Any, int], tuple[float, Any]] = {}
    for row in rows_of(out / "tune.csv"):
        for layer in (*LAYERS, *TINY):
            if (layer.kind, str(layer.width), str(layer.height)) == (row["kind"], row["width"], row["height"]):
                found = float(row["us"]), Tuning(*(int(row[name]) for name in Tuning._fields))
                key = layer, int(row["rows"])
                best[key] = min(best.get(key, found), found)
    return {key: tuning for key, (_, tuning) in best.items()}


def tunings(layer: Any, rows: int) -> Iterator[Any]:
    from pe_fx.compiled.lowering.single_read_gpu import Tuning, power_of_two

    size = power_of_two(layer.width) * (1 if layer.kind == "mlp" else 2)
    for elements, warps, stages, programs in itertools.product((4096, 8192, 16384, 32768), (4, 8, 16), (2, 3, 4), (1, 2, 4)):
        threads = warps * 32
        fits = programs * stages * elements * 2 <= 200_000 and rows * size // threads <= 64
        if fits and elements >= size and 16 <= elements // threads <= 64 and programs * warps in (8, 16, 32):
            yield Tuning(elements // size, warps, stages, programs)


def tune(part: int, turn: Turn, out: Path, dry: bool) -> None:
    """The kernel alone, with every tuning there is time for."""
    import torch
    from bench_once import LAYERS, TINY, graphed, microseconds, weights_of

    from pe_fx.compiled.lowering.single_read_gpu import Tuning

    device = "cpu" if dry else "cuda"
    dtype = torch.float32 if dry else torch.bfloat16
    layers = TINY if dry else LAYERS
    todo = [(layer, rows) for layer in layers for rows in layer.rows if rows * layer.width <= 16384]
    todo.sort(key=lambda pair: (pair[1] > 1, pair[1], layers.index(pair[0])))
    measured = []
    for layer, rows in todo[part :: 1 if dry else TUNERS]:
        sets = weights_of(layer, device, dtype)
        x = torch.randn(rows, layer.width, device=device, dtype=dtype)
        found = []
        for tuning in [Tuning(2, 4, 2, 2)] if dry else list(tunings(layer, rows))[:: 1 if rows == 1 and layer.width == 4096 else 4]:
            if turn.time_left < 5:
                break
            try:
                found.append((tuning, graphed(kernel_calls(layer, sets, x, tuning), not dry)))
            except Exception as error:  # too many registers, or too much shared memory
                print(f"{layer} {rows} {tuning}: {str(error)[:100]}", flush=True)
        measured.append((layer, rows, found, len(sets)))
    turn.wait()
    for layer, rows, found, count in measured:
        for (tuning, _), each in zip(found, microseconds([call for _, call in found], 2 if dry else 9), strict=True):
            row = {"kind": layer.kind, "width": layer.width, "height": layer.height, "rows": rows, **tuning._asdict()}
            append(out / "tune.csv", row | {"us": f"{statistics.median(each) / count:.2f}"} | made_by(device))


# ------------------------------------------------------------------------------------------------------------------- the parent


@dataclass
class Child:
    """A process with a name and a log."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self, log: Path) -> None:
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=os.environ | self.environment, stdout=file, stderr=file, start_new_session=True
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: int) -> None:
        if self.process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def say(start: float, text: str) -> None:
    print(f"[{time.time() - start:5.0f} s] {text}", flush=True)


def children_of(options: argparse.Namespace, work: Path, ready_by: float, learn_seconds: float) -> dict[str, list[Child]]:
    me = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out), "--work", str(work), "--ready-by", str(ready_by)]
    me += ["--dry-run"] if options.dry_run else []
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    few = {"PYTHONPATH": paths, "TORCHINDUCTOR_COMPILE_THREADS": "3", "OMP_NUM_THREADS": "1"}
    interpreted = few | ({"TRITON_INTERPRET": "1"} if options.dry_run else {})
    tested = work / "tested.txt"
    tested.write_text("\n".join(row["test"] for row in rows_of(options.out / "tests.csv")), encoding="utf-8")
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "gpu_tests", "--show-capture=no", "--tb=short"]
    tests += ["tests/compiled"]
    few_tests = ["-n", "0", "-k", "test_gpu and (activation or single_read and none-1)"]
    tests += few_tests if options.dry_run else ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]
    tests += ["-k", options.tests] if options.tests else []
    reported = {"PE_FX_TESTS": str(options.out / "tests.csv"), "PE_FX_TESTED": str(tested), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    learn = [sys.executable, "examples/accuracy.py", "--out", str(options.out / "learning.csv")]
    if options.dry_run:
        learn += ["--device", "cpu", "--tasks", "vit", "--variants", "dense", "--steps", "10", "--seeds", "1", "--searching", "1"]
    else:
        learn += ["--device", "cuda", "--seconds", f"{learn_seconds:.0f}", *options.learn.split()]
    graphs = {"default": "", "reduce-overhead": GRAPHS}
    done = {f"{row['model']}@{row['batch']}{graphs[row['mode']]}" for row in rows_of(options.out / "bench.csv")}
    every = ["dry@1"] if options.dry_run else [*MODELS, *(case + GRAPHS for case in MODELS)]
    cases = [case for case in options.cases or every if case.partition(":")[0] not in done]
    parts = range(1 if options.dry_run else TUNERS)
    return {
        "tests": [Child("tests", tests, few | reported | ({} if options.dry_run else {"PE_FX_DEVICE": "cuda"}))],
        "bench": [Child(f"bench {case}", [*me, "--child", f"bench {case}"], few) for case in cases],
        "once": [Child("once", [*me, "--child", "once"], interpreted)],
        "tune": [Child(f"tune {part}", [*me, "--child", f"tune {part}"], interpreted) for part in parts],
        "learn": [Child("learn", learn, few)],
    }


def is_done(step: str, out: Path) -> bool:
    """Whether an earlier call has finished the step; of tests, bench and learn it is asked for each test, case and run."""
    return step not in ("tests", "bench", "learn") and bool(rows_of(out / f"{step}.csv"))


def check(options: argparse.Namespace, start: float) -> list[str]:
    """What is there, and the steps that can be taken."""
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("there is no GPU here: --dry-run tries every step on the CPU")
    import pe_fx

    device = "cpu" if options.dry_run else "cuda"
    say(start, f"pe_fx from {Path(pe_fx.__file__).parent}; {made_by(device)}")
    if "pe_fx" not in torch._dynamo.list_backends(exclude_tags=()):
        sys.exit("the backend pe_fx is not registered: pip install --no-deps --no-build-isolation -e .")
    steps = []
    for step in options.steps:
        if is_done(step, options.out):
            say(start, f"{step} was done before, in {options.out}")
            continue
        lacking = [name for name in NEEDED.get(step, ()) if importlib.util.find_spec(name) is None]
        if lacking:
            say(start, f"without {', '.join(lacking)}, {step} is left out")
        else:
            steps.append(step)
    if not options.dry_run:
        big = torch.empty(2**31, dtype=torch.uint8, device="cuda")
        other = torch.empty_like(big)
        square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        from bench_once import microseconds

        (copy,), (product,) = (microseconds([call], 5) for call in (lambda: other.copy_(big), lambda: square @ square))
        bandwidth, rate = 2 * 2**31 / statistics.median(copy) / 1e6, 2 * 8192**3 / statistics.median(product) / 1e6
        say(start, f"a copy moves {bandwidth:.2f} TB/s, a product makes {rate:.0f} TFLOP/s")
    return steps


def run(options: argparse.Namespace) -> None:
    start = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    steps = check(options, start)
    end = start + options.seconds
    ready_by = start + options.compile_seconds
    learn_seconds = options.learn_seconds or max(20.0, options.seconds - 40)
    work = options.out / "work"
    work.mkdir(exist_ok=True)
    for stale in work.glob("*"):
        stale.unlink()
    children = children_of(options, work, ready_by, learn_seconds)
    timed = [child for step in ("bench", "once", "tune") if step in steps for child in children[step]]
    learning, testing = ([child for child in children[step] if step in steps] for step in ("learn", "tests"))
    log = options.out / "log.txt"
    for child in [*timed, *learning]:
        child.start(log)
    timed.sort(key=lambda child: not child.name.startswith("tune"))  # whose results the next one uses
    try:
        ready: set[str] = set()
        while time.time() < min(ready_by + 20, end) and any(child.running and child.name not in ready for child in timed):
            for child in timed:
                if child.name not in ready and (work / f"{child.name}.ready").exists():
                    ready.add(child.name)
                    say(start, f"{child.name} is compiled")
            time.sleep(0.2)
        for child in learning:
            child.send(signal.SIGSTOP)
        for child in timed:
            if child.running and child.name not in ready:
                say(start, f"{child.name} was not compiled in time")
                child.send(signal.SIGKILL)
        time.sleep(3)  # for what the nets have handed to the GPU
        for child in timed:
            if child.running:
                (work / f"{child.name}.go").touch()
                assert child.process is not None
                try:
                    code = child.process.wait(min(60, max(1, end - time.time())))
                    say(start, f"{child.name} is measured" if not code else f"{child.name} failed, see log.txt")
                except subprocess.TimeoutExpired:
                    say(start, f"{child.name} took too long")
                    child.send(signal.SIGKILL)
        for child in learning:
            child.send(signal.SIGCONT)
        for child in testing:
            child.start(log)
        while any(child.running for child in [*learning, *testing]) and time.time() < end:
            time.sleep(0.2)
        for child in [*learning, *testing]:
            say(
                start,
                f"{child.name}: " + ("cut off" if child.running else f"ended with {child.process.returncode if child.process else None}"),
            )
    finally:
        for child in [*timed, *learning, *testing]:
            child.send(signal.SIGKILL)
        for stale in work.glob("*"):
            stale.unlink()
        work.rmdir()
    for path in sorted(options.out.glob("*.csv")):
        say(start, f"{path.name}: {len(rows_of(path))} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), metavar="FOLDER")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--cases", nargs="+", metavar="MODEL@BATCH[+graphs][:VARIANT|…]", help="of bench (default: all)")
    parser.add_argument("--seconds", type=float, default=530, help="for everything (default: 530)")
    parser.add_argument("--compile-seconds", type=float, default=170, help="until the measurements begin (default: 170)")
    parser.add_argument("--learn-seconds", type=float, help="after which no training begins (default: when 40 are left)")
    parser.add_argument("--learn", default="", metavar="OPTIONS", help="of learn, as accuracy.py takes them, in one string")
    parser.add_argument("--tests", help="pytest's -k, of the tests (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ready-by", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is None:
        run(options)
        return
    step, _, case = options.child.partition(" ")
    turn = Turn(options.work, options.child, options.ready_by)
    if step == "bench":
        bench(case, turn, options.out, options.dry_run)
    elif step == "once":
        once(turn, options.out, options.dry_run)
    else:
        tune(int(case), turn, options.out, options.dry_run)


if __name__ == "__main__":
    main()
