"""Tied models on several processes: which modules FSDP2 must shard together.

DistributedDataParallel needs nothing of this: a tied weight is no parameter, so it is neither reduced nor stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import networkx as nx
from torch import Tensor, nn
from torch.distributed import fsdp

from pe_fx.errors import PeFxError
from pe_fx.tied import Tied, stored

_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict)


def units(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> list[list[nn.Module]]:
    """The modules to shard, those that read one weight together, inner ones first.

    >>> import torch, pe_fx
    >>> block = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> model = nn.Sequential(block(), block(), block())
    >>> tied = pe_fx.transform(model, torch.ones(1, 4), rules=["mlp"])
    >>> [[list(tied).index(module) for module in unit] for unit in units(tied)]
    [[0], [1], [2]]
    >>> tied[2][0].weight = tied[0][0].weight  # one parameter in two blocks
    >>> [[list(tied).index(module) for module in unit] for unit in units(tied)]
    [[0, 2], [1]]

    Args:
        modules: the modules that would be sharded each by itself. By default the children of every ModuleList and Sequential
            that have children themselves: the blocks of most models.

    Two modules are in one unit where a parameter of the one is also a parameter, or the source of a tied weight, in the other.
    What shares with the rest of the model is in no unit: it belongs to the root, which is sharded last.
    Raises `PeFxError` where `modules` holds one that is not in the model.
    """
    chosen = set(_blocks(model) if modules is None else modules) | {model}
    order = {module: index for index, module in enumerate(model.modules())}
    for module in chosen:
        if module not in order:
            raise PeFxError(f"units: {type(module).__name__} is no module of this {type(model).__name__}")
    inside: nx.DiGraph[nn.Module] = nx.DiGraph()  # from each chosen module to the innermost one around it
    inside.add_nodes_from(chosen)
    home = {"": model}
    readers: dict[int, list[nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        outer = home[path.rpartition(".")[0]]
        home[path] = module if module in chosen else outer
        if home[path] is not outer:
            inside.add_edge(module, outer)
        for parameter in _read(module):
            readers.setdefault(id(parameter), []).append(home[path])
    graph = inside.copy()
    for homes in readers.values():
        nx.add_cycle(graph, homes)  # makes one component of those who read one parameter, and of what lies between them
    components = nx.condensation(graph)
    members: dict[int, set[nn.Module]] = {component: components.nodes[component]["members"] for component in components}
    nested = {module for group in members.values() for module in group if group & set(inside[module])}
    if nested:  # each is sharded as a part of what is around it
        return units(model, chosen - nested)
    inner_first = nx.lexicographical_topological_sort(components, key=lambda component: min(map(order.__getitem__, members[component])))
    return [sorted(members[component], key=order.__getitem__) for component in inner_first if model not in members[component]]


def fully_shard(model: nn.Module, modules: Iterable[nn.Module] | None = None, **kwargs: Any) -> nn.Module:
    """FSDP2, `torch.distributed.fsdp.fully_shard`, on the `units` of a tied model and on the model itself, in place.

    `modules` as for `units`; `kwargs` (mesh, mp_policy, reshard_after_forward, …) go to every call. Returns the model.
    """
    for unit in units(model, modules):
        fsdp.fully_shard(unit, **kwargs)
    fsdp.fully_shard(model, **kwargs)
    return model


def check(model: nn.Module) -> None:
    """Raises `PeFxError` where `fully_shard`, called by hand, splits a tie: a weight and what it is tied to in different units.

    >>> check(nn.Linear(2, 2))
    """
    unit: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = fsdp.fully_shard.state(module) if isinstance(module, fsdp.FSDPModule) else None  # type: ignore[attr-defined]
        unit[path] = own or unit.get(path.rpartition(".")[0])
    names = {id(module): path for path, module in model.named_modules()}
    for path, module in model.named_modules():
        for name, weight in module.tied_weights.items() if isinstance(module, Tied) else ():
            for source, attribute in weight.sources:
                if unit[path] is not unit[names[id(source)]]:
                    raise PeFxError(
                        f"{path}.{name} is tied to {names.get(id(source), '')}.{attribute}, which another FSDP unit shards: "
                        "it is not gathered where it is read. Shard both as one, fully_shard([first, second]), or call "
                        "pe_fx.distributed.fully_shard(model)"
                    )


def _blocks(model: nn.Module) -> list[nn.Module]:
    children = [child for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential)) for child in module]
    return [child for child in children if not isinstance(child, _WITHOUT_FORWARD) and any(child.children())]


def _read(module: nn.Module) -> Iterator[Tensor]:
    """The stored parameters that a module itself reads: its own and those it is tied to."""
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for weight in module.tied_weights.values() if isinstance(module, Tied) else ():
        yield from (stored(*source) for source in weight.sources)
