"""Variants of the tie: the same matrix, its output channels in another order, with other signs, or scaled."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterable

from pe_fx.ties import Site, Tie

MIXES = ("none", "signed", "fitted")
GAIN = 0.2
"""Where learned factors start by default: small, so that a branch grows into its residual stream as a dense one does."""


def vary(sites: Iterable[Site], mix: str, gain: float | None) -> list[Site]:
    """The same sites, each tie `W₂ = g S P Wᵀ T`: signs S, T and order P drawn by a seed where `mix` is "signed", factors g from `gain`.

    Plain, `Wᵀ F(W x)` is the gradient of a sum of functions of wᵢ·x: its Jacobian is symmetric, and positive where F
    increases, so that a residual stack can stretch but hardly rotate or shrink. S P breaks the symmetry; T, a sign per hidden unit,
    lets half of the units write against the direction that they read. Neither costs a parameter. "fitted": as "none", and the order
    of the hidden units is found later, in the weights' values.

    >>> from pe_fx.ties import Block, Tie
    >>> tie = Tie(Block.whole("fc2", (4, 8)), Block.whole("fc1", (8, 4)), transposed=True, channels=0)
    >>> print(vary([Site("mlp", "", ("fc1", "fc2"), (tie,))], "signed", None)[0].ties[0])
    fc2 ← ±fc1ᵀ

    The first block of a stage under "slice" and "expand" is tied the other way round: its input channels are mixed, none scaled.
    """

    def varied(tie: Tie, site: Site) -> Tie:
        seed = _seed(tie, site) if mix == "signed" else None
        scale = None if site.entry is not None else gain
        return tie if tie.channels is None or (tie.seed, tie.gain) == (seed, scale) else dataclasses.replace(tie, seed=seed, gain=scale)

    return [site.with_ties(varied(tie, site) for tie in site.ties) for site in sites]


def _seed(tie: Tie, site: Site) -> int:
    """Of the weight's own name: it does not depend on what else is tied.

    Without its numbers, so that blocks alike are mixed by the same kernels; where blocks share one W, the mix is all that tells them apart.
    """
    name = str(tie.into)
    return zlib.crc32((name if site.stage is not None else re.sub(r"\d+", "", name)).encode())
