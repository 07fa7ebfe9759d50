"""What the commands do, apart from reading their options and showing what came out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pe_fx
from pe_fx import checkpoint
from pe_fx.cli.specs import Loaded, load
from pe_fx.diff import Diff, Graph, compare, diff_transform, page, picture
from pe_fx.errors import CaptureError, PeFxError
from pe_fx.files import check_writable
from pe_fx.ties import Plan

Result = TypeVar("Result")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Models:
    """How the models of one call are made: with which inputs, whether files may run code, and who is told what is going on."""

    inputs: Sequence[str]
    trust: bool
    say: Say

    def built(self, spec: str, *, on_meta: bool = True) -> Loaded:
        self.say(f"building {spec}")
        return load(spec, self.inputs, on_meta=on_meta, trust=self.trust)

    def used(self, loaded: Loaded, use: Callable[[Loaded], Result]) -> Result:
        """What `use` makes of a model; one without memory for its weights whose graph cannot be captured so is built with."""
        if any(parameter.is_meta for parameter in loaded.model.parameters()):
            with contextlib.suppress(CaptureError), loaded.home.entered():
                return use(loaded)
            loaded = self.built(loaded.spec, on_meta=False)
        try:
            with loaded.home.entered():
                return use(loaded)
        except CaptureError as error:
            raise CaptureError(f"{loaded.spec}: {error}") from error


def planned(models: Models, spec: str, options: dict[str, Any], read: Plan | None) -> Plan:
    """The model's plan; one that was read is checked to fit."""

    def plan_it(loaded: Loaded) -> Plan:
        if read is not None:
            models.say("checking the plan")
            pe_fx.apply(loaded.model, read, inplace=True)
            return read
        models.say(f"planning {spec}")
        return pe_fx.plan(loaded.model, loaded.example_inputs, **options)

    return models.used(models.built(spec), plan_it)


def write_tied(
    models: Models, spec: str, output: Path, options: dict[str, Any], read: Plan | None, weights: Path | None, init: str
) -> Plan:
    """Ties the model and writes its weights, with the plan in the metadata; returns the plan."""
    check_writable(output)
    loaded = models.built(spec, on_meta=False)
    with loaded.home.entered():
        if weights is not None:
            models.say(f"reading {weights}")
            checkpoint.load(weights, loaded.model, inplace=True, trust=models.trust)
        models.say("planning")
        made = pe_fx.plan(loaded.model, loaded.example_inputs, **options) if read is None else read
        tied = pe_fx.apply(loaded.model, made, init=init, inplace=True)
        models.say(f"writing {output}")
        checkpoint.save(tied, output, metadata={"pe_fx_spec": spec})
    return made


def diff_of_transform(models: Models, spec: str, options: dict[str, Any], read: Plan | None) -> Diff:
    def diff_it(loaded: Loaded) -> Diff:
        models.say(f"comparing {spec} with its tied self")
        return diff_transform(loaded.model, loaded.example_inputs, made=read, name=spec, **options)

    return models.used(models.built(spec), diff_it)


def diff_of_two(models: Models, first: str, second: str) -> Diff:
    """Compares two models on the same inputs: those given, else those that an exported program keeps."""
    on_meta = bool(models.inputs) or not any(spec.endswith(".pt2") for spec in (first, second))
    both = [models.built(spec, on_meta=on_meta) for spec in (first, second)]
    known = next((loaded.example_inputs for loaded in both if loaded.example_inputs is not None), None)

    def graph_of(loaded: Loaded) -> Graph:
        models.say(f"capturing {loaded.spec}")
        return Graph.of(loaded.model, loaded.example_inputs if loaded.example_inputs is not None else known, loaded.spec)

    before, after = (models.used(loaded, graph_of) for loaded in both)
    models.say("aligning")
    return compare(before, after)


def read_plan(path: Path | None) -> Plan | None:
    """A plan from JSON, or from the metadata of a tied model's weights."""
    if path is None:
        return None
    if path.suffix == ".safetensors":
        held = checkpoint.read_plan(path)
        if held is None:
            raise PeFxError(f"{path} has no plan in its metadata: pe-fx transform writes one")
        return held
    try:
        return Plan.from_json(path.read_text())
    except (PeFxError, UnicodeDecodeError) as error:
        raise PeFxError(f"{path}: {error}") from error


def write_drawings(found: Diff, html: Path | None, svg: Path | None, png: Path | None, module: str, say: Say) -> None:
    if html is not None:
        say(f"writing {html}")
        page.write_page(found, html)
    for path, write in ((svg, picture.write_svg), (png, picture.write_png)):
        if path is not None:
            say(f"writing {path}")
            write(found, path, module)
