"""The command `speedlimit`: a demo, one run shown, runs compared, closed forms printed."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from lightning_speedlimit.cli.complaints import Complaint
from lightning_speedlimit.words import one_line

__all__ = ["main"]

_LIBRARIES = ("typer", "rich", "matplotlib", "jinja2")  # of the extra "report"


def main() -> None:
    """Runs the command that `sys.argv` asks for.

    Exit codes: 0; 2 for what the user can fix, said in one line on stderr; 130 for Ctrl-C; 1 where whoever read the
    output went away, silently.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no "±" gets a "?"
    try:
        from lightning_speedlimit.cli.app import app

        try:
            app(prog_name="speedlimit")
        finally:
            sys.stdout.flush()
    except Complaint as complaint:
        _end(str(complaint))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _LIBRARIES:
            raise
        _end(f"needs {error.name}, which is not installed; pip install 'lightning-speedlimit[report]'")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        sys.exit(1)


def _end(text: str) -> NoReturn:
    print(f"speedlimit: {one_line(text, 2000)}", file=sys.stderr)
    sys.exit(2)
