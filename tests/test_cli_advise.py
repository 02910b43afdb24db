"""`speedlimit advise`: on one screen, in the order cost, gain, change, physics; as JSON; what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from in_this_process import run_here
from test_cli import ESCAPE, environment, on_terminal, without_escapes

from lightning_speedlimit import RunRecord
from lightning_speedlimit.cli import main
from lightning_speedlimit.report.advice import advise


def speedlimit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_here(main, ["speedlimit", *arguments], cwd, environment())


def save_run(folder: Path, *, batch: int, seconds: float) -> None:
    """200 steps of SGD with works and losses that scatter, rows every ten."""
    draw = np.random.default_rng(batch)
    groups = [{"lr": 0.1, "momentum": 0.0}]
    record = RunRecord({"optimizers": [{"class": "SGD", "groups": groups}], "batch_size": batch, "parameters": 10})
    works = draw.normal([[0.3], [0.1]], 0.02, (2, 200)).cumsum(1)[:, 9::10]
    for i, (work, anti) in enumerate(works.T, 1):
        row = {"work_ito": work, "work_anti_ito": anti, "loss_drop": 1.2 * i, "loss": 30 - 1.2 * i, "elapsed": 10.0 * i}
        row |= {"samples": 10.0 * i * batch, "seconds": seconds * i, "conversion": 0.4, "signal_fraction": 0.33}
        record.append(10 * i, row | {"loss_se": 0.01, "loss_drop_se": 0.01, "straightness": 0.5, "steadiness": 0.9})
    record.save(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_run(home / "runs" / "a", batch=32, seconds=0.1)
    save_run(home / "runs" / "b", batch=128, seconds=0.2)
    return home


def test_one_screen_in_the_order_of_what_is_asked(home: Path) -> None:
    done = speedlimit("advise", "runs/a", cwd=home)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "SGD lr 0.1, batch 32   runs/a"
    heads = ["What it cost", "What it bought", "What to change", "The physics"]
    assert [line for line in lines if line in heads] == heads
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 92
    assert ESCAPE not in done.stdout
    assert "200 steps, 6,400 samples, 2 seconds" in done.stdout


def test_json_is_the_advice(home: Path) -> None:
    found = json.loads(speedlimit("advise", "runs/a", "--times", "runs", "--json", cwd=home).stdout)
    record, other = (RunRecord.load(home / "runs" / name) for name in "ab")
    wanted = advise(record, [other])
    assert list(found) == ["path", "cost", "gain", "change", "findings", "sentence"]
    assert found["cost"] == {"steps": 200, "samples": 6400.0, "tokens": None, "epochs": None, "seconds": 2.0}
    assert found["gain"]["loss_drop"] == 24.0
    assert found["change"]["critical_batch_size"]["value"] == wanted.critical_batch_size.value
    told = wanted.rate_multiple
    assert found["change"]["rate_multiple"] == (None if math.isnan(told) else told)
    rows = {row["batch"]: row for row in found["change"]["at_batches"]}
    assert rows[128]["steps"] == wanted.at_batches[4].steps
    assert rows[128]["seconds"] == pytest.approx(0.02 * rows[128]["steps"])
    assert rows[64]["seconds"] is None, "no run of that batch is there"
    assert [finding["cause"] for finding in found["findings"]] == ["noise"]


def test_without_other_runs_seconds_are_open(home: Path) -> None:
    found = json.loads(speedlimit("advise", "runs/a", "--json", cwd=home).stdout)
    assert [row["batch"] for row in found["change"]["at_batches"] if row["seconds"] is not None] == [32]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs"], "advise wants one run, got runs, which holds 2; name one, as runs/a"),
        (["nowhere"], "no such folder: nowhere"),
        (["runs/a", "--times", "nowhere"], "no such folder: nowhere"),
        (["runs/a", "--times", ""], "a path"),
    ],
)
def test_what_it_refuses(home: Path, arguments: list[str], said: str) -> None:
    done = speedlimit("advise", *arguments, cwd=home)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("speedlimit: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_beside_that_can_not_be_read_is_said_aside(home: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "a", batch=32, seconds=0.1)
    save_run(tmp_path / "b", batch=64, seconds=0.1)
    (data,) = (tmp_path / "b").glob("data-*.npz")
    data.write_bytes(data.read_bytes()[:-10])
    done = speedlimit("advise", "a", "--times", ".", cwd=tmp_path)
    assert done.returncode == 0
    assert "What to change" in done.stdout
    assert done.stderr.startswith("left out: b: data-")


def test_a_terminal_gets_lines_that_fit(home: Path) -> None:
    raw = on_terminal("advise", "runs/a", cwd=home, columns=80)
    assert raw != without_escapes(raw), "titles in bold"
    assert max(map(len, without_escapes(raw).splitlines())) <= 80


def test_show_speaks_in_the_same_order_on_a_terminal(home: Path) -> None:
    text = without_escapes(on_terminal("show", "runs/a", cwd=home, columns=100))
    heads = ["What it cost", "What it bought", "What to change", "How close to the speed limit", "What cost the most"]
    assert [text.index(head) for head in heads] == sorted(text.index(head) for head in heads)
