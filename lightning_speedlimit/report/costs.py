"""What runs are compared by: steps, samples, tokens, epochs or seconds, and how each is called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from lightning_speedlimit.report.alignment import Timeline
from lightning_speedlimit.report.runs import Run
from lightning_speedlimit.words import listed

Cost = Literal["steps", "samples", "tokens", "epochs", "seconds"]

ALIKE = 1.1  # batches that differ by less: the last one of an epoch may be smaller

_CURES = {
    "samples": 'SpeedLimit(samples_per_batch=…) where batches do not tell; record.take(meter, {"samples": …}) by hand',
    "tokens": 'they are counted where batches hold 2-D integers; record.take(meter, {"tokens": …}) by hand',
    "epochs": "they are counted where the training's data have a length",
    "seconds": "records of this version have them",
}


class CostWords(NamedTuple):
    """How a cost is spoken of."""

    heading: str
    least: str
    """ "fewest steps"."""
    less: str
    """ "fewer steps"."""
    noun: str
    """ "2.0 times the steps"."""


@dataclass(frozen=True)
class Axis:
    """The cost that runs are compared by."""

    name: Cost | Literal["lr"]
    """ "lr": learning rates, summed: the steps of runs that were measured by that clock."""
    key: str
    """Of `Point.values`."""
    sizes: tuple[float, float] | None = None
    """The smallest and the largest number of samples in a step, in the mean of a run, where these differ."""
    chosen: bool = False
    """For that reason, and not asked for."""

    @property
    def words(self) -> CostWords:
        if self.name == "lr":
            return CostWords("learning rate, summed", "least time", "less time", "time")
        if self.name == "seconds":
            return CostWords("seconds", "least time", "less time", "time")
        return CostWords(self.name, f"fewest {self.name}", f"fewer {self.name}", self.name)


def axis_of(runs: list[Run], timelines: Mapping[str, Timeline], cost: Cost | None) -> Axis:
    """The cost that was asked for; else samples where batches differ and all runs have them; else steps.

    Raises:
        ValueError: no such cost; a run without it.
    """
    if cost is not None and cost not in get_args(Cost):
        raise ValueError(f"cost must be one of {', '.join(map(repr, get_args(Cost)))}, got {cost!r}")
    sizes = _sizes(timelines)
    by_steps = any(run.record.run.get("clock", "steps") == "steps" for run in runs)
    if cost is None and sizes is not None and not _lacking(timelines, "samples"):
        return Axis("samples", "samples", sizes, chosen=True)
    if cost is None:
        return Axis("steps" if by_steps else "lr", "elapsed", sizes)
    if cost == "steps":
        return Axis(cost, "elapsed" if by_steps else "step", sizes)
    lacking = _lacking(timelines, cost)
    if lacking:
        reasons = (run.record.reasons.get(cost) for run in runs if run.name in lacking)
        why = next((f" ({reason})" for reason in reasons if reason), "")
        raise ValueError(
            f"cost={cost!r} needs that column in every run, got none in {listed(lacking)}{why}; {_CURES[cost]}; "
            'or compare by cost="steps"'
        )
    return Axis(cost, cost, sizes)


def _lacking(timelines: Mapping[str, Timeline], cost: str) -> list[str]:
    return [name for name, timeline in timelines.items() if not np.isfinite(timeline.column(cost, np.nan)).any()]


def _sizes(timelines: Mapping[str, Timeline]) -> tuple[float, float] | None:
    """Of the samples of a step, where these are known and differ."""
    known = [size for size in map(_samples_per_step, timelines.values()) if math.isfinite(size) and size > 0]
    if len(known) < 2 or max(known) <= ALIKE * min(known):
        return None
    return min(known), max(known)


def _samples_per_step(timeline: Timeline) -> float:
    """Mean over the run; NaN where samples are unknown."""
    samples = timeline.column("samples", math.nan)
    known = np.flatnonzero(np.isfinite(samples))
    return float(samples[known[-1]] / timeline.steps[known[-1]]) if len(known) else math.nan
