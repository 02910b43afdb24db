"""One callback object for several trainers, one within another's fit; copies and pickles of it afterwards."""

import copy
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
from callback_cases import Regressor, batches, last_row, loader, quiet, repeatable, sgd, trainer

from lightning_speedlimit import RunRecord, SpeedLimit

SETTINGS: list[dict[str, Any]] = [{}, {"probe_batches": 2, "clouds": "neurons"}, {"per_layer": True, "coordinates": 10}]


class Model(Regressor):
    """Of tests that pickle it: no closure, no tape."""

    def __init__(self) -> None:
        super().__init__()
        del self._optimizer

    def configure_optimizers(self) -> Any:
        return sgd()(list(self.parameters()))


def alike(record: RunRecord | None, other: RunRecord | None) -> None:
    assert record is not None
    assert other is not None
    found, wanted = repeatable(record.columns), repeatable(other.columns)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


# --- copies


@pytest.mark.mode("a callback or a Trainer that was copied or pickled after a fit", "measured", "settings and record")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_after_a_fit_the_callback_and_its_trainer_can_be_copied(
    tmp_path: Path, copied: Any, settings: dict[str, Any]
) -> None:
    callback = quiet(**settings)
    run = trainer(tmp_path, callback)
    run.fit(Model(), loader(batches(6)))
    other = copied(run)
    (again,) = [c for c in other.callbacks if isinstance(c, SpeedLimit)]
    for found in (copied(callback), again):
        alike(found.record, callback.record)
        assert str(found.record.summary()) == str(callback.record.summary())  # type: ignore[union-attr]
        assert found.probe_batches == callback.probe_batches
        assert found.state_dict() == {}
        trainer(tmp_path / "again", found).fit(Model(), loader(batches(6)))
        alike(found.record, callback.record)


def test_a_pickle_is_of_the_record_and_not_of_the_model(tmp_path: Path) -> None:
    class Unpicklable(Regressor):
        """Of a local class, with a lambda."""

    callback = quiet(clouds="neurons")
    trainer(tmp_path, callback).fit(Unpicklable(), loader(batches(4)))
    alike(pickle.loads(pickle.dumps(callback)).record, callback.record)


@pytest.mark.parametrize("at", ["on_train_batch_end", "on_train_epoch_end", "on_exception"])
def test_a_copy_within_a_fit_measures_nothing_and_disturbs_nothing(tmp_path: Path, at: str) -> None:
    copies: list[SpeedLimit] = []

    class Copy(pl.Callback):
        def take(self, *args: Any) -> None:
            copies.append(copy.deepcopy(callback))
            copies.append(pickle.loads(pickle.dumps(callback)))

    class Failing(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if at == "on_exception" and batch_idx == 4:
                raise RuntimeError("out of cheese")
            return super().training_step(batch, batch_idx)

    setattr(Copy, at, Copy.take)
    whole, callback = quiet(), quiet()
    for measured, others in ((whole, ()), (callback, (Copy(),))):
        run = trainer(tmp_path, measured, *others)
        if at == "on_exception":
            with pytest.raises(RuntimeError, match="out of cheese"):
                run.fit(Failing(), loader(batches(6)))
        else:
            run.fit(Failing(), loader(batches(6)))
    alike(callback.record, whole.record)
    assert copies
    assert all(c.state_dict() == {} for c in copies)


@pytest.mark.slow  # starts processes
def test_a_second_fit_under_spawn(tmp_path: Path) -> None:
    callback = quiet(dirpath=tmp_path)
    trainer(tmp_path, callback).fit(Model(), loader(batches(6)))
    for epochs in (2, 3):
        run = trainer(tmp_path, callback, strategy="ddp_spawn", devices=2, max_epochs=epochs)
        run.fit(Model(), loader(batches(6)))
        assert RunRecord.load(tmp_path).columns["step"][-1] == 3 * epochs  # six batches, of two processes
    assert last_row(callback)["step"] == 6  # the children's does not come back


# --- a fit within a fit


class Within(pl.Callback):
    """Runs something once, at one of the hooks of the outer fit."""

    def __init__(self, hook: str, inner: Any) -> None:
        self.hook, self.inner, self.done = hook, inner, False

    def _once(self, trainer: Any, hook: str) -> None:
        if hook == self.hook and not self.done and trainer.global_step in (0, 5, 8):
            if trainer.global_step == 0 and hook in ("on_train_batch_start", "on_train_batch_end"):
                return
            self.done = True
            self.inner()

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self._once(trainer, "on_fit_start")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._once(trainer, "on_train_start")

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self._once(trainer, "on_train_batch_start")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._once(trainer, "on_train_batch_end")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._once(trainer, "on_train_epoch_end")


HOOKS = ["on_fit_start", "on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, SpeedLimit, SpeedLimit]:
    """The outer fit without the inner one, and the two callbacks of each alone."""
    folder, whole, alone = tmp_path_factory.mktemp("alone"), quiet(per_layer=True), quiet(per_layer=True)
    expected = trainer(folder / "whole", whole, max_epochs=2)
    expected.fit(Regressor(), loader(batches(8)))
    trainer(folder / "alone", alone, max_epochs=2).fit(Regressor(width=3), loader(batches(4, seed=9)))
    return expected, whole, alone


@pytest.mark.mode("one callback object in a fit within a fit", "measured", "the inner one's record is in its folder")
@pytest.mark.parametrize("callback_first", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_fit_within_a_fit_leaves_the_outer_one_as_it_was(
    tmp_path: Path, undisturbed: tuple[Any, SpeedLimit, SpeedLimit], hook: str, callback_first: bool
) -> None:
    def inner() -> None:
        trainer(tmp_path / "inner", callback, max_epochs=2).fit(Regressor(width=3), loader(batches(4, seed=9)))

    (expected, whole, alone), callback = undisturbed, quiet(per_layer=True)
    within = Within(hook, inner)
    order = [callback, within] if callback_first else [within, callback]
    run = trainer(tmp_path, *order, max_epochs=2)
    run.fit(Regressor(), loader(batches(8)))
    assert within.done
    alike(callback.record, whole.record)
    alike(RunRecord.load(tmp_path / "speed_limit"), whole.record)
    alike(RunRecord.load(tmp_path / "inner" / "speed_limit"), alone.record)
    assert {k: float(v) for k, v in run.callback_metrics.items()} == pytest.approx(
        {k: float(v) for k, v in expected.callback_metrics.items()}, nan_ok=True
    )


@pytest.mark.parametrize("kind", ["fails", "validates", "is stopped by Ctrl-C"])
def test_what_another_trainer_does_within_a_fit_does_not_end_its_measurement(tmp_path: Path, kind: str) -> None:
    class Inner(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise RuntimeError("out of cheese") if kind == "fails" else KeyboardInterrupt
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                raise RuntimeError("out of cheese")

    def inner() -> None:
        run = trainer(tmp_path / "inner", callback)
        if kind == "validates":
            run.validate(Inner(), loader(batches(2)), verbose=False)
            with pytest.raises(RuntimeError, match="out of cheese"):
                run.validate(Inner(), loader(batches(4)), verbose=False)
        else:
            handler = signal.getsignal(signal.SIGINT)
            with pytest.raises((RuntimeError, SystemExit)):
                run.fit(Inner(), loader(batches(4)))
            signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored

    whole, callback = quiet(), quiet()
    trainer(tmp_path / "whole", whole).fit(Regressor(), loader(batches(8)))
    run = trainer(tmp_path, callback, Within("on_train_batch_start", inner))
    run.fit(Regressor(), loader(batches(8)))
    alike(callback.record, whole.record)
    assert "speed_limit/displacement" in run.callback_metrics


def test_three_fits_within_each_other(tmp_path: Path) -> None:
    """And after a fit that never ended, the next one is no part of it."""

    def innermost() -> None:
        trainer(tmp_path / "2", callback).fit(Regressor(), loader(batches(3)))

    def inner() -> None:
        middle = Within("on_train_epoch_end", innermost)
        trainer(tmp_path / "1", callback, middle).fit(Regressor(), loader(batches(8)))

    callback = quiet()
    trainer(tmp_path / "0", callback, Within("on_train_epoch_end", inner)).fit(Regressor(), loader(batches(8)))
    assert last_row(callback)["step"] == 8
    found = [RunRecord.load(tmp_path / str(i) / "speed_limit").columns["step"][-1] for i in range(3)]
    assert found == [8, 8, 3]
    lost = trainer(tmp_path / "lost", callback)
    callback.setup(lost, None, "fit")  # and nothing more of it
    trainer(tmp_path / "next", callback).fit(Regressor(), loader(batches(5)))
    assert last_row(callback)["step"] == 5
