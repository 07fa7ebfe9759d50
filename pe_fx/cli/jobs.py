"""What the commands do, apart from reading their options and showing what came out."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pe_fx
from pe_fx import checkpoint
from pe_fx.cli.options import refuse
from pe_fx.cli.specs import HUB, Loaded, load, split_commas
from pe_fx.diff import Diff, Graph, compare, diff_transform, page, picture
from pe_fx.errors import CaptureError, PeFxError
from pe_fx.files import check_writable
from pe_fx.tied.held import held_plan
from pe_fx.tied.twin import Report
from pe_fx.ties import SCHEMA_VERSION, Plan

SPEC = "pe_fx_spec"
"""The key, in a file's metadata, of the spec whose model it was made from."""

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
    """Ties the model and writes its weights, with the plan in the metadata, or its folder for the hub; returns the plan."""
    source = Path(split_commas(spec.removeprefix(HUB))[0]) if spec.startswith(HUB) else None
    folder = Path(str(output).removeprefix(HUB)) if str(output).startswith(HUB) else None
    if folder is None:
        check_writable(output)
    elif source is not None and source.resolve() == folder.resolve():
        raise PeFxError(f"{output} is where the dense weights are read from while the tied ones are written: give another folder")
    loaded = models.built(spec, on_meta=False)
    with loaded.home.entered():
        if weights is not None:
            models.say(f"reading {weights}")
            checkpoint.load(weights, loaded.model, inplace=True, trust=models.trust)
        made = _tied(models, loaded, options, read, init)
        models.say(f"writing {output}")
        if folder is None:
            checkpoint.save(loaded.model, output, metadata={SPEC: spec})
        elif hasattr(loaded.model, "save_pretrained"):
            _write_folder(loaded.model, source, folder)
        else:
            raise PeFxError(f"{output}: a {type(loaded.model).__name__} writes no folder for the hub: -o tied.safetensors")
    return made


def _write_folder(model: Any, source: Path | None, folder: Path) -> None:
    """As transformers does; what else the folder that the model comes from holds, such as its tokenizer, is copied."""
    model.save_pretrained(folder)
    for file in source.iterdir() if source is not None else ():
        if file.is_file() and not (checkpoint.is_weights(file) or (folder / file.name).exists()):
            shutil.copy2(file, folder)


def _tied(models: Models, loaded: Loaded, options: dict[str, Any], read: Plan | None, init: str = "keep") -> Plan:
    """Ties the model itself; returns the plan."""
    models.say("planning")
    made = pe_fx.plan(loaded.model, loaded.example_inputs, **options) if read is None else read
    pe_fx.apply(loaded.model, made, init=init, inplace=True)
    return made


def write_untied(models: Models, file: Path, output: Path, spec: str | None, read: Plan | None) -> Plan:
    """Writes a tied file's weights as those of the dense model; returns the plan that they were tied by."""
    check_writable(output)
    loaded = None if spec is None else models.built(spec)
    models.say(f"untying {file}")
    with contextlib.nullcontext() if loaded is None else loaded.home.entered():
        return checkpoint.untie(file, output, model=None if loaded is None else loaded.model, plan=read, trust=models.trust)


def verified(
    models: Models, spec: str, options: dict[str, Any], read: Plan | None, weights: Path | None, tolerance: float | None
) -> Report:
    """Compares the model, tied as its weights say or else by the options, with its dense twin."""
    loaded = models.built(spec, on_meta=False)
    with loaded.home.entered():
        if weights is not None:
            models.say(f"reading {weights}")
            checkpoint.load(weights, loaded.model, inplace=True, trust=models.trust)
        if held_plan(loaded.model) is None:
            _tied(models, loaded, options, read)
        else:
            refuse(f"{weights or spec} is tied, by the plan in it", [*options, *(["plan"] if read else [])])
        models.say("comparing it with its dense twin")
        return pe_fx.verify(loaded.model, loaded.example_inputs, tolerance=tolerance)


@dataclass(frozen=True)
class Described:
    """A plan, and what is known of the file that it was found in; `tensors` where that holds weights, the number and bytes by dtype."""

    file: Path
    plan: Plan
    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[int, int]] | None

    def facts(self) -> dict[str, str]:
        """As text, by what they are about."""
        held = [f"{count:,} of {dtype}, {size:,} bytes" for dtype, (count, size) in (self.tensors or {}).items()]
        by = f"pe_fx {self.metadata[checkpoint.VERSION]}, " if checkpoint.VERSION in self.metadata else ""
        named = {
            "model" if key == SPEC else key: value for key, value in self.metadata.items() if key not in (checkpoint.VERSION, "format")
        }
        return {
            "file": str(self.file),
            **({"tensors": "; ".join(held)} if held else {}),
            **named,
            "plan": f"{by}schema version {SCHEMA_VERSION}, captured by {self.plan.capture}",
            "options": "; ".join(f"{name} {_option(value)}" for name, value in self.plan.options.items() if value is not None),
        }

    def to_json(self) -> str:
        held = None if self.tensors is None else {dtype: {"tensors": count, "bytes": size} for dtype, (count, size) in self.tensors.items()}
        versions = {"plan": SCHEMA_VERSION, "pe_fx": self.metadata.get(checkpoint.VERSION)}
        body = {"file": str(self.file), "tensors": held, "versions": versions, "metadata": dict(self.metadata)}
        return json.dumps(body | {"plan": json.loads(self.plan.to_json())})


def described(file: Path) -> Described:
    """Raises `PeFxError` where the file holds no plan."""
    if not checkpoint.is_weights(file):
        return Described(file, _plan_in(file), {}, None)
    found = checkpoint.read(file, device="meta")
    if found.plan is None:
        raise PeFxError(f"{file} {_NO_PLAN}")
    tensors: dict[str, tuple[int, int]] = {}
    for value in found.values.values():
        dtype = str(value.dtype).removeprefix("torch.")
        count, size = tensors.get(dtype, (0, 0))
        tensors[dtype] = (count + 1, size + value.nbytes)
    metadata = {key: value for key, value in found.metadata.items() if key != checkpoint.PLAN}
    return Described(file, found.plan, metadata, tensors)


def _option(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{key}={item}" for key, item in value.items()]
    return ", ".join(map(str, value)) or "none" if isinstance(value, Sequence) and not isinstance(value, str) else str(value).lower()


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


_NO_PLAN = "has no plan in its metadata: pe-fx transform writes one"


def read_plan(path: Path | None) -> Plan | None:
    """A plan from JSON, or from the metadata of a tied model's weights."""
    if path is None:
        return None
    if not checkpoint.is_weights(path):
        return _plan_in(path)
    held = checkpoint.read_plan(path)
    if held is None:
        raise PeFxError(f"{path} {_NO_PLAN}")
    return held


def _plan_in(path: Path) -> Plan:
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
