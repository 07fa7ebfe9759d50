"""Model to graph: one flat torch.fx graph, its weights as labelled placeholders, without touching the model."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pe_fx.errors import CaptureError, first_line
from pe_fx.graph.inputs import ExampleInputs, as_arguments, derive_inputs, enumerate_tensors, tensors_in
from pe_fx.graph.ops import COPIES, GATHERS, base_name, value_of
from pe_fx.graph.plain import plain

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
    `torch.export.export(strict=False)`, in train mode first. Nothing is computed, no weight is copied.

    Raises `CaptureError` where neither mode exports.
    """
    if isinstance(model, fx.GraphModule) and _has_values(model.graph):
        return _read(model)
    _refuse(model)
    errors: list[Exception] = []
    tried: list[ExampleInputs] = []
    for inputs in derive_inputs(model) if example_inputs is None else [example_inputs]:
        tried.append(inputs)
        args, kwargs = as_arguments(inputs)
        for training in (True, False):
            try:
                with _quiet(), _rng_untouched(model):
                    program = torch.export.export(_Flattened(_sharing_copy(model).train(training)), args, kwargs, strict=False)
            except Exception as error:  # whatever a user's forward raises
                errors.append(error)
                log.debug("export with training=%s failed", training, exc_info=True)
            else:
                return _labelled(program, inputs)
    raise _failure(model, tried, errors, given=example_inputs is not None) from (errors[0] if errors else None)


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


def _labelled(program: torch.export.ExportedProgram, inputs: ExampleInputs) -> Captured:
    signature = program.graph_signature
    names = {key: name.removeprefix("model.") for key, name in signature.inputs_to_parameters.items()}
    graph = plain(program.graph_module)
    placeholders = graph.find_nodes(op="placeholder")
    weights = {node: names[node.name] for node in placeholders if node.name in names}
    lifted = signature.inputs_to_lifted_tensor_constants
    for node in placeholders:
        if node.name in lifted:
            _show(node, program.constants[lifted[node.name]])
    return Captured(graph, weights, {node for node in placeholders if node.name in signature.user_inputs}, inputs)


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
    return Captured(graph, weights, set(graph.find_nodes(op="placeholder")) - set(weights))


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
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return tensors_in(self.model(*args, **kwargs))


_FLATTENED = f"{_Flattened.__module__}.{_Flattened.__qualname__}"


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that holds the very tensors of the original."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [value for value in pytree.tree_leaves(dict(vars(module))) if isinstance(value, Tensor)]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for module in copied.modules():
        module._apply = functools.partial(_convert, module)  # type: ignore[method-assign]
    return copied


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
def _quiet() -> Iterator[None]:
    """Export reports a failure by printing the whole graph so far; the caller gets one line instead."""
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
