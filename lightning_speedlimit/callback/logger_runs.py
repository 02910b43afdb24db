"""The logger's own run: what it is called there, what was set, and the record as one of its artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning_speedlimit.checks import guard
from lightning_speedlimit.checks.guard import look
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.writing import replace_file
from lightning_speedlimit.trajectory.description import MAX_SETTINGS, plain

FOLDER = "speed_limit"  # of MLflow's artifacts
KIND = "speed_limit"  # of W&B's
PAGE = "report.html"

Say = Callable[[str, str], None]


def described(logger: Any) -> dict[str, Any]:
    """{"class", "name", "project", "id", "tags"} of the logger's run, in plain text; what it does not tell is left out.

    By what the logger can do: its class comes from either of Lightning's packages, or from neither. W&B's run and
    MLflow's have names that people gave them; the folders of both are named by their ids.
    """
    run = look(lambda: logger.experiment, None)
    found: dict[str, Any] = {}
    if hasattr(logger, "run_id") and callable(getattr(run, "get_run", None)):  # MLflow
        found = look(_of_mlflow, {}, logger, run)
    elif hasattr(run, "log_artifact") and hasattr(run, "project"):  # W&B
        names = {"name": "name", "project": "project", "id": "id", "tags": "tags"}
        found = {ours: look(getattr, None, run, theirs) for ours, theirs in names.items()}
    tags = [str(plain(tag)) for tag in list(found.pop("tags", None) or ())[:MAX_SETTINGS]]
    texts = {key: str(plain(value)) for key, value in found.items() if value}
    return {"class": type(logger).__name__, **texts, **({"tags": tags} if tags else {})}


def _of_mlflow(logger: Any, client: Any) -> dict[str, Any]:
    run = client.get_run(logger.run_id)
    return {
        "name": run.info.run_name,
        "project": client.get_experiment(run.info.experiment_id).name,
        "id": logger.run_id,
        "tags": [f"{key}={value}" for key, value in run.data.tags.items() if not key.startswith("mlflow.")],
    }


def hyperparameters(module: Any) -> dict[str, Any]:
    """What the module saved by `save_hyperparameters`, as plain settings; of more than 50 the first."""
    given = look(lambda: dict(module.hparams), {})
    return {str(plain(name)): plain(value) for name, value in list(given.items())[:MAX_SETTINGS]}


def attach(record: RunRecord, folder: Path, loggers: Iterable[Any], say: Say) -> None:
    """Gives the record's folder, with the page of the run in it, to every logger that keeps artifacts.

    Never raises: what could not be drawn, written or taken is said.
    """
    takers = [(logger, way) for logger in loggers if (way := look(_way, None, logger)) is not None]
    if not takers:
        say(
            "log_record=True: no logger here keeps artifacts, as W&B's and MLflow's do; the record has its folder",
            "artifact",
        )
        return
    _write_page(record, folder, say)
    for logger, way in takers:
        try:
            way(logger, folder)
        except Exception as error:  # a server that is away, a disk that is full
            name = type(logger).__name__
            say(f"SpeedLimit could not give its record to {name}: {guard.told(error)}", f"artifact: {name}")


def _write_page(record: RunRecord, folder: Path, say: Say) -> None:
    try:
        from lightning_speedlimit.report import compare
        from lightning_speedlimit.report.page import page

        replace_file(folder / PAGE, page([compare(record)]).encode())
    except Exception as error:  # the extra "report" is not there, or there is no loss to show the run by
        say(f"log_record=True: the record goes without its page: {guard.told(error)}", "artifact: page")


def _way(logger: Any) -> Callable[[Any, Path], None] | None:
    run = logger.experiment
    if hasattr(logger, "run_id") and callable(getattr(run, "log_artifacts", None)):
        return _to_mlflow
    return _to_wandb if callable(getattr(run, "log_artifact", None)) and hasattr(run, "project") else None


def _to_mlflow(logger: Any, folder: Path) -> None:
    logger.experiment.log_artifacts(logger.run_id, str(folder), FOLDER)


def _to_wandb(logger: Any, folder: Path) -> None:
    import wandb

    run = logger.experiment
    artifact = wandb.Artifact(f"{KIND}-{run.id}", type=KIND)
    artifact.add_dir(str(folder))
    run.log_artifact(artifact)
