"""Ways from a model to a graph of operations: torch.export, which computes nothing, and a run that is recorded."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pe_fx.errors import CaptureError
from pe_fx.graph.copies import copied, modules_in
from pe_fx.graph.inputs import ExampleInputs, as_arguments, tensors_in


@dataclass(frozen=True)
class Traced:
    """A graph, and which of its nodes are parameters, under which names, the caller's inputs, and constants of the code; `how` is
    the way that led to it."""

    how: str
    gm: fx.GraphModule
    weights: Mapping[str, str]
    inputs: set[str]
    constants: Mapping[str, Any]


class Flattened(nn.Module):
    """Returns every tensor that the model's output holds, whatever its type, as one list."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return tensors_in(self.model(*args, **kwargs))


def qualified(module: nn.Module | type[nn.Module]) -> str:
    """The name of a module's class, as export writes it in a graph."""
    cls = module if isinstance(module, type) else type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


# ---- export


def exported(model: nn.Module, inputs: ExampleInputs, training: bool, dtype: torch.dtype | None = None) -> Traced:
    """By `torch.export.export(strict=False)`, of a copy in one of its modes, its numbers of another dtype where one is given."""
    like = functools.partial(in_dtype, dtype=dtype)
    args, kwargs = pytree.tree_map_only(Tensor, like, as_arguments(inputs, model))
    program = torch.export.export(Flattened(sharing_copy(model, training, like)), args, kwargs, strict=False)
    signature = program.graph_signature
    weights = {key: name.removeprefix("model.") for key, name in signature.inputs_to_parameters.items()}
    constants = {key: program.constants[name] for key, name in signature.inputs_to_lifted_tensor_constants.items()}
    return Traced("export", program.graph_module, weights, set(signature.user_inputs), constants)


def in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor, or, for floating numbers of another dtype, one like it: values do not matter, so none are set."""
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    like = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
    return nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like


# ---- a run


def recorded(model: nn.Module, inputs: ExampleInputs, training: bool) -> Traced:
    """By running a copy once, in one of its modes, on copies of the inputs: where a value decides, the graph holds what it decided."""
    with _on_loan(model, inputs, training) as (runs, args, kwargs), fx_traceback.preserve_node_meta():
        _record_modules(runs)
        parameters = dict(runs.named_parameters())
        given = [*parameters.values(), *runs.buffers(), *tensors_in((args, kwargs))]  # who reads one of them reads its placeholder
        gm = make_fx(lambda given: runs(*args, **kwargs), pre_dispatch=True, _error_on_data_dependent_ops=False)(given)
    for node in reversed(gm.graph.nodes):
        if node.target in _SWITCHES:
            gm.graph.erase_node(node)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    weights = {key: name.removeprefix("model.") for key, name in zip(names, parameters, strict=False)}
    constants = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(value := getattr(gm, str(node.target)), Tensor):
            constants[node.name] = value
            node.meta["val"] = FakeTensorMode().from_tensor(value)
    return Traced("run", gm, weights, set(names[len(parameters) + len([*runs.buffers()]) :]), constants)


def run(model: nn.Module, inputs: ExampleInputs, training: bool) -> None:
    """The run alone. Raises what the model raises."""
    with _on_loan(model, inputs, training) as (runs, args, kwargs), torch.no_grad():
        runs(*args, **kwargs)


_SWITCHES = (torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
"""What a recorded graph holds of `torch.no_grad` and `torch.autocast`, beside what they did."""


@contextlib.contextmanager
def _on_loan(model: nn.Module, inputs: ExampleInputs, training: bool) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """A copy of the model and of its inputs that may be run. Nothing that it does can be seen in the model or in its inputs."""
    own = {id(tensor): tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors_in(inputs)}
    args, kwargs = copy.deepcopy(as_arguments(inputs, model), own)
    with _CopyOnWrite(model.parameters()):
        yield Flattened(sharing_copy(model, training, _lent)), args, kwargs


def _lent(tensor: Tensor) -> Tensor:
    """A parameter in the same memory, which `_CopyOnWrite` guards; a copy of a buffer, to which batch norms write unseen by that."""
    return copy.copy(tensor) if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


class _CopyOnWrite(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """From the first write to the memory of one of these tensors, a copy of that memory stands for it in every operation.

    A run that is watched by such a mode also tells what becomes of `value.data`, which else would be a constant in its graph.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shared = {_memory(tensor) for tensor in tensors} - {0}
        self.copies: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            if (memory := _memory(tensor)) in self.shared and memory not in self.copies:
                self.copies[memory] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
        if not self.copies or func.is_view:  # what is made of a view is known by its memory, too
            return func(*args, **kwargs)
        originals: dict[int, Tensor] = {}

        def in_copy(tensor: Tensor) -> Tensor:
            memory = self.copies.get(_memory(tensor))
            if memory is None:
                return tensor
            new = tensor.new_empty(0).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
            originals[id(new)] = tensor
            return new

        new_args, new_kwargs = pytree.tree_map_only(Tensor, in_copy, (args, kwargs))
        return pytree.tree_map_only(Tensor, lambda made: originals.get(id(made), made), func(*new_args, **new_kwargs))


def _memory(tensor: Tensor) -> int:
    """Where a dense tensor's numbers lie; 0 where they lie nowhere."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The operands to which an operation writes."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _record_modules(root: nn.Module) -> None:
    """Has every node say which modules' forward made it, as export does."""
    stack: list[tuple[str, str]] = []

    def tell() -> None:
        fx_traceback.get_current_meta()["nn_module_stack"] = dict(zip((path for path, _ in stack), stack, strict=True))

    def enter(entry: tuple[str, str], module: nn.Module, args: Any) -> None:
        stack.append(entry)
        tell()

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        stack.pop()
        tell()

    for path, module in root.named_modules():
        module.register_forward_pre_hook(functools.partial(enter, (path, qualified(module))), prepend=True)
        module.register_forward_hook(leave, always_call=True)


# ---- what both need


def sharing_copy(model: nn.Module, training: bool, like: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """A copy of the module tree in one of its modes that holds the very parameters and buffers of the original, or what is `like` them.

    Other tensors are copied: export replaces none of them while a forward runs that may write to them. So may a `train` of a
    module's own write to its weights, as one that merges adapters into them.
    """
    changes = any(module.training is not training for module in model.modules())
    writers = [module for module in model.modules() if changes and type(module).train is not nn.Module.train]
    own = {id(tensor) for module in writers for tensor in (*module.parameters(), *module.buffers())}
    shared = {id(tensor) for tensor in (*model.parameters(), *model.buffers())} - own
    known = {}
    for tensor in (leaf for module in modules_in(model) for leaf in pytree.tree_leaves(dict(vars(module))) if isinstance(leaf, Tensor)):
        new = like(tensor)
        if new is not tensor or id(tensor) in shared:
            known[id(tensor)] = new
    result = copied(model, known, lend=True)
    for name, module in result.named_modules():
        module._apply = functools.partial(_convert, name, module)  # type: ignore[method-assign]
    return result.train(training) if changes else result


def _convert(name: str, module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """A module that is what a forward would convert it to stays as it is: weights cannot be exchanged while they are traced."""
    pairs = [(old, fn(old)) for old in (*module.parameters(recurse), *module.buffers(recurse))]
    changed = [(old, new) for old, new in pairs if (new.dtype, new.device) != (old.dtype, old.device)]
    for old, new in changed:
        if isinstance(old, nn.Parameter):
            raise CaptureError(
                f"forward converts the weights of {name or 'the model'}, {old.dtype} on {old.device}, to {new.dtype} on {new.device}: "
                "do so before, once, with .to(...)"
            )
    return type(module)._apply(module, fn, recurse) if changed else module  # type: ignore[no-untyped-call]
