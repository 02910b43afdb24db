"""What the steps add up to in each row of coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.sums import RunningSum

# Sums over the run of each row. Of drawn coordinates they are unweighted; the signs are those of −f.
SUMS = (
    "squares",  # Σ ‖u‖²
    "action",  # Σ ‖u‖²/lr, on the clock "lr"
    "path_length",  # Σ ‖u‖²/‖u of all‖, which adds up to Σ ‖u‖
    "free_squares",  # Σ ‖u‖², u without decoupled decay, where there is one
    "work_met",  # Σ −f_k·u_k over the steps whose next gradient is known
    "work_anti_ito",  # Σ −f_{k+1}·u_k over those steps
    "l2_drop",  # ½w Σ (‖θ_{k+1}‖² − ‖θ_k‖²)
    "work_action",  # Σ u²/μ
    "work_decay",  # Σ f_k·v_k of decoupled decay, v = −lr w θ_k; with this sign
    "gradient_signal",  # Σ g_k·g_{k−1} over the steps whose gradient before is known
    "gradient_noise",  # Σ (‖g_k‖² − g_k·g_{k−1}) over those steps
)
NEGATIVE = ("work_met", "work_anti_ito", "l2_drop")  # products with −f


class RowSums:
    """SUMS; those that nothing has been added to take no memory."""

    def __init__(self, coordinates: Coordinates) -> None:
        self._coordinates = coordinates
        self.known: dict[str, RunningSum] = {}

    def add(self, name: str, row: Tensor, factor: Scalar = 1.0, rows: slice | None = None) -> None:
        """S[rows] ← S[rows] + factor · row, where the row is as `Coordinates.dot` makes it, scaled."""
        whole = rows is None or (rows.start == 0 and rows.stop == self._coordinates.count)
        self._sum(name).add_(row, factor * self._coordinates.unscaled, None if whole else rows)

    def begin(self, name: str, like: str) -> None:
        """A sum that was the same as another one up to now."""
        if name not in self.known and like in self.known:
            self._sum(name).copy_(self.known[like])

    def of(self, name: str) -> RunningSum | None:
        """None: 0. Without decoupled decay all of u is free of it."""
        found = self.known.get(name)
        return self.known.get("squares") if found is None and name == "free_squares" else found

    def totals(self) -> Tensor:
        """Over all rows as they are now, (SUMS,)."""
        weights = self._coordinates.weights
        return torch.stack([weights.new_zeros(()) if (s := self.of(n)) is None else s.value @ weights for n in SUMS])

    def load(self, name: str, value: Tensor) -> None:
        """Take over what was saved."""
        self._sum(name).load_(value)

    def _sum(self, name: str) -> RunningSum:
        if name not in self.known:
            self.known[name] = RunningSum(self._coordinates.count, device=self._coordinates.device)
        return self.known[name]
