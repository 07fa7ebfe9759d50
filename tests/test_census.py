"""The true sites of real models, worked out from their source code and never from a graph: census.json."""

from __future__ import annotations

import pytest
from census import CENSUS, built

import pe_fx


def as_set(found: list[list[str]]) -> set[frozenset[str]]:
    return {frozenset(pair) for pair in found}


def show(found: set[frozenset[str]]) -> list[str]:
    return sorted(" ~ ".join(sorted(pair)) for pair in found)


@pytest.mark.parametrize("key", CENSUS)
def test_sites_of_real_models(key: str) -> None:
    required, allowed = (as_set(CENSUS[key][which]) for which in ("required", "allowed"))
    plan = pe_fx.plan(*built(key), share=())
    found = {frozenset((tie.target, tie.source)) for tie in plan.ties}
    assert not show(required - found), "missing"
    assert not show(found - required - allowed), "wrong"
