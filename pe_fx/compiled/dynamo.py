"""What Dynamo and Inductor tell in private alone, all in one place. Tried with torch 2.11 and 2.14."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import RestartAnalysis
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import ChainedSource
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._subclasses.fake_tensor import FakeTensor

GraphPass = Callable[[fx.Graph], None]

Restart = RestartAnalysis
"""What Dynamo raises to begin anew: no failure of a graph."""


@dataclass(frozen=True)
class GraphWeight:
    """A parameter, the placeholder that stands for it, and its place among the graph's arguments."""

    parameter: nn.Parameter
    node: fx.Node
    place: int


def weights_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[str, GraphWeight]:
    """The graph's parameters by the names that the compiled module gives them.

    Empty where Dynamo passes stand-ins instead of the parameters, as it does to the buckets that it cuts a DDP module into.
    """
    found: dict[str, GraphWeight] = {}
    for place, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)):
        if isinstance(value, nn.Parameter) and not isinstance(value, FakeTensor):
            name = _fqn(node)
            found[node.name if name in found else name] = GraphWeight(value, node, place)
    return found


def _fqn(node: fx.Node) -> str:
    """`blocks.0.weight` of a placeholder whose source is L['self']._modules['blocks']._modules['0']._parameters['weight']."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    keys = re.findall(r"\['([^']*)'\]", name() if callable(name) else name)
    return ".".join(keys[1:]) or node.name


def roots_of(gm: fx.GraphModule) -> list[nn.Module]:
    """The outermost modules through which Dynamo found the graph's parameters: the model, as a rule. None outside of Dynamo."""
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:
        return []
    scope = {"L": output.local_scope, "G": output.global_scope}
    roots: dict[int, nn.Module] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        chain = [getattr(node.meta.get("grapharg"), "source", None)]
        while isinstance(chain[-1], ChainedSource):
            chain.append(chain[-1].base)
        for source in reversed(chain):
            with contextlib.suppress(Exception):  # what is no value of the frame, such as a constant or a number of Dynamo's own
                value = source.get_value(scope, {}, {})
                if isinstance(value, nn.Module):
                    roots[id(value)] = value
                    break
    return list(roots.values())


def held_in(gm: fx.GraphModule) -> set[str]:
    """The placeholders of tensors that a module holds, buffers and others, and the caller does not pass."""
    sources = {node.name: getattr(node.meta.get("grapharg"), "source", None) for node in gm.graph.find_nodes(op="placeholder")}
    return {name for name, source in sources.items() if source is not None and source.guard_source.name.endswith("MODULE")}


def classes_in(gm: fx.GraphModule) -> set[type]:
    """The classes of the modules that the graph was traced through."""
    stacks = [node.meta.get("nn_module_stack") or {} for node in gm.graph.nodes]
    return {cls for stack in stacks for _, cls in stack.values() if isinstance(cls, type)}


def graph_break(gm: fx.GraphModule) -> str | None:
    """Why and where the graph ends before its function does."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    place = f" at {reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}" if reason.user_stack else ""
    return f"{reason.reason.splitlines()[0]}{place}"


def keep_record(gm: fx.GraphModule, tied: fx.GraphModule, added: Iterable[str]) -> None:
    """Says of a rewritten graph what Dynamo said of `gm`: where its inputs come from, `added` parameters among them.

    AOTAutograd takes weights for ordinary inputs otherwise, which a CUDA graph copies in every run.
    """
    tied.meta = gm.meta
    tied._param_name_to_source = gm._param_name_to_source | {name: ConstantSource(name) for name in added}  # type: ignore[operator]
    for new, old in zip(tied.graph.find_nodes(op="placeholder"), gm.graph.find_nodes(op="placeholder"), strict=True):
        new._dynamo_source = old._dynamo_source


def fake_like(gm: fx.GraphModule, tensor: Tensor) -> Tensor:
    """The fake tensor of `tensor` in the graph's own fake mode."""
    values = (node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder"))
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    return mode.from_tensor(tensor)  # type: ignore[no-any-return]


def lower(
    gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, config: Mapping[str, Any], joint_pass: GraphPass, uuid: object
) -> Callable[..., Any]:
    """AOTAutograd and Inductor, with `joint_pass` run on the joint graph of forward and backward."""
    patches = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    patches |= config
    users = patches.get("joint_custom_pre_pass", torch._inductor.config.joint_custom_pre_pass)
    patches["joint_custom_pre_pass"] = _JointPass(joint_pass, uuid, users)
    compiled: Callable[..., Any] = torch._inductor.compile(gm, list(example_inputs), options=patches)
    return compiled


def hash_of_sources(folder: Path) -> bytes:
    """What changes with every line of the Python files in a folder."""
    return get_hash_for_files(tuple(sorted(map(str, folder.rglob("*.py")))))


class _JointPass(CustomGraphPass):
    """Our pass after the user's own; Inductor's caches tell compiled code apart by `uuid`."""

    def __init__(self, ours: GraphPass, uuid: object, users: Any) -> None:
        self.ours = ours
        self.version = uuid
        self.users = users

    def __call__(self, graph: fx.Graph) -> None:
        if self.users is not None:
            self.users(graph)
        self.ours(graph)

    def uuid(self) -> Any:
        if self.users is None:
            return self.version
        users = self.users.uuid() if isinstance(self.users, CustomGraphPass) else None
        return None if users is None else (self.version, users)
