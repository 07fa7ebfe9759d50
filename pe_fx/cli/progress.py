"""What stderr shows while a command works: on a terminal what it is doing, and nowhere what the libraries say that it imports."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.text import Text

from pe_fx.text import printable

STDERR = 2


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that says on stderr what is going on, where that is a terminal.

    What else is written there meanwhile is a note of the exception, if there is one: with --debug it is shown.
    """
    with _own_stderr() as stream:
        console = Console(file=stream)
        if not console.is_terminal:
            with _others_aside():
                yield lambda step: None
            return
        others = sys.stderr  # the status would have it pass through the console
        with console.status("importing torch …") as status, contextlib.redirect_stderr(others), _others_aside():
            yield lambda step: status.update(Text(f"{printable(step)} …"))


@contextlib.contextmanager
def _own_stderr() -> Iterator[TextIO]:
    """Standard error, which stays what it is when its descriptor becomes another file."""
    if sys.stderr is None:  # it is closed
        with open(os.devnull, "w", encoding="utf-8") as stream:
            yield stream
        return
    try:
        descriptor = os.dup(sys.stderr.fileno())
    except OSError:  # it is no file, as in a test
        yield sys.stderr
        return
    with open(descriptor, "w", encoding=sys.stderr.encoding, errors="replace") as stream:
        yield stream


@contextlib.contextmanager
def _others_aside() -> Iterator[None]:
    """Whatever is written to the descriptor, in whatever way, goes to a file: streams and handlers that hold it stay as they are."""
    if sys.__stderr__ is None:  # the descriptor is closed, or that of something else
        yield
        return
    with tempfile.TemporaryFile() as file:
        terminal = os.dup(STDERR)
        os.dup2(file.fileno(), STDERR)
        try:
            yield
        except Exception as error:
            _flush()
            file.seek(0)
            if said := file.read().decode(errors="replace").strip():
                error.add_note(f"on stderr meanwhile:\n{said}")
            raise
        finally:
            _flush()
            os.dup2(terminal, STDERR)
            os.close(terminal)


def _flush() -> None:
    for stream in (sys.stderr, sys.__stderr__):
        if stream is not None:
            stream.flush()
