"""What a diff finds: between a model and its tied self the plan's sites, between a model and itself nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from models import MODELS, prepared
from oracle import Net, blocks, linear, mlp
from torch import Tensor, fx, nn

import pe_fx
from pe_fx.diff import Change, Diff, Graph, compare, diff_transform, terminal
from pe_fx.diff.align import align
from pe_fx.diff.tree import rows, signed

X = torch.randn(3, 8)


def picture(model: nn.Module, inputs: Any = X) -> Graph:
    return Graph.of(model, inputs)


def assert_shows_the_plan(diff: Diff, plan: pe_fx.Plan) -> None:
    """Every site is a change, every change a site, and together they account for every node and parameter that differs."""
    assert sorted((change.kind, change.module) for change in diff.changes) == sorted((site.kind, site.name) for site in plan.sites)
    assert all(change.edits for change in diff.changes)
    assert sorted(tie for change in diff.changes for tie in change.ties) == sorted(map(str, plan.ties))
    assert diff.delta == sum(change.delta for change in diff.changes) == plan.params_after - plan.params_before
    edits = [edit for change in diff.changes for edit in change.edits]
    assert len(edits) == len(set(edits))
    targets = {tie.target for tie in plan.ties}
    readers = {id for name in targets for id in diff.before.readers[name]}
    assert {edit.before for edit in edits if edit.kind == "changed"} == readers


# ---- a model and its tied self


@pytest.mark.parametrize("name", MODELS)
def test_a_transform_shows_its_sites_and_nothing_else(name: str) -> None:
    model = prepared(name)
    inputs = model.inputs
    diff = compare(picture(model.dense, inputs), picture(model.tied, inputs), model.plan)
    assert_shows_the_plan(diff, model.plan)
    assert len(diff.pairs) == len(diff.before.nodes) == len(diff.after.nodes)


@pytest.mark.parametrize(("name", "sites"), [("resnet50", 12), ("deit_small_patch16_224", 24)])
def test_real_models_on_the_meta_device(name: str, sites: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = pe_fx.plan(model)
    diff = diff_transform(model, made=plan)
    assert len(diff.changes) == sites
    assert_shows_the_plan(diff, plan)
    assert not compare(diff.before, Graph.of(timm.create_model(name)))
    found = json.loads(diff.to_json())
    assert [(change["kind"], change["module"]) for change in found["changes"]] == [(c.kind, c.module) for c in diff.changes]
    headings = [row.note for row in rows(diff, fold=False) if row.role == "site"]
    assert headings == [f"{change.kind}  {signed(change.delta)}" for change in diff.changes]
    shown = terminal.unified(diff, 100, fold=False).plain.splitlines()
    assert sum(line.endswith(tuple(headings)) for line in shown) == sites


@pytest.mark.parametrize("entry", ["slice", "expand"])
def test_what_an_entry_block_gains_and_loses_is_part_of_its_site(entry: str) -> None:
    model = prepared("resnet").dense
    diff = diff_transform(model, MODELS["resnet"].inputs, entry=entry)
    treated = [change for change in diff.changes if change.treatment]
    assert treated
    assert {change.treatment for change in treated} == {entry}
    assert all(change.is_site for change in diff.changes)
    assert {edit.kind for change in treated for edit in change.edits} == {"added", "removed", "changed"}
    assert sum(change.delta for change in diff.changes) == diff.delta


def test_a_change_tells_weights_ties_and_edits() -> None:
    (change,) = diff_transform(blocks(1), X).changes
    assert (change.kind, change.module, change.delta) == ("mlp", "blocks.0", -128)
    assert [str(weight) for weight in change.weights] == [
        "blocks.0.0.weight (16, 8)",
        "blocks.0.2.weight (8, 16) → blocks.0.0.weightᵀ",
    ]
    (edit,) = change.edits
    assert (edit.before, edit.after, edit.what) == ("linear_1", "linear_1", ("weights",))


def test_a_matrix_in_common_names_those_that_share_it() -> None:
    diff = diff_transform(blocks(3), X, share=("mlp",))
    assert diff.shared == {"blocks.0.0.weight": tuple(f"blocks.{i}.{j}.weight" for i, j in [(0, 2), (1, 0), (1, 2), (2, 0), (2, 2)])}
    assert diff.changes[1].shared_with == ("blocks.0.0.weight", "blocks.0.2.weight", "blocks.2.0.weight", "blocks.2.2.weight")


def test_misses_come_along() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.c(m.b(x.relu()).relu())

    diff = diff_transform(Net(forward, b=linear(8, 16), c=linear(16, 4)), X)
    assert not diff
    assert ["not transposes" in miss.reason for miss in diff.misses] == [True]


def test_a_graph_module_whose_weights_are_attributes() -> None:
    exported = torch.export.export(blocks(2), (X,)).module()
    diff = diff_transform(exported)
    assert [change.module for change in diff.changes] == ["blocks.0", "blocks.1"]
    assert [str(operand) for operand in diff.after.nodes["linear_1"].operands] == ["blocks.0.0.weightᵀ", "blocks.0.2.bias"]


def test_symbolic_traces_are_compared_alike() -> None:
    assert [change.module for change in diff_transform(fx.symbolic_trace(nn.Sequential(mlp(), mlp())), X).changes] == ["0", "1"]


# ---- a model and itself


def test_nothing_differs_between_two_instances() -> None:
    assert not compare(picture(blocks(3)), picture(blocks(3)))


def test_nothing_differs_between_a_model_and_its_export() -> None:
    model = blocks(2)
    for mode in (model.train(), model.eval()):
        assert not compare(picture(model), picture(torch.export.export(mode, (X,)).module()))


def test_names_of_nodes_do_not_matter() -> None:
    def other_order(m: Net, x: Tensor) -> Tensor:
        right, left = m.b(x), m.a(x)
        return left + right

    def one_order(m: Net, x: Tensor) -> Tensor:
        left, right = m.a(x), m.b(x)
        return left + right

    first, second = (picture(Net(forward, a=linear(8, 8), b=linear(8, 8))) for forward in (one_order, other_order))
    assert not compare(first, second)
    assert align(first, second)["linear"] == "linear_1"


def test_a_module_of_another_name_is_renamed() -> None:
    inner = blocks(2)
    diff = compare(picture(inner), picture(Net(lambda m, x: m.net(x), net=blocks(2))))
    assert [(change.kind, change.module, change.module_after) for change in diff.changes] == [("renamed", "", "net")]
    assert len(diff.pairs) == len(diff.before.nodes)


# ---- two models


def only(diff: Diff) -> Change:
    (change,) = diff.changes
    return change


def test_an_added_block_is_one_change() -> None:
    diff = compare(picture(blocks(2)), picture(blocks(3)))
    added = next(change for change in diff.changes if change.kind == "added" and change.module == "blocks.2")
    assert added.delta == 8 * 16 * 2 + 16 + 8
    assert [edit.kind for edit in added.edits] == ["added"] * 3
    assert {edit.kind for change in diff.changes for edit in change.edits} == {"added"}
    assert sum(change.delta for change in diff.changes) == diff.delta


def test_another_width_changes_weights_and_shapes() -> None:
    diff = compare(picture(mlp(16)), picture(mlp(32)))
    assert [change.module for change in diff.changes] == ["0", "1", "2"]
    assert [str(weight) for weight in diff.changes[0].weights] == ["0.weight (16, 8) → (32, 8)", "0.bias (16,) → (32,)"]
    assert [edit.what for change in diff.changes for edit in change.edits] == [("weights", "shape"), ("shape",), ("weights",)]


def test_another_setting() -> None:
    change = only(compare(picture(nn.Sequential(nn.Softmax(0))), picture(nn.Sequential(nn.Softmax(1)))))
    assert change.edits[0].what == ("settings",)


def test_another_operation_in_its_place() -> None:
    change = only(compare(picture(nn.Sequential(linear(8, 8), nn.ReLU())), picture(nn.Sequential(linear(8, 8), nn.GELU()))))
    assert sorted(edit.kind for edit in change.edits) == ["added", "removed"]


def test_other_wires() -> None:
    def build(swap: bool) -> nn.Module:
        def forward(m: Net, x: Tensor) -> Tensor:
            y = m.a(x)
            return m.b(y) + (x if swap else y)

        return Net(forward, a=linear(8, 8), b=linear(8, 8))

    change = only(compare(picture(build(False)), picture(build(True))))
    assert [edit.what for edit in change.edits] == [("inputs",)]


def test_a_parameter_that_nothing_reads() -> None:
    plain, more = mlp(), mlp()
    more.register_parameter("unread", nn.Parameter(torch.zeros(5)))
    change = only(compare(picture(plain), picture(more)))
    assert (change.kind, change.module, change.delta, change.edits) == ("added", "", 5, ())


def test_two_models_of_which_one_is_tied() -> None:
    change = only(compare(picture(blocks(1)), picture(pe_fx.transform(blocks(1), X))))
    assert (change.kind, change.module) == ("changed", "blocks.0.2")
    assert [str(weight) for weight in change.weights] == ["blocks.0.2.weight (8, 16) → blocks.0.0.weightᵀ"]


def test_one_weight_in_place_of_two() -> None:
    def two(m: Net, x: Tensor) -> Tensor:
        return m.b(m.a(x).relu())

    def one(m: Net, x: Tensor) -> Tensor:
        return m.a(m.a(x).relu())

    def renamed(m: Net, x: Tensor) -> Tensor:
        return m.c(m.c(x).relu())

    def layer() -> nn.Linear:
        return linear(8, 8, bias=False)

    before = picture(Net(two, a=layer(), b=layer()))
    shared = compare(before, picture(Net(one, a=layer())))
    assert [str(weight) for change in shared.changes for weight in change.weights] == ["b.weight (8, 8) → a.weight"]
    assert shared.delta == sum(change.delta for change in shared.changes) == -64
    other = compare(before, picture(Net(renamed, c=layer())))
    assert other.delta == sum(change.delta for change in other.changes) == -64
    assert [edit.what for change in other.changes for edit in change.edits] == [("weights",)]


def test_models_with_nothing_in_common() -> None:
    diff = compare(picture(mlp()), picture(nn.Sequential(nn.Flatten(), nn.Conv1d(1, 4, 3)), torch.randn(1, 1, 9)))
    assert {change.kind for change in diff.changes} <= {"added", "removed", "changed"}
    assert diff.delta == sum(change.delta for change in diff.changes)
    assert set(diff.edit_of_before) >= {"linear", "gelu", "linear_1"}
    assert set(diff.edit_of_after) >= {"flatten", "conv1d"}


# ---- the picture


def test_views_of_weights_are_no_nodes() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        first, second = m.w.chunk(2)
        return x @ torch.cat([first, second[1:3]]).t()

    graph = picture(Net(forward, w=torch.randn(8, 8)))
    assert [node.op for node in graph.nodes.values()] == ["input", "matmul", "output"]
    (operand,) = graph.nodes["matmul"].operands
    assert operand.names == ("w",)
    assert operand.shape == (8, 6)


def test_what_is_written_in_place_is_read_by_what_follows() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        x.relu_()
        return m.b(x)

    graph = picture(Net(forward, a=linear(8, 8), b=linear(8, 8)))
    assert graph.nodes["linear_1"].inputs == ("relu_",)


def test_json_holds_the_graphs_on_request() -> None:
    diff = diff_transform(mlp(), X)
    short, whole = json.loads(diff.to_json()), json.loads(diff.to_json(graphs=True))
    assert short["changes"] == whole["changes"]
    assert "pairs" not in short
    assert whole["pairs"]["linear_1"] == "linear_1"
    assert whole["after"]["graph"][3]["operands"][0]["view"] == "{0}ᵀ"


# ---- text

UNIFIED = """
--- Net
+++ Net, tied
  Net
    blocks  ModuleList
      0  Sequential                                                    mlp  −128
        linear  0.weight 16×8
-       linear  2.weight 8×16
+       linear  2.weight ← 0.weightᵀ
      blocks.1 … blocks.2: as blocks.0                                  2 × −128
    · head
"""

SIDE_BY_SIDE = """
--- Net
+++ Net, tied
  Net                                                      │   Net
    blocks  ModuleList                                     │     blocks  ModuleList
      0  Sequential                                        │       0  Sequential                              mlp  −128
        linear  0.weight 16×8                              │         linear  0.weight 16×8
-       linear  2.weight 8×16                              │ +       linear  2.weight ← 0.weightᵀ
      blocks.1 … blocks.2: as blocks.0                     │       blocks.1 … blocks.2: as blocks.0            2 × −128
    · head                                                 │     · head
"""

STAGE = """
--- Net
+++ Net, tied
  Net
    blocks  ModuleList
      0  Sequential                                                    mlp  −128
        shared: blocks.0.0.weight, by blocks.0, blocks.1, blocks.2
        linear  0.weight 16×8
-       linear  2.weight 8×16
+       linear  2.weight ← 0.weightᵀ
      1  Sequential                                                    mlp  −256
        shared: blocks.0.0.weight, by blocks.0, blocks.1, blocks.2
-       linear  0.weight 16×8
+       linear  0.weight ← blocks.0.0.weight
-       linear  2.weight 8×16
+       linear  2.weight ← blocks.0.0.weightᵀ
      blocks.2: as blocks.1                                                 −256
    · head
"""

STAT = """
 blocks.{0…1} | mlp  2 × −128 −−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−−
"""

NARROW = """
--- Net
+++ Net, tied
  Net
    blocks  ModuleList
      0  Sequential
               mlp  −128
      linear  0.weight
      16×8
-     linear  2.weight
-     8×16
+     linear  2.weight ←
+     0.weightᵀ
    · head
"""


def test_unified() -> None:
    assert terminal.unified(diff_transform(blocks(3), X), 80).plain == UNIFIED[1:]


def test_side_by_side() -> None:
    assert terminal.side_by_side(diff_transform(blocks(3), X), 120).plain == SIDE_BY_SIDE[1:]


def test_what_is_shared() -> None:
    assert terminal.unified(diff_transform(blocks(3), X, share=("mlp",)), 80).plain == STAGE[1:]


def test_stat() -> None:
    assert terminal.stat(diff_transform(blocks(2), X), 80).plain == STAT[1:]
    unfolded = terminal.stat(diff_transform(blocks(2), X), 80, fold=False).plain.splitlines()
    assert [line.split(" | ")[0] for line in unfolded] == [" blocks.0", " blocks.1"]


def test_changes_that_differ_are_not_folded() -> None:
    """Of three blocks that share a matrix, the first has it; the others read it."""
    stat = terminal.stat(diff_transform(blocks(3), X, share=("mlp",)), 80).plain.splitlines()
    assert [line.split(" | ")[0].strip() for line in stat] == ["blocks.0", "blocks.{1…2}"]


def test_a_narrow_terminal() -> None:
    assert terminal.unified(diff_transform(blocks(1), X), 24).plain == NARROW[1:]


@pytest.mark.parametrize("width", [20, 80, 120])
def test_side_by_side_keeps_its_columns(width: int) -> None:
    lines = terminal.side_by_side(diff_transform(blocks(3), X), 2 * width).plain.splitlines()[2:]
    assert {line.index("│") for line in lines} == {(2 * width - 3) // 2 + 1}


def test_unfolded() -> None:
    text = terminal.unified(diff_transform(blocks(3), X), 80, fold=False).plain
    assert text.count("+       linear  2.weight ← 0.weightᵀ") == 3


def test_blocks_that_changed_otherwise_are_not_folded() -> None:
    text = terminal.unified(diff_transform(blocks(3), X, exclude=["blocks.1"]), 80).plain
    assert " as " not in text
    assert "      · 1\n" in text


def test_summary() -> None:
    assert terminal.summary(diff_transform(blocks(2), X)).plain == (
        "2 changes (2 mlp); 2 of 11 nodes; 587 → 331 parameters (−256, −43.6 %)"
    )
    assert terminal.summary(compare(picture(mlp()), picture(mlp()))).plain == "no differences"
