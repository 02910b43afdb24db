"""Whatever is given to the command, it ends with what it was asked for, or with a short word on what was wrong."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from lightning_speedlimit import RunRecord, cli
from lightning_speedlimit.cli import demonstration

BAD = [
    "", " ", "-1", "0", "0.5", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 400,
    "1,", ",", "1,,2", "1,nan", "a", "True",
    "None", "0x10", "1_000", "1j", "[1]", "{}", "$HOME", "a=b", "=b", "a=", "=", "a\0b", "\ud800", "\x1b[31m",
    "x" * 5000,
    "s3://bucket/run", "pipe", "~nobody.of.this.name", "--json", "-", "--", "*", "loss", "step",
]  # fmt: skip
CALLS: dict[str, tuple[list[str], dict[str, str]]] = {
    "demo": (["demo", "--quick"], {"--output": "tried"}),
    "show": (["show", "run"], {}),
    "compare": (["compare", "run"], {"--by": "loss", "--at": "1.5", "--html": "page.html"}),
    "compare groups": (["compare"], {"--group": "a=run"}),
    "gradient-flow": (["theory", "gradient-flow"], {"--eigenvalues": "1,0.1", "--residual": "1,1", "--times": "0,1"}),
    "langevin": (
        ["theory", "langevin"],
        {"--curvature": "1", "--mean": "1", "--std": "1", "--temperature": "0.5", "--times": "1"},
    ),
    "power-law": (
        ["theory", "power-law"],
        {"--kernel-exponent": "1.5", "--residual-exponent": "0.5", "--modes": "100", "--times": "10"},
    ),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # stands for devices: a test that fails must not reach the system's own
    monkeypatch.setattr(cli.sys, "exit", leave)
    monkeypatch.setattr(
        demonstration, "train_all", lambda folder, **_: [folder.mkdir(parents=True, exist_ok=True) or Path("run")]
    )
    monkeypatch.setattr("lightning_speedlimit.report.page.check_installed", lambda: None)
    monkeypatch.setattr("lightning_speedlimit.report.page.page", lambda *_, **__: "a page")
    record = RunRecord({"clock": "steps", "parameters": 3})
    for step in (2, 4):
        record.append(step, {"loss": 2 - 0.2 * step, "loss_drop": 0.2 * step, "elapsed": step, "action": step})
        record.add_sketch(step, np.full(4093, 0.1 * step))
    record.save("run")
    return tmp_path


def leave(code: object) -> None:
    raise SystemExit(code)


def said(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and what stands on stderr; a traceback would raise here."""
    monkeypatch.setattr(cli.sys, "argv", ["speedlimit", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_bad_values_end_in_a_short_word(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, options = CALLS[name]
    given = [*command, *itertools.chain(*options.items())]
    code, error = said(given, monkeypatch, capsys)
    assert code == 0, error
    unclear = []
    places = [i for i, word in enumerate(given) if word in options.values() or word == "run"]
    for place, bad in itertools.product(places, BAD):
        arguments = [bad if i == place else word for i, word in enumerate(given)]
        try:
            code, error = said(arguments, monkeypatch, capsys)
        except Exception as fault:
            unclear.append(f"{given[place - 1]} {bad!r:.60}: {type(fault).__name__}: {fault!s:.200}")
            continue
        ours = error.startswith("speedlimit: ") and error.count("\n") == 1
        usage = "Usage: speedlimit" in error and "Error: " in error
        if code not in (0, 2) or (code == 2 and not (ours or usage)) or "\x1b" in error or len(error) > 6000:
            unclear.append(f"{given[place - 1]} {bad!r:.60}: {code}, {error!r:.200}")
    assert not unclear, "\n".join(unclear)
    assert {path.name for path in home.iterdir()} <= {"run", "tried", "page.html", *BAD}
    assert stat.S_ISFIFO((home / "pipe").lstat().st_mode)


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", ""],
        ["compare", ""],
        ["compare", "run", "--html", ""],
        ["demo", "--output", " "],
        ["compare", "--group", "a= "],
    ],
    ids=" ".join,
)
def test_no_path_is_not_the_working_directory(
    arguments: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = said(arguments, monkeypatch, capsys)
    assert code == 2
    assert "wanted a file or folder; '.' is the working directory" in error
    assert {path.name for path in home.iterdir()} == {"run", "pipe"}
