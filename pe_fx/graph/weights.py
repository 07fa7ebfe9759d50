"""Which parameter an operation applies, and which view of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from pe_fx.graph.capture import Captured
from pe_fx.graph.operation import Op, Weight, factors, is_floating, is_tensor, narrowed, product_labels, shape_of
from pe_fx.graph.ops import KINDS, RESHAPES, Kind, base_name, value_of
from pe_fx.graph.products import linear_by_group
from pe_fx.graph.tags import channels_in, listed, numbered, remembered, varying_axes
from pe_fx.graph.views import moved
from pe_fx.graph.walks import reached
from pe_fx.ties import Block, Dims, Shape

_AXES: dict[str, tuple[Dims, Dims]] = {"linear": ((0,), (1,)), linear_by_group.__name__: ((0, 1), (0, 2))}
"""Of operations on a value and a weight, the weight's axes along which their output and their input channels lie."""

_STATIC_KINDS = {Kind.POINTWISE, Kind.PRODUCT, Kind.NORM, Kind.REDUCE, Kind.NONLINEAR, Kind.CONSTANT}
_IDENTITIES = (
    "contiguous",
    "clone",
    "alias",
    "detach",
    "to",
    "to_copy",
    "type",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "double",
    "lift_fresh",
)


class Static:
    """What is computed from parameters and constants alone."""

    def __init__(self, captured: Captured) -> None:
        self._names = captured.weights
        self._cache: dict[fx.Node, frozenset[fx.Node]] = {}

    def sources(self, node: fx.Node) -> frozenset[fx.Node]:
        """The parameter nodes that a value is computed from."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._cache:
                stack.pop()
                continue
            if current in self._names:
                self._cache[current] = frozenset((current,))
                continue
            is_constant = not current.op.startswith("call") or KINDS.get(base_name(current)) is Kind.CONSTANT
            if is_constant or not is_floating(value_of(current)):  # an index carries no weight
                self._cache[current] = frozenset()
                continue
            waiting = [operand for operand in current.all_input_nodes if operand not in self._cache]
            if waiting:
                stack += waiting
            else:
                self._cache[current] = frozenset().union(*(self._cache[operand] for operand in current.all_input_nodes))
        return self._cache[node]

    def parameters(self, node: fx.Node) -> list[str]:
        return sorted(self._names[source] for source in self.sources(node))

    def name(self, node: fx.Node) -> str:
        return self._names[node]


def attach_weight(op: Op, operands: list[fx.Node], static: Static) -> None:
    """Finds the weight operand of a linear, a convolution or a matrix product, and what it is a view of."""
    checked = op.operands[1:2] if "grouped_mm" in op.name else op.operands[1:]  # expert offsets come from the values
    if (op.kind is Kind.CONV or (op.kind is Kind.PROJECTION and op.name != "addmm")) and any(checked):
        op.kind = Kind.OTHER  # a weight or bias made from the input
        return
    if op.kind is Kind.CONV:
        _attach_kernel(op, operands, static)
        return
    if op.name in _AXES and op.kind is Kind.PROJECTION:
        position, (out_axes, in_axes) = 1, _AXES[op.name]
        op.operands = op.operands[:1]
    elif op.name != "addmm" and op.kind is Kind.PROJECTION:  # grouped_mm(x, W of every expert, offsets)
        position, out_axes, in_axes = 1, (2,), (1,)
        op.operands = op.operands[:1]
    elif op.kind is Kind.PROJECTION:  # addmm(bias, x, W)
        if op.operands[0] is not None or op.operands[1] is None or op.operands[2] is not None:
            op.kind = Kind.OTHER
            return
        position, out_axes, in_axes = 2, (1,), (0,)
        op.operands = (op.operands[1],)
    else:
        labels = product_labels(op)
        pair = factors(op)
        if labels is None or len(pair) < 2 or (pair[0] is None) == (pair[1] is None):
            return
        position = 0 if pair[0] is None else 1
        names, value_names, result = labels[position], labels[1 - position], labels[2]
        inner = [label for label in names if label in value_names and label not in result]
        outer = [label for label in names if label in result and label not in value_names]
        if len(inner) != 1 or len(outer) != 1 or len(names) != 2:
            return
        value, node = pair[1 - position], operands[position + (op.name == "baddbmm")]
        weight = _view_of_parameter(node, (names.index(outer[0]),), (names.index(inner[0]),), static)
        if weight is None or value is None:
            return
        op.kind, op.weight, op.operands = Kind.PROJECTION, weight, (value,)
        op.in_axis = value_names.index(inner[0]) - len(value_names)
        op.out_axis = result.index(outer[0]) - len(result)
        return
    op.weight = _view_of_parameter(operands[position], out_axes, in_axes, static)


def _attach_kernel(op: Op, operands: list[fx.Node], static: Static) -> None:
    op.operands = op.operands[:1]
    kernel = shape_of(value_of(operands[1]))
    spatial = len(kernel) - 2
    op.in_axis = op.out_axis = -1 - spatial
    transposed = op.name.startswith("conv_transpose") or (op.name == "convolution" and op.node.args[6:7] == (True,))
    place = 8 if op.name == "convolution" else 6
    groups = op.node.kwargs.get("groups", op.node.args[place] if len(op.node.args) > place else 1)
    if not isinstance(groups, int):
        return
    op.groups = groups
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    op.weight = _view_of_parameter(operands[1], (out_axis,), (in_axis,), static, kernel[2:], groups)
    if op.weight is not None and op.weight.is_matrix and not transposed:
        op.kind = Kind.PROJECTION


def _view_of_parameter(node: fx.Node, out_axes: Dims, in_axes: Dims, static: Static, kernel: Shape = (), groups: int = 1) -> Weight | None:
    """The weight whose output and input channels lie along these axes of `node`; None where no one parameter makes that."""
    shape = shape_of(value_of(node))
    sources = static.sources(node)
    main = [source for source in sources if source is node or math.prod(shape_of(value_of(source))) >= math.prod(shape)]
    if len(main) != 1:
        return None
    parameter = main[0]
    full = shape_of(value_of(parameter))
    outputs, inputs = (math.prod(shape[axis] for axis in axes) for axes in (out_axes, in_axes))
    whole = Weight(Block.whole(static.name(parameter), full), out_axes, in_axes, range(outputs), inputs, kernel, groups)
    if node is parameter:
        return whole
    positions = _positions(node, parameter, full) if len(sources) == 1 else None
    if positions is not None:
        found = _from_positions(positions, shape, whole)
        return found or replace(whole, out_dims=(), in_dims=(), opaque=f"{base_name(node)}, which rearranges it")
    return replace(whole, opaque=_stranger(node, parameter, static)) if full == shape else None


def _positions(node: fx.Node, parameter: fx.Node, full: Shape) -> list[Tensor] | None:
    """For each dimension of the parameter, its position at each entry of `node`; None if `node` is no view of it."""
    chain: list[fx.Node] = []
    current = node
    while current is not parameter:
        kind = KINDS.get(base_name(current)) if current.op.startswith("call") else None
        if len(current.all_input_nodes) != 1 or not (kind is Kind.VIEW or base_name(current) in _IDENTITIES):
            return None
        chain.append(current)
        current = current.all_input_nodes[0]
    found = []
    for dim in range(len(full)):
        tags: Any = numbered(full, dim)
        for step in reversed(chain):
            if KINDS[base_name(step)] is not Kind.VIEW:
                continue
            op = Op(
                0,
                step,
                base_name(step),
                Kind.VIEW,
                shape_of(value_of(step)),
                (origin := Op(0, step.all_input_nodes[0], "", Kind.INPUT, (), ()),),
            )
            tags = moved(op, {origin: tags})
            if tags is None:
                return None
        found.append(tags)
    return found


def _from_positions(positions: list[Tensor], shape: Shape, given: Weight) -> Weight | None:
    """The weight that holds these positions of its parameter, where `given` has the axes of the view in place of dimensions.

    None where they are no rectangular part of the parameter, or the input channels not in order.
    """
    full = given.block.full_shape
    varying = [varying_axes(tags) for tags in positions]
    if any(len(axes) > 1 for axes in varying):
        return None
    spare = [dim for dim, axes in enumerate(varying) if not axes]
    along: dict[int, Dims] = {}
    for axis in dict.fromkeys((*given.out_dims, *given.in_dims)):
        along[axis] = _slowest_first(positions, [dim for dim, axes in enumerate(varying) if axes == (axis,)])
        if not along[axis] and shape[axis] == 1 and spare:
            along[axis] = (spare.pop(0),)
    out_dims, in_dims = (tuple(dim for axis in axes for dim in along[axis]) for axes in (given.out_dims, given.in_dims))
    rows, columns = (_as_one(tuple(positions[dim] for dim in dims), tuple(full[dim] for dim in dims)) for dims in (out_dims, in_dims))
    if rows is None or not isinstance(columns, range) or len(columns) != given.inputs:
        return None
    block = narrowed(given.block, out_dims, rows) if len(rows) == len(set(rows)) == given.outputs else None
    block = None if block is None else narrowed(block, in_dims, columns)
    for dim, tags in enumerate(positions):
        if block is not None and dim not in (*out_dims, *in_dims):
            held = channels_in(tags)
            block = None if held is None else block.narrowed(dim, held)
    return None if block is None else replace(given, block=block, out_dims=out_dims, in_dims=in_dims, rows=rows)


def _slowest_first(positions: list[Tensor], dims: list[int]) -> Dims:
    """The dimensions that lie along one axis of a view, in the order in which their positions change there."""

    def first_change(dim: int) -> int:
        along = _distinct(positions[dim]).reshape(-1)
        return int((along != along[0]).nonzero()[0])

    return tuple(sorted(dims, key=first_change, reverse=True) if len(dims) > 1 else dims)


@remembered
def _as_one(positions: tuple[Tensor, ...], sizes: Shape) -> Sequence[int] | None:
    """At each entry of a view, the position along several dimensions as one; None where it holds what lies nowhere."""
    total = torch.zeros(())
    for tags, size in zip(positions, sizes, strict=True):
        own = _distinct(tags)
        if own.is_complex() or not bool((own > 0).all()):
            return None
        total = total * size + own - 1
    return listed(total.reshape(-1).long().tolist())


def _distinct(tags: Tensor) -> Tensor:
    """The tags without those that repeat along an axis."""
    for axis in range(tags.dim()):
        if axis not in varying_axes(tags):
            tags = tags.narrow(axis, 0, 1)
    return tags


def _stranger(node: fx.Node, parameter: fx.Node, static: Static) -> str:
    """The first operation between `parameter` and `node` that does more than standardise, by name.

    It may neither reorder entries nor leave some out, and what it scales or shifts by must be the same for a row or for all.
    """
    if not _reaches_entrywise(node, parameter):
        return "a mean of it"
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        name = base_name(current) if current.op.startswith("call") else ""
        kind = KINDS.get(name)
        if name and ((kind not in _STATIC_KINDS and name not in (*RESHAPES, "expand", "expand_as")) or name == "where"):
            return name
        for operand in current.all_input_nodes:
            sources = static.sources(operand)
            if kind in (Kind.PRODUCT, Kind.POINTWISE) and parameter not in sources and _varies_by_entry(operand, parameter):
                return name
            if operand not in seen and sources and operand is not parameter:
                seen.add(operand)
                stack.append(operand)
    return ""


def _reaches_entrywise(node: fx.Node, parameter: fx.Node) -> bool:
    """Whether a way leads from each entry of the parameter to `node`, past no reduction."""

    def operands(current: fx.Node) -> list[fx.Node]:
        reduces = not current.op.startswith("call") or KINDS.get(base_name(current)) is Kind.REDUCE
        return [] if reduces else current.all_input_nodes

    return parameter in reached(node, operands)


def _varies_by_entry(operand: fx.Node, parameter: fx.Node) -> bool:
    """Whether a value has as many entries as the parameter: a mask, or what is added to each of them."""
    return is_tensor(value_of(operand)) and math.prod(shape_of(value_of(operand))) >= math.prod(shape_of(value_of(parameter))) > 1
