"""`SpeedLimit(alert_after=n)`: once per finding and fit, when it has held for n log steps; and nothing else happens."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from callback_cases import Regressor, batches, loader, quiet, sgd, trainer
from logger_files import alerts_of_wandb
from pytorch_lightning.loggers import CSVLogger, Logger

from lightning_speedlimit import RunRecord, SpeedLimit
from lightning_speedlimit.callback import alerts
from lightning_speedlimit.callback.alerts import Alerts
from lightning_speedlimit.report import diagnose

ROOT = Path(__file__).parents[1]
Given = tuple[str, str]


class Alerting(Logger):
    """Keeps its alerts; `fails`: raises after that."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.given: list[Given] = []
        self.fails = fails

    @property
    def name(self) -> str:
        return "alerting"

    @property
    def version(self) -> int:
        return 0

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(alert=self._alert)

    def _alert(self, *, title: str, text: str) -> None:
        self.given.append((title, text))
        if self.fails:
            raise ConnectionError("the server is away")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keeps none."""

    def log_hyperparams(self, *given: Any, **named: Any) -> None:
        """Keeps none."""


def runs_away(folder: Path, *loggers: Logger, after: int | None = 3, **options: Any) -> SpeedLimit:
    """SGD whose rate is far too large."""
    callback = quiet(alert_after=after, dirpath=folder / "run")
    trainer(folder, callback, logger=list(loggers) or False, **options).fit(
        Regressor(sgd(lr=8.0)), loader(batches(options.pop("steps", 30)))
    )
    return callback


def begun(record: RunRecord, rows: int) -> RunRecord:
    """What the record was when it had so many rows."""
    columns = record.columns
    found = RunRecord(record.run)
    for row in range(rows):
        values = {name: float(column[row]) for name, column in columns.items() if name != "step"}
        found.append(int(columns["step"][row]), values, record.reasons)
    return found


def falls_and_stops(rows: int, *, flat_from: int) -> RunRecord:
    """A loss that falls by 0.1 a row, and from one row on no more."""
    record = RunRecord({"loss_window": 1, "optimizers": [{"class": "SGD", "groups": [{"lr": 0.1}]}]})
    for row in range(1, rows + 1):
        drop = 0.1 * min(row, flat_from)
        record.append(row, {"loss": 9 - drop, "loss_drop": drop, "loss_se": 1e-3, "loss_drop_se": 1e-3})
    return record


def looked_at(alerts: Alerts, record: RunRecord) -> None:
    """Row by row, as in a training."""
    for rows in range(1, len(record) + 1):
        alerts.look(begun(record, rows))


def refuse(message: str, key: str | None = None) -> None:
    raise AssertionError(message)


# --- in a fit


def test_a_loss_that_ran_away_is_alerted_of_once(tmp_path: Path) -> None:
    logger = Alerting()
    callback = runs_away(tmp_path, logger)
    ((title, text),) = logger.given
    assert title == "SpeedLimit: divergence"
    assert len(title) < 64, "W&B takes no more"
    assert callback.record is not None
    finding = next(f for f in diagnose(callback.record) if f.cause == "divergence")
    assert "learning rate was 8.00" in text
    assert text.endswith(f"{finding.advice} It has held for 3 log steps.")


def test_it_comes_at_the_nth_row_that_says_so(tmp_path: Path) -> None:
    """Rows of the record, judged one after the other by themselves."""
    logger, seen = Alerting(), []
    callback = quiet(alert_after=4, dirpath=tmp_path / "run")

    class Counts(Regressor):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.append(len(logger.given))

    trainer(tmp_path, callback, logger=logger).fit(Counts(sgd(lr=1.2)), loader(batches(30)))
    assert callback.record is not None
    held = [
        any(f.cause == "divergence" for f in diagnose(begun(callback.record, rows)))
        for rows in range(1, len(callback.record) + 1)
    ]
    first = next(row for row in range(4, 31) if all(held[row - 4 : row]))
    assert seen.index(1) == first, "the alert came at the end of that row's batch"


def test_no_alert_is_given_by_itself(tmp_path: Path) -> None:
    logger = Alerting()
    runs_away(tmp_path, logger, after=None)
    assert logger.given == []


class Blown(Regressor):
    """Its loss is multiplied from one batch on; `stops`: raises some batches later."""

    def __init__(self, factor: float, *, at: int, stops: int | None = None) -> None:
        super().__init__(sgd(lr=0.05))
        self.factor, self.at, self.stops = factor, at, stops

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.stops is not None and batch_idx == self.at + self.stops:
            raise FloatingPointError("the loss is not finite")
        return loss * self.factor if batch_idx >= self.at else loss


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize(("every", "stops"), [(50, None), (10, None), (50, 3)])
def test_one_that_blows_up_before_the_first_row_is_alerted_of(
    tmp_path: Path, factor: float, every: int, stops: int | None
) -> None:
    """However few log steps there are until the fit ends, by itself or by an exception."""
    logger, callback = Alerting(), quiet(alert_after=4, dirpath=tmp_path / "run")
    run = trainer(tmp_path, callback, logger=logger, log_every_n_steps=every)
    with pytest.raises(FloatingPointError) if stops else contextlib.nullcontext():
        run.fit(Blown(factor, at=2, stops=stops), loader(batches(20)))
    ((title, text),) = logger.given
    assert title == "SpeedLimit: divergence"
    assert "of the fit" in text or "It held at the fit's last log step." in text


def test_a_fit_that_ends_well_is_alerted_of_nothing(tmp_path: Path) -> None:
    logger, callback = Alerting(), quiet(alert_after=4, dirpath=tmp_path / "run")
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=5).fit(Regressor(sgd(lr=0.02)), loader(batches(30)))
    assert logger.given == []


def test_what_was_alerted_of_is_not_repeated_at_the_end() -> None:
    logger = Alerting()
    alerts_of = Alerts(2, [logger], refuse)
    record = RunRecord({"loss_window": 1})
    for row in range(1, 4):
        record.append(row, {"loss": 9.0 + row, "loss_drop": -float(row), "loss_se": 1e-3, "loss_drop_se": 1e-3})
        alerts_of.look(record)
    alerts_of.conclude()
    alerts_of.conclude()
    assert len(logger.given) == 1


def test_a_plateau_that_has_just_begun_is_none_of_the_ends(tmp_path: Path) -> None:
    logger = Alerting()
    found = Alerts(1000, [logger], refuse)
    looked_at(found, falls_and_stops(120, flat_from=40))
    found.conclude()
    assert logger.given == []


def test_a_start_that_is_rounded_off_is_not_told() -> None:
    record = RunRecord({"loss_window": 1})
    for row, loss in enumerate((2.0, 1e8, 1e20), 1):
        record.append(row, {"loss": loss, "loss_drop": 2.0 - loss, "loss_se": 1e-3, "loss_drop_se": 1e-3})
    (finding,) = [f for f in diagnose(record) if f.cause == "divergence"]
    assert "The loss rose to 1.00e+20" in finding.sentence
    assert "loss_start" not in finding.evidence
    (finding,) = [f for f in diagnose(begun(record, 2)) if f.cause == "divergence"]
    assert "The loss rose from 2" in finding.sentence


def test_a_fit_after_it_alerts_again(tmp_path: Path) -> None:
    logger = Alerting()
    callback = quiet(alert_after=2, dirpath=tmp_path / "run")
    for _ in range(2):
        trainer(tmp_path, callback, logger=logger).fit(Regressor(sgd(lr=8.0)), loader(batches(20)))
    assert [title for title, _ in logger.given] == ["SpeedLimit: divergence"] * 2


def test_without_such_a_logger_it_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"SpeedLimit: divergence\. The loss .*held for 3 log steps") as found:
        runs_away(tmp_path, CSVLogger(tmp_path))
    assert len([w for w in found if "divergence" in str(w.message)]) == 1


def test_one_logger_of_two_is_enough(tmp_path: Path) -> None:
    logger = Alerting()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*divergence.*")
        runs_away(tmp_path, CSVLogger(tmp_path), logger)
    assert len(logger.given) == 1


def test_a_server_that_is_away_ends_nothing(tmp_path: Path) -> None:
    """What it would have said is a warning then; and both are said once."""
    logger = Alerting(fails=True)
    with pytest.warns(UserWarning, match="could not give its alert to Alerting.*the server is away") as found:
        callback = runs_away(tmp_path, logger)
    assert len([w for w in found if "divergence" in str(w.message)]) == 1
    assert len(logger.given) == 1
    assert callback.record is not None
    assert len(callback.record) == 30


def test_a_judgement_that_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(record: RunRecord) -> dict[str, str]:
        raise OverflowError("too large")

    monkeypatch.setattr(alerts, "_on_the_course", fail)
    with pytest.warns(UserWarning, match="could not look for what to alert of.*too large") as found:
        callback = runs_away(tmp_path)
    assert len([w for w in found if "alert" in str(w.message)]) == 1
    assert callback.record is not None
    assert len(callback.record) == 30


def test_a_process_that_writes_nothing_alerts_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, callback = Alerting(), quiet(alert_after=1, dirpath=tmp_path / "run")
    run = trainer(tmp_path, callback, logger=logger)
    monkeypatch.setattr(type(run), "is_global_zero", property(lambda self: False))
    run.fit(Regressor(sgd(lr=8.0)), loader(batches(10)))
    assert callback.record is not None
    assert len(callback.record) == 10
    assert logger.given == []


# --- by rows


def test_a_loss_that_stopped_falling(tmp_path: Path) -> None:
    logger = Alerting()
    looked_at(Alerts(5, [logger], refuse), falls_and_stops(120, flat_from=40))
    ((title, text),) = logger.given
    assert title == "SpeedLimit: plateau"
    assert text.startswith("The loss stopped falling at step ")
    assert text.endswith("It has held for 5 log steps.")


def test_a_loss_that_falls_is_none(tmp_path: Path) -> None:
    logger = Alerting()
    looked_at(Alerts(1, [logger], refuse), falls_and_stops(60, flat_from=60))
    assert logger.given == []


def test_what_is_over_in_between_counts_anew() -> None:
    """Three times two rows of a loss beyond its start are no four."""
    record = RunRecord({"loss_window": 1})
    for row in range(1, 19):
        drop = -5.0 if row % 6 in (4, 5) else 0.1 * row
        record.append(row, {"loss": 9 - drop, "loss_drop": drop, "loss_se": 1e-3, "loss_drop_se": 1e-3})
    for after, expected in ((2, 1), (3, 0)):
        logger = Alerting()
        looked_at(Alerts(after, [logger], refuse), record)
        assert len(logger.given) == expected, after


def test_a_loss_that_is_not_finite() -> None:
    record, logger = falls_and_stops(10, flat_from=10), Alerting()
    watch = Alerts(2, [logger], refuse)
    looked_at(watch, record)
    for row in (11, 12):
        record.append(row, {"loss": math.nan, "loss_drop": math.nan}, {"loss": "a recorded loss was not finite"})
        watch.look(record)
    assert logger.given == [
        (
            "SpeedLimit: divergence",
            "The loss became NaN or infinite between steps 10 and 11; it began at 9.00. Try a quarter of the learning "
            "rate: it cured 9 of 9 runs that had run away; a value in the data that is not finite does it too. It has "
            "held for 2 log steps.",
        )
    ]


def test_both_findings_are_given() -> None:
    record, logger = falls_and_stops(120, flat_from=40), Alerting()
    watch = Alerts(1, [logger], refuse)
    looked_at(watch, record)
    record.append(121, {"loss": 50.0, "loss_drop": -41.0, "loss_se": 1e-3, "loss_drop_se": 1e-3})
    watch.look(record)
    assert [title for title, _ in logger.given] == ["SpeedLimit: plateau", "SpeedLimit: divergence"]
    assert "held" not in logger.given[0][1], "one row is no time"


# --- with what is installed


def test_what_it_judges_by_needs_nothing_of_the_extra() -> None:
    """Where the extra "report" is not installed."""
    program = """
import sys
for name in ("matplotlib", "scipy", "jinja2", "rich", "typer", "pytorch_lightning", "lightning"):
    sys.modules[name] = None
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.report.findings import JudgedRun
from lightning_speedlimit.report.findings_of_course import plateaued, rose
record = RunRecord({"loss_window": 1})
for row in range(1, 9):
    record.append(row, {"loss": 1.0 + row, "loss_drop": -1.0 * row, "loss_se": 0.01, "loss_drop_se": 0.01})
run = JudgedRun({}, record)
print(rose(run)[0].cause, plateaued(run))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert (done.stdout, done.returncode) == ("divergence []\n", 0), done.stderr


@pytest.mark.slow
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the file that W&B's own run wrote."""
    module = pytest.importorskip("wandb", reason="needs wandb: extra 'test'")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    runs_away(tmp_path, WandbLogger(save_dir=str(tmp_path), offline=True, project="limits"))
    module.finish()
    module.teardown()
    ((title, text),) = alerts_of_wandb(tmp_path)
    assert title == "SpeedLimit: divergence"
    assert text.startswith("The loss ")
