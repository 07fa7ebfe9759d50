"""Plan to module tree, and plan to graph: tied weights become views of their sources."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pe_fx.errors import PeFxError
from pe_fx.graph.ops import value_of
from pe_fx.graph.views import call
from pe_fx.tied.derived import derive
from pe_fx.tied.entry import PadShortcut, Widen, Widened, strided_shortcut
from pe_fx.tied.owners import Owner, forbidden, owners_in
from pe_fx.tied.weight import Gain, Layout, Mix, Piece, TiedWeight, View, choose, tie_weight, tied_class
from pe_fx.ties import Block, Entry, Plan, Ranges, Tie, gain_of, length, overlap, positions

INITS = ("keep", "mean", "reset")


def rewrite_modules(model: nn.Module, plan: Plan, init: str = "keep") -> None:
    """Ties `model` in place. Everything is checked before anything is changed.

    Raises `PeFxError` where the plan does not fit the model.
    """
    found = check_fits(model, plan)
    targets = _by_target(plan.ties)
    kept = {name: _kept(ties) for name, ties in targets.items()}
    layouts = {name: _layout(ties, targets, kept) for name, ties in targets.items()}
    names = dict.fromkeys(name for tie in plan.ties for name in (tie.target, tie.source))
    owners = {name: (module, name.rpartition(".")[2]) for name in names if (module := found[name].module) is not None}
    classes = _new_classes(model, plan, owners)
    modules = {name: module for entry in plan.entries for name, module in _new_modules(model, entry).items()}
    values = _initial_values(model, plan, init)
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    for entry in plan.entries:
        if entry.treatment == "expand":
            model.get_submodule(entry.conv1).in_channels = entry.out  # type: ignore[assignment]
    for name, new in modules.items():
        outer, attribute = _owner(model, name)
        setattr(outer, attribute, new)
    for module, cls in classes.items():
        module.__class__ = cls  # type: ignore[assignment]
    for name, ties in targets.items():
        module, attribute = owners[name]
        dense = module._parameters[attribute]
        assert dense is not None
        rest = None
        if kept[name]:
            runs = [dense.detach().narrow(layouts[name].axis, start, stop - start) for start, stop in kept[name]]
            rest = nn.Parameter(torch.cat(runs, layouts[name].axis), requires_grad=dense.requires_grad)
            vars(rest).update(vars(dense))  # marks that a training script may have left on it
        text = "; ".join(tie.text() for tie in ties)
        tie_weight(module, attribute, TiedWeight(layouts[name], [owners[tie.source] for tie in ties], text, plan, name), rest)
    _take_whole(model, [module for module, _ in owners.values()])
    choose(model)


def _take_whole(model: nn.Module, tied: Iterable[nn.Module]) -> None:
    """Lets graphs that read weights of these modules read the modules, too: a GraphModule of such a graph takes them as they are."""
    for gm in (module for module in model.modules() if isinstance(module, fx.GraphModule)):
        paths = {module: path for path, module in gm.named_modules()}
        read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
        owners = {name.rpartition(".")[0] for name in read}
        new = [path for path in dict.fromkeys(paths.get(module, "") for module in tied) if path in owners - read - {""}]
        if new:
            with gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op != "placeholder")):
                for path in new:
                    gm.graph.get_attr(path)
            gm.recompile()


def rewrite_graph(gm: fx.GraphModule, plan: Plan, weights: Mapping[str, fx.Node] | None = None) -> None:
    """Ties, in place, a graph whose weights are placeholders: every read of a tied weight becomes an expression of its source.

    `weights` says which node the plan's names mean; by default the placeholder of that name. The placeholders stay, so that the
    caller's arguments still fit; a weight that is tied away as a whole is not read any more.
    Raises `PeFxError` where the plan names weights that the graph does not have.
    """
    nodes = {node.name: node for node in gm.graph.find_nodes(op="placeholder")} if weights is None else weights
    _compare_shapes(plan, {name: tuple(getattr(value_of(node), "shape", ())) for name, node in nodes.items()}, "graph")
    if plan.entries:
        raise PeFxError("entry='slice' and 'expand' change modules; a graph whose weights are placeholders has none: use entry='keep'")
    if any(tie.gain is not None for tie in plan.ties):
        raise PeFxError("gain=True adds parameters; a graph whose weights are placeholders can have none: transform the model instead")
    targets = _by_target(plan.ties)
    kept = {name: _kept(ties) for name, ties in targets.items()}
    tracer = fx.proxy.GraphAppendingTracer(gm.graph)
    known = {node: i for i, node in enumerate(gm.graph.nodes)}

    @functools.cache
    def stored(name: str) -> Any:
        weight: Any = fx.Proxy(nodes[name], tracer)
        ranges = kept.get(name)
        return View((*[None] * _axis(targets[name]), ranges))(weight) if ranges else weight

    switch = next((node for node in gm.graph.nodes if node.op == "call_function" and value_of(node) is None), gm.graph.output_node())
    readers = {name: list(nodes[name].users) for name in targets if nodes[name].users}
    # where it is first read, since autograd comes late to what is made early; but before grad mode or autocast may be another
    places = {name: min((*users, switch), key=known.__getitem__) for name, users in readers.items()}
    for name, place in sorted(places.items(), key=lambda item: known[item[1]]):
        with gm.graph.inserting_before(place):
            dense: Any = _layout(targets[name], targets, kept).assemble(stored(name), [stored(tie.source) for tie in targets[name]])
        for reader in readers[name]:
            reader.replace_input_with(nodes[name], dense.node)
    _record_values([node for node in gm.graph.nodes if node not in known])
    gm.graph.lint()
    gm.recompile()


def _record_values(nodes: list[fx.Node]) -> None:
    """Gives new nodes the fake values that Dynamo gave the others, so that the graph can be read again."""
    with torch.no_grad():
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
            node.meta["example_value"] = call(node.target, args, kwargs)


def check_fits(model: nn.Module, plan: Plan) -> dict[str, Owner]:
    """The owners of the model's parameters. Raises `PeFxError` where the plan does not fit: a weight or a module is missing, or a
    weight has another shape or must be left alone."""
    owners = owners_in(model)
    what = type(model).__name__
    _compare_shapes(plan, {name: tuple(owner.parameter.shape) for name, owner in owners.items()}, what)
    for tie in plan.ties:
        reason = forbidden(tie, owners)
        if reason is not None:
            raise PeFxError(f"the plan does not fit this {what}: {reason}")
    targets = {id(owners[tie.target].parameter): tie.target for tie in plan.ties}
    for name in (name for tie in plan.ties for name in (tie.target, tie.source)):
        other = targets.get(id(owners[name].parameter), name)
        if other != name:
            raise PeFxError(f"the plan does not fit this {what}: {other} and {name} are one parameter here, two in the plan")
    modules = dict(model.named_modules(remove_duplicate=False)) if plan.entries else {}
    for entry in plan.entries:
        around = [path for path in modules if path == "" or f"{entry.block}.".startswith(f"{path}.")]
        if any(isinstance(modules[path], fx.GraphModule) for path in around):
            raise PeFxError(
                f"entry={entry.treatment!r} changes what the module {entry.block} computes, which this GraphModule does not call: "
                "transform the model, then trace it, or use entry='keep'"
            )
        for name in (entry.block, entry.conv1, *entry.convs, *entry.norms):
            if name not in modules:
                raise PeFxError(f"the plan does not fit this {what}: {name}, a module that entry={entry.treatment!r} treats, is missing")
    for name in (gain_of(tie.target) for tie in plan.ties if tie.gain is not None):
        module, attribute = _owner(model, name)
        if hasattr(module, attribute):
            raise PeFxError(f"{name}, where the learned factors would be, is there already: use gain=False")
    return owners


def _compare_shapes(plan: Plan, shapes: dict[str, tuple[int, ...]], what: str) -> None:
    unknown = [name for tie in plan.ties for name in (tie.target, tie.source) if name not in plan.shapes]
    if unknown:
        raise PeFxError(f"the plan is damaged: it ties {unknown[0]}, but does not say its shape")
    widened = {entry.conv1 for entry in plan.entries if entry.treatment == "expand"}
    for block in (block for tie in plan.ties for block in (tie.into, tie.of)):
        if block.full_shape != plan.shapes[block.name] and block.name.rpartition(".")[0] not in widened:
            raise PeFxError(f"the plan is damaged: {block.name} is {plan.shapes[block.name]} in it, in a tie {block.full_shape}")
    wrong = [
        f"{name} is {shapes[name]} here, {shape} in the plan" if name in shapes else f"{name} {shape} is missing"
        for name, shape in plan.shapes.items()
        if shapes.get(name) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise PeFxError(
            f"the plan does not fit this {what}: {'; '.join(wrong[:5])}{more}. "
            "Apply a plan to a dense model of the architecture that it was made from"
        )


def _by_target(ties: Iterable[Tie]) -> dict[str, list[Tie]]:
    grouped: dict[str, list[Tie]] = {}
    for tie in ties:
        for other in grouped.setdefault(tie.target, []):
            if other.into.overlaps(tie.into):
                raise PeFxError(f"two ties for one weight: {other} and {tie}")
        grouped[tie.target].append(tie)
    return grouped


def _axis(ties: list[Tie]) -> int:
    """The dimension along which the ties divide their target."""
    axes = {
        dim
        for tie in ties
        for dim, (ranges, size) in enumerate(zip(tie.into.ranges, tie.into.full_shape, strict=True))
        if length(ranges) != size
    }
    if len(axes) > 1:
        raise PeFxError(f"{ties[0].target} would be tied along several dimensions: {', '.join(map(str, ties))}")
    return axes.pop() if axes else 0


def _kept(ties: list[Tie]) -> Ranges:
    """The positions that no tie takes."""
    edges = [0, *(edge for span in _taken(ties) for edge in span), ties[0].into.full_shape[_axis(ties)]]
    return tuple((start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop)


def _layout(ties: list[Tie], targets: dict[str, list[Tie]], kept: dict[str, Ranges]) -> Layout:
    """The layout of a tied weight, where of each tied weight only the positions `kept` are stored (all, where not given)."""
    axis = _axis(ties)
    views = []
    gains: list[Gain | None] = []
    for tie in ties:
        ranges = list(tie.of.ranges)
        sizes = list(tie.of.full_shape)
        if tie.source in targets:
            divided = _axis(targets[tie.source])
            if overlap(ranges[divided], _taken(targets[tie.source])):
                raise PeFxError(f"{tie}: the source is tied away itself")
            if tie.source in kept:
                ranges[divided] = _renumbered(ranges[divided], kept[tie.source])
                sizes[divided] = length(kept[tie.source])
        views.append(
            View(
                tuple(None if own == ((0, size),) else own for own, size in zip(ranges, sizes, strict=True)),
                tie.axes if tie.transposed else None,
                tie.into.shape if len(tie.into.shape) != len(tie.of.shape) else None,
                mix_of(tie),
            )
        )
        start = sum(gain.count for gain in gains if gain is not None)
        gains.append(None if tie.gain is None or tie.channels is None else Gain(tie.channels, start, tie.gains, tie.gain))
    name = ties[0].target
    spans = [(start, stop, index) for index, tie in enumerate(ties) for start, stop in tie.into.ranges[axis]]
    spans += [(start, stop, -1) for start, stop in _kept(ties)]
    counts = Counter(index for *_, index in spans)
    seen: Counter[int] = Counter()
    pieces = []
    for start, stop, index in sorted(spans):
        size = stop - start
        begin = start if index < 0 and name not in kept else seen[index]
        whole = counts[index] == 1 and (index >= 0 or name in kept)
        pieces.append(Piece(index) if whole else Piece(index, begin, begin + size))
        seen[index] += size
    return Layout(axis, tuple(pieces), tuple(views), tuple(gains))


def mix_of(tie: Tie) -> Mix | None:
    if tie.seed is None or tie.channels is None:
        return None
    across = tie.axes[1] if tie.channels == tie.axes[0] else tie.axes[0]
    return Mix.drawn(tie.channels, across, tie.into.shape, tie.seed)


def _taken(ties: list[Tie]) -> Ranges:
    """The positions that ties take, which overlap nowhere, as ranges in order."""
    axis = _axis(ties)
    return tuple(sorted(span for tie in ties for span in tie.into.ranges[axis]))


def _renumbered(ranges: Ranges, kept: Ranges) -> Ranges:
    """Dense positions as positions among those kept, which hold them all.

    >>> _renumbered(((4, 6), (8, 9)), kept=((0, 2), (4, 6), (8, 10)))
    ((2, 5),)
    """
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        place = sum(min(end, start) - begin for begin, end in kept if begin < start)
        joins = bool(found) and found[-1][1] == place
        first = found.pop()[0] if joins else place
        found.append((first, place + stop - start))
    return tuple(found)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _initial_values(model: nn.Module, plan: Plan, init: str) -> dict[str, Tensor]:
    """New values for the sources. "mean" averages over all that share one matrix, "reset" draws anew."""
    if init == "keep":
        return {}
    sources = dict.fromkeys(tie.source for tie in plan.ties)
    if init == "reset":
        return {name: _drawn(model.get_parameter(name), [tie for tie in plan.ties if tie.source == name]) for name in sources}
    totals = {name: model.get_parameter(name).detach().clone() for name in sources}
    counts = {name: torch.ones_like(total) for name, total in totals.items()}
    for tie in plan.ties:
        if plan.shapes[tie.target] != tie.into.full_shape:
            continue  # a weight that changes its shape has no value to give
        value = part(model.get_parameter(tie.target).detach(), tie.into)
        mix = mix_of(tie)
        value = value if mix is None else mix.inverse(value)
        if tie.gain is not None:
            if tie.gain == 0:
                continue  # scaled to nothing, it can have any source
            value = value / tie.gain
        value = value.transpose(*tie.axes) if tie.transposed and value.dim() > max(tie.axes) else value
        add_part(totals[tie.source], tie.of, value.reshape(tie.of.shape))
        add_part(counts[tie.source], tie.of, torch.ones_like(value).reshape(tie.of.shape))
    return {name: total / counts[name] for name, total in totals.items()}


def _drawn(source: Tensor, ties: Iterable[Tie]) -> Tensor:
    """Normal values that keep the scale of what the source is applied to: their standard deviation is 1 / sqrt(inputs)."""
    outputs = {tie.channels if tie.transposed else sum(tie.axes) - tie.channels for tie in ties if tie.channels is not None}
    inputs = source.numel() / source.shape[min(outputs, default=0)]
    return torch.randn_like(source).div(inputs**0.5)


def part(dense: Tensor, block: Block) -> Tensor:
    """The block's values, copied out by index."""
    return dense[_index(block, dense.device)]


def add_part(dense: Tensor, block: Block, value: Tensor) -> None:
    """Adds `value` to the block in place."""
    dense[_index(block, dense.device)] += value


def _index(block: Block, device: torch.device) -> tuple[Tensor, ...]:
    return torch.meshgrid(*(torch.tensor(positions(ranges), device=device) for ranges in block.ranges), indexing="ij")


def _new_classes(model: nn.Module, plan: Plan, owners: Mapping[str, tuple[nn.Module, str]]) -> dict[nn.Module, type]:
    """The classes that modules get. A class may refuse to be subclassed, which must show before anything is changed."""
    blocks = [model.get_submodule(entry.block) for entry in plan.entries if entry.treatment == "expand"]
    classes = {block: derive(type(block), Widened) for block in blocks}
    tied: dict[nn.Module, list[str]] = {}
    for tie in plan.ties:
        module, attribute = owners[tie.target]
        tied.setdefault(module, []).append(attribute)
    return classes | {module: tied_class(classes.get(module, type(module)), module, names) for module, names in tied.items()}


def _new_modules(model: nn.Module, entry: Entry) -> dict[str, nn.Module]:
    """What an entry treatment puts under which name, in the mode of what was there."""
    like = next(model.get_submodule(entry.conv1).parameters())
    modules: dict[str, nn.Module] = {name: nn.Identity() for name in entry.removed}
    if entry.treatment == "slice":
        modules |= {name: PadShortcut(entry.out, entry.stride) for name in entry.convs}
    else:
        modules |= {name: strided_shortcut(entry.out, entry.stride) for name in entry.convs}
    modules = {name: module.train(model.get_submodule(name).training) for name, module in modules.items()}
    if entry.treatment == "expand":
        block = model.get_submodule(entry.block)
        modules[f"{entry.block}.widen" if entry.block else "widen"] = Widen(entry.width, entry.out).train(block.training)
    return {name: module.to(like) for name, module in modules.items()}
