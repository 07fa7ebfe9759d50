"""Code of two folders in one call: no module of one is met by the other, and both models keep working."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from pe_fx import PeFxError
from pe_fx.cli.home import Home
from pe_fx.cli.specs import load

LAYERS = """
from torch import nn
WIDTH = {width}
class Block(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, WIDTH), nn.GELU(), nn.Linear(WIDTH, 8))
"""


def built(imports: str) -> str:
    return f"{imports}\n\nbuild = Block\n"


LATE = """
from torch import nn
from layers import Block
class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
    def forward(self, x):
        from layers import WIDTH
        from late import twice
        return twice(self.block(x)) if WIDTH == 32 else self.block(x)
build = Late
"""

RECORD = """
import dataclasses
from torch import nn
@dataclasses.dataclass
class Sizes:
    width: "int" = 3
build = lambda: nn.Linear(Sizes().width, 2)
"""

LATER = "def twice(x):\n    return x + x\n"

LAYOUTS = {
    "modules": ("model.py", {"layers.py": LAYERS, "model.py": built("from layers import Block")}),
    "folder without __init__": (
        "model.py",
        {"parts/layers.py": LAYERS, "model.py": built("from parts.layers import Block")},
    ),
    "package": (
        "pkg/model.py",
        {"pkg/__init__.py": "", "pkg/layers.py": LAYERS, "pkg/model.py": built("from .layers import Block")},
    ),
    "package that imports the file": (
        "src/pkg/sub/model.py",
        {
            "src/pkg/__init__.py": "from .sub.model import build",
            "src/pkg/sub/__init__.py": "",
            "src/pkg/layers.py": LAYERS,
            "src/pkg/sub/model.py": built("from ..layers import Block"),
        },
    ),
    "the package itself": (
        "pkg/__init__.py",
        {"pkg/layers.py": LAYERS, "pkg/__init__.py": built("from .layers import Block")},
    ),
    "siblings in a package": (
        "pkg/model.py",
        {"pkg/__init__.py": "", "pkg/layers.py": LAYERS, "pkg/model.py": built("from layers import Block")},
    ),
    "sys.path": (
        "scripts/model.py",
        {
            "lib/layers.py": LAYERS,
            "scripts/model.py": built(
                "import os, sys\nsys.path.append(os.path.join(os.path.dirname(__file__), '..', 'lib'))\nfrom layers import Block"
            ),
        },
    ),
    "named as an installed package": (
        "model.py",
        {"timm/__init__.py": LAYERS, "model.py": built("from timm import Block")},
    ),
    "named as one of Python": ("test/model.py", {"test/__init__.py": LAYERS, "test/model.py": built("from . import Block")}),
    "late": ("model.py", {"layers.py": LAYERS, "late.py": LATER, "model.py": LATE}),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(files: dict[str, str], **values: int) -> None:
    for name, code in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(textwrap.dedent(code.replace("{width}", str(values.get("width")))))


def checkouts(layout: str) -> list[str]:
    file, files = LAYOUTS[layout]
    for name, width in (("old", 16), ("new", 32)):
        write({f"{name}/{path}": code for path, code in files.items()}, width=width)
    return [f"{name}/{file}:build" for name in ("old", "new")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_checkouts_are_two_models(layout: str) -> None:
    import timm  # is among those that a folder's hides

    modules, path = dict(sys.modules), list(sys.path)
    models = [load(spec) for spec in checkouts(layout)]
    assert [next(loaded.model.parameters()).shape[0] for loaded in models] == [16, 32]
    assert sys.path == path
    assert {name: module for name, module in sys.modules.items() if modules.get(name) is not module} == {}
    assert sys.modules["timm"] is timm


@pytest.mark.parametrize("layout", ["modules", "package", "late"])
def test_a_diff_of_two_checkouts(layout: str) -> None:
    arguments = [sys.executable, "-m", "pe_fx", "diff", *checkouts(layout), "--input", "2x8", "--exit-code", "--stat"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "280 → 552 parameters" in result.stdout


def test_a_model_keeps_working_at_home() -> None:
    both = [load(spec) for spec in checkouts("late")]
    x = torch.randn(2, 8)
    for loaded in both + both:
        with loaded.home.entered():
            copied, unpickled = copy.deepcopy(loaded.model), pickle.loads(pickle.dumps(loaded.model))
            program = torch.export.export(loaded.model, (x,), strict=True).module()
            for other in (copied, unpickled, program):
                torch.testing.assert_close(other(x), loaded.model(x))
            assert type(unpickled) is type(loaded.model)


def test_one_folder_twice() -> None:
    write({"layers.py": LAYERS, "one.py": built("from layers import Block"), "two.py": "from one import build"}, width=4)
    assert [len(load(spec).model) for spec in ("one.py:build", "two.py:build", "one:build", "one.py:build")] == [3] * 4
    assert not {"one", "two", "layers"} & sys.modules.keys()


@pytest.mark.parametrize("name", ["random.py", "torch.py", "my-model.v2.py", "__main__.py"])
def test_any_name_will_do(name: str) -> None:
    kept = sys.modules["random"], sys.modules["torch"], sys.modules["__main__"]
    write({name: RECORD})
    assert load(f"{name}:build").model.in_features == 3
    assert kept == (sys.modules["random"], sys.modules["torch"], sys.modules["__main__"])


def test_what_others_import_too_stays() -> None:
    write({"model.py": "import colorsys\nfrom torch import nn\nbuild = lambda: nn.Linear(1, 1)"})
    sys.modules.pop("colorsys", None)
    load("model.py:build")
    assert "colorsys" in sys.modules


def test_a_failed_import_leaves_nothing_behind() -> None:
    write({"layers.py": LAYERS, "model.py": "import layers\nraise ValueError('no')"}, width=4)
    before = sys.modules.keys() | set()
    with pytest.raises(PeFxError, match=r"model.py could not be imported: ValueError: no"):
        load("model.py:build")
    assert sys.modules.keys() == before


def test_no_folder_changes_nothing() -> None:
    path = sys.path
    with Home().entered():
        assert sys.path is path
