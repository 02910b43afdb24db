"""Runs an experiment of the paper as a reader would, shortened, and reads what it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from in_this_process import run_example

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "paper"
_PNG = b"\x89PNG\r\n\x1a\n"


def run_experiment(name: str, output: Path, *arguments: str) -> dict[str, Any]:
    """The result file of `examples/paper/NAME.py --quick`."""
    printed = run_example(ROOT / "examples" / "paper" / f"{name}.py", output, *arguments)
    assert f"{name}.png" in printed
    assert (output / f"{name}.png").read_bytes().startswith(_PNG)
    return read_result(output / f"{name}.json")


def read_result(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def committed(name: str) -> dict[str, Any]:
    """The full run's result file, beside the page that cites it."""
    assert (DOCS / f"{name}.png").read_bytes().startswith(_PNG)
    return read_result(DOCS / f"{name}.json")


def page(name: str) -> str:
    """The page's text in one line, so that line breaks do not matter."""
    return re.sub(r"\s+", " ", (DOCS / f"{name}.md").read_text(encoding="utf-8"))
