"""Tables in Markdown, for the pages that the scripts beside this file write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """
    >>> print(markdown(("model", "step"), [("gpt2", "0.93")]))
    | model | step |
    | --- | --- |
    | gpt2 | 0.93 |
    """
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))
