"""What the rows of a record say of a run's course: a loss that ran away or stopped falling, clipped gradients."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.lost_loss import LostLoss, lost_loss
from lightning_speedlimit.report.alignment import SURE, Timeline
from lightning_speedlimit.report.interpolation import Values

_LOST = 10.0  # times the loss's error at its smallest: beyond this, and beyond all that the loss fell, it is not known
_UNCHANGED = 0.999  # a clipped gradient is shorter than this share of what it was: float32 norms round to 1e-6
_BEYOND = (
    10.0  # times the loss: in a quadratic bowl the work of a step is 2 L where it ends at the bottom, 4 L at the edge
)

# A plateau, in shares of the whole fall: conventions.
LEAST_STRETCH = 0.25  # of the steps
FEWEST_ROWS = 9  # of losses that have none in common
NO_FALL = 0.005  # a fall that may be told from 0, and is none
LARGEST_FALL = 0.05  # what it may have fallen by, two errors included
_SLACK = 1e-6  # more than running sums of rows round to
LARGEST_SHARE = 0.1  # of its own level: a loss that goes to 0 falls for ever


@dataclass(frozen=True)
class Divergence:
    """A loss that ended beyond its start, unknown by more than all that it ever fell, not finite, or far below the work
    of each step."""

    step: int
    """Of the first row from which on it stayed so."""
    start: float
    """L_0, loss; of a run that climbs its loss, here the negative, which is to fall."""
    loss: float
    """L of the last row, as `start`; NaN: not finite."""
    error: float
    """Standard error of it, loss."""
    start_error: float = 0.0
    """Standard error of `start`, loss: in a run that ran away at once, the losses from which it follows had too."""
    work: float = math.nan
    """Mean over the steps of their work along the gradients, loss."""
    lost: LostLoss | None = None
    """Where it ceased to be finite, if it did."""


@dataclass(frozen=True)
class Plateau:
    """A stretch up to the end in which the loss did not fall: by 5 % of all that it fell at most, with two errors."""

    step: int
    """Of its first row."""
    fall: float
    """Mean of its first third of rows less that of its last third, loss."""
    error: float
    """Standard error of `fall`, loss, from the scatter within thirds."""
    drop: float
    """Of the whole run: its start less its lowest row, loss."""


@np.errstate(all="ignore")  # of numbers near the largest float
def divergence(record: RunRecord, step: float = math.inf) -> Divergence | None:
    """Whether the loss ran away by this step, and from which row on.

    A row has run away where its loss drop is below −3 standard errors; or where the loss is not known to 10 times
    what it once was, nor to all that it ever fell; or where a recorded loss was not finite; or where the mean work of a
    step along its gradient is above 10 times the loss, at its start and there: a run that blew up within its first
    rows has no start to be compared with.
    """
    columns = record.columns
    rows = (columns["step"] > 0) & (columns["step"] <= step)
    if not rows.any() or not {"loss", "loss_drop"} <= columns.keys():
        return None
    timeline = Timeline(record)
    steps, unknown = columns["step"][rows], np.full(int(rows.sum()), math.nan)
    names = ("loss_se", "loss_drop", "loss_drop_se")
    error, drop, drop_error = (columns[n][rows] if n in columns else unknown for n in names)
    start, loss = float(timeline.loss[0]), timeline.loss[1 : len(steps) + 1]
    finite = np.isfinite(loss)
    away = finite & (drop < -SURE * np.nan_to_num(drop_error)) | finite & _lost(error, start, loss)
    work = columns["work_ito"][rows] / steps if "work_ito" in columns else unknown
    away |= finite & (work > _BEYOND * np.maximum(np.abs(loss), abs(start)))
    lost = lost_loss(columns, record.reasons, step)
    if lost is not None:
        away |= ~finite
    if not away[-1]:
        return None
    before = np.flatnonzero(~away)
    first = int(before[-1]) + 1 if len(before) else 0
    last = float(loss[-1]) if finite[-1] else math.nan
    both = drop_error**2 - error**2  # the start's own is in every row's
    started = math.sqrt(max(float(both[np.isfinite(both)].min(initial=math.inf)), 0.0))
    own = float(np.nan_to_num(error[-1]))
    return Divergence(
        int(steps[first]), start, last, own, started if math.isfinite(started) else 0.0, float(work[-1]), lost
    )


def _lost(error: Values, start: float, loss: Values) -> npt.NDArray[np.bool_]:
    """Where a line through wild losses says anything: its error beyond what is known of the loss's whole range."""
    known = np.isfinite(error) & (error > 0)
    if not known.any() or math.isnan(start):
        return np.zeros(len(error), dtype=bool)
    smallest = np.minimum.accumulate(np.where(known, error, math.inf))
    reached = np.minimum.accumulate(np.where(known & (error <= _LOST * smallest), loss, math.inf))
    fallen = start - reached
    fallen = np.where(np.isfinite(fallen), np.maximum(fallen, 0.0), 0.0)
    found: npt.NDArray[np.bool_] = known & (error > _LOST * smallest) & (error > np.maximum(fallen, abs(start)))
    return found


@np.errstate(all="ignore")
def plateau(record: RunRecord, step: float = math.inf) -> Plateau | None:
    """The longest stretch up to this step in which the loss did not fall; None where that can't be said.

    Of n rows from k on, as far apart as the window of losses that each comes from, with the means m_1, m_2, m_3 of the
    first n//3, those between and the last n//3, and the scatter s about them:

        fall = m_1 − min(m_2, m_3)      error = s √(2/(n//3))

    It is flat where the fall is below its error or 0.5 % of the run's whole drop, and fall + 2 errors below 5 % of that
    drop and 10 % of the loss itself, so that neither noise nor a slow fall is taken for one; and where m_3 is above m_1
    by no more than that 5 % either. Its first row is no higher above m_1 than 2 s and 0.5 % of the drop.
    """
    timeline = Timeline(record)
    until = (timeline.steps <= step) & np.isfinite(timeline.loss)
    x, y = timeline.steps[until], timeline.loss[until]
    if not len(x):
        return None
    drop = float(y[0] - y.min()) if x[0] == 0 else float(y.max() - y.min())
    x, y = _apart(x[x > 0], y[x > 0], record.run.get("loss_window") or 1)
    if not drop > 0:
        return None
    for first in _perhaps_flat(y, drop):
        if x[-1] - x[first] < LEAST_STRETCH * x[-1]:
            return None
        if (found := _flat(y[first:], drop)) is not None:
            return Plateau(int(x[first]), *found, drop)
    return None


def _perhaps_flat(y: Values, drop: float) -> list[int]:
    """First rows from which on `_flat` may find one: all at once, by running sums, and what these round to allowed."""
    rows = len(y)
    first = np.arange(max(0, rows - FEWEST_ROWS + 1))
    if not len(first):
        return []
    third = (rows - first) // 3
    ends = first, first + third, rows - third, np.full_like(first, rows)
    level, near = y[-1], y - y[-1]
    one, two = (np.concatenate([[0.0], np.cumsum(near**power)]) for power in (1, 2))
    counts = [after - before for before, after in itertools.pairwise(ends)]
    sums = [one[after] - one[before] for before, after in itertools.pairwise(ends)]
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    squares = two[rows] - two[first] - sum(mean * total for mean, total in zip(means, sums, strict=True))
    scatter = np.sqrt(np.maximum(squares, 0.0) / (rows - first - 3)) * (1 + _SLACK)
    error, fall = scatter * np.sqrt(2 / third), means[0] - np.minimum(means[1], means[2])
    most, slack = np.maximum(fall, 0.0) + 2 * error * (1 - 2 * _SLACK), _SLACK * drop
    flat = (fall <= np.maximum(error, NO_FALL * drop) + slack) & (most <= LARGEST_FALL * drop + slack)
    flat &= means[2] - means[0] <= LARGEST_FALL * drop + slack
    flat &= most <= LARGEST_SHARE * np.abs(level + means[0]) + slack
    flat &= near[first] <= means[0] + 2 * scatter + NO_FALL * drop + slack
    found: list[int] = np.flatnonzero(flat).tolist()
    return found


def _flat(y: Values, drop: float) -> tuple[float, float] | None:
    """From the first third of the losses to the last: the fall and its error; None where any third fell."""
    third = len(y) // 3
    parts = y[:third], y[third:-third], y[-third:]
    means = [float(part.mean()) for part in parts]
    squares = sum(float(((part - mean) ** 2).sum()) for part, mean in zip(parts, means, strict=True))
    scatter = math.sqrt(squares / (len(y) - 3))
    error, fall = scatter * math.sqrt(2 / third), means[0] - min(means[1:])
    most = max(fall, 0.0) + 2 * error
    flat = fall <= max(error, NO_FALL * drop) and max(most, means[2] - means[0]) <= LARGEST_FALL * drop
    flat &= most <= LARGEST_SHARE * abs(means[0]) and float(y[0]) <= means[0] + 2 * scatter + NO_FALL * drop
    return (means[0] - means[2], error) if flat else None


def _apart(x: Values, y: Values, window: int) -> tuple[Values, Values]:
    """The rows that share no losses: backwards from the last, each a window before the one after it."""
    kept: list[int] = []
    for i in range(len(x) - 1, -1, -1):
        if not kept or x[kept[-1]] - x[i] >= window:
            kept.append(i)
    rows = kept[::-1]
    return x[rows], y[rows]


@dataclass(frozen=True)
class Clipped:
    """Gradients that were shorter for the optimizer than before clipping."""

    share: float
    """Of the log steps, 1."""
    kept: float
    """Length after over length before, 1: the median of these."""


def clipped(record: RunRecord, step: float = math.inf) -> Clipped | None:
    """Of the log steps up to this one; None where no gradient was clipped, or that is not recorded."""
    columns = record.columns
    if not {"grad_norm", "grad_norm_clipped"} <= columns.keys():
        return None
    here = columns["step"] <= step
    before, after = columns["grad_norm"][here], columns["grad_norm_clipped"][here]
    known = np.isfinite(before) & np.isfinite(after) & (before > 0)
    ratios = after[known] / before[known]
    shorter = ratios < _UNCHANGED
    if not shorter.any():
        return None
    return Clipped(float(shorter.mean()), float(np.median(ratios[shorter])))
