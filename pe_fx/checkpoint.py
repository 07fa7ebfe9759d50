"""Weights on disk, with the plan in the metadata, read back as a whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from pe_fx.api import apply
from pe_fx.errors import PeFxError, check_one_of, first_line
from pe_fx.files import whole_file
from pe_fx.graph.copies import copied
from pe_fx.tied import twin
from pe_fx.tied.held import held_plan, uncompiled
from pe_fx.tied.layouts import axis_of, by_target, kept_ranges, layout_of
from pe_fx.tied.reading import is_sharded
from pe_fx.tied.rewrite_modules import INITS
from pe_fx.tied.weight import MIX, drop_placeholders, hands_of
from pe_fx.ties import Plan, gain_of, kept_of, length

PLAN, VERSION = "pe_fx_plan", "pe_fx_version"
"""The keys of the plan, and of the version that wrote it, in a file's metadata."""

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
"""How files are called that torch.save writes."""

INDEX = ".index.json"
"""How the file is called that says which of several files holds which tensor."""

SHARD = 5_000_000_000
"""Bytes of tensors, at most, in one of several files."""


def save(model: nn.Module, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a model's parameters and buffers; of a tied model, with its plan.

    >>> import tempfile, pe_fx
    >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> tied = pe_fx.transform(build())
    >>> file = Path(tempfile.mkdtemp()) / "tied.safetensors"
    >>> save(tied, file)
    >>> load(file, build())[2]
    TiedLinear(in_features=8, out_features=4, bias=True, weight ← 0.weightᵀ)

    Names, shapes and dtypes are those of `model.state_dict()`. The file's name says in what form they are written: `….index.json` in
    several files beside it, as on the hub; `.pt`, `.pth`, `.bin` or `.ckpt` as torch.save does; any other as safetensors, in which a
    tensor with several names stands under its first. `metadata` is kept beside the plan. The file takes the place of an older one only
    when it is complete.
    Raises `PeFxError` where the state_dict holds what is no dense tensor, or a tie leads out of the model; `OSError` where the
    file cannot be written.
    """
    plan = held_plan(uncompiled(model))
    plans = {} if plan is None else {PLAN: plan.to_json(), **_version()}
    values = uncompiled(model).state_dict(keep_vars=True)
    names = values if _suffix(Path(path)) in PICKLES else _named(model)
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.is_meta or is_sharded(value) or value.layout is not torch.strided:
            raise PeFxError(f"{name} is {_kind(value)}: a file of weights holds dense tensors with values only")
    _write({name: values[name] for name in names}, Path(path), {"format": "pt", **(metadata or {}), **plans}, _told(values))


def load(
    path: str | Path, model: nn.Module | Callable[[], nn.Module], *, init: str = "keep", inplace: bool = False, trust: bool = False
) -> nn.Module:
    """The model with the values of a file, tied where the file or the model is.

    >>> import tempfile, pe_fx
    >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> file = Path(tempfile.mkdtemp()) / "dense.safetensors"
    >>> dense = build()
    >>> save(dense, file)
    >>> tied = load(file, pe_fx.transform(build()), init="mean")
    >>> torch.allclose(tied[0].weight, (dense[0].weight + dense[2].weight.t()) / 2)
    True

    Args:
        path: what `save` wrote; any safetensors file; a state_dict by torch.save, by itself or under "state_dict" or "model"; or the
            index (`….index.json`) of several such files.
        model: dense or tied. It is left as it is unless `inplace`. Or what builds it, say `lambda: timm.create_model("resnet50")`: then
            there is never memory for the weights of the dense model.
        init: how a tied model takes the values of a dense file; see `pe_fx.transform`.
        inplace: change `model` itself.
        trust: unpickle whatever a file by torch.save holds, which runs code that it may carry; else weights alone.

    Returns:
        A model with the file's values, in the model's own dtypes and on its devices, as with `load_state_dict`. A dense model
        given a tied file is tied by the file's plan.

    Raises:
        PeFxError: the file is damaged, its plan or mix does not fit, or a tensor is missing, unexpected or of another shape or kind.
        OSError: it cannot be read. In both cases the model is left as it was.
    """
    check_one_of("init", init, INITS)
    path = Path(path)
    found = read(path, trust=trust)
    values, plan = found.values, found.plan
    is_built_here = not isinstance(model, nn.Module)
    if not isinstance(model, nn.Module):
        model = _built_without_values(model)
    held = held_plan(uncompiled(model))
    if any(map(is_sharded, model.parameters())):
        raise PeFxError("this model is sharded: load before that, or with torch.distributed.checkpoint")
    if not is_built_here and any(parameter.is_meta for parameter in model.parameters()):
        raise PeFxError("this model has no memory for its weights: give what builds it, or model.to_empty(device='cpu')")
    if plan is not None and held is not None and set(plan.ties) != set(held.ties):
        other = next(iter(set(plan.ties) ^ set(held.ties)))
        raise PeFxError(f"{path} is tied otherwise than the model: only one of them has {other}. Load it into a dense model")
    if held is not None and _is_dense(values, held):
        if held.entries:
            raise PeFxError(
                f"{path} is dense, and entry={held.entries[0].treatment!r} has changed modules of the model: "
                "load it into the dense model, and tie that by the plan, pe_fx.apply(dense, plan)"
            )
        dense = twin.untie(uncompiled(model))
        dense.load_state_dict(_fitting(dense, values, path))
        values = apply(dense, held, init=init, inplace=True).state_dict()
    outline = _outline(model)  # what does not fit is found on it, before the model is changed
    missing = plan if held is None else None
    if missing is not None:
        with _about(path):
            apply(outline, missing, inplace=True)
    state = _fitting(outline, values, path)
    result = model if inplace or is_built_here else copied(model)
    if missing is not None:
        apply(uncompiled(result), missing, inplace=True)
    if is_built_here:
        _give_values(uncompiled(result), state)
    else:
        uncompiled(result).load_state_dict(state)
    return result


def _built_without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """The model, its parameters on the meta device as soon as they are registered; buffers have values, which may be in no file."""

    def on_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        if parameter not in moved:
            moved[parameter] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        return moved[parameter]

    moved: MutableMapping[nn.Parameter, nn.Parameter] = WeakIdKeyDictionary()  # one that is registered twice stays one
    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # it may return another, as documented
    try:
        return build()
    finally:
        handle.remove()


def _give_values(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Makes a file's tensors the model's, in the model's dtypes."""
    own = model.state_dict(keep_vars=True)
    made = {
        key: nn.Parameter(state[name].to(value.dtype), requires_grad=value.requires_grad)
        for name, value in own.items()
        if isinstance(value, nn.Parameter) and (key := id(value))
    }
    given = OrderedDict((name, made.get(id(value), state[name])) for name, value in own.items())
    vars(given)["_metadata"] = _told(state)
    model.load_state_dict(given, assign=True)


def untie(path: str | Path, to: str | Path, *, model: nn.Module | None = None, plan: Plan | None = None, trust: bool = False) -> Plan:
    """Writes the weights in a tied file as those of the dense model, and returns the plan that they were tied by.

    >>> import tempfile, pe_fx
    >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> folder = Path(tempfile.mkdtemp())
    >>> save(pe_fx.transform(build()), folder / "tied.safetensors")
    >>> _ = untie(folder / "tied.safetensors", folder / "dense.safetensors")
    >>> dense = load(folder / "dense.safetensors", build())
    >>> torch.equal(dense[2].weight, dense[0].weight.t())
    True

    Dtypes stay. What `entry` changed in the model stays as well: such a file fits `pe_fx.untie` of the tied model.

    Args:
        path, trust: as for `load`.
        to: as for `save`.
        model: the dense model, whose values do not matter. Without it, the tensors are put together by their names in the plan; with it,
            the model reads and writes them itself, and the file is checked to fit it.
        plan: where the file holds none.

    Raises:
        PeFxError: the file is damaged, dense, or does not fit its plan or the model. OSError: it cannot be read, or `to` not written.
    """
    path = Path(path)
    found = read(path, trust=trust)
    if found.plan is not None and plan is not None:
        raise PeFxError(f"{path} has its plan in it: give no other")
    plan = plan or found.plan
    if plan is None:
        raise PeFxError(f"{path} has no plan in its metadata, which says what is tied in it: give the plan")
    if _is_dense(found.values, plan):
        raise PeFxError(f"{path} is dense: it holds {next(tie.target for tie in plan.ties if tie.target in found.values)}")
    metadata = {key: value for key, value in found.metadata.items() if key not in (PLAN, VERSION)}
    if model is None:
        told = {module: {key: of[key] for key in of if key not in (MIX, PLAN, VERSION)} for module, of in _told(found.values).items()}
        _write(_dense(found.values, plan, path), Path(to), metadata, told)
        return plan
    outline = _outline(model)
    with _about(path):
        apply(outline, plan, inplace=True)
    outline.load_state_dict(_fitting(outline, found.values, path), assign=True)
    save(twin.untie(outline, inplace=True), to, metadata=metadata)
    return plan


def _dense(values: Mapping[str, Any], plan: Plan, path: Path) -> dict[str, Tensor]:
    """The weights of a tied model as those of its dense twin."""
    targets = by_target(plan.ties)
    kept = {name: kept_ranges(ties) for name, ties in targets.items()}
    told = _told(values)
    dense = dict(values)

    def stored(name: str, shape: tuple[int, ...]) -> Tensor:
        value = values.get(name)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            has = f"has {name} as {tuple(value.shape)}, not {shape}" if isinstance(value, Tensor) else f"lacks {name}"
            raise PeFxError(f"{path} {has}, as its plan says. Where the model writes its weights under other names, give the model")
        return value

    def whole(name: str, shape: tuple[int, ...]) -> Tensor:
        """What is stored of a source, or of what a tie left of a weight."""
        if not kept.get(name):
            return stored(name, shape)
        axis = axis_of(targets[name])
        return stored(kept_of(name), (*shape[:axis], length(kept[name]), *shape[axis + 1 :]))

    for name, ties in targets.items():
        layout = layout_of(ties, targets, kept)
        module, _, attribute = name.rpartition(".")
        mixes = told.get(module, {}).get(MIX, {}).get(attribute)
        if mixes not in (None, hands_of(layout)):
            raise PeFxError(f"{path}: {name} has another order or other signs (mix) there than in the plan")
        own = whole(name, ties[0].into.full_shape) if kept[name] else None
        gains = sum(gain.count for gain in layout.gains)
        factors = stored(gain_of(name), (gains,)) if gains else None
        sources = [whole(tie.source, tie.of.full_shape) for tie in ties]
        view = layout.assemble(own, sources, factors, [fitted.moves(sources[0].dtype) for fitted in layout.fitted])
        dense[name] = view.clone(memory_format=torch.contiguous_format)
    for name in targets:
        for left in (kept_of(name), gain_of(name)):
            dense.pop(left, None)
    return dense


@dataclass(frozen=True)
class Contents:
    """What a file of weights holds."""

    values: Mapping[str, Any]
    metadata: Mapping[str, str]
    plan: Plan | None


def read(path: str | Path, *, trust: bool = False, device: str = "cpu") -> Contents:
    """What a file holds, or several that it is the index of; on the device "meta" without values.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "dense.safetensors"
    >>> save(nn.Linear(4, 2), file)
    >>> sorted(read(file).values)
    ['bias', 'weight']

    Raises `PeFxError` where it is damaged, or may run code and is not trusted; `OSError` where it cannot be read.
    """
    path = Path(path)
    values, metadata = _read(path, trust, device)
    with _about(path):
        plan = Plan.from_json(metadata[PLAN]) if PLAN in metadata else None
    for tie in plan.ties if plan is not None else ():
        drop_placeholders(values, tie.target)
    return Contents(values, metadata, plan)


def read_plan(path: str | Path) -> Plan | None:
    """The plan in a file's metadata; None where it holds none.

    Raises `PeFxError` where the file or the plan is damaged.
    """
    return read(path, device="meta").plan


def is_weights(path: Path) -> bool:
    """Whether a file is called as one of weights, or the index of several, is."""
    return path.name.endswith((".safetensors", *PICKLES, INDEX))


def _suffix(path: Path) -> str:
    """That of the files of which this is the index, or of the file itself."""
    return Path(path.name.removesuffix(INDEX)).suffix


def _version() -> dict[str, str]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return {VERSION: importlib.metadata.version("pe_fx")}
    return {}


def _write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], told: Mapping[str, Any]) -> None:
    """In the form that the file's name asks for. `told`: what is said of each module, which torch.save keeps."""
    if not path.name.endswith(INDEX):
        with whole_file(path) as draft:
            _write_one(tensors, path, draft, metadata, told)
        return
    stem, suffix = Path(path.name.removesuffix(INDEX)).stem, _suffix(path) or ".safetensors"
    shards = _shards(tensors)
    where: dict[str, str] = {}
    with contextlib.ExitStack() as drafts:
        index = drafts.enter_context(whole_file(path))  # entered first, it takes its place last
        for number, shard in enumerate(shards, start=1):
            file = path.with_name(f"{stem}-{number:05}-of-{len(shards):05}{suffix}")
            _write_one(shard, file, drafts.enter_context(whole_file(file)), {"format": "pt"}, told)
            where |= dict.fromkeys(shard, file.name)
        size = sum(value.nbytes for value in tensors.values())
        index.write_text(json.dumps({"metadata": {"total_size": size, **metadata}, "weight_map": where}, indent=2))


def _shards(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD
    for name, value in tensors.items():
        if shards[-1] and value.nbytes > room:
            shards.append({})
            room = SHARD
        shards[-1][name] = value
        room -= value.nbytes
    return shards


def _write_one(tensors: Mapping[str, Tensor], path: Path, draft: Path, metadata: Mapping[str, str], told: Mapping[str, Any]) -> None:
    if path.suffix in PICKLES:
        state = OrderedDict((name, value.detach()) for name, value in tensors.items())
        vars(state)["_metadata"] = OrderedDict(told) | {"": {**told.get("", {}), **metadata}}
        torch.save(state, draft)
        return
    alone: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in storages:
            value = value.clone()  # part of a tensor that is written already
        storages.add(value.untyped_storage().data_ptr() if value.numel() else 0)
        alone[name] = value
    library = _safetensors()
    try:
        library.torch.save_file(alone, draft, metadata=dict(metadata))
    except library.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {first_line(error)}") from error
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise PeFxError(f"{path}: safetensors cannot hold this model: {first_line(error)}") from error


def _read(path: Path, trust: bool, device: str) -> tuple[dict[str, Any], Mapping[str, str]]:
    if path.name.endswith(INDEX):
        return _read_shards(path, trust, device)
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        with _opened(path) as opened:
            values = {name: opened.get_tensor(name).to(device) for name in opened.keys()}  # noqa: SIM118 (no dict)
            return values, opened.metadata() or {}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # a training script's options, kept beside its weights
            values = torch.load(path, map_location=device, weights_only=not trust)
    except Exception as error:  # a damaged file raises anything
        if trust:
            raise PeFxError(f"{path} is no checkpoint: {first_line(error)}") from error
        raise PeFxError(
            f"{path} is no checkpoint of weights alone: {type(error).__name__}. "
            "Where it is whole and you trust whoever made it, trust=True (--trust) loads it with the code that it carries"
        ) from error
    if isinstance(values, dict):
        values = next((values[key] for key in ("state_dict", "model") if isinstance(values.get(key), dict)), values)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise PeFxError(f"{path} holds no weights by name, but {_kind(values)}")
    return values, {key: value for key, value in _told(values).get("", {}).items() if isinstance(value, str)}


def _read_shards(path: Path, trust: bool, device: str) -> tuple[dict[str, Any], Mapping[str, str]]:
    values: OrderedDict[str, Any] = OrderedDict()
    told: dict[str, Any] = {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        files = [path.with_name(file) for file in dict.fromkeys(index["weight_map"].values())]
        metadata = {key: value for key, value in index.get("metadata", {}).items() if isinstance(value, str)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PeFxError(f"{path} is no index of files beside it, or a damaged one: {first_line(error)}") from error
    for file in files:
        part, _ = _read(file, trust, device)
        values |= part
        told |= _told(part)
    vars(values)["_metadata"] = told
    return values, metadata


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    library = _safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            yield file
    except library.SafetensorError as error:
        raise PeFxError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise PeFxError("weights are written and read with safetensors: pip install 'pe_fx[cli]'") from error
    return safetensors


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Names the file in errors."""
    try:
        yield
    except PeFxError as error:
        raise PeFxError(f"{path}: {error}") from error


def _is_dense(values: Mapping[str, Any], held: Plan) -> bool:
    """Whether these weights are those of the model before it was tied."""
    return any(tie.target in values for tie in held.ties)


def _outline(model: nn.Module) -> nn.Module:
    """A copy without values."""
    model = uncompiled(model)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo: dict[int, Any] = {}
    for key, tensor in tensors.items():
        empty = torch.empty_like(tensor, device="meta")
        memo[key] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copied(model, memo, lend=True)


def _fitting(model: nn.Module, values: Mapping[str, Any], path: Path) -> OrderedDict[str, Any]:
    """The model's state_dict with these values; a tensor with several names takes the one that the file has.

    Raises `PeFxError` unless they fit one for one.
    """
    first = _first_names(model)
    own = model.state_dict()
    given = {first.get(name, name): value for name, value in values.items()}
    wrong = [f"it lacks {name}" for name, shared in first.items() if shared not in given]
    wrong += [f"it has {name}, which the model has not" for name in values if name not in first]
    wrong += [text for name in values if name in first for text in _differences(name, values[name], own[name], given[first[name]])]
    told = _told(values)
    wrong += [
        f"{module} has another order or other signs (mix) there"
        for module, here in _told(own).items()
        if (there := told.get(module, {}).get(MIX)) is not None and there != here.get(MIX)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PeFxError(f"{path} does not fit this {type(model).__name__}: {'; '.join(wrong[:3])}{more}")
    state = OrderedDict((name, given[shared]) for name, shared in first.items())
    vars(state)["_metadata"] = told
    return state


def _told(values: Mapping[str, Any]) -> Mapping[str, dict[str, Any]]:
    """What a state_dict says of each module beside its values."""
    return getattr(values, "_metadata", {})


def _differences(name: str, value: Any, own: Any, shared: Any) -> Iterator[str]:
    if not isinstance(value, Tensor) or not isinstance(own, Tensor):
        if isinstance(value, Tensor) or isinstance(own, Tensor):
            yield f"{name} is {_kind(value)}, in the model {_kind(own)}"
    elif value.shape != own.shape:
        yield f"{name} is {tuple(value.shape)}, in the model {tuple(own.shape)}"
    elif (value.is_floating_point(), value.is_complex()) != (own.is_floating_point(), own.is_complex()):
        yield f"{name} is {value.dtype}, in the model {own.dtype}"
    elif value is not shared and not torch.equal(value, shared):
        yield f"{name} is one with another tensor in the model, but not in the file"


def _named(model: nn.Module) -> dict[str, Any]:
    """The state_dict, every tensor under its first name alone."""
    model = uncompiled(model)
    values = model.state_dict(keep_vars=True)
    first = _first_names(model)
    return {name: value for name, value in values.items() if first[name] == name}


def _first_names(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in model.state_dict(keep_vars=True).items()}


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"a {layout}{type(value).__name__}{' on the meta device' * value.is_meta}"
    return f"a {type(value).__name__}"
