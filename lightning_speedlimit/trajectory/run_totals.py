"""What a measurement knows on the host: sums by group and layer, and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_speedlimit.trajectory.losses import LossDrop
from lightning_speedlimit.trajectory.mobility import Inertia
from lightning_speedlimit.trajectory.sums import SUMS

NAN = math.nan
Numbers = Any  # a float; in `RunTotals.shifted` an array (2, n) of what it would be
Error = dict[str, Numbers]  # of one source by group (NAMES, n): what one standard error in each of n directions changes

# What is of the moment of a reading. Squares in parameter², works in loss units.
NOW = (
    "displacement_squared",
    "free_displacement_squared",  # without decoupled decay
    "weighted",  # Σ (Δθ_i)²/m_i
    "step_squares",
    "gradient_squares",
    "net_squared",
)
COLUMNS = (*SUMS, "waiting", *NOW)
NAMES = (*COLUMNS, "work_ito")  # which is work_met and what waits for its next gradient
SHIFT = 1e-3  # of one standard error: linear to 1e-6 of it at most, and rounding to 1e-13 of the value


@dataclass(frozen=True)
class SectionTotals:
    """Sums over the run of one group and layer.

    group: which parameters share one effective mobility and one inertia, whatever their layers.
    effective: the mobility is Σ‖u‖²/work_ito.
    sums: by NAMES; see `sums.SUMS`. Squares in parameter², works in loss units.
    inertia: how the group's optimizer spreads a force over steps.
    """

    layer: str
    group: str
    effective: bool
    sums: Mapping[str, Numbers]
    inertia: Inertia

    def plus(self, changes: Mapping[str, Numbers]) -> SectionTotals:
        """With something added to its sums."""
        return replace(self, sums={name: value + changes.get(name, 0.0) for name, value in self.sums.items()})

    def numerator(self, steps: float) -> Numbers:
        """Σ (Δθ_i)²/m_i; an effective mobility has m = steps × it. NaN where work_ito ≤ 0."""
        if not self.effective:
            return self.sums["weighted"]
        work, squares = self.sums["work_ito"], self.sums["free_squares"]
        found = ratio(self.sums["free_displacement_squared"] * work, steps * squares)
        return np.where(squares == 0.0, 0.0, np.where(work > 0.0, found, NAN))

    @property
    def work_action(self) -> Numbers:
        """Σ u²/μ, which is work_ito where μ is the effective one."""
        return self.sums["work_ito"] if self.effective else self.sums["work_action"]


@dataclass(frozen=True)
class RunTotals:
    """What a measurement knows on the host.

    steps: K, joint steps. measured: those measured. elapsed: τ on the chosen clock. lasting: (Σ lr)²/Σ lr², the steps
    of one rate that would diffuse as far; K where rates are not known. errors: of each source of what was sampled; a
    value's variance is the sum of its changes' squares, over all directions.
    """

    sections: Sequence[SectionTotals]
    steps: float
    measured: float
    lasting: float
    elapsed: float
    loss: LossDrop | None
    gradient_norm: Numbers
    clipped_norm: Numbers
    step_norm: Numbers
    path_length: Numbers
    learning_rate: float
    whole_norm: bool = False  # the gradients' norms are of all coordinates, whatever was drawn
    layer_paths: Mapping[str, float] = field(default_factory=dict)  # ℓ of each layer's own motion
    overlaps: bool = False  # of neighbouring gradients are summed up
    per_rate: bool = False  # the action is counted on the clock "lr"
    coordinates: float = 0.0  # that are measured
    moves: float = 0.0  # steps before which weights were moved elsewhere
    moved: float = 0.0  # √Σ of these moves' squares
    unkept: bool = False  # θ_0 was not kept when weights were moved: ‖θ_K − θ_0‖ is not known
    no_work: str = ""  # why works are not known, though gradients were seen
    single: bool = False  # products are rounded to float32
    no_formula: tuple[str, ...] = ()
    errors: Sequence[Error] = ()
    sampled: bool = False  # coordinates or steps: all values carry an error
    unspread: bool = False  # too few sampled steps to tell an error
    no_loss: str = ""  # why there is none, where it is not for want of recording
    no_path: str = ""  # why the path length is unknown

    def sum(self, name: str) -> Numbers:
        return added(section.sums[name] for section in self.sections)

    def merged(self) -> RunTotals:
        """With one section for each group, whatever its layers: the same numbers from fewer sums."""
        parts: dict[str, list[SectionTotals]] = {}
        for section in self.sections:
            parts.setdefault(section.group, []).append(section)
        return replace(self, sections=[_merged(part) for part in parts.values()])

    def layer(self, name: str) -> RunTotals:
        """Of one layer alone: ℓ is that of its own motion (of shards NaN: no process knows it), no loss, no norms."""
        sections = [s for s in self.sections if s.layer == name]
        path = self.path_length if len(sections) == len(self.sections) else self.layer_paths.get(name, NAN)
        unknown: dict[str, Any] = dict.fromkeys(("gradient_norm", "clipped_norm", "step_norm", "learning_rate"), NAN)
        return replace(self, sections=sections, path_length=path, loss=None, errors=(), sampled=False, **unknown)

    def shifted(self) -> list[RunTotals]:
        """Of each source of errors, as it would be with ±SHIFT of its n standard errors: (2, n) for each number."""
        found = [self._shifted(error) for error in self.errors]
        if self.loss is not None:
            either: Numbers = SHIFT * self.loss.standard_error * np.array([[1.0], [-1.0]])
            found.append(replace(self, loss=replace(self.loss, value=self.loss.value + either)))
        return found

    def _shifted(self, error: Error) -> RunTotals:
        changes = {g: dict(zip(NAMES, SHIFT * np.stack([own, -own], 1), strict=True)) for g, own in error.items()}
        path, gradient, step = (
            sum(own[name] for own in changes.values()) for name in ("path_length", "gradient_squares", "step_squares")
        )
        known = self.whole_norm or self.gradient_norm == 0.0
        gradient, clipping = (0.0, 0.0) if known else (gradient, ratio(self.clipped_norm, self.gradient_norm))
        return replace(
            self,
            sections=[s.plus(changes[s.group]) if s.group in changes else s for s in self.sections],
            path_length=self.path_length + path,
            gradient_norm=_norm(self.gradient_norm, gradient),
            clipped_norm=_norm(self.clipped_norm, clipping**2 * gradient),
            step_norm=_norm(self.step_norm, step),
        )


def _merged(sections: Sequence[SectionTotals]) -> SectionTotals:
    first = sections[0]
    return replace(first, sums={name: sum(section.sums[name] for section in sections) for name in first.sums})


def _norm(norm: float, change: Numbers) -> Numbers:
    """√(‖x‖² + a change of it)."""
    return np.sqrt(np.maximum(0.0, np.square(norm) + change))


def added(values: Iterable[Numbers]) -> Numbers:
    """Σ; NaN where it is not finite."""
    total = sum(values, start=0.0)
    return total + 0.0 * total


def ratio(numerator: Numbers, denominator: Numbers) -> Numbers:
    """x/y; NaN for 0/0 and for x/0."""
    if isinstance(denominator, float):  # a tenth of the time
        return numerator / denominator if denominator != 0.0 else NAN
    return np.divide(numerator, np.where(denominator == 0.0, NAN, denominator))


def directions(covariance: Tensor) -> Tensor:
    """(n, columns): rows whose outer products add up to the covariance; what rounding made negative counts 0."""
    scale = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    plain = covariance / torch.outer(scale, scale)
    if not bool(plain.isfinite().all()):
        return torch.full_like(scale, math.nan)[None]
    values, vectors = torch.linalg.eigh(plain)
    roots = values.clamp_min(0).sqrt()
    found: Tensor = scale * vectors.T * roots[:, None]
    return found[roots > 0]
