"""W₂² between the distributions that two clouds of the same replicas were drawn from."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_speedlimit.ensemble.entropy import sampled_gaussian
from lightning_speedlimit.ensemble.estimate import Sampled
from lightning_speedlimit.ensemble.trajectories import BLOCKS
from lightning_speedlimit.transport import Transport, gaussian_wasserstein2_squared, wasserstein2_squared
from lightning_speedlimit.transport.duals import Pairing

_POTENTIAL_SWEEPS = 500
_POTENTIAL_GAP = 1e-3  # of W₂²: what its standard error may be off by, and more than an error needs
_CUTS = 4  # into halves
_FEW = 1024  # replicas: of more, one cut is as exact


def sampled_distance(x: Tensor, y: Tensor, transport: Transport) -> Sampled:
    """W₂² with f_r + g_r, by which it moves when replica r weighs more: f, g are Kantorovich potentials.

    Source: del Barrio & Loubes 2019, Ann. Probab. 47, for independent clouds; here x_r and y_r are one replica.
    """
    matching = transport.matching
    if matching is None:
        return Sampled(transport.value, torch.full_like(x[:, 0], math.nan), "beyond 16384 replicas W₂² has no plan")
    matching = matching.to(x.device)
    own = (y[matching] - x).square().sum(1)
    if bool((matching == torch.arange(len(x), device=x.device)).all()):
        return Sampled(transport.value, own)  # f_r + g_r is the pair's own cost, whatever the potentials
    centre = x.mean(0)
    a, b = x - centre, y[matching] - centre
    costs = a.square().sum(1)[:, None] + b.square().sum(1) - 2.0 * (a @ b.T)
    costs.diagonal().copy_(own)
    pairing = Pairing(costs, torch.arange(len(own), device=own.device), own, torch.full_like(own, 1.0 / len(own)))
    starts = torch.zeros_like(own), -(a * (b - a)).sum(1)
    potential, _ = pairing.improve(*starts, enough=_POTENTIAL_GAP * transport.value, sweeps=_POTENTIAL_SWEEPS)
    partner = torch.empty_like(own)
    partner[matching] = own - potential
    return Sampled(transport.value, potential + partner)


def extrapolated(
    distance: Sampled, x: Tensor, y: Tensor, transport: Transport, gelbrich: Sampled, tolerance: float
) -> Sampled:
    """W − (W_½ − W)/(2^α − 1), α = 2/max(d, 2), W_½ the mean over halves of the replicas, which is at least W.

    Empirical clouds are too far apart by about R^{−α}. No more is taken off than down to what means and covariances
    require. `systematic` is max(½, d/20) of what is taken off: in 6 dimensions the rest of the bias is at most a
    quarter of it, in 20 two thirds.

    Source: Chizat, Roussillon, Léger, Vialard, Peyré 2020, NeurIPS 33 (the rate between smooth distributions).
    """
    replicas, d = x.shape
    # Where no one changes partner, no part of the replicas does.
    matching = transport.matching
    if matching is None or replicas < 4 or bool((matching.cpu() == torch.arange(replicas, device="cpu")).all()):
        return distance
    cuts, halves = (_CUTS if replicas <= _FEW else 1), 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(cuts):
        order = torch.randperm(replicas, generator=generator, device="cpu").to(x.device)
        for part in order.chunk(2):
            part_distance = wasserstein2_squared(x[part], y[part], tolerance=tolerance)
            halves += part_distance.value * len(part) / replicas / cuts
    excess = max(0.0, halves - distance.value) / (2 ** (2 / max(d, 2)) - 1)
    most = max(0.0, distance.value - _least(x, y, gelbrich))
    off = min(excess, most)
    return replace(distance, value=distance.value - off, systematic=min(max(0.5, d / 20) * off, most))


def _least(x: Tensor, y: Tensor, gelbrich: Sampled) -> float:
    """What W₂² of the distributions is at least: between normal ones, or between the means, as far as these show."""
    moved = y - x
    mean = moved.mean(0)
    between = float(mean.square().sum() - (moved - mean).square().sum() / (len(x) * (len(x) - 1)))
    return between if math.isnan(gelbrich.value) else max(between, gelbrich.value)


def sampled_gelbrich(x: Tensor, y: Tensor) -> Sampled:
    """W₂² between N(m_x, Σ_x) and N(m_y, Σ_y), the jackknifed value; influence x·(1 − A)x + y·(1 − A⁻¹)y, centred.

    A = Σ_x^{−½} (Σ_x^½ Σ_y Σ_x^½)^½ Σ_x^{−½} is the optimal map's slope; the means add 2(m_x − m_y)·(x − y).
    """
    flat = sampled_gaussian(x).reason or sampled_gaussian(y).reason
    if flat:
        return Sampled.undefined(flat, x[:, 0])
    (mean_x, cov_x), (mean_y, cov_y) = _moments(x), _moments(y)
    full = gaussian_wasserstein2_squared(mean_x, cov_x, mean_y, cov_y)
    groups = min(len(x), BLOCKS)
    without = []
    for group in range(groups):
        kept = torch.arange(len(x), device=x.device) % groups != group
        without.append(gaussian_wasserstein2_squared(*_moments(x[kept]), *_moments(y[kept])))
    value = groups * full - (groups - 1) * sum(without) / groups
    root = _symmetric_power(cov_x, 0.5)
    inverse = _symmetric_power(cov_x, -0.5)
    slope = inverse @ _symmetric_power(root @ cov_y @ root, 0.5) @ inverse
    a, b = x - mean_x, y - mean_y
    influence = (a * (a - a @ slope)).sum(1) + (b * (b - torch.linalg.solve(slope, b.T).T)).sum(1)
    return Sampled(value, influence + 2 * (a - b) @ (mean_x - mean_y))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d)."""
    centred = x - x.mean(0)
    return x.mean(0), centred.T @ centred / (len(x) - 1)


def _symmetric_power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    # Rounding may leave a nearly flat direction below 0.
    found: Tensor = (vectors * values.clamp(min=float(values[-1]) * 1e-15) ** power) @ vectors.T
    return found
