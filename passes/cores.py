"""Where attention happens: softmax(q kᵀ) v, fused or written out, and along which axes its positions lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from pe_fx.graph.flow import Flow
from pe_fx.graph.operation import Op, factors, product_labels
from pe_fx.graph.ops import Kind
from pe_fx.graph.tags import numbered, varying_axes

_SCORES = {Kind.VIEW, Kind.POINTWISE, Kind.PRODUCT, Kind.NONLINEAR, Kind.NORM}


@dataclass(frozen=True)
class Operand:
    """Queries, keys or values, as they enter a product, and the axis, counted from the right, along which their positions lie."""

    value: Op
    axis: int


@dataclass(frozen=True)
class Core:
    """Where attention happens: its operands, and the product that averages the values.

    Without q, `k` is under the softmax by itself, and not in a product with queries. `scores` is the product of queries and keys, and
    `weights` what the values are multiplied with, where these are not in one operation with `mix`.
    """

    q: Operand | None
    k: Operand | None
    v: Operand | None
    mix: Op
    scores: Op | None = None
    weights: Op | None = None

    @property
    def operands(self) -> list[Operand]:
        return [operand for operand in (self.q, self.k, self.v) if operand is not None]


def cores(flow: Flow) -> Iterator[Core]:
    for op in flow.ops:
        if op.kind is Kind.ATTEND:
            q, k, v = (None if value is None else Operand(value, -2) for value in op.operands[:3])
            yield Core(q, k, v, op)
        elif op.kind is Kind.SOFTMAX:
            averaged = _value_product(flow, op)
            if averaged is not None:
                weights, v, mix = averaged
                q, k, scores = _score_product(flow, op, *averaged) or (None, Operand(op, -1), None)
                yield Core(q, k, v, mix, scores, weights)


def _value_product(flow: Flow, softmax: Op) -> tuple[Op, Operand, Op] | None:
    """The attention map as it meets the values, the values, and their product."""
    for product in flow.forward(softmax, _SCORES, lambda op: op.kind is Kind.MATMUL, mixes_heads):
        pair = factors(product)
        labels = product_labels(product)
        for own, (weights, values) in ((1, pair), (0, pair[::-1])):
            if weights is not None and values is not None and values is not softmax and not flow.reaches(softmax, values):
                summed = [] if labels is None else [axis for axis, label in enumerate(labels[own]) if label not in labels[2]]
                return weights, Operand(values, summed[-1] - len(values.shape) if summed else -2), product
    return None


def _score_product(flow: Flow, softmax: Op, weights: Op, values: Operand, mix: Op) -> tuple[Operand, Operand, Op] | None:
    """q and k, and the product of them under the softmax. The keys lie along the axis over which the values are averaged."""
    labels = product_labels(mix)
    names = labels[0 if factors(mix)[0] is weights else 1] if labels is not None else ""
    averaged = [axis for axis, label in enumerate(names) if labels is not None and label not in labels[2]]
    for product in sorted(flow.backward(softmax, _SCORES, lambda op: op.kind is Kind.MATMUL, mixes_heads), key=lambda op: op.index):
        terms = product_labels(product)
        first, second = factors(product)
        if terms is None or first is None or second is None or len(averaged) != 1:
            continue
        for mine, other, k, q in ((terms[1], terms[0], second, first), (terms[0], terms[1], first, second)):
            own = [axis for axis, label in enumerate(terms[2]) if label in mine and label not in other]
            if own and _axis_at(flow, product, own[-1], weights) == averaged[0]:
                asking = [axis - len(other) for axis, label in enumerate(other) if label in terms[2] and label not in mine]
                key = mine.index(terms[2][own[-1]]) - len(mine)
                return Operand(q, asking[-1] if asking else -2), Operand(k, key), product
    return None


def unnormalised(flow: Flow, known: Iterable[Core]) -> Iterator[tuple[Op, tuple[Op, Op, Op]]]:
    """Products of three values in which no softmax stands, with these values: linear attention, maps by a sigmoid, retention."""
    normalised = {op for core in known for op in (core.mix, core.scores)}

    def is_free(op: Op) -> bool:
        return op.kind is Kind.MATMUL and op not in normalised

    for op in filter(is_free, flow.ops):
        for inner, other in (factors(op), factors(op)[::-1]):
            if inner is None or other is None or inner in normalised:
                continue
            for product in [inner] if is_free(inner) else flow.backward(inner, _SCORES, is_free):
                first, second = factors(product)
                if first is not None and second is not None:
                    yield op, (first, second, other)


def mixes_heads(op: Op) -> bool:
    """Whether a weight only mixes the attention maps of several heads ("talking heads")."""
    return (
        op.is_projection and op.weight is not None and op.weight.is_matrix and op.weight.inputs == op.weight.outputs and len(op.shape) > 3
    )


def _axis_at(flow: Flow, product: Op, axis: int, value: Op) -> int | None:
    """Where an axis of the product lies in a value made from it."""
    size = product.shape[axis]
    state = flow.trace(product, value, tags=numbered(product.shape, axis), loosely=True)[value]
    axes = varying_axes(state.tags) if isinstance(state.tags, Tensor) else ()
    return axes[0] if len(axes) == 1 else (axis if size == 1 else None)


def query_axis(flow: Flow, core: Core) -> int | None:
    """Where the queries lie in the averaged values."""
    if core.scores is None or core.weights is None or core.q is None:
        return -2 if core.mix.kind is Kind.ATTEND else None
    query, _, scores = _labels(core.scores, core.q.value)
    weights, _, result = _labels(core.mix, core.weights)
    label = query[core.q.axis]
    at = _axis_at(flow, core.scores, scores.index(label), core.weights) if label in scores else None
    return result.index(weights[at]) if at is not None and weights[at] in result else None


def own_channels(core: Core) -> Tensor | None:
    """The channels of values that no matrix made."""
    assert core.v is not None
    if product_labels(core.mix) is None:
        return None
    names, others, result = _labels(core.mix, core.v.value)
    own = [axis for axis, label in enumerate(names) if label in result and label not in others]
    return numbered(core.v.value.shape, own[-1]) if own else None


def _labels(product: Op, factor: Op) -> tuple[str, str, str]:
    """The labels of one factor of a product, of the other one, and of the result."""
    labels = product_labels(product)
    assert labels is not None
    first, second, result = labels
    return (first, second, result) if factors(product)[0] is factor else (second, first, result)
