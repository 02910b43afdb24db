"""Runs against each other: at the same loss, step or time; which are beaten by none; what wasted the others' work."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from lightning_speedlimit import _arguments
from lightning_speedlimit._summary_text import measured_share
from lightning_speedlimit.report.alignment import CONFIDENCE, By, Crossing, Timeline, common_level
from lightning_speedlimit.report.clouds import GroupDistance, group_distances
from lightning_speedlimit.report.diagnosis import Finding, diagnose
from lightning_speedlimit.report.labels import optimizer_title
from lightning_speedlimit.report.runs import Gathered, Run, Sources, gather

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDING = 1e-9
NAN = math.nan
Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One run where it is compared."""

    run: Run
    values: Mapping[str, float]
    """Its numbers there, named and in units as in `Summary`, and `step`, `seconds`, `useful_share`, `bouncing_share`,
    `noise_share`: of the work, no unit. NaN where the run did not get there."""
    elapsed_interval: Interval
    """Within which τ lies, clock: from the loss's standard error, and what may be between two log steps. One point
    where τ is exact; up to inf for a run that did not get there, from what it took in all."""
    action_interval: Interval
    """Within which the action lies, parameter²/clock: from the same, and from the error of sampled steps."""
    loss_interval: Interval
    """Within which the loss lies, loss: from its standard error, and what may be between two log steps."""
    read: Mapping[str, Interval]
    """Of τ, the action and the loss, by name: what is not known between two log steps alone."""
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
    elapsed_interval: Interval
    """95 % interval of the mean τ (Student's t over runs); of a single run, that of its point. Where a run did not get
    there: from the least that one took."""
    action_interval: Interval
    """The same of the action."""
    loss_interval: Interval
    """The same of the loss."""
    beaten_by: str | None = None
    """A group of which one mean, of τ or of the action, is lower, and none higher; None: there is none."""
    clearly: bool = False
    """Whether the intervals of both do not overlap with those of `beaten_by`."""
    findings: tuple[Finding, ...] = ()
    """What wasted work or time in it, the costliest first."""

    @property
    def reached(self) -> bool:
        """Whether every run of it got to where they are compared."""
        return all(point.reached for point in self.points)

    @property
    def placed(self) -> bool:
        """Whether it has a place in the plane: it got there, and its τ and action are known."""
        return self.reached and math.isfinite(self.values["elapsed"] + self.values["action"])


@dataclass(frozen=True)
class Comparison:
    """Runs at one loss, step or time, and what follows. `print` shows it as text.

    τ·A ≥ D²: steps and action buy each other, so at the same loss one group beats another when it took less of both
    (THEORY: the plane of elapsed time and action); where their intervals overlap no winner is named.
    """

    by: By
    at: float
    """The loss, step or second at which the runs are compared."""
    set_by: str | None
    """The run that `at` was taken from, for it got no further; None: it was asked for."""
    groups: tuple[Group, ...]
    """In the order of their ranking: by τ at the same loss, by loss at the same step or time."""
    at_loss: tuple[Group, ...]
    """The groups at the same loss, for the plane; those of `groups` where `by` is "loss", empty without losses."""
    loss_level: float
    """The loss of `at_loss`; NaN without."""
    distances: tuple[GroupDistance, ...] = ()
    """W₂ between the clouds of groups that have replicas with sketches."""
    notes: tuple[str, ...] = ()
    """What to beware of."""

    @property
    def winner(self) -> str | None:
        """The first of the ranking, where its interval does not overlap with any other's; else None.

        A run that did not get to the loss is not behind before it took more steps than the first.
        """
        return _winner(self.groups, self.by)

    @property
    def frontier(self) -> tuple[str, ...]:
        """The groups that are beaten by none at the same loss, from the fastest to the cheapest."""
        return tuple(group.name for group in self.at_loss if group.placed and group.beaten_by is None)

    def verdict(self) -> list[str]:
        """Sentences: who needed the fewest steps and the least action, who is beaten by none, who by whom."""
        from lightning_speedlimit.report.text import verdict

        return verdict(self)

    def table(self) -> str:
        """Plain text: a row for each group, the verdict, and what to beware of."""
        from lightning_speedlimit.report.text import table

        return table(self)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the records, as JSON knows it: NaN and infinities are None."""
        from lightning_speedlimit.report.text import as_json

        return as_json(self)

    def figure(self) -> Figure:
        """The plane (elapsed, action) at the same loss, with each group's hyperbola τ·A = D² and the frontier.

        Raises:
            ValueError: no loss at which to compare. ImportError: the extra "report" is not installed.
        """
        from lightning_speedlimit.report.figures import PlanePoint, plane

        if not self.at_loss:
            raise ValueError("the plane needs runs with a loss, got none; record_loss(loss) at every step")
        return plane(
            [
                PlanePoint(
                    name=group.name,
                    elapsed=group.values["elapsed"],
                    action=group.values["action"],
                    displacement=group.values["displacement"],  # of the mean: (mean D)² ≤ mean τ · mean A
                    elapsed_interval=group.elapsed_interval,
                    action_interval=group.action_interval,
                    on_frontier=group.beaten_by is None,
                )
                for group in self.at_loss
                if group.placed
            ],
            clock=self.groups[0].points[0].run.record.run.get("clock", "steps"),
        )

    def html(self, path: str | os.PathLike[str]) -> None:
        """Writes the page: one file that opens from disk, without network.

        Raises:
            ImportError: the extra "report" is not installed. OSError: the file can't be written.
        """
        from lightning_speedlimit.report.page import write_page

        write_page(path, [self])


def compare(runs: Sources, *, by: By = "loss", at: float | None = None) -> Comparison:
    """Which run came how far at what price: all at the same loss (the fair one), step or time.

    Args:
        runs: records or folders of them, each a group of its own; folders that differ in a seed alone ("adam/seed_0")
            are one group. Or a mapping: name of a group → its runs.
        by: "loss": each where its loss first came down to `at`; "step": after `at` steps; "time": after `at` seconds of
            the fit.
        at: None: the lowest loss that every run clearly reached (loss + 3 standard errors) whose loss fell at all, or
            the last step or second that all have.

    Raises:
        RecordError: a folder without a record, or none that can be read. Of several runs one that is damaged, or has
            no step yet, is left out, as `notes` say.
        ValueError: nothing to compare by; different models or clocks; runs of one group with different settings.

    Example::

        comparison = compare({"SGD": ["runs/sgd/0", "runs/sgd/1"], "AdamW": ["runs/adamw/0", "runs/adamw/1"]})
        print(comparison)
        comparison.html("report.html")
    """
    at = _checked_at(by, at)
    return _compare(_with_steps(gather(runs)), by, at)


def compare_models(runs: Sources, *, by: By = "loss", at: float | None = None) -> list[Comparison]:
    """One comparison for each model among the runs: for each number of parameters, in the order in which they come.

    Args and errors are those of `compare`, which refuses to mix models.
    """
    at = _checked_at(by, at)
    models: dict[int | None, list[Run]] = {}
    gathered, left_out = _with_steps(gather(runs))
    for run in gathered:
        models.setdefault(run.record.run.get("parameters"), []).append(run)
    return [_compare(Gathered(found, left_out), by, at) for found in models.values()]


def _with_steps(found: Gathered) -> Gathered:
    """Those that have a row after step 0; in a folder of runs one may just have begun."""
    runs = [run for run in found.runs if (run.record.columns["step"] > 0).any()]
    names = {run.name for run in runs}
    empty = [run.name for run in found.runs if run.name not in names]
    if not runs:
        raise ValueError(f"no steps in {_listed(empty)}; leave it out, or train for at least one log step")
    told = [f"left out, without a step so far: {_listed(empty)}"] if empty else []
    return Gathered(runs, [*found.left_out, *told])


def _checked_at(by: By, at: float | None) -> float | None:
    _arguments.check_among("by", by, *get_args(By))
    if at is None:
        return None
    where = _arguments.number("at", at)
    if not (math.isfinite(where) and (where > 0 or by == "loss")):
        raise ValueError(f"at must be a {by} that runs can reach, got {at!r}; leave it out for the last one in common")
    return where


@np.errstate(all="ignore")  # a run that diverged has inf − inf; it comes out as NaN
def _compare(found: Gathered, by: By, at: float | None) -> Comparison:
    gathered, left_out = found
    check_alike(gathered)
    timelines = {run.name: Timeline(run.record) for run in gathered}  # names are unique
    level, limit = common_level(timelines)
    at_loss: tuple[Group, ...] = ()
    if math.isfinite(level):
        level = at if by == "loss" and at is not None else level
        at_loss = _groups(gathered, timelines, "loss", level)
    if by == "loss":
        if not at_loss:
            raise ValueError('no run has a finite loss to compare by; compare by="step", or record the losses')
        where, groups = level, at_loss
    else:
        where, limit = _last_in_common(timelines, by) if at is None else (at, None)
        groups = _groups(gathered, timelines, by, where)
    return Comparison(
        by=by,
        at=where,
        set_by=None if at is not None else limit,
        groups=groups,
        at_loss=at_loss,
        loss_level=level,
        distances=group_distances([(group.name, group.points) for group in groups if group.reached]),
        notes=(*left_out, *_notes(gathered)),
    )


def check_alike(runs: Sequence[Run]) -> None:
    """Raises ValueError for runs whose actions are not of one unit: other models, other clocks."""
    for what, key, cure in (
        ("models", "parameters", "compare each model by itself; speedlimit compare --split makes one section for each"),
        ("clocks", "clock", 'train all with the same SpeedLimit(clock="steps")'),
    ):
        found: dict[Any, list[str]] = {}
        for run in runs:
            if run.record.run.get(key) is not None:
                found.setdefault(run.record.run[key], []).append(run.name)
        if len(found) > 1:
            what_has = "; ".join(
                f"{value:,} parameters: {_listed(names)}" if key == "parameters" else f"{value}: {_listed(names)}"
                for value, names in found.items()
            )
            raise ValueError(f"runs must have the same {what} to be compared, got {what_has}; {cure}")


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _last_in_common(timelines: Mapping[str, Timeline], by: By) -> tuple[float, str | None]:
    """The last step or second that every run has, and whose it is; None where all end there."""
    ends = {
        name: float(timeline.steps[-1] if by == "step" else np.fmax.reduce(timeline.column("seconds", 0.0)))
        for name, timeline in timelines.items()
    }
    unknown = [name for name, end in ends.items() if not end > 0]
    if unknown:
        raise ValueError(f'no wall-clock times to compare by in {_listed(unknown)}; compare by="loss" or by="step"')
    name = min(ends, key=lambda name: ends[name])
    return ends[name], name if any(end > ends[name] for end in ends.values()) else None


# --- points and groups


def _groups(runs: Sequence[Run], timelines: Mapping[str, Timeline], by: By, at: float) -> tuple[Group, ...]:
    """The groups at one loss, step or time, ranked; by loss, also who beats whom."""
    members: dict[str, list[Point]] = {}
    for run in runs:
        members.setdefault(run.group, []).append(_point(run, timelines[run.name], by, at))
    groups = [_group(name, points) for name, points in members.items()]
    ranked = sorted(groups, key=lambda group: _rank(group, by))
    return _with_beaten(ranked) if by == "loss" else tuple(ranked)


def _rank(group: Group, by: By) -> float:
    value = group.values["elapsed" if by == "loss" else "loss"]
    return value if math.isfinite(value) else math.inf


def _point(run: Run, timeline: Timeline, by: By, at: float) -> Point:
    if by == "loss":
        where = timeline.crossing(at)
    else:
        step = at if by == "step" else timeline.step_of_time(at)
        where = Crossing(step, step, step, read=(step, step))
    values = timeline.at(where.step)
    if by == "loss" and math.isfinite(values["loss"]):
        values["loss"] = at  # and not what the noise made of it there
    sampled = CONFIDENCE * float(np.nan_to_num(values["action_se"]))
    noise = CONFIDENCE * float(np.nan_to_num(values["loss_se"]))
    least, most = _reach(timeline, "action", (where.earliest, where.latest))
    lowest, highest = timeline.read("loss", where.step)
    return Point(
        run,
        values,
        elapsed_interval=_reach(timeline, "elapsed", (where.earliest, where.latest)),
        action_interval=(least - sampled, most + sampled),
        loss_interval=(lowest - noise, highest + noise),
        read={
            "elapsed": _reach(timeline, "elapsed", where.read),
            "action": _reach(timeline, "action", where.read),
            "loss": (lowest, highest),
        },
        sampling={} if measured_share(run.record.run) is None else timeline.standard_errors(where.step),
    )


def _reach(timeline: Timeline, name: str, steps: Interval) -> Interval:
    """Of a sum that grows, from the first step to the last: what is not within the run is above all of it."""
    first, last = steps
    end = float(timeline.steps[-1])
    low = timeline.read(name, first if first <= end else end)[0]
    return low, timeline.read(name, last)[1] if last <= end else math.inf


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
        elapsed_interval=_interval("elapsed", points),
        action_interval=_interval("action", points),
        loss_interval=_interval("loss", points),
        findings=tuple(findings),
    )


def _interval(name: str, points: Sequence[Point]) -> Interval:
    """Of a mean over runs: Student's of the lower and of the upper ends of what is known between two log steps."""
    own: list[Interval] = [getattr(point, f"{name}_interval") for point in points]
    if len(points) == 1:
        return own[0]
    if not all(point.reached for point in points):
        return (NAN, NAN) if name == "loss" else (min(low for low, _ in own), math.inf)
    lows, highs = zip(*(point.read[name] for point in points), strict=True)
    times = _student(len(points))
    return _mean(lows) - times * _standard_error(lows), _mean(highs) + times * _standard_error(highs)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else NAN


def _student(count: int) -> float:
    """t of the 95 % interval of a mean of `count` values."""
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1))


# --- who beats whom


def _with_beaten(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Each with the group that beats it: where several do, one that does so clearly, then the cheapest."""
    found = []
    for group in groups:
        better = [other for other in groups if _beats(other, group)]
        better.sort(key=lambda other: (not _clearly(other, group), other.values["action"]))
        name = better[0].name if better else None
        found.append(replace(group, beaten_by=name, clearly=bool(better) and _clearly(better[0], group)))
    return tuple(found)


def _beats(a: Group, b: Group) -> bool:
    """Less of one, no more of the other; who reached the loss beats nobody who did not: that is told otherwise."""
    pairs = [(a.values[key], b.values[key]) for key in ("elapsed", "action")]
    return not any(_less(y, x) for x, y in pairs) and any(_less(x, y) for x, y in pairs) and a.placed and b.placed


def _clearly(a: Group, b: Group) -> bool:
    """Both intervals apart."""
    return below(a.elapsed_interval, b.elapsed_interval) and below(a.action_interval, b.action_interval)


def below(a: Interval, b: Interval) -> bool:
    """Whether one interval ends before the other begins; no where either end is unknown."""
    return _less(a[1], b[0])


def _less(a: float, b: float) -> bool:
    """By more than sums over a long run round to, about 1e-10."""
    return a < b and not math.isclose(a, b, rel_tol=ROUNDING)


def ranking_interval(group: Group, by: By) -> Interval:
    """Of what the groups are ranked by."""
    return group.elapsed_interval if by == "loss" else group.loss_interval


def rivals(groups: Sequence[Group], by: By) -> list[Group]:
    """Those that may be the first: at the same loss also who did not get there yet; else who has a loss there."""
    return [group for group in groups if by == "loss" or math.isfinite(group.values["loss"])]


def _winner(groups: Sequence[Group], by: By) -> str | None:
    compared = rivals(groups, by)
    if len(compared) < 2 or not compared[0].reached:
        return None
    first = ranking_interval(compared[0], by)
    return compared[0].name if all(below(first, ranking_interval(other, by)) for other in compared[1:]) else None


# --- what to beware of


def _notes(runs: Sequence[Run]) -> tuple[str, ...]:
    notes = []
    late = [run.name for run in runs if run.record.run.get("since_step")]
    if late:
        notes.append(
            f"measured from a later step on only, so that steps and action lack what was before: {_listed(late)}"
        )
    for key, what in (("entropy_production", "estimates of the entropy production"), ("monitor", "monitored losses")):
        kinds = {run.record.run.get(key) for run in runs}
        if len(kinds) > 1:
            notes.append(f"different {what} ({', '.join(sorted(map(str, kinds)))}): these numbers are not alike")
    sampled = [run.name for run in runs if (run.record.run.get("measure_every_n_steps") or 1) > 1]
    if sampled:
        notes.append(f"measured at a sample of the steps, so that action and factors are estimates: {_listed(sampled)}")
    if all(a.group != b.group for a, b in combinations(runs, 2)) and len(runs) > 1:
        notes.append(
            "one run each: the intervals come from the noise of the loss, and know nothing of other seeds (runs in "
            "folders named seed_0, seed_1, … are taken as one group; others by --group NAME=PATH, or a list in Python)"
        )
    return tuple(notes)
