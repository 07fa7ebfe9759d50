"""The page of a diff, in a browser without a network: what it holds, and what a reader can do with it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from oracle import Net, linear
from torch import Tensor, nn
from towers import tower
from typer.testing import CliRunner

import pe_fx
from pe_fx.cli.commands import app
from pe_fx.diff import Diff, Graph, compare, diff_transform
from pe_fx.diff.page import page, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

X = torch.randn(3, 8)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    library = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
    with library.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Reader:
    """Someone who looks at a page."""

    def __init__(self, browser: Any, file: Path, scheme: str) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.file = file
        self.page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme=scheme)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("body[data-drawn]", timeout=30_000)

    def __call__(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def part(self, path: str, op: str | None = None) -> int:
        """The number of a module, or of an operation of one."""
        test = "part.children" if op is None else f"(part.before ?? part.after).op === {op!r}"
        return self(f"viewer.data.parts.findIndex((part) => (part.before ?? part.after).path === {path!r} && {test})")

    def shown(self, side: str = "after") -> set[int]:
        return set(self(f"viewer.panes.{side}.nodes().map((node) => Number(node.id()))"))

    def classes(self, part: int, side: str = "after") -> set[str]:
        return set(self(f"viewer.panes.{side}.getElementById('{part}').classes()"))

    def click(self, part: int, side: str = "after", head: bool = False) -> None:
        """On the middle of a part, or on the heading of an unfolded module."""
        x, y = self(
            """([part, side, head]) => {
                const pane = viewer.panes[side], frame = document.getElementById(side).getBoundingClientRect();
                const box = pane.getElementById(`${part}`).renderedBoundingBox({ includeLabels: false, includeOverlays: false });
                return [frame.x + (head ? box.x1 + 20 : (box.x1 + box.x2) / 2), frame.y + (head ? box.y1 + 8 : (box.y1 + box.y2) / 2)];
            }""",
            [part, side, head],
        )
        self.page.mouse.click(x, y)

    def views(self) -> list[dict[str, float]]:
        return [self(f"({{ zoom: viewer.panes.{side}.zoom(), ...viewer.panes.{side}.pan() }})") for side in ("before", "after")]

    def text(self, id: str) -> str:
        return str(self.page.inner_text(f"#{id}"))


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens the page of a diff; at the end, nothing may have gone wrong and nothing may have been asked of a network."""
    readers: list[Reader] = []

    def open_page(diff: Diff, scheme: str = "light") -> Reader:
        file = tmp_path / f"page{len(readers)}.html"
        write_page(diff, file)
        readers.append(Reader(browser, file, scheme))
        return readers[-1]

    yield open_page
    for reader in readers:
        reader.page.close()
        assert reader.said == []
        assert reader.asked == [reader.file.as_uri()]


def mlp(hidden: int = 16) -> nn.Sequential:
    return nn.Sequential(linear(8, hidden), nn.GELU(), linear(hidden, 8))


def residual(depth: int = 3) -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        for block in m.blocks:
            x = x + block(x)
        return m.tail(m.head(x).relu())

    return Net(forward, blocks=nn.ModuleList(mlp() for _ in range(depth)), head=linear(8, 16), tail=linear(16, 4))


@pytest.fixture(scope="module")
def diff() -> Diff:
    return diff_transform(residual(), X, name="residual")


# ---- what it holds


def assert_shows(reader: Reader, diff: Diff) -> None:
    """The page has the diff's data, lists its changes, and marks its edits and nothing else."""
    assert reader("viewer.data.diff") == json.loads(diff.to_json())
    listed = reader("[...document.querySelectorAll('#changes button')].map((button) => [...button.children].map((it) => it.textContent))")
    assert sorted(row[:2] for row in listed) == sorted([change.kind, change.module or "the model"] for change in diff.changes)
    marked = reader(
        "viewer.data.parts.filter((part) => part.edit).map((part) => [part.edit.kind, part.before?.id ?? null, part.after?.id ?? null])"
    )
    assert sorted(map(str, marked)) == sorted(str([edit.kind, edit.before, edit.after]) for change in diff.changes for edit in change.edits)


def test_the_page_shows_the_diff(opened: Any, diff: Diff) -> None:
    reader = opened(diff)
    assert_shows(reader, diff)
    assert "3 changes (3 mlp); 3 of" in reader.text("summary")
    assert "residual, tied" in reader.text("title-after")
    for side in ("before", "after"):
        edits = {part for part in reader.shown(side) if "changed" in reader.classes(part, side)}
        assert len(edits) == 3


@pytest.mark.parametrize(("name", "sites"), [("resnet50", 12), ("deit_small_patch16_224", 24)])
def test_the_sites_of_real_models(name: str, sites: int, opened: Any) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = pe_fx.plan(model)
    diff = diff_transform(model, made=plan)
    reader = opened(diff)
    assert_shows(reader, diff)
    changes = reader("viewer.data.diff.changes")
    assert len(changes) == sites
    assert sorted((change["kind"], change["module"]) for change in changes) == sorted((site.kind, site.name) for site in plan.sites)


def test_a_model_and_itself(opened: Any) -> None:
    model = residual()
    reader = opened(compare(Graph.of(model, X), Graph.of(model, X)))
    assert reader.text("summary") == "no differences"
    assert not any(reader.classes(part) & {"changed", "added", "removed", "holds", "shared"} for part in reader.shown())
    reader.page.keyboard.press("n")


def test_what_one_side_lacks_is_a_gap_there(opened: Any) -> None:
    first, second = nn.Sequential(linear(8, 8), nn.Tanh()), nn.Sequential(linear(8, 8), nn.ReLU())
    reader = opened(compare(Graph.of(first, X), Graph.of(second, X)))
    tanh, relu = reader.part("1", "tanh"), reader.part("1", "relu")
    assert reader.classes(tanh, "before") == {"removed"}
    assert reader.classes(relu, "after") == {"added"}
    assert reader.shown("before") - reader.shown("after") == {tanh}
    assert reader.shown("after") - reader.shown("before") == {relu}


def test_a_renamed_module_can_be_found(opened: Any) -> None:
    first, second = nn.ModuleDict({"body": mlp()}), nn.ModuleDict({"trunk": mlp()})
    before = Graph.of(Net(lambda m, x: m.net["body"](x), net=first), X)
    reader = opened(compare(before, Graph.of(Net(lambda m, x: m.net["trunk"](x), net=second), X)))
    reader.page.click("#changes button")
    assert "net.body → net.trunk" in reader.text("details")
    assert [reader(f"viewer.data.parts[viewer.selected].{side}.path") for side in ("before", "after")] == ["net.body", "net.trunk"]


def test_blocks_that_changed_alike_are_one_row(opened: Any, diff: Diff) -> None:
    reader = opened(diff)
    rows = "[...document.querySelectorAll('#changes > li > :first-child')].map((row) => row.querySelector('summary')?.textContent)"
    assert reader(rows) == ["mlpblocks.{0…2}3 × −128"]
    assert not reader.page.is_visible("#changes button")
    reader.page.click("#changes summary")
    reader.page.click("#changes button >> nth=1")
    assert "blocks.1" in reader.text("details")
    reader.page.click("#changes summary")
    reader.page.keyboard.press("n")
    assert reader.page.is_visible("#changes button[aria-current=true] >> text=blocks.2")


@pytest.mark.parametrize("width", [1200, 1600])
def test_long_names_are_cut_and_stay_in_their_line(width: int, opened: Any) -> None:
    name = "a_transformer_with_a_very_long_name"
    model = Net(lambda m, x: m.outer[name](x), outer=nn.ModuleDict({name: nn.Sequential(residual())}))
    reader = opened(diff_transform(model, X))
    reader.page.set_viewport_size({"width": width, "height": 900})
    reader.page.click("#changes summary")
    lines = reader("""[...document.querySelectorAll("#changes button")].map((button) => [...button.children].map((cell) => {
        const { height, left, right } = cell.getBoundingClientRect(), room = button.getBoundingClientRect();
        return [height, left >= room.left && right <= room.right, cell.title];
    }))""")
    assert [line[1][2] for line in lines] == [f"outer.{name}.0.blocks.{number}" for number in range(3)]
    assert all(height < 26 and is_inside for line in lines for height, is_inside, _ in line)
    last = "document.querySelector('#changes button .where').lastChild"
    assert reader(f"{last}.scrollWidth <= {last}.clientWidth"), "the end of the name, which tells it from others, is cut as well"


def test_near_misses_tell_their_reasons(opened: Any, diff: Diff) -> None:
    reader = opened(diff)
    reader.page.click("#tab-misses")
    assert len(diff.misses) == 1
    assert diff.misses[0].reason in reader.text("misses")
    assert not reader.page.is_visible("#changes")


def test_names_are_text_and_never_markup() -> None:
    model = nn.Sequential(linear(8, 8))
    text = page(diff_transform(model, X, name="<script>alert(1)</script>"))
    assert "alert(1)" not in text.replace("&lt;script&gt;alert(1)&lt;/script&gt;", "")


# ---- what a reader can do


def test_a_click_expands_a_module_in_both_panes(opened: Any, diff: Diff) -> None:
    reader = opened(diff)
    block, fc1 = reader.part("blocks.1"), reader.part("blocks.1.0", "linear")
    reader.page.click("#fold")
    assert reader.shown() == reader.shown("before") == set(reader("viewer.data.parts[0].children"))
    assert "holds" in reader.classes(reader.part("blocks"))
    reader.click(reader.part("blocks"))
    assert block in reader.shown("before") & reader.shown("after")
    reader.click(block, "before")
    assert fc1 in reader.shown("before") & reader.shown("after")
    reader.click(block, head=True)
    assert fc1 not in reader.shown("before") | reader.shown("after")


def test_a_click_on_a_tied_node_shows_its_details(opened: Any, diff: Diff) -> None:
    reader = opened(diff)
    fc1, fc2 = reader.part("blocks.0.0", "linear"), reader.part("blocks.0.2", "linear")
    assert reader.classes(fc2) == {"changed", "shared"}
    assert reader.classes(fc2, "before") == {"changed"}
    reader("(part) => viewer.goto(part)", fc2)
    reader.page.keyboard.press("Escape")
    reader.click(fc2)
    details = reader.text("details")
    for text in ("blocks.0.2", "blocks.0.0.weightᵀ", "8×16", "mlp", "−128", "shares its weight with", "blocks.0.0 linear"):
        assert text in details
    assert {"group"} <= reader.classes(fc1) & reader.classes(fc1, "before")
    reader.page.click("#details .jump")
    assert reader("viewer.selected") == fc1


def test_a_matrix_in_common_is_drawn_between_blocks(opened: Any) -> None:
    reader = opened(diff_transform(residual(), X, share=("mlp",)))
    ends = reader("viewer.panes.after.edges('.link').map((edge) => [Number(edge.source().id()), Number(edge.target().id())])")
    source = reader.part("blocks.0.0", "linear")
    assert {tuple(end) for end in ends} == {
        (source, reader.part(f"blocks.{i}.{j}", "linear")) for i, j in ((0, 2), (1, 0), (1, 2), (2, 0), (2, 2))
    }
    assert reader("viewer.panes.before.edges('.link').length") == 0


@pytest.mark.parametrize("side", ["before", "after"])
def test_the_panes_move_in_step(side: str, opened: Any, diff: Diff) -> None:
    reader = opened(diff)
    first, second = reader.views()
    assert first == second
    frame = reader.page.locator(f"#{side}").bounding_box()
    x, y = frame["x"] + 20, frame["y"] + frame["height"] - 30
    reader.page.mouse.move(x, y)
    reader.page.mouse.wheel(0, -300)
    while reader.views()[0] == first:
        reader.page.wait_for_timeout(20)
    zoomed, other = reader.views()
    assert zoomed == other
    reader.page.mouse.down()
    reader.page.mouse.move(x + 60, y - 40, steps=4)
    reader.page.mouse.up()
    moved, other = reader.views()
    assert moved == other
    assert moved["x"] == pytest.approx(zoomed["x"] + 60, abs=6)
    assert moved["y"] == pytest.approx(zoomed["y"] - 40, abs=6)


def test_parts_stand_at_the_same_place_in_both_panes(opened: Any, diff: Diff) -> None:
    reader = opened(diff)
    places = [
        reader(f"Object.fromEntries(viewer.panes.{side}.nodes().map((it) => [it.id(), it.position()]))") for side in ("before", "after")
    ]
    assert places[0] == places[1]
    boxes = reader("[...viewer.geometry.shown].filter(([part]) => !viewer.open.has(part)).map(([, box]) => box)")
    for place, box in enumerate(boxes):
        for other in boxes[:place]:
            apart = abs(box["x"] - other["x"]) >= (box["width"] + other["width"]) / 2
            assert apart or abs(box["y"] - other["y"]) >= (box["height"] + other["height"]) / 2


def test_search_finds_modules_operations_and_weights(opened: Any, diff: Diff) -> None:
    reader = opened(diff)
    reader.page.click("#fold")
    reader.page.keyboard.press("/")
    reader.page.keyboard.type("blocks.2 gelu")
    assert "blocks.2.1" in reader.text("results")
    reader.page.keyboard.press("Enter")
    gelu = reader.part("blocks.2.1", "gelu")
    assert reader("viewer.selected") == gelu
    assert gelu in reader.shown()
    reader.page.fill("#search", "tail.weight")
    assert len(reader.page.query_selector_all("#results [role=option]")) == 1
    reader.page.click("#results [role=option]")
    assert reader("viewer.selected") == reader.part("tail", "linear")
    reader.page.fill("#search", "nowhere")
    assert reader.text("results") == "nothing found"


def test_the_keyboard_is_enough(opened: Any, diff: Diff) -> None:
    reader = opened(diff)
    press = reader.page.keyboard.press
    press("n")
    press("n")
    assert reader("viewer.selected") == reader.part("blocks.1.2", "linear")
    press("p")
    assert reader("viewer.selected") == reader.part("blocks.0.2", "linear")
    reader.page.focus("#after")
    press("ArrowUp")
    assert reader("viewer.selected") == reader.part("blocks.0.1", "gelu")
    press("Backspace")
    block = reader.part("blocks.0")
    assert reader("viewer.selected") == block
    assert "open" not in reader.classes(block)
    press("Enter")
    assert "open" in reader.classes(block)
    zoom = reader.views()[0]["zoom"]
    press("+")
    assert reader.views()[0]["zoom"] > zoom
    press("Escape")
    assert reader("viewer.selected") is None
    press("c")
    assert reader.part("blocks.0") not in reader.shown()
    press("?")
    assert reader.page.is_visible("#keys")
    assert "Cytoscape Consortium" in reader("document.querySelector('#keys pre').textContent")
    press("Escape")
    assert not reader.page.is_visible("#keys")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(scheme: str, opened: Any, diff: Diff) -> None:
    def brightness() -> tuple[float, float]:
        paper, ink = reader("['backgroundColor', 'color'].map((name) => getComputedStyle(document.querySelector('aside'))[name])")
        return tuple(sum(map(float, color[4:-1].split(","))) for color in (paper, ink))  # type: ignore[return-value]

    def node() -> str:
        return str(reader("viewer.panes.after.nodes()[0].style('background-color')"))

    reader = opened(diff, scheme)
    paper, ink = brightness()
    color = node()
    assert (paper > ink) == (scheme == "light")
    reader.page.keyboard.press("t")
    paper, ink = brightness()
    assert (paper > ink) == (scheme == "dark")
    assert node() != color


# ---- large graphs


@pytest.mark.parametrize("flat", [False, True])
def test_large_graphs(flat: bool, opened: Any) -> None:
    """A first drawing takes 0.5 s on an idle machine; on a busy one it can be compared with that of a small graph alone."""

    def drawn(diff: Diff) -> float:
        return min(opened(diff)("Number(document.body.dataset.drawn)") for _ in range(3))

    blocks, seconds = 910, 9
    diff = compare(tower(blocks, tied=False, flat=flat), tower(blocks, tied=True, flat=flat))
    assert len(diff.before.nodes) == 11 * blocks + 1
    start = time.process_time()
    assert len(page(diff).encode()) < 3_000_000
    assert time.process_time() - start < seconds
    assert drawn(diff) < 8 * drawn(compare(tower(2, tied=False), tower(2, tied=True)))
    reader = opened(diff)
    assert len(reader.shown()) < 500
    reader("viewer.gotoChange(viewer.data.diff.changes.length - 1)")
    assert "changed" in reader.classes(reader("viewer.selected"))


# ---- the command


def test_the_command_writes_the_page_and_prints_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))\n")
    files = ["--html", "net.html", "--svg", "net.svg", "--png", "net.png"]
    result = CliRunner().invoke(app, ["diff", "net.py:net", *files])
    assert result.exit_code == 0, result.output
    assert result.stdout == "1 change (mlp); 1 of 5 nodes; 280 → 152 parameters (−128, −45.7 %)\n"
    assert {file.name for file in tmp_path.iterdir()} - {"__pycache__"} == {"net.py", "net.html", "net.svg", "net.png"}
    failed = CliRunner().invoke(app, ["diff", "net.py:net", "--svg", "other.svg", "--module", "nowhere"])
    assert failed.exit_code == 2
    assert failed.stderr == "pe-fx: error: there is nothing to draw in module 'nowhere': it has no operations, or one alone\n"
    assert not Path("other.svg").exists()
