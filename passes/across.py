"""Ties across blocks: each site's ties lead to the matrices of the next site of its kind and shape, the last one's to the first's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence

from pe_fx.graph.flow import Flow
from pe_fx.passes.stage import rows_of
from pe_fx.ties import Entry, Miss, Site, Tie


def tie_across(
    flow: Flow,
    sites: Iterable[Site],
    kinds: Iterable[str],
    trait: Callable[[str], Hashable] = lambda name: None,
    forbidden: Callable[[Tie | Entry], str | None] = lambda what: None,
) -> tuple[list[Site], list[Miss]]:
    """The same sites, those of the given kinds tied in rings, and why a site could not be: it stays tied within itself.

    A unit then writes along a direction that another layer reads, which needs no signs to be told from its own; the matrices are as many
    as without. A ring holds what a stage would: consecutive sites of one shape, of weights of one `trait`. A site alone stays as it is.
    """
    result, misses = list(sites), []
    for kind in kinds:
        replaced: dict[Site, Site] = {}
        for row in rows_of(flow, [site for site in result if site.kind == kind], trait):
            for site, following in zip(row, [*row[1:], row[0]], strict=True) if len(row) > 1 else ():
                ties = tuple(dataclasses.replace(tie, of=other.of) for tie, other in zip(site.ties, following.ties, strict=True))
                refused = _refused(site, ties, forbidden)
                misses += refused
                replaced[site] = site if refused else site.with_ties(ties)
        result = [replaced.get(site, site) for site in result]
    return result, misses


def _refused(site: Site, ties: Sequence[Tie], forbidden: Callable[[Tie | Entry], str | None]) -> list[Miss]:
    return [Miss(site.kind, site.name, (tie.source, tie.target), reason) for tie in ties if (reason := forbidden(tie)) is not None]
