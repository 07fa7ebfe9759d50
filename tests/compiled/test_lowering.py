"""What the backend adds to Inductor, read off the graphs that it generates."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from oracle import Recorder, linear
from torch import Tensor, fx, nn

import pe_fx
import pe_fx.compiled.lowering
from pe_fx.compiled.dynamo import CustomGraphPass, hash_of_sources
from pe_fx.compiled.lowering import UUID, sums
from pe_fx.compiled.lowering.nodes import CAST

aten = torch.ops.aten
MM = (aten.mm.default, aten.addmm.default)
X = torch.randn(32, 64)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch.compiler.reset()


def compiled(model: nn.Module, x: Tensor, backend: str = "pe_fx", autocast: bool = True, **options: Any) -> tuple[fx.Graph, fx.Graph]:
    """Forward and backward graph of one training step."""
    recorder = Recorder()
    inductor = {"post_grad_custom_post_pass": recorder}
    run = torch.compile(model, backend=backend, options=inductor if backend == "inductor" else options | {"inductor": inductor})
    with torch.autocast(X.device.type, dtype=torch.bfloat16, enabled=autocast):
        y = run(x)
    y.float().square().sum().backward()
    forward, backward = recorder.graphs
    return forward, backward


def casts_of(graph: fx.Graph, numel: int) -> list[fx.Node]:
    """Casts to half precision of values of this size that do not depend on the data."""
    casts = graph.find_nodes(op="call_function", target=CAST)
    return [node for node in casts if node.args[1] is torch.bfloat16 and node.meta["val"].numel() == numel]


def saved(forward: fx.Graph, numel: int) -> int:
    """How many different values of this size, whatever their views, the forward keeps for the backward."""
    roots = set()
    for node in forward.output_node().args[0][1:]:
        while node.target in (aten.permute.default, aten.view.default, aten.reshape.default, aten.slice.Tensor):
            node = node.args[0]
        if isinstance(node, fx.Node) and node.meta["val"].numel() == numel:
            roots.add(node)
    return len(roots)


def products(backward: fx.Graph, shape: tuple[int, ...]) -> list[fx.Node]:
    """Matrix products in the backward whose result has the shape of a weight, either way round."""
    found = [node for target in MM for node in backward.find_nodes(op="call_function", target=target)]
    return [node for node in found if tuple(node.meta["val"].shape) in (shape, shape[::-1])]


def copies(graph: fx.Graph, numel: int) -> list[fx.Node]:
    clones = graph.find_nodes(op="call_function", target=aten.clone.default)
    return [node for node in clones if node.meta["val"].numel() == numel]


def mlp() -> nn.Sequential:
    return nn.Sequential(linear(64, 256), nn.GELU(), linear(256, 64))


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv3(self.conv2(self.conv1(x).relu()).relu())
        return y


def stage(blocks: int) -> nn.Sequential:
    return nn.Sequential(*(Bottleneck() for _ in range(blocks)))


# ---- casts


@pytest.mark.parametrize("tied", [True, False])
def test_one_cast_and_one_saved_copy_per_feed_forward(tied: bool) -> None:
    """Whether transform tied the model or the backend ties its graph."""
    forward, backward = compiled(pe_fx.transform(mlp(), X) if tied else mlp(), X)
    assert len(casts_of(forward, 64 * 256) + casts_of(backward, 64 * 256)) == 1
    assert saved(forward, 64 * 256) == 1
    assert len(products(backward, (256, 64))) == 2
    assert not copies(backward, 64 * 256)


def test_inductor_alone_casts_twice() -> None:
    forward, _ = compiled(pe_fx.transform(mlp(), X), X, backend="inductor")
    assert len(casts_of(forward, 64 * 256)) == 2


def test_attention_reads_its_projection_off_the_one_cast() -> None:
    """q, k and kᵀ are joined and cast in one go; the output projection reads qᵀ off that."""
    x = torch.randn(2, 3, 32, 32)
    options = {"img_size": 32, "depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 7}
    model = pe_fx.transform(timm.create_model("vit_tiny_patch16_224", **options), x, rules=["attention"])
    forward, backward = compiled(model, x)
    assert [node.args[0].target for node in casts_of(forward, 3 * 64 * 64)] == [aten.cat.default]
    assert not casts_of(forward, 64 * 64) + casts_of(forward, 2 * 64 * 64)
    assert not casts_of(backward, 64 * 64) + casts_of(backward, 3 * 64 * 64)


def test_a_stage_is_cast_and_saved_once() -> None:
    x = torch.randn(2, 64, 8, 8)
    forward, backward = compiled(pe_fx.transform(stage(3), x), x)
    weights = [node for node in casts_of(forward, 16 * 64) if node.meta["val"].dim() == 4]
    assert len(weights) == 1
    assert not [node for node in casts_of(backward, 16 * 64) if node.args[0].op == "placeholder"]
    assert len(copies(forward, 16 * 64)) == 1, "one transposed copy serves all convolutions of the forward"


def test_casts_change_no_number() -> None:
    """Through both backends, the same products of the same half-precision numbers."""
    ours, theirs = (copy.deepcopy(tied) for tied in [pe_fx.transform(mlp(), X)] * 2)
    compiled(ours, X)
    torch.compiler.reset()
    compiled(theirs, X, backend="inductor")
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_float32_has_nothing_to_cast() -> None:
    forward, backward = compiled(pe_fx.transform(mlp(), X), X, autocast=False)
    assert not forward.find_nodes(op="call_function", target=CAST)
    assert len(products(backward, (256, 64))) == 2
    assert not copies(backward, 64 * 256)


# ---- sums


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_a_stage_are_added_as_they_come(tied: bool, autocast: bool) -> None:
    """12 uses of one W: no more than a few gradients wait for each other."""
    x = torch.randn(2, 64, 8, 8)
    model = pe_fx.transform(stage(6), x) if tied else stage(6)
    _, backward = compiled(model, x, autocast=autocast)
    added = backward.find_nodes(op="call_function", target=torch.ops.pe_fx.plus.default)
    gradients = {term for node in added for term in node.args[:2]} - set(added)
    assert (len(gradients), len(added)) == (12, 11)
    assert all(term.meta["val"].dtype is (torch.bfloat16 if autocast else torch.float32) for term in gradients), "no copy in float32"
    assert all(node.meta["val"].dtype is torch.float32 for node in added)
    assert added[-1].meta["val"].is_contiguous(), "else autograd would copy it"
    assert most_waiting(backward, gradients) <= 4, "two sums, one of them of what is made transposed, and two gradients that were just made"


def most_waiting(graph: fx.Graph, gradients: set[fx.Node]) -> int:
    """How many of these and of their sums are there at once."""
    kept = gradients | set(graph.find_nodes(op="call_function", target=torch.ops.pe_fx.plus.default))
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = {node: max(order[user] for user in node.users) for node in kept}
    return max(sum(order[node] <= now < last[node] for node in kept) for now in order.values())


def test_sums_in_half_precision_are_as_exact_as_in_float32() -> None:
    x = torch.randn(2, 64, 8, 8)
    model = pe_fx.transform(stage(6), x)
    exact = copy.deepcopy(model).double()
    exact(x.double()).square().sum().backward()
    errors = []
    for backend in ("pe_fx", "inductor"):
        torch.compiler.reset()
        each = copy.deepcopy(model)
        compiled(each, x, backend=backend)
        errors.append(float((each[0].conv1.weight.grad - exact[0].conv1.weight.grad).norm() / exact[0].conv1.weight.grad.norm()))
    assert errors[0] < 1.01 * errors[1]


def test_short_sums_and_float32_products_are_left_to_inductor() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(linear(64, 256), nn.GELU(), linear(256, 64))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.body(x)
            return y

    x = torch.randn(2, 64, 8, 8)
    _, short = compiled(pe_fx.transform(stage(2), x), x)
    torch.compiler.reset()
    chain = pe_fx.transform(nn.Sequential(*(Residual() for _ in range(4))), X, share=("mlp",))
    _, products = compiled(chain, X, autocast=False)
    for graph in (short, products):
        assert not graph.find_nodes(op="call_function", target=torch.ops.pe_fx.plus.default)
    adding = products.find_nodes(op="call_function", target=aten.addmm.default)
    assert len(adding) >= 6, "each gradient is added by the product that makes it"


def test_a_dense_model_becomes_the_graph_of_the_tied_one() -> None:
    """Operation by operation: so it is fused alike, and takes as long to compile and to run."""
    x = torch.randn(2, 64, 8, 8)
    joint = []
    for model in (stage(3), pe_fx.transform(stage(3), x)):
        torch.compiler.reset()
        recorder = Recorder()
        torch.compile(model, backend="pe_fx", options={"inductor": {"joint_custom_pre_pass": recorder}})(x).sum().backward()
        calls = [node for graph in recorder.graphs for node in graph.nodes if node.op == "call_function"]
        joint.append([(node.target, getattr(node.meta["val"], "shape", None)) for node in calls])
    assert joint[0] == joint[1]


# ---- passes of the user


def test_a_pass_of_the_user_runs_too() -> None:
    seen: list[int] = []

    class Users(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            seen.append(len(graph.nodes))

        def uuid(self) -> Any:
            return b"users"

    compiled(pe_fx.transform(mlp(), X), X)
    torch.compiler.reset()
    run = torch.compile(mlp(), backend="pe_fx", options={"inductor": {"joint_custom_pre_pass": Users()}})
    run(X).sum().backward()
    assert len(seen) == 1


LOWERING = Path(pe_fx.compiled.lowering.__file__).parent


@pytest.mark.parametrize("file", sorted(str(file.relative_to(LOWERING)) for file in LOWERING.rglob("*.py")))
def test_one_line_changed_in_any_file_is_another_uuid(file: str, tmp_path: Path) -> None:
    """So that Inductor's caches never serve what another version of the passes made."""
    copied = tmp_path / "lowering"
    shutil.copytree(LOWERING, copied)
    assert hash_of_sources(copied) == UUID
    hash_of_sources(LOWERING)  # what it remembers is of another folder
    lines = (copied / file).read_text().splitlines(keepends=True)
    lines[len(lines) // 2] = "changed\n"
    (copied / file).write_text("".join(lines))
    assert hash_of_sources(copied) != UUID


def test_inductor_is_told_the_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def compile_nothing(gm: fx.GraphModule, inputs: Any, options: dict[str, Any]) -> fx.GraphModule:
        given.append(options["joint_custom_pre_pass"].uuid())
        return gm

    monkeypatch.setattr(torch._inductor, "compile", compile_nothing)
    torch.compile(mlp(), backend="pe_fx")(X)
    torch.compile(mlp(), backend="pe_fx", options={"single_read": False})(X)
    assert given == [(UUID, True), (UUID, False)]


def test_a_cast_that_fails_stays(caplog: pytest.LogCaptureFixture) -> None:
    from pe_fx.compiled.lowering.casts import share_casts

    graph = fx.Graph()
    weight = graph.placeholder("weight")
    weight.meta["val"] = torch.ones(2, 3)
    view = graph.call_function(aten.permute.default, (weight, [1, 0]))
    cast = graph.call_function(CAST, (view, "no dtype"))
    graph.output(cast)
    share_casts(graph)
    assert "not shared" in caplog.text
    assert "no dtype" in caplog.text
    assert graph.output_node().args[0] is cast


def test_a_pass_that_fails_is_left_out(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(graph: fx.Graph) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(pe_fx.compiled.lowering, "PASSES", (failing, *pe_fx.compiled.lowering.PASSES))
    forward, _ = compiled(pe_fx.transform(mlp(), X), X)
    assert "failing failed" in caplog.text
    assert len(casts_of(forward, 64 * 256)) == 1


def test_numbers_of_the_shape_may_be_added_and_dynamic(caplog: pytest.LogCaptureFixture) -> None:
    model = pe_fx.transform(mlp(), X)
    run = torch.compile(lambda x: (model(x) + x.shape[0], x.shape[0]), backend="pe_fx", dynamic=True)
    for x in (X, X[:7]):
        torch.testing.assert_close(run(x)[0], model(x) + len(x))
    assert "failed" not in caplog.text


def test_a_gradient_that_counts_twice_is_added_twice() -> None:
    """In the order in which the graph can be run."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2, 2)
    products = []
    for _ in range(3):
        products.append(graph.call_function(aten.bmm.default, (x, x)))
        products[-1].meta["val"] = torch.ones(2, 2)
    total = products[0]
    for term in (*products[1:], *products):
        total = graph.call_function(aten.add.Tensor, (total, term))
        total.meta["val"] = torch.ones(2, 2)
    graph.output((total,))
    sums.sum_in_turn(graph)
    graph.eliminate_dead_code()
    graph.lint()
    added = graph.find_nodes(op="call_function", target=torch.ops.pe_fx.plus.default)
    assert Counter(term for node in added for term in node.args[:2]) == dict.fromkeys(products, 2) | dict.fromkeys(added[:-1], 1)
