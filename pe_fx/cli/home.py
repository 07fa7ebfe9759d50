"""Where a user's code is imported from: modules of one folder, which no other folder's code meets."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

KEPT = {*sys.stdlib_module_names, "__main__", "torch", "pe_fx"}
"""What this process itself runs on: once it is loaded, no folder's module takes its place."""


class Home:
    """Folders that come before all others on `sys.path`, and the modules that were imported from there.

    >>> import tempfile
    >>> old, new = (Path(tempfile.mkdtemp()) for _ in range(2))
    >>> for folder, size in ((old, 1), (new, 2)):
    ...     _ = (folder / "sizes_of_it.py").write_text(f"SIZE = {size}")
    >>> homes = Home(old), Home(new)
    >>> for home in (*homes, *homes):
    ...     with home.entered():
    ...         print(importlib.import_module("sizes_of_it").SIZE)
    1
    2
    1
    2
    >>> "sizes_of_it" in sys.modules
    False

    What else is imported meanwhile stays for everyone: whatever the surrounding process would find in the same place.
    """

    def __init__(self, *before: Path, after: Path | None = None) -> None:
        self._before, self._after = ([os.path.realpath(place) for place in places] for places in (before, (after,) if after else ()))
        self._path: list[str] | None = None
        self._modules: dict[str, ModuleType] = {}

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Its folders on the path and its modules among those loaded, both only while this lasts.

        What the code itself does to `sys.path` is remembered for the next time.
        """
        if not self._before:
            yield
            return
        outside, sys.path = sys.path, self._path or [*self._before, *sys.path, *self._after]
        importlib.invalidate_caches()
        here = {name.partition(".")[0] for place in sys.path if place not in outside and os.path.isdir(place) for name in os.listdir(place)}
        others = _taken(top for top in (here & _loaded().keys()) - KEPT if _place(_found(top)) != _place(_spec(sys.modules[top])))
        before = _loaded()
        sys.modules.update(self._modules)
        try:
            yield
        finally:
            self._path, sys.path = sys.path, outside
            new = [top for top, module in _loaded().items() if before.get(top) is not module and _spec(module) is not None]
            self._modules = _taken(top for top in new if _place(_found(top)) != _place(_spec(sys.modules[top])))
            sys.modules.update(others)


def _loaded() -> dict[str, ModuleType]:
    """The modules that are in no package."""
    return {name: module for name, module in sys.modules.items() if "." not in name}


def _taken(tops: Iterator[str]) -> dict[str, ModuleType]:
    """These modules and all inside them, which are loaded no more."""
    out = set(tops)
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in out}


def _found(name: str) -> ModuleSpec | None:
    """What an import would find were the module not loaded."""
    found = (finder.find_spec(name, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in found if spec is not None), None)


def _spec(module: ModuleType) -> ModuleSpec | None:
    return getattr(module, "__spec__", None)


def _place(spec: ModuleSpec | None) -> tuple[str, ...]:
    """The file of a module, or the folders of a package without one."""
    if spec is None:
        return ()
    return tuple(map(os.path.realpath, [spec.origin] if spec.origin else spec.submodule_search_locations or ()))
