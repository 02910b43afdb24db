"""Decoupled weight decay, θ ← (1 − lr w)θ, which is no answer to a force: taken out of the update."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.compiled import Step
from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.mobility import Scalar, number
from lightning_speedlimit.trajectory.runs import Run
from lightning_speedlimit.trajectory.sums import Pair, RowSums, Term, cut, masked, sum_dtype


class Decay:
    """What decoupled decay does to the update, step by step.

    travelled: Σ u without it, where there is any; of sampled steps Σ lr w θ_k.

    Args:
        start: θ_0. sampled: not all steps are measured.
    """

    def __init__(self, coordinates: Coordinates, start: Tensor, *, sampled: bool) -> None:
        self.travelled: Pair | None = None
        self._coordinates, self._start, self._sampled = coordinates, start, sampled
        # Of each row, of the last step: ‖u‖² without decay and −f·θ_k, as `coordinates.dots` makes them.
        self._squares, self._work = coordinates.row(), coordinates.row()

    def begin(self, runs: list[Run], theta: Tensor) -> None:
        """Before a step's updates are seen: it may be the first one with decay."""
        if self.travelled is None and any(run.decoupled for run in runs):
            self.travelled = Pair(self._start)
            if not self._sampled:
                torch.sub(theta, self._start, out=self.travelled.high)

    def take_out(self, run: Run, update: Tensor, theta: Tensor, gradient: Tensor, valid: Tensor | None) -> None:
        """u ← u + lr w θ_k at the run's rows, and 0 where that is rounding; Σ u grows.

        Rounding: less than 2 ulp of θ, whose step may be rounded twice; of half precision, which the optimizer rounds
        once, less than ¾ ulp. The first scratch holds 1 where u ≠ 0 then, else 0.
        """
        if self.travelled is None:
            return
        coordinates, low = self._coordinates, cut(self.travelled.low, run.rows)
        update, theta, gradient = (cut(x, run.rows) for x in (update, theta, gradient))
        if run.decoupled:
            room, squares, work = (cut(x, run.rows) for x in (coordinates.scratch[0], self._squares, self._work))
            decay = _share(run) if valid is None else _share(run) * valid.to(sum_dtype(update.device))
            if isinstance(decay, Tensor) or self._sampled:
                update.add_(torch.mul(theta, decay, out=room))
                if self._sampled:
                    low.add_(room)
            else:
                update.add_(theta, alpha=decay)
            torch.add(theta, update, alpha=_coarse(run, update.dtype), out=room)
            update.mul_(torch.ne(room, theta, out=room))
            coordinates.dots([(update, update, squares), (gradient, theta, work)])
        if not self._sampled:
            low.add_(update)

    def ask(self, step: Step, run: Run) -> bool:
        """The same of a compiled pass, where there is one."""
        if self.travelled is None:
            return True
        share, moved = _share(run), self.travelled.low
        if isinstance(share, Tensor):
            return False
        if not self._sampled:
            step.take(travelled=moved)
        elif run.decoupled:
            step.take(decayed=moved)
        if run.decoupled:
            step.share, step.coarse = share, _coarse(run, moved.dtype)
            step.take(free_squares=self._squares, decay_work=self._work)
        return True

    def squares(self, run: Run, squares: Tensor) -> Tensor:
        """‖u‖² without decay at the run's rows; squares: with it."""
        if self.travelled is None:
            return squares
        free = cut(self._squares, run.rows)
        return free if run.decoupled else free.copy_(squares)

    def terms(self, sums: RowSums, runs: list[Run], valid: Tensor | None) -> list[Term]:
        """What the step adds to the sums."""
        if self.travelled is None:
            return []
        self.travelled.added()
        sums.begin("free_squares", "squares")  # what went before had no decay
        works = [(run, masked(cut(self._work, run.rows), valid)) for run in runs if run.decoupled]
        found = [Term("work_decay", work, _share(run), run.rows) for run, work in works]
        return [*found, Term("free_squares", masked(self._squares, valid))]


def _share(run: Run) -> Scalar:
    """lr w: of θ_k, what the step takes away."""
    return number(run.group["lr"]) * run.decoupled


def _coarse(run: Run, dtype: torch.dtype) -> float:
    """What u is multiplied by before it is held to θ: what is lost then, was rounding."""
    eps = torch.finfo(dtype).eps
    return 0.25 if run.coarsest <= eps else 0.67 * eps / run.coarsest
