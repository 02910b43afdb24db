"""Programs run within the process of the tests: importing takes most of them longest, and that is done already."""

import contextlib
import io
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

LOGGERS = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
SILENT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # as Python itself has it


def run_here(
    program: Callable[[], object], arguments: list[str], folder: Path, environment: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """What it prints and how it ends, as if it were started alone in the folder; what it sets does not stay."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, levels, modules = Path.cwd(), [logger.level for logger in LOGGERS], set(sys.modules)
    os.chdir(folder)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", arguments),
            mock.patch.object(sys, "path", [str(Path(arguments[0]).parent), *sys.path]),
            mock.patch.dict(os.environ, environment or {}, clear=environment is not None),
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.resetwarnings()
            for category in SILENT:
                warnings.simplefilter("ignore", category)
            try:
                program()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
                err.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    finally:
        os.chdir(before)
        for logger, level in zip(LOGGERS, levels, strict=True):
            logger.setLevel(level)
        _forget(set(sys.modules) - modules, Path(arguments[0]).parent)
    err.write("".join(f"{warning.category.__name__}: {warning.message}\n" for warning in said))
    return CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def _forget(names: set[str], folder: Path) -> None:
    """A script's neighbours may have the names of other modules, and what it changed in them must not stay.

    Those of the other examples too: some scripts import from several of their folders.
    """
    around = next((place for place in (folder, *folder.parents) if place.name == "examples"), folder)
    for name in names:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(around):
            del sys.modules[name]


def run_example(script: Path, output: Path, *arguments: str) -> str:
    """What `python script --quick --output …` prints, and nothing on stderr."""
    command = [str(script), "--quick", "--output", str(output), *arguments]
    done = run_here(lambda: runpy.run_path(str(script), run_name="__main__"), command, output.parent)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout
