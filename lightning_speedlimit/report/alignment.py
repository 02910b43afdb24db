"""Runs at one point of comparison: where each reached a loss, a step or a time, and its numbers there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.drawn import parts_of_balance
from lightning_speedlimit.record.stretch import COSTS, SUMS
from lightning_speedlimit.record.tuning import is_full_batch
from lightning_speedlimit.report.interpolation import Interval, Values, first_below, read_between, time_above

By = Literal["loss", "step", "time"]

CONFIDENCE = 2.0  # standard errors on either side: 95 % of normal errors
# The first of many rows at which a noisy loss is low is one that dips. Of two runs of one curve, one of much noise and
# one of little, 2 standard errors made the noisy one the clear winner in 8 to 33 of 100, 3 do in 0 to 8.
SURE = 3.0
WILD = 10.0  # times the smallest standard error of a run's losses: a loss of that error may be no loss at all
LOSS_WINDOW = 50  # losses at each end that L_0 and L_K come from, where a record does not say
NAN = math.nan

# What is read off between two rows as it is: the first row's holds before it.
LEVELS = ("learning_rate", "grad_norm", "grad_norm_clipped", "step_norm", "loss_se", "loss_drop_se")

OTHERS = (
    "displacement",
    "loss",
    "loss_drop",
    "entropy_production",
    "efficiency",
    "efficiency_low",
    "efficiency_drift",
    "efficiency_action",
    "action_se",
    "work_ito_se",
)


@dataclass(frozen=True)
class Crossing:
    """Where a run's loss came down to a level, in steps with a fraction: between two log steps. NaN: never."""

    step: float
    earliest: float
    """From here on it may have: the loss − 3 standard errors is at the level, or may be between two log steps."""
    latest: float
    """Here it had: the loss + 3 standard errors is at the level; inf where that is not within the run."""
    read: Interval
    """`earliest` and `latest` of a loss without error: only what is not known between two log steps."""


class Timeline:
    """The columns of a record with the start before them (step 0, where every sum is 0), made once for many looks."""

    def __init__(self, record: RunRecord) -> None:
        columns = record.columns
        rows = columns["step"] > 0
        self.steps: Values = np.concatenate([[0.0], columns["step"][rows]])
        self.missing: Values = np.full(len(self.steps), np.nan)
        run = record.run
        self._window: int = run.get("loss_window") or LOSS_WINDOW
        self._run = run
        self._climbs = any(group.get("maximize") for o in run.get("optimizers", []) for group in o.get("groups", []))
        self._columns = {name: np.asarray(column[rows], dtype=np.float64) for name, column in columns.items()}

    def column(self, name: str, first: float) -> Values:
        """A column from step 0 on; NaN throughout where the record has none."""
        if name == "step":
            return self.steps
        found = self._columns.get(name)
        return self.missing if found is None else np.concatenate([[first], found])

    @property
    def loss(self) -> Values:
        """L at every time, loss, and its negative where the loss is climbed; L_0 = L_k + loss_drop.

        The drop has an L2 term in it, ½w(‖θ_0‖² − ‖θ_k‖²), which is least early: the row is the first whose windows
        of losses at both ends are full, else the last.
        """
        levels, drops = (self._columns.get(name, self.missing[1:]) for name in ("loss", "loss_drop"))
        levels = -levels if self._climbs else levels
        known = np.flatnonzero(np.isfinite(levels) & np.isfinite(drops))  # inf − inf warns
        full = known[self.steps[1:][known] >= self._window]
        row = full[0] if len(full) else known[-1] if len(known) else None
        start = NAN if row is None else float(levels[row] + drops[row])
        return np.concatenate([[start], levels])

    @property
    def loss_error(self) -> Values:
        """Standard error of the losses, loss; 0 where it is unknown.

        Records of earlier versions have only that of the loss drop, which has the start's in it.
        """
        errors = self.column("loss_se" if "loss_se" in self._columns else "loss_drop_se", NAN)
        errors[0] = errors[1] if len(errors) > 1 else 0.0
        return np.nan_to_num(errors, nan=0.0, posinf=np.inf)

    def crossing(self, level: float) -> Crossing:
        """Where the loss comes down to the level for the first time; see `Crossing`.

        The first row at which a noisy loss is that low is one that dips, long before the curve under the noise is. From
        where it may have come down, a, to where it clearly had, b, it is above the level for a time t: the crossing is
        a + t, which noise on either side leaves where it is, and which is the first row's where there is none.
        """
        error = SURE * self.loss_error
        loss = np.where(self._wild, NAN, self.loss)
        first, step, last = first_below(self.steps, loss, level)
        earliest, may, _ = first_below(self.steps, loss - error, level)
        _, had, latest = first_below(self.steps, loss + error, level)
        dips = level < self.loss[0] and not self.fell and math.isnan(latest)  # what never clearly fell is its noise
        if math.isnan(step) or dips:
            return Crossing(NAN, earliest, math.inf, read=(NAN, NAN))
        latest = math.inf if math.isnan(latest) else max(last, latest)
        middle = may + time_above(self.steps, loss, level, (may, had)) if may < had else step
        return Crossing(middle, min(first, earliest), latest, read=(middle - (step - first), middle + (last - step)))

    def read(self, name: str, step: float) -> Interval:
        """Within which a sum, or the loss, is at a step: linear where it is known, and what may be between two rows."""
        return read_between(self.steps, self.loss if name == "loss" else self.column(name, 0.0), step)

    def reach(self, name: str, steps: Interval) -> Interval:
        """Of a sum that grows, from the first step to the last: what is not within the run is above all of it."""
        first, last = steps
        end = float(self.steps[-1])
        low = self.read(name, first if first <= end else end)[0]
        return low, self.read(name, last)[1] if last <= end else math.inf

    def cost_interval(self, name: str, level: float) -> Interval:
        """Within which a sum is where the loss came down to a level; up to inf where it may not have."""
        where = self.crossing(level)
        return self.reach(name, (where.earliest, where.latest))

    @property
    def lowest(self) -> float:
        """The lowest loss of any row; NaN where none is finite. Losses of a wild error are left out."""
        losses = self.loss[1:]
        known = losses[np.isfinite(losses) & ~self._wild[1:]]
        return float(known.min()) if len(known) else NAN

    def lowest_sure(self) -> float:
        """The lowest level that the loss + 3 standard errors came down to; NaN without losses."""
        values = self.loss + SURE * self.loss_error
        values = values[np.isfinite(values)]
        return float(values.min()) if len(values) else NAN

    @property
    def fell(self) -> bool:
        """Whether the loss clearly came below where it began; a start that is unknown is no reason against.

        By 3 standard errors of the drop besides, where these are recorded: the start has an error too.
        """
        start, lowest = float(self.loss[0]), self.lowest_sure()
        if not math.isfinite(start):
            return math.isfinite(lowest)
        error = np.nan_to_num(self.column("loss_drop_se", 0.0), nan=0.0, posinf=np.inf)
        return lowest < start and bool(np.any(start - self.loss[1:] > SURE * error[1:]))

    @property
    def _wild(self) -> npt.NDArray[np.bool_]:
        """(rows,): of an error that tells nothing: 3 of it are beyond all that the loss surely fell from any row.

        Extrapolated from losses that ran away, such a loss may be far below all that the run ever had. An error like
        those of the other rows is none: the least is at a tenth of it.
        """
        error = self.loss_error
        known = error[np.isfinite(error) & (error > 0)]
        if not len(known):
            return np.zeros(len(error), dtype=bool)
        highest = self.loss - SURE * error
        fall = float(highest[np.isfinite(highest)].max(initial=-math.inf)) - self.lowest_sure()
        wild: npt.NDArray[np.bool_] = (error > WILD * known.min()) & (SURE * error > max(fall, 0.0))
        return wild

    def step_of_time(self, seconds: float) -> float:
        """The step at a wall-clock time of the fit; NaN where the record has none, or ended before."""
        column = self.column("seconds", 0.0)
        known = np.isfinite(column)
        if known.sum() < 2 or not 0 <= seconds <= column[known][-1]:
            return NAN
        return float(np.interp(seconds, column[known], self.steps[known]))

    def at(self, step: float) -> dict[str, float]:
        """The run's numbers at a step, named and in units as in `Summary`, and `step`, `seconds`.

        Sums, D, L and Σ(Δθ_i)²/m_i are linear between two log steps; ratios are made of them. All NaN beyond the run.
        """
        if not 0 <= step <= self.steps[-1]:
            return _ratios({}, NAN, self._run)

        def at(column: Values) -> float:
            return float(np.interp(step, self.steps, column))

        found = {name: at(self.column(name, 0.0)) for name in (*SUMS, *COSTS)}
        found |= {name: at(self._from_first(name)) for name in LEVELS}
        found["displacement"] = at(self.column("displacement", 0.0))
        found["loss"] = at(self.loss)
        found["loss_drop"] = at(self.column("loss_drop", 0.0))
        produced = self.column("entropy_production", 0.0)
        found["entropy_production"] = at(produced)
        for name, divisor in (
            ("efficiency", produced),
            ("efficiency_low", produced),
            ("efficiency_drift", produced),
            ("efficiency_action", self.column("work_action", 0.0)),
        ):
            numerator = self.column(name, 0.0) * divisor
            numerator[0] = 0.0
            found[name] = _ratio(at(numerator), at(divisor))
        for name in ("action_se", "work_ito_se"):
            found[name] = at(self.column(name, 0.0))
        return _ratios(found, step, self._run)

    def standard_errors(self, step: float) -> dict[str, float]:
        """Of what was sampled, at a step: linear between two log steps."""
        names = [name for name in self._columns if name.endswith("_se") and name.removesuffix("_se") in self._columns]
        if not 0 <= step <= self.steps[-1]:
            return {}
        return {n.removesuffix("_se"): float(np.interp(step, self.steps, self._from_first(n))) for n in names}

    def _from_first(self, name: str) -> Values:
        column = self.column(name, NAN)
        if len(column) > 1:
            column[0] = column[1]
        return column


def _ratios(sums: Mapping[str, float], step: float, run: Mapping[str, Any]) -> dict[str, float]:
    """D²/ℓ², ℓ²/(τA), D²/(τA), D²/A, conversion and signal of the sums; the balance of the work."""
    found = {"step": float(step), **{name: float(sums.get(name, NAN)) for name in (*SUMS, *COSTS, *LEVELS, *OTHERS)}}
    squared, path, action, elapsed = (found[n] for n in ("displacement", "path_length", "action", "elapsed"))
    squared = squared * squared
    met = 2.0 * found["work_stratonovich"] - found["work_anti_ito"]  # Σ f_k·u_k of the steps that met the next force
    work, anti, drop = found["work_ito"], found["work_anti_ito"], found["loss_drop"]
    return found | {
        "straightness": _ratio(squared, path * path),
        "steadiness": _ratio(path * path, elapsed * action),
        "kinematic_efficiency": _ratio(squared, elapsed * action),
        "speed_limit_time": _ratio(squared, action),
        "conversion": _ratio(drop, work),
        "conversion_se": _ratio(found["loss_drop_se"], abs(work)),
        "signal_fraction": _ratio(anti, met),
        **work_shares(_ratio(drop - np.nan_to_num(found["work_decay"]), work), _ratio(anti, met), run),
    }


def work_shares(conversion: float, signal_fraction: float, run: Mapping[str, Any]) -> dict[str, float]:
    """W = d + (d − a) + (W − 2d + a): what lowered the loss, bouncing, batch noise, as shares of the work W.

    To second order in the step, for every optimizer: with f = F + n, force of the whole loss and of the batch's
    noise, W = Σ F_k·u_k + Σ n_k·u_k, a = Σ F_{k+1}·u_k and d = ½ Σ (F_k + F_{k+1})·u_k, so that d − a = ½ Σ u·H·u.
    W is work_ito, a work_anti_ito, d the loss drop. Shares add up to 1 and can be negative: with weights that climb
    (d < a), and where batches are not independent.

    Args:
        conversion: of the drop that the updates without decoupled decay made, d − work_decay.
        run: what was run. Where every step sees all data there is no noise, and what did not lower the loss is
            bouncing: steps that overshoot are beyond second order, and the balance would book some of that as noise.
            Where samples come once an epoch both are freed of it (`record.drawn`).
    """
    if is_full_batch(run):  # NaN where the conversion is
        return {"useful_share": conversion, "bouncing_share": 1.0 - conversion, "noise_share": 0.0 * conversion}
    both, parts = 1.0 - 2.0 * conversion + signal_fraction, parts_of_balance(run)
    bouncing = conversion - signal_fraction + parts.following * both
    return {"useful_share": conversion, "bouncing_share": bouncing, "noise_share": parts.own * both}


def values_at(record: RunRecord, step: float | None = None) -> dict[str, float]:
    """The numbers of a run at a step (None: the last row's), interpolated between log steps; see `Timeline.at`."""
    timeline = Timeline(record)
    return timeline.at(float(timeline.steps[-1]) if step is None else step)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else NAN
