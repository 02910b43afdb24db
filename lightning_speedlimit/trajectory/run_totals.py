"""What a measurement knows on the host: sums by group and layer, and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.losses import LossDrop
from lightning_speedlimit.trajectory.mobility import Inertia
from lightning_speedlimit.trajectory.totals import Kind

NAN = math.nan


@dataclass(frozen=True)
class SectionTotals:
    """Sums over the run of one group and layer; see `sums.SUMS`. Squares in parameter², works in loss units.

    group: which parameters share one effective mobility and one inertia, whatever their layers.
    sums: with "work_ito", "displacement_squared", "free_displacement_squared", "weighted" = Σ (Δθ_i)²/m_i.
    inertia: how the group's optimizer spreads a force over steps.
    """

    layer: str
    group: str
    kind: Kind
    sums: dict[str, float]
    inertia: Inertia

    def numerator(self, steps: float) -> float:
        """Σ (Δθ_i)²/m_i; an effective mobility Σ‖u‖²/work_ito has m = steps × it. NaN where work_ito ≤ 0."""
        if self.kind != "effective":
            return self.sums["weighted"]
        work, squares = self.sums["work_ito"], self.sums["free_squares"]
        if squares == 0.0:
            return 0.0
        return ratio(self.sums["free_displacement_squared"] * work, steps * squares) if work > 0 else NAN

    def plus(self, changes: Mapping[str, float], scale: float = 1.0) -> SectionTotals:
        """With something added to its sums."""
        return replace(self, sums={name: value + scale * changes.get(name, 0.0) for name, value in self.sums.items()})

    @property
    def work_action(self) -> float:
        """Σ u²/μ, which is work_ito where μ is the effective one."""
        return self.sums["work_ito"] if self.kind == "effective" else self.sums["work_action"]


@dataclass(frozen=True)
class Error:
    """One standard error of the totals in one direction: of some sections' sums, of the loss drop.

    Errors of different directions are independent; a value's variance is the sum over them of its change squared.
    """

    sums: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # section → changes
    loss: float = 0.0


@dataclass(frozen=True)
class RunTotals:
    """What a measurement knows on the host.

    steps: K, joint steps. measured: those measured. elapsed: τ on the chosen clock. lasting: (Σ lr)²/Σ lr², the steps
    of one rate that would diffuse as far; K where rates are not known. path_length, action: of the whole parameter
    vector where they are not sums over the sections. errors: of what was sampled.
    """

    sections: list[SectionTotals]
    steps: float
    measured: float
    elapsed: float
    loss: LossDrop | None
    gradient_norm: float
    clipped_norm: float
    step_norm: float
    learning_rate: float
    lasting: float = NAN
    whole_norm: bool = False  # the gradients' norms are of all coordinates, whatever was drawn
    path_length: float | None = None
    layer_paths: Mapping[str, float] = field(default_factory=dict)  # ℓ of each layer's own motion
    overlaps: bool = False  # of neighbouring gradients are summed up
    per_rate: bool = False  # the action is counted on the clock "lr"
    coordinates: float = 0.0  # that are measured
    moves: float = 0.0  # steps before which weights were moved elsewhere
    moved: float = 0.0  # √Σ of these moves' squares
    unkept: bool = False  # θ_0 was not kept when weights were moved: ‖θ_K − θ_0‖ is not known
    untold: str = ""  # why works are not known, though gradients were seen
    unforced: bool = False  # a step moved weights without a gradient
    single: bool = False  # products are rounded to float32
    no_formula: tuple[str, ...] = ()
    errors: tuple[Error, ...] = ()
    sampled: bool = False  # coordinates or steps: all values carry an error
    unspread: bool = False  # too few sampled steps to tell an error
    no_loss: str = ""  # why there is none, where it is not for want of recording
    no_path: str = ""  # why the path length is unknown

    def sum(self, name: str) -> float:
        return added(section.sums[name] for section in self.sections)

    def merged(self) -> RunTotals:
        """With one section for each group, whatever its layers: the same numbers from fewer sums."""
        places: dict[tuple[str, str], int] = {}
        own = [places.setdefault((section.group, section.kind), len(places)) for section in self.sections]
        parts: list[list[SectionTotals]] = [[] for _ in places]
        for place, section in zip(own, self.sections, strict=True):
            parts[place].append(section)
        sections = [replace(part[0], sums=_summed([s.sums for s in part])) for part in parts]
        errors = tuple(Error(_by_place(error.sums, own), error.loss) for error in self.errors)
        return replace(self, sections=sections, errors=errors)

    def layer(self, name: str) -> RunTotals:
        """Of one layer alone: ℓ is that of its own motion (of shards NaN: no process knows it), no loss, no norms."""
        sections = [s for s in self.sections if s.layer == name]
        path = self.layer_paths.get(name, NAN if self.layer_paths else self.sum("path_length"))
        if self.path_length is not None:
            path = self.path_length if len(sections) == len(self.sections) else NAN
        unknown: dict[str, Any] = dict.fromkeys(("gradient_norm", "clipped_norm", "step_norm", "learning_rate"), NAN)
        return replace(self, sections=sections, path_length=path, loss=None, errors=(), sampled=False, **unknown)

    def shifted(self, error: Error, scale: float) -> RunTotals:
        """As it would be with `scale` times an error."""
        changes = error.sums
        sections = [s.plus(changes[i], scale) if i in changes else s for i, s in enumerate(self.sections)]
        loss = self.loss
        if loss is not None and error.loss:
            loss = replace(loss, value=loss.value + scale * error.loss)
        path = self.path_length
        if path is not None:
            path += scale * sum(c.get("path_length", 0.0) for c in changes.values())
        return replace(self, sections=sections, loss=loss, path_length=path, **self._shifted_norms(changes, scale))

    def _shifted_norms(self, changes: Mapping[int, Mapping[str, float]], scale: float) -> dict[str, Any]:
        gradient, step = (
            scale * sum(c.get(name, 0.0) for c in changes.values()) for name in ("gradient_squares", "step_squares")
        )
        gradient = 0.0 if self.whole_norm else gradient
        clipped = ratio(self.clipped_norm, self.gradient_norm) ** 2 * gradient
        return {
            "gradient_norm": math.sqrt(max(0.0, self.gradient_norm**2 + gradient)),
            "clipped_norm": math.sqrt(max(0.0, self.clipped_norm**2 + clipped)),
            "step_norm": math.sqrt(max(0.0, self.step_norm**2 + step)),
        }


def _summed(sums: list[dict[str, float]]) -> dict[str, float]:
    return {name: added(own[name] for own in sums) for name in sums[0]} if len(sums) > 1 else sums[0]


def _by_place(changes: Mapping[int, Mapping[str, float]], places: list[int]) -> dict[int, Mapping[str, float]]:
    """The changes of sections that are merged, added up."""
    found: dict[int, Mapping[str, float]] = {}
    for section, own in changes.items():
        known = found.setdefault(places[section], {})
        found[places[section]] = {n: known.get(n, 0.0) + own.get(n, 0.0) for n in {**known, **own}}
    return found


def added(values: Iterable[float]) -> float:
    """Σ; NaN where one is not finite (−inf + inf is no reason to raise)."""
    known = list(values)
    return math.fsum(known) if all(map(math.isfinite, known)) else NAN


def ratio(numerator: float, denominator: float) -> float:
    """x/y; NaN for 0/0 and for x/0."""
    return numerator / denominator if denominator != 0.0 else NAN


def directions(covariance: Tensor) -> list[Tensor]:
    """Columns whose outer products add up to the covariance; what rounding made negative counts 0."""
    scale = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    plain = covariance / torch.outer(scale, scale)
    if not bool(plain.isfinite().all()):
        return [torch.full_like(scale, math.nan)]
    values, vectors = torch.linalg.eigh(plain)
    return [scale * v * root for v, root in zip(vectors.T, values.clamp_min(0).sqrt(), strict=True) if float(root) > 0]
