"""What a hidden unit computes, written so that PyTorch, Triton and C++ all read it.

A unit is the elementwise part of a feed-forward layer: a few calls of known functions on the values `a`, `b` … that the matrices
before it gave, one assignment each, `t0=mul(a,0.5);t1=erf(a);t2=mul(t0,t1)`. The last is its result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pe_fx.compiled.lowering.nodes import CAST, aten


class Function(NamedTuple):
    """An elementwise function: the call in PyTorch, in Triton and in C++, there of vectors `Vec` as PyTorch's own functions are."""

    torch: Callable[..., Any]
    triton: str
    cpp: str


def _same(call: Callable[..., Any], text: str) -> Function:
    return Function(call, text, text)


FUNCTIONS: Mapping[str, Function] = {
    "add": _same(torch.add, "{} + {}"),
    "sub": _same(torch.sub, "{} - {}"),
    "mul": _same(torch.mul, "{} * {}"),
    "div": _same(torch.div, "{} / {}"),
    "neg": Function(torch.neg, "-{}", "{}.neg()"),
    "gt": _same(torch.gt, "{} > {}"),
    "lt": _same(torch.lt, "{} < {}"),
    "ge": _same(torch.ge, "{} >= {}"),
    "le": _same(torch.le, "{} <= {}"),
    "where": Function(torch.where, "tl.where({}, {}, {})", "Vec::blendv({2}, {1}, {0})"),
    # of a NaN, all three make a NaN
    "maximum": Function(torch.maximum, "tl.maximum({}, {}, tl.PropagateNan.ALL)", "at::vec::maximum({}, {})"),
    "minimum": Function(torch.minimum, "tl.minimum({}, {}, tl.PropagateNan.ALL)", "at::vec::minimum({}, {})"),
    "abs": Function(torch.abs, "tl.abs({})", "{}.abs()"),
    "exp": Function(torch.exp, "tl.exp({})", "{}.exp()"),
    "expm1": Function(torch.expm1, "pe_expm1({})", "{}.expm1()"),
    "log1p": Function(torch.log1p, "pe_log1p({})", "{}.log1p()"),
    "sqrt": Function(torch.sqrt, "tl.sqrt({})", "{}.sqrt()"),
    "erf": Function(torch.erf, "tl.erf({})", "{}.erf()"),
    "sigmoid": Function(torch.sigmoid, "tl.sigmoid({})", "Vec(1) / (Vec(1) + {}.neg().exp())"),
    "tanh": Function(torch.tanh, "2 * tl.sigmoid(2 * {}) - 1", "{}.tanh()"),
}

COMPARISONS = ("gt", "lt", "ge", "le")
ONLY_TENSORS = ("where", "maximum", "minimum")
"""Functions that PyTorch has of tensors only."""

ATEN: Mapping[Any, str] = {
    **{getattr(aten, name).Tensor: name for name in ("add", "sub", "mul", "div")},
    **{getattr(getattr(aten, name), of): name for name in COMPARISONS for of in ("Tensor", "Scalar")},
    **{getattr(aten, name).default: name for name in ("neg", "abs", "exp", "expm1", "log1p", "sqrt", "erf", "sigmoid", "tanh")},
    aten.where.self: "where",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.clamp_min.default: "maximum",
    aten.clamp_max.default: "minimum",
}
"""Operations that call one function with their own arguments."""

VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default}
FLOATS = {torch.float32, torch.float16, torch.bfloat16}
"""A unit is computed in float32, whichever of these it is written in; casts between them fall away, as they do in Inductor."""

LINE = re.compile(r"t(\d+)=(\w+)\(([\w.,+-]+)\)")


class NoUnit(Exception):  # noqa: N818
    """What lies between two matrix products is more than elementwise functions of the first's results."""


def unit_between(products: Mapping[fx.Node, str], result: fx.Node, width: int) -> tuple[str, set[fx.Node]]:
    """The unit that makes `result` of the values of `products`, named as given, and the nodes that it stands for.

    All are of the same rows and of `width` columns, whatever they are reshaped to in between. Raises `NoUnit` where anything else
    is read, or anything in between is read from elsewhere.
    """
    names: dict[fx.Node, str] = {}
    inside: set[fx.Node] = set()
    lines: list[str] = []
    numel = next(iter(products)).meta["val"].numel()

    def value(arg: Any) -> str:
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            return _literal(arg)
        if not isinstance(arg, fx.Node):
            raise NoUnit(f"{arg} is no number")
        if arg in products:
            return products[arg]
        if arg not in names:
            names[arg] = made(arg)
            inside.add(arg)
        return names[arg]

    def number(arg: Any) -> str:
        """The value; of a comparison 1 or 0."""
        truth = isinstance(arg, fx.Node) and arg.meta["val"].dtype is torch.bool
        return call("where", value(arg), "1.0", "0.0") if truth else value(arg)

    def call(name: str, *args: str) -> str:
        lines.append(f"t{len(lines)}={name}({','.join(args)})")
        return f"t{len(lines) - 1}"

    def made(node: fx.Node) -> str:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            raise NoUnit(f"{node} is no value of theirs")
        if (node.target is aten.full.default and list(node.args[0]) == []) or node.target is aten.scalar_tensor.default:  # type: ignore[arg-type]
            return value(node.args[-1])
        shape = node.meta["val"].shape
        if not shape or shape[-1] != width or node.meta["val"].numel() != numel:
            raise NoUnit(f"{node} is of another shape, {tuple(shape)}")
        if node.target in VIEWS or (node.target is CAST and node.args[1] in FLOATS):
            return number(node.args[0])
        if node.target is aten.relu.default:
            return call("maximum", value(node.args[0]), "0.0")
        if node.target is aten.reciprocal.default:
            return call("div", "1.0", value(node.args[0]))
        if node.target is aten.pow.Tensor_Scalar and node.args[1] in (2, 3):
            base = value(node.args[0])
            square = call("mul", base, base)
            return square if node.args[1] == 2 else call("mul", square, base)
        if node.target not in ATEN or node.kwargs:
            raise NoUnit(f"{node.target} is not among the functions")
        name = ATEN[node.target]
        if name not in COMPARISONS and not node.meta["val"].is_floating_point():
            raise NoUnit(f"{node} is no floating-point number")
        given = list(map(number, node.args[name == "where" :]))
        return call(name, *([value(node.args[0])] if name == "where" else []), *given)

    last = number(result)
    for node in (*products, *inside):
        escaping = [user for user in node.users if user not in inside]
        if escaping and node is not result:
            raise NoUnit(f"{node} is read by {escaping[0]}, too")
    if (lines and last != f"t{len(lines) - 1}") or not lines:
        call("mul", last, "1.0")
    return ";".join(lines), inside


def _literal(number: float) -> str:
    text = repr(float(number))
    if text.strip("-") in ("inf", "nan"):
        raise NoUnit(f"{number} has no literal")
    return text


def lines_of(unit: str) -> list[tuple[str, str, list[str]]]:
    """Name, function and arguments of each line.

    >>> lines_of("t0=mul(a,0.5);t1=erf(t0)")
    [('t0', 'mul', ['a', '0.5']), ('t1', 'erf', ['t0'])]

    Raises `ValueError` for anything else.
    """
    lines = []
    for line in unit.split(";"):
        found = LINE.fullmatch(line)
        if found is None or found[2] not in FUNCTIONS:
            raise ValueError(f"{line!r} is no line of a unit")
        lines.append((f"t{found[1]}", found[2], found[3].split(",")))
    return lines


def evaluate(unit: str, values: Sequence[Tensor]) -> Tensor:
    """The unit on tensors, in their own dtype.

    >>> evaluate("t0=mul(a,0.5);t1=add(t0,b)", [torch.tensor(4.0), torch.tensor(1.0)])
    tensor(3.)
    """
    names: dict[str, Any] = dict(zip("abcdefgh", values, strict=False))
    name = ""
    for name, function, args in lines_of(unit):
        given = [names[arg] if arg in names else float(arg) for arg in args]
        if not isinstance(given[0], Tensor) or function in ONLY_TENSORS:
            given = [each if isinstance(each, Tensor) else values[0].new_full((), each) for each in given]
        names[name] = FUNCTIONS[function].torch(*given)
    result: Tensor = names[name]
    return result


def source(unit: str, language: str, suffix: str = "") -> list[tuple[str, str]]:
    """Name and expression of each line in "triton" or "cpp"; `suffix` goes behind every name, so that units may stand side by side.

    >>> source("t0=mul(a,0.5);t1=erf(t0)", "triton", "_0")
    [('t0_0', 'a_0 * 0.5'), ('t1_0', 'tl.erf(t0_0)')]
    """

    def written(arg: str) -> str:
        if arg[0].isalpha():
            return arg + suffix
        return f"Vec({arg}f)" if language == "cpp" else f"({arg})" if arg.startswith("-") else arg

    return [(name + suffix, getattr(FUNCTIONS[function], language).format(*map(written, args))) for name, function, args in lines_of(unit)]
