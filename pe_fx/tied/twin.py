"""The dense twin: back from ties to ordinary parameters, and the proof that both compute the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx, nn

from pe_fx.errors import PeFxError, first_line
from pe_fx.graph.capture import capture, rng_restored
from pe_fx.graph.copies import copied
from pe_fx.graph.inputs import ExampleInputs, as_arguments, tensors_in
from pe_fx.tied.weight import Tied, tied_weights_in, unchoose, untie_weights
from pe_fx.ties import table

TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""For other dtypes 1e-4."""


def untie(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A dense copy of a tied model: every tied weight is an ordinary parameter with its present value. `inplace`: the model itself.

    >>> import pe_fx
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> dense = pe_fx.untie(pe_fx.transform(model))
    >>> type(dense[2]), torch.equal(dense[2].weight, dense[0].weight.t())
    (<class 'torch.nn.modules.linear.Linear'>, True)

    Classes, names, mode, dtypes and devices are those of the model that was transformed, so its state_dict loads there with
    `strict=True`. The entry treatments "slice" and "expand" change what a block computes: their shortcuts stay.
    """
    model = model if inplace else copied(model)
    unchoose(model)
    tied = [module for module in model.modules() if isinstance(module, Tied)]
    weights = [(module, dict(module.tied_weights)) for module in tied]
    dense = {id(module): {name: weight.dense_parameter(module, name) for name, weight in named.items()} for module, named in weights}
    for module in tied:
        untie_weights(module, dense[id(module)])
    for gm in (module for module in model.modules() if isinstance(module, fx.GraphModule)):
        _drop_unused_reads(gm)
    return model


def _drop_unused_reads(gm: fx.GraphModule) -> None:
    """Of parameters that a tied model had and its dense twin has not: a trace of a tied weight meets them on its way."""
    gone = [node for node in gm.graph.find_nodes(op="get_attr") if not node.users and not _resolves(gm, str(node.target))]
    for node in gone:
        gm.graph.erase_node(node)
    if gone:
        gm.recompile()


def _resolves(model: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    return hasattr(model.get_submodule(path), attribute)


@dataclass(frozen=True)
class Comparison:
    """The largest relative error of one quantity: ‖tied - dense‖ / ‖dense‖ over a whole tensor."""

    mode: str
    quantity: str
    worst: str
    error: float


@dataclass(frozen=True)
class Report:
    """What `verify` found; true where something was compared and no error is above the tolerance. `notes` say what could
    not be compared, and why."""

    comparisons: tuple[Comparison, ...]
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        return max((c.error if c.error == c.error else float("inf") for c in self.comparisons), default=0.0)

    def __bool__(self) -> bool:
        return bool(self.comparisons) and self.worst <= self.tolerance

    def to_json(self) -> str:
        """The same as JSON text; an error that is no number is null."""
        rows = [asdict(c) | {"error": c.error if math.isfinite(c.error) else None} for c in self.comparisons]
        return json.dumps({"equal": bool(self), "tolerance": self.tolerance, "comparisons": rows, "notes": self.notes})

    def __str__(self) -> str:
        rows = [(c.mode, c.quantity, f"{c.error:.1e}", c.worst) for c in self.comparisons]
        verdict = "equal to the dense twin" if self else "NOT equal to the dense twin" if rows else "nothing could be compared"
        lines = [table(("mode", "quantity", "error", "worst at"), rows), "", f"{verdict} (tolerance {self.tolerance:.0e})", *self.notes]
        return "\n".join(lines)


def verify(model: nn.Module, example_inputs: ExampleInputs | None = None, *, tolerance: float | None = None) -> Report:
    """Compares a tied model with its dense twin: outputs and gradients, in train and in eval mode.

    >>> import pe_fx
    >>> tied = pe_fx.transform(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    >>> bool(pe_fx.verify(tied, torch.randn(3, 4)))
    True

    The default `tolerance` of the relative error is 1e-4, for half precision 1e-2 and for bfloat16 5e-2.
    The gradient of a source must be the sum of the twin's gradients, mapped through the ties. Random operations draw the same
    numbers in both. Parameters that are constant, such as a scale that starts at zero, are given other values in the copies that
    are compared, lest they hide an error. The report says so where the twin runs in one mode alone, where there is no
    floating-point output or no finite one, where the twin's own backward raises, where no gradient reaches a tied weight, and where the
    twin does not even equal itself, since it seeds random numbers of its own. The model itself is not touched. Raises `PeFxError` where
    nothing in the model is tied, or the model cannot be copied.
    """
    tied_modules = [module for module in model.modules() if isinstance(module, Tied)]
    if not tied_modules:
        raise PeFxError("nothing in this model is tied: pass what pe_fx.transform returned")
    args, kwargs = as_arguments(_fitting_inputs(model) if example_inputs is None else example_inputs, model)
    dtypes = {source.dtype for _, _, _, weight in tied_weights_in(model) for source in weight.parameters}
    limit = max(TOLERANCES.get(dtype, 1e-4) for dtype in dtypes) if tolerance is None else tolerance
    found: list[Comparison] = []
    notes: list[str] = []
    ran = False
    model = _without_constants(model)
    tied, twin = model, untie(model)
    for mode, training in (("train", True), ("eval", False)):
        try:
            expected, dense_gradients = _run(twin.train(training), args, kwargs)
        except Exception as error:  # as where a model wants labels in train mode
            if mode == "eval" and not ran:
                raise
            notes.append(f"{mode}: not compared, since the dense twin does not run in it: {first_line(error)}")
            continue
        ran = True
        outputs, gradients = _run(tied.train(training), args, kwargs)
        if not expected:
            notes.append(f"{mode}: not compared, since the model returns no floating-point tensor")
            continue
        if not _any_finite(expected):
            notes.append(f"{mode}: not compared, since the dense twin returns no finite number")
            continue
        compared = _outputs(mode, outputs, expected)
        if not compared.error <= limit and not (own := _outputs(mode, _run(twin, args, kwargs)[0], expected)).error <= limit:
            notes.append(
                f"{mode}: not compared, since two runs of the dense twin differ by {own.error:.0e}: it seeds its own random numbers"
            )
            continue
        found.append(compared)
        if isinstance(dense_gradients, Exception):
            notes.append(f"{mode}: no gradients compared, since the dense twin's backward raises {first_line(dense_gradients)}")
            continue
        if isinstance(gradients, Exception):
            raise gradients
        mapped = _mapped_gradients(tied, dense_gradients)
        reaching = [gradient for name in _sources(tied) if (gradient := mapped[name]) is not None and bool(gradient.any())]
        if not reaching:
            notes.append(f"{mode}: no gradient reaches a tied weight")
        elif not _any_finite(reaching):
            notes.append(f"{mode}: no gradients compared, since no finite one reaches a tied weight")
            continue
        pairs = {name: (gradients[name], mapped[name]) for name in mapped if gradients.get(name) is not None or mapped[name] is not None}
        found.append(_largest(mode, "gradients", pairs))
    return Report(tuple(found), limit, tuple(notes))


def _any_finite(values: Iterable[Tensor]) -> bool:
    return any(bool(value.isfinite().any()) for value in values)


def _sources(model: nn.Module) -> list[str]:
    """The names of the parameters that ties are views of."""
    sources = {id(source) for _, _, _, weight in tied_weights_in(model) for source in weight.parameters}
    return [name for name, parameter in model.named_parameters() if id(parameter) in sources]


def _without_constants(model: nn.Module) -> nn.Module:
    """A copy in which parameters that are one number throughout vary: a scale that starts at zero would hide what is behind it."""
    model = copied(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.reshape(-1)[0]).all()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter))
    return model


def _fitting_inputs(model: nn.Module) -> ExampleInputs:
    """The first of the derived inputs with which the graph can be captured."""
    found = capture(model).example_inputs
    if found is None:
        raise PeFxError("this GraphModule keeps no example inputs: pass example_inputs")
    return found


def _run(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[list[Tensor], dict[str, Tensor | None] | Exception]:
    """Outputs, and the gradients of a random projection of them, or what the backward raises."""
    model.zero_grad(set_to_none=True)
    with rng_restored(model):
        torch.manual_seed(0)
        outputs = [value for value in tensors_in(model(*args, **kwargs)) if value.is_floating_point()]
        torch.manual_seed(1)
        loss = sum(
            ((value.float() * torch.randn(value.shape, device=value.device)).sum() for value in outputs if value.requires_grad),
            torch.zeros(()),
        )
        outputs = [value.detach() for value in outputs]
        try:
            if loss.requires_grad:
                torch.autograd.backward(loss)
        except Exception as error:  # whatever a model's own backward raises
            return outputs, error
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters()}


def _mapped_gradients(tied: nn.Module, dense: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The twin's gradients as those of the stored parameters: a parameter gets its own and, through the ties, those of its views."""
    views: list[Tensor] = []
    gradients: list[Tensor] = []
    viewed: set[str] = set()
    for full, module, name, weight in tied_weights_in(tied):
        viewed.add(full)
        gradient = dense.get(full)
        if gradient is not None:
            views.append(weight.dense(module, name))
            gradients.append(gradient)
    stored = dict(tied.named_parameters())
    trained = [name for name, parameter in stored.items() if parameter.requires_grad]
    through = (
        torch.autograd.grad(views, [stored[name] for name in trained], gradients, allow_unused=True) if views else [None] * len(trained)
    )
    mapped: dict[str, Tensor | None] = dict.fromkeys(stored)
    for name, gradient in zip(trained, through, strict=True):
        own = None if name in viewed else dense.get(name)
        mapped[name] = own if gradient is None else gradient if own is None else own + gradient
    return mapped


def _outputs(mode: str, got: list[Tensor], expected: list[Tensor]) -> Comparison:
    return _largest(mode, "outputs", {f"output {i}": pair for i, pair in enumerate(zip(got, expected, strict=True))})


def _largest(mode: str, quantity: str, pairs: dict[str, tuple[Tensor | None, Tensor | None]]) -> Comparison:
    scale = max((float(b[b.isfinite()].double().norm()) for _, b in pairs.values() if b is not None), default=0.0)
    worst, largest = "", 0.0
    for name, (a, b) in pairs.items():
        error = float("inf") if a is None or b is None else _error(a, b, scale)
        if not error <= largest:
            worst, largest = name, error
    return Comparison(mode, quantity, worst, largest)


def _error(a: Tensor, b: Tensor, scale: float) -> float:
    """Relative to the tensor's own norm, or where that vanishes to a thousandth of the largest tensor's."""
    if a.shape != b.shape:
        return float("inf")
    if a.dtype == b.dtype and torch.equal(a, b):
        return 0.0
    a, b = a.double().cpu(), b.double().cpu()
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return float("inf")
    difference = float((a - b)[finite].norm())
    return difference / max(float(b[finite].norm()), 1e-3 * scale, 1e-30) if difference else 0.0
