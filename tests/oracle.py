"""An independent oracle: the dense twin of a tied model by plain index arithmetic on the plan's ties, and short helpers for tests."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

import pe_fx
from pe_fx import Plan
from pe_fx.compiled.dynamo import CustomGraphPass
from pe_fx.tied.assembly import Mix
from pe_fx.tied.layouts import mix_of
from pe_fx.ties import Block, Miss, Tie

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]


class Net(nn.Module):
    """A model written inline: its members (modules, weights) by name, and its forward as a function of itself and the inputs."""

    def __init__(self, forward: Callable[..., Any], **members: nn.Module | Tensor) -> None:
        super().__init__()
        self.body = forward
        for name, member in members.items():
            bare = isinstance(member, Tensor) and not isinstance(member, nn.Parameter)
            setattr(self, name, nn.Parameter(member) if bare else member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


class Recorder(CustomGraphPass):
    """Keeps the graphs that Inductor generates code for: the forward, then the backward."""

    def __init__(self) -> None:
        self.graphs: list[fx.Graph] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs.append(copy.deepcopy(graph))

    def uuid(self) -> Any:
        return None


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


every_parametrization = pytest.mark.parametrize(
    "register",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        parametrizations.spectral_norm,
        lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    ],
    ids=["weight_norm", "orthogonal", "spectral_norm", "custom"],
)
"""Runs a test with every way to parametrize a module's weight, as `register(module)`."""


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def ties(plan: Plan) -> list[str]:
    return [str(tie) for tie in plan.ties]


def assert_hit(model: nn.Module, inputs: Inputs, *expected: str, kind: str, **options: Any) -> nn.Module:
    """The plan holds exactly these ties, all of `kind`, and the tied model computes what its dense twin does. Returns it."""
    made = pe_fx.plan(model, inputs, **options)
    assert sorted(ties(made)) == sorted(expected), f"{made}\n{made.explain()}"
    assert {site.kind for site in made.sites} == {kind}
    tied = pe_fx.apply(model, made)
    assert_equals_twin(model, tied, made, inputs)
    return tied


def assert_miss(model: nn.Module, inputs: Inputs, reason: str, *, kind: str = "mlp", weights: Sequence[str] = (), **options: Any) -> Miss:
    """Nothing is tied, and a miss of `kind` gives a reason that matches, naming the weights. Returns it."""
    made = pe_fx.plan(model, inputs, **options)
    assert not made.sites, str(made)
    found = [miss for miss in made.misses if miss.kind == kind and re.search(reason, miss.reason)]
    assert found, f"no {kind} miss matches {reason!r}:\n{made.explain()}"
    for name in weights:
        assert name in found[0].weights
        assert name in found[0].reason
    return found[0]


def assert_idempotent(model: nn.Module, inputs: Inputs, **options: Any) -> nn.Module:
    """Transforming twice changes nothing more and does not warn (pytest makes NoSitesWarning an error)."""
    once = pe_fx.transform(model, inputs, **options)
    twice = pe_fx.transform(once, inputs, **options)
    before, after = once.state_dict(), twice.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [type(module) for module in once.modules()] == [type(module) for module in twice.modules()]
    assert not pe_fx.plan(once, inputs, **options).sites
    return once


def assert_equals_twin(dense: nn.Module, tied: nn.Module, plan: Plan, inputs: Inputs, tolerance: float = 1e-4) -> None:
    """Outputs, buffers and gradients of `tied` are those of the dense model with every target block set to its source block."""
    tied = copy.deepcopy(tied)
    gains = {name: parameter for name, parameter in tied.named_parameters() if name.endswith("_gain")}
    with torch.no_grad():
        for gain in gains.values():
            gain.uniform_(0.5, 2)
    twin = dense_twin(dense, plan, gains)
    kept = {name: _untied(twin.get_parameter(name), plan, name) for name, _ in dense.named_parameters()}
    now = {name: name if bool(mask.all()) else f"{name}_kept" for name, mask in kept.items() if bool(mask.any())}
    stored = {name: parameter for name, parameter in tied.named_parameters() if name not in gains}
    assert set(stored) == set(now.values()), f"parameters differ: {sorted(set(stored) ^ set(now.values()))}"
    assert set(gains) == {f"{tie.target}_gain" for tie in plan.ties if tie.gain is not None}
    for name, own in now.items():
        entries = int(kept[name].sum())
        assert stored[own].numel() == entries, f"{own} stores {tuple(stored[own].shape)} for {entries} untied entries"
    for training in (True, False):
        mode = "train" if training else "eval"
        got, expected = _run(copy.deepcopy(tied).train(training), inputs), _run(copy.deepcopy(twin).train(training), inputs)
        _compare(got.outputs, expected.outputs, f"{mode} output", tolerance)
        _compare(got.buffers, expected.buffers, f"{mode} buffer", tolerance)
        _compare(got.input_gradients, expected.input_gradients, f"{mode} gradient of input", tolerance)
        mapped = {own: _mapped(name, expected.gradients, plan, kept[name], stored[own].shape, gains) for name, own in now.items()}
        mapped |= {name: _gain_gradient(name, expected.gradients, plan, twin, gain) for name, gain in gains.items()}
        _compare(got.gradients, mapped, f"{mode} gradient of", tolerance)


def dense_twin(dense: nn.Module, plan: Plan, gains: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of the dense model in which every target block holds the values of its source block."""
    twin = copy.deepcopy(dense)
    with torch.no_grad():
        for tie in plan.ties:
            target, source = twin.get_parameter(tie.target), twin.get_parameter(tie.source)
            target_index, source_index = positions(tie)
            flat = target.detach().reshape(-1).clone()
            flat[target_index] = source.detach().reshape(-1)[source_index] * factors(tie, plan, gains)
            target.copy_(flat.reshape(target.shape))
    return twin


def positions(tie: Tie) -> tuple[Tensor, Tensor]:
    """For each entry of the target block its position in the flattened target, and that of its value in the flattened source."""
    target = _flat_positions(tie.into)
    source = _flat_positions(tie.of)
    if tie.spread is not None:
        target, source = (each.permute(rows + columns) for each, (rows, columns) in zip((target, source), tie.spread, strict=True))
        target, source = target.reshape(matrix_shape(tie)), source.reshape(matrix_shape(tie))
    elif tie.transposed:
        first, second = tie.axes
        order = list(range(source.dim()))
        order[first], order[second] = second, first
        source = source.permute(order)
    source = source.reshape(target.shape)
    if tie.seed is not None:
        source = source.index_select(channel_axis(tie), torch.tensor(signed_order(tie)[0]))
    if tie.order is not None:
        source = source.index_select(tie.channel_axes[1], torch.tensor(tie.order.places))
    return target.reshape(-1), source.reshape(-1)


def matrix_shape(tie: Tie) -> tuple[int, ...]:
    """The shape that a variant sees: the target's, or that of the rows and columns that its dimensions make up."""
    if tie.spread is None:
        return tie.into.shape
    return tuple(math.prod(tie.into.shape[dim] for dim in dims) for dims in tie.spread[0])


def channel_axis(tie: Tie) -> int:
    return (tie.channels or 0) if tie.spread is None else 1


def signed_order(tie: Tie) -> tuple[list[int], list[int]]:
    """Which channel of the source stands at each position of the target, and with what sign, by dealing cards one after another."""
    mix = mix_of(tie)
    assert isinstance(mix, Mix)
    piles: list[list[int]] = [[] for _ in range(mix.hands)]
    for card in range(matrix_shape(tie)[channel_axis(tie)]):
        piles[card % mix.hands].append(card)
    cards = [card for pile in piles for card in pile]
    half = len(cards) // 2
    return cards, [-1] * half + [1] * (len(cards) - half)


def factors(tie: Tie, plan: Plan, gains: Mapping[str, Tensor] | None = None) -> Tensor:
    """What each entry of the target block is multiplied with."""
    result = torch.ones(matrix_shape(tie))
    along = [1] * result.dim()
    along[channel_axis(tie)] = -1
    if tie.order is not None:
        signs = torch.tensor(tie.order.signs).view([-1 if axis == tie.channel_axes[1] else 1 for axis in range(result.dim())])
        result = result * signs * tie.order.factor
    if isinstance(mix_of(tie), Mix):
        across = tie.channel_axes[1]
        result = result * torch.tensor(signed_order(tie)[1]).view(along)
        result.narrow(across, 0, result.shape[across] // 2).neg_()
    if tie.gain is not None:
        learned = gains[f"{tie.target}_gain"].detach()[_own_gains(tie, plan)] if gains else torch.full((tie.gains,), tie.gain)
        result = result * learned.view(along)
    return result.reshape(-1)


def _own_gains(tie: Tie, plan: Plan) -> slice:
    """The place of a tie's learned factors among those of its weight."""
    start = 0
    for other in plan.ties:
        if other == tie:
            break
        start += other.gains if other.target == tie.target else 0
    return slice(start, start + tie.gains)


def _gain_gradient(name: str, gradients: dict[str, Tensor | None], plan: Plan, twin: nn.Module, gain: Tensor) -> Tensor | None:
    """The gradient of learned factors: of each, the sum over its channel of gradient times unscaled weight."""
    total = torch.zeros_like(gain)
    for tie in plan.ties:
        gradient = gradients[tie.target]
        if tie.gain is None or f"{tie.target}_gain" != name:
            continue
        if gradient is None:
            return None
        target_index, _ = positions(tie)
        shape = matrix_shape(tie)
        share = (gradient * twin.get_parameter(tie.target).detach()).reshape(-1)[target_index].reshape(shape)
        others = [axis for axis in range(len(shape)) if axis != channel_axis(tie)]
        total[_own_gains(tie, plan)] = share.sum(others) / gain.detach()[_own_gains(tie, plan)]
    return total


def _flat_positions(block: Block) -> Tensor:
    result = torch.zeros((), dtype=torch.long)
    for ranges, size in zip(block.ranges, block.full_shape, strict=True):
        here = torch.tensor([position for start, stop in ranges for position in range(start, stop)])
        result = result.unsqueeze(-1) * size + here
    return result


def _untied(parameter: Tensor, plan: Plan, name: str) -> Tensor:
    """Flat mask of the entries that no tie takes."""
    mask = torch.ones(parameter.numel(), dtype=torch.bool)
    for tie in plan.ties:
        if tie.target == name:
            mask[positions(tie)[0]] = False
    return mask


def _mapped(
    name: str, gradients: dict[str, Tensor | None], plan: Plan, kept: Tensor, shape: torch.Size, gains: Mapping[str, Tensor]
) -> Tensor | None:
    """The gradient that a stored parameter must have: its own, and those of all entries that are views of it."""
    into = [tie for tie in plan.ties if tie.source == name and gradients[tie.target] is not None]
    own = gradients[name]
    if own is None and not into:
        return None
    total = torch.zeros(kept.numel()) if own is None else own.reshape(-1).clone()
    for tie in into:
        target_index, source_index = positions(tie)
        gradient = gradients[tie.target]
        assert gradient is not None
        through = gradient.reshape(-1)[target_index] * factors(tie, plan, gains)
        total.index_put_((source_index,), through.to(total), accumulate=True)
    return total[kept].reshape(shape)


class _Result:
    outputs: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]
    gradients: dict[str, Tensor | None]
    input_gradients: dict[str, Tensor | None]


def _run(model: nn.Module, inputs: Inputs) -> _Result:
    """Outputs, and the gradients of a fixed random projection of them."""
    named = inputs if isinstance(inputs, dict) else dict(enumerate(inputs if isinstance(inputs, tuple) else (inputs,)))
    leaves = {
        key: value.detach().clone().requires_grad_()
        for key, value in named.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    passed = {key: leaves[key].clone() if key in leaves else value for key, value in named.items()}
    torch.manual_seed(0)
    outputs = _tensors(model(**passed) if isinstance(inputs, dict) else model(*passed.values()))
    generator = torch.Generator("cpu").manual_seed(1)
    drawn = [torch.randn(output.shape, generator=generator, device="cpu").to(output.device) for output in outputs if output.requires_grad]
    projected = [(output * some).sum() for output, some in zip((each for each in outputs if each.requires_grad), drawn, strict=True)]
    if projected:
        torch.stack(projected).sum().backward()
    result = _Result()
    result.outputs = {str(i): output.detach() for i, output in enumerate(outputs)}
    result.buffers = dict(model.named_buffers())
    result.gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    result.input_gradients = {str(key): leaf.grad for key, leaf in leaves.items()}
    return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _compare(got: dict[str, Tensor | None], expected: dict[str, Tensor | None], what: str, tolerance: float) -> None:
    assert set(got) == set(expected), f"{what}s: {sorted(set(got) ^ set(expected))} in one only"
    norms = {name: float(value.double().norm()) for name, value in expected.items() if value is not None}
    floor = 1e-3 * max(norms.values(), default=0.0) + 1e-12
    for name, value in expected.items():
        mine = got[name]
        assert (mine is None) == (value is None), f"{what} {name}: {'none' if mine is None else 'one'} in the tied model only"
        if mine is None or value is None:
            continue
        assert mine.shape == value.shape, f"{what} {name}: {tuple(mine.shape)}, the twin's is {tuple(value.shape)}"
        error = float((mine.double() - value.double()).norm()) / max(norms[name], floor)
        assert error < tolerance, f"{what} {name}: relative error {error:.1e}"


def mlp(hidden: int = 16) -> nn.Sequential:
    return nn.Sequential(linear(8, hidden), nn.GELU(), linear(hidden, 8))


def blocks(depth: int) -> nn.Module:
    """Residual blocks, each an mlp, and a head."""

    def forward(m: Net, x: Tensor) -> Tensor:
        for block in m.blocks:
            x = x + block(x)
        return m.head(x)

    return Net(forward, blocks=nn.ModuleList(mlp() for _ in range(depth)), head=linear(8, 3))
