"""The end of a training's output: one thing to change, by what was followed on other tasks, and where to read more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lightning_speedlimit import RunRecord
from lightning_speedlimit.report import advise, diagnose
from lightning_speedlimit.report.advice_text import rate
from lightning_speedlimit.report.closing import closing, to_change

SGD = {"class": "SGD", "groups": [{"lr": 0.1, "momentum": 0.0}]}


def run(
    works: tuple[float, float], losses: Any = None, reasons: dict[str, str] | None = None, rows: int = 20
) -> RunRecord:
    """Rows of ten steps with these works (their own, and that which the next batch confirms) at a drop of 0.3."""
    record = RunRecord({"optimizers": [SGD], "batch_size": 16})
    for i in range(1, rows + 1):
        drop = 3.0 * i
        row = {"work_ito": 10 * works[0] * i, "work_anti_ito": 10 * works[1] * i + 0.01 * (i % 3), "loss_drop": drop}
        row |= {"loss": 99 - drop, "loss_se": 0.01, "loss_drop_se": 0.01, "samples": 160.0 * i, "straightness": 0.8}
        row |= {"conversion": 0.3 / works[0], "signal_fraction": works[1] / works[0], "steadiness": 0.8}
        record.append(10 * i, row | ({} if losses is None else losses(i)), reasons)
    return record


def noisy() -> RunRecord:
    return run((1.0, 0.35))


def test_a_rate_that_was_too_low_comes_before_the_batch() -> None:
    record = run((1.0, 0.2))  # S/C = 0.4/0.2
    assert "noise" in [finding.cause for finding in diagnose(record)]
    assert to_change(record) == rate(advise(record)).replace("±", "+/-") != ""


def test_a_loss_that_ran_away_comes_before_all() -> None:
    lost = run(
        (1.0, 0.2),
        lambda i: {"loss": math.nan, "loss_drop": math.nan} if i > 15 else {},
        {"loss": "a recorded loss is not finite"},
    )
    assert to_change(lost).startswith("Try a quarter of the learning rate")


def test_a_few_losses_that_rose_are_no_advice() -> None:
    """As of three steps by which somebody tries whether all works; of a loss that is gone there is no doubt."""
    rose = run((1.0, 0.2), lambda i: {"loss": 1.0 + i, "loss_drop": -1.0 * i, "conversion": -1.0}, rows=3)
    assert [finding.cause for finding in diagnose(rose)] == ["divergence"]
    assert to_change(rose) == ""
    longer = run((1.0, 0.2), lambda i: {"loss": 1.0 + i, "loss_drop": -1.0 * i, "conversion": -1.0}, rows=4)
    assert to_change(longer).startswith("Try a quarter of the learning rate")
    reasons = {"loss": "a recorded loss is not finite"}
    lost = run((1.0, 0.2), lambda i: {"loss": math.nan, "loss_drop": math.nan}, reasons, rows=1)
    assert to_change(lost).startswith("Try a quarter of the learning rate")


def test_it_is_the_sentence_of_the_advice() -> None:
    (noise,) = [finding for finding in diagnose(noisy()) if finding.cause == "noise"]
    assert to_change(noisy()) == noise.advice
    text = closing(noisy(), Path("logs/version_0/speed_limit"))
    assert " ".join(text.split()) == (
        f"What to change: {noise.advice} Record: logs/version_0/speed_limit "
        "More: speedlimit advise logs/version_0/speed_limit"
    )
    assert max(map(len, text.splitlines())) <= 92


@pytest.mark.parametrize("record", [RunRecord(), run((0.4, 0.3)), run((0.7, -0.1))], ids=["empty", "well", "bouncing"])
def test_where_nothing_is_known_to_help_nothing_is_said(record: RunRecord) -> None:
    """A run without a row, one whose work mostly lowered the loss, and one that bounces: no fix is known."""
    assert to_change(record) == ""
    assert closing(record, None) == ""
    assert "change" not in closing(record, Path("here"))


def test_a_folder_with_a_space_can_be_copied_into_a_shell() -> None:
    assert closing(RunRecord(), Path("my runs/a")).splitlines()[-1] == "More: speedlimit advise 'my runs/a'"
