"""Captured by a run: models in which values decide, recorded on copies, and what the model keeps from it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import transformers
from feed_forward import TIE, X, mlp, plain
from oracle import Net, assert_hit, linear, ties
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import pe_fx
from pe_fx import CaptureError
from pe_fx.graph.capture import capture, module_of
from pe_fx.graph.routes import recorded
from pe_fx.ties import ONE_PATH


def asks(x: Tensor) -> None:
    """No graph of export's can hold what this does."""
    if float(x.detach().abs().sum()) < 0:
        raise AssertionError


def run_only(m: Net, x: Tensor) -> Tensor:
    asks(x)
    return plain(m, x)


# ---- values decide


def lengths(m: Net, x: Tensor, lengths: Tensor) -> Tensor:
    longest = int(lengths.max())
    padding = torch.arange(longest).expand(len(lengths), longest) >= lengths[:, None]
    return plain(m, x[:, :longest]).masked_fill(padding[..., None], 0)


def chosen_rows(m: Net, x: Tensor) -> Tensor:
    keep = x.sum(-1) > 0
    out = x.clone()
    out[keep] = plain(m, x[keep])
    return out


def nonzero_rows(m: Net, x: Tensor) -> Tensor:
    rows = (x[..., 0] > 0).nonzero(as_tuple=True)
    return plain(m, x[rows])


def best_tokens(m: Net, x: Tensor) -> Tensor:
    number = max(1, int((x.mean(-1) > 0).sum(1).min()))
    best = x.mean(-1).topk(number, 1).indices
    return plain(m, x.gather(1, best[..., None].expand(-1, -1, 8)))


def windows(m: Net, x: Tensor) -> Tensor:
    bounds = x.abs().sum((0, 2)).argsort()[:2].sort().values.tolist()
    return torch.cat([plain(m, part) for part in x.tensor_split(bounds, 1) if part.shape[1]], 1)


def branch(m: Net, x: Tensor) -> Tensor:
    return plain(m, x) if x.abs().sum() > 0 else x


def by_numpy(m: Net, x: Tensor) -> Tensor:
    return plain(m, x) * float(x.detach().cpu().numpy().shape[0])


def regions(m: Net, x: Tensor) -> Tensor:
    asks(x)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        scale = x.abs().amax()
    with torch.autocast("cpu", enabled=False):
        h = m.fc1(x / scale).relu()
    return m.fc2(h)


def checkpointed(reentrant: bool) -> Callable[[Net, Tensor], Tensor]:
    def forward(m: Net, x: Tensor) -> Tensor:
        asks(x)
        return checkpoint(lambda y: plain(m, y), x, use_reentrant=reentrant)

    return forward


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def own_function(m: Net, x: Tensor) -> Tensor:
    asks(x)
    return Doubled.apply(plain(m, Doubled.apply(x)))


ON_X = [chosen_rows, best_tokens, windows, branch, by_numpy, regions, checkpointed(True), checkpointed(False), own_function]


@pytest.mark.parametrize("forward", ON_X, ids=lambda f: f.__qualname__)
def test_values_decide(forward: Callable[..., Tensor]) -> None:
    assert_hit(mlp(forward), X, TIE, kind="mlp")
    assert pe_fx.plan(mlp(forward), X).capture == ("export" if forward is chosen_rows else "run")


def test_lengths() -> None:
    assert_hit(mlp(lengths), (X, torch.tensor([5, 4, 2])), TIE, kind="mlp")


def test_packed_sequences() -> None:
    def forward(m: Net, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(plain(m, x), lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(m.lstm(packed)[0], batch_first=True)[0]

    inputs = (X, torch.tensor([5, 2, 4]))
    model = mlp(forward, lstm=nn.LSTM(8, 8, batch_first=True))
    assert_hit(model, inputs, TIE, kind="mlp")
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l0"} <= set(capture(model, inputs).weights.values())


@pytest.mark.parametrize("written_out", ["nonzero", "where"])
def test_routed_experts(written_out: str) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = m.router(rows).softmax(-1).topk(2)
        result = torch.zeros_like(rows)
        for number in chosen.unique().tolist():
            expert, hit = m.experts[number], chosen == number
            row, place = hit.nonzero(as_tuple=True) if written_out == "nonzero" else torch.where(hit)
            result.index_add_(0, row, expert(rows[row]) * weights[row, place, None])
        return result.view_as(x)

    experts = nn.ModuleList(nn.Sequential(linear(8, 16), nn.GELU(), linear(16, 8)) for _ in range(3))
    model = Net(forward, router=linear(8, 3), experts=experts)
    assert_hit(model, torch.randn(4, 20, 8), *(f"experts.{i}.2.weight ← experts.{i}.0.weightᵀ" for i in range(3)), kind="mlp")


@dataclass
class Graphs:
    """A batch of graphs, as such libraries hold them: no container that torch knows."""

    nodes: Tensor
    edges: Tensor
    of: Tensor


def test_a_batch_of_its_own_type() -> None:
    def forward(m: Net, batch: Graphs) -> Tensor:
        inside = batch.of[batch.edges[0]] == batch.of[batch.edges[1]]
        sources, targets = batch.edges[:, inside]
        made = plain(m, batch.nodes[sources])
        batch.nodes = torch.zeros_like(batch.nodes).index_add_(0, targets, made)
        return batch.nodes.new_zeros(int(batch.of.max()) + 1, 8).index_add_(0, batch.of, batch.nodes)

    batch = Graphs(torch.randn(6, 8), torch.tensor([[0, 1, 2, 5, 3], [1, 0, 1, 0, 4]]), torch.tensor([0, 0, 0, 1, 1, 1]))
    before = batch.nodes
    plan = pe_fx.plan(mlp(forward), (batch,))
    assert ties(plan) == [TIE]
    assert batch.nodes is before
    assert len(capture(mlp(forward), (batch,)).inputs) == 3


def test_a_detector_as_a_whole() -> None:
    detection = pytest.importorskip("torchvision").models.detection
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    plan = pe_fx.plan(model)
    assert plan.capture == "run"
    assert {site.kind for site in plan.sites} == {"bottleneck", "squeeze_excite"}
    assert model.training


# ---- one dialect


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224"])
def test_a_run_gives_the_graph_that_export_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = timm.create_model(name), torch.randn(1, 3, 224, 224)
    by_export = capture(model, images)
    monkeypatch.setattr("pe_fx.graph.capture.exported", recorded)
    by_run = capture(model, images)
    assert (by_export.how, by_run.how) == ("export", "run")

    def told(captured: Any) -> list[Any]:
        return [(node.target, module_of(node)) for node in captured.graph.nodes if node.op == "call_function"]

    assert told(by_run) == told(by_export)
    assert by_run.shapes() == by_export.shapes()
    assert pe_fx.plan(model, by_run).to_json().replace('"run"', '"export"') == pe_fx.plan(model, by_export).to_json()


@pytest.mark.parametrize("kind", ["GPT2", "Bert"])
def test_a_run_gives_the_plan_that_export_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1}
    sizes = {
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
        "Bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    }
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes[kind], **small))
    ids = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    by_export = pe_fx.plan(model, ids)
    monkeypatch.setattr("pe_fx.graph.capture.exported", recorded)
    by_run = pe_fx.plan(model, ids)
    assert by_run == by_export
    assert (len(by_run.sites), by_run.capture, by_export.capture) == (4, "run", "export")


# ---- the model is left alone


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], list[int], list[str]]:
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model.state_dict()), [tensor._version for tensor in tensors], [repr(vars(module)) for module in model.modules()]


def assert_left_alone(model: nn.Module, inputs: Any) -> None:
    (values, *before), parameters = state_of(model), dict(model.named_parameters())
    randoms = torch.get_rng_state(), random.getstate()
    assert capture(model, inputs).how == "run"
    now, *after = state_of(model)
    assert all(torch.equal(now[name], value) for name, value in values.items())
    assert after == before
    assert all(parameter is parameters[name] and parameter.grad is None for name, parameter in model.named_parameters())
    assert torch.equal(randoms[0], torch.get_rng_state())
    assert randoms[1] == random.getstate()


def test_what_forward_writes_stays_in_the_copy() -> None:
    """A queue of keys made by an average of the weights, as in contrastive learning; and whatever else a forward may leave behind."""

    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(m.slow.parameters(), m.fast.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
                slow.data.clamp_(-1, 1)
            key = m.slow(x).mean((0, 1))
            start = int(m.place)
            m.queue[start] = key
            m.place[0] = (start + 1) % 4
        m.last, m.calls, m.list[0] = x, m.calls + 1, x
        m.table.add_(1)
        random.random()
        h = m.norm(m.fc1(x).transpose(1, 2)).transpose(1, 2).relu()
        return m.fc2(nn.functional.dropout(h, training=m.training)), m.fast(x) @ m.queue.clone().t()

    model = mlp(forward, slow=linear(8, 16), fast=linear(8, 16), norm=nn.BatchNorm1d(16))
    model.register_buffer("queue", torch.zeros(4, 16))
    model.register_buffer("place", torch.zeros(1, dtype=torch.long))
    model.calls, model.list, model.table = 0, [None], torch.zeros(3)
    assert_left_alone(model, X)
    assert model.table.eq(0).all()
    assert_hit(model, X, TIE, kind="mlp")


def test_what_was_written_is_what_is_read() -> None:
    """A copy stands for what is written to in all that is read later, under whichever name."""

    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.scale.view(-1)[0] = 2
        if float(m.scale.detach()[0, 0] + m.scale.flatten()[0]) != 4:
            raise ValueError("not what was written")
        return plain(m, x)

    model = mlp(forward, scale=torch.ones(1, 1))
    assert_left_alone(model, X)


def test_inputs_that_forward_writes_to() -> None:
    x = X.clone()
    assert ties(pe_fx.plan(mlp(lambda m, x: run_only(m, x.mul_(2))), x)) == [TIE]
    assert torch.equal(x, X)


def test_a_run_makes_no_second_copy_of_the_weights() -> None:
    wide = nn.Sequential(linear(1024, 4096), nn.ReLU(), linear(4096, 1024))  # 33 MB
    model = Net(lambda m, x: (asks(x), m.wide(x))[1], wide=wide)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        assert capture(model, torch.ones(2, 1024)).how == "run"
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) < 4096 * 1024


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_in_every_mode(mode: Callable[[], Any], training: bool) -> None:
    with mode():
        model = mlp(run_only).train(training)
        assert ties(pe_fx.plan(model, X)) == [TIE]
    assert model.training is training


def test_a_hidden_value_is_seen_whatever_its_way_out() -> None:
    def forward(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        asks(x)
        h = m.fc1(x).relu()
        return m.fc2(h), h.data * 2

    assert not pe_fx.plan(mlp(forward), X).sites


def test_forces_are_gradients() -> None:
    def forward(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        energy = run_only(m, x)
        return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]

    assert capture(mlp(forward), X).how == "run"


# ---- what the plan says


def test_the_plan_tells_that_it_knows_one_path() -> None:
    plan = pe_fx.plan(mlp(run_only), X)
    assert str(plan).endswith(ONE_PATH)
    again = pe_fx.Plan.from_json(plan.to_json())
    assert (again, again.capture) == (plan, "run")
    tied = pe_fx.apply(mlp(run_only), plan)
    assert pe_fx.verify(tied, X)
    by_export = pe_fx.plan(mlp(plain), X)
    assert (by_export, by_export.capture) == (plan, "export")
    assert ONE_PATH not in str(by_export)


def test_a_plan_of_a_graph() -> None:
    exported = torch.export.export(mlp(plain), (X,), strict=False).graph_module
    assert pe_fx.plan(exported).capture == "graph"


def test_plans_that_were_written_before_load() -> None:
    text = pe_fx.plan(mlp(plain), X).to_json()
    assert '"capture": "export"' in text
    old = text.replace(', "capture": "export"', "")
    assert '"capture"' not in old
    assert pe_fx.Plan.from_json(old).capture == "export"


# ---- where it fails


def test_a_model_without_values() -> None:
    with pytest.raises(
        CaptureError, match=r"values decide in it, and what is on the meta device has none: with model and inputs in memory"
    ):
        pe_fx.plan(mlp(run_only).to("meta"), X.to("meta"))


def test_a_detector_without_values() -> None:
    """What is derived first fits: no other inputs are tried."""
    detection = pytest.importorskip("torchvision").models.detection
    with torch.device("meta"):
        model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.raises(CaptureError, match=r"\(1 tried\), the likeliest being 0.0 \(3, 128, 160\), .* in memory"):
        pe_fx.plan(model)


def test_values_that_do_not_decide_need_no_memory() -> None:
    with pytest.raises(CaptureError, match=r"reduction dim|mat1 and mat2.* check that model\(\*example_inputs\) runs"):
        pe_fx.plan(mlp(plain).to("meta"), torch.empty(2, 9, device="meta"))


def test_a_model_that_runs_is_not_said_to_fail() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        if torch.overrides._get_current_function_mode_stack():
            raise ValueError("nobody may look on")
        return plain(m, x)

    with pytest.raises(CaptureError) as caught:
        pe_fx.plan(mlp(forward), X)
    text = str(caught.value)
    assert "nobody may look on" in text
    assert 'torch.compile(model, backend="pe_fx")' in text
    assert "pe_fx.commit(model)" in text
    assert "check that" not in text


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(CaptureError, match=r"mat1 and mat2 .* check that model\(\*example_inputs\) runs: forward takes args, kwargs"):
        pe_fx.plan(mlp(run_only), torch.randn(3, 9))
