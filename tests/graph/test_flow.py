"""Dominance, by which the passes know what is closed; and what they ask the flow, at what cost."""

import gc
import random
from collections.abc import Iterator

import networkx as nx
import pytest
import torch
from oracle import linear
from torch import nn

import pe_fx
from pe_fx.graph.capture import capture
from pe_fx.graph.flow import Flow
from pe_fx.graph.walks import immediate_dominators
from pe_fx.ties import Site


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("backwards", [False, True])
def test_dominators_are_those_of_networkx(seed: int, backwards: bool) -> None:
    draw = random.Random(seed)
    nodes, root = range(25), 25 if backwards else -1
    order = reversed(nodes) if backwards else nodes
    before = {node: [draw.randint(*((node + 1, 25) if backwards else (-1, node - 1))) for _ in range(draw.randint(0, 3))] for node in order}
    graph: nx.DiGraph[int] = nx.DiGraph((source, node) for node, sources in before.items() for source in sources)
    graph.add_node(root)
    assert immediate_dominators(before, root) == {k: v for k, v in nx.immediate_dominators(graph, root).items() if k != root}


def test_a_trace_goes_on_through_what_was_found_and_keeps_what_it_knew() -> None:
    net = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 16), nn.ReLU(), linear(16, 8))
    flow = Flow(capture(net))
    first, relu, middle, _, last = flow.ops[1:]
    before = flow.trace(first, last)
    assert before[last].lost == "2.weight"
    flow.carry([middle])
    after = flow.trace(first, last)
    assert after[relu] is before[relu]
    assert after[middle].mixed
    assert after[last].lost == "4.weight"


class Seen(list[tuple[bool, int]]):
    """A rule that finds nothing, and notes whether garbage is collected meanwhile, and how many threads work."""

    kind = "seen"

    def match(self, flow: Flow) -> Iterator[Site]:
        self.append((gc.isenabled(), torch.get_num_threads()))
        yield from ()


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_after_matching_where_it_was_before(enabled: bool) -> None:
    seen = Seen()
    model = nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 8))
    try:
        if not enabled:
            gc.disable()
        pe_fx.plan(model, rules=[seen])
        assert seen == [(False, 1)]
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_as_many_threads_work_as_before() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tied = pe_fx.transform(model, torch.randn(2, 5, 8))
        assert "self_attn.in_proj_weight_kept" in tied.state_dict()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
