"""pe-fx: plan, transform and diff from the command line."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import torch
import typer
from rich.console import Console, RenderableType
from rich.text import Text
from torch import nn

import pe_fx
from pe_fx.diff import Diff, Graph, compare, diff_transform, page, picture, report, terminal
from pe_fx.errors import CaptureError, PeFxError
from pe_fx.files import whole_file
from pe_fx.passes import DEFAULT_RULES
from pe_fx.specs import FORMS, Loaded, load
from pe_fx.ties import Plan

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

DIFFERENT, FAILED, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141

EPILOG = "Exit codes: 0 done, 1 differences (only with diff --exit-code), 2 an error, 130 interrupted, 141 closed pipe."

app = typer.Typer(
    name="pe-fx",
    help=f"""One matrix where two were: see what can be tied in a model, tie it, and look at the difference.

\b
pe-fx plan timm:deit_small_patch16_224
pe-fx diff timm:resnet50 --side-by-side
pe-fx transform timm:resnet50 -o tied.safetensors

A model is {FORMS}.
""",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Spec = Annotated[str, typer.Argument(metavar="SPEC", help=f"The model: {FORMS}.", show_default=False)]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", "-i", metavar="SHAPE", help="Input shape: 1x3x224x224, 1x16:int64 or input_ids=1x16:int64. Derived where left out."
    ),
]
KINDS = ", ".join(rule.kind for rule in DEFAULT_RULES)
Rules = Annotated[str | None, typer.Option("--rules", metavar="KINDS", help=f"Kinds of sites, with commas: {KINDS}. All by default.")]
Share = Annotated[str, typer.Option("--share", metavar="KINDS", help="Kinds whose sites share one matrix per stage; none for none.")]
Entry = Annotated[str, typer.Option("--entry", metavar="HOW", help="The first block of a stage: keep, slice or expand.")]
Include = Annotated[list[str] | None, typer.Option("--include", metavar="GLOB", help="Only in modules like this, e.g. 'layer3.*'.")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not in modules like this.")]
FromPlan = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="A plan made before, instead of matching anew.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
Misses = Annotated[bool, typer.Option("--misses", help="Say of every near miss why it is none.")]
Color = Annotated[str, typer.Option("--color", metavar="WHEN", help="auto (on a terminal), always or never.")]
Width = Annotated[
    int | None, typer.Option("--width", min=20, help="Columns; the terminal's by default, 100 in a pipe.", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, show the traceback.")]


def reported(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """A command whose errors are one line each, and whose exit codes are those that the help names."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
            raise typer.Exit(CLOSED_PIPE) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except typer.Exit:
            raise
        except Exception as error:
            if kwargs.get("debug"):
                raise
            known = isinstance(error, PeFxError | OSError)
            text = " ".join(str(error).split()) if known else f"{type(error).__name__}: {error}; --debug shows where"
            hint = " (here: --input)" if isinstance(error, CaptureError) else ""
            print(f"pe-fx: error: {text}{hint}", file=sys.stderr)
            raise typer.Exit(FAILED) from None

    return run


@app.command(
    "plan", epilog="    pe-fx plan timm:resnet50 --entry slice -o plan.json\n\n    pe-fx plan timm:resnet50 --plan plan.json\n\n" + EPILOG
)
@reported
def plan_command(
    spec: Spec,
    input: Inputs = None,
    rules: Rules = None,
    share: Share = "bottleneck",
    entry: Entry = "keep",
    include: Include = None,
    exclude: Exclude = None,
    plan: FromPlan = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan here, as JSON.")] = None,
    misses: Misses = False,
    as_json: AsJson = False,
    color: Color = "auto",
    width: Width = None,
    debug: Debug = False,
) -> None:
    """Show what can be tied in a model, and what that saves.

    \b
    pe-fx plan timm:deit_small_patch16_224
    pe-fx plan timm:resnet50 --entry slice --include 'layer[34].*' -o plan.json
    pe-fx plan timm:resnet50 --plan plan.json
    pe-fx plan transformers:bert,num_hidden_layers=4 --json
    pe-fx plan my_models.py:build --input 1x3x64x64
    """
    options = plan_options(rules, share, entry, include, exclude)
    with progress() as say:
        made = planned(spec, input or (), options, read_plan(plan), say)
    if output is not None:
        with whole_file(output) as draft:
            draft.write_text(made.to_json())
    if as_json:
        print(made.to_json())
    else:
        show(report.plan_report(made, every_miss=misses), color, width)


@app.command("transform", epilog=EPILOG)
@reported
def transform_command(
    spec: Spec,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The tied weights, as safetensors.", show_default=False)],
    input: Inputs = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="FILE", help="Dense weights, .safetensors or .pt; random where left out.")
    ] = None,
    init: Annotated[str, typer.Option("--init", metavar="HOW", help="A shared matrix's values: keep, mean or reset.")] = "keep",
    rules: Rules = None,
    share: Share = "bottleneck",
    entry: Entry = "keep",
    include: Include = None,
    exclude: Exclude = None,
    plan: FromPlan = None,
    debug: Debug = False,
) -> None:
    """Tie a model and write its weights.

    The plan goes into the file's metadata, as "pe_fx_plan": --plan FILE reads it from there, too.

    \b
    pe-fx transform timm:resnet50 --checkpoint dense.safetensors -o tied.safetensors
    pe-fx transform timm:resnet50 --plan plan.json --init mean -o tied.safetensors
    """
    options = plan_options(rules, share, entry, include, exclude)
    with whole_file(output) as draft, progress() as say:
        save = _safetensors().save_model
        read = read_plan(plan)
        say(f"building {spec}")
        loaded = load(spec, input or ())
        if checkpoint is not None:
            say(f"reading {checkpoint}")
            load_checkpoint(loaded.model, checkpoint)
        say("planning")
        made = pe_fx.plan(loaded.model, loaded.example_inputs, **options) if read is None else read
        tied = pe_fx.apply(loaded.model, made, init=init)
        if not made.sites:
            print("pe-fx: warning: nothing could be tied; pe-fx plan --misses says why", file=sys.stderr)
        say(f"writing {output}")
        save(tied, str(draft), metadata={"format": "pt", "pe_fx_plan": made.to_json(), "pe_fx_spec": spec})
    print(f"{output}: {len(made.sites)} sites, {made.params_before:,} → {made.params_after:,} parameters", file=sys.stderr)


@app.command("diff", epilog=EPILOG)
@reported
def diff_command(
    spec: Spec,
    other: Annotated[
        str | None, typer.Argument(metavar="[SPEC2]", help="Another model to compare with; else the model is compared with itself, tied.")
    ] = None,
    input: Inputs = None,
    rules: Rules = None,
    share: Share = "bottleneck",
    entry: Entry = "keep",
    include: Include = None,
    exclude: Exclude = None,
    plan: FromPlan = None,
    side_by_side: Annotated[bool, typer.Option("--side-by-side", "-y", help="Two columns.")] = False,
    stat: Annotated[bool, typer.Option("--stat", help="One line a change.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="A page for a browser: both graphs side by side.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="A picture of the model, or of --module.")] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="The same as PNG, drawn with resvg-py.")] = None,
    module: Annotated[str, typer.Option("--module", metavar="PATH", help="What --svg and --png show, e.g. layer4.1.")] = "",
    fold: Annotated[bool, typer.Option(help="Fold blocks that changed like the one before them.")] = True,
    misses: Misses = False,
    as_json: AsJson = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 where there are differences.")] = False,
    color: Color = "auto",
    width: Width = None,
    debug: Debug = False,
) -> None:
    """Show how a model and its tied self differ, or any two models.

    \b
    pe-fx diff timm:deit_small_patch16_224
    pe-fx diff timm:resnet50 --entry expand --side-by-side --misses
    pe-fx diff timm:resnet50 timm:resnet101 --stat
    pe-fx diff timm:resnet50 exported.pt2 --exit-code
    pe-fx diff timm:resnet50 --html diff.html
    pe-fx diff timm:resnet50 --svg layer4.svg --module layer4

    With --html, --svg or --png only the summary is printed.
    """
    options = plan_options(rules, share, entry, include, exclude)
    with progress() as say:
        if other is None:
            found = diff_of_transform(spec, input or (), options, read_plan(plan), say)
        else:
            found = diff_of_two(spec, other, input or (), say)
        write_drawings(found, html, svg, png, module, say)
    if as_json:
        print(found.to_json())
    else:
        columns = width or default_width()
        if stat:
            show(terminal.stat(found, columns), color, columns)
        elif found and not (html or svg or png):
            show((terminal.side_by_side if side_by_side else terminal.unified)(found, columns, fold=fold), color, columns)
        if misses:
            show(terminal.misses(found, columns), color, columns)
        if found:
            show(terminal.summary(found), color, columns)
        else:
            print(terminal.summary(found).plain, file=sys.stderr)
    if exit_code and found:
        raise typer.Exit(DIFFERENT)


def write_drawings(found: Diff, html: Path | None, svg: Path | None, png: Path | None, module: str, say: Callable[[str], None]) -> None:
    if html is not None:
        say(f"writing {html}")
        page.write_page(found, html)
    for path, write in ((svg, picture.write_svg), (png, picture.write_png)):
        if path is not None:
            say(f"writing {path}")
            write(found, path, module)


def planned(spec: str, inputs: Sequence[str], options: dict[str, Any], read: Plan | None, say: Callable[[str], None]) -> Plan:
    """The model's plan; one that was read is checked to fit."""

    def plan_it(loaded: Loaded) -> Plan:
        if read is not None:
            say("checking the plan")
            pe_fx.apply(loaded.model, read, inplace=True)
            return read
        say(f"planning {spec}")
        return pe_fx.plan(loaded.model, loaded.example_inputs, **options)

    return _on_meta_if_possible(spec, inputs, plan_it, say)


def diff_of_transform(spec: str, inputs: Sequence[str], options: dict[str, Any], read: Plan | None, say: Callable[[str], None]) -> Diff:
    def diff_it(loaded: Loaded) -> Diff:
        say(f"comparing {spec} with its tied self")
        return diff_transform(loaded.model, loaded.example_inputs, made=read, name=spec, **options)

    return _on_meta_if_possible(spec, inputs, diff_it, say)


def diff_of_two(first: str, second: str, inputs: Sequence[str], say: Callable[[str], None]) -> Diff:
    """Compares two models on the same inputs: those given, else those that an exported program keeps."""
    known = next((load(spec).example_inputs for spec in (first, second) if spec.endswith(".pt2") and not inputs), None)

    def picture(loaded: Loaded) -> Graph:
        say(f"capturing {loaded.spec}")
        return Graph.of(loaded.model, loaded.example_inputs if loaded.example_inputs is not None else known, loaded.spec)

    before, after = (_on_meta_if_possible(spec, inputs, picture, say, on_meta=known is None) for spec in (first, second))
    say("aligning")
    return compare(before, after)


def _on_meta_if_possible(
    spec: str, inputs: Sequence[str], use: Callable[[Loaded], Result], say: Callable[[str], None], on_meta: bool = True
) -> Result:
    """Uses the model without memory for its weights, and where its graph cannot be captured so, with."""
    say(f"building {spec}")
    loaded = load(spec, inputs, on_meta=on_meta)
    if not any(parameter.is_meta for parameter in loaded.model.parameters()):
        return use(loaded)
    with contextlib.suppress(CaptureError):
        return use(loaded)
    say(f"building {spec} in memory")
    return use(load(spec, inputs))


def plan_options(rules: str | None, share: str, entry: str, include: list[str] | None, exclude: list[str] | None) -> dict[str, Any]:
    """The options of `pe_fx.plan`, as far as they are given."""
    options: dict[str, Any] = {"share": _kinds(share), "entry": entry, "include": include, "exclude": exclude}
    return options if rules is None else options | {"rules": _kinds(rules)}


def _kinds(text: str) -> list[str]:
    return [] if text == "none" else [kind.strip() for kind in text.split(",")]


def read_plan(path: Path | None) -> Plan | None:
    """A plan from JSON, or from the metadata of a tied model's weights."""
    if path is None:
        return None
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            text = (file.metadata() or {}).get("pe_fx_plan")
        if text is None:
            raise PeFxError(f"{path} has no plan in its metadata: pe-fx transform writes one")
        return Plan.from_json(text)
    try:
        return Plan.from_json(path.read_text())
    except (PeFxError, UnicodeDecodeError) as error:
        raise PeFxError(f"{path}: {error}") from error


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Loads dense weights, strictly."""
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a damaged file raises anything
            raise PeFxError(f"{path} is no checkpoint of weights alone: {type(error).__name__}") from error
        weights = next((weights[key] for key in ("state_dict", "model") if isinstance(weights, dict) and key in weights), weights)
    try:
        result = model.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise PeFxError(f"{path} does not fit the model: {textwrap.shorten(str(error), 300)}") from error
    for names, what in ((result.missing_keys, "lacks"), (result.unexpected_keys, "has what the model has not:")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise PeFxError(f"{path} does not fit the model: it {what} {', '.join(names[:3])}{more}")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise PeFxError("the tied weights are written with safetensors: pip install 'pe_fx[cli]'") from error
    return safetensors.torch


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    _safetensors()
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise PeFxError(f"{path} is no safetensors file: {error}") from error


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that says on stderr what is going on, where that is a terminal."""
    console = Console(file=sys.stderr)  # bound here: capture turns sys.stderr aside while it exports
    if not console.is_terminal:
        yield lambda step: None
        return
    with console.status("") as status:
        yield lambda step: status.update(f"{step} …")


def default_width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def show(what: RenderableType, color: str, width: int | None) -> None:
    """Prints to stdout; plain text where that is no terminal."""
    if color not in ("auto", "always", "never"):
        raise PeFxError(f"--color {color}: choose from auto, always, never")
    forced = {"auto": None, "always": True, "never": False}[color]
    console = Console(file=sys.stdout, width=width or default_width(), force_terminal=forced, no_color=color == "never", highlight=False)
    with console.capture() as captured:
        console.print(what, soft_wrap=isinstance(what, Text), end="" if isinstance(what, Text) and what.plain.endswith("\n") else "\n")
    text = captured.get()
    sys.stdout.write(text if console.color_system else "".join(line.rstrip() + "\n" for line in text.splitlines()))
