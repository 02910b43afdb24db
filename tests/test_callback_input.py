"""Bad input raises early, with the cure; in a training, what cannot be measured is said once."""

import errno
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callback_cases import EXACT, Batch, ByHand, Regressor, batches, last_row, loader, plain, quiet, sgd, trainer
from torch import Tensor

from lightning_speedlimit import SpeedLimit

# --- at construction

FLAGS = ("per_layer", "prog_bar", "log_figures", "print_summary")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clock": "seconds"}, "clock got 'seconds', wanted one of 'steps', 'lr'"),
        ({"entropy_production": "loss"}, "entropy_production got 'loss', wanted one of 'loss_drop'"),
        ({"coordinates": 0}, "coordinates got 0"),
        ({"coordinates": "some"}, "coordinates got 'some'"),
        ({"coordinates": 1000.0}, "coordinates got 1000.0"),
        ({"coordinates": True}, "coordinates got True"),
        ({"loss_window": 1}, "loss_window got 1, wanted a whole number of at least 2"),
        ({"loss_window": 2.5}, "loss_window got 2.5"),
        ({"probe_batches": -1}, "probe_batches got -1, wanted a whole number of at least 0"),
        ({"probe_batches": True}, "probe_batches got True"),
        ({"measure_every_n_steps": 0}, "measure_every_n_steps got 0, wanted a whole number of at least 1"),
        ({"alert_after": 0}, "alert_after got 0, wanted a whole number of at least 1"),
        ({"alert_after": True}, "alert_after got True"),
        ({"alert_after": "3"}, "alert_after got '3', wanted a whole number"),
    ],
    ids=str,
)
def test_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeedLimit(**settings)


def repr_of(value: Any) -> str:
    """Of some of these there is none."""
    return ", ".join(value) if isinstance(value, dict) else ""


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("it must not be looked at")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        *(({name: "no"}, TypeError, f"{name} got 'no', wanted True or False") for name in FLAGS),
        *(({name: 1}, TypeError, f"{name} got 1, wanted True or False") for name in FLAGS),
        ({"print_summary": None}, TypeError, "print_summary got None, wanted True or False"),
        ({"per_layer": np.bool_(True)}, TypeError, "per_layer got .*, wanted True or False"),
        ({"log_figures": Unshowable()}, TypeError, "log_figures got an object of Unshowable, wanted True or False"),
        ({"monitor": 5}, TypeError, "monitor got 5, wanted the name of a logged metric, or None"),
        ({"monitor": ""}, ValueError, "monitor got '', wanted the name of a logged metric, or None"),
        ({"dirpath": ""}, ValueError, "dirpath got '', wanted a folder; '.' is the working directory"),
        ({"dirpath": "  "}, ValueError, "dirpath got '  ', wanted a folder"),
        ({"dirpath": b"runs"}, TypeError, "dirpath got b'runs', wanted a path as text or a pathlib.Path"),
        ({"dirpath": 5}, TypeError, "dirpath got 5, wanted a path"),
        (
            {"dirpath": "s3://bucket/runs"},
            ValueError,
            "dirpath got 's3://bucket/runs', wanted a folder of this machine",
        ),
        ({"dirpath": "a\0b"}, ValueError, "wanted a folder of this machine"),
        ({"dirpath": "~nobody.of.this.name/runs"}, ValueError, "wanted a folder: .*; write it out"),
        ({"clouds": np.array(["neurons", "x"])}, ValueError, "clouds got array.*, wanted 'neurons' or None"),
        ({"clock": np.array(["steps", "lr"])}, ValueError, "clock got array.*, wanted one of 'steps', 'lr'"),
        ({"clock": Unshowable()}, ValueError, "clock got an object of Unshowable, wanted one of"),
        ({"coordinates": np.ones(3)}, ValueError, "coordinates got array.*, wanted a whole number of at least 1"),
        ({"coordinates": 10**400}, ValueError, "wanted a whole number from 1 to 9,223,372,036,854,775,807"),
        ({"loss_window": 10**5000}, ValueError, "loss_window got .*, wanted a whole number from 2 to 1,000,000"),
        ({"loss_window": 1_000_001}, ValueError, "loss_window got 1000001, wanted a whole number from 2 to 1,000,000"),
        ({"probe_batches": 2**63}, ValueError, "probe_batches got 9223372036854775808, wanted a whole number from 0"),
        ({"measure_every_n_steps": "2"}, ValueError, "measure_every_n_steps got '2', wanted a whole number"),
    ],
    ids=repr_of,
)
def test_arguments_of_another_kind(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as found:
        SpeedLimit(**settings)
    assert len(str(found.value)) < 800


def test_folders_as_they_are_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SpeedLimit(dirpath="~/runs").dirpath == tmp_path / "runs"
    assert SpeedLimit(dirpath=".").dirpath == SpeedLimit(dirpath=Path()).dirpath == Path()
    assert SpeedLimit(dirpath=tmp_path).dirpath == tmp_path
    assert SpeedLimit().dirpath is None


# --- what cannot be measured


@pytest.mark.mode("all parameters frozen", "refused", "SpeedLimit got optimizers whose parameters are all frozen")
def test_a_frozen_model(tmp_path: Path) -> None:
    model = Regressor()
    model.requires_grad_(False)
    model.loss = lambda batch: torch.ones((), requires_grad=True)  # type: ignore[method-assign]
    callback = quiet()
    with pytest.warns(UserWarning, match="all frozen") as said:
        trainer(tmp_path, callback).fit(model, loader(batches(3)))
    assert sum("frozen" in str(w.message) for w in said) == 1
    got = last_row(callback)
    assert got["path_length"] == got["displacement"] == 0.0
    assert callback.record is not None
    for name in ("kinematic_efficiency", "efficiency_action", "efficiency"):
        assert math.isnan(got[name])
        assert callback.record.reasons[name]


class Bare:
    """What Lightning asks of an optimizer, and no hooks: gradient descent."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": parameters, "lr": 0.1}]
        self.defaults: dict[str, Any] = {}
        self.state: dict[Any, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def zero_grad(self, set_to_none: bool | None = True) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
        return loss


class Bared(Regressor):
    def configure_optimizers(self) -> Any:
        return Bare(list(self.parameters()))


@pytest.mark.mode(
    "an optimizer without step hooks", "refused", "SpeedLimit can't measure Bare, which has no step hooks"
)
def test_an_optimizer_without_hooks(tmp_path: Path) -> None:
    model, callback = Bared(), quiet()
    with pytest.warns(UserWarning, match=r"can't measure Bare, which has no step hooks: derive it from") as said:
        trainer(tmp_path, callback, max_epochs=2).fit(model, loader(batches(3)))
    assert sum("Bare" in str(w.message) for w in said) == 1
    assert len(model.tape.losses) == 6
    assert callback.record is not None
    assert len(callback.record) == 0


def test_of_two_optimizers_the_one_with_hooks_is_measured(tmp_path: Path) -> None:
    class Mixed(ByHand, Regressor):
        def configure_optimizers(self) -> Any:
            hooked = self.tape.follow(torch.optim.SGD(self.first.parameters(), lr=0.1))
            return [Bare(list(self.second.parameters())), hooked]

    model, callback = Mixed(), quiet()
    with pytest.warns(UserWarning, match="can't measure Bare"):
        trainer(tmp_path, callback).fit(model, loader(batches(5)))
    wanted = plain(model.tape.steps, model.tape.losses)
    for name in ("displacement", "path_length", "work_ito", "grad_norm", "elapsed"):
        assert last_row(callback)[name] == pytest.approx(wanted[name], rel=EXACT), name


@pytest.mark.mode("no optimizer", "refused", "SpeedLimit measures nothing: configure_optimizers returned no optimizer")
def test_no_optimizer(tmp_path: Path) -> None:
    class Idle(Regressor):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.warns(UserWarning, match="configure_optimizers returned no optimizer"):
        trainer(tmp_path, quiet()).fit(Idle(), loader(batches(2)))


@pytest.mark.parametrize("rate", [{}, {"lr": None}], ids=["without", "None"])
def test_an_optimizer_without_a_learning_rate(tmp_path: Path, rate: dict[str, Any]) -> None:
    """Some set their own pace (Adafactor of transformers has lr=None); the clock "steps" needs none."""

    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, dict(rate))

        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(0.1 * parameter.grad)
            return loss

    class Paced(Regressor):
        def configure_optimizers(self) -> Any:
            return Own(self.parameters())

    model, callback = Paced(), quiet()
    start = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    trainer(tmp_path, callback).fit(model, loader(batches(1) * 5))
    got = last_row(callback)
    moved = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - start
    assert got["displacement"] == pytest.approx(float(moved.norm()), rel=EXACT)
    assert got["elapsed"] == 5
    assert math.isnan(got["learning_rate"])
    for name in ("kinematic_efficiency", "efficiency", "efficiency_action", "work_ito"):
        assert math.isfinite(got[name]), name


# --- numbers that are not finite


@pytest.mark.mode("a loss that is not finite", "caveat", "recorded as such; what rests on it is NaN, with the reason")
def test_a_nan_loss_is_recorded_as_such(tmp_path: Path) -> None:
    """The loss of step 3 alone: its gradient is whole, and so is all that does not rest on the loss."""

    class Spoilt(Regressor):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + math.nan if batch_idx == 3 else loss

    model, callback = Spoilt(), quiet(loss_window=50)
    trainer(tmp_path, callback).fit(model, loader(batches(8)))
    got, wanted = last_row(callback), plain(model.tape.steps, model.tape.losses)
    assert callback.record is not None
    for name in ("loss_drop", "efficiency", "conversion", "loss"):
        assert math.isnan(got[name])
        assert "loss is not finite" in callback.record.reasons[name]
    for name in ("displacement", "path_length", "work_ito", "efficiency_action", "elapsed"):
        assert got[name] == pytest.approx(wanted[name], rel=EXACT), name


@pytest.mark.mode(
    "a gradient that is not finite", "caveat", "recorded as such; what rests on it is NaN, with the reason"
)
def test_a_gradient_that_is_not_finite_does_not_stop_the_training(tmp_path: Path) -> None:
    class Spoilt(Regressor):
        def on_after_backward(self) -> None:
            super().on_after_backward()
            if self.tape.batch == 3:
                next(self.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]

    model, callback = Spoilt(), quiet()
    trainer(tmp_path, callback).fit(model, loader(batches(8)))
    assert callback.record is not None
    assert len(model.tape.steps) == 8
    assert math.isnan(last_row(callback)["path_length"])
    assert "not finite" in callback.record.reasons["path_length"]
    assert math.isfinite(callback.record.columns["path_length"][2])


# --- disks


def refuse(monkeypatch: pytest.MonkeyPatch, error: OSError) -> list[str]:
    """Files cannot be put in place any more (the tests may run as root, whom no mode stops)."""
    tried = []

    def fail(source: Any, target: Any, **kwargs: Any) -> None:
        tried.append(os.fspath(target))
        raise error

    monkeypatch.setattr(os, "replace", fail)
    return tried


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied")],
    ids=["full", "read-only"],
)
def test_a_disk_that_takes_nothing_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    tried = refuse(monkeypatch, error)
    model, callback = Regressor(), quiet()
    with pytest.warns(UserWarning, match=r"could not save its record.*set dirpath=") as said:
        trainer(tmp_path, callback, max_epochs=3).fit(model, loader(batches(4)))
    assert sum("could not save" in str(w.message) for w in said) == 1
    assert len(tried) >= 2  # at the first row, and at the end again
    assert last_row(callback)["step"] == len(model.tape.steps) == 12
    left = [p.name for p in (tmp_path / "speed_limit").iterdir()]
    assert not [name for name in left if name.endswith(".tmp")]


# --- the loss


class Logged(Regressor):
    """The loss that it returns is scaled; the one that it logs is the loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("plain", loss.detach())
        self.log("both", loss.detach(), on_step=True, on_epoch=True)
        return 3.0 * loss


@pytest.mark.parametrize("name", ["plain", "both"])
def test_a_monitored_metric_is_the_loss(tmp_path: Path, name: str) -> None:
    # Lightning keeps logged values in float32 unless told otherwise, hence 1e-6 of the losses.
    model, callback = Logged(sgd(lr=0.01)), quiet(monitor=name)
    trainer(tmp_path, callback).fit(model, loader(batches(1) * 8))
    losses = model.tape.losses
    wanted = losses[0] - (2 * losses[-1] - losses[-2])
    assert last_row(callback)["loss_drop"] == pytest.approx(wanted, abs=1e-6 * losses[0])

    other, unmonitored = Logged(sgd(lr=0.01)), quiet()
    trainer(tmp_path, unmonitored).fit(other, loader(batches(1) * 8))
    assert last_row(unmonitored)["loss_drop"] == pytest.approx(3 * wanted, abs=3e-6 * losses[0])


def test_a_monitor_of_another_name_is_told_what_there_is(tmp_path: Path) -> None:
    """What steps log, not epochs, and none of our own values."""

    class Logs(Logged):
        def on_train_epoch_end(self) -> None:
            self.log("epochs", 1.0)

    callback = quiet(monitor="plane")
    trainer(tmp_path, callback, max_epochs=2).fit(Logs(), loader(batches(5)))
    assert callback.record is not None
    told = "monitor='plane' was not among the metrics logged at each step; these are: plain and both"
    assert callback.record.reasons["conversion"] == f"no loss was recorded: {told}"


def test_a_training_that_returns_no_loss_is_told_how_to_give_one(tmp_path: Path) -> None:
    class Silent(ByHand, Regressor):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)

    callback = quiet()
    trainer(tmp_path, callback).fit(Silent(), loader(batches(5)))
    assert callback.record is not None
    text = " ".join(str(callback.record.summary()).split())
    cure = "return it from training_step, or log it there and pass SpeedLimit(monitor='its name')"
    assert text.count(f"are undefined: no loss was recorded: {cure}") == 1
    assert text.count("no loss was recorded") == 1


def test_a_monitor_that_never_appears(tmp_path: Path) -> None:
    model, callback = Regressor(), quiet(monitor="nonsense")
    trainer(tmp_path, callback).fit(model, loader(batches(5)))
    got = last_row(callback)
    assert callback.record is not None
    assert math.isnan(got["loss_drop"])
    reason = callback.record.reasons["loss_drop"]
    assert reason == (
        "no loss was recorded: monitor='nonsense' was not among the metrics logged at each step: "
        "self.log('nonsense', loss) in training_step"
    )
    assert str(callback.record.summary()).count("no loss was recorded") == 1
    assert got["displacement"] == pytest.approx(plain(model.tape.steps, model.tape.losses)["displacement"], rel=EXACT)
