"""The command line: what it prints and writes, and how it ends."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shell import enter, error, line, run
from torch import nn

import pe_fx
from pe_fx.cli.forms import KINDS
from pe_fx.cli.specs import load
from pe_fx.passes import DEFAULT_RULES
from pe_fx.ties import ONE_PATH

SOURCE = """
import time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(depth))
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.relu())

class Deciding(Net):
    def forward(self, x):
        return super().forward(x if float(x.abs().sum()) >= 0 else x + 1)

def plain():
    return nn.Linear(3, 3)

class Failing(nn.Linear):
    def forward(self, x):
        raise RuntimeError("captured")

def failing():
    return Failing(3, 3)

def slow():
    print("building", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, SOURCE, monkeypatch)


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.name != "__pycache__"}


# ---- plan

PLAN = """
site           kind   ties                     saved
────────────────────────────────────────────────────
blocks.{0…2}   mlp    2.weight ← 0.weightᵀ   3 × 128

kind   sites   saved   of all
─────────────────────────────
mlp        3     384   41.1 %

stage    sites   saved   of all
───────────────────────────────
blocks       3     384   41.1 %

near miss: . (mlp)
  head.weight is (6, 8), stem.weight is (8, 4): not transposes of each other
3 sites; 934 → 550 parameters (58.9 %); 1 near miss
"""


def test_plan() -> None:
    assert run("plan", "net.py:Net").stdout == PLAN[1:]


def test_a_plan_that_knows_one_path() -> None:
    shown = run("plan", "net.py:Deciding").stdout
    assert shown.startswith(PLAN[1:])
    assert shown.endswith(f"\n{ONE_PATH}\n")
    assert json.loads(run("plan", "net.py:Deciding", "--json").stdout)["capture"] == "run"


def test_plan_to_json_and_back(folder: Path) -> None:
    made = pe_fx.Plan.from_json(run("plan", "net.py:Net", "-o", "plan.json", "--json").stdout)
    assert len(made.sites) == 3
    assert pe_fx.Plan.from_json(Path("plan.json").read_text()) == made
    assert run("plan", "net.py:Net", "--plan", "plan.json").stdout == run("plan", "net.py:Net").stdout
    assert files(folder) == {"net.py", "plan.json"}


def test_options_of_the_plan() -> None:
    def sites(*options: str) -> list[str]:
        return [site["name"] for site in json.loads(run("plan", "net.py:Net", "--json", *options).stdout)["sites"]]

    assert sites("--include", "blocks.0", "--include", "blocks.2") == ["blocks.0", "blocks.2"]
    assert sites("--exclude", "blocks.*") == []
    assert sites("--rules", "attention,glu") == []
    assert sites("--rules", "none") == []
    assert len(sites("--rules", "none", "--share", "mlp=2")) == 1
    assert sites("--input", "7x4") == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_plan_brings_its_own_options() -> None:
    run("plan", "net.py:Net", "-o", "plan.json")
    for given in (["plan"], ["diff"], ["transform", "-o", "tied.safetensors"]):
        assert "leave out --entry, --include" in error(
            *given, "net.py:Net", "--plan", "plan.json", "--include", "blocks.1", "--entry", "keep"
        )


def test_a_plan_of_another_model() -> None:
    run("plan", "net.py:Net", "-o", "plan.json")
    assert "the plan does not fit this Linear" in error("plan", "net.py:plain", "--plan", "plan.json")


# ---- transform


def test_transform_writes_weights_and_plan(folder: Path) -> None:
    run("transform", "net.py:Net", "-o", "tied.safetensors")
    with safe_open("tied.safetensors", framework="pt") as file:
        plan = pe_fx.Plan.from_json(file.metadata()["pe_fx_plan"])
    names = {f"blocks.{i}.{j}" for i in range(3) for j in ("0.weight", "0.bias", "2.bias")}
    assert set(load_file("tied.safetensors")) == names | {"stem.weight", "stem.bias", "head.weight", "head.bias"}
    assert len(plan.sites) == 3
    assert "3 × 128" in run("plan", "net.py:Net", "--plan", "tied.safetensors").stdout
    assert files(folder) == {"net.py", "tied.safetensors"}


@pytest.mark.parametrize("name", ["dense.safetensors", "dense.pt", "dense.bin", "dense.safetensors.index.json", "dense.bin.index.json"])
def test_transform_of_a_checkpoint(name: str) -> None:
    weights = {"weight": torch.randn(3, 3), "bias": torch.randn(3)}
    files = {name: weights}
    if name.endswith(".index.json"):
        files = {f"{key}{Path(name.removesuffix('.index.json')).suffix}": {key: value} for key, value in weights.items()}
        Path(name).write_text(json.dumps({"weight_map": dict(zip(weights, files, strict=True))}))
    for file, part in files.items():
        (save_file if file.endswith(".safetensors") else torch.save)(part, file)
    result = run("transform", "net.py:plain", "--checkpoint", name, "-o", "tied.safetensors")
    assert "nothing could be tied" in result.stderr
    assert torch.equal(load_file("tied.safetensors")["weight"], weights["weight"])


def test_values_and_variants_of_a_transform() -> None:
    run("transform", "net.py:Net,depth=1", "--include", "head", "-o", "dense.pt")
    dense = torch.load("dense.pt", weights_only=True)
    arguments = ["net.py:Net,depth=1", "--checkpoint", "dense.pt", "--init", "mean", "--mix", "signed", "--gain", "1"]
    run("transform", *arguments, "-o", "tied.bin")
    tied = torch.load("tied.bin", weights_only=True)
    model = load("net.py:Net,depth=1").model
    model.load_state_dict(dense)
    expected = pe_fx.transform(model, init="mean", mix="signed", gain=1.0).state_dict()
    assert torch.equal(tied["blocks.0.2.weight_gain"], torch.ones(8))
    assert list(tied) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in tied.items())


def test_a_checkpoint_that_does_not_fit_leaves_nothing_behind(folder: Path) -> None:
    save_file({"weight": torch.randn(3, 3)}, "lacking.safetensors")
    save_file({"weight": torch.randn(3, 4), "bias": torch.randn(3)}, "wide.safetensors")
    torch.save([1], "list.pt")
    Path("damaged.safetensors").write_text("{")
    Path("damaged.pt").write_text("{")
    before = files(folder)
    for name, message in {
        "lacking.safetensors": "it lacks bias",
        "wide.safetensors": "does not fit this Linear: weight is (3, 4), in the model (3, 3)",
        "list.pt": "list.pt holds no weights by name",
        "damaged.safetensors": "is no safetensors file",
        "damaged.pt": "is no checkpoint of weights alone",
        "nowhere.pt": "error: nowhere.pt: No such file",
        "nowhere.safetensors": "No such file",
    }.items():
        assert message in error("transform", "net.py:plain", "--checkpoint", name, "-o", "tied.safetensors")
    assert "error: . is a folder" in error("transform", "net.py:plain", "-o", ".")
    assert "/proc/x cannot be written" in error("transform", "net.py:plain", "-o", "/proc/x")
    assert "there is no folder nowhere" in error("transform", "net.py:plain", "-o", "nowhere/tied.safetensors")
    assert files(folder) == before


def test_a_file_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.save_file", lambda *args, **options: (_ for _ in ()).throw(TypeError("no")))
    assert "error: tied.safetensors: safetensors cannot hold this model" in error("transform", "net.py:plain", "-o", "tied.safetensors")


# ---- diff

DIFF = """
--- net.py:Net
+++ net.py:Net, tied
  Net
    · stem
    blocks  ModuleList
      0  Sequential                                                    mlp  −128
        linear  0.weight 16×8
-       linear  2.weight 8×16
+       linear  2.weight ← 0.weightᵀ
      blocks.1 … blocks.2: as blocks.0                                  2 × −128
    · head
3 changes (3 mlp); 3 of 17 nodes; 934 → 550 parameters (−384, −41.1 %)
"""


def test_diff_is_plain_text_in_a_pipe() -> None:
    assert run("diff", "net.py:Net").stdout == DIFF[1:]


def test_diff_in_colours_on_request() -> None:
    assert "\x1b[32m+       linear  2.weight ← 0.weightᵀ\x1b[0m" in run("diff", "net.py:Net", "--color", "always").stdout


def test_an_unknown_color_is_refused_before_the_work(folder: Path) -> None:
    for given in (["plan", "-o", "plan.json"], ["diff", "--html", "diff.html"]):
        assert "--color some: choose from auto, always, never" in error(*given, "net.py:Net", "--color", "some")
    assert files(folder) == {"net.py"}


def test_diff_of_a_model_with_itself_is_empty() -> None:
    for form in ([], ["--stat"], ["--side-by-side"]):
        result = run("diff", "net.py:Net", "net.py:Net", "--exit-code", *form)
        assert not result.stdout
        assert result.stderr == "no differences\n"


def test_exit_code_of_differences() -> None:
    run("diff", "net.py:Net", "--exit-code", code=1)
    run("diff", "net.py:Net", "net.py:Net,depth=2", "--exit-code", code=1)
    run("diff", "net.py:Net", "net.py:Net,depth=2")


def test_diff_with_an_exported_program() -> None:
    torch.export.save(torch.export.export(nn.Linear(3, 3), (torch.ones(5, 3),)), "plain.pt2")
    run("diff", "net.py:plain", "plain.pt2", "--exit-code")


def test_two_models_are_compared_as_they_are() -> None:
    assert "leave out --share, --misses" in error("diff", "net.py:Net", "net.py:plain", "--share", "none", "--misses")


def test_which_of_two_models_failed() -> None:
    torch.export.save(torch.export.export(nn.Linear(3, 3), (torch.ones(5, 3),)), "plain.pt2")
    assert "error: net.py:Net: Net could not be captured" in error("diff", "plain.pt2", "net.py:Net")
    assert "did you mean resnet50" in error("diff", "net.py:failing", "timm:resnet5"), "names are looked up before anything is captured"


def test_diff_as_json() -> None:
    found = json.loads(run("diff", "net.py:Net", "--json").stdout)
    assert [change["module"] for change in found["changes"]] == ["blocks.0", "blocks.1", "blocks.2"]
    assert found["delta"] == -384


def test_diff_by_an_earlier_plan() -> None:
    run("plan", "net.py:Net", "--include", "blocks.1", "-o", "plan.json")
    assert "1 change (mlp)" in run("diff", "net.py:Net", "--plan", "plan.json").stdout


def test_stat_side_by_side_and_misses() -> None:
    for columns in (80, 120):
        stat = run("diff", "net.py:Net", "--stat", columns=columns).stdout.splitlines()
        assert stat[0].startswith(" blocks.{0…2} | mlp  3 × −128 −−−")
        assert (len(stat[0]), len(stat)) == (columns - 2, 2)
    stat = run("diff", "net.py:Net", "--stat", "--no-fold").stdout.splitlines()
    assert [line.split(" | ")[0] for line in stat[:3]] == [" blocks.0", " blocks.1", " blocks.2"]
    assert len(stat) == 4
    assert " │ +       linear  2.weight ← 0.weightᵀ" in run("diff", "net.py:Net", "-y", "--width", "120").stdout
    assert "near miss" in run("diff", "net.py:Net", "--misses").stdout


def test_the_viewer_needs_a_terminal() -> None:
    assert "--tui needs a terminal" in error("diff", "net.py:Net", "--tui")


def test_the_viewer_on_a_terminal() -> None:
    terminal, inside = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    arguments = line("diff", "net.py:Net", "--tui", "--exit-code")
    with subprocess.Popen(arguments, stdin=inside, stdout=inside, stderr=inside, env=environment) as process:
        os.close(inside)
        drawn = b""
        while b"Quit" not in drawn:
            drawn += os.read(terminal, 65536)
        os.write(terminal, b"q")
        with contextlib.suppress(OSError):  # closed at the other end
            while os.read(terminal, 65536):
                pass
    os.close(terminal)
    assert process.returncode == 1


def test_one_form_at_a_time() -> None:
    assert "--stat and --json: give one of them" in error("diff", "net.py:Net", "--json", "--stat")


# ---- how it ends


def test_help_teaches_by_example() -> None:
    shown = run("--help").stdout
    assert "pe-fx plan timm:deit_small_patch16_224" in shown
    assert "Exit codes: 0 done, 1 differences" in " ".join(shown.split())
    for name in ("plan", "transform", "diff", "verify"):
        assert f"  pe-fx {name} timm:" in run(name, "--help").stdout


def test_help_comes_at_once_and_knows_the_rules() -> None:
    code = "import sys; from pe_fx.cli.commands import app; app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("\nFalse\n")
    assert {rule.kind for rule in DEFAULT_RULES} == set(KINDS)


@pytest.mark.parametrize("command", [["plan"], ["diff"], ["diff", "net.py:plain"], ["transform", "-o", "x.safetensors"]])
def test_a_wrong_spec_is_one_line(command: list[str], folder: Path) -> None:
    assert "did you mean resnet50" in error(*command, "timm:resnet5")
    assert files(folder) == {"net.py"}


def test_inputs_that_do_not_fit() -> None:
    assert "--input" in error("plan", "net.py:Net", "--input", "2x5")


def test_debug_shows_the_traceback() -> None:
    lines = run("plan", "nowhere\x1b[2J.py:f", "--debug", code=2).stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == r"pe_fx.errors.PeFxError: there is no file nowhere\x1b[2J.py"


def test_an_unknown_option_is_a_usage_error() -> None:
    assert "No such option" in run("plan", "net.py:Net", "--bogus", code=2).stderr


def test_a_closed_pipe() -> None:
    """As `pe-fx diff … | head -1`, with a reader that is gone before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        result = subprocess.run(line("diff", "net.py:Net"), stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_terminal_without_these_characters() -> None:
    result = subprocess.run(line("diff", "net.py:Net"), capture_output=True, check=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert b"linear  2.weight ? 0.weight?" in result.stdout


def test_interrupted(folder: Path) -> None:
    arguments = line("transform", "net.py:slow", "-o", "tied.safetensors")
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "")
        assert process.returncode == 130
    assert files(folder) == {"net.py"}


def test_without_the_extra(folder: Path) -> None:
    (folder / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    result = subprocess.run(line("--help"), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "pe-fx: error: the command line needs typer: pip install 'pe_fx[cli]'\n"


def test_pe_fx_itself_imports_none_of_it() -> None:
    code = "import pe_fx, sys; print({'typer', 'rich', 'timm', 'pe_fx.diff'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
