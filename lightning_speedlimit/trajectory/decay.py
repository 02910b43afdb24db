"""Decoupled weight decay, θ ← (1 − lr w)θ, which is no answer to a force: taken out of the update."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.mobility import Scalar


def remove_decay(
    update: Tensor, before: Tensor, decay: Scalar, coarsest: float, room: Tensor, decayed: Tensor | None
) -> None:
    """u ← u + lr w θ_k, and 0 where that is rounding.

    Rounding: less than 2 ulp of θ, whose step may be rounded twice; of half precision, which the optimizer rounds
    once, less than ¾ ulp.

    Args:
        update, before: u and θ_k. decay: lr w. coarsest: the largest ε of the parameters' dtypes. room: as large as u;
            afterwards 1 where u ≠ 0, else 0.
        decayed: where lr w θ_k is added up, too; or None.
    """
    if isinstance(decay, Tensor) or decayed is not None:
        own = torch.mul(before, decay, out=room)
        update.add_(own)
        if decayed is not None:
            decayed.add_(own)
    else:
        update.add_(before, alpha=decay)
    eps = torch.finfo(update.dtype).eps
    torch.add(before, update, alpha=0.25 if coarsest <= eps else 0.67 * eps / coarsest, out=room)
    update.mul_(torch.ne(room, before, out=room))
