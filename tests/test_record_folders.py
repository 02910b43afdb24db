"""Where a record is looked for: in the folder that is named, or in the only one below it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from callback_cases import Regressor, batches, loader, quiet, trainer
from damaged_records import whole_record
from pytorch_lightning.loggers import CSVLogger

from lightning_speedlimit.record import RecordError, RunRecord


def test_the_folder_of_a_run_gives_its_record(tmp_path: Path) -> None:
    """As Lightning names it: "lightning_logs/version_0"."""
    callback = quiet()
    trainer(tmp_path, callback, logger=CSVLogger(tmp_path, name="lightning_logs")).fit(Regressor(), loader(batches(4)))
    found = RunRecord.load(tmp_path / "lightning_logs" / "version_0")
    assert callback.record is not None
    np.testing.assert_equal(found.columns, callback.record.columns)
    np.testing.assert_equal(RunRecord.load(tmp_path).columns, found.columns)


def test_a_folder_that_is_a_record_is_it_whatever_lies_below(tmp_path: Path) -> None:
    whole_record(steps=50).save(tmp_path / "run")
    whole_record(steps=90).save(tmp_path / "run" / "below")
    assert RunRecord.load(tmp_path / "run").summary().steps == 50


def test_several_are_listed_in_natural_order(tmp_path: Path) -> None:
    for place in (10, 2, 1):
        whole_record(steps=20).save(tmp_path / "runs" / f"version_{place}" / "speed_limit")
    with pytest.raises(RecordError) as error:
        RunRecord.load(tmp_path / "runs")
    wanted = ", ".join(str(tmp_path / "runs" / f"version_{i}" / "speed_limit") for i in (1, 2))
    last = tmp_path / "runs" / "version_10" / "speed_limit"
    assert str(error.value) == f"{tmp_path / 'runs'} holds 3 records: {wanted} and {last}; name one of them"


def test_very_many_are_counted(tmp_path: Path) -> None:
    for place in range(12):
        whole_record(steps=20).save(tmp_path / f"run_{place}")
    with pytest.raises(RecordError, match=r"holds 12 records: .*run_0, .*run_9 and 2 more; name one of them$"):
        RunRecord.load(tmp_path)


def test_the_only_one_below_that_is_damaged_is_named(tmp_path: Path) -> None:
    whole_record(steps=20).save(tmp_path / "run" / "speed_limit")
    (tmp_path / "run" / "speed_limit" / "record.json").write_text("{")
    with pytest.raises(RecordError, match=rf"^{tmp_path / 'run' / 'speed_limit'}: record\.json is no valid JSON"):
        RunRecord.load(tmp_path / "run")


def test_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no such folder: .*nowhere; pass the folder of a run"):
        RunRecord.load(tmp_path / "nowhere")
    with pytest.raises(RecordError, match=r"holds no record: got no record\.json in it or below"):
        RunRecord.load(tmp_path)
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(RecordError, match="is a file, wanted a folder"):
        RunRecord.load(tmp_path / "record.json")


def test_from_within_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_record(steps=20).save(tmp_path / "run" / "speed_limit")
    monkeypatch.chdir(tmp_path / "run")
    for name in (".", "speed_limit", os.path.join("..", "run")):
        assert RunRecord.load(name).summary().steps == 20
