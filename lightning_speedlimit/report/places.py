"""Runs and groups of replicas where they are compared: their numbers there, and within which bounds these lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_speedlimit.record.summary_text import measured_share
from lightning_speedlimit.report.alignment import CONFIDENCE, By, Crossing, Timeline
from lightning_speedlimit.report.costs import Axis
from lightning_speedlimit.report.diagnosis import Finding, diagnose
from lightning_speedlimit.report.interpolation import Interval
from lightning_speedlimit.report.labels import optimizer_title
from lightning_speedlimit.report.runs import Run

NAN = math.nan


@dataclass(frozen=True)
class Point:
    """One run where it is compared."""

    run: Run
    values: Mapping[str, float]
    """Its numbers there, named and in units as in `Summary`, and `step`, `seconds`, `samples`, `tokens`, `epochs`,
    `cost` (the one of these that is compared, or τ), `useful_share`, `bouncing_share`, `noise_share`: of the work, no
    unit. NaN where the run did not get there."""
    cost_interval: Interval
    """Within which the cost lies: from the loss's standard error, and what may be between two log steps. One point
    where it is exact; up to inf for a run that did not get there, from what it took in all."""
    elapsed_interval: Interval
    """The same of τ, clock."""
    action_interval: Interval
    """Within which the action lies, parameter²/clock: from the same, and from the error of sampled steps."""
    loss_interval: Interval
    """Within which the loss lies, loss: from its standard error, and what may be between two log steps."""
    read: Mapping[str, Interval]
    """Of the cost, τ, the action and the loss, by name: what is not known between two log steps alone."""
    lowest: float = NAN
    """The lowest loss of any of its rows, loss; NaN where none is finite."""
    fell: bool = True
    """Whether its loss clearly came below where it began."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Standard errors of its numbers, where coordinates were sampled; empty where all were measured."""

    @property
    def reached(self) -> bool:
        """Whether the run got to where it is compared."""
        return math.isfinite(self.values["step"])


@dataclass(frozen=True)
class Group:
    """Replicas, or a single run, where they are compared."""

    name: str
    title: str
    """The optimizers with their settings."""
    points: tuple[Point, ...]
    values: Mapping[str, float]
    """Means over the runs; NaN where one run's is."""
    standard_errors: Mapping[str, float]
    """Of these means, from the spread of the runs; for a single run those of its sampling, NaN where it has none."""
    cost_interval: Interval
    """95 % interval of the mean cost (Student's t over runs, of its logarithm: no cost is below 0); of a single run,
    that of its point. Where a run did not get there: from the least that one took."""
    elapsed_interval: Interval
    """The same of τ."""
    action_interval: Interval
    """The same of the action."""
    loss_interval: Interval
    """The same of the loss, but of itself, which may be below 0."""
    beaten_by: str | None = None
    """A group of which one mean, of the cost or of the action, is lower, and none higher; None: there is none."""
    clearly: bool = False
    """Whether the intervals of both do not overlap with those of `beaten_by`."""
    findings: tuple[Finding, ...] = ()
    """What wasted work or time in it, the costliest first."""

    @property
    def stretched(self) -> bool:
        """Whether it is a part of a run, which began where that had come to."""
        return self.points[0].run.record.run.get("stretch") is not None

    @property
    def reached(self) -> bool:
        """Whether every run of it got to where they are compared."""
        return all(point.reached for point in self.points)

    @property
    def placed(self) -> bool:
        """Whether it has a place in the plane: it got there, and its cost and action are known."""
        return self.reached and math.isfinite(self.values["cost"] + self.values["action"])


def groups_at(
    runs: Sequence[Run], timelines: Mapping[str, Timeline], by: By, at: float, axis: Axis
) -> tuple[Group, ...]:
    """The groups at one loss, step or time, ranked: by what it cost at the same loss, else by loss."""
    members: dict[str, list[Point]] = {}
    for run in runs:
        members.setdefault(run.group, []).append(_point(run, timelines[run.name], by, at, axis))
    groups = [_group(name, points) for name, points in members.items()]
    return tuple(sorted(groups, key=lambda group: _rank(group, by)))


def _rank(group: Group, by: By) -> float:
    value = group.values["cost" if by == "loss" else "loss"]
    return value if math.isfinite(value) else math.inf


def _point(run: Run, timeline: Timeline, by: By, at: float, axis: Axis) -> Point:
    if by == "loss":
        where = timeline.crossing(at)
    else:
        step = at if by == "step" else timeline.step_of_time(at)
        where = Crossing(step, step, step, read=(step, step))
    values = timeline.at(where.step)
    values["cost"] = values[axis.key]
    if by == "loss" and math.isfinite(values["loss"]):
        values["loss"] = at  # and not what the noise made of it there
    sampled = CONFIDENCE * float(np.nan_to_num(values["action_se"]))
    noise = CONFIDENCE * float(np.nan_to_num(values["loss_se"]))
    around = where.earliest, where.latest
    least, most = timeline.reach("action", around)
    lowest, highest = timeline.read("loss", where.step)
    return Point(
        run,
        values,
        cost_interval=timeline.reach(axis.key, around),
        elapsed_interval=timeline.reach("elapsed", around),
        action_interval=(_in_logarithms(least, -sampled), _in_logarithms(most, sampled)),
        loss_interval=(lowest - noise, highest + noise),
        read={
            "cost": timeline.reach(axis.key, where.read),
            "elapsed": timeline.reach("elapsed", where.read),
            "action": timeline.reach("action", where.read),
            "loss": (lowest, highest),
        },
        lowest=timeline.lowest,
        fell=timeline.fell,
        sampling={} if measured_share(run.record.run) is None else timeline.standard_errors(where.step),
    )


def _group(name: str, points: Sequence[Point]) -> Group:
    keys = points[0].values.keys()
    values = {key: _mean([point.values[key] for point in points]) for key in keys}
    errors = {key: _standard_error([point.values[key] for point in points]) for key in keys}
    if len(points) == 1:
        errors |= {key: error for key, error in points[0].sampling.items() if key in keys and key != "loss"}
    reached = [point for point in points if point.reached]
    findings = diagnose(values, reached[0].run.record) if reached else []
    return Group(
        name,
        optimizer_title(points[0].run.record),
        tuple(points),
        values,
        errors,
        cost_interval=_interval("cost", points),
        elapsed_interval=_interval("elapsed", points),
        action_interval=_interval("action", points),
        loss_interval=_interval("loss", points),
        findings=tuple(findings),
    )


def _interval(name: str, points: Sequence[Point]) -> Interval:
    """Of a mean over runs: Student's of the lower and of the upper ends of what is known between two log steps.

    Of what can't be below 0 it is that of the logarithm, mean · e^{± t · error/mean}: with two seeds, of t = 12.7, mean
    ± t · error would often begin below 0.
    """
    own: list[Interval] = [getattr(point, f"{name}_interval") for point in points]
    if len(points) == 1:
        return own[0]
    if not all(point.reached for point in points):
        return (NAN, NAN) if name == "loss" else (min(low for low, _ in own), math.inf)
    lows, highs = zip(*(point.read[name] for point in points), strict=True)
    times = _student(len(points))
    ends = ((_mean(lows), -times * _standard_error(lows)), (_mean(highs), times * _standard_error(highs)))
    (low, below), (high, above) = ends
    if name == "loss":
        return low + below, high + above
    return _in_logarithms(low, below), _in_logarithms(high, above)


def _in_logarithms(value: float, error: float) -> float:
    """value · e^{error/value}: to first order value + error, and never below 0."""
    return value * float(np.exp(error / value)) if value > 0 else value


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else NAN


def _student(count: int) -> float:
    """t of the 95 % interval of a mean of `count` values."""
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1))
