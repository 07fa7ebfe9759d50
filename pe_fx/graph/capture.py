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

from pe_fx.errors import CaptureError, first_line
from pe_fx.graph.derive import derive_inputs
from pe_fx.graph.inputs import ExampleInputs, as_arguments, enumerate_tensors, tensors_in
from pe_fx.graph.ops import COPIES, GATHERS, base_name, value_of
from pe_fx.graph.plain import plain
from pe_fx.graph.products import open_products
from pe_fx.graph.routes import Flattened, Traced, exported, qualified, recorded, run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """A flat graph; for each node that reads a parameter the parameter's name; the nodes that are the caller's inputs; the example
    inputs that fitted; and how it came about: by "export", by a "run", or as a "graph" that was given."""

    graph: fx.Graph
    weights: dict[fx.Node, str]
    inputs: set[fx.Node]
    example_inputs: ExampleInputs | None = None
    how: str = "graph"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter that the graph reads."""
        return {name: tuple(value_of(node).shape) for node, name in self.weights.items()}


def capture(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Captured:
    """The model's graph.

    >>> captured = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    >>> sorted(captured.weights.values()), captured.how
    (['0.bias', '0.weight'], 'export')

    `example_inputs` is a tensor, a tuple of positional or a dict of keyword arguments; derived where left out. A GraphModule
    whose nodes carry their values (from torch.export or Dynamo) is read as it is; anything else goes through
    `torch.export.export(strict=False)`, in train mode first, which computes nothing. What export refuses for its dtype, such as a
    grouped product of float32, it gets in another. What it refuses for values that decide is recorded in a run on these inputs, and
    one path is what the graph holds. No weight is copied but those to which forward, or a `train` of a module's own, writes.

    Raises `CaptureError` where no way leads to a graph.
    """
    if isinstance(model, fx.GraphModule) and _has_values(model.graph):
        return _read(model)
    _refuse(model)
    failed: list[tuple[ExampleInputs, list[Exception]]] = []
    for inputs in derive_inputs(model) if example_inputs is None else [example_inputs]:
        errors: list[Exception] = []
        failed.append((inputs, errors))
        for route in _routes(model, inputs, errors):
            try:
                with quiet(), _rng_untouched(model):
                    traced = route()
            except CaptureError:
                raise
            except Exception as error:  # whatever a user's forward raises
                errors.append(error)
                log.debug("%s failed", route, exc_info=True)
            else:
                return _labelled(traced, inputs)
        if _lacks_values(model, inputs):
            break  # they fit, and others would lack them as well
    raise _failure(model, failed, given=example_inputs is not None) from (failed[0][1][0] if failed else None)


_MODES = (True, False)


def _routes(model: nn.Module, inputs: ExampleInputs, errors: list[Exception]) -> Iterator[Callable[[], Traced]]:
    """Ways to the graph, each to be gone where those before it failed: first those that compute nothing."""
    yield from (functools.partial(exported, model, inputs, training) for training in _MODES)
    if _NAMES_DTYPE.search(first_line(errors[-1])):
        yield from (functools.partial(exported, model, inputs, training, d) for d in _other_dtypes(model, inputs) for training in _MODES)
    yield from (functools.partial(recorded, model, inputs, training) for training in _MODES)


_NAMES_DTYPE = re.compile(r"dtype|float|half|double|scalar type", re.IGNORECASE)


def _other_dtypes(model: nn.Module, inputs: ExampleInputs) -> tuple[torch.dtype, ...]:
    """The dtypes in which a model may be captured that export refuses in its own; none where its values have several."""
    tensors = (*model.parameters(), *tensors_in(inputs))
    own = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return tuple(dtype for dtype in (torch.float32, torch.bfloat16) if dtype not in own) if len(own) == 1 else ()


def _failure(model: nn.Module, failed: list[tuple[ExampleInputs, list[Exception]]], given: bool) -> CaptureError:
    """What happened with the inputs that fit, or else with the likeliest, in train and in eval mode, and what to do."""
    name = type(model).__name__
    takes = ", ".join(inspect.signature(model.forward).parameters) or "nothing"
    pass_them = f"pass example_inputs, a tensor, a tuple of positional or a dict of keyword arguments: forward takes {takes}"
    if not failed:
        return CaptureError(f"no example inputs can be derived for {name}: {pass_them}")
    inputs, errors = failed[-1]
    if _lacks_values(model, inputs):
        what = _by_mode(errors)
        hint = "values decide in it, and what is on the meta device has none: with model and inputs in memory, a run of it is recorded"
    elif (fitting := next((each for each in failed if not _refusals(model, each[0])), None)) is not None:
        inputs, errors = fitting
        what = f"{_by_mode(errors)}; nor by recording a run ({first_line(errors[-1])}), though it runs"
        hint = 'tie what torch.compile sees of it: torch.compile(model, backend="pe_fx"), run that once, then pe_fx.commit(model)'
    else:
        inputs, errors = failed[0]
        what = _by_mode(_refusals(model, inputs) or errors)
        hint = f"check that model(*example_inputs) runs: forward takes {takes}" if given else pass_them
    shapes = [f"{key} {tuple(value.shape)}" for key, value in enumerate_tensors(as_arguments(inputs, model))]
    origin = "the inputs given," if given else f"inputs derived from it ({len(failed)} tried), the likeliest being"
    return CaptureError(f"{name} could not be captured with {origin} {', '.join(shapes) or 'no tensors'}: {what}; {hint}")


def _lacks_values(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether the model asks for values that what is on the meta device does not have."""
    on_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers(), *tensors_in(inputs)))
    return on_meta and any("meta" in str(error) for error in _refusals(model, inputs))


def _refusals(model: nn.Module, inputs: ExampleInputs) -> list[Exception]:
    """What the model raises in train and in eval mode; nothing where it runs in one of them."""
    errors: list[Exception] = []
    for training in _MODES:
        try:
            with quiet(), _rng_untouched(model):
                run(model, inputs, training)
        except Exception as error:  # whatever a user's forward raises
            errors.append(error)
        else:
            return []
    return errors


def _by_mode(errors: list[Exception]) -> str:
    in_train, in_eval = map(first_line, errors[:2])
    return in_train if in_train == in_eval else f"{in_train} (in eval mode: {in_eval})"


def _labelled(traced: Traced, inputs: ExampleInputs) -> Captured:
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
    return Captured(graph, weights, users, inputs, traced.how)


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
    return path.removeprefix("model").removeprefix(".") if stack[0][1] == qualified(Flattened) else path


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for atom in path.split("."):
        value = getattr(value, atom, None)
    return value


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
