"""The demo, as a reader runs it: few steps, the first time a process of its own."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from in_this_process import run_example

from lightning_speedlimit import RunRecord

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "compare_optimizers.py"
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


@pytest.fixture(scope="module")
def printed(output: Path) -> str:
    """By a process of its own."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--output", str(output)],
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


def losses(folder: Path) -> list[tuple[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["step"], row["loss_on_all_images"]) for row in csv.DictReader(file) if row["train_loss"]]


def table_of(printed: str, model: str) -> list[str]:
    """The rows of the model's table."""
    _, _, section = printed.partition(f"\n{model.upper()}\n")
    _, _, rows = section.partition("-----\n")
    return rows.partition("\n\n")[0].splitlines()


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_every_run_is_in_its_models_table(printed: str, model: str) -> None:
    wanted = [TITLES[name] for kind, name in RUNS if kind == model]
    rows = table_of(printed, model)
    assert len(rows) == len(wanted)
    for title in wanted:
        assert sum(row.startswith(title) for row in rows) == 1


def test_the_page_has_a_section_with_the_runs_of_each_model(printed: str, output: Path) -> None:
    page = (output / "report.html").read_text("utf-8")
    assert (output / "report.html").resolve().as_uri() in printed
    for count in ("26,122", "6,090"):  # parameters: 64·128 + 128·128 + 128·10, 16·9 + 32·16·9 + 128·10, and biases
        assert count in page
    for name in {name for _, name in RUNS}:
        assert TITLES[name] in page
    assert "--quick" in page, "the command that makes it again"


def test_the_run_that_is_pointed_to_is_there(printed: str) -> None:
    found = re.search(r"speedlimit show (\S+)", printed)
    assert found is not None
    assert RunRecord.load(Path(found[1]) / "speed_limit").summary().steps == 40


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
    run_example(SCRIPT, output, "--bare", "--models", "mlp", "--optimizers", *names)
    for name in names:
        bare = output / "mlp" / f"{name}-bare"
        assert not (bare / "speed_limit").exists()
        assert losses(bare) == losses(output / "mlp" / name)


def test_a_run_ends_when_its_loss_is_reached(tmp_path: Path) -> None:
    arguments = ["--bare", "--models", "mlp", "cnn", "--optimizers", "sgd", "--target", "2.29"]
    text = run_example(SCRIPT, tmp_path / "runs", *arguments)
    ends = re.findall(r"step +(\d+) +loss +([\d.]+)", text)
    assert len(ends) == 2
    for steps, loss in ends:
        assert int(steps) < 40
        assert float(loss) <= 2.29
