"""What is alike in the blocks of one stack, as one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from pe_fx.diff.changes import Change
from pe_fx.diff.tree import within
from pe_fx.ties import Site, to_ranges

T = TypeVar("T")

_NUMBER = re.compile(r"\d+(?=\D*$)")


def groups(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    """
    >>> groups([1, 2, 3], key=lambda number: number % 2)
    {1: [1, 3], 0: [2]}
    """
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def form_of_site(site: Site) -> Hashable:
    """What a site is, whatever its number in the stack."""
    ties = tuple(within(str(tie), site.name) for tie in site.ties)
    return site.kind, _numberless(site.name), ties, site.saved, site.entry is None


def form_of_change(change: Change) -> Hashable:
    """What a change is, whatever the number of its block."""
    weights = tuple(
        (within(each.name, change.module), each.before, each.after, within(each.view, change.module)) for each in change.weights
    )
    edits = tuple((edit.kind, edit.what) for edit in change.edits)
    names = _numberless(change.module), _numberless(change.module_after)
    return change.kind, change.treatment, change.delta, names, weights, edits


def span(names: Sequence[str]) -> str:
    """
    >>> span(["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]), span(["blocks.1", "blocks.3"])
    ('blocks.{0…2}.attn', 'blocks.{1,3}')
    """
    numbers = [int(match[0]) for name in names if (match := _NUMBER.search(name))]
    if len(numbers) < 2:
        return names[0]
    runs = to_ranges(numbers)
    spans = ",".join(str(start) if stop == start + 1 else f"{start}…{stop - 1}" for start, stop in runs)
    return _NUMBER.sub(f"{{{spans}}}", names[0])


def times(count: int) -> str:
    """
    >>> times(3), times(1)
    ('3 × ', '')
    """
    return f"{count} × " if count > 1 else ""


def _numberless(name: str) -> str:
    return _NUMBER.sub("*", name)
