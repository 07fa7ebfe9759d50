"""The plan: which weight is which view of which weight, and why others stayed as they are."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pe_fx.errors import PeFxError
from pe_fx.text import printable

SCHEMA_VERSION = 2

Ranges = tuple[tuple[int, int], ...]
"""Sorted, disjoint, half-open ranges of positions along one dimension."""

Shape = tuple[int, ...]

Dims = tuple[int, ...]
"""Dimensions of a parameter, by number."""

Spread = tuple[Dims, Dims]
"""The dimensions along which the rows of a matrix lie, and those of its columns; several are read as one, the last changing fastest."""


def to_ranges(positions: Iterable[int]) -> Ranges:
    """
    >>> to_ranges([4, 0, 1, 5, 9])
    ((0, 2), (4, 6), (9, 10))
    """
    if isinstance(positions, range) and positions.step == 1:
        return ((positions.start, positions.stop),) if positions else ()
    ranges: list[tuple[int, int]] = []
    ordered = sorted(set(positions))
    if ordered and ordered[-1] - ordered[0] == len(ordered) - 1:
        return ((ordered[0], ordered[-1] + 1),)
    for position in ordered:
        if ranges and ranges[-1][1] == position:
            ranges[-1] = (ranges[-1][0], position + 1)
        else:
            ranges.append((position, position + 1))
    return tuple(ranges)


def positions(ranges: Ranges) -> list[int]:
    """
    >>> positions(((0, 2), (4, 5)))
    [0, 1, 4]
    """
    return [position for start, stop in ranges for position in range(start, stop)]


def length(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def gain_of(name: str) -> str:
    """The parameter that holds the learned factors of a tied weight."""
    return f"{name}_gain"


def kept_of(name: str) -> str:
    """The parameter that holds what is left of a tied weight."""
    return f"{name}_kept"


def _trimmed(shape: Shape, axes: tuple[int, int]) -> Shape:
    """A 1x1 convolution's kernel dimensions count for nothing."""
    last = max(axes) + 1
    return shape[:last] + tuple(size for size in shape[last:] if size != 1)


def overlap(a: Ranges, b: Ranges) -> bool:
    """
    >>> overlap(((0, 2), (4, 6)), ((2, 4), (6, 8))), overlap(((0, 2), (4, 6)), ((2, 5),))
    (False, True)
    """
    if a == b:
        return length(a) > 0
    return any(start < stop for (_, stop), (start, _) in itertools.pairwise(sorted((*a, *b))))


@dataclass(frozen=True)
class Block:
    """A rectangular part of a parameter: for each dimension, the positions that belong to it.

    >>> block = Block("qkv.weight", (192, 64), (((64, 128),), ((0, 64),)))
    >>> block.shape, block.is_whole, str(block)
    ((64, 64), False, 'qkv.weight[64:128]')

    Raises `PeFxError` where the parameter does not have these positions.
    """

    name: str
    full_shape: Shape
    ranges: tuple[Ranges, ...]

    def __post_init__(self) -> None:
        fits = len(self.ranges) == len(self.full_shape)
        for ranges, size in zip(self.ranges, self.full_shape, strict=False):
            edges = [0, *(edge for start, stop in ranges for edge in (start, stop)), size]
            fits &= edges == sorted(edges)
        if not fits:
            raise PeFxError(f"{self.name} has no part {self.ranges}: its shape is {self.full_shape}")

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> Block:
        return cls(name, tuple(shape), tuple(((0, size),) for size in shape))

    def narrowed(self, dim: int, positions: Iterable[int]) -> Block:
        """The same block with only `positions` of dimension `dim`."""
        chosen = to_ranges(positions)
        return (
            self if chosen == self.ranges[dim] else Block(self.name, self.full_shape, (*self.ranges[:dim], chosen, *self.ranges[dim + 1 :]))
        )

    @functools.cached_property
    def shape(self) -> Shape:
        return tuple(length(ranges) for ranges in self.ranges)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        return self.shape == self.full_shape

    @functools.cached_property
    def divided(self) -> tuple[int, ...]:
        """The dimensions of which the block has only a part."""
        return tuple(dim for dim, (size, full) in enumerate(zip(self.shape, self.full_shape, strict=True)) if size != full)

    def overlaps(self, other: Block) -> bool:
        return self.name == other.name and all(map(overlap, self.ranges, other.ranges))

    def __str__(self) -> str:
        if self.is_whole:
            return self.name
        parts = [
            ":" if length(ranges) == size else "+".join(f"{start}:{stop}" for start, stop in ranges[:3]) + ("+…" if len(ranges) > 3 else "")
            for ranges, size in zip(self.ranges, self.full_shape, strict=True)
        ]
        while parts[-1] == ":":
            parts.pop()
        return f"{self.name}[{', '.join(parts)}]"


def _lies_in(block: Block, spread: Spread) -> bool:
    """Whether the matrix takes each dimension once, as it must."""
    return sorted((*spread[0], *spread[1])) == list(range(len(block.shape)))


def _as_matrix(block: Block, spread: Spread) -> tuple[int, int]:
    rows, columns = (math.prod(block.shape[dim] for dim in dims) for dims in spread)
    return rows, columns


@dataclass(frozen=True)
class Order:
    """A signed permutation and a number: entry i is what stood at `places[i]`, times the sign of i and times `factor`.

    >>> order = Order.of([2, 0, 1], [1, -1, 1], 0.5)
    >>> order, order.places, order.signs
    (Order(code='BAABAAIA', factor=0.5), (2, 0, 1), (1, -1, 1))

    `code` holds them compactly as text: for each entry twice its place, plus one where it is negated, as base64 of 16-bit or 32-bit
    numbers. Raises `PeFxError` for a text that is no signed permutation.
    """

    code: str
    factor: float = 1.0

    @classmethod
    def of(cls, places: Sequence[int], signs: Sequence[int], factor: float = 1.0) -> Order:
        width = _width(len(places))
        numbers = (2 * place + (sign < 0) for place, sign in zip(places, signs, strict=True))
        return cls(base64.b64encode(b"".join(number.to_bytes(width, "little") for number in numbers)).decode(), factor)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor) or sorted(self.places) != list(range(len(self.places))):
            raise PeFxError(f"{self.code[:16]}…, times {self.factor}, is no order of a tie")

    @functools.cached_property
    def _numbers(self) -> list[int]:
        try:
            data = base64.b64decode(self.code, validate=True)
        except (binascii.Error, ValueError) as error:
            raise PeFxError(f"{self.code[:16]}… is no order of a tie: {error}") from error
        width = _width(len(data) // 2)
        return [int.from_bytes(data[start : start + width], "little") for start in range(0, len(data), width)]

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(number >> 1 for number in self._numbers)

    @property
    def signs(self) -> tuple[int, ...]:
        return tuple(-1 if number & 1 else 1 for number in self._numbers)


def _width(count: int) -> int:
    """Bytes of a number in the code of an order of so many entries."""
    return 2 if 2 * count <= 1 << 16 else 4


@dataclass(frozen=True)
class Tie:
    """`into` is no parameter any more: it is `of`, its matrix dimensions `axes` swapped where `transposed`.

    >>> fc1, fc2 = Block.whole("fc1.weight", (8, 4)), Block.whole("fc2.weight", (4, 8))
    >>> tie = Tie(into=fc2, of=fc1, transposed=True, channels=0)
    >>> print(tie)
    fc2.weight ← fc1.weightᵀ
    >>> tie.target, tie.source
    ('fc2.weight', 'fc1.weight')
    >>> print(dataclasses.replace(tie, seed=0, gain=0.2))
    fc2.weight ← gain · ±fc1.weightᵀ

    `channels` is the dimension of `into` along which a variant of the tie changes it, None where it only repeats its source: a
    signed permutation, drawn by `seed` (with signs along the other of `axes`, too), and a learned factor per channel that starts
    at `gain`. It is the dimension of the output channels, so that a unit does not write back along the direction that it reads.
    `order`: in place of a seed, an order and signs of the channels along the other of `axes`, fitted to the weights' values.
    `contiguous`: the model views `into` in a way in which a transposed matrix cannot be viewed; it is a copy, row by row.
    `spread`: where swapping two dimensions does not do, how a matrix lies in `into`, and how the same one lies in `of`; then `channels`
    is the first dimension of its columns in `into`.

    >>> keys, values = Block.whole("k", (8, 2, 4)), Block.whole("v", (8, 2, 4))
    >>> print(Tie(values, keys, transposed=True, channels=1, spread=(((0,), (1, 2)), ((1, 2), (0,)))))
    v ← kᵀ

    Raises `PeFxError` where the two blocks do not have matching shapes, or not these dimensions.
    """

    into: Block
    of: Block
    transposed: bool
    axes: tuple[int, int] = (0, 1)
    channels: int | None = None
    seed: int | None = None
    gain: float | None = None
    contiguous: bool = False
    spread: tuple[Spread, Spread] | None = None
    order: Order | None = None

    def __post_init__(self) -> None:
        if self.spread is None:
            rank = min(len(self.into.shape), len(self.of.shape))
            fits = 0 <= min(self.axes) < max(self.axes) < rank and self.channels in (None, *self.axes)
        else:
            fits = all(_lies_in(block, dims) for block, dims in zip((self.into, self.of), self.spread, strict=True))
            fits = fits and self.channels in (None, *self.spread[0][1][:1])
        if not fits:
            where = f"axes {self.axes}" if self.spread is None else f"a matrix along {self.spread}"
            raise PeFxError(f"{self} cannot be a tie: {where} and channels {self.channels} do not fit {self.into.shape}")
        if self.gain is not None and not math.isfinite(self.gain):
            raise PeFxError(f"{self} cannot be a tie: its gain is {self.gain}")
        if self.spread is None:
            alike = _trimmed(self.into.shape, self.axes) == _trimmed(self.source_shape, self.axes)
        else:
            alike = _as_matrix(self.into, self.spread[0]) == _as_matrix(self.of, self.spread[1])
        if not alike:
            raise PeFxError(f"{self} cannot be a tie: {self.into.shape} is not the shape of {self.of.shape}{'ᵀ' * self.transposed}")
        if self.channels is None and any(each is not None for each in (self.seed, self.gain, self.order)):
            raise PeFxError(f"{self} names no dimension whose channels are mixed or scaled")
        if self.order is not None and (self.seed is not None or len(self.order.places) != self.shape[self.channel_axes[1]]):
            raise PeFxError(f"{self} cannot be a tie: its order has {len(self.order.places)} entries, or it has a seed beside it")

    @property
    def source_shape(self) -> Shape:
        """The source's shape as the target sees it, with the matrix dimensions `axes` swapped."""
        shape = list(self.of.shape)
        if self.transposed:
            first, second = self.axes
            shape[first], shape[second] = shape[second], shape[first]
        return tuple(shape)

    @property
    def target(self) -> str:
        return self.into.name

    @property
    def source(self) -> str:
        return self.of.name

    @property
    def shape(self) -> Shape:
        """What a variant of the tie changes: `into`, or the matrix that is spread over it."""
        return self.into.shape if self.spread is None else _as_matrix(self.into, self.spread[0])

    @property
    def channel_axes(self) -> tuple[int, int]:
        """The axes of this shape along which a variant's channels lie, and the others of the matrix."""
        if self.spread is not None or self.channels is None:
            return 1, 0
        return self.channels, sum(self.axes) - self.channels

    @property
    def gains(self) -> int:
        """The number of learned factors."""
        return 0 if self.gain is None or self.channels is None else self.shape[self.channel_axes[0]]

    def text(self, within: str = "") -> str:
        """What `into` is, the source named relative to the module `within`."""
        scaled, mixed = "gain · " * (self.gain is not None), "±" * (self.seed is not None or self.order is not None)
        return f"{scaled}{mixed}{_relative(str(self.of), within)}{'ᵀ' * self.transposed}"

    def __str__(self) -> str:
        return f"{self.into} ← {self.text()}"


@dataclass(frozen=True)
class Entry:
    """How the first block of a stage, whose input is narrower than the stage's W, takes part in it.

    `treatment` is "slice" or "expand" (see `pe_fx.transform`); `convs` and `norms` are the modules of the projection
    shortcut that it replaces, `conv1` the module whose weight becomes a view of W.
    """

    treatment: str
    block: str
    conv1: str
    convs: tuple[str, ...]
    norms: tuple[str, ...]
    width: int
    out: int
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.treatment not in ("slice", "expand"):
            raise PeFxError(f"{self.block}: entry={self.treatment!r} is unknown; choose from 'slice', 'expand'")

    @property
    def removed(self) -> tuple[str, ...]:
        """The modules whose parameters go."""
        keeps_norms = self.treatment == "expand" and any(step > 1 for step in self.stride)
        return self.convs if keeps_norms else self.convs + self.norms


@dataclass(frozen=True)
class Site:
    """A matched pattern: `kind`, the enclosing module's `name`, its `weights` in dataflow order, and their `ties`.

    `stage` names the first weight that it shares with its neighbours, `entry` how a first block takes part in that; `saved` is the
    number of parameters that go.
    """

    kind: str
    name: str
    weights: tuple[str, ...]
    ties: tuple[Tie, ...]
    stage: str | None = None
    entry: Entry | None = None
    saved: int = 0

    def with_ties(self, ties: Iterable[Tie]) -> Site:
        """The site with these ties; itself where they are its own."""
        ties = tuple(ties)
        return self if ties == self.ties else replace(self, ties=ties)

    def renamed(self, rename: Callable[[str], str]) -> Site:
        """The site of a model whose modules and weights have other names."""

        def tie(old: Tie) -> Tie:
            return replace(old, into=replace(old.into, name=rename(old.target)), of=replace(old.of, name=rename(old.source)))

        entry = self.entry and replace(
            self.entry,
            block=rename(self.entry.block),
            conv1=rename(self.entry.conv1),
            convs=tuple(map(rename, self.entry.convs)),
            norms=tuple(map(rename, self.entry.norms)),
        )
        return replace(
            self,
            name=rename(self.name),
            weights=tuple(map(rename, self.weights)),
            ties=tuple(map(tie, self.ties)),
            stage=self.stage and rename(self.stage),
            entry=entry,
        )


@dataclass(frozen=True)
class Miss:
    """A near miss: the weights, and as a sentence why they were not tied."""

    kind: str
    name: str
    weights: tuple[str, ...]
    reason: str

    def renamed(self, rename: Callable[[str], str]) -> Miss:
        return replace(self, name=rename(self.name), weights=tuple(map(rename, self.weights)))


@dataclass(frozen=True)
class FarMiss(Miss):
    """What has the shapes of a pair, and in neither weight a matrix: plans count these, and list them not."""


@dataclass(frozen=True)
class Plan:
    """Sites, misses, and the options that led to them; made by `pe_fx.plan`.

    `far_misses` is the number of pairs of larger or grouped convolutions that would fit, were they 1x1 and ungrouped. `capture` is how
    the graph came about in which all were found, and of no consequence for what the plan does: by "export", by a "run" of the model, or
    as a "graph" that was given.

    >>> import torch, pe_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    >>> plan = pe_fx.plan(model)
    >>> print(plan)
    site  kind  weights             shapes                ties                  saved
    ----  ----  ------------------  --------------------  --------------------  ------
    .     mlp   0.weight, 2.weight  (256, 64), (64, 256)  2.weight ← 0.weightᵀ  16,384
    <BLANKLINE>
    1 site; 33,088 → 16,704 parameters (50.5 %)
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    sites: tuple[Site, ...] = ()
    misses: tuple[Miss, ...] = ()
    shapes: dict[str, Shape] = field(default_factory=dict)
    params_before: int = 0
    params_after: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    capture: str = field(default="export", compare=False)
    far_misses: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        for tie in self.ties:
            if self.shapes.get(tie.source, tie.of.full_shape) != tie.of.full_shape:
                raise PeFxError(f"{tie} cannot be a tie: {tie.source} is {self.shapes[tie.source]}, not {tie.of.full_shape}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # a plan is never changed, and every tied weight of a model refers to it

    @property
    def ties(self) -> tuple[Tie, ...]:
        return tuple(tie for site in self.sites for tie in site.ties)

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(site.entry for site in self.sites if site.entry)

    def renamed(self, rename: Callable[[str], str]) -> Plan:
        """The plan of a model whose modules and weights have other names, as where it is part of another.

        >>> from torch import nn
        >>> import pe_fx
        >>> plan = pe_fx.plan(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
        >>> [str(tie) for tie in plan.renamed("backbone.{}".format).ties]
        ['backbone.2.weight ← backbone.0.weightᵀ']
        """
        return replace(
            self,
            sites=tuple(site.renamed(rename) for site in self.sites),
            misses=tuple(miss.renamed(rename) for miss in self.misses),
            shapes={rename(name): shape for name, shape in self.shapes.items()},
        )

    def to_json(self) -> str:
        """The plan as JSON text, with a schema version; `Plan.from_json` reads it back."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({"pe_fx_plan": SCHEMA_VERSION} | body, default=dataclasses.asdict)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what `to_json` wrote. Raises `PeFxError` for other text and for an unknown schema version."""
        try:
            body = json.loads(text)
            version = body.pop("pe_fx_plan")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise PeFxError(f"this is not a plan written by Plan.to_json(): {error!r}") from error
        if version not in (1, SCHEMA_VERSION):
            raise PeFxError(
                f"this plan has schema version {version!r}; this pe_fx reads versions 1 and {SCHEMA_VERSION}: "
                "make the plan anew with pe_fx.plan()"
            )
        try:
            body = {"capture": cls.capture, "far_misses": cls.far_misses} | body  # the youngest fields
            plan: Plan = _decoded(cls, {f.name: body[f.name] for f in dataclasses.fields(cls)})
        except (KeyError, TypeError, ValueError, PeFxError) as error:
            raise PeFxError(f"this plan is damaged: {error if isinstance(error, PeFxError) else repr(error)}") from error
        return _of_version_1(plan) if version == 1 else plan

    def __str__(self) -> str:
        if not self.sites:
            return _summary(self)
        rows = [
            (
                site.name or ".",
                site.kind + (f" ({site.entry.treatment})" if site.entry else ""),
                ", ".join(_relative(name, site.name) for name in site.weights),
                ", ".join(str(self.shapes[name]) for name in site.weights),
                "; ".join(f"{_relative(str(tie.into), site.name)} ← {tie.text(site.name)}" for tie in site.ties),
                f"{site.saved:,}",
            )
            for site in self.sites
        ]
        return table(("site", "kind", "weights", "shapes", "ties", "saved"), rows) + f"\n\n{_summary(self)}"

    def explain(self) -> str:
        """The misses as text: for each reason's weights, one line."""
        lines = [printable(f"{miss.name or '.'} ({miss.kind}): {miss.reason}") for miss in self.misses]
        return "\n".join([*(lines or ["no misses"]), *self.notes])

    @property
    def notes(self) -> list[str]:
        """What is to be said beside the near misses."""
        several = self.far_misses > 1
        pairs = f"{self.far_misses:,} pair{'s' * several} of convolutions, neither of them 1x1 and ungrouped, {'are' if several else 'is'}"
        return [f"{pairs} left as {'they are' if several else 'it is'}"] if self.far_misses else []


def _of_version_1(plan: Plan) -> Plan:
    """In which signed weights lay in memory row by row, so that nobody asked whether the model views them so."""

    def in_rows(tie: Tie) -> Tie:
        return dataclasses.replace(tie, contiguous=True) if tie.seed is not None and tie.transposed and tie.spread is None else tie

    sites = tuple(site.with_ties(map(in_rows, site.ties)) for site in plan.sites)
    return dataclasses.replace(plan, sites=sites)


ONE_PATH = "captured by a run: where values decide, this is the path that the inputs took"
"""What is to be known of a plan whose graph was captured so."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the header underlined.

    >>> print(table(("a", "b"), [("1", "22")]))
    a  b
    -  --
    1  22
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _summary(plan: Plan) -> str:
    kinds = Counter(site.kind for site in plan.sites)
    count = f"{len(plan.sites)} site{'s' * (len(plan.sites) != 1)}"
    detail = f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if len(kinds) > 1 else ""
    misses = f"; {len(plan.misses)} near miss{'es' * (len(plan.misses) > 1)}, see plan.explain()" if plan.misses else ""
    share = f" ({100 * plan.params_after / plan.params_before:.1f} %)" if plan.params_before else ""
    note = f"\n{ONE_PATH}" if plan.capture == "run" else ""
    return f"{count}{detail}; {plan.params_before:,} → {plan.params_after:,} parameters{share}{misses}{note}"


def _relative(name: str, prefix: str) -> str:
    return name.removeprefix(prefix + ".") if prefix else name


def _decoded(kind: Any, value: Any) -> Any:
    """What JSON says, as the annotated type. Raises `TypeError` or `ValueError` where it is something else."""
    of = get_args(kind)
    if kind is Any:
        return _tuples(value)
    if get_origin(kind) is UnionType:
        return None if value is None else _decoded(of[0], value)
    if get_origin(kind) is tuple and isinstance(value, list):
        kinds = [of[0]] * len(value) if of[-1] is ... else of
        return tuple(_decoded(one, item) for one, item in zip(kinds, value, strict=True))
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: _decoded(of[1], item) for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        return kind(**{key: _decoded(hints.get(key, Any), item) for key, item in value.items()})  # type: ignore[operator]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError(f"{value!r} is no {getattr(kind, '__name__', kind)}")
    return value


def _tuples(value: Any) -> Any:
    """JSON has no tuples: every list becomes one."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
