"""Random networks of random blocks: what must be tied is, what must not be is not, and every rewrite equals its dense twin."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from oracle import assert_equals_twin
from torch import Tensor, nn
from torch.nn import functional as F

import pe_fx
from pe_fx.api import KINDS
from pe_fx.passes.variants import MIXES
from pe_fx.tied.rewrite_modules import INITS

WIDTH, TOKENS, CONDITION = 8, 6, 3
PARTS = int(os.environ.get("PE_FX_PARTS", "4"))
EXAMPLES = int(os.environ.get("PE_FX_EXAMPLES", "25"))

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "square": lambda h: h * h,
    "softmax": lambda h: h.softmax(-1),
    "in_place": lambda h: h.relu_(),
}
HARMLESS = {
    "nothing": lambda h: h,
    "dropout": lambda h: F.dropout(h, 0.1, True),
    "norm": lambda h: F.layer_norm(h, h.shape[-1:]),
    "heads": lambda h: h.unflatten(-1, (2, -1)).transpose(1, 2).transpose(1, 2).flatten(-2),
    "tokens": lambda h: h.flatten(0, 1).view(-1, TOKENS, h.shape[-1]),
    "split": lambda h: torch.cat(h.chunk(2, -1), -1),
    "roll": lambda h: h.roll(1, 1),
    "depthwise": lambda h: F.conv1d(h.mT, torch.ones(h.shape[-1], 1, 3, dtype=h.dtype), padding=1, groups=h.shape[-1]).mT,
    "rms": lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
}
BREAKING = {
    "flip": lambda h: h.flip(-1),
    "shuffle": lambda h: h.unflatten(-1, (2, -1)).mT.flatten(-2),
    "mean": lambda h: h.mean(-1, keepdim=True).expand_as(h).contiguous(),  # for an activation in place may follow
}
MODULATIONS = {
    "nothing": lambda block, h, side: h,
    "mask": lambda block, h, side: h * side.mask,
    "filled": lambda block, h, side: h.masked_fill(side.mask == 0, 0.0),
    "condition": lambda block, h, side: h * (1 + (c := F.linear(side.condition, block.modulator).chunk(2, -1))[0]) + c[1],
}
RIVALS = {"rival": lambda block, h, side: h + F.linear(side.input, block.modulator)}
FORMS = ("linear", "functional", "matmul", "einsum", "conv", "addmm")


Expected = tuple[str, tuple[str, ...]]  # the kind of a site and its weights' names in the block


class Side(NamedTuple):
    """What enters a network beside its first input, and what a block works on."""

    mask: Tensor
    condition: Tensor
    positions: Tensor
    input: Tensor


@dataclass(frozen=True)
class Chain:
    """Two weights with something between them, modulated by what enters beside the first input or by what a `rival` makes.

    `borrows`: the weight that an earlier chain of the same shapes lends it.
    """

    form: str = "linear"
    hidden: int = 16
    activation: str | None = "relu"
    before: str = "nothing"
    after: str = "nothing"
    modulation: str = "nothing"
    leak: bool = False
    residual: bool = True
    frozen: bool = False
    calls: int = 1
    borrows: str | None = None

    @property
    def sites(self) -> list[Expected]:
        in_order = {self.before, self.after}.isdisjoint(BREAKING) or self.before == self.after == "flip"
        if self.activation is None or not in_order or self.leak or self.frozen or self.modulation in RIVALS:
            return []
        return [("bottleneck" if self.form == "conv" and "depthwise" in (self.before, self.after) else "mlp", ("first", "second"))]

    def lends_to(self, other: Chain) -> bool:
        return (self.form, self.hidden) == (other.form, other.hidden)


def normed(x: Tensor) -> Tensor:
    """What a block works on: without it, squares of squares leave no digits to compare."""
    return F.layer_norm(x, (WIDTH,))


class ChainBlock(nn.Module):
    def __init__(self, spec: Chain) -> None:
        super().__init__()
        self.spec = spec
        shapes = ((spec.hidden, WIDTH), (WIDTH, spec.hidden))
        if spec.form in ("matmul", "einsum", "addmm"):
            shapes = (shapes[0][::-1], shapes[1][::-1])
        if spec.form == "conv":
            shapes = ((*shapes[0], 1), (*shapes[1], 1))
        self.first, self.second = (nn.Parameter(torch.randn(shape) / 4) for shape in shapes)
        self.second.requires_grad_(not spec.frozen)
        if spec.modulation == "condition":
            self.modulator = nn.Parameter(torch.randn(2 * spec.hidden, CONDITION) / 4)
        elif spec.modulation in RIVALS:
            self.modulator = nn.Parameter(torch.randn(spec.hidden, WIDTH) / 4)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        match self.spec.form:
            case "matmul":
                return x @ weight
            case "einsum":
                return torch.einsum("bnc,cd->bnd", x, weight)
            case "addmm":
                return torch.addmm(torch.zeros(weight.shape[1], dtype=x.dtype), x.flatten(0, 1), weight).view(*x.shape[:2], -1)
            case "conv":
                return F.conv1d(x.mT, weight).mT
        return F.linear(x, weight)

    def once(self, x: Tensor, side: Side) -> Tensor:
        change = HARMLESS | BREAKING
        h = change[self.spec.before](self.apply_weight(x, self.first))
        h = (MODULATIONS | RIVALS)[self.spec.modulation](self, h, side)
        if self.spec.activation is not None:
            h = ACTIVATIONS[self.spec.activation](h)
        y = self.apply_weight(change[self.spec.after](h), self.second)
        return y + h[..., :WIDTH] if self.spec.leak else y

    def forward(self, x: Tensor, *side: Tensor) -> Tensor:
        for _ in range(self.spec.calls):
            y = self.once(normed(x), Side(*side, input=normed(x)))
            x = x + y if self.spec.residual else normed(x) + x.tanh() * y
        return x


@dataclass(frozen=True)
class Gate:
    """down(activation(gate(x)) * up(x)); `fused`: gate and up are rows of one weight."""

    hidden: int = 16
    activation: str | None = "gelu"
    fused: bool = False
    up_first: bool = False
    after: str = "nothing"
    modulation: str = "nothing"

    @property
    def sites(self) -> list[Expected]:
        if self.activation is None or self.after in BREAKING:
            return []
        return [("glu", ("up", "down") if self.fused else ("gate", "up", "down"))]


class GateBlock(nn.Module):
    def __init__(self, spec: Gate) -> None:
        super().__init__()
        self.spec = spec
        self.up = nn.Parameter(torch.randn(spec.hidden * (2 if spec.fused else 1), WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(WIDTH, spec.hidden) / 4)
        self.gate = None if spec.fused else nn.Parameter(torch.randn(spec.hidden, WIDTH) / 4)
        if spec.modulation == "condition":
            self.modulator = nn.Parameter(torch.randn(2 * spec.hidden, CONDITION) / 4)

    def forward(self, x: Tensor, *side: Tensor) -> Tensor:
        y = normed(x)
        up, gate = F.linear(y, self.up).chunk(2, -1) if self.gate is None else (F.linear(y, self.up), F.linear(y, self.gate))
        gate = gate if self.spec.activation is None else ACTIVATIONS[self.spec.activation](gate)
        h = MODULATIONS[self.spec.modulation](self, up * gate if self.spec.up_first else gate * up, Side(*side, input=y))
        return x + F.linear((HARMLESS | BREAKING)[self.spec.after](h), self.down)


@dataclass(frozen=True)
class Attend:
    """Attention: the weights `apart`, rows of one, or of three dimensions by `einsum` or `view`; the products written out or fused.

    `rotary`: by positions that are an input; `values`: written into a cache with the keys, masked, or added to others that fit as well.
    """

    weights: str = "apart"
    written_out: bool = False
    softmax: bool = True
    heads: int = 2
    after: str = "nothing"
    rotary: bool = False
    values: str = "plain"

    @property
    def sites(self) -> list[Expected]:
        if (self.written_out and not self.softmax) or (self.values == "residual" and self.after == "mean"):
            return []
        inner = self.inner + (("other",) if self.values == "residual" else ())
        return [("attention", inner if self.after == "mean" else (*inner, "proj"))]

    @property
    def inner(self) -> tuple[str, ...]:
        return {"kv": ("q", "kv"), "qkv": ("qkv",)}.get(self.weights, ("q", "k", "v"))


class AttendBlock(nn.Module):
    def __init__(self, spec: Attend) -> None:
        super().__init__()
        self.spec = spec
        for name in (*spec.inner, "proj"):
            shape: tuple[int, ...] = ((1 if name == "proj" else len(name)) * WIDTH, WIDTH)
            if spec.weights in ("einsum", "view"):
                apart = (spec.heads, WIDTH // spec.heads)
                shape = (*apart, WIDTH) if name == "proj" else (WIDTH, *apart)
            setattr(self, name, nn.Parameter(torch.randn(shape) / 4))
        if spec.values == "residual":
            self.other = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def apply_weight(self, x: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)
        match self.spec.weights, name:
            case "einsum", "proj":
                return torch.einsum("bnhk,hkc->bnc", x.unflatten(-1, weight.shape[:2]), weight)
            case "einsum", _:
                return torch.einsum("bnc,chk->bnhk", x, weight).flatten(-2)
            case "view", _:
                return x @ weight.view(WIDTH, WIDTH)
        return F.linear(x, weight)

    def forward(self, x: Tensor, mask: Tensor, condition: Tensor, positions: Tensor) -> Tensor:
        parts = [part for name in self.spec.inner for part in self.apply_weight(normed(x), name).split(WIDTH, -1)]
        q, k, v = (part.unflatten(-1, (self.spec.heads, -1)).transpose(1, 2) for part in parts)
        if self.spec.rotary:
            q, k = (turned(part, positions) for part in (q, k))
        match self.spec.values:
            case "residual":
                v = v + F.linear(normed(x), self.other).unflatten(-1, (self.spec.heads, -1)).transpose(1, 2) / 2
            case "masked":
                v = v * mask[:, None]
            case "cached":
                k, v = (cached(part) for part in (k, v))
        if self.spec.written_out:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            y = (scores.softmax(-1) if self.spec.softmax else scores.sigmoid()) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return x + self.apply_weight((HARMLESS | BREAKING)[self.spec.after](y.transpose(1, 2).flatten(-2)), "proj")


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding."""
    angles = positions[:, None] / torch.arange(1.0, x.shape[-1] + 1, dtype=x.dtype)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


def cached(x: Tensor) -> Tensor:
    """As it is read from a longer memory into which it was written."""
    memory = x.new_zeros(*x.shape[:2], x.shape[2] + 2, x.shape[3])
    memory[:, :, : x.shape[2]] = x
    return memory


@dataclass(frozen=True)
class Joint:
    """Attention over two streams joined along the sequence, each with weights of its own; the second is the condition."""

    written_out: bool = False

    @property
    def sites(self) -> list[Expected]:
        return [("attention", ("q", "k", "v", "proj", "aq", "ak", "av", "aproj"))]


class JointBlock(nn.Module):
    def __init__(self, spec: Joint) -> None:
        super().__init__()
        self.spec = spec
        for name in ("q", "k", "v", "proj"):
            setattr(self, name, nn.Parameter(torch.randn(WIDTH, WIDTH) / 4))
            shape = (CONDITION, WIDTH) if name == "proj" else (WIDTH, CONDITION)
            setattr(self, f"a{name}", nn.Parameter(torch.randn(shape) / 4))

    def forward(self, x: Tensor, mask: Tensor, condition: Tensor, positions: Tensor) -> Tensor:
        both = [torch.cat((F.linear(normed(x), getattr(self, n)), F.linear(condition, getattr(self, f"a{n}"))), 1) for n in "qkv"]
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in both)
        y = (q @ k.mT).softmax(-1) @ v if self.spec.written_out else F.scaled_dot_product_attention(q, k, v)
        first, second = y.transpose(1, 2).flatten(2).split([TOKENS, condition.shape[1]], 1)
        return x + F.linear(first, self.proj) + F.linear(second, self.aproj).mean()


@dataclass(frozen=True)
class Parallel:
    """Attentions, gated and plain units side by side, so many of each: one weight makes what they work with, in any order of `roles`.

    `frozen`: their last weights that are not trained. Roles are named by a letter and the number of the unit.
    """

    attentions: int
    gates: int
    plain: int
    roles: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    transposed: bool = False
    hidden: int = 12

    @property
    def lasts(self) -> list[str]:
        counts = {"o": self.attentions, "d": self.gates, "e": self.plain}
        return [f"{letter}{i}" for letter, count in counts.items() for i in range(count)]

    @property
    def sites(self) -> list[Expected]:
        units = [name for name in self.lasts if name[0] != "o" and name not in self.frozen]
        found = [("glu" if name[0] == "d" else "mlp", ("w", name)) for name in units]
        return [("attention", ("w", f"o{i}")) for i in range(self.attentions)] + found


class ParallelBlock(nn.Module):
    def __init__(self, spec: Parallel) -> None:
        super().__init__()
        self.spec = spec
        self.widths = [spec.hidden if role[0] in "guh" else WIDTH for role in spec.roles]
        shape = (sum(self.widths), WIDTH)
        self.w = nn.Parameter(torch.randn(shape[::-1] if spec.transposed else shape) / 4)
        for name in spec.lasts:
            last = nn.Parameter(torch.randn(WIDTH, WIDTH if name[0] == "o" else spec.hidden) / 4)
            setattr(self, name, last.requires_grad_(name not in spec.frozen))

    def forward(self, x: Tensor, *side: Tensor) -> Tensor:
        y = normed(x) @ self.w if self.spec.transposed else F.linear(normed(x), self.w)
        part = dict(zip(self.spec.roles, y.split(self.widths, -1), strict=True))
        for name in self.spec.lasts:
            i = name[1:]
            if name[0] == "o":
                q, k, v = (part[role + i].unflatten(-1, (2, -1)).transpose(1, 2) for role in "qkv")
                hidden = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
            elif name[0] == "d":
                hidden = F.silu(part["g" + i]) * part["u" + i]
            else:
                hidden = F.gelu(part["h" + i])
            x = x + F.linear(hidden, getattr(self, name))
        return x


BETWEEN = {name: HARMLESS[name] for name in ("nothing", "dropout", "norm", "rms", "split")}
BREAKING_BETWEEN = {"flip": lambda h: h.flip(-1), "shuffle": BREAKING["shuffle"], "experts": lambda h: h.flip(-3)}


@dataclass(frozen=True)
class Experts:
    """Feed-forward layers side by side in one tensor, (experts, in, out); their results are summed, each `scored` or not, by `form`."""

    form: str = "einsum"
    experts: int = 3
    hidden: int = 12
    activation: str | None = "relu"
    after: str = "nothing"
    gated: bool = False

    @property
    def sites(self) -> list[Expected]:
        if self.activation is None or (self.after in BREAKING_BETWEEN and (self.after != "experts" or self.experts > 1)):
            return []
        return [("glu", ("gate", "first", "second")) if self.gated else ("mlp", ("first", "second"))]


class ExpertsBlock(nn.Module):
    def __init__(self, spec: Experts) -> None:
        super().__init__()
        self.spec = spec
        self.first, self.gate = (nn.Parameter(torch.randn(spec.experts, WIDTH, spec.hidden) / 4) for _ in range(2))
        self.second = nn.Parameter(torch.randn(spec.experts, spec.hidden, WIDTH) / 4)
        self.router = nn.Parameter(torch.randn(spec.experts, WIDTH) / 4)

    def up(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if self.spec.form in ("bmm", "matmul") else torch.einsum("bnc,ecf->benf", x, weight)

    def forward(self, x: Tensor, mask: Tensor, condition: Tensor, positions: Tensor) -> Tensor:
        y = given = normed(x)
        match self.spec.form:
            case "bmm":
                given = y.flatten(0, 1).expand(self.spec.experts, -1, -1)
            case "matmul":
                given = y.unsqueeze(1)
        h = self.up(given, self.first)
        activation = ACTIVATIONS.get(self.spec.activation or "", lambda h: h)
        h = activation(self.up(given, self.gate)) * h if self.spec.gated else activation(h)
        h = (BETWEEN | BREAKING_BETWEEN)[self.spec.after](h)
        match self.spec.form:
            case "bmm":
                y = torch.bmm(h, self.second).sum(0).view_as(x)
            case "matmul":
                y = (h @ self.second).sum(1)
            case "scored":
                y = torch.einsum("benf,efc,bne->bnc", h, self.second, F.linear(y, self.router).softmax(-1))
            case _:
                y = torch.einsum("benf,efc->bnc", h, self.second)
        return x + y


Spec = Chain | Gate | Attend | Joint | Parallel | Experts
BLOCKS = {Chain: ChainBlock, Gate: GateBlock, Attend: AttendBlock, Joint: JointBlock, Parallel: ParallelBlock, Experts: ExpertsBlock}

changes = st.sampled_from([*HARMLESS] * 3 + [*BREAKING])
sizes = st.sampled_from((8, 12, 16))
seldom = st.sampled_from((False, False, False, True))
chains = st.builds(
    Chain,
    form=st.sampled_from(FORMS),
    hidden=sizes,
    activation=st.sampled_from([*ACTIVATIONS, None]),
    before=changes,
    after=changes,
    modulation=st.sampled_from(["nothing"] * 4 + [*MODULATIONS, *RIVALS]),
    leak=seldom,
    residual=st.booleans(),
    frozen=seldom,
    calls=st.sampled_from((1, 1, 2)),
    borrows=st.sampled_from((None, None, None, "first", "second")),
)
gates = st.builds(
    Gate,
    sizes,
    st.sampled_from(("relu", "gelu", "square", None)),
    st.booleans(),
    st.booleans(),
    changes.filter(lambda change: change != "split"),  # a product in parts is not recognised
    st.sampled_from(["nothing", *MODULATIONS]),
)
attentions = st.builds(
    Attend,
    st.sampled_from(("apart", "kv", "qkv", "einsum", "view")),
    st.booleans(),
    st.booleans(),
    st.sampled_from((1, 2)),
    st.sampled_from(("nothing", "mean")),
    st.booleans(),
    st.sampled_from(("plain", "plain", "residual", "masked", "cached")),
)
joints = st.builds(Joint, st.booleans())


experts = st.builds(
    Experts,
    st.sampled_from(("einsum", "scored", "bmm", "matmul")),
    st.sampled_from((1, 2, 3)),
    sizes,
    st.sampled_from([*ACTIVATIONS, None]),
    st.sampled_from([*BETWEEN, *BREAKING_BETWEEN]),
    st.booleans(),
).filter(lambda spec: not (spec.gated and spec.after == "split"))  # a product in parts is not recognised


@st.composite
def parallels(draw: st.DrawFn) -> Parallel:
    counts = draw(st.sampled_from([(1, 1, 0), (2, 0, 0), (0, 2, 0), (2, 1, 0), (1, 2, 0), (1, 0, 1), (0, 1, 1), (0, 0, 2), (1, 1, 1)]))
    roles = [f"{role}{i}" for letters, count in zip(("qkv", "gu", "h"), counts, strict=True) for i in range(count) for role in letters]
    spec = Parallel(*counts, tuple(draw(st.permutations(roles))), transposed=draw(st.booleans()))
    return replace(spec, frozen=tuple(name for name in spec.lasts if draw(seldom)))


class Serial(nn.Sequential):
    def forward(self, x: Tensor, *side: Tensor) -> Tensor:
        for block in self:
            x = block(x, *side)
        return x


@dataclass(frozen=True)
class Network:
    """Blocks one after another, each so many modules deep; `again`: the first one once more at the end."""

    blocks: tuple[Spec, ...]
    depths: tuple[int, ...]
    again: bool

    def build(self) -> Serial:
        blocks = [BLOCKS[type(spec)](spec) for spec in self.blocks]  # type: ignore[arg-type]
        for borrower, lender, name in self.loans():
            setattr(blocks[borrower], name, getattr(blocks[lender], name))
        model = Serial()
        for block, depth in zip(blocks, self.depths, strict=False):
            for _ in range(depth):
                block = Serial(block)
            model.append(block)
        return model.append(model[0]) if self.again else model

    def loans(self) -> list[tuple[int, int, str]]:
        found = []
        for i, spec in enumerate(self.blocks):
            lenders = [
                j
                for j, other in enumerate(self.blocks[:i])
                if isinstance(other, Chain) and isinstance(spec, Chain) and other.lends_to(spec)
            ]
            if isinstance(spec, Chain) and spec.borrows is not None and lenders:
                found.append((i, lenders[0], spec.borrows))
        return found

    def sites(self, rules: Sequence[str], exclude: int | None) -> set[tuple[str, frozenset[str]]]:
        lent = {i for borrower, lender, _ in self.loans() for i in (borrower, lender)}
        found = set()
        for i, (spec, depth) in enumerate(zip(self.blocks, self.depths, strict=False)):
            for kind, names in spec.sites:
                if kind in rules and i != exclude and i not in lent:
                    path = ".".join([str(i), *["0"] * depth])
                    found.add((kind, frozenset(f"{path}.{name}" for name in names)))
        return found


networks = st.builds(
    Network,
    blocks=st.lists(st.one_of(chains, chains, gates, attentions, joints, parallels(), experts), min_size=1, max_size=4).map(tuple),
    depths=st.tuples(*[st.integers(0, 2)] * 4),
    again=seldom,
)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks(part: int) -> None:
    @seed(part)
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate])
    @given(
        network=networks,
        rules=st.one_of(st.just(KINDS), st.lists(st.sampled_from(KINDS), min_size=1, unique=True)),
        exclude=st.one_of(st.none(), st.none(), st.integers(0, 3)),
        share=st.dictionaries(st.sampled_from(KINDS), st.sampled_from((2, 2, 3, "all"))),
        ring=st.lists(st.sampled_from(KINDS), unique=True),
        mix=st.sampled_from(MIXES),
        gain=st.booleans(),
        init=st.sampled_from(("keep", "keep", *INITS)),
    )
    def check(
        network: Network,
        rules: Sequence[str],
        exclude: int | None,
        share: dict[str, int | str],
        ring: Sequence[str],
        mix: str,
        gain: bool,
        init: str,
    ) -> None:
        torch.manual_seed(0)
        model = network.build().double()
        before = copy.deepcopy(model.state_dict())
        x, condition = (torch.randn(2, TOKENS, width, dtype=torch.float64) for width in (WIDTH, CONDITION))
        mask = (torch.arange(TOKENS) < 4).to(x)[:, None].expand(2, -1, -1)
        inputs = (x, mask, condition, torch.arange(TOKENS).to(x))

        left_out = None if exclude is None else [f"{exclude}.*"]
        across = [kind for kind in ring if kind not in share]
        plan = pe_fx.plan(model, inputs, rules=rules, exclude=left_out, share=share, across=across, mix=mix, gain=gain)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        tied = {(site.kind, frozenset(site.weights)) for site in plan.sites if site.kind in rules}
        assert tied == network.sites(rules, exclude), f"{plan}\n{plan.explain()}"
        assert {site.kind for site in plan.sites} <= {*rules, *share}
        assert pe_fx.Plan.from_json(plan.to_json()) == plan

        try:
            result = pe_fx.apply(model, plan, init=init)
        except pe_fx.PeFxError as error:  # experts' matrices of two layouts in one weight
            if init != "fit" or "no reordering of the other" not in str(error):
                raise
            result = pe_fx.apply(model, plan, init="mean")
        assert sum(parameter.numel() for parameter in result.parameters()) == plan.params_after
        if plan.sites:
            if init == "keep":
                assert_equals_twin(model, result, plan, inputs)
            dense = pe_fx.untie(result)
            torch.manual_seed(0)
            expected = result(*inputs)
            torch.manual_seed(0)
            torch.testing.assert_close(dense(*inputs), expected)

    check()


def test_random_stages() -> None:
    """Blocks of one kind in a row, whose matrices they share, tied or not."""
    rule_lists = st.one_of(st.just([]), st.lists(st.sampled_from(KINDS), unique=True))

    @seed(0)
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate])
    @given(
        spec=st.one_of(chains, gates, attentions, joints, parallels(), experts),
        count=st.integers(2, 5),
        rules=rule_lists,
        share=st.dictionaries(st.sampled_from(KINDS), st.sampled_from((2, 2, 3, "all")), min_size=3),
        mix=st.sampled_from(MIXES),
    )
    def check(spec: Spec, count: int, rules: Sequence[str], share: dict[str, int | str], mix: str) -> None:
        torch.manual_seed(0)
        model = Network((spec,) * count, (0,) * count, False).build().double()
        x, condition = (torch.randn(2, TOKENS, width, dtype=torch.float64) for width in (WIDTH, CONDITION))
        inputs = (x, torch.ones_like(x[..., :1]), condition, torch.arange(TOKENS).to(x))
        plan = pe_fx.plan(model, inputs, rules=rules, share=share, mix=mix)
        tied = pe_fx.apply(model, plan)
        assert sum(parameter.numel() for parameter in tied.parameters()) == plan.params_after
        if plan.sites:
            assert_equals_twin(model, tied, plan, inputs)
            assert not pe_fx.plan(tied, inputs, rules=rules, share=share, mix=mix).sites

    check()
