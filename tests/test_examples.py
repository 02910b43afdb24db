"""The demo, as a reader runs it: a process of its own, few steps."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_speedlimit import RunRecord

ROOT = Path(__file__).parents[1]
TITLES = {
    "sgd": "SGD lr",
    "momentum": "SGD+momentum",
    "rmsprop": "RMSprop",
    "adamw": "AdamW",
    "muon": "Muon+AdamW",
}
RUNS = [(model, name) for model in ("mlp", "cnn") for name in TITLES if (model, name) != ("cnn", "muon")]
if not hasattr(torch.optim, "Muon"):
    RUNS.remove(("mlp", "muon"))
KINEMATIC = re.compile(r"(\S+) = +(\S+) x +(\S+)")


def demo(output: Path, *arguments: str) -> str:
    """What it prints."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "compare_optimizers.py"),
            "--quick",
            "--output",
            str(output),
            *arguments,
        ],
        cwd=output.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "nothing but the demo's own words"
    return done.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "runs"


@pytest.fixture(scope="module")
def printed(output: Path) -> str:
    return demo(output)


def losses(folder: Path) -> list[tuple[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["step"], row["loss_on_all_images"]) for row in csv.DictReader(file) if row["train_loss"]]


def test_every_run_is_in_the_table(printed: str) -> None:
    rows = [line for line in printed.splitlines() if KINEMATIC.search(line) and "straightness" not in line]
    assert len(rows) == len(RUNS)
    for (_, name), row in zip(RUNS, rows, strict=True):
        assert row.startswith(TITLES[name])
        found = KINEMATIC.search(row)
        assert found is not None
        efficiency, straightness, steadiness = (float(number) for number in found.groups())
        assert 0 < efficiency <= 1
        assert efficiency == pytest.approx(straightness * steadiness, abs=0.0015)  # three decimals each


def test_every_run_has_a_sentence_that_cites_the_table(printed: str) -> None:
    text = " ".join(printed.split())
    for model, name in RUNS:
        start = rf"{model.upper()} {re.escape(TITLES[name])}[^:]*: 40 steps "
        assert re.search(start + r"[^:]*:[^:]* fewer than \d+ steps on the same budget\.", text)


def test_a_run_that_did_not_reach_the_loss_is_marked_and_not_compared(printed: str) -> None:
    assert printed.count("* ended before the loss was 0.1") == 2
    assert printed.count("no run reached the loss, so there is nothing to compare") == 2


def test_lines_fit_a_terminal(printed: str) -> None:
    report, _, paths = printed.partition("\nCurves ")
    assert paths
    assert max(len(line) for line in report.splitlines()) <= 110


@pytest.mark.parametrize(("model", "name"), RUNS)
def test_records_and_logs_are_there(printed: str, output: Path, model: str, name: str) -> None:
    folder = output / model / name
    record = RunRecord.load(folder / "speed_limit")
    assert record.summary().steps == 40
    assert 0 < record.summary().kinematic_efficiency <= 1
    assert len(losses(folder)) == 8  # every fifth step
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1


def test_the_bare_run_has_the_same_losses(printed: str, output: Path) -> None:
    names = [name for name in ("momentum", "muon") if ("mlp", name) in RUNS]
    demo(output, "--bare", "--models", "mlp", "--optimizers", *names)
    for name in names:
        bare = output / "mlp" / f"{name}-bare"
        assert not (bare / "speed_limit").exists()
        assert losses(bare) == losses(output / "mlp" / name)


def test_runs_that_reach_the_loss_are_compared(tmp_path: Path) -> None:
    text = demo(tmp_path / "runs", "--models", "mlp", "--optimizers", "sgd", "adamw", "--target", "2.29")
    assert "beaten by none" in text
    assert "nothing to compare" not in text
