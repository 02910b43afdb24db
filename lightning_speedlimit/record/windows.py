"""Efficiency between any two recorded times, from sketches and running sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.checks import arguments

Values = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]

NEEDED = ("elapsed", "action", "work_ito", "loss_drop")


@dataclass(frozen=True)
class Windows:
    """η(s, t) = D²(s, t)/[(τ_t − τ_s)(A_t − A_s)] ÷ conversion(s, t), for windows between recorded times s < t.

    Arrays of one shape, float64 but for the steps. NaN where a step has no sketch or a column is missing; the
    efficiency also where the loss did not fall by two of its standard errors. Nothing is clipped.

    Source: the speed limit of gradient flow (arXiv:2307.14653) with the effective mobility work/action.
    """

    first_step: Steps
    """s, steps; 0 is the start."""
    last_step: Steps
    """t, steps."""
    efficiency: Values
    """η, no unit; its D² is known to 2.2 % (the sketch's error, common to neighbouring windows)."""
    efficiency_se: Values
    """Standard error of η from those of both losses, no unit; an upper one: losses near each other share noise."""
    kinematic_efficiency: Values
    """D²/[(τ_t − τ_s)(A_t − A_s)], no unit."""
    conversion: Values
    """(L_s − L_t)/(work_ito between s and t), no unit."""
    displacement: Values
    """D(s, t), parameter; from the sketches."""
    loss_drop: Values
    """L_s − L_t, loss."""


class Trajectory:
    """What a record knows at each time that it has a sketch of, the start included."""

    def __init__(
        self, step: Steps, columns: Mapping[str, Values], sketch_steps: Steps, sketches: npt.NDArray[np.float32]
    ) -> None:
        known = np.isin(sketch_steps, step) & (sketch_steps > 0)  # a row of step 0 is the start
        self.steps: Steps = np.concatenate([[0], sketch_steps[known]]).astype(np.int64)
        self._sketches = np.concatenate([np.zeros((1, sketches.shape[1]), np.float32), sketches[known]])
        rows = np.searchsorted(step, sketch_steps[known])
        missing = np.full(len(step), np.nan)
        # At the start every sum is 0, and so is the error: that of a loss drop has the start's in it.
        self._columns = {
            name: np.concatenate([[0.0], columns.get(name, missing)[rows]]) for name in (*NEEDED, "loss_drop_se")
        }

    @np.errstate(all="ignore")  # a run that diverged has inf − inf; it comes out as NaN
    def windows(self, first: npt.ArrayLike, last: npt.ArrayLike) -> Windows:
        """For arrays of steps that fit each other; see `Windows`."""
        s, t = arguments.steps("first_step", first), arguments.steps("last_step", last)
        try:
            s, t = np.broadcast_arrays(s, t)
        except ValueError as unfit:
            raise ValueError(f"first_step and last_step must have shapes that fit, got {s.shape}, {t.shape}") from unfit
        if (s >= t).any():
            raise ValueError("first_step must be at least 0 and below last_step, got another order; swap them")
        i, j = self._places(s), self._places(t)
        known = (i >= 0) & (j >= 0)

        def between(name: str) -> Any:
            column = self._columns[name]
            return np.where(known, column[j] - column[i], np.nan)

        squared = np.where(known, self._squared_distances(i, j), np.nan)
        drop, work = between("loss_drop"), between("work_ito")
        error = np.hypot(self._columns["loss_drop_se"][i], self._columns["loss_drop_se"][j])
        # NaN errors are of losses that are known, as on a probe.
        error = np.where(np.isnan(error), 0.0, error)
        kinematic = _defined(squared / (between("elapsed") * between("action")))
        conversion = _defined(drop / work)
        efficiency = np.where(drop >= 2 * error, _defined(kinematic / conversion), np.nan)
        relative = np.where(known, error, np.nan) / drop
        return Windows(
            first_step=s,
            last_step=t,
            efficiency=efficiency,
            efficiency_se=efficiency * relative,
            kinematic_efficiency=kinematic,
            conversion=conversion,
            displacement=np.sqrt(squared),
            loss_drop=drop,
        )

    @np.errstate(all="ignore")
    def speed_limit_times(self, first: npt.ArrayLike, last: npt.ArrayLike) -> Values:
        """τ_SL(s, t) = η(s, t)·(τ_t − τ_s), clock; NaN where η is undefined."""
        elapsed = self._columns["elapsed"]
        found = self.windows(first, last)
        i, j = self._places(found.first_step), self._places(found.last_step)
        return np.asarray(found.efficiency * (elapsed[j] - elapsed[i]), dtype=np.float64)

    def _places(self, steps: Steps) -> Any:
        """Where each step is among `self.steps`; −1: nowhere."""
        place = np.searchsorted(self.steps, steps).clip(max=len(self.steps) - 1)
        return np.where(self.steps[place] == steps, place, -1)

    def _squared_distances(self, i: Any, j: Any) -> Values:
        """Row by row: all windows of a heat map at once would take gigabytes."""
        found = [
            float(np.square(self._sketches[b].astype(np.float64) - self._sketches[a]).sum())
            for a, b in zip(i.ravel(), j.ravel(), strict=True)
        ]
        return np.array(found, dtype=np.float64).reshape(i.shape)


def _defined(values: Any) -> Values:
    """0/0 and x/0 are NaN."""
    return np.where(np.isfinite(values), values, np.nan)
