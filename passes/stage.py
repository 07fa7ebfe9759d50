"""Stage sharing: consecutive sites of one shape use one W."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pe_fx.flow import Flow, Op
from pe_fx.ops import Kind
from pe_fx.passes.pairs import Pair, common_module, entry_pairs
from pe_fx.ties import Block, Entry, Miss, Shape, Site, Tie

ENTRIES = ("keep", "slice", "expand")

_SHORTCUT = {Kind.POINTWISE, Kind.POOL, Kind.NORM, Kind.VIEW}


@dataclass
class _Stage:
    """Consecutive blocks of one shape; `entry` is the first one, where its input is narrower."""

    entry: Pair | None
    sites: list[Site] = field(default_factory=list)


def share_stages(
    flow: Flow, sites: Iterable[Site], misses: Iterable[Miss], kinds: Iterable[str], entry: str, wanted: Callable[[Site | Miss], bool]
) -> tuple[list[Site], list[Miss]]:
    """The same sites and misses, those of the given kinds sharing one matrix per stage; entry blocks only where `wanted`.

    The root of a stage is its first matrix of full shape in dataflow order: an entry block's last weight, else the source of
    the first site. Source: arXiv 2401.16438, stage-level sharing of ResNet blocks.
    """
    result, left = list(sites), list(misses)
    for kind in dict.fromkeys(kinds):
        entries = {pair: _treated(flow, pair, entry) for pair in entry_pairs(flow)} if kind == "bottleneck" else {}
        entries = {pair: treated for pair, treated in entries.items() if wanted(treated)}
        stages = _stages(flow, [site for site in result if site.kind == kind], entries)
        replaced: dict[tuple[str, ...], Site] = {}
        for stage in stages:
            for site in _shared(stage):
                replaced[site.weights] = site
            if stage.entry is not None:
                treated = entries[stage.entry]
                left = [miss for miss in left if miss.weights != stage.entry.names]
                if isinstance(treated, Site):
                    result.insert(_position(flow, result, stage.entry.first), treated)
                else:
                    left.append(treated)
        result = [replaced.get(site.weights, site) for site in result]
    return result, left


def _stages(flow: Flow, sites: Iterable[Site], entries: Iterable[Pair]) -> list[_Stage]:
    blocks: list[tuple[int, Site | Pair]] = [(_first(flow, site).index, site) for site in sites]
    blocks += [(pair.first.index, pair) for pair in entries]
    stages: list[_Stage] = []
    last: Op | None = None
    for _, block in sorted(blocks, key=lambda item: item[0]):
        if isinstance(block, Pair):
            stages.append(_Stage(block))
            last = block.second
            continue
        first = _first(flow, block)
        fits = bool(stages) and last is not None and _matches(stages[-1], block) and flow.reaches(last, first)
        if fits:
            stages[-1].sites.append(block)
        else:
            stages.append(_Stage(None, [block]))
        last = _last(flow, block)
    return [stage for stage in stages if len(stage.sites) + (stage.entry is not None) > 1 or stage.entry is not None]


def _first(flow: Flow, site: Site) -> Op:
    return min((op for name in site.weights for op in flow.readers[name]), key=lambda op: op.index)


def _last(flow: Flow, site: Site) -> Op:
    return max((op for name in site.weights for op in flow.readers[name]), key=lambda op: op.index)


def _matches(stage: _Stage, site: Site) -> bool:
    if stage.sites:
        return _signature(stage.sites[0]) == _signature(site)
    assert stage.entry is not None
    return len(site.ties) == 1 and site.ties[0].into.shape == stage.entry.weights[1].block.shape


def _signature(site: Site) -> list[tuple[Shape, Shape, bool]]:
    return [(tie.into.shape, tie.of.shape, tie.transposed) for tie in site.ties]


def _shared(stage: _Stage) -> list[Site]:
    """The stage's sites with every matrix tied to the root."""
    if stage.entry is not None:
        root = stage.entry.weights[1].block
        return [_to_target(site, root) for site in stage.sites]
    leader = stage.sites[0]
    name = leader.ties[0].source
    return [dataclasses.replace(leader, stage=name)] + [_to_source(site, leader, name) for site in stage.sites[1:]]


def _to_source(site: Site, leader: Site, stage: str) -> Site:
    ties: list[Tie] = []
    for own, leading in zip(site.ties, leader.ties, strict=True):
        ties.append(Tie(own.of, leading.of, transposed=False, axes=own.axes))
        ties.append(dataclasses.replace(own, of=leading.of))
    return dataclasses.replace(site, ties=tuple(dict.fromkeys(ties)), stage=stage)


def _to_target(site: Site, root: Block) -> Site:
    (own,) = site.ties
    ties = (Tie(own.of, root, own.transposed, own.axes), Tie(own.into, root, False, own.axes))
    return dataclasses.replace(site, ties=ties, stage=root.name)


def _treated(flow: Flow, pair: Pair, treatment: str) -> Site | Miss:
    """An entry block as a site, or as a miss that says why its first weight stays dense."""
    first, second = pair.weights
    name = common_module(pair.names)
    shapes = f"{second.name} is {second.block.shape}, {first.name} is {first.block.shape}: not transposes of each other"
    if treatment == "keep":
        hint = "; entry='slice' or 'expand' would tie it to the stage's W" if first.inputs < second.outputs else ""
        return Miss("bottleneck", name, pair.names, shapes + hint)
    entry = _shortcut(flow, pair, treatment)
    if isinstance(entry, str):
        return Miss("bottleneck", name, pair.names, f"{shapes}; entry={treatment!r} does not apply: {entry}")
    root = second.block
    if treatment == "slice":
        tie = Tie(first.block, root.narrowed(second.out_dim, range(first.inputs)), True)
    else:
        wide = (first.outputs, second.outputs, *first.block.full_shape[2:])
        tie = Tie(Block.whole(first.name, wide), root, True)
    return Site("bottleneck", name, pair.names, (tie,), stage=root.name, entry=entry)


def _shortcut(flow: Flow, pair: Pair, treatment: str) -> Entry | str:
    """The projection shortcut around an entry block, or why there is none to replace."""
    first, second = pair.weights
    source = pair.first.inputs[0]
    joins = (op for op in flow.inevitable(pair.second) if not flow.dominates(pair.second, op))
    join = next(joins, None)
    if first.inputs >= second.outputs:
        return "its input is not narrower than its output"
    if join is None or join.kind is not Kind.POINTWISE or len(join.inputs) != 2:
        return "no shortcut is added to its output"
    main = {pair.second, *flow.between(pair.second, join)}
    others = [op for op in join.inputs if op not in main]
    convs: list[Op] = []
    norms: list[Op] = []
    current = others[0] if len(others) == 1 else source
    while current is not source:
        if current.is_projection and current.weight is not None and current.weight.is_matrix:
            convs.append(current)
        elif current.kind is Kind.NORM:
            norms.append(current)
        elif current.kind not in _SHORTCUT and not current.is_depthwise:
            return f"its shortcut passes {current.name or current.node.name}"
        if len(current.inputs) != 1:
            return "its shortcut has several inputs"
        current = current.inputs[0]
    if len(convs) != 1 or convs[0].weight is None or convs[0].weight.block.full_shape[2:] != first.block.full_shape[2:]:
        return "its shortcut is not one 1x1 convolution"
    conv = convs[0].weight.name
    modules = [name.rpartition(".")[0] for op in norms for name in op.parameters[:1]]
    if treatment == "expand" and (second.outputs - first.inputs) % first.inputs:
        return f"{second.outputs} - {first.inputs} new channels are no multiple of {first.inputs}"
    return Entry(
        treatment=treatment,
        block=common_module((first.name, second.name, conv)),
        conv1=first.name.rpartition(".")[0],
        convs=(conv.rpartition(".")[0],),
        norms=tuple(modules),
        width=first.inputs,
        out=second.outputs,
        stride=convs[0].stride,
    )


def _position(flow: Flow, sites: list[Site], first: Op) -> int:
    return next((i for i, site in enumerate(sites) if site.kind == "bottleneck" and _first(flow, site).index > first.index), len(sites))
