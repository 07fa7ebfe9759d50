"""The ties that compiled graphs hold, decided once, by the identity of the parameters; and `commit`, which gives them to the model."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from pe_fx.api import apply, plan_of
from pe_fx.errors import PeFxError
from pe_fx.tied.held import uncompiled
from pe_fx.tied.owners import Owner, forbidden
from pe_fx.tied.weight import Tied
from pe_fx.ties import Plan, Site, Tie

log = logging.getLogger(__name__)

ANEW = (
    "Change a model so after pe_fx.commit(model), which ties the model itself; or call torch.compiler.reset(): "
    "then the ties are decided anew, from the model as it is, where a weight tied so far has the values that it had before"
)


@dataclass(frozen=True)
class Home:
    """The module that holds a parameter, and the way to it from the model that was compiled.

    >>> model = nn.Sequential(nn.Linear(4, 8))
    >>> weight, home = next(homes_in([model]))
    >>> model[0].weight = other = nn.Parameter(weight.detach())
    >>> home.parameter() is other
    True
    """

    root: weakref.ref[nn.Module]
    path: str
    module: weakref.ref[nn.Module]
    name: str

    def owner(self) -> nn.Module | None:
        """The module, if the model still has it, else what took its place."""
        root, module = self.root(), self.module()
        if root is None:
            return module
        try:
            there = root.get_submodule(self.path)
        except AttributeError:
            there = None
        return module if module is not there and any(each is module for each in root.modules()) else there

    def parameter(self) -> Tensor | None:
        owner = self.owner()
        return None if owner is None else owner._parameters.get(self.name)

    def is_tied(self) -> bool:
        """Whether the weight is a tied one in the model itself."""
        owner = self.owner()
        return isinstance(owner, Tied) and self.name in owner.tied_weights


def homes_in(roots: Iterable[nn.Module]) -> Iterator[tuple[Tensor, Home]]:
    """Every parameter of these models, and its first home."""
    for root in roots:
        for path, module in root.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield parameter, Home(weakref.ref(root), path, weakref.ref(module), name)


@dataclass(eq=False)
class Weight:
    """A parameter that a compiled graph has read, the ties that it is a target of, and those that it is a source of.

    `home` is None for the weights of a second model of the same code, for which Dynamo does not ask the backend again.
    """

    ref: weakref.ref[Tensor]
    options: Mapping[str, Any]
    home: Home | None = None
    version: int | None = None  # when it was tied; None once a write was told
    held: list[Held] = field(default_factory=list)
    read: list[Held] = field(default_factory=list)

    def is_in_place(self) -> bool:
        weight = self.ref()
        return weight is not None and (self.home is None or self.home.parameter() is weight)


@dataclass(eq=False)
class Held:
    """One tie, with its weights as objects: a graph of another shape, or after a break, names them otherwise."""

    site: Site
    tie: Tie
    target: Weight
    source: Weight

    def __str__(self) -> str:
        return f"compiled graphs hold {self.tie}"


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

    It keeps no parameter alive. Where a parameter that is a source was replaced, the ties follow; `check` refuses what they cannot follow.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._weights: dict[int, Weight] = {}
        self.clear()

    def clear(self) -> None:
        for weight in self._weights.values():
            weight.held.clear()
            weight.read.clear()  # torch swaps no tensor to which a weak reference is left
        self._weights.clear()
        self.state = object()  # another one after each change
        self.warned = False  # whether there is no need to say that nothing was tied

    def record(self, sites: Sequence[Site], weights: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> None:
        """Decides all these weights: they are tied by `sites`, or not. Raises `PeFxError` as `check_new` does."""
        with self.lock:
            self.check_new(sites, weights)
            known = {name: self._known(weight) or self._new(weight, options or {}) for name, weight in weights.items()}
            self.warned |= bool(sites)
            for site in sites:
                for tie in site.ties:
                    target = known[tie.target]
                    if unnamed(tie) not in map(_unnamed, target.held):  # another thread may have been here
                        self._hold(Held(site, tie, target, known[tie.source]))
            self.state = object()

    def locate(self, homes: Iterable[tuple[Tensor, Home]]) -> None:
        """Notes where the weights that are known are held."""
        with self.lock:
            for parameter, home in homes:
                weight = self._known(parameter)
                if weight is not None and weight.home is None:
                    weight.home = home

    def _new(self, weight: Tensor, options: Mapping[str, Any], home: Home | None = None) -> Weight:
        key = id(weight)
        known = self._weights

        def forget(ref: weakref.ref[Tensor]) -> None:
            if key in known and known[key].ref is ref:
                del known[key]
            self.state = object()

        known[key] = Weight(weakref.ref(weight, forget), options, home)
        return known[key]

    def _known(self, weight: Tensor) -> Weight | None:
        return self._weights.get(id(weight))

    def home_of(self, weight: Tensor) -> Home | None:
        known = self._known(weight)
        return None if known is None else known.home

    def ties_of(self, weight: Tensor) -> dict[Tie, Tensor | None]:
        """What the weight is a target of, and the source of each; without names: those are another graph's."""
        known = self._known(weight)
        return {} if known is None else {_unnamed(held): held.source.ref() for held in known.held}

    def is_decided(self, weight: Tensor) -> bool:
        return self._known(weight) is not None

    def is_target(self, weight: Tensor) -> bool:
        known = self._known(weight)
        return known is not None and bool(known.held)

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Lets the ties of these weights follow the model. Raises `PeFxError` where they cannot."""
        with self.lock:
            here = {id(tensor) for tensor in tensors}
            written: list[str] = []
            for held in self._all():
                home, target, source = held.target.home, held.target.ref(), held.source.ref()
                now = None if home is None else home.parameter()
                if home is not None and home.is_tied():
                    self._drop(held)
                elif target is not None and id(target) in here:
                    self._follow(held, target, here)
                    if held.tie.into.is_whole and held.target.version not in (None, version_of(target)):
                        held.target.version = None
                        written.append(str(held.tie))
                elif now is not None and now is not target and id(source if isinstance(now, nn.Parameter) else now) in here:
                    raise PeFxError(_replaced(held))
            if written:
                more = f", and {len(written) - 1} more" if len(written) > 1 else ""
                log.warning(
                    "a weight that compiled graphs do not read was written to, as by load_state_dict: they hold %s%s", written[0], more
                )

    def check_new(self, sites: Iterable[Site], weights: Mapping[str, Tensor]) -> None:
        """Raises `PeFxError` where one of these ties would take the place of another, whose target was replaced."""
        here = {id(weight) for weight in weights.values()}
        for tie in (tie for site in sites for tie in site.ties):
            source = self._known(weights[tie.source])
            for held in source.read if source is not None else ():
                there = held.target.ref()
                lost = not held.target.is_in_place() or (held.target.home is None and id(there) not in here)
                if there is not weights[tie.target] and _unnamed(held) == unnamed(tie) and lost:
                    raise PeFxError(_replaced(held))

    def check_options(self, weights: Iterable[Tensor], options: Mapping[str, Any]) -> None:
        """Raises `PeFxError` where other options have decided about these weights."""
        for known in filter(None, map(self._known, weights)):
            if options and known.options != options:
                raise PeFxError(
                    f"graphs that read the same weights were compiled with {_written(known.options)}, this one with {_written(options)}: "
                    "what is tied is decided once. Give the same options, or call torch.compiler.reset() before"
                )

    def _follow(self, held: Held, target: Tensor, here: set[int]) -> None:
        tie, source = held.tie, held.source
        if not held.target.is_in_place():
            raise PeFxError(f"{held}, but {tie.target} is not where it was: pruned, parametrized, or taken out of the model. {ANEW}")
        now = source.ref() if source.home is None else source.home.parameter()
        if not isinstance(now, nn.Parameter) or (source.home is None and id(now) not in here):
            raise PeFxError(f"{held}, but {tie.source} is not where it was: replaced, pruned, parametrized, or taken out. {ANEW}")
        weights = {tie.target: target, tie.source: now}
        wrong = [block.name for block in (tie.into, tie.of) if weights[block.name].shape != block.full_shape]
        reason = forbidden(tie, {name: Owner(weight, name) for name, weight in weights.items()})
        if wrong or reason is not None:
            raise PeFxError(f"{held}, but {reason or f'{wrong[0]} is {tuple(weights[wrong[0]].shape)} now'}. {ANEW}")
        if now is not source.ref():
            self._drop(held)
            self._hold(Held(held.site, tie, held.target, self._known(now) or self._new(now, held.target.options, source.home)))

    def _all(self) -> list[Held]:
        return list(dict.fromkeys(held for weight in list(self._weights.values()) for held in (*weight.held, *weight.read)))

    def _hold(self, held: Held) -> None:
        held.target.version = version_of(held.target.ref())
        held.target.held.append(held)
        held.source.read.append(held)
        self.state = object()

    def _drop(self, held: Held) -> None:
        held.target.held.remove(held)
        held.source.read.remove(held)
        self.state = object()

    def apart(self, weights: Iterable[Tensor]) -> Held | None:
        """A tie of which these weights are one end alone."""
        here = {id(weight) for weight in weights}
        return next((held for held in self._all() if (id(held.target.ref()) in here) != (id(held.source.ref()) in here)), None)

    def sites(self, weights: Mapping[str, Tensor]) -> tuple[list[Site], dict[str, nn.Parameter]]:
        """The sites that concern these weights, by the names given; and the sources that are not among them, by new names."""
        names = {id(weight): name for name, weight in reversed(list(weights.items()))}
        absent: dict[str, Any] = {}
        ties: dict[int, tuple[Site, list[Tie]]] = {}
        for target, weight in weights.items():
            known = self._known(weight)
            if names[id(weight)] != target or known is None:
                continue
            for held in known.held:
                source = held.source.ref()
                if id(source) not in names:
                    names[id(source)] = f"pe_fx_source_{len(absent)}"
                    absent[names[id(source)]] = source
                tie = replace(held.tie, into=replace(held.tie.into, name=target), of=replace(held.tie.of, name=names[id(source)]))
                ties.setdefault(id(held.site), (held.site, []))[1].append(tie)
        return [_renamed(site, own) for site, own in ties.values()], absent


def version_of(weight: Tensor | None) -> int | None:
    """How often it was written to, as far as autograd sees it."""
    return None if weight is None or weight.is_inference() else weight._version


def unnamed(tie: Tie) -> Tie:
    return replace(tie, into=replace(tie.into, name=""), of=replace(tie.of, name=""))


def _unnamed(held: Held) -> Tie:
    return unnamed(held.tie)


def _replaced(held: Held) -> str:
    return (
        f"{held}, but {held.tie.target} was replaced since, by hand, by load_state_dict(assign=True) or by functional_call, "
        f"and what it holds would not be read. {ANEW}"
    )


def _written(options: Mapping[str, Any]) -> str:
    return f"options={dict(options)}" if options else "no options"


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

    Raises `PeFxError` where the model is a part of what was compiled, and a tie goes beyond it; or where it was changed so that a
    tie has lost its weights.
    """
    if not isinstance(model, nn.Module):
        raise PeFxError(f"this is no module but a {type(model).__name__}: give the module whose weights the compiled function reads")
    inner = uncompiled(model)
    parameters = dict(inner.named_parameters())
    ledger.locate(homes_in([inner]))
    ledger.check(parameters.values())
    held = ledger.apart(parameters.values())
    if held is not None:
        raise PeFxError(
            f"{held}, and this {type(inner).__name__} has only one of the two: commit the model that was compiled as a whole. "
            "Where the other one was replaced since: torch.compiler.reset(), and run the compiled model once before"
        )
    sites, _ = ledger.sites(parameters)
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
    Where the model is tied already and its graphs hold no more, nothing is left to do, and the plan is empty.
    Raises `PeFxError` where no compiled graph holds ties of this model, and says why.
    """
    plan = pending(model)
    inner = uncompiled(model)
    if plan.sites:
        apply(inner, plan, inplace=True)
    elif not any(isinstance(module, Tied) for module in inner.modules()):
        if any(map(ledger.is_decided, inner.parameters())):
            raise PeFxError(
                "nothing is tied in the graphs that were compiled of this model, so there is nothing to commit: "
                "print(pe_fx.plan(model).explain()) says why, if need be with example inputs"
            )
        raise PeFxError(
            f'no graph that backend="pe_fx" compiled has read the weights of this {type(inner).__name__}: '
            'run torch.compile(model, backend="pe_fx") once before, on this very model: a copy, or a model that was loaded, is another one'
        )
    return plan
