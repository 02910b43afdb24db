"""What a change of batch size or learning rate would buy, from the columns of a record between two rows.

To second order in the step and for independent batches, with W = Σ f_k·u_k, a = Σ f_{k+1}·u_k and the drop d of the
mean loss between the rows that these updates made (what decoupled weight decay did, Σ f_k·v_k with v = −lr w θ_k, is
taken out):

    slope S = 2d − a        curvature C = 2(d − a)        noise N = W − S
    noise_share = N/W       step_headroom = S/C
    critical_batch_size = B · N/S                                    SGD without momentum
                        = B · Σ (‖g_k‖² − g_k·g_{k−1}) / Σ g_k·g_{k−1}    any other

B is the batch of a step. Steps to a loss go as 1 + B_c/B, samples as B + B_c.

Of batches that share no sample within an epoch N is freed of what these have in common, as `drawn.parts_of_balance`
says, and so is the overlap, with the share q of an epoch in a step:

    Σ (‖g_k‖² − g_k·g_{k−1}) ← …/(1 − q²)    Σ g_k·g_{k−1} ← … + q/(1 + q) Σ (‖g_k‖² − g_k·g_{k−1})

Source: McCandlish, Kaplan, Amodei et al. 2018, arXiv:1812.06162 (their B_simple); THEORY §9.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record.drawn import Parts, parts_of_balance, share_of_epoch
from lightning_speedlimit.record.log_steps import too_few

Columns = Mapping[str, npt.NDArray[Any]]

TUNING = ("critical_batch_size", "step_headroom", "noise_share")
_NAN = math.nan
_BLOCKS = 8  # rows whose spread tells the noise of steps, at least, where there are so many
FEWEST = 4  # rows
_SAME_BATCH = 0.2  # epochs end with smaller batches
_TOLD = 3.0  # standard errors that a difference must have to be divided by


@dataclass(frozen=True)
class Tuned:
    """A number of `RunRecord.tuning`."""

    value: float
    """NaN where it can't be told."""
    standard_error: float
    """In the value's unit; NaN where the value is."""
    reason: str = ""
    """Why it is NaN; empty where it is not."""

    @classmethod
    def undefined(cls, reason: str) -> Tuned:
        return cls(_NAN, _NAN, reason)


@dataclass(frozen=True)
class _Sum:
    """A sum over the steps of a stretch: what each unit of it is made of, and the error of the loss drop within it.

    parts: column → how much of it. drops: how much of d.
    """

    parts: Mapping[str, float]
    drops: float = 0.0

    def plus(self, factor: float, other: _Sum) -> _Sum:
        """This and so much of the other one."""
        names = self.parts.keys() | other.parts.keys()
        parts = {n: self.parts.get(n, 0.0) + factor * other.parts.get(n, 0.0) for n in sorted(names)}
        return _Sum(parts, self.drops + factor * other.drops)

    def times(self, factor: float) -> _Sum:
        return _Sum({}).plus(factor, self)


_OF_NEIGHBOURS = ("work_anti_ito", "work_stratonovich", "gradient_signal", "gradient_noise")
_WORK = _Sum({"work_ito": 1.0})
_SLOPE = _Sum({"work_anti_ito": -1.0}, 2.0)
_CURVATURE = _Sum({"work_anti_ito": -2.0}, 2.0)
_NOISE = _Sum({"work_ito": 1.0, "work_anti_ito": 1.0}, -2.0)
_SIGNAL, _SCATTER = _Sum({"gradient_signal": 1.0}), _Sum({"gradient_noise": 1.0})


class Tuning:
    """Of the steps between two rows of a record.

    Args:
        columns: of the record, by name. run: what was run.
        start: the row after which the stretch begins; None: from the first step on. stop: its last row.
        reasons: why values of the last row are NaN, where that is known.
    """

    @classmethod
    def between(
        cls, columns: Columns, run: Mapping[str, Any], after: int, to: int | None, reasons: Mapping[str, str]
    ) -> Tuning:
        """By steps: of the row `after` which (0: the start) and of the last row (None: of all)."""
        steps = columns["step"]
        rows = {int(step): row for row, step in enumerate(steps)}
        last = (int(steps[-1]) if len(steps) else 0) if to is None else to
        for name, step in (("after", after), ("to", last)):
            if step not in rows and not (step == 0 and (name == "after" or not len(steps))):
                raise ValueError(f"tuning got {name}={step}, wanted the step of a row: see columns['step']")
        return cls(columns, run, rows.get(after) if after else None, rows.get(last, -1), reasons)

    def __init__(
        self,
        columns: Columns,
        run: Mapping[str, Any],
        start: int | None = None,
        stop: int = -1,
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        rows = len(columns["step"])
        self._columns = _begun_at_0(columns, run)
        begun = int(np.searchsorted(columns["step"], 1))  # a row at step 0 is the start
        start = None if start is not None and start % rows < begun else start
        self._stop = stop % rows if rows else -1
        self._reasons = (reasons or {}) if self._stop == rows - 1 else {}
        self._start = -1 if start is None else start % rows
        own = self._per_step("samples")  # the run's are of all its steps
        self._run = run if math.isnan(own) else {**run, "samples_per_step": own}
        if rows and self._start >= self._stop:
            raise ValueError(f"a stretch got rows {start} to {stop}, wanted one that ends after it begins")
        first = max(begun - 1, min(self._start, self._stop - _BLOCKS))
        self._blocks = range(first + 1, self._stop + 1)
        self._found: dict[str, npt.NDArray[np.float64]] = {}

    def only(self, names: Iterable[str]) -> dict[str, Tuned]:
        with np.errstate(all="ignore"):  # of a run that diverged: what is not finite comes out as NaN
            return {name: _finite(getattr(self, name)) for name in names}

    @property
    def values(self) -> dict[str, Tuned]:
        return self.only(TUNING)

    @property
    def noise_share(self) -> Tuned:
        """N/W: the share of the work that the updates did on the noise of their own batches."""
        if is_full_batch(self._run) and math.isfinite(self._total("work_ito")):
            return Tuned(0.0, 0.0)
        if not self._of(_WORK) > 0.0:
            return Tuned.undefined(self._why("no work was done") if self._stop >= 0 else "nothing was recorded")
        return self._ratio(self._noise, _WORK, "the work")

    @property
    def step_headroom(self) -> Tuned:
        """S/C: the multiple of each step at which it would have lowered the loss most, to second order."""
        curvature = _CURVATURE.plus(2.0 * self._parts.following, _NOISE)
        bends = "the loss bends downwards along the updates, and to second order a larger step always gains more"
        return self._ratio(self._slope, curvature, "the curvature along the updates", bends)

    @property
    def critical_batch_size(self) -> Tuned:
        """B·N/S, of plain SGD; else by neighbouring gradients. In the unit of `batch`."""
        batch = self.batch
        if math.isnan(batch):
            return Tuned.undefined(
                "the batch size is not known; SpeedLimit(samples_per_batch=...) says it, or in a plain loop "
                'record.take(meter, {"samples": ...})'
            )
        found = self.critical_batches
        return Tuned(batch * found.value, batch * found.standard_error, found.reason)

    @property
    def critical_batches(self) -> Tuned:
        """The same in batches, B_c/B."""
        if is_full_batch(self._run):
            return Tuned.undefined("each step sees all data: there is no noise")
        if self._counted and self._batch_changed:
            return Tuned.undefined("the batch size changed within; RunRecord.tuning(after, to) takes a part")
        found = self._critical_batches()
        if found.value < 0.0:
            return Tuned.undefined("no noise can be told: gradients are more alike than those of independent batches")
        return found

    def _critical_batches(self) -> Tuned:
        if self._by_gradients:
            q = self._drawn
            scatter, signal = _SCATTER.times(1 / (1 - q * q)), _SIGNAL.plus(q / (1 + q), _SCATTER)
            opposed = "neighbouring gradients oppose each other, as steps overshoot; a smaller learning rate tells"
            return self._ratio(scatter, signal, "the overlap of neighbouring gradients", opposed)
        if not is_plain_sgd(self._run):
            return Tuned.undefined(
                "the overlap of neighbouring gradients was not recorded; a run with this version has it"
            )
        lost = "the updates raised the mean loss on the whole; a smaller learning rate tells"
        return self._ratio(self._noise.times(1 / (1 - self._drawn)), self._slope, "the slope along the updates", lost)

    @cached_property
    def _noise(self) -> _Sum:
        """N: of the updates, the work on the noise of their own batches."""
        return _NOISE.times(self._parts.own)

    @cached_property
    def _slope(self) -> _Sum:
        """S = W − N."""
        return _WORK.plus(-1.0, self._noise) if self._drawn else _SLOPE

    @cached_property
    def _parts(self) -> Parts:
        return parts_of_balance(self._run)

    @cached_property
    def _drawn(self) -> float:
        return share_of_epoch(self._run)

    @property
    def batch(self) -> float:
        """B: samples of a step, or tokens where these were counted; NaN where neither was."""
        return self._per_step(self._counted) if self._counted else _NAN

    def _per_step(self, name: str) -> float:
        steps = self._total("step")
        return self._total(name) / steps if steps > 0 else _NAN

    @cached_property
    def _counted(self) -> str:
        known = [n for n in ("tokens", "samples") if n in self._columns and math.isfinite(self._total(n))]
        return known[0] if known else ""

    @property
    def _batch_changed(self) -> bool:
        """Between the first and the second half of the rows."""
        rows = len(self._blocks)
        if rows < 2:
            return False
        sizes = [
            self._each(self._counted)[half].sum() / self._each("step")[half].sum()
            for half in (slice(0, rows // 2), slice(rows // 2, rows))
        ]
        return bool(abs(sizes[0] - sizes[1]) > _SAME_BATCH * max(sizes))

    @cached_property
    def _by_gradients(self) -> bool:
        return "gradient_signal" in self._columns and math.isfinite(self._total("gradient_signal"))

    # --- sums and their errors

    def _ratio(self, above: _Sum, below: _Sum, name: str, negative: str = "") -> Tuned:
        """x/y with √Var of dx/y − x dy/y²; NaN where y is not three errors above 0.

        Args:
            name: of y. negative: what it means where y is three errors below 0, which more steps do not change.
        """
        x, y = self._of(above), self._of(below)
        if not (math.isfinite(x) and math.isfinite(y)):
            return Tuned.undefined(self._why("a value that it is made of is NaN"))
        error = self._error(below)
        if math.isnan(error):
            return Tuned.undefined(self._why_no_error(below))
        if y < -_TOLD * error:
            return Tuned.undefined(f"{name} is below 0 ({y:.2g} +/- {error:.1g}): {negative}")
        if y <= _TOLD * error:
            return Tuned.undefined(f"{name} can't be told from 0 ({y:.2g} +/- {error:.1g}); a longer run tells more")
        slope = x / y
        change = above.plus(-slope, below).times(1 / y)
        error = self._error(change)
        return Tuned.undefined(self._why_no_error(change)) if math.isnan(error) else Tuned(slope, error)

    def _why_no_error(self, what: _Sum) -> str:
        if len(self._blocks) < FEWEST:
            return too_few(FEWEST, len(self._blocks), self._total("step"), self._run)
        if what.drops and math.isnan(self._error_of_drop):
            return "how far the losses are known is not known; loss_window of 3 and more, or probe_batches of 2, tell"
        return "a value before it is NaN"

    def _of(self, what: _Sum) -> float:
        total = sum(share * self._total(name) for name, share in what.parts.items())
        return total + what.drops * self._drop if what.drops else total

    @cached_property
    def _drop(self) -> float:
        """d of the updates alone, without what decoupled decay did to the loss."""
        decayed = self._total("work_decay")
        return self._total("loss_drop") - (0.0 if math.isnan(decayed) else decayed)

    def _error(self, what: _Sum) -> float:
        """√(K·v + (drops · the error of d)²), v the variance of a step, from the second differences of the rows.

        A trend of the rates is hardly in these; what noise the steps of a row share is.
        """
        steps = self._each("step")
        if len(steps) < FEWEST:
            return _NAN
        rates = sum(share * self._each(name) for name, share in what.parts.items()) / steps
        apart = (rates[2:] - 2.0 * rates[1:-1] + rates[:-2]) ** 2 / (1 / steps[2:] + 4 / steps[1:-1] + 1 / steps[:-2])
        own = math.sqrt(self._total("step") * float(apart.mean()))
        return math.hypot(own, what.drops * self._error_of_drop) if what.drops else own

    def _each(self, name: str) -> npt.NDArray[np.float64]:
        """What each row of the blocks added."""
        if name not in self._found:
            self._found[name] = self._added_by_each(name)
        return self._found[name]

    def _added_by_each(self, name: str) -> npt.NDArray[np.float64]:
        column = np.asarray(self._columns.get(name, ()), dtype=np.float64)
        if not len(column):
            return np.full(len(self._blocks), _NAN)
        if name == "work_anti_ito":
            column = column * self._completing
        added = column[self._blocks.start : self._blocks.stop].copy()
        added[1:] -= column[self._blocks.start : self._blocks.stop - 1]
        added[0] -= column[self._blocks.start - 1] if self._blocks.start else 0.0
        return added

    def _total(self, name: str) -> float:
        if name == "work_anti_ito":
            return self._added(name) * self._completing
        return self._added(name)

    def _added(self, name: str) -> float:
        """What the stretch added to a column."""
        column = self._columns.get(name, ())
        if not len(column) or self._stop < 0:
            return _NAN
        return float(column[self._stop]) - (float(column[self._start]) if self._start >= 0 else 0.0)

    @cached_property
    def _completing(self) -> float:
        """W over the work of the steps that have met their next gradient: a is of these alone."""
        met = 2.0 * self._added("work_stratonovich") - self._added("work_anti_ito")
        return self._added("work_ito") / met if met > 0.0 else 1.0

    @cached_property
    def _error_of_drop(self) -> float:
        """Of the loss drop between two rows: both ends are estimated. NaN where the losses have no known error.

        Of a probe's batches the drop since the start is known better than the loss, of a window's losses less well;
        while the first window fills, each row estimates the start anew.
        """
        window = self._run.get("loss_window") or 0
        if 0 < window < 3 and not self._run.get("probe_batches"):
            return _NAN
        if self._start < 0:
            return self._at("loss_drop_se", self._stop)
        filling = int(self._columns["step"][self._start]) < window
        errors = [
            [self._at(name, row) for name in ("loss_drop_se", "loss_se")[: 1 if filling else 2]]
            for row in (self._start, self._stop)
        ]
        return math.hypot(*(min((e for e in own if not math.isnan(e)), default=_NAN) for own in errors))

    def _at(self, name: str, row: int) -> float:
        column = self._columns.get(name, ())
        return float(column[row]) if len(column) else _NAN

    def _why(self, otherwise: str) -> str:
        """Of a sum that is NaN: of the first one that says why, that."""
        known = [n for n in ("loss_drop", "work_ito", "work_anti_ito") if math.isnan(self._total(n))]
        told = f"{', '.join(known)} {'is' if len(known) == 1 else 'are'} NaN" if known else otherwise
        return next((self._reasons[name] for name in known if name in self._reasons), told)


def _begun_at_0(columns: Columns, run: Mapping[str, Any]) -> Columns:
    """Sums over steps that have met the next gradient are NaN in rows before the first of these: here they are 0."""
    early = np.asarray(columns["step"]) <= 2 * (run.get("measure_every_n_steps") or 1)
    begun = dict(columns)
    for name in _OF_NEIGHBOURS:
        column = np.asarray(columns.get(name, ()), dtype=np.float64)
        if len(column) and math.isnan(column[0]):
            unmet = np.logical_and.accumulate(np.isnan(column)) & early
            begun[name] = np.where(unmet, 0.0, column)
    return begun


def _finite(found: Tuned) -> Tuned:
    if found.reason or (math.isfinite(found.value) and math.isfinite(found.standard_error)):
        return found
    return Tuned.undefined("a sum that it is made of is beyond the range of its products")


def is_plain_sgd(run: Mapping[str, Any]) -> bool:
    """All optimizers are SGD without momentum."""
    optimizers = run.get("optimizers") or ()
    groups = [group for optimizer in optimizers for group in optimizer.get("groups", ())]
    return bool(groups) and all(
        optimizer.get("class") == "SGD" and not any(group.get("momentum") for group in optimizer.get("groups", ()))
        for optimizer in optimizers
    )


def is_full_batch(run: Mapping[str, Any]) -> bool:
    """Whether a run says that each of its steps sees all data: one step in an epoch."""
    return 0 < (run.get("batches_per_epoch") or 0) <= (run.get("accumulate_grad_batches") or 1)
