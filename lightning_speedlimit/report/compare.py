"""Runs against each other: at the same loss, step or time, in the cost that counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, get_args

import numpy as np

from lightning_speedlimit.checks import arguments
from lightning_speedlimit.report.alignment import By, Timeline
from lightning_speedlimit.report.clouds import group_distances
from lightning_speedlimit.report.comparison import Comparison
from lightning_speedlimit.report.costs import Axis, Cost, axis_of
from lightning_speedlimit.report.late_runs import from_one_start
from lightning_speedlimit.report.levels import check_below_starts, fair_level, three_levels
from lightning_speedlimit.report.places import Group, groups_at
from lightning_speedlimit.report.ranking import with_beaten
from lightning_speedlimit.report.runs import Gathered, Run, Sources, gather
from lightning_speedlimit.words import listed


def compare(runs: Sources, *, by: By = "loss", at: float | None = None, cost: Cost | None = None) -> Comparison:
    """Which run came how far at what price: all at the same loss (the fair one), step or time.

    Args:
        runs: records or folders of them, each a group of its own; folders that differ in a seed alone ("adam/seed_0")
            are one group. Or a mapping: name of a group → its runs. A path that ends in "@1000:2000" is that stretch of
            the run or runs in it (`RunRecord.stretch`).
        by: "loss": each where its loss first came down to `at`; "step": after `at` steps; "time": after `at` seconds of
            the fit.
        at: None: a loss that most runs reached and that tells them apart (`report.levels.fair_level`; the others are
            left out by name), or the last step or second that all have.
        cost: what runs paid for a loss: "steps", "samples", "tokens", "epochs" or "seconds". None: samples where the
            runs have steps of different numbers of samples, else steps (or learning rates, of the clock "lr").

    Raises:
        RecordError: a folder without a record, or none that can be read. Of several runs one that is damaged, or has
            no step yet, is left out, as `notes` say; and one that was measured only from a later step on than the
            others (resumed without the callback's state), as `late` says.
        ValueError: nothing to compare by; a run that lacks the cost; different models or clocks; runs of one group
            with different settings; two groups of one name; a loss above all that runs began at; none measured from
            its start, and no step at which all begin.

    Example::

        comparison = compare({"SGD": ["runs/sgd/0", "runs/sgd/1"], "AdamW": ["runs/adamw/0", "runs/adamw/1"]})
        print(comparison)
        comparison.html("report.html")
    """
    at = _checked_at(by, at)
    return _compare(_with_steps(gather(runs)), by, at, cost)


def compare_models(
    runs: Sources, *, by: By = "loss", at: float | None = None, cost: Cost | None = None
) -> list[Comparison]:
    """One comparison for each model among the runs: for each number of parameters, in the order in which they come.

    Args and errors are those of `compare`, which refuses to mix models.
    """
    at = _checked_at(by, at)
    models: dict[int | None, list[Run]] = {}
    gathered, left_out = _with_steps(gather(runs))
    for run in gathered:
        models.setdefault(run.record.run.get("parameters"), []).append(run)
    return [_compare(Gathered(found, left_out), by, at, cost) for found in models.values()]


def _with_steps(found: Gathered) -> Gathered:
    """Those that have a row after step 0; in a folder of runs one may just have begun."""
    runs = [run for run in found.runs if (run.record.columns["step"] > 0).any()]
    names = {run.name for run in runs}
    empty = [run.name for run in found.runs if run.name not in names]
    if not runs:
        raise ValueError(f"no steps in {listed(empty)}; leave it out, or train for at least one log step")
    told = [f"left out, without a step so far: {listed(empty)}"] if empty else []
    return Gathered(runs, [*found.left_out, *told])


def _checked_at(by: By, at: float | None) -> float | None:
    arguments.check_among("by", by, *get_args(By))
    if at is None:
        return None
    where = arguments.number("at", at)
    if not (math.isfinite(where) and (where > 0 or by == "loss")):
        raise ValueError(f"at must be a {by} that runs can reach, got {at!r}; leave it out for the last one in common")
    return where


@np.errstate(all="ignore")  # a run that diverged has inf − inf; it comes out as NaN
def _compare(found: Gathered, by: By, at: float | None, cost: Cost | None) -> Comparison:
    every, left_out = found
    check_alike(every)
    gathered, late = from_one_start(every)
    timelines = {run.name: Timeline(run.record) for run in gathered}  # names are unique
    axis = axis_of(gathered, timelines, cost)
    level, limit = fair_level(timelines, axis.key, {run.name: run.group for run in gathered})
    at_loss: tuple[Group, ...] = ()
    if math.isfinite(level):
        if by == "loss" and at is not None:
            check_below_starts(timelines, at)
            level = at
        if _within_common(gathered, timelines, by, level):
            at_loss = with_beaten(groups_at(gathered, timelines, "loss", level, axis))
        else:
            level = math.nan
    if by == "loss":
        if not at_loss:
            raise ValueError('no run has a finite loss to compare by; compare by="step", or record the losses')
        where, groups = level, at_loss
    else:
        where, limit = _last_in_common(timelines, by) if at is None else (at, None)
        groups = groups_at(gathered, timelines, by, where, axis)
    return Comparison(
        by=by,
        at=where,
        set_by=None if at is not None else limit,
        axis=axis,
        groups=groups,
        at_loss=at_loss,
        loss_level=level,
        levels=three_levels(_by_group(gathered, timelines), axis.key, level),
        distances=group_distances([(group.name, group.points) for group in groups if group.reached]),
        notes=(*left_out, *_notes(gathered, axis)),
        late=late,
    )


def _within_common(runs: Sequence[Run], timelines: Mapping[str, Timeline], by: By, level: float) -> bool:
    """Whether no stretch begins below a loss, as the second of one run does below all of the first.

    Raises:
        ValueError: one does, and this loss is what they are compared at.
    """
    begun = [run.name for run in runs if run.record.run.get("stretch") and timelines[run.name].loss[0] <= level]
    if begun and by == "loss":
        raise ValueError(
            f"loss {level:.4g} was behind {listed(begun)} at its start: stretches of one run have no loss in common; "
            'compare them by="step", or give another loss'
        )
    return not begun


def _by_group(runs: Sequence[Run], timelines: Mapping[str, Timeline]) -> dict[str, list[Timeline]]:
    found: dict[str, list[Timeline]] = {}
    for run in runs:
        found.setdefault(run.group, []).append(timelines[run.name])
    return found


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
                f"{value:,} parameters: {listed(names)}" if key == "parameters" else f"{value}: {listed(names)}"
                for value, names in found.items()
            )
            raise ValueError(f"runs must have the same {what} to be compared, got {what_has}; {cure}")


def _last_in_common(timelines: Mapping[str, Timeline], by: By) -> tuple[float, str | None]:
    """The last step or second that every run has, and whose it is; None where all end there."""
    ends = {
        name: float(timeline.steps[-1] if by == "step" else np.fmax.reduce(timeline.column("seconds", 0.0)))
        for name, timeline in timelines.items()
    }
    unknown = [name for name, end in ends.items() if not end > 0]
    if unknown:
        raise ValueError(f'no wall-clock times to compare by in {listed(unknown)}; compare by="loss" or by="step"')
    name = min(ends, key=lambda name: ends[name])
    return ends[name], name if any(end > ends[name] for end in ends.values()) else None


def _notes(runs: Sequence[Run], axis: Axis) -> tuple[str, ...]:
    notes = []
    if axis.sizes is not None and axis.name in ("steps", "lr"):
        few, many = (f"{size:.4g}" for size in axis.sizes)
        notes.append(f'steps have {few} to {many} samples, so that fewer steps are not fewer samples: cost="samples"')
    for key, what in (("entropy_production", "estimates of the entropy production"), ("monitor", "monitored losses")):
        kinds = {run.record.run.get(key) for run in runs}
        if len(kinds) > 1:
            notes.append(f"different {what} ({', '.join(sorted(map(str, kinds)))}): these numbers are not alike")
    sampled = [run.name for run in runs if (run.record.run.get("measure_every_n_steps") or 1) > 1]
    if sampled:
        notes.append(f"measured at a sample of the steps, so that action and factors are estimates: {listed(sampled)}")
    members = Counter(run.group for run in runs)
    if pairs := [name for name, seeds in members.items() if seeds == 2]:
        notes.append(
            f"two seeds in {listed(pairs)}: too few for a narrow interval (12.7 standard errors to either side, of "
            "three seeds 4.3); run one more"
        )
    if all(a.group != b.group for a, b in combinations(runs, 2)) and len(runs) > 1:
        notes.append(
            "one run each: the intervals know nothing of other seeds (folders named seed_0, seed_1, … are one group; "
            "others by --group NAME=PATH, or a list in Python)"
        )
    return tuple(notes)
