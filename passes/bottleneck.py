"""Bottlenecks: W₁ᵀ G(W₂ x), with a spatial convolution or attention in G, becomes Wᵀ G(W x)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pe_fx.graph.flow import Flow
from pe_fx.passes.pairs import match_pairs
from pe_fx.ties import Miss, Site


@dataclass(frozen=True)
class Bottleneck:
    """`conv3.weight ← conv1.weightᵀ` for 1x1 convolutions around k x k (also grouped or depthwise) convolutions.

    Inverted bottlenecks (MBConv) are the same pattern; gates and attention inside are sites of their own. Source: arXiv
    2401.16438, bottleneck layers.
    """

    kind: str = "bottleneck"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        yield from match_pairs(flow, self.kind, lambda pair: pair.is_bottleneck)
