"""Which node of one graph is which of another."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Hashable, Iterable

import networkx as nx

from pe_fx.diff.graph import Graph, Node

RADII = (8, 4, 2, 1)
"""How far around a node its neighbourhood is compared, in steps, where its place in the module tree does not tell."""


def align(before: Graph, after: Graph) -> dict[str, str]:
    """Maps ids of `before` to ids of `after`; who has no counterpart is left out.

    >>> from torch import nn
    >>> before = Graph.of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)))
    >>> after = Graph.of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8)))
    >>> align(before, after)
    {'args_0': 'args_0', 'linear': 'linear', 'relu': 'relu', 'linear_1': 'linear_1', 'output': 'output'}

    By module path, operation and parameters first; what that leaves open, by the nodes around it: outwards from what is matched,
    then by hashes of ever smaller neighbourhoods. Linear in the number of nodes.
    """
    alignment = _Alignment(before, after)
    for key in (_exact, _named, _placed):
        alignment.pair_by(functools.partial(_keys, key))
    alignment.spread(alignment.pairs)
    for radius in RADII:
        if not alignment.is_complete:
            alignment.spread(alignment.pair_by(functools.partial(_neighbourhoods, radius)))
    return {id: alignment.pairs[id] for id in before.nodes if id in alignment.pairs}


def _keys(key: Callable[[Node], Hashable], graph: Graph, nodes: list[Node]) -> dict[str, Hashable]:
    return {node.id: key(node) for node in nodes}


def _exact(node: Node) -> Hashable:
    return node.module, node.op, node.operands, node.shape


def _named(node: Node) -> Hashable:
    return node.module, node.op, node.names


def _placed(node: Node) -> Hashable:
    return node.module, node.op


def _form(node: Node) -> Hashable:
    """What is left of a node without its names."""
    return node.op, node.shape, tuple((operand.view, operand.shape) for operand in node.operands)


def _neighbourhoods(radius: int, graph: Graph, nodes: list[Node]) -> dict[str, Hashable]:
    """Weisfeiler-Lehman hashes: equal where the operations up to `radius` steps around two nodes are."""
    near: nx.Graph[str] = nx.Graph()
    frontier = {node.id for node in nodes}
    for _ in range(radius):
        frontier |= {other for id in frontier for other in (*graph.nodes[id].inputs, *graph.users[id])}
    near.add_nodes_from((id, {"form": ascii(_form(graph.nodes[id]))}) for id in graph.nodes if id in frontier)
    near.add_edges_from((source, id) for id in near for source in graph.nodes[id].inputs if source in frontier)
    hashes = nx.weisfeiler_lehman_subgraph_hashes(near, node_attr="form", iterations=radius)
    return {node.id: hashes[node.id][-1] for node in nodes}


class _Alignment:
    """Pairs found so far, and who is still alone."""

    def __init__(self, before: Graph, after: Graph) -> None:
        self.before, self.after = before, after
        self.pairs: dict[str, str] = {}
        self._taken: set[str] = set()

    @property
    def is_complete(self) -> bool:
        return len(self.pairs) in (len(self.before.nodes), len(self.after.nodes))

    def pair_by(self, keys: Callable[[Graph, list[Node]], dict[str, Hashable]]) -> dict[str, str]:
        """Pairs the nodes of one key in order, where both graphs have equally many of them; returns the new pairs."""
        alone = [node for node in self.before.nodes.values() if node.id not in self.pairs]
        others = [node for node in self.after.nodes.values() if node.id not in self._taken]
        theirs = _grouped(keys(self.after, others))
        found: dict[str, str] = {}
        for key, ids in _grouped(keys(self.before, alone)).items():
            if len(ids) == len(theirs.get(key, ())):
                found |= zip(ids, theirs[key], strict=True)
        self.pairs |= found
        self._taken.update(found.values())
        return found

    def spread(self, pairs: dict[str, str]) -> None:
        """Goes from pairs to the nodes around them: what stands at the same place and does the same is a pair, too."""
        queue = deque(pairs.items())
        while queue:
            first, second = queue.popleft()
            for mine, others in (
                (self.before.nodes[first].inputs, self.after.nodes[second].inputs),
                (self.before.users[first], self.after.users[second]),
            ):
                for id, other in self._alike(mine, others):
                    self.pairs[id] = other
                    self._taken.add(other)
                    queue.append((id, other))

    def _alike(self, mine: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
        """Of the nodes beside a pair, those that are alone and alike, in order."""
        theirs = _grouped({other: _form(self.after.nodes[other]) for other in others if other not in self._taken})
        own = _grouped({id: _form(self.before.nodes[id]) for id in mine if id not in self.pairs})
        return [pair for form, ids in own.items() for pair in zip(ids, theirs.get(form, ()), strict=False)]


def _grouped(keys: dict[str, Hashable]) -> dict[Hashable, list[str]]:
    groups: dict[Hashable, list[str]] = {}
    for id, key in keys.items():
        groups.setdefault(key, []).append(id)
    return groups
