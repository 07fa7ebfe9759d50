"""Dominance, by which the passes know what is closed."""

import random

import networkx as nx
import pytest

from pe_fx.graph.walks import immediate_dominators


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
