"""Model to graph: one flat torch.fx graph, its weights as labelled placeholders, without touching the model."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import logging
import operator
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pe_fx.errors import CaptureError
from pe_fx.graph.ops import COPIES, GATHERS, KINDS, base_name, is_in_place, keeps_order, may_alias

log = logging.getLogger(__name__)

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


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
    graph = inline_regions(program.graph_module)
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


def as_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """
    >>> as_arguments({"x": 1})
    ((), {'x': 1})
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


IMAGE_SIZES = (224, 64, 32, 256, 128, 96, 160, 192, 288, 384, 448, 512)
LENGTHS = (64, 16, 1024, 16000)


def derive_inputs(model: nn.Module) -> Iterator[ExampleInputs]:
    """Inputs that may fit, the likeliest first: timm's `pretrained_cfg`, transformers' `dummy_inputs`, the first layer's shape.

    >>> next(derive_inputs(nn.Linear(3, 5))).shape
    torch.Size([2, 3])
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it is

    def random_like(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(like)

    configuration = getattr(model, "pretrained_cfg", None)
    if isinstance(configuration, Mapping) and "input_size" in configuration:
        yield random_like(2, *configuration["input_size"])
    with contextlib.suppress(Exception):  # a property of a user's model may raise anything
        dummy = model.dummy_inputs
        if isinstance(dummy, Mapping):
            inputs = {key: value.to(like.device) if isinstance(value, Tensor) else value for key, value in dummy.items()}
            takes = inspect.signature(model.forward).parameters
            yield inputs
            if "attention_mask" in takes:  # some make none for themselves while they are traced
                inputs = {"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs
                yield inputs
            if "pixel_values" in takes and takes.keys() >= dummy.keys():  # text and images
                first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
                for size in IMAGE_SIZES:
                    yield inputs | {"pixel_values": random_like(len(inputs["input_ids"]), first.in_channels, size, size)}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield random_like(2, module.in_features)
            yield random_like(2, 16, module.in_features)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            for size in LENGTHS if isinstance(module, nn.Conv1d) else IMAGE_SIZES:
                yield random_like(2, module.in_channels, *[size] * len(module.kernel_size))
        elif isinstance(module, nn.Embedding):
            yield torch.randint(module.num_embeddings, (2, 16), generator=generator, device="cpu").to(like.device)
        else:
            continue
        return


def inline_regions(gm: fx.GraphModule) -> fx.Graph:
    """A copy of the graph with autocast, no_grad and checkpoint regions (operators that call one subgraph) inlined, and functions
    made of several operations, such as `F.multi_head_attention_forward`, opened."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    result = _copy_into(graph, gm, values)
    graph.output(result)
    _spell_out_glu(graph)
    _spell_out_writes(graph)
    return graph


def _spell_out_glu(graph: fx.Graph) -> None:
    """glu(x) as what it stands for: the first half of x times the sigmoid of the second."""
    for node in list(graph.nodes):
        if not node.op.startswith("call") or base_name(node) != "glu":
            continue
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
        halves = value_of(node.args[0]).chunk(2, dim)
        with graph.inserting_before(node):
            chunks = graph.call_function(torch.chunk, (node.args[0], 2, dim))
            first, second = (graph.call_function(operator.getitem, (chunks, i)) for i in (0, 1))
            gate = graph.call_function(torch.sigmoid, (second,))
            product = graph.call_function(torch.mul, (first, gate))
        chunks.meta["val"] = halves
        for new, value in ((first, halves[0]), (second, halves[1]), (gate, halves[1]), (product, value_of(node))):
            new.meta["val"] = value
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def overwritten(value: Any, by: Any) -> Any:
    """Stands in a captured graph for what a value holds after an operation wrote to a part of it, or to it in another shape."""
    raise NotImplementedError


def _spell_out_writes(graph: fx.Graph) -> None:
    """After a write in place, whoever reads the rest of that memory under another name reads `overwritten`.

    Who reads the very value that was written reads the operation's result: `flow.live_operands` sees to that.
    """
    order: dict[fx.Node, float] = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(order):
        if not (node.op.startswith("call") and is_in_place(node) and isinstance(node.args[0], fx.Node)):
            continue
        chain = memory_chain(node.args[0])
        same = {value for value in chain if written_whole(value, node)}
        stale = set(chain) - same
        if chain[-1] in same:  # all of it was written, and all that was made of it before
            stale |= {value for value in _aliases(chain[-1]) if order[value] < order[node]} - set(chain)
        for value in sorted(stale, key=order.__getitem__):
            readers = [user for user in value.users if order[user] > order[node]]
            if not readers or not isinstance(value_of(value), Tensor):
                continue
            with graph.inserting_after(node):
                if value in chain and written_whole(value, node, reshaped=True):
                    new = graph.call_function(torch.reshape, (node, tuple(value_of(value).shape)))
                else:
                    new = graph.call_function(overwritten, (value, node))
            new.meta["val"] = value_of(value)
            order[new] = order[node] + 0.5
            for reader in readers:
                reader.replace_input_with(value, new)


def written_whole(value: fx.Node, by: fx.Node, reshaped: bool = False) -> bool:
    """Whether an operation in place wrote all of `value`, which its first operand is or is made of, in the same shape (or any)."""
    current = by.args[0]
    while current is not value and isinstance(current, fx.Node) and keeps_order(current):
        current = current.args[0]
    old, new = value_of(value), value_of(by)
    if current is not value or not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return current is value
    return old.numel() == new.numel() if reshaped else old.shape == new.shape


def memory_chain(value: fx.Node) -> list[fx.Node]:
    """The value, what it is a view of, and so on to the value in whose memory all of them lie."""
    chain = [value]
    while may_alias(chain[-1]) and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    return chain


def _aliases(value: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        for user in current.users:
            if may_alias(user) and user.args[0] is current and user not in found:
                found.add(user)
                stack.append(user)
    return found


def _copy_into(graph: fx.Graph, gm: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
    for node in gm.graph.nodes:
        if node.op == "output":
            return fx.node.map_arg(node.args[0], values.__getitem__)
        if node in values:
            continue
        region = _region(gm, node) or _opened(node)
        if region is not None:
            body, operands = region
            inner = dict(
                zip(body.graph.find_nodes(op="placeholder"), [fx.node.map_arg(o, values.__getitem__) for o in operands], strict=True)
            )
            values[node] = _copy_into(graph, body, inner)
        elif node.target is operator.getitem and not isinstance(values[node.args[0]], fx.Node):
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    raise CaptureError("a graph without an output node")


_REGIONS = (
    *("wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast", "invoke_subgraph"),
    *("tag_activation_checkpoint", "wrap_activation_checkpoint"),
)
"""Operators that call their subgraph once and as it is."""


def _region(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, list[Any]] | None:
    """The body and its operands, where `node` calls exactly one subgraph exactly once."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or str(node.target) not in _REGIONS:
        return None
    bodies = [
        (i, getattr(gm, str(a.target)))
        for i, a in enumerate(node.args)
        if isinstance(a, fx.Node) and a.op == "get_attr" and isinstance(getattr(gm, str(a.target), None), fx.GraphModule)
    ]
    if len(bodies) != 1:
        return None
    position, body = bodies[0]
    operands = list(node.args[position + 1 :])
    return (body, operands) if len(operands) == len(body.graph.find_nodes(op="placeholder")) else None


def _is_composed(node: fx.Node) -> bool:
    """Whether a call does what takes several operations: a Python function that is none itself, `x[i] = y`, or `x[i]` by a tensor."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return any(isinstance(value_of(index), Tensor) for index in node.all_input_nodes[1:])
    return node.target is operator.setitem or (inspect.isfunction(node.target) and base_name(node) not in KINDS)


def _opened(node: fx.Node) -> tuple[fx.GraphModule, list[Any]] | None:
    """What a composed call does, as a graph of operations, and its operands."""
    if not _is_composed(node):
        return None
    function: Any = node.target
    operands = node.all_input_nodes

    def call(*values: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), dict(zip(operands, values, strict=True)).__getitem__)
        return function(*args, **kwargs)

    values = [value_of(operand) for operand in operands]
    fake_mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), contextlib.nullcontext())
    try:
        with fake_mode:  # of copies, since it may write to them
            body = make_fx(call, pre_dispatch=True)(*(value.clone() if isinstance(value, Tensor) else value for value in values))
    except Exception:  # whatever a function does that is not made for fake values
        log.debug("%s was not opened", node.format_node(), exc_info=True)
        return None
    for inner in body.graph.nodes:
        inner.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    return body, list(operands)


def _read(gm: fx.GraphModule) -> Captured:
    graph = inline_regions(gm)
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


def value_of(node: fx.Node) -> Any:
    """What the node computes, as export or Dynamo recorded it: a fake tensor, or a tuple of them."""
    return node.meta.get("val", node.meta.get("example_value"))


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


def enumerate_tensors(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """The tensors among positional and keyword arguments, with their places.

    >>> [name for name, _ in enumerate_tensors(((torch.ones(1), 2), {"mask": torch.ones(1)}))]
    ['0', 'mask']
    """
    args, kwargs = arguments
    named = [*((str(i), value) for i, value in enumerate(args)), *kwargs.items()]
    return [(name, value) for name, value in named if isinstance(value, Tensor)]


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor that a value of any type holds.

    >>> len(tensors_in({"a": torch.ones(1), "b": (torch.ones(2), None)}))
    2
    """
    return list(_tensors(value, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, (str, bytes, int, float, type(None), nn.Module)):
        seen.add(id(value))
        if isinstance(value, Mapping):
            children = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            children = list(value)
        else:
            slots = [name for cls in type(value).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
            children = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
        for child in children:
            yield from _tensors(child, seen)


def _names(slots: str | Iterable[str]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


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


def first_line(error: Exception) -> str:
    """
    >>> first_line(ValueError("too long\\nby far"))
    'ValueError: too long'
    """
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
