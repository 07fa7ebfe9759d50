"""What the backend adds to Inductor: passes on the joint graph of forward and backward, in ATen operations."""

from __future__ import annotations

from torch import fx

from pe_fx.lowering.casts import share_casts
from pe_fx.lowering.copies import share_copies
from pe_fx.lowering.sums import sum_in_turn

UUID = "pe_fx lowering 1"
"""Changes with every pass: Inductor's caches tell compiled graphs apart by it."""

PASSES = (share_casts, share_copies, sum_in_turn)


def run_passes(graph: fx.Graph) -> None:
    for lowering_pass in PASSES:
        lowering_pass(graph)
    graph.eliminate_dead_code()
