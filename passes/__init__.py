"""The rules: which patterns of a dataflow can hold one matrix where they held two.

A rule has a `kind` and a method `match(flow) -> Iterator[Site | Miss]`; it knows the flow and the plan, nothing else. The
innermost patterns come first: what they claim is one step to the patterns around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from pe_fx.graph.flow import Flow
from pe_fx.passes.attention import Attention
from pe_fx.passes.bottleneck import Bottleneck
from pe_fx.passes.glu import Glu
from pe_fx.passes.mlp import Mlp
from pe_fx.passes.pairs import near_misses
from pe_fx.passes.squeeze_excite import SqueezeExcite
from pe_fx.ties import Miss, Site

__all__ = ["DEFAULT_RULES", "Attention", "Bottleneck", "Glu", "Mlp", "Rule", "SqueezeExcite", "find"]


class Rule(Protocol):
    """What `pe_fx.transform(rules=…)` takes beside the names of the default rules."""

    @property
    def kind(self) -> str: ...

    def match(self, flow: Flow) -> Iterator[Site | Miss]: ...


DEFAULT_RULES: tuple[Rule, ...] = (SqueezeExcite(), Attention(), Glu(), Mlp(), Bottleneck())


def find(flow: Flow, rules: Iterable[Rule] = DEFAULT_RULES) -> tuple[list[Site], list[Miss]]:
    """All sites and near misses. A weight belongs to one site: the first rule's, then the first in the dataflow."""
    sites: list[Site] = []
    misses: list[Miss] = []
    for rule in rules:
        for found in rule.match(flow):
            if isinstance(found, Site):
                flow.claim(found.weights, found.name)
                sites.append(found)
            else:
                misses.append(found)
    known = {miss.weights for miss in misses}
    misses += [miss for miss in near_misses(flow) if miss.weights not in known]
    return sites, misses
