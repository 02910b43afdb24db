"""`monitor=`: the loss is what training logged in the batches of a step, and nothing else that has that name."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from callback_cases import EXACT, Batch, Regressor, batches, last_row, loader, quiet, sgd, trainer
from torch import Tensor

# Lightning keeps logged values in float32 unless they are float64: ours are.


class Logging(Regressor):
    """Returns three times the loss, and logs the loss, as `how` says."""

    def __init__(self, how: dict[str, Any], make: Any = None) -> None:
        super().__init__(make or sgd(lr=0.01))
        self.how = how

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.how:
            self.log("mine", loss.detach(), **self.how)
        return 3.0 * loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not self.how:
            self.log("mine", self.loss(batch))


def drop(losses: list[float]) -> float:
    return losses[0] - (2 * losses[-1] - losses[-2])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("how", [{"on_step": True}, {"on_step": True, "on_epoch": True, "prog_bar": True}], ids=str)
@pytest.mark.mode("monitor=, with or without accumulation", "measured")
def test_the_mean_over_the_batches_of_a_step(tmp_path: Path, how: dict[str, Any], accumulate: int) -> None:
    """7 batches: with windows of 3 the last one is short."""
    model, callback = Logging(how), quiet(monitor="mine")
    trainer(tmp_path, callback, max_epochs=2, accumulate_grad_batches=accumulate).fit(model, loader(batches(7)))
    epochs = model.tape.losses[:7], model.tape.losses[7:]
    parts = [e[i : i + accumulate] for e in epochs for i in range(0, 7, accumulate)]
    means = [math.fsum(part) / len(part) for part in parts]
    got = last_row(callback)
    assert got["step"] == len(means)
    assert got["loss_drop"] == pytest.approx(drop(means), rel=EXACT)
    if accumulate > 1:
        assert abs(drop([part[-1] for part in parts]) / drop(means) - 1) > 0.05  # the last batch's alone would be seen


STALE = {"validation alone": {}, "the ends of epochs": {"on_step": False, "on_epoch": True}}


@pytest.mark.parametrize("name", STALE)
@pytest.mark.mode(
    "monitor= of a metric that only validations or epoch ends log", "caveat", "loss_drop is NaN, with the reason"
)
def test_what_no_step_logs_is_no_loss(tmp_path: Path, name: str) -> None:
    """A value of the last validation would be repeated as the loss of every step that follows."""
    model, callback = Logging(STALE[name]), quiet(monitor="mine")
    run = trainer(tmp_path, callback, max_epochs=3, num_sanity_val_steps=0)
    run.fit(model, loader(batches(5)), loader(batches(2)))
    assert "mine" in run.callback_metrics
    assert callback.record is not None
    assert math.isnan(last_row(callback)["loss_drop"])
    assert "monitor='mine' was not among the metrics logged at each step" in callback.record.reasons["loss_drop"]
    assert "these are" not in callback.record.reasons["loss_drop"], "nothing else is logged at steps"


def test_a_step_that_logs_nothing_has_no_loss(tmp_path: Path) -> None:
    """Logged in every second batch: the others are not given the value of the one before."""

    class Sometimes(Logging):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            self.how = {"on_step": True} if batch_idx % 2 == 0 else {}
            return super().training_step(batch, batch_idx)

    model, callback = Sometimes({}), quiet(monitor="mine")
    trainer(tmp_path, callback).fit(model, loader(batches(9)))
    losses = model.tape.losses[0::2]  # at the steps 0, 2, …, 8 of 9
    slope = (losses[-1] - losses[-2]) / 2
    assert last_row(callback)["loss_drop"] == pytest.approx(losses[0] - (losses[-1] + slope), rel=EXACT)


def test_a_torchmetrics_metric(tmp_path: Path) -> None:
    class Metric(Regressor):
        def __init__(self) -> None:
            super().__init__(sgd(lr=0.01))
            self.error = torchmetrics.MeanSquaredError().set_dtype(torch.float64)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.error(self(batch[0]).detach(), batch[1])
            self.log("mine", self.error, on_step=True, on_epoch=True)
            return 3.0 * loss

    model, callback = Metric(), quiet(monitor="mine")
    trainer(tmp_path, callback).fit(model, loader(batches(7)))
    assert last_row(callback)["loss_drop"] == pytest.approx(drop(model.tape.losses), rel=EXACT)


def test_lbfgs_logs_many_and_the_first_counts(tmp_path: Path) -> None:
    model = Logging({"on_step": True}, lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4))
    callback, starts = quiet(monitor="mine"), []
    original = model.on_train_batch_start

    def started(*args: Any) -> Any:
        starts.append(len(model.tape.losses))
        return original(*args)

    model.on_train_batch_start = started  # type: ignore[method-assign]
    trainer(tmp_path, callback).fit(model, loader(batches(1) * 5))
    assert len(model.tape.losses) > 10
    assert last_row(callback)["loss_drop"] == pytest.approx(drop([model.tape.losses[i] for i in starts]), rel=EXACT)
