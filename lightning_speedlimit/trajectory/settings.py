"""How a run is measured, the same for all of its optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_speedlimit.trajectory.clipping import GradientChanges
from lightning_speedlimit.trajectory.draw import Draw
from lightning_speedlimit.trajectory.mobility import MomentumMobility

Clock = Literal["steps", "lr"]


@dataclass(frozen=True)
class Settings:
    """Of a meter, as its followers and motions need them."""

    changes: GradientChanges  # what changes gradients between being seen and being used
    momentum_mobility: MomentumMobility
    clock: Clock
    every: int  # one step of each block of so many is measured
    draw: Draw  # which coordinates are measured
    place: Callable[[Tensor], int]  # the position of a parameter in the whole run's parameter vector
    layer_of: Callable[[Tensor], str] | None  # the name under which a parameter's sums are kept apart
    layers: list[str]  # the names that are known
    overlaps: bool  # of neighbouring gradients count: the works tell signal and noise of plain SGD alone
    processes: int  # that hold shards of the parameters; 0: this one has them whole

    @property
    def response(self) -> bool:
        """Momentum's mobility is the response."""
        return self.momentum_mobility == "response"

    @property
    def per_rate(self) -> bool:
        """The action's clock is the learning rate."""
        return self.clock == "lr"

    def saved(self) -> dict[str, Any]:
        """What sums are of: those of other settings do not add to them."""
        found: dict[str, Any] = {
            "clock": self.clock,
            "every": self.every,
            "momentum_mobility": self.momentum_mobility,
            "coordinates": self.draw.coordinates,
        }
        return found | ({"processes": self.processes} if self.processes else {})

    @property
    def snapshots(self) -> bool:
        """Sums are kept as they were before each measured step: sampled steps tell their spread by them."""
        return self.every > 1
