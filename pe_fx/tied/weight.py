"""Modules whose weights are views of another module's weight.

A tied module is a subclass of its own class with a property in place of the parameter. A tied weight is never a parameter: what is
left of it, where only some of its rows are tied, is stored under a name of its own. The source is held without being registered, so
that every weight has exactly one name.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from pe_fx.errors import PeFxError
from pe_fx.tied.derived import Derived, derive
from pe_fx.tied.missing import whereabouts
from pe_fx.tied.placed import placed
from pe_fx.tied.read_only import ReadOnly, read_only
from pe_fx.tied.whole import check_loaded, outside_saved
from pe_fx.ties import Plan, Ranges, Shape, gain_of, kept_of


@dataclass(frozen=True)
class Mix:
    """Fixed signs for the channels along both matrix dimensions, and another order along one of them.

    The `height` channels along `axis` are dealt like cards into `hands`, one hand laid behind the other; then the first half is
    negated, as is the first half of the `width` channels along `across`.

    >>> mix = Mix(axis=0, across=1, hands=2, height=4, width=2)
    >>> mix(torch.tensor([[10, 11], [20, 21], [30, 31], [40, 41]])).tolist()
    [[10, -11], [30, -31], [-20, 21], [-40, 41]]
    >>> mix.inverse(mix(torch.eye(4, 2))).equal(torch.eye(4, 2))
    True

    Made of views and products, it keeps nothing in memory, its gradient scatters nothing, and Inductor makes one kernel of it, the
    same for all weights of one shape with as many hands. A shard along `across`, as in tensor parallel, needs no other.
    """

    axis: int
    across: int
    hands: int
    height: int
    width: int

    @classmethod
    def drawn(cls, axis: int, across: int, shape: Shape, seed: int) -> Mix:
        """The mix of a weight of this shape that the seed stands for, by arithmetic alone: the same everywhere and for ever.

        >>> Mix.drawn(0, 1, (384, 1536), 2024)
        Mix(axis=0, across=1, hands=16, height=384, width=1536)
        """
        size = shape[axis]
        divisors = [hands for hands in range(2, size // 2 + 1) if size % hands == 0]
        # the two that move channels farthest: more trained no better, and each is a kernel more to compile
        middle = sorted(divisors, key=lambda hands: (max(hands, size // hands), hands))[:2] or [1]
        return cls(axis, across, middle[seed % len(middle)], size, shape[across])

    def __call__(self, part: Tensor) -> Tensor:
        return self._signed(self._dealt(part, (-1, self.hands)))

    def inverse(self, mixed: Tensor) -> Tensor:
        return self._dealt(self._signed(mixed), (self.hands, -1))

    def _dealt(self, part: Tensor, grid: tuple[int, int]) -> Tensor:
        rows: Tensor = part.unflatten(self.axis, grid)  # type: ignore[no-untyped-call]
        return rows.transpose(self.axis, self.axis + 1).flatten(self.axis, self.axis + 1)

    def _signed(self, part: Tensor) -> Tensor:
        for axis, size in ((self.axis, self.height), (self.across, self.width)):
            signs = torch.cat([part.new_full((size // 2,), -1), part.new_full((size - size // 2,), 1)])
            part = (part.transpose(axis, -1) * signs).transpose(axis, -1)
        return part


@dataclass(frozen=True)
class View:
    """A part of a stored tensor: `ranges` of each dimension (None: all of it), dimensions `swap` exchanged, `reshape`d and mixed.

    Written with methods and `cat` alone, so that it runs on tensors and on torch.fx proxies.
    """

    ranges: tuple[Ranges | None, ...]
    swap: tuple[int, int] | None = None
    reshape: Shape | None = None
    mix: Mix | None = None

    def __call__(self, stored: Tensor) -> Tensor:
        part = stored
        for dim, ranges in enumerate(self.ranges):
            if ranges is not None:
                part = _joined([part.narrow(dim, start, stop - start) for start, stop in ranges], dim)
        if self.swap is not None:
            part = part.transpose(*self.swap)
        if self.reshape is not None:
            part = part.reshape(self.reshape)
        return part if self.mix is None else self.mix(part)


@dataclass(frozen=True)
class Piece:
    """Positions start to stop of a part (None: all of it); part -1 is what the module itself stores."""

    part: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Gain:
    """Which of a module's learned factors scale a part, one for each position along `axis`."""

    axis: int
    start: int
    count: int
    initial: float

    def __call__(self, part: Tensor, factors: Tensor) -> Tensor:
        return (part.transpose(self.axis, -1) * factors.narrow(0, self.start, self.count)).transpose(self.axis, -1)


@dataclass(frozen=True)
class Layout:
    """How a dense weight is put together along `axis`. `gains` scale the parts, where any is scaled; `contiguous`: as a copy.

    >>> layout = Layout(0, (Piece(0),), (View((((0, 2),), None), swap=(0, 1)),))
    >>> layout.assemble(None, [torch.ones(4, 3)]).shape
    torch.Size([3, 2])
    """

    axis: int
    pieces: tuple[Piece, ...]
    views: tuple[View, ...]
    gains: tuple[Gain | None, ...] = ()
    contiguous: bool = False

    def assemble(self, own: Tensor | None, sources: Sequence[Tensor], factors: Tensor | None = None) -> Tensor:
        parts = [view(source) for view, source in zip(self.views, sources, strict=True)]
        if factors is not None:
            parts = [part if gain is None else gain(part, factors) for part, gain in zip(parts, self.gains, strict=True)]
        pieces = []
        for piece in self.pieces:
            part = own if piece.part < 0 else parts[piece.part]
            assert part is not None
            pieces.append(part if piece.stop is None else part.narrow(self.axis, piece.start, piece.stop - piece.start))
        dense = _joined(pieces, self.axis)
        return dense.contiguous() if self.contiguous else dense


@functools.cache
def written_out(layout: Layout) -> Callable[..., Tensor]:
    """`layout.assemble` as straight-line code, a function of nothing, what a module stores, its factors, and each source.

    >>> written_out(Layout(0, (Piece(0),), (View((None, None), swap=(0, 1)),)))(None, None, None, torch.ones(4, 3)).shape
    torch.Size([3, 4])

    Layouts that are equal have one function. Dynamo guards on that alone, and not on every number in the layout.
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    names = ("own", "factors", *(f"source{i}" for i in range(len(layout.views))))
    own, factors, *sources = (cast(Tensor, fx.Proxy(graph.placeholder(name), tracer)) for name in names)
    dense: Any = layout.assemble(own, sources, factors if any(layout.gains) else None)
    graph.output(dense.node)
    code = graph.python_code("self")
    exec(code.src, code.globals)
    return cast(Callable[..., Tensor], code.globals["forward"])


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
        self.assemble = written_out(self.layout)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "assemble"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.__post_init__()

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
        return self.assemble(None, own.get(kept_of(name)), own.get(gain_of(name)), *sources)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that it is a view of."""
        return [module.get_parameter(attribute) for module, attribute in self.sources]

    def left(self, name: str) -> list[str]:
        """The parameters that the module has in place of the weight `name`."""
        is_kept = any(piece.part < 0 for piece in self.layout.pieces)
        return [kept_of(name)] * is_kept + [gain_of(name)] * any(self.layout.gains)

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
        return self.assemble(None, own.get(kept_of(name)), own.get(gain_of(name)), *(own[attribute] for _, attribute in self.sources))


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor, the class of which takes long to import."""
    return hasattr(parameter, "placements")


living: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Every module that was given a tied weight: a source, which knows nothing of its ties, is found through them."""

MIX = "pe_fx_mix"
"""The key of the mix in what a state_dict tells of a tied module."""


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

    def _mixes(self) -> dict[str, list[int | None]]:
        return {
            name: [None if view.mix is None else view.mix.hands for view in weight.layout.views]
            for name, weight in self.tied_weights.items()
        }

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
    factors = [dense.new_full((gain.count,), gain.initial) for gain in weight.layout.gains if gain is not None]
    if factors:
        own[gain_of(name)] = nn.Parameter(torch.cat(factors), requires_grad=dense.requires_grad)
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
    return next((tied for tied in getattr(module, "tied_weights", ()) if kept_of(tied) == name), name)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
