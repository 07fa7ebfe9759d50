"""Model to graph: one flat torch.fx graph, its weights as labelled placeholders, without touching the model."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pe_fx.errors import CaptureError, first_line
from pe_fx.graph.copies import copied, modules_in
from pe_fx.graph.inputs import ExampleInputs, as_arguments, derive_inputs, enumerate_tensors, tensors_in
from pe_fx.graph.ops import COPIES, GATHERS, base_name, value_of
from pe_fx.graph.plain import plain
from pe_fx.graph.products import open_products

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """A flat graph; for each node that reads a parameter the parameter's name; the nodes that are the caller's inputs; and
    the example inputs that fitted."""

    graph: fx.Graph
    weights: dict[fx.Node, str]
    inputs: set[fx.Node]
    example_inputs: ExampleInputs | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter that the graph reads."""
        return {name: tuple(value_of(node).shape) for node, name in self.weights.items()}


def capture(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Captured:
    """The model's graph.

    >>> captured = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    >>> sorted(captured.weights.values())
    ['0.bias', '0.weight']

    `example_inputs` is a tensor, a tuple of positional or a dict of keyword arguments; derived where left out. A GraphModule
    whose nodes carry their values (from torch.export or Dynamo) is read as it is; anything else goes through
    `torch.export.export(strict=False)`, in train mode first. Nothing is computed, and no weight is copied but those to which a `train`
    of a module's own may write. What export refuses for its dtype, such as a grouped product of float32, is captured in another; or
    else recorded, while a copy of the model runs once.

    Raises `CaptureError` where neither mode exports.
    """
    if isinstance(model, fx.GraphModule) and _has_values(model.graph):
        return _read(model)
    _refuse(model)
    errors: list[Exception] = []
    tried: list[ExampleInputs] = []
    for inputs in derive_inputs(model) if example_inputs is None else [example_inputs]:
        tried.append(inputs)
        for route in _routes(model, inputs, errors):
            try:
                with quiet(), _rng_untouched(model):
                    traced = route()
            except Exception as error:  # whatever a user's forward raises
                errors.append(error)
                log.debug("%s failed", route, exc_info=True)
            else:
                return _labelled(traced, inputs)
    raise _failure(model, tried, errors, given=example_inputs is not None) from (errors[0] if errors else None)


@dataclass(frozen=True)
class _Traced:
    """A graph, and which of its nodes are parameters, under which names, the caller's inputs, and constants of the code."""

    gm: fx.GraphModule
    weights: dict[str, str]
    inputs: set[str]
    constants: dict[str, Any]


def _routes(model: nn.Module, inputs: ExampleInputs, errors: list[Exception]) -> Iterator[Callable[[], _Traced]]:
    """Ways to the graph, each to be gone where those before it failed."""
    modes = (True, False)
    yield from (functools.partial(_exported, model, inputs, training) for training in modes)
    if _NAMES_DTYPE.search(first_line(errors[-1])):
        yield from (functools.partial(_exported, model, inputs, training, d) for d in _other_dtypes(model, inputs) for training in modes)
        yield from (functools.partial(_recorded, model, inputs, training) for training in modes)


def _exported(model: nn.Module, inputs: ExampleInputs, training: bool, dtype: torch.dtype | None = None) -> _Traced:
    args, kwargs = pytree.tree_map_only(Tensor, functools.partial(_in_dtype, dtype=dtype), as_arguments(inputs))
    program = torch.export.export(_Flattened(_sharing_copy(model, training, dtype)), args, kwargs, strict=False)
    signature = program.graph_signature
    weights = {key: name.removeprefix("model.") for key, name in signature.inputs_to_parameters.items()}
    constants = {key: program.constants[name] for key, name in signature.inputs_to_lifted_tensor_constants.items()}
    return _Traced(program.graph_module, weights, set(signature.user_inputs), constants)


def _recorded(model: nn.Module, inputs: ExampleInputs, training: bool) -> _Traced:
    """One run of a copy, which may change itself as it likes."""
    runs = _Flattened(copied(model, lend=True).train(training))
    parameters = dict(runs.named_parameters())
    state = parameters | dict(runs.named_buffers())

    def run(values: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return torch.func.functional_call(runs, dict(zip(state, values, strict=True)), args, kwargs)

    own = pytree.tree_map_only(Tensor, lambda value: value.detach().clone(), as_arguments(inputs))
    gm = make_fx(run, pre_dispatch=True)(list(state.values()), *own)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    weights = {key: name.removeprefix("model.") for key, name in zip(names, state, strict=False) if name in parameters}
    constants = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(value := getattr(gm, str(node.target)), Tensor):
            constants[node.name] = value
            node.meta["val"] = FakeTensorMode().from_tensor(value)
    return _Traced(gm, weights, set(names[len(state) :]), constants)


_NAMES_DTYPE = re.compile(r"dtype|float|half|double|scalar type", re.IGNORECASE)


def _other_dtypes(model: nn.Module, inputs: ExampleInputs) -> tuple[torch.dtype, ...]:
    """The dtypes in which a model may be captured that export refuses in its own; none where its values have several."""
    tensors = (*model.parameters(), *tensors_in(inputs))
    own = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return tuple(dtype for dtype in (torch.float32, torch.bfloat16) if dtype not in own) if len(own) == 1 else ()


def _in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor, or, for floating numbers of another dtype, one like it: values do not matter, so none are set."""
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    like = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
    return nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like


def _failure(model: nn.Module, tried: list[ExampleInputs], errors: list[Exception], given: bool) -> CaptureError:
    """What happened with the likeliest inputs, in train and in eval mode, and what to do."""
    name = type(model).__name__
    takes = ", ".join(inspect.signature(model.forward).parameters)
    pass_them = f"pass example_inputs, a tensor, a tuple of positional or a dict of keyword arguments: forward takes {takes or 'nothing'}"
    if not errors:
        return CaptureError(f"no example inputs can be derived for {name}: {pass_them}")
    shapes = [f"{key} {tuple(value.shape)}" for key, value in enumerate_tensors(as_arguments(tried[0]))]
    origin = "the inputs given," if given else f"inputs derived from it ({len(tried)} tried), the likeliest being"
    in_train, in_eval = map(first_line, errors[:2])
    what = in_train if in_train == in_eval else f"{in_train} (in eval mode: {in_eval})"
    hint = f"check that model(*example_inputs) runs: forward takes {takes}" if given else pass_them
    return CaptureError(f"{name} could not be captured with {origin} {', '.join(shapes) or 'no tensors'}: {what}; {hint}")


def _labelled(traced: _Traced, inputs: ExampleInputs) -> Captured:
    graph = plain(traced.gm)
    weights: dict[fx.Node, str] = {}
    users: set[fx.Node] = set()
    for node in (*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr")):
        if node.name in traced.weights:
            weights[node] = traced.weights[node.name]
        elif node.name in traced.inputs:
            users.add(node)
        elif node.name in traced.constants:
            _show(node, traced.constants[node.name])
    open_products(graph, weights, users)
    return Captured(graph, weights, users, inputs)


def _show(constant: fx.Node, value: Any) -> None:
    """Positions that stand in the model's code are recorded as they are, not as fakes, unless something may write to them."""
    copies: list[fx.Node] = [constant]
    readers: list[fx.Node] = []
    for node in copies:
        for user in node.users:
            (copies if base_name(user) in COPIES else readers).append(user)
    if isinstance(value, Tensor) and not value.is_meta and all(base_name(user) in GATHERS for user in readers):
        for node in copies:
            node.meta["val"] = value.to("cpu", value_of(node).dtype)


def _read(gm: fx.GraphModule) -> Captured:
    graph = plain(gm)
    weights: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(value := _attribute(gm, str(node.target)), nn.Parameter):
            weights[node] = str(node.target)
            node.meta.setdefault("val", value)
        elif node.op == "placeholder" and isinstance(value_of(node), nn.Parameter):
            weights[node] = node.name
    inputs = set(graph.find_nodes(op="placeholder")) - set(weights)
    open_products(graph, weights, inputs)
    return Captured(graph, weights, inputs)


def _has_values(graph: fx.Graph) -> bool:
    """Whether every call that the output depends on has its value."""
    live = dict.fromkeys(graph.find_nodes(op="output"))
    for node in reversed(graph.nodes):
        if node in live:
            live |= dict.fromkeys(node.all_input_nodes)
    calls = [node for node in live if node.op.startswith("call")]
    return bool(calls) and all(node.op != "call_module" and value_of(node) is not None for node in calls)


def module_of(node: fx.Node) -> str | None:
    """The path of the module whose forward made the node; None where that was not recorded.

    >>> graph = capture(nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU()))).graph
    >>> [module_of(node) for node in graph.nodes if node.op == "call_function"]
    ['0', '1.0']
    """
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return None
    path: str = stack[-1][0]
    return path.removeprefix("model").removeprefix(".") if stack[0][1] == _FLATTENED else path


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for atom in path.split("."):
        value = getattr(value, atom, None)
    return value


class _Flattened(nn.Module):
    """Returns every tensor that the model's output holds, whatever its type, as one list."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return tensors_in(self.model(*args, **kwargs))


_FLATTENED = f"{_Flattened.__module__}.{_Flattened.__qualname__}"


def _sharing_copy(model: nn.Module, training: bool, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the module tree in one of its modes that holds the very parameters and buffers of the original, or such in another dtype.

    Other tensors are copied: export replaces none of them while a forward runs that may write to them. So may a `train` of a
    module's own write to its weights, as one that merges adapters into them.
    """
    changes = any(module.training is not training for module in model.modules())
    writers = [module for module in model.modules() if changes and type(module).train is not nn.Module.train]
    own = {id(tensor) for module in writers for tensor in (*module.parameters(), *module.buffers())}
    shared = {id(tensor) for tensor in (*model.parameters(), *model.buffers())} - own
    known = {}
    for tensor in (leaf for module in modules_in(model) for leaf in pytree.tree_leaves(dict(vars(module))) if isinstance(leaf, Tensor)):
        new = _in_dtype(tensor, dtype)
        if new is not tensor or id(tensor) in shared:
            known[id(tensor)] = new
    result = copied(model, known, lend=True)
    for module in result.modules():
        module._apply = functools.partial(_convert, module)  # type: ignore[method-assign]
    return result.train(training) if changes else result


def _convert(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """A module that is what a forward would convert it to stays as it is: tensors cannot be exchanged while they are traced."""
    tensors = [*module.parameters(recurse), *module.buffers(recurse)]
    changed = any((new.dtype, new.device) != (old.dtype, old.device) for old in tensors for new in [fn(old)])
    return type(module)._apply(module, fn, recurse) if changed else module  # type: ignore[no-untyped-call]


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{name or 'the model'} is a ScriptModule, whose graph is closed: transform the model before torch.jit.script"
            )
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise CaptureError(f"{name or 'the model'} is compiled: transform the model first, then call torch.compile")
        if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise CaptureError(f"{name or 'the model'} has uninitialised lazy parameters: run the model once before")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stderr: export reports a failure by printing the whole graph so far, and the caller gets one line instead."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _rng_untouched(model: nn.Module) -> Iterator[None]:
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        with rng_restored(model):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def rng_restored(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Restores afterwards the random state of the CPU and of the devices that the model is on or that are in use, and wakes no others."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    kind = next((device.type for device in devices), "cuda")
    in_use = kind == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch.manual_seed seeds them all
    indices = list(range(torch.cuda.device_count())) if in_use else [device.index for device in devices]
    return torch.random.fork_rng(indices, device_type=kind)
