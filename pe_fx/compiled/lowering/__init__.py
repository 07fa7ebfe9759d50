"""What the backend adds to Inductor: passes on the joint graph of forward and backward, in ATen operations."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import fx

from pe_fx.compiled.dynamo import hash_of_sources
from pe_fx.compiled.lowering.casts import share_casts
from pe_fx.compiled.lowering.copies import share_copies
from pe_fx.compiled.lowering.once import read_once
from pe_fx.compiled.lowering.sums import sum_in_turn
from pe_fx.graph.operation import place_of

log = logging.getLogger(__name__)

UUID = hash_of_sources(Path(__file__).parent)
"""Inductor's caches tell by it what these passes made from what others made."""

PASSES = (share_casts, read_once, share_copies, sum_in_turn)


def run_passes(graph: fx.Graph, single_read: bool = True) -> None:
    """Every pass in turn. What a pass changes is whole at each step, so one that fails is logged, and the graph is right as it is."""
    for lowering_pass in PASSES:
        if lowering_pass is read_once and not single_read:
            continue
        try:
            lowering_pass(graph)
        except Exception as error:
            log.exception("%s failed at %s and is left out", lowering_pass.__name__, place_of(error))
    graph.eliminate_dead_code()
