"""What a model's weights are multiplied with while it runs, and its gradients: the second moments, for every view of a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pe_fx.errors import PeFxError
from pe_fx.graph.capture import rng_restored
from pe_fx.graph.inputs import ExampleInputs, as_arguments, tensors_in
from pe_fx.text import with_progress

aten = torch.ops.aten

PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.mv.default: (0, 1),
    aten.addmv.default: (1, 2),
}
"""The matrix products that all others come down to, and the places of their two factors."""

_View = tuple[tuple[int, ...], tuple[int, ...], int]
"""A matrix that lies in a parameter's storage: its sizes, strides and offset."""


@dataclass
class Moment:
    """The sum of x xᵀ over all vectors x that were multiplied with one matrix."""

    total: Tensor
    count: int = 0

    def add(self, vectors: Tensor) -> None:
        vectors = vectors.reshape(-1, len(self.total)).to(self.total.dtype)
        self.total.addmm_(vectors.t(), vectors)
        self.count += len(vectors)


@dataclass
class Moments:
    """For parameters by name, what was multiplied with each matrix that is a view of them: inputs and, backwards, gradients.

    >>> layer = nn.Linear(3, 2)
    >>> moments = moments_of(layer, ["weight"], [torch.eye(3)])
    >>> moments.along("weight", torch.tensor([0, 1, 2])).equal(torch.eye(3) / 3)  # the first row's entries meet the inputs
    True
    >>> moments.along("weight", torch.tensor([0, 3])).shape  # and the first column's the gradients of the outputs
    torch.Size([2, 2])
    """

    parameters: Mapping[str, Tensor]
    seen: dict[str, dict[_View, Moment]] = field(default_factory=dict)

    def along(self, name: str, line: Tensor) -> Tensor | None:
        """The mean of x xᵀ over the vectors whose entries these of the parameter were multiplied with, given by their flat positions.

        None where nothing was seen that lies along them.
        """
        parameter = self.parameters[name]
        for (shape, strides, offset), moment in self.seen.get(name, {}).items():
            numbers = _numbered(parameter).as_strided(shape, strides, offset)
            rows, columns = (torch.full((parameter.numel(),), -1, device="cpu") for _ in range(2))
            rows[numbers], columns[numbers] = torch.unravel_index(torch.arange(numbers.numel(), device="cpu").view(shape), shape)
            if int(rows[line].min()) >= 0 and bool((columns[line] == columns[line[0]]).all()):
                index = rows[line].to(moment.total.device)
                return moment.total[index][:, index] / moment.count
        return None


def _numbered(parameter: Tensor) -> Tensor:
    """The parameter's storage, where each of its entries is its flat position."""
    stored = torch.full((parameter.untyped_storage().nbytes() // parameter.element_size(),), -1, device="cpu")
    numbers = torch.arange(parameter.numel(), device="cpu").view(parameter.shape)
    stored.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset()).copy_(numbers)
    return stored


class _Watch(TorchDispatchMode):
    """Adds up what is multiplied with views of parameters. In a backward, where inputs are computed from gradients, these are."""

    def __init__(self, moments: Moments) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moments = moments
        self.names = {parameter.untyped_storage().data_ptr(): name for name, parameter in moments.parameters.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            left, right = (args[place] for place in PRODUCTS[func])
            self._see(right, left)
            if left.dim() > 1:
                self._see(left.mT, right.mT if right.dim() > 1 else right)
        elif func is aten.convolution.default:
            x, weight, _, strides, padding, _, transposed, _, groups = args
            if groups == 1 and not transposed and not any(padding):
                self._see_pixels(weight.transpose(0, 1), _strided(x, strides))
        elif func is aten.convolution_backward.default:
            gradient, _, weight, *_, transposed, _, groups, _ = args
            if groups == 1 and not transposed:
                self._see_pixels(weight, gradient)
        return result

    def _see_pixels(self, weight: Tensor, images: Tensor) -> None:
        if all(size == 1 for size in weight.shape[2:]):
            self._see(weight.flatten(1), images.movedim(1, -1))

    def _see(self, matrix: Tensor, vectors: Tensor) -> None:
        name = self.names.get(matrix.untyped_storage().data_ptr())
        if matrix.dim() == 3 and (matrix.shape[0] == 1 or matrix.stride(0) == 0):
            matrix = matrix[0]
        if name is None or matrix.dim() != 2:
            return
        views = self.moments.seen.setdefault(name, {})
        view = (tuple(matrix.shape), matrix.stride(), int(matrix.storage_offset()))
        if view not in views:
            views[view] = Moment(matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float32))
        views[view].add(vectors)


def _strided(images: Tensor, strides: Iterable[int]) -> Tensor:
    """What a 1x1 convolution with these strides sees."""
    for dim, stride in enumerate(strides, 2):
        images = images.index_select(dim, torch.arange(0, images.shape[dim], stride, device=images.device))
    return images


def moments_of(model: nn.Module, weights: Iterable[str], calibration: Iterable[ExampleInputs]) -> Moments:
    """What these weights are multiplied with while the batches run through the model in eval mode, and gradients back.

    The gradients are those of random projections of the model's outputs, always the same: they tell how much each output of a layer
    counts. The model's mode, gradients and buffers and the random state stay. Raises `PeFxError` where there is no batch, or what is
    seen is not finite.
    """
    parameters = {name: parameter.detach().requires_grad_(parameter.is_floating_point()) for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    moments = Moments({name: parameters[name] for name in weights})
    training = {module: module.training for module in model.modules()}
    generator = torch.Generator("cpu").manual_seed(0)
    count = 0
    try:
        model.eval()
        with rng_restored(model), torch.enable_grad():
            for count, batch in enumerate(with_progress(calibration, "calibration"), 1):  # noqa: B007 (read when all is done)
                with _Watch(moments):
                    args, kwargs = pytree.tree_map_only(Tensor, _differentiable, as_arguments(batch, model))
                    leaves = [leaf for leaf in (*parameters.values(), *tensors_in((args, kwargs))) if leaf.requires_grad]
                    outputs = tensors_in(torch.func.functional_call(model, parameters | buffers, args, kwargs))
                    outputs = [output for output in outputs if output.requires_grad]
                    projections = [torch.randn(output.shape, generator=generator, device="cpu").to(output) for output in outputs]
                    if outputs:
                        torch.autograd.grad(outputs, leaves, projections, allow_unused=True)
    finally:
        for module, mode in training.items():
            module.training = mode
    if not count:
        raise PeFxError("calibration holds no batch: give an iterable of example inputs, such as [inputs], or leave it out")
    for name, views in moments.seen.items():
        if not all(bool(moment.total.isfinite().all()) for moment in views.values()):
            raise PeFxError(f"calibration: what {name} is multiplied with, or a gradient there, is not finite. Leave such inputs out")
    return moments


def _differentiable(value: Tensor) -> Tensor:
    """Else no gradient would reach the first layer's outputs."""
    return value.detach().requires_grad_() if value.is_floating_point() else value
