"""Tied models on several processes: which modules FSDP2 shards together, and how tensor parallel shards a tie.

DistributedDataParallel needs nothing of this: a tied weight is no parameter, so it is neither reduced nor stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import networkx as nx
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from pe_fx.errors import PeFxError
from pe_fx.tied.weight import Tied, tied_weights_in
from pe_fx.ties import Plan, Site

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
    for full, module, _, weight in tied_weights_in(model):
        for source, attribute in weight.sources:
            if id(source) not in names:
                raise PeFxError(f"{full} is tied to a {type(source).__name__} that is no part of this model: shard the whole")
            if unit[names[id(module)]] is not unit[names[id(source)]]:
                raise PeFxError(
                    f"{full} is tied to {names[id(source)]}.{attribute}, which another FSDP unit shards: it is not gathered "
                    "where it is read. Shard both as one, fully_shard([first, second]), or call pe_fx.distributed.fully_shard(model)"
                )


class TiedColwise(ParallelStyle):
    """W, each process with its own of the outputs (the rows of W): takes a whole input and gives its part of the output.

    As torch's ColwiseParallel, also for layers whose weight is (in, out), then `dim` 1, and for weights that are tied, which are
    computed from the shard of their source. The output is a DTensor, so that whatever follows is right or refused; with `gather` it
    is an ordinary tensor, whole on every process.
    """

    def __init__(self, dim: int = 0, *, gather: bool = False) -> None:
        super().__init__()
        self.dim, self.gather = dim, gather

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dim}{', gather=True' if self.gather else ''})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:  # what parallelize_module calls
        return distribute_module(module, device_mesh, self._partition, self._take, self._give)  # type: ignore[arg-type]

    def _partition(self, _: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            shard = Shard(self.dim if parameter.dim() > 1 else 0)
            value = distribute_tensor(parameter, mesh, [shard], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(value, parameter.requires_grad))

    @staticmethod
    def _take(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
        return _distributed(inputs[0], mesh, Replicate()), *inputs[1:]

    def _give(self, module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return _whole(output) if self.gather else output.redistribute(placements=[Shard(-1)])


class TiedRowwise(ParallelStyle):
    """Wᵀ, each process with its own of the inputs (the rows of W): takes its part of the input and sums the outputs over all.

    As torch's RowwiseParallel, for a weight that is tied: computed from the shard of its source. Other parameters are replicated.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:  # what parallelize_module calls
        return distribute_module(module, device_mesh, None, self._take, self._give)  # type: ignore[arg-type]

    @staticmethod
    def _take(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
        return _distributed(inputs[0], mesh, Shard(-1)), *inputs[1:]

    @staticmethod
    def _give(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return _whole(output)


def _distributed(value: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """A DTensor so placed, of another or of a tensor that is the same on all processes."""
    if not isinstance(value, DTensor):
        value = DTensor.from_local(value, mesh, [Replicate()], run_check=False)
    return value.redistribute(placements=[placement])


def _whole(value: DTensor) -> Tensor:
    return value.redistribute(placements=[Replicate()]).to_local()


def tensor_parallel_plan(model: nn.Module, plan: Plan) -> dict[str, ParallelStyle]:
    """The styles for `torch.distributed.tensor.parallel.parallelize_module`: one shard of W serves all that is tied to it.

    >>> import torch, pe_fx
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> plan = pe_fx.plan(model)
    >>> tensor_parallel_plan(pe_fx.apply(model, plan), plan)
    {'0': TiedColwise(0), '2': TiedRowwise()}

    `model` is tied by `plan`. In an mlp or a gated unit each process works on its part of the hidden channels; the sum of the outputs
    is all that is communicated. Attention whose q, k, v and output are four layers shares the work and the memory of those that are
    tied: q and k are gathered, the values are a sum as any product with a transposed shard is, and every process sees all heads.

    Replicated stay convolutions, layers between which other parameters stand, and attention whose q, k and v are rows of one weight:
    the rows of v are columns of k, which no process could make of its shard without communicating the weight; so are hidden channels
    that `mix="fitted"` has put in another order, and what shares its matrices without being tied. `fully_shard` on another dimension
    of the mesh shards those, too.
    Raises `PeFxError` where the model is not tied by the plan.
    """
    modules = dict(model.named_modules())
    for tie in plan.ties:
        owner, _, attribute = tie.target.rpartition(".")
        if attribute not in getattr(modules.get(owner), "tied_weights", {}):
            raise PeFxError(f"{tie.target} is not tied in this model: apply the plan first, pe_fx.apply(model, plan)")
    found = {site: _styles(modules, site) for site in plan.sites}
    sharing = nx.Graph((site, name) for site in found for tie in site.ties for name in (tie.source, tie.target))
    refused: set[Site] = set()
    for group in nx.connected_components(sharing):  # all that use one W, or none
        sites = found.keys() & group
        if not all(found[site] for site in sites):
            refused |= sites
    styles = {name: style for site in found if site not in refused for name, style in found[site].items()}
    return {name: styles[name] for name in modules if name in styles}


def _styles(modules: dict[str, nn.Module], site: Site) -> dict[str, ParallelStyle]:
    """A style for each layer of a site; none at all where one of them cannot have it."""
    rowwise = {tie.target for tie in site.ties if tie.transposed}
    tied = {name for tie in site.ties for name in (tie.source, tie.target)}
    names = [name for name in site.weights if site.kind != "attention" or name in tied]
    layers = {name: modules[name.removesuffix(".weight")] for name in names if name.endswith(".weight")}
    dims = {_output_dim(layer) for layer in layers.values()}
    whole = len(layers) == len(names) and all(tie.into.is_whole and tie.of.is_whole and tie.order is None for tie in site.ties)
    if site.kind not in ("mlp", "glu", "attention") or not rowwise or not whole or len(dims) > 1 or (dim := dims.pop()) is None:
        return {}
    if site.kind != "attention" and _stands_between(modules, list(layers.values())):
        return {}
    return {
        name.removesuffix(".weight"): TiedRowwise() if name in rowwise else TiedColwise(dim, gather=site.kind == "attention")
        for name in layers
    }


def _output_dim(layer: nn.Module) -> int | None:
    """The dimension of a matrix that is the layer's outputs; None where that cannot be told, or the weight is no matrix."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    if isinstance(layer, nn.Linear):
        return 0
    dims = [dim for dim, size in enumerate(weight.shape) if isinstance(bias, Tensor) and bias.shape == (size,)]
    return dims[0] if len(dims) == 1 else None


def _stands_between(modules: dict[str, nn.Module], layers: list[nn.Module]) -> bool:
    """Whether a module with parameters is registered between the first and the last of the layers."""
    order = list(modules.values())
    places = [order.index(layer) for layer in layers]
    return any(module not in layers and any(True for _ in module.parameters(recurse=False)) for module in order[min(places) : max(places)])


def _blocks(model: nn.Module) -> list[nn.Module]:
    children = [child for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential)) for child in module]
    return [child for child in children if not isinstance(child, _WITHOUT_FORWARD) and any(child.children())]


def _read(module: nn.Module) -> Iterator[Tensor]:
    """The stored parameters that a module itself reads: its own and those it is tied to."""
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for weight in module.tied_weights.values() if isinstance(module, Tied) else ():
        yield from weight.parameters
