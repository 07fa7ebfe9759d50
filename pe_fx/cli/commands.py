"""pe-fx: plan, transform and diff from the command line."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from pe_fx.cli.forms import FORMS, KINDS
from pe_fx.errors import CaptureError, PeFxError
from pe_fx.files import whole_file

if TYPE_CHECKING:  # what needs torch is imported by the commands: help and completion come at once
    from pe_fx.diff import Diff

Parameters = ParamSpec("Parameters")

DIFFERENT, FAILED, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141

COLORS = {"auto": None, "always": True, "never": False}

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
Rules = Annotated[
    str | None, typer.Option("--rules", metavar="KINDS", help=f"Kinds of sites, with commas: {', '.join(KINDS)}. All by default.")
]
Share = Annotated[
    str | None,
    typer.Option("--share", metavar="KINDS", help="Kinds whose sites share one matrix per stage, or none; bottleneck by default."),
]
Entry = Annotated[
    str | None, typer.Option("--entry", metavar="HOW", help="The first block of a stage: keep, slice or expand; keep by default.")
]
Include = Annotated[list[str] | None, typer.Option("--include", metavar="GLOB", help="Only in modules like this, e.g. 'layer3.*'.")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not in modules like this.")]
MixHow = Annotated[str | None, typer.Option("--mix", metavar="HOW", help="The tied output channels: none or signed; none by default.")]
GainFrom = Annotated[
    float | None, typer.Option("--gain", metavar="START", help="A learned factor per tied output channel, which starts here, e.g. 0.2.")
]
FromPlan = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="A plan made before, with its options, instead of matching anew.")
]
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
            if isinstance(error, OSError) and error.filename is not None:
                text = f"{error.filename}: {error.strerror}"
            elif isinstance(error, PeFxError | OSError):
                text = " ".join(str(error).split())
            else:
                text = f"{type(error).__name__}: {error}; --debug shows where"
            hint = "; example_inputs are --input here" if isinstance(error, CaptureError) else ""
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
    share: Share = None,
    entry: Entry = None,
    include: Include = None,
    exclude: Exclude = None,
    mix: MixHow = None,
    gain: GainFrom = None,
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
    colors = colored(color)
    options = plan_options(plan, rules, share, entry, include, exclude, mix, gain)
    with progress() as say:
        from pe_fx.cli import jobs
        from pe_fx.diff import report

        made = jobs.planned(spec, input or (), options, jobs.read_plan(plan), say)
    if output is not None:
        with whole_file(output) as draft:
            draft.write_text(made.to_json())
    if as_json:
        print(made.to_json())
    else:
        show(report.plan_report(made, every_miss=misses), colors, width)


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
    share: Share = None,
    entry: Entry = None,
    include: Include = None,
    exclude: Exclude = None,
    mix: MixHow = None,
    gain: GainFrom = None,
    plan: FromPlan = None,
    debug: Debug = False,
) -> None:
    """Tie a model and write its weights.

    The plan goes into the file's metadata, as "pe_fx_plan": --plan FILE reads it from there, too.

    \b
    pe-fx transform timm:resnet50 --checkpoint dense.safetensors -o tied.safetensors
    pe-fx transform timm:resnet50 --plan plan.json --init mean -o tied.safetensors
    """
    options = plan_options(plan, rules, share, entry, include, exclude, mix, gain)
    with progress() as say:
        from pe_fx.cli import jobs

        made = jobs.write_tied(spec, output, input or (), options, jobs.read_plan(plan), checkpoint, init, say)
    if not made.sites:
        print("pe-fx: warning: nothing could be tied; pe-fx plan --misses says why", file=sys.stderr)
    print(f"{output}: {len(made.sites)} sites, {made.params_before:,} → {made.params_after:,} parameters", file=sys.stderr)


@app.command("diff", epilog=EPILOG)
@reported
def diff_command(
    spec: Spec,
    other: Annotated[
        str | None,
        typer.Argument(
            metavar="SPEC2", help="Another model to compare with; else the model is compared with itself, tied.", show_default=False
        ),
    ] = None,
    input: Inputs = None,
    rules: Rules = None,
    share: Share = None,
    entry: Entry = None,
    include: Include = None,
    exclude: Exclude = None,
    mix: MixHow = None,
    gain: GainFrom = None,
    plan: FromPlan = None,
    side_by_side: Annotated[bool, typer.Option("--side-by-side", "-y", help="Two columns.")] = False,
    stat: Annotated[bool, typer.Option("--stat", help="One line a change.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="A page for a browser: both graphs side by side.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="A picture of the model, or of --module.")] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="The same as PNG, drawn with resvg-py.")] = None,
    module: Annotated[str, typer.Option("--module", metavar="PATH", help="What --svg and --png show, e.g. layer4.1.")] = "",
    fold: Annotated[bool, typer.Option(help="Fold blocks that changed like the one before them.")] = True,
    misses: Misses = False,
    tui: Annotated[bool, typer.Option("--tui", help="Walk through it in the terminal: fold, search, jump from change to change.")] = False,
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
    pe-fx diff timm:resnet50 --tui
    pe-fx diff timm:resnet50 --html diff.html
    pe-fx diff timm:resnet50 --svg layer4.svg --module layer4

    With --html, --svg or --png only the summary is printed.
    """
    colors = colored(color)
    at_most_one({"--side-by-side": side_by_side, "--stat": stat, "--tui": tui, "--json": as_json})
    walk_through = viewer() if tui else None
    options = plan_options(plan, rules, share, entry, include, exclude, mix, gain)
    if other is not None:
        refuse("two models are compared as they are", [*options, *(["plan"] if plan else []), *(["misses"] if misses else [])])
    with progress() as say:
        from pe_fx.cli import jobs
        from pe_fx.diff import terminal

        if other is None:
            found = jobs.diff_of_transform(spec, input or (), options, jobs.read_plan(plan), say)
        else:
            found = jobs.diff_of_two(spec, other, input or (), say)
        jobs.write_drawings(found, html, svg, png, module, say)
    if as_json:
        print(found.to_json())
    elif walk_through is not None:
        walk_through(found)
    else:
        columns = width or default_width()
        if found and stat:
            show(terminal.stat(found, columns), colors, columns)
        elif found and not (html or svg or png):
            show((terminal.side_by_side if side_by_side else terminal.unified)(found, columns, fold=fold), colors, columns)
        if misses:
            show(terminal.misses(found, columns), colors, columns)
        if found:
            show(terminal.summary(found), colors, columns)
        else:
            print(terminal.summary(found).plain, file=sys.stderr)
    if exit_code and found:
        raise typer.Exit(DIFFERENT)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that says on stderr what is going on, where that is a terminal."""
    console = Console(file=sys.stderr)  # bound here: capture turns sys.stderr aside while it exports
    if not console.is_terminal:
        yield lambda step: None
        return
    with console.status("importing torch …") as status:
        yield lambda step: status.update(f"{step} …")


def plan_options(
    plan: Path | None,
    rules: str | None,
    share: str | None,
    entry: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    mix: str | None,
    gain: float | None,
) -> dict[str, Any]:
    """The options of `pe_fx.plan`, as far as they are given; a plan that is read brings its own."""
    given = {
        "rules": rules and _kinds(rules),
        "share": share and _kinds(share),
        "entry": entry,
        "include": include,
        "exclude": exclude,
        "mix": mix,
        "gain": gain,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if plan is not None:
        refuse("--plan has its options in it", options)
    return options


def _kinds(text: str) -> list[str]:
    return [] if text == "none" else [kind.strip() for kind in text.split(",")]


def refuse(why: str, given: Iterable[str]) -> None:
    """Says of options that would be passed over in silence that they are to be left out."""
    names = [f"--{name}" for name in given]
    if names:
        raise PeFxError(f"{why}: leave out {', '.join(names)}")


def at_most_one(given: dict[str, object]) -> None:
    """Refuses options that cannot be obeyed together."""
    names = [name for name, value in given.items() if value]
    if len(names) > 1:
        raise PeFxError(f"{' and '.join(names)}: give one of them")


def viewer() -> Callable[[Diff], None]:
    """The interactive viewer, where there is a terminal for it."""
    streams = (sys.stdin, sys.stdout, sys.stderr)  # Textual draws on stderr
    if not all(stream and stream.isatty() for stream in streams) or os.environ.get("TERM") == "dumb":
        raise PeFxError("--tui needs a terminal: leave it out, or try --side-by-side")
    try:
        from pe_fx.diff.tui import Viewer
    except ImportError as error:
        raise PeFxError("--tui needs textual: pip install 'pe_fx[cli]'") from error
    return lambda diff: Viewer(diff).run()


def default_width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def colored(when: str) -> bool | None:
    """What `--color` asks for; None where the terminal decides."""
    if when not in COLORS:
        raise PeFxError(f"--color {when}: choose from {', '.join(COLORS)}")
    return COLORS[when]


def show(what: RenderableType, colors: bool | None, width: int | None) -> None:
    """Prints to stdout; plain text where that is no terminal."""
    console = Console(file=sys.stdout, width=width or default_width(), force_terminal=colors, no_color=colors is False, highlight=False)
    with console.capture() as captured:
        console.print(what, soft_wrap=isinstance(what, Text), end="" if isinstance(what, Text) and what.plain.endswith("\n") else "\n")
    text = captured.get()
    sys.stdout.write(text if console.color_system else "".join(line.rstrip() + "\n" for line in text.splitlines()))
