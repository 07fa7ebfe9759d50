"""Feed-forward blocks: W₂ F(W₁ x) becomes Wᵀ F(W x)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pe_fx.graph.flow import Flow
from pe_fx.passes.pairs import match_pairs
from pe_fx.passes.parts import match_parts
from pe_fx.ties import Miss, Site


@dataclass(frozen=True)
class Mlp:
    """`fc2.weight ← fc1.weightᵀ`, where all of fc1's output goes through a nonlinearity to fc2 and nowhere else.

    Linear layers and 1x1 convolutions; between them dropout, norms, depthwise convolutions, gates, reshapes of other axes, and
    values that join in from elsewhere, such as a mask or a condition, unless another matrix that fits made them. `fc1` may be some
    rows of a weight whose others make other values, as in a parallel block. Source: arXiv 2401.16438, feed-forward layers.
    """

    kind: str = "mlp"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        yield from match_pairs(flow, self.kind, lambda pair: not pair.is_bottleneck)
        yield from match_parts(flow, self.kind)
