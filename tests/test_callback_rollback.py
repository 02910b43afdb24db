"""A state that is loaded in the middle of a fit takes the measurement back with the weights."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callback_cases import EXACT, Regressor, Step, batches, last_row, loader, quiet, repeatable, trainer
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint

from lightning_speedlimit import RunRecord, SpeedLimit
from lightning_speedlimit.callback import measuring

PER_EPOCH, EPOCHS = 8, 4
STEPS = PER_EPOCH * EPOCHS
TRIALS = 6


class Rated(Regressor):
    """Its loader, learning rate and batch size are its own, as the tuners want them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lr, self.batch_size = 0.02, 4
        self.tried: list[int] = []

    def configure_optimizers(self) -> Any:
        return self.tape.follow(torch.optim.AdamW(self.parameters(), lr=self.lr))

    @contextmanager
    def trial(self) -> Iterator[None]:
        before = len(self.tape.steps)
        yield
        self.tried += range(before, len(self.tape.steps))

    @property
    def steps(self) -> list[Step]:
        """Those that were no trial."""
        return [step for i, step in enumerate(self.tape.steps) if i not in self.tried]

    def train_dataloader(self) -> Any:
        return loader(batches(PER_EPOCH))


class LearningRates(LearningRateFinder):
    """The pattern of Lightning's documentation: at milestones, and at the start."""

    def __init__(self, *epochs: int) -> None:
        super().__init__(num_training_steps=TRIALS, early_stop_threshold=None, update_attr=False)
        self.epochs = epochs

    def on_fit_start(self, *args: Any) -> None:
        """Not here."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch in self.epochs:
            with module.trial():
                self.lr_find(trainer, module)


class BatchSizes(BatchSizeFinder):
    def __init__(self, *epochs: int) -> None:
        super().__init__(steps_per_trial=20, max_trials=2, init_val=4)
        self.epochs = [*epochs]

    def on_fit_start(self, *args: Any) -> None:
        """Not here."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch in self.epochs:
            self.epochs.remove(trainer.current_epoch)  # it sets the loop back: this epoch comes again
            with module.trial():
                self.scale_batch_size(trainer, module)


class Trial(pl.Callback):
    """Steps that are taken back, at the end of a batch of which callbacks that come later have not heard yet."""

    def __init__(self, step: int, path: Path, *, restore: Any = None) -> None:
        self.step, self.path = step, path
        self.restore = restore or (lambda trainer, path: trainer._checkpoint_connector.restore(path))

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step != self.step or module.tried:
            return
        trainer.save_checkpoint(self.path)
        with module.trial():
            for batch in batches(3, seed=5):
                trainer.optimizers[0].zero_grad()
                module.loss(batch).backward()
                trainer.optimizers[0].step()
        self.restore(trainer, self.path)


def fit(folder: Path, *callbacks: Any, model: Any = None, epochs: int = EPOCHS, **options: Any) -> Any:
    model = model or Rated()
    options = {"log_every_n_steps": 3, "max_epochs": epochs, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer(folder, *callbacks, **options).fit(model)
    return model


def same(record: RunRecord | None, other: RunRecord | None) -> None:
    assert record is not None
    assert other is not None
    found, wanted = (repeatable(r.columns) for r in (record, other))
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    np.testing.assert_array_equal(record.sketches, other.sketches)
    assert record.reasons == other.reasons
    assert record.run == other.run
    assert {name: np.asarray(value).tolist() for name, value in record.clouds.items()} == {
        name: np.asarray(value).tolist() for name, value in other.clouds.items()
    }


# --- trial steps of tuners


@pytest.fixture(scope="module")
def untried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, SpeedLimit]:
    """A training without any trials, and what was measured in it."""
    callback = quiet()
    return fit(tmp_path_factory.mktemp("plain"), callback), callback


@pytest.mark.mode("`LearningRateFinder`, `BatchSizeFinder` in the middle", "measured", "trial steps are none")
@pytest.mark.parametrize("callback_first", [True, False])
@pytest.mark.parametrize(
    "tuner",
    [
        lambda _: LearningRates(0),
        lambda _: LearningRates(2),
        lambda _: LearningRates(0, 1, 3),
        lambda folder: Trial(5, folder / "trial.ckpt"),
        lambda folder: Trial(8, folder / "trial.ckpt"),
    ],
    ids=["at the start", "in the middle", "three times", "within an epoch", "within its last batch"],
)
def test_trial_steps_are_none_of_the_runs(
    tmp_path: Path, untried: tuple[Any, SpeedLimit], tuner: Any, callback_first: bool
) -> None:
    (plain_model, plain_run), callback, finder = untried, quiet(), tuner(tmp_path)
    weights = plain_model.state_dict()
    model = fit(tmp_path, *([callback, finder] if callback_first else [finder, callback]))
    assert len(model.tried) >= 3
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    assert last_row(callback)["step"] == STEPS
    same(callback.record, plain_run.record)


@pytest.mark.parametrize(
    "settings",
    [
        {"probe_batches": 2, "clouds": "neurons"},
        {"probe_batches": 12},  # complete after the trials
        {"measure_every_n_steps": 3, "per_layer": True, "clock": "lr"},
        {"coordinates": 500},
    ],
    ids=str,
)
def test_whatever_is_measured_is_taken_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    width = 300 if "coordinates" in settings else 5
    plain_run, callback = quiet(**settings), quiet(**settings)
    fit(tmp_path / "plain", plain_run, model=Rated(width=width))
    fit(tmp_path, callback, LearningRates(1), model=Rated(width=width))
    same(callback.record, plain_run.record)
    assert math.isfinite(last_row(callback)["loss_drop"])  # no probe was given up


def test_trial_steps_with_accumulated_gradients(tmp_path: Path) -> None:
    plain_run, callback = quiet(), quiet()
    fit(tmp_path / "plain", plain_run, accumulate_grad_batches=3)
    fit(tmp_path, callback, LearningRates(1), accumulate_grad_batches=3)
    same(callback.record, plain_run.record)


def test_trial_steps_of_the_batch_size_finder_are_none_of_the_runs(tmp_path: Path) -> None:
    callback = quiet()
    model = fit(tmp_path, callback, BatchSizes(2))
    assert len(model.tried) >= 2
    assert last_row(callback)["step"] == len(model.steps) > 2 * PER_EPOCH
    total = torch.stack([s.update for s in model.steps]).sum(0)
    assert last_row(callback)["displacement"] == pytest.approx(float(total.norm()), rel=EXACT)
    assert last_row(callback)["moved_outside"] == 0.0


# --- checkpoints that are restored in the middle


class Recover(pl.Callback):
    """Goes back to an earlier checkpoint once, as after a spike of the loss."""

    def __init__(self, at: int, path: Path) -> None:
        self.at, self.path, self.done = at, path, False

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == self.at and not self.done:
            self.done = True
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer._checkpoint_connector.restore(self.path)
            trainer.fit_loop.restarting = trainer.fit_loop.epoch_loop.restarting = False


@pytest.mark.parametrize("settings", [{}, {"clouds": "neurons", "probe_batches": 2}], ids=str)
def test_an_earlier_checkpoint_is_gone_back_to(tmp_path: Path, settings: dict[str, Any]) -> None:
    """16 steps, back to the 8th: its sums, rows and losses, and those of what follows."""
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=PER_EPOCH, save_top_k=-1)
    callback = quiet(**settings)
    recover = Recover(2 * PER_EPOCH, tmp_path / f"step={PER_EPOCH}.ckpt")
    model = fit(tmp_path, callback, recover, keep, enable_checkpointing=True, log_every_n_steps=1)
    steps = model.tape.steps
    steps, losses = steps[:PER_EPOCH] + steps[2 * PER_EPOCH :], model.tape.losses
    assert callback.record is not None
    columns = callback.record.columns
    assert columns["step"].tolist() == list(range(1, len(steps) + 1))
    wanted = torch.stack([s.update for s in steps]).cumsum(0).norm(dim=1)
    assert columns["displacement"].tolist() == pytest.approx(wanted.tolist(), rel=EXACT)
    path = torch.stack([s.update.norm() for s in steps]).cumsum(0)
    assert columns["path_length"].tolist() == pytest.approx(path.tolist(), rel=EXACT)
    assert columns["moved_outside"].tolist() == [0.0] * len(steps)
    assert (np.diff(columns["seconds"]) >= 0).all()
    if not settings:
        last = losses[-2:]
        assert columns["loss_drop"][-1] == pytest.approx(losses[0] - (2 * last[1] - last[0]), rel=EXACT)
    saved = RunRecord.load(tmp_path / "speed_limit")
    assert saved.columns["step"].tolist() == columns["step"].tolist()


def test_the_callbacks_state_alone_is_loaded(tmp_path: Path) -> None:
    """By hand, before the weights: their order does not matter."""

    def restore(trainer: Any, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        callback.load_state_dict(saved["callbacks"]["SpeedLimit"])
        trainer.lightning_module.load_state_dict(saved["state_dict"])
        trainer.optimizers[0].load_state_dict(saved["optimizer_states"][0])

    plain_run, callback = quiet(), quiet()
    fit(tmp_path / "plain", plain_run)
    model = fit(tmp_path, callback, Trial(13, tmp_path / "trial.ckpt", restore=restore))
    assert len(model.tried) == 3
    same(callback.record, plain_run.record)


def test_the_state_of_another_run_is_gone_on_with(tmp_path: Path) -> None:
    """Its record, its θ_0 and its neurons, as when it is resumed."""

    def restore(trainer: Any, path: Path) -> None:
        trainer._checkpoint_connector.restore(other)

    other = tmp_path / "other" / "step=5.ckpt"
    keep = ModelCheckpoint(other.parent, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    model = Rated()
    with torch.no_grad():
        model.first.weight += 1.0
    first = fit(other.parent, quiet(clouds="neurons"), keep, model=model, enable_checkpointing=True)
    callback = quiet(clouds="neurons")
    second = fit(tmp_path, callback, Trial(PER_EPOCH, tmp_path / "trial.ckpt", restore=restore), epochs=2)
    steps = [*first.tape.steps[:5], *second.tape.steps[PER_EPOCH + 3 :]]
    assert last_row(callback)["step"] == len(steps)
    total = torch.stack([s.update for s in steps]).sum(0)
    assert last_row(callback)["displacement"] == pytest.approx(float(total.norm()), rel=EXACT)
    assert callback.record is not None
    assert callback.record.clouds["displacement"][-1].sum() > 0
    assert last_row(callback)["wasserstein2"] <= last_row(callback)["displacement"] * (1 + EXACT)


@pytest.mark.parametrize("damage", ["left out", "unusable"])
def test_where_nothing_tells_of_the_steps_before_it_measures_anew_and_says_so(tmp_path: Path, damage: str) -> None:
    def restore(trainer: Any, path: Path) -> None:
        saved = torch.load(path, weights_only=False)
        if damage == "left out":
            del saved["callbacks"]["SpeedLimit"]
        else:
            saved["callbacks"]["SpeedLimit"]["meter"] = {}
        torch.save(saved, path)
        trainer._checkpoint_connector.restore(path)

    callback, trial = quiet(probe_batches=2), Trial(6, tmp_path / "trial.ckpt", restore=restore)
    with pytest.warns(UserWarning, match=r"anew (from|at) step 6"):
        model = fit_loudly(tmp_path, callback, trial)
    steps = model.steps[6:]
    assert callback.record is not None
    assert callback.record.run["since_step"] == 6
    assert last_row(callback)["step"] == len(steps) == STEPS - 6
    total = torch.stack([s.update for s in steps]).sum(0)
    assert last_row(callback)["displacement"] == pytest.approx(float(total.norm()), rel=EXACT)
    ends = []
    for weights in (steps[0].before, steps[-1].after):
        torch.nn.utils.vector_to_parameters(weights, model.parameters())
        ends.append(sum(float(model.loss(batch)) for batch in batches(PER_EPOCH)[6:]) / 2)
    assert last_row(callback)["loss_drop"] == pytest.approx(ends[0] - ends[1], rel=EXACT)


def test_what_could_not_be_measured_from_the_start_is_not_from_a_checkpoint_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said that nothing is measured."""
    monkeypatch.setattr(measuring, "Measurement", Mock(side_effect=MemoryError))
    callback = quiet()
    with pytest.warns(UserWarning, match="SpeedLimit measures nothing: MemoryError"):
        fit_loudly(tmp_path, callback, Able(monkeypatch), Trial(6, tmp_path / "trial.ckpt"))
    assert callback.record is None
    fit(tmp_path, callback)
    assert last_row(callback)["step"] == STEPS


class Able(pl.Callback):
    """From the fourth batch on, what failed would work again."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.patched = patched

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.patched.undo()


def fit_loudly(folder: Path, *callbacks: Any) -> Any:
    model = Rated()
    trainer(folder, *callbacks, max_epochs=EPOCHS, log_every_n_steps=3).fit(model)
    return model


def test_a_checkpoint_of_no_step_resumes_as_a_new_run(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "start.ckpt")

    whole, resumed = quiet(), quiet()
    fit(tmp_path / "whole", whole, Save())
    model = Rated()
    trainer(tmp_path, resumed, max_epochs=EPOCHS, log_every_n_steps=3).fit(model, ckpt_path=tmp_path / "start.ckpt")
    same(resumed.record, whole.record)
