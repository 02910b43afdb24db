"""Whether a fit goes on, as its record tells: within a fit, at its end, after a kill, and of a loop of one's own."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from callback_cases import Regressor, batches, loader, quiet, trainer
from damaged_records import whole_record
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_speedlimit import RunRecord
from lightning_speedlimit.record import fit_state, keeper
from lightning_speedlimit.record.fit_state import FitState, duration
from lightning_speedlimit.report import compare
from lightning_speedlimit.report.settings import settings_of

START = 1_000_000.0  # s since 1970


class Clock:
    """Stands in for `time`."""

    now = START

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(fit_state, "time", found)
    monkeypatch.setattr(keeper, "time", found)
    return found


class At(pl.Callback):
    """Does something at the end of a batch, after the measurement."""

    def __init__(self, batch: int, act: Callable[[], None]) -> None:
        self.batch, self.act = batch, act

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.act()


def fit(folder: Path, *others: Any, steps: int = 6, **options: Any) -> None:
    trainer(folder, quiet(dirpath=folder / "run"), *others, **options).fit(Regressor(), loader(batches(steps)))


def state(folder: Path) -> FitState:
    return fit_state.fit_state(RunRecord.load(folder), folder)


def touch(folder: Path, at: float) -> None:
    os.utime(folder / "record.json", (at, at))


def test_within_a_fit_and_when_it_is_over(tmp_path: Path, clock: Clock) -> None:
    seen: list[FitState] = []

    def look() -> None:
        clock.now = START + 12
        touch(tmp_path / "run", START)
        seen.append(state(tmp_path / "run"))

    fit(tmp_path, At(2, look))
    assert [(s.kind, s.sentence) for s in seen] == [("running", "still running, last written 12 s ago")]
    clock.now = START + 12 + 3 * 3600
    assert state(tmp_path / "run") == FitState("ended", 3 * 3600.0)
    assert state(tmp_path / "run").sentence == "ended 3 h ago"


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_fit_that_failed_says_by_what(tmp_path: Path, clock: Clock, error: type[BaseException]) -> None:
    def fail() -> None:
        raise error("of the user")

    with pytest.raises((ArithmeticError, KeyboardInterrupt, SystemExit)):  # Lightning makes an exit of Ctrl-C
        fit(tmp_path, At(3, fail))
    clock.now += 5
    assert state(tmp_path / "run").sentence == f"ended 5 s ago by {error.__name__}"


def test_a_killed_one_is_running_until_it_has_been_silent_too_long(tmp_path: Path, clock: Clock) -> None:
    """Three times 30 s where rows follow each other quickly; of rows that are 100 s apart three times 130 s."""
    fit(tmp_path, At(2, lambda: void(shutil.copytree(tmp_path / "run", tmp_path / "killed"))))
    slow = RunRecord({"ended": None, "written": START})
    for step in range(1, 5):
        slow.append(step, {"seconds": 100.0 * step})
    slow.save(tmp_path / "slow")
    for name, patience in (("killed", 90.0), ("slow", 390.0)):
        touch(tmp_path / name, START)
        for off, kind in ((-1, "running"), (+1, "silent")):
            clock.now = START + patience + off
            assert state(tmp_path / name).kind == kind, (name, off)
    assert state(tmp_path / "slow").sentence == "not ended: last written 6 min ago, killed or still running"


@pytest.mark.parametrize("seconds", [0.1, 6.0, 14.0])
def test_a_fit_on_a_slow_disk_is_running_until_its_next_write(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Writes of 14 s are 280 s apart; looked at just before each has replaced the one before."""
    real, seen, rows = RunRecord.save, [], RunRecord()

    def slow(record: RunRecord, path: Any) -> None:
        clock.now += seconds
        if seen or clock.now > START + 20:
            seen.append(state(tmp_path).kind)
        real(record, path)
        touch(tmp_path, clock.now)

    monkeypatch.setattr(RunRecord, "save", slow)
    one = keeper.RecordKeeper(tmp_path)
    while clock.now < START + 1500:
        rows.append(int(clock.now - START), {"seconds": clock.now - START})
        one.write(rows)
        clock.now += 1.0
    assert set(seen) == {"running"}
    assert len(seen) >= 4
    written = RunRecord.load(tmp_path).run
    clock.now = written["written"] + 4 * (written["pause"] + 20)
    assert state(tmp_path).kind == "silent"
    one.release()


@pytest.mark.parametrize("pause", [None, float("nan"), float("inf"), -1.0])
def test_a_pause_that_tells_nothing(tmp_path: Path, clock: Clock, pause: float | None) -> None:
    """The usual one is taken."""
    record = RunRecord({"ended": None, "written": START, "pause": pause})
    record.append(1, {"seconds": 0.0})
    record.save(tmp_path)
    touch(tmp_path, START)
    for age, kind in ((89.0, "running"), (91.0, "silent")):
        clock.now = START + age
        assert state(tmp_path).kind == kind


def test_a_copy_is_as_old_as_what_it_holds(tmp_path: Path, clock: Clock) -> None:
    """A folder of a killed run that was fetched from elsewhere a moment ago."""
    fit(tmp_path, At(2, lambda: void(shutil.copytree(tmp_path / "run", tmp_path / "copy"))))
    clock.now = START + 86400 * 3
    touch(tmp_path / "copy", clock.now - 1)
    assert state(tmp_path / "copy").sentence == "not ended: last written 3 days ago, killed or still running"


def test_clocks_that_differ_make_no_negative_age(tmp_path: Path, clock: Clock) -> None:
    record = whole_record(steps=20)
    record.run |= {"ended": None, "written": START + 500}
    record.save(tmp_path)
    touch(tmp_path, START + 300)
    assert state(tmp_path).sentence == "still running, last written 0 s ago"


def test_a_loop_of_ones_own_is_never_called_running(tmp_path: Path, clock: Clock) -> None:
    record = whole_record(steps=20)
    del record.run["ended"], record.run["written"], record.run["pause"]
    record.save(tmp_path)
    touch(tmp_path, START - 1)
    assert state(tmp_path) == FitState("unknown", 1.0)
    record.run["ended"] = None  # unless it says so
    record.save(tmp_path)
    touch(tmp_path, START - 1)
    assert state(tmp_path).kind == "running"


def test_a_run_that_is_resumed_goes_on_again(tmp_path: Path, clock: Clock) -> None:
    """In the folder in which the fit before it had ended."""
    fit(tmp_path, ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True), enable_checkpointing=True)
    assert state(tmp_path / "run").kind == "ended"
    seen: list[str] = []
    look = At(0, lambda: seen.append(state(tmp_path / "run").kind))
    run = trainer(tmp_path, quiet(dirpath=tmp_path / "run"), look, max_epochs=2)
    run.fit(Regressor(), loader(batches(6)), ckpt_path=tmp_path / "last.ckpt")
    assert seen == ["running"]
    assert state(tmp_path / "run").kind == "ended"
    assert RunRecord.load(tmp_path / "run").summary().steps == 12


def test_the_marks_are_on_disk_alone(tmp_path: Path) -> None:
    """A record that goes into a checkpoint, or that its user saves elsewhere, tells nothing of a fit."""
    callback = quiet(dirpath=tmp_path / "run")
    trainer(tmp_path, callback).fit(Regressor(), loader(batches(3)))
    assert callback.record is not None
    assert not {"ended", "written", "pause"} & callback.record.run.keys()
    callback.record.save(tmp_path / "elsewhere")
    assert state(tmp_path / "elsewhere").kind == "unknown"
    assert RunRecord.load(tmp_path / "run").run.keys() - callback.record.run.keys() == {"ended", "written", "pause"}


def test_how_and_when_a_fit_ended_is_no_setting() -> None:
    """Of runs that are compared, each was written at another time."""
    records = [whole_record(rate=rate) for rate in (0.01, 0.02)]
    records[1].run |= {"ended": "KeyboardInterrupt", "written": START, "batch_norm_layers": 3}
    found = settings_of(compare({"a": records[0], "b": records[1]}))
    assert found.differing == ("batch norm layers",)
    assert not {"ended", "written", "pause"} & dict(found.same).keys()


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.9, 60, 3599, 3600, 47.9 * 3600, 48 * 3600, 86400.0 * 12_345)] == [
        "0 s", "59 s", "1 min", "59 min", "1 h", "47 h", "2 days", "12,300 days",
    ]  # fmt: skip


def test_the_time_of_writing_is_the_systems(tmp_path: Path) -> None:
    before = time.time()
    fit(tmp_path)
    assert before <= RunRecord.load(tmp_path / "run").run["written"] <= time.time()


def void(_: Any) -> None:
    """For what gives something back."""
