"""What fails around a training, or within the measurement: the training goes on as it would have, what happened is
said once, and the record holds the last completed step.
"""

import errno
import json
import math
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callback_cases import (
    EXACT,
    Regressor,
    Resumable,
    batches,
    flat,
    last_row,
    loader,
    plain,
    quiet,
    repeatable,
    sgd,
    trainer,
)
from ended_trainings import fit as fit_as_the_ended
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger
from test_callback_loggers import Both

from lightning_speedlimit import RunRecord
from lightning_speedlimit.callback.measurement import Measurement
from lightning_speedlimit.record import keeper, writing
from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.follower import Follower
from lightning_speedlimit.trajectory.joint import JointSteps
from lightning_speedlimit.trajectory.motion import Motion
from lightning_speedlimit.trajectory.reading import Reader
from lightning_speedlimit.trajectory.stepwise import Stepwise

Make = Callable[[], Regressor]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def said(found: Any, part: str) -> int:
    return sum(part in str(w.message) for w in found)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return flat(list(model.parameters()))


def same_rows(got: dict[str, Any], wanted: dict[str, Any], rows: int) -> None:
    assert got.keys() == wanted.keys()
    for name, column in repeatable(wanted).items():
        np.testing.assert_array_equal(got[name], column[:rows], err_msg=name)


# --- exceptions, wherever they come from


class InValidation(Regressor):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise RuntimeError("out of cheese")


class InBackward(Regressor):
    def on_after_backward(self) -> None:
        super().on_after_backward()
        if self.tape.batch == 4:
            raise RuntimeError("out of cheese")


class AfterTheStep(Regressor):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        if len(self.tape.steps) == 5:
            raise RuntimeError("out of cheese")


class InTheOptimizer(torch.optim.SGD):
    """Fails within `step`, with half of the weights moved."""

    def step(self, closure: Any = None) -> Any:
        self.count = getattr(self, "count", 0) + 1
        if self.count == 5:
            with torch.enable_grad():
                closure()
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise RuntimeError("out of cheese")
        return super().step(closure)


class Other(pl.Callback):
    """Another callback's hook fails, with the batch that stepped not yet at its end for those that come later."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            raise RuntimeError("out of cheese")


WHERE: dict[str, tuple[Make, int]] = {  # and the steps that were completed
    "validation_step": (InValidation, 5),
    "on_after_backward": (InBackward, 4),
    "on_before_zero_grad": (AfterTheStep, 5),
    "optimizer.step": (lambda: Regressor(lambda p: InTheOptimizer(p, lr=0.05)), 4),
    "another callback": (Regressor, 5),
}


@pytest.mark.mode("an exception anywhere in a training", "measured", "the record ends with the last completed step")
@pytest.mark.parametrize("where", WHERE)
def test_an_exception_leaves_the_last_completed_step(tmp_path: Path, where: str) -> None:
    make, completed = WHERE[where]
    model, callback = make(), quiet()
    others = [Other()] if where == "another callback" else []
    run = trainer(
        tmp_path, *others, callback, log_every_n_steps=50, val_check_interval=5, num_sanity_val_steps=0, max_epochs=3
    )
    with pytest.raises(RuntimeError, match="out of cheese"):
        run.fit(model, loader(batches(10)), loader(batches(1)))
    steps = model.tape.steps[:completed]
    assert len(steps) == completed
    if where == "optimizer.step":  # θ is half-way: that step is none, and the last row is the last log step's: none
        assert callback.record is not None
        assert len(callback.record) == 0
        return
    got, wanted = last_row(callback), plain(steps, model.tape.losses)
    assert got["step"] == completed
    for name in ("displacement", "path_length", "work_ito", "grad_norm"):
        assert got[name] == pytest.approx(wanted[name], rel=EXACT), name
    assert RunRecord.load(tmp_path / "speed_limit").columns["step"].tolist() == [completed]


def test_an_exception_before_the_training_leaves_the_record_of_the_fit_before(tmp_path: Path) -> None:
    callback = quiet()
    trainer(tmp_path / "a", callback).fit(Regressor(), loader(batches(6)))
    first = callback.record
    with pytest.raises(RuntimeError, match="out of cheese"):
        trainer(tmp_path / "b", callback).fit(InValidation(), loader(batches(6)), loader(batches(1)))
    assert callback.record is first
    assert len(RunRecord.load(tmp_path / "a" / "speed_limit")) == 6
    assert not (tmp_path / "b" / "speed_limit").exists()


# --- bitwise the same training, through what ends and resumes it


class Failing(Regressor):
    fails = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fails and len(self.tape.steps) == 11:
            raise RuntimeError("out of cheese")
        return super().training_step(batch, batch_idx)


@pytest.mark.mode("an exception, then resumed", "measured", "the record is that of the uninterrupted run")
def test_an_exception_and_a_resume_are_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Weights are bitwise those of a run without the callback, and rows those of one that did not fail."""

    def run(folder: Path, *callbacks: Any, fails: bool = False, ckpt: Any = None) -> Failing:
        model = Failing(adam)
        model.fails = fails
        keep = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        fit = trainer(folder, keep, *callbacks, enable_checkpointing=True, max_epochs=3)
        fit.fit(model, Resumable(batches(8)), ckpt_path=ckpt)
        return model

    without = run(tmp_path / "without")
    whole, resumed = quiet(), quiet()
    run(tmp_path / "whole", whole)
    with pytest.raises(RuntimeError, match="out of cheese"):
        run(tmp_path / "failed", quiet(), fails=True)
    again = run(tmp_path / "failed", resumed, ckpt=tmp_path / "failed" / "step=10.ckpt")
    assert torch.equal(weights(again), weights(without))
    assert whole.record is not None
    assert resumed.record is not None
    same_rows(resumed.record.columns, whole.record.columns, len(whole.record))


@pytest.mark.mode("early stopping on another metric, and a resumed run of it", "measured")
def test_early_stopping_is_left_alone(tmp_path: Path) -> None:
    class Validated(Regressor):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

    def run(folder: Path, *callbacks: Any, ckpt: Any = None) -> tuple[Any, ...]:
        model, stop = Validated(sgd(lr=0.2)), EarlyStopping("val_loss", patience=2)
        keep = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        fit = trainer(folder, stop, keep, *callbacks, enable_checkpointing=True, max_epochs=20, val_check_interval=4)
        fit.fit(model, Resumable(batches(8)), loader(batches(2, seed=9)), ckpt_path=ckpt)
        return weights(model), fit.global_step, float(stop.best_score), stop.wait_count

    without, callback = run(tmp_path / "a"), quiet()
    measured = run(tmp_path / "b", callback)
    again = run(tmp_path / "b", quiet(), ckpt=tmp_path / "b" / "step=5.ckpt")
    assert 5 < without[1] < 160  # it did stop
    for other in (measured, again):
        assert torch.equal(other[0], without[0])
        assert other[1:] == without[1:]
    assert last_row(callback)["step"] == without[1]


@pytest.mark.mode("Timer and `max_time`", "measured")
def test_a_run_that_is_out_of_time(tmp_path: Path) -> None:
    class Late(pl.callbacks.Timer):
        """Its time is up in the batch that takes step 5, whatever the clock of the machine says."""

        def time_elapsed(self, *args: Any) -> float:
            return 1e9 if len(model.tape.steps) >= 5 else 0.0

    model, callback = Regressor(), quiet()
    trainer(tmp_path, callback, Late({"hours": 1}), log_every_n_steps=50).fit(model, loader(batches(20)))
    assert last_row(callback)["step"] == len(model.tape.steps) == 5
    moved = plain(model.tape.steps, model.tape.losses)["displacement"]
    assert last_row(callback)["displacement"] == pytest.approx(moved, rel=EXACT)
    assert RunRecord.load(tmp_path / "speed_limit").columns["step"].tolist() == [5]


# --- several fits, the tuner


def test_two_models_on_one_callback(tmp_path: Path) -> None:
    """Each fit has its record; the second knows nothing of the first."""
    callback = quiet()
    models = Regressor(), Regressor(adam, width=7)
    records = []
    for number, model in enumerate(models):
        trainer(tmp_path / str(number), callback).fit(model, loader(batches(5 + number)))
        records.append(callback.record)
        steps = model.tape.steps
        assert last_row(callback)["step"] == len(steps) == 5 + number
        moved = float((steps[-1].after - steps[0].before).norm())
        assert last_row(callback)["displacement"] == pytest.approx(moved, rel=EXACT)
    assert records[0] is not records[1]
    for number in range(2):
        assert len(RunRecord.load(tmp_path / str(number) / "speed_limit")) == 5 + number


class Tuned(Regressor):
    lr, batch_size = 0.05, 2

    def configure_optimizers(self) -> Any:
        return self.tape.follow(torch.optim.SGD(self.parameters(), lr=self.lr))

    def train_dataloader(self) -> Any:
        x, y = batches(1, size=32)[0]
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=self.batch_size)


def tune(run: Any, model: Tuned, how: str) -> None:
    tuner = pl.tuner.Tuner(run)
    if how == "lr_find":
        tuner.lr_find(model, num_training=8, update_attr=False)
    else:
        tuner.scale_batch_size(model, max_trials=2, steps_per_trial=2)


@pytest.mark.mode("Tuner: lr_find and scale_batch_size", "measured", "their trial steps are not the run's")
@pytest.mark.parametrize("before", [False, True], ids=["first", "after a fit"])
@pytest.mark.parametrize("how", ["lr_find", "scale_batch_size"])
def test_the_tuner_leaves_nothing_behind(tmp_path: Path, how: str, before: bool) -> None:
    """It saves the callback's state and loads it again: not that of the model of an earlier fit."""
    callback = quiet()
    if before:
        trainer(tmp_path / "before", callback).fit(Regressor(), loader(batches(6)))
    earlier = callback.record
    model = Tuned()
    run = trainer(tmp_path, callback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of its own checkpoint
        tune(run, model, how)
    assert callback.record is earlier
    tried = len(model.tape.steps)
    assert tried >= 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "SpeedLimit")
        run.fit(model)
    steps = model.tape.steps[tried:]
    assert last_row(callback)["step"] == len(steps) == run.global_step
    moved = float((steps[-1].after - steps[0].before).norm())
    assert last_row(callback)["displacement"] == pytest.approx(moved, rel=EXACT)
    assert callback.record is not None
    assert "since_step" not in callback.record.run


def test_a_checkpoint_that_was_only_tested_is_not_resumed(tmp_path: Path) -> None:
    """`Trainer.test(ckpt_path=…)` loads the callback's state too; the fit that follows is a new one."""

    class Tested(Regressor):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer(tmp_path, keep, quiet(), enable_checkpointing=True).fit(Tested(), loader(batches(6)))
    callback, model = quiet(), Tested()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of the checkpoint's callbacks
        trainer(tmp_path, callback).test(model, loader(batches(1)), ckpt_path=tmp_path / "step=3.ckpt")
    trainer(tmp_path, callback).fit(model, loader(batches(4)))
    steps = model.tape.steps
    assert last_row(callback)["step"] == len(steps) == 4
    moved = float((steps[-1].after - steps[0].before).norm())
    assert last_row(callback)["displacement"] == pytest.approx(moved, rel=EXACT)


# --- Ctrl-C within the measurement's own code


class Interrupt(BaseException):
    """What Ctrl-C raises wherever Python is, and no `except Exception` sees."""


def half_a_row(record: RunRecord, step: int, values: Any, reasons: Any = None) -> None:
    RunRecord._real_append(record, step, {"path_length": math.nan})  # type: ignore[attr-defined]
    raise Interrupt


def interrupted(*args: Any, **kwargs: Any) -> Any:
    raise Interrupt


PLACES: dict[str, tuple[Any, str]] = {
    "the sums of a step": (JointSteps, "_close"),
    "the clock": (JointSteps, "_rate"),
    "after the sums of a joint step": (JointSteps, "_close"),
    "after a joint step": (JointSteps, "end"),
    "the update": (Follower, "finish"),
    "after the update": (Follower, "finish"),
    "half of the update": (Motion, "_terms"),
    "before the update": (Follower, "force"),
    "the gradients": (Follower, "observe"),
    "after the gradients": (Follower, "observe"),
    "moves outside of step": (Motion, "open"),
    "after moves outside of step": (Motion, "open"),
    "a reading": (Reader, "_collect"),
    "after a reading": (Stepwise, "fold"),
    "a row": (RunRecord, "append"),
}


@pytest.mark.parametrize("where", PLACES)
def test_ctrl_c_within_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """In step 5 or at the reading of step 6: every row is, bitwise, one of the run that nobody interrupted."""
    make = Both if "joint" in where else Regressor  # whose optimizers' steps are joined by the callback
    whole, callback, model = quiet(), quiet(), make()
    trainer(tmp_path / "whole", whole).fit(make(), loader(batches(9)))
    place, name = PLACES[where]
    real = getattr(place, name)
    if place is RunRecord:
        monkeypatch.setattr(RunRecord, "_real_append", real, raising=False)
    armed = [True]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if len(model.tape.losses) < 5 or not armed:
            return real(*args, **kwargs)
        armed.clear()
        if where.startswith("after"):
            real(*args, **kwargs)
        return (half_a_row if place is RunRecord else interrupted)(*args, **kwargs)

    monkeypatch.setattr(place, name, deadly)
    with pytest.raises(Interrupt):
        trainer(tmp_path / "cut", callback, log_every_n_steps=3).fit(model, loader(batches(9)))
    assert whole.record is not None
    assert callback.record is not None
    columns = callback.record.columns
    steps = columns["step"].tolist()
    assert steps in ([[3, 6]] if where in ("a row", "after a reading") else [[3], [3, 4]])
    for column, values in repeatable(whole.record.columns).items():
        np.testing.assert_array_equal(columns[column], values[[step - 1 for step in steps]], err_msg=column)
    assert len(RunRecord.load(tmp_path / "cut" / "speed_limit")) == len(steps)


# --- a process that is ended


def end(folder: Path, signals: list[str]) -> list[RunRecord]:
    """Trainings in processes of their own, each ended by one of the signals; what they leave, loaded."""
    folder.mkdir()
    script = Path(__file__).with_name("ended_trainings.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder), *signals],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [RunRecord.load(folder / str(number) / "speed_limit") for number in range(len(signals))]


def rows_are_the_runs(records: list[RunRecord], folder: Path) -> None:
    """Each is, bitwise, the beginning of the run that nobody ended: no half-written row, none skipped."""
    longest = max(len(record) for record in records)
    whole = fit_as_the_ended(folder / "whole", Regressor(), max_steps=longest).record
    assert len(whole) == longest
    for record in records:
        assert len(record) >= 1
        columns = record.columns
        same_rows({n: c[:-1] for n, c in columns.items()}, whole.columns, len(record) - 1)
        for name in MOTION:
            np.testing.assert_array_equal(columns[name][-1], whole.columns[name][len(record) - 1], err_msg=name)
        np.testing.assert_array_equal(record.sketches, whole.sketches[: len(record)])


# What the last row knows though the batch of its step, and with it its loss, has not come to its end.
MOTION = ("step", "displacement", "path_length", "action", "work_ito", "work_anti_ito", "grad_norm", "elapsed")


@pytest.mark.mode("Ctrl-C (SIGINT) and SIGTERM", "measured", "the record ends with the last completed step")
@pytest.mark.mode("SIGKILL at any moment", "measured", "the last record that was written (every 30 s) is whole")
def test_signals_leave_a_whole_record(tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM: with every step that was completed; SIGKILL: whatever was last written, whole."""
    records = end(tmp_path / "ended", ["SIGINT", "SIGKILL", "SIGTERM", "SIGKILL", "SIGINT", "SIGKILL"])
    for number, how in ((0, "SystemExit"), (2, "SIGTERMException"), (4, "SystemExit")):
        told = json.loads((tmp_path / "ended" / str(number) / "said.json").read_text())
        assert told["ended"] == how
        steps = int(records[number].columns["step"][-1])
        assert told["steps"] - steps in (0, 1)  # 1: the signal came within the update, which is then not completed
        if how == "SIGTERMException":  # Lightning waits for the end of the batch
            assert told["steps"] == steps
    rows_are_the_runs(records, tmp_path)


# --- disks


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """No file of this process may grow beyond a size: the system then says EFBIG, as a full disk says ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.mode(
    "a disk that is full, or takes no files of that size",
    "caveat",
    "said once: `SpeedLimit could not save its record in …`; the record stays in memory, the last whole one on disk",
)
def test_a_file_that_may_not_grow(
    tmp_path: Path, file_size_limit: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system itself refuses, in the middle of a write, from the third step on; at the end it does no more."""
    monkeypatch.setattr(keeper, "WRITE_EVERY", 0.0)
    whole = RunRecord

    class Fill(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                loaded = whole.load(tmp_path / "speed_limit")
                size = max(p.stat().st_size for p in (tmp_path / "speed_limit").iterdir())
                assert len(loaded) == 4
                file_size_limit(size)
            if batch_idx == 8:
                assert len(whole.load(tmp_path / "speed_limit")) == 4  # the last one that was written whole
                assert not [p for p in (tmp_path / "speed_limit").iterdir() if p.suffix == ".tmp"]
                file_size_limit(resource.RLIM_INFINITY)

    model, callback = Regressor(), quiet()
    with pytest.warns(UserWarning, match=r"could not save its record.*set dirpath=") as found:
        trainer(tmp_path, callback, Fill()).fit(model, loader(batches(12)))
    assert said(found, "could not save") == 1
    assert last_row(callback)["step"] == len(model.tape.steps) == 12
    assert len(RunRecord.load(tmp_path / "speed_limit")) == 12  # it was tried again, and there was room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 kB in memory, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of these records do not fit: the second write fails, and the first stays."""
    monkeypatch.setattr(keeper, "WRITE_EVERY", 0.0)
    model, callback = Regressor(), quiet(dirpath=small_disk / "speed_limit")
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3)  # θ_0 may find no room either
    with pytest.warns(UserWarning, match=r"could not save its record.*No space left") as found:
        trainer(tmp_path, callback, keep, enable_checkpointing=True).fit(model, loader(batches(12)))
    assert said(found, "could not save") == 1
    assert last_row(callback)["step"] == 12
    assert 1 <= len(RunRecord.load(small_disk / "speed_limit")) < 12
    assert not list((small_disk / "speed_limit").glob("*.tmp"))


READ_ONLY = OSError(errno.EROFS, "Read-only file system")


def below_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "a file").write_text("no folder")
    return folder / "a file" / "speed_limit"


def refused_by_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise READ_ONLY

    monkeypatch.setattr(writing, "open", refuse, raising=False)
    return folder / "speed_limit"


def refused_by_mkdir(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    real = Path.mkdir

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "speed_limit":
            raise READ_ONLY
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    return folder / "speed_limit"


@pytest.mark.mode("a folder that cannot be written", "caveat", "said once: `SpeedLimit could not save its record in …`")
@pytest.mark.parametrize("how", [below_a_file, refused_by_open, refused_by_mkdir])
def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[Path, pytest.MonkeyPatch], Path], capsys: Any
) -> None:
    monkeypatch.setattr(keeper, "WRITE_EVERY", 0.0)
    without = Regressor()
    trainer(tmp_path, max_epochs=2).fit(without, loader(batches(4)))
    folder = how(tmp_path, monkeypatch)
    model, callback = Regressor(), quiet(dirpath=folder, print_summary=True)
    with pytest.warns(UserWarning, match=r"could not save its record.*set dirpath=") as found:
        trainer(tmp_path, callback, max_epochs=2).fit(model, loader(batches(4)))
    assert said(found, "could not save") == 1
    assert torch.equal(weights(model), weights(without))
    assert last_row(callback)["step"] == 8
    assert "Record:" not in capsys.readouterr().out  # no folder is named that holds none


# --- the measurement itself


class Fault(Exception):
    pass


def fail(*args: Any, **kwargs: Any) -> Any:
    raise Fault("no memory, say")


FAULTS = {
    "a log step": (Reader, "_collect"),
    "a step": (Motion, "close"),
    "a row": (RunRecord, "append"),
    "a sketch": (RunRecord, "add_sketch"),
    "the loss": (TrajectoryMeter, "record_loss"),
    "the gradients": (Follower, "observe"),
    "the summary": (RunRecord, "summary"),
    "the file": (RunRecord, "save"),
}


class Validated(Regressor):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.mode(
    "a fault of the measurement itself",
    "caveat",
    "said once: `the measurement stopped at step …. The training goes on`; values are NaN from there on",
)
@pytest.mark.parametrize("where", FAULTS)
def test_a_fault_of_the_measurement_never_reaches_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, capsys: Any
) -> None:
    def run(*callbacks: Any) -> Validated:
        model = Validated(adam)
        keep = ModelCheckpoint(tmp_path / str(len(callbacks)), every_n_train_steps=4)
        fit = trainer(
            tmp_path,
            *callbacks,
            keep,
            max_epochs=2,
            val_check_interval=3,
            log_every_n_steps=2,
            enable_checkpointing=True,
        )
        fit.fit(model, Resumable(batches(6)), loader(batches(1)))
        return model

    without = run()
    place, name = FAULTS[where]
    monkeypatch.setattr(place, name, fail)
    callback = quiet(print_summary=True)
    with pytest.warns(UserWarning, match="no memory, say") as found:
        model = run(callback)
    assert said(found, "no memory, say") == 1
    assert torch.equal(weights(model), weights(without))
    assert len(model.tape.steps) == 12
    if where == "the file":  # the measurement goes on
        assert math.isfinite(last_row(callback)["path_length"])


def test_after_a_fault_values_are_nan_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the row on in which it happened; the rows before it stay."""
    real = Reader._collect
    model, callback = Regressor(), quiet()

    def once(*args: Any, **kwargs: Any) -> Any:
        return fail() if len(model.tape.steps) == 5 else real(*args, **kwargs)

    monkeypatch.setattr(Reader, "_collect", once)
    with pytest.warns(UserWarning, match="the measurement stopped at step 5: Fault: no memory, say. The training goes"):
        trainer(tmp_path, callback, max_epochs=2).fit(model, loader(batches(7)))
    assert callback.record is not None
    columns = callback.record.columns
    assert columns["step"].tolist()[:5] == [1, 2, 3, 4, 5]
    assert np.isfinite(columns["path_length"][:4]).all()
    assert np.isnan(columns["path_length"][4:]).all()
    assert "stopped at step 5" in callback.record.reasons["path_length"]


def test_a_fault_after_a_row_shows_in_that_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of an epoch, when its last step has been measured: no table shows that as the end of the run."""
    monkeypatch.setattr(Measurement, "measure_clouds", fail)
    callback = quiet(clouds="neurons")
    with pytest.warns(UserWarning, match="the measurement stopped at step 6"):
        trainer(tmp_path, callback, max_epochs=2).fit(Regressor(), loader(batches(6)))
    assert last_row(callback)["step"] == 6
    assert math.isnan(last_row(callback)["path_length"])
    assert callback.record is not None
    assert "stopped at step 6" in callback.record.reasons["path_length"]


def test_a_reading_that_fails_does_not_keep_other_processes_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait in the collective of each reading: a process that cannot read takes part, with nothing but NaN."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        seen = []
        real = dist.all_reduce
        monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: seen.append(real(*args, **kwargs)))
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        measuring = TrajectoryMeter(optimizer, process_group=dist.group.WORLD)
        weight.grad = torch.ones(3)
        optimizer.step()
        monkeypatch.setattr(Reader, "_collect", fail)
        with pytest.warns(UserWarning, match="the measurement stopped at step 1: Fault"):
            first = measuring.compute()
        assert math.isnan(first["path_length"])
        optimizer.step()
        assert math.isnan(measuring.compute()["path_length"])
        assert measuring.steps == 2
        assert len(seen) == 2
    finally:
        dist.destroy_process_group()


def test_a_state_that_cannot_be_saved_is_left_out_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrajectoryMeter, "state_dict", fail)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    callback = quiet()
    with pytest.warns(UserWarning, match="could not put its state in a checkpoint") as found:
        trainer(tmp_path, callback, keep, enable_checkpointing=True).fit(Regressor(), loader(batches(6)))
    assert said(found, "in a checkpoint") == 1
    assert last_row(callback)["step"] == 6
    assert "SpeedLimit" not in torch.load(tmp_path / "step=4.ckpt", weights_only=True)["callbacks"]


DAMAGE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "of another class": lambda state: {"threshold": 3},
    "without its meter": lambda state: {k: v for k, v in state.items() if k != "meter"},
    "of other types": lambda state: state | {"meter": 3},
    "without a number": lambda state: {k: v for k, v in state.items() if k != "measured_at"},
    "without the loss": lambda state: {k: v for k, v in state.items() if k != "loss"},
    "with another start": lambda state: state | {"start": 3},
    "of an older shape": lambda state: state | {"loss": 0.0},
    "without rows": lambda state: state | {"record": {}},
}


@pytest.mark.mode(
    "a checkpoint whose state of the callback cannot be used",
    "caveat",
    "`SpeedLimit starts anew at step …`, with the reason; `record.run['since_step']` tells",
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_cannot_be_loaded_starts_anew(tmp_path: Path, damage: str) -> None:
    def run(*callbacks: Any, ckpt: Any = None) -> Regressor:
        model = Regressor(adam)
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        fit = trainer(tmp_path, keep, *callbacks, enable_checkpointing=True, max_epochs=2)
        fit.fit(model, Resumable(batches(8)), ckpt_path=ckpt)
        return model

    settings: dict[str, Any] = {"probe_batches": 1, "clouds": "neurons"}
    without = run(quiet(**settings))
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    saved["callbacks"]["SpeedLimit"] = DAMAGE[damage](saved["callbacks"]["SpeedLimit"])
    torch.save(saved, tmp_path / "other.ckpt")
    callback = quiet(**settings)
    with pytest.warns(UserWarning, match="starts anew at step 5") as found:
        model = run(callback, ckpt=tmp_path / "other.ckpt")
    assert said(found, "starts anew") == 1
    assert torch.equal(weights(model), weights(without))
    assert callback.record is not None
    assert callback.record.run["since_step"] == 5
    steps = model.tape.steps
    assert last_row(callback)["step"] == len(steps) == 11
    moved = float((steps[-1].after - steps[0].before).norm())
    assert last_row(callback)["displacement"] == pytest.approx(moved, rel=EXACT)


def test_a_summary_that_cannot_be_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("builtins.print", broken)
    callback = quiet(print_summary=True)
    with pytest.warns(UserWarning, match=r"could not print its summary.*record.summary\(\) has it"):
        trainer(tmp_path, callback).fit(Regressor(), loader(batches(5)))
    assert len(RunRecord.load(tmp_path / "speed_limit")) == 5


# --- loggers that fail


class Bad(Logger):
    """Fails in one of its methods; what Lightning needs is there."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.calls = where, 0

    def _maybe(self, where: str) -> None:
        self.calls += where == self.where
        if where == self.where and self.calls >= (5 if where == "log_metrics" else 1):
            raise ConnectionError(f"{where}: the server is gone")

    @property
    def name(self) -> str:
        self._maybe("name")
        return "bad"

    @property
    def version(self) -> int:
        self._maybe("version")
        return 0

    @property
    def save_dir(self) -> str | None:
        return None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._maybe("log_metrics")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._maybe("log_hyperparams")

    def finalize(self, status: str) -> None:
        self._maybe("finalize")


@pytest.mark.mode(
    "a logger that does not tell where it writes",
    "caveat",
    "`SpeedLimit keeps its record in …, for the logger does not tell where it writes`; `default_root_dir` is used",
)
@pytest.mark.parametrize("where", ["name", "version"])  # save_dir is asked for by Lightning first
def test_a_logger_that_does_not_tell_where_it_writes(tmp_path: Path, where: str) -> None:
    callback = quiet()
    with pytest.warns(UserWarning, match=f"does not tell where it writes.*{where}: the server is gone") as found:
        trainer(tmp_path, callback, logger=Bad(where)).fit(Regressor(), loader(batches(5)))
    assert said(found, "does not tell") == 1
    assert len(RunRecord.load(tmp_path / "speed_limit")) == 5


@pytest.mark.mode(
    "a logger that raises in log_metrics, log_hyperparams or finalize",
    "caveat",
    "Lightning itself calls it, and the exception ends the training, with or without SpeedLimit; the record is kept",
)
@pytest.mark.parametrize(("where", "steps"), [("log_hyperparams", 0), ("log_metrics", 5), ("finalize", 8)])
@pytest.mark.parametrize("measured", [True, False])
def test_a_logger_that_raises_is_lightnings_affair(tmp_path: Path, where: str, steps: int, measured: bool) -> None:
    """The callback calls no logger: the same exception at the same step without it. Its record is on disk."""

    class Logs(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

    model, callback = Logs(), quiet()
    callbacks = [callback] if measured else []
    with pytest.raises(ConnectionError, match=f"{where}: the server is gone"):
        trainer(tmp_path, *callbacks, logger=Bad(where)).fit(model, loader(batches(8)))
    assert len(model.tape.steps) == steps
    if measured and steps:
        saved = RunRecord.load(tmp_path / "bad" / "version_0" / "speed_limit")
        assert saved.columns["step"][-1] == steps


def test_a_module_whose_log_refuses_a_name(tmp_path: Path) -> None:
    class Logs(Regressor):
        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            if name == "speed_limit/action":
                raise ValueError("no action here")
            super().log(name, *args, **kwargs)

    callback, logger = quiet(), CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"could not log speed_limit/action \(ValueError: no action here\)") as found:
        trainer(tmp_path, callback, logger=logger).fit(Logs(), loader(batches(5)))
    assert said(found, "could not log") == 1
    assert last_row(callback)["step"] == 5
    assert math.isfinite(last_row(callback)["action"])


def test_no_logger_is_no_reason_for_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*self.log.*")
        run = trainer(tmp_path, quiet())
        run.fit(Regressor(), loader(batches(3)))
    assert "speed_limit/efficiency" in run.callback_metrics  # monitors find it all the same
