"""The first block of a stage: modules that let it use the stage's W although its input is narrower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pe_fx.tied.derived import Derived


class PadShortcut(nn.Module):
    """The parameter-free shortcut of He et al. 2015, option A: subsample, then zero channels up to `out`.

    >>> PadShortcut(8, (2, 2))(torch.ones(1, 4, 6, 6)).shape
    torch.Size([1, 8, 3, 3])
    """

    def __init__(self, out: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.out = out
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        for axis, step in enumerate(self.stride, start=2):
            if step > 1:
                x = x[(slice(None),) * axis + (slice(None, None, step),)]
        return nn.functional.pad(x, [0, 0] * len(self.stride) + [0, self.out - x.shape[1]])

    def extra_repr(self) -> str:
        return f"{self.out}, stride={self.stride}"


class Depthwise(nn.Conv2d):
    """A depthwise convolution that computes one output to a channel on CUDA: for several, cuDNN runs a kernel for each channel.

    >>> Depthwise(4, 8, 3, padding=1, groups=4)(torch.ones(2, 4, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def forward(self, x: Tensor) -> Tensor:
        times = self.out_channels // self.in_channels
        if times > 1 and x.is_cuda is True:  # what torch.fx traces with has no device, and is not asked
            x = x.repeat_interleave(times, 1)
            return nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.out_channels)
        made: Tensor = self._conv_forward(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return made


class Widen(nn.Module):
    """`width` channels to `out`: a depthwise 3x3 convolution, BatchNorm and GELU make the new ones, put before the old.

    >>> Widen(4, 12)(torch.ones(2, 4, 5, 5)).shape
    torch.Size([2, 12, 5, 5])

    Source: the public code of arXiv 2401.16438's authors.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv = Depthwise(width, out - width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(out - width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.act(self.norm(self.conv(x))), x], 1)


class Widened(Derived):
    """A block that widens its input first."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.widen(x), *args, **kwargs)  # type: ignore[misc,attr-defined]


def strided_shortcut(out: int, stride: tuple[int, ...]) -> nn.Module:
    """What replaces a projection shortcut once the input has `out` channels."""
    if all(step == 1 for step in stride):
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(out, out, 3, stride=stride, padding=1, groups=out, bias=False), nn.BatchNorm2d(out))  # type: ignore[arg-type]


def widen_params(width: int, out: int, stride: tuple[int, ...]) -> int:
    """Parameters that `Widen` and `strided_shortcut` add."""
    added = 11 * (out - width)
    return added if all(step == 1 for step in stride) else added + 11 * out
