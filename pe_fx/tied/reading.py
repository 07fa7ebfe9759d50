"""How Dynamo reads a tied weight. All that it meets on the way it checks again before each call, so it shall meet little."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pe_fx.tied.assembly import Layout, written_out
from pe_fx.tied.placed import placed
from pe_fx.ties import gain_of, kept_of


def is_sharded(parameter: Any) -> bool:
    """Whether it is a DTensor, the class of which takes long to import."""
    return hasattr(parameter, "placements")


@functools.cache
def reader(layout: Layout, name: str, attributes: tuple[str, ...], beside: tuple[str, ...]) -> Callable[..., Any]:
    """A function of a `TiedWeight` and its module that does what `TiedWeight.dense` does, and leaves to it what is out of the ordinary.

    `attributes`: the names of the sources, whose modules the tied weight holds as `source0` and so on; `beside`: those of the module's
    other parameters. Names stand in the code as constants, which takes less than half of the checks that a loop over them takes.
    """
    general = f"tied.dense(owner, {name!r})"
    own = "".join(
        f"own[{each!r}] if own.get({each!r}) is not None else " for each in dict.fromkeys((*beside, kept_of(name), gain_of(name)))
    )
    lines = [
        "def read(tied, owner):",
        "    own = owner._parameters",
        f"    if own is not tied.place: return {general}",
        f"    beside = {own}next((each for each in own.values() if each is not None), None)",
    ]
    for i, attribute in enumerate(attributes):
        lines += [
            f"    source{i} = tied.source{i}._parameters.get({attribute!r})",
            f"    if source{i} is None: return {general}",
            f"    source{i} = placed(source{i}, tied.source{i}, {attribute!r}, beside)",
            f"    if source{i} is None or is_sharded(source{i}): return {general}",
        ]
    given = [f"own.get({kept_of(name)!r})", f"own.get({gain_of(name)!r})", *(f"source{i}" for i in range(len(attributes)))]
    given += ["*tied.moves_beside(source0)"] if layout.fitted else []
    lines.append(f"    return assemble(None, {', '.join(given)})")
    space: dict[str, Any] = {"placed": placed, "is_sharded": is_sharded, "assemble": written_out(layout)}
    exec("\n".join(lines), space)
    found: Callable[..., Any] = space["read"]
    return found
