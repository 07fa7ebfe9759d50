"""Capture by export: what is inlined, in which mode and dtype, and that the model is left alone."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from feed_forward import TIE, X, mlp, plain
from oracle import Net, assert_equals_twin, assert_hit, linear, ties
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pe_fx
from pe_fx import CaptureError
from pe_fx.graph.capture import Captured, capture
from pe_fx.graph.inputs import tensors_in
from pe_fx.graph.ops import value_of
from pe_fx.graph.routes import sharing_copy


def calls(captured: Captured) -> list[str]:
    return [str(node.target) for node in captured.graph.nodes if node.op.startswith("call")]


# ---- regions are inlined


def in_autocast(m: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return plain(m, x)


def with_autocast_off(m: Net, x: Tensor) -> Tensor:
    h = m.fc1(x)
    with torch.autocast("cpu", enabled=False):
        h = h.relu()
    return m.fc2(h)


def in_checkpoint(m: Net, x: Tensor) -> Tensor:
    return checkpoint(lambda y: plain(m, y), x, use_reentrant=False)


def half_in_checkpoint(m: Net, x: Tensor) -> Tensor:
    return m.fc2(checkpoint(lambda y: m.fc1(y).relu(), x, use_reentrant=False))


def beside_no_grad(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().amax()
    return plain(m, x / scale)


def nested(m: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        h = m.fc1(x)
        with torch.autocast("cpu", enabled=True, dtype=torch.bfloat16):
            h = h.relu()
        return m.fc2(h)


def several_results(m: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        first, second = m.fc1(x).relu().chunk(2, -1)
    return m.fc2(torch.cat((first, second), -1))


REGIONS = [in_autocast, with_autocast_off, in_checkpoint, half_in_checkpoint, beside_no_grad, nested, several_results]


@pytest.mark.parametrize("forward", REGIONS, ids=lambda f: f.__name__)
def test_regions_are_inlined(forward: Callable[..., Tensor]) -> None:
    model = mlp(forward)
    captured = capture(model, X)
    captured.graph.lint()
    assert not any("wrap_with" in call or "checkpoint" in call for call in calls(captured))
    assert sum("linear" in call for call in calls(captured)) == 2
    assert set(captured.weights.values()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    plan = pe_fx.plan(model, X)
    assert ties(plan) == [TIE]
    assert_equals_twin(model, pe_fx.apply(model, plan), plan, X, tolerance=2e-2 if forward in (in_autocast, nested) else 1e-4)


def test_model_called_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ties(pe_fx.plan(mlp(plain), X)) == [TIE]


# ---- outputs


@dataclass
class Output:
    y: Tensor
    rest: Any = None


class Opaque:
    def __init__(self, y: Tensor) -> None:
        self.y = y


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, None, 3),
    "list": lambda y: [y, [y + 1]],
    "dict": lambda y: {"y": y, "name": "text"},
    "dataclass": lambda y: Output(y, {"more": y + 1}),
    "object": Opaque,
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs_of_any_form(form: str) -> None:
    model = mlp(lambda m, x: OUTPUTS[form](plain(m, x)))
    tied = pe_fx.transform(model, X)
    assert "fc2.weight" not in tied.state_dict()
    assert type(tied(X)) is type(model(X))
    assert pe_fx.verify(tied, X)


@pytest.mark.parametrize("form", OUTPUTS)
def test_a_hidden_value_in_any_output_is_seen(form: str) -> None:
    def forward(m: Net, x: Tensor) -> Any:
        h = m.fc1(x).relu()
        return m.fc2(h), OUTPUTS[form](h)

    assert not pe_fx.plan(mlp(forward), X).sites


def test_tensors_in() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    cyclic: list[Any] = [a]
    cyclic.append(cyclic)
    assert [len(t) for t in tensors_in((Output(a, {"k": [b]}), None, "text", Opaque(c)))] == [1, 2, 3]
    assert [len(t) for t in tensors_in(cyclic)] == [1]
    assert tensors_in(None) == []


# ---- train mode first, then eval mode


def test_model_that_exports_in_eval_mode_only() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        if m.training and float(x.sum()) > 0:  # data decides
            return x
        return plain(m, x)

    model = mlp(forward)
    plan = pe_fx.plan(model, X)
    assert ties(plan) == [TIE]
    assert model.training
    assert pe_fx.apply(model, plan).training


def test_train_mode_is_what_counts() -> None:
    """What eval mode alone would call a pair is none in training."""

    def forward(m: Net, x: Tensor) -> Any:
        h = m.fc1(x).relu()
        return (m.fc2(h), h) if m.training else m.fc2(h)

    model = mlp(forward).eval()
    assert not pe_fx.plan(model, X).sites
    assert not model.training


def test_every_way_fails() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        raise ValueError("not today" if m.training else "not here")

    with pytest.raises(CaptureError, match=r"ValueError: not today \(in eval mode: ValueError: not here\); check that"):
        pe_fx.plan(mlp(forward), X)


def test_module_converted_in_forward_to_the_dtype_it_has() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        m.fc1 = m.fc1.to(torch.float32)
        return plain(m, x.to(m.fc2.to(x.device).weight.dtype))

    net = mlp(forward)
    weight = net.fc1.weight
    assert_hit(net, X, TIE, kind="mlp")
    assert net.fc1.weight is weight
    assert "_apply" not in vars(net.fc1)


def test_module_converted_in_forward_to_another_dtype() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        m.fc1 = m.fc1.double()
        return m.fc2(m.fc1(x.double()).relu().float())

    with pytest.raises(pe_fx.CaptureError, match=r"weights of fc1, torch.float32 on cpu, to torch.float64 on cpu: do so before"):
        pe_fx.plan(mlp(forward), X)


def test_a_failure_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError):
        pe_fx.plan(mlp(plain), torch.randn(3, 9))
    assert capfd.readouterr() == ("", "")


# ---- in-place operations


def writes_relu(m: Net, x: Tensor) -> Tensor:
    return m.fc2(m.fc1(x).relu_())


def adds_to_the_output(m: Net, x: Tensor) -> Tensor:
    y = plain(m, x)
    y += x
    return y.clamp_(-1, 1)


def writes_through_a_view(m: Net, x: Tensor) -> Tensor:
    h = m.fc1(x)
    h.view(-1, 16).relu_()
    return m.fc2(h)


@pytest.mark.parametrize("forward", [writes_relu, adds_to_the_output, writes_through_a_view], ids=lambda f: f.__name__)
def test_in_place(forward: Callable[..., Tensor]) -> None:
    assert_hit(mlp(forward), X, TIE, kind="mlp")


def test_in_place_before_a_second_reader_is_a_leak() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.fc1(x)
        kept = h[..., :8]
        h.relu_()
        return m.fc2(h) + kept

    assert not pe_fx.plan(mlp(forward), X).sites


def test_in_place_that_moves_channels_is_no_pair() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.fc1(x).relu()
        h[..., :8] = h[..., 8:]
        return m.fc2(h)

    assert not pe_fx.plan(mlp(forward), X).sites


def test_in_place_without_effect_on_the_pair_is_no_nonlinearity() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.fc1(x)
        h.clone().relu_()
        return m.fc2(h)

    assert not pe_fx.plan(mlp(forward), X).sites


# ---- what export refuses for its dtype


PICKY: list[Any] = []


def picky(refused: tuple[torch.dtype, ...], even_when_run: bool) -> Callable[[Tensor], Tensor]:
    """A new operation, which export refuses for these dtypes; so does a real run, or not."""

    def check(x: Tensor) -> Tensor:
        torch._check(x.dtype not in refused, lambda: f"expected another dtype, got {x.dtype}")
        return torch.empty_like(x)

    def run(x: Tensor) -> Tensor:
        return check(x).copy_(x) if even_when_run else x.clone()

    operation = torch.library.custom_op(f"pe_fx_tests::picky{len(PICKY)}", run, mutates_args=())
    operation.register_fake(check)
    PICKY.append(operation)
    return operation


def dtypes(captured: Captured) -> set[torch.dtype]:
    return {value_of(node).dtype for node in captured.weights}


@pytest.mark.parametrize(
    ("own", "other"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float32)]
)
@pytest.mark.parametrize("even_when_run", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_captured_in_another_dtype(own: torch.dtype, other: torch.dtype, even_when_run: bool, device: str) -> None:
    operation = picky((own,), even_when_run)
    net = mlp(lambda m, x: operation(plain(m, x))).to(own).to(device)
    before = dict(net.named_parameters())
    captured = capture(net, X.to(own).to(device))
    assert dtypes(captured) == {other}
    assert captured.example_inputs.dtype == own
    assert ties(pe_fx.plan(net, X.to(own).to(device))) == [TIE]
    assert all(parameter is before[name] and parameter.dtype == own for name, parameter in net.named_parameters())


def test_recorded_in_its_own_dtype_where_export_takes_none() -> None:
    """The copy that runs may change; neither model nor inputs do."""
    operation = picky((torch.float32, torch.bfloat16), even_when_run=False)

    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.norm.weight.mul_(2)
        return operation(m.norm(plain(m, x.mul_(2))))[:, m.order]

    net = mlp(forward)
    net.norm, net.order = nn.BatchNorm1d(5), torch.tensor([4, 3, 2, 1, 0])
    state, x = copy.deepcopy(net.state_dict()), X.clone()
    captured = capture(net, x)
    assert dtypes(captured) == {torch.float32}
    assert sorted(captured.weights.values()) == sorted(name for name, _ in net.named_parameters())
    assert len(captured.inputs) == 1
    assert ties(pe_fx.plan(net, x)) == [TIE]
    assert x.equal(X)
    assert all(value.equal(net.state_dict()[name]) for name, value in state.items())


def test_inputs_of_another_dtype_than_the_model_are_an_error() -> None:
    operation = picky((torch.bfloat16,), even_when_run=True)
    with pytest.raises(CaptureError, match=r"got torch\.bfloat16"):
        capture(mlp(lambda m, x: plain(m, operation(x).float())), X.bfloat16())


def test_a_dtype_that_nothing_takes_is_told_as_it_was() -> None:
    operation = picky((torch.float32, torch.bfloat16), even_when_run=True)
    with pytest.raises(CaptureError, match=r"got torch\.float32"):
        capture(mlp(lambda m, x: operation(plain(m, x))), X)


# ---- the model is left alone


def test_the_copy_shares_every_parameter_and_buffer() -> None:
    model = nn.Sequential(linear(8, 16), nn.BatchNorm1d(16), linear(16, 8))
    model.table = torch.randn(100)
    copied = sharing_copy(model, training=True)
    assert copied is not model
    assert copied[0] is not model[0]
    assert all(a is b for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(copied.buffers(), model.buffers(), strict=True))
    assert torch.equal(copied.table, model.table)
    assert copied.table is not model.table  # a forward may write to it


def test_capture_allocates_no_second_copy_of_the_weights() -> None:
    model = nn.Sequential(linear(1024, 4096), nn.ReLU(), linear(4096, 1024))  # 33 MB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        capture(model, torch.zeros(2, 1024))
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) < 4096 * 1024


def test_nothing_is_computed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(linear(10**5, 10**6), nn.ReLU(), linear(10**6, 10**5))  # 800 GB
    assert ties(pe_fx.plan(model, torch.empty(2, 10**5, device="meta"))) == ["2.weight ← 0.weightᵀ"]


def test_caches_made_in_forward_stay_off_the_model() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        m.cache = x * 2
        m.calls = getattr(m, "calls", 0) + 1
        return plain(m, m.cache)

    model = mlp(forward)
    pe_fx.plan(model, X)
    assert not hasattr(model, "cache")
    assert not hasattr(model, "calls")
    tied = pe_fx.transform(model, X)
    assert not hasattr(tied, "cache")


def test_batch_norm_statistics_stay() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), linear(8, 16), nn.ReLU(), linear(16, 8))
    before = copy.deepcopy(model.state_dict())
    pe_fx.plan(model, torch.randn(4, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Shared(nn.Module):
    """A teacher that copies of the model share, and do not multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = linear(8, 8), nn.Dropout(0.5)
        self.seen = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0] += 1
        self.last = x
        return self.drop(self.layer(x))

    def __deepcopy__(self, memo: dict[int, object]) -> Shared:
        return self


@pytest.mark.parametrize("hidden", [False, True])
def test_a_module_that_copies_share(hidden: bool) -> None:
    model = mlp(lambda m, x: plain(m, x) + (m.hidden[0] if hidden else m.teacher)(x))
    teacher = Shared()
    if hidden:
        model.hidden = [teacher]  # type: ignore[assignment]
    else:
        model.teacher = teacher
    for module in (model, teacher):
        module.eval()
    before = model(X)
    attributes, last = set(vars(teacher)), teacher.last
    pe_fx.plan(model, X)
    assert [module.training for module in (teacher, teacher.layer, teacher.drop)] == [False] * 3
    assert set(vars(teacher)) == attributes
    assert teacher.seen == [1]
    assert teacher.last is last
    assert torch.equal(model(X), before)


class Merging(nn.Linear):
    """A LoRA that adds its product to the weight in eval mode, as loralib's does."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.down, self.up, self.merged = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2)), False

    def train(self, mode: bool = True) -> Merging:
        if mode is self.merged:
            self.weight.data += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        made = super().forward(x)
        return made if self.merged else made + x @ self.down.T @ self.up.T


def test_a_mode_that_writes_to_weights() -> None:
    model = nn.Sequential(Merging(), mlp(plain)).eval()
    before, weights = model(X), copy.deepcopy(model.state_dict())
    assert ties(pe_fx.plan(model, X)) == ["1.fc2.weight ← 1.fc1.weightᵀ"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(X), before)


def test_a_tensor_that_forward_counts_in() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        m.steps.add_(1)
        return plain(m, x)

    model = mlp(forward)
    model.__dict__["steps"] = torch.zeros(())
    pe_fx.plan(model, X)
    assert model.steps == 0


def test_what_a_module_frees_stays_open(tmp_path: Path) -> None:
    class Logging(nn.Sequential):
        def __del__(self) -> None:
            self.log.close()  # type: ignore[operator,union-attr]

    with (tmp_path / "log").open("w") as log:
        model = Logging(linear(8, 16), nn.ReLU(), linear(16, 8))
        model.log = log  # type: ignore[assignment]
        assert ties(pe_fx.plan(model, X)) == ["2.weight ← 0.weightᵀ"]
        gc.collect()
        assert not log.closed


# ---- names


def test_a_module_registered_twice_has_its_first_name() -> None:
    fc1, fc2 = linear(8, 16), linear(16, 8)
    model = Net(lambda m, x: m.b2(m.b1(x).relu()), a1=fc1, a2=fc2, b1=fc1, b2=fc2)
    plan = pe_fx.plan(model, X)
    assert ties(plan) == ["a2.weight ← a1.weightᵀ"]
    assert plan.params_before == sum(p.numel() for p in model.parameters())
    tied = pe_fx.apply(model, plan)
    assert tied.a2 is tied.b2
    assert sum(p.numel() for p in tied.parameters()) == plan.params_after


def test_unread_parameters_count() -> None:
    model = Net(plain, fc1=linear(8, 16), fc2=linear(16, 8), spare=linear(3, 3))
    plan = pe_fx.plan(model, X)
    assert plan.params_before == sum(p.numel() for p in model.parameters())
    assert plan.params_before - plan.params_after == 128


def test_labels() -> None:
    captured = capture(mlp(plain), X)
    assert set(captured.weights.values()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert captured.shapes()["fc1.weight"] == (16, 8)
    assert len(captured.inputs) == 1
    assert not captured.inputs & set(captured.weights)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_default_device_changes_nothing(device: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.device(device):
        assert [str(tie) for tie in pe_fx.plan(model).ties] == ["2.weight ← 0.weightᵀ"]


def test_a_model_on_the_default_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        assert sorted(pe_fx.transform(model).state_dict()) == ["0.bias", "0.weight", "2.bias"]
