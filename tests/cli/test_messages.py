"""What libraries say while a command works: nowhere to be seen, unless the command fails and is asked."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest
from shell import enter, line

SOURCE = """
import logging, os, sys, warnings
import tqdm
from torch import nn

logging.basicConfig()

def build():
    print("printed", file=sys.stderr)
    warnings.warn("warned")
    logging.warning("logged")
    os.write(2, b"by descriptor\\n")
    os.system("echo by another process >&2")
    for step in tqdm.tqdm(range(3), desc="bar"):
        pass
    sys.__stderr__.write("no newline")
    return nn.Linear(3, 3)

def failing():
    build()
    raise ValueError("no")
"""

SAID = ("printed", "UserWarning: warned", "WARNING:root:logged", "by descriptor", "by another process", "bar: 100%", "no newline")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, SOURCE, monkeypatch)


def err(*arguments: str, code: int = 0) -> str:
    result = subprocess.run(line(*arguments), capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    return result.stderr


def test_a_command_that_succeeds_says_what_it_has_to_say_itself() -> None:
    assert err("plan", "net.py:build") == ""
    warning = "pe-fx: warning: nothing could be tied; pe-fx plan --misses says why\n"
    assert err("transform", "net.py:build", "-o", "tied.safetensors") == f"{warning}tied.safetensors: 0 sites, 12 → 12 parameters\n"


def test_a_command_that_fails_says_why() -> None:
    line = "pe-fx: error: net.py:failing could not be built: ValueError: no\n"
    assert err("plan", "net.py:failing", code=2) == line
    told = err("plan", "net.py:failing", "--debug", code=2)
    assert told.index("ValueError: no") < told.index("on stderr meanwhile:")
    assert [text for text in SAID if text not in told] == []


def test_importing_diffusers_says_nothing() -> None:
    pytest.importorskip("diffusers")
    assert err("plan", "diffusers:AutoencoderKL,block_out_channels=(32,),latent_channels=2", "--input", "1x3x32x32") == ""


def test_a_terminal_shows_what_is_going_on_and_nothing_else() -> None:
    terminal, inside = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen(line("plan", "net.py:build"), stdout=subprocess.DEVNULL, stderr=inside, env=environment) as process:
        os.close(inside)
        drawn = b""
        try:
            while part := os.read(terminal, 65536):
                drawn += part
        except OSError:  # closed at the other end
            pass
    os.close(terminal)
    assert process.returncode == 0
    assert "importing torch …" in drawn.decode()
    assert [text for text in SAID if text in drawn.decode()] == []


def test_stderr_may_be_closed() -> None:
    Path("net.py").write_text("from torch import nn\nbuild = lambda: nn.Linear(3, 3)\n")
    closed = f"{' '.join(line('plan', 'net.py:build', '--json'))} 2>&-"
    assert '"params_before": 12' in subprocess.run(closed, shell=True, stdout=subprocess.PIPE, text=True, check=True).stdout
