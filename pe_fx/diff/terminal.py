"""A diff as text, in colours on a terminal."""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter

from rich.text import Text

from pe_fx.diff.changes import Diff
from pe_fx.diff.folds import form_of_change, groups, span, times
from pe_fx.diff.tree import Row, rows, signed

STYLES = {"before": "red", "after": "green", "site": "bold", "module": "", "folded": "dim", "line": "", "note": "cyan"}


def unified(diff: Diff, width: int, *, fold: bool = True) -> Text:
    """What is there before marked "-", what is there after "+", as in a unified diff."""
    text = _heading(diff)
    for row in rows(diff, fold=fold):
        for mark, content, style, note in _sides(row)[row.is_context :]:
            text.append_text(Text("").join(line.append("\n") for line in _lines(mark, row.depth, content, width, style, note)))
    return text


def side_by_side(diff: Diff, width: int, *, fold: bool = True) -> Text:
    """Before on the left, after on the right, in two columns."""
    text = _heading(diff)
    half = (width - 3) // 2
    for row in rows(diff, fold=fold):
        left, right = (_lines(mark, row.depth, content, half, style, note) for mark, content, style, note in _sides(row))
        for before, after in itertools.zip_longest(left, right, fillvalue=Text()):
            gap = " " * (half - before.cell_len)
            text.append_text(before).append(f"{gap} │ ").append_text(after).rstrip()
            text.append("\n")
    return text


def stat(diff: Diff, width: int, *, fold: bool = True) -> Text:
    """One line a change with a bar for its parameters, as `git diff --stat` has; with `fold`, one for all blocks that changed alike."""
    diff, text = diff.shown, Text()
    if not diff:
        return text
    folded = list(groups(diff.changes, form_of_change).values()) if fold else [[change] for change in diff.changes]
    names = [span([change.module for change in alike]) or "." for alike in folded]
    numbers = [f"{times(len(alike) if alike[0].delta else 1)}{signed(alike[0].delta)}" for alike in folded]
    kinds = [alike[0].kind for alike in folded]
    deltas = [sum(change.delta for change in alike) for alike in folded]
    columns = [max(map(len, cells)) for cells in (names, kinds, numbers)]
    largest = max(map(abs, deltas)) or 1
    room = max(width - sum(columns) - 9, 0)
    for name, kind, number, delta in zip(names, kinds, numbers, deltas, strict=True):
        text.append(f" {name:<{columns[0]}} | {kind:<{columns[1]}}  {number:>{columns[2]}} ")
        bar = max(round(room * abs(delta) / largest), 1) if delta else 0
        text.append("−" * bar if delta < 0 else "+" * bar, STYLES["before" if delta < 0 else "after"])
        text.append("\n")
    return text


def misses(diff: Diff, width: int) -> Text:
    """Why others were left as they are."""
    diff, text = diff.shown, Text("\n")
    if not diff.misses:
        return text.append("no near misses\n")
    text.append("near misses:\n", STYLES["site"])
    for miss in diff.misses:
        text.append(f"  {miss.name or '.'}  {miss.kind}\n")
        text.append(
            textwrap.fill(miss.reason, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False) + "\n", "dim"
        )
    return text


def summary(diff: Diff) -> Text:
    """One line: how many changes of which kind, how many nodes, how many parameters.

    >>> from torch import nn
    >>> from pe_fx.diff.changes import diff_transform
    >>> print(summary(diff_transform(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)))).plain)
    1 change (mlp); 1 of 5 nodes; 33,088 → 16,704 parameters (−16,384, −49.5 %)
    """
    diff = diff.shown
    if not diff:
        return Text("no differences")
    kinds = Counter(change.kind for change in diff.changes)
    named = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) if len(kinds) > 1 or len(diff.changes) > 1 else next(iter(kinds))
    edits = sum(len(change.edits) for change in diff.changes)
    total = len(diff.before.nodes) + sum(edit.before is None for change in diff.changes for edit in change.edits)
    line = f"{len(diff.changes)} change{'s' * (len(diff.changes) != 1)} ({named}); {edits:,} of {total:,} nodes; "
    return Text(line + _parameters(diff), STYLES["site"])


def _parameters(diff: Diff) -> str:
    before, after = diff.before.numel, diff.after.numel
    if before == after:
        return f"{before:,} parameters"
    share = f", {100 * diff.delta / before:+.1f} %".replace("-", "−") if before else ""
    return f"{before:,} → {after:,} parameters ({signed(diff.delta)}{share})"


def _heading(diff: Diff) -> Text:
    diff, text = diff.shown, Text()
    if diff:
        text.append(f"--- {diff.before.name}\n", STYLES["before"])
        text.append(f"+++ {diff.after.name}\n", STYLES["after"])
    return text


def _sides(row: Row) -> list[tuple[str, str | None, str, str]]:
    """For before and after: the mark, what stands there, its style, and the note where it belongs to that side."""
    if row.is_context:
        style = STYLES[row.role]
        return [(" ", row.before, style, ""), (" ", row.after, style, row.note)]
    return [("-", row.before, STYLES["before"], "" if row.after else row.note), ("+", row.after, STYLES["after"], row.note)]


def _lines(mark: str, depth: int, content: str | None, width: int, style: str, note: str) -> list[Text]:
    """The line, wrapped under its own beginning, its note at the right edge or, where there is no room, below."""
    if content is None:
        return []
    deepest = max(width // 2 - 10, 0)  # what is narrow is indented less
    first, under = (f"{mark} {'  ' * min(steps, deepest)}" for steps in (depth, depth + 2))
    wrapped = textwrap.wrap(first + content, width, subsequent_indent=under, break_on_hyphens=False)
    lines = [Text(line, style) for line in wrapped]
    if note:
        if lines[-1].cell_len + 2 + len(note) > width:
            lines.append(Text(mark))
        lines[-1].append(note.rjust(width - lines[-1].cell_len), STYLES["note"])
    return lines
