"""The sums of one motion as totals: on the device, by group and layer, with the covariance of what was drawn."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.clipping import verdict
from lightning_speedlimit.trajectory.follower import Follower
from lightning_speedlimit.trajectory.mobility import UNKNOWN
from lightning_speedlimit.trajectory.norms import gradient_squares
from lightning_speedlimit.trajectory.run_totals import COLUMNS, NAMES, Error, Numbers, SectionTotals, directions
from lightning_speedlimit.trajectory.sketch import Sketch
from lightning_speedlimit.trajectory.sums import NEGATIVE, SUMS

_PIECE = 1 << 13  # units that are looked at together: so many times the columns are little memory
_LITTLE = 1e-30  # instead of 0, where all units of a parameter are certain: 0 is divided by it
# What counts c times where gradients were scaled by c and not clipped.
_SCALED = ("work_ito", "work_met", "work_anti_ito", "waiting", "work_action", "work_decay", "weighted")
_Columns = dict[str, tuple[Tensor, float]]  # by COLUMNS a number of each row, and what it is multiplied by


class Section(NamedTuple):
    """The parameters of one group and layer of a motion."""

    group: int
    layer: str


class Table:
    """What a motion has to tell at a reading.

    values: (sections, COLUMNS). covariances: by group (COLUMNS, COLUMNS), of the error of the values of drawn
    coordinates; empty where all are measured. sketch: buckets by sign.

    Args:
        place: of the optimizer, and of the motion among its own. sharded: a process may hold small parameters alone,
            and draw nothing of them: there is a covariance of every group.
        factor: steps over measured steps: what sums over measured steps are multiplied by.
    """

    def __init__(
        self, place: tuple[int, int], follower: Follower, factor: float, sketch: Sketch | None, *, sharded: bool
    ) -> None:
        self.place, self.follower, self.motion = place, follower, follower.motions[place[1]]
        self._factor = factor
        coordinates = self.motion.coordinates
        self.sketch = None if sketch is None else Sketch.empty(coordinates.device)
        own = [Section(member.group, member.layer) for member in self.motion.members]
        self.sections = list(dict.fromkeys(own))
        columns = self._columns(sketch)
        self.values = self._totals(columns, [self.sections.index(section) for section in own])
        self.covariances = self._covariances(columns) if sharded or not coordinates.exact else {}

    def _columns(self, sketch: Sketch | None) -> _Columns:
        """Of −f·u, lost L2 energy and waiting work the sign turns; products are scaled back. What is missing is 0."""
        motion, factor, unscaled = self.motion, self._factor, self.motion.coordinates.unscaled
        found = {
            name: (functools.reduce(torch.sub, total.parts()), -factor if name in NEGATIVE else factor)
            for name in SUMS
            if (total := motion.sums.of(name)) is not None
        }
        if motion.waiting:
            found["waiting"] = motion.last, -factor * unscaled
        if self.follower.took_part and not motion.coordinates.exact:  # for errors: the norms themselves are read apart
            known = motion.gradient_squares
            gradient = gradient_squares(motion, closed=True) if known is None else known
            found |= {"step_squares": (motion.squares, unscaled), "gradient_squares": (gradient, 1.0)}
        displacement, free, weighted, net = self._displacements(sketch)
        return found | {
            "displacement_squared": (displacement, 1.0),
            "free_displacement_squared": (free, 1.0),
            "weighted": (weighted, unscaled / factor),
            "net_squared": (net, 1.0),
        }

    def _displacements(self, sketch: Sketch | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each row ‖Σ u‖², that without decoupled decay, Σ of its squares over m, and ‖θ_K − θ_0‖².

        The last is the first with what moved the weights outside of the steps.
        """
        motion, coordinates = self.motion, self.motion.coordinates
        displacement, weighted = coordinates.row(motion.total), coordinates.row()
        free = displacement if motion.decay.travelled is None else coordinates.row(motion.total)
        net = displacement if motion.moves.origin is None else coordinates.row(motion.total)
        for rows in coordinates.pieces():
            moved = motion.theta.rows[rows] - motion.start[rows]
            coordinates.squares(moved, displacement[rows])
            if motion.moves.origin is not None:
                coordinates.squares(motion.theta.rows[rows] - motion.moves.origin[rows], net[rows])
            if sketch is not None and self.sketch is not None:
                sketch.add(moved, rows, self.sketch)
            if motion.decay.travelled is not None:
                own = motion.decay.travelled.high[rows] + motion.decay.travelled.low[rows]
                moved = moved.add_(own, alpha=self._factor) if motion.snapshots else own
                coordinates.squares(moved, free[rows])
            m = motion.mobility.m
            if m is not None:
                share = torch.add(m.high[rows], m.low[rows]).reciprocal_()
                share.nan_to_num_(nan=0.0, posinf=0.0).mul_(moved)  # what has no mobility has not moved
                coordinates.dots([(share, moved, weighted[rows])])
        return displacement, free, weighted, net

    def _totals(self, columns: _Columns, sections: list[int]) -> Tensor:
        """(sections, COLUMNS): weighted sums over the rows of each section. What is not finite stays in its own."""
        coordinates, number = self.motion.coordinates, len(self.sections)
        none = 0.0 * self._factor  # NaN where no step was measured
        found = coordinates.weights.new_full((len(COLUMNS), number), none)
        for name, (column, scale) in columns.items():
            found[COLUMNS.index(name)] = coordinates.totals(column, sections, number, scale)
        return found.T

    def _covariances(self, columns: _Columns) -> dict[int, Tensor]:
        """Of each group Σ_h n_h/(n_h − 1) Σ_{i ∈ h} (1 − π_i)(e_i − ē_h)(e_i − ē_h)ᵀ over its parameters h.

        Hájek's approximation of the variance of a systematic draw with unequal chances (J. Hájek, Ann. Math. Stat.
        35, 1964); e_i are the units' weighted contributions, to first order: to ‖u‖ half of ‖u_i‖²/‖u‖.

        ē_h = Σ c_i e_i/Σ c_i, c_i = n_h/(n_h − 1) (1 − π_i); 0 and 1 − π_i where n_h is 1.
        """
        coordinates, members = self.motion.coordinates, self.motion.members
        none = coordinates.weights.new_zeros(len(COLUMNS), len(COLUMNS))
        found = {member.group: none.clone() for member in members}
        if coordinates.exact:
            return found
        places, c = range(len(members)), coordinates.variance_weights()
        certain, member_of = c <= 0.0, coordinates.of_each(places, torch.int64)  # what is certain may be inf
        means = none.new_zeros(len(COLUMNS), len(members))
        for name, (column, scale) in columns.items():
            row = (column * c).masked_fill_(certain, 0.0)
            means[COLUMNS.index(name)] = coordinates.totals(row, places, len(places), _first_order(name, scale))
        several = torch.tensor([float(number > 1) for number in coordinates.counts], dtype=c.dtype, device="cpu")
        means *= several.to(c.device, non_blocking=True)
        means /= coordinates.totals(c / coordinates.weights, places, len(places)).clamp_min(_LITTLE)
        for group, neighbours in itertools.groupby(places, lambda i: members[i].group):
            here = list(neighbours)
            low, high = coordinates.rows[here[0]].start, coordinates.rows[here[-1]].stop
            for start in range(low, high, _PIECE):
                rows = slice(start, min(start + _PIECE, high))
                own = self._contributions(columns, rows).sub_(means.index_select(1, member_of[rows]))
                own.masked_fill_(certain[rows], 0.0)
                found[group].addmm_(own * c[rows], own.T)
        return found

    def _contributions(self, columns: _Columns, rows: slice) -> Tensor:
        """(COLUMNS, rows): the units' weighted contributions."""
        weights = self.motion.coordinates.weights[rows]
        found = weights.new_zeros(len(COLUMNS), len(weights))
        for name, (column, scale) in columns.items():
            torch.mul(weights, column[rows], out=found[COLUMNS.index(name)]).mul_(_first_order(name, scale))
        return found

    # -- on the host -----------------------------------------------------------------------------------------

    def without_formula(self) -> set[Section]:
        """Where the mobility of a parameter has no formula: it is the effective one."""
        runs, members = self.motion.runs.current(self.motion.missing), self.motion.members
        effective = [m for run in runs if run.formula is None for m in members[run.members.start : run.members.stop]]
        return {Section(member.group, member.layer) for member in effective}

    def read(self, host: dict[str, Tensor], *, uneven: bool) -> tuple[list[SectionTotals], list[Error], bool]:
        """The sections, the errors of what was drawn, and whether works can't be told.

        Args:
            host: the values and covariances, by name. uneven: shards were clipped by several factors.
        """
        stats = host.get(f"changes {self.place[0]}")
        told = verdict(self.follower.changes, None if stats is None else stats.tolist())
        without_formula = self.without_formula()
        sections: list[SectionTotals] = []
        groups: dict[int, str] = {}
        for section, sums in zip(self.sections, _named(host[f"values {self.place}"], told.factor), strict=True):
            effective = uneven or told.effective or section in without_formula
            sections.append(self._section(section, sums.tolist(), effective=effective))
            groups.setdefault(section.group, sections[-1].group)
        errors: list[Error] = []
        for group in self.covariances:
            changes = _named(directions(host[f"covariance {self.place} {group}"]), told.factor)
            errors.append({groups[group]: changes.T})
        return sections, errors, math.isnan(told.factor)

    def _section(self, section: Section, sums: list[float], *, effective: bool) -> SectionTotals:
        runs = [r for r in self.motion.runs.current(self.motion.missing) if r.index == section.group]
        run = next((r for r in runs if not self.motion.members[r.members.start].gone), runs[0])
        inertia = UNKNOWN if run.formula is None or effective else run.formula.inertia(run.group)
        group = f"{self.place} {section.group} {effective}"
        return SectionTotals(section.layer, group, effective, dict(zip(NAMES, sums, strict=True)), inertia)


def _first_order(name: str, scale: float) -> float:
    """What a row of a column is multiplied by for what it contributes."""
    return 0.5 * scale if name == "path_length" else scale


def _named(columns: Tensor, factor: float) -> Numbers:
    """(n, COLUMNS) → (n, NAMES): works as often as they count, and work_ito with what waits for its next gradient."""
    ito = columns[:, COLUMNS.index("work_met")] + columns[:, COLUMNS.index("waiting")]
    found = torch.cat([columns, ito[:, None]], 1).numpy()
    found[:, [NAMES.index(name) for name in _SCALED]] *= factor
    return found
