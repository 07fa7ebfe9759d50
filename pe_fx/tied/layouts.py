"""The ties of a plan as layouts, from which both rewriters put a tied weight together."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from pe_fx.errors import PeFxError
from pe_fx.tied.assembly import Fitted, Gain, Layout, Mix, Piece, Regrouping, View
from pe_fx.ties import Plan, Ranges, Tie, length, overlap


def compare_shapes(plan: Plan, shapes: dict[str, tuple[int, ...]], what: str) -> None:
    """Raises `PeFxError` where a plan contradicts itself, or the shapes that the weights have here."""
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


def by_target(ties: Iterable[Tie]) -> dict[str, list[Tie]]:
    """The ties of each tied weight. Raises `PeFxError` where two of them overlap."""
    grouped: dict[str, list[Tie]] = {}
    for tie in ties:
        for other in grouped.setdefault(tie.target, []):
            if other.into.overlaps(tie.into):
                raise PeFxError(f"two ties for one weight: {other} and {tie}")
        grouped[tie.target].append(tie)
    return grouped


def axis_of(ties: list[Tie]) -> int:
    """The dimension along which the ties divide their target."""
    axes = {dim for tie in ties for dim in tie.into.divided}
    if len(axes) > 1:
        raise PeFxError(f"{ties[0].target} would be tied along several dimensions: {', '.join(map(str, ties))}")
    return axes.pop() if axes else 0


def kept_ranges(ties: list[Tie]) -> Ranges:
    """The positions that no tie takes."""
    edges = [0, *(edge for span in _taken(ties) for edge in span), ties[0].into.full_shape[axis_of(ties)]]
    return tuple((start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop)


def layout_of(ties: list[Tie], targets: dict[str, list[Tie]], kept: dict[str, Ranges]) -> Layout:
    """The layout of a tied weight, where of each tied weight only the positions `kept` are stored (all, where not given)."""
    axis = axis_of(ties)
    views: list[View] = []
    gains = 0
    for tie in ties:
        ranges = list(tie.of.ranges)
        sizes = list(tie.of.full_shape)
        if tie.source in targets:
            divided = axis_of(targets[tie.source])
            if overlap(ranges[divided], _taken(targets[tie.source])):
                raise PeFxError(f"{tie}: the source is tied away itself")
            if tie.source in kept:
                ranges[divided] = _renumbered(ranges[divided], kept[tie.source])
                sizes[divided] = length(kept[tie.source])
        views.append(
            View(
                tuple(None if own == ((0, size),) else own for own, size in zip(ranges, sizes, strict=True)),
                tie.axes if tie.transposed and tie.spread is None else None,
                tie.into.shape if tie.spread is None and len(tie.into.shape) != len(tie.of.shape) else None,
                mix_of(tie),
                None if tie.gain is None else Gain(channel_axes_in_source(tie)[0], gains, tie.gains, tie.gain),
                regrouping_of(tie),
            )
        )
        gains += tie.gains
    name = ties[0].target
    spans = [(start, stop, index) for index, tie in enumerate(ties) for start, stop in tie.into.ranges[axis]]
    spans += [(start, stop, -1) for start, stop in kept_ranges(ties)]
    counts = Counter(index for *_, index in spans)
    seen: Counter[int] = Counter()
    pieces = []
    for start, stop, index in sorted(spans):
        size = stop - start
        begin = start if index < 0 and name not in kept else seen[index]
        whole = counts[index] == 1 and (index >= 0 or name in kept)
        pieces.append(Piece(index) if whole else Piece(index, begin, begin + size))
        seen[index] += size
    return Layout(axis, tuple(pieces), tuple(views), any(tie.contiguous for tie in ties))


def channel_axes_in_source(tie: Tie) -> tuple[int, int]:
    """The tie's `channel_axes` as dimensions of what it is made of."""
    channels, others = tie.channel_axes
    return (others, channels) if tie.transposed and tie.spread is None else (channels, others)


def mix_of(tie: Tie) -> Mix | Fitted | None:
    channels, others = channel_axes_in_source(tie)
    if tie.order is not None:
        return Fitted(others, tie.order)
    if tie.seed is None or tie.channels is None:
        return None
    drawn = Mix.drawn(*tie.channel_axes, tie.shape, tie.seed)
    return dataclasses.replace(drawn, axis=channels, across=others)


def regrouping_of(tie: Tie) -> Regrouping | None:
    """How `into` is made of `of` where their matrix is spread over several dimensions."""
    if tie.spread is None:
        return None
    (shape, dims), (_, order) = (
        (block.shape, (*rows, *columns)) for block, (rows, columns) in zip((tie.into, tie.of), tie.spread, strict=True)
    )
    back = tuple(dims.index(dim) for dim in range(len(dims)))
    return Regrouping(order, tie.shape, tuple(shape[dim] for dim in dims), back)


def _taken(ties: list[Tie]) -> Ranges:
    """The positions that ties take, which overlap nowhere, as ranges in order."""
    axis = axis_of(ties)
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
