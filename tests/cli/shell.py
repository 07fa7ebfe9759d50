"""The command as a shell runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pe_fx.cli.commands import app


def run(*arguments: str, code: int | None = 0, columns: int = 80) -> Result:
    """What it prints; its exit code is `code`, or any (None)."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns)})
    assert code is None or result.exit_code == code, result.output
    return result


def enter(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, as working directory, with the source in net.py."""
    (folder / "net.py").write_text(source)
    monkeypatch.chdir(folder)
    return folder


def line(*arguments: str) -> list[str]:
    """The command as a process of its own."""
    return [sys.executable, "-m", "pe_fx", *arguments]


def error(*arguments: str) -> str:
    """The one line that a command which cannot work leaves on stderr."""
    result = run(*arguments, code=2)
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("pe-fx: error: ")
    return line
