"""The signal and the noise in neighbouring gradients, of which the critical batch size is made."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.coordinates import Coordinates, Vector
from lightning_speedlimit.trajectory.row_sums import RowSums
from lightning_speedlimit.trajectory.valid import masked


class Overlap:
    """Σ g_k·g_{k−1} and Σ (‖g_k‖² − g_k·g_{k−1}), whose means are ‖F‖² and tr Σ/B where batches are independent.

    Source: McCandlish, Kaplan, Amodei et al. 2018, arXiv:1812.06162, for what they are; THEORY §9 for neighbours.
    """

    def __init__(self, coordinates: Coordinates) -> None:
        self._coordinates = coordinates
        self.before = coordinates.vector()  # g_{k−1}, with the sign and the L2 term of −f
        self.known: Tensor | None = None  # on the device, False as long as that is no step's gradient; None: it is one
        self._begun = False
        self._signal, self._squares = coordinates.row(), coordinates.row()

    def meet(self, gradient: Vector, rows: slice, room: Tensor) -> None:
        """Products of some rows of g_k."""
        now, before = gradient.rows[rows], self.before.rows[rows]
        self._coordinates.dot(now, before, room, self._signal[rows])
        self._coordinates.dot(now, now, room, self._squares[rows])

    def add(self, sums: RowSums, valid: Tensor | None) -> None:
        """The products go into the sums; valid: False where g_k is of no step."""
        if valid is not None and self.known is not None:
            valid = valid & self.known
        valid = self.known if valid is None else valid
        sums.add("gradient_signal", masked(self._signal, valid))
        sums.add("gradient_noise", masked(self._squares - self._signal, valid))

    def keep(self, gradient: Vector, valid: Tensor | None) -> None:
        """g_k will be the next one's g_{k−1}, unless it is of no step: then the one before it is."""
        begun, self._begun = self._begun, True
        if valid is None:
            self.known = None
            return
        torch.where(valid, gradient.rows, self.before.rows, out=gradient.rows)
        known = torch.full_like(valid, begun) if self.known is None else self.known
        self.known = valid | known

    def load(self, *, known: bool) -> None:
        """After `before` was taken over; known: it is a step's gradient."""
        self._begun = known
        self.known = None if known else torch.zeros((), dtype=torch.bool, device=self._coordinates.device)

    @property
    def is_known(self) -> bool:
        """`before`, or what will be it, is a step's gradient. Syncs."""
        return self._begun and (self.known is None or bool(self.known))
