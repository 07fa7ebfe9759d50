"""Models by name: what the command line takes for a model.

timm:NAME[,key=value…]              torchvision:NAME[,key=value…]
transformers:MODEL_TYPE[,key=value…]    from its configuration, with random weights
diffusers:CLASS[,key=value…]        likewise, from its constructor's defaults
hf:FOLDER[,key=value…]              a local folder of the hub: transformers' config.json and the weights beside it
package.module:callable[,key=value…]    path/file.py:callable[,key=value…]
model.pt2                           an exported program

A callable is code, which runs. An exported program is data, and read as such, as is a folder of the hub.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pe_fx.cli.exported import load_program
from pe_fx.cli.forms import FORMS
from pe_fx.cli.home import KEPT, Home
from pe_fx.errors import PeFxError, first_line
from pe_fx.graph.inputs import ExampleInputs

Build = Callable[..., Any]


HUB = "hf:"
"""Before a local folder of the hub."""


@dataclass(frozen=True)
class Loaded:
    """A model with the spec that it was made from, and example inputs where they are known (else None: they are derived).

    Its code may import more when it runs: inside of `home.entered()`.
    """

    spec: str
    model: nn.Module
    example_inputs: ExampleInputs | None = None
    home: Home = field(default_factory=Home)


def load(spec: str, inputs: Sequence[str] = (), *, on_meta: bool = False, trust: bool = False) -> Loaded:
    """Builds the model that a spec names.

    >>> load("torch.nn:Linear,in_features=4,out_features=2").model
    Linear(in_features=4, out_features=2, bias=True)

    `inputs` as for `parse_inputs`. With `on_meta`, models of the libraries are built without memory for their weights where that
    works. Nothing is downloaded. Raises `PeFxError` where there is no such model, with the nearest names that there are; and for an
    exported program that may run code of its own, unless `trust`.
    """
    if spec.endswith(".pt2"):
        model, example_inputs = load_program(Path(spec), trust=trust)
        return Loaded(spec, model, parse_inputs(inputs, "cpu") or example_inputs)
    file, py, rest = spec.partition(".py:")
    source, colon, rest = (f"{file}.py", ":", rest) if py else spec.partition(":")
    name, *arguments = split_commas(rest)
    if not source or not colon or not name:
        guess = f" (timm:{spec}?)" if spec.isidentifier() and spec not in _LIBRARIES else ""
        raise PeFxError(f"{spec!r} is no model spec{guess}: write {FORMS}")
    options = dict(map(_option, arguments))
    home = Home()
    if source in _LIBRARIES:
        library = _LIBRARIES[source](name, trust)
        with contextlib.nullcontext() if trust else _weights_alone():
            model = _built(spec, library.build, options, (library.outline or library.build) if on_meta else None)
    else:
        home, module = _at_home(Path(source)) if py else (Home(Path.cwd()), source)
        with home.entered():  # also for what is imported while it is built
            found = _from_file(module, Path(source)) if py else _from_package(module)
            model = _built(spec, _callable(found, source, name), options)
    like = next(iter(model.parameters()), torch.empty(0))
    return Loaded(spec, model, parse_inputs(inputs, like.device), home)


def parse_inputs(inputs: Sequence[str], device: torch.device | str = "cpu") -> ExampleInputs | None:
    """Example inputs from their shapes: float32 unless a dtype is given, by position or by name; None for none.

    >>> (image,) = parse_inputs(["1x3x224x224"])
    >>> image.shape
    torch.Size([1, 3, 224, 224])
    >>> {name: (tuple(x.shape), x.dtype) for name, x in parse_inputs(["input_ids=1x16:int64"]).items()}
    {'input_ids': ((1, 16), torch.int64)}

    Raises `PeFxError` for anything else.
    """
    parsed = [_input(text, device) for text in inputs]
    if not parsed:
        return None
    if all(name for name, _ in parsed):
        named = dict(parsed)
        if len(named) < len(parsed):
            raise PeFxError(f"inputs {', '.join(inputs)}: two have one name")
        return named
    if any(name for name, _ in parsed):
        raise PeFxError(f"inputs {', '.join(inputs)}: give all of them by name or none")
    return tuple(value for _, value in parsed)


def _input(text: str, device: torch.device | str) -> tuple[str, torch.Tensor]:
    match = re.fullmatch(r"(?:(\w+)=)?(\d+(?:x\d+)*)(?::(\w+))?", text)
    dtype = getattr(torch, match[3] or "float32", None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise PeFxError(f"{text!r} is no input: write 1x3x224x224, 1x16:int64 or input_ids=1x16:int64")
    try:
        return match[1] or "", torch.zeros([int(size) for size in match[2].split("x")], dtype=dtype, device=device)
    except (RuntimeError, NotImplementedError) as error:
        raise PeFxError(f"{text!r} is no input that can be made: {_first_line(error)}") from error


def split_commas(text: str) -> list[str]:
    """
    >>> split_commas("resnet50,layers=(1, 1, 1, 1),stem_width=32")
    ['resnet50', 'layers=(1, 1, 1, 1)', 'stem_width=32']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise PeFxError(f"{text!r} is no option of a model: write key=value")
    with contextlib.suppress(ValueError, SyntaxError):
        return key, ast.literal_eval(value)
    return key, {"true": True, "false": False, "none": None}.get(value.lower(), value)


def _built(spec: str, build: Build, options: dict[str, Any], outline: Build | None = None) -> nn.Module:
    """By `outline` on the meta device, where that works."""
    if outline is not None:
        with contextlib.suppress(Exception), torch.device("meta"):  # some constructors compute with values
            return _checked(spec, outline(**options))
    try:
        made = build(**options)
    except Exception as error:  # whatever a model's constructor raises
        raise PeFxError(f"{spec} could not be built: {error if isinstance(error, PeFxError) else first_line(error)}") from error
    return _checked(spec, made)


def _checked(spec: str, made: Any) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise PeFxError(f"{spec} is a {type(made).__name__}, not a torch.nn.Module or a callable that returns one")
    return made


@contextlib.contextmanager
def _weights_alone() -> Iterator[None]:
    """No file that an option names, such as timm's checkpoint_path, is unpickled by `torch.load`."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@dataclass(frozen=True)
class _Library:
    """How a library's model is built, and how on the meta device, where that is another way."""

    build: Build
    outline: Build | None = None


def _timm(name: str, trust: bool) -> _Library:
    timm = _imported("timm", "pip install 'pe_fx[timm]'")
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    return _Library(lambda **options: timm.create_model(name, pretrained=False, **options))


def _torchvision(name: str, trust: bool) -> _Library:
    models = _imported("torchvision", "pip install torchvision").models
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    without = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    return _Library(lambda **options: builder(**without | options))


def _transformers(name: str, trust: bool) -> _Library:
    transformers = _imported("transformers", "pip install transformers")
    known = list(transformers.CONFIG_MAPPING)
    if name not in known:
        raise _unknown("transformers", name, known)
    return _Library(lambda **options: transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **options)))


def _diffusers(name: str, trust: bool) -> _Library:
    diffusers = _imported("diffusers", "pip install diffusers")
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise _unknown("diffusers", name, dir(diffusers.models))
    return _Library(found)


def _folder(name: str, trust: bool) -> _Library:
    """The class that the configuration names, else the library's choice for its type."""
    if not (Path(name) / "config.json").is_file():
        raise PeFxError(f"{name} is no folder with a config.json")
    transformers = _imported("transformers", "pip install transformers")
    importlib.import_module("pe_fx.transformers")  # which reads folders that are tied
    told = {"local_files_only": True, "trust_remote_code": trust}

    def chosen(options: dict[str, Any]) -> tuple[Any, Any]:
        config = transformers.AutoConfig.from_pretrained(name, **told, **options)
        named = [getattr(transformers, each, None) for each in config.architectures or ()]
        return next(filter(None, named), transformers.AutoModel), config

    def build(**options: Any) -> Any:
        cls, config = chosen(options)
        model, found = cls.from_pretrained(name, config=config, output_loading_info=True, **told)
        lacking = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
        if lacking:
            raise PeFxError(f"the weights there do not fit a {type(model).__name__}: they lack {', '.join(lacking[:3])}")
        return model

    def outline(**options: Any) -> Any:
        cls, config = chosen(options)
        return cls.from_config(config, trust_remote_code=trust) if cls is transformers.AutoModel else cls(config)

    return _Library(build, outline)


_LIBRARIES: dict[str, Callable[[str, bool], _Library]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "diffusers": _diffusers,
    HUB.removesuffix(":"): _folder,
}


def _imported(module: str, hint: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeFxError(f"{module} cannot be imported ({_first_line(error)}): {hint}") from error


def _unknown(what: str, name: str, known: Iterable[str]) -> PeFxError:
    nearest = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return PeFxError(f"{what} knows no {name!r}" + (f"; did you mean {', '.join(nearest)}?" if nearest else ""))


def _callable(module: Any, source: str, name: str) -> Callable[..., Any]:
    found = module
    for atom in name.split("."):
        if not hasattr(found, atom):
            raise _unknown(source, name, (other for other in vars(module) if not other.startswith("_")))
        found = getattr(found, atom)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise PeFxError(f"{source}:{name} is a {type(found).__name__}, not a torch.nn.Module or a callable that returns one")
    return found  # type: ignore[no-any-return]


def _at_home(path: Path) -> tuple[Home, str]:
    """Where a file's imports are looked up, and what the file is called there: `package.module` where it is part of a package."""
    if not path.is_file():
        raise PeFxError(f"there is no file {path}")
    root = folder = path.resolve().parent
    packages: list[str] = []
    while (root / "__init__.py").is_file():
        root, packages = root.parent, [root.name, *packages]
    names = [*packages, *([path.stem.replace(".", "_")] if path.name != "__init__.py" else [])]
    if names[0] in KEPT & sys.modules.keys():
        return Home(folder), f"{names[-1]}_"  # a file called random.py is not what others import by that name
    return Home(root, after=folder if packages else None), ".".join(names)


def _from_file(name: str, path: Path) -> Any:
    with _user_code(str(path)):
        if package := name.rpartition(".")[0]:
            importlib.import_module(package)
        loaded = sys.modules.get(name)
        if loaded is not None and os.path.realpath(getattr(loaded, "__file__", None) or "") == os.path.realpath(path):
            return loaded  # its package has imported it
        spec = importlib.util.spec_from_file_location(name, path.resolve())
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses and pickle look a class's module up
        spec.loader.exec_module(module)
    return module


def _from_package(name: str) -> Any:
    with _user_code(name):
        exists = _exists(name)
    if not exists:
        raise _unknown("Python", name, _LIBRARIES)
    with _user_code(name):
        return importlib.import_module(name)


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return False
        raise  # a package around it is there, but lacks something itself


@contextlib.contextmanager
def _user_code(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a user's module raises
        raise PeFxError(f"{what} could not be imported: {first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
