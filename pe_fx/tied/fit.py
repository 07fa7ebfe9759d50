"""Ties fitted to a trained model: the order in which a weight reads its source, and the values of the source.

Of a tie `W₂ = c Wᵀ Π T`, Π T pairs each column of W₂ with the row of W₁ that it comes nearest to, up to its sign; then W makes the
weighed distance to both least. What a deviation of a weight counts is seen in calibration: the second moments of what it is
multiplied with on one side, and those of the gradients of what comes out on the other.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pe_fx.errors import PeFxError
from pe_fx.text import with_progress
from pe_fx.tied.assembly import Fitted
from pe_fx.tied.layouts import layout_of
from pe_fx.tied.moments import Moments
from pe_fx.ties import Block, Order, Plan, Tie

DAMPING = 0.1
"""What is added to the second moments, as a part of their mean: what a few batches show of directions is not all."""

STEPS = 100
"""Of conjugate gradients at most."""


@dataclass
class Use:
    """A use of a source: for each entry of a matrix the place in the source and a factor, and the values that the matrix had.

    The second moments of its `rows`' and `columns`' counterparts weigh a deviation from these.
    """

    places: Tensor
    factors: Tensor
    values: Tensor
    rows: Tensor
    columns: Tensor

    def turned(self) -> Use:
        return Use(self.places.t(), self.factors.t(), self.values.t(), self.columns, self.rows)


class Fit:
    """The weights of a model, and what was seen of them; without `moments` all entries of a weight count alike."""

    def __init__(self, model: nn.Module, moments: Moments | None) -> None:
        self.moments = moments
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}

    def own_use(self, tie: Tie) -> Use:
        """Of the source, by itself."""
        places, factors = reading(dataclasses.replace(tie, seed=None, order=None, gain=None))
        return self._use(tie.source, places, places, factors)

    def tied_use(self, tie: Tie) -> Use:
        """Of the source, as the target."""
        return self._use(tie.target, as_matrix(tie, positions(tie.into)), *reading(tie))

    def _use(self, name: str, own: Tensor, places: Tensor, factors: Tensor) -> Use:
        weight = self.weights.get(name)
        if weight is None or weight.is_meta:
            raise PeFxError(f"{name} has no values here that a tie could be fitted to: load the weights before, or use mix='signed'")
        if not bool(weight.isfinite().all()):
            raise PeFxError(f"{name} holds values that are not finite: no tie can be fitted to it")
        device = weight.device
        values = weight.reshape(-1)[own.to(device)].double()
        if self.moments is None:
            scale = 1 / values.norm().clamp_min(1e-30)
            rows, columns = (scale * torch.eye(size, dtype=values.dtype, device=device) for size in values.shape)
        else:
            rows, columns = (self._seen(name, line) for line in (own[:, 0], own[0]))
        return Use(places.to(device), factors.to(values), values, rows, columns)

    def _seen(self, name: str, line: Tensor) -> Tensor:
        assert self.moments is not None
        moment = self.moments.along(name, line)
        if moment is None:
            raise PeFxError(
                f"calibration: nothing, or no gradient, was seen at the products with {name}. Give batches that reach it, "
                f"exclude=[{name!r}], or leave calibration out: then ties are fitted to the weights alone"
            )
        return _damped(moment.double())


def fitted(plan: Plan, model: nn.Module, moments: Moments | None = None) -> Plan:
    """The plan with an order for each tie, found in the values of the model's weights.

    >>> import pe_fx
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with torch.no_grad():
    ...     _ = model[2].weight.copy_(-0.5 * model[0].weight[[2, 0, 1]].t())
    >>> fitted(pe_fx.plan(model), model).ties[0].order
    Order(code='BQABAAMA', factor=0.5)

    A target that changes its shape has no values to fit to, and keeps the order of its source.
    """
    fit = Fit(model, moments)

    def with_order(tie: Tie) -> Tie:
        has_order = tie.channels is not None and plan.shapes[tie.target] == tie.into.full_shape
        return dataclasses.replace(tie, order=_order(fit, tie)) if has_order else tie

    sites = [site.with_ties(map(with_order, site.ties)) for site in with_progress(plan.sites, "fitting orders")]
    return dataclasses.replace(plan, sites=tuple(sites))


def _order(fit: Fit, tie: Tie) -> Order:
    """Pairs that add least to the weighed distance, if W were chosen for each pair by itself and its entries counted alike."""
    own, tied = fit.own_use(tie), fit.tied_use(tie)
    if tie.spread is None and tie.channel_axes[1] != tie.axes[0]:
        own, tied = own.turned(), tied.turned()  # what has an order are the rows
    norms = [float(use.values.norm()) for use in (own, tied)]
    if not all(norms):
        return Order.of(range(len(own.values)), [1] * len(own.values))
    scale = norms[1] / norms[0]
    root = torch.linalg.cholesky(own.columns / own.columns.trace() + tied.columns / tied.columns.trace())
    first, second = own.values @ root, tied.values @ root / scale
    inner = first @ second.t()
    reads, writes = (use.rows.diagonal() * use.columns.diagonal().mean() for use in (own, tied))
    writes = writes * scale**2
    counts = reads[:, None] * writes / (reads[:, None] + writes).clamp_min(1e-300)
    costs = counts * (first.square().sum(1)[:, None] + second.square().sum(1) - 2 * inner.abs())
    columns, rows = _assignment()(costs.t().cpu().numpy())
    signs = [-1 if value < 0 else 1 for value in inner.cpu()[rows, columns].tolist()]
    return Order.of(rows.tolist(), signs, scale / (tie.gain or 1.0))


def _damped(moment: Tensor) -> Tensor:
    """The same, and something in every direction."""
    mean = moment.diagonal().mean().clamp_min(1e-30)
    return moment + DAMPING * mean * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise PeFxError("mix='fitted' pairs rows and columns with scipy: pip install 'pe_fx[fit]', or use mix='signed'") from error
    return linear_sum_assignment


def fitted_sources(plan: Plan, model: nn.Module, moments: Moments | None = None) -> dict[str, Tensor]:
    """Values for the sources of a plan's ties that change all uses of them least, each as it counts.

    >>> import pe_fx
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> new = fitted_sources(pe_fx.plan(model), model)["0.weight"]
    >>> w1, w2 = (layer.weight.detach() for layer in (model[0], model[2]))
    >>> a, b = 1 / w1.norm() ** 2, 1 / w2.norm() ** 2
    >>> torch.allclose(new, (a * w1 + b * w2.t()) / (a + b))
    True
    """
    fit = Fit(model, moments)
    result: dict[str, Tensor] = {}
    for name in with_progress(dict.fromkeys(tie.source for tie in plan.ties), "fitting weights"):
        weight = fit.weights[name]
        source = weight.reshape(-1).double()
        ties = sorted((tie for tie in plan.ties if tie.source == name), key=lambda tie: -tie.of.numel)
        while ties:
            whole = ties[0].of
            here = [tie for tie in ties if tie.of.overlaps(whole)]
            ties = [tie for tie in ties if tie not in here]
            own = fit.own_use(here[0])
            uses = [fit.tied_use(tie) for tie in here if plan.shapes[tie.target] == tie.into.full_shape and tie.gain != 0]
            source[own.places.reshape(-1)] = _nearest([_laid(use, own.places, name) for use in (own, *uses)]).reshape(-1)
        result[name] = source.view(weight.shape).to(weight.dtype)
    return result


class Goal(NamedTuple):
    """Values that W should have, and what counts a deviation D from them: the trace of `rows D columns Dᵀ`."""

    values: Tensor
    rows: Tensor
    columns: Tensor

    def pulled(self, deviation: Tensor) -> Tensor:
        return self.rows @ deviation @ self.columns


def _laid(use: Use, places: Tensor, name: str) -> Goal:
    """The use as a goal for the matrix at these places of the source: its order, signs and factors undone; zero where it reads nothing."""
    height, width = places.shape
    index = places.new_zeros(int(places.max()) + 1)
    index[places] = torch.arange(height * width, device=places.device).view(height, width)
    if int(index[use.places[0, 0]]) // width != int(index[use.places[0, -1]]) // width:
        use = use.turned()
    rows, columns = index[use.places[:, 0]] // width, index[use.places[0]] % width
    if not torch.equal(index[use.places], rows[:, None] * width + columns):
        raise PeFxError(f"init='fit': {name} is read as matrices of which one is no reordering of the other. Use init='mean'")
    factors = use.factors[:, 0], use.factors[0] / use.factors[0, 0]
    values = use.values.new_zeros(height, width)
    values[rows[:, None], columns] = use.values / use.factors
    sides = []
    for size, at, factor, moment in zip(places.shape, (rows, columns), factors, (use.rows, use.columns), strict=True):
        side = moment.new_zeros(size, size)
        side[at[:, None], at] = factor[:, None] * moment * factor
        sides.append(side)
    return Goal(values, *sides)


def _nearest(goals: list[Goal]) -> Tensor:
    """The matrix that misses its goals least, the first of which holds for all of it: by conjugate gradients.

    Where there are two goals, the first step solves the equations: in the bases in which both are diagonal.
    """
    first, rest = goals[0], goals[1:]
    wholes = [goal.rows.trace() * goal.columns.trace() for goal in rest]
    total = sum(wholes, first.rows.new_zeros(())).clamp_min(1e-300)
    rows = sum((goal.rows * goal.columns.trace() for goal in rest), torch.zeros_like(first.rows))
    columns = sum((goal.columns * goal.rows.trace() for goal in rest), torch.zeros_like(first.columns)) / total
    left, right = _common(first.rows, rows), _common(first.columns, columns)
    scale = 1 + left.ratios[:, None] * right.ratios

    def solved(pull: Tensor) -> Tensor:
        return left.basis @ (left.basis.t() @ pull @ right.basis / scale) @ right.basis.t()

    matrix = first.values
    residual = sum((goal.pulled(goal.values - matrix) for goal in rest), torch.zeros_like(matrix))
    direction = solved(residual)
    size = start = (residual * direction).sum()
    for _ in range(STEPS):
        if not size > 1e-12 * start:
            break
        bent = sum((goal.pulled(direction) for goal in goals), torch.zeros_like(matrix))
        step = size / (direction * bent).sum()
        matrix = matrix + step * direction
        residual = residual - step * bent
        next_direction = solved(residual)
        before, size = size, (residual * next_direction).sum()
        direction = next_direction + size / before * direction
    return matrix


class Common(NamedTuple):
    """A basis in which one form is the identity, and another one has these on its diagonal."""

    basis: Tensor
    ratios: Tensor


def _common(one: Tensor, other: Tensor) -> Common:
    root = torch.linalg.cholesky(one)
    half = torch.linalg.solve_triangular(root, other, upper=False)
    ratios, turn = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.t(), upper=False))
    return Common(torch.linalg.solve_triangular(root.t(), turn, upper=True), ratios.clamp_min(0))


def as_matrix(tie: Tie, value: Tensor) -> Tensor:
    """The matrix that a tie is about, of something in the shape of `tie.into`."""
    if tie.spread is not None:
        return value.permute((*tie.spread[0][0], *tie.spread[0][1])).reshape(tie.shape)
    return value.movedim(tie.axes, (0, 1)).flatten(1)


def positions(block: Block) -> Tensor:
    """Where the entries of the block are in its parameter, flat."""
    numbers = torch.arange(math.prod(block.full_shape), device="cpu").view(block.full_shape)
    for dim, ranges in enumerate(block.ranges):
        numbers = torch.cat([numbers.narrow(dim, start, stop - start) for start, stop in ranges], dim)
    return numbers


def reading(tie: Tie) -> tuple[Tensor, Tensor]:
    """For each entry of a tie's matrix its place in the source, flat, and what the entry there is multiplied with."""
    (view,) = layout_of([tie], {}, {}).views
    numbers = torch.arange(1.0, math.prod(tie.of.full_shape) + 1, dtype=torch.float64, device="cpu").view(tie.of.full_shape)
    factor, moves = 1.0 if tie.gain is None else tie.gain, None
    if isinstance(view.mix, Fitted):
        places, signs = view.mix.moves(torch.float64)
        factor, moves = factor * view.mix.order.factor, (places, signs.sign())
    found = as_matrix(tie, view(numbers, None, moves))
    return found.abs().long() - 1, found.sign() * factor
