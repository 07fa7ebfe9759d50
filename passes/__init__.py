"""The rules: which patterns of a dataflow can hold one matrix where they held two.

A rule has a `kind` and a method `match(flow) -> Iterator[Site | Miss]`; it knows the flow and the plan, nothing else. The
innermost patterns come first: what they claim is one step to the patterns around them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from pe_fx.graph.flow import Flow
from pe_fx.passes.attention import Attention
from pe_fx.passes.bottleneck import Bottleneck
from pe_fx.passes.glu import Glu
from pe_fx.passes.mlp import Mlp
from pe_fx.passes.pairs import near_misses
from pe_fx.passes.squeeze_excite import SqueezeExcite
from pe_fx.ties import Miss, Site, Tie

__all__ = ["DEFAULT_RULES", "Attention", "Bottleneck", "Glu", "Mlp", "Rule", "SqueezeExcite", "find", "tieable"]


class Rule(Protocol):
    """What `pe_fx.transform(rules=…)` takes beside the names of the default rules."""

    @property
    def kind(self) -> str: ...

    def match(self, flow: Flow) -> Iterator[Site | Miss]: ...


DEFAULT_RULES: tuple[Rule, ...] = (SqueezeExcite(), Attention(), Glu(), Mlp(), Bottleneck())


def find(
    flow: Flow,
    rules: Iterable[Rule] = DEFAULT_RULES,
    wanted: Callable[[Site | Miss], bool] = lambda found: True,
    forbidden: Callable[[Tie], str | None] = lambda tie: None,
    is_tied: Callable[[Site], bool] = lambda site: True,
) -> tuple[list[Site], list[Miss]]:
    """All sites and near misses that are `wanted`. What a tie takes belongs to one site: the first rule's, then the first in the dataflow.

    A site that is not wanted, and a tie that is `forbidden` (then why), are found all the same, as a step to the patterns around them,
    and take nothing. So does a site that is wanted, but not to be tied.
    """
    sites: list[Site] = []
    misses: list[Miss] = []
    for rule in rules:
        for found in rule.match(flow):
            if isinstance(found, Miss):
                misses.append(found)
                continue
            site: Site | None = found if wanted(found) else None
            taken: tuple[Tie, ...] = ()
            if site is not None and is_tied(site):
                site, refused = tieable(found, functools.partial(_obstacle, flow, forbidden, found))
                taken = site.ties if site is not None else ()
                misses += refused
            flow.claim(found, taken)
            sites += [] if site is None else [site]
    known = {miss.weights for miss in misses}
    misses += [miss for miss in near_misses(flow) if miss.weights not in known]
    return sites, [miss for miss in misses if wanted(miss)]


def tieable(site: Site, obstacle: Callable[[Tie], str | None]) -> tuple[Site | None, list[Miss]]:
    """What is left of a site without the ties that have an obstacle, and a miss for each of these."""
    reasons = {tie: obstacle(tie) for tie in site.ties}
    misses = [Miss(site.kind, site.name, tuple(dict.fromkeys((tie.source, tie.target))), why) for tie, why in reasons.items() if why]
    ties = tuple(tie for tie in site.ties if reasons[tie] is None)
    return site.with_ties(ties) if ties else None, misses


def _obstacle(flow: Flow, forbidden: Callable[[Tie], str | None], site: Site, tie: Tie) -> str | None:
    return flow.clash(site, tie) or forbidden(tie)
