"""The README's tables of what a sweep found, in Markdown, made from its CSV."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

Row = dict[str, str]

PAPER = (  # the models of the tables of arXiv 2401.16438 that timm has
    *("deit_tiny_patch16_224", "deit_small_patch16_224"),
    *("pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5"),
    *("tnt_s_legacy_patch16_224", "tnt_b_patch16_224"),
    *("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
    *("twins_svt_small", "twins_svt_base", "twins_svt_large"),
    *("resnet18", "resnet34", "resnet50"),
)


def summary(rows: Sequence[Row]) -> str:
    parts = [outcomes(rows), paper(rows), misses(rows)]
    if any(row["error"] for row in rows):
        parts.append(errors(rows))
    return "\n\n".join(parts)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def outcomes(rows: Sequence[Row]) -> str:
    """Per library the number of models by outcome, and the time that planning takes beside capture."""
    by_library: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_library[row["library"]].append(row)
    header = (
        "models",
        "not built",
        "planned",
        "with sites",
        "verified",
        "of them shallow",
        "in float64",
        "too large",
        "not equal",
        "errors",
        "worst error",
        "match / capture",
    )
    lines = [(_label(library, own), *_outcome(own)) for library, own in by_library.items()]
    slowest = max((row for row in rows if row["capture_s"]), key=lambda row: float(row["match_s"]) + float(row["rewrite_s"] or 0))
    seconds = float(slowest["match_s"]) + float(slowest["rewrite_s"] or 0)
    share = seconds / float(slowest["capture_s"])
    note = (
        f"Slowest to match and rewrite: {slowest['model']} ({int(slowest['nodes']):,} nodes, {seconds:.1f} s, {share:.0%} of its capture)."
    )
    dates = sorted({row["date"] for row in rows})
    return f"{markdown(('library', *header), lines)}\n\n{note} Run {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."


def _label(library: str, rows: Sequence[Row]) -> str:
    return "; ".join(sorted({row["versions"] for row in rows})) or library


def _outcome(rows: Sequence[Row]) -> list[str]:
    verified = Counter(row["verified"] for row in rows)
    shares = [
        (float(row["match_s"]) + float(row["rewrite_s"] or 0)) / float(row["capture_s"]) for row in rows if float(row["capture_s"] or 0)
    ]
    return [
        f"{len(rows):,}",
        f"{sum(map(_is_unbuilt, rows)):,}",
        f"{sum(bool(row['params']) for row in rows):,}",
        f"{sum(row['sites'] not in ('', '{}') for row in rows):,}",
        f"{verified['full'] + verified['shallow'] + verified['float64']:,}",
        f"{verified['shallow']:,}",
        f"{verified['float64']:,}",
        f"{verified['too large']:,}",
        f"{verified['NOT equal']:,}",
        f"{sum(bool(row['error']) and not _is_unbuilt(row) for row in rows):,}",
        f"{max((float(row['worst_error']) for row in rows if row['worst_error']), default=0.0):.0e}",
        f"{statistics.median(shares):.1%}",
    ]


def _is_unbuilt(row: Row) -> bool:
    """Whether no small model with fitting inputs could be made from its configuration: nothing of pe_fx was run."""
    return row["error"].startswith("build:")


def paper(rows: Sequence[Row]) -> str:
    """The paper's models before and after."""
    by_name = {row["model"]: row for row in rows if row["library"] == "timm" and row["params"]}
    lines = []
    for name in PAPER:
        if row := by_name.get(name):
            before, after = int(row["params"]), int(row["params_tied"])
            sites = ", ".join(f"{number} {kind}" for kind, number in json.loads(row["sites"]).items()) or "none"
            lines.append((name, f"{before:,}", f"{after:,}", f"{after / before:.0%}", sites))
    return markdown(("model", "dense", "tied", "", "sites"), lines)


def misses(rows: Sequence[Row]) -> str:
    """The misses by reason, most frequent first."""
    number: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows:
        own = json.loads(row["misses"] or "{}")
        number.update(own)
        models.update(own.keys())
    lines = [(f"{count:,}", str(models[reason]), reason) for reason, count in number.most_common()]
    return markdown(("misses", "models", "reason"), lines)


def errors(rows: Sequence[Row]) -> str:
    number: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["error"]:
            number[re.sub(r"\d+", "…", row["error"])[:120]].append(row["model"])
    lines = [
        (str(len(names)), ", ".join(names[:6]), error.replace("|", "\\|"))
        for error, names in sorted(number.items(), key=lambda item: -len(item[1]))
    ]
    return markdown(("errors", "models", "error"), lines)
