"""The dataflow view that passes read: operations of known kinds, the weights they apply, and how they dominate one another.

Only values that depend on the model's inputs are part of the flow. What is computed from parameters and constants alone (a
chunk of `in_proj_weight`, a standardised kernel, a rotary table) is folded into the operation that uses it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, fx

from pe_fx.graph.capture import Captured
from pe_fx.graph.channels import Channels, transfer
from pe_fx.graph.operation import Op, is_floating, is_tensor, shape_of
from pe_fx.graph.ops import GATHERS, KINDS, SHAPE_OF_SECOND, Kind, base_name, is_in_place, value_of
from pe_fx.graph.plain import memory_chain, written_whole
from pe_fx.graph.tags import numbered
from pe_fx.graph.walks import encloses, immediate_dominators, nested, reached
from pe_fx.graph.weights import Static, attach_weight
from pe_fx.ties import Block, Site, Tie

Test = Callable[[Op], bool]

_ELEMENTWISE = (Kind.POINTWISE, Kind.NONLINEAR, Kind.PRODUCT)
_HAVE_WEIGHTS = (Kind.PROJECTION, Kind.CONV, Kind.LOOKUP)


@dataclass(frozen=True)
class Claim:
    """A part of a parameter that a site ties away (`is_target`) or reads in its place."""

    block: Block
    site: Site
    is_target: bool


class Flow:
    """The operations of a captured graph, in order, with their dominance relations.

    As rules find sites, `claimed` says of each parameter which parts of it are taken, and `found` holds the ties that were found, made
    or not; `carriers` are the operations that are a step to other patterns, `spare` those among them where patterns may end all the same.
    `applied` are the matrices of a site, where its ties do not name them all.
    """

    def __init__(self, captured: Captured) -> None:
        self.ops: list[Op] = []
        self.readers: dict[str, list[Op]] = {}
        self.claimed: dict[str, list[Claim]] = {}
        self.found: set[Tie] = set()
        self.applied: dict[Site, tuple[Block, ...]] = {}
        self.carriers: dict[Op, None] = {}  # in the order in which they were found
        self.spare: set[Op] = set()
        self._of_node: dict[fx.Node, Op] = {}
        self._between: dict[tuple[Op, Op], tuple[Op, ...]] = {}
        self._traces: dict[Op, tuple[dict[Op, Channels], int]] = {}  # and how many carriers there were
        self._build(captured)
        self._dominance()

    # ---- what is taken

    def claim(self, site: Site, ties: Collection[Tie]) -> None:
        """Of the pattern `site`, these ties are made: what they tie is taken from here on.

        Who applies its weights is one step to the patterns around it, and if its tie is not made, an end of other patterns, too.
        """
        self.found.update(site.ties)
        tied = {block.name for tie in site.ties for block in (tie.into, tie.of)}
        self.carry(op for name in site.weights if name not in tied for op in self.readers[name] if op.weight is not None)
        for tie in site.ties:
            self.carry(self._applying(tie))
            if tie not in ties:
                self.spare |= self._applying(tie)
                continue
            for block in (tie.into, tie.of):
                self.claimed.setdefault(block.name, []).append(Claim(block, site, block is tie.into))

    def carry(self, ops: Iterable[Op]) -> None:
        """From here on these operations are a step to other patterns."""
        self.carriers.update(dict.fromkeys(ops))

    def owner(self, block: Block) -> Site | None:
        """The site to which a part of the block belongs."""
        return next((claim.site for claim in self.claimed.get(block.name, ()) if claim.block.overlaps(block)), None)

    def is_made(self, tie: Tie) -> bool:
        return any(claim.is_target and tie in claim.site.ties for claim in self.claimed.get(tie.target, ()) if claim.block == tie.into)

    def clash(self, site: Site, tie: Tie) -> str | None:
        """Why a tie cannot be made beside those that are. Several sites of one kind may read the same rows, none else."""
        for block in (tie.into, tie.of):
            for claim in self.claimed.get(block.name, ()):
                both_read = block is tie.of and not claim.is_target and claim.site.kind == site.kind
                if claim.block.overlaps(block) and not both_read:
                    return f"{block} {taken_by(claim.site)}"
        beside = [claim.block for claim in self.claimed.get(tie.target, ()) if claim.is_target]
        if len({dim for block in (*beside, tie.into) for dim in block.divided}) > 1:
            return f"{', '.join(map(str, (*beside, tie.into)))} would be tied: a weight is divided along one dimension only"
        return None

    @property
    def progress(self) -> tuple[int, ...]:
        """All of it only grows: the numbers tell the sets."""
        return sum(map(len, self.claimed.values())), len(self.carriers), len(self.spare)

    def _applying(self, tie: Tie) -> set[Op]:
        blocks = (tie.into, tie.of)
        return {op for block in blocks for op in self.readers[block.name] if op.weight is not None and op.weight.block.overlaps(block)}

    # ---- construction

    def _build(self, captured: Captured) -> None:
        static = Static(captured)
        resolved = live_operands(captured.graph, effects=True)
        output = next(iter(captured.graph.find_nodes(op="output")))
        reached = set(captured.inputs)
        chosen_by: list[Op] = []
        for node, operands in resolved.items():
            if not reached.isdisjoint(operands):
                reached.add(node)
            name = base_name(node) if node.op.startswith("call") else ""
            if not self._is_value(node, name, operands, captured, reached):
                if name in GATHERS:  # a value that chooses rows of a table is read there
                    chosen_by += [self._of_node[operand] for operand in operands if operand in self._of_node]
                continue
            op = self._op(node, name, operands, static)
            self.ops.append(op)
            self._of_node[node] = op
            if others := [operand for operand in operands if operand not in self._of_node]:
                op.parameters = tuple([name for operand in others for name in static.parameters(operand)])
                for name in dict.fromkeys(op.parameters):
                    self.readers.setdefault(name, []).append(op)
        self.results = [self._of_node[node] for node in resolved[output] if node in self._of_node] + chosen_by
        returned = Op(len(self.ops), output, "the output", Kind.OTHER, (), ())
        for node in resolved[output]:
            for name in static.parameters(node) if node not in self._of_node else ():
                self.readers.setdefault(name, []).append(returned)
        self.users: dict[Op, list[Op]] = {op: [] for op in self.ops}
        for op in self.ops:
            for source in dict.fromkeys(op.inputs):
                self.users[source].append(op)

    def _is_value(self, node: fx.Node, name: str, operands: list[fx.Node], captured: Captured, reached: set[fx.Node]) -> bool:
        if node.op == "placeholder":
            return node in captured.inputs and is_floating(value_of(node))
        if node.op == "output" or not is_tensor(value_of(node)):
            return False
        kind = KINDS.get(name)
        if kind in (Kind.PROJECTION, Kind.CONV) or (kind is Kind.LOOKUP and node in reached):
            return True
        if name in GATHERS:  # which rows of a table are taken makes them no value of another origin
            return operands[0] in self._of_node
        return kind is not Kind.CONSTANT and not self._of_node.keys().isdisjoint(operands)

    def _op(self, node: fx.Node, name: str, operands: list[fx.Node], static: Static) -> Op:
        kind = KINDS.get(name, Kind.OTHER) if name else Kind.INPUT
        values = tuple(self._of_node.get(operand) for operand in operands)
        if name in SHAPE_OF_SECOND:
            values = (values[0], *[None] * (len(values) - 1))
        if kind is Kind.NORM:  # its statistics and scales are values where they are computed
            values = (values[0], *[None if value is None or value.kind is Kind.INPUT else value for value in values[1:]])
        if name == "copy":  # of what was written to, nothing is left
            values = values[1:2]
        if kind is Kind.PRODUCT and sum(value is not None for value in values) == 1:
            kind = Kind.POINTWISE  # a scale
        if kind is Kind.REDUCE and name in ("max", "min") and len(operands) == 2:
            kind = Kind.NONLINEAR  # the larger or smaller of two values
        op = Op(len(self.ops), node, name, kind, shape_of(value_of(node)), values)
        if kind in (Kind.PROJECTION, Kind.CONV, Kind.MATMUL):
            attach_weight(op, operands, static)
        op.inputs = tuple([operand for operand in op.operands if operand is not None])
        return op

    def _dominance(self) -> None:
        entry, leave = -1, len(self.ops)
        sources = {op.index: [source.index for source in op.inputs] or [entry] for op in self.ops}
        users = {op.index: [user.index for user in self.users[op]] for op in reversed(self.ops)}
        for op in self.results:
            users[op.index].append(leave)
        self._idom = immediate_dominators(sources, entry)
        self._ipdom = immediate_dominators(users, leave)
        self._next_applying: dict[int, int] = {}
        for op in reversed(self.ops):
            after = self._ipdom.get(op.index, leave)
            stops = after == leave or self.ops[after].weight is not None or self.ops[after].is_projection
            self._next_applying[op.index] = after if stops else self._next_applying[after]
        self._intervals = nested(self._idom, entry)
        self._feeders: dict[int, Op | None] = {entry: None}
        for op in self.ops:
            self._feeders[op.index] = op if _has_weight(op) else self._feeders[self._idom[op.index]]

    # ---- structure

    def dominates(self, first: Op, second: Op) -> bool:
        """Whether every way from the inputs to `second` leads through `first`."""
        return encloses(self._intervals, first.index, second.index)

    def feeder(self, op: Op) -> Op | None:
        """The nearest operation with a weight that every way to `op` leads through (itself, if it has one)."""
        return self._feeders[op.index]

    def dominator(self, op: Op) -> Op | None:
        """The nearest operation before `op` that every way to it leads through."""
        index = self._idom.get(op.index, -1)
        return self.ops[index] if index >= 0 else None

    def is_function(self, op: Op, of: Op) -> bool:
        """Whether `op` is an elementwise function of one value, though it has several operands: h * sigmoid(h) is one of h."""
        return all(step.kind in _ELEMENTWISE for step in self.between(of, op))

    def inevitable(self, op: Op) -> Iterator[Op]:
        """The operations after `op` that every way to the outputs leads through, nearest first."""
        index = self._ipdom.get(op.index, len(self.ops))
        while index < len(self.ops):
            yield self.ops[index]
            index = self._ipdom[index]

    def inevitably_applied(self, op: Op) -> Iterator[Op]:
        """Of these operations, those that apply a weight."""
        index = self._next_applying[op.index]
        while index < len(self.ops):
            yield self.ops[index]
            index = self._next_applying[index]

    def makers(self, value: Op) -> list[Op]:
        """The nearest operations with a weight on the ways back from a value, itself where it has one; past no product of two values.

        One of them made the channels that it holds, the others what these were modulated by.
        """
        ends = (*_HAVE_WEIGHTS, Kind.MATMUL, Kind.ATTEND)
        back = reached(value, lambda op: () if op.kind in ends and not op.is_depthwise else op.inputs)
        return sorted(filter(_has_weight, back), key=attrgetter("index"))

    def joining(self, start: Op, end: Op) -> Iterator[tuple[Op, Op]]:
        """The values from elsewhere that join in on the ways from `start` to `end`, each with the operation where it does."""
        if self.dominates(start, end):
            return
        inside = {start, *self.between(start, end)}
        for op in (*self.between(start, end), end):
            yield from ((source, op) for source in op.inputs if source not in inside)

    def modulates(self, start: Op, op: Op) -> bool:
        """Whether what is made of `start` is itself what modulates, at `op`, another value.

        It does where it is broadcast, or meets a value as large from which it was made: the stream of a residual block, or what a gate
        multiplies.
        """
        if op.kind not in _ELEMENTWISE or len(op.inputs) < 2:
            return False
        inside = {start, *self.between(start, op)}
        others = [source for source in op.inputs if source not in inside and source.shape == op.shape]
        own = [source for source in op.inputs if source in inside]
        return bool(others) and (all(s.shape != op.shape for s in own) or any(self.reaches(source, start) for source in others))

    def between(self, start: Op, end: Op) -> tuple[Op, ...]:
        """The operations on the ways from `start` to `end`, both left out, in order."""
        if (start, end) not in self._between:
            back: set[Op] = set()
            stack = [end]
            while stack:
                for source in stack.pop().inputs:
                    if source.index > start.index and source not in back:
                        back.add(source)
                        stack.append(source)
            derived = {start: None}  # in order
            for op in sorted(back, key=attrgetter("index")):
                if not derived.keys().isdisjoint(op.inputs):
                    derived[op] = None
            self._between[start, end] = tuple(derived)[1:]
        return self._between[start, end]

    def reaches(self, start: Op, end: Op) -> bool:
        return start is not end and end in reached(start, lambda op: (user for user in self.users[op] if user.index <= end.index))

    def forward(self, start: Op, through: Collection[Kind], until: Test, besides: Test = lambda op: False) -> Iterator[Op]:
        """The first operations after `start` for which `until` holds, on ways through the kinds `through` and what `besides` takes."""
        return _walk(start, self.users.__getitem__, lambda op: op.kind in through or besides(op), until)

    def backward(self, start: Op, through: Collection[Kind], until: Test, besides: Test = lambda op: False) -> Iterator[Op]:
        """As `forward`, towards the inputs."""
        return _walk(start, lambda op: op.inputs, lambda op: op.kind in through or besides(op), until)

    # ---- where channels go

    def trace(
        self, start: Op, end: Op, *, tags: Tensor | None = None, carriers: Collection[Op] = (), loosely: bool = False
    ) -> dict[Op, Channels]:
        """Follows the output channels of `start` through every operation up to and with `end`; maps each to what it then holds.

        Views are understood by running them on the tags. `carriers` are matrix products through which the second factor's
        channels pass (attention's weighted mean of values). `loosely`: sums with what was lost and
        weights over other axes are followed too.
        """
        if tags is None and not carriers and not loosely:
            states = self._known(start)
        else:
            states = {start: _own_channels(start) if tags is None else Channels(tags)}
        passing = {*self.carriers, *carriers} if carriers else self.carriers
        for op in (*self.between(start, end), end) if end is not start else ():
            if op not in states:
                states[op] = transfer(op, states, passing, loosely)
        return states

    def _known(self, start: Op) -> dict[Op, Channels]:
        """What traces from `start` found, up to the first operation that became a carrier since."""
        states, before = self._traces.get(start, ({start: _own_channels(start)}, 0))
        changed = [op.index for op in itertools.islice(self.carriers, before, None) if op in states and op is not start]
        if changed:
            first = min(changed)
            states = {op: state for op, state in states.items() if op.index < first}
        self._traces[start] = states, len(self.carriers)
        return states


def _has_weight(op: Op) -> bool:
    return op.kind in _HAVE_WEIGHTS and not op.is_depthwise


def taken_by(site: Site) -> str:
    return f"belongs to another site already ({site.name or 'the model'})"


def _own_channels(op: Op) -> Channels:
    return Channels(numbered(op.shape, op.out_axis))


def _walk(start: Op, following: Callable[[Op], Iterable[Op]], through: Test, until: Test) -> Iterator[Op]:
    seen, stack = {start}, [start]
    while stack:
        for op in following(stack.pop()):
            if op in seen:
                continue
            seen.add(op)
            if until(op):
                yield op
            elif through(op):
                stack.append(op)


def source_along(op: Op, through: Collection[Kind]) -> Op | None:
    """What `op` is applied to, before operations of the kinds `through` on that one value."""
    source = op.inputs[0] if op.inputs else None
    while source is not None and source.kind in through and len(set(source.inputs)) == 1:
        source = source.inputs[0]
    return source


def live_operands(graph: fx.Graph, effects: bool = False) -> dict[fx.Node, list[fx.Node]]:
    """Every node that the output depends on, in order, with the nodes that it reads, each as last written in place.

    `effects`: what is written into a buffer or an input counts as an output, too.

    >>> graph = fx.symbolic_trace(lambda x: (x.add_(1), x.cos(), x)[2]).graph
    >>> {node.name: [operand.name for operand in operands] for node, operands in live_operands(graph).items()}
    {'x': [], 'add_': ['x'], 'output': ['add_']}
    """
    latest: dict[fx.Node, fx.Node] = {}
    resolved: dict[fx.Node, list[fx.Node]] = {}
    written: list[fx.Node] = []
    for node in graph.nodes:
        resolved[node] = _in_order(node, latest)
        if node.op.startswith("call") and is_in_place(node) and isinstance(node.args[0], fx.Node):
            _rename_written(node, latest)
            if effects and not memory_chain(node.args[0])[-1].op.startswith("call"):
                written.append(node)
    output = next(iter(graph.find_nodes(op="output")))
    resolved[output] += [node for node in written if node not in resolved[output]]
    live = set(reached(output, resolved.__getitem__))
    return {node: operands for node, operands in resolved.items() if node in live}


def _in_order(node: fx.Node, latest: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """The nodes among a call's arguments in order, repeated where they are, each as last written."""
    found: list[fx.Node] = []

    def note(operand: fx.Node) -> fx.Node:
        current = operand
        while current in latest:
            current = latest[current]
        found.append(current)
        return operand

    fx.node.map_arg((node.args, node.kwargs), note)
    return found


def _rename_written(node: fx.Node, latest: dict[fx.Node, fx.Node]) -> None:
    """From here on, who reads what an in-place operation wrote to reads its result."""
    written: Any = node.args[0]
    while isinstance(written, fx.Node) and written_whole(written, node):
        latest[written] = node
        written = next(iter(written.args), None)
