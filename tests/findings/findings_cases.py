"""Runs a finding as a reader would, shortened, and lends the scripts' own modules to the tests."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from in_this_process import run_example

ROOT = Path(__file__).parents[2]
SCRIPTS, DOCS = ROOT / "examples" / "findings", ROOT / "docs" / "findings"


def run_finding(name: str, output: Path, *arguments: str) -> dict[str, Any]:
    """The result file of `examples/findings/NAME.py --quick`."""
    printed = run_example(SCRIPTS / f"{name}.py", output, *arguments)
    assert f"{name}.png" in printed
    assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return read_rows(output / f"{name}.json")


def read_rows(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def page(name: str) -> str:
    """The page's text in one line, so that line breaks do not matter."""
    return re.sub(r"\s+", " ", (DOCS / f"{name}.md").read_text(encoding="utf-8"))


@contextmanager
def scripts(*names: str) -> Iterator[SimpleNamespace]:
    """The scripts' modules by their names. What they changed of the imports does not stay."""
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("lab", *names)})
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "examples")):
                del sys.modules[name]
