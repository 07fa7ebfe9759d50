"""The interactive viewer, driven by its keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from textual.pilot import Pilot
from torch import nn

from pe_fx.diff import Diff, Graph, compare, diff_transform
from pe_fx.diff.outline import Outline
from pe_fx.diff.tui import Misses, Pane, Viewer

Scenario = Callable[[Viewer, Pilot[None]], Awaitable[None]]


def block(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64))


@pytest.fixture(scope="module")
def diff() -> Diff:
    """Twelve blocks that are tied, between a layer alone and a head that nearly is a site."""
    head = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 5))
    return diff_transform(nn.Sequential(nn.Linear(8, 64), *(block(128) for _ in range(12)), head), name="net")


def play(diff: Diff, scenario: Scenario, size: tuple[int, int] = (100, 30)) -> Viewer:
    async def run() -> Viewer:
        viewer = Viewer(diff)
        async with viewer.run_test(size=size) as pilot:
            await pilot.pause()
            await scenario(viewer, pilot)
        return viewer

    return asyncio.run(run())


def shown(viewer: Viewer, column: str) -> list[str]:
    """The lines of a pane that are on the screen."""
    pane = viewer.query_one(f"#{column}", Pane)
    return [pane.render_line(y).text.rstrip() for y in range(pane.scrollable_content_region.height)]


def details(viewer: Viewer) -> str:
    return str(viewer.query_one("#details Static").render())


def test_it_opens_at_the_first_change(diff: Diff) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        assert viewer.here.module == "1"
        line = viewer.cursor
        assert shown(viewer, "tree")[line].split() == ["▾", "1", "mlp", "−8,192"]
        assert shown(viewer, "before")[line] == "  Sequential  16,576 params"
        assert shown(viewer, "after")[line + 1].startswith("  0.weight 128×64, 0.bias 128")
        assert shown(viewer, "before")[line + 3].startswith("- 2.weight 64×128")
        assert shown(viewer, "after")[line + 3].startswith("+ 0.weightᵀ 64×128")

    play(diff, scenario)


def test_next_and_previous_change(diff: Diff) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        await pilot.press("c", "c")
        assert viewer.here.module == "3"
        await pilot.press("C")
        assert viewer.here.module == "2"
        await pilot.press("C", "C")
        assert viewer.here.module == "12", "around the end"

    play(diff, scenario)


def test_the_panes_scroll_in_step(diff: Diff) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        await pilot.press("e", "end")
        await pilot.pause()
        offsets = {pane.scroll_offset.y for pane in viewer.query(Pane)}
        assert len(offsets) == 1
        assert offsets != {0}
        assert "output" in shown(viewer, "tree")[-1]
        viewer.query_one("#after", Pane).scroll_to(y=3, animate=False)
        await pilot.pause()
        assert {pane.scroll_offset.y for pane in viewer.query(Pane)} == {3}

    play(diff, scenario)


def test_fold_and_unfold(diff: Diff) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        lines = len(viewer.lines)
        await pilot.press("space")
        assert len(viewer.lines) == lines - 3
        assert viewer.here.module == "1"
        await pilot.press("right", "down", "down")
        assert viewer.here.name == "1 gelu"
        await pilot.press("left")
        assert viewer.here.module == "1", "from an operation to the module that it is in"
        await pilot.press("e")
        assert len(viewer.lines) == len(viewer.outline.items)
        await pilot.press("E")
        assert [item.name for item in viewer.lines[:4]] == ["Sequential", "input", "0 linear", "1"]
        assert viewer.here.module == "1"
        assert len(viewer.lines) < len(viewer.outline.items) - 30

    play(diff, scenario)


def test_search(diff: Diff) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"7.1 gelu", "enter")
        assert not viewer.matches, "a module and its operation are no one text"
        await pilot.press("slash")
        viewer.query_one("#search").value = ""
        await pilot.press(*"GELU", "enter")
        assert viewer.here.name == "1 gelu"
        assert viewer.here.module == "1.1"
        await pilot.press("n")
        assert viewer.here.module == "2.1"
        assert viewer.here in viewer.lines, "what is folded is unfolded"
        await pilot.press("N", "N")
        assert viewer.here.module == "13.1"
        assert "match 13 of 13" in str(viewer.query_one("#tree").border_title)

    play(diff, scenario)


def test_the_search_is_left_without_going_anywhere(diff: Diff) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        before = viewer.here
        await pilot.press("slash", *"output", "escape")
        assert viewer.here is before
        await pilot.press("c")
        assert viewer.here.module == "2", "keys are keys again"

    play(diff, scenario)


def test_details_of_a_site_and_of_an_operation(diff: Diff) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        assert "mlp  1: −8,192 parameters" in details(viewer)
        assert "- 1.2.weight 64×128\n+ 1.2.weight ← 1.0.weightᵀ" in details(viewer)
        await pilot.press("down", "down", "down")
        assert details(viewer).startswith("linear in 1.2  (changed: weights)\n- linear_2 1.2.weight 64×128")
        assert "shared: 1.0.weight 128×64 is read as 1.0.weight (linear in 1.0), 1.0.weightᵀ (linear in 1.2)" in details(viewer)
        assert "reads: gelu in 1.1\nread by: linear in 2.0" in details(viewer)
        await pilot.press("d")
        assert not viewer.query_one("#details").display

    play(diff, scenario)


def test_who_shares_a_weight_is_marked_and_found(diff: Diff) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        await pilot.press("down")
        assert [item.module for item in viewer.lines if item in viewer.shared] == ["1.0", "1.2"]
        assert shown(viewer, "tree")[viewer.cursor + 2].split() == ["≡", "2", "linear", "−8,192"]
        await pilot.press("s")
        assert viewer.here.module == "1.2"
        await pilot.press("up")
        assert not viewer.shared, "a gelu shares nothing"

    play(diff, scenario)


def test_a_folded_module_stands_for_the_sharers_inside(diff: Diff) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        await pilot.press("space")
        assert viewer.shared == {viewer.here}

    play(diff, scenario)


def test_misses_with_their_reasons(diff: Diff) -> None:
    (miss,) = diff.misses

    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        await pilot.press("m")
        assert isinstance(viewer.screen, Misses)
        await pilot.press("escape")
        assert not isinstance(viewer.screen, Misses)
        await pilot.press("m", "enter")
        assert viewer.here.module == miss.name
        assert miss.reason in details(viewer)

    play(diff, scenario)


def test_a_click_goes_there_and_a_second_folds(diff: Diff) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        lines = len(viewer.lines)
        await pilot.press("home")
        await pilot.click("#before", offset=(5, 4))
        assert viewer.here.module == "1"
        await pilot.click("#before", offset=(5, 4))
        assert len(viewer.lines) == lines - 3

    play(diff, scenario)


def test_key_help_and_quit(diff: Diff) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        await pilot.press("question_mark")
        assert viewer.screen.query("HelpPanel")
        await pilot.press("question_mark")
        assert not viewer.screen.query("HelpPanel")
        await pilot.press("q")
        assert not viewer.is_running

    assert play(diff, scenario).return_code == 0


def test_without_differences() -> None:
    graph = Graph.of(block())

    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        await pilot.press("c", "s", "m", "escape", "n")
        assert viewer.here is viewer.outline.root

    play(compare(graph, Graph.of(block())), scenario)


@pytest.mark.parametrize("size", [(40, 12), (20, 6), (300, 90)])
def test_narrow_and_wide(diff: Diff, size: tuple[int, int]) -> None:
    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        await pilot.press("c", "e", "end", "home", "m", "escape", "question_mark")

    play(diff, scenario, size)


def test_what_was_added_and_removed_leaves_a_gap() -> None:
    before = Graph.of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    after = Graph.of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)))

    async def scenario(viewer: Viewer, pilot: Pilot[None]) -> None:
        assert viewer.here.module == "2"
        assert shown(viewer, "before")[viewer.cursor].startswith("╱╱╱")
        assert shown(viewer, "after")[viewer.cursor].startswith("+ 2.weight 4")

    play(compare(before, after), scenario)


def test_a_renamed_module_is_one_line_with_both_paths() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = block()

        def forward(self, x):
            return self.inner(x)

    class Renamed(Wrapped):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.body = block()

        def forward(self, x):
            return self.body(x)

    outline = Outline(compare(Graph.of(Wrapped()), Graph.of(Renamed())))
    (item,) = outline.changed
    assert outline.columns(item) == ("Sequential  8,320 params", "body  Sequential  8,320 params")
    assert outline.note(item) == "renamed"


def test_a_change_without_a_rule_is_at_its_operation() -> None:
    class Shifted(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + 1

    before, after = block(), Shifted(*block())
    outline = Outline(compare(Graph.of(before), Graph.of(after)))
    assert [(item.name, outline.note(item)) for item in outline.changed] == [("add", "added")]
    assert next(outline.details(outline.changed[0])) == ("site", "add in the model  (added)")


def test_a_model_that_was_wrapped() -> None:
    outline = Outline(compare(Graph.of(block()), Graph.of(nn.Sequential(block(), nn.Tanh()))))
    (linear,) = (item for item in outline.items if item.name == "0 linear")
    assert outline.columns(linear) == ("0.weight 64×64, 0.bias 64 → 2×64", "0.0.weight 64×64, 0.0.bias 64 → 2×64")
    assert outline.note(outline.root) == "renamed"
