"""The commands of pe-fx."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pe_fx.cli.forms import CODE, FORMS, WEIGHTS
from pe_fx.cli.options import AsJson, Debug, Inputs, Look, Misses, Output, Spec, Ties, Trust, at_most_one, refuse, spread
from pe_fx.cli.progress import progress
from pe_fx.errors import CaptureError, PeFxError
from pe_fx.files import whole_file
from pe_fx.text import printable

if TYPE_CHECKING:  # what needs torch is imported by the commands: help and completion come at once
    from pe_fx.diff import Diff

DIFFERENT, FAILED, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141

EPILOG = "Exit codes: 0 done, 1 differences (with verify, and diff --exit-code), 2 an error, 130 interrupted, 141 closed pipe."

app = typer.Typer(
    name="pe-fx",
    help=f"""One matrix where two were: see what can be tied in a model, tie it, and look at the difference.

\b
pe-fx plan timm:deit_small_patch16_224
pe-fx diff timm:resnet50 --side-by-side
pe-fx transform timm:resnet50 -o tied.safetensors
pe-fx verify timm:resnet50 --checkpoint tied.safetensors
pe-fx untie tied.safetensors -o dense.safetensors

A model is {FORMS}. {CODE}
""",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line each, but for its new option --debug, and whose exit codes are those that the help names."""

    @functools.wraps(command)
    def run(*, debug: bool, **given: Any) -> None:
        try:
            command(**given)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
            raise typer.Exit(CLOSED_PIPE) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except typer.Exit:
            raise
        except Exception as error:
            if debug:
                lines = "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
                print(*map(printable, lines), sep="\n", file=sys.stderr)
                raise typer.Exit(FAILED) from None
            if isinstance(error, OSError) and error.filename is not None:
                text = f"{error.filename}: {error.strerror}"
            elif isinstance(error, PeFxError | OSError):
                text = str(error)
            else:
                text = f"{type(error).__name__}: {error}; --debug shows where"
            hint = "; example_inputs are --input here" if isinstance(error, CaptureError) else ""
            print(f"pe-fx: error: {printable(text)}{hint}", file=sys.stderr)
            raise typer.Exit(FAILED) from None

    signature = inspect.signature(command)
    last = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), last])  # type: ignore[attr-defined]
    return run


@app.command(
    "plan", epilog="    pe-fx plan timm:resnet50 --entry slice -o plan.json\n\n    pe-fx plan timm:resnet50 --plan plan.json\n\n" + EPILOG
)
@reported
@spread
def plan_command(
    *,
    spec: Spec,
    input: Inputs = None,
    trust: Trust = False,
    ties: Ties,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan here, as JSON.")] = None,
    misses: Misses = False,
    as_json: AsJson = False,
    look: Look,
) -> None:
    """Show what can be tied in a model, and what that saves.

    \b
    pe-fx plan timm:deit_small_patch16_224
    pe-fx plan timm:resnet50 --entry slice --include 'layer[34].*' -o plan.json
    pe-fx plan timm:resnet50 --plan plan.json
    pe-fx plan transformers:bert,num_hidden_layers=4 --json
    pe-fx plan my_models.py:build --input 1x3x64x64
    """
    options = ties.options()
    with progress() as say:
        from pe_fx.cli import jobs
        from pe_fx.diff import report

        made = jobs.planned(jobs.Models(input or (), trust, say), spec, options, jobs.read_plan(ties.plan))
    if output is not None:
        with whole_file(output) as draft:
            draft.write_text(made.to_json())
    if as_json:
        print(printable(made.to_json(), as_json=True))
    else:
        look.show(report.plan_report(made, every_miss=misses))


@app.command("transform", epilog=EPILOG)
@reported
@spread
def transform_command(
    *,
    spec: Spec,
    output: Output,
    input: Inputs = None,
    trust: Trust = False,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="FILE", help=f"Dense weights: {WEIGHTS}. Random where left out.")
    ] = None,
    init: Annotated[str, typer.Option("--init", metavar="HOW", help="A shared matrix's values: keep, mean, fit or reset.")] = "keep",
    ties: Ties,
) -> None:
    """Tie a model and write its weights.

    The plan goes into the file's metadata, as "pe_fx_plan": --plan FILE reads it from there, too. With -o hf:FOLDER a model of
    transformers is written as a folder for the hub.

    \b
    pe-fx transform timm:resnet50 --checkpoint dense.safetensors -o tied.safetensors
    pe-fx transform timm:resnet50 --plan plan.json --init mean -o tied.safetensors
    pe-fx transform hf:FOLDER --mix signed -o hf:TIED_FOLDER
    """
    options = ties.options()
    with progress() as say:
        from pe_fx.cli import jobs

        models = jobs.Models(input or (), trust, say)
        made = jobs.write_tied(models, spec, output, options, jobs.read_plan(ties.plan), checkpoint, init)
    if not made.sites:
        print("pe-fx: warning: nothing could be tied; pe-fx plan --misses says why", file=sys.stderr)
    print(f"{printable(str(output))}: {len(made.sites)} sites, {made.params_before:,} → {made.params_after:,} parameters", file=sys.stderr)


@app.command("untie", epilog=EPILOG)
@reported
@spread
def untie_command(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help=f"Tied weights: {WEIGHTS}.", show_default=False)],
    spec: Annotated[
        str | None,
        typer.Argument(
            metavar="SPEC",
            help="The dense model, where the result is to be checked to fit it, or has names that the plan does not know.",
            show_default=False,
        ),
    ] = None,
    output: Output,
    trust: Trust = False,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="The plan, where the weights come without it.")] = None,
) -> None:
    """Write tied weights as those of the dense model.

    They are put together by the plan in the file; the model itself is not needed.

    \b
    pe-fx untie tied.safetensors -o dense.safetensors
    pe-fx untie tied.safetensors timm:resnet50 -o dense.safetensors
    pe-fx untie tied.pt --plan plan.json -o dense.pt
    """
    with progress() as say:
        from pe_fx.cli import jobs

        made = jobs.write_untied(jobs.Models((), trust, say), file, output, spec, jobs.read_plan(plan))
    if made.entries:
        stays = f"{len(made.entries)} blocks stay as entry={made.entries[0].treatment} made them"
        print(f"pe-fx: warning: {stays}: these weights fit what pe_fx.untie makes of the tied model", file=sys.stderr)
    print(f"{printable(str(output))}: {len(made.sites)} sites, {made.params_after:,} → {made.params_before:,} parameters", file=sys.stderr)


@app.command("verify", epilog=EPILOG)
@reported
@spread
def verify_command(
    *,
    spec: Spec,
    input: Inputs = None,
    trust: Trust = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="FILE", help=f"Weights, tied or dense: {WEIGHTS}. Random where left out."),
    ] = None,
    ties: Ties,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", metavar="ERROR", help="The largest relative error, by default 1e-4; more in half precision."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a tied model with its dense twin: outputs and gradients, in train and in eval mode.

    \b
    pe-fx verify timm:deit_small_patch16_224
    pe-fx verify timm:resnet50 --checkpoint tied.safetensors
    pe-fx verify my_models.py:build --input 1x3x64x64 --rules mlp --mix signed && echo equal
    """
    options = ties.options()
    with progress() as say:
        from pe_fx.cli import jobs

        models = jobs.Models(input or (), trust, say)
        found = jobs.verified(models, spec, options, jobs.read_plan(ties.plan), checkpoint, tolerance)
    print(printable(found.to_json(), as_json=True) if as_json else "\n".join(map(printable, str(found).split("\n"))))
    if not found:
        raise typer.Exit(DIFFERENT)


@app.command("info", epilog=EPILOG)
@reported
@spread
def info_command(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help=f"A plan, .json, or tied weights: {WEIGHTS}.", show_default=False)],
    misses: Misses = False,
    as_json: AsJson = False,
    look: Look,
) -> None:
    """Show the plan in a tied file, or in one that pe-fx plan wrote: sites, savings, options, versions.

    \b
    pe-fx info tied.safetensors
    pe-fx info plan.json --json
    """
    with progress():
        from pe_fx.cli import jobs
        from pe_fx.diff import report

        found = jobs.described(file)
    if as_json:
        print(printable(found.to_json(), as_json=True))
    else:
        look.show(report.facts(found.facts()))
        look.show("")
        look.show(report.plan_report(found.plan, every_miss=misses))


@app.command("diff", epilog=EPILOG)
@reported
@spread
def diff_command(
    *,
    spec: Spec,
    other: Annotated[
        str | None,
        typer.Argument(
            metavar="SPEC2", help="Another model to compare with; else the model is compared with itself, tied.", show_default=False
        ),
    ] = None,
    input: Inputs = None,
    trust: Trust = False,
    ties: Ties,
    side_by_side: Annotated[bool, typer.Option("--side-by-side", "-y", help="Two columns.")] = False,
    stat: Annotated[bool, typer.Option("--stat", help="One line a change, or for all blocks that changed alike.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="A page for a browser: both graphs side by side.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="A picture of the model, or of --module.")] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="The same as PNG, drawn with resvg-py.")] = None,
    module: Annotated[str, typer.Option("--module", metavar="PATH", help="What --svg and --png show, e.g. layer4.1.")] = "",
    fold: Annotated[bool, typer.Option(help="Fold blocks that changed like the one before them.")] = True,
    misses: Misses = False,
    tui: Annotated[bool, typer.Option("--tui", help="Walk through it in the terminal: fold, search, jump from change to change.")] = False,
    as_json: AsJson = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 where there are differences.")] = False,
    look: Look,
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
    at_most_one({"--side-by-side": side_by_side, "--stat": stat, "--tui": tui, "--json": as_json})
    walk_through = viewer() if tui else None
    options = ties.options()
    if other is not None:
        refuse("two models are compared as they are", [*options, *(["plan"] if ties.plan else []), *(["misses"] if misses else [])])
    with progress() as say:
        from pe_fx.cli import jobs
        from pe_fx.diff import terminal

        models = jobs.Models(input or (), trust, say)
        if other is None:
            found = jobs.diff_of_transform(models, spec, options, jobs.read_plan(ties.plan))
        else:
            found = jobs.diff_of_two(models, spec, other)
        jobs.write_drawings(found, html, svg, png, module, say)
    if as_json:
        print(printable(found.to_json(), as_json=True))
    elif walk_through is not None:
        walk_through(found)
    else:
        if found and stat:
            look.show(terminal.stat(found, look.columns, fold=fold))
        elif found and not (html or svg or png):
            look.show((terminal.side_by_side if side_by_side else terminal.unified)(found, look.columns, fold=fold))
        if misses:
            look.show(terminal.misses(found, look.columns))
        if found:
            look.show(terminal.summary(found))
        else:
            print(terminal.summary(found).plain, file=sys.stderr)
    if exit_code and found:
        raise typer.Exit(DIFFERENT)


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
