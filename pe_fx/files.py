"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when all went well, and is gone otherwise.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with whole_file(folder / "plan.json") as draft:
    ...     _ = draft.write_text("{}")
    >>> [file.name for file in folder.iterdir()]
    ['plan.json']

    A link stays one, and a file that is there keeps its mode; a device or a pipe gets all of it in the end.
    Raises `OSError` where the folder cannot be written to.
    """
    target = _target(path)
    if target is None:
        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder) / Path(path).name
            yield draft
            with draft.open("rb") as file, Path(path).open("wb") as stream:
                shutil.copyfileobj(file, stream)
        return
    with _beside(target) as draft:
        yield draft
        draft.chmod(_mode(target))  # a temporary file is closed to others
        with draft.open("rb") as file:
            os.fsync(file.fileno())  # or the name might be there before the bytes
        draft.replace(target)


def check_writable(path: str | Path) -> None:
    """Raises `OSError` where `whole_file` would, before there is anything to write."""
    target = _target(path)
    if target is not None:
        with _beside(target):
            pass


def _target(path: str | Path) -> Path | None:
    """The file to replace, past links; None for a device or a pipe."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        return None
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """An empty file in the same folder, which is gone in the end."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _mode(path: Path) -> int:
    """The mode of the file, or that of any new one."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
