"""Tied files in the shell: turned back, checked, described."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from shell import enter, error, run

import pe_fx
from pe_fx import checkpoint
from pe_fx.cli.specs import load
from pe_fx.tied import weight

SOURCE = """
from torch import nn

def mlp(width=16):
    return nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))

def build(depth=3):
    return nn.Sequential(*(mlp() for _ in range(depth)))

def half():
    return build().bfloat16()

def resnet():
    from timm.models.resnet import Bottleneck, ResNet
    return ResNet(Bottleneck, layers=(3, 2, 1, 1), channels=(8, 16, 16, 16), stem_width=8, num_classes=7)

def plain():
    return nn.Linear(3, 3)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, SOURCE, monkeypatch)


def tied_file(*options: str, spec: str = "net.py:build", name: str = "tied.safetensors") -> str:
    run("transform", spec, "-o", name, *options)
    return name


# ---- untie


@pytest.mark.parametrize("spec", [(), ("net.py:build",)])
@pytest.mark.parametrize("form", ["safetensors", "pt", "bin", "safetensors.index.json"])
def test_untie(form: str, spec: tuple[str, ...]) -> None:
    tied = tied_file("--mix", "signed", "--gain", "0.3", name=f"tied.{form}")
    result = run("untie", tied, *spec, "-o", f"dense.{form}")
    assert result.stderr == f"dense.{form}: 3 sites, 480 → 840 parameters\n"
    dense = checkpoint.load(f"dense.{form}", load("net.py:build").model)
    twin = pe_fx.untie(checkpoint.load(tied, load("net.py:build").model))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in dense.state_dict().items())
    assert checkpoint.read(f"dense.{form}").metadata["pe_fx_spec"] == "net.py:build"


def test_untied_weights_of_a_changed_model() -> None:
    tied = tied_file("--entry", "slice", "--input", "1x3x32x32", spec="net.py:resnet")
    result = run("untie", tied, "-o", "dense.safetensors")
    assert "pe-fx: warning: 1 blocks stay as entry=slice made them" in result.stderr


def test_a_plan_beside_the_weights() -> None:
    tied = tied_file()
    torch.save(dict(checkpoint.read(tied).values), "tied.pt")
    run("plan", "net.py:build", "-o", "plan.json")
    run("untie", tied, "-o", "one.safetensors")
    run("untie", "tied.pt", "--plan", "plan.json", "-o", "two.safetensors")
    one, two = load_file("one.safetensors"), load_file("two.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_not_untied(folder: Path) -> None:
    tied = tied_file()
    run("untie", tied, "-o", "dense.safetensors")
    save_file({name: value for name, value in load_file(tied).items() if name != "1.0.weight"}, "lacking.safetensors")
    run("plan", "net.py:build", "-o", "plan.json")
    before = {file.name for file in folder.iterdir()}
    for arguments, message in {
        ("dense.safetensors",): "dense.safetensors has no plan in its metadata",
        ("dense.safetensors", "--plan", "plan.json"): "dense.safetensors is dense: it holds 0.2.weight",
        ("lacking.safetensors", "--plan", "plan.json"): "lacks 1.0.weight, as its plan says. Where the model",
        (tied, "--plan", "plan.json"): "has its plan in it",
        (tied, "net.py:plain"): "tied.safetensors: the plan does not fit this Linear",
        (tied, "net.py:build,depth=4"): "tied.safetensors does not fit this Sequential: it lacks 3.0.weight",
        ("nowhere.safetensors",): "No such file",
        ("net.py",): "is no checkpoint of weights alone",
        ("plan.json",): "is no checkpoint of weights alone",
    }.items():
        assert message in error("untie", *arguments, "-o", "new.safetensors")
    assert "there is no folder nowhere" in error("untie", tied, "-o", "nowhere/dense.safetensors")
    assert {file.name for file in folder.iterdir()} == before


# ---- verify


def test_verify() -> None:
    result = run("verify", "net.py:build", "--mix", "signed")
    assert result.stdout.splitlines()[0].split() == ["mode", "quantity", "error", "worst", "at"]
    assert result.stdout.endswith("\nequal to the dense twin (tolerance 1e-04)\n")
    assert "(tolerance 5e-02)" in run("verify", "net.py:half").stdout
    found = json.loads(run("verify", "net.py:build", "--json", "--tolerance", "0.5").stdout)
    assert (found["equal"], found["tolerance"]) == (True, 0.5)
    assert [(row["mode"], row["quantity"]) for row in found["comparisons"]] == [
        ("train", "outputs"),
        ("train", "gradients"),
        ("eval", "outputs"),
        ("eval", "gradients"),
    ]


def test_the_weights_say_how_a_model_is_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong view is what makes the two differ."""
    tied = tied_file("--include", "1", "--mix", "signed")
    run("untie", tied, "-o", "dense.safetensors")
    for file in (tied, "dense.safetensors"):
        assert "equal to the dense twin" in run("verify", "net.py:build", "--checkpoint", file).stdout
    dense = weight.TiedWeight.dense_parameter

    def wrong(*arguments: object) -> torch.nn.Parameter:
        with torch.no_grad():
            return torch.nn.Parameter(dense(*arguments).flip(0))  # type: ignore[arg-type]

    monkeypatch.setattr(weight.TiedWeight, "dense_parameter", wrong)
    result = run("verify", "net.py:build", "--checkpoint", tied, code=1)
    assert result.stdout.endswith("\nNOT equal to the dense twin (tolerance 1e-04)\n")
    assert json.loads(run("verify", "net.py:build", "--checkpoint", tied, "--json", code=1).stdout)["equal"] is False


def test_what_is_not_verified() -> None:
    tied = tied_file()
    assert "tied.safetensors is tied, by the plan in it: leave out --rules" in error(
        "verify", "net.py:build", "--checkpoint", tied, "--rules", "mlp"
    )
    assert "nothing in this model is tied" in error("verify", "net.py:plain")
    assert "does not fit this Sequential" in error("verify", "net.py:build,depth=4", "--checkpoint", tied)
    assert "nowhere.pt: No such file" in error("verify", "net.py:build", "--checkpoint", "nowhere.pt")


def test_folders_of_the_hub(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tied = pytest.importorskip("pe_fx.transformers")
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder / "dense")
    options = tied.PeFxConfig(mix="signed")
    transformers.GPT2LMHeadModel.from_pretrained(folder / "dense", quantization_config=options).save_pretrained(folder / "tied")
    for spec in ("hf:dense", "hf:tied"):
        assert "equal to the dense twin" in run("verify", spec).stdout
    assert "hf:tied is tied, by the plan in it: leave out --rules" in run("verify", "hf:tied", "--rules", "mlp", code=2).stderr
    assert "mix signed" in run("info", "tied/model.safetensors").stdout
    run("untie", "tied/model.safetensors", "hf:dense", "-o", "dense/model.safetensors")
    transformers.GPT2LMHeadModel.from_pretrained(folder / "dense")


# ---- info

INFO = """
file     tied.safetensors
tensors  9 of float32, 1,824 bytes
model    net.py:build
plan     pe_fx 1.2.3, schema version 2, captured by export
options  rules mlp, glu; share none; across none; entry keep; mix none

site    kind   ties                     saved
─────────────────────────────────────────────
{0…2}   mlp    2.weight ← 0.weightᵀ   3 × 128
"""

NARROW = """
file     plan.json
plan     schema version 2, captured by export
options  rules squeeze_excite, attention, glu, mlp,
         bottleneck; share bottleneck=all; across none;
         entry keep; include 1, 2; mix none
"""


def test_info(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
    tied = tied_file("--rules", "mlp,glu", "--share", "none")
    for columns in (80, 120):
        assert run("info", tied, columns=columns).stdout.startswith(INFO[1:])
    assert run("info", tied).stdout.endswith(run("plan", "net.py:build").stdout)
    found = json.loads(run("info", tied, "--json").stdout)
    assert (found["file"], found["versions"]) == (tied, {"plan": 2, "pe_fx": "1.2.3"})
    assert found["tensors"] == {"float32": {"tensors": 9, "bytes": 1824}}
    assert pe_fx.Plan.from_json(json.dumps(found["plan"])) == checkpoint.read_plan(tied)


def test_info_of_a_plan() -> None:
    run("plan", "net.py:build", "--include", "1", "--include", "2", "-o", "plan.json")
    assert run("info", "plan.json", "--width", "60").stdout.startswith(NARROW[1:])
    found = json.loads(run("info", "plan.json", "--json").stdout)
    assert (found["tensors"], found["versions"]) == (None, {"plan": 2, "pe_fx": None})


@pytest.mark.parametrize("form", ["pt", "bin", "bin.index.json", "safetensors.index.json"])
def test_info_of_every_form(form: str) -> None:
    tied_file(name=f"tied.{form}")
    assert json.loads(run("info", f"tied.{form}", "--json").stdout)["tensors"] == {"float32": {"tensors": 9, "bytes": 1824}}


def test_names_in_a_file_are_shown_as_text() -> None:
    checkpoint.save(pe_fx.transform(load("net.py:build").model), "odd.safetensors", metadata={"pe_fx_spec": "\x1b[2J", "a\nb": "c"})
    shown = run("info", "odd.safetensors").stdout
    assert r"\x1b[2J" in shown
    assert r"a\nb" in shown


def test_a_folder_of_the_hub_becomes_a_tied_one() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).save_pretrained("dense")
    Path("dense/vocab.txt").write_text("a\nb\n")
    run("transform", "hf:dense", "--mix", "signed", "-o", "hf:tied")
    tied = transformers.AutoModel.from_pretrained("tied")
    expected = pe_fx.transform(transformers.AutoModel.from_pretrained("dense"), mix="signed")
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in tied.state_dict().items())
    assert Path("tied/vocab.txt").read_text() == "a\nb\n"
    assert run("verify", "hf:tied").exit_code == 0
    assert "-o tied.safetensors" in error("transform", "net.py:build", "-o", "hf:tied")
    assert "give another folder" in error("transform", "hf:dense", "-o", "hf:./dense")
    assert "quantization_config" not in Path("dense/config.json").read_text()


def test_what_holds_no_plan() -> None:
    save_file({"weight": torch.ones(1)}, "dense.safetensors")
    Path("odd.json").write_text("{}")
    Path("odd.safetensors.index.json").write_text("{}")
    for file, message in {
        "dense.safetensors": "dense.safetensors has no plan in its metadata: pe-fx transform writes one",
        "odd.json": "odd.json: this is not a plan",
        "odd.safetensors.index.json": "is no index of files beside it",
        "nowhere.json": "nowhere.json: No such file",
        "nowhere.safetensors": "nowhere.safetensors: No such file",
        ".": "Is a directory",
    }.items():
        assert message in error("info", file)
