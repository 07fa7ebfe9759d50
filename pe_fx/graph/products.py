"""Products with a parameter of several dimensions, opened into a product with one matrix and the views around it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional

from pe_fx.graph.operation import Product, product_of, shape_of
from pe_fx.graph.ops import KINDS, Kind, base_name, is_in_place, value_of
from pe_fx.graph.strides import outline


def linear_by_group(value: Tensor, weight: Tensor) -> Tensor:
    """Stands in a captured graph for as many matrices as `weight` has, each applied to its own group of the last axis' channels."""
    raise NotImplementedError


def open_products(graph: fx.Graph, weights: Collection[fx.Node], inputs: Collection[fx.Node]) -> None:
    """Spells out every product of values and a parameter in which more than one axis of the parameter is summed over, or is new in the
    result, or tells to which part of the value the others are applied.

    `einsum("btd,dhk->bthk", x, w)` is `linear(x, w.permute(1, 2, 0).flatten(0, 1)).unflatten(-1, (h, k))`: whoever follows channels
    knows all of that. Channels that lie along several axes are counted in the order of the value's labels, or the result's.
    """
    values, static = set(inputs), set(weights)
    views = _Views(graph)
    for node in list(graph.nodes):
        applies_weight = node.op.startswith("call") and KINDS.get(base_name(node)) in (Kind.PROJECTION, Kind.CONV)
        if values.isdisjoint(node.all_input_nodes) and not applies_weight:  # queries made of a token are values, and no weight
            static.update([] if static.isdisjoint(node.all_input_nodes) else [node])
            continue
        values.add(node)
        product = product_of(node) if node.op.startswith("call") and not node.kwargs.keys() - {"dims", "path"} else None
        result = None if product is None else _opened(views.before(node), product, values, static)
        if result is not None:
            values.add(result)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
        elif node.op.startswith("call") and is_in_place(node):
            views.known.clear()


class _Factor(NamedTuple):
    """What is multiplied, and the labels of its axes."""

    node: fx.Node
    labels: str


class _Views:
    """Makes nodes before one that is to be replaced; a view of a value once, for whoever reads the value."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.known: dict[tuple[Any, ...], fx.Node] = {}

    def before(self, node: fx.Node) -> _Views:
        self.place = node
        return self

    def view(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        if (function, *args) not in self.known:
            value = function(*fx.node.map_arg(args, lambda operand: outline(value_of(operand))))
            self.known[function, *args] = self._new(function, args, value)
        return self.known[function, *args]

    def product(self, function: Callable[..., Any], *args: Any, shape: Iterable[int]) -> fx.Node:
        return self._new(function, args, torch.empty(tuple(shape), dtype=value_of(self.place).dtype, device="meta"))

    def _new(self, function: Callable[..., Any], args: tuple[Any, ...], value: Tensor) -> fx.Node:
        with self.graph.inserting_before(self.place):
            new = self.graph.create_node("call_function", function, args, name=f"{self.place.name}_{function.__name__}")
        new.meta = {**self.place.meta, "val": value}
        return new

    def ordered(self, factor: _Factor, labels: str) -> fx.Node:
        return factor.node if factor.labels == labels else self.view(torch.permute, factor.node, tuple(map(factor.labels.index, labels)))

    def arranged(self, factor: _Factor, *groups: str) -> fx.Node:
        """The factor with one axis for each group of labels."""
        node, end = self.ordered(factor, "".join(groups)), len(factor.labels)
        for group in reversed(groups):
            end -= len(group)
            node = self.view(torch.flatten, node, end, end + len(group) - 1) if len(group) > 1 else node
        return node

    def without(self, factor: _Factor, labels: Collection[str]) -> _Factor:
        """The factor at the first position of axes along which it repeats."""
        node = factor.node
        for axis, label in reversed(list(enumerate(factor.labels))):
            node = self.view(torch.select, node, axis, 0) if label in labels else node
        return _Factor(node, "".join(label for label in factor.labels if label not in labels))


def _opened(views: _Views, product: Product, values: Collection[fx.Node], static: Collection[fx.Node]) -> fx.Node | None:
    """What stands for the product; None where nothing is to be opened, or it is no product with one parameter alone."""
    factors = list(map(_Factor, product.factors, product.terms))
    own, others = ([factor for factor in factors if (factor.node in values) is is_value] for is_value in (True, False))
    has_diagonal = any(len(set(labels)) < len(labels) for labels in (*product.terms, product.result))
    if has_diagonal or len(others) != 1 or others[0].node not in static:
        return None
    size: dict[str, int] = {}
    for node, labels in factors:
        for label, extent in zip(labels, shape_of(value_of(node)), strict=True):
            size[label] = max(extent, size.get(label, 1))
    repeated = [{label for axis, label in enumerate(labels) if _repeats(node, axis, size[label])} for node, labels in (*own, *others)]
    *in_values, in_weight = (
        "".join(label for label in labels if label not in left_out) for (_, labels), left_out in zip((*own, *others), repeated, strict=True)
    )
    shared = "".join(dict.fromkeys("".join(in_values)))
    kept = {*in_weight, *product.result}
    batch = "".join(label for label in shared if label in in_weight and label in product.result)
    inner = "".join(label for label in shared if label in in_weight and label not in product.result)
    outer = "".join(label for label in product.result if label in in_weight and label not in shared)
    is_whole = set(product.result) <= {*shared, *in_weight} and len(batch + inner + outer) == len(in_weight)
    is_plain = len(own) == 1 and len(others[0].labels) == 2 and len(inner) == len(outer) == 1
    if not inner or not outer or not is_whole or is_plain or not (kept.issuperset(shared) or len(own) == 2):
        return None
    value = _multiplied(views, [views.without(*each) for each in zip(own, repeated, strict=False)], kept, size)
    weight = views.without(others[0], repeated[-1])
    rest = "".join(label for label in value.labels if label not in in_weight)
    applied = views.arranged(weight, *((batch, outer, inner) if batch else (outer, inner)))
    shape = [*(size[label] for label in rest), math.prod(size[label] for label in batch + outer)]
    function = linear_by_group if batch else functional.linear
    result = views.product(function, views.arranged(value, *rest, batch + inner), applied, shape=shape)
    if len(batch + outer) > 1:
        result = views.view(torch.unflatten, result, -1, tuple(size[label] for label in batch + outer))
    result = views.ordered(_Factor(result, rest + batch + outer), product.result)
    if base_name(views.place) == "baddbmm":
        result = views.product(torch.add, views.place.args[0], result, shape=shape_of(value_of(views.place)))
    return result


def _multiplied(views: _Views, factors: list[_Factor], kept: Collection[str], size: Mapping[str, int]) -> _Factor:
    """The product of the values alone: elementwise, or of two with a sum over what nothing else has."""
    labels = "".join(dict.fromkeys("".join(factor.labels for factor in factors)))
    left = "".join(label for label in labels if label in kept)
    if left != labels:
        equation = f"{','.join(factor.labels for factor in factors)}->{left}"
        return _Factor(views.product(torch.einsum, equation, *(node for node, _ in factors), shape=map(size.__getitem__, left)), left)
    wide = []
    for factor in factors:
        node = views.ordered(factor, "".join(label for label in labels if label in factor.labels))
        for axis, label in enumerate(labels):
            node = node if label in factor.labels else views.view(torch.unsqueeze, node, axis)
        wide.append(node)
    multiply = functools.partial(views.product, torch.mul, shape=[size[label] for label in labels])
    return _Factor(functools.reduce(multiply, wide), labels)


_REPEATING = ("expand", "expand_as", "broadcast_to", "repeat", "tile")


def _repeats(node: fx.Node, axis: int, size: int) -> bool:
    """Whether all positions along an axis of a factor, which counts so many in the product, hold the same."""
    shape = shape_of(value_of(node))
    if shape[axis] < size:
        return True
    if size == 1 or not node.op.startswith("call") or base_name(node) not in _REPEATING:
        return False
    before = shape_of(value_of(node.all_input_nodes[0]))
    place = axis - len(shape) + len(before)
    return place < 0 or before[place] == 1
