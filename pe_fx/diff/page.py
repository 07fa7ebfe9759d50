"""A diff as one page that needs nothing but a browser: both graphs side by side."""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

from pe_fx.diff.changes import Change, Diff
from pe_fx.diff.folds import form_of_change, groups, span
from pe_fx.diff.graph import Node
from pe_fx.diff.overlay import AFTER, BEFORE, Overlay
from pe_fx.diff.terminal import summary
from pe_fx.diff.tree import shaped
from pe_fx.files import whole_file

TITLES = {BEFORE: "before", AFTER: "after"}


def write_page(diff: Diff, path: str | Path) -> None:
    """Writes the page. Raises `OSError` where that cannot be done."""
    text = page(diff)
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def page(diff: Diff) -> str:
    """The page as text: assets/page.html with its style, its scripts and the diff put in.

    >>> from torch import nn
    >>> from pe_fx.diff.changes import diff_transform
    >>> page(diff_transform(nn.Linear(4, 4), name="a linear layer"))[:15]
    '<!doctype html>'
    """
    diff = diff.shown
    packed = zlib.compress(json.dumps(described(diff), ensure_ascii=False, separators=(",", ":")).encode(), 9)
    parts = {
        "title": html.escape(f"{diff.before.name} → {diff.after.name}"),
        "style": _asset("page.css"),
        "cytoscape": _asset("cytoscape.min.js"),
        "licence": html.escape(_asset("cytoscape.LICENSE")),
        "data": base64.b64encode(packed).decode(),
        "script": _asset("page.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], _asset("page.html"))


def described(diff: Diff) -> dict[str, Any]:
    """What the page draws: `Diff.to_json` as "diff", its parts with their layouts, and the edges."""
    diff = diff.shown
    overlay = Overlay(diff)
    parts = [_part(overlay, number) for number in range(len(overlay.parts))]
    for number, points, routes in overlay.levels():
        parts[number] |= {"points": list(points.items()), "routes": [[*edge, bends] for edge, bends in routes.items()]}
    return {
        "diff": json.loads(diff.to_json()),
        "summary": summary(diff).plain,
        "parts": parts,
        "edges": [[*edge, sides] for edge, sides in overlay.edges.items()],
        "links": overlay.links,
        "opened": overlay.opened(),
        "folds": _folds(diff),
    }


def _folds(diff: Diff) -> list[dict[str, Any]]:
    """The rows of the list of changes: one for all blocks that changed alike."""
    rows = groups(range(len(diff.changes)), lambda number: form_of_change(diff.changes[number])).values()
    return [{"changes": row, "name": span([_titled(diff.changes[number]) for number in row])} for row in rows]


def _titled(change: Change) -> str:
    return (change.module or "the model") + (f" → {change.module_after}" if change.module_after else "")


def _part(overlay: Overlay, number: int) -> dict[str, Any]:
    part = overlay.parts[number]
    found: dict[str, Any] = {"parent": part.parent, "changes": sorted(part.changes), "delta": part.delta}
    if part.is_module:
        found["children"] = part.children
    if number in overlay.edit:
        _, edit = overlay.edit[number]
        found["edit"] = {"kind": edit.kind, "what": edit.what}
    sides = overlay.sides(number)
    for side, title in TITLES.items():
        if sides & side:
            node = part.before if side == BEFORE else part.after
            path = overlay.path(number, side)
            more = {"class": overlay.graph(side).modules.get(path, "")} if node is None else _node(node)
            name, detail = overlay.labels(number, side)
            found[title] = {"path": path, "name": name, "detail": detail} | more
    return found


def _node(node: Node) -> dict[str, Any]:
    """As it is shown in detail. `path` is the module's."""
    return {
        "path": node.module,
        "op": node.op,
        "id": node.id,
        "operands": [[str(operand), operand.names, shaped(operand.shape)] for operand in node.operands],
        "settings": node.settings,
        "shape": shaped(node.shape) if node.dtype else "",
        "dtype": node.dtype,
    }


def _asset(name: str) -> str:
    return resources.files("pe_fx.diff").joinpath("assets", name).read_text(encoding="utf-8")
