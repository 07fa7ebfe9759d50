"""Names are text: whatever is in them, it is shown, and does nothing to the terminal, the page or the picture."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import shell
import torch
from safetensors.torch import save_file
from torch import nn

import pe_fx
from pe_fx.diff import Diff, diff_transform
from pe_fx.diff.page import page
from pe_fx.diff.picture import svg
from pe_fx.text import legible, printable

NAMES = {
    "[/cls]": "[/cls]",
    "[link=file:///etc]x[/link]": "[link=file:///etc]x[/link]",
    ":smile:": ":smile:",
    "<script>&{{title}}": "<script>&{{title}}",
    "x\x1b]0;TITLE\x07\x1b[2J": r"x\x1b]0;TITLE\x07\x1b[2J",
    "c1\x9b2J\x85": r"c1\x9b2J\x85",
    "del\x7f\b\r": r"del\x7f\x08\r",
    "rtl\u202eteh\u2066": r"rtl\u202eteh\u2066",
    "line\u2028\u2029\n\x0b\x1c": r"line\u2028\u2029\n\x0b\x1c",
    "wide\u200b\ufeff\U000e0041": r"wide\u200b\ufeff\U000e0041",
}
"""Names, and how they are shown."""

SOURCE = f"""
from torch import nn
class Net(nn.Module):
    def __init__(self, key):
        super().__init__()
        self.heads = nn.ModuleDict({{key: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))}})
        self.miss = nn.ModuleDict({{key: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))}})
    def forward(self, x):
        for head in (*self.heads.values(), *self.miss.values()):
            x = head(x)
        return x
nets = [lambda key=key: Net(key) for key in {list(NAMES)!a}]
{"".join(f"net{number} = nets[{number}]; " for number in range(len(NAMES)))}
"""


class Net(nn.Module):
    def __init__(self, *keys: str) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({key: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for key in keys})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for head in self.heads.values():
            x = head(x)
        return x


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return shell.enter(tmp_path, SOURCE, monkeypatch)


run = functools.partial(shell.run, columns=200)


def is_plain(text: str) -> bool:
    return text.replace("\n", "").isprintable()


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


VIEWS = (["plan", "--misses"], ["diff"], ["diff", "--side-by-side"], ["diff", "--stat", "--misses"])


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_every_view_shows_the_name(number: int) -> None:
    name, shown = list(NAMES.items())[number]
    for view in VIEWS:
        text = run(*view, f"net.py:net{number}", "--input", "2x8").stdout
        assert is_plain(text)
        assert shown in text
    for command in ("plan", "diff"):
        coloured = run(command, f"net.py:net{number}", "--input", "2x8", "--color", "always").stdout
        assert is_plain(re.sub(r"\x1b\[[\d;]*m", "", coloured))
        text = run(command, f"net.py:net{number}", "--input", "2x8", "--json").stdout
        assert is_plain(text)
        assert any(name in found for found in texts(json.loads(text)))


@pytest.fixture(scope="module")
def diff() -> Diff:
    return diff_transform(Net(*NAMES), torch.randn(2, 8))


def test_the_page(diff: Diff) -> None:
    text = page(diff)
    (data,) = re.findall(r'<script[^>]* id="data"[^>]*>([^<]*)<', text)
    found = list(texts(json.loads(zlib.decompress(base64.b64decode(data)))))
    assert all(map(is_plain, found))
    assert all(any(f"heads.{shown}" in one for one in found) for shown in NAMES.values())


def test_the_picture(diff: Diff) -> None:
    text = svg(diff, "heads")
    assert is_plain(text)
    shown = [element.text or "" for element in ElementTree.fromstring(text).iter()]
    assert any("[/cls]" in one for one in shown)
    assert any(r"\x9b" in one for one in shown)


def test_the_files() -> None:
    run(
        "diff",
        "net.py:net4",
        "--input",
        "2x8",
        "--html",
        "d.html",
        "--svg",
        "d.svg",
        "--png",
        "d.png",
        "--module",
        r"heads.x\x1b]0;TITLE\x07\x1b[2J",
    )
    assert Path("d.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse("d.svg")


def test_the_viewer(diff: Diff) -> None:
    from pe_fx.diff.tui import Pane, Viewer

    async def seen() -> list[str]:
        viewer = Viewer(diff)
        async with viewer.run_test(size=(200, 80)) as pilot:
            await pilot.press("e")
            await pilot.pause()
            strips = [pane.render_line(line).text for pane in viewer.query(Pane) for line in range(len(viewer.lines))]
            for _ in viewer.lines:
                strips += [strip.text for strip in viewer.screen._compositor.render_strips()]
                await pilot.press("down")
            return strips

    lines = asyncio.run(seen())
    assert all(map(is_plain, lines))
    assert all(any(shown in line for line in lines) for shown in NAMES.values())


def test_errors() -> None:
    run("plan", "net.py:net4", "--input", "2x8", "-o", "plan.json")
    for command in (["plan", "net.py:net0"], ["diff", "net.py:net0"], ["transform", "net.py:net0", "-o", "x.safetensors"]):
        text = run(*command, "--input", "2x8", "--plan", "plan.json", code=2).stderr
        assert is_plain(text)
        assert r"\x1b]0;TITLE" in text
    save_file({"w\x1b[2J": torch.ones(1)}, "weights.safetensors")
    torch.save({"w\x1b[2J": torch.ones(1)}, "weights.pt")
    for name in ("weights.safetensors", "weights.pt"):
        text = run("transform", "net.py:net0", "--input", "2x8", "--checkpoint", name, "-o", "x.safetensors", code=2).stderr
        assert is_plain(text)
    for spec in ("net.py:\x1b[2J", "\x1b[2J.py:build", "timm:\x1b[2J", "net.py:net0,\x1b[2J=3", "\x1b[2J", "\x1b[2J.pt2", "[/x]"):
        assert is_plain(run("plan", spec, code=2).stderr)


def test_a_terminal_is_told_what_goes_on_in_plain_text() -> None:
    code = (
        "import sys; from pe_fx.cli.commands import progress; sys.stderr.isatty = lambda: True\n"
        "with progress() as say: say('planning m.py:build,x=[/red]\\x1b]0;TITLE\\x07')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | {"TERM": "xterm"})
    assert result.returncode == 0, result.stderr
    assert "\x1b]0;" not in result.stderr


def test_a_plan_in_python() -> None:
    model = Net("x\x1b[2J", "x\\x1b[2J")
    plan = pe_fx.plan(model, torch.randn(2, 8))
    assert is_plain(str(plan))
    assert pe_fx.Plan.from_json(plan.to_json()) == plan
    assert is_plain(pe_fx.plan(model, torch.randn(2, 8), rules=["glu"]).explain())


def test_names_that_differ_are_shown_differently() -> None:
    first, second = legible(("\x1b", "\\x1b"))
    assert first != second
    shown = diff_transform(Net("x\x1b", "x\\x1b"), torch.randn(2, 8)).shown
    assert len(shown.changes) == len({change.module for change in shown.changes}) == 2
    assert printable("fc1.weightᵀ 16×8 é 字") == "fc1.weightᵀ 16×8 é 字"
