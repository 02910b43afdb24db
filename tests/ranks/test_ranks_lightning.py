"""Lightning's DDPStrategy with two processes: the rows of one process, one collective a row, one record."""

import json
import math
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks_lightning import BATCHES, EPOCHS, LOG_EVERY, ddp, fit, launched, speed_limit
from torch.multiprocessing.spawn import spawn

from lightning_speedlimit import RunRecord, SpeedLimit

SAME = 1e-9  # float64; gradients are added in another order, and extrapolated losses lose some digits
LOGGED = 1e-5  # loggers take float32
ROWS = sorted({*range(LOG_EVERY, EPOCHS * BATCHES, LOG_EVERY), *(BATCHES * (e + 1) for e in range(EPOCHS))})

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("launched")
    spawn(launched, args=(str(folder), free_port()), nprocs=2)  # type: ignore[no-untyped-call]
    return folder


def witness(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"witness-{rank}.json").read_text())
    return found


def assert_rows_of_one_process(folder: Path, alone: Path, callback: SpeedLimit) -> None:
    """Every column of the record, and the values that the logger wrote last."""
    fit(alone, callback)
    wanted = callback.record
    assert wanted is not None
    got = RunRecord.load(folder / "run" / "speed_limit")
    assert got.columns["step"].tolist() == ROWS
    assert got.columns.keys() == wanted.columns.keys()
    for name, column in wanted.columns.items():
        assert got.columns[name].tolist() == pytest.approx(column.tolist(), rel=SAME, abs=1e-12, nan_ok=True), name
    assert math.isfinite(got.columns["loss_drop"][-1])
    one = witness(alone, 0)["metrics"]
    for rank in range(2):
        metrics = witness(folder, rank)["metrics"]
        for name, value in one.items():
            if name.startswith("speed_limit/"):
                assert metrics[name] == pytest.approx(value, rel=LOGGED, abs=1e-9, nan_ok=True), name
    assert witness(folder, 0)["metrics"] == pytest.approx(witness(folder, 1)["metrics"], rel=0, abs=0, nan_ok=True)


@pytest.mark.mode("DDP, launched by torchrun", "measured")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("probe", {"probe_batches": 3}),
        ("clouds", {"clouds": "neurons", "per_layer": True}),
    ],
)
def test_rows_are_those_of_one_process(root: Path, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    assert_rows_of_one_process(root / name, tmp_path, speed_limit(**options))


@pytest.mark.parametrize("name", ["plain", "probe", "clouds"])
def test_one_collective_a_row_and_one_writer(root: Path, name: str) -> None:
    for rank in range(2):
        seen, without = witness(root / name, rank), witness(root / "without", rank)
        assert seen["rows"] == ROWS
        assert without["sent"] > 0
        assert seen["sent"] - without["sent"] == len(ROWS)
        assert (seen["saves"] > 0) == (rank == 0)


def test_the_count_can_fail(root: Path) -> None:
    """A callback that sends one number more at each row is seen."""
    seen, without = witness(root / "talkative", 0), witness(root / "without", 0)
    assert seen["sent"] - without["sent"] == 2 * len(ROWS)


@pytest.mark.mode("DDP, processes that ask to stop at different steps", "measured", "those steps have no row")
def test_asking_to_stop_at_different_steps(root: Path) -> None:
    for rank in range(2):
        assert witness(root / "stopped", rank)["rows"] == ROWS


@pytest.mark.mode("DDP, resumed", "measured", "between log steps the checkpoint holds the first process's own losses")
def test_resumed(root: Path, tmp_path: Path) -> None:
    callback = speed_limit()
    fit(tmp_path, callback)
    assert callback.record is not None
    got = RunRecord.load(root / "resumed" / "run" / "speed_limit")
    for name, column in callback.record.columns.items():
        assert got.columns[name].tolist() == pytest.approx(column.tolist(), rel=SAME, abs=1e-12, nan_ok=True), name


@pytest.mark.mode("DDP, an error on one process", "measured", "the record ends with the last row before it")
def test_an_error_on_one_process_ends_all(root: Path) -> None:
    assert "ArithmeticError: on the second process alone" in (root / "fails" / "error-1.txt").read_text()
    assert (root / "fails" / "error-0.txt").exists()
    found = RunRecord.load(root / "fails" / "run" / "speed_limit").columns["step"].tolist()
    assert found == [4, 8]  # the error is at the tenth step


@pytest.mark.slow
@pytest.mark.mode("DDP, ddp_spawn", "caveat", "callback.record stays None in the parent: RunRecord.load the folder")
def test_spawned_by_lightning(tmp_path: Path) -> None:
    callback = speed_limit()
    fit(tmp_path / "two", callback, devices=2, strategy=ddp("spawn"))
    assert callback.record is None  # it was made in the processes, which are gone
    assert_rows_of_one_process(tmp_path / "two", tmp_path / "one", speed_limit())


@pytest.mark.slow
@pytest.mark.mode("DDP, launched by Lightning (popen)", "measured")
def test_a_script_that_lightning_launches(tmp_path: Path) -> None:
    script = Path(__file__).parent / "ranks_lightning.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    subprocess.run([sys.executable, str(script), str(tmp_path / "two")], check=True, env=environment, timeout=180)
    assert_rows_of_one_process(tmp_path / "two", tmp_path / "one", speed_limit())


def test_a_callback_can_be_sent_to_another_process() -> None:
    everything = speed_limit(clouds="neurons", per_layer=True, probe_batches=2, dirpath="somewhere")
    assert isinstance(pickle.loads(pickle.dumps(everything)), SpeedLimit)
