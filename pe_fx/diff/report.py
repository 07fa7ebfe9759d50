"""A plan as tables: its sites, what they save by kind and by stage, and its near misses."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pe_fx.ties import Plan, Site

SHOWN = 8
"""Near misses that are shown without being asked for."""


def plan_report(plan: Plan, *, every_miss: bool = False) -> RenderableType:
    """Everything that `pe-fx plan` shows."""
    parts: list[RenderableType] = []
    if plan.sites:
        by_kind = _savings("kind", plan, lambda site: site.kind)
        by_stage = _savings("stage", plan, lambda site: stage_of(site.name))
        parts += [_sites(plan), "", by_kind, "", by_stage, ""]
    shown = plan.misses if every_miss else plan.misses[:SHOWN]
    for miss in shown:
        parts += [Text(f"near miss: {miss.name or '.'} ({miss.kind})", "bold"), Padding(Text(miss.reason, "dim"), (0, 0, 0, 2))]
    if len(shown) < len(plan.misses):
        parts.append(Text(f"… and {len(plan.misses) - len(shown)} more near misses: --misses"))
    share = f" ({100 * plan.params_after / plan.params_before:.1f} %)" if plan.params_before else ""
    count = f"{len(plan.sites)} site{'s' * (len(plan.sites) != 1)}"
    near = f"; {len(plan.misses)} near miss{'es' * (len(plan.misses) != 1)}"
    parts.append(Text(f"{count}; {plan.params_before:,} → {plan.params_after:,} parameters{share}{near}", "bold"))
    return Group(*parts)


def stage_of(module: str) -> str:
    """The stack of blocks that a module is in: its path up to the last number.

    >>> stage_of("layers.0.blocks.1.attn"), stage_of("head.mlp")
    ('layers.0.blocks', 'head.mlp')
    """
    atoms = module.split(".")
    last = max((place for place, atom in enumerate(atoms) if atom.isdigit()), default=len(atoms))
    return ".".join(atoms[:last]) or "."


def _sites(plan: Plan) -> Table:
    """Sites that differ in nothing but numbers are one line."""
    table = _table(("site", "left"), ("kind", "left"), ("ties", "left"), ("saved", "right"))
    for sites in _groups(plan.sites, _without_numbers).values():
        first = sites[0]
        kind = f"{first.kind} ({first.entry.treatment})" if first.entry else first.kind
        ties = "\n".join(str(tie).replace(f"{first.name}.", "") if first.name else str(tie) for tie in first.ties)
        times = f"{len(sites)} × " if len(sites) > 1 else ""
        table.add_row(_span([site.name for site in sites]) or ".", kind, ties, f"{times}{first.saved:,}")
    return table


def _savings(title: str, plan: Plan, key: Callable[[Site], str]) -> Table:
    table = _table((title, "left"), ("sites", "right"), ("saved", "right"), ("of all", "right"))
    for name, sites in _groups(plan.sites, key).items():
        saved = sum(site.saved for site in sites)
        table.add_row(str(name), str(len(sites)), f"{saved:,}", f"{100 * saved / plan.params_before:.1f} %")
    return table


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table


def _groups(sites: Iterable[Site], key: Callable[[Site], Hashable]) -> dict[Hashable, list[Site]]:
    groups: dict[Hashable, list[Site]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return groups


def _without_numbers(site: Site) -> Hashable:
    """What blocks of one kind have in common."""
    names = (site.name, *(tie.target for tie in site.ties), *(tie.source for tie in site.ties))
    blocks = tuple((tie.into.ranges, tie.of.ranges, tie.transposed) for tie in site.ties)
    return site.kind, tuple(re.sub(r"\d+", "*", name) for name in names), blocks, site.saved, site.entry is None


def _span(names: Sequence[str]) -> str:
    """
    >>> _span(["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"])
    'blocks.{0…2}.attn'
    """
    atoms = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(values[0] if len(set(values)) == 1 else f"{{{values[0]}…{values[-1]}}}" for values in atoms)
