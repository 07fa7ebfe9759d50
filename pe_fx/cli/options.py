"""The options that several commands take, each stated once: a dataclass among a command's parameters stands for its fields."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from pe_fx.cli.forms import CODE, FORMS, KINDS, WEIGHTS
from pe_fx.errors import PeFxError
from pe_fx.text import sizes_in

COLORS = {"auto": None, "always": True, "never": False}

Spec = Annotated[str, typer.Argument(metavar="SPEC", help=f"The model: {FORMS}. {CODE}", show_default=False)]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", "-i", metavar="SHAPE", help="Input shape: 1x3x224x224, 1x16:int64 or input_ids=1x16:int64. Derived where left out."
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Load model.pt2 and --checkpoint FILE whole, with the code that such files can carry and that runs then. "
        "Without it they are read as data, and refused where they are more. For files whose maker you trust.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help=f"The weights: {WEIGHTS}.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
Misses = Annotated[bool, typer.Option("--misses", help="Say of every near miss why it is none.")]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, show the traceback.")]


@dataclass(frozen=True, kw_only=True)
class Ties:
    """What is tied: options of `pe_fx.plan`, or a plan made before, which brings its own."""

    rules: Annotated[
        str | None,
        typer.Option("--rules", metavar="KINDS", help=f"Kinds of sites, with commas: {', '.join(KINDS)}, or none. All by default."),
    ] = None
    share: Annotated[
        str | None,
        typer.Option(
            "--share",
            metavar="KINDS",
            help="Kinds whose neighbouring sites share their matrices, all of them or, as mlp=2, in groups; or none. A kind that is not "
            "among the rules is shared without being tied. By default bottleneck, where it is tied.",
        ),
    ] = None
    across: Annotated[
        str | None,
        typer.Option("--across", metavar="KINDS", help="Kinds whose sites are tied to the matrices of the next one, such as mlp."),
    ] = None
    entry: Annotated[
        str | None, typer.Option("--entry", metavar="HOW", help="The first block of a stage: keep, slice or expand; keep by default.")
    ] = None
    include: Annotated[list[str] | None, typer.Option("--include", metavar="GLOB", help="Only in modules like this, e.g. 'layer3.*'.")] = (
        None
    )
    exclude: Annotated[list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not in modules like this.")] = None
    mix: Annotated[
        str | None, typer.Option("--mix", metavar="HOW", help="The order of tied channels: none, signed or fitted; none by default.")
    ] = None
    gain: Annotated[
        float | None,
        typer.Option("--gain", metavar="START", help="A learned factor per tied output channel, which starts here, e.g. 0.2."),
    ] = None
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="A plan made before, with its options, instead of matching anew.")
    ] = None

    def options(self) -> dict[str, Any]:
        """As `pe_fx.plan` takes them, as far as they are given."""
        given = {name: value for name, value in vars(self).items() if value is not None and name != "plan"}
        given |= {name: read(given[name]) for name, read in (("rules", _kinds), ("share", sizes_in), ("across", _kinds)) if name in given}
        if self.plan is not None:
            refuse("--plan has its options in it", given)
        return given


@dataclass(frozen=True, kw_only=True)
class Look:
    """How what is shown looks."""

    color: Annotated[str, typer.Option("--color", metavar="WHEN", help="auto (on a terminal), always or never.")] = "auto"
    width: Annotated[
        int | None, typer.Option("--width", min=20, help="Columns; the terminal's by default, 100 in a pipe.", show_default=False)
    ] = None

    def __post_init__(self) -> None:
        if self.color not in COLORS:
            raise PeFxError(f"--color {self.color}: choose from {', '.join(COLORS)}")

    @property
    def columns(self) -> int:
        return self.width or shutil.get_terminal_size((100, 24)).columns

    def show(self, what: RenderableType) -> None:
        """Prints to stdout; plain text where that is no terminal."""
        colors = COLORS[self.color]
        console = Console(
            file=sys.stdout, width=self.columns, force_terminal=colors, no_color=colors is False, highlight=False, markup=False, emoji=False
        )
        with console.capture() as captured:
            console.print(what, soft_wrap=isinstance(what, Text), end="" if isinstance(what, Text) and what.plain.endswith("\n") else "\n")
        text = captured.get()
        sys.stdout.write(text if console.color_system else "".join(line.rstrip() + "\n" for line in text.splitlines()))


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer reads it: each dataclass among its parameters gives way to its fields.

    >>> def shown(*, spec: Spec, look: Look) -> None: print(spec, look.width)
    >>> spread(shown)(spec="model", color="auto", width=80)
    model 80
    >>> list(inspect.signature(spread(shown)).parameters)
    ['spec', 'color', 'width']
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: own.annotation for name, own in signature.parameters.items() if dataclasses.is_dataclass(own.annotation)
    }

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        command(**given)

    parameters: list[inspect.Parameter] = []
    for name, own in signature.parameters.items():
        parameters += inspect.signature(groups[name], eval_str=True).parameters.values() if name in groups else [own]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


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


def _kinds(text: str) -> list[str]:
    return [] if text == "none" else [kind.strip() for kind in text.split(",")]
