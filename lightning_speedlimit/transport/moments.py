"""Bounds of W₂² from means and covariances alone, for clouds too large for a matrix of their pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_speedlimit.transport.clouds import Clouds
from lightning_speedlimit.transport.gaussian import procrustes_squared

_WIDTH = 512  # coordinates that are taken jointly


def moment_bounds(clouds: Clouds, blocks: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
    """Gelbrich's lower bound, Σ w_i |d_i|² and the cost of the independent coupling.

    The lower bound is summed over groups of at most 512 coordinates: W₂² is at least the sum of its
    projections on orthogonal subspaces. The second value is NaN where i → i is no plan.
    """
    totals: Tensor | None = None
    for x, y in (part for pair in blocks for part in _narrow(*pair)):
        if totals is None:
            w, v = clouds.weights(len(x), len(y), x.device)
            paired = len(x) == len(y) and torch.equal(w, v)
            totals = x.new_zeros(4)  # |c|², Gelbrich, variance, Σ w |d|²
        mean_x, mean_y = w @ x, v @ y
        a, b = (x - mean_x) * w.sqrt()[:, None], (y - mean_y) * v.sqrt()[:, None]
        totals[0] += (mean_y - mean_x).square().sum()
        totals[2] += a.square().sum() + b.square().sum()
        if bool(torch.isfinite(totals[2])):
            totals[1] += procrustes_squared(_triangle(a), _triangle(b))
        elif not bool(torch.isfinite(a).all()):
            totals[2] = -torch.inf  # told apart from y below
        if paired:
            totals[3] += w @ (y - x).square().sum(1)
    assert totals is not None  # clouds refuse to be empty
    clouds.sum(totals)
    shift, gelbrich, variance, displaced = totals.tolist()
    if not math.isfinite(variance) or not math.isfinite(shift):
        raise clouds.non_finite(x=variance == -math.inf)
    # ‖A‖ and ‖B‖ are known to rounding, so the distance between them is known to this
    gelbrich = max(math.sqrt(gelbrich) - 1e-12 * math.sqrt(variance), 0.0) ** 2
    return shift * (1 - 1e-12) + gelbrich, displaced if paired else math.nan, shift + variance


def _narrow(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[:, i : i + _WIDTH], y[:, i : i + _WIDTH]) for i in range(0, x.shape[1], _WIDTH)]


def _triangle(a: Tensor) -> Tensor:
    """R with RᵀR = AᵀA, no more rows than columns."""
    triangle: Tensor = torch.linalg.qr(a, mode="r").R
    return triangle
