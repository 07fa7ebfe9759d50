"""Two graphs laid over each other: one tree of modules, in which a part has the same place before and after."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx as nx

from pe_fx.diff.changes import Change, Diff, Edit
from pe_fx.diff.graph import Graph, Node, path_to
from pe_fx.diff.tree import shaped, signed, within
from pe_fx.errors import PeFxError

ROOT = 0
ENTRY, EXIT = -1, -2
"""Where edges come into a module and leave it, beside its children."""

BEFORE, AFTER = 1, 2
"""Which graph has an edge: either bit, or both."""

ROOM = 40
"""Parts that are shown at first."""

MOST, RUN = 250, 100
"""A module of more children than the first is shown in runs of the second: no browser draws thousands at once."""

BENDS = 1000
"""Layers that the edges of one module may pass in all: crossings are minimised among these. Longer ones are drawn as they come."""

Point = tuple[float, int]
"""A place in a layered drawing: x in widths of a part, and the layer."""

Routes = dict[tuple[int, int], list[Point]]
"""For each edge where it bends: one point in each layer that it passes."""


@dataclass
class Part:
    """A module, or an operation where it stands in either graph (None: it is not there).

    `module` is its path, or that of the module that runs it, as before. `children` are numbers of parts in dataflow order. `changes`
    are the numbers of the changes that it holds, `delta` the parameters that those add which are wholly inside.
    """

    parent: int
    module: str
    before: Node | None = None
    after: Node | None = None
    children: list[int] = field(default_factory=list)
    changes: set[int] = field(default_factory=set)
    delta: int = 0

    @property
    def is_module(self) -> bool:
        return self.before is None and self.after is None


class Overlay:
    """The parts of a diff, the root first, and the edges between operations.

    >>> from torch import nn
    >>> from pe_fx.diff.changes import diff_transform
    >>> overlay = Overlay(diff_transform(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))))
    >>> [(part.module, part.after.op) for part in overlay.parts if not part.is_module]
    [('', 'input'), ('0', 'linear'), ('1', 'gelu'), ('2', 'linear'), ('', 'output')]
    >>> overlay.edges
    {(1, 2): 3, (2, 3): 3, (3, 4): 3, (4, 5): 3}

    A module that holds one part alone is left out; that part stands in its place.
    """

    def __init__(self, diff: Diff) -> None:
        self.diff = diff = diff.shown
        homes = _homes(diff)
        self.after_name = {old: new for new, old in reversed(homes.items()) if homes.get(old) != old}
        self.parts = [Part(-1, "")]
        self.modules = {"": ROOT}
        of_before, of_after = self._place()
        self.links = _links(diff, of_before)
        self.edges: dict[tuple[int, int], int] = {}
        for graph, numbers, side in ((diff.before, of_before, BEFORE), (diff.after, of_after, AFTER)):
            for node in graph.nodes.values():
                for source in node.inputs:
                    edge = numbers[source], numbers[node.id]
                    self.edges[edge] = self.edges.get(edge, 0) | side
        self.edit: dict[int, tuple[Change, Edit]] = {}
        for number, change in enumerate(diff.changes):
            held = []
            for edit in change.edits:
                held.append(of_before[edit.before] if edit.before is not None else of_after[edit.after or ""])
                self.edit[held[-1]] = change, edit
            chains = [self.chain(part) for part in held]
            for part in set().union(*chains):
                self.parts[part].changes.add(number)
                if all(part in chain for chain in chains):
                    self.parts[part].delta += change.delta

    def _place(self) -> tuple[dict[str, int], dict[str, int]]:
        """Makes the parts; returns which is which node's."""
        places = [(id, other, ["", *filter(None, path_to(module))]) for id, other, module in _nodes(self.diff)]
        crowd: Counter[str] = Counter()
        seen: set[tuple[str, str | int]] = set()
        for number, (_, _, chain) in enumerate(places):
            inner: str | int = number
            for path in reversed(chain):
                if (path, inner) not in seen:
                    seen.add((path, inner))
                    crowd[path] += 1
                inner = path
        of_before: dict[str, int] = {}
        of_after: dict[str, int] = {}
        for id, other, chain in places:
            around = ROOT
            for path in chain[1:]:
                if crowd[path] > 1:
                    if path not in self.modules:
                        self.modules[path] = self._add(Part(self._run(around, crowd), path))
                    around = self.modules[path]
            before, after = self.diff.before.nodes.get(id or ""), self.diff.after.nodes.get(other or "")
            part = self._add(Part(self._run(around, crowd), chain[-1], before, after))
            if id is not None:
                of_before[id] = part
            if other is not None:
                of_after[other] = part
        return of_before, of_after

    def _add(self, part: Part) -> int:
        self.parts.append(part)
        self.parts[part.parent].children.append(len(self.parts) - 1)
        return len(self.parts) - 1

    def _run(self, around: int, crowd: Counter[str]) -> int:
        """Who is the parent of a module's next child: itself, or the run that is not full."""
        it = self.parts[around]
        if crowd[it.module] <= MOST:
            return around
        if not it.children or len(self.parts[it.children[-1]].children) == RUN:
            self._add(Part(around, it.module))
        return it.children[-1]

    def is_run(self, part: int) -> bool:
        it = self.parts[part]
        return it.is_module and part != ROOT and self.parts[it.parent].module == it.module

    def chain(self, part: int) -> list[int]:
        """A part and the modules around it, innermost first."""
        found = [part]
        while found[-1] != ROOT:
            found.append(self.parts[found[-1]].parent)
        return found

    def path(self, part: int, side: int) -> str:
        """The module's path, as it is called on one side."""
        module = self.parts[part].module
        return self.after_name.get(module, module) if side == AFTER else module

    def graph(self, side: int) -> Graph:
        return self.diff.after if side == AFTER else self.diff.before

    def sides(self, part: int) -> int:
        """Which of the graphs has it."""
        it = self.parts[part]
        if it.is_module:
            return sum(side for side in (BEFORE, AFTER) if part == ROOT or any(self.sides(child) & side for child in it.children))
        return BEFORE * (it.before is not None) + AFTER * (it.after is not None)

    def labels(self, part: int, side: int, around: int | None = None) -> tuple[str, str]:
        """Two lines to be written into a part: what it is, named as inside of `around`, and what it works with."""
        it = self.parts[part]
        outer = self.path(it.parent if around is None else around, side) if part != ROOT else ""
        if it.is_module:
            path = self.path(part, side)
            count = len(it.changes)
            held = [f"{count} change{'s' * (count != 1)}"] * bool(count) + [signed(it.delta)] * bool(it.delta)
            if self.is_run(part):
                first = self.parts[it.parent].children.index(part) * RUN
                return f"{first + 1} … {first + len(it.children)}", ", ".join(held)
            name = _inside(path, outer) or self.graph(side).name
            return f"{name}  {self.graph(side).modules.get(path, '')}".strip(), ", ".join(held)
        node = it.before if side == BEFORE else it.after
        assert node is not None
        weight = next(iter(node.operands), None)
        detail = shaped(node.shape) if node.dtype else ""
        if weight is not None:
            detail = f"{within(str(weight), outer)} {shaped(weight.shape) if weight.is_whole else ''}".strip()
        return f"{_inside(node.module, outer)}  {node.op}".strip(), detail

    def opened(self, start: int = ROOT) -> list[int]:
        """The modules to unfold: those with changes, level by level, as long as there is room."""
        found = [start]
        shown = len(self.parts[start].children)
        level = found
        while level:
            level = [child for part in level for child in self.parts[part].children if self.parts[child].is_module]
            level = [part for part in level if self.parts[part].changes]
            shown += sum(len(self.parts[part].children) - 1 for part in level)
            if shown > ROOM:
                break
            found += level
        return found

    def unfolded(self, start: int) -> tuple[list[int], dict[tuple[int, int], int], list[tuple[int, int]]]:
        """What is to be seen of a module at first: the parts, the edges between them, from `ENTRY` and to `EXIT`, and the links."""
        opened = set(self.opened(start))
        shown = sorted(child for part in opened for child in self.parts[part].children if child not in opened)
        stands: dict[int, int] = {part: part for part in shown}
        for part, it in enumerate(self.parts):
            if it.parent in stands:  # parents come first
                stands[part] = stands[it.parent]
        edges: dict[tuple[int, int], int] = {}
        for (source, target), sides in self.edges.items():
            edge = stands.get(source, ENTRY), stands.get(target, EXIT)
            if edge[0] != edge[1] and edge != (ENTRY, EXIT):
                edges[edge] = edges.get(edge, 0) | sides
        links = {(stands[source], stands[target]): None for source, target in self.links if source in stands and target in stands}
        return shown, edges, [link for link in links if link[0] != link[1]]

    def module(self, path: str) -> int:
        """The number of a module. Raises `PeFxError` where there is none to be drawn."""
        path = {new: old for old, new in self.after_name.items()}.get(path, path)
        inside = (part for part, it in enumerate(self.parts) if it.is_module and (it.module == path or it.module.startswith(f"{path}.")))
        found = self.modules.get(path, next(inside, None))
        if found is None:
            raise PeFxError(f"there is nothing to draw in module {path!r}: it has no operations, or one alone")
        return found

    def levels(self) -> Iterator[tuple[int, dict[int, Point], Routes]]:
        """For each module where its children stand, with `ENTRY` and `EXIT` where it has them, and how edges go between them."""
        inside: dict[int, dict[tuple[int, int], None]] = {part: {} for part, it in enumerate(self.parts) if it.is_module}
        for source, target in self.edges:
            above, below = self.chain(source), self.chain(target)
            while len(above) > 1 and len(below) > 1 and above[-2] == below[-2]:
                above.pop()
                below.pop()
            for inner, outer in itertools.pairwise(above[:-1]):
                inside[outer][inner, EXIT] = None
            for inner, outer in itertools.pairwise(below[:-1]):
                inside[outer][ENTRY, inner] = None
            inside[above[-1]][above[-2], below[-2]] = None
        for part, edges in inside.items():
            ends = {end for edge in edges for end in edge}
            ordered = [ENTRY, *self.parts[part].children, EXIT]
            points, routes = layered([end for end in ordered if end >= 0 or end in ends], edges)
            yield part, points, routes


def _nodes(diff: Diff) -> list[tuple[str | None, str | None, str]]:
    """Every operation once, in dataflow order: its id before and after, and its module."""
    partner = {other: id for id, other in diff.pairs.items()}
    homes = _homes(diff)
    order = {id: place for place, id in enumerate(diff.before.nodes)}
    found: list[tuple[int, int, str | None, str | None, str]]
    found = [(order[id], -1, id, diff.pairs.get(id), node.module) for id, node in diff.before.nodes.items()]
    last = -1
    for place, (id, node) in enumerate(diff.after.nodes.items()):
        if id in partner:
            last = order[partner[id]]
        else:
            known = next((path for path in reversed(path_to(node.module)) if path in homes), "")
            module = f"{homes.get(known, '')}{node.module.removeprefix(known)}"
            found.append((last, place, None, id, module))
    found.sort(key=lambda entry: entry[:2])
    return [entry[2:] for entry in found]


def _links(diff: Diff, of_before: dict[str, int]) -> list[tuple[int, int]]:
    """From the first operation that applies the source of a tie to each that applies what is tied to it."""
    applied = {name: [of_before[id] for id in ids] for name, ids in diff.before.readers.items()}
    return [
        (source, target)
        for name, views in diff.shared.items()
        for source in applied.get(name, ())[:1]
        for view in views
        for target in applied.get(view, ())
        if source != target
    ]


def _inside(path: str, outer: str) -> str:
    """
    >>> _inside("blocks.0.fc1", "blocks.0"), _inside("blocks.0", "blocks.0")
    ('fc1', '')
    """
    return within(f"{path}.", outer).removesuffix(".") if path != outer else ""


def _homes(diff: Diff) -> dict[str, str]:
    """What modules of the second graph are called in the first."""
    homes: dict[str, str] = {}
    for id, other in diff.pairs.items():
        old, new = diff.before.nodes[id].module, diff.after.nodes[other].module
        while new and old and new not in homes:
            homes[new] = old
            if new.rpartition(".")[2] != old.rpartition(".")[2]:
                break
            new, old = new.rpartition(".")[0], old.rpartition(".")[0]
    return homes


def layered(parts: list[int], edges: Iterable[tuple[int, int]]) -> tuple[dict[int, Point], Routes]:
    """Where parts in dataflow order stand, and where edges bend that pass a layer.

    >>> layered([7, 8, 9], [(7, 8), (8, 9), (7, 9)])
    ({7: (0.25, 0), 8: (0.75, 1), 9: (0.25, 2)}, {(7, 8): [], (7, 9): [(0.0, 1)], (8, 9): []})

    An edge against the order, as modules have that run twice, is laid out like one along it: the layout knows no cycles.
    Raises `PeFxError` where fast-sugiyama is missing.
    """
    try:
        from fast_sugiyama import from_edges
    except ImportError as error:
        raise PeFxError("graphs are laid out with fast-sugiyama: pip install 'pe_fx[cli]'") from error
    number = {part: place for place, part in enumerate(parts)}
    forward = {(min(pair), max(pair)) for source, target in edges if (pair := (number[source], number[target]))[0] != pair[1]}
    pieces: nx.Graph[int] = nx.Graph(_shortest(len(parts), forward))
    where: dict[int, Point] = {}
    routes: Routes = {}
    left = 0.0
    for piece in sorted(map(sorted, nx.connected_components(pieces))):
        index = {place: at for at, place in enumerate(piece)}  # the layout counts from 0 without gaps, and bends from there on
        pairs = sorted((index[a], index[b]) for a, b in map(sorted, pieces.subgraph(piece).edges))
        ((positions, *_, drawn),) = from_edges(pairs, vertex_spacing=100)
        x0, y0 = min(x for _, (x, _) in positions), max(y for _, (_, y) in positions)
        points = {int(id): (round(left + (x - x0) / 100, 2), round((y0 - y) / 100)) for id, (x, y) in positions}
        left = max(x for x, _ in points.values()) + 1
        where |= {place: points[at] for place, at in index.items()}
        routes |= {(piece[a], piece[b]): bends for a, b, bends in _routes(points, drawn or (), len(piece))}
    alone = (place for place in range(len(parts)) if place not in where)
    where |= {place: (left, layer) for layer, place in enumerate(alone)}
    return {part: where[place] for place, part in enumerate(parts)}, {(parts[a], parts[b]): routes[a, b] for a, b in sorted(routes)}


def _shortest(count: int, edges: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """The edges that pass fewest layers, while there is room for their bends; every part keeps one to the layer above."""
    layer = [0] * count
    for source, target in sorted(edges):
        layer[target] = max(layer[target], layer[source] + 1)
    spans = sorted((layer[target] - layer[source], source, target) for source, target in edges)
    passed = itertools.accumulate(span - 1 for span, *_ in spans)
    return {(source, target) for (_, source, target), bends in zip(spans, passed, strict=True) if bends <= BENDS}


def _routes(points: dict[int, Point], drawn: Iterable[tuple[Any, Any]], count: int) -> Iterator[tuple[int, int, list[Point]]]:
    """For each edge its ends and the bends between; what is numbered `count` or more is a bend."""
    following: dict[int, list[int]] = {}
    for source, target in drawn:
        following.setdefault(int(source), []).append(int(target))
    for source in range(count):
        for target in following.get(source, ()):
            bends: list[Point] = []
            while target >= count:
                bends.append(points[target])
                (target,) = following[target]
            yield source, target, bends
