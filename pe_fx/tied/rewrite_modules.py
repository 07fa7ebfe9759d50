"""Plan to module tree: tied weights become views of their sources' weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from pe_fx.errors import PeFxError
from pe_fx.graph.threads import one_thread
from pe_fx.tied.derived import derive
from pe_fx.tied.entry import PadShortcut, Widen, Widened, strided_shortcut
from pe_fx.tied.fit import as_matrix, fitted_sources, positions, reading
from pe_fx.tied.layouts import by_target, compare_shapes, kept_ranges, layout_of
from pe_fx.tied.moments import Moments
from pe_fx.tied.owners import Owner, forbidden, owners_in, unfit_entry
from pe_fx.tied.weight import TiedWeight, choose, tie_weight, tied_class
from pe_fx.ties import Entry, Plan, Tie, gain_of, kept_of

INITS = ("keep", "mean", "fit", "reset")


def rewrite_modules(model: nn.Module, plan: Plan, init: str = "keep", moments: Moments | None = None) -> None:
    """Ties `model` in place. Everything is checked before anything is changed. `moments`: what init "fit" weighs by.

    Raises `PeFxError` where the plan does not fit the model.
    """
    found = check_fits(model, plan)
    targets = by_target(plan.ties)
    kept = {name: kept_ranges(ties) for name, ties in targets.items()}
    layouts = {name: layout_of(ties, targets, kept) for name, ties in targets.items()}
    names = dict.fromkeys(name for tie in plan.ties for name in (tie.target, tie.source))
    owners = {name: (module, name.rpartition(".")[2]) for name in names if (module := found[name].module) is not None}
    classes = _new_classes(model, plan, owners)
    modules = {name: module for entry in plan.entries for name, module in _new_modules(model, entry).items()}
    values = _initial_values(model, plan, init, moments)
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
            with one_thread():
                rest = nn.Parameter(torch.cat(runs, layouts[name].axis), requires_grad=dense.requires_grad)
            vars(rest).update(vars(dense))  # marks that a training script may have left on it
        text = "; ".join(tie.text() for tie in ties)
        stored = {tie.source: kept_of(owners[tie.source][1]) if kept.get(tie.source) else owners[tie.source][1] for tie in ties}
        sources = [(owners[tie.source][0], stored[tie.source]) for tie in ties]
        weight = TiedWeight(layouts[name], sources, text, plan, name, module._parameters, list(module._parameters))
        tie_weight(module, attribute, weight, rest)
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


def check_fits(model: nn.Module, plan: Plan) -> dict[str, Owner]:
    """The owners of the model's parameters. Raises `PeFxError` where the plan does not fit: a weight or a module is missing, or a
    weight has another shape or must be left alone."""
    owners = owners_in(model)
    what = type(model).__name__
    compare_shapes(plan, {name: tuple(owner.parameter.shape) for name, owner in owners.items()}, what)
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
        if (reason := unfit_entry(entry, modules)) is not None:
            raise PeFxError(f"the plan does not fit this {what}: entry={entry.treatment!r} does not apply: {reason}")
    gains = [gain_of(tie.target) for tie in plan.ties if tie.gain is not None]
    lefts = [kept_of(name) for name, ties in by_target(plan.ties).items() if kept_ranges(ties)]
    for name in (*gains, *lefts):
        module, attribute = _owner(model, name)
        if hasattr(module, attribute):
            what = "the learned factors" if name in gains else "what is left of a weight"
            raise PeFxError(f"{name}, where {what} would be, is there already: use gain=False, exclude=[…] or another name for it")
    return owners


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _initial_values(model: nn.Module, plan: Plan, init: str, moments: Moments | None) -> dict[str, Tensor]:
    """New values for the sources. "mean" averages over all that share one matrix, "fit" changes each least, "reset" draws anew."""
    if init == "keep":
        return {}
    if init == "fit":
        return fitted_sources(plan, model, moments)
    sources = dict.fromkeys(tie.source for tie in plan.ties)
    if init == "reset":
        return {name: _drawn(model.get_parameter(name), [tie for tie in plan.ties if tie.source == name]) for name in sources}
    totals = {name: model.get_parameter(name).detach().clone().reshape(-1) for name in sources}
    counts = {name: torch.ones_like(total) for name, total in totals.items()}
    for tie in plan.ties:
        if plan.shapes[tie.target] != tie.into.full_shape or tie.gain == 0:
            continue  # a weight that changes its shape, or is scaled to nothing, has no value to give
        target = model.get_parameter(tie.target).detach().reshape(-1)
        own = as_matrix(tie, positions(tie.into)).reshape(-1).to(target.device)
        places, factors = (each.reshape(-1).to(target.device) for each in reading(tie))
        totals[tie.source].index_add_(0, places, target[own] / factors.to(target.dtype))
        counts[tie.source].index_add_(0, places, torch.ones_like(target[own]))
    return {name: (total / counts[name]).view(plan.shapes[name]) for name, total in totals.items()}


def _drawn(source: Tensor, ties: Sequence[Tie]) -> Tensor:
    """Normal values that keep the scale of what the source is applied to: their standard deviation is 1 / sqrt(inputs)."""
    inputs = max(
        (_inputs(source, tie) for tie in ties if tie.channels is not None), default=source.numel() // source.shape[ties[0].axes[0]]
    )
    return torch.randn_like(source).div(inputs**0.5)


def _inputs(source: Tensor, tie: Tie) -> int:
    """The number of input channels of a source."""
    if tie.spread is not None:
        return tie.shape[1]
    outputs, hidden = tie.channel_axes
    return source.shape[hidden if tie.transposed else outputs]


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
