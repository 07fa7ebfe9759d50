"""Exported programs of strangers: a .pt2 archive is read as data, and only what can do no more than describe a graph goes to torch.

`torch.export.load` runs code that a file brings, and in more ways than one: it unpickles; it evaluates the expressions for sizes, the
guards and the trees of inputs; it looks operators up by any name; and it writes the names of the file into Python code. So it is never
given the file itself, but a copy with nothing in it that was not checked here: numbers, and texts of which each is of its field's form.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pe_fx.errors import PeFxError, first_line
from pe_fx.graph.capture import quiet
from pe_fx.graph.inputs import ExampleInputs
from pe_fx.graph.plain import REGIONS


def load_program(path: Path, *, trust: bool = False) -> tuple[nn.Module, ExampleInputs | None]:
    """The module of an exported program, and the example inputs that it keeps.

    Raises `PeFxError` for what is no such file, and, unless `trust`, for one that holds more than plain operations on plain tensors.
    """
    if not path.is_file():
        raise PeFxError(f"there is no file {path}")
    try:
        with quiet():
            program = torch.export.load(path if trust else _checked_copy(path))
            args, kwargs = program.example_inputs or ((), {})
            return program.module(), dict(kwargs) if kwargs and not args else tuple(args) or None
    except PeFxError as error:
        raise PeFxError(f"{path} may run code when it is loaded: {error}. If you trust whoever made it, --trust loads it") from error
    except Exception as error:  # a damaged archive raises anything
        raise PeFxError(f"{path} is no exported program that this torch can read: {first_line(error)}") from error


GRAPH, INPUTS = "models/model.json", "data/sample_inputs/model.pt"
TENSORS = {
    "data/weights/": ("model_weights_config.json", re.compile(r"weight_\d+")),
    "data/constants/": ("model_constants_config.json", re.compile(r"tensor_\d+")),
}
"""Folders of tensors: the file that says what each is, and the names of those that are bytes and nothing else."""


def _checked_copy(path: Path) -> io.BytesIO:
    """An archive with the graph, the tensors and the example inputs; whatever else there was is left out."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as to:
        root = archive.namelist()[0].partition("/")[0]
        records = {name.removeprefix(f"{root}/") for name in archive.namelist()}
        if not {GRAPH, INPUTS, *(folder + config for folder, (config, _) in TENSORS.items())} <= records:
            raise PeFxError("it is not laid out as torch.export.save does today, and other layouts are pickled")

        def read(name: str) -> bytes:
            return archive.read(f"{root}/{name}")

        def write(name: str, content: bytes) -> None:
            to.writestr(f"model/{name}", content)

        for name in ("archive_format", "archive_version", "byteorder", ".data/version"):
            if name in records:
                write(name, _matching(re.compile(r"\w+\s*"), read(name).decode(), name).encode())
        write(GRAPH, json.dumps(_checked(json.loads(read(GRAPH)), "graph")).encode())
        for folder, (config, plain) in TENSORS.items():
            described = _checked(json.loads(read(folder + config)), config)
            write(folder + config, json.dumps(described).encode())
            for tensor, payload in described["config"].items():
                if payload["use_pickle"] is not False or not plain.fullmatch(payload["path_name"]):
                    raise PeFxError(f"the values of {tensor} are pickled")
            for name in sorted({payload["path_name"] for payload in described["config"].values()}):
                write(folder + name, read(folder + name))
        write(INPUTS, _repickled(read(INPUTS)))
    copy.seek(0)
    return copy


def _repickled(content: bytes) -> bytes:
    """A pickle of the same tensors and plain values."""
    if not content:
        return content
    try:
        value = torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        raise PeFxError("its example inputs are more than tensors and plain values") from error
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# ---- the graph

Form = re.Pattern[str] | Callable[[str, str], str]


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.ASCII)


_IDENTIFIER = _form(r"(?!__)\w*")
"""What any text is that `_FORMS` does not name: it becomes a variable in generated code."""

_PATH = _form(r"(?!__)[\w-]*(\.(?!__)[\w-]+)*")
_NUMBER = _form(r"-?\w*")

_FUNCTIONS = (
    *("Integer", "Float", "Rational", "Add", "Mul", "Pow", "Abs", "Max", "Min", "Mod", "floor", "ceiling", "And", "Or", "Not"),
    *("Equality", "Unequality", "LessThan", "GreaterThan", "StrictLessThan", "StrictGreaterThan"),
    *("FloorDiv", "CeilDiv", "CleanDiv", "ModularIndexing", "PythonMod", "IntTrueDiv", "FloatTrueDiv", "PowByNatural", "FloatPow"),
    *("CeilToInt", "FloorToInt", "TruncToInt", "TruncToFloat", "RoundToInt", "ToFloat", "Identity", "LShift", "RShift", "Where"),
)
_EXPRESSION = _form(
    rf"((?:{'|'.join(_FUNCTIONS)})\(|Symbol\('[a-z]+\d+'|Float\('[\d.e+-]+'|, [a-z]+=(?:True|False|\d+)|-?\d+(?:\.\d+)?|true|false|, |\))*"
)
"""Sizes as SymPy writes them for being evaluated: calls of these functions, symbols and numbers, no matter in which order."""

_STACK = _form(r"[\w.@<>-]*,[\w.@<>-]*,[\w.@<>-]*(;[\w.@<>-]*,[\w.@<>-]*,[\w.@<>-]*)*")

_SCALARS = _form(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|add|sub|mul|truediv|floordiv|mod|pow|and_|or_|lshift|rshift)"
    r"|math\.(trunc|ceil|floor)|torch\.sym_(not|int|float|ite|max|min|sqrt|sum)"
)
"""Arithmetic on sizes."""


def _operator(text: str, field: str) -> str:
    """An operation on tensors or sizes, or a region: what computes a value and does nothing beside."""
    if _SCALARS.fullmatch(text) or text in (f"torch.ops.higher_order.{region}" for region in REGIONS):
        return text
    if match := re.fullmatch(r"torch\.ops\.(aten|prims)\.(\w+)\.(\w+)", text, re.ASCII):
        operation: Any = getattr(getattr(getattr(torch.ops, match[1]), match[2], None), match[3], None)
        is_known = isinstance(operation, torch._ops.OpOverload)
        if is_known and torch._C._dispatch_has_kernel(operation.name()):  # none of TorchScript alone
            kinds = [str(argument.type) for argument in operation._schema.arguments if not argument.is_out]
            if any("Tensor" in kind for kind in kinds) or not any("str" in kind for kind in kinds):  # the text may name a file
                return text
    raise PeFxError(f"it calls {text!r}, which is no plain operation on tensors")


_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def _tree(text: str, field: str) -> str:
    """A tree of inputs or outputs, made of tuples, lists and dicts: other types are looked up by name, and imported."""

    def checked(spec: Any) -> dict[str, Any]:
        if spec["type"] not in _CONTAINERS:
            raise PeFxError(f"it takes or returns a {spec['type']}, where plain ones have tuples, lists and dicts")
        keys = json.loads(spec["context"]) if spec["context"] else None
        if not isinstance(keys, list | None):
            raise PeFxError(f"a {spec['type']} in its inputs or outputs has {str(keys)[:80]!r} for keys")
        for key in keys or ():
            if not isinstance(key, int):
                _matching(_PATH, key, "key")
        context = None if spec["context"] is None else json.dumps(keys)
        return {"type": spec["type"], "context": context, "children_spec": [checked(child) for child in spec["children_spec"]]}

    if not text:
        return text
    protocol, spec = json.loads(text)
    return json.dumps([int(protocol), checked(spec)])


_FORMS: dict[str, Form] = {
    "expr_str": _EXPRESSION,
    "as_float": _NUMBER,
    **dict.fromkeys(("as_string", "as_strings", "torch_version"), _form(r"[\w ,.:>+-]*")),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "fqn"), _PATH),
    "nn_module_stack": _STACK,
    **dict.fromkeys(("target", "as_operator"), _operator),
    **dict.fromkeys(("in_spec", "out_spec"), _tree),
}

_LEFT_OUT: dict[str, Any] = {"guards_code": [], "treespec_namedtuple_fields": {}}
"""Code, and names that nothing here needs."""


def _checked(value: Any, field: str) -> Any:
    """The same JSON, every text of its field's form."""
    if isinstance(value, dict):
        if field == "metadata":  # lines of source, names of functions: only where a node comes from is needed
            value = {key: text for key, text in value.items() if key == "nn_module_stack"}
        return {_matching(_PATH, key, field): _LEFT_OUT[key] if key in _LEFT_OUT else _checked(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_checked(item, field) for item in value]
    if isinstance(value, str):
        form = _FORMS.get(field, _IDENTIFIER)
        return _matching(form, value, field) if isinstance(form, re.Pattern) else form(value, field)
    return value


def _matching(form: re.Pattern[str], text: Any, field: str) -> str:
    if not isinstance(text, str) or not form.fullmatch(text):
        raise PeFxError(f"its {field} holds {str(text)[:80]!r}")
    return text
