"""The signal and the noise in neighbouring gradients, of which the critical batch size is made."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.gathering import Vector
from lightning_speedlimit.trajectory.sums import Term, masked


class Overlap:
    """Σ g_k·g_{k−1} and Σ (‖g_k‖² − g_k·g_{k−1}), whose means are ‖F‖² and tr Σ/B where batches are independent.

    Source: McCandlish, Kaplan, Amodei et al. 2018, arXiv:1812.06162, for what they are; THEORY §9 for neighbours.
    """

    def __init__(self, coordinates: Coordinates) -> None:
        self._coordinates = coordinates
        self.before = coordinates.vector()  # g_{k−1}, with the sign and the L2 term of −f
        self.known: Tensor | bool = False  # there is a g_{k−1} to meet; a tensor where the device alone knows
        self._signal, self._squares = coordinates.row(), coordinates.row()

    def pairs(self, gradient: Vector) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What g_k is multiplied with, and where to."""
        now = gradient.rows
        return [(now, self.before.rows, self._signal), (now, now, self._squares)]

    def terms(self, valid: Tensor | None) -> list[Term]:
        """What the products add to the sums; valid: False where g_k is of no step."""
        known = self.known if valid is None else valid & self.known
        signal, squares = masked(self._signal, known), masked(self._squares, known)
        noise = Term("gradient_noise", squares), Term("gradient_noise", signal, -1.0)
        return [Term("gradient_signal", signal), *noise]

    def keep(self, gradient: Vector, valid: Tensor | None, *, measured: bool) -> None:
        """g_k will be the next one's g_{k−1}, unless it is of no step: then the one before it is.

        measured: of sampled steps, the gradients after the others meet none.
        """
        if valid is None:
            self.known = measured
            return
        torch.where(valid, gradient.rows, self.before.rows, out=gradient.rows)
        self.known = self.known | valid if measured else self.known & ~valid

    def restore(self, *, known: bool) -> None:
        """The saved gradient is there to be met, or is of no step."""
        self.known = known or torch.zeros((), dtype=torch.bool, device=self._coordinates.device)
