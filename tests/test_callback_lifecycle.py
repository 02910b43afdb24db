"""Weights moved between steps, exceptions, early ends, loggers: what surrounds the steps."""

import copy
import math
import pickle
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_cases import EXACT, Batch, Regressor, batches, flat, last_row, loader, of, quiet, sgd, trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_speedlimit import RunRecord
from lightning_speedlimit.callback import LOGGED
from lightning_speedlimit.callback.layer_names import LayerNames
from lightning_speedlimit.report.closing import to_change

# --- weights moved outside of the step


class Clamp(pl.Callback):
    def __init__(self, first: int) -> None:
        self.first = first

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self.first:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.clamp_(-0.3, 0.3)


@pytest.mark.parametrize("clamp_first", [True, False])
@pytest.mark.mode("weights clamped after every step", "measured")
def test_clamping_from_the_start_is_taken_out(tmp_path: Path, clamp_first: bool) -> None:
    """D is then ‖Σ u_k‖, whichever callback comes first."""
    model, callback, clamp = Regressor(), quiet(), Clamp(0)
    order = [clamp, callback] if clamp_first else [callback, clamp]
    trainer(tmp_path, *order).fit(model, loader(batches(12)))
    steps = model.tape.steps
    sums = [float(torch.stack([s.update for s in steps[: k + 1]]).sum(0).norm()) for k in range(len(steps))]
    assert callback.record is not None
    assert callback.record.columns["displacement"].tolist() == pytest.approx(sums, rel=EXACT)
    assert abs(float((steps[-1].after - steps[0].before).norm()) / sums[-1] - 1) > 0.05  # clamping does matter


@pytest.mark.parametrize("clamp_first", [True, False])
@pytest.mark.mode(
    "weights moved outside of step, from whatever step on",
    "measured",
    "displacement is that of the steps alone; the moves' size is `moved_outside`, and a reason tells of them",
)
def test_clamping_that_starts_later_is_taken_out(tmp_path: Path, clamp_first: bool) -> None:
    model, callback, clamp = Regressor(), quiet(), Clamp(10)
    order = [clamp, callback] if clamp_first else [callback, clamp]
    trainer(tmp_path, *order).fit(model, loader(batches(14)))
    steps = model.tape.steps
    sums = [float(torch.stack([s.update for s in steps[: k + 1]]).sum(0).norm()) for k in range(len(steps))]
    moves = [float((b.before - a.after).norm()) for a, b in pairwise(steps)]  # the last one meets no step
    assert [move > 0 for move in moves] == [False] * 10 + [True] * 3
    assert callback.record is not None
    columns = callback.record.columns
    assert columns["displacement"].tolist() == pytest.approx(sums, rel=EXACT)
    size = [math.sqrt(math.fsum(move**2 for move in moves[:k])) for k in range(len(steps))]
    assert columns["moved_outside"].tolist() == pytest.approx(size, rel=EXACT)
    assert "moved outside" in callback.record.reasons["displacement"]
    path = math.fsum(float(s.update.norm()) for s in steps)
    assert last_row(callback)["path_length"] == pytest.approx(path, rel=EXACT)


@pytest.mark.parametrize("when", ["on_train_batch_end", "on_train_epoch_start", "on_validation_end"])
def test_the_summary_tells_both_displacements_where_the_best_weights_are_loaded(tmp_path: Path, when: str) -> None:
    class Reload(pl.Callback):
        def load(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                self.best = {name: value.clone() for name, value in module.state_dict().items()}
            elif trainer.global_step == 8:
                module.load_state_dict(self.best)

    class Keep(Reload):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 2 or when == "on_train_batch_end":
                self.load(trainer, module)

    if when != "on_train_batch_end":
        setattr(Keep, when, Reload.load)
    model, callback = Validated(), quiet()
    run = trainer(tmp_path, callback, Keep(), max_epochs=2, num_sanity_val_steps=0)
    run.fit(model, loader(batches(8)), loader(batches(1, seed=2)))
    steps = model.tape.steps
    assert len(steps) == 16
    net = float((steps[-1].after - steps[0].before).norm())
    own = float(torch.stack([s.update for s in steps]).sum(0).norm())
    assert last_row(callback)["net_displacement"] == pytest.approx(net, rel=EXACT)
    assert abs(own / net - 1) > 0.1
    assert callback.record is not None
    text = " ".join(str(callback.record.summary()).split())
    assert f"the displacement, {own:.3g}, is of the steps alone; from the first weights to the last {net:.3g}" in text
    assert f"with moves outside {net:.3g}" in text
    assert "with moves outside" not in str(quiet_record(tmp_path).summary())


def quiet_record(folder: Path) -> RunRecord:
    callback = quiet()
    trainer(folder, callback).fit(Regressor(), loader(batches(3)))
    assert callback.record is not None
    return callback.record


class Swap(pl.Callback):
    """Averaged weights during validation, and the trained ones back."""

    def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
        self.kept = [p.detach().clone() for p in module.parameters()]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), self.kept, strict=True):
                parameter.copy_(value)


class Shrink(pl.Callback):
    """A validation that moves weights for good."""

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.9)


class Validated(Regressor):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


@pytest.mark.parametrize("callback_first", [True, False])
@pytest.mark.parametrize("mover", [Swap, Shrink])
@pytest.mark.mode("weights swapped or moved in validations", "measured")
def test_weights_moved_in_validation(tmp_path: Path, mover: type[pl.Callback], callback_first: bool) -> None:
    model, callback, other = Validated(), quiet(), mover()
    order = [callback, other] if callback_first else [other, callback]
    run = trainer(tmp_path, *order, val_check_interval=5, max_epochs=2, num_sanity_val_steps=0)
    run.fit(model, loader(batches(10)), loader(batches(1, seed=2)))
    total = torch.stack([s.update for s in model.tape.steps]).sum(0)
    assert last_row(callback)["displacement"] == pytest.approx(float(total.norm()), rel=EXACT)
    if mover is Swap:
        steps = model.tape.steps
        assert last_row(callback)["displacement"] == pytest.approx(float((steps[-1].after - steps[0].before).norm()))


class Averaged(Validated):
    """Puts the mean of its weights in their place for the validation, through the module's own hooks."""

    def on_fit_start(self) -> None:  # there is a validation before the training, too
        self.mean = [p.detach().clone() for p in self.parameters()]

    def on_train_batch_end(self, *args: Any) -> None:
        for mean, parameter in zip(self.mean, self.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 0.1)

    def swap(self) -> None:
        for i, parameter in enumerate(self.parameters()):
            self.mean[i], parameter.data = parameter.data, self.mean[i]

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.swap()

    def on_validation_model_train(self) -> None:
        self.swap()
        super().on_validation_model_train()


@pytest.mark.parametrize("settings", [{}, {"probe_batches": 2}, {"clouds": "neurons"}], ids=str)
@pytest.mark.parametrize("interval", [3, 10])  # within epochs, or at their ends
@pytest.mark.mode("averaged weights in on_validation_model_eval, and back", "measured")
def test_weights_swapped_as_the_module_turns_to_validation(
    tmp_path: Path, interval: int, settings: dict[str, Any]
) -> None:
    model, callback = Averaged(), quiet(**settings)
    run = trainer(tmp_path, callback, val_check_interval=interval, max_epochs=2)
    run.fit(model, loader(batches(10)), loader(batches(1, seed=2)))
    steps = model.tape.steps
    assert callback.record is not None
    wanted = [float((s.after - steps[0].before).norm()) for s in steps]
    assert callback.record.columns["displacement"].tolist() == pytest.approx(wanted, rel=EXACT)
    assert callback.record.columns["moved_outside"].tolist() == [0.0] * 20
    assert "displacement" not in callback.record.reasons


AVERAGING = {
    "mean": lambda: pl.callbacks.WeightAveraging(),
    "exponential": lambda: pl.callbacks.EMAWeightAveraging(),
    "stochastic": lambda: pl.callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2),
}


@pytest.mark.parametrize("callback_first", [True, False])
@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.mode("WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging", "measured")
def test_lightnings_averaging_callbacks(tmp_path: Path, name: str, callback_first: bool) -> None:
    """They swap weights in validation and at the end of the fit: D is of the weights that were trained."""
    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no weight averaging but the stochastic one")
    model, callback = Validated(), quiet()
    order = [callback, AVERAGING[name]()] if callback_first else [AVERAGING[name](), callback]
    run = trainer(tmp_path, *order, max_epochs=4, num_sanity_val_steps=0)
    run.fit(model, loader(batches(8)), loader(batches(1)))
    steps = model.tape.steps
    assert last_row(callback)["step"] == len(steps) == 32
    moved = float((steps[-1].after - steps[0].before).norm())
    assert last_row(callback)["displacement"] == pytest.approx(moved, rel=EXACT)


def test_a_swap_that_began_before_is_not_taken_for_the_training(tmp_path: Path) -> None:
    """Swapped in on_validation_start by a callback that comes first."""

    class Sooner(Swap):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            super().on_validation_epoch_start(trainer, module)

        def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
            pass

    model, callback = Validated(), quiet()
    run = trainer(tmp_path, Sooner(), callback, val_check_interval=5, num_sanity_val_steps=0)
    run.fit(model, loader(batches(10)), loader(batches(1, seed=2)))
    assert callback.record is not None
    total = torch.stack([s.update for s in model.tape.steps]).sum(0)
    assert last_row(callback)["displacement"] == pytest.approx(float(total.norm()), rel=EXACT)
    assert last_row(callback)["moved_outside"] == 0.0


# --- exceptions and early ends


class Failing(Regressor):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if batch_idx == 7:
            raise RuntimeError("out of cheese")
        return super().training_step(batch, batch_idx)


def hooks(optimizer: Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


@pytest.mark.parametrize("kind", [Regressor, Failing])
def test_no_hook_stays_on_the_optimizer(tmp_path: Path, kind: type[Regressor]) -> None:
    made: list[Optimizer] = []
    counts = []

    class Count(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            counts.append(hooks(made[0]))

    def make(parameters: Any) -> Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.1))
        return made[0]

    run = trainer(tmp_path, quiet(), Count())
    try:
        run.fit(kind(make), loader(batches(8)))
    except RuntimeError:
        assert kind is Failing
    assert counts[0] == 4  # the tape's two and the meter's two
    assert hooks(made[0]) == 2


def test_teardown_alone_removes_the_hooks(tmp_path: Path) -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            optimizer = trainer.optimizers[0]
            before = hooks(optimizer)
            callback.teardown(trainer, module, "fit")
            callback.teardown(trainer, module, "fit")
            assert hooks(optimizer) == before - 2
            trainer.should_stop = True

    callback = quiet()
    trainer(tmp_path, callback, Interrupt()).fit(Regressor(), loader(batches(3)))


def test_the_last_step_is_recorded_though_it_is_no_log_step(tmp_path: Path) -> None:
    callback = quiet()
    trainer(tmp_path, callback, max_steps=5, log_every_n_steps=50).fit(Regressor(), loader(batches(10)))
    assert callback.record is not None
    assert callback.record.columns["step"].tolist() == [5]
    assert RunRecord.load(tmp_path / "speed_limit").columns["step"].tolist() == [5]


def test_monitors_find_the_logged_numbers(tmp_path: Path) -> None:
    """Neither early stopping nor checkpoints fail before the first log step, and both act on the value."""
    stop = EarlyStopping("speed_limit/displacement", mode="min", patience=1)  # it grows: stops after two epochs
    best = ModelCheckpoint(tmp_path, monitor="speed_limit/efficiency", mode="max", filename="best", save_top_k=1)
    keep = ModelCheckpoint(
        tmp_path, monitor="speed_limit/path_length", mode="max", every_n_train_steps=2, filename="{step}"
    )
    model, callback = Regressor(), quiet()
    run = trainer(tmp_path, stop, best, keep, callback, enable_checkpointing=True, max_epochs=9, log_every_n_steps=4)
    run.fit(model, loader(batches(1) * 6))
    assert run.current_epoch == 2
    assert callback.record is not None
    efficiency = dict(zip(callback.record.columns["step"], callback.record.columns["efficiency"], strict=True))
    assert best.best_model_score is not None
    assert float(best.best_model_score) == pytest.approx(max(efficiency[6], efficiency[12]), rel=1e-6)  # float32 logs
    assert keep.best_model_score is not None
    longest = callback.record.columns["path_length"][-1]  # step 12 is one of its steps, and the path only grows
    assert float(keep.best_model_score) == pytest.approx(longest, rel=1e-6)


# --- where it logs and writes


def test_exactly_the_totals_are_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path, quiet())
    run.fit(Regressor(), loader(batches(3)))
    assert set(run.callback_metrics) == {f"speed_limit/{name}" for name in LOGGED}
    assert len(LOGGED) == 22
    assert not run.progress_bar_metrics


def test_the_progress_bar_shows_noise_and_critical_batch(tmp_path: Path) -> None:
    run = trainer(tmp_path, quiet(prog_bar=True))
    run.fit(Regressor(), loader(batches(3)))
    assert set(run.progress_bar_metrics) == {"speed_limit/noise_share", "speed_limit/critical_batch_size"}


def test_layers_are_logged_on_request(tmp_path: Path) -> None:
    model, callback = Regressor(), quiet(per_layer=True)
    run = trainer(tmp_path, callback)
    run.fit(model, loader(batches(6)))
    steps, cut = model.tape.steps, sum(p.numel() for p in model.first.parameters())
    for layer, part in (("first", slice(0, cut)), ("second", slice(cut, None))):
        logged = {n.rpartition("/")[2]: float(v) for n, v in run.callback_metrics.items() if f"layers/{layer}/" in n}
        displacement = float((steps[-1].after - steps[0].before)[part].norm())
        work = -math.fsum(float(s.raw[part] @ s.update[part]) for s in steps)
        path = math.fsum(float(s.update[part].norm()) for s in steps)
        assert logged["displacement"] == pytest.approx(displacement, rel=1e-6)  # float32 logs
        assert logged["path_length"] == pytest.approx(path, rel=1e-6)
        assert logged["work_ito"] == pytest.approx(work, rel=1e-6)


class Wrapping(Regressor):
    """Has a parameter of its own beside a layer that is called as the model itself is in the logs."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part.double())
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        outer = [part(x) for name, part in self.named_children() if name.startswith("model")]
        return super().forward(x) * self.scale + sum(outer)


@pytest.mark.parametrize(
    ("parts", "own"),
    [((), "model"), (("model",), "model_itself"), (("model", "model_itself"), "model_itself_itself")],
)
def test_no_two_layers_are_logged_under_one_name(tmp_path: Path, parts: tuple[str, ...], own: str) -> None:
    model, callback = Wrapping(**{name: nn.Linear(4, 1) for name in parts}), quiet(per_layer=True)
    keep = ModelCheckpoint(tmp_path, monitor=f"speed_limit/layers/{own}/displacement", every_n_train_steps=1)
    begun = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = trainer(tmp_path, keep, callback, enable_checkpointing=True)
    run.fit(model, loader(batches(4)))
    assert keep.best_model_score is not None
    moved = {name: float((p.detach() - begun[name]).square().sum()) for name, p in model.named_parameters()}
    for layer in (*parts, ""):
        wanted = math.sqrt(sum(square for name, square in moved.items() if name.rpartition(".")[0] == layer))
        found = run.callback_metrics[f"speed_limit/layers/{layer or own}/displacement"]
        assert float(found) == pytest.approx(wanted, rel=1e-6)  # float32 logs


def test_layers_are_in_the_record_without_a_request(tmp_path: Path) -> None:
    """And are logged to none: see the totals above."""
    model, callback = Regressor(), quiet()
    trainer(tmp_path, callback).fit(model, loader(batches(6)))
    assert callback.record is not None
    found, steps = callback.record.layers, model.tape.steps
    assert (found["step"], found["layers"]) == (6, ["first", "second"])
    cut = sum(p.numel() for p in model.first.parameters())
    for i, part in enumerate((slice(0, cut), slice(cut, None))):
        squared = float((steps[-1].after - steps[0].before)[part].norm()) ** 2
        path = math.fsum(float(s.update[part].norm()) for s in steps)
        assert found["parameters"][i] == len(steps[0].before[part])
        assert found["straightness"][i] == pytest.approx(squared / path**2, rel=1e-6)  # float32 updates
        action = math.fsum(float(s.update[part].norm()) ** 2 for s in steps)
        assert found["action"][i] == pytest.approx(action, rel=1e-6)
    assert found["action"].sum() == pytest.approx(callback.record.columns["action"][-1], rel=1e-12)


class Deep(nn.Module):
    """So many blocks of two layers each, and a weight of its own."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        block = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)) for _ in range(blocks)]
        self.blocks = nn.ModuleList(block)


@pytest.mark.parametrize(("blocks", "every", "count", "first"), [
    (3, False, 7, "blocks.0.0"),
    (60, False, 61, "blocks.0"),
    (60, True, 121, "blocks.0.0"),
    (120, False, 2, "blocks"),
])  # fmt: skip
def test_of_very_many_layers_the_blocks_are_kept(blocks: int, every: bool, count: int, first: str) -> None:
    """At the depth at which there are 100 at most; all where they are to be logged."""
    model = Deep(blocks)
    names = LayerNames.of(model, every=every)
    layers = list(dict.fromkeys(map(names, model.parameters())))
    assert (len(layers), layers[:2]) == (count, ["", first])
    model.blocks[0].requires_grad_(False)
    told = names.measured({"": {"action": 1.0, "steadiness": 0.5}, first: {"action": 2.0}})
    assert told[""] == {"parameters": 2.0, "action": 1.0}
    assert told[first]["parameters"] == (0 if first != "blocks" else 10 * (blocks - 1))


@pytest.mark.mode("`fast_dev_run`", "caveat", "no file is written: `callback.record` has it")
def test_fast_dev_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = quiet()
    trainer(tmp_path, callback, fast_dev_run=3).fit(Regressor(), loader(batches(5)))
    assert last_row(callback)["step"] == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.mode("`barebones=True`", "caveat", "nothing is logged, printed or saved: `callback.record` has it")
def test_barebones_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, recwarn: Any) -> None:
    monkeypatch.chdir(tmp_path)
    callback = quiet(print_summary=True)
    run = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[callback])
    capsys.readouterr()
    run.fit(Regressor(), loader(batches(5)))
    assert capsys.readouterr().out == ""
    assert not [w for w in recwarn if "peed" in str(w.message) or "self.log" in str(w.message)]
    assert not list(tmp_path.iterdir())
    assert last_row(callback)["step"] == 5  # a record all the same


def test_the_summary_is_printed_with_the_folder(tmp_path: Path, capsys: Any) -> None:
    trainer(tmp_path, quiet(print_summary=True)).fit(Regressor(), loader(batches(5)))
    out = capsys.readouterr().out
    folder = tmp_path / "speed_limit"
    assert out.endswith(f"\nRecord: {folder}\nMore: speedlimit advise {shlex.quote(str(folder))}\n")
    assert "efficiency" in out


def test_the_output_of_a_fit_ends_with_what_to_change(tmp_path: Path, capsys: Any) -> None:
    """As `advise` has it: the rate is so high that the loss runs away."""
    callback = quiet(print_summary=True)
    trainer(tmp_path, callback).fit(Regressor(sgd(lr=8.0)), loader(batches(10)))
    assert callback.record is not None
    change = to_change(callback.record)
    assert "a quarter of the learning rate" in change
    assert f"What to change: {change} Record: " in " ".join(capsys.readouterr().out.split())


# --- sharing


@pytest.mark.mode("a callback that was copied or pickled before the fit", "measured")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_it_can_be_copied_before_a_fit(tmp_path: Path, copied: Any) -> None:
    callback = copied(quiet(clock="lr", probe_batches=1))
    model = Regressor()
    trainer(tmp_path, callback).fit(model, loader(batches(4)))
    assert last_row(callback)["elapsed"] == pytest.approx(0.05 * 4, rel=EXACT)


def test_the_module_can_be_copied_during_a_fit(tmp_path: Path) -> None:
    """Weight averaging deep-copies the module; nothing may hang on it."""

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.copy = copy.deepcopy(torch.nn.ModuleList([module.first, module.second]))

    model, other = Regressor(), Copy()
    trainer(tmp_path, quiet(), other).fit(model, loader(batches(3)))
    assert torch.equal(flat(list(other.copy.parameters())), flat(of(model.tape._optimizers[0])))


def test_the_command_line_takes_a_class_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    from pytorch_lightning.cli import LightningCLI
    from pytorch_lightning.demos.boring_classes import BoringDataModule, BoringModel

    monkeypatch.chdir(tmp_path)
    arguments = [
        "fit",
        "--trainer.callbacks=lightning_speedlimit.SpeedLimit",
        "--trainer.callbacks.clock=lr",
        "--trainer.callbacks.print_summary=false",
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.limit_val_batches=0",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
    ]
    cli = LightningCLI(BoringModel, BoringDataModule, args=arguments, save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "SpeedLimit"]
    assert callback.clock == "lr"
    assert last_row(callback)["step"] == 2
