"""A captured graph as a plain picture: what a diff compares and a viewer draws."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from pe_fx.api import canonical
from pe_fx.graph.capture import Captured, capture, module_of
from pe_fx.graph.flow import live_operands
from pe_fx.graph.inputs import ExampleInputs
from pe_fx.graph.operation import shape_of
from pe_fx.graph.ops import KINDS, Kind, base_name, value_of
from pe_fx.tied.owners import owners_in
from pe_fx.tied.weight import Tied, before_tied
from pe_fx.ties import Shape

_MODES = ("train", "training", "cudnn_enabled")
_IDENTITIES = ("contiguous", "clone", "alias", "detach", "lift_fresh")
_SCALED = {"neg": "−{0}", "mul": "{1} · {0}"}


@dataclass(frozen=True)
class Operand:
    """What an operation reads of the parameters: one of them, or a view put together from several.

    >>> weight = Operand("{0}", ("fc1.weight",), (8, 4))
    >>> str(Operand("{0}ᵀ", ("fc1.weight",), (4, 8))), str(weight), weight.is_whole
    ('fc1.weightᵀ', 'fc1.weight', True)
    """

    view: str
    names: tuple[str, ...]
    shape: Shape

    @property
    def is_whole(self) -> bool:
        return self.view == "{0}"

    def __str__(self) -> str:
        return self.view.format(*self.names)


@dataclass(frozen=True)
class Node:
    """An operation, an input ("input") or the result ("output").

    `op` is its name without dialect, `kind` what it does to channels (`pe_fx.graph.ops.Kind`, in lower case), `module` the path of the
    module whose forward runs it, `operands` the parameters that it reads, `inputs` the ids of the nodes that it reads,
    `settings` its other arguments as text, `shape` and `dtype` those of its value.
    """

    id: str
    op: str
    kind: str
    module: str
    operands: tuple[Operand, ...]
    inputs: tuple[str, ...]
    settings: str
    shape: Shape
    dtype: str

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that it reads."""
        return tuple(dict.fromkeys(name for operand in self.operands for name in operand.names))


@dataclass(frozen=True)
class Graph:
    """The operations of a model in dataflow order, by id; its modules (path to class name) and its parameters (name to shape).

    >>> graph = Graph.of(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    >>> [(node.op, node.module, [str(operand) for operand in node.operands]) for node in graph.nodes.values()]
    [('input', '', []), ('linear', '0', ['0.weight', '0.bias']), ('relu', '1', []), ('output', '', [])]
    >>> graph.modules
    {'': 'Sequential', '0': 'Linear', '1': 'ReLU'}
    >>> graph.numel
    40

    A view of parameters alone (a transpose, rows, several joined) is no node: it is part of the operand of whoever reads it. Buffers,
    constants and what the output does not depend on are left out.
    """

    nodes: dict[str, Node]
    modules: dict[str, str]
    parameters: dict[str, Shape]
    name: str = field(default="", compare=False)

    @classmethod
    def of(cls, model: nn.Module, example_inputs: ExampleInputs | Captured | None = None, name: str = "") -> Graph:
        """The picture of a model; `example_inputs` as in `pe_fx.plan`. Raises `CaptureError` where it cannot be captured."""
        captured = example_inputs if isinstance(example_inputs, Captured) else capture(model, example_inputs)
        names = {name: _plan_name(model, name) for name, _ in model.named_parameters()}
        nodes = _Reader(canonical(captured, owners_in(model)), model, names).nodes
        parameters = {names[name]: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        modules = {path: _class_name(module) for path, module in model.named_modules()}
        for node in nodes.values():  # an exported program's tree may lack what the graph remembers
            for path in path_to(node.module):
                modules.setdefault(path, "")
        return cls(nodes, modules, parameters or captured.shapes(), name or type(model).__name__)

    @functools.cached_property
    def users(self) -> dict[str, tuple[str, ...]]:
        """For each node the ids of those that read it."""
        users: dict[str, list[str]] = {id: [] for id in self.nodes}
        for node in self.nodes.values():
            for source in dict.fromkeys(node.inputs):
                users[source].append(node.id)
        return {id: tuple(ids) for id, ids in users.items()}

    @functools.cached_property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """For each parameter the ids of the nodes that read it or a view of it."""
        readers: dict[str, list[str]] = {name: [] for name in self.parameters}
        for node in self.nodes.values():
            for name in node.names:
                readers.setdefault(name, []).append(node.id)
        return {name: tuple(ids) for name, ids in readers.items()}

    @functools.cached_property
    def numel(self) -> int:
        return sum(map(math.prod, self.parameters.values()))


def _plan_name(model: nn.Module, name: str) -> str:
    """The name that a parameter has in plans: what is left of a tied weight goes by the weight's."""
    path, _, attribute = name.rpartition(".")
    return name.removesuffix(attribute) + before_tied(model.get_submodule(path), attribute)


def path_to(module: str) -> list[str]:
    """The module and those around it but the root, outermost first; the root alone for itself.

    >>> path_to("blocks.0.attn")
    ['blocks', 'blocks.0', 'blocks.0.attn']
    """
    atoms = module.split(".")
    return [".".join(atoms[: depth + 1]) for depth in range(len(atoms))]


class _Reader:
    """Reads a captured graph into nodes."""

    def __init__(self, captured: Captured, model: nn.Module, names: dict[str, str]) -> None:
        self._captured = captured
        self._model = model
        self._names = names
        self._operands: dict[fx.Node, Operand] = {}
        self.nodes: dict[str, Node] = {}
        for node, operands in live_operands(captured.graph).items():
            operand = self._operand(node, operands)
            if operand is not None:
                self._operands[node] = operand
            elif node.op in ("call_function", "call_method", "call_module", "output") or node in captured.inputs:
                self.nodes[node.name] = self._node(node, operands)

    def _operand(self, node: fx.Node, operands: list[fx.Node]) -> Operand | None:
        """What the node is of the parameters, where it is nothing else."""
        if node in self._captured.weights:
            return Operand("{0}", (self._name(self._captured.weights[node]),), shape_of(value_of(node)))
        if node.op == "get_attr":
            return self._tied(str(node.target))
        is_view = node.op.startswith("call") and (KINDS.get(base_name(node)) is Kind.VIEW or base_name(node) in (*_IDENTITIES, *_SCALED))
        if not is_view or not operands or any(operand not in self._operands for operand in operands):
            return None
        known = [self._operands[operand] for operand in operands]
        places = {name: f"{{{place}}}" for place, name in enumerate(dict.fromkeys(name for operand in known for name in operand.names))}
        views = [operand.view.format(*map(places.__getitem__, operand.names)) for operand in known]
        return Operand(_view(node, views), tuple(places), shape_of(value_of(node)))

    def _name(self, name: str) -> str:
        return self._names.get(name, name)

    @functools.cached_property
    def _by_parameter(self) -> dict[int, str]:
        return {id(parameter): self._name(name) for name, parameter in self._model.named_parameters()}

    def _tied(self, name: str) -> Operand | None:
        """A weight that the graph reads as an attribute, where that is a view of others."""
        path, _, attribute = name.rpartition(".")
        try:
            owner = self._model.get_submodule(path)
        except AttributeError:
            return None
        if not isinstance(owner, Tied) or attribute not in owner.tied_weights:
            return None
        tied = owner.tied_weights[attribute]
        sources = tuple(self._by_parameter[id(source)] for source in tied.parameters)
        return Operand(tied.text, sources, tuple(getattr(owner, attribute).shape))

    def _node(self, node: fx.Node, operands: list[fx.Node]) -> Node:
        inputs = [operand.name for operand in operands if operand.name in self.nodes]
        read = tuple(self._operands[operand] for operand in dict.fromkeys(operands) if operand in self._operands)
        value = value_of(node)
        op = base_name(node) if node.op.startswith("call") else {"placeholder": "input"}.get(node.op, node.op)
        kind = KINDS.get(op, Kind.OTHER) if node.op.startswith("call") else Kind.INPUT if node in self._captured.inputs else Kind.OTHER
        module = module_of(node)
        if module is None:
            module = self.nodes[inputs[0]].module if inputs and node.op != "output" else ""
        return Node(
            id=node.name,
            op=op,
            kind=kind.name.lower(),
            module=module,
            operands=read,
            inputs=tuple(inputs),
            settings=_settings(node) if node.op.startswith("call") else "",
            shape=shape_of(value),
            dtype=str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else "",
        )


def _class_name(module: nn.Module) -> str:
    return type(module).__name__


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by name, where the operation has a schema; else by position."""
    names = [argument.name for argument in node.target._schema.arguments] if isinstance(node.target, torch._ops.OpOverload) else []
    names += [str(place) for place in range(len(names), len(node.args))]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _settings(node: fx.Node) -> str:
    """The arguments that are no values. The mode is none of the model's: capture takes the one in which it can be captured."""
    given = ((name, value) for name, value in _arguments(node).items() if name not in _MODES and not _is_value(value))
    return ", ".join(f"{name}={_text(value)}" for name, value in given)


def _is_value(argument: Any) -> bool:
    """Whether an argument is a node, or nodes alone; devices and what is left out count as nothing, too."""
    if isinstance(argument, (list, tuple)):
        return bool(argument) and all(map(_is_value, argument))
    return isinstance(argument, fx.Node | torch.device | torch.layout | torch.memory_format) or argument is None


def _text(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return "·"
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_text, argument))}]"
    if isinstance(argument, float):
        return f"{argument:g}"
    return str(argument).removeprefix("torch.")


def _view(node: fx.Node, views: list[str]) -> str:
    """The view in short: Wᵀ, W[0:4], [V; W]."""
    name = base_name(node)
    arguments = list(_arguments(node).values())
    rank = len(shape_of(value_of(node.all_input_nodes[0])))
    if name in _IDENTITIES:
        return views[0]
    if name in _SCALED and len(views) == _SCALED[name].count("{"):
        return _SCALED[name].format(*views)
    if name in ("t", "transpose", "mt", "numpy_t") and {axis % rank for axis in arguments[1:3]} in (set(), {0, 1}):
        return f"{views[0]}ᵀ"
    if name in ("narrow", "slice") and len(arguments) == 4:
        dim, start, end = arguments[1] % rank, arguments[2], arguments[3] + (arguments[2] if name == "narrow" else 0)
        return f"{views[0]}[{':, ' * dim}{start}:{end}]"
    if name in ("cat", "concat"):
        dim = arguments[1] if len(arguments) > 1 else 0
        return f"[{'; '.join(views)}]" if dim == 0 else f"[{', '.join(views)}]" if dim in (1, -1) else f"cat({', '.join(views)}, {dim})"
    if name == "getitem":
        return f"{views[0]}[{_text(arguments[1])}]"
    return f"{', '.join(views)}.{name}({_settings(node)})"
