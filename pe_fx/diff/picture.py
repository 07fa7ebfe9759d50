"""One module of a diff as a picture for papers and READMEs: before on the left, after on the right."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator
from pathlib import Path

from pe_fx.diff.changes import Diff
from pe_fx.diff.overlay import AFTER, BEFORE, ENTRY, EXIT, ROOT, Overlay, Point, layered
from pe_fx.errors import PeFxError
from pe_fx.files import whole_file

WIDTH, HEIGHT, ACROSS, DOWN, MARGIN, HEAD, FOOT = 184, 40, 24, 26, 20, 34, 30
LETTERS = 26
"""How many fit into a part."""

FILLS = {"": "#ffffff", "module": "#e9edf4", "holds": "#fff4d6", "changed": "#ffe3a3", "added": "#c6efd3", "removed": "#ffd0cc"}
LINES = {"": "#b3bdcc", "module": "#b3bdcc", "holds": "#b7791f", "changed": "#b7791f", "added": "#1f8a4c", "removed": "#c8322b"}
SHARED = "#7c3aed"
LEGEND = {"module": "module", "holds": "holds changes", "changed": "changed", "added": "added", "removed": "removed"}


def write_svg(diff: Diff, path: str | Path, module: str = "") -> None:
    """Writes the picture of a module. Raises `PeFxError` where there is none such, `OSError` where the file cannot be written."""
    text = svg(diff, module)
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_png(diff: Diff, path: str | Path, module: str = "") -> None:
    """As `write_svg`, in twice as many pixels. Raises `PeFxError` also where resvg-py is missing."""
    try:
        import resvg_py
    except ImportError as error:
        raise PeFxError("PNG is drawn with resvg-py: pip install 'pe_fx[cli]'; SVG needs no such library") from error
    content = bytes(resvg_py.svg_to_bytes(svg_string=svg(diff, module), zoom=2))
    with whole_file(path) as draft:
        draft.write_bytes(content)


def svg(diff: Diff, module: str = "") -> str:
    """The picture as text: what changed is unfolded as far as there is room.

    >>> from torch import nn
    >>> from pe_fx.diff.changes import diff_transform
    >>> text = svg(diff_transform(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))))
    >>> text[:4], text.count("0.weightᵀ")
    ('<svg', 1)
    """
    overlay = Overlay(diff)
    start = overlay.module(module) if module else ROOT
    parts, edges, links = overlay.unfolded(start)
    ends = {end for edge in edges for end in edge if end < 0}
    points, routes = layered([*ends & {ENTRY}, *parts, *ends & {EXIT}], edges)
    places = [*points.values(), *itertools.chain.from_iterable(routes.values())]
    left = min(x for x, _ in places)
    right = max(x for x, _ in places) + (0.5 if links else 0)  # what is linked bulges
    wide = _x((right, 0)) - _x((left, 0)) + WIDTH + 2 * MARGIN
    high = HEAD + _y((0, max(layer for _, layer in places))) + HEIGHT + FOOT
    panes = []
    for place, side in enumerate((BEFORE, AFTER)):
        lines = [f'<text x="{wide / 2:g}" y="20" class="title">{_title(overlay, start, side)}</text>']
        for edge, sides in edges.items():
            if sides & side:
                kind = {BEFORE: "removed", AFTER: "added"}.get(sides, "")
                way = routes.get(edge, routes.get((edge[1], edge[0]), [])[::-1])
                lines.append(_edge([points[edge[0]], *way, points[edge[1]]], edge, kind, left))
        lines += [_link(points[source], points[target], left) for source, target in links if side == AFTER]
        shared = {end for link in overlay.links for end in link} if side == AFTER else set()
        lines += itertools.chain.from_iterable(
            _box(overlay, part, side, start, points[part], left, part in shared) for part in parts if overlay.sides(part) & side
        )
        panes.append(f'<g transform="translate({place * wide:g} 0)">{"".join(lines)}</g>')
    kinds = {_kind(overlay, part) for part in parts}
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * wide:g}" height="{high:g}" viewBox="0 0 {2 * wide:g} {high:g}">'
        "<style>text{font:11px 'DejaVu Sans',Verdana,sans-serif;text-anchor:middle;fill:#1c2430}.title{font-weight:bold}"
        ".key{text-anchor:start;fill:#667085}</style>"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#98a2b3"/></marker></defs>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(panes)}{_legend(kinds, bool(links), high)}</svg>\n'
    )


def _x(point: Point) -> float:
    return point[0] * (WIDTH + ACROSS)


def _y(point: Point) -> float:
    return point[1] * (HEIGHT + DOWN)


def _center(point: Point, left: float) -> tuple[float, float]:
    return MARGIN + WIDTH / 2 + _x(point) - _x((left, 0)), HEAD + _y(point) + HEIGHT / 2


def _title(overlay: Overlay, start: int, side: int) -> str:
    path = overlay.path(start, side)
    return html.escape(f"{overlay.graph(side).name}{': ' if path else ''}{path}")


def _kind(overlay: Overlay, part: int) -> str:
    it = overlay.parts[part]
    if it.is_module:
        return "holds" if it.changes else "module"
    return overlay.edit[part][1].kind if part in overlay.edit else ""


def _box(overlay: Overlay, part: int, side: int, start: int, point: Point, left: float, shared: bool) -> Iterator[str]:
    x, y = _center(point, left)
    kind = _kind(overlay, part)
    line, width = (SHARED, 2.5) if shared else (LINES[kind], 1.2)
    yield (
        f'<rect x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{FILLS[kind]}" '
        f'stroke="{line}" stroke-width="{width}"/>'
    )
    texts = [text for text in overlay.labels(part, side, start) if text]
    for row, text in enumerate(texts):
        yield f'<text x="{x:g}" y="{y + 4 + 15 * (row - (len(texts) - 1) / 2):g}">{html.escape(_shortened(text))}</text>'


def _edge(way: list[Point], edge: tuple[int, int], kind: str, left: float) -> str:
    """A curve that leaves and comes in from above, through the bends between."""
    points = [_center(point, left) for point in way]
    if edge[0] >= 0:
        points[0] = points[0][0], points[0][1] + HEIGHT / 2
    if edge[1] >= 0:
        points[-1] = points[-1][0], points[-1][1] - HEIGHT / 2
    path = f"M{points[0][0]:g} {points[0][1]:g}"
    for (x, y), (to_x, to_y) in itertools.pairwise(points):
        path += f"C{x:g} {(y + to_y) / 2:g} {to_x:g} {(y + to_y) / 2:g} {to_x:g} {to_y:g}"
    color, width = (LINES[kind], 2) if kind else ("#98a2b3", 1.2)
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width}" marker-end="url(#tip)"/>'


def _link(source: Point, target: Point, left: float) -> str:
    (x, y), (to_x, to_y) = _center(source, left), _center(target, left)
    out = max(x, to_x) + WIDTH / 2 + 40 + min(60, abs(to_y - y) / 8)
    path = f"M{x + WIDTH / 2:g} {y:g}C{out:g} {y:g} {out:g} {to_y:g} {to_x + WIDTH / 2:g} {to_y:g}"
    return f'<path d="{path}" fill="none" stroke="{SHARED}" stroke-width="1.8" stroke-dasharray="5 4"/>'


def _legend(kinds: set[str], linked: bool, high: float) -> str:
    x, y = float(MARGIN), high - 12
    keys = []
    for kind, text in LEGEND.items():
        if kind in kinds:
            keys.append(f'<rect x="{x:g}" y="{y - 9:g}" width="18" height="11" rx="3" fill="{FILLS[kind]}" stroke="{LINES[kind]}"/>')
            keys.append(f'<text x="{x + 24:g}" y="{y:g}" class="key">{text}</text>')
            x += 44 + 7 * len(text)
    if linked:
        keys.append(f'<path d="M{x:g} {y - 4:g}h18" stroke="{SHARED}" stroke-width="1.8" stroke-dasharray="5 4"/>')
        keys.append(f'<text x="{x + 24:g}" y="{y:g}" class="key">one matrix</text>')
    return "".join(keys)


def _shortened(text: str) -> str:
    """
    >>> _shortened("fc1.weight 1536×384"), _shortened("scaled_dot_product_attention_for_cpu")
    ('fc1.weight 1536×384', 'scaled_dot…tention_for_cpu')
    """
    return text if len(text) <= LETTERS else f"{text[: LETTERS * 2 // 5]}…{text[LETTERS * 2 // 5 + 1 - LETTERS :]}"
