"""A fit that runs without the callback runs with it, to the same weights, whatever the objects around it do."""

import contextlib
import json
import logging
import math
import threading
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_cases import Batch, ByHand, Regressor, batches, flat, heard, last_row, loader, quiet, sgd, trainer
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_speedlimit import RunRecord, SpeedLimit, TrajectoryMeter, loaders
from lightning_speedlimit.callback import lightning, logged_metrics
from lightning_speedlimit.callback.measurement import Measurement
from lightning_speedlimit.callback.unseen_steps import UnseenSteps
from lightning_speedlimit.checks import guard
from lightning_speedlimit.record.keeper import RecordKeeper

STEPS = 4


class Unshowable:
    """Neither `repr` nor `str`, `bool`, `==` or `len` may be asked of it."""

    def _raise(self, *args: Any) -> Any:
        raise RuntimeError("it must not be looked at")

    __repr__ = __str__ = __bool__ = __eq__ = __len__ = __iter__ = __float__ = _raise
    __hash__ = object.__hash__


class Unsayable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words for it")


def setting(name: Any, value: Any) -> Callable[[list[Tensor]], Optimizer]:
    def make(parameters: Any) -> Optimizer:
        made = SGD(parameters, lr=0.05)
        made.param_groups[0][name] = value
        return made

    return make


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def odd(base: type, **members: Any) -> Any:
    return type("Odd", (base,), members)


def raising(*args: Any, **kwargs: Any) -> Any:
    raise Unsayable


class Batches:
    """Of a user's own; `members` of a class derived from it are properties that raise."""

    def __init__(self, data: list[Batch]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        return iter(self.data)


class Hookless(SGD):
    def register_step_post_hook(self, hook: Any) -> Any:
        raise RuntimeError("hooks are not taken here")


class Shy(SGD):
    @property
    def register_step_post_hook(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not in this state")


class Untaped(Regressor):
    """Registers no hooks of its own."""

    def configure_optimizers(self) -> Any:
        return self._optimizer(list(self.parameters()))


class Manual(ByHand, Untaped):
    """Two optimizers on the same parameters."""

    def configure_optimizers(self) -> Any:
        return [SGD(self.parameters(), lr=0.05), torch.optim.Adam(self.parameters(), lr=0.01)]


CASES: dict[str, dict[str, Any]] = {
    "a meta tensor in a group": {"optimizer": setting("mask", torch.ones(3, device="meta"))},
    "a sparse tensor in a group": {"optimizer": setting("mask", torch.eye(3).to_sparse())},
    "a list that holds itself": {"optimizer": setting("rules", endless())},
    "a setting without a repr": {"optimizer": setting("rule", Unshowable())},
    "a key without a repr": {"optimizer": setting(Unshowable(), 1.0)},
    "a key that is a number": {"optimizer": setting(3, 1.0)},
    "a key that is a tuple": {"optimizer": setting(("a", 1), 1.0)},
    "a number of 5,000 digits": {"optimizer": setting("seed", 10**5000)},
    "a lock": {"optimizer": setting("lock", threading.Lock())},
    "a parameter twice in a group": {"optimizer": lambda p: SGD([*p, p[0]], lr=0.05)},
    "hooks that are refused": {"optimizer": lambda p: Hookless(p, lr=0.05)},
    "hooks whose property raises": {"optimizer": lambda p: Shy(p, lr=0.05)},
    "two optimizers on the same parameters": {"module": Manual},
    "a dataset without a length": {"loader": odd(Batches, dataset=odd(list, __len__=raising)())},
    "a batch size that raises": {"loader": odd(Batches, batch_size=property(raising))},
    "a data set that raises": {"loader": odd(Batches, dataset=odd(list, __len__=raising)(), batch_size=2)},
    "a monitor that raises": {"callback": odd(pl.Callback, monitor=property(raising))},
    "a monitor without a repr": {"callback": odd(pl.Callback, monitor=Unshowable())},
    "a callback that can't be compared": {"callback": odd(pl.Callback, __eq__=raising, __hash__=object.__hash__)},
}


def run(folder: Path, case: dict[str, Any], *callbacks: Any, data: list[Batch] | None = None) -> Tensor:
    """The weights at the end."""
    model = case.get("module", Untaped)(case.get("optimizer", sgd()))
    given = case["loader"](data or batches(STEPS)) if "loader" in case else loader(data or batches(STEPS))
    others = [case["callback"]()] if "callback" in case else []
    fitted = trainer(folder, *others, *callbacks, max_epochs=2, **case.get("options", {}))
    fitted.fit(model, given)
    assert fitted.current_epoch == 2
    return flat(list(model.parameters()))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning_speedlimit")
@pytest.mark.mode("whatever an optimizer's settings, data, loaders and other callbacks hold", "measured")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_odd_objects_end_no_fit(tmp_path: Path, case: dict[str, Any]) -> None:
    callback = quiet()
    with heard("") as said:
        weights = run(tmp_path, case, callback)
    assert torch.equal(weights, run(tmp_path, case))
    assert not [text for text in said if "measures nothing" in text or "measurement stopped" in text]
    assert callback.record is not None
    refused = [text for text in said if "SpeedLimit can't measure" in text]
    assert len(refused) == ("hooks" in next(name for name, c in CASES.items() if c is case))
    if not refused:
        assert last_row(callback)["step"] == 2 * STEPS
        assert last_row(callback)["path_length"] > 0.0


@pytest.mark.parametrize("how", ["a filter that makes errors of warnings", "a showwarning that raises"])
def test_a_warning_of_ours_ends_no_fit(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged instead. (The shared parameters are said by the meter, the odd key by the callback.)"""
    case = {"module": Manual, "options": {"log_every_n_steps": 2}}

    def fit(*callbacks: Any) -> Tensor:
        with warnings.catch_warnings():
            if how == "a showwarning that raises":
                warnings.simplefilter("always")
                monkeypatch.setattr(warnings, "showwarning", raising)
            else:
                warnings.simplefilter("error")
            for others in ("pytorch_lightning", "torch"):
                warnings.filterwarnings("ignore", module=others)
            return run(tmp_path, case, *callbacks)

    without, callback = fit(), quiet(dirpath=tmp_path / "record.json")
    (tmp_path / "record.json").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="lightning_speedlimit"):
        assert torch.equal(fit(callback), without)
    assert last_row(callback)["step"] == 2 * STEPS
    assert "parameters in both SGD and Adam" in caplog.text
    assert "could not save its record" in caplog.text


# --- a fault in each hook


HOOKS = {
    "setup": (SpeedLimit, "_clear"),
    "the start, the folder": (SpeedLimit, "_default_folder"),
    "the start, the meter": (TrajectoryMeter, "__init__"),
    "the start, the description": (lightning, "run_description"),
    "the start, the record": (RunRecord, "__init__"),
    "the start, the weights": (UnseenSteps, "__init__"),
    "the start, the monitors": (lightning, "watched"),
    "the start of a batch": (lightning, "change_of_optimizers"),
    "before backward": (logged_metrics, "last_logged"),
    "before the step": (lightning, "loss_scale"),
    "the end of a batch": (lightning, "should_log"),
    "the end of a batch, the weights": (UnseenSteps, "message"),
    "the end of an epoch": (Measurement, "measure_clouds"),
    "the end of the fit": (SpeedLimit, "_draw"),
    "teardown": (TrajectoryMeter, "close"),
}
NOT_NEEDED = ("the start, the description", "the start, the weights", "the end of the fit")  # to measure


@pytest.mark.filterwarnings("ignore::UserWarning:lightning_speedlimit")
@pytest.mark.parametrize(("where", "error"), zip(HOOKS, cycle([Unsayable, StopIteration]), strict=False), ids=str)
def test_a_fault_in_any_hook_ends_no_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: type[Exception]
) -> None:
    callback, reached = quiet(monitor="loss", log_figures=where == "the end of the fit"), []

    def fault(*args: Any, **kwargs: Any) -> Any:
        reached.append(where)
        raise error

    without = run(tmp_path, {})
    monkeypatch.setattr(*HOOKS[where], fault)
    assert torch.equal(run(tmp_path, {}, callback), without)
    assert reached
    assert callback._trainer is None
    assert not [*tmp_path.rglob(".fit.lock")]  # the folder is free for others
    if where in NOT_NEEDED:
        assert last_row(callback)["step"] == 2 * STEPS
        assert last_row(callback)["path_length"] > 0.0


@pytest.mark.filterwarnings("ignore::UserWarning:lightning_speedlimit")
@pytest.mark.parametrize("where", [(TrajectoryMeter, "close"), (SpeedLimit, "_measure")], ids=str)
def test_a_fault_does_not_hide_the_users_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any) -> None:
    class Failing(Untaped):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise KeyError("the user's own")
            return super().training_step(batch, batch_idx)

    callback = quiet()
    monkeypatch.setattr(*where, raising)
    with pytest.raises(KeyError, match="the user's own"):
        run(tmp_path, {"module": Failing}, callback)
    assert callback._trainer is None
    assert not [*tmp_path.rglob(".fit.lock")]


@pytest.mark.filterwarnings("ignore::UserWarning:lightning_speedlimit")
@pytest.mark.parametrize("fails", [True, False], ids=["of a failing fit", "of a fit that ends"])
@pytest.mark.parametrize("where", [(TrajectoryMeter, "close"), (RecordKeeper, "write")], ids=str)
def test_ctrl_c_at_the_end_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, fails: bool
) -> None:
    """Held by a callback that lives on, as in a notebook; the next fit would get another folder."""

    class Failing(Untaped):
        def on_train_end(self) -> None:
            if fails:
                raise KeyError("the user's own")

    real, pressed = getattr(*where), []

    def press(*args: Any, **kwargs: Any) -> Any:
        if locked(tmp_path):
            pressed.append(where)
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    callback = quiet(dirpath=tmp_path / "record")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*where, press)
        with contextlib.suppress(BaseException):  # Lightning makes a SystemExit of it, or goes on
            run(tmp_path, {"module": Failing}, callback)
    assert pressed
    assert not locked(tmp_path)
    run(tmp_path, {}, again := quiet(dirpath=tmp_path / "record"))
    assert again._folder == tmp_path / "record"


def locked(folder: Path) -> list[Path]:
    return [*folder.rglob(".fit.lock")]


@pytest.mark.parametrize(
    "state", [torch.ones(3), torch.ones(()), [1, 2], 5, Unshowable()], ids=lambda s: type(s).__name__
)
def test_a_checkpoints_state_of_another_kind_ends_no_fit(tmp_path: Path, state: Any) -> None:
    class Resumed(SpeedLimit):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            super().setup(*args, **kwargs)
            self.load_state_dict(state)  # between these two Lightning does

    callback = Resumed(print_summary=False, log_figures=False)
    with pytest.warns(UserWarning, match="SpeedLimit starts anew at step 0: the checkpoint's state has"):
        run(tmp_path, {}, callback)
    assert last_row(callback)["step"] == 2 * STEPS


def test_after_a_fault_at_the_start_no_row_of_the_fit_before_is_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = quiet(print_summary=True, dirpath=tmp_path / "second")
    run(tmp_path, {}, callback)
    saved = (tmp_path / "second" / "record.json").read_bytes()
    monkeypatch.setattr(TrajectoryMeter, "__init__", raising)
    with pytest.warns(UserWarning, match="SpeedLimit measures nothing: Unsayable. The training goes on") as said:
        run(tmp_path, {}, callback)
    assert sum("SpeedLimit" in str(w.message) for w in said) == 1
    assert callback.record is None
    assert (tmp_path / "second" / "record.json").read_bytes() == saved


# --- what can be seen is still told


def test_what_could_not_be_looked_at_is_left_out_of_the_description(tmp_path: Path) -> None:
    callback = quiet()
    run(tmp_path, CASES["a batch size that raises"], callback)
    assert callback.record is not None
    run_told = callback.record.run
    assert run_told["batch_size"] is None
    assert run_told["model"] == "Untaped"
    assert run_told["parameters"] == run_told["trainable_parameters"] == 31
    json.dumps(run_told)


def drawn_in_pairs(data: list[Batch]) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data[0]), batch_size=2)


def test_what_raises_is_left_out_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning, "_version", raising)
    monkeypatch.setattr(loaders, "_drawn_once", raising)
    monkeypatch.setattr(lightning, "describe_optimizers", raising)
    callback = quiet()
    run(tmp_path, {"loader": drawn_in_pairs}, callback)
    assert callback.record is not None
    assert "versions" not in callback.record.run
    assert callback.record.run["batches_per_epoch"] is None
    assert callback.record.run["batch_size"] == 2
    assert callback.record.run["optimizers"] == [{"class": "SGD", "groups": []}]
    assert callback.record.run["model"] == "Untaped"
    assert callback.record.run["precision"] == "32-true"


def test_a_monitor_is_still_found_beside_one_that_raises(tmp_path: Path) -> None:
    """Early stopping on a key of ours finds it from the first batch on."""
    stop = pl.callbacks.EarlyStopping("speed_limit/path_length", mode="max", check_on_train_epoch_end=True)
    callback = quiet()
    others = [odd(pl.Callback, monitor=property(raising))(), stop]
    fitted = trainer(tmp_path, callback, *others, max_epochs=2)
    fitted.fit(Untaped(), loader(batches(STEPS)))
    assert callback._values is not None
    assert callback._values.announces
    assert float(stop.best_score) == pytest.approx(last_row(callback)["path_length"], rel=1e-6)


def test_monitors_of_ours_find_nan_where_the_start_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is not there at all would end the fit."""
    monkeypatch.setattr(TrajectoryMeter, "__init__", raising)
    stop = pl.callbacks.EarlyStopping("speed_limit/path_length", check_finite=False, check_on_train_epoch_end=True)
    fitted = trainer(tmp_path, quiet(), stop, max_epochs=2)
    with pytest.warns(UserWarning, match="SpeedLimit measures nothing: Unsayable"):
        fitted.fit(Untaped(), loader(batches(STEPS)))
    assert math.isnan(fitted.callback_metrics["speed_limit/path_length"])


def test_the_guard_itself() -> None:
    assert guard.told(ValueError("why")) == "ValueError: why"
    assert guard.told(Unsayable()) == "Unsayable"
    assert guard.told(KeyError("x" * 10_000)).endswith("…")
    assert len(guard.told(KeyError("x" * 10_000))) == 500
    assert guard.shown(Unshowable()) == "an object of Unshowable"
    assert guard.look(int, None, "5") == 5
    assert guard.look(int, None, "five") is None
    with pytest.raises(KeyboardInterrupt):
        guard.look(interrupt, None)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_fault_within_a_plain_loops_step_ends_no_loop_either(caplog: pytest.LogCaptureFixture) -> None:
    """Under a filter that makes errors of warnings."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([weight], lr=0.1)
    meter = TrajectoryMeter(optimizer, layer_of=raising)
    weight.grad = torch.ones(3)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="lightning_speedlimit"):
        warnings.simplefilter("error")
        optimizer.step()
    assert weight.tolist() == pytest.approx([0.9] * 3)
    assert "the measurement stopped at step 0: Unsayable. The training goes on" in caplog.text
    assert math.isnan(meter.compute()["path_length"])
