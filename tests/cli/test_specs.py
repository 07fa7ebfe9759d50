"""Models by spec: what each form builds, where its inputs come from, and what is said of a spec that names nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from pe_fx import PeFxError
from pe_fx.cli.specs import load, parse_inputs

SOURCE = """
import torch
from torch import nn

def build(width=8):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

class Zoo:
    small = staticmethod(lambda: build(4))

made = build(2)
number = 3

def broken():
    raise ValueError("no weights\\nhere")

def late():
    from sibling import WIDTH
    return build(WIDTH)

def strange(url, n):
    return build(len(url) + n["a"])
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "zoo_file.py").write_text(SOURCE)
    (tmp_path / "unreadable.py").write_text("def (:")
    (tmp_path / "zoo_package").mkdir()
    (tmp_path / "zoo_package" / "__init__.py").write_text("")
    (tmp_path / "zoo_package" / "models.py").write_text(SOURCE)
    monkeypatch.delitem(sys.modules, "sibling", raising=False)
    (tmp_path / "sibling.py").write_text("WIDTH = 6")
    for name, code in (("lacking", "import not_there_at_all"), ("raising", "raise RuntimeError('no driver')")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        (tmp_path / name / "models.py").write_text(SOURCE)
    (tmp_path / "damaged.pt2").write_text("no archive")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "width"),
    [
        ("zoo_file.py:build", 8),
        ("zoo_file.py:build,width=3", 3),
        ("zoo_file.py:Zoo.small", 4),
        ("zoo_file.py:made", 2),
        ("zoo_file.py:late", 6),
        ("zoo_file.py:strange,url='http://x',n={'a':1}", 9),
        ("zoo_package.models:build,width=5", 5),
        ("zoo_package.models:late", 6),
        ("torch.nn:Sequential", None),
    ],
)
def test_callables(spec: str, width: int | None) -> None:
    loaded = load(spec)
    assert loaded.spec == spec
    assert loaded.example_inputs is None
    assert isinstance(loaded.model, nn.Sequential)
    assert [layer.in_features for layer in loaded.model[:1]] == [width][: len(loaded.model)]


def test_an_absolute_path(folder: Path) -> None:
    assert len(load(f"{folder / 'zoo_file.py'}:build").model) == 3


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("timm:vit_tiny_patch16_224,depth=1,embed_dim=16,num_heads=2", "VisionTransformer"),
        ("timm:resnet18,layers=(1,1,1,1)", "ResNet"),
        ("torchvision:resnet18,num_classes=3", "ResNet"),
        ("transformers:bert,num_hidden_layers=1,vocab_size=50,hidden_size=16,num_attention_heads=2,intermediate_size=32", "BertModel"),
        ("diffusers:AutoencoderKL,block_out_channels=(32,),latent_channels=2", "AutoencoderKL"),
    ],
)
def test_libraries_on_the_meta_device_and_off_it(spec: str, name: str) -> None:
    for on_meta in (True, False):
        model = load(spec, on_meta=on_meta).model
        assert type(model).__name__ == name
        assert all(parameter.is_meta == on_meta for parameter in model.parameters())


@pytest.fixture
def hub(folder: Path) -> transformers.GPT2LMHeadModel:
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model.save_pretrained(folder / "hub")
    return model


def test_a_folder_of_the_hub_brings_its_weights_where_they_are_needed(hub: nn.Module) -> None:
    loaded, outline = load("hf:hub"), load("hf:hub", on_meta=True)
    assert type(loaded.model) is type(outline.model) is type(hub)
    assert all(torch.equal(value, hub.state_dict()[name]) for name, value in loaded.model.state_dict().items())
    assert all(parameter.is_meta for parameter in outline.model.parameters())
    assert not any(torch.equal(value, value * 0) for value in loaded.model.state_dict().values() if value.dim() > 1)


def test_a_folder_whose_class_is_not_named(hub: nn.Module, folder: Path) -> None:
    config = json.loads((folder / "hub" / "config.json").read_text())
    (folder / "hub" / "config.json").write_text(json.dumps(config | {"architectures": None}))
    for on_meta in (False, True):
        assert type(load("hf:hub", on_meta=on_meta).model).__name__ == "GPT2Model"


def test_a_folder_that_lacks_weights(hub: nn.Module, folder: Path) -> None:
    weights = load_file(folder / "hub" / "model.safetensors")
    weights.pop("transformer.h.0.mlp.c_fc.weight")
    save_file(weights, folder / "hub" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PeFxError, match=r"hf:hub could not be built: the weights there do not fit a GPT2LMHeadModel: .*c_fc\.weight"):
        load("hf:hub")
    (folder / "hub" / "model.safetensors").unlink()
    with pytest.raises(PeFxError, match="hf:hub could not be built: OSError"):
        load("hf:hub")


def test_the_code_of_a_folder_does_not_run(hub: nn.Module, folder: Path) -> None:
    config = json.loads((folder / "hub" / "config.json").read_text()) | {"architectures": ["Odd"], "model_type": "odd"}
    (folder / "hub" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "odd.Config", "AutoModel": "odd.Odd"}}))
    (folder / "hub" / "odd.py").write_text(ODD)
    for on_meta in (False, True):
        with pytest.raises(PeFxError, match="hf:hub could not be built: ValueError"):
            load("hf:hub", on_meta=on_meta)
    assert not (folder / "ran").exists()
    load("hf:hub", on_meta=True, trust=True)
    assert (folder / "ran").exists()


ODD = """
from pathlib import Path
from transformers import GPT2Config, GPT2Model
Path("ran").touch()

class Config(GPT2Config):
    model_type = "odd"

class Odd(GPT2Model):
    config_class = Config
"""


def test_torchvision_downloads_no_backbone() -> None:
    assert type(load("torchvision:fcn_resnet50", on_meta=True).model).__name__ == "FCN"


def test_an_exported_program_brings_its_inputs(folder: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(4, 2), (torch.ones(3, 4),)), folder / "model.pt2")
    loaded = load("model.pt2")
    assert isinstance(loaded.example_inputs, tuple)
    assert loaded.example_inputs[0].shape == (3, 4)
    assert loaded.model(torch.ones(3, 4)).shape == (3, 2)


WRONG = {
    "resnet50": r"no model spec \(timm:resnet50\?\): write timm:NAME",
    "": "no model spec",
    "timm:": "no model spec",
    ":build": "no model spec",
    "timm:resnet5": "timm knows no 'resnet5'; did you mean resnet50",
    "timm:resnet18,layers": "'layers' is no option of a model: write key=value",
    "timm:resnet18,nonsense=3": "could not be built: TypeError",
    "torchvision:resnt50": "did you mean resnet50",
    "transformers:brt": "did you mean bert",
    "diffusers:UNet2DConditionModl": "diffusers knows no 'UNet2DConditionModl'; did you mean UNet2DConditionModel",
    "diffusers:UNet2DConditionModel,width=3": "could not be built: TypeError",
    "hf:nowhere": "nowhere is no folder with a config.json",
    "hf:zoo_package": "zoo_package is no folder with a config.json",
    "hf:bert-base-uncased": "bert-base-uncased is no folder with a config.json",
    "tim:resnet50": "Python knows no 'tim'; did you mean timm",
    "zoo_package.modells:build": "Python knows no 'zoo_package.modells'",
    "zoo_file.modells:build": "Python knows no 'zoo_file.modells'",
    "lacking.models:build": "lacking.models could not be imported: ModuleNotFoundError: No module named 'not_there_at_all'",
    "raising.models:build": "raising.models could not be imported: RuntimeError: no driver",
    "zoo_package.models:bild": "zoo_package.models knows no 'bild'; did you mean build",
    "zoo_file.py:number": "is a int, not a torch.nn.Module",
    "zoo_file.py:broken": "zoo_file.py:broken could not be built: ValueError: no weights$",
    "zoo_file.py:build,width=wide": "could not be built: TypeError",
    "unreadable.py:build": "unreadable.py could not be imported: SyntaxError",
    "nowhere.py:build": "there is no file nowhere.py",
    "nowhere.pt2": "there is no file nowhere.pt2",
    "damaged.pt2": "damaged.pt2 is no exported program",
}


@pytest.mark.parametrize("spec", WRONG)
def test_wrong_specs(spec: str) -> None:
    with pytest.raises(PeFxError, match=WRONG[spec]) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1x3x", "axb", "1x3:float33", "1x3:nn", "=1x3", "-1x3", ""])
def test_wrong_inputs(text: str) -> None:
    with pytest.raises(PeFxError, match="is no input: write 1x3x224x224"):
        parse_inputs([text])


def test_inputs_that_cannot_be_made() -> None:
    with pytest.raises(PeFxError, match="'1x3:quint8' is no input that can be made"):
        parse_inputs(["1x3:quint8"])


def test_two_inputs_of_one_name() -> None:
    with pytest.raises(PeFxError, match="x=1x3, x=1x4: two have one name"):
        parse_inputs(["x=1x3", "x=1x4"])


def test_inputs_are_named_all_or_none() -> None:
    with pytest.raises(PeFxError, match="all of them by name or none"):
        parse_inputs(["1x3", "mask=1x3"])


def test_inputs_are_on_the_models_device() -> None:
    loaded = load("timm:resnet18", ["1x3x32x32"], on_meta=True)
    assert isinstance(loaded.example_inputs, tuple)
    assert loaded.example_inputs[0].is_meta
