"""Trainings at a pace, and what the work balance of one says that a decay will gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from lab import Row
from sets import Set
from torch import Tensor
from torch.optim import Adam, Optimizer
from trainings import Run, Training

PACES = ("constant", "linear", "cosine", "constant speed", "falling speed")
INERTIA = {"SGD": 0.0, "momentum": 0.9, "Adam": 0.9}
LOOKS, ROWS = 50, 25  # of a run with a schedule
PROBED = 2000  # training samples whose loss tells the gain

# --- schedules


def direction_length(optimizer: Optimizer) -> float:
    """‖u‖ / lr of the step to come, from the gradients as they are; SGD with and without momentum, Adam."""
    squares = [
        direction(group, optimizer.state.get(p, {}), p.grad, isinstance(optimizer, Adam)).square().sum()
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return math.sqrt(float(torch.stack(squares).sum()))


def direction(group: Mapping[str, Any], state: Mapping[str, Any], g: Tensor, adam: bool) -> Tensor:
    if not adam:
        return group["momentum"] * state["momentum_buffer"] + g if state.get("momentum_buffer") is not None else g
    (b1, b2), t = group["betas"], float(state.get("step", 0)) + 1
    m = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    v = b2 * state.get("exp_avg_sq", 0.0) + (1 - b2) * g * g
    return m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"])


def keep_speed(run: Run, *, falling: bool) -> None:
    """The rate that makes the coming step as long as the training's `rate` says, or falling linearly to 0."""
    length = run.training.rate * (1.0 - run.step / run.training.steps if falling else 1.0)
    set_rate(run, length / direction_length(run.optimizer))


def set_rate(run: Run, rate: float) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = rate


def begun(training: Training, pace: str, data: Set, *, measured: bool) -> Run:
    """A run at this pace; of a speed the training's rate is the length of a step, parameter units."""
    by_rate = "speed" not in pace
    run = Run(replace(training, schedule=pace if by_rate else "constant"), data, measured=measured)
    if not by_rate:
        run.control = lambda run: keep_speed(run, falling=pace == "falling speed")
    return run


def ended(run: Run) -> float:
    """Held-out loss at the end, the mean of five looks; NaN where it diverged."""
    whole = run.step == run.training.steps and not run.course.diverged
    return fmean(run.course.losses[-5:]) if whole else math.nan


def scheduled(training: Training, pace: str, data: Set) -> Row:
    """A run, measured: its end, its course, and what its last fifth did on noise."""
    run = begun(training, pace, data, measured=True).go(rows=ROWS, looks=LOOKS)
    columns = run.record.columns
    named = ("steadiness", "straightness", "kinematic_efficiency", "conversion", "displacement", "action")
    row: Row = {"end": ended(run)} | {name: float(columns[name][-1]) for name in named}
    last = balance(columns, round(0.8 * training.steps), training.steps)
    row |= {"last_noise": last.noise, "last_work": last.work}
    return row | {"losses": shortened(run.course.losses), "actions": shortened(columns["action"])}


def shortened(values: Any) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in map(float, values)]


# --- the work balance, and what it predicts


@dataclass(frozen=True)
class Balance:
    """Of a stretch of `steps`: work Σ f·u, drop of the mean loss, N, C; loss units."""

    steps: int
    work: float
    drop: float
    noise: float
    curvature: float

    def dropping(self, drop: float) -> Balance:
        """With another drop of the loss and the same W and a: N = W + a − 2d, C = 2(d − a)."""
        less = 2 * (self.drop - drop)
        return Balance(self.steps, self.work, drop, self.noise + less, self.curvature - less)


def balance(columns: Mapping[str, Any], after: int, to: int) -> Balance:
    """N = W + a − 2d and C = 2(d − a) between the rows of two steps."""
    steps = columns["step"].tolist()
    i, j = (min(range(len(steps)), key=lambda row, step=step: abs(steps[row] - step)) for step in (after, to))
    work, confirmed, drop = (
        float(columns[name][j] - columns[name][i]) for name in ("work_ito", "work_anti_ito", "loss_drop")
    )
    return Balance(steps[j] - steps[i], work, drop, work + confirmed - 2 * drop, 2 * (drop - confirmed))


def excess(share: Callable[[int], float], steps: int, start: float, c: float, source: float) -> float:
    """E after so many steps of E ← (1 − s c)² E + s² source, s = share(step)."""
    found = start
    for step in range(steps):
        s = share(step)
        found = (1 - s * c) ** 2 * found + s * s * source
    return found


@dataclass(frozen=True)
class Promise:
    """Of a decay, nats: gain, and what of it noise's excess loss is; simple: a quarter of a step's noise work."""

    gain: float
    noise: float
    simple: float


def promised(found: Balance, inertia: float, before: int, tail: int) -> Promise:
    """What a linear decay over the next `tail` steps takes off the loss, from a stretch of the `before` steps so far.

    c = (1 + β) C/W, E ← (1 − s c)² E + s² c N/(2(1 − β) n). NaN where no noise, or no curvature, can be told.
    """
    if not (found.noise > 0 and found.curvature > 0 and found.work > 0):
        return Promise(math.nan, math.nan, math.nan)
    c = (1 + inertia) * found.curvature / found.work
    per_step = found.noise / ((1 - inertia) * found.steps)
    source = c * per_step / 2
    now = excess(lambda step: 1.0, before, 0.0, c, source)
    kept = excess(lambda step: 1.0, tail, now, c, source)
    noise = kept - excess(lambda step: 1.0 - step / tail, tail, now, c, source)
    given_up = found.drop / found.steps * (tail - 1) / 2
    return Promise(noise - given_up, noise, per_step / 4)


def gained(training: Training, tail: int, data: Set) -> Row:
    """Two runs that are the same for `steps` − `tail` steps: at the constant rate to the end, and decayed."""
    before = training.steps - tail
    kept, fallen = (Run(training, data, measured=measured) for measured in (True, False))
    fallen.control = lambda run: set_rate(run, training.rate * min(1.0, 1.0 - (run.step - before) / tail))
    losses = [run_out(run, tail) for run in (kept, fallen)]
    found = balance(kept.record.columns, before - tail, before)
    row = {"tail": tail, "gain": losses[0].loss - losses[1].loss, "held_gain": losses[0].held - losses[1].held}
    row |= {"smooth_drop": smooth_drop(losses[1].batches, before, tail)}
    return row | {
        "work": found.work,
        "drop": found.drop,
        "noise": found.noise,
        "curvature": found.curvature,
    }


def smooth_drop(batches: list[float], before: int, tail: int) -> float:
    """By how much the mean of tail/2 batches' losses fell in the `tail` steps before step `before`."""
    then, now = (fmean(batches[end - tail // 2 : end]) for end in (before - tail, before))
    return then - now


def promise_of(row: Row, *, smoothed: bool = False) -> Promise:
    """Of a row of `gained`; smoothed: d is that of the batches' mean losses instead of the record's."""
    known = (math.nan if row[name] is None else row[name] for name in ("work", "drop", "noise", "curvature"))
    found = Balance(row["tail"], *known)
    found = found.dropping(row["smooth_drop"]) if smoothed else found
    return promised(found, INERTIA[row["optimizer"]], row["steps"] - row["tail"], row["tail"])


@dataclass(frozen=True)
class End:
    """Losses of a part of the training samples and of the held-out ones; and of each batch."""

    loss: float
    held: float
    batches: list[float]


def run_out(run: Run, tail: int) -> End:
    """To the end: decayed the losses there, at the constant rate means over looks in the last fifth of the tail."""
    batches, losses, held = [], [], []
    probed = torch.arange(min(PROBED, len(run.data.inputs)))
    steps, every = run.training.steps, max(1, tail // 25)
    for step in range(1, steps + 1):
        batches.append(run.advance())
        if run.meter and step % (5 * every) == 0:
            run.record.take(run.meter)
        if step > steps - tail // 5 and step % every == 0:
            with torch.no_grad():
                losses.append(run.loss(probed).item())
            held.append(run.held_loss())
    if run.meter:
        run.meter.close()
    return End(losses[-1], held[-1], batches) if run.control else End(fmean(losses), fmean(held), batches)
