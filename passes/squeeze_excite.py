"""Squeeze-and-excite gates: x * sigmoid(W₂ F(W₁ pool(x))) becomes x * sigmoid(Wᵀ F(W pool(x)))."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from pe_fx.graph.flow import Flow, source_along
from pe_fx.graph.ops import Kind
from pe_fx.passes.pairs import Pair, match_pairs
from pe_fx.ties import Miss, Site

_PASSING = {Kind.VIEW, Kind.POINTWISE, Kind.NONLINEAR, Kind.NORM}


@dataclass(frozen=True)
class SqueezeExcite:
    """`expand.weight ← reduce.weightᵀ` in the gate of a pooled value that multiplies what it was pooled from."""

    kind: str = "squeeze_excite"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        yield from match_pairs(flow, self.kind, functools.partial(_is_gate, flow))


def _is_gate(flow: Flow, pair: Pair) -> bool:
    pooled = source_along(pair.first, _PASSING)
    if pooled is None or pooled.kind not in (Kind.REDUCE, Kind.POOL):
        return False
    product = next(flow.forward(pair.second, _PASSING, lambda op: op.kind is Kind.PRODUCT), None)
    return product is not None and not flow.dominates(pair.second, product)
