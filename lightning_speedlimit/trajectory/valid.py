"""Steps that may have been none: `valid`, on the device, is False where a loss scaler skipped one. None: it was one."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.sums import sum_dtype


def masked(row: Tensor, valid: Tensor | None) -> Tensor:
    """0 of a step that was none."""
    return row if valid is None else torch.where(valid, row, torch.zeros_like(row))


def chosen(valid: Tensor, now: Scalar, known: Scalar) -> Scalar:
    """`now` of a step, `known` of none."""
    if now is known or (not isinstance(now, Tensor) and not isinstance(known, Tensor) and now == known):
        return now
    first, second = (torch.as_tensor(x, dtype=sum_dtype(valid.device), device=valid.device) for x in (now, known))
    return torch.where(valid, first, second)
