"""The gradients of a weight that is used many times are added as they come."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from pe_fx.lowering.nodes import CAST, SAME_SIZE, aten, base_of, new_node

GROUP = 4
"""So many gradients are added in one kernel; more would all be kept until the last one is there."""

PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution_backward.default}


@torch.library.custom_op("pe_fx::settle", mutates_args=())
def settle(total: Tensor) -> Tensor:
    """A copy, which Inductor does not look into: what it is made of is computed before what is made of it.

    >>> settle(torch.ones(2))
    tensor([1., 1.])
    """
    return total.clone()


@settle.register_fake
def _(total: Tensor) -> Tensor:
    return torch.empty_like(total)


def sum_in_turn(graph: fx.Graph) -> None:
    """Splits sums of more than `GROUP` weight gradients, so that no more than that many are held at a time.

    Sums of float32 matrix products are left alone: Inductor turns each addition into the product's own accumulation.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for result in graph.output_node().args[0]:  # type: ignore[union-attr]
        if isinstance(result, fx.Node) and result.target is aten.add.Tensor:
            terms = sorted(_terms(result), key=order.__getitem__)
            if len(terms) > GROUP and all(map(_is_product, terms)) and not all(term.target is aten.mm.default for term in _bases(terms)):
                _split(graph, result, terms)


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


def _split(graph: fx.Graph, result: fx.Node, terms: list[fx.Node]) -> None:
    total = terms[0]
    for number, term in enumerate(terms[1:], start=1):
        if number % GROUP == 0:
            with graph.inserting_after(total):
                total = new_node(graph, result, torch.ops.pe_fx.settle.default, total)
        with graph.inserting_after(total if term is terms[number - 1] else term):  # one gradient may count twice
            total = new_node(graph, result, aten.add.Tensor, total, term)
    result.replace_all_uses_with(total)
