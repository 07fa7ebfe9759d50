"""A plugin of the tests that `gpu.py` starts: a row of a CSV for each test as soon as it has run, and none of those that have one.

`PE_FX_TESTS` names the CSV, `PE_FX_TESTED` a file with the tests that are left out, one on each line.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tables import append, made_by


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = set(Path(os.environ["PE_FX_TESTED"]).read_text(encoding="utf-8").splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in before])
    items[:] = [item for item in items if item.nodeid not in before]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ and (report.when == "call" or not report.passed):
        message = "" if report.passed else str(report.longrepr)[-2000:].replace("\n", " ")
        row = {"test": report.nodeid, "outcome": report.outcome, "message": message}
        append(Path(os.environ["PE_FX_TESTS"]), row | made_by(os.environ.get("PE_FX_DEVICE", "cpu")))
