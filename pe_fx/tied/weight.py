"""Modules whose weights are views of another module's weight.

A tied module is a subclass of its own class with a property in place of the parameter. A tied weight is never a parameter: what is
left of it, where only some of its rows are tied, is stored under a name of its own. The source is held without being registered, so
that every weight has exactly one name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from pe_fx.errors import PeFxError
from pe_fx.tied.assembly import Layout, written_out
from pe_fx.tied.derived import Derived, derive
from pe_fx.tied.layouts import by_target, kept_ranges, layout_of
from pe_fx.tied.missing import whereabouts
from pe_fx.tied.placed import placed
from pe_fx.tied.read_only import ReadOnly, read_only
from pe_fx.tied.reading import is_sharded, reader
from pe_fx.tied.whole import check_loaded, outside_saved
from pe_fx.ties import Plan, gain_of, kept_of


@dataclass
class TiedWeight:
    """One tied weight of a module: its layout, and the modules and names of the parameters that it is a view of.

    `plan` is what tied it, `name` its name there, `place` the dict of the module's parameters, by which a copy is told from the module
    itself, `order` their names before.
    """

    layout: Layout
    sources: list[tuple[nn.Module, str]]
    text: str
    plan: Plan
    name: str
    place: dict[str, nn.Parameter | None]
    order: list[str]

    def __post_init__(self) -> None:
        self.moves: list[Tensor] = []
        self._write_out()

    def __getstate__(self) -> dict[str, Any]:
        """Without the layout, which is no more than what this version makes of the plan."""
        return {name: self.__dict__[name] for name in (*self.__dataclass_fields__, "moves") if name != "layout"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        near = {self.name, *(tie.source for tie in self.plan.ties if tie.target == self.name)}
        targets = by_target(tie for tie in self.plan.ties if tie.target in near)
        self.layout = layout_of(targets[self.name], targets, {name: kept_ranges(ties) for name, ties in targets.items()})
        self._write_out()

    def _write_out(self) -> None:
        """The weight as code: of its parts, and for Dynamo, which is given the sources' modules one by one."""
        self.assemble = written_out(self.layout)
        name = self.name.rpartition(".")[2]
        self.read = reader(self.layout, name, tuple(each for _, each in self.sources), tuple(each for each in self.order if each != name))
        self.__dict__ |= {f"source{i}": module for i, (module, _) in enumerate(self.sources)}

    def place_moves(self, like: Tensor) -> None:
        """Makes the tensors of fitted orders anew, for a source of this dtype and on this device; on meta they would lose their values."""
        moves = [fitted.moves(like.dtype, "cpu" if like.is_meta else like.device) for fitted in self.layout.fitted]
        self.moves = [tensor for of_one_kind in zip(*moves, strict=True) for tensor in of_one_kind]

    def moves_beside(self, source: Tensor) -> Iterator[Tensor]:
        """Those tensors where the source is: elsewhere they are only where something has moved parameters one by one."""
        for tensor in self.moves:
            dtype = source.dtype if tensor.is_floating_point() else tensor.dtype
            yield tensor if (tensor.device, tensor.dtype) == (source.device, dtype) else tensor.to(source.device, dtype)

    def dense(self, owner: nn.Module, name: str) -> Tensor:
        """The weight `name` of `owner`, computed. Raises `PeFxError` where its source cannot be read, or is another model's."""
        own = owner._parameters
        if own is not self.place:
            return self._copied(owner, name)
        beside = next((each for each in own.values() if each is not None), None)
        sources = []
        for module, attribute in self.sources:
            parameter = module._parameters.get(attribute)
            if parameter is None:
                source = f"the {attribute} of its source, {type(module).__name__}, is no parameter any more"
                raise PeFxError(f"{name} ← {self.text}: {source}. It {whereabouts(module, attribute)}")
            value = placed(parameter, module, attribute, beside)
            if value is None:
                raise PeFxError(
                    f"{name} ← {self.text}: its source, a {type(module).__name__}, is on the meta device, without values, while its own "
                    "layer has them. What places weights only while their module runs must do so for both, or take pe_fx.untie(model)"
                )
            sources.append(value)
        if any(map(is_sharded, sources)) and not all(map(is_sharded, (*sources, *(each for each in own.values() if each is not None)))):
            raise PeFxError(
                f"{name} of {owner} reads a shard: its source was sharded apart from it. FSDP2 must shard both modules as one unit, "
                "pe_fx.distributed.fully_shard(model) or fully_shard([first, second]); pe_fx.distributed.check(model) names them. "
                "Tensor parallel needs a style for both: pe_fx.distributed.tensor_parallel_plan"
            )
        return self.assemble(None, own.get(kept_of(name)), own.get(gain_of(name)), *sources, *self.moves_beside(sources[0]))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that it is a view of."""
        return [module.get_parameter(attribute) for module, attribute in self.sources]

    def left(self, name: str) -> list[str]:
        """The parameters that the module has in place of the weight `name`."""
        is_kept = any(piece.part < 0 for piece in self.layout.pieces)
        return [kept_of(name)] * is_kept + [gain_of(name)] * bool(self.layout.gains)

    def dense_parameter(self, owner: nn.Module, name: str) -> nn.Parameter:
        """The same as a parameter of its own, trained where the first source is."""
        value = self.dense(owner, name).detach().clone(memory_format=torch.contiguous_format)
        return nn.Parameter(value, requires_grad=self.parameters[0].requires_grad)

    def _copied(self, owner: nn.Module, name: str) -> Tensor:
        """Read through a copy that holds the same ties, and tensors of its own in place of the parameters."""
        if any(module._parameters is not self.place for module, _ in self.sources):
            raise PeFxError(
                f"{name} ← {self.text} is read by a copy of its module that was made part by part, as by nn.DataParallel or a library for "
                "meta-learning, or that got another dict of parameters, as by DeepSpeed's ZeRO 3: where the copy of its source is cannot "
                "be known. Use DistributedDataParallel, FSDP2, torch.func.functional_call(model, parameters, args), copy.deepcopy(model), "
                "or pe_fx.untie(model)"
            )
        own = {key: value for key, value in (*vars(owner).items(), *owner._parameters.items()) if isinstance(value, Tensor)}
        sources = [own[attribute] for _, attribute in self.sources]
        return self.assemble(None, own.get(kept_of(name)), own.get(gain_of(name)), *sources, *self.moves_beside(sources[0]))


TOLD = "is tied: import pe_fx.transformers before from_pretrained"


def placeholder(like: Tensor) -> Tensor:
    """What stands for a tied weight in a file that a class which knows nothing of ties must refuse: no values, and the shape of no weight.

    One of them has a second name, with `TOLD` behind it.
    """
    return like.new_empty((1,) + (0,) * (like.dim() - 1))


def drop_placeholders(values: dict[str, Any], name: str) -> None:
    """Takes what stands for the tied weight of this name out of a file's values."""
    for each in (name, f"{name} {TOLD}"):
        if isinstance(values.get(each), Tensor) and not values[each].numel():
            del values[each]


living: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Every module that was given a tied weight: a source, which knows nothing of its ties, is found through them."""

MIX = "pe_fx_mix"
"""The key of the mix in what a state_dict tells of a tied module."""


def hands_of(layout: Layout) -> list[int | None]:
    """How a weight's parts are mixed."""
    return [None if view.mix is None else view.mix.mark for view in layout.views]


class Chosen:
    """The mark of a module: what of its parameters is tied has been decided, also of those that are in no tie.

    It is kept beside the parameters and not in them, since `load_state_dict(assign=True)` exchanges them and copies of them lose
    what is marked; with its module it is deep-copied and pickled.
    """

    marks: ClassVar[weakref.WeakSet[Chosen]] = weakref.WeakSet()

    def __init__(self, parameters: dict[str, nn.Parameter | None]) -> None:
        self.parameters = parameters
        self.marks.add(self)

    def __reduce__(self) -> tuple[type[Chosen], tuple[dict[str, nn.Parameter | None]]]:
        return Chosen, (self.parameters,)


def choose(model: nn.Module) -> None:
    """Marks a model's modules: what in them is tied has been decided."""
    for module in model.modules():
        if module._parameters:
            module.__dict__["pe_fx_chosen"] = Chosen(module._parameters)


def unchoose(model: nn.Module) -> None:
    """Takes the marks away again."""
    for module in model.modules():
        module.__dict__.pop("pe_fx_chosen", None)


def is_any_chosen(parameters: Iterable[Tensor]) -> bool:
    """Whether a module that holds one of them, or the module that this one is a copy of, is marked."""
    chosen = {id(own) for mark in Chosen.marks for own in mark.parameters.values()}
    return any(id(parameter) in chosen for parameter in parameters)


class Tied(Derived):
    """A module with weights that are views; `tied_weights` says which, and of what."""

    tied_weights: dict[str, TiedWeight]

    @classmethod
    def attributes(cls, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: _property(name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        living.add(self)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        ties = ", ".join(f"{name} ← {weight.text}" for name, weight in self.tied_weights.items())
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, {ties}" if own else ties

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves and casts parameters does so with orders, but for values that were not to be kept (`to_empty`)."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        for weight in self.tied_weights.values():
            for signs in weight.moves[-1:]:
                weight.place_moves(fn(signs))
        return self

    def _mixes(self) -> dict[str, list[int | None]]:
        return {name: hands_of(weight.layout) for name, weight in self.tied_weights.items()}

    def _left(self) -> dict[str, nn.Parameter]:
        """What is stored of tied weights, which the module's own class knows nothing of."""
        own: dict[str, nn.Parameter | None] = self._parameters  # type: ignore[attr-defined]
        names = (left for name, weight in self.tied_weights.items() for left in weight.left(name))
        return {name: parameter for name in names if (parameter := own.get(name)) is not None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Whatever the module's own class writes there."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name in self.tied_weights:
            destination.pop(prefix + name, None)
        destination.update({prefix + name: value for name, value in outside_saved(self._sources(), destination).items()})
        for name, parameter in self._left().items():
            destination.setdefault(prefix + name, parameter if keep_vars else parameter.detach())
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][MIX] = self._mixes()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: list[str]
    ) -> None:
        """Weights have the same names and shapes whatever the mix: a state_dict remembers it."""
        own = self._mixes()
        saved = local_metadata.get(MIX, own)
        if saved != own:
            alike = {name: len(hands) for name, hands in saved.items()} == {name: len(hands) for name, hands in own.items()}
            difference = "another order or other signs (mix) than it has" if alike else "other weights tied, or other parts of them, than"
            errors.append(f"{prefix[:-1]} was saved with {difference} here: tie the model by its own plan")
        for name in self.tied_weights:
            drop_placeholders(state_dict, prefix + name)
        check_loaded(self._sources(), assign=local_metadata.get("assign_to_params_buffers", False))
        arguments = (prefix, local_metadata, strict, missing, unexpected, errors)
        if self.dense_class._load_from_state_dict is nn.Module._load_from_state_dict:  # type: ignore[attr-defined]
            super()._load_from_state_dict(state_dict, *arguments)  # type: ignore[misc]
        else:
            self._load_as_its_class_does(state_dict, *arguments)

    def _load_as_its_class_does(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: list[str]
    ) -> None:
        """By a method that expects a dense weight, of which it is given the present value, and knows nothing of what is left of it."""
        lent = {prefix + name: getattr(self, name).detach().clone() for name in self.tied_weights if prefix + name not in state_dict}
        state_dict.update(lent)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)  # type: ignore[misc]
        for name in lent:
            state_dict.pop(name, None)
        handled = {*lent, *(prefix + name for name in self._left())}
        missing[:] = [name for name in missing if name not in handled]
        unexpected[:] = [name for name in unexpected if name not in handled]
        left = nn.Module()
        left._parameters = dict(self._left())
        nn.Module._load_from_state_dict(left, state_dict, prefix, local_metadata, strict, missing, [], errors)
        self._parameters.update(left._parameters)  # type: ignore[attr-defined]

    def _sources(self) -> dict[str, list[tuple[nn.Module, str]]]:
        return {name: weight.sources for name, weight in self.tied_weights.items()}

    def _refuse(self, name: str) -> None:
        raise PeFxError(
            f"{name} ← {self.tied_weights[name].text} is tied, and can be neither set nor deleted: change its source, or take "
            "pe_fx.untie(model), in which it is a parameter"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """What setting an attribute to a parameter comes to."""
        if name in self.tied_weights:
            self._refuse(name)
        if isinstance(param, ReadOnly):  # as pruning keeps a weight under another name
            raise PeFxError(f"{param.tied_name} is tied: it cannot be registered as {name}. Take what pe_fx.untie(model) returns")
        super().register_parameter(name, param)  # type: ignore[misc]

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if name in self.tied_weights:
            self._refuse(name)
        super().register_buffer(name, tensor, persistent)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        if name in self.tied_weights:
            self._refuse(name)
        super().__delattr__(name)

    def __prepare_scriptable__(self) -> Any:
        raise PeFxError("torch.jit.script cannot follow a tied weight to its source: use torch.jit.trace, or script pe_fx.untie(model)")


def tied_weights_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, TiedWeight]]:
    """Every tied weight of a model: its full name, its module, its name there, and what it is."""
    for path, module in model.named_modules():
        for name, weight in module.tied_weights.items() if isinstance(module, Tied) else ():
            yield f"{path}.{name}" if path else name, module, name, weight


def _property(name: str) -> property:
    def dense(self: Any) -> Tensor:
        tied: TiedWeight = self.tied_weights[name]
        if torch.compiler.is_dynamo_compiling():
            return cast(Tensor, tied.read(tied, self))
        if is_fx_symbolic_tracing():
            read = _traced(self, name, tied)
            return tied.dense(self, name) if read is None else cast(Tensor, read)
        try:
            value = tied.dense(self, name)
        except NotImplementedError as error:  # a quantized tensor
            raise PeFxError(f"{name} ← {tied.text}: the source cannot be viewed any more ({error}). Quantize pe_fx.untie(model)") from error
        return value if torch.compiler.is_compiling() else read_only(value, tied.name)

    def refuse(self: Any, value: Tensor) -> None:
        self._refuse(name)

    return property(dense, refuse, doc=f"The dense {name}, computed from what it is tied to.")


def _traced(module: nn.Module, name: str, weight: TiedWeight) -> Any:
    """What torch.fx records of a read, else it would keep the value; None where its graph cannot name the weight.

    The modules are read, too: a GraphModule then takes them as they are, and not their weights alone.
    """
    source, attribute = weight.sources[0]
    parameter = nn.Module.__getattr__(source, attribute)
    if not isinstance(parameter, fx.Proxy):
        return None
    tracer: Any = parameter.tracer
    try:
        paths = [tracer.path_of_module(each) for each in (*(source for source, _ in weight.sources), module)]
    except NameError:  # a module outside of what is traced
        return None
    if not all(paths):
        return None
    for path in paths:
        tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("get_attr", f"{paths[-1]}.{name}", (), {})


def tied_class(cls: type, module: nn.Module, names: Iterable[str]) -> type:
    """The class, in place of its class `cls`, of a module in which `names` are tied beside those that are."""
    dense_class: type = module.dense_class if isinstance(module, Tied) else cls
    return derive(dense_class, Tied, {*module.__dict__.get("tied_weights", ()), *names})


def tie_weight(module: nn.Module, name: str, weight: TiedWeight, kept: nn.Parameter | None) -> None:
    """Makes `module.<name>`, whose class is a `tied_class`, a view; of the parameter only `kept` stays, if anything."""
    own = module._parameters
    dense = own[name]
    assert dense is not None
    if kept is None:
        del own[name]
    else:
        names = [kept_of(name) if each == name else each for each in own]
        own[kept_of(name)] = kept
        del own[name]
        for each in names:  # an optimizer's order
            own[each] = own.pop(each)
    factors = [dense.new_full((gain.count,), gain.initial) for gain in weight.layout.gains]
    if factors:
        own[gain_of(name)] = nn.Parameter(torch.cat(factors), requires_grad=dense.requires_grad)
    weight.place_moves(dense)
    module.__dict__["tied_weights"] = {**module.__dict__.get("tied_weights", {}), name: weight}
    living.add(module)


def untie_weights(module: nn.Module, dense: dict[str, nn.Parameter]) -> None:
    """Gives a tied module these parameters, and its own class."""
    assert isinstance(module, Tied)
    weights: dict[str, TiedWeight] = module.__dict__.pop("tied_weights")
    module.__class__ = module.dense_class  # type: ignore[assignment]
    own = module._parameters
    for name, weight in weights.items():
        for left in weight.left(name):
            del own[left]
        own[name] = dense[name]
    for name in next(iter(weights.values())).order:
        own[name] = own.pop(name)


def before_tied(module: nn.Module, name: str) -> str:
    """The name that a parameter had before what is left of it got a name of its own.

    >>> before_tied(nn.Linear(2, 2), "weight")
    'weight'
    """
    return next((tied for tied in module.__dict__.get("tied_weights", ()) if kept_of(tied) == name), name)
