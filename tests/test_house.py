"""The house: how much a newcomer meets at the first look, and what may import what (pyproject.toml, [tool.importlinter])."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent


def rooms() -> nx.DiGraph:
    """The files and folders of `pe_fx/`, with an arrow from each to what it imports."""
    graph = grimp.build_graph("pe_fx", cache_dir=None)
    room = {module: ".".join(module.split(".")[:2]) for module in graph.modules}
    house = nx.DiGraph((room[a], room[b]) for a in graph.modules for b in graph.find_modules_directly_imported_by(a) if room[a] != room[b])
    house.add_nodes_from(room.values())
    return house


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache', '--no-logo'])"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)


def test_few_rooms_on_few_floors_without_circles() -> None:
    house = rooms()
    assert 10 < len(house) <= 18
    assert nx.is_directed_acyclic_graph(house)
    assert len(list(nx.topological_generations(house))) <= 9


def test_the_import_contracts_are_kept() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("pe_fx/graph/ops.py", "import pe_fx.passes"),
        ("pe_fx/graph/views.py", "from pe_fx.tied.weight import Tied"),
        ("pe_fx/ties.py", "from pe_fx.graph.ops import Kind"),
        ("pe_fx/tied/owners.py", "from pe_fx import plan"),
        ("pe_fx/api.py", "import pe_fx.diff.page"),
        ("pe_fx/checkpoint.py", "import pe_fx.diff.page"),
        ("passes/mlp.py", "from pe_fx.tied.weight import Tied"),
        ("passes/mlp.py", "from pe_fx.errors import PeFxError"),
        ("pe_fx/graph/ops.py", "from pe_fx.graph.flow import Flow"),
        ("pe_fx/fresh.py", ""),
    ],
)
def test_breaking_a_contract_fails(file: str, line: str, tmp_path: Path) -> None:
    for name in ("pe_fx", "passes"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
