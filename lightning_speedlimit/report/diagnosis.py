"""Why a run fell short, in words: what took its work, what bent its path, what changed its speed, and what to try.

The least time for the same displacement on the same action falls short of the time taken by

    ln(τ/τ_SL) = −ln straightness − ln steadiness = −ln conversion − ln(straightness/conversion) − ln steadiness

where the first part is work that did not lower the loss, divided between batch noise and bouncing as the work is;
the second is what the path turns without them (for plain gradient descent the action is wasted in the same
proportion as the work); the third is changes of speed. The findings are ordered by these parts. The second is judged
only where most of the work lowered the loss: noise hides changes of speed, and puts them into the straightness.

Whether work was lost to noise or to bouncing is told by the work balance (`work_shares`), and not by the signal
fraction: that is negative for gradient descent on all data with too large a rate, where there is no noise at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from lightning_speedlimit import _arguments
from lightning_speedlimit._plain_text import one_line
from lightning_speedlimit._summary_text import number
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.report.alignment import is_full_batch, work_shares
from lightning_speedlimit.report.runs import check_record

Cause = Literal["noise", "bouncing", "curved path", "uneven speed", "efficiency above 1", "undefined", "nothing"]
CAUSES: tuple[Cause, ...] = get_args(Cause)

# Fixed on the digits of one seed by examples/diagnosis/truth.py (36 settings of SGD, momentum and Adam), and judged
# on another seed, on batches without replacement and on a transformer: docs/diagnosis.md.
USEFUL_CONVERSION = 0.5  # at least this much of the work lowered the loss: the rest is not worth a finding
NOISE_LEAD = -0.05  # by how much the share of noise must exceed that of bouncing to be named first

# Conventions, without a truth to be fitted to: a factor below one half doubles the least time.
SECOND_SHARE = 0.25  # of the work: from here on the smaller of noise and bouncing is named too
STRAIGHT_ENOUGH = 0.5  # straightness/conversion; gradient flow on digits has 0.77
STEADY_ENOUGH = 0.5  # gradient flow on digits has 0.58
LOADED = 0.6  # share of the path that one half of the time has to hold to be called the heavy one
DECAYED = 0.5  # a last rate below this share of the largest is a schedule's doing
UNCERTAIN = 0.1  # standard error of the conversion from which on the work balance is not judged
_STRAIGHTEN = "A lower learning rate will not straighten it; a larger batch may."
_ROUNDING = 1e-6  # sums in float64 over 10⁶ steps round to about 1e-10


@dataclass(frozen=True)
class Finding:
    """One cause, and what is known of it."""

    cause: Cause
    """What it was; "undefined": not to be told from this record; "nothing": no part of it stands out."""
    sentence: str
    """What was found, with the numbers that it rests on, three digits each."""
    advice: str
    """What to try; empty where nothing was found to help."""
    evidence: Mapping[str, float]
    """Name → the values that the sentence cites, no unit; NaN for one that is missing."""


def diagnose(values: Mapping[str, float] | RunRecord, record: RunRecord | None = None) -> list[Finding]:
    """What cost a run the most work and time, in this order; then whether its efficiency is above 1.

    Args:
        values: the run's numbers where it is looked at, named as the fields of `Summary`, and `step`, in steps: they
            say up to where the columns are read. Or the record alone: its last row.
        record: the run; gives the optimizers, the batch size and the columns.

    Returns:
        At least one finding. "nothing" stands alone. What can't be judged because a value is NaN is said as
        "undefined", and never guessed.

    Raises:
        TypeError: values without a record.
    """
    if isinstance(values, RunRecord):
        record = values
        values = _last_row(record)
    if record is None:
        raise TypeError("diagnose needs the record that the values are of, got None; pass diagnose(values, record)")
    check_record("record", record)
    run = _Run(_arguments.numbers("values", values), record)
    costly = [*(_rose(run) or _waste(run)), *_curved(run), *_uneven(run)]
    costly.sort(key=lambda pair: -pair[0])  # stable: equal costs stay in the order above
    found = [finding for _, finding in costly]
    return [*found, *_above_one(run), *_undefined(run)] or [_nothing(run)]


def _last_row(record: RunRecord) -> dict[str, float]:
    summary = record.summary()
    values = {f.name: getattr(summary, f.name) for f in dataclasses.fields(summary)}
    return {name: value for name, value in values.items() if isinstance(value, float)} | {"step": summary.steps}


class _Run:
    """The numbers by name, NaN where there is none, and what was run."""

    def __init__(self, values: Mapping[str, float], record: RunRecord) -> None:
        self.values = dict(values)
        self.record = record
        self.step = float(values.get("step", math.nan))
        self.conversion, self.signal = self["conversion"], self["signal_fraction"]
        self.shares = work_shares(self.conversion, self.signal, full_batch=is_full_batch(record.run))
        self.columns = record.columns

    def __getitem__(self, name: str) -> float:
        return float(self.values.get(name, math.nan))

    @property
    def uncertain(self) -> bool:
        """Whether the loss drop is too uncertain for a work balance."""
        return self["conversion_se"] > UNCERTAIN

    @property
    def balance_known(self) -> bool:
        known = math.isfinite(self.conversion) and math.isfinite(self.signal)
        return known and not self.uncertain and not self["work_ito"] <= 0

    @property
    def wasteful(self) -> bool:
        return self.balance_known and self.conversion < USEFUL_CONVERSION

    # --- what was run

    @property
    def optimizers(self) -> list[Mapping[str, Any]]:
        return list(self.record.run.get("optimizers", []))

    @property
    def groups(self) -> list[Mapping[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.get("groups", [])]

    @property
    def is_plain_sgd(self) -> bool:
        """One optimizer, SGD without momentum."""
        return (
            len(self.optimizers) == 1
            and self.optimizers[0].get("class") == "SGD"
            and all(not group.get("momentum") for group in self.groups)
        )

    @property
    def rate(self) -> float:
        """The largest learning rate of the run, else the one of the optimizer; NaN for none or several."""
        rates = {float(g["lr"]) for g in self.groups if isinstance(g.get("lr"), int | float)}
        if len(rates) > 1:
            return math.nan
        measured = self._up_to_now("learning_rate")
        measured = measured[np.isfinite(measured)]
        return float(measured.max()) if len(measured) else rates.pop() if rates else math.nan

    @property
    def batch(self) -> int | None:
        return self.record.run.get("batch_size")

    @property
    def batches(self) -> int | None:
        """In which an epoch sees all data; None where that is not known."""
        return self.record.run.get("batches_per_epoch")

    # --- columns

    def _up_to_now(self, name: str) -> np.ndarray[Any, Any]:
        column = self.columns.get(name)
        if column is None:
            return np.empty(0)
        here = self.columns["step"] <= self.step if math.isfinite(self.step) else slice(None)
        return np.asarray(column[here], dtype=np.float64)

    @property
    def first_half(self) -> float:
        """ℓ(τ/2)/ℓ(τ): the share of the path that the first half of the time holds, 1; linear between log steps.

        NaN where no log step lies within the run: a straight line would be taken for its course.
        """
        path, elapsed = self._up_to_now("path_length"), self._up_to_now("elapsed")
        known = np.isfinite(path) & np.isfinite(elapsed) if len(path) == len(elapsed) else np.zeros(0, bool)
        total, time = self["path_length"], self["elapsed"]
        if not (known.any() and total > 0 and time > 0):
            return math.nan
        times = np.concatenate([[0.0], elapsed[known], [time]])
        lengths = np.concatenate([[0.0], path[known], [total]])
        if not np.any((times > 0) & (times < time)):
            return math.nan
        return float(np.interp(time / 2, times, lengths)) / total

    @property
    def rate_kept(self) -> float:
        """Last learning rate over the largest, 1; NaN without the column."""
        rates = self._up_to_now("learning_rate")
        rates = rates[np.isfinite(rates)]
        return float(rates[-1] / rates.max()) if len(rates) and rates.max() > 0 else math.nan


# --- the work


def _rose(run: _Run) -> list[tuple[float, Finding]]:
    """A loss that clearly rose: curvature gave back more than the steps along the force took, F·u < ½ u·H·u.

    However noisy the batches are. Steps so large are outside of the balance's second order: no shares are told.
    """
    if not run.conversion + 2 * float(np.nan_to_num(run["conversion_se"])) < 0:
        return []
    evidence = _evidence(run, "conversion", "straightness")
    sentence = f"The loss rose, conversion {number(run.conversion)}: the steps overshoot{_turns(evidence)}."
    return [(math.inf, Finding("bouncing", sentence, f"Try {_third(run)}, or less.", evidence))]


def _waste(run: _Run) -> list[tuple[float, Finding]]:
    """Noise and bouncing, with −ln conversion divided between them as the work is."""
    if not run.wasteful:
        return []
    noise, bouncing = run.shares["noise_share"], run.shares["bouncing_share"]
    total = math.inf if run.conversion <= 0 else -math.log(run.conversion)
    shares, findings = (noise, bouncing), (_noise(run), _bouncing(run))
    if not _noise_leads(run):
        shares, findings = shares[::-1], findings[::-1]
    if shares[1] < SECOND_SHARE:
        return [(total, findings[0])]
    costs = sorted((total * share / (noise + bouncing) for share in shares), reverse=True)
    return list(zip(costs, findings, strict=True))  # the lead says which is first, also where it has the smaller share


def _noise_leads(run: _Run) -> bool:
    return run.shares["noise_share"] > run.shares["bouncing_share"] + NOISE_LEAD


def _noise(run: _Run) -> Finding:
    evidence = _evidence(run, "noise_share", "conversion", "straightness")
    sentence = (
        f"Batch noise took {number(evidence['noise_share'])} of the work{_turns(evidence)}; "
        f"{number(evidence['conversion'])} lowered the loss."
    )
    return Finding("noise", sentence, _noise_advice(run), evidence)


def _noise_advice(run: _Run) -> str:
    larger = "four times the batch" if run.batch is None else f"a batch of {4 * run.batch} instead of {run.batch}"
    if run.batches is not None and run.batches < 4:
        larger = "all data in each batch"
    if run.is_plain_sgd:
        return f"Try {_momentum(run)}, which needs no more data; or {larger}."
    return f"Try {larger}: fewer steps for no more action, but more data."


def _bouncing(run: _Run) -> Finding:
    evidence = _evidence(run, "bouncing_share", "conversion", "straightness")
    sentence = (
        f"Bouncing took {number(evidence['bouncing_share'])} of the work: the steps overshoot{_turns(evidence)}; "
        f"{number(evidence['conversion'])} lowered the loss."
    )
    return Finding("bouncing", sentence, _bouncing_advice(run), evidence)


def _bouncing_advice(run: _Run) -> str:
    slower = f"{_third(run)}: more steps, but less action by more than that"
    return f"Try {_momentum(run)}; or {slower}." if run.is_plain_sgd else f"Try {slower}."


def _turns(evidence: dict[str, float]) -> str:
    """The straightness, where it is known."""
    straightness = evidence["straightness"]
    if math.isnan(straightness):
        del evidence["straightness"]
        return ""
    return f" (straightness {number(straightness)})"


# --- the path and its speed


def _curved(run: _Run) -> list[tuple[float, Finding]]:
    """What turning is left when the lost work is taken out, straightness/conversion, where little is lost."""
    straightness = run["straightness"]
    if not run.balance_known or run.wasteful or math.isnan(straightness):
        return []
    left = straightness / min(run.conversion, 1.0)
    if left >= STRAIGHT_ENOUGH:
        return []
    evidence = _evidence(run, "straightness", "conversion") | {"straightness_over_conversion": left}
    sentence = (
        f"The path bends more than the lost work accounts for: straightness {number(straightness)} is {number(left)} "
        f"of the conversion {number(run.conversion)}."
    )
    cost = -math.log(left) if left > 0 else math.inf
    return [(cost, Finding("curved path", sentence, _STRAIGHTEN, evidence))]


def _uneven(run: _Run) -> list[tuple[float, Finding]]:
    """Steadiness, and where the burst was."""
    steadiness = run["steadiness"]
    if math.isnan(steadiness) or steadiness >= STEADY_ENOUGH:
        return []
    evidence = _evidence(run, "steadiness")
    where, first_half = "", run.first_half
    if math.isfinite(first_half):
        evidence["first_half"] = first_half
        where = f": the first half of the time holds {number(first_half)} of the path"
    sentence = f"The speed changed: steadiness {number(steadiness)}{where}{_loading(run, evidence)}."
    cost = -math.log(steadiness) if steadiness > 0 else math.inf
    return [(cost, Finding("uneven speed", sentence, _uneven_advice(run), evidence))]


def _loading(run: _Run, evidence: dict[str, float]) -> str:
    """Front or back, and whether the schedule did it."""
    first_half = evidence.get("first_half", math.nan)
    if math.isnan(first_half):
        return ""
    if first_half <= 1 - LOADED:
        return ", a crawl and then a burst"
    if first_half < LOADED:
        return ", with bursts in both"
    kept = run.rate_kept
    if math.isnan(kept):
        return ", a burst and then a crawl"
    evidence["rate_kept"] = kept
    if kept < DECAYED:
        return f", a burst and then a crawl, as the learning rate fell to {number(kept)} of its largest"
    return f", a burst and then a crawl: the gradients fell, the learning rate is at {number(kept)} of its largest"


def _uneven_advice(run: _Run) -> str:
    """For a burst at the front alone: what helps against others was not measured."""
    if not run.first_half >= LOADED:
        return ""
    if run.rate_kept < DECAYED:
        return f"The rate falls too early. Try {_third(run)}, kept constant."
    return "Try a learning rate that rises as the gradients fall: lower at the start, and about twice this at the end."


# --- efficiency above 1


def _above_one(run: _Run) -> list[Finding]:
    """η = η_action · (work_action/work_ito)/conversion, with η_action ≤ 1: which of the two quotients lifts it.

    An identity, where Q is the loss drop. The first quotient is inertia: updates that the present force does not
    account for. The second is work lost, or a loss that hardly fell.
    """
    efficiency = run["efficiency"]
    if not efficiency > 1 + _ROUNDING:
        return []
    evidence = {"efficiency": efficiency}
    sentence = f"The efficiency {number(efficiency)} is above 1, where it is no longer a bound: {_why(run, evidence)}."
    advice = "Read efficiency_action and kinematic_efficiency instead, which can't exceed 1."
    return [Finding("efficiency above 1", sentence, advice, evidence)]


def _why(run: _Run, evidence: dict[str, float]) -> str:
    foreign = run.record.reasons.get("efficiency", "")
    if "effective mobility" in foreign:
        classes = dict.fromkeys(one_line(o.get("class", "one"), 60) for o in run.optimizers)
        names = " and ".join(classes) or "this optimizer"
        return f"{names} has no mobility formula, and an effective one stands in for it"
    if (estimator := run.record.run.get("entropy_production") or "loss_drop") != "loss_drop":
        return f"it divides by {one_line(estimator, 60)} work, which undercounts what was dissipated"
    drop, error = run["loss_drop"], run["loss_drop_se"]
    if error > 0 and drop < 4 * error:
        evidence |= {"loss_drop": drop, "loss_drop_se": error}
        return f"the loss hardly fell, by {number(drop)} with a standard error of {number(error)}"
    inertia = run["work_action"] / run["work_ito"] if run["work_ito"] > 0 else math.nan
    lost = 1 / run.conversion if run.conversion > 0 else math.nan
    if math.isnan(inertia) or math.isnan(lost) or not run.balance_known:
        return "why is not to be told, as the works or the loss drop are undefined"
    if inertia >= lost:
        evidence["inertia"] = inertia
        return f"inertia, the updates' own work is {number(inertia)} times that along the gradients"
    evidence["conversion"] = run.conversion
    share = "noise_share" if _noise_leads(run) else "bouncing_share"
    evidence[share] = run.shares[share]
    taken = f"{number(evidence[share])} of the work"
    if share == "noise_share":
        return f"batch noise, {taken}, moved the weights too (conversion {number(run.conversion)})"
    return f"learning rate x curvature is of order 1, {taken} was bouncing (conversion {number(run.conversion)})"


# --- what can't be told, and when all is well


def _undefined(run: _Run) -> list[Finding]:
    """The factors that are missing, with their reasons."""
    names = [n for n in ("conversion", "signal_fraction", "straightness", "steadiness") if not math.isfinite(run[n])]
    if names:
        evidence = {name: run[name] for name in names}
        told = "; ".join(f"{n} is undefined{_reason(run, n)}" for n in names)
        return [Finding("undefined", f"Not everything could be judged: {told}.", "", evidence)]
    if run["work_ito"] <= 0:
        evidence = {"work_ito": run["work_ito"]}
        sentence = f"Where the work went is not to be told: it is {number(run['work_ito'])}, not positive."
        return [Finding("undefined", sentence, "", evidence)]
    if run.uncertain:
        evidence = _evidence(run, "conversion", "conversion_se")
        sentence = (
            f"Where the work went is not to be told: the conversion {number(run.conversion)} has a standard error "
            f"of {number(run['conversion_se'])}, as the loss drop is uncertain."
        )
        return [Finding("undefined", sentence, "Measure longer, or the loss with probe_batches=4.", evidence)]
    return []


def _reason(run: _Run, name: str) -> str:
    reason = run.record.reasons.get(name)
    return f" ({reason.rstrip('. ')})" if reason else ""


def _nothing(run: _Run) -> Finding:
    evidence = _evidence(run, "conversion", "straightness", "steadiness")
    sentence = (
        f"Nothing stands out: {number(run.conversion)} of the work lowered the loss (straightness "
        f"{number(run['straightness'])}, steadiness {number(run['steadiness'])})."
    )
    return Finding("nothing", sentence, "", evidence)


# --- words


def _evidence(run: _Run, *names: str) -> dict[str, float]:
    return {name: run.shares[name] if name in run.shares else run[name] for name in names}


def _third(run: _Run) -> str:
    rate = run.rate
    if not rate > 0:
        return "a third of the learning rate"
    return f"a learning rate of about {number(rate / 3, 1)} instead of {number(rate, 2)}"


def _momentum(run: _Run) -> str:
    """The same steady mobility lr/(1 − β)."""
    rate = run.rate
    tenth = "a tenth of the learning rate" if not rate > 0 else f"a learning rate of {number(rate / 10, 2)}"
    return f"momentum 0.9 with {tenth}: about the same steps for a fraction of the action"
