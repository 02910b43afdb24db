"""A number known from a sample of replicas: its value, its standard error, and why it is missing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """An estimated number; `print` shows value ± standard error."""

    value: float
    """In the unit that the field or function says; NaN where `reason` says why."""
    standard_error: float
    """Of `value`, in its unit; NaN where the sample tells none."""
    reason: str = ""
    """Why a number is NaN; empty where none is."""

    @classmethod
    def undefined(cls, reason: str) -> Estimate:
        return cls(math.nan, math.nan, reason)

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"undefined: {self.reason}"
        if math.isnan(self.standard_error):
            return f"{self.value:.6g}"
        return f"{self.value:.6g} ± {self.standard_error:.2g}"


@dataclass(frozen=True)
class Sampled:
    """A statistic with what each replica adds to it: errors of sums and ratios then know their correlations.

    value ± √(Var(influence)/R + systematic²): `influence` (R,) are jackknife pseudo-values, or the terms of a mean;
    only their differences count. `systematic`: what else the value may be off by, whatever the replicas.
    """

    value: float
    influence: Tensor
    reason: str = ""
    systematic: float = 0.0

    @classmethod
    def mean(cls, terms: Tensor) -> Sampled:
        return cls(float(terms.mean()), terms)

    @classmethod
    def undefined(cls, reason: str, like: Tensor) -> Sampled:
        return cls(math.nan, torch.full_like(like, math.nan), reason)

    def __add__(self, other: Sampled) -> Sampled:
        systematic = math.hypot(self.systematic, other.systematic)
        influence = self.influence + other.influence
        return Sampled(self.value + other.value, influence, self.reason or other.reason, systematic)

    def __sub__(self, other: Sampled) -> Sampled:
        return self + other.times(-1.0)

    def times(self, factor: float) -> Sampled:
        return Sampled(factor * self.value, factor * self.influence, self.reason, abs(factor) * self.systematic)

    def over(self, other: Sampled) -> Sampled:
        """The ratio, to first order in the errors (delta method)."""
        ratio = self.value / other.value if other.value else math.nan
        below = other.value or math.nan
        influence = (self.influence - ratio * other.influence) / below
        systematic = math.hypot(self.systematic, ratio * other.systematic) / abs(below)
        return Sampled(ratio, influence, self.reason or other.reason, systematic)

    @property
    def standard_error(self) -> float:
        """√(Var/R + systematic²); NaN for one replica."""
        count = len(self.influence)
        return math.hypot(float(self.influence.std()) / math.sqrt(count), self.systematic) if count > 1 else math.nan

    def estimate(self) -> Estimate:
        error = self.standard_error
        reason = self.reason
        if not reason and math.isnan(error):
            reason = "one replica tells no standard error"
        return Estimate(self.value, error, reason)
