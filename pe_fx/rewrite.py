"""Plan to module tree: the same model, its tied weights views of their sources."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pe_fx.entry import PadShortcut, Widen, strided_shortcut, widened_class
from pe_fx.errors import PeFxError
from pe_fx.tied import Layout, TiedWeight, View, tie_weight
from pe_fx.ties import Block, Entry, Plan, Ranges, Tie, length, to_ranges

INITS = ("keep", "mean", "reset")


def rewrite_modules(model: nn.Module, plan: Plan, init: str = "keep") -> None:
    """Ties `model` in place. Everything is checked before anything is changed.

    Raises `PeFxError` where the plan does not fit the model.
    """
    check_fits(model, plan)
    targets = _by_target(plan.ties)
    layouts = {name: _layout(name, ties, targets) for name, ties in targets.items()}
    values = _initial_values(model, plan, init)
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    for entry in plan.entries:
        _treat_entry(model, entry)
    owners = {name: _owner(model, name) for tie in plan.ties for name in (tie.target, tie.source)}
    for name, ties in targets.items():
        module, attribute = owners[name]
        dense = module._parameters[attribute]
        assert dense is not None
        kept = _kept(ties)
        axis = layouts[name].axis
        rest = None
        if kept:
            index = torch.tensor([i for start, stop in kept for i in range(start, stop)], device=dense.device)
            rest = nn.Parameter(dense.detach().index_select(axis, index), requires_grad=dense.requires_grad)
        text = "; ".join(f"{tie.of}{'ᵀ' if tie.transposed else ''}" for tie in ties)
        tie_weight(module, attribute, TiedWeight(layouts[name], [owners[tie.source] for tie in ties], text), rest)


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Raises `PeFxError` where a weight of the plan is missing or has another shape."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wrong = [
        f"{name} is {tuple(parameters[name].shape)} here, {shape} in the plan" if name in parameters else f"{name} {shape} is missing"
        for name, shape in plan.shapes.items()
        if name not in parameters or tuple(parameters[name].shape) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise PeFxError(
            f"the plan does not fit this {type(model).__name__}: {'; '.join(wrong[:5])}{more}. "
            "Apply a plan to a dense model of the architecture that it was made from"
        )


def stored_ranges(block: Block, kept: Ranges | None, axis: int) -> tuple[Ranges, ...]:
    """A block of the dense weight in the coordinates of what is stored, where only `kept` of `axis` is."""
    if kept is None:
        return block.ranges
    place = {position: i for i, position in enumerate(p for start, stop in kept for p in range(start, stop))}
    try:
        moved = to_ranges(place[p] for start, stop in block.ranges[axis] for p in range(start, stop))
    except KeyError as error:
        raise PeFxError(f"{block} is to be the source of a tie, but is itself tied away") from error
    return (*block.ranges[:axis], moved, *block.ranges[axis + 1 :])


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
    axes = {dim for tie in ties for dim, (ranges, size) in enumerate(zip(tie.into.ranges, tie.into.full_shape, strict=True)) if length(ranges) != size}
    if len(axes) > 1:
        raise PeFxError(f"{ties[0].target} would be tied along several dimensions: {', '.join(map(str, ties))}")
    return axes.pop() if axes else 0


def _kept(ties: list[Tie]) -> Ranges:
    """The positions that no tie takes."""
    axis = _axis(ties)
    taken = {p for tie in ties for start, stop in tie.into.ranges[axis] for p in range(start, stop)}
    return to_ranges(set(range(ties[0].into.full_shape[axis])) - taken)


def _layout(name: str, ties: list[Tie], targets: dict[str, list[Tie]]) -> Layout:
    axis = _axis(ties)
    views = []
    for tie in ties:
        source_ties = targets.get(tie.source)
        kept = _kept(source_ties) if source_ties else None
        ranges = stored_ranges(tie.of, kept, _axis(source_ties) if source_ties else 0)
        views.append(View(ranges, tie.transposed, tie.axes, tie.into.shape))
    spans = [(start, stop, index) for index, tie in enumerate(ties) for start, stop in tie.into.ranges[axis]]
    spans += [(start, stop, -1) for start, stop in _kept(ties)]
    offsets = dict.fromkeys(range(-1, len(ties)), 0)
    pieces = []
    for start, stop, index in sorted(spans):
        size = stop - start
        pieces.append((index, offsets[index], offsets[index] + size))
        offsets[index] += size
    return Layout(axis, tuple(pieces), tuple(views))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _initial_values(model: nn.Module, plan: Plan, init: str) -> dict[str, Tensor]:
    """New values for the sources. "mean" averages over all that share one matrix."""
    if init == "keep":
        return {}
    sources = dict.fromkeys(tie.source for tie in plan.ties)
    if init == "reset":
        for module in dict.fromkeys(_owner(model, name)[0] for name in sources):
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is None:
                raise PeFxError(f"init='reset': {type(module).__name__} has no reset_parameters(); use 'keep' and initialise the model yourself")
            reset()
        return {}
    totals = {name: model.get_parameter(name).detach().clone() for name in sources}
    counts = {name: torch.ones_like(total) for name, total in totals.items()}
    for tie in plan.ties:
        if plan.shapes[tie.target] != tie.into.full_shape:
            continue  # a weight that changes its shape has no value to give
        value = part(model.get_parameter(tie.target).detach(), tie.into)
        value = value.transpose(*tie.axes) if tie.transposed and value.dim() > max(tie.axes) else value
        add_part(totals[tie.source], tie.of, value.reshape(tie.of.shape))
        add_part(counts[tie.source], tie.of, torch.ones_like(value).reshape(tie.of.shape))
    return {name: total / counts[name] for name, total in totals.items()}


def part(dense: Tensor, block: Block) -> Tensor:
    """The block's values, copied out by index."""
    return dense[_index(block, dense.device)]


def add_part(dense: Tensor, block: Block, value: Tensor) -> None:
    """Adds `value` to the block in place."""
    dense[_index(block, dense.device)] += value


def _index(block: Block, device: torch.device) -> tuple[Tensor, ...]:
    positions = [torch.tensor([p for start, stop in ranges for p in range(start, stop)], device=device) for ranges in block.ranges]
    return tuple(torch.meshgrid(*positions, indexing="ij"))


def _treat_entry(model: nn.Module, entry: Entry) -> None:
    like = model.get_submodule(entry.conv1).weight
    assert isinstance(like, Tensor)
    modules: dict[str, nn.Module] = {name: nn.Identity() for name in entry.removed}
    if entry.treatment == "slice":
        modules |= {name: PadShortcut(entry.out, entry.stride) for name in entry.convs}
    else:
        modules |= {name: strided_shortcut(entry.out, entry.stride) for name in entry.convs}
        block = model.get_submodule(entry.block)
        block.widen = Widen(entry.width, entry.out).to(like).train(block.training)
        block.__class__ = widened_class(type(block))
        conv1 = model.get_submodule(entry.conv1)
        conv1.in_channels = entry.out  # type: ignore[assignment]
    for name, module in modules.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, module.to(like).train(model.training))
