"""ModelCheckpoint and EarlyStopping on a `speed_limit/…` key: they act on the numbers of the tape, and none stops
a training for a number that has not been measured yet.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_cases import Regressor, Resumable, Tape, batches, flat, loader, of, quiet, sgd, trainer
from packaging.version import Version
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from test_callback_input import Bared

LOGS = 1e-6  # Lightning logs in float32

GRADIENT = "speed_limit/grad_norm"  # goes up and down, so that the best is neither the first nor the last


class Validated(Regressor):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def gradient_norms(tape: Tape) -> dict[int, float]:
    """Step (from 1 on) → ‖g‖ of the raw gradient."""
    return {k: float(step.raw.norm()) for k, step in enumerate(tape.steps, start=1)}


def best_of(values: dict[int, float], steps: list[int], mode: str) -> int:
    return (min if mode == "min" else max)(steps, key=values.__getitem__)


def weights(path: str, model: Regressor) -> torch.Tensor:
    """The parameters in a checkpoint, in the order of the optimizer."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return flat([state[name] for name, _ in model.named_parameters()])


# --- ModelCheckpoint


@pytest.mark.mode("ModelCheckpoint on a `speed_limit/…` key, every n steps", "measured")
@pytest.mark.parametrize("mode", ["min", "max"])
def test_checkpoints_of_the_best_step(tmp_path: Path, mode: str) -> None:
    keep = ModelCheckpoint(tmp_path, monitor=GRADIENT, mode=mode, every_n_train_steps=2, filename="{step}")
    model = Regressor()
    trainer(tmp_path, keep, quiet(), enable_checkpointing=True).fit(model, loader(batches(14, seed=5)))
    norms = gradient_norms(model.tape)
    best = best_of(norms, list(range(2, 15, 2)), mode)
    assert best not in (2, 14)
    assert float(keep.best_model_score) == pytest.approx(norms[best], rel=LOGS)  # type: ignore[arg-type]
    assert torch.equal(weights(keep.best_model_path, model), model.tape.steps[best - 1].after)


@pytest.mark.mode(
    "ModelCheckpoint on a `speed_limit/…` key between two log steps",
    "caveat",
    "it finds the value of the last log step, NaN before the first: let every_n_train_steps be a multiple of "
    "log_every_n_steps",
)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_between_log_steps_a_checkpoint_goes_by_the_last_one(tmp_path: Path, mode: str) -> None:
    """NaN, before the first, is the worst; a value that is not better than itself is saved once."""
    keep = ModelCheckpoint(tmp_path, monitor=GRADIENT, mode=mode, every_n_train_steps=2, filename="{step}")
    model = Regressor()
    run = trainer(tmp_path, keep, quiet(), enable_checkpointing=True, log_every_n_steps=4)
    run.fit(model, loader(batches(11)))
    norms = gradient_norms(model.tape)
    best = best_of(norms, [4, 8], mode)
    assert float(keep.best_model_score) == pytest.approx(norms[best], rel=LOGS)  # type: ignore[arg-type]
    assert keep.best_model_path.endswith(f"step={best}.ckpt")


@pytest.mark.mode("ModelCheckpoint on a `speed_limit/…` key, at the ends of epochs", "measured")
@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_checkpoints_of_the_best_epoch(tmp_path: Path, mode: str, validated: bool) -> None:
    """Their last step, though it is no log step; with a validation the checkpoint is saved at its end."""
    keep = ModelCheckpoint(tmp_path, monitor=GRADIENT, mode=mode, filename="{step}", save_top_k=1)
    model = Validated()
    run = trainer(tmp_path, keep, quiet(), enable_checkpointing=True, log_every_n_steps=50, max_epochs=5)
    run.fit(model, Resumable(batches(6)), loader(batches(1)) if validated else None)
    norms = gradient_norms(model.tape)
    best = best_of(norms, [6, 12, 18, 24, 30], mode)
    assert float(keep.best_model_score) == pytest.approx(norms[best], rel=LOGS)  # type: ignore[arg-type]
    assert torch.equal(weights(keep.best_model_path, model), model.tape.steps[best - 1].after)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_layers_number_can_be_monitored(tmp_path: Path, mode: str) -> None:
    keep = ModelCheckpoint(
        tmp_path, monitor="speed_limit/layers/first/displacement", mode=mode, every_n_train_steps=1, filename="{step}"
    )
    model = Regressor()
    run = trainer(tmp_path, keep, quiet(per_layer=True), enable_checkpointing=True, log_every_n_steps=3)
    run.fit(model, loader(batches(9)))
    cut = sum(p.numel() for p in model.first.parameters())
    moved = {k: float((s.after - model.tape.steps[0].before)[:cut].norm()) for k, s in enumerate(model.tape.steps, 1)}
    best = best_of(moved, [3, 6, 9], mode)
    assert float(keep.best_model_score) == pytest.approx(moved[best], rel=LOGS)  # type: ignore[arg-type]


# --- EarlyStopping


def stops_after(values: list[float], mode: str, patience: int) -> int:
    """How many looks it takes until `patience` of them in a row brought nothing better."""
    best, waited = math.inf if mode == "min" else -math.inf, 0
    for look, value in enumerate(values, start=1):
        if value < best if mode == "min" else value > best:
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience:
            return look
    return len(values)


@pytest.mark.mode("EarlyStopping on a `speed_limit/…` key, in validations within an epoch", "measured")
@pytest.mark.parametrize("mode", ["min", "max"])
def test_early_stopping_within_an_epoch(tmp_path: Path, mode: str) -> None:
    """Every look finds the step just before it, although none of them is a log step."""
    whole = Validated()
    trainer(tmp_path, max_epochs=1).fit(whole, loader(batches(30)))
    norms = gradient_norms(whole.tape)
    wanted = 3 * stops_after([norms[k] for k in range(3, 31, 3)], mode, patience=2)
    assert 6 < wanted < 30

    stop = EarlyStopping(GRADIENT, mode=mode, patience=2)
    model = Validated()
    run = trainer(tmp_path, stop, quiet(), val_check_interval=3, log_every_n_steps=50, num_sanity_val_steps=0)
    run.fit(model, loader(batches(30)), loader(batches(1)))
    assert len(model.tape.steps) == wanted
    best = best_of(norms, list(range(3, wanted + 1, 3)), mode)
    assert float(stop.best_score) == pytest.approx(norms[best], rel=LOGS)


@pytest.mark.mode("EarlyStopping on a `speed_limit/…` key, at the ends of epochs", "measured")
@pytest.mark.parametrize("mode", ["min", "max"])
def test_early_stopping_at_the_ends_of_epochs(tmp_path: Path, mode: str) -> None:
    whole = Regressor()
    trainer(tmp_path, max_epochs=9).fit(whole, Resumable(batches(5, seed=5)))
    norms = gradient_norms(whole.tape)
    wanted = 5 * stops_after([norms[k] for k in range(5, 46, 5)], mode, patience=2)
    assert 10 < wanted < 45

    model, stop = Regressor(), EarlyStopping(GRADIENT, mode=mode, patience=2)
    run = trainer(tmp_path, stop, quiet(), max_epochs=9, log_every_n_steps=50)
    run.fit(model, Resumable(batches(5, seed=5)))
    assert len(model.tape.steps) == wanted


@pytest.mark.mode(
    "EarlyStopping with `check_finite=True` (its default) on a `speed_limit/…` key",
    "caveat",
    "stops at the first NaN; `efficiency` is NaN while the loss drop is lost in its noise: `check_finite=False`",
)
@pytest.mark.parametrize("check_finite", [True, False])
def test_early_stopping_on_a_number_that_is_undefined(tmp_path: Path, check_finite: bool) -> None:
    """With a learning rate of 0 the loss does not drop: the efficiency is NaN."""
    stop = EarlyStopping("speed_limit/efficiency", mode="max", patience=99, check_finite=check_finite)
    keep = ModelCheckpoint(tmp_path, monitor="speed_limit/efficiency", mode="max")
    run = trainer(tmp_path, stop, keep, quiet(), max_epochs=3, enable_checkpointing=True)
    run.fit(Regressor(sgd(lr=0.0)), loader(batches(4)))
    assert math.isnan(float(run.callback_metrics["speed_limit/efficiency"]))
    assert run.current_epoch == (1 if check_finite else 3)
    assert Path(keep.best_model_path).is_file()  # the checkpoint takes NaN for the worst, and is written


def test_a_look_before_the_first_log_step_stops_nothing(tmp_path: Path) -> None:
    stop = EarlyStopping("speed_limit/displacement", mode="max", patience=99)  # check_finite=True, by default
    model = Validated()
    run = trainer(tmp_path, stop, quiet(), val_check_interval=2, log_every_n_steps=50, num_sanity_val_steps=0)
    run.fit(model, loader(batches(9)), loader(batches(1)))
    steps = model.tape.steps
    assert len(steps) == 9
    moved = [float((s.after - steps[0].before).norm()) for s in steps]
    assert float(stop.best_score) == pytest.approx(max(moved[1::2]), rel=LOGS)  # at steps 2, 4, 6, 8


def test_looks_within_an_accumulation_window(tmp_path: Path) -> None:
    """Before the first step there is nothing but NaN, and no error; later each finds the step that was last."""
    stop = EarlyStopping("speed_limit/path_length", mode="max", patience=99, check_finite=False)
    part = EarlyStopping("speed_limit/layers/second/path_length", mode="max", patience=99, check_finite=False)
    model = Validated()
    run = trainer(
        tmp_path,
        stop,
        part,
        quiet(per_layer=True),
        accumulate_grad_batches=4,
        val_check_interval=3,
        log_every_n_steps=50,
        num_sanity_val_steps=0,
    )
    run.fit(model, loader(batches(11)), loader(batches(1)))
    assert model.tape.batch == 10
    path = math.fsum(float(s.update.norm()) for s in model.tape.steps[:2])  # of the look after batch 9, step 2
    assert float(stop.best_score) == pytest.approx(path, rel=LOGS)
    cut = sum(p.numel() for p in model.first.parameters())
    path = math.fsum(float(s.update[cut:].norm()) for s in model.tape.steps[:2])
    assert float(part.best_score) == pytest.approx(path, rel=LOGS)


def test_where_nothing_is_measured_monitors_find_nan(tmp_path: Path) -> None:
    """An optimizer without hooks: said at the start; no monitor ends the training for want of a key."""
    stop = EarlyStopping("speed_limit/displacement", patience=99, check_finite=False)
    keep = ModelCheckpoint(tmp_path, monitor="speed_limit/displacement")
    model = Bared()
    run = trainer(tmp_path, stop, keep, quiet(), max_epochs=3, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="can't measure Bare"):
        run.fit(model, loader(batches(4)))
    assert run.current_epoch == 3
    assert math.isnan(float(run.callback_metrics["speed_limit/displacement"]))


def test_a_resumed_run_stops_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    """A look within the epoch that was cut, before any log step of the resumed run."""
    if Version(pl.__version__) < Version("2.5.6"):
        pytest.skip("this Lightning validates at other steps after a resume within an epoch")

    def run(folder: Path, stop: EarlyStopping, ckpt: Any = None, **options: Any) -> Validated:
        model = Validated()
        keep = ModelCheckpoint(folder, every_n_train_steps=8, save_top_k=-1, filename="{step}")
        settings = {"val_check_interval": 3, "log_every_n_steps": 50, "num_sanity_val_steps": 0, **options}
        fit = trainer(folder, stop, keep, quiet(), enable_checkpointing=True, **settings)
        fit.fit(model, Resumable(batches(15)), loader(batches(1)), ckpt_path=ckpt)
        return model

    whole, resumed = (EarlyStopping(GRADIENT, mode="min", patience=3) for _ in range(2))
    model = run(tmp_path, whole, max_epochs=3)
    again = run(tmp_path, resumed, ckpt=tmp_path / "step=8.ckpt", max_epochs=3)
    assert 8 < len(model.tape.steps) < 45
    assert len(again.tape.steps) == len(model.tape.steps) - 8
    assert float(resumed.best_score) == float(whole.best_score)
    assert torch.equal(flat(of(again.tape._optimizers[0])), flat(of(model.tape._optimizers[0])))


class Look(pl.Callback):
    """What a callback that comes later finds after the first batch."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self.monitor = GRADIENT  # else nothing is announced

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if not self.found:
            self.found = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_a_resumed_run_announces_what_it_knows(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    model = Regressor()
    trainer(tmp_path, keep, quiet(), enable_checkpointing=True, log_every_n_steps=3).fit(model, Resumable(batches(8)))
    look = Look()
    run = trainer(tmp_path, look, quiet(), log_every_n_steps=50)
    run.fit(Regressor(), Resumable(batches(8)), ckpt_path=tmp_path / "step=4.ckpt")
    assert look.found[GRADIENT] == pytest.approx(gradient_norms(model.tape)[3], rel=LOGS)  # of log step 3


def test_a_key_in_the_name_of_a_checkpoint(tmp_path: Path) -> None:
    """Its slash begins a folder where Lightning inserts the key; without that it is a number in the name."""
    keep = ModelCheckpoint(
        tmp_path, filename="{step}-{speed_limit/path_length:.3f}", auto_insert_metric_name=False, every_n_train_steps=4
    )
    model = Regressor()
    trainer(tmp_path, keep, quiet(), enable_checkpointing=True).fit(model, loader(batches(4)))
    path = math.fsum(float(step.update.norm()) for step in model.tape.steps)
    assert [p.name for p in tmp_path.glob("*.ckpt")] == [f"4-{path:.3f}.ckpt"]
