"""What a closed form returns: W₂², entropy production and efficiency, each a sum over independent modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ENTRIES = 2**20  # modes × times of one block: 8 MiB for each intermediate value


@dataclass(frozen=True, eq=False)
class Curve:
    """η = W₂²/(t·Q) over time: the share of the elapsed time that the thermodynamic speed limit asks for.

    All fields are float64, of the shape of the times asked for, detached.

    Attributes:
        time: t, in units of parameter²/loss (learning rate × steps).
        wasserstein2_squared: W₂²(p_0, p_t), parameter².
        entropy_production: Q = temperature × total entropy production between 0 and t, loss units.
        efficiency: W₂²/(t·Q), no unit; at t = 0 its limit. NaN where it is undefined: where nothing moves, or
            where W₂² and Q (at t < 1: W₂²/t² and Q/t) overflow together. Never clipped.
    """

    time: Tensor
    wasserstein2_squared: Tensor
    entropy_production: Tensor
    efficiency: Tensor


Rates = Callable[..., tuple[Tensor, Tensor]]


def mode_blocks(count: int, times: Tensor) -> Iterator[slice]:
    """Slices of modes that are small enough to be met with all times at once."""
    step = max(1, _ENTRIES // times.numel())
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def sum_rates(times: Tensor, blocks: Iterable[tuple[Tensor, ...]], rates: Rates) -> tuple[Tensor, Tensor]:
    """(W₂²/τ², Q/τ), τ = min(t, 1), of the shape of the times: unlike W₂² and Q these have a limit at t = 0.

    Args:
        blocks: for some modes each, the tensors (modes,) that `rates` takes after the times (n, 1).
        rates: the two terms (n, modes) of each mode.
    """
    column = times.reshape(-1, 1)
    speed_squared = torch.zeros_like(column[:, 0])
    power = torch.zeros_like(speed_squared)
    for block in blocks:
        of_speed, of_power = rates(column, *block)
        speed_squared += of_speed.sum(1)
        power += of_power.sum(1)
    return speed_squared.reshape(times.shape), power.reshape(times.shape)


def curve_from_rates(times: Tensor, speed_squared: Tensor, power: Tensor) -> Curve:
    """The curve whose W₂² is τ²·`speed_squared` and whose Q is τ·`power`, τ = min(t, 1)."""
    unit = times.clamp(max=1)
    return Curve(
        time=times.clone(),  # what the caller does with its own changes no result
        wasserstein2_squared=unit * (unit * speed_squared),
        entropy_production=torch.where(times == 0, 0.0, unit * power),  # also where the power is infinite
        efficiency=speed_squared / power / times.clamp(min=1),
    )
