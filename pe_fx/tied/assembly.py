"""How a dense weight is put together of views of others: as data, and as code."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from pe_fx.ties import Dims, Order, Ranges, Shape


@dataclass(frozen=True)
class Mix:
    """Fixed signs for the channels along both matrix dimensions, and another order along one of them.

    The `height` channels along `axis` are dealt like cards into `hands`, one hand laid behind the other; then the first half is
    negated, as is the first half of the `width` channels along `across`.

    >>> mix = Mix(axis=0, across=1, hands=2, height=4, width=2)
    >>> mix(torch.tensor([[10, 11], [20, 21], [30, 31], [40, 41]])).tolist()
    [[10, -11], [30, -31], [-20, 21], [-40, 41]]

    Made of views and products, it keeps nothing in memory, its gradient scatters nothing, and Inductor makes one kernel of it, the
    same for all weights of one shape with as many hands. A shard along `across`, as in tensor parallel, needs no other.
    """

    axis: int
    across: int
    hands: int
    height: int
    width: int

    @property
    def mark(self) -> int:
        """What tells mixes of one weight apart."""
        return self.hands

    @classmethod
    def drawn(cls, axis: int, across: int, shape: Shape, seed: int) -> Mix:
        """The mix of a weight of this shape that the seed stands for, by arithmetic alone: the same everywhere and for ever.

        >>> Mix.drawn(0, 1, (384, 1536), 2024)
        Mix(axis=0, across=1, hands=16, height=384, width=1536)
        """
        size = shape[axis]
        divisors = [hands for hands in range(2, size // 2 + 1) if size % hands == 0]
        # the two that move channels farthest: more trained no better, and each is a kernel more to compile
        middle = sorted(divisors, key=lambda hands: (max(hands, size // hands), hands))[:2] or [1]
        return cls(axis, across, middle[seed % len(middle)], size, shape[across])

    def __call__(self, part: Tensor, rank: int = 2) -> Tensor:
        """`rank`: the number of dimensions of the part."""
        # not the method: under a default device, Dynamo of torch 2.11 cannot trace it
        rows = torch.unflatten(part, self.axis, (-1, self.hands))
        dealt = rows.transpose(self.axis, self.axis + 1)
        across = self.across + (self.across > self.axis)
        dealt = dealt * _half_negative(part, self.height).reshape(self.hands, *_along(self.axis, rank))
        dealt = dealt * _half_negative(part, self.width).reshape(_along(across, rank + 1))
        return dealt.flatten(self.axis, self.axis + 1)


def _half_negative(like: Tensor, count: int) -> Tensor:
    return torch.cat([like.new_full((count // 2,), -1), like.new_full((count - count // 2,), 1)])


def _along(axis: int, rank: int) -> Shape:
    """The shape of a vector that lies along this dimension. It is not the matrix that is turned: Inductor would store it so."""
    return (-1, *[1] * (rank - 1 - axis))


Moves = tuple[Tensor, Tensor]
"""An order as tensors: what each channel reads, and what that is multiplied with."""


@dataclass(frozen=True)
class Fitted:
    """A stored order and signs of the channels `along` one matrix dimension.

    >>> fitted = Fitted(along=1, order=Order.of([1, 0], [1, -1]))
    >>> fitted(torch.tensor([[1, 2], [3, 4]]), fitted.moves()).tolist()
    [[2.0, -1.0], [4.0, -3.0]]

    Weights of one shape are computed alike, whatever their orders, which are therefore no part of what makes two of them equal.
    """

    along: int
    order: Order = field(compare=False)

    @property
    def mark(self) -> int:
        return zlib.crc32(repr(self.order).encode())

    def moves(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Moves:
        """The order as tensors for a weight of this dtype on this device."""
        places = torch.tensor(self.order.places, device="cpu")
        signs = torch.tensor(self.order.signs, dtype=torch.float64, device="cpu") * self.order.factor
        return places.to(device), signs.to(dtype).to(device)

    def __call__(self, part: Tensor, moves: Moves, rank: int = 2) -> Tensor:
        """`rank`: the number of dimensions of the part."""
        places, signs = moves
        return part.index_select(self.along, places) * signs.reshape(_along(self.along, rank))


@dataclass(frozen=True)
class Gain:
    """Which of a module's learned factors scale a part, one for each position along `axis`."""

    axis: int
    start: int
    count: int
    initial: float

    def __call__(self, part: Tensor, factors: Tensor, rank: int = 2) -> Tensor:
        """`rank`: the number of dimensions of the part."""
        return part * factors.narrow(0, self.start, self.count).reshape(_along(self.axis, rank))


@dataclass(frozen=True)
class Regrouping:
    """Dimensions put in another `order` and read as one `matrix`, which is taken apart again into `shape` and put `back` in order.

    >>> heads_apart = Regrouping(order=(1, 2, 0), matrix=(8, 8), shape=(8, 2, 4), back=(0, 1, 2))
    >>> key = torch.randn(8, 2, 4)
    >>> value = heads_apart.taken_apart(heads_apart.joined(key))
    >>> value.reshape(8, 8).equal(key.reshape(8, 8).t())
    True
    """

    order: Dims
    matrix: Shape
    shape: Shape
    back: Dims

    def joined(self, part: Tensor) -> Tensor:
        return part.permute(self.order).reshape(self.matrix)

    def taken_apart(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.shape).permute(self.back)


@dataclass(frozen=True)
class View:
    """A part of a stored tensor: `ranges` of each dimension (None: all of it), mixed and scaled, dimensions `swap` exchanged, `reshape`d.

    What is mixed and scaled stays row by row of its source, so that it is written once, and each use may read it as it likes.
    `regroup`: in place of the exchange, through a matrix whose rows or columns lie along several dimensions.
    Written with methods and `cat` alone, so that it runs on tensors and on torch.fx proxies.
    """

    ranges: tuple[Ranges | None, ...]
    swap: tuple[int, int] | None = None
    reshape: Shape | None = None
    mix: Mix | Fitted | None = None
    gain: Gain | None = None
    regroup: Regrouping | None = None

    def __call__(self, stored: Tensor, factors: Tensor | None = None, moves: Moves | None = None) -> Tensor:
        part = stored
        for dim, ranges in enumerate(self.ranges):
            if ranges is not None:
                part = _joined([part.narrow(dim, start, stop - start) for start, stop in ranges], dim)
        rank = len(self.ranges)
        if self.regroup is not None:
            part, rank = self.regroup.joined(part), 2
        if isinstance(self.mix, Mix):
            part = self.mix(part, rank)
        elif self.mix is not None:
            assert moves is not None
            part = self.mix(part, moves, rank)
        if self.gain is not None and factors is not None:
            part = self.gain(part, factors, rank)
        if self.swap is not None:
            part = part.transpose(*self.swap)
        if self.reshape is not None:
            part = part.reshape(self.reshape)
        return part if self.regroup is None else self.regroup.taken_apart(part)


@dataclass(frozen=True)
class Piece:
    """Positions start to stop of a part (None: all of it); part -1 is what the module itself stores."""

    part: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Layout:
    """How a dense weight is put together along `axis`; `contiguous`: as a copy.

    >>> layout = Layout(0, (Piece(0),), (View((((0, 2),), None), swap=(0, 1)),))
    >>> layout.assemble(None, [torch.ones(4, 3)]).shape
    torch.Size([3, 2])
    """

    axis: int
    pieces: tuple[Piece, ...]
    views: tuple[View, ...]
    contiguous: bool = False

    @property
    def gains(self) -> list[Gain]:
        return [view.gain for view in self.views if view.gain is not None]

    @property
    def fitted(self) -> list[Fitted]:
        return [view.mix for view in self.views if isinstance(view.mix, Fitted)]

    def assemble(self, own: Tensor | None, sources: Sequence[Tensor], factors: Tensor | None = None, moves: Sequence[Moves] = ()) -> Tensor:
        left = iter(moves)
        parts = [
            view(source, factors, next(left) if isinstance(view.mix, Fitted) else None)
            for view, source in zip(self.views, sources, strict=True)
        ]
        pieces = []
        for piece in self.pieces:
            part = own if piece.part < 0 else parts[piece.part]
            assert part is not None
            pieces.append(part if piece.stop is None else part.narrow(self.axis, piece.start, piece.stop - piece.start))
        dense = _joined(pieces, self.axis)
        return dense.contiguous() if self.contiguous else dense


@functools.cache
def written_out(layout: Layout) -> Callable[..., Tensor]:
    """`layout.assemble` as straight-line code, a function of nothing, what a module stores, its factors, each source, and the tensors
    of each order.

    >>> written_out(Layout(0, (Piece(0),), (View((None, None), swap=(0, 1)),)))(None, None, None, torch.ones(4, 3)).shape
    torch.Size([3, 4])

    Layouts that are equal have one function. Dynamo guards on that alone, and not on every number in the layout.
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)

    def given(*names: str) -> list[Tensor]:
        return [cast(Tensor, fx.Proxy(graph.placeholder(name), tracer)) for name in names]

    own, factors = given("own", "factors")
    sources = given(*(f"source{i}" for i in range(len(layout.views))))
    places, signs = (given(*(f"{what}{i}" for i in range(len(layout.fitted)))) for what in ("places", "signs"))
    dense: Any = layout.assemble(own, sources, factors if layout.gains else None, list(zip(places, signs, strict=True)))
    graph.output(dense.node)
    code = graph.python_code("self")
    exec(code.src, code.globals)
    return cast(Callable[..., Tensor], code.globals["forward"])


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
