"""Views that are not run give what they would give, and hold repetitions in no memory."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pe_fx.graph.capture import capture
from pe_fx.graph.channels import Channels
from pe_fx.graph.flow import Flow
from pe_fx.graph.views import _joined, _reshaped

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@st.composite
def tags(draw: st.DrawFn, sizes: list[int]) -> Tensor:
    """Numbers that repeat along some axes."""
    repeated = [draw(st.booleans()) for _ in sizes]
    small = [1 if repeats else size for repeats, size in zip(repeated, sizes, strict=True)]
    return torch.arange(math.prod(small), dtype=torch.float64).view(small).expand(sizes)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...]]:
    sizes = draw(SIZES)
    factors = [prime for size in sizes for prime in ((2, 2) if size == 4 else (size,))]
    shape = draw(st.permutations(factors)) if draw(st.booleans()) else list(factors)
    while len(shape) > 1 and draw(st.booleans()):
        place = draw(st.integers(0, len(shape) - 2))
        shape[place : place + 2] = [shape[place] * shape[place + 1]]
    return draw(tags(sizes)), tuple(shape)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of the machine's load
@given(reshapes())
def test_a_reshape_keeps_the_order(case: tuple[Tensor, tuple[int, ...]]) -> None:
    given_tags, shape = case
    reshaped = _reshaped(given_tags, shape)
    assert reshaped is not None
    assert torch.equal(reshaped, given_tags.reshape(shape))


@given(st.data())
def test_a_join_is_that_of_all_entries(data: st.DataObject) -> None:
    sizes = data.draw(SIZES)
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    parts = tuple(data.draw(tags(sizes)) for _ in range(data.draw(st.integers(1, 3))))
    for run, is_new in ((torch.cat, False), (torch.stack, True)):
        wanted = run(parts, axis)
        joined = _joined(parts, axis, is_new, tuple(wanted.shape))
        assert joined is not None
        assert torch.equal(joined, wanted)


def arrived(view: nn.Module) -> Tensor:
    """Where the channels of a linear are after a view of its result, (2, 6, 5, 8)."""
    flow = Flow(capture(nn.Sequential(nn.Linear(4, 8), view), torch.randn(2, 6, 5, 4)))
    held: Channels = flow.trace(flow.ops[1], flow.ops[-1])[flow.ops[-1]]
    assert isinstance(held.tags, Tensor)
    return held.tags


class Roll(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, (1,) * len(self.dims), self.dims) if self.dims else torch.roll(x, 1)


@pytest.mark.parametrize("dims", [(1,), (1, 2), (-1,), (1, -1), ()])
def test_a_roll_moves_what_lies_on_its_axes(dims: tuple[int, ...]) -> None:
    channels = torch.arange(1.0, 9.0, dtype=torch.float64).expand(2, 6, 5, 8)
    assert torch.equal(arrived(Roll(*dims)), Roll(*dims)(channels))


def test_repetitions_stay_in_no_memory() -> None:
    heads = torch.arange(2.0, dtype=torch.float64)[:, None].expand(3, 2, 400)
    reshaped = _reshaped(heads, (6, 20, 20))
    joined = _joined((heads, heads), 1, False, (3, 4, 400))
    assert reshaped is not None
    assert joined is not None
    assert reshaped.untyped_storage().nbytes() == 6 * 8
    assert joined.untyped_storage().nbytes() == 4 * 8
