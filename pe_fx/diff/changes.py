"""What differs between two graphs: the model that every view of a diff (terminal, page, viewer) is drawn from.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    >>> diff = diff_transform(model)
    >>> change, = diff.changes
    >>> change.kind, change.module, change.delta
    ('mlp', '', -16384)
    >>> [str(weight) for weight in change.weights]
    ['0.weight (256, 64)', '2.weight (64, 256) → 0.weightᵀ']
    >>> [(edit.before, edit.after, edit.what) for edit in change.edits]
    [('linear_1', 'linear_1', ('weights',))]

How it hangs together:

- `Diff.before` and `Diff.after` are `pe_fx.diff.graph.Graph`s: `nodes` by id in dataflow order, `modules` (path to class name, the
  root is ""), `parameters` (name to shape); `users` and `readers` are their inverse tables. A tied weight is no node: the node that
  applies it has an `Operand` whose text is the view ("fc1.weightᵀ") and whose `names` are the parameters that are read.
- `Diff.pairs` maps ids of `before` to ids of `after`. A node without a partner was removed or added; a partner that does
  something else was changed. Every such node is in exactly one `Edit`, every edit in exactly one `Change`. All other pairs are alike,
  and `edit_of_before`/`edit_of_after` have nothing for them.
- A `Change` is a site of the plan (its `kind` is the rule's: "mlp", "attention", …, its `ties` the plan's), or what differs in one
  module ("added", "removed", "changed"), or a module that only bears another name ("renamed", `module` → `module_after`).
- `Change.weights` are the parameters concerned, with their shapes before and after (None: it is not there) and what a tied one
  now is a view of. The source of a tie is among them, unchanged. `Change.shared_with` are parameters of other changes that are
  the same matrix. `Diff.shared` maps each source of the plan to everything that is a view of it: what to highlight together.
- `Diff.misses` are the plan's near misses (`kind`, `name` of the module, `weights`, `reason`).
- Names are as the models have them, with any characters; views draw `Diff.shown`, where they are printable.

`Diff.to_json()` has all of it under the same names; with `graphs=True` the graphs and pairs, too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from pe_fx.api import apply, plan
from pe_fx.diff.align import align
from pe_fx.diff.graph import Graph, Node, Operand, path_to
from pe_fx.graph.capture import capture
from pe_fx.graph.inputs import ExampleInputs
from pe_fx.text import legible
from pe_fx.ties import Miss, Plan, Shape, Site, gain_of

SCHEMA_VERSION = 1

KINDS = ("added", "removed", "changed", "renamed")
"""The kinds of changes that no rule made."""


@dataclass(frozen=True)
class Edit:
    """A node that is not as it was. `before` and `after` are ids, None where it was added or removed.

    `what` differs in a changed node: any of "weights", "shape", "dtype", "settings", "inputs".
    """

    before: str | None
    after: str | None
    what: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "added" if self.before is None else "removed" if self.after is None else "changed"


@dataclass(frozen=True)
class WeightChange:
    """A parameter with its shape before and after (None: it is not there); `view` is what a tied one is computed from.

    >>> str(WeightChange("fc2.weight", (64, 256), None, "fc1.weightᵀ")), str(WeightChange("fc1.weight", (256, 64), (256, 64)))
    ('fc2.weight (64, 256) → fc1.weightᵀ', 'fc1.weight (256, 64)')
    """

    name: str
    before: Shape | None
    after: Shape | None
    view: str = ""

    @property
    def kind(self) -> str:
        return "added" if self.before is None else "removed" if self.after is None else "changed"

    @property
    def delta(self) -> int:
        """How many parameters more there are."""
        return _numel(self.after) - _numel(self.before)

    def __str__(self) -> str:
        if self.before == self.after:
            return f"{self.name} {self.before}"
        new = f"{self.after}" if self.after is not None else "" if self.view else "none"
        return f"{self.name} {self.before or 'none'} → {', '.join(filter(None, (new, self.view)))}"


@dataclass(frozen=True)
class Change:
    """A site of the plan, or what differs in one module; see the head of this file."""

    kind: str
    module: str
    edits: tuple[Edit, ...]
    weights: tuple[WeightChange, ...]
    ties: tuple[str, ...] = ()
    shared_with: tuple[str, ...] = ()
    treatment: str = ""
    module_after: str = ""

    @property
    def delta(self) -> int:
        """How many parameters more there are."""
        return sum(weight.delta for weight in self.weights)

    @property
    def is_site(self) -> bool:
        return self.kind not in KINDS


@dataclass(frozen=True)
class Diff:
    """Two graphs, which node is which, and what differs; false where nothing does."""

    before: Graph
    after: Graph
    pairs: dict[str, str]
    changes: tuple[Change, ...]
    misses: tuple[Miss, ...] = ()
    shared: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.changes)

    @functools.cached_property
    def edit_of_before(self) -> dict[str, tuple[Change, Edit]]:
        """For each id of `before` that is not as it was, its change and its edit."""
        return {edit.before: (change, edit) for change in self.changes for edit in change.edits if edit.before is not None}

    @functools.cached_property
    def edit_of_after(self) -> dict[str, tuple[Change, Edit]]:
        """As `edit_of_before`, for the ids of `after`."""
        return {edit.after: (change, edit) for change in self.changes for edit in change.edits if edit.after is not None}

    @property
    def delta(self) -> int:
        return self.after.numel - self.before.numel

    @functools.cached_property
    def shown(self) -> Diff:
        """The same with every name `pe_fx.text.legible`: what all views are drawn from."""
        shown = legible(self)
        vars(shown)["shown"] = shown
        return shown

    def to_json(self, *, graphs: bool = False, indent: int | None = None) -> str:
        """The diff as JSON text, with a schema version; with `graphs` the nodes, modules and pairs, too."""
        body: dict[str, Any] = {
            "pe_fx_diff": SCHEMA_VERSION,
            "before": _described(self.before, graphs),
            "after": _described(self.after, graphs),
            "delta": self.delta,
            "changes": [dataclasses.asdict(change) | {"delta": change.delta} for change in self.changes],
            "misses": [dataclasses.asdict(miss) for miss in self.misses],
            "shared": self.shared,
        }
        if graphs:
            body["pairs"] = self.pairs
        return json.dumps(body, ensure_ascii=False, indent=indent)


def diff_transform(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    made: Plan | None = None,
    name: str = "",
    **options: Any,
) -> Diff:
    """What `pe_fx.transform` does to a model; the model is left as it is.

    Takes the options of `pe_fx.plan`, or the plan `made` by it. Raises what that raises.
    """
    captured = capture(model, example_inputs)
    made = plan(model, captured, **options) if made is None else made
    tied = apply(model, made)
    name = name or type(model).__name__
    inputs = captured.example_inputs if example_inputs is None else example_inputs
    return compare(Graph.of(model, captured, name), Graph.of(tied, inputs, f"{name}, tied"), made)


def compare(before: Graph, after: Graph, made: Plan | None = None) -> Diff:
    """The differences of two graphs; those that a plan explains are its sites.

    >>> from torch import nn
    >>> build = lambda: Graph.of(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    >>> bool(compare(build(), build()))
    False
    """
    pairs = align(before, after)
    comparison = _Comparison(before, after, pairs)
    made = made or Plan()
    changes = [*_sites(comparison, made), *_rest(comparison), *_renames(comparison)]
    place = _places(before, after, comparison.partner)
    changes.sort(key=lambda change: min(map(place, change.edits), default=-1))
    shared: dict[str, list[str]] = {}
    for tie in made.ties:
        shared.setdefault(tie.source, []).append(tie.target)
    return Diff(before, after, pairs, tuple(changes), made.misses, {name: tuple(dict.fromkeys(views)) for name, views in shared.items()})


def _places(before: Graph, after: Graph, partner: dict[str, str]) -> Callable[[Edit], float]:
    """Where an edit stands in dataflow order. An added node comes right after the last one before it that both graphs have."""
    mine = {id: float(position) for position, id in enumerate(before.nodes)}
    theirs: dict[str, float] = {}
    last = -1.0
    for id in after.nodes:
        last = mine[partner[id]] if id in partner else last
        theirs[id] = last if id in partner else last + 0.5
    return lambda edit: theirs[edit.after or ""] if edit.before is None else mine[edit.before]


class _Comparison:
    """Edits and parameter differences of two aligned graphs, handed out once."""

    def __init__(self, before: Graph, after: Graph, pairs: dict[str, str]) -> None:
        self.before, self.after, self.pairs = before, after, pairs
        self.partner = {other: id for id, other in pairs.items()}
        self.renamed = self._renamed_parameters()
        self._frontiers: dict[tuple[bool, str], frozenset[str]] = {}
        self.edits = dict.fromkeys(self._edits())
        self.weights = {weight.name: weight for weight in self._weights()}

    def _renamed_parameters(self) -> dict[str, str]:
        """Parameters of `before` whose node in `after` reads one of another name in their place, each a different one."""
        renamed: dict[str, str] = {}
        taken: set[str] = set()
        for id, other in self.pairs.items():
            for mine, theirs in zip(self.before.nodes[id].operands, self.after.nodes[other].operands, strict=False):
                if (mine.view, mine.shape) == (theirs.view, theirs.shape):
                    for old, new in zip(mine.names, theirs.names, strict=True):
                        known = old in self.after.parameters or new in self.before.parameters
                        if not known and old not in renamed and new not in taken:
                            renamed[old] = new
                            taken.add(new)
        return renamed

    def _edits(self) -> Iterator[Edit]:
        for id in self.before.nodes:
            other = self.pairs.get(id)
            what = self._differences(self.before.nodes[id], self.after.nodes[other]) if other is not None else ()
            if other is None or what:
                yield Edit(id, other, what)
        for id in self.after.nodes:
            if id not in self.partner:
                yield Edit(None, id)

    def _differences(self, mine: Node, theirs: Node) -> tuple[str, ...]:
        differs = {
            "weights": [self._in_new_names(operand) for operand in mine.operands] != list(theirs.operands),
            "shape": mine.shape != theirs.shape,
            "dtype": mine.dtype != theirs.dtype,
            "settings": mine.settings != theirs.settings,
            "inputs": [self._seen(id, True) for id in mine.inputs] != [self._seen(id, False) for id in theirs.inputs],
        }
        return tuple(name for name, value in differs.items() if value)

    def _in_new_names(self, operand: Operand) -> Operand:
        return dataclasses.replace(operand, names=tuple(self.renamed.get(name, name) for name in operand.names))

    def _seen(self, id: str, is_before: bool) -> frozenset[str]:
        """Where a value comes from, past nodes that only one graph has: those are edits of their own."""
        graph, known = (self.before, self.pairs) if is_before else (self.after, self.partner)
        stack = [id]
        while stack:
            current = stack[-1]
            if (is_before, current) in self._frontiers:
                stack.pop()
            elif current in known:
                self._frontiers[is_before, current] = frozenset((known[current] if is_before else current,))
            elif waiting := [source for source in graph.nodes[current].inputs if (is_before, source) not in self._frontiers]:
                stack += waiting
            else:
                sources = (self._frontiers[is_before, source] for source in graph.nodes[current].inputs)
                self._frontiers[is_before, current] = frozenset().union(*sources)
        return self._frontiers[is_before, id]

    def _weights(self) -> Iterator[WeightChange]:
        new = set(self.renamed.values())
        for name, shape in self.before.parameters.items():
            after = self.after.parameters.get(name)
            if shape != after and name not in self.renamed:
                yield WeightChange(name, shape, after)
        for name, shape in self.after.parameters.items():
            if name not in self.before.parameters and name not in new:
                yield WeightChange(name, None, shape)

    def nodes_of(self, edit: Edit) -> list[Node]:
        nodes = (self.before.nodes.get(edit.before or ""), self.after.nodes.get(edit.after or ""))
        return [node for node in nodes if node is not None]

    def take(self, edits: Iterable[Edit]) -> tuple[Edit, ...]:
        taken = tuple(edits)
        for edit in taken:
            del self.edits[edit]
        return taken

    def take_weight(self, name: str, view: str = "") -> WeightChange | None:
        weight = self.weights.pop(name, None)
        if weight is None:
            shape = self.before.parameters.get(name)
            weight = None if shape is None else WeightChange(name, shape, self.after.parameters.get(name))
        return weight and dataclasses.replace(weight, view=view)


def _sites(comparison: _Comparison, made: Plan) -> Iterator[Change]:
    """The plan's sites: what reads their weights, and in entry blocks the modules that are put in or taken out."""
    owner = {name: site for site in made.sites for name in site.weights}
    by_site: dict[int, list[Edit]] = {}
    treated = {module: site for site in made.sites if site.entry for module in _treated_modules(site)}
    for edit in comparison.edits:
        site = _site_of(comparison.nodes_of(edit), owner, treated)
        if site is not None:
            by_site.setdefault(id(site), []).append(edit)
    views: dict[str, list[str]] = {}
    groups: dict[str, dict[str, None]] = {}
    for tie in made.ties:
        views.setdefault(tie.target, []).append(str(tie).removeprefix(f"{tie.target} ← "))
        groups.setdefault(tie.source, {tie.source: None})[tie.target] = None
    for site in made.sites:
        extra = [name for name in comparison.weights if any(_is_inside(name, module) for module in _treated_modules(site))]
        gains = [gain_of(tie.target) for tie in site.ties if tie.gain is not None]
        weights = [comparison.take_weight(name, "; ".join(views.get(name, ()))) for name in dict.fromkeys((*site.weights, *extra, *gains))]
        sharing = dict.fromkeys(name for tie in site.ties for name in groups[tie.source])
        yield Change(
            kind=site.kind,
            module=site.name,
            edits=comparison.take(by_site.get(id(site), ())),
            weights=tuple(weight for weight in weights if weight is not None),
            ties=tuple(map(str, site.ties)),
            shared_with=tuple(name for name in sharing if name not in site.weights),
            treatment=site.entry.treatment if site.entry else "",
        )


def _site_of(nodes: list[Node], owner: dict[str, Site], treated: dict[str, Site]) -> Site | None:
    for node in nodes:
        for name in node.names:
            if name in owner:
                return owner[name]
        for path in path_to(node.module):
            if path in treated:
                return treated[path]
    return None


def _treated_modules(site: Site) -> tuple[str, ...]:
    if site.entry is None:
        return ()
    return (*site.entry.convs, *site.entry.norms, f"{site.entry.block}.widen".removeprefix("."))


def _rest(comparison: _Comparison) -> Iterator[Change]:
    """What no site explains, by module."""
    gone = _whole_modules(comparison.before, {edit.before for edit in comparison.edits if edit.kind == "removed"})
    new = _whole_modules(comparison.after, {edit.after for edit in comparison.edits if edit.kind == "added"})
    edits: dict[str, list[Edit]] = {}
    for edit in comparison.edits:
        module = comparison.nodes_of(edit)[0].module
        whole = {"removed": gone, "added": new}.get(edit.kind, set())
        edits.setdefault(next((path for path in path_to(module) if path in whole), module), []).append(edit)
    weights: dict[str, list[WeightChange]] = {}
    for name, weight in comparison.weights.items():
        owner = name.rpartition(".")[0]
        readers = [graph.nodes[id].module for graph in (comparison.before, comparison.after) for id in graph.readers.get(name, ())]
        place = next((path for module in (owner, *readers) for path in path_to(module) if path in edits), owner)
        weights.setdefault(place, []).append(weight)
    for module in dict.fromkeys((*edits, *weights)):
        own, changed = edits.get(module, []), weights.get(module, [])
        kinds = {edit.kind for edit in own} | {weight.kind for weight in changed}
        kind = kinds.pop() if len(kinds) == 1 else "changed"
        yield Change(kind, module, tuple(own), tuple(_with_view(comparison, weight) for weight in changed))


def _whole_modules(graph: Graph, ids: Collection[str | None]) -> set[str]:
    """The modules all of whose nodes are among `ids`."""
    counts: Counter[str] = Counter()
    among: Counter[str] = Counter()
    for node in graph.nodes.values():
        counts.update(path_to(node.module))
        if node.id in ids:
            among.update(path_to(node.module))
    return {module for module, count in among.items() if count == counts[module]}


def _with_view(comparison: _Comparison, weight: WeightChange) -> WeightChange:
    """A weight that went, with what its node reads in its place: another, or a view of others."""
    for id in comparison.before.readers.get(weight.name, ()):
        other = comparison.pairs.get(id)
        if other is None:
            continue
        mine = [operand for operand in comparison.before.nodes[id].operands if weight.name in operand.names]
        new = (operand for operand in comparison.after.nodes[other].operands if operand not in comparison.before.nodes[id].operands)
        theirs = [operand for operand in new if operand.shape == mine[0].shape]
        if theirs and weight.after != weight.before:
            return dataclasses.replace(weight, view=str(theirs[0]))
    return weight


def _renames(comparison: _Comparison) -> Iterator[Change]:
    """Modules whose nodes are alike and whose paths differ, by the part of the paths that does."""
    seen: dict[tuple[str, str], None] = {}
    for id, other in comparison.pairs.items():
        old, new = comparison.before.nodes[id].module, comparison.after.nodes[other].module
        if old != new:
            seen[_differing(old, new)] = None
    for old, new in seen:
        yield Change("renamed", old, (), (), module_after=new)


def _differing(old: str, new: str) -> tuple[str, str]:
    """
    >>> _differing("blocks.0.fc1", "encoder.blocks.0.fc1")
    ('', 'encoder')
    """
    mine, theirs = old.split(".") if old else [], new.split(".") if new else []
    while mine and theirs and mine[-1] == theirs[-1]:
        mine.pop()
        theirs.pop()
    return ".".join(mine), ".".join(theirs)


def _is_inside(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _numel(shape: Shape | None) -> int:
    return 0 if shape is None else math.prod(shape)


def _described(graph: Graph, whole: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"name": graph.name, "nodes": len(graph.nodes), "parameters": graph.numel}
    if whole:
        body |= {"graph": [dataclasses.asdict(node) for node in graph.nodes.values()], "modules": graph.modules}
        body |= {"shapes": graph.parameters}
    return body
