"""The examples, as a reader runs them: few steps; and what their records say is true.

The oracle is a witness in the same process, which keeps θ around each step of every optimizer and sums up with numpy.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from example_witness import witnessed
from in_this_process import run_here
from logger_files import of_csv, of_tensorboard

from lightning_speedlimit import RunRecord

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
WITNESS = Path(__file__).with_name("example_witness.py")
CONFIG = EXAMPLES / "cli_yaml" / "config.yaml"
# What other libraries say on standard error of a machine that is all right.
KNOWN = ("wandb:", "Matplotlib is building the font cache")
# The meter takes the updates in float32 (6e-8 each) and sums in float64; numpy here takes all in float64. Where a decay
# is taken out of an update, what is left of it has lost two digits.
SAME = 1e-5
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Run:
    printed: str
    tapes: Arrays  # what the witness wrote
    output: Path

    def records(self) -> list[Path]:
        """The folders that the last lines name, as arguments of the command `speedlimit`."""
        (line,) = re.findall(r"speedlimit (?:show|compare) (.*)", self.printed)
        return [Path(folder) for folder in line.split()]


def run(folder: Path, script: str, *arguments: str, apart: bool = False) -> Run:
    """In the process of the tests, or in one of its own."""
    output, tapes = folder / "runs", folder / "steps.npz"
    place = [f"--trainer.logger.init_args.save_dir={output}"] if "cli" in script else [f"--output={output}"]
    command = [str(EXAMPLES / script), *arguments, *place]
    if apart:
        done = start([str(WITNESS), str(tapes), *command], folder)
    else:
        with witnessed(str(tapes)):
            done = run_here(lambda: runpy.run_path(command[0], run_name="__main__"), command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith(KNOWN)] == []
    assert [path.name for path in folder.iterdir() if path not in (output, tapes)] == [], "written elsewhere"
    with np.load(tapes) as file:
        return Run(done.stdout, dict(file), output)


def start(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )


def assert_record_of(record: RunRecord, tapes: Arrays, n: int = 0) -> None:
    """D, ℓ, A, the work Σ −g·u and the last gradient's norm, in every row; u without decoupled decay in the work."""
    before, after, gradient = (tapes[f"{name}_{n}"].astype(np.float64) for name in ("before", "after", "gradient"))
    u = after - before
    rows = record.columns["step"] - 1
    assert rows[-1] == len(u) - 1
    wanted = {
        "displacement": np.linalg.norm(after - before[0], axis=1),
        "path_length": np.linalg.norm(u, axis=1).cumsum(),
        "action": (u**2).sum(1).cumsum(),  # on the clock "steps"
        "work_ito": -(gradient * (u + tapes[f"decay_{n}"][:, None] * before)).sum(1).cumsum(),
        "grad_norm": np.linalg.norm(gradient, axis=1),
        "step_norm": np.linalg.norm(u, axis=1),
    }
    for name, values in wanted.items():
        np.testing.assert_allclose(record.columns[name], values[rows], rtol=SAME, err_msg=name)
    kinematic = wanted["displacement"] ** 2 / (np.arange(1, len(u) + 1) * wanted["action"])
    np.testing.assert_allclose(record.columns["kinematic_efficiency"], kinematic[rows], rtol=SAME)


# --- plain PyTorch


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("plain"), "plain_pytorch.py", "--quick")


def test_plain_pytorch(plain: Run) -> None:
    (folder,) = plain.records()
    record = RunRecord.load(folder)
    assert_record_of(record, plain.tapes)
    assert record.summary().steps == 58  # 29 batches of 64 among 1,797 images, two epochs
    assert record.sketch_steps[-1] == 58
    assert str(record.summary()) in plain.printed


def test_plain_pytorch_clips_and_says_so(plain: Run) -> None:
    """The gradient that the optimizer got is the raw one, or of norm 0.5."""
    columns = RunRecord.load(plain.records()[0]).columns
    raw = np.linalg.norm(plain.tapes["gradient_0"], axis=1)[columns["step"] - 1]
    assert (raw > 0.5).any()
    assert (raw < 0.5).any()
    np.testing.assert_allclose(columns["grad_norm_clipped"], np.minimum(raw, 0.5), rtol=SAME)


def test_plain_pytorch_prints_the_course(plain: Run) -> None:
    columns = RunRecord.load(plain.records()[0]).columns
    shown = re.findall(r"^ +(\d+)" + r" +([\d.]+|nan)" * 6 + "$", plain.printed, re.MULTILINE)
    assert 8 <= len(shown) <= 16
    assert int(shown[-1][0]) == 58
    for step, *values in shown:
        (row,) = np.flatnonzero(columns["step"] == int(step))
        names = ("learning_rate", "grad_norm", "grad_norm_clipped", "efficiency", "straightness", "steadiness")
        np.testing.assert_allclose([float(v) for v in values], [columns[n][row] for n in names], atol=5.1e-4)


# --- Lightning


def test_tensorboard(tmp_path: Path) -> None:
    found = run(tmp_path, "lightning_tensorboard.py", "--quick")
    (folder,) = found.records()
    record = RunRecord.load(folder)
    assert_record_of(record, found.tapes)
    assert record.summary().steps == 56
    curves = of_tensorboard(folder.parent)
    assert {"train_loss", "speed_limit/efficiency", "speed_limit/straightness"} <= curves.keys()
    step, length = curves["speed_limit/path_length"][-1]
    u = (found.tapes["after_0"] - found.tapes["before_0"])[: step + 1]
    assert length == pytest.approx(np.linalg.norm(u, axis=1).sum(), rel=SAME)
    assert f"tensorboard --logdir {found.output / 'tensorboard'}" in found.printed


def test_cli_takes_the_settings_from_the_file(tmp_path: Path) -> None:
    found = run(tmp_path, "cli_yaml/train.py", "fit", "--config", str(CONFIG), "--trainer.max_epochs=2")
    (folder,) = found.records()
    record = RunRecord.load(folder)
    assert_record_of(record, found.tapes)
    (callback,) = yaml.safe_load(CONFIG.read_text())["trainer"]["callbacks"]
    assert callback["init_args"]
    assert {name: record.run[name] for name in callback["init_args"]} == callback["init_args"]
    assert record.clouds["step"].tolist() == [28, 56]
    assert "train_loss" in of_csv(folder.parent)
    assert (folder.parent / "config.yaml").exists()


@pytest.mark.slow
def test_cli_refuses_a_wrong_setting(tmp_path: Path) -> None:
    """As its docstring says: before anything is trained."""
    arguments = ["fit", "--config", str(CONFIG), f"--trainer.logger.init_args.save_dir={tmp_path}"]
    wrong = "--trainer.callbacks.entropy_production=itoo"
    done = start([str(EXAMPLES / "cli_yaml" / "train.py"), *arguments, wrong], tmp_path)
    assert done.returncode == 2
    assert "itoo" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path) -> None:
    found = run(tmp_path, "wandb_offline.py", "--quick", apart=True)
    folders = found.records()
    assert len(folders) == 2
    words = " ".join(found.printed.split())
    for n, folder in enumerate(folders):
        record = RunRecord.load(folder)
        assert_record_of(record, found.tapes, n)
        assert record.summary().sentence() in words
    (file,) = found.output.glob(f"wandb/offline-run-*-{folders[0].parent.name}/*.wandb")
    content = file.read_bytes()
    assert b"speed_limit/efficiency" in content
    assert b"in words" in content


@pytest.mark.slow
def test_two_process_ddp(tmp_path: Path) -> None:
    """The witness sits in the first process, where DDP has averaged the gradients."""
    found = run(tmp_path, "two_process_ddp.py", "--quick", apart=True)
    alone, together = (RunRecord.load(folder) for folder in found.records())
    assert (alone.run["world_size"], together.run["world_size"]) == (1, 2)
    assert_record_of(alone, found.tapes, 0)
    assert_record_of(together, found.tapes, 1)
    shown = re.findall(r"^([a-z ]+?) +(-?[\d.]+) +(-?[\d.]+) +\S+$", found.printed, re.MULTILINE)
    assert len(shown) == 15
    for name, *values in shown:
        of_one, of_two = (float(value) for value in values)
        # float32 gradients added in another order, 28 steps: 1e-7 grown a hundredfold
        assert of_two == pytest.approx(of_one, rel=1e-5), name
        assert of_one == pytest.approx(alone.columns[name.replace(" ", "_")][-1], rel=1e-6)


# --- the list


def test_the_list_has_every_example_and_its_command() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {path.relative_to(ROOT).as_posix() for path in EXAMPLES.glob("*.py")} | {"examples/cli_yaml/train.py"}
    named = set(re.findall(r"\| `python ([\w/]+\.py)", text))
    assert scripts <= named
    for name in named | {CONFIG.relative_to(ROOT).as_posix()}:
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (EXAMPLES / target).exists(), target


@pytest.mark.parametrize("name", ["lightning_tensorboard", "wandb_offline", "plain_pytorch", "two_process_ddp"])
def test_a_docstring_names_its_own_command(name: str) -> None:
    assert f"\n    python examples/{name}.py\n" in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
