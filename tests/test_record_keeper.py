"""Where the record of a fit lies while another one writes there, and how often it is written."""

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from callback_cases import Regressor, batches, loader, quiet, trainer

from lightning_speedlimit import RunRecord, SpeedLimit
from lightning_speedlimit.record import keeper, lock
from lightning_speedlimit.record.keeper import RecordKeeper
from lightning_speedlimit.report import figures

ELSEWHERE = r"keeps its record in .*-2: another fit, which is not over, writes in .*Give each its own dirpath="


class Within(pl.Callback):
    """Does something once, within a batch of the fit that it belongs to."""

    def __init__(self, act: Callable[[], None], batch: int = 3) -> None:
        self.act, self.batch = act, batch

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.act()


def fit(folder: Path, callback: SpeedLimit, *others: Any, steps: int = 8, **options: Any) -> SpeedLimit:
    trainer(folder, callback, *others, **options).fit(Regressor(), loader(batches(steps)))
    return callback


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("data-")}


# --- folders


def test_a_fit_within_another_ones_folder_takes_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither record, nor a figure, is lost or mixed; and when both are over, the folder is free again."""
    monkeypatch.setattr(figures, "OF_ONE_RUN", {"work_balance": figures.OF_ONE_RUN["work_balance"]})
    here = tmp_path / "here"
    inner = quiet(dirpath=here, log_figures=True)
    outer = quiet(dirpath=here, log_figures=True)
    with pytest.warns(UserWarning, match=ELSEWHERE) as found:
        fit(tmp_path, outer, Within(lambda: void(fit(tmp_path, inner, steps=5))))
    assert len([w for w in found if "another fit" in str(w.message)]) == 1
    assert (outer._folder, inner._folder) == (here, tmp_path / "here-2")
    assert len(RunRecord.load(here)) == 8
    assert len(RunRecord.load(tmp_path / "here-2")) == 5
    assert names(here) == names(tmp_path / "here-2") == {"record.json", "figures"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*another fit.*")
        fit(tmp_path, quiet(dirpath=here), steps=3)
    assert len(RunRecord.load(here)) == 3


def void(_: Any) -> None:
    pass


def test_the_folder_beside_logs_without_a_logger(tmp_path: Path) -> None:
    """No dirpath: two fits in one default_root_dir, as when two scripts are started in one directory."""
    inner, outer = quiet(), quiet()
    with pytest.warns(UserWarning, match=ELSEWHERE):
        fit(tmp_path, outer, Within(lambda: void(fit(tmp_path, inner, steps=5))))
    assert len(RunRecord.load(tmp_path / "speed_limit")) == 8
    assert len(RunRecord.load(tmp_path / "speed_limit-2")) == 5


def test_a_third_fit_and_a_folder_of_that_name_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that lies there is written over; "." has a name too."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here-2").write_text("of the user")
    monkeypatch.chdir(tmp_path / "here")
    record = RunRecord()
    record.append(1, {"loss": 1.0})
    keepers = [RecordKeeper(Path(".")) for _ in range(3)]
    for one in keepers:
        one.write(record)
    assert [one.folder for one in keepers] == [Path("."), tmp_path / "here-3", tmp_path / "here-4"]
    assert (tmp_path / "here-2").read_text() == "of the user"
    for one in keepers:
        assert len(RunRecord.load(one.folder)) == 1
        one.release()
    assert names(tmp_path / "here") == names(tmp_path / "here-4") == {"record.json"}


def test_a_fit_that_failed_holds_no_folder(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("of the user")

    here, failed = tmp_path / "here", quiet(dirpath=tmp_path / "here")
    with pytest.raises(RuntimeError, match="of the user"):
        fit(tmp_path, failed, Within(fail))
    assert len(RunRecord.load(here)) == 4
    assert names(here) == {"record.json"}
    assert fit(tmp_path, quiet(dirpath=here))._folder == here


def test_where_there_are_no_locks_the_folder_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before: the record of the one that ends last, whole."""
    monkeypatch.setattr(lock, "fcntl", None)
    here, inner = tmp_path / "here", quiet(dirpath=tmp_path / "here")
    outer = fit(tmp_path, quiet(dirpath=here), Within(lambda: void(fit(tmp_path, inner, steps=5))))
    assert outer._folder == inner._folder == here
    assert len(RunRecord.load(here)) == 8


def test_a_copy_within_a_fit_has_no_claim(tmp_path: Path) -> None:
    """Callbacks are copied and pickled; the lock stays with the one that took it, and a copy writes elsewhere."""
    copies: list[RecordKeeper] = []
    callback = quiet(dirpath=tmp_path / "here")

    def copied() -> None:
        assert callback._keeper is not None
        assert callback.record is not None
        copies.extend([copy.deepcopy(callback._keeper), pickle.loads(pickle.dumps(callback._keeper))])
        for one in copies:
            one.write(callback.record, ended="finished")
            one.release()

    fit(tmp_path, callback, Within(copied))
    assert [one.folder for one in copies] == [tmp_path / "here-2", tmp_path / "here-3"]
    assert callback._keeper is None
    assert len(RunRecord.load(tmp_path / "here")) == 8


def test_saving_into_the_folder_of_a_fit_waits_for_no_end(tmp_path: Path) -> None:
    """`record.save` is the user's own: it is written there, and the fit goes on writing."""
    here, seen = tmp_path / "here", []
    callback = quiet(dirpath=here)

    def save() -> None:
        assert callback.record is not None
        callback.record.save(here)
        seen.append(len(RunRecord.load(here)))

    fit(tmp_path, callback, Within(save))
    assert seen == [4]
    assert len(RunRecord.load(here)) == 8


# --- how often


class Clock:
    """Stands in for `time`: it goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(keeper, "time", found)
    return found


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows at each write."""
    real, rows = RunRecord.save, []

    def counted(record: RunRecord, path: Any) -> None:
        rows.append(len(record))
        real(record, path)

    monkeypatch.setattr(RunRecord, "save", counted)
    return rows


def test_many_short_epochs_are_written_seldom(tmp_path: Path, clock: Clock, saved: list[int]) -> None:
    """40 epochs of two steps, all within the first seconds: the first row, and all of them in the end."""
    fit(tmp_path, quiet(), steps=2, max_epochs=40)
    assert saved == [1, 80]
    assert len(RunRecord.load(tmp_path / "speed_limit")) == 80


@pytest.mark.parametrize(
    ("every", "written"),
    [(1, [1, 2, 3, 4, 7, 10, 13, 16, 16]), (3, [3, 4, 6, 8, 12, 15, 16])],  # rows at the ends of epochs too
)
def test_one_write_in_thirty_seconds_after_the_first_ones(
    tmp_path: Path, clock: Clock, saved: list[int], every: int, written: list[int]
) -> None:
    """11 s a step, 4 steps an epoch: what is there is written when the time has come, and at the end of the fit."""

    class Seconds(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            clock.now += 11.0

    callback = fit(tmp_path, quiet(), Seconds(), steps=4, max_epochs=4, log_every_n_steps=every)
    assert callback.record is not None
    steps = callback.record.columns["step"]
    assert [steps[rows - 1] for rows in saved] == written


def test_the_first_writes_come_soon_and_the_last_one_always(tmp_path: Path, clock: Clock, saved: list[int]) -> None:
    """Rows each half second: pauses of 2, 5 and 10 s, then of 30 s."""
    one, record, begun = RecordKeeper(tmp_path / "here"), RunRecord(), []
    for half in range(160):
        clock.now = half / 2
        record.append(half, {"loss": 1.0})
        before = len(saved)
        one.write(record)
        begun += [clock.now] * (len(saved) - before)
    assert begun == [0.0, 2.0, 7.0, 17.0, 47.0, 77.0]
    one.write(record, ended="finished")
    assert saved[-1] == 160
    one.release()


def test_a_slow_disk_is_written_less_often(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes of 6 s: one in two minutes, 5 % of the time; the first says 30 s, of which 60 s are made at most."""
    begun: list[float] = []

    def slow(record: RunRecord, path: Any) -> None:
        begun.append(clock.now)
        clock.now += 6.0
        if len(begun) == 2:
            raise OSError("full")

    monkeypatch.setattr(RunRecord, "save", slow)
    one, record = RecordKeeper(tmp_path / "here"), RunRecord()
    while clock.now < 400.0:
        try:
            one.write(record)
        except OSError:
            assert len(begun) == 2
        clock.now += 1.0
    assert begun == [0.0, 66.0, 192.0, 318.0]
    one.write(record, ended="finished")
    assert len(begun) == 5
    one.release()


def test_an_exception_between_two_writes_loses_no_row(tmp_path: Path, clock: Clock, saved: list[int]) -> None:
    def fail() -> None:
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        fit(tmp_path, quiet(), Within(fail, batch=5))
    assert saved == [1, 6]
    assert len(RunRecord.load(tmp_path / "speed_limit")) == 6


def test_a_fit_that_measures_nothing_makes_no_folder(tmp_path: Path) -> None:
    fit(tmp_path, quiet(dirpath=tmp_path / "here"), max_steps=0)
    assert not (tmp_path / "here").exists()


def test_nothing_is_written_after_the_fit(tmp_path: Path, saved: list[int]) -> None:
    """An error in a later `test` of the same callback is none of the record's."""
    callback = quiet()

    class Failing(Regressor):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("of the user")

    own = trainer(tmp_path, callback)
    own.fit(Failing(), loader(batches(3)))
    count = len(saved)
    with pytest.raises(RuntimeError, match="of the user"):
        own.test(Failing(), loader(batches(1)))
    assert len(saved) == count
    assert os.listdir(tmp_path / "speed_limit")
