"""One operation on values, and the weight that it applies."""

from __future__ import annotations

import functools
import math
import string
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pe_fx.graph.ops import Kind, base_name, value_of
from pe_fx.ties import Block, Dims, Shape, Spread


@dataclass(frozen=True)
class Weight:
    """The parameter behind a weight operand.

    Its output channels lie along the dimensions `out_dims` of the parameter, its input channels along `in_dims`; of several, the first
    changes slowest. A dimension among both holds one matrix for each group of channels, as of experts. `rows[i]` is the position, along
    all of `out_dims` as one, that holds output channel i (a range where these are consecutive); `inputs` is the number of input
    channels. `kernel` is the spatial extent of a convolution, () for a linear. The operand is a view of the parameter or calculated
    from it as in weight standardisation; if by anything else, `opaque` names the operation.
    """

    block: Block
    out_dims: Dims
    in_dims: Dims
    rows: Sequence[int]
    inputs: int
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
    def matrix(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @functools.cached_property
    def parts(self) -> int:
        """The number of groups of channels that have a matrix each."""
        return math.prod(self.block.shape[dim] for dim in self.out_dims if dim in self.in_dims)

    @functools.cached_property
    def is_straight(self) -> bool:
        """Whether output channel i is the parameter's row i."""
        return self.rows == range(self.outputs)

    @property
    def is_convolution(self) -> bool:
        return bool(self.kernel)

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies each position by matrices alone: a linear or an ungrouped 1x1 convolution."""
        return math.prod(self.kernel) == 1 and self.groups == 1

    @functools.cached_property
    def is_whole_matrix(self) -> bool:
        return self.is_matrix and self.block.is_whole

    def mirrors(self, other: Weight, channels: int | None = None) -> bool:
        """Whether its shape is that of the other's transpose, or of these many of the other's output channels."""
        channels = other.outputs if channels is None else channels
        beyond = self.outputs // self.parts == other.inputs // other.parts and (self.parts == other.parts or 1 in (self.parts, other.parts))
        alike = self.block.numel * other.outputs == other.block.numel * channels
        return self.inputs == channels and beyond and (alike or not (self.is_matrix and other.is_matrix))

    def spread(self, rows: Dims) -> Spread:
        """How its matrix lies in the parameter, with the channels along `rows` as rows; each group's channels are in a row of their own."""
        beside = tuple(dim for dim in range(len(self.block.shape)) if dim not in (*self.out_dims, *self.in_dims))
        return (*beside, *rows), tuple(dim for dim in (*self.out_dims, *self.in_dims) if dim not in rows)

    def of_channels(self, channels: Iterable[int]) -> Block:
        """The part of the parameter that makes these output channels; all of it where they are no rectangular part."""
        part = self._part(channels)
        return self.block if part is None else part

    def is_part(self, channels: Iterable[int]) -> bool:
        """Whether these output channels are a rectangular part of the parameter."""
        return self._part(channels) is not None

    def _part(self, channels: Iterable[int]) -> Block | None:
        return narrowed(self.block, self.out_dims, channels if self.is_straight else [self.rows[channel] for channel in channels])


def narrowed(block: Block, dims: Dims, positions: Iterable[int]) -> Block | None:
    """The part of the block that holds these positions along several of its parameter's dimensions as one; None where it holds others, too.

    >>> str(narrowed(Block.whole("w", (3, 4, 8)), (0, 1), range(4, 8))), narrowed(Block.whole("w", (3, 4, 8)), (0, 1), range(6))
    ('w[1:2]', None)
    """
    if len(dims) == 1:
        return block.narrowed(dims[0], positions)
    sizes = [block.full_shape[dim] for dim in dims]
    held = positions if isinstance(positions, range) else frozenset(positions)
    if held == range(math.prod(sizes)) or not dims:
        return block
    beyond = 1
    for dim, size in reversed(list(zip(dims, sizes, strict=True))):
        block = block.narrowed(dim, {position // beyond % size for position in held})
        beyond *= size
    return block if math.prod(block.shape[dim] for dim in dims) == len(held) else None


@dataclass(eq=False)
class Op:
    """An operation on values. `operands` are its tensor arguments in order, None where one is no value of the flow; `inputs` the others."""

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
    inputs: tuple[Op, ...] = ()

    @property
    def is_projection(self) -> bool:
        return self.kind is Kind.PROJECTION

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and bool(self.inputs) and self.groups == self.shape[self.out_axis] == self.inputs[0].shape[self.in_axis]

    @property
    def stride(self) -> tuple[int, ...]:
        """A convolution's stride along each spatial axis."""
        stride = self.node.kwargs.get("stride", self.node.args[3] if len(self.node.args) > 3 else 1)
        steps = (stride,) if isinstance(stride, int) else tuple(stride)  # type: ignore[arg-type]
        spatial = len(self.shape) - 2
        return steps * spatial if len(steps) == 1 else steps  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"<{self.index} {self.node.name} {self.kind.name} {self.shape}>"


_PRODUCTS = ("matmul", "mm", "bmm", "baddbmm", "tensordot")


class Product(NamedTuple):
    """A product as an einsum: what is multiplied, the labels of each factor's axes, and those of the result."""

    factors: tuple[fx.Node, ...]
    terms: tuple[str, ...]
    result: str


def product_labels(op: Op) -> tuple[str, str, str] | None:
    """A matrix product as einsum labels of its two factors and its result."""
    if op.kind is Kind.ATTEND:
        return _matmul_labels(len(op.shape), len(op.shape), len(op.shape if op.operands[2] is None else op.operands[2].shape))
    product = product_of(op.node)
    return None if product is None or len(product.terms) != 2 else (*product.terms, product.result)


def product_of(node: fx.Node) -> Product | None:
    """What a node multiplies; None where it is no product, or none that einsum could spell."""
    name = base_name(node)
    if name == "einsum":
        return _einsum(node)
    factors = node.args[1:3] if name == "baddbmm" else node.args[:2]
    if name not in _PRODUCTS or len(factors) != 2 or not all(isinstance(factor, fx.Node) for factor in factors):
        return None
    if name == "tensordot":
        *terms, result = _tensordot_labels(node)
    else:
        ranks = [len(shape_of(value_of(factor))) for factor in factors]  # type: ignore[arg-type]
        if min(ranks) < 2:
            return None
        *terms, result = _matmul_labels(len(shape_of(value_of(node))), *ranks)
    return Product(factors, tuple(terms), result)  # type: ignore[arg-type]


def _matmul_labels(rank: int, first: int, second: int) -> tuple[str, str, str]:
    batch = "".join(chr(ord("A") + axis) for axis in range(rank - 2))
    return batch[rank - first :] + "mk", batch[rank - second :] + "kn", batch + "mn"


def _einsum(node: fx.Node) -> Product | None:
    equation, *rest = node.args
    nodes = rest[0] if rest and isinstance(rest[0], (list, tuple)) else rest
    if not isinstance(equation, str) or not nodes or not all(isinstance(factor, fx.Node) for factor in nodes):
        return None  # labels as lists of numbers
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        once = sorted(label for label in set(left) - set(",.") if left.count(label) == 1)
        result = "..." * ("..." in left) + "".join(once)
    if len(terms) != len(nodes):
        return None
    spelled = [_spelled_out(term, len(shape_of(value_of(factor)))) for term, factor in zip(terms, nodes, strict=True)]  # type: ignore[arg-type]
    return Product(tuple(nodes), tuple(spelled), _spelled_out(result, len(shape_of(value_of(node)))))  # type: ignore[arg-type]


def _tensordot_labels(node: fx.Node) -> tuple[str, str, str]:
    left, right = (len(shape_of(value_of(argument))) for argument in node.args[:2])  # type: ignore[arg-type]
    dims: Any = node.args[2:4] or (node.kwargs.get("dims", 2),)
    pairs = (range(-dims[0], 0), range(dims[0])) if isinstance(dims[0], int) else dims if len(dims) == 2 else dims[0]
    first, second = string.ascii_lowercase[:left], list(string.ascii_uppercase[:right])
    for a, b in zip(*pairs, strict=True):
        second[b] = first[a]
    summed = {first[a] for a in pairs[0]}
    return first, "".join(second), "".join(label for label in (*first, *second) if label not in summed)


def _spelled_out(term: str, rank: int) -> str:
    """An einsum term with letters for its ellipsis, none that einsum takes, the same counted from the right.

    >>> _spelled_out("...ij", 4)
    'ψωij'
    """
    hidden = rank - len(term.replace("...", ""))
    return term.replace("...", "".join(chr(ord("ω") - hidden + 1 + i) for i in range(hidden)))


def factors(op: Op) -> tuple[Op | None, ...]:
    """The two factors of a matrix product; of fused attention, the last product's: the attention map (none) and the values."""
    if op.kind is Kind.ATTEND:
        return None, op.operands[2]
    return op.operands[1:3] if op.name == "baddbmm" else op.operands[:2]


def shape_of(value: Any) -> Shape:
    if isinstance(value, (list, tuple)):
        return (len(value),)
    return tuple([size if type(size) is int else number(size) for size in value.shape]) if isinstance(value, Tensor) else ()


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
