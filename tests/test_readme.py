"""The README and the pages in examples/: snippets run, commands print what is shown, links lead somewhere, tables are the rows'."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pe_fx.cli.commands import app

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = README.parent / "examples"
PAGES = [README, *sorted(EXAMPLES.glob("*.md"))]


def python_in(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands_in(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```console\n\$ pe-fx ([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def anchors_in(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if python_in(page.read_text())], ids=lambda page: page.name)
def test_snippets_run_in_order_and_print_what_is_shown(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    for snippet in python_in(page.read_text()):
        exec(compile(snippet, str(page), "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        assert set(re.findall(r"^print\(.*\)\n# (.*)$", snippet, re.MULTILINE)) <= set(printed)


@pytest.mark.parametrize("page", [page for page in PAGES if commands_in(page.read_text())], ids=lambda page: page.name)
def test_outputs_are_what_the_commands_print(page: Path) -> None:
    for command, output in commands_in(page.read_text()):
        assert CliRunner().invoke(app, shlex.split(command)).stdout == output


def test_snippets_and_commands_are_found() -> None:
    texts = [page.read_text() for page in PAGES]
    assert sum(len(python_in(text)) for text in texts) > 10
    assert sum(len(commands_in(text)) for text in texts) > 2
    fences = [fence for text in texts for fence in re.findall(r"^```(.+)$", text, re.MULTILINE)]
    assert set(fences) == {"python", "console", "bash"}
    assert fences.count("console") == sum(len(commands_in(text)) for text in texts)


def test_documented_commands_are_marked_for_ci() -> None:
    assert re.findall(r"^<!-- ci: (\w+) -->\n```bash$", README.read_text(), re.MULTILINE) == ["run", "tests"]


def test_readme_fits_one_sitting() -> None:
    assert len(README.read_text().splitlines()) <= 250
    assert len(README.read_bytes()) <= 18_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors_in(target.read_text()), link


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README.read_text())}
    assert {f"examples/{page.name}" for page in PAGES[1:]} <= linked


def test_measured_figures_are_those_of_the_pages() -> None:
    measured = README.read_text().partition("\n## Measured\n")[2].partition("\n## ")[0]
    lines = [line.split(" | ") for line in measured.splitlines() if line.startswith("| ") and "](" in line]
    assert len(lines) >= 5
    for what, figures, where in lines:
        page = (README.parent / re.findall(r"\]\(([^)#]+)", where)[0]).read_text()
        for figure in re.findall(r"(?<![\w.])\d[\d,.]*\d(?! %)", figures):
            assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d%]|[.,]\d)", page), f"{what}: {figure} is not in {where}"


def test_the_packages_docstring_opens_with_the_readmes_example() -> None:
    import pe_fx

    statements = [example.source.strip() for example in doctest.DocTestParser().get_examples(pe_fx.__doc__ or "")]
    example = python_in(README.read_text())[0].replace("\n\n", "\n").splitlines()
    assert statements[: len(example)] == example


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize(("script", "option"), [("sweep", "--out"), ("accuracy", "--out"), ("bench", "--csv")])
def test_pages_of_rows_are_written_by_their_scripts(script: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by `python examples/SCRIPT.py --summary`, never by hand."""
    rows = tmp_path / f"{script}.csv"
    for beside in (rows.name, "once.csv", "at_scale.csv"):
        (tmp_path / beside).write_bytes((EXAMPLES / beside).read_bytes())
    monkeypatch.setattr("sys.argv", [script, "--summary", option, str(rows)])
    importlib.import_module(script).main()
    assert rows.with_suffix(".md").read_text(encoding="utf-8") == (EXAMPLES / f"{script}.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("script", ["accuracy_summary", "sweep", "tables", "zoo"])
def test_examples_in_the_scripts_run(script: str) -> None:
    result = doctest.testmod(importlib.import_module(script))
    assert result.attempted
    assert not result.failed


@pytest.mark.usefixtures("examples")
def test_rows_of_a_benchmark_take_the_place_of_older_ones(tmp_path: Path) -> None:
    import bench_summary

    def row(model: str, **filled: str) -> dict[str, str]:
        return dict.fromkeys(bench_summary.COLUMNS, "") | {"device": "GPU", "dtype": "bf16", "model": model, "batch": "8"} | filled

    path = tmp_path / "rows.csv"
    bench_summary.write_rows(path, [row("a", step="1.00"), row("b", step="0.90")])
    bench_summary.write_rows(path, [row("a", step="0.95", kernels="7"), row("a", step="1.00", device="CPU")])
    rows = bench_summary.rows_of(path)
    assert [(row["device"], row["model"], row["step"]) for row in rows] == [
        ("GPU", "a", "0.95"),
        ("GPU", "b", "0.90"),
        ("CPU", "a", "1.00"),
    ]
    text = bench_summary.page(rows, [])
    assert "| model | batch | step | kernels |\n| --- | --- | --- | --- |\n| a | 8 | 0.95 | 7 |\n| b | 8 | 0.90 |  |\n" in text
    assert "| model | batch | step |\n| --- | --- | --- |\n| a | 8 | 1.00 |\n" in text
