"""What a change of the batch would do to a run's steps and samples, and what its steps say of the learning rate.

By `other_batches`, of the run's K steps to the loss that it came to (where it stopped falling: to that).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from lightning_speedlimit.checks.guard import look, shown
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.tuning import Tuned, Tuning
from lightning_speedlimit.report.course import Plateau, clipped, divergence, plateau
from lightning_speedlimit.report.findings_of_course import MOSTLY
from lightning_speedlimit.report.interpolation import Interval
from lightning_speedlimit.report.labels import effective_batch, optimizer_title, peak_rates
from lightning_speedlimit.report.other_batches import rate_was_low, share_of_steps
from lightning_speedlimit.report.runs import check_record
from lightning_speedlimit.words import number

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_TRIED = ("SGD", "Adam", "AdamW")  # optimizers that the headroom was followed with
_SAME_BATCH = 0.02  # relative: the mean batch of a run whose last ones are smaller
_NOMINAL = 0.2  # relative: how far the mean may be from the batch that was set
_CHANGED = 0.9  # a learning rate that fell below this share of its peak, or began there
MOST_AT_ONCE = 4.0  # times a learning rate: more was not tried
UNTUNED = (
    "the learning rate was too low for the batch, so the table, which supposes tuned rates, does not hold for the "
    "run's own row"
)


@dataclass(frozen=True)
class AtBatch:
    """What another batch is predicted to take to the same loss."""

    multiple: float
    """m, of the run's batch."""
    batch: float
    """m·B, samples, of the batch that was set (tokens, where these are counted); NaN where the batch is not known."""
    steps: float
    steps_interval: Interval
    samples: float
    """In the unit of `batch`: steps times m times the mean batch."""
    samples_interval: Interval
    seconds: float
    """Steps times the time per step that a run of this batch took, s; NaN where there is none."""


@dataclass(frozen=True)
class Advice:
    """What a run says of changes that were not made."""

    title: str
    """ "AdamW lr 0.003, batch 128"."""
    steps: int
    """K: the step whose loss the predictions are for."""
    unit: str
    """What a batch counts: "samples" or "tokens"."""
    batch: float
    """B: as set, where the mean over the steps is within 20 % of it; else that mean. In this unit; NaN: not known."""
    mean_batch: float
    """Mean over the steps: below `batch` where the last batch of an epoch is short. In this unit."""
    critical_batch_size: Tuned
    """B_c of these K steps, in this unit."""
    step_headroom: Tuned
    """The multiple of the steps at which the loss would have fallen most, 1. Greedy: along the steps that were made."""
    noise_share: Tuned
    """Share of the work that updates did on the noise of their own batches, 1."""
    at_batches: tuple[AtBatch, ...]
    """By size; empty where B_c is not known."""
    cautions: tuple[str, ...]
    """What the numbers do not hold for."""
    rate_tried: bool = True
    """Whether rates times the headroom were tried with its optimizers; of others no rate is advised."""

    @property
    def rate_multiple(self) -> float:
        """What to multiply the learning rate by, 1: the headroom, 4 at most; NaN where that is not told above 1."""
        return _rate_multiple(self.step_headroom) if self.rate_tried else math.nan


def advise(record: RunRecord, others: Iterable[RunRecord] = ()) -> Advice:
    """Steps K (1 + r/m)/(1 + r) and samples at batch × m = ¼ … 16, r = B_c/B, and the headroom of the steps.

    Args:
        others: runs of the same model on the same device, whose time per step tells the seconds at their batch.

    Raises:
        TypeError: what is no record.
    """
    check_record("record", record)
    beside: list[RunRecord] | None = look(list, None, others)
    if beside is None:
        raise TypeError(f"others got {shown(others)}, wanted records, as a list: [RunRecord.load(folder)]")
    for other in beside:
        check_record("a record among others", other)
    timed = [record, *beside]
    ran_away, stopped = divergence(record), plateau(record)
    steps = record.columns["step"]
    row = int(np.flatnonzero(steps == stopped.step)[0]) if stopped is not None else len(steps) - 1
    tuning = Tuning(record.columns, record.run, None, row)
    unit, batch, mean = _batch(record, tuning)
    ratio, found = tuning.critical_batches, tuning.values
    if ran_away is not None:
        ratio = Tuned.undefined(f"the loss ran away, from step {ran_away.step} on")
        found = dict.fromkeys(found, ratio)
    elif math.isfinite(mean):
        found["critical_batch_size"] = Tuned(mean * ratio.value, mean * ratio.standard_error, ratio.reason)
    last = int(steps[row]) if len(steps) else 0
    multiples = MULTIPLES if math.isfinite(ratio.value) else ()
    cautions = _cautions(record, stopped)
    if multiples and rate_was_low(found["step_headroom"]):
        cautions.append(UNTUNED)
    return Advice(
        optimizer_title(record),
        last,
        unit,
        batch,
        mean,
        **found,
        at_batches=tuple(_at(m, last, (batch, mean), ratio, timed) for m in multiples if not m * batch < 1),
        cautions=tuple(cautions),
        rate_tried=all(o.get("class") in _TRIED for o in record.run.get("optimizers") or ()),
    )


def _rate_multiple(told: Tuned) -> float:
    return min(told.value, MOST_AT_ONCE) if rate_was_low(told) else math.nan


def _at(multiple: float, steps: int, batches: tuple[float, float], ratio: Tuned, timed: Sequence[RunRecord]) -> AtBatch:
    """The prediction for m·B; of the run's own batch what it was."""
    share, ends = share_of_steps(ratio, multiple)
    taken, low, high = (steps * x for x in (share, *ends))
    batch, mean = (multiple * size for size in batches)
    per_step = _per_step(batch, timed[:1]) if multiple == 1 else _per_step(batch, timed)
    return AtBatch(multiple, batch, taken, (low, high), taken * mean, (low * mean, high * mean), taken * per_step)


def _batch(record: RunRecord, tuning: Tuning) -> tuple[str, float, float]:
    """What a step counts, how many as it was set, and in the mean: as the rows tell it, else the settings."""
    columns, mean = record.columns, tuning.batch
    if "tokens" in columns and math.isfinite(mean) and np.isfinite(columns["tokens"][-1]):
        return "tokens", mean, mean
    nominal = float(effective_batch(record.run) or math.nan)
    if math.isnan(mean):
        return "samples", nominal, nominal
    return "samples", nominal if math.isclose(nominal, mean, rel_tol=_NOMINAL) else mean, mean


def _per_step(batch: float, timed: Sequence[RunRecord]) -> float:
    """Mean seconds per step of the runs of this batch that are like the first one; NaN of none."""
    first, found = timed[0], []
    for record in timed:
        alike = all(record.run.get(key) == first.run.get(key) for key in ("parameters", "device", "world_size"))
        size = _batch(record, Tuning(record.columns, record.run))[1]
        seconds = record.columns.get("seconds", np.empty(0))
        if alike and math.isclose(size, batch, rel_tol=_SAME_BATCH) and len(seconds) and seconds[-1] > 0:
            found.append(float(seconds[-1] / record.columns["step"][-1]))
    return fmean(found) if found else math.nan


def _cautions(record: RunRecord, stopped: Plateau | None) -> list[str]:
    """What the formula does not know of this run."""
    run, said = record.run, []
    if stopped is not None:
        said.append(f"the loss stopped falling at step {stopped.step}: all this is of the way until then")
    rates = record.columns.get("learning_rate", np.empty(0))
    rates, peak = rates[np.isfinite(rates)], (peak_rates(record) or [math.nan])[0]
    if len(rates) and rates.min() < _CHANGED * peak:
        names = ", ".join(run.get("lr_schedules", []))
        told = f"the learning rate went between {number(float(rates.min()))} and {number(peak)}"
        said.append(f"{told}{f' ({names})' if names else ''}: these are means over all of it")
    if run.get("batch_norm_layers"):
        said.append(
            "BatchNorm: samples of a batch are not independent, and what it normalises by changes with the batch"
        )
        if (run.get("accumulate_grad_batches") or 1) > 1:
            size = f"{run['batch_size']} " if run.get("batch_size") else ""
            said.append(f"BatchNorm normalises by the {size}samples of one batch, however many are accumulated")
    if any("Adam" in str(o.get("class")) for o in run.get("optimizers") or ()):
        said.append(
            "where it was tried, Adam's larger batches took fewer steps than this says, up to three times fewer"
        )
    short = clipped(record)
    if short is not None and short.share >= MOSTLY:
        said.append(f"gradients were clipped at {number(short.share)} of the log steps: the threshold sets these steps")
    return said
