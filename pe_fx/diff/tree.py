"""The lines of a diff: a tree by module path in which only what changed is unfolded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from pe_fx.diff.changes import Change, Diff, WeightChange
from pe_fx.diff.graph import Graph, Node, Operand, path_to
from pe_fx.ties import Shape

LONGEST = 12
"""Lines of one change that are shown."""


@dataclass(frozen=True)
class Row:
    """One line: what stands there before and after (None: nothing), both alike for context, and a note at its end.

    `role` is "line", "module" (a module that is unfolded), "site" (one that changed) or "folded" (what is left out).
    """

    depth: int
    before: str | None
    after: str | None
    note: str = ""
    role: str = "line"

    @property
    def is_context(self) -> bool:
        return self.before == self.after


@dataclass
class Branch:
    """A module on the way to a change."""

    path: str
    changes: list[Change] = field(default_factory=list)
    children: dict[str, Branch] = field(default_factory=dict)

    @property
    def delta(self) -> int:
        return sum(change.delta for change in self.changes) + sum(child.delta for child in self.children.values())


def rows(diff: Diff, *, fold: bool = True) -> list[Row]:
    """The tree as lines; with `fold`, blocks that changed like the one before them are named alone."""
    diff = diff.shown
    return list(_Tree(diff, fold).branch(grown(diff), 0)) if diff else []


def grown(diff: Diff) -> Branch:
    """The changes hung up at their module paths."""
    root = Branch("")
    for change in diff.changes:
        branch = root
        for path in path_to(change.module) if change.module else ():
            branch = branch.children.setdefault(path, Branch(path))
        branch.changes.append(change)
    return root


def signed(number: int) -> str:
    """
    >>> signed(-1234), signed(5), signed(0)
    ('−1,234', '+5', '0')
    """
    return f"{number:+,}".replace("-", "−") if number else "0"


class _Tree:
    def __init__(self, diff: Diff, fold: bool) -> None:
        self.diff, self.fold = diff, fold
        self.modules = diff.after.modules | diff.before.modules
        self.children: dict[str, list[str]] = {}
        present = {path for graph in (diff.before, diff.after) for node in graph.nodes.values() for path in path_to(node.module)}
        for path in diff.before.modules | diff.after.modules:
            if path in present and path:
                self.children.setdefault(path.rpartition(".")[0], []).append(path)
        self.touched = set(self._touched())
        self.home = {weight.name: change.module for change in diff.changes for weight in change.weights}

    def _touched(self) -> Iterator[str]:
        """The modules that hold a change, and those around them."""
        for change in self.diff.changes:
            yield from path_to(change.module)
            for weight in change.weights:
                yield from path_to(weight.name)
            for edit in change.edits:
                for graph, id in ((self.diff.before, edit.before), (self.diff.after, edit.after)):
                    if id is not None:
                        yield from path_to(graph.nodes[id].module)

    def branch(self, branch: Branch, depth: int) -> Iterator[Row]:
        for change in branch.changes:
            yield from self.change(change, depth)
        if not branch.children:
            return
        if not branch.changes:
            title = self.title(branch.path)
            yield Row(depth, title, title, role="module")
        previous: list[Row] = []
        alike: list[Branch] = []
        for path, others in itertools.groupby(self.order(branch), lambda path: path if path in branch.children else None):
            if path is None:
                names = ", ".join(other.rpartition(".")[2] for other in others)
                yield from self.folded(alike, depth + 1)
                alike, previous = [], []
                yield Row(depth + 1, f"· {names}", f"· {names}", role="folded")
                continue
            child = branch.children[path]
            inner = list(self.branch(child, depth + 1))
            if self.fold and alike and self.same(previous, inner):
                alike.append(child)
                continue
            yield from self.folded(alike, depth + 1)
            yield from inner
            alike, previous = [child], inner
        yield from self.folded(alike, depth + 1)

    def order(self, branch: Branch) -> list[str]:
        """The modules inside, in the model's order, with those that only changes name at the end."""
        known = self.children.get(branch.path, [])
        shown = [path for path in known if path in branch.children or path not in self.touched]
        return [*shown, *(path for path in branch.children if path not in known)]

    def same(self, previous: list[Row], inner: list[Row]) -> bool:
        """Whether two blocks changed alike, whatever their own names."""
        return previous[1:] == inner[1:] and previous[0].note == inner[0].note

    def folded(self, alike: list[Branch], depth: int) -> Iterator[Row]:
        """One line for all blocks but the first."""
        if len(alike) < 2:
            return
        first, *others = alike
        span = others[0].path if len(others) == 1 else f"{others[0].path} … {others[-1].path}"
        text = f"{span}: as {first.path}"
        times = f"{len(others)} × " if len(others) > 1 else ""
        yield Row(depth, text, text, f"{times}{signed(first.delta)}", role="folded")

    def title(self, path: str) -> str:
        kind = self.modules.get(path, "")
        return f"{path.rpartition('.')[2]}  {kind}".strip()

    def change(self, change: Change, depth: int) -> Iterator[Row]:
        title = self.title(change.module)
        kind = f"{change.kind} ({change.treatment})" if change.treatment else change.kind
        if change.kind == "renamed":
            yield Row(depth, title or "the model", f"{title or 'the model'} → {change.module_after or 'the model'}", kind, role="site")
            return
        note = f"{kind}  {signed(change.delta)}" if change.is_site or change.delta else kind
        yield Row(depth, title, title, note, role="site")
        lines = [*self.sharing(change, depth + 1), *self.weights(change, depth + 1), *self.nodes(change, depth + 1)]
        yield from lines[:LONGEST]
        if len(lines) > LONGEST:
            text = f"… {len(lines) - LONGEST} more lines"
            yield Row(depth + 1, text, text, role="folded")

    def sharing(self, change: Change, depth: int) -> Iterator[Row]:
        """Which matrix the change has in common with whom."""
        own = {weight.name for weight in change.weights}
        for source, views in self.diff.shared.items():
            group = (source, *views)
            if own.intersection(group) and not own.issuperset(group):
                homes = list(dict.fromkeys(self.home.get(name, name.rpartition(".")[0]) for name in group))
                shown = homes if len(homes) < 5 else [homes[0], "…", homes[-1]]
                text = f"shared: {source}, by {', '.join(shown)}"
                yield Row(depth, text, text)

    def weights(self, change: Change, depth: int) -> Iterator[Row]:
        for weight in change.weights:
            name = within(weight.name, change.module)
            op = self.reader(weight)
            start = f"{op}  {name}" if op else name
            before = None if weight.before is None else f"{start} {shaped(weight.before)}"
            after = None if weight.after is None else f"{start} {shaped(weight.after)}"
            if weight.view:
                views = within(weight.view, change.module)
                after = f"{start} ← {views}" if weight.after is None else f"{after}, {views}"
            yield Row(depth, before, after)

    def reader(self, weight: WeightChange) -> str:
        """The operations that apply a weight."""
        for graph in (self.diff.before, self.diff.after):
            ops = dict.fromkeys(graph.nodes[id].op for id in graph.readers.get(weight.name, ()))
            if ops:
                return "/".join(ops)
        return ""

    def nodes(self, change: Change, depth: int) -> Iterator[Row]:
        """The nodes that its weights do not stand for."""
        concerned = {weight.name for weight in change.weights}
        for edit in change.edits:
            before = self.diff.before.nodes.get(edit.before or "")
            after = self.diff.after.nodes.get(edit.after or "")
            what = set(edit.what)
            if not concerned.isdisjoint(name for node in (before, after) if node for name in node.names):
                what.discard("weights")
                if not what:
                    continue
            told = what if edit.kind == "changed" else {"shape"}
            old, new = _described(before, told, change.module, self.diff.before), _described(after, told, change.module, self.diff.after)
            yield Row(depth, old, new)


def _described(node: Node | None, what: set[str], module: str, graph: Graph) -> str | None:
    """A node with what is to be told of it."""
    if node is None:
        return None
    where = within(node.module, module) if node.module != module else ""
    parts = [f"{node.op}  {where}".rstrip()]
    if "shape" in what:
        parts.append(shaped(node.shape))
    if "dtype" in what:
        parts.append(node.dtype)
    if "settings" in what:
        parts.append(f"({node.settings})")
    if "weights" in what:
        parts.append(", ".join(_operand(operand, module) for operand in node.operands) or "no weights")
    if "inputs" in what:
        parts.append(f"of {', '.join(_source(graph.nodes[id]) for id in node.inputs)}")
    return " ".join(parts)


def _operand(operand: Operand, module: str) -> str:
    return f"{within(str(operand), module)} {shaped(operand.shape)}"


def _source(node: Node) -> str:
    return f"{node.op} in {node.module}" if node.module else node.op


def shaped(shape: Shape) -> str:
    """
    >>> shaped((64, 3, 7, 7)), shaped(())
    ('64×3×7×7', 'scalar')
    """
    return "×".join(map(str, shape)) or "scalar"


def within(text: str, module: str) -> str:
    """Parameter names as they are called inside the module.

    >>> within("0.fc1.weightᵀ; 10.fc1.weight", "0")
    'fc1.weightᵀ; 10.fc1.weight'
    """
    return re.sub(rf"(?<![\w.]){re.escape(module)}\.", "", text) if module else text
