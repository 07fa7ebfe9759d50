"""Two graphs as one outline by module, for views that fold: every line stands for the same place before and after."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pe_fx.diff.changes import Change, Diff, Edit
from pe_fx.diff.graph import Graph, Node, path_to
from pe_fx.diff.tree import shaped, signed, within
from pe_fx.ties import Shape


@dataclass(eq=False)
class Item:
    """A module with what is inside it, or an operation with its node before and after (None: it is not there).

    A module that runs nothing but one operation is one item with it. `module_after` is the module's path after, where the graph has it;
    `changes` are those of the module itself, `edit` is what became of the operation, `place` counts the items from the top.
    """

    name: str
    module: str
    module_after: str | None = None
    parent: Item | None = None
    before: Node | None = None
    after: Node | None = None
    changes: list[Change] = field(default_factory=list)
    edit: Edit | None = None
    children: list[Item] = field(default_factory=list)
    is_open: bool = False
    place: int = 0

    @property
    def is_operation(self) -> bool:
        return self.before is not None or self.after is not None

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    def around(self) -> Iterator[Item]:
        """The items that it is in, innermost first."""
        if self.parent is not None:
            yield self.parent
            yield from self.parent.around()

    def walk(self, *, opened: bool = False) -> Iterator[Item]:
        """Itself and what is inside; with `opened`, inside what is unfolded."""
        yield self
        if self.is_open or not opened:
            for child in self.children:
                yield from child.walk(opened=opened)


class Outline:
    """The items of a diff, in dataflow order inside their modules.

    >>> from torch import nn
    >>> from pe_fx.diff.changes import diff_transform
    >>> outline = Outline(diff_transform(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))))
    >>> [item.name for item in outline.items]
    ['Sequential', 'input', '0 linear', '1 gelu', '2 linear', 'output']
    >>> print(*outline.columns(outline.items[4]), sep=" | ")
    2.weight 64×256, 2.bias 64 → 2×64 | 0.weightᵀ 64×256, 2.bias 64 → 2×64
    """

    def __init__(self, diff: Diff) -> None:
        self.diff = diff = diff.shown
        classes = diff.after.modules | diff.before.modules
        self.root = Item(classes.get("") or "model", "", is_open=True)
        self.modules = {"": self.root}
        for before, after in aligned(diff):
            self._hang_up(before, after)
        for item in [item for item in self.modules.values() if item.parent is not None and len(item.children) == 1]:
            _merge(item)
        self.items = list(self.root.walk())
        of_edit = {item.edit: item for item in self.items if item.edit is not None}
        for change in diff.changes:
            is_alone = len(change.edits) == 1 and not change.is_site
            (of_edit[change.edits[0]] if is_alone else self.at(change.module)).changes.append(change)
        for place, item in enumerate(self.items):
            item.place = place
        self.of_after = {item.after.id: item for item in self.items if item.after is not None}
        self.changed = [item for item in self.items if item.changes]
        self._counts = [_numel_by_module(graph) for graph in (diff.before, diff.after)]
        self._texts = {
            item: " ".join((item.module, item.name, *map(str, self.columns(item)), *self.kinds(item))).lower() for item in self.items
        }
        for item in self.changed:
            self.reveal(item)

    def _hang_up(self, before: Node | None, after: Node | None) -> None:
        node = before or after
        assert node is not None
        parent = self.root
        for path in path_to(node.module) if node.module else ():
            if path not in self.modules:
                self.modules[path] = Item(path.rpartition(".")[2], path, parent=parent)
                parent.children.append(self.modules[path])
            parent = self.modules[path]
        found = self.diff.edit_of_before.get(node.id) if before else self.diff.edit_of_after.get(node.id)
        item = Item(node.op, node.module, None, parent, before, after, edit=found[1] if found else None)
        parent.children.append(item)
        path = after.module if after else node.module
        for outer in item.around():
            if after and outer.module_after is None:
                outer.module_after = path
            path = path.rpartition(".")[0]

    def at(self, module: str) -> Item:
        """The innermost item around a module."""
        return next((self.modules[path] for path in reversed(path_to(module)) if path in self.modules), self.root)

    def visible(self) -> list[Item]:
        return list(self.root.walk(opened=True))

    def reveal(self, item: Item) -> None:
        """Unfolds what an item is in."""
        for outer in item.around():
            outer.is_open = True

    def reveal_change(self, item: Item) -> None:
        """Unfolds a module as far as its changes go."""
        for inner in item.walk():
            if inner.edit:
                self.reveal(inner)

    def matches(self, text: str) -> list[Item]:
        """The items whose path, operation, weights, shapes or rule have the text in them, upper or lower case."""
        return [item for item in self.items if text.lower() in self._texts[item]]

    def sharing(self, item: Item) -> set[Item]:
        """The operations that read the same parameters as this one, or as the site at this module does; itself among them."""
        inside = item.walk() if item.changes else (item,)
        names = {name for one in inside if one.after is not None for name in one.after.names}
        groups = [self.diff.after.readers[name] for name in names]
        return {self.of_after[id] for ids in groups if len(ids) > 1 for id in ids}

    def kinds(self, item: Item) -> list[str]:
        return [f"{change.kind} ({change.treatment})" if change.treatment else change.kind for change in item.changes]

    def note(self, item: Item) -> str:
        """The rules at a module, and how many parameters more or fewer there are in it."""
        is_module = item.module in self.modules and self.modules[item.module] is item
        delta = self._numel(self.diff.after, item) - self._numel(self.diff.before, item) if is_module else 0
        return "  ".join((*self.kinds(item), *([signed(delta)] if delta else ())))

    def columns(self, item: Item) -> tuple[str | None, str | None]:
        """What to say of an item before and after: an operation's weights and shapes, a module's class and parameters."""
        if item.is_operation:
            around = item.parent or self.root
            return _brief(item.before, around.module), _brief(item.after, self._path(self.diff.after, around))
        return self._module(self.diff.before, item), self._module(self.diff.after, item)

    def _path(self, graph: Graph, item: Item) -> str:
        return item.module if graph is self.diff.before or item.module_after is None else item.module_after

    def _numel(self, graph: Graph, item: Item) -> int:
        return self._counts[graph is self.diff.after][self._path(graph, item)]

    def _module(self, graph: Graph, item: Item) -> str | None:
        path, numel = self._path(graph, item), self._numel(graph, item)
        if path not in graph.modules:
            return None
        name = graph.modules[path] if path == item.module else f"{path or 'the model'}  {graph.modules[path]}"
        return f"{name}  {numel:,} params" if numel else name

    def details(self, item: Item) -> Iterator[tuple[str, str]]:
        """Everything about an item as lines, each with its role: "site", "before", "after", "note" or "line"."""
        if item.is_operation:
            yield from self._operation(item)
        else:
            yield "site", item.module or item.name
            yield from _both(*self.columns(item))
        for change in self._changes_at(item):
            yield from self._change(change)
        if item.is_operation:
            yield from self._surroundings(item)
            return
        inside = Counter(change.kind for inner in item.walk() if inner is not item for change in inner.changes)
        if inside:
            yield "line", f"inside: {', '.join(f'{count} {kind}' for kind, count in inside.items())}"
        for miss in self.diff.misses:
            if item.module in ("", miss.name) or miss.name.startswith(f"{item.module}."):
                yield "note", f"near miss: {miss.name or '.'}  {miss.kind}"
                yield "line", f"  {miss.reason}"

    def _changes_at(self, item: Item) -> list[Change]:
        """The changes of a module itself; of an operation, the one that it is part of."""
        if item.changes or item.edit is None:
            return item.changes
        return [change for change in self.diff.changes if item.edit in change.edits]

    def _operation(self, item: Item) -> Iterator[tuple[str, str]]:
        node = item.after or item.before
        assert node is not None
        what = ": " + ", ".join(item.edit.what) if item.edit and item.edit.what else ""
        fate = f"  ({item.edit.kind}{what})" if item.edit else ""
        yield "site", f"{node.op} in {item.module or 'the model'}{fate}"
        yield from _both(_full(item.before), _full(item.after))

    def _surroundings(self, item: Item) -> Iterator[tuple[str, str]]:
        """Who reads the same parameters, where the values come from and where they go."""
        graph = self.diff.after if item.after else self.diff.before
        node = item.after or item.before
        assert node is not None
        for name in node.names:
            readers = [graph.nodes[id] for id in graph.readers[name]]
            if len(readers) > 1:
                views = (f"{operand} ({_place(reader)})" for reader in readers for operand in reader.operands if name in operand.names)
                yield "note", f"shared: {name} {shaped(graph.parameters.get(name, ()))} is read as {', '.join(views)}"
        for title, ids in (("reads", node.inputs), ("read by", graph.users[node.id])):
            if ids:
                yield "line", f"{title}: {', '.join(_place(graph.nodes[id]) for id in ids)}"

    def _change(self, change: Change) -> Iterator[tuple[str, str]]:
        where = change.module or "the model"
        to = f" → {change.module_after or 'the model'}" if change.kind == "renamed" else ""
        delta = f": {signed(change.delta)} parameters" if change.delta else ""
        treatment = f" ({change.treatment})" if change.treatment else ""
        yield "note", f"{change.kind}{treatment}  {where}{to}{delta}"
        for weight in change.weights:
            yield from _both(_weight(weight.name, weight.before), _weight(weight.name, weight.after))
        for tie in change.ties:
            yield "after", f"+ {tie}"
        if change.shared_with:
            yield "line", f"  shared with {', '.join(change.shared_with)}"


def aligned(diff: Diff) -> Iterator[tuple[Node | None, Node | None]]:
    """The nodes of both graphs, partners together, in dataflow order; an added node comes after the last one that both have.

    >>> from torch import nn
    >>> from pe_fx.diff.changes import compare
    >>> less, more = Graph.of(nn.Sequential(nn.Linear(4, 4))), Graph.of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    >>> [(before and before.op, after and after.op) for before, after in aligned(compare(less, more))]
    [('input', 'input'), ('linear', 'linear'), (None, 'relu'), ('output', 'output')]
    """
    partner = {other: id for id, other in diff.pairs.items()}
    added: dict[str | None, list[Node]] = {}
    last: str | None = None
    for id, node in diff.after.nodes.items():
        last = partner.get(id, last)
        if id not in partner:
            added.setdefault(last, []).append(node)
    yield from ((None, node) for node in added.get(None, ()))
    for id, node in diff.before.nodes.items():
        yield node, diff.after.nodes[diff.pairs[id]] if id in diff.pairs else None
        yield from ((None, node) for node in added.get(id, ()))


def _merge(item: Item) -> None:
    """Makes a module and the one operation in it one item."""
    (only,) = item.children
    if only.is_operation and not only.children:
        item.name, item.before, item.after, item.edit = f"{item.name} {only.name}", only.before, only.after, only.edit
        item.children = []


def _numel_by_module(graph: Graph) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, shape in graph.parameters.items():
        for path in {"", *path_to(name.rpartition(".")[0])}:
            counts[path] += math.prod(shape)
    return counts


def _brief(node: Node | None, module: str) -> str | None:
    """An operation's weights, named as inside the module, and the shape of its value."""
    if node is None:
        return None
    operands = ", ".join(f"{within(str(operand), module)} {shaped(operand.shape)}" for operand in node.operands)
    return f"{operands} → {shaped(node.shape)}".strip()


def _full(node: Node | None) -> str | None:
    if node is None:
        return None
    operands = ", ".join(f"{operand} {shaped(operand.shape)}" for operand in node.operands)
    settings = f"({node.settings})" if node.settings else ""
    return " ".join(filter(None, (node.id, operands, settings, f"→ {shaped(node.shape)} {node.dtype}".rstrip())))


def _weight(name: str, shape: Shape | None) -> str | None:
    return None if shape is None else f"{name} {shaped(shape)}"


def _place(node: Node) -> str:
    return f"{node.op} in {node.module}" if node.module else node.op


def _both(before: str | None, after: str | None) -> Iterable[tuple[str, str]]:
    """What is there before and after, once where it is the same."""
    if before == after:
        return [("line", f"  {before}")]
    sides = (("before", "-", before), ("after", "+", after))
    return [(role, f"{mark} {text}") for role, mark, text in sides if text is not None]
