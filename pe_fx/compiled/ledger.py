"""The ties that compiled graphs hold, decided once, by the identity of the parameters; and `commit`, which gives them to the model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from pe_fx.api import apply, plan_of
from pe_fx.errors import PeFxError
from pe_fx.tied.held import uncompiled
from pe_fx.tied.weight import Tied
from pe_fx.ties import Plan, Site, Tie


@dataclass(frozen=True)
class Held:
    """One tie of a parameter, with its source as an object: a graph of another shape, or after a break, names it otherwise."""

    site: Site
    tie: Tie
    source: nn.Parameter


class Ledger:
    """For every parameter that a compiled graph has read, the ties that it is a target of.

    >>> import torch
    >>> from pe_fx.ties import Block
    >>> w1, w2 = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(4, 8))
    >>> tie = Tie(Block.whole("w2", (4, 8)), Block.whole("w1", (8, 4)), transposed=True)
    >>> ledger = Ledger()
    >>> ledger.record([Site("mlp", "", ("w1", "w2"), (tie,))], {"w1": w1, "w2": w2})
    >>> sites, absent = ledger.sites({"a.weight": w1, "b.weight": w2})
    >>> print(sites[0].ties[0])
    b.weight ← a.weightᵀ
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._held: dict[int, list[Held]] = {}
        self._unnamed: dict[int, frozenset[Tie]] = {}
        self.state = object()  # another one after each change
        self.warned = False  # whether there is no need to say that nothing was tied

    def record(self, sites: Sequence[Site], weights: Mapping[str, nn.Parameter]) -> None:
        """Decides all these weights: they are tied by `sites`, or not."""
        for weight in weights.values():
            if id(weight) not in self._held:
                self._held[id(weight)] = []
                weakref.finalize(weight, self._forget, id(weight))
        self.warned |= bool(sites)
        for site in sites:
            for tie in site.ties:
                self._held[id(weights[tie.target])].append(Held(site, tie, weights[tie.source]))
        for weight in weights.values():
            self._unnamed[id(weight)] = frozenset(unnamed(held.tie) for held in self._held[id(weight)])
        self.state = object()

    def _forget(self, key: int) -> None:
        self._held.pop(key, None)
        self._unnamed.pop(key, None)
        self.state = object()

    def ties_of(self, weight: nn.Parameter) -> frozenset[Tie]:
        """What the weight is a target of, without names: those are another graph's."""
        return self._unnamed.get(id(weight), frozenset())

    def is_decided(self, weight: nn.Parameter) -> bool:
        return id(weight) in self._held

    def is_target(self, weight: nn.Parameter) -> bool:
        return bool(self._held.get(id(weight)))

    def sites(self, weights: Mapping[str, nn.Parameter]) -> tuple[list[Site], dict[str, nn.Parameter]]:
        """The sites that concern these weights, by the names given; and the sources that are not among them, by new names."""
        names = {id(weight): name for name, weight in reversed(list(weights.items()))}
        absent: dict[str, nn.Parameter] = {}
        ties: dict[int, tuple[Site, list[Tie]]] = {}
        for target, weight in weights.items():
            if names[id(weight)] != target:
                continue
            for held in self._held.get(id(weight), []):
                if id(held.source) not in names:
                    names[id(held.source)] = f"pe_fx_source_{len(absent)}"
                    absent[names[id(held.source)]] = held.source
                source = names[id(held.source)]
                tie = replace(held.tie, into=replace(held.tie.into, name=target), of=replace(held.tie.of, name=source))
                ties.setdefault(id(held.site), (held.site, []))[1].append(tie)
        return [_renamed(site, own) for site, own in ties.values()], absent


def unnamed(tie: Tie) -> Tie:
    return replace(tie, into=replace(tie.into, name=""), of=replace(tie.of, name=""))


def _renamed(site: Site, ties: list[Tie]) -> Site:
    stage = ties[0].source if site.stage is not None else None
    return replace(
        site, weights=tuple(dict.fromkeys(name for tie in ties for name in (tie.source, tie.target))), ties=tuple(ties), stage=stage
    )


ledger = Ledger()
"""Of this process."""


def pending(model: nn.Module) -> Plan:
    """The ties that hold in the model's compiled graphs, but not in the model itself: until `commit`, the two differ.

    >>> import torch, pe_fx
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> y = torch.compile(model, backend="pe_fx")(torch.ones(2, 4))
    >>> [str(tie) for tie in pe_fx.pending(model).ties]
    ['2.weight ← 0.weightᵀ']
    >>> plan = pe_fx.commit(model)
    >>> pe_fx.pending(model).ties
    ()

    Raises `PeFxError` where a weight is tied to one outside this model.
    """
    parameters = dict(uncompiled(model).named_parameters())
    sites, absent = ledger.sites(parameters)
    if absent:
        held = [tie for site in sites for tie in site.ties if tie.source in absent]
        raise PeFxError(f"{held[0].target} is tied to a parameter outside this model: commit the model that was compiled as a whole")
    return plan_of(sites, {name: tuple(parameter.shape) for name, parameter in parameters.items()})


def commit(model: nn.Module) -> Plan:
    """Ties the model itself as its compiled graphs are tied, in place, so that eager runs, checkpoints and compiled runs agree.

    >>> import torch, pe_fx
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> y = torch.compile(model, backend="pe_fx")(torch.ones(2, 4))
    >>> [str(tie) for tie in pe_fx.commit(model).ties]
    ['2.weight ← 0.weightᵀ']
    >>> torch.allclose(model(torch.ones(2, 4)), y, atol=1e-6)
    True

    `model` is the module given to torch.compile, what it returned, or a module that holds it. Returns the plan, to be kept beside
    a checkpoint for `pe_fx.apply`. The optimizer still holds the parameters of before: make a new one to train on.
    Raises `PeFxError` where no compiled graph holds ties of this model: run the compiled model once before.
    """
    plan = pending(model)
    inner = uncompiled(model)
    if not plan.sites:
        if any(isinstance(module, Tied) for module in inner.modules()):
            return plan
        raise PeFxError('no compiled graph holds ties of this model: run torch.compile(model, backend="pe_fx") once before')
    apply(inner, plan, inplace=True)
    return plan
