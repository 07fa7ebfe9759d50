"""The page of what a sweep found, made from its CSV."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence

from tables import markdown

Row = dict[str, str]

PAPER = (  # the models of the tables of arXiv 2401.16438
    *("deit_tiny_patch16_224", "deit_small_patch16_224"),
    *("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large"),
    *("pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5"),
    *("t2t_vit_14", "t2t_vit_19", "t2t_vit_24"),
    *("tnt_s_legacy_patch16_224", "tnt_b_patch16_224"),
    *("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
    *("cvt_13", "cvt_21"),
    *("twins_svt_small", "twins_svt_base", "twins_svt_large"),
    *("resnet18", "resnet34", "resnet50"),
)


INTRODUCTION = """\
# Every model of timm, torchvision, transformers and diffusers

This page is written by `python examples/sweep.py --summary` from [sweep.csv](sweep.csv).

`python examples/sweep.py` plans, transforms and verifies whole libraries of models, each in a process of its own, one row for each; it goes
on where it stopped. Models of more than 100 M parameters are planned on the meta device and verified as shallow variants, where the
constructor takes a depth ("too large": where it does not). Of transformers, a small model is made from the configuration of each
architecture, of diffusers one from each constructor's defaults; "not built" are those for which that failed. "In float64" are models
whose float32 gradients are mostly rounding (a batch norm of two values, standardised weights): there the comparison was repeated. "Match
/ capture" is the median share of the capture's time that matching and rewriting take. Every row of the CSV has its date and versions: two
libraries were run with the same rules only where their dates agree."""

WITHOUT = """\
Models of timm without a site are chains of 3x3 convolutions (VGG, ResNet18, RepVGG, Darknet), blocks that join all they made (VoVNet,
DenseNet, HGNet), or bottlenecks that no tie fits: of two widths (DPN, SKNet, ResNeSt, RDNet) or with a gate that mixes positions (gMLP).

`PE_FX_PARTS=40 PE_FX_EXAMPLES=250 pytest tests/test_properties.py` makes 10,000 random networks of chains, gates, attentions, joined
streams and experts, with masks, conditions, caches, lent weights, nesting and random options: each is planned as expected, equals its
dense twin and comes back by `untie`. pytest alone makes 100.

## The models of the paper

At the paper's sizes, by the names that they have in timm; PVT and CvT are transformers' ("pvt_…", "cvt_…") and T2T-ViT is mmpretrain's,
which is optional (`pip install mmpretrain mmcv-lite mmengine-lite`). Focal Transformer (Tiny, Small and Base) is in no package that was
found: the FocalNet of timm and transformers is another model, without attention:"""

MISSES = """\
ResNet18 and 34 have no bottleneck, only pairs of 3x3 convolutions.

## What is not tied

By how often it occurs: matrices that are no transposes of each other; 3x3 convolutions; the first block of a stage, unless `entry` treats
it; grouped 1x1 convolutions; attention whose q, k, v or output is not made by one square matrix; hidden values that something else reads,
too; gates whose two factors are both activated, or are mixed over positions. Every reason, without the names and numbers of the models:"""

UNBUILT = """\
## Not built

Of transformers and diffusers, models of which no small one was found that runs. "Options": none of the sets of options tried makes a
model, as where a constructor takes other models; "inputs": a model was made, and none of the inputs tried, which are made by the names in
its signature, went through; "not told": rows without that distinction. The rows have the errors:"""

ERRORS = """\
## Errors

Of models that could be built and fed:"""


def page(rows: Sequence[Row]) -> str:
    libraries = [row for row in rows if row["library"] != "paper"]
    parts = [INTRODUCTION, outcomes(libraries), WITHOUT, paper(rows), MISSES, misses(libraries), UNBUILT, unbuilt(libraries)]
    if any(row["error"] and not _is_unbuilt(row) for row in rows):
        parts += [ERRORS, errors(rows)]
    return "\n\n".join(parts) + "\n"


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
    verified = Counter(row["verified"] for row in rows if not row["error"])
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
    by_name = {row["model"]: row for row in rows if row["library"] in ("timm", "paper") and row["params"]}
    lines = []
    for name in PAPER:
        if row := by_name.get(name):
            before, after = int(row["params"]), int(row["params_tied"])
            sites = ", ".join(f"{number} {kind}" for kind, number in json.loads(row["sites"]).items()) or "none"
            lines.append((name, f"{before:,}", f"{after:,}", f"{after / before:.0%}", sites, row["verified"]))
    return markdown(("model", "dense", "tied", "", "sites", "verified"), lines)


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


def unbuilt(rows: Sequence[Row]) -> str:
    """The models that were not built, by library and by what was not found."""
    models: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in filter(_is_unbuilt, rows):
        found = re.search(r"BuildError: no (\w+) fit", row["error"])
        models[row["library"], found[1] if found else "not told"].append(row["model"])
    lines = [(library, what, str(len(names)), ", ".join(names)) for (library, what), names in sorted(models.items())]
    return markdown(("library", "no fitting", "models", "which"), lines)


def errors(rows: Sequence[Row]) -> str:
    """What failed of models that were built: the first cause, without its model, places and numbers."""
    models: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["error"] and not _is_unbuilt(row):
            cause = re.sub(r"could not be captured with the inputs given.*?\): ", "", row["error"].partition(" [")[0])
            models[re.sub(r"CaptureError: \w+ |[;(].*|(?<=dependent expression) .*", "", cause).strip()].append(row["model"])
    lines = [(str(len(names)), cause, ", ".join(names)) for cause, names in sorted(models.items(), key=lambda item: -len(item[1]))]
    return markdown(("models", "error", "which"), lines)
