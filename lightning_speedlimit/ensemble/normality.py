"""Whether a cloud of replicas may have been drawn from a normal distribution."""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor

from lightning_speedlimit.ensemble.entropy import whitened

_REPLICAS = 4096  # of more the first, which are as independent: the test looks at all pairs
_ROWS = 2**20  # numbers at a time


def normality_p_value(x: Tensor) -> float:
    """p of the cloud (R, d) under "normal": three times the least of three tests' p, at most 1.

    Henze and Zirkler's test sees every shape, best in few dimensions; Mardia's skewness and kurtosis see tails in
    many. All are of the cloud made white: no unit, no direction counts. Normal clouds have p < 0.01 in about
    1.5 of 100. What stays unseen is small: a double well of 60 replicas in 6 dimensions passes in 5 of 6 draws,
    and there the normal entropy is above the true one by 1.2 of its standard errors.

    NaN: fewer than d + 2 replicas, a cloud flat in some direction.

    Source: Henze & Zirkler 1990, Comm. Stat. Theory Meth. 19; Mardia 1974, Sankhyā B 36 (moments for few replicas).
    """
    least = min(_p_values(x[:_REPLICAS]))
    return least if math.isnan(least) else min(1.0, 3 * least)


def _p_values(x: Tensor) -> tuple[float, float, float]:
    """By Henze and Zirkler, by skewness, by kurtosis."""
    why, white, _ = whitened(x)
    if why:
        return math.nan, math.nan, math.nan
    n, d = x.shape
    z = white * math.sqrt(n / (n - 1))  # covariance of the plain mean, as in the sources
    squared = z.square().sum(1)
    beta2 = ((2 * d + 1) * n / 4) ** (2 / (d + 4)) / 2
    near = cubes = 0.0
    rows = max(1, _ROWS // n)
    for start in range(0, n, rows):
        gram = z[start : start + rows] @ z.T
        cubes += float((gram**3).sum())
        near += float(torch.exp(-beta2 / 2 * (squared[start : start + rows, None] + squared - 2 * gram)).sum())
    return (
        _henze_zirkler(near, squared, beta2, n, d),
        _skewness(cubes / n**2, n, d),
        _kurtosis(float(squared.square().mean()), n, d),
    )


def _henze_zirkler(near: float, squared: Tensor, beta2: float, n: int, d: int) -> float:
    """p of n∫|φ̂(t) − e^{−|t|²/2}|² weighted by N(0, β²), about lognormal; `near`: Σ_rs e^{−β²|z_r − z_s|²/2}."""
    centre = float(torch.exp(-beta2 / (2 * (1 + beta2)) * squared).sum())
    a, b, w = 1 + 2 * beta2, beta2**2, (1 + beta2) * (1 + 3 * beta2)
    found = near / n - 2 * (1 + beta2) ** (-d / 2) * centre + n * a ** (-d / 2)
    mean = 1 - a ** (-d / 2) * (1 + d * beta2 / a + d * (d + 2) * b / (2 * a**2))
    variance = (
        2 * (1 + 4 * beta2) ** (-d / 2)
        + 2 * a**-d * (1 + 2 * d * b / a**2 + 3 * d * (d + 2) * b**2 / (4 * a**4))
        - 4 * w ** (-d / 2) * (1 + 3 * d * b / (2 * w) + d * (d + 2) * b**2 / (2 * w**2))
    )
    if found <= 0 or not variance > 0:  # rounding, in many dimensions
        return 1.0
    scale = math.log1p(variance / mean**2)
    return float(stats.norm.sf((math.log(found / mean) + scale / 2) / math.sqrt(scale)))


def _skewness(mean_cube: float, n: int, d: int) -> float:
    """p of b = ⟨(z_r·z_s)³⟩: n b c/6 is about χ² of d(d+1)(d+2)/6."""
    few = (d + 1) * (n + 1) * (n + 3) / (n * ((n + 1) * (d + 1) - 6))
    return float(stats.chi2.sf(n * few * mean_cube / 6, d * (d + 1) * (d + 2) / 6))


def _kurtosis(mean_fourth: float, n: int, d: int) -> float:
    """p of ⟨|z|⁴⟩, two-sided, with its exact mean and variance under "normal"."""
    mean = d * (d + 2) * (n - 1) / (n + 1)
    variance = 8 * d * (d + 2) * (n - 3) * (n - d - 1) * (n - d + 1) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    return float(2 * stats.norm.sf(abs(mean_fourth - mean) / math.sqrt(variance))) if variance > 0 else 1.0
