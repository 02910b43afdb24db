"""Values that go straight to the metrics which `log` made: Lightning shows what it shows when all go through `log`."""

import math
from collections import Counter
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callback_cases import Batch, Regressor, batches, loader, quiet, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_speedlimit.callback import LOGGED
from lightning_speedlimit.callback.logged_metrics import LoggedMetrics

NAME = "speed_limit/action"


class Logging(Regressor):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class OwnName(pl.Callback):
    """Logs a name of ours before us, in the same hook and in another way: ours is refused."""

    settings: ClassVar[dict[str, Any]] = {"prog_bar": True}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.log("speed_limit/displacement", -1.0, on_step=True, on_epoch=False, **self.settings)


class SameWay(OwnName):
    """In our way: the later value counts."""

    settings: ClassVar[dict[str, Any]] = {"logger": True, "batch_size": 1}


class AnotherHook(Logging):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.log("speed_limit/displacement", -float(batch_idx))
        return super().training_step(batch, batch_idx)


class Tape(pl.Callback):
    """What Lightning shows after each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        shown = {f"{kind} {k}": float(v) for kind in KINDS for k, v in getattr(trainer, kind).items()}
        self.seen.append(shown)


KINDS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


def shown(
    folder: Path, model: type[Logging], other: list[type[OwnName]], **settings: Any
) -> tuple[list[dict[str, float]], str, list[str]]:
    """What is seen after each batch, the logger's file, and the checkpoints' names."""
    keep = ModelCheckpoint(folder, monitor=NAME, every_n_train_steps=2, save_top_k=-1, filename="{speed_limit/action}")
    tape, logger = Tape(), CSVLogger(folder)
    run = trainer(
        folder, *(callback() for callback in other), quiet(**settings), tape, keep,
        logger=logger, max_epochs=3, log_every_n_steps=2, enable_checkpointing=True, val_check_interval=4,
    )  # fmt: skip
    run.fit(model(), loader(batches(9)), loader(batches(2)))
    tape.on_train_batch_end(run)
    return tape.seen, (Path(logger.log_dir) / "metrics.csv").read_text(), sorted(str(p) for p in folder.rglob("*=*"))


@pytest.mark.parametrize(
    ("model", "other", "settings"),
    [
        (Logging, [], {"prog_bar": True, "per_layer": True, "clouds": "neurons"}),
        (AnotherHook, [], {}),
        (Logging, [OwnName], {}),
        (Logging, [SameWay], {}),
    ],
)
@pytest.mark.filterwarnings("ignore:SpeedLimit could not log")
def test_lightning_shows_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: type[Logging], other: list[type[OwnName]],
    settings: dict[str, Any],
) -> None:  # fmt: skip
    seen, file, names = shown(tmp_path / "short", model, other, **settings)
    monkeypatch.setattr(LoggedMetrics, "_takes_next", staticmethod(lambda *_: False))
    expected, whole_file, whole_names = shown(tmp_path / "whole", model, other, **settings)
    assert file == whole_file
    assert [Path(n).name for n in names] == [Path(n).name for n in whole_names]
    assert len(names) > 3
    for here, there in zip(seen, expected, strict=True):
        assert here.keys() == there.keys()
        np.testing.assert_array_equal(list(here.values()), list(there.values()))
    assert any(math.isfinite(v) for v in seen[-1].values())


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each name went through the modules' `log`."""
    calls: Counter[str] = Counter()
    log = pl.LightningModule.log

    @wraps(log)
    def counting(module: Any, name: str, *args: Any, **kwargs: Any) -> None:
        calls[name] += 1
        log(module, name, *args, **kwargs)

    monkeypatch.setattr(pl.LightningModule, "log", counting)
    return calls


def test_a_name_goes_through_log_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    trainer(tmp_path, quiet(), log_every_n_steps=2).fit(Logging(), loader(batches(12)))
    assert calls["train_loss"] == 12
    assert {calls[f"speed_limit/{name}"] for name in LOGGED} == {1}


def test_a_log_of_the_modules_own_is_asked_each_time(tmp_path: Path) -> None:
    heard: Counter[str] = Counter()

    class Own(Logging):
        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            heard[name] += 1
            super().log(name, *args, **kwargs)

    class Later(Logging):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 7:
                vars(self)["log"] = lambda name, *args, **kwargs: heard.update([name])

    trainer(tmp_path, quiet(), log_every_n_steps=2).fit(Own(), loader(batches(12)))
    assert heard[NAME] == 6
    trainer(tmp_path, quiet(), log_every_n_steps=2).fit(Later(), loader(batches(12)))
    assert heard[NAME] == 6 + 3


def test_what_is_no_next_value_goes_through_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other settings, which Lightning refuses; another fit; what has to be reset."""
    calls, metrics, value = counted(monkeypatch), LoggedMetrics(), torch.ones(())
    way: dict[str, Any] = {"on_step": True, "on_epoch": False, "batch_size": 1}

    class Logs(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            connector = trainer._logger_connector
            metrics.log(pl_module, "x", value, **way)
            connector._current_fx = "another"
            metrics.log(pl_module, "x", value, **way)
            assert connector._current_fx == "on_train_batch_end"
            if batch_idx:
                with pytest.raises(MisconfigurationException, match="different arguments"):
                    metrics.log(pl_module, "x", value, **way | {"prog_bar": True})

    for fits in (1, 2):
        trainer(tmp_path, Logs()).fit(Logging(), loader(batches(3)))
        assert calls["x"] == fits * (1 + 1 + 2)  # the first one, the one that resets, those with other settings
