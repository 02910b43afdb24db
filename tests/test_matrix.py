"""The environments of `make test-matrix`: what they promise to try, and what is said where one can't be made."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MATRIX = ROOT / "tests" / "matrix"
RUN: dict[str, Any] = runpy.run_path(str(MATRIX / "run.py"))


def pins(name: str) -> dict[str, str]:
    lines = RUN["pinned"]((MATRIX / f"{name}.txt").read_text(encoding="utf-8"))
    return {RUN["package"](line): line.partition("==")[2] for line in lines}


def lower_bounds() -> dict[str, str]:
    """Of what the package depends on. (Read as text: Python 3.10 has no reader of TOML.)"""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', block))


def tries(pin: str, bound: str) -> bool:
    """Whether the pin is of the release that the bound names: 2.4.0 of 2.4."""
    return f"{pin}.".startswith(f"{bound}.")


def test_the_oldest_environment_has_the_oldest_that_is_promised() -> None:
    bounds, oldest = lower_bounds(), pins("oldest")
    assert len(bounds) >= 3
    assert not {name: bound for name, bound in bounds.items() if not tries(oldest[name], bound)}
    assert tries("2.4.1", "2.4")
    assert not tries("2.40.0", "2.4")  # the comparison can fail


def test_which_of_lightnings_packages_is_where() -> None:
    names = {"lightning", "pytorch-lightning"}
    assert {e: sorted(names & set(pins(e))) for e in ("oldest", "newest", "both")} == {
        "oldest": ["pytorch-lightning"],
        "newest": ["lightning"],
        "both": ["lightning", "pytorch-lightning"],
    }


@pytest.mark.parametrize("interpreter", ["/nowhere/python3.10", "false"])
def test_a_missing_interpreter_is_said_with_the_cure(interpreter: str) -> None:
    with pytest.raises(SystemExit) as raised:
        RUN["python_version"]("oldest", interpreter, "# python 3.10\n")
    assert str(raised.value) == (
        f"test-matrix, oldest: no '{interpreter}' that starts; wanted Python 3.10: "
        "make test-matrix PYTHON_OLDEST=/path/to/python3.10"
    )


def test_another_interpreter_is_said_too(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 3.1.0\n")
    other.chmod(0o755)
    with pytest.raises(
        SystemExit, match=r"^test-matrix, newest: '.*' is Python 3\.1\.0; wanted 3\.13: make test-matrix"
    ):
        RUN["python_version"]("newest", str(other), "# python 3.13\n")
    assert RUN["python_version"]("both", str(other), "# python 3\n") == "3.1.0"


def test_the_makefile_knows_every_environment() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^MATRIX \?= (.*)$", makefile, re.MULTILINE)
    assert set(listed.split()) == {file.stem for file in MATRIX.glob("*.txt")}
    for name in listed.split():
        assert f"PYTHON_{name} := $(PYTHON_{name.upper()})" in makefile
