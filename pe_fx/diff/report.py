"""A plan as tables: its sites, what they save by kind and by stage, and its near misses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pe_fx.diff.folds import form_of_site, groups, span, times
from pe_fx.diff.tree import within
from pe_fx.text import legible
from pe_fx.ties import ONE_PATH, Plan, Site

SHOWN = 8
"""Near misses that are shown without being asked for."""


def plan_report(plan: Plan, *, every_miss: bool = False) -> RenderableType:
    """Everything that `pe-fx plan` shows."""
    plan = legible(plan)
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
    parts += [Text(note, "dim") for note in plan.notes]
    share = f" ({100 * plan.params_after / plan.params_before:.1f} %)" if plan.params_before else ""
    count = f"{len(plan.sites)} site{'s' * (len(plan.sites) != 1)}"
    near = f"; {len(plan.misses)} near miss{'es' * (len(plan.misses) != 1)}"
    parts.append(Text(f"{count}; {plan.params_before:,} → {plan.params_after:,} parameters{share}{near}", "bold"))
    parts += [Text(ONE_PATH)] if plan.capture == "run" else []
    return Group(*parts)


def facts(told: Mapping[str, str]) -> RenderableType:
    """One line for each, under one another."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, text in legible(dict(told)).items():
        table.add_row(name, text)
    return table


def stage_of(module: str) -> str:
    """The stack of blocks that a module is in: its path up to the last number.

    >>> stage_of("layers.0.blocks.1.attn"), stage_of("head.mlp")
    ('layers.0.blocks', 'head.mlp')
    """
    atoms = module.split(".")
    last = max((place for place, atom in enumerate(atoms) if atom.isdigit()), default=len(atoms))
    return ".".join(atoms[:last]) or "."


def _sites(plan: Plan) -> Table:
    """Sites of one stack that are tied alike are one line."""
    table = _table(("site", "left"), ("kind", "left"), ("ties", "left"), ("saved", "right"))
    for sites in groups(plan.sites, form_of_site).values():
        first = sites[0]
        kind = f"{first.kind} ({first.entry.treatment})" if first.entry else first.kind
        ties = "\n".join(within(str(tie), first.name) for tie in first.ties)
        table.add_row(span([site.name for site in sites]) or ".", kind, ties, f"{times(len(sites))}{first.saved:,}")
    return table


def _savings(title: str, plan: Plan, key: Callable[[Site], str]) -> Table:
    table = _table((title, "left"), ("sites", "right"), ("saved", "right"), ("of all", "right"))
    for name, sites in groups(plan.sites, key).items():
        saved = sum(site.saved for site in sites)
        table.add_row(str(name), str(len(sites)), f"{saved:,}", f"{100 * saved / plan.params_before:.1f} %")
    return table


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table
