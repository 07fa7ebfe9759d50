"""What a reader sees: names and messages, whatever characters somebody put into them, and how far long work has come."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def printable(text: str, *, as_json: bool = False) -> str:
    r"""The text with every character escaped that is not to be seen as itself: control characters, line separators, changes of direction.

    >>> print(printable("fc1\x1b[2J\n.weight\u202e ← W"))
    fc1\x1b[2J\n.weight\u202e ← W

    `as_json` is for JSON text, in which such characters stand in strings alone: it says the same after.

    >>> print(printable('{"name": "\x7f"}', as_json=True))
    {"name": "\u007f"}
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _in_json(c) if as_json else repr(c)[1:-1] for c in text)


def _in_json(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else json.dumps(character)[1:-1]


def sizes_in(text: str) -> dict[str, int | str]:
    """Names with commas, some with a number, as the option `share` is written where there is only text.

    >>> sizes_in("mlp=2, attention"), sizes_in("none")
    ({'mlp': 2, 'attention': 'all'}, {})
    """
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip() not in ("", "none")]
    return {name: int(size) if size.isdecimal() else size or "all" for name, _, size in parts}


def with_progress(things: Iterable[T], what: str) -> Iterable[T]:
    """The same, with a progress bar where that takes more than a second, tqdm is installed, and somebody sees it: no file is written to.

    >>> list(with_progress([1, 2], "fitting"))
    [1, 2]
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return things
    bar: Iterable[T] = tqdm(things, what, leave=False, delay=1, disable=None)
    return bar


def legible(value: T) -> T:
    r"""A dataclass, or a container, with all its texts `printable`. Other texts stay other ones: a backslash becomes two.

    >>> legible({"fc1\x1b": ("fc1\\x1b", 3)})
    {'fc1\\x1b': ('fc1\\\\x1b', 3)}
    """
    found: Any = value
    if isinstance(value, str):
        found = printable(value.replace("\\", r"\\"))
    elif isinstance(value, tuple | list):
        found = type(value)(map(legible, value))
    elif isinstance(value, dict):
        found = {legible(key): legible(item) for key, item in value.items()}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = dataclasses.replace(value, **{field.name: legible(getattr(value, field.name)) for field in dataclasses.fields(value)})
    return found  # type: ignore[no-any-return]
