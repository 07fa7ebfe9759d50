"""The README's Python runs as it stands."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pe_fx.cli.commands import app

README = Path(__file__).parent.parent / "README.md"


def test_snippets_run_in_order() -> None:
    snippets = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) > 4
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), namespace)


def test_outputs_are_what_the_commands_print() -> None:
    shown = re.findall(r"^```console\n\$ pe-fx ([^\n]*)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(shown) > 2
    for command, output in shown:
        assert CliRunner().invoke(app, shlex.split(command)).stdout == output


def test_documented_commands_are_marked_for_ci() -> None:
    assert re.findall(r"^<!-- ci: (\w+) -->\n```bash$", README.read_text(), re.MULTILINE) == ["run", "tests"]


def test_sweep_tables_are_those_of_the_committed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by `python examples/sweep.py --summary`, never by hand."""
    monkeypatch.syspath_prepend(README.parent / "examples")
    import sweep_summary

    with (README.parent / "examples" / "sweep.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    text = README.read_text(encoding="utf-8")
    assert sweep_summary.outcomes(rows) in text
    assert sweep_summary.paper(rows) in text


def test_accuracy_tables_are_those_of_the_committed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by `python examples/accuracy.py --summary`, never by hand."""
    monkeypatch.syspath_prepend(README.parent / "examples")
    import accuracy
    import accuracy_summary

    rows = accuracy.read_rows(README.parent / "examples" / "accuracy.csv")
    assert accuracy_summary.summary(rows) in README.read_text(encoding="utf-8")
