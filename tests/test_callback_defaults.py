"""torch's default device and dtype, set within a training, change none of the callback's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callback_cases import Regressor, batches, loader, quiet, sgd, trainer

from lightning_speedlimit import RunRecord

AT = 5
DEFAULTS: dict[str, Callable[[], None]] = {
    "the meta device": lambda: torch.set_default_device("meta"),
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
}


class Change(pl.Callback):
    """Of a default, within a batch."""

    def __init__(self, change: Callable[[], None], hook: str) -> None:
        self.change, self.hook = change, hook

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.hook == "start" and batch_idx == AT:
            self.change()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if self.hook == "step" and trainer.global_step == AT:
            self.change()


def measured(folder: Path, *callbacks: Any) -> tuple[RunRecord, dict[str, float]]:
    """And what was logged last."""
    callback = quiet(clouds="neurons", probe_batches=2, per_layer=True, coordinates=8)
    model = Regressor(sgd(momentum=0.9), width=40, dtype=torch.float32)
    run = trainer(folder, *callbacks, callback, log_every_n_steps=2)
    run.fit(model, loader(batches(12, dtype=torch.float32)))
    assert callback.record is not None
    logged = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("speed_limit/")}
    return callback.record, logged


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.usefixtures("defaults")
def test_a_default_of_torch_is_none_of_the_callbacks_business(tmp_path: Path, default: str) -> None:
    wanted, logged = measured(tmp_path / "plain")
    for hook in ("start", "step"):
        found, logged_too = measured(tmp_path / hook, Change(DEFAULTS[default], hook))
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        assert found.columns.keys() == wanted.columns.keys()
        for name in wanted.columns.keys() - {"seconds"}:
            np.testing.assert_array_equal(found.columns[name], wanted.columns[name], err_msg=name)
        np.testing.assert_array_equal(found.sketches, wanted.sketches)
        assert found.reasons == wanted.reasons
        assert len(wanted.clouds) > 0
        assert str(found.clouds) == str(wanted.clouds)
        assert logged_too == pytest.approx(logged, abs=0, rel=0, nan_ok=True)
