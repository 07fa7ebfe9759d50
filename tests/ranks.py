"""What the tests of pe_fx.distributed run on every process; the first process keeps what came out."""

from __future__ import annotations

import copy
import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import pe_fx.compiled.backend
from pe_fx import PeFxError, Plan
from pe_fx import distributed as pe_dist
from pe_fx.tied.weight import Tied

STEPS = 5
LIMIT = 150.0
"""Seconds for all that one group of processes does."""


@dataclass(frozen=True)
class Case:
    """A tied model in float64, its plan, and a batch that divides by the number of processes."""

    model: nn.Module
    plan: Plan
    batch: Tensor


@dataclass(frozen=True)
class Run:
    """Losses of all processes together, parameters as one process would hold them, and what else a way reports."""

    losses: list[float]
    state: dict[str, Tensor]
    calls: int = 0
    details: Any = None


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    output = model(batch)
    return getattr(output, "logits", output).square().mean()


def train(model: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer | None = None, steps: int = STEPS) -> list[float]:
    """Steps of AdamW; its losses, averaged over the processes if there are any."""
    optimizer = optimizer or adamw(model)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def alone(case: Case, steps: int = STEPS) -> Run:
    model = copy.deepcopy(case.model)
    return Run(train(model, case.batch, steps=steps), whole(model))


def whole(model: nn.Module) -> dict[str, Tensor]:
    values = model.state_dict().items()
    return {name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone() for name, value in values}


def part(batch: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    return batch.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def counted(model: nn.Module) -> list[int]:
    """Counts the calls of the first tied layer from now on."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for tied in [module for module in model.modules() if isinstance(module, Tied)][:1]:
        tied.register_forward_hook(count)
    return calls


def ddp(case: Case, model: nn.Module) -> Run:
    wrapped = DistributedDataParallel(model)
    sent = [0]

    def hook(state, bucket):  # DDP refuses annotations that are text
        sent[0] += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, hook)
    calls = counted(model)
    return Run(train(wrapped, part(case.batch)), whole(model), calls[0], sent[0] / STEPS)


def fsdp(case: Case, model: nn.Module) -> Run:
    pe_dist.fully_shard(model)
    pe_dist.check(model)
    calls = counted(model)
    return Run(train(model, part(case.batch)), whole(model), calls[0])


def tensor_parallel(case: Case, model: nn.Module) -> Run:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, pe_dist.tensor_parallel_plan(model, case.plan))
    calls = counted(model)
    held = {name: parameter.to_local().shape for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    return Run(train(model, case.batch), whole(model), calls[0], held)


def two_dimensional(case: Case, model: nn.Module) -> Run:
    """Tensor parallel within pairs of processes, FSDP2 over the pairs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], pe_dist.tensor_parallel_plan(model, case.plan))
    pe_dist.fully_shard(model, mesh=mesh["dp"])
    return Run(train(model, part(case.batch, mesh["dp"].get_group())), whole(model))


def split_by_hand(case: Case, model: nn.Module) -> str:
    """What `check` says where every block is a unit of its own."""
    for unit in pe_dist.units(model):
        for block in unit:
            fully_shard(block)
    fully_shard(model)
    try:
        pe_dist.check(model)
    except PeFxError as error:
        return str(error)
    return "nothing"


def split_and_run(case: Case, model: nn.Module) -> str:
    """What a forward pass says where the two layers of an mlp are units of their own."""
    first, second = (model.get_submodule(name.rpartition(".")[0]) for name in case.plan.sites[-1].weights)
    fully_shard(first)
    fully_shard(second)
    fully_shard(model)
    try:
        loss_of(model, case.batch)
    except PeFxError as error:
        return str(error)
    return "nothing"


def save(case: Case, model: nn.Module, folder: Path) -> dict[str, Tensor]:
    pe_dist.fully_shard(model)
    optimizer = adamw(model)
    train(model, part(case.batch), optimizer)
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder)
    return whole(model)


def load(case: Case, model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], Run]:
    """The parameters as loaded, and after one more step."""
    pe_dist.fully_shard(model)
    optimizer = adamw(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = whole(model)
    return loaded, Run(train(model, part(case.batch), optimizer, steps=1), whole(model))


def compiled(case: Case, model: nn.Module) -> Run:
    """The dense model, tied in its graphs alone: compiled, then wrapped. The graphs run without Inductor."""
    pe_fx.compiled.backend.lower = lambda gm, *_: gm.forward  # type: ignore[attr-defined]
    wrapped = DistributedDataParallel(torch.compile(model, backend="pe_fx"), find_unused_parameters=True)
    return Run(train(wrapped, part(case.batch)), whole(model))


Job = tuple[Callable[..., Any], str, bool, tuple[Any, ...]]
"""A way, the case that it takes, whether with activation checkpointing, further arguments."""


def on_ranks(world: int, jobs: dict[str, Job], cases: dict[str, Case], folder: Path) -> dict[str, Any]:
    """Runs the jobs on `world` processes; for each what the first process returned, or the text of what it raised."""
    torch.save((jobs, cases), folder / "jobs.pt")
    context = multiprocessing.get_context("forkserver")  # no thread of this process gets into those
    context.set_forkserver_preload(["timm", "transformers.models.gpt2", "pe_fx.api", "pe_fx.compiled.backend", "pe_fx.distributed"])
    started = torch.multiprocessing.start_processes(_rank, (world, folder), world, join=False, start_method="forkserver")
    assert started is not None
    deadline = time.monotonic() + LIMIT
    try:
        while not started.join(timeout=1):
            assert time.monotonic() < deadline, f"{world} processes hang"
    finally:
        for process in started.processes:
            process.kill()
    results: dict[str, Any] = torch.load(folder / f"results{world}.pt", weights_only=False)
    return results


def _rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    jobs, cases = torch.load(folder / "jobs.pt", weights_only=False)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group{world}", rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT / 3)
    )
    results: dict[str, Any] = {}
    for name, (way, case, checkpointing, args) in jobs.items():
        model = copy.deepcopy(cases[case].model)
        if checkpointing:
            checkpoint_activations(model)
        try:
            results[name] = way(cases[case], model, *args)
        except Exception:
            results[name] = traceback.format_exc()
    if rank == 0:
        torch.save(results, folder / f"results{world}.pt")
    dist.destroy_process_group()


def checkpoint_activations(model: nn.Module) -> None:
    """As timm and transformers do it."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    else:
        model.gradient_checkpointing_enable()
