"""How a run is measured, the same for all of its optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_speedlimit.trajectory.clipping import GradientChanges
from lightning_speedlimit.trajectory.draw import Draw


@dataclass(frozen=True)
class Settings:
    """Of a meter, as its followers and motions need them."""

    changes: GradientChanges  # what changes gradients between being seen and being used
    response: bool  # momentum's mobility is the response
    per_rate: bool  # the action's clock is the learning rate
    every: int  # one step of each block of so many is measured
    draw: Draw  # which coordinates are measured
    place: Callable[[Tensor], int]  # the position of a parameter in the whole run's parameter vector
    layer_of: Callable[[Tensor], str] | None  # the name under which a parameter's sums are kept apart
    processes: int  # that hold shards of the parameters; 0: this one has them whole

    @property
    def snapshots(self) -> bool:
        """Sums are kept as they were before each measured step: sampled steps tell their spread by them."""
        return self.every > 1
