"""Decoupled weight decay, θ ← (1 − lr w)θ, which is no answer to a force: taken out of the update."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.mobility import Scalar, number
from lightning_speedlimit.trajectory.row_sums import RowSums
from lightning_speedlimit.trajectory.runs import Run
from lightning_speedlimit.trajectory.sums import Pair, sum_dtype
from lightning_speedlimit.trajectory.valid import masked


class Decay:
    """What decoupled decay does to the update, step by step.

    travelled: Σ u without it, where there is any; of sampled steps Σ lr w θ_k.

    Args:
        start: θ_0. sampled: not all steps are measured.
    """

    def __init__(self, coordinates: Coordinates, start: Tensor, *, sampled: bool) -> None:
        self.travelled: Pair | None = None
        self._coordinates, self._start, self._sampled = coordinates, start, sampled
        # Of each row, of the last step: ‖u‖² without decay and −f·θ_k, as `coordinates.dot` makes them.
        self._squares, self._work = coordinates.row(), coordinates.row()

    def begin(self, runs: list[Run], theta: Tensor) -> None:
        """Before a step's updates are seen: it may be the first one with decay."""
        if self.travelled is None and any(run.decoupled for run in runs):
            self.travelled = Pair(self._start)
            if not self._sampled:
                torch.sub(theta, self._start, out=self.travelled.high)

    def take_out(
        self, run: Run, rows: slice, update: Tensor, theta: Tensor, gradient: Tensor, rooms: tuple[Tensor, Tensor],
        valid: Tensor | None,
    ) -> None:  # fmt: skip
        """u ← u + lr w θ_k at some rows; the first room holds 1 where u ≠ 0 then, else 0. Σ u grows."""
        if self.travelled is None:
            return
        coordinates, low = self._coordinates, self._coordinates.cut(self.travelled.low, rows)
        if run.decoupled:
            decay = _share(run)
            decay = decay if valid is None else decay * valid.to(sum_dtype(update.device))
            remove_decay(update, theta, decay, run.coarsest, rooms[0], low if self._sampled else None)
            coordinates.step_dot(update, update, rooms[1], coordinates.cut(self._squares, rows))
            coordinates.step_dot(gradient, theta, rooms[1], coordinates.cut(self._work, rows))
        if not self._sampled:
            low.add_(update)

    def squares(self, run: Run, squares: Tensor) -> Tensor:
        """‖u‖² without decay at the run's rows; squares: with it, of all."""
        own = self._coordinates.cut(squares, run.rows)
        if self.travelled is None:
            return own
        free = self._coordinates.cut(self._squares, run.rows)
        return free if run.decoupled else free.copy_(own)

    def add(self, sums: RowSums, runs: list[Run], valid: Tensor | None) -> None:
        """The step's sums."""
        if self.travelled is None:
            return
        self.travelled.added()
        for run in runs:
            if run.decoupled:
                work = masked(self._coordinates.cut(self._work, run.rows), valid)
                sums.add("work_decay", work, _share(run), run.rows)
        sums.begin("free_squares", "squares")  # what went before had no decay
        sums.add("free_squares", masked(self._squares, valid))


def _share(run: Run) -> Scalar:
    """lr w: of θ_k, what the step takes away."""
    return number(run.group["lr"]) * run.decoupled


def remove_decay(
    update: Tensor, before: Tensor, decay: Scalar, coarsest: float, room: Tensor, decayed: Tensor | None
) -> None:
    """u ← u + lr w θ_k, and 0 where that is rounding.

    Rounding: less than 2 ulp of θ, whose step may be rounded twice; of half precision, which the optimizer rounds
    once, less than ¾ ulp.

    Args:
        update, before: u and θ_k. decay: lr w. coarsest: the largest ε of the parameters' dtypes. room: as large as u;
            afterwards 1 where u ≠ 0, else 0.
        decayed: where lr w θ_k is added up, too; or None.
    """
    if isinstance(decay, Tensor) or decayed is not None:
        own = torch.mul(before, decay, out=room)
        update.add_(own)
        if decayed is not None:
            decayed.add_(own)
    else:
        update.add_(before, alpha=decay)
    eps = torch.finfo(update.dtype).eps
    torch.add(before, update, alpha=0.25 if coarsest <= eps else 0.67 * eps / coarsest, out=room)
    update.mul_(torch.ne(room, before, out=room))
