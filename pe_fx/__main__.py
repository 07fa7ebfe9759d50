"""The command `pe-fx`."""

from __future__ import annotations

import atexit
import gc
import io
import sys


def main() -> None:
    gc.set_threshold(100_000, 50, 100)  # what is imported stays: looking at it again and again takes a quarter of a command's time
    atexit.register(gc.freeze)  # nor is it looked at in the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show "←" shows "?"
    try:
        from pe_fx.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"pe-fx: error: the command line needs {error.name}: pip install 'pe_fx[cli]'")
    app()


if __name__ == "__main__":
    main()
