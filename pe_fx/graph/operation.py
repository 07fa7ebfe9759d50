"""One operation on values, and the weight that it applies."""

from __future__ import annotations

import functools
import math
import string
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pe_fx.graph.ops import Kind, value_of
from pe_fx.ties import Block, Shape, length


@dataclass(frozen=True)
class Weight:
    """The parameter behind a weight operand.

    `rows[i]` is the position along the parameter's dimension `out_dim` that holds output channel i (a range where these are
    consecutive); `in_dim` is the dimension of the input channels. `kernel` is the spatial extent of a convolution, () for a
    linear. The operand is a view of the parameter or calculated from it as in weight standardisation; if by anything else,
    `opaque` names the operation.
    """

    block: Block
    out_dim: int
    in_dim: int
    rows: Sequence[int]
    kernel: Shape = ()
    groups: int = 1
    opaque: str = ""

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def outputs(self) -> int:
        return len(self.rows)

    @property
    def inputs(self) -> int:
        return length(self.block.ranges[self.in_dim])

    @property
    def matrix(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @functools.cached_property
    def is_straight(self) -> bool:
        """Whether output channel i is the parameter's row i."""
        return self.rows == range(self.outputs)

    @property
    def is_convolution(self) -> bool:
        return bool(self.kernel)

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies each position by one matrix: a linear or an ungrouped 1x1 convolution."""
        return math.prod(self.kernel) == 1 and self.groups == 1

    @functools.cached_property
    def is_whole_matrix(self) -> bool:
        return self.is_matrix and self.block.is_whole

    def of_channels(self, channels: Iterable[int]) -> Block:
        """The part of the parameter that makes these output channels."""
        return self.block.narrowed(self.out_dim, channels if self.is_straight else (self.rows[channel] for channel in channels))


@dataclass(eq=False)
class Op:
    """An operation on values. `operands` are its tensor arguments in order, None where one is no value of the flow."""

    index: int
    node: fx.Node
    name: str
    kind: Kind
    shape: Shape
    operands: tuple[Op | None, ...]
    parameters: tuple[str, ...] = ()
    weight: Weight | None = None
    in_axis: int = -1
    out_axis: int = -1
    groups: int = 1

    @functools.cached_property
    def inputs(self) -> tuple[Op, ...]:
        return tuple(op for op in self.operands if op is not None)

    @property
    def is_projection(self) -> bool:
        return self.kind is Kind.PROJECTION

    @property
    def is_depthwise(self) -> bool:
        return bool(self.inputs) and self.groups > 1 and self.groups == self.shape[self.out_axis] == self.inputs[0].shape[self.in_axis]

    @property
    def stride(self) -> tuple[int, ...]:
        """A convolution's stride along each spatial axis."""
        stride = self.node.kwargs.get("stride", self.node.args[3] if len(self.node.args) > 3 else 1)
        steps = (stride,) if isinstance(stride, int) else tuple(stride)  # type: ignore[arg-type]
        spatial = len(self.shape) - 2
        return steps * spatial if len(steps) == 1 else steps  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"<{self.index} {self.node.name} {self.kind.name} {self.shape}>"


def product_labels(op: Op) -> tuple[str, str, str] | None:
    """A matrix product as einsum labels of its two factors and its result."""
    if op.name == "einsum":
        equation = op.node.args[0]
        if not isinstance(equation, str) or "->" not in equation:
            return None
        left, result = equation.replace(" ", "").split("->")
        terms = left.split(",")
        if len(terms) != 2:
            return None
        spelled = [
            _spelled_out(term, None if factor is None else len(factor.shape)) for term, factor in zip(terms, factors(op), strict=True)
        ]
        return spelled[0], spelled[1], _spelled_out(result, len(op.shape))
    if op.name == "tensordot":
        return _tensordot_labels(op)
    rank = len(op.shape)
    ranks = [rank if factor is None else len(factor.shape) for factor in factors(op)]
    if op.name in ("mv", "addbmm") or len(ranks) < 2 or min(ranks) < 2:
        return None
    batch = "".join(chr(ord("A") + axis) for axis in range(rank - 2))
    return batch[rank - ranks[0] :] + "mk", batch[rank - ranks[1] :] + "kn", batch + "mn"


def _tensordot_labels(op: Op) -> tuple[str, str, str]:
    left, right = (len(shape_of(value_of(argument))) for argument in op.node.args[:2])  # type: ignore[arg-type]
    dims: Any = op.node.args[2:4] or (op.node.kwargs.get("dims", 2),)
    pairs = (range(-dims[0], 0), range(dims[0])) if isinstance(dims[0], int) else dims if len(dims) == 2 else dims[0]
    first, second = string.ascii_lowercase[:left], list(string.ascii_uppercase[:right])
    for a, b in zip(*pairs, strict=True):
        second[b] = first[a]
    summed = {first[a] for a in pairs[0]}
    return first, "".join(second), "".join(label for label in (*first, *second) if label not in summed)


def _spelled_out(term: str, rank: int | None) -> str:
    """An einsum term with letters for its ellipsis, the same counted from the right.

    >>> _spelled_out("...ij", 4)
    'YZij'
    """
    hidden = 0 if rank is None else rank - len(term.replace("...", ""))
    return term.replace("...", "".join(chr(ord("Z") - hidden + 1 + i) for i in range(hidden)))


def factors(op: Op) -> tuple[Op | None, ...]:
    """The two factors of a matrix product; of fused attention, the last product's: the attention map (none) and the values."""
    if op.kind is Kind.ATTEND:
        return None, op.operands[2]
    return op.operands[1:3] if op.name == "baddbmm" else op.operands[:2]


def shape_of(value: Any) -> Shape:
    if isinstance(value, (list, tuple)):
        return (len(value),)
    return tuple(map(number, value.shape)) if isinstance(value, Tensor) else ()


def number(size: int | torch.SymInt) -> int:
    """A size as a number. What only the model's run can tell counts as a prime, such that no reshape fits it by chance."""
    if isinstance(size, int):
        return size
    if isinstance(size.node.hint, int):
        return size.node.hint
    return max(1, int(size.node.expr.xreplace(dict.fromkeys(size.node.expr.free_symbols, 7))))


def is_tensor(value: Any) -> bool:
    return any(map(is_tensor, value)) if isinstance(value, (list, tuple)) else isinstance(value, Tensor)


def is_floating(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(is_floating, value))
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def place_of(error: BaseException) -> str:
    """The node of a graph at which an exception came, as far as the variables of the innermost frames tell."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in reversed(list(frame.f_locals.values())):
            node = value.node if isinstance(value, Op) else value
            if isinstance(node, fx.Node):
                return node.name
    return "no node"
