"""The learning rates of a motion's parameter groups: which rows are whose, and squares over a rate."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.runs import Member


def rows_of_groups(members: list[Member], coordinates: Coordinates) -> list[tuple[int, slice | None]]:
    """Neighbouring rows of one group, which may have others elsewhere; None: all."""
    found: list[tuple[int, slice]] = []
    for member, rows in zip(members, coordinates.rows, strict=True):
        if found and found[-1][0] == member.group:
            found[-1] = member.group, slice(found[-1][1].start, rows.stop)
        else:
            found.append((member.group, rows))
    return [(index, None if len(found) == 1 else rows) for index, rows in found]


def over(squared: Tensor, rate: Scalar) -> Tensor:
    """‖u‖²/lr: 0/0 counts 0 (a warm-up from 0); a motion without learning rate is undefined."""
    if isinstance(rate, Tensor):
        moved = torch.where(rate > 0, squared / rate, torch.full_like(squared, torch.nan))
    else:
        moved = squared / rate if rate > 0 else torch.full_like(squared, torch.nan)
    return torch.where(squared == 0, torch.zeros_like(squared), moved)
