"""What the tests of the command share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def net_folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the test module's SOURCE in net.py."""
    (tmp_path / "net.py").write_text(request.module.SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path
