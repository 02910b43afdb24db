"""Moves of the weights between steps: seen by their values, kept out of the displacement, added up."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.sums import RunningSum


class Moves:
    """What moved θ outside of `step` moves θ_0 along, so that D = ‖θ − θ_0‖ is of the steps alone.

    sums: of moves Σ 1 and Σ ‖move‖², and the latter of those that came before θ_0 was kept apart.
    origin: θ_0 as it was, where there have been any.
    """

    def __init__(self, coordinates: Coordinates, start: Tensor) -> None:
        self._coordinates, self._start = coordinates, start
        self.sums = RunningSum(3, device=coordinates.device)
        self.origin: Tensor | None = None
        self._squares: list[Tensor] = []  # of the move that is being taken in, by stretch
        self.settled()

    def settled(self) -> None:
        """A step has ended: writes to the weights count from here on."""
        self._version = self._written()

    def take_in(self, moved: Tensor, rows: slice, row: Tensor) -> None:
        """The move of some rows, which is written over; row: room for a number of each of them."""
        coordinates = self._coordinates
        if coordinates.on_host and not any(torch.aminmax(moved)):
            return  # on a device, looking would wait for it
        if self.origin is None and (coordinates.on_host or self._written() != self._version):
            self.origin = self._start.clone()
        self._start[rows].add_(moved)
        coordinates.dot(moved, moved, moved, row)
        self._squares.append(torch.dot(row.to(coordinates.weights.dtype), coordinates.weights[rows]))

    def add(self) -> None:
        """All rows have been taken in."""
        if self._squares:
            total = torch.stack(self._squares).sum() * self._coordinates.unscaled
            self.sums.add_(torch.stack([total.sign(), total, total * (self.origin is None)]))
            self._squares = []

    def _written(self) -> int:
        """Grows with each write to the parameters (not through .data); 0 where the values themselves tell of moves."""
        if self._coordinates.on_host or self.origin is not None:
            return 0
        return sum(p._version for p in self._coordinates.parameters)
