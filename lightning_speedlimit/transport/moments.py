"""Bounds of W₂² from means and covariances alone, for clouds too large for a matrix of their pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_speedlimit.transport.clouds import Clouds, check_finite
from lightning_speedlimit.transport.gaussian import procrustes_squared

_WIDTH = 512  # coordinates that are taken jointly


class Moments(NamedTuple):
    """What means and covariances say of W₂²."""

    lower: float
    """Gelbrich's lower bound, rounding allowed for."""
    paired: float
    """Σ w_i |d_i|²; NaN where i → i is no plan."""
    independent: float
    """What the independent coupling costs."""
    same: bool
    """Whether x_i = y_i for all i, in every digit."""
    rounding: float
    """Relative error of these sums."""


def moment_bounds(clouds: Clouds, blocks: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """Gelbrich's lower bound, Σ w_i |d_i|² and the cost of the independent coupling.

    The lower bound is summed over groups of at most 512 coordinates: W₂² is at least the sum of its
    projections on orthogonal subspaces.
    """
    totals: Tensor | None = None
    for x, y in (part for pair in blocks for part in _narrow(*pair)):
        if totals is None:
            w, v = clouds.weights(len(x), len(y), x.device)
            paired = len(x) == len(y) and torch.equal(w, v)
            totals = x.new_zeros(7)  # |c|², Gelbrich, variances of x and y, Σ w |d|², parts that differ, parts
        d = y - x if paired else None
        anchor = x[w.argmax()]  # far from the origin the two means would be rounded apart
        x, y = x - anchor, y - anchor
        mean_x, mean_y = w @ x, v @ y
        moved = mean_y - mean_x if d is None else w @ d
        a, b = (x - mean_x) * w.sqrt()[:, None], (y - mean_y) * v.sqrt()[:, None]
        totals[0] += moved.square().sum()
        totals[2] += a.square().sum()
        totals[3] += b.square().sum()
        if bool(torch.isfinite(totals[2:4]).all()):
            totals[1] += procrustes_squared(_triangle(a), _triangle(b))
        if d is not None:
            totals[4] += w @ d.square().sum(1)
            totals[5] += d.any()
        totals[6] += 1
    assert totals is not None  # clouds refuse to be empty
    clouds.sum(totals)
    shift, gelbrich, variance_x, variance_y, paired_cost, differences, parts = totals.tolist()
    check_finite(variance_x, variance_y, shift)
    variance = variance_x + variance_y
    # ‖A‖ and ‖B‖ are known to rounding, so the distance between them is known to this
    gelbrich = max(math.sqrt(gelbrich) - 1e-12 * math.sqrt(variance), 0.0) ** 2
    lower = shift * (1 - 1e-12) + gelbrich
    return Moments(
        lower=lower,
        paired=paired_cost if paired else math.nan,
        independent=shift + variance,
        same=paired and differences == 0,
        rounding=1e-12 + torch.finfo(torch.float64).eps * parts,
    )


def _narrow(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[:, i : i + _WIDTH], y[:, i : i + _WIDTH]) for i in range(0, x.shape[1], _WIDTH)]


def _triangle(a: Tensor) -> Tensor:
    """R with RᵀR = AᵀA, no more rows than columns."""
    triangle: Tensor = torch.linalg.qr(a, mode="r").R
    return triangle
