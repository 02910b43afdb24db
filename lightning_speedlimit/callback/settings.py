"""What a user sets of a measurement."""

from __future__ import annotations

from typing import Literal

from lightning_speedlimit.trajectory.estimates import Estimator
from lightning_speedlimit.trajectory.settings import Clock


class Settings:
    """The arguments of `SpeedLimit` that say what is measured, by their names."""

    clock: Clock
    entropy_production: Estimator
    monitor: str | None
    loss_window: int
    probe_batches: int
    measure_every_n_steps: int
    samples_per_batch: int | None
    clouds: Literal["neurons"] | None
    per_layer: bool
    prog_bar: bool
    coordinates: int | Literal["all"]
