"""Stage sharing: consecutive sites of one shape use one W, all of them or in groups of so many, tied or as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from pe_fx.graph.capture import module_of
from pe_fx.graph.flow import Flow
from pe_fx.graph.operation import Op
from pe_fx.graph.ops import Kind
from pe_fx.passes.pairs import Pair, common_module, entry_pairs
from pe_fx.ties import Block, Entry, Miss, Site, Tie, positions

ENTRIES = ("keep", "slice", "expand")

_SHORTCUT = {Kind.POINTWISE, Kind.POOL, Kind.NORM, Kind.VIEW}

Found = Site | Miss
Unlike = tuple[tuple[str, ...], str]


@dataclass(frozen=True)
class _Block:
    """A site, or the pair of an entry block, with the operations where it begins and ends the first time that it runs.

    `matrices` are what a site applies that is not tied.
    """

    found: Site | Pair
    first: Op
    last: Op
    matrices: tuple[Block, ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What has to be alike in those that share."""
        if isinstance(self.found, Pair):
            return (self.found.weights[1].block,)
        return self.matrices or tuple(block for tie in self.found.ties for block in (tie.of, tie.into))

    @property
    def sources(self) -> tuple[str, ...]:
        """The weights that are there to be shared."""
        is_tied = isinstance(self.found, Site) and not self.matrices
        return tuple(dict.fromkeys(block.name for block in self.blocks[:: 2 if is_tied else 1]))

    @property
    def form(self) -> Hashable:
        """How the matrices lie in their weights, and how they are tied."""
        names = [block.name for block in self.blocks]
        if self.matrices:
            return tuple((names.index(block.name), block.full_shape, block.ranges) for block in self.blocks)
        return tuple(tie.transposed for tie in self.found.ties) if isinstance(self.found, Site) else None


@dataclass
class _Stage:
    """Consecutive blocks of one shape; `entry` is the first one, where its input is narrower. `shared` are its sites as they become."""

    blocks: list[_Block]
    is_open: bool = True
    shared: dict[Site, Site] = field(default_factory=dict)

    @property
    def entry(self) -> Pair | None:
        head = self.blocks[0].found
        return head if isinstance(head, Pair) else None


def share_stages(
    flow: Flow,
    sites: Iterable[Site],
    misses: Iterable[Miss],
    sizes: Mapping[str, int | None],
    entry: str,
    wanted: Callable[[Found], bool] = lambda found: True,
    is_tied: Callable[[Found], bool] = lambda found: True,
    trait: Callable[[str], Hashable] = lambda name: None,
    forbidden: Callable[[Tie | Entry], str | None] = lambda what: None,
) -> tuple[list[Site], list[Miss]]:
    """The same sites and misses, those of the given kinds sharing their matrices: each stage, or where there is a size, so many neighbours.

    Of sites that are not to be tied those stay that share. Entry blocks take part where they are `wanted` and not `forbidden` (then why).
    A stage passes over weights of another `trait` (trained or frozen, dtype, device); a group of a given size ends there, as at another
    shape, and a miss says so.

    The root of a stage is its first matrix of full shape in dataflow order: an entry block's last weight, else the source of
    the first site. Source: arXiv 2401.16438, stage-level sharing of ResNet blocks.
    """
    result = list(sites)
    untied = {(site.kind, name) for site in result if not is_tied(site) for name in site.weights}
    left = [miss for miss in misses if not untied.issuperset((miss.kind, name) for name in miss.weights)]  # they ask for other shapes
    for kind, size in sizes.items():
        entries = {pair: _treated(flow, pair, entry, forbidden) for pair in entry_pairs(flow)} if kind == "bottleneck" else {}
        entries = {pair: treated for pair, treated in entries.items() if wanted(treated) and is_tied(treated)}
        blocks = [_block(flow, site, is_tied(site)) for site in result if site.kind == kind]
        blocks += [_Block(pair, pair.first, pair.second) for pair in entries]
        stages, ends = _stages(flow, blocks, size, trait, forbidden)
        replaced: dict[Site, Site] = {}
        for stage in stages:
            replaced |= stage.shared
            if stage.entry is not None:
                treated = entries[stage.entry]
                left = [miss for miss in left if miss.weights != stage.entry.names]
                if isinstance(treated, Site):
                    result.insert(_position(flow, result, stage.entry.first), treated)
                else:
                    left.append(treated)
        result = [replaced.get(site, site) for site in result if site.kind != kind or is_tied(site) or site in replaced]
        left += ends
    return [site for site in result if site.ties], left


def rows_of(flow: Flow, sites: Iterable[Site], trait: Callable[[str], Hashable]) -> list[list[Site]]:
    """Tied sites of one kind, by the stages that they would share: consecutive ones of one shape."""
    stages, _ = _stages(flow, [_block(flow, site) for site in sites], None, trait, lambda tie: None)
    return [[block.found for block in stage.blocks if isinstance(block.found, Site)] for stage in stages]


def _join(flow: Flow, first: Op, last: Op) -> Op | None:
    """The sum in which a block's output meets what its input came from: Wᵀ G(W x) + x."""
    join = next((op for op in flow.inevitable(last) if not flow.dominates(last, op)), None)
    is_sum = join is not None and join.kind is Kind.POINTWISE and len(join.inputs) == 2
    return join if is_sum and not (join and flow.dominates(first, join)) else None


def _stages(
    flow: Flow,
    blocks: list[_Block],
    size: int | None,
    trait: Callable[[str], Hashable],
    forbidden: Callable[[Tie], str | None],
) -> tuple[list[_Stage], list[Miss]]:
    """The stages, and why groups of a given size ended before, or a block that follows could not share."""
    blocks = sorted(blocks, key=lambda block: block.first.index)
    traits = {block: tuple(map(trait, block.sources)) for block in blocks}
    stages: list[_Stage] = []
    misses: list[Miss] = []
    for position, block in enumerate(blocks):
        if not _is_residual(flow, block):
            continue
        earlier = [other for other in blocks[:position] if traits[other] == traits[block]]
        open_stages = [stage for stage in stages if stage.is_open] if isinstance(block.found, Site) else []
        compared = [(stage, _difference(stage.blocks[0], block)) for stage in open_stages]
        for stage, unlike in sorted(compared, key=lambda each: each[1] is not None):  # of parallel ones first what is alike
            head = stage.blocks[0]
            passes_over = size is None and (unlike is not None or traits[head] != traits[block])
            if passes_over or not _follows(flow, stage.blocks[-1], block, earlier):
                continue
            ties, refused = _sharing(flow, head, block, unlike, forbidden)
            if not refused:
                _join_stage(flow, stage, block, ties)
                stage.is_open = len(stage.blocks) != size
                break
            misses += refused
            stage.is_open = size is None
        else:
            stages.append(_Stage([block], size != 1))
    return stages, misses


def _is_residual(flow: Flow, block: _Block) -> bool:
    """Only blocks that add to their input are taken for alike; of other kinds than bottlenecks that is not asked."""
    if isinstance(block.found, Pair) or block.found.kind != "bottleneck":
        return True
    join = _join(flow, block.first, block.last)
    return join is not None and any(flow.reaches(source, block.first) for source in join.inputs)


def _block(flow: Flow, site: Site, is_tied: bool = True) -> _Block:
    readers = [[op.index for op in flow.readers[name]] for name in site.weights]
    first = min(index for indices in readers for index in indices)
    last = max(min(index for index in indices if index >= first) for indices in readers)
    applied = flow.applied.get(site) or (block for tie in site.ties for block in (tie.of, tie.into))
    return _Block(site, flow.ops[first], flow.ops[last], () if is_tied else tuple(dict.fromkeys(applied)))


def _follows(flow: Flow, last: _Block, block: _Block, earlier: list[_Block]) -> bool:
    """Whether `block` comes right after the last one of a stage, no other block between them."""
    if not flow.reaches(last.last, block.first):
        return False
    between = [other for other in earlier if other.first.index > last.last.index]
    return not any(flow.reaches(last.last, other.first) and flow.reaches(other.last, block.first) for other in between)


def _difference(head: _Block, block: _Block) -> Unlike | None:
    """Which of a block's matrices are not like those of a stage, and why."""
    is_entry = isinstance(head.found, Pair)
    own = block.blocks[1:] if is_entry else block.blocks  # the first block of a stage has the second of the two
    for mine, leading in zip(own, head.blocks, strict=False):
        if mine.shape != leading.shape:
            return (leading.name, mine.name), f"{mine} is {mine.shape}, {leading} is {leading.shape}: only matrices of one shape are shared"
    if len(own) != len(head.blocks) or not (is_entry or block.form == head.form):
        names = head.blocks[0].name, own[0].name
        return names, f"{names[1]} and what goes with it are not arranged as {names[0]} is: they are not shared"
    return None


def _shared_ties(flow: Flow, head: _Block, site: Site, matrices: tuple[Block, ...]) -> tuple[Tie, ...]:
    if matrices:
        pairs = zip(_by_weight(matrices), _by_weight(head.matrices), strict=True)
        return tuple(Tie(own, leading, False, _sides(flow, own.name)) for own, leading in pairs if own != leading)
    if isinstance(head.found, Pair):
        (root,), (tie,) = head.blocks, site.ties
        return Tie(tie.of, root, tie.transposed, tie.axes), dataclasses.replace(tie, of=root, transposed=False)
    ties: list[Tie] = []
    for own, leading in zip(site.ties, head.found.ties, strict=True):
        ties.append(Tie(own.of, leading.of, transposed=False, axes=own.axes))
        ties.append(dataclasses.replace(own, of=leading.of))
    return tuple(dict.fromkeys(ties))


def _by_weight(blocks: Iterable[Block]) -> list[Block]:
    """For each weight one part of it, which holds all that are given."""
    found: dict[str, Block] = {}
    for block in blocks:
        whole = found.setdefault(block.name, block)
        for dim, (ranges, more) in enumerate(zip(whole.ranges, block.ranges, strict=True)):
            whole = whole.narrowed(dim, (*positions(ranges), *positions(more)))
        found[block.name] = whole
    return list(found.values())


def _sides(flow: Flow, name: str) -> tuple[int, int]:
    """The dimensions of a weight's outputs and inputs, the first of each."""
    weight = next(op.weight for op in flow.readers[name] if op.weight is not None and op.weight.name == name)
    sides = (*weight.out_dims[:1], *weight.in_dims[:1])
    return (sides[0], sides[1]) if len(set(sides)) == 2 else (0, 1)


def _sharing(
    flow: Flow, head: _Block, block: _Block, unlike: Unlike | None, forbidden: Callable[[Tie], str | None]
) -> tuple[tuple[Tie, ...], list[Miss]]:
    """The ties of a block that uses the matrices of a stage, and what stands against them."""
    site = block.found
    assert isinstance(site, Site)
    if unlike is not None:
        return (), [Miss(site.kind, site.name, *unlike)]
    ties = _shared_ties(flow, head, site, block.matrices)
    misses = []
    for tie in ties:
        clash = flow.clash(site, tie) if block.matrices and not flow.is_made(tie) else None
        if (reason := forbidden(tie) or clash) is not None:
            misses.append(Miss(site.kind, site.name, (tie.source, tie.target), reason))
    return ties, misses


def _join_stage(flow: Flow, stage: _Stage, block: _Block, ties: tuple[Tie, ...]) -> None:
    head, site = stage.blocks[0], block.found
    assert isinstance(site, Site)
    name = head.blocks[0].name
    if block.matrices:
        ties = tuple(tie for tie in ties if not flow.is_made(tie))  # another site may have the same weights
        flow.claim(site.with_ties(ties), ties)
    elif isinstance(head.found, Site):
        stage.shared[head.found] = dataclasses.replace(head.found, stage=name)
    stage.shared[site] = dataclasses.replace(site, ties=ties, stage=name)
    stage.blocks.append(block)


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
