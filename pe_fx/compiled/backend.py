"""`torch.compile(model, backend="pe_fx")`: ties in Dynamo's graphs, lowered through Inductor."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from pe_fx.api import plan, plan_of
from pe_fx.compiled.dynamo import (
    GraphWeight,
    Restart,
    classes_in,
    fake_like,
    graph_break,
    held_in,
    keep_record,
    lower,
    roots_of,
    weights_of,
)
from pe_fx.compiled.ledger import Ledger, homes_in, ledger, unnamed, version_of
from pe_fx.compiled.lowering import UUID, run_passes
from pe_fx.errors import CaptureError, NoSitesWarning, PeFxError, first_line
from pe_fx.graph.capture import capture
from pe_fx.graph.operation import place_of
from pe_fx.tied.owners import Owner, forbidden, owners_in
from pe_fx.tied.rewrite_graph import rewrite_graph
from pe_fx.tied.weight import Tied, is_any_chosen
from pe_fx.ties import Site, Tie

log = logging.getLogger(__name__)

TRANSFORM_OPTIONS = ("rules", "share", "across", "include", "exclude", "mix")
OPTIONS = (*TRANSFORM_OPTIONS, "mode", "inductor", "single_read")


class Backend:
    """What torch.compile calls with each graph; found by the name "pe_fx".

    >>> import torch, pe_fx
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> compiled = torch.compile(model, backend="pe_fx", options={"rules": ["mlp"]})

    `options` takes `rules`, `share`, `across`, `include`, `exclude` and `mix` of `pe_fx.transform`; `mode`, a mode of torch.compile, which
    itself takes mode or options, not both; `inductor`, a dict of `torch._inductor.config` entries; and `single_read`: whether
    feed-forward layers of few rows read their weight once in graphs without gradients (default: yes).

    In a model that was transformed, `pe_fx.transform` has decided what is tied: nothing more is, unless these options are given.
    A weight that is tied away is not read any more and gets no gradient. The ties are decided by the first graph that reads a
    weight and hold in every graph after it; the model itself stays as it is until `pe_fx.commit(model)`. A graph in which
    matching fails, or which fails with new ties, is compiled as it is, and the failure logged. All graphs follow a source whose
    parameter is replaced. Raises `PeFxError` for unknown options, and where a model was changed so that its ties cannot follow.
    """

    __name__ = "pe_fx"

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        options = options or {}
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise PeFxError(f"option {unknown[0]!r} is unknown to the backend; choose from {', '.join(OPTIONS)}")
        if options.get("mix") == "fitted":
            raise PeFxError(
                "mix='fitted' is decided by values, which graphs do not show: tie the model itself before it is compiled, "
                "pe_fx.transform(model, inputs, mix='fitted', …)"
            )
        weights = weights_of(gm, example_inputs)
        parameters = {name: weight.parameter for name, weight in weights.items()}
        chosen = {name: options[name] for name in TRANSFORM_OPTIONS if name in options}
        roots = roots_of(gm)
        self.ledger.locate(homes_in(roots))
        self.ledger.check_options(parameters.values(), chosen)
        self.ledger.check(value for value in example_inputs if isinstance(value, Tensor))
        held, absent = self.ledger.sites(parameters)
        owners = {id(owner.parameter): owner for root in roots for owner in owners_in(root).values()}
        new = self._new_sites(gm, weights, chosen, {name: owners[id(each)] for name, each in parameters.items() if id(each) in owners})
        self.ledger.check_new(new, parameters)
        once = bool(options.get("single_read", True))
        passes = functools.partial(run_passes, single_read=once)

        def lowered(sites: Sequence[Site]) -> Callable[..., Any]:
            tied = self._tied(gm, weights, sites, absent)
            return lower(tied, example_inputs, options.get("mode", mode), options.get("inductor", {}), passes, (UUID, once))

        try:
            run = lowered([*held, *new])
        except Restart:
            raise
        except Exception as error:
            if not new:
                raise
            run = lowered(held)  # where this fails as well, it is not for the ties
            log.warning("this graph is compiled without new ties, since it failed with them: %s", first_line(error))
            new = []
            self.ledger.warned = True
        self.ledger.record(new, parameters, chosen)  # not before: where compilation fails, no graph holds them
        self.ledger.locate(homes_in(roots))
        self._report(gm, weights, [*held, *new], new)
        return self._checked(run, weights, [*held, *new], absent, chosen)

    def reset(self) -> None:
        """Called by torch.compiler.reset(): forgets every tie."""
        self.ledger.clear()

    @staticmethod
    def _tied(
        gm: fx.GraphModule, weights: Mapping[str, GraphWeight], sites: Sequence[Site], absent: Mapping[str, nn.Parameter]
    ) -> fx.GraphModule:
        """The graph with these ties, some of them to sources that it does not read itself."""
        if not sites:
            return gm
        tied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        keep_record(gm, tied, absent)
        placeholders = {node.name: node for node in tied.graph.find_nodes(op="placeholder")}
        nodes = {name: placeholders[weight.node.name] for name, weight in weights.items()}
        for name, source in absent.items():
            tied.register_parameter(name, source)
            with tied.graph.inserting_before(next(node for node in tied.graph.nodes if node.op != "placeholder")):
                nodes[name] = tied.graph.get_attr(name)
            nodes[name].meta["example_value"] = fake_like(gm, source)
        shapes = {name: tuple(weight.parameter.shape) for name, weight in weights.items()}
        shapes |= {name: tuple(source.shape) for name, source in absent.items()}
        rewrite_graph(tied, plan_of(sites, shapes), nodes)
        return tied

    def _new_sites(
        self, gm: fx.GraphModule, weights: Mapping[str, GraphWeight], options: Mapping[str, Any], owners: Mapping[str, Owner]
    ) -> list[Site]:
        """Sites of weights that no graph has read before; none in a model that was transformed, unless options ask for more."""
        undecided = {name for name, weight in weights.items() if not self.ledger.is_decided(weight.parameter)}
        if not undecided or (not options and self._is_transformed(gm, weights)):
            return []
        names = {weight.node.name: name for name, weight in weights.items()}
        try:
            captured = capture(gm)
        except CaptureError as error:
            log.warning("this graph is compiled without new ties: %s", error)
            return []
        try:
            held = held_in(gm)
            captured = replace(
                captured,
                weights={node: names.get(node.name, node.name) for node in captured.weights},
                inputs={node for node in captured.inputs if node.name not in held},
            )
            made = plan(gm, captured, **options)
        except PeFxError:
            raise
        except Exception as error:
            log.exception("matching failed at %s: this graph is compiled without new ties", place_of(error))
            return []
        for miss in made.misses:
            log.info("not tied: %s (%s): %s", miss.name, miss.kind, miss.reason)
        free = {name for name, weight in weights.items() if not self.ledger.is_target(weight.parameter)}
        refused = {tie: reason for tie in made.ties if (reason := forbidden(tie, owners)) is not None}  # by modules, which no graph tells
        for tie, reason in refused.items():
            log.info("not tied: %s: %s", tie.target, reason)

        def is_new(tie: Tie) -> bool:
            return tie.target in undecided and tie.source in free and tie not in refused

        sites = [site.with_ties(filter(is_new, site.ties)) for site in made.sites]
        return [site for site in sites if site.ties]

    def _is_transformed(self, gm: fx.GraphModule, weights: Mapping[str, GraphWeight]) -> bool:
        """Whether `pe_fx.transform` has decided what is tied, and what is not."""
        return any(issubclass(cls, Tied) for cls in classes_in(gm)) or is_any_chosen(weight.parameter for weight in weights.values())

    def _checked(
        self,
        run: Callable[..., Any],
        weights: Mapping[str, GraphWeight],
        sites: Sequence[Site],
        absent: Mapping[str, nn.Parameter],
        options: Mapping[str, Any],
    ) -> Callable[..., Any]:
        """Dynamo runs one graph for all models of the same code, and for one whose weights were replaced: its ties are recorded for
        the weights of each, or it must not run."""
        ledger = self.ledger
        places = {name: weight.place for name, weight in weights.items()}  # compiled code must not keep a model's parameters alive
        outside = {name: (weakref.ref(source), ledger.home_of(source)) for name, source in absent.items()}
        homes = {name: ledger.home_of(weight.parameter) for name, weight in weights.items()}
        ties: dict[str, dict[Tie, str]] = {}
        for tie in (tie for site in sites for tie in site.ties):
            ties.setdefault(tie.target, {})[unnamed(tie)] = tie.source

        def check(args: Sequence[Any]) -> None:
            given: dict[str, Any] = {name: args[place] for name, place in places.items()}
            ledger.check(given.values())
            if ties and not absent and not any(ledger.is_decided(given[target]) for target in ties):
                ledger.record(sites, given, options)
                ledger.locate((given[name], home) for name, home in homes.items() if home is not None and home.parameter() is given[name])
            given |= {name: source() for name, (source, _) in outside.items()}
            for name in places:
                known = ledger.ties_of(given[name]) if name in ties else {}
                alike = known.keys() == ties.get(name, {}).keys() and all(known[tie] is given[ties[name][tie]] for tie in known)
                if not alike or (name not in ties and ledger.is_target(given[name])):
                    raise PeFxError(
                        "Dynamo runs this graph with weights, those of another model or replaced since, whose ties were decided otherwise: "
                        f"see {name}. Call torch.compiler.reset(), and compile every model as a whole"
                    )

        whole = [places[tie.target] for site in sites for tie in site.ties if tie.into.is_whole]
        tied = [places[name] for name in dict.fromkeys(name for site in sites for name in site.weights) if name in places]
        passed: tuple[object, ...] | None = None  # with these weights, while the ledger and they stay as they are

        @functools.wraps(run)
        def checked(*args: Any) -> Any:
            nonlocal passed
            given = (
                [id(args[place]) for place in places.values()],
                [version_of(args[place]) for place in whole],
                [args[place].requires_grad for place in tied],  # not every Dynamo guards on it
            )
            moved = any(home is not None and home.parameter() is not source() for source, home in outside.values())
            if moved or passed != (ledger.state, *given):
                check(args)
                passed = ledger.state, *given
            return run(*args)

        return checked

    def _report(self, gm: fx.GraphModule, weights: Mapping[str, GraphWeight], sites: Sequence[Site], new: Sequence[Site]) -> None:
        matrices = sum(weight.parameter.dim() > 1 for weight in weights.values())
        reason = graph_break(gm)
        if reason:
            log.warning("a graph break cuts the model, and no weight before it is tied to one behind it: %s", reason)
        if new:
            log.info("%d sites tied in the compiled graphs alone; pe_fx.commit(model) ties the model itself", len(new))
        elif matrices > 1 and not sites and not reason and not self.ledger.warned and not self._is_transformed(gm, weights):
            self.ledger.warned = True
            warnings.warn(
                f"none of the {matrices} matrices in this graph can be tied; it is compiled as by Inductor. "
                "print(pe_fx.plan(model, inputs, ...).explain()), with the same inputs and rules, lists what came near a tie",
                NoSitesWarning,
                stacklevel=2,
            )


backend = Backend(ledger)
