"""The figures of a run, drawn once at the end of its fit, for the loggers that show pictures; else as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.writing import replace_file

TAG = "speed_limit/figures/"
FOLDER = "figures"  # within the record's

Show = Callable[[Any, str, Any, int], None]
Say = Callable[[str, str], None]


def show(record: RunRecord, loggers: list[Any], folder: Path | None, step: int, say: Say) -> None:
    """Gives each figure to every logger that shows pictures; where there is none, writes them into the folder.

    Never raises: what could not be drawn, shown or written is said.

    Args:
        folder: the record's; None: no files.
        step: where they stand on the loggers' x-axis.
        say: message and topic, once for each topic.
    """
    try:
        from lightning_speedlimit.report import figures

        found = figures.available(record)
    except ImportError as error:
        cure = "pip install 'lightning-speedlimit[report]', or set log_figures=False"
        say(f"SpeedLimit draws no figures: {error}; {cure}", "figures")
        return
    except Exception as error:
        say(f"SpeedLimit could not draw its figures: {type(error).__name__}: {error}", "figures")
        return
    shown = [_show(logger, found, step, say) for logger in loggers]
    if not any(shown) and folder is not None:
        _write(found, folder / FOLDER, say)


def _show(logger: Any, found: dict[str, Any], step: int, say: Say) -> bool:
    """Whether the logger took them all."""
    try:
        way = _way(logger)
        if way is None:
            return False
        for name, figure in found.items():
            way(logger, name, figure, step)
    except Exception as error:  # a server that is away, a logger of the user's own
        name = type(logger).__name__
        say(f"SpeedLimit could not give its figures to {name}: {type(error).__name__}: {error}", f"figures: {name}")
        return False
    return True


def _way(logger: Any) -> Show | None:
    """How this logger takes a picture; by what it can do: its class comes from either namespace, or from neither."""
    if callable(getattr(logger, "log_image", None)):  # W&B
        return _by_image
    experiment = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_figure", None)):  # TensorBoard
        return _by_add_figure
    if callable(getattr(experiment, "log_figure", None)) and hasattr(logger, "run_id"):  # MLflow
        return _by_artifact
    return None


def _by_image(logger: Any, name: str, figure: Any, step: int) -> None:
    from lightning_speedlimit.report.figures import pixels

    logger.log_image(TAG + name, [pixels(figure)], step=step)


def _by_add_figure(logger: Any, name: str, figure: Any, step: int) -> None:
    from lightning_speedlimit.report.style import style

    with style():
        logger.experiment.add_figure(TAG + name, figure, global_step=step)


def _by_artifact(logger: Any, name: str, figure: Any, step: int) -> None:
    from lightning_speedlimit.report.style import style

    with style():
        logger.experiment.log_figure(logger.run_id, figure, f"{TAG}{name}.png")


def _write(found: dict[str, Any], folder: Path, say: Say) -> None:
    """PNG files; those of an earlier run in this folder that this run has not are deleted."""
    from lightning_speedlimit.report.figures import OF_ONE_RUN, png

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in found.items():
            replace_file(folder / f"{name}.png", png(figure))
        for name in OF_ONE_RUN.keys() - found.keys():
            (folder / f"{name}.png").unlink(missing_ok=True)
    except Exception as error:
        say(f"SpeedLimit could not write its figures in {folder}: {error}", "figures: files")
