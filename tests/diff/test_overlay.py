"""Where a drawing puts things, and the pictures that need no browser."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Net, blocks, linear, mlp
from torch import Tensor, nn
from towers import tower

from pe_fx.diff import Diff, Graph, compare, diff_transform
from pe_fx.diff.overlay import AFTER, BEFORE, BENDS, ENTRY, EXIT, MOST, ROOM, ROOT, RUN, Overlay, layered
from pe_fx.diff.picture import svg, write_png, write_svg
from pe_fx.errors import PeFxError

X = torch.randn(3, 8)


def between(first: nn.Module, second: nn.Module) -> Diff:
    return compare(Graph.of(first, X), Graph.of(second, X))


def paths(overlay: Overlay, side: int = BEFORE) -> list[str]:
    """The modules and operations that one side has, by what their labels say first."""
    return [overlay.labels(part, side)[0] for part in range(1, len(overlay.parts)) if overlay.sides(part) & side]


# ---- one tree for two graphs


def test_what_both_graphs_have_is_one_part() -> None:
    overlay = Overlay(diff_transform(blocks(2), X))
    assert all(part.before and part.after for part in overlay.parts if not part.is_module)
    assert set(overlay.edges.values()) == {BEFORE | AFTER}
    held = {f"{overlay.parts[part].module} {edit.kind}" for part, (_, edit) in overlay.edit.items()}
    assert held == {"blocks.0.2 changed", "blocks.1.2 changed"}
    assert [overlay.labels(part, AFTER)[1] for part in overlay.edit] == ["0.weightᵀ", "0.weightᵀ"]


def test_a_part_of_one_graph_stands_between_its_neighbours() -> None:
    overlay = Overlay(between(nn.Sequential(linear(8, 8), nn.ReLU()), nn.Sequential(linear(8, 8), nn.ReLU(), nn.Tanh())))
    assert paths(overlay, BEFORE) == ["input", "0  linear", "1  relu", "output"]
    assert paths(overlay, AFTER) == ["input", "0  linear", "1  relu", "2  tanh", "output"]
    assert overlay.edges[3, 4] == AFTER
    assert overlay.edges[3, 5] == BEFORE


def test_a_renamed_module_is_one_part_with_two_names() -> None:
    first, second = nn.ModuleDict({"body": mlp()}), nn.ModuleDict({"trunk": mlp()})
    overlay = Overlay(between(Net(lambda m, x: m.net["body"](x), net=first), Net(lambda m, x: m.net["trunk"](x), net=second)))
    (module,) = (part for part in range(1, len(overlay.parts)) if overlay.parts[part].is_module)
    assert (overlay.path(module, BEFORE), overlay.path(module, AFTER)) == ("net.body", "net.trunk")
    assert overlay.module("net.body") == overlay.module("net.trunk") == module


def test_changes_and_savings_add_up_towards_the_root() -> None:
    diff = diff_transform(blocks(3), X)
    overlay = Overlay(diff)
    assert overlay.parts[ROOT].delta == overlay.parts[overlay.module("blocks")].delta == diff.delta
    block = overlay.parts[overlay.module("blocks.1")]
    assert (block.changes, block.delta) == ({1}, -128)


def test_links_go_from_the_source_of_a_tie_to_what_is_tied() -> None:
    overlay = Overlay(diff_transform(blocks(2), X, share=("mlp",)))
    links = [(overlay.parts[a].module, overlay.parts[b].module) for a, b in overlay.links]
    assert links == [("blocks.0.0", name) for name in ("blocks.0.2", "blocks.1.0", "blocks.1.2")]


def test_modules_unfold_while_there_is_room() -> None:
    overlay = Overlay(diff_transform(blocks(3), X))
    assert {overlay.parts[part].module for part in overlay.opened()} == {"", "blocks", "blocks.0", "blocks.1", "blocks.2"}
    large = Overlay(compare(tower(30, tied=False), tower(30, tied=True)))
    assert [large.parts[part].module for part in large.opened()] == ["", "blocks"][: 1 + (ROOM >= 30)]
    same = Overlay(compare(tower(3, tied=False), tower(3, tied=False)))
    assert same.opened() == [ROOT]


@pytest.mark.parametrize("flat", [False, True])
def test_very_many_children_are_held_in_runs(flat: bool) -> None:
    blocks = 30 if flat else MOST + 1
    overlay = Overlay(compare(tower(blocks, tied=False, flat=flat), tower(blocks, tied=True, flat=flat)))
    holder = overlay.parts[ROOT if flat else overlay.module("blocks")]
    runs = [overlay.parts[run] for run in holder.children]
    assert all(overlay.is_run(run) for run in holder.children)
    assert {len(run.children) for run in runs[:-1]} == {RUN}
    assert sum(len(run.children) for run in runs) == (11 * blocks + 1 if flat else blocks)
    assert overlay.labels(holder.children[1], BEFORE)[0] == "101 … 200"
    assert all(len(points) <= MOST + 2 for _, points, _ in overlay.levels())


# ---- layers


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of the machine's load
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_any_edges_can_be_laid_out(edges: list[tuple[int, int]]) -> None:
    points, routes = layered(list(range(10)), edges)
    assert len(set(points.values())) == len(points) == 10
    assert set(routes) == {(min(edge), max(edge)) for edge in edges if edge[0] != edge[1]}
    for (source, target), bends in routes.items():
        assert [layer for _, layer in bends] == list(range(points[source][1] + 1, points[target][1]))


def test_layouts_are_the_same_each_time() -> None:
    edges = [(a, b) for a in range(12) for b in range(12) if (a * b) % 5 == 1]
    assert len({repr(layered(list(range(12)), edges)) for _ in range(5)}) == 1


def test_a_dense_module_is_laid_out_by_its_short_edges() -> None:
    edges = [(a, b) for b in range(60) for a in range(b)]
    points, routes = layered(list(range(60)), edges)
    assert [layer for _, layer in points.values()] == list(range(60))
    assert sum(map(len, routes.values())) <= BENDS
    assert {(a, a + 1) for a in range(59)} <= set(routes) < set(edges)


def test_a_module_that_runs_twice_makes_no_cycle() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.a(m.b(m.a(x)))

    model = Net(forward, a=nn.Sequential(linear(8, 8), nn.ReLU()), b=nn.Sequential(linear(8, 8), nn.ReLU()))
    levels = {part: (points, routes) for part, points, routes in Overlay(between(model, model)).levels()}
    overlay = Overlay(between(model, model))
    a, b = overlay.module("a"), overlay.module("b")
    points, routes = levels[ROOT]
    assert (a, b) in routes
    assert (b, a) not in routes
    assert points[a][1] < points[b][1]


def test_edges_enter_and_leave_a_module() -> None:
    overlay = Overlay(between(blocks(2), blocks(2)))
    levels = {part: points for part, points, _ in overlay.levels()}
    block = levels[overlay.module("blocks.0")]
    assert block[ENTRY][1] < min(point[1] for end, point in block.items() if end >= 0)
    assert block[EXIT][1] > max(point[1] for end, point in block.items() if end >= 0)
    assert not {ENTRY, EXIT} & set(levels[ROOT])


# ---- pictures


def texts(picture: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]


def test_a_picture_shows_both_sides_of_a_module() -> None:
    shown = texts(svg(diff_transform(blocks(3), X, name="net <3>"), "blocks.1"))
    assert shown.count("net <3>: blocks.1") == 1
    assert shown.count("net <3>, tied: blocks.1") == 1
    assert shown.count("0.weight 16×8") == 2
    assert (shown.count("2.weight 8×16"), shown.count("0.weightᵀ")) == (1, 1)
    assert shown[-2:] == ["changed", "one matrix"]


def test_a_picture_of_graphs_that_differ_leaves_gaps() -> None:
    shown = texts(svg(between(nn.Sequential(linear(8, 8), nn.Tanh()), nn.Sequential(linear(8, 8), nn.ReLU()))))
    assert [shown.count(label) for label in ("0  linear", "1  tanh", "1  relu")] == [2, 1, 1]
    assert {"added", "removed"} <= set(shown)


def test_pictures_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    diff = diff_transform(blocks(1), X)
    write_svg(diff, tmp_path / "net.svg")
    assert (tmp_path / "net.svg").read_text() == svg(diff)
    with pytest.raises(PeFxError, match="nothing to draw in module 'nowhere'"):
        write_svg(diff, tmp_path / "other.svg", "nowhere")
    with pytest.raises(FileNotFoundError):
        write_svg(diff, tmp_path / "nowhere" / "net.svg")
    assert [file.name for file in tmp_path.iterdir()] == ["net.svg"]


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="resvg-py has no wheel for this machine")
    write_png(diff_transform(blocks(1), X), tmp_path / "net.png")
    assert (tmp_path / "net.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("library", "write"), [("fast_sugiyama", write_svg), ("resvg_py", write_png)])
def test_a_missing_library_names_the_extra(library: str, write: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(PeFxError, match=r"pe_fx\[cli\]"):
        write(diff_transform(blocks(1), X), tmp_path / "net")  # type: ignore[operator]
