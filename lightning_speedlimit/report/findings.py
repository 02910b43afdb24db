"""What a diagnosis is made of: findings, and the run that they are of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.tuning import Tuning, is_full_batch
from lightning_speedlimit.report import course
from lightning_speedlimit.report.alignment import SURE, work_shares
from lightning_speedlimit.report.interpolation import Values
from lightning_speedlimit.report.labels import effective_batch

Cause = Literal[
    "divergence",
    "no clear fall",
    "plateau",
    "noise",
    "bouncing",
    "curved path",
    "uneven speed",
    "clipping",
    "efficiency above 1",
    "undefined",
    "nothing",
]
CAUSES: tuple[Cause, ...] = get_args(Cause)

# Fixed on the digits of one seed by examples/diagnosis/truth.py (36 settings of SGD, momentum and Adam), and judged
# on another seed, on batches without replacement and on a transformer: docs/diagnosis.md.
USEFUL_CONVERSION = 0.5  # at least this much of the work lowered the loss: the rest is not worth a finding
UNCERTAIN = 0.1  # standard error of the conversion from which on the work balance is not judged: a convention

# What was tried against these and did not hold, or was not tried: docs/diagnosis.md.
_NO_ADVICE: Mapping[Cause, str] = {
    "bouncing": "No known fix: a third of the learning rate took more steps in 10 of 10 runs.",
    "curved path": "No known fix.",
    "uneven speed": "No known fix.",
    "plateau": "No known fix.",
    "clipping": "Whether another threshold helps was not tried.",
}


@dataclass(frozen=True)
class Finding:
    """One cause, and what is known of it."""

    cause: Cause
    """What it was; "undefined": not to be told from this record; "nothing": no part of it stands out."""
    sentence: str
    """What was found, with the numbers that it rests on, three digits each."""
    advice: str
    """What to do, where that was shown to help, and at what cost; else empty."""
    evidence: Mapping[str, float]
    """Name → the values that the sentence cites; NaN for one that is missing."""

    @property
    def text(self) -> str:
        """The sentence, and the advice; where there is none what was tried in vain."""
        return " ".join(part for part in (self.sentence, self.advice or _NO_ADVICE.get(self.cause, "")) if part)


class JudgedRun:
    """The numbers by name, NaN where there is none, and what was run."""

    def __init__(self, values: Mapping[str, float], record: RunRecord) -> None:
        self.values = dict(values)
        self.record = record
        self.step = float(values.get("step", math.inf))
        self.step = math.inf if math.isnan(self.step) else self.step
        self.conversion, self.signal = self["conversion"], self["signal_fraction"]
        decay = self["work_decay"] / self["work_ito"] if abs(self["work_decay"]) > 0 else 0.0
        self.shares = work_shares(self.conversion - decay, self.signal, record.run)
        self._columns = record.columns

    def __getitem__(self, name: str) -> float:
        return float(self.values.get(name, math.nan))

    def evidence(self, *names: str) -> dict[str, float]:
        return {name: self.shares[name] if name in self.shares else self[name] for name in names}

    @cached_property
    def tuning(self) -> Tuning:
        """Of the steps up to here, or up to where the loss stopped falling."""
        step = self.step if self.plateau is None else self.plateau.step
        here = self._columns["step"] <= step
        return Tuning({name: column[here] for name, column in self._columns.items()}, self.record.run)

    @property
    def tokens_per_step(self) -> float:
        """Mean over the steps up to here; NaN where tokens are not counted."""
        tokens, steps = self.until("tokens"), self.until("step")
        return float(tokens[-1] / steps[-1]) if len(tokens) and steps[-1] > 0 else math.nan

    @property
    def uncertain(self) -> bool:
        """Whether the loss drop is too uncertain for a work balance."""
        return self["conversion_se"] > UNCERTAIN

    @property
    def clearly_fell(self) -> bool:
        """Whether the loss drop is beyond 3 of its standard errors; so too where either is unknown.

        And where each step sees all data: what its losses scatter by is no noise.
        """
        return is_full_batch(self.record.run) or not self["loss_drop"] < SURE * self["loss_drop_se"]

    @property
    def balance_known(self) -> bool:
        known = math.isfinite(self.conversion) and math.isfinite(self.signal)
        return known and self.clearly_fell and not self.uncertain and not self["work_ito"] <= 0

    @property
    def wasteful(self) -> bool:
        return self.balance_known and self.conversion < USEFUL_CONVERSION

    # --- what was run

    @property
    def optimizers(self) -> list[Mapping[str, Any]]:
        return list(self.record.run.get("optimizers", []))

    @property
    def batch(self) -> float | None:
        """Samples of a step."""
        return effective_batch(self.record.run)

    @property
    def steps_per_epoch(self) -> float | None:
        """In which an epoch sees all data; None where that is not known."""
        batches = self.record.run.get("batches_per_epoch")
        return None if batches is None else batches / (self.record.run.get("accumulate_grad_batches") or 1)

    # --- its course

    @cached_property
    def divergence(self) -> course.Divergence | None:
        return course.divergence(self.record, self.step)

    @cached_property
    def plateau(self) -> course.Plateau | None:
        return None if self.divergence else course.plateau(self.record, self.step)

    @cached_property
    def clipped(self) -> course.Clipped | None:
        return course.clipped(self.record, self.step)

    def until(self, name: str, step: float | None = None) -> Values:
        """A column up to a step, else up to where the run is looked at; empty where there is none."""
        column = self._columns.get(name)
        if column is None:
            return np.empty(0)
        return np.asarray(column[self._columns["step"] <= (self.step if step is None else step)], dtype=np.float64)

    def rate_kept(self, step: float | None = None) -> float:
        """The learning rate at a step, else the last one, over the largest, 1; NaN without the column."""
        rates, here = self.until("learning_rate"), self.until("learning_rate", step)
        rates, here = rates[np.isfinite(rates)], here[np.isfinite(here)]
        return float(here[-1] / rates.max()) if len(here) and rates.max() > 0 else math.nan

    @property
    def first_half(self) -> float:
        """ℓ(τ/2)/ℓ(τ): the share of the path that the first half of the time holds, 1; linear between log steps.

        NaN where no log step lies within the run: a straight line would be taken for its course.
        """
        path, elapsed = self.until("path_length"), self.until("elapsed")
        known = np.isfinite(path) & np.isfinite(elapsed) if len(path) == len(elapsed) else np.zeros(0, bool)
        total, time = self["path_length"], self["elapsed"]
        if not (known.any() and total > 0 and time > 0):
            return math.nan
        times = np.concatenate([[0.0], elapsed[known], [time]])
        lengths = np.concatenate([[0.0], path[known], [total]])
        if not np.any((times > 0) & (times < time)):
            return math.nan
        return float(np.interp(time / 2, times, lengths)) / total
