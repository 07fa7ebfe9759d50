"""A tied weight refuses to be written: it would be lost, or change its source with it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import pe_fx
from pe_fx import PeFxError

X = torch.randn(6, 8)


def mlp(**options: Any) -> nn.Module:
    return pe_fx.transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), X, **options)


def set_data(weight: Tensor) -> None:
    weight.data = torch.zeros(8, 16)


def set_grad(weight: Tensor) -> None:
    weight.grad = torch.zeros(8, 16)


def set_requires_grad(weight: Tensor) -> None:
    weight.requires_grad = False


def add_in_place(weight: Tensor) -> None:
    weight += 1


def set_item(weight: Tensor) -> None:
    weight[0] = 0


WRITES: dict[str, Callable[[Tensor], object]] = {
    "data": set_data,
    "data.copy_": lambda weight: weight.data.copy_(torch.zeros(8, 16)),
    "detach().mul_": lambda weight: weight.detach().mul_(0),
    "mul_": lambda weight: weight.mul_(0.5),
    "+=": add_in_place,
    "[0] =": set_item,
    "[0].zero_": lambda weight: weight[0].zero_(),
    "T.div_": lambda weight: weight.T.div_(torch.ones(8)),
    "chunk": lambda weight: weight.chunk(2)[0].zero_(),
    "view_as": lambda weight: weight.view_as(torch.ones(8, 16)).zero_(),
    "nn.init": nn.init.xavier_uniform_,
    "trunc_normal_": nn.init.trunc_normal_,
    "nn.init.orthogonal_": nn.init.orthogonal_,
    "register_hook": lambda weight: weight.register_hook(lambda gradient: 0 * gradient),
    "retain_grad": lambda weight: weight.retain_grad(),
    "grad": set_grad,
    "requires_grad": set_requires_grad,
    "requires_grad_": lambda weight: weight.requires_grad_(False),
    "nn.Parameter": nn.Parameter,
    "nn.Parameter of its data": lambda weight: nn.Parameter(weight.data),
}


@pytest.mark.parametrize("options", [{}, {"mix": "signed"}], ids=["plain", "signed"])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_refused(name: str, options: dict[str, Any]) -> None:
    tied = mlp(**options)
    before = copy.deepcopy(tied.state_dict())
    with pytest.raises(PeFxError, match=r"2\.weight is tied: .*pe_fx\.untie\(model\)"), torch.no_grad():
        WRITES[name](tied[2].weight)
    assert all(torch.equal(value, before[key]) for key, value in tied.state_dict().items())


def test_a_loop_over_all_layers_is_stopped() -> None:
    tied = mlp()
    with pytest.raises(PeFxError, match=r"2\.weight is tied: mul_"), torch.no_grad():
        tied.apply(lambda layer: layer.weight.mul_(0.5) if isinstance(layer, nn.Linear) else None)


def test_global_pruning_is_refused() -> None:
    tied = mlp()
    with pytest.raises(PeFxError, match=r"2\.weight is tied"):
        prune.global_unstructured([(tied[2], "weight")], prune.L1Unstructured, amount=0.3)
    with pytest.raises(PeFxError, match=r"2\.weight is tied"):
        prune.l1_unstructured(tied[2], "weight", 0.3)


def test_folding_batch_norm_is_refused() -> None:
    x = torch.randn(2, 8, 4, 4)
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)).eval()
    tied = pe_fx.transform(net, x)
    with pytest.raises(PeFxError, match="is tied"):
        torch.nn.utils.fuse_conv_bn_eval(tied[3], tied[4])
    dense = pe_fx.untie(tied)
    fused = nn.Sequential(dense[0], dense[1], dense[2], torch.nn.utils.fuse_conv_bn_eval(dense[3], dense[4]))
    torch.testing.assert_close(fused(x), tied(x), rtol=1e-4, atol=1e-5)


def test_what_is_read_is_an_ordinary_tensor_in_all_else() -> None:
    tied = mlp()
    weight = tied[2].weight
    assert isinstance(weight, Tensor)
    assert not torch.overrides.has_torch_function((weight,))  # fast paths of PyTorch ask this
    assert type(weight + 1) is type(weight.clone()) is type(nn.functional.linear(torch.ones(1, 16), weight)) is Tensor
    assert repr(weight) == repr(tied[0].weight.t() + 0).replace("AddBackward0", "AliasBackward0")
    assert type(copy.deepcopy(weight.detach())) is type(pickle.loads(pickle.dumps(weight.detach()))) is Tensor
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    assert type(torch.load(file)) is Tensor
    copied = nn.Parameter(weight.detach().clone())
    with torch.no_grad():
        copied.zero_()
    assert weight.any()
    frozen = nn.Parameter(weight.detach(), requires_grad=False)  # an inference engine's: it may read, and never writes
    assert torch.equal(frozen, weight)
    weight.square().sum().backward()
    torch.testing.assert_close(tied[0].weight.grad, 2 * tied[0].weight)


def test_its_source_is_written_as_ever() -> None:
    tied = mlp()
    with torch.no_grad():
        tied[0].weight.fill_(2)
        nn.init.ones_(tied[0].bias)
    assert (tied[2].weight == 2).all()
