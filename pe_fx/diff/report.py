"""A plan as tables: its sites, what they save by kind and by stage, and its near misses."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pe_fx.diff.tree import within
from pe_fx.text import legible
from pe_fx.ties import ONE_PATH, Plan, Site, to_ranges

_NUMBER = re.compile(r"\d+(?=\D*$)")

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
    for sites in _groups(plan.sites, _form).values():
        first = sites[0]
        kind = f"{first.kind} ({first.entry.treatment})" if first.entry else first.kind
        ties = "\n".join(within(str(tie), first.name) for tie in first.ties)
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


def _form(site: Site) -> Hashable:
    """What a site is, whatever its number in the stack."""
    ties = tuple(within(str(tie), site.name) for tie in site.ties)
    return site.kind, _NUMBER.sub("*", site.name), ties, site.saved, site.entry is None


def _span(names: Sequence[str]) -> str:
    """
    >>> _span(["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]), _span(["blocks.1", "blocks.3"])
    ('blocks.{0…2}.attn', 'blocks.{1,3}')
    """
    numbers = [int(match[0]) for name in names if (match := _NUMBER.search(name))]
    if len(numbers) < 2:
        return names[0]
    runs = to_ranges(numbers)
    spans = ",".join(str(start) if stop == start + 1 else f"{start}…{stop - 1}" for start, stop in runs)
    return _NUMBER.sub(f"{{{spans}}}", names[0])
