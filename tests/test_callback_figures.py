"""Figures at the end of a fit: which, where, at which step, and nothing else.

Pictures are compared with those of the record that the fit left; what they show is tested in report/test_figures.py.
"""

import io
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from callback_cases import Regressor, batches, flat, heard, loader, quiet, trainer
from logger_files import images_of_tensorboard, images_of_wandb, of_csv, of_tensorboard
from matplotlib.figure import Figure
from matplotlib.image import imread
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_speedlimit import SpeedLimit
from lightning_speedlimit.record import writing
from lightning_speedlimit.report import figures

MODE = "figures at the end of a fit: TensorBoard, W&B, MLflow, files"
NAMES = {"efficiency", "windows", "trajectories", "work_balance"}
TAG = "speed_limit/figures/"


def fit(folder: Path, *, number: int = 12, model: Any = None, **options: Any) -> SpeedLimit:
    settings = {key: options.pop(key) for key in ("log_figures", "clouds", "dirpath") if key in options}
    callback = quiet(**{"log_figures": True, **settings})
    trainer(folder, callback, **options).fit(model or Regressor(), loader(batches(number)))
    return callback


def same_pictures(found: dict[str, Any], callback: SpeedLimit, names: set[str] = NAMES) -> None:
    """name → (height, width, 3 or 4), uint8 or 0 to 1."""
    assert set(found) == names
    for name, figure in figures.available(callback.record).items():
        picture = found[name] if found[name].dtype == np.uint8 else (255 * found[name]).round().astype(np.uint8)
        np.testing.assert_array_equal(picture[:, :, :3], figures.pixels(figure), err_msg=name)


def files_in(folder: Path) -> dict[str, Any]:
    return {path.stem: imread(path) for path in folder.glob("*.png")}


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the figures that are drawn: the quickest alone."""
    monkeypatch.setattr(figures, "OF_ONE_RUN", {"work_balance": figures.OF_ONE_RUN["work_balance"]})
    return {"work_balance"}


@pytest.mark.mode(MODE, "measured")
@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 5}, {"log_every_n_steps": 5}])
def test_tensorboard(tmp_path: Path, options: dict[str, Any]) -> None:
    """At the step of the last metrics, once each; and no files."""
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")]
    callback = fit(tmp_path, logger=loggers, clouds="neurons", **options)
    images = images_of_tensorboard(tmp_path / "board")
    last = max(step for step, _ in of_tensorboard(tmp_path / "board")["speed_limit/displacement"])
    assert {tag: [step for step, _ in found] for tag, found in images.items()} == {
        TAG + name: [last] for name in NAMES | {"layers"}
    }
    pictures = {tag.removeprefix(TAG): imread(io.BytesIO(found[0][1])) for tag, found in images.items()}
    same_pictures(pictures, callback, NAMES | {"layers"})
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.mode(MODE, "measured")
@pytest.mark.parametrize("with_csv", [True, False])
def test_files(tmp_path: Path, with_csv: bool, one: set[str]) -> None:
    """In the record's folder, which is still a record."""
    callback = fit(tmp_path, logger=CSVLogger(tmp_path) if with_csv else False)
    (folder,) = {path.parent for path in tmp_path.rglob("*.png")}
    assert folder == callback._folder / "figures"
    same_pictures(files_in(folder), callback, one)
    assert len(type(callback.record).load(folder.parent)) == 12


def test_files_of_an_earlier_run_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: draw for name, draw in figures.OF_ONE_RUN.items() if name in {"work_balance", "layers"}}
    monkeypatch.setattr(figures, "OF_ONE_RUN", kept)
    fit(tmp_path, dirpath=tmp_path / "here", clouds="neurons")
    (tmp_path / "here" / "figures" / "own.png").write_bytes(b"of the user")
    assert (tmp_path / "here" / "figures" / "layers.png").exists()
    fit(tmp_path, dirpath=tmp_path / "here")
    assert {path.stem for path in (tmp_path / "here" / "figures").iterdir()} == {"work_balance", "own"}


def test_a_link_in_the_place_of_a_file_is_replaced_and_a_mode_is_kept(tmp_path: Path, one: set[str]) -> None:
    """What the link points at is the user's; what the user closed to others stays closed."""
    outside, picture = tmp_path / "outside", tmp_path / "here" / "figures" / "work_balance.png"
    outside.write_text("of the user")
    picture.parent.mkdir(parents=True)
    picture.symlink_to(outside)
    callback = fit(tmp_path, dirpath=tmp_path / "here")
    assert outside.read_text() == "of the user"
    assert not picture.is_symlink()
    picture.chmod(0o600)
    fit(tmp_path, dirpath=tmp_path / "here")
    same_pictures(files_in(picture.parent), callback, one)
    assert picture.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in picture.parent.iterdir()] == ["work_balance.png"]


def test_a_disk_that_fills_up_leaves_no_half_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: set[str]
) -> None:
    callback = fit(tmp_path, dirpath=tmp_path / "here")
    monkeypatch.setattr(writing.os, "replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.warns(UserWarning, match="could not write its figures"):
        fit(tmp_path, dirpath=tmp_path / "here", number=4)
    monkeypatch.undo()
    monkeypatch.setattr(figures, "OF_ONE_RUN", {"work_balance": figures.OF_ONE_RUN["work_balance"]})
    same_pictures(files_in(tmp_path / "here" / "figures"), callback, one)
    assert [path.name for path in (tmp_path / "here" / "figures").iterdir()] == ["work_balance.png"]


@pytest.mark.mode(MODE, "measured")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: set[str]) -> None:
    pytest.importorskip("mlflow", reason="needs mlflow-skinny: extra 'test'")
    from pytorch_lightning.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    callback = fit(tmp_path, logger=MLFlowLogger(save_dir=str(tmp_path / "mlruns")))
    (artifacts,) = tmp_path.glob("mlruns/*/*/artifacts")
    same_pictures(files_in(artifacts / "speed_limit" / "figures"), callback, one)
    assert len(list(tmp_path.rglob("*.png"))) == len(one)


@pytest.mark.slow
@pytest.mark.mode(MODE, "measured")
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("wandb", reason="needs wandb: extra 'test'")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    callback = fit(tmp_path, logger=WandbLogger(save_dir=str(tmp_path), offline=True, project="limits"))
    module.finish()
    module.teardown()
    images = images_of_wandb(tmp_path)
    assert {tag: step for tag, (step, _) in images.items()} == {TAG + name: 11 for name in NAMES}
    same_pictures({tag.removeprefix(TAG): imread(path) for tag, (_, path) in images.items()}, callback)


# --- when none are drawn


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The records that were drawn."""
    seen: list[Any] = []
    whole = figures.available
    monkeypatch.setattr(figures, "available", lambda record: seen.append(record) or whole(record))
    return seen


class Failing(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 8:
            raise RuntimeError("the user's own")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}, {"log_figures": False}])
def test_none_are_drawn_where_nothing_is_kept(tmp_path: Path, drawings: list[Any], options: dict[str, Any]) -> None:
    if "barebones" in options:
        options |= dict.fromkeys(["logger", "enable_checkpointing", "log_every_n_steps"])
    fit(tmp_path, **options)
    assert not drawings
    assert not list(tmp_path.rglob("*.png"))


def test_none_are_drawn_after_an_exception(tmp_path: Path, drawings: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(tmp_path, model=Failing())
    assert not drawings


def test_none_are_drawn_by_other_processes(tmp_path: Path, drawings: list[Any]) -> None:
    callback = fit(tmp_path, log_figures=False)
    callback.log_figures, callback._writes = True, False
    callback._draw(trainer(tmp_path))
    assert not drawings


@pytest.mark.usefixtures("one")
def test_they_are_drawn_once_and_after_the_last_step(tmp_path: Path, drawings: list[Any]) -> None:
    counts: list[tuple[int, int]] = []

    class Watched(Regressor):
        def on_train_batch_end(self, *args: Any) -> None:
            counts.append((len(self.tape.steps), len(drawings)))

    callback = fit(tmp_path, model=Watched(), max_epochs=2)
    assert counts[-1] == (24, 0)
    assert drawings == [callback.record]


# --- when something is in the way


def test_without_matplotlib_the_cure_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with heard() as said:
        callback = fit(tmp_path)
    (message,) = said
    assert "draws no figures" in message
    assert "pip install 'lightning-speedlimit[report]'" in message
    assert len(callback.record) == 12
    assert not list(tmp_path.rglob("*.png"))


class Refusing(Logger):
    """Has what a TensorBoardLogger has, and a writer that is broken."""

    name, version = "refusing", 0

    class experiment:
        @staticmethod
        def add_figure(*args: Any, **kwargs: Any) -> None:
            raise OSError("no space left")

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_logger_that_refuses_is_named_once_and_files_take_its_place(tmp_path: Path, one: set[str]) -> None:
    with heard() as said:
        callback = fit(tmp_path, logger=Refusing())
    assert said == ["SpeedLimit could not give its figures to Refusing: OSError: no space left"]
    same_pictures(files_in(callback._folder / "figures"), callback, one)


@pytest.mark.usefixtures("one")
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:

    (tmp_path / "speed_limit").mkdir()
    (tmp_path / "speed_limit" / "figures").write_text("a file")
    with heard() as said:
        callback = fit(tmp_path)
    (message,) = said
    assert message.startswith(f"SpeedLimit could not write its figures in {tmp_path / 'speed_limit' / 'figures'}")
    assert len(callback.record) == 12


def test_a_fault_in_the_drawing_reaches_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(record: Any) -> Any:
        raise ZeroDivisionError("a fault")

    monkeypatch.setitem(figures.OF_ONE_RUN, "windows", broken)
    with heard() as said:
        callback = fit(tmp_path)
    assert said == ["SpeedLimit could not draw its figures: ZeroDivisionError: a fault"]
    assert np.isfinite(callback.record.summary().efficiency)


def test_a_logger_of_ones_own_that_shows_nothing_gets_nothing(tmp_path: Path, one: set[str]) -> None:
    class Plain(Refusing):
        experiment = None

    callback = fit(tmp_path, logger=Plain())
    same_pictures(files_in(callback._folder / "figures"), callback, one)


# --- and nothing else


def test_weights_and_random_states_are_bitwise_the_same(tmp_path: Path) -> None:
    """After two fits in a row: the second would feel what the first one's figures drew."""

    class Noisy(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (1 + 0.1 * torch.rand(()) + 0.1 * np.random.rand())  # noqa: NPY002

    def outcome(folder: Path, callbacks: Any) -> tuple[Any, ...]:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        models = [Noisy(), Noisy()]
        torch.manual_seed(2)
        for model in models:
            options = {"logger": [TensorBoardLogger(folder), CSVLogger(folder)]}
            trainer(folder, *callbacks(), **options).fit(model, loader(batches(12)))
        weights = torch.cat([flat(list(model.parameters())) for model in models])
        return weights, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    plain = outcome(tmp_path / "plain", list)
    drawn = outcome(tmp_path / "drawn", lambda: [quiet(log_figures=True)])
    assert torch.equal(plain[0], drawn[0])
    assert torch.equal(plain[1], drawn[1])
    assert plain[2:] == drawn[2:]
    assert "speed_limit/efficiency" in of_csv(tmp_path / "drawn" / "lightning_logs" / "version_3")


def test_of_two_fits_at_once_each_draws_its_own_and_neither_sees_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: set[str]
) -> None:
    """Each waits until the other trains; a third thread looks at matplotlib's settings while a file is written."""
    together, real, looked = threading.Barrier(2, timeout=60), Figure.savefig, []

    class Waiting(Regressor):
        def on_fit_start(self) -> None:
            together.wait()

    def savefig(*args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as third:
            looked.append(third.submit(dict, matplotlib.rcParams).result(60) == before)
        return real(*args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    with matplotlib.rc_context({"font.size": 30}), ThreadPoolExecutor(2) as pool:
        before = dict(matplotlib.rcParams)
        callbacks = list(pool.map(lambda i: fit(tmp_path / str(i), number=4 + i, model=Waiting()), range(2)))
        assert dict(matplotlib.rcParams) == before
    assert looked == [True, True]
    for i, callback in enumerate(callbacks):
        assert len(callback.record) == 4 + i
        (folder,) = {path.parent for path in (tmp_path / str(i)).rglob("*.png")}
        same_pictures(files_in(folder), callback, one)
