"""Lightning's DDPStrategy with two processes: the rows of one process, one collective a row, one record."""

import json
import math
import os
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from callback_cases import repeatable
from pytorch_lightning.strategies import SingleDeviceStrategy
from ranks_cases import PARTS, Net
from ranks_lightning import BATCHES, EPOCHS, LOG_EVERY, Module, ddp, fit, launched, speed_limit
from two_processes import in_two_processes

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
    in_two_processes(launched, str(folder), free_port())
    return folder


def witness(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"witness-{rank}.json").read_text())
    return found


PER_BATCH = ("samples", "critical_batch_size", "critical_batch_size_se")  # of all processes together


def of_all_processes(columns: dict[str, Any], processes: int) -> dict[str, Any]:
    """What several with a batch each have, from the columns of one with the same batches."""
    return {name: column * (processes if name in PER_BATCH else 1) for name, column in repeatable(columns).items()}


def assert_rows_of_one_process(
    folder: Path, alone: Path, callback: SpeedLimit, width: int = 11, processes: int = 2
) -> None:
    """Every column of the record, and the values that the logger wrote last. processes: with samples of their own."""
    model = Module()
    model.net = Net(width)
    fit(alone, callback, model)
    wanted = callback.record
    assert wanted is not None
    got = RunRecord.load(folder / "run" / "speed_limit")
    assert got.columns["step"].tolist() == ROWS
    assert got.run["samples_per_step"] == pytest.approx(processes * wanted.run["samples_per_step"])
    first = [PARTS[k % len(PARTS)][0] for k in range(LOG_EVERY)]  # rows of the first tensor of each batch
    assert got.columns["samples"][0] == processes * sum(first)
    for name, column in of_all_processes(wanted.columns, processes).items():
        assert got.columns[name].tolist() == pytest.approx(column.tolist(), rel=SAME, abs=1e-12, nan_ok=True), name
    assert math.isfinite(got.columns["loss_drop"][-1])
    one = witness(alone, 0)["metrics"]
    for rank in range(2):
        metrics = witness(folder, rank)["metrics"]
        for name, value in one.items():
            if name.startswith("speed_limit/"):
                value *= processes if name.removeprefix("speed_limit/") in PER_BATCH else 1
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
    record = RunRecord.load(root / name / "run" / "speed_limit")
    assert len(record.layers["layers"]) > 1
    assert record.layers["action"].sum() == pytest.approx(record.columns["action"][-1], rel=1e-9)


@pytest.mark.parametrize("name", ["plain", "probe", "clouds"])
def test_one_collective_a_row_and_one_writer(root: Path, name: str) -> None:
    for rank in range(2):
        seen, without = witness(root / name, rank), witness(root / "without", rank)
        assert seen["rows"] == ROWS
        assert without["sent"] > 0
        # The comparison of an epoch's neurons is a reading of its own.
        assert seen["sent"] - without["sent"] == len(ROWS) + (EPOCHS if name == "clouds" else 0)
        assert (seen["saves"] > 0) == (rank == 0)


def test_a_probe_that_one_process_gives_up_is_given_up_by_all(root: Path) -> None:
    """Said by the first process, which sees it in the mean; rows and what is sent for them stay as they are."""
    record = RunRecord.load(root / "refused" / "run" / "speed_limit")
    assert record.columns["step"].tolist() == ROWS
    known = [step < 9 for step in ROWS]
    assert np.isfinite(record.columns["loss_drop"]).tolist() == known
    assert True in known
    assert record.reasons["loss_drop"] == "probe_batches was given up: its losses are NaN on one of the processes"
    for rank in range(2):
        assert witness(root / "refused", rank)["sent"] == witness(root / "probe", rank)["sent"]


def test_the_count_can_fail(root: Path) -> None:
    """A callback that sends one number more at each row is seen."""
    seen, without = witness(root / "talkative", 0), witness(root / "without", 0)
    assert seen["sent"] - without["sent"] == 2 * len(ROWS)


@pytest.mark.parametrize("when", [0, 1], ids=["at the start", "when optimizers are replaced"])
def test_where_one_process_cannot_measure_none_does_and_none_waits(root: Path, when: int) -> None:
    folder = root / f"unable {when}"
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]
    assert said[1] == []  # the first process speaks for both
    assert said[0][-1] == "SpeedLimit measures nothing: another process can't"
    assert len(said[0]) == 1 + when
    assert witness(folder, 0)["rows"] == []
    assert witness(folder, 1)["rows"] == [LOG_EVERY] * when
    for rank in range(2):
        metrics = witness(folder, rank)["metrics"]
        assert math.isfinite(metrics["speed_limit/path_length"]) == bool(when)
        assert math.isfinite(metrics["train_loss"])


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
    for name, column in of_all_processes(callback.record.columns, 2).items():
        assert got.columns[name].tolist() == pytest.approx(column.tolist(), rel=SAME, abs=1e-12, nan_ok=True), name


def test_where_one_process_cannot_go_on_all_begin_anew(root: Path) -> None:
    """From the step of the checkpoint: the rows of the first epoch are in neither, and each says what it knows."""
    for rank in range(2):
        assert witness(root / "forgotten", rank)["rows"] == [row - BATCHES for row in ROWS if row > BATCHES]
        assert math.isfinite(witness(root / "forgotten", rank)["metrics"]["speed_limit/path_length"])
    said = [json.loads((root / "forgotten" / f"said-{rank}.json").read_text()) for rank in range(2)]
    assert said == [[f"SpeedLimit starts anew at step {BATCHES}: another process can not go on"], []]
    record = RunRecord.load(root / "forgotten" / "run" / "speed_limit")
    assert record.run["since_step"] == BATCHES
    assert not [reason for reason in record.reasons.values() if "process" in reason]


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


SHARDED = (
    "SpeedLimit under ModelParallelStrategy: each process holds a part of the parameters. Nothing is saved in "
    "checkpoints (a resumed run is measured from there); probe_batches and clouds are left out"
)


@pytest.mark.mode("FSDP2, ModelParallelStrategy", "caveat", SHARDED)
@pytest.mark.mode("tensor parallel, ModelParallelStrategy", "caveat", SHARDED + "; no sketch")
@pytest.mark.parametrize(("name", "sketches"), [("fully sharded", True), ("tensor parallel", False)])
def test_sharded_parameters(root: Path, tmp_path: Path, name: str, sketches: bool) -> None:
    shares = 1 if name == "tensor parallel" else 2  # both processes see all samples, or each its own
    assert_rows_of_one_process(root / name, tmp_path, speed_limit(), width=12, processes=shares)
    record = RunRecord.load(root / name / "run" / "speed_limit")
    assert (len(record.sketches) > 0) == sketches
    assert math.isnan(record.columns["wasserstein2"][-1])
    assert record.layers["layers"] == [], "a process knows of no layer how far it moved"
    whole = sum(p.numel() for p in Net(12).parameters())
    assert record.run["measured_coordinates"] == record.run["optimized_coordinates"] == whole
    assert "measured:" not in str(record.summary())
    said = [json.loads((root / name / f"said-{rank}.json").read_text()) for rank in range(2)]
    assert said[0][0] == SHARDED
    assert any(text.startswith("SpeedLimit keeps no sketch") for text in said[0]) == (not sketches)
    assert len(said[0]) == len(set(said[0]))
    assert said[1] == []  # one process speaks
    saved = torch.load(root / name / "epoch=0.ckpt", weights_only=True)
    assert "SpeedLimit" not in saved["callbacks"]
    for rank in range(2):
        assert (witness(root / name, rank)["saves"] > 0) == (rank == 0)


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Of that name; DeepSpeed itself need not be installed."""


REFUSED = (
    "SpeedLimit measures nothing in this run: DeepSpeed keeps gradients and weights in its engine, which it does not "
    "support"
)


@pytest.mark.mode("DeepSpeed", "refused", REFUSED)
def test_deepspeed_is_refused_by_name(tmp_path: Path) -> None:
    callback, model = speed_limit(), Module()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(tmp_path, callback, model, strategy=DeepSpeedStrategy("cpu"), accelerator="auto", max_epochs=1)
    assert [str(w.message) for w in said if "SpeedLimit" in str(w.message)] == [REFUSED]
    assert callback.record is not None
    assert len(callback.record) == 0
    assert model.trainer.global_step == BATCHES


class FSDPStrategy(SingleDeviceStrategy):
    """Of that name; Lightning's own asks for a GPU."""

    def __init__(self, sharding: str) -> None:
        super().__init__("cpu")
        self.sharding_strategy = type("Sharding", (), {"name": sharding})()


@pytest.mark.mode(
    "FSDP with replicas (HYBRID_SHARD, NO_SHARD)", "refused", "SpeedLimit measures nothing in this run: …"
)
@pytest.mark.parametrize("sharding", ["HYBRID_SHARD", "NO_SHARD"])
def test_replicas_of_flat_shards_are_refused(tmp_path: Path, sharding: str) -> None:
    with pytest.warns(UserWarning, match=f"measures nothing in this run: FSDPStrategy with {sharding} keeps replicas"):
        fit(tmp_path, True, strategy=FSDPStrategy(sharding), accelerator="auto", max_epochs=1)


def test_lightnings_fsdp_asks_for_a_gpu() -> None:
    """So its flat parameters are shown with torch's own loop, in test_ranks_shards."""
    with pytest.raises(Exception, match="requires a GPU accelerator"):
        pl.Trainer(strategy="fsdp", accelerator="cpu", devices=2)


def test_a_callback_can_be_sent_to_another_process() -> None:
    everything = speed_limit(clouds="neurons", per_layer=True, probe_batches=2, dirpath="somewhere")
    assert isinstance(pickle.loads(pickle.dumps(everything)), SpeedLimit)
