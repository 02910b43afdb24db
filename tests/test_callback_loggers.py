"""What is in the loggers' files: the record's numbers, at the steps at which Lightning writes its own.

The oracle is the tape of the run, and Lightning's `train_loss` of the same training step.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callback_cases import Batch, ByHand, Regressor, Resumable, batches, last_row, loader, quiet, trainer
from logger_files import Metrics, of_csv, of_mlflow, of_tensorboard, of_wandb
from packaging.version import Version
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_speedlimit import RunRecord, SpeedLimit, compare
from lightning_speedlimit.callback import LOGGED

LOGS = 1e-6  # Lightning logs in float32


class Logging(Regressor):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Both(ByHand, Logging):
    """Two optimizers, both stepping in every batch: `global_step` counts two."""

    def configure_optimizers(self) -> Any:
        return [self.tape.follow(torch.optim.SGD(part.parameters(), lr=0.05)) for part in (self.first, self.second)]


def displacements(model: Regressor) -> list[float]:
    """D after each joint step, from the tape."""
    count = 1 + max(step.optimizer for step in model.tape.steps)
    by_optimizer = [[s for s in model.tape.steps if s.optimizer == o] for o in range(count)]
    squares = [[float(((s.after - steps[0].before) ** 2).sum()) for s in steps] for steps in by_optimizer]
    return [math.sqrt(sum(parts)) for parts in zip(*squares, strict=True)]


# name: (model, options of the trainer, batches of an epoch, optimizer steps at which a row is written)
CASES: dict[str, tuple[Callable[[], Logging], dict[str, Any], int, list[int]]] = {
    "plain": (Logging, {}, 12, [3, 6, 9, 12]),
    "accumulated": (Logging, {"accumulate_grad_batches": 2}, 12, [3, 6]),
    "accumulated, a short last window": (Logging, {"accumulate_grad_batches": 5}, 32, [3, 6]),
    "two optimizers": (Both, {}, 9, [3, 6, 9]),
    "validation in between": (Logging, {"val_check_interval": 4}, 12, [3, 6, 9, 12]),
    "two epochs": (Logging, {"max_epochs": 2}, 6, [3, 6, 9, 12]),
}


@pytest.mark.mode("CSVLogger and TensorBoardLogger, accumulation, several optimizers, validation", "measured")
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_lightnings_own_metrics(tmp_path: Path, case: str) -> None:
    """The k-th joint step is at x = k − 1 in every logger, and so is the train_loss of its last batch."""
    make, options, size, steps = CASES[case]
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")]
    model, callback = make(), quiet()
    run = trainer(tmp_path, callback, logger=loggers, log_every_n_steps=3, num_sanity_val_steps=0, **options)
    run.fit(model, loader(batches(size)), loader(batches(2, seed=5)))
    moved = displacements(model)
    assert run.global_step == len(model.tape.steps)
    for metrics in (of_csv(tmp_path / "csv"), of_tensorboard(tmp_path / "board")):
        own = [step for step, _ in metrics["train_loss"]]
        assert own == [step - 1 for step in steps]
        for name in LOGGED:
            assert [step for step, _ in metrics[f"speed_limit/{name}"]][: len(own)] == own, name
        found = dict(metrics["speed_limit/displacement"])
        for step in own:
            assert found[step] == pytest.approx(moved[step], rel=LOGS)
        last = max(found)  # the end of an epoch that is no log step: as Lightning's own, at its last batch
        assert found[last] == pytest.approx(moved[-1], rel=LOGS)
        assert last in (own[-1], len(moved) - 1)


def test_several_optimizers_count_several_global_steps(tmp_path: Path) -> None:
    """The record counts joint steps, as the loggers count batches."""
    model, callback = Both(), quiet()
    run = trainer(tmp_path, callback)
    run.fit(model, loader(batches(7)))
    assert run.global_step == 14
    assert last_row(callback)["step"] == 7


@pytest.mark.mode("a resumed run's loggers", "measured")
@pytest.mark.parametrize("at", [5, 8])
def test_a_resumed_runs_files_go_on(tmp_path: Path, at: int) -> None:
    """Steps and values of the two parts are, row by row, those of the uninterrupted run."""
    if Version(pl.__version__) < Version("2.5.6"):
        pytest.skip("this Lightning counts log steps anew from a checkpoint")

    def run(folder: Path, ckpt: Any = None, **options: Any) -> Metrics:
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=at, save_top_k=-1, filename="{step}")
        settings = {"max_epochs": 2, "log_every_n_steps": 3, "enable_checkpointing": True, **options}
        fit = trainer(tmp_path, quiet(), keep, logger=CSVLogger(folder), **settings)
        fit.fit(Logging(), Resumable(batches(8)), ckpt_path=ckpt)
        return of_csv(folder)

    whole = run(tmp_path / "whole")
    before = run(tmp_path / "before", max_steps=at)
    after = run(tmp_path / "after", tmp_path / f"step={at}.ckpt")
    names = [f"speed_limit/{name}" for name in LOGGED] + ["train_loss"]
    for name in names:
        parts = dict(before[name]) | dict(after[name])
        for step, value in whole[name]:  # at the end of the first part stands one row more
            assert parts[step] == pytest.approx(value, rel=LOGS, nan_ok=True), (name, step)
        assert [step for step, _ in after[name]] == [step for step, _ in whole[name] if step >= at], name


# --- MLflow and W&B


def one_fit(folder: Path, loggers: Any, **options: Any) -> Any:
    model, callback = Logging(), quiet()
    run = trainer(folder, callback, logger=loggers, log_every_n_steps=2, num_sanity_val_steps=0, **options)
    run.fit(model, loader(batches(9)), loader(batches(1)))
    return callback


def same_as_the_record(metrics: Metrics, record: RunRecord | None) -> None:
    """All numbers of all rows, NaN where the record has NaN; x is the optimizer step less one."""
    assert record is not None
    columns = record.columns
    for name in LOGGED:
        found = metrics[f"speed_limit/{name}"]
        assert [step for step, _ in found] == [step - 1 for step in columns["step"]], name
        values = np.array([value for _, value in found])
        np.testing.assert_allclose(values, columns[name], rtol=LOGS, err_msg=name)  # NaN is equal to NaN
    assert [step for step, _ in metrics["train_loss"]] == [1, 3, 5, 7]
    assert np.isnan(columns["efficiency"]).any()


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's file store is in maintenance, and says so unless told."""
    pytest.importorskip("mlflow", reason="needs mlflow-skinny: extra 'test'")
    from pytorch_lightning.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return MLFlowLogger


@pytest.mark.mode("MLFlowLogger (a local folder)", "measured", "the record lies in the run's folder")
def test_mlflow(tmp_path: Path, mlflow: Any) -> None:
    callbacks = [one_fit(tmp_path, mlflow(save_dir=str(tmp_path / "mlruns"), run_name=name)) for name in ("a", "b")]
    experiment = {path.parent for path in (tmp_path / "mlruns").glob("*/*/meta.yaml")}
    places = [run / "speed_limit" for run in (p.parent for p in (tmp_path / "mlruns").glob("*/*/metrics"))]
    assert len(experiment) == 2
    assert sorted(places) == sorted(callback._folder for callback in callbacks)  # each run keeps its own
    for callback in callbacks:
        same_as_the_record(of_mlflow(callback._folder.parent), callback.record)
        assert len(RunRecord.load(callback._folder)) == len(callback.record)


def test_the_names_and_tags_of_the_loggers_run_and_what_was_set_are_in_the_record(tmp_path: Path, mlflow: Any) -> None:
    logger = mlflow(
        experiment_name="limits", run_name="brave-hen", tags={"owner": "me"}, save_dir=str(tmp_path / "mlruns")
    )
    module = Logging()
    module.save_hyperparameters({"width": 3, "net": torch.nn.ReLU(), "rates": [0.1, 0.2]})
    callback = SpeedLimit(print_summary=False, log_figures=False)
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=2).fit(module, loader(batches(8)))
    told = RunRecord.load(callback._folder).run
    assert told["logger"] == {
        "class": "MLFlowLogger",
        "name": "brave-hen",
        "project": "limits",
        "id": logger.run_id,
        "tags": ["owner=me"],
    }
    assert told["hparams"] == {"width": 3, "net": "ReLU()", "rates": [0.1, 0.2]}
    # In a comparison a run is called by its name, and the settings that differ are told.
    other = one_fit(tmp_path, mlflow(experiment_name="limits", run_name="calm-owl", save_dir=str(tmp_path / "mlruns")))
    text = str(compare([callback._folder, other._folder], by="step"))
    assert "brave-hen" in text
    assert "calm-owl" in text
    assert logger.run_id not in text
    assert "width 3" in text


def test_a_logger_that_tells_nothing_harms_nothing(tmp_path: Path) -> None:
    class Away:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("the server is away")

    class Silent(CSVLogger):
        @property
        def experiment(self) -> Any:
            return Away()

        def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...
        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...
        def save(self) -> None: ...
        def finalize(self, status: str) -> None: ...

    callback = SpeedLimit(print_summary=False, log_record=True)
    with pytest.warns(UserWarning, match="no logger here keeps artifacts"):
        trainer(tmp_path, callback, logger=Silent(tmp_path)).fit(Logging(), loader(batches(4)))
    assert "logger" not in callback.record.run
    assert callback.record.run["model"] == "Logging"
    assert len(RunRecord.load(callback._folder)) == len(callback.record)


def test_the_record_and_its_page_are_an_artifact_of_the_run(tmp_path: Path, mlflow: Any) -> None:
    logger = mlflow(save_dir=str(tmp_path / "mlruns"), artifact_location=str(tmp_path / "artifacts"))
    callback = SpeedLimit(print_summary=False, log_figures=False, log_record=True)
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=2).fit(Logging(), loader(batches(8)))
    (kept,) = (tmp_path / "artifacts").rglob("speed_limit")
    assert len(RunRecord.load(kept)) == len(callback.record)
    assert (kept / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_mlflow_lists_its_experiments_without_a_complaint(tmp_path: Path, mlflow: Any, caplog: Any) -> None:
    """A folder of ours among its experiments would be a damaged one."""
    from mlflow.tracking import MlflowClient

    one_fit(tmp_path, mlflow(save_dir=str(tmp_path / "mlruns")))
    caplog.clear()
    names = [e.name for e in MlflowClient(f"file:{tmp_path / 'mlruns'}").search_experiments()]
    assert sorted(names) == ["Default", "lightning_logs"]
    assert "Malformed" not in caplog.text
    assert not (tmp_path / "mlruns" / "speed_limit").exists()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("wandb", reason="needs wandb: extra 'test'")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    yield lambda folder: WandbLogger(save_dir=str(folder), offline=True, project="limits")
    module.finish()
    module.teardown()


@pytest.mark.slow
@pytest.mark.mode("WandbLogger (offline)", "measured", "the record lies in project/run, beside the checkpoints")
def test_wandb(tmp_path: Path, wandb: Any) -> None:
    import wandb as module

    (tmp_path / "a").mkdir()
    callback = one_fit(tmp_path, wandb(tmp_path / "a"))
    run = module.run.id
    module.finish()
    same_as_the_record(of_wandb(tmp_path / "a"), callback.record)
    assert callback.record.run["logger"]["id"] == run
    assert callback.record.run["logger"]["project"] == "limits"
    assert callback._folder == tmp_path / "a" / "limits" / run / "speed_limit"
    assert len(RunRecord.load(callback._folder)) == len(callback.record)


@pytest.mark.slow
@pytest.mark.mode("several loggers at once", "measured", "the record lies with the first one")
def test_four_loggers_at_once(tmp_path: Path, wandb: Any, mlflow: Any) -> None:
    import wandb as module

    for name in ("csv", "board", "wandb"):
        (tmp_path / name).mkdir()
    loggers = [
        mlflow(save_dir=str(tmp_path / "mlruns")),
        CSVLogger(tmp_path / "csv"),
        wandb(tmp_path / "wandb"),
        TensorBoardLogger(tmp_path / "board"),
    ]
    callback = one_fit(tmp_path, loggers)
    module.finish()
    assert callback._folder.is_relative_to(tmp_path / "mlruns")
    same_as_the_record(of_csv(tmp_path / "csv"), callback.record)
    same_as_the_record(of_tensorboard(tmp_path / "board"), callback.record)
    same_as_the_record(of_wandb(tmp_path / "wandb"), callback.record)
    same_as_the_record(of_mlflow(tmp_path / "mlruns"), callback.record)


# --- where the record lies


@pytest.mark.parametrize(
    ("name", "version", "parts"),
    [
        ("net", 3, ["net", "version_3"]),
        ("net", "x7", ["net", "x7"]),
        (None, None, []),
        ("", 0, ["version_0"]),
    ],
)
@pytest.mark.parametrize("saves", [True, False])
def test_a_logger_of_ones_own(tmp_path: Path, name: Any, version: Any, parts: list[str], saves: bool) -> None:
    """save_dir/name/version, as ModelCheckpoint has it; in default_root_dir where the logger writes no files."""
    name_and_version = name, version

    class Own(Logger):
        save_dir = str(tmp_path / "logs") if saves else None
        name, version = name_and_version

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            pass

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    callback = quiet()
    trainer(tmp_path, callback, logger=Own()).fit(Regressor(), loader(batches(3)))
    folder = (tmp_path / "logs" if saves else tmp_path).joinpath(*parts, "speed_limit")
    assert len(RunRecord.load(folder)) == 3
