"""plan, transform and apply."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from pe_fx.errors import NoSitesWarning, PeFxError, check_one_of
from pe_fx.graph.capture import Captured, capture
from pe_fx.graph.copies import copied
from pe_fx.graph.flow import Flow
from pe_fx.graph.inputs import ExampleInputs
from pe_fx.graph.ops import value_of
from pe_fx.graph.strides import fails, is_viewed, outline
from pe_fx.graph.tags import tracing
from pe_fx.passes import DEFAULT_RULES, Rule, find
from pe_fx.passes.across import tie_across
from pe_fx.passes.stage import ENTRIES, share_stages
from pe_fx.passes.variants import GAIN, MIXES, vary
from pe_fx.tied.entry import widen_params
from pe_fx.tied.fit import fitted
from pe_fx.tied.layouts import layout_of
from pe_fx.tied.moments import Moments, moments_of
from pe_fx.tied.owners import ONCE, Owner, forbidden, owners_in, unfit, unfit_entry
from pe_fx.tied.rewrite_graph import rewrite_graph
from pe_fx.tied.rewrite_modules import INITS, rewrite_modules
from pe_fx.tied.weight import Tied
from pe_fx.ties import Entry, FarMiss, Miss, Plan, Shape, Site, Tie

KINDS = tuple(rule.kind for rule in DEFAULT_RULES)

INTEGRATIONS = {"transformers"}
"""Libraries that write a model's configuration beside its weights: where the model's class is one of theirs, they are told of its ties."""

Share = Sequence[str] | Mapping[str, int | str | None]


def plan(
    model: nn.Module,
    example_inputs: ExampleInputs | Captured | None = None,
    *,
    rules: Sequence[str | Rule] = DEFAULT_RULES,
    share: Share | None = None,
    across: Sequence[str] = (),
    entry: str = "keep",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    mix: str = "none",
    gain: bool | float = False,
    calibration: Iterable[ExampleInputs] | None = None,
) -> Plan:
    """What `transform` would do to the model; nothing is changed.

    >>> import pe_fx
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> [str(tie) for tie in pe_fx.plan(model).ties]
    ['2.weight ← 0.weightᵀ']

    Takes the options of `transform`; what `pe_fx.graph.capture.capture` returned stands for the inputs where the graph is at hand.
    Raises `PeFxError` for wrong options and `CaptureError` where the model's graph cannot be captured.
    """
    options: dict[str, Any] = {"rules": rules, "share": share, "across": across, "entry": entry, "include": include, "exclude": exclude}
    options |= {"mix": mix, "gain": gain}
    _check_calibration(calibration, mix)
    made = _matched(model, example_inputs, options)
    return fitted(made, model, _moments(model, made, calibration)) if mix == "fitted" else made


def _matched(model: nn.Module, example_inputs: ExampleInputs | Captured | None, given: Mapping[str, Any]) -> Plan:
    """The plan by these options of `plan`, as far as it does not depend on values."""
    chosen = _checked_rules(given["rules"])
    tied = {rule.kind for rule in chosen}
    shared = [kind for kind in ("bottleneck",) if kind in tied] if given["share"] is None else given["share"]
    options = _checked_options(**{name: value for name, value in given.items() if name != "rules"} | {"share": shared})
    captured = example_inputs if isinstance(example_inputs, Captured) else capture(model, example_inputs)
    with tracing():
        return _found(model, captured, chosen, options)


def _found(model: nn.Module, captured: Captured, rules: Sequence[Rule], options: dict[str, Any]) -> Plan:
    """The plan by the graph."""
    tied = {rule.kind for rule in rules}
    sizes = {kind: size if isinstance(size, int) else None for kind, size in options["share"].items()}
    owners = owners_in(model)
    captured = canonical(captured, owners)

    def is_tied(found: Site | Miss) -> bool:
        return found.kind in tied

    def wanted(found: Site | Miss) -> bool:
        return (is_tied(found) or found.kind in sizes) and _selected(found, options["include"], options["exclude"])

    custom = [rule for rule in rules if rule not in DEFAULT_RULES]
    flow = Flow(captured)
    owners = owners | {name: Owner(value_of(node), name) for node, name in captured.weights.items() if name not in owners}
    against = functools.partial(_against, owners, functools.cache(lambda: dict(model.named_modules(remove_duplicate=False))))
    sites, misses = find(flow, (*custom, *DEFAULT_RULES), wanted, against, is_tied)
    apart = functools.partial(_apart, owners, against)
    trait = functools.partial(_trait, owners)
    sites, misses = share_stages(flow, sites, misses, sizes, options["entry"], wanted, is_tied, trait, apart)
    sites, refused = tie_across(flow, sites, options["across"], trait, against)
    sites = _laid_out(vary(sites, options["mix"], options["gain"]), captured)
    shapes = {owner.name: tuple(owner.parameter.shape) for owner in owners.values()}
    made = plan_of(sites, shapes, list(dict.fromkeys([*misses, *refused])), {"rules": tuple(rule.kind for rule in rules)} | options)
    return replace(made, capture=captured.how)


def plan_of(
    sites: Sequence[Site], shapes: Mapping[str, Shape], misses: Sequence[Miss] = (), options: Mapping[str, Any] | None = None
) -> Plan:
    """The plan that holds these sites, of a model whose parameters have these shapes."""
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    sites = [replace(site, saved=_saved(site, shapes, numel)) for site in sites]
    before = sum(numel.values())
    return Plan(
        sites=tuple(sites),
        misses=tuple(miss for miss in misses if not isinstance(miss, FarMiss)),
        shapes={name: shapes[name] for site in sites for name in (*site.weights, *(tie.source for tie in site.ties))},
        params_before=before,
        params_after=before - sum(site.saved for site in sites),
        options=dict(options or {}),
        capture="graph",
        far_misses=sum(isinstance(miss, FarMiss) for miss in misses),
    )


def transform(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    rules: Sequence[str | Rule] = DEFAULT_RULES,
    share: Share | None = None,
    across: Sequence[str] = (),
    entry: str = "keep",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    mix: str = "none",
    gain: bool | float = False,
    init: str = "keep",
    calibration: Iterable[ExampleInputs] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """The same model with one matrix where it held two.

    >>> import pe_fx
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> tied = pe_fx.transform(model)
    >>> sorted(tied.state_dict())
    ['0.bias', '0.weight', '2.bias']
    >>> tied[2]
    TiedLinear(in_features=8, out_features=4, bias=True, weight ← 0.weightᵀ)

    Args:
        model: any module that torch.export can capture or that runs, or an fx.GraphModule. It is left as it is unless `inplace`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. Where left out, derived from what forward
            takes, from configurations such as timm's `pretrained_cfg` and transformers' `config`, or the first layer's shape. Only
            shapes and dtypes matter, but where values decide in a model that is captured by a run.
        rules: kinds ("mlp", "glu", "attention", "bottleneck", "squeeze_excite") or rule objects; see `pe_fx.passes`.
        share: the kinds whose sites share their matrices with neighbours of one shape, in the order of the data flow: ("mlp",) all in a
            row, {"mlp": 2} in groups of two, the last of which may be smaller; () for none. Kinds that are not among `rules` share
            all matrices of a site without being tied. By default bottlenecks share, where they are tied.
        across: the kinds whose sites are tied to the matrices of the next site of one shape, the last to the first's; such as ("mlp",).
        entry: how the first block of a stage, whose input is narrower, takes part in it. "keep": its first convolution and
            its shortcut stay. "slice": the convolution uses the first columns of W, the shortcut pads with zeros. "expand":
            a depthwise convolution widens the input, so that W fits.
        include, exclude: globs on module names, such as "layer3.*".
        mix: "signed" puts the tied output channels in a fixed other order with fixed signs; the plan keeps the seeds. "fitted", for a
            trained model, pairs each column of a tied weight with the row of its source that it is most like, up to sign and scale;
            the plan keeps the pairs.
        gain: True, or a starting value, gives each tied output channel a learned factor, `<name of the weight>_gain`.
        init: "keep" the source's values, their "mean" with the tied weights', "fit": those that change the model least, or
            "reset": drawn anew, normal, with a standard deviation of 1 / sqrt(inputs).
        calibration: batches of inputs, each as `example_inputs`, that show "fitted" and "fit" what counts for the model's outputs;
            without them, all entries of a weight count alike.
        inplace: change `model` itself.

    Returns:
        A model of the same class. A tied weight's name leaves the state_dict; every other name stays.

    Raises:
        PeFxError: wrong options. CaptureError: no graph. In both cases the model is left as it was.

    Warns:
        NoSitesWarning: nothing could be tied.

    Source: O. C. Koyun, B. U. Töreyin, arXiv 2401.16438.
    """
    check_one_of("init", init, INITS)
    options: dict[str, Any] = {"rules": rules, "share": share, "across": across, "entry": entry, "include": include, "exclude": exclude}
    options |= {"mix": mix, "gain": gain}
    _check_calibration(calibration, mix, init)
    made = _matched(model, example_inputs, options)
    if not made.sites and not any(isinstance(module, Tied) for module in model.modules()):
        call = _call_of_plan(example_inputs is not None, options)
        warnings.warn(f"nothing in this {type(model).__name__} can be tied{_nearly(made.misses, call)}", NoSitesWarning, stacklevel=2)
    moments = _moments(model, made, calibration)
    return _applied(model, fitted(made, model, moments) if mix == "fitted" else made, init, moments, inplace)


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    init: str = "keep",
    calibration: Iterable[ExampleInputs] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Ties a model by a plan made earlier, say to load a tied checkpoint.

    >>> import pe_fx
    >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> trained = pe_fx.transform(build())
    >>> text = pe_fx.plan(build()).to_json()
    >>> fresh = pe_fx.apply(build(), pe_fx.Plan.from_json(text))
    >>> fresh.load_state_dict(trained.state_dict())
    <All keys matched successfully>

    Raises `PeFxError`, before anything is changed, where the plan's weights are not in the model, have other shapes, or are such
    that `plan` would leave them alone: frozen beside a trained one, of another dtype or device, used in other places too.
    """
    check_one_of("init", init, INITS)
    _check_calibration(calibration, "none", init)
    return _applied(model, plan, init, _moments(model, plan, calibration), inplace)


def _applied(model: nn.Module, plan: Plan, init: str, moments: Moments | None, inplace: bool) -> nn.Module:
    result = model if inplace else copied(model)
    if isinstance(result, fx.GraphModule) and not any(True for _ in result.parameters()):
        rewrite_graph(result, plan)
    else:
        rewrite_modules(result, plan, init, moments)
    for library in INTEGRATIONS.intersection(base.__module__.partition(".")[0] for base in type(result).__mro__):
        with contextlib.suppress(ImportError):  # an older library: then its files are written as before
            importlib.import_module(f"pe_fx.{library}").attach(result)
    return result


def _check_calibration(calibration: Iterable[ExampleInputs] | None, mix: str, init: str = "keep") -> None:
    if calibration is not None and mix != "fitted" and init != "fit":
        raise PeFxError("calibration is for mix='fitted' and init='fit' alone: give one of them, or leave it out")


def _moments(model: nn.Module, plan: Plan, calibration: Iterable[ExampleInputs] | None) -> Moments | None:
    if calibration is None:
        return None
    return moments_of(model, dict.fromkeys(name for tie in plan.ties for name in (tie.target, tie.source)), calibration)


def _call_of_plan(has_inputs: bool, options: Mapping[str, Any]) -> str:
    """The call that makes the same plan. What has no plain form goes by the name of its parameter.

    >>> _call_of_plan(True, {"rules": ["mlp", object()], "include": ["layer3.*"], "share": None})
    "pe_fx.plan(model, example_inputs, rules=rules, include=['layer3.*'])"
    """

    def is_plain(value: object) -> bool:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return all(map(is_plain, parts)) if isinstance(parts, (list, tuple)) else parts is None or isinstance(parts, (str, int, float))

    defaults = {name: repr(parameter.default) for name, parameter in inspect.signature(plan).parameters.items()}
    given = [f"{name}={repr(value) if is_plain(value) else name}" for name, value in options.items() if repr(value) != defaults[name]]
    return f"pe_fx.plan({', '.join(['model', *['example_inputs'] * has_inputs, *given])})"


def _nearly(misses: Sequence[Miss], call: str) -> str:
    if not misses:
        return f", and nothing comes near it: {call} has no near miss"
    several = len(misses) > 1
    count = f"{len(misses)} near misses" if several else "1 near miss"
    return f" ({count}: {misses[0].reason}{', …' * several}); print({call}.explain()) shows {'them' if several else 'it'}"


def checked(init: str, options: Mapping[str, Any]) -> None:
    """Raises `PeFxError` where `transform` would, for these options alone."""
    check_one_of("init", init, INITS)
    defaults = {name: parameter.default for name, parameter in inspect.signature(plan).parameters.items()}
    given = {name: value for name, value in defaults.items() if name not in ("model", "example_inputs", "calibration")}
    for name in options:
        check_one_of("the option", name, list(given))
    given |= options
    _checked_rules(given.pop("rules"))
    given["share"] = given["share"] or ()
    _checked_options(**given)


def _checked_rules(rules: Sequence[str | Rule]) -> tuple[Rule, ...]:
    by_kind = {rule.kind: rule for rule in DEFAULT_RULES}
    chosen = []
    for rule in (rules,) if isinstance(rules, str) else rules:
        if isinstance(rule, str):
            check_one_of("rules", rule, KINDS)
            rule = by_kind[rule]
        elif not hasattr(rule, "match") or not hasattr(rule, "kind"):
            raise PeFxError(f"rules: {rule!r} is neither one of {', '.join(KINDS)} nor an object with `kind` and `match(flow)`")
        chosen.append(rule)
    return tuple(chosen)


def _checked_options(
    *,
    share: Share,
    across: Sequence[str],
    entry: str,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    mix: str,
    gain: bool | float | None,
) -> dict[str, Any]:
    check_one_of("entry", entry, ENTRIES)
    check_one_of("mix", mix, MIXES)
    if gain is not None and not (isinstance(gain, (bool, int, float)) and math.isfinite(gain)):
        raise PeFxError(f"gain={gain!r} must be True, False or the number at which the learned factors start")
    for option, globs in (("include", include), ("exclude", exclude)):
        if isinstance(globs, str):
            raise PeFxError(f"{option}={globs!r} must be a list of globs: {option}=[{globs!r}]")
    if isinstance(across, str):
        raise PeFxError(f"across={across!r} must be a tuple of kinds: across=({across!r},)")
    sizes = _checked_share(share)
    for kind in across:
        check_one_of("across", kind, KINDS)
        if kind in sizes:
            raise PeFxError(
                f"{kind!r} is in share and in across: neighbours that share one matrix have no other's to be tied to; choose one"
            )
    return {
        "share": sizes,
        "across": tuple(across),
        "entry": entry,
        "include": None if include is None else tuple(include),
        "exclude": None if exclude is None else tuple(exclude),
        "mix": mix,
        "gain": GAIN if gain is True else None if gain is False else gain,
    }


def _checked_share(share: Share) -> dict[str, int | str]:
    """For each kind how many neighbours share, or "all"."""
    if isinstance(share, str):
        raise PeFxError(f"share={share!r} must be a tuple of kinds: share=({share!r},), or have a size for each: share={{{share!r}: 2}}")
    sizes = share if isinstance(share, Mapping) else dict.fromkeys(share)
    for kind, size in sizes.items():
        check_one_of("share", kind, KINDS)
        if size not in (None, "all") and not (type(size) is int and size > 0):
            raise PeFxError(f"share={{{kind!r}: {size!r}}}: {size!r} is no number of neighbours; give 2 or more, or 'all'")
    return {kind: "all" if size is None else size for kind, size in sizes.items()}


def canonical(captured: Captured, owners: Mapping[str, Owner]) -> Captured:
    """Names each weight by its first name: a module registered twice has one name in the plan."""
    weights = {node: owners[name].name if name in owners else name for node, name in captured.weights.items()}
    return replace(captured, weights=weights)


def _selected(found: Site | Miss, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    names = [found.name, *found.weights]
    names += [".".join(name.split(".")[:depth]) for name in tuple(names) for depth in range(1, name.count(".") + 1)]

    def matches(globs: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs for name in names)

    return (include is None or matches(include)) and not (exclude is not None and matches(exclude))


def _trait(owners: Mapping[str, Owner], name: str) -> tuple[object, ...] | None:
    owner = owners.get(name)
    return None if owner is None else (owner.parameter.requires_grad, owner.parameter.dtype, owner.parameter.device, unfit(owner))


def _against(owners: Mapping[str, Owner], modules: Callable[[], Mapping[str, nn.Module]], what: Tie | Entry) -> str | None:
    """Why the weights and modules themselves forbid a tie or the treatment of an entry block."""
    return forbidden(what, owners) if isinstance(what, Tie) else unfit_entry(what, modules())


def _apart(owners: Mapping[str, Owner], against: Callable[[Tie | Entry], str | None], what: Tie | Entry) -> str | None:
    """Why a block cannot use the matrix of another: a group that is there already is not made larger."""
    if isinstance(what, Tie) and not what.transposed and what.source in owners and (other := owners[what.source].read_by):
        return f"{what.source} is the source of {other}, by an earlier transform: {ONCE}"
    return against(what)


def _laid_out(sites: Iterable[Site], captured: Captured) -> list[Site]:
    """The same sites: where the model takes a view of a tied weight that needs it row by row, the tie makes it so."""
    readers: dict[str, list[fx.Node]] = {}
    for node, name in captured.weights.items():
        readers.setdefault(name, []).append(node)

    def laid_out(tie: Tie) -> Tie:
        return replace(tie, contiguous=True) if must_be_contiguous(tie) else tie

    def must_be_contiguous(tie: Tie) -> bool:
        if not (tie.into.is_whole and tie.target in readers and tie.source in readers):
            return False  # what is put together of parts is a copy
        if not any(map(is_viewed, readers[tie.target])):
            return False
        source = outline(value_of(readers[tie.source][0]))
        dense = layout_of([tie], {}, {}).assemble(None, [source], source.new_empty(tie.gains))
        nodes = [node for node in readers[tie.target] if value_of(node).shape == dense.shape]
        return not dense.is_contiguous() and any(fails(node, dense) for node in nodes)

    return [site.with_ties(map(laid_out, site.ties)) for site in sites]


def _saved(site: Site, shapes: Mapping[str, Shape], numel: Mapping[str, int]) -> int:
    """Parameters that the site's ties and its entry treatment remove."""
    saved = 0
    for tie in site.ties:
        changes_shape = tie.into.full_shape != shapes[tie.target]
        saved += (numel[tie.target] if changes_shape else tie.into.numel) - tie.gains
    if site.entry is not None:
        saved += sum(size for name, size in numel.items() if name.rpartition(".")[0] in site.entry.removed)
        if site.entry.treatment == "expand":
            saved -= widen_params(site.entry.width, site.entry.out, site.entry.stride)
    return saved
