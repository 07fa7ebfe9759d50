"""As networks are trained on a GPU: what is compiled, sharded or under autocast equals the eager model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import pe_fx
from pe_fx.distributed import fully_shard

DEVICE = torch.tensor(0).device.type


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def one_process() -> Iterator[None]:
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=64, num_heads=2, num_classes=10).to(DEVICE)


def resnet() -> nn.Module:
    """Two stages of two bottlenecks."""
    model = timm.models.ResNet(timm.models.resnet.Bottleneck, layers=(2, 2), channels=(8, 16), num_classes=10)
    model.layer3 = model.layer4 = nn.Identity()
    return model.to(DEVICE)


class Mlp(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


IMAGES = torch.randn(4, 3, 32, 32)
ROWS = torch.randn(16, 64)
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
    torch.float16: {"rtol": 0.02, "atol": 0.02},
}


def losses(model: nn.Module, x: Tensor, autocast: bool = False, steps: int = 4) -> Tensor:
    """Of so many steps of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    found = []
    for _ in range(steps):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model(x).to(torch.promote_types(x.dtype, torch.float32)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().clone())
    return torch.stack(found)


@pytest.mark.parametrize("mix", ["none", "signed"])
@pytest.mark.parametrize(("build", "x"), [(vit, IMAGES), (resnet, IMAGES)], ids=["vit", "resnet"])
def test_bf16_autocast(build: Any, x: Tensor, mix: str) -> None:
    tied = pe_fx.transform(build(), x, mix=mix)
    expected = losses(copy.deepcopy(tied).double(), x.double())
    torch.testing.assert_close(losses(torch.compile(tied, backend="pe_fx"), x, autocast=True).double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("entry", ["keep", "slice", "expand"])
def test_channels_last(entry: str) -> None:
    """In float64: in float32 rounding alone moves a ResNet in a few steps."""
    tied = pe_fx.transform(resnet(), IMAGES, entry=entry).double().to(memory_format=torch.channels_last)
    x = IMAGES.double().to(memory_format=torch.channels_last)
    expected = losses(copy.deepcopy(tied), x)
    torch.testing.assert_close(losses(torch.compile(tied, backend="pe_fx"), x), expected)


def test_activation_checkpointing() -> None:
    tied = pe_fx.transform(Mlp(checkpointed=True), ROWS)
    expected = losses(pe_fx.untie(tied), ROWS, steps=1)
    compiled = losses(torch.compile(tied, backend="pe_fx"), ROWS, steps=1)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transformed", [True, False])
def test_cuda_graphs(transformed: bool) -> None:
    """Each step replays a graph, into which no weight is copied; on a CPU the mode changes nothing."""
    model = pe_fx.transform(vit(), IMAGES) if transformed else vit()
    twin = copy.deepcopy(model) if transformed else pe_fx.transform(copy.deepcopy(model), IMAGES)
    compiled = losses(torch.compile(model, backend="pe_fx", options={"mode": "reduce-overhead"}), IMAGES, steps=6)
    torch.testing.assert_close(compiled, losses(twin, IMAGES, steps=6), rtol=1e-3, atol=1e-4)
    assert DEVICE == "cpu" or not counters["inductor"]["cudagraph_skips"]


def test_ddp(one_process: None) -> None:
    tied = pe_fx.transform(vit(), IMAGES)
    expected = losses(copy.deepcopy(tied), IMAGES)
    torch.testing.assert_close(
        losses(torch.compile(DistributedDataParallel(tied), backend="pe_fx"), IMAGES), expected, rtol=1e-3, atol=1e-4
    )


def test_fsdp2(one_process: None) -> None:
    tied = pe_fx.transform(vit(), IMAGES)
    expected = losses(copy.deepcopy(tied), IMAGES)
    sharded = fully_shard(tied, mesh=init_device_mesh(DEVICE, (1,)))
    torch.testing.assert_close(losses(sharded, IMAGES), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("mix", ["none", "signed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_read(rows: int, mix: str, dtype: torch.dtype) -> None:
    tied = pe_fx.transform(Mlp(), ROWS, mix=mix).to(dtype)
    x = ROWS[:rows].to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(tied).double()(x.double())
        made = torch.compile(tied, backend="pe_fx")(x)
    torch.testing.assert_close(made.double(), expected, **TOLERANCE[dtype])
