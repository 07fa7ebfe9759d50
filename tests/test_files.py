"""Files that are written whole: what takes the place of what."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pe_fx import checkpoint
from pe_fx.files import check_writable, whole_file


def write(path: Path) -> None:
    check_writable(path)
    with whole_file(path) as draft:
        draft.write_text("new")


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_file_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    path.chmod(mode)
    write(path)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == mode


def test_a_new_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    write(tmp_path / "plan.json")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "plan.json").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("there", [False, True])
def test_a_link_stays_a_link(there: bool, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    file, link = tmp_path / "runs" / "plan.json", tmp_path / "last.json"
    if there:
        file.write_text("old")
    link.symlink_to(file)
    write(link)
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert list(file.parent.iterdir()) == [file]


def save_weights(path: Path) -> None:
    checkpoint.save(nn.Linear(2, 3), path)


@pytest.mark.parametrize("writer", [write, save_weights])
def test_a_pipe_stays_a_pipe(writer: Callable[[Path], None], tmp_path: Path) -> None:
    path, expected = tmp_path / "pipe", tmp_path / "file"
    torch.manual_seed(0)
    writer(expected)
    os.mkfifo(path)
    torch.manual_seed(0)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer(path)
    assert path.is_fifo()
    assert os.read(reader, 10_000) == expected.read_bytes()
    os.close(reader)
    assert set(tmp_path.iterdir()) == {path, expected}
