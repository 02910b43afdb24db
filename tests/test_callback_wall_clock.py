"""The wall clock in the record: what a comparison by time rests on; and the batches that Lightning knows of."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from callback_cases import Regressor, Resumable, batches, loader, quiet, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

PAUSE = 0.03  # seconds


class Slow(pl.Callback):
    """A training whose steps take at least PAUSE."""

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(PAUSE)


def seconds(callback: Any) -> np.ndarray:
    found: np.ndarray = callback.record.columns["seconds"]
    return found


def test_seconds_are_those_of_the_fit(tmp_path: Path) -> None:
    callback = quiet()
    began = time.monotonic()
    trainer(tmp_path, callback, Slow()).fit(Regressor(), loader(batches(4)))
    taken = time.monotonic() - began
    found = seconds(callback)
    assert len(found) == 4
    assert (np.diff(found) >= 0.9 * PAUSE).all()  # a sleep may end early by the resolution of the clock
    assert 0.9 * 4 * PAUSE <= found[-1] <= taken


def test_a_resumed_run_goes_on_from_its_seconds_without_the_pause(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    first, second = quiet(), quiet()
    trainer(tmp_path, first, Slow(), keep, enable_checkpointing=True).fit(Regressor(), Resumable(batches(6)))
    before = seconds(first)
    time.sleep(20 * PAUSE)
    began = time.monotonic()
    trainer(tmp_path / "on", second, Slow()).fit(Regressor(), Resumable(batches(6)), ckpt_path=tmp_path / "step=3.ckpt")
    taken = time.monotonic() - began
    found = seconds(second)
    np.testing.assert_array_equal(found[:3], before[:3])
    assert before[2] + 0.9 * PAUSE <= found[3] <= before[2] + taken
    assert (np.diff(found) > 0).all()


def test_no_logger_gets_them(tmp_path: Path) -> None:
    callback = quiet()
    trainer(tmp_path, callback, logger=CSVLogger(tmp_path)).fit(Regressor(), loader(batches(3)))
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "speed_limit/displacement" in header
    assert "seconds" not in header


def test_the_record_knows_the_batches_where_lightning_does(tmp_path: Path) -> None:
    """How many in an epoch only where they hold all data: a part of it, drawn anew, is noise."""
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches(4), strict=True)))
    sampler = BatchSampler(SequentialSampler(data), 6, drop_last=True)
    cases = [  # 24 examples
        (DataLoader(data, batch_size=4), {}, 4, 6),
        (DataLoader(data, batch_size=5), {}, 5, 5),
        (DataLoader(data, batch_size=24, shuffle=True), {}, 24, 1),
        (DataLoader(data, batch_size=20, drop_last=True), {}, 20, None),
        (DataLoader(data, batch_size=12), {"limit_train_batches": 1}, 12, None),
        (DataLoader(data, batch_sampler=sampler), {}, 6, 4),
        (loader(batches(4)), {}, None, None),  # it makes no batches: they come as they are
    ]
    for number, (loads, options, size, count) in enumerate(cases):
        callback = quiet()
        trainer(tmp_path / str(number), callback, **options).fit(Regressor(), loads)
        assert callback.record is not None
        assert (callback.record.run["batch_size"], callback.record.run["batches_per_epoch"]) == (size, count), number
        pool = {20: 20, 12: 12, None: None}.get(size, 24)  # in its order, a part of the data is always the same part
        assert callback.record.run["samples_without_replacement"] == pool, number


def test_the_record_knows_whether_samples_may_come_again(tmp_path: Path) -> None:
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches(4), strict=True)))
    samplers = {
        RandomSampler(data, replacement=True): None,
        RandomSampler(data): 24,
        RandomSampler(data, num_samples=8): 24,
        RandomSampler(data, num_samples=48): None,
        SubsetRandomSampler(range(10)): 10,
        WeightedRandomSampler([1.0] * 24, 24): None,
    }
    for number, (sampler, wanted) in enumerate(samplers.items()):
        callback = quiet()
        trainer(tmp_path / str(number), callback).fit(Regressor(), DataLoader(data, batch_size=4, sampler=sampler))
        assert callback.record is not None
        assert callback.record.run["samples_without_replacement"] == wanted, number
