"""The plan that a tied model holds, and the model itself behind what torch.compile makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from pe_fx.errors import PeFxError
from pe_fx.tied.weight import before_tied, tied_weights_in
from pe_fx.ties import Plan, Site

Rename = Callable[[str], str]


def held_plan(model: nn.Module) -> Plan | None:
    """The plan that would tie a dense model as this one is, by the names that its weights have now; None where nothing is tied.

    >>> import pe_fx
    >>> tied = pe_fx.transform(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    >>> [str(tie) for tie in held_plan(nn.Sequential(nn.ReLU(), tied)).ties]
    ['1.2.weight ← 1.0.weightᵀ']

    Several transforms make one plan. Raises `PeFxError` where a weight is tied to one outside the model.
    """
    paths: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), path)
    plans: dict[int, Plan] = {}
    names: dict[int, dict[str, str]] = {}  # for each plan, from the names in it to those in the model
    for full, _, _, weight in tied_weights_in(model):
        plans[id(weight.plan)] = weight.plan
        now = names.setdefault(id(weight.plan), {})
        now[weight.name] = full
        sources = [tie.source for tie in weight.plan.ties if tie.target == weight.name]
        for source, (owner, name) in zip(sources, weight.sources, strict=True):
            if id(owner) not in paths:
                raise PeFxError(f"{full} is tied to {source}, which is no part of this model: take the whole, or pe_fx.untie it")
            path, name = paths[id(owner)], before_tied(owner, name)
            now[source] = f"{path}.{name}" if path else name
    if not plans:
        return None
    present = [(plan, old, new) for key, plan in plans.items() for old, new in _present(plan, names[key])]
    sites = tuple(new for _, _, new in present)
    shapes = {name: plan.shapes[was] for plan, old, new in present for was, name in zip(old.weights, new.weights, strict=True)}
    after = sum(parameter.numel() for parameter in model.parameters())
    only = next(iter(plans.values())) if len(plans) == 1 else Plan()
    as_it_was = all(old == new for now in names.values() for old, new in now.items())
    return Plan(
        sites=sites,
        misses=only.misses if as_it_was else (),
        shapes=shapes | {new: plans[key].shapes[old] for key, now in names.items() for old, new in now.items()},
        params_before=after + sum(site.saved for site in sites),
        params_after=after,
        options=only.options,
        capture=max((plan.capture for plan in plans.values()), key="run".__eq__),
    )


def _present(plan: Plan, now: Mapping[str, str]) -> Iterator[tuple[Site, Site]]:
    """The plan's sites as far as the model has them: as they were, and by their present names."""
    for site in plan.sites:
        ties = [tie for tie in site.ties if tie.target in now]
        if ties:
            rename = _renaming(now, ties[0].target)
            saved = site.saved if len(ties) == len(site.ties) else sum(tie.into.numel - tie.gains for tie in ties)
            yield site, replace(site, ties=tuple(ties), saved=saved).renamed(rename)


def _renaming(now: Mapping[str, str], target: str) -> Rename:
    """From the names of a site's modules and weights in the plan to those in the model: what surrounds `target` moved with it."""
    old, new = target.split("."), now[target].split(".")
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()

    def rename(name: str) -> str:
        if name in now:
            return now[name]
        parts = name.split(".") if name else []
        return ".".join(new + parts[len(old) :]) if parts[: len(old)] == old else name

    return rename


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile was given, where it returned this one."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner
