"""Trainings drawn at random are the same with SpeedLimit and without; and each kind of difference would be seen."""

import json
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from drawn_trainings import CALLBACKS, CLIPPING, COMPILED, LOGGERS, MODELS, OPTIMIZERS, SCHEDULES, VALIDATION, draw
from sixty_trainings import COUNT, Left, Tally, compare, in_what_differ, speed_limit, train

PLAIN = replace(
    draw(0),
    model="noisy",
    optimizers=("AdamW",),
    schedule="each step",
    precision="32-true",
    accumulated=1,
    clipping="norm",
    callbacks=("ModelCheckpoint",),
    validation="each epoch",
    compiled="none",
    logger="kept",
    log_every=1,
    ending="whole",
)
COUNTS = Path(__file__).with_name("sixty_trainings.json")

newer = pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="needs Lightning 2.6")


@newer
@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, COUNT, 5))
def test_a_training_is_the_same_with_and_without(tmp_path: Path, number: int) -> None:
    training = draw(number)
    found, _, callback = compare(training, tmp_path / "training", speed_limit(training))
    assert found == []
    assert training.stops_in_finder or len(callback.record) > 0


def test_the_committed_counts_are_of_the_trainings_that_are_drawn() -> None:
    counts, tally = json.loads(COUNTS.read_text()), Tally()
    for number in range(COUNT):
        for name, values in draw(number).features().items():
            tally.features[name].update(values)
    assert counts["trainings"] == counts["measured"] + counts["stopped within a finder"] == COUNT
    assert (counts["differ"], counts["differences"]) == (0, {})
    assert counts["of them"] == tally.figures()["of them"]


def test_among_them_is_everything() -> None:
    seen = {name: set() for name in draw(0).features()}
    for number in range(COUNT):
        for name, values in draw(number).features().items():
            seen[name].update(values)
    assert seen["optimizer"] == set(OPTIMIZERS)
    assert seen["callbacks"] == {*CALLBACKS, "none"}
    assert (seen["model"], seen["schedule"]) == (set(MODELS), set(SCHEDULES))
    assert (seen["clipping"], seen["validation"]) == (set(CLIPPING), set(VALIDATION))
    assert (seen["compiled"], seen["logger"]) == (set(COMPILED), set(LOGGERS))
    assert len(seen["ending"]) == 4
    assert {"probe_batches=3", "clouds=neurons", "log_figures=True", "coordinates=16"} <= seen["SpeedLimit"]


# -- the comparison can fail


class Intruder(pl.Callback):
    """Stands where SpeedLimit would, and changes one thing."""

    def __init__(self, act: Callable[[Any, Any], Any], when: str) -> None:
        setattr(self, when, self._act)
        self._does, self._done = act, False

    def _act(self, trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if not self._done:
            self._done = True
            self._does(trainer, module)


def nudge(trainer: Any, module: Any) -> None:
    with torch.no_grad():
        weight = module.head.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], weight[0, 0] + 1)


def hook(trainer: Any, module: Any) -> None:
    trainer.optimizers[0].register_step_post_hook(lambda *_: None)


def logs(trainer: Any, module: Any) -> None:
    trainer.logger.log_metrics({"train_loss": 1.0}, 1)


def handle(trainer: Any, module: Any) -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def moment(trainer: Any, module: Any) -> None:
    state = trainer.optimizers[0].state[module.head.weight]
    state["exp_avg"][0, 0] = 7.0


INTRUSIONS: dict[str, tuple[Callable[[Any, Any], Any], str, str]] = {  # what it does, when, where it is seen
    "a weight": (nudge, "on_train_batch_end", "weights/"),
    "a weight at the end": (nudge, "on_train_end", "weights/"),
    "a moment": (moment, "on_train_end", "optimizers/"),
    "a hook that stays": (hook, "on_train_start", "hooks of optimizers/"),
    "a gradient": (lambda _, module: module.zero_grad(), "on_train_batch_end", "gradients/"),
    "an attribute": (lambda _, module: setattr(module, "ours", 1), "on_train_end", "attributes"),
    "a metric": (logs, "on_train_epoch_end", "logged: "),
    "a random number of torch": (lambda *_: torch.rand(()), "on_train_end", "torch generator"),
    "a random number of numpy": (lambda *_: np.random.rand(), "on_train_end", "numpy generator/"),  # noqa: NPY002
    "a random number of Python": (lambda *_: random.random(), "on_train_end", "python generator/"),
    "the default dtype": (lambda *_: torch.set_default_dtype(torch.float64), "on_train_end", "default dtype"),
    "a filter": (lambda *_: warnings.filterwarnings("ignore", "ours"), "on_train_start", "warnings filters"),
    "a warning": (lambda *_: warnings.warn("not ours", stacklevel=1), "on_train_start", "warnings: "),
    "matplotlib's settings": (
        lambda *_: matplotlib.rcParams.update({"font.size": 4}),
        "teardown",
        "matplotlib/font.size",
    ),
    "a signal": (handle, "on_fit_start", "signal handlers/"),
    "the environment": (lambda *_: os.environ.update({"OURS": "1"}), "on_train_end", "environment: ['OURS']"),
    "an early end": (lambda trainer, _: setattr(trainer, "should_stop", True), "on_train_epoch_end", "losses: "),
    "a checkpoint": (
        lambda trainer, _: trainer.save_checkpoint(Path(trainer.default_root_dir, "again.ckpt")),
        "on_train_end",
        "checkpoints: ['again.ckpt']",
    ),
}


@pytest.fixture
def restored() -> Iterator[None]:
    """What intruders change, as it was."""
    handler, dtype, size = signal.getsignal(signal.SIGUSR2), torch.get_default_dtype(), matplotlib.rcParams["font.size"]
    yield
    signal.signal(signal.SIGUSR2, handler)
    torch.set_default_dtype(dtype)
    matplotlib.rcParams["font.size"] = size
    os.environ.pop("OURS", None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Left]:
    """A training without anything, and where it was."""
    folder = tmp_path_factory.mktemp("plain") / "training"
    return folder, train(PLAIN, folder, None)[0]


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", INTRUSIONS)
def test_a_difference_is_seen(plain: tuple[Path, Left], name: str) -> None:
    act, when, where = INTRUSIONS[name]
    folder, without = plain
    found = in_what_differ(without, train(PLAIN, folder, lambda: Intruder(act, when))[0])
    assert any(text.startswith(where) for text in found), found


def test_where_there_is_none_none_is_seen(plain: tuple[Path, Left]) -> None:
    folder, without = plain
    left, _ = train(PLAIN, folder, pl.Callback)
    assert in_what_differ(without, left) == []
    assert len(left.found["losses"]) == 18
    assert len(left.found["logged"]) > 18
    assert left.found["checkpoints"]
