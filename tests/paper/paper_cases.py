"""Runs an experiment of the paper as a reader would, shortened, and reads what it leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "paper"
_PNG = b"\x89PNG\r\n\x1a\n"


def run_experiment(name: str, output: Path, *arguments: str) -> dict[str, Any]:
    """The result file of `examples/paper/NAME.py --quick`, run in a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "paper" / f"{name}.py"),
            "--quick",
            "--output",
            str(output),
            *arguments,
        ],
        cwd=output,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "nothing but the table of results"
    assert f"{name}.png" in done.stdout
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
