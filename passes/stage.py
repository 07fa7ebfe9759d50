"""Stage sharing: consecutive sites of one shape use one W."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

from pe_fx.graph.capture import module_of
from pe_fx.graph.flow import Flow
from pe_fx.graph.operation import Op
from pe_fx.graph.ops import Kind
from pe_fx.passes.pairs import Pair, common_module, entry_pairs
from pe_fx.ties import Block, Entry, Miss, Shape, Site, Tie

ENTRIES = ("keep", "slice", "expand")

_SHORTCUT = {Kind.POINTWISE, Kind.POOL, Kind.NORM, Kind.VIEW}


@dataclass(frozen=True)
class _Block:
    """A site, or the pair of an entry block, with the operations where it begins and ends the first time that it runs."""

    found: Site | Pair
    first: Op
    last: Op

    @property
    def weights(self) -> tuple[str, ...]:
        return self.found.weights if isinstance(self.found, Site) else self.found.names


@dataclass
class _Stage:
    """Consecutive blocks of one shape; `entry` is the first one, where its input is narrower."""

    blocks: list[_Block]

    @property
    def entry(self) -> Pair | None:
        head = self.blocks[0].found
        return head if isinstance(head, Pair) else None

    @property
    def root(self) -> str:
        """The weight that the stage shares."""
        head = self.blocks[0]
        return head.weights[-1] if self.entry is not None else head.weights[0]

    @property
    def sites(self) -> list[Site]:
        return [block.found for block in self.blocks if isinstance(block.found, Site)]


def share_stages(
    flow: Flow,
    sites: Iterable[Site],
    misses: Iterable[Miss],
    kinds: Iterable[str],
    entry: str,
    wanted: Callable[[Site | Miss], bool] = lambda found: True,
    trait: Callable[[str], Hashable] = lambda name: None,
    forbidden: Callable[[Tie | Entry], str | None] = lambda what: None,
) -> tuple[list[Site], list[Miss]]:
    """The same sites and misses, those of the given kinds sharing one matrix per stage.

    Entry blocks take part where they are `wanted` and not `forbidden` (then why); only weights of one `trait` (trained or frozen, dtype,
    device) are shared.

    The root of a stage is its first matrix of full shape in dataflow order: an entry block's last weight, else the source of
    the first site. Source: arXiv 2401.16438, stage-level sharing of ResNet blocks.
    """
    result, left = list(sites), list(misses)
    for kind in dict.fromkeys(kinds):
        entries = {pair: _treated(flow, pair, entry, forbidden) for pair in entry_pairs(flow)} if kind == "bottleneck" else {}
        entries = {pair: treated for pair, treated in entries.items() if wanted(treated)}
        stages = _stages(flow, [site for site in result if site.kind == kind], entries, trait)
        replaced: dict[Site, Site] = {}
        for stage in stages:
            replaced |= _shared(stage)
            if stage.entry is not None:
                treated = entries[stage.entry]
                left = [miss for miss in left if miss.weights != stage.entry.names]
                if isinstance(treated, Site):
                    result.insert(_position(flow, result, stage.entry.first), treated)
                else:
                    left.append(treated)
        result = [replaced.get(site, site) for site in result]
    return result, left


def _join(flow: Flow, first: Op, last: Op) -> Op | None:
    """The sum in which a block's output meets what its input came from: Wᵀ G(W x) + x."""
    join = next((op for op in flow.inevitable(last) if not flow.dominates(last, op)), None)
    is_sum = join is not None and join.kind is Kind.POINTWISE and len(join.inputs) == 2
    return join if is_sum and not (join and flow.dominates(first, join)) else None


def _stages(flow: Flow, sites: Iterable[Site], entries: Iterable[Pair], trait: Callable[[str], Hashable]) -> list[_Stage]:
    blocks = [_block(flow, site) for site in sites] + [_Block(pair, pair.first, pair.second) for pair in entries]
    blocks.sort(key=lambda block: block.first.index)
    stages: list[_Stage] = []
    for position, block in enumerate(blocks):
        if isinstance(block.found, Site) and not _is_residual(flow, block.found):
            continue
        own = trait(block.weights[0])
        earlier = [other for other in blocks[:position] if trait(other.weights[0]) == own]
        alike = (stage for stage in reversed(stages) if trait(stage.root) == own)
        stage = next((stage for stage in alike if _continues(flow, stage, block, earlier)), None)
        if stage is None:
            stages.append(_Stage([block]))
        else:
            stage.blocks.append(block)
    return stages


def _is_residual(flow: Flow, site: Site) -> bool:
    """Only blocks that add to their input are taken for alike; of other kinds than bottlenecks that is not asked."""
    if site.kind != "bottleneck":
        return True
    block = _block(flow, site)
    join = _join(flow, block.first, block.last)
    return join is not None and any(flow.reaches(source, block.first) for source in join.inputs)


def _block(flow: Flow, site: Site) -> _Block:
    readers = [[op.index for op in flow.readers[name]] for name in site.weights]
    first = min(index for indices in readers for index in indices)
    last = max(min(index for index in indices if index >= first) for indices in readers)
    return _Block(site, flow.ops[first], flow.ops[last])


def _continues(flow: Flow, stage: _Stage, block: _Block, earlier: list[_Block]) -> bool:
    """Whether `block` fits the stage and comes right after it, no other block between them."""
    last = stage.blocks[-1].last
    if isinstance(block.found, Pair) or not _matches(stage, block.found) or not flow.reaches(last, block.first):
        return False
    between = [other for other in earlier if other.first.index > last.index]
    return not any(flow.reaches(last, other.first) and flow.reaches(other.last, block.first) for other in between)


def _matches(stage: _Stage, site: Site) -> bool:
    if stage.sites:
        return _signature(stage.sites[0]) == _signature(site)
    assert stage.entry is not None
    return len(site.ties) == 1 and site.ties[0].into.shape == stage.entry.weights[1].block.shape


def _signature(site: Site) -> list[tuple[Shape, Shape, bool]]:
    return [(tie.into.shape, tie.of.shape, tie.transposed) for tie in site.ties]


def _shared(stage: _Stage) -> dict[Site, Site]:
    """The stage's sites, and what they are with every matrix tied to the root."""
    if stage.entry is not None:
        root = stage.entry.weights[1].block
        return {site: _to_target(site, root) for site in stage.sites}
    if len(stage.sites) < 2:
        return {}
    leader = stage.sites[0]
    name = leader.ties[0].source
    return {site: dataclasses.replace(leader, stage=name) if site is leader else _to_source(site, leader, name) for site in stage.sites}


def _to_source(site: Site, leader: Site, stage: str) -> Site:
    ties: list[Tie] = []
    for own, leading in zip(site.ties, leader.ties, strict=True):
        ties.append(Tie(own.of, leading.of, transposed=False, axes=own.axes))
        ties.append(dataclasses.replace(own, of=leading.of))
    return dataclasses.replace(site, ties=tuple(dict.fromkeys(ties)), stage=stage)


def _to_target(site: Site, root: Block) -> Site:
    (own,) = site.ties
    ties = (Tie(own.of, root, own.transposed, own.axes), dataclasses.replace(own, of=root, transposed=False))
    return dataclasses.replace(site, ties=ties, stage=root.name)


def _treated(flow: Flow, pair: Pair, treatment: str, forbidden: Callable[[Tie | Entry], str | None]) -> Site | Miss:
    """An entry block as a site, or as a miss that says why its first weight stays dense."""
    first, second = pair.weights
    name = common_module(pair.names)
    shapes = f"{second.name} is {second.block.shape}, {first.name} is {first.block.shape}: not transposes of each other"
    if treatment == "keep":
        others = [other for other in ENTRIES[1:] if isinstance(_treated(flow, pair, other, forbidden), Site)]
        hint = f"; entry={' or '.join(map(repr, others))} would tie it to the stage's W" if others else ""
        return Miss("bottleneck", name, pair.names, shapes + hint)
    entry = _shortcut(flow, pair, treatment)
    if isinstance(entry, str):
        return Miss("bottleneck", name, pair.names, f"{shapes}; entry={treatment!r} does not apply: {entry}")
    root = second.block
    if treatment == "slice":
        tie = Tie(first.block, root.narrowed(second.out_dims[0], range(first.inputs)), True, channels=first.in_dims[0])
    else:
        wide = (first.outputs, second.outputs, *first.block.full_shape[2:])
        tie = Tie(Block.whole(first.name, wide), root, True, channels=first.in_dims[0])
    reason = forbidden(tie) or forbidden(entry)
    if reason is not None:
        return Miss("bottleneck", name, pair.names, f"{shapes}; entry={treatment!r} does not apply: {reason}")
    return Site("bottleneck", name, pair.names, (tie,), stage=root.name, entry=entry)


def _shortcut(flow: Flow, pair: Pair, treatment: str) -> Entry | str:
    """The projection shortcut around an entry block, or why there is none to replace."""
    first, second = pair.weights
    if not pair.first.inputs:
        return "its input is a constant"
    source = pair.first.inputs[0]
    join = _join(flow, pair.first, pair.second)
    if first.inputs >= second.outputs:
        return "its input is not narrower than its output"
    if join is None:
        return "no shortcut is added to its output"
    main = {pair.second, *flow.between(pair.second, join)}
    others = [op for op in join.inputs if op not in main]
    convs: list[Op] = []
    norms: list[Op] = []
    passed: list[Op] = []
    current = others[0] if len(others) == 1 else source
    while current is not source:
        if current.is_projection and current.weight is not None and current.weight.is_matrix:
            convs.append(current)
        elif current.kind is Kind.NORM:
            norms.append(current)
        elif current.kind in _SHORTCUT or current.is_depthwise:
            passed.append(current)
        else:
            return f"its shortcut passes {current.name or current.node.name}"
        if len(current.inputs) != 1:
            return "its shortcut has several inputs"
        current = current.inputs[0]
    if len(convs) != 1 or convs[0].weight is None or convs[0].weight.block.full_shape[2:] != first.block.full_shape[2:]:
        return "its shortcut is not one 1x1 convolution"
    conv = convs[0].weight.name
    block = common_module((first.name, second.name, conv))
    modules = {op: _module(op.parameters[0]) for op in (*convs, *norms) if op.parameters}
    if block in modules.values() or not _are_called(flow, modules, passed):
        return "its shortcut is not made of modules that do nothing else and are called once"
    if treatment == "expand":
        if (second.outputs - first.inputs) % first.inputs:
            return f"{second.outputs} - {first.inputs} new channels are no multiple of {first.inputs}"
        if not _is_input(flow, source, block, {pair.first, convs[0], *norms, *passed}):
            return f"the value that it works on is not, or not only, the input of {block or 'the model'}"
    return Entry(
        treatment=treatment,
        block=block,
        conv1=_module(first.name),
        convs=(modules[convs[0]],),
        norms=tuple(modules[op] for op in norms if op in modules),
        width=first.inputs,
        out=second.outputs,
        stride=convs[0].stride,
    )


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _are_called(flow: Flow, modules: Mapping[Op, str], beside: Iterable[Op]) -> bool:
    """Whether each of these operations is all that its module does, and nothing `beside` them is done there."""
    alone = len(set(modules.values())) == len(modules) and not any(module_of(op.node) in modules.values() for op in beside)
    called = all(module_of(op.node) in (None, module) for op, module in modules.items())  # None: not recorded
    return alone and called and all(flow.readers[op.parameters[0]] == [op] for op in modules)


def _is_input(flow: Flow, value: Op, block: str, readers: set[Op]) -> bool:
    """Whether a value comes from outside of a module, in which only these operations read it."""

    def is_inside(op: Op) -> bool:
        return op.kind is not Kind.INPUT and f"{module_of(op.node)}.".startswith(f"{block}." if block else "")

    return not is_inside(value) and value not in flow.results and all(user in readers for user in flow.users[value] if is_inside(user))


def _position(flow: Flow, sites: list[Site], first: Op) -> int:
    return next(
        (i for i, site in enumerate(sites) if site.kind == "bottleneck" and _block(flow, site).first.index > first.index), len(sites)
    )
