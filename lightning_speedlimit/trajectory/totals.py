"""The sums of one motion as totals: on the device, by group and layer, with the covariance of what was drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.clipping import Changes
from lightning_speedlimit.trajectory.mail import Mail
from lightning_speedlimit.trajectory.motion import Motion
from lightning_speedlimit.trajectory.norms import raw_gradient
from lightning_speedlimit.trajectory.ranks import Share
from lightning_speedlimit.trajectory.sketch import Sketch
from lightning_speedlimit.trajectory.sums import NEGATIVE, SUMS

Kind = Literal["scalar", "diagonal", "effective"]

# Columns of a table: the sums, and what is of this moment. Of −f·u, lost L2 energy and waiting work the sign turns.
NOW = (
    "displacement_squared",
    "free_displacement_squared",
    "weighted",
    "step_squares",
    "gradient_squares",
    "net_squared",
)
COLUMNS = (*SUMS, "waiting", *NOW)
_PIECE = 1 << 13  # units that are looked at together: so many times the columns are little memory
_LITTLE = 1e-30  # where all units of a parameter are certain, nothing is divided by it


@dataclass(frozen=True)
class Section:
    """The parameters of one group and layer of a motion."""

    group: int
    layer: str


class Table:
    """What a motion has to tell at a reading.

    values: (sections, COLUMNS). covariances: by group (COLUMNS, COLUMNS), of the error of the values of drawn
    coordinates; empty where all are measured. sketch: buckets by sign.

    Args:
        factor: steps over measured steps: what sums over measured steps are multiplied by.
        current: the motion was part of the last measured joint step.
    """

    def __init__(self, motion: Motion, factor: float, sketch: Sketch | None, *, current: bool) -> None:
        self.motion, self._factor, self._current = motion, factor, current
        self.sketch = None if sketch is None else Sketch.empty(motion.coordinates.device)
        own = [Section(member.group, member.layer) for member in motion.members]
        self.sections = list(dict.fromkeys(own))
        columns = [*self._sums(), *self._now(sketch)]
        self.values = self._totals(columns, [self.sections.index(section) for section in own])
        self.covariances = {} if motion.coordinates.exact else self._covariances(columns)

    def _sums(self) -> list[Tensor | None]:
        """Of each row, in the order of COLUMNS; None: 0."""
        found: list[Tensor | None] = []
        for name in SUMS:
            total = self.motion.sums.of(name)
            parts = () if total is None else total.parts()
            found.append(parts[0] - parts[1] if len(parts) > 1 else parts[0] if parts else None)
        return [*found, self.motion.last if self.motion.waiting else None]

    def _now(self, sketch: Sketch | None) -> list[Tensor | None]:
        """Of each row ‖Σ u‖², that without decoupled decay, Σ of its squares over m; and `_last`.

        At last ‖θ_K − θ_0‖², the first of these with what moved the weights outside of the steps.
        """
        motion, coordinates = self.motion, self.motion.coordinates
        displacement, weighted = coordinates.row(motion.total), coordinates.row()
        free = displacement if motion.decay.travelled is None else coordinates.row(motion.total)
        net = displacement if motion.moves.origin is None else coordinates.row(motion.total)
        rooms = *motion.scratch, coordinates.room()
        for rows in coordinates.all_stretches:
            moved, room, product = (r[: rows.stop - rows.start] for r in rooms)
            torch.sub(motion.theta.rows[rows], motion.start[rows], out=moved)
            coordinates.squares(moved, displacement[rows])
            if motion.moves.origin is not None:
                coordinates.squares(torch.sub(motion.theta.rows[rows], motion.moves.origin[rows], out=room), net[rows])
            if sketch is not None and self.sketch is not None:
                sketch.add(moved, rows, self.sketch)
            if motion.decay.travelled is not None:
                own = torch.add(motion.decay.travelled.high[rows], motion.decay.travelled.low[rows], out=room)
                moved = moved.add_(own, alpha=self._factor) if motion.snapshots else own
                coordinates.squares(moved, free[rows])
            m = motion.mobility.m
            if m is not None:
                share = torch.add(m.high[rows], m.low[rows], out=product).reciprocal_()
                share.nan_to_num_(nan=0.0, posinf=0.0).mul_(moved)  # what has no mobility has not moved
                coordinates.dot(share, moved, rooms[0][: rows.stop - rows.start], weighted[rows])
        return [displacement, free, weighted, *self._last(), net]

    def _last(self) -> list[Tensor | None]:
        """Of each row ‖u‖² and ‖g‖² of the last step, for their errors: the norms themselves are read apart."""
        motion, coordinates = self.motion, self.motion.coordinates
        if coordinates.exact or not self._current:
            return [None, None]
        gradient = coordinates.row(motion.total)
        coordinates.squares(raw_gradient(motion, closed=True), gradient)
        return [motion.squares, gradient]

    def _scales(self) -> dict[str, float]:
        """What each column is multiplied by: of −f·u and lost L2 energy the sign turns, products are scaled back."""
        unscaled = 1.0 / self.motion.coordinates.scale
        found = dict.fromkeys(SUMS, self._factor) | dict.fromkeys(NOW, 1.0)
        found |= {"waiting": self._factor * unscaled, "weighted": unscaled / self._factor}
        found["step_squares"] = unscaled
        return found | {name: -found[name] for name in (*NEGATIVE, "waiting")}

    def _totals(self, columns: list[Tensor | None], sections: list[int]) -> Tensor:
        """(sections, COLUMNS): weighted sums over the rows of each section. What is not finite stays in its own."""
        coordinates, scales, number = self.motion.coordinates, self._scales(), len(self.sections)
        found = coordinates.weights.new_zeros(len(COLUMNS), number)
        for place, name, column in zip(found, COLUMNS, columns, strict=True):
            if column is not None:
                place.copy_(coordinates.totals(column, sections, number))
            place.mul_(scales[name])  # NaN where no step was measured
        return found.T

    def _covariances(self, columns: list[Tensor | None]) -> dict[int, Tensor]:
        """Of each group Σ_h n_h/(n_h − 1) Σ_{i ∈ h} (1 − π_i)(e_i − ē_h)(e_i − ē_h)ᵀ over its parameters h.

        Hájek's approximation of the variance of a systematic draw with unequal chances (J. Hájek, Ann. Math. Stat.
        35, 1964); e_i are the units' weighted contributions, to first order: to ‖u‖ half of ‖u_i‖²/‖u‖.
        """
        coordinates = self.motion.coordinates
        scales = self._scales() | {"path_length": 0.5 * self._factor}
        found: dict[int, Tensor] = {}
        for i, member in enumerate(self.motion.members):
            known = found.setdefault(member.group, coordinates.weights.new_zeros(len(COLUMNS), len(COLUMNS)))
            number = coordinates.counts[i]
            if number == 0:
                continue
            rest, here = coordinates.rest(i), coordinates.rows[i]
            product, mean = torch.zeros_like(known), known.new_zeros(len(COLUMNS))
            for low, part in zip(range(here.start, here.stop, _PIECE), torch.split(rest, _PIECE), strict=True):
                own = self._contributions(columns, scales, slice(low, low + len(part)))
                product.addmm_(own * part, own.T)
                mean.addmv_(own, part)
            if number > 1:
                product.addr_(mean, mean / rest.sum().clamp_min(_LITTLE), alpha=-1.0)
            known.add_(product, alpha=number / max(number - 1, 1))
        return found

    def _contributions(self, columns: list[Tensor | None], scales: dict[str, float], rows: slice) -> Tensor:
        """(COLUMNS, rows): the units' weighted contributions."""
        weights = self.motion.coordinates.weights[rows]
        found = weights.new_zeros(len(COLUMNS), len(weights))
        for place, name, column in zip(found, COLUMNS, columns, strict=True):
            if column is not None:
                torch.mul(weights, column[rows], out=place).mul_(scales[name])
        return found


@dataclass(frozen=True)
class Part:
    """A table, its key in the mail, and its optimizer's: by these numbers of both are found on the host."""

    key: str
    follower_key: str
    changes: Changes
    optimizer: str
    table: Table

    def put(self, mail: Mail, share: Share) -> None:
        table, motion = self.table, self.table.motion
        mail.put(f"values {self.key}", table.values, share)
        mail.put_sum(f"moves {self.key}", motion.moves.sums, share)
        for group, matrix in table.covariances.items():
            mail.put(f"covariance {self.key} {group}", matrix, share)


def kind(motion: Motion, section: Section) -> Kind:
    """Whether μ is one number, differs between coordinates, or has no formula and is the effective one."""
    found: set[Kind] = set()
    for run in motion.runs.current(motion.missing):
        members = motion.members[run.members.start : run.members.stop]
        if any(m.group == section.group and m.layer == section.layer for m in members):
            found.add("effective" if run.formula is None else "diagonal" if run.names else "scalar")
    return "effective" if "effective" in found else found.pop()
