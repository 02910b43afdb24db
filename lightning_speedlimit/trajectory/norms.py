"""‖g‖² of a step, before and after clipping, over an optimizer's parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_speedlimit.trajectory import compiled
from lightning_speedlimit.trajectory.gathering import dense
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.motion import Motion

_PIECE = 1 << 17  # coordinates that are looked at together


def norms_observed(motions: Sequence[Motion], squares: Sequence[Tensor], clip: Tensor | None) -> Tensor:
    """(2,): by the measured coordinates. squares: `gradient_squares` of each motion. clip: the factor of clipping."""
    raw = total([motion.coordinates.total(row) for motion, row in zip(motions, squares, strict=True)])
    return torch.stack([raw, raw if clip is None else raw * clip**2])


def norms_as_used(
    gradients: Sequence[Tensor | None], scale: Scalar | None, clip: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(2,): by all coordinates of the gradients as the optimizer used them, with a loss scaler's scale."""
    used = total([_squared(dense(g), dtype) for g in gradients if g is not None])
    used = used if scale is None else used / scale**2
    return torch.stack([used if clip is None else used / clip**2, used])


def gradient_squares(motion: Motion, *, closed: bool) -> Tensor:
    """g² summed over each row, of the last step that was looked at. closed: it has moved the weights."""
    found = motion.coordinates.row(motion.total)
    motion.coordinates.squares(raw_gradient(motion, closed=closed), found)
    return found


def raw_gradient(motion: Motion, *, closed: bool) -> Tensor:
    """±g of the last step that was looked at, without the L2 term that −f has."""
    raw = motion.gradient.rows
    for run in motion.runs.current(motion.missing):
        if run.coupled:  # g = −f − wθ_k
            raw = raw.clone() if raw is motion.gradient.rows else raw
            here = run.rows
            theta = motion.theta.rows[here] - motion.update[here] if closed else motion.theta.rows[here]
            raw[here] -= run.coupled * theta
    return raw


def _squared(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ x² of a tensor of any size, piece by piece: without another one of its size."""
    if (known := compiled.norm_squared(values)) is not None:
        return torch.tensor(known, dtype=dtype, device=values.device)
    pieces = torch.split(values.reshape(-1), _PIECE)
    return torch.stack([torch.linalg.vector_norm(piece, dtype=dtype) for piece in pieces]).square().sum()


def total(values: Sequence[Tensor]) -> Tensor:
    """Σ over motions, which may lie on several devices."""
    found = values[0]
    for value in values[1:]:
        found = found + value.to(found.device, non_blocking=True)
    return found
