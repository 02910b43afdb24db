"""The probe: losses of fixed batches at θ_0 and now, against the same losses evaluated by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import EXACT, Batch, Regressor, batches, last_row, loader, quiet, sgd, trainer
from torch import Tensor, nn

from lightning_speedlimit import SpeedLimit


def loss_at(theta: Tensor, data: list[Batch]) -> Tensor:
    """(n,) losses of a fresh model with the weights of a tape."""
    model, place = Regressor(), 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(theta[place : place + parameter.numel()].view_as(parameter))
            place += parameter.numel()
        return torch.stack([model.loss(batch) for batch in data])


class Probed(Regressor):
    """Keeps the losses that carry a graph apart: the probe evaluates without."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if not torch.is_grad_enabled():
            self.tape.losses.pop()
            self.tape.batch -= 1
        return loss


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_the_drop_is_that_of_the_first_batches(tmp_path: Path, size: int, options: dict[str, Any]) -> None:
    data = batches(8)
    model, callback = Probed(), quiet(probe_batches=size)
    trainer(tmp_path, callback, **options).fit(model, loader(data))
    steps = model.tape.steps
    assert callback.record is not None
    columns = callback.record.columns
    complete = [
        row for row, step in enumerate(columns["step"]) if step * options.get("accumulate_grad_batches", 1) >= size
    ]
    assert complete
    for row in complete:
        after = steps[int(columns["step"][row]) - 1].after
        fall = loss_at(steps[0].before, data[:size]) - loss_at(after, data[:size])
        assert columns["loss_drop"][row] == pytest.approx(float(fall.mean()), rel=EXACT)
        error = float(fall.std()) / math.sqrt(size) if size > 1 else math.nan
        assert columns["loss_drop_se"][row] == pytest.approx(error, rel=EXACT, nan_ok=True)


def test_before_it_is_complete_the_training_losses_serve_and_it_says_so(tmp_path: Path) -> None:
    model, callback = Probed(), quiet(probe_batches=6)
    trainer(tmp_path, callback, max_steps=4).fit(model, loader(batches(8)))
    assert callback.record is not None
    assert "6 probe batches" in callback.record.reasons["loss_drop"]
    losses = model.tape.losses
    assert last_row(callback)["loss_drop"] == pytest.approx(losses[0] - (2 * losses[-1] - losses[-2]), rel=EXACT)


class Dropping(Regressor):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.dropout(torch.tanh(self.first(x)), 0.5, self.training))


def test_dropout_draws_the_same_masks_at_both_ends(tmp_path: Path) -> None:
    """Weights that stay have no drop: the difference is the weights' alone."""
    callback = quiet(probe_batches=3)
    trainer(tmp_path, callback).fit(Dropping(sgd(lr=0.0)), loader(batches(6)))
    assert last_row(callback)["loss_drop"] == 0.0


def test_a_pair_of_probes_after_a_clamp_does_not_count_it_twice(tmp_path: Path) -> None:
    """The probe looks for moves before it puts θ_0 in place; the next step looks again."""
    import pytorch_lightning as pl

    class Shift(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.add_(0.25)

    model, callback = Probed(), quiet(probe_batches=2)
    trainer(tmp_path, callback, Shift()).fit(model, loader(batches(6)))
    total = torch.stack([s.update for s in model.tape.steps]).sum(0)
    assert last_row(callback)["displacement"] == pytest.approx(float(total.norm()), rel=EXACT)


@pytest.mark.parametrize("kind", ["batch alone", "anything"])
def test_training_step_may_take_what_lightning_gives_it(tmp_path: Path, kind: str) -> None:
    class Alone(Regressor):
        def training_step(self, batch: Batch) -> Any:  # type: ignore[override]
            return self.loss(batch)

    class Anything(Regressor):
        def training_step(self, *args: Any) -> Any:
            assert args[1] in range(6)
            return self.loss(args[0])

    callback = quiet(probe_batches=2)
    model = Alone() if kind == "batch alone" else Anything()
    trainer(tmp_path, callback).fit(model, loader(batches(6)))
    assert last_row(callback)["loss_drop_se"] > 0  # the probe's: two losses at each end alone have none


@pytest.mark.parametrize("fails", ["at once", "later"])
def test_a_probe_that_cannot_be_evaluated_is_said_once(tmp_path: Path, fails: str) -> None:
    """A penalty on a gradient needs a graph, which the probe does not build: the training's losses serve."""

    class Penalised(Probed):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if fails == "at once" or len(self.tape.steps) > 4:
                torch.autograd.grad(loss, next(self.parameters()), create_graph=True)
            return loss

    model, callback = Penalised(), quiet(probe_batches=2)
    with pytest.warns(UserWarning, match="could not evaluate probe_batches") as said:
        trainer(tmp_path, callback).fit(model, loader(batches(8)))
    assert sum("probe_batches" in str(w.message) for w in said) == 1
    assert last_row(callback)["step"] == 8
    if fails == "at once":
        losses = model.tape.losses
        assert last_row(callback)["loss_drop"] == pytest.approx(losses[0] - (2 * losses[-1] - losses[-2]), rel=EXACT)


@pytest.mark.mode(
    "probe_batches under manual optimization",
    "refused",
    "raises ValueError: probe_batches=… needs automatic optimization",
)
def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    model = Regressor()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match=r"probe_batches=2 needs automatic optimization.*monitor="):
        trainer(tmp_path, SpeedLimit(probe_batches=2, log_figures=False)).fit(model, loader(batches(2)))
