"""A loss that ran away, one that stopped falling, clipped gradients: small runs, recomputed by plain numpy; and what is
none of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lightning_speedlimit import RunRecord, TrajectoryMeter
from lightning_speedlimit.report import course, diagnose
from lightning_speedlimit.report.course import clipped, divergence, plateau
from lightning_speedlimit.report.findings import Finding

Values = npt.NDArray[np.float64]
WINDOW = 20  # losses at each end of the runs


# --- runs


def regression(
    lr: float,
    steps: int,
    *,
    every: int = 50,
    momentum: float = 0.0,
    hidden: int = 0,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    batch: int = 16,
) -> tuple[RunRecord, list[float]]:
    """Batches of y = Σx + noise of variance 1, so that the loss levels off at 1; and the losses of the steps."""
    torch.manual_seed(0)
    layers = (
        [torch.nn.Linear(8, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1)] if hidden else [torch.nn.Linear(8, 1)]
    )
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    scheduler = None if schedule is None else schedule(optimizer)
    meter = TrajectoryMeter(optimizer, loss_window=WINDOW)
    record, losses = RunRecord(meter.description() | {"batch_size": batch, "loss_window": WINDOW}), []
    for step in range(1, steps + 1):
        x = torch.randn(batch, 8)
        loss = ((model(x) - x.sum(1, keepdim=True) - torch.randn(batch, 1)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        meter.record_loss(loss.detach())
        if clip is not None:
            meter.observe_gradients(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if step % every == 0:
            record.take(meter)
    return record, losses


def cosine(steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def rows(loss: Values, every: int = 50, *, start: float = 2.0, error: float = 0.01, **more: Values) -> RunRecord:
    """A record of these losses alone."""
    record = RunRecord({"loss_window": 50})
    for i, value in enumerate(loss):
        row = {"loss": float(value), "loss_se": error, "loss_drop": start - float(value), "loss_drop_se": error}
        record.append((i + 1) * every, row | {name: float(column[i]) for name, column in more.items()})
    return record


def noisy(curve: Values, spread: float, seed: int = 0) -> Values:
    return curve + np.random.default_rng(seed).normal(0.0, spread, len(curve))


def only(record: RunRecord, cause: str) -> Finding:
    (found,) = [finding for finding in diagnose(record) if finding.cause == cause]
    return found


# --- a plateau


def by_numpy(record: RunRecord) -> tuple[int, float, float] | None:
    """First step of the plateau, its fall and error, by the definition."""
    steps, losses = record.columns["step"].astype(float), record.columns["loss"]
    start = losses[-1] + record.columns["loss_drop"][-1]
    drop = start - losses.min()
    kept = [len(steps) - 1]
    while (earlier := steps[steps <= steps[kept[0]] - record.run["loss_window"]]).size:
        kept.insert(0, int(np.flatnonzero(steps == earlier[-1])[0]))
    steps, losses = steps[kept], losses[kept]
    for i in range(len(steps) - 8):
        y, third = losses[i:], (len(steps) - i) // 3
        parts = np.split(y, [third, len(y) - third])
        scatter = math.sqrt(sum(part.var() * len(part) for part in parts) / (len(y) - 3))
        falls = [parts[0].mean() - part.mean() for part in parts[1:]]
        error = scatter * math.sqrt(1 / third + 1 / third)
        if steps[-1] - steps[i] < 0.25 * steps[-1] or max(falls) > max(error, 0.005 * drop):
            continue
        most, level = max(0.0, *falls) + 2 * error, parts[0].mean()
        if -falls[1] > 0.05 * drop:
            continue
        if most <= min(0.05 * drop, 0.1 * abs(level)) and y[0] <= level + 2 * scatter + 0.005 * drop:
            return int(steps[i]), float(falls[1]), float(error)
    return None


def test_a_plateau_before_the_schedule_falls() -> None:
    """The loss is at its floor, the noise of the targets, while a cosine is near its top."""
    record, losses = regression(0.016, 500, every=WINDOW, batch=256, schedule=cosine(500))
    found = plateau(record)
    assert found is not None
    step, fall, error = by_numpy(record) or (0, 0.0, 0.0)
    assert (found.step, found.fall, found.error) == (
        step,
        pytest.approx(fall, rel=1e-6),
        pytest.approx(error, rel=1e-6),
    )
    assert np.mean(losses[found.step :]) == pytest.approx(1.0, abs=0.05), "the variance of the targets' noise"
    assert np.mean(losses[: found.step // 2]) > 1.2
    rate = 0.5 * (1 + math.cos(math.pi * found.step / 500))
    assert rate > 0.9
    finding = only(record, "plateau")
    assert finding.sentence.startswith(f"The loss stopped falling at step {found.step}, with the learning rate at 0.9")
    assert finding.evidence["rate_kept"] == pytest.approx(rate, rel=0.01)  # the first row is not at the very top
    assert finding.evidence["steps_since"] == 500 - found.step
    for other in diagnose(record):
        assert "too early" not in other.sentence + other.advice
        assert "as the learning rate fell" not in other.sentence


def test_a_plateau_costs_the_time_since() -> None:
    """Of two halves of the time one was for nothing: ln 2, after a conversion of 0.4 and before one of 0.6."""
    flat = noisy(np.where(np.arange(1, 41) <= 20, 2.0 - 0.08 * np.arange(1, 41), 0.4), 0.001)
    for conversion, wanted in ((0.4, ["noise", "plateau"]), (0.499, ["noise", "plateau"]), (0.6, ["plateau"])):
        work = {"conversion": conversion, "signal_fraction": conversion, "work_ito": 1.0, "straightness": 0.9}
        record = rows(flat, steadiness=np.full(40, 0.9), **{n: np.full(40, v) for n, v in work.items()})
        assert [finding.cause for finding in diagnose(record)] == wanted
    found = plateau(record)
    assert found is not None
    assert abs(found.step - 1000) <= 50


@pytest.mark.parametrize("seed", range(5))
def test_where_a_plateau_begins(seed: int) -> None:
    """An exponential with time 200 that levels off at 0.5: within noise of 0.01 it has by 4 to 8 of these."""
    record = rows(noisy(0.5 + 1.5 * np.exp(-np.arange(1, 81) * 50 / 200), 0.01, seed))
    found = plateau(record)
    assert found is not None
    assert 500 <= found.step <= 1600
    assert found.drop == pytest.approx(2.0 - record.columns["loss"].min())
    assert (found.step, found.fall, found.error) == pytest.approx(by_numpy(record), rel=1e-6)


K = np.arange(1, 81) * 50.0
STILL_FALLING = {
    "linear": 2.0 - 0.0004 * K,
    "exponential": 0.3 + 1.7 * np.exp(-K / 1500),
    "to zero": 2.0 * np.exp(-K / 300),
    "power law": 2.0 * (1 + K / 50) ** -0.3,
    "of language": 3 + 7 * (1 + K) ** -0.25,
    "falls again when the rate does": np.where(K < 2000, 1.0, 1.0 - 0.0004 * (K - 2000)),
    "a short rest": np.where(K < 3400, 2.0 - 0.0004 * K, 0.64),
    "rises at last": 0.5 + np.abs(K - 2500) / 2500,
}


@pytest.mark.parametrize("spread", [0.0, 0.003, 0.02])
@pytest.mark.parametrize("name", STILL_FALLING)
def test_what_still_falls_is_on_no_plateau(name: str, spread: float) -> None:
    for seed in range(20):
        assert plateau(rows(noisy(STILL_FALLING[name], spread, seed))) is None, seed


def test_noise_is_no_plateau() -> None:
    """Where the losses scatter by a fifth of all that they fell, a stop can't be told from a fall."""
    flat = np.full(80, 1.0)
    assert plateau(rows(noisy(flat, 0.01))) is not None
    for seed in range(20):
        assert plateau(rows(noisy(flat, 0.4, seed))) is None


def test_too_few_rows_tell_nothing() -> None:
    flat = noisy(np.r_[1.5, np.full(course.FEWEST_ROWS, 1.0)], 0.001)
    assert plateau(rows(flat)) is not None
    assert plateau(rows(flat[:-1])) is None
    assert plateau(RunRecord()) is None
    assert plateau(rows(np.full(20, math.nan))) is None
    # Fifty losses make one value: rows every ten steps share them, and are thinned.
    close = noisy(np.r_[np.full(5, 1.5), np.full(24, 1.0)], 0.001)
    assert plateau(rows(close, every=10)) is None
    assert plateau(rows(close, every=50)) is not None


def test_a_plateau_is_looked_for_up_to_where_the_run_is_looked_at() -> None:
    record = rows(noisy(np.where(K < 2000, 1.0, 1.0 - 0.0004 * (K - 2000)), 0.002))
    found = plateau(record, 2000)
    assert found is not None
    assert found.step <= 100
    assert plateau(record) is None


# --- a loss that ran away


def test_a_run_whose_loss_is_no_number_any_more() -> None:
    """Rate 0.4 on a network: it blows up, and the loss is beyond float32."""
    record, losses = regression(0.4, 100, every=10, hidden=16)
    assert not math.isfinite(losses[-1])
    first = next(i for i, loss in enumerate(losses) if not math.isfinite(loss)) + 1  # the step
    found = divergence(record)
    assert found is not None
    assert found.step - 10 < first <= found.step
    assert math.isnan(found.loss)
    (finding,) = diagnose(record)
    assert finding.cause == "divergence"
    assert found.lost is not None
    assert found.lost.after < first <= found.lost.by == found.lost.after + 10
    assert finding.sentence.startswith(f"The loss became NaN or infinite between steps {found.lost.after} and ")
    assert f"{found.lost.by}, where the learning rate was 0.4" in finding.sentence
    assert finding.advice.startswith("Try a quarter of the learning rate")
    assert "data" in finding.advice


def test_a_run_that_ends_beyond_its_start() -> None:
    """Momentum 0.9 at a rate of 0.3: an oscillation that grows, as the losses show."""
    record, losses = regression(0.3, 100, every=10, momentum=0.9)
    found = divergence(record)
    assert found is not None
    columns = record.columns
    surely = columns["loss_drop"] < -3 * columns["loss_drop_se"]
    assert found.step <= columns["step"][np.flatnonzero(surely)[0]]
    assert min(losses[found.step :]) > 3 * losses[0]
    finding = only(record, "divergence")
    assert finding.sentence.startswith("The loss rose from ")
    assert finding.evidence["loss"] == columns["loss"][-1] > 1e4 * losses[0]
    assert finding.advice == "Try a quarter of the learning rate: it cured 9 of 9 runs that had run away."
    assert {f.cause for f in diagnose(record)} == {"divergence"}, "of its works nothing can be said"


def test_a_run_whose_last_losses_put_the_line_far_below_0() -> None:
    """The same at 0.25: losses up to 5,000; a line through the last of an oscillation may end at −2,000."""
    record, losses = regression(0.25, 100, every=10, momentum=0.9)
    last = {name: float(column[-1]) for name, column in record.columns.items() if name != "step"}
    assert last["loss"] > 1000
    assert min(losses) > 0
    below = {"loss": -2000.0, "loss_drop": last["loss_drop"] + last["loss"] + 2000.0}
    record.append(100, last | below)
    assert only(record, "divergence").sentence.startswith("The loss ran away from step ")


def test_a_run_that_blew_up_within_its_first_rows() -> None:
    """Cross entropy at a rate of 300: the losses from which its start is told are thousands, and it ends lower."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    truth = torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=300.0, momentum=0.9)
    meter = TrajectoryMeter(optimizer, loss_window=WINDOW)
    record, losses, work = RunRecord(meter.description() | {"loss_window": WINDOW}), [], 0.0
    for step in range(1, 101):
        x = torch.rand(16, 8)
        loss = torch.nn.functional.cross_entropy(model(x), (x @ truth).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        meter.record_loss(loss.detach())
        optimizer.step()
        losses.append(float(loss.detach()))
        for p, old in zip(model.parameters(), before, strict=True):
            assert p.grad is not None
            work -= float((p.grad.double() * (p.detach().double() - old.double())).sum())
        if step % WINDOW == 0:
            record.take(meter)
    assert losses[0] < 2
    assert record.columns["loss_drop"][-1] > 0, "by the losses from which the start is told it fell"
    assert np.mean(losses[50:]) > 10 * losses[0]
    found = divergence(record)
    assert found is not None
    assert found.step == WINDOW
    assert found.work == pytest.approx(work / 100, rel=1e-4)
    (finding,) = diagnose(record)
    assert "a step's work along its gradient is" in finding.sentence
    assert "began" not in finding.sentence, "which is not known"


@pytest.mark.parametrize("rate", [0.5, 1.0, 1.9])
def test_single_long_steps_are_no_divergence(rate: float) -> None:
    """Descent in a bowl up to the edge: a step's work is up to 4 times the loss."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=rate)
    meter = TrajectoryMeter(optimizer, loss_window=2)
    record = RunRecord(meter.description() | {"loss_window": 2})
    for _ in range(4):
        loss = 0.5 * (weight**2).sum()
        optimizer.zero_grad()
        loss.backward()
        meter.record_loss(loss.detach())
        optimizer.step()
        record.take(meter)
        assert divergence(record) is None


def test_a_loss_that_wild_losses_put_anywhere() -> None:
    """A line through them ends far below 0: once told as "loss −7.6e7", without a word."""
    loss, error = np.r_[np.linspace(1.8, 1.0, 10), -3e3, -7.6e7], np.r_[np.full(10, 0.01), 4e3, 2e8]
    record = RunRecord({"loss_window": 50})
    for i, (value, se) in enumerate(zip(loss, error, strict=True), 1):
        record.append(50 * i, {"loss": value, "loss_se": se, "loss_drop": 2 - value, "loss_drop_se": se})
    found = divergence(record)
    assert found is not None
    assert (found.step, found.start, found.loss, found.error, found.start_error) == (550, 2.0, -7.6e7, 2e8, 0.0)
    finding = only(record, "divergence")
    assert finding.sentence == (
        "The loss ran away from step 550 on: it scatters so that it is known to 2.00e+08 alone, and it began at 2.00."
    )
    assert divergence(record, 500) is None
    assert plateau(record, 500) is None


FINE = {
    "falls": (np.linspace(1.9, 0.5, 20), np.full(20, 0.05)),
    "noise as large as the loss": (noisy(np.full(20, 1.9), 1.0), np.full(20, 1.0)),
    "not known to itself from the start on": (np.full(20, 1.9), np.full(20, 3.0)),
    "rises within its error": (np.linspace(2.0, 2.1, 20), np.full(20, 0.05)),
    "a spike that went by": (np.r_[np.linspace(1.9, 1.0, 10), 50.0, np.linspace(1.0, 0.5, 9)], np.full(20, 0.05)),
    "noisier as it goes": (np.linspace(1.9, 0.5, 20), np.linspace(0.01, 0.9, 20)),
}


@pytest.mark.parametrize("name", FINE)
def test_what_did_not_run_away(name: str) -> None:
    record = RunRecord()
    for i, (value, error) in enumerate(zip(*FINE[name], strict=True), 1):
        record.append(50 * i, {"loss": value, "loss_se": error, "loss_drop": 2 - value, "loss_drop_se": error})
    assert divergence(record) is None
    assert divergence(RunRecord()) is None


def test_an_unknown_loss_is_no_divergence() -> None:
    """A probe that was given up, a metric that was not logged: no loss, and no word of one that is not finite."""
    record = rows(np.r_[1.5, math.nan])
    assert divergence(record) is None
    record.append(150, {"loss": math.nan, "loss_drop": math.nan}, {"loss": "a recorded loss is not finite"})
    found = divergence(record)
    assert found is not None
    assert found.step == 100


def test_a_loss_that_is_climbed_runs_away_downwards() -> None:
    run = {"optimizers": [{"class": "SGD", "groups": [{"lr": 0.1, "maximize": True}]}]}
    up, down = RunRecord(run), RunRecord(run)
    for record, sign in ((up, 1.0), (down, -1.0)):
        for i in range(1, 11):
            row = {"loss": sign * 10.0 * i, "loss_se": 0.1, "loss_drop": sign * 10.0 * i, "loss_drop_se": 0.1}
            record.append(10 * i, row)
    assert divergence(up) is None
    found = divergence(down)
    assert found is not None
    assert (found.step, found.start, found.loss, found.error) == (10, 0.0, 100.0, 0.1)


# --- clipping


def test_clipped_gradients_are_counted() -> None:
    record, _ = regression(0.01, 150, every=5, clip=1.0)
    norms, after = record.columns["grad_norm"], record.columns["grad_norm_clipped"]
    assert np.allclose(after, np.minimum(norms, 1.0), rtol=1e-5)
    found = clipped(record)
    assert found is not None
    assert found.share == pytest.approx(np.mean(norms > 1.0))
    assert found.kept == pytest.approx(np.median(1.0 / norms[norms > 1.0]), rel=1e-5)
    assert found.share > 0.5
    assert only(record, "clipping").evidence["clipped_share"] == found.share


def test_seldom_clipped_or_never_is_no_finding() -> None:
    norms = np.linspace(0.5, 1.5, 20)
    for limit, share in ((1.0, 0.5), (1.05, 0.45), (2.0, 0.0)):
        record = rows(np.linspace(1.9, 1.0, 20), grad_norm=norms, grad_norm_clipped=np.minimum(norms, limit))
        found = clipped(record)
        assert (found.share if found else 0.0) == pytest.approx(share)
        assert ("clipping" in [finding.cause for finding in diagnose(record)]) == (share >= 0.5)
    assert clipped(rows(np.ones(3))) is None


def test_no_row_is_missed_by_looking_at_all_at_once() -> None:
    """Against each row by itself, of losses with and without a floor, at several sizes."""
    draw, some = np.random.default_rng(0), 0
    for trial in range(300):
        rows = int(draw.integers(9, 60))
        fall = np.exp(-np.arange(rows) / draw.uniform(1, rows))
        y = draw.choice([1e-3, 1.0, 1e6]) * (draw.choice([0.0, 1.0, 100.0]) + fall + draw.normal(0, 0.01, rows))
        drop = float(y.max() - y.min()) or 1.0
        found = [i for i in range(rows - course.FEWEST_ROWS + 1) if course._flat(y[i:], drop) is not None]
        assert set(found) <= set(course._perhaps_flat(y, drop)), trial
        some += bool(found)
    assert 10 < some < 290
