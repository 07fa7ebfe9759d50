"""The gradients of a weight that is used many times are added as they come."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor, fx

from pe_fx.compiled.lowering.nodes import CAST, SAME_SIZE, aten, base_of, new_node

FEW = 4
"""So many gradients Inductor may keep, to add them in one kernel."""

PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution_backward.default}


@torch.library.custom_op("pe_fx::plus", mutates_args=())
def plus(total: Tensor, term: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum, in `dtype`.

    Inductor does not look into it: so it is computed before what it is added to, and there is no kernel to generate and compile.

    >>> plus(torch.ones(2), torch.ones(2), torch.float64)
    tensor([2., 2.], dtype=torch.float64)
    """
    return total.to(dtype) + term


plus.register_fake(lambda total, term, dtype: total.to(dtype) + term)


def sum_in_turn(graph: fx.Graph) -> None:
    """Adds more than `FEW` weight gradients one by one, so that they are not all held at a time.

    Sums of float32 matrix products are left alone: Inductor turns each addition into the product's own accumulation.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for result in graph.output_node().args[0]:  # type: ignore[union-attr]
        if isinstance(result, fx.Node) and result.target is aten.add.Tensor and _is_static(result):
            terms = sorted(_terms(result), key=order.__getitem__)
            if len(terms) > FEW and all(map(_is_product, terms)) and not all(term.target is aten.mm.default for term in _bases(terms)):
                _add(graph, result, terms)


def _is_static(node: fx.Node) -> bool:
    """As weights are: what has a dynamic batch is the gradient of none."""
    return all(isinstance(size, int) for size in node.meta["val"].shape)


def _terms(node: fx.Node) -> list[fx.Node]:
    """What is summed up by additions that nothing else reads."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return [node]
    terms = []
    for arg in node.args:
        if not isinstance(arg, fx.Node) or not isinstance(arg.meta["val"], Tensor) or arg.meta["val"].shape != node.meta["val"].shape:
            return [node]
        terms += _terms(arg) if len(arg.users) == 1 else [arg]
    return terms


def _bases(terms: list[fx.Node]) -> list[fx.Node]:
    return [base_of(term, SAME_SIZE) for term in terms]


def _is_product(term: fx.Node) -> bool:
    base = base_of(term, SAME_SIZE | {CAST, operator.getitem})
    return base.target in PRODUCTS


def _add(graph: fx.Graph, result: fx.Node, terms: list[fx.Node]) -> None:
    """Adds each term where it is made; what is made transposed apart, since a change of layout takes longer than an addition."""

    def added(total: fx.Node, term: fx.Node) -> fx.Node:
        return new_node(graph, result, torch.ops.pe_fx.plus.default, total, term, result.meta["val"].dtype)

    sums: dict[bool, fx.Node] = {}
    following = {term: term.next for term in terms}  # one gradient may count twice
    for term in terms:
        transposed = not term.meta["val"].is_contiguous()
        with graph.inserting_before(following[term]):
            exact = _uncast(graph, term)
            sums[transposed] = added(sums[transposed], exact) if transposed in sums else exact
    with graph.inserting_before(result):
        total = functools.reduce(added, (sums[transposed] for transposed in sorted(sums)))  # the first decides on the layout
    result.replace_all_uses_with(total)


def _uncast(graph: fx.Graph, term: fx.Node) -> fx.Node:
    """The term before its cast to the dtype of the sum, which needs no copy in that."""
    base = base_of(term, SAME_SIZE)
    if base.target is not CAST:
        return term

    def redone(node: fx.Node) -> fx.Node:
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        return inner if node is base else new_node(graph, node, node.target, redone(inner), *node.args[1:], **node.kwargs)

    return redone(term)
