"""Entropy production of a linear system with Gaussian fluctuations, at any lag."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_speedlimit.checks.tensors import flag
from lightning_speedlimit.ensemble.estimate import Estimate
from lightning_speedlimit.ensemble.matrices import logarithm
from lightning_speedlimit.ensemble.trajectories import BLOCKS, Array, Pairs, double, jackknife

_VISIBLE = 4.0  # times √(d/n), a correlation is no noise
# Gauss–Legendre on [0, 1]: exact to the sixth order of the step of time.
_NODES = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))


def entropy_production_linear(
    times: Array, positions: Array, *, lag: int = 1, stationary: bool = True, blocks: int = BLOCKS
) -> Estimate:
    """σ = ⟨ν·D⁻¹ν⟩ of dx = (a − Ax) dt + √(2D) dW, nats/time, from x_t and x_{t+lag}; ν the mean local velocity.

    The regression of x_{t+lag} on x_t gives e^{−A·lag}, and the matrix logarithm takes the lag out of it: nothing
    is assumed small, so a long lag may be used, which costs few samples for much time. T·σ is the rate in
    units of the loss. What is left of the bias is of second order in 1/n (jackknife over blocks, which also
    gives the standard error).

    How well it can be known: from total time 𝒯 (samples × lag, lag below the slowest relaxation) to about
    √(8σ/𝒯), twice what the entropy production itself scatters, since the forces have to be estimated too.

    Args:
        times: (K,), equally spaced; any unit, the rate's is its inverse.
        positions: (K, R, d): a long trajectory (R = 1), or many short ones; replicas are independent.
        lag: records between the two ends of a pair: up to about the fastest relaxation.
        stationary: one distribution at all times. False: the distribution is taken from the replicas at each
            time, and σ is averaged over the window given (two records: the mean rate between them).
        blocks: of replicas, or of time where these are few; each has to be longer than the correlations.

    Raises:
        TypeError, ValueError: as the arrays and settings do not fit.

    NaN: fewer samples than unknowns or than 8 blocks; a lag over which some direction forgets itself, or the
    propagator has no logarithm; a coordinate without noise. What no data at this lag can tell: a rotation by
    more than half a turn per lag is taken for a slower one.

    For a system that is not linear this is no bound (at a short lag in a steady state it is one:
    `entropy_production_bound` always is).
    """
    flag("stationary", stationary)
    pairs = Pairs.of(times, positions, lag, blocks, over_time=stationary)
    sums = _sums(pairs, per_time=not stationary)
    why = pairs.too_few() or _unsupported(pairs, stationary)
    if why:
        return Estimate.undefined(why)
    total = sums.sum(0)
    rate = _stationary_rate if stationary else _mean_rate
    try:
        faintest, noise = float(_least_correlation(total.sum(0))), math.sqrt(pairs.dimensions / pairs.samples)
        if faintest < _VISIBLE * noise:
            return Estimate.undefined(
                f"some direction keeps a correlation of only {faintest:.2g} over the lag, and {_VISIBLE * noise:.2g} "
                "would be told from noise: shorten the lag, or take more samples"
            )
        full, without = rate(total[None], pairs.lag)[0], rate(total - sums, pairs.lag)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return Estimate.undefined("a coordinate does not fluctuate, or depends on others: leave it out")
    if not bool(torch.isfinite(full)) or not bool(torch.isfinite(without).all()):
        return Estimate.undefined(
            "the propagator of the lag has no real logarithm, or the noise found is not positive: shorten the lag, "
            "or take more samples"
        )
    return jackknife(full, without).estimate()


def _unsupported(pairs: Pairs, stationary: bool) -> str:
    d, replicas = pairs.dimensions, pairs.positions.shape[1]
    fewest = 2 * d + 2
    if not stationary and replicas * (1 - 1 / pairs.blocks) < fewest:
        return f"{replicas} replicas cannot show how {d} dimensions are distributed at one time, {2 * fewest} can"
    if pairs.samples * (1 - 1 / pairs.blocks) < fewest:
        return f"{pairs.samples} samples cannot show a propagator of {d} dimensions, {2 * fewest} can"
    return ""


def _sums(pairs: Pairs, *, per_time: bool) -> Tensor:
    """(B, P or 1, 1 + 2d, 1 + 2d): Σ z zᵀ, z = (1, x_t, x_{t+lag}), of each block."""
    d = pairs.dimensions
    centre = double(pairs.positions[0]).mean(0)
    found = []
    for x, y in pairs:
        z = torch.cat([torch.ones_like(x[..., :1]), x - centre, y - centre], -1)
        z = z if per_time else z.reshape(1, -1, 1 + 2 * d)
        found.append(z.transpose(-1, -2) @ z)
    return torch.stack(found)


@dataclass(frozen=True)
class _Moments:
    """Means and covariances of x_t and y = x_{t+lag}, with any dimensions before (d,), (d, d)."""

    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> _Moments:
        d = (sums.shape[-1] - 1) // 2
        mean = sums[..., 0, 1:] / sums[..., 0, :1]
        cov = sums[..., 1:, 1:] / sums[..., :1, :1] - mean[..., :, None] * mean[..., None, :]
        return cls(mean[..., :d], mean[..., d:], cov[..., :d, :d], cov[..., d:, :d], cov[..., d:, d:])


def _least_correlation(sums: Tensor) -> Tensor:
    """The smallest canonical correlation of x_t and x_{t+lag}: between directions, each of variance 1."""
    moments = _Moments.of(sums)
    x, y = torch.linalg.cholesky(moments.xx), torch.linalg.cholesky(moments.yy)
    half = torch.linalg.solve_triangular(y, moments.yx, upper=False)
    both = torch.linalg.solve_triangular(x, half.mT, upper=False)
    least: Tensor = torch.linalg.svdvals(both)[-1]
    return least


def _stationary_rate(sums: Tensor, lag: float) -> Tensor:
    """(B,): tr(C⁻¹ QᵀD⁻¹Q), AC = D + Q with D symmetric and Q antisymmetric, C the covariance; ν = −QC⁻¹x."""
    moments = _Moments.of(sums[:, 0])
    drift = -logarithm(torch.linalg.solve(moments.xx, moments.yx, left=False)) / lag
    cov = (moments.xx + moments.yy) / 2
    product = drift @ cov
    diffusion, rotation = (product + product.mT) / 2, (product - product.mT) / 2
    rate = (torch.linalg.solve(cov, rotation.mT) * torch.linalg.solve(diffusion, rotation).mT).sum((-1, -2))
    return torch.where(_positive(diffusion), rate, torch.nan)


def _mean_rate(sums: Tensor, lag: float) -> Tensor:
    """(B,): σ(t) averaged over the window: dynamics from all pairs, distributions from each time's replicas."""
    pooled = _Moments.of(sums.sum(1))
    propagator = torch.linalg.solve(pooled.xx, pooled.yx, left=False)
    noise = pooled.yy - propagator @ pooled.yx.mT
    constant = pooled.mean_y - (propagator @ pooled.mean_x[..., None])[..., 0]
    flow = _affine_flow(propagator, constant) / lag
    diffusion = _diffusion(propagator, noise, lag)
    at = _Moments.of(sums)
    mean, cov = at.mean_x, at.xx
    total = torch.zeros(len(sums), dtype=sums.dtype, device=sums.device)
    for node, weight in _NODES:
        m, c = _moved(flow, diffusion, node * lag, mean, cov)
        total = total + weight * _rate(flow, diffusion, m, c).mean(1)
    return torch.where(_positive(diffusion), total, torch.nan)


def _affine_flow(propagator: Tensor, constant: Tensor) -> Tensor:
    """(B, d + 1, d + 1): log of x → Gx + c, [[−A·lag, a·lag], [0, 0]]."""
    affine = torch.nn.functional.pad(propagator, (0, 1, 0, 1))
    affine[..., :-1, -1] = constant
    affine[..., -1, -1] = 1.0
    return logarithm(affine)


def _diffusion(propagator: Tensor, noise: Tensor, lag: float) -> Tensor:
    """(B, d, d): D from the noise of a lag, ∫₀^lag e^{−As} 2D e^{−Aᵀs} ds = N.

    log [[G, N G⁻ᵀ], [0, G⁻ᵀ]] = lag [[−A, 2D], [0, Aᵀ]]. Source: Van Loan 1978, IEEE Trans. Autom. Control 23.
    """
    d = noise.shape[-1]
    inverse = torch.linalg.inv(propagator).mT
    top = torch.cat([propagator, noise @ inverse], -1)
    bottom = torch.cat([torch.zeros_like(noise), inverse], -1)
    found = logarithm(torch.cat([top, bottom], -2))[..., :d, d:] / (2 * lag)
    return (found + found.mT) / 2


def _moved(flow: Tensor, diffusion: Tensor, time: float, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """(B, P, d), (B, P, d, d): mean and covariance after `time`, from those before; flow of (B, d + 1, d + 1)."""
    d = diffusion.shape[-1]
    drift = flow[..., :d, :d]
    affine = torch.linalg.matrix_exp(flow * time)
    both = torch.cat([torch.cat([drift, 2 * diffusion], -1), torch.cat([0 * drift, -drift.mT], -1)], -2)
    expanded = torch.linalg.matrix_exp(both * time)
    propagator = affine[..., :d, :d]
    noise = expanded[..., :d, d:] @ propagator.mT
    moved = mean @ propagator.mT + affine[..., None, :d, d]
    return moved, propagator[:, None] @ cov @ propagator[:, None].mT + noise[:, None]


def _rate(flow: Tensor, diffusion: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """(B, P): u·D⁻¹u + tr(MᵀD⁻¹MC), ν(x) = u + M(x − m), u = a − Am, M = −A + DC⁻¹."""
    d = diffusion.shape[-1]
    drift = flow[:, None, :d, :d]
    velocity = (drift @ mean[..., None])[..., 0] + flow[:, None, :d, d]
    slope = drift + torch.linalg.solve(cov, diffusion[:, None], left=False)
    inverse = torch.linalg.inv(diffusion)[:, None]
    steady = (velocity[..., None, :] @ inverse @ velocity[..., None])[..., 0, 0]
    total: Tensor = steady + (slope.mT @ inverse @ slope @ cov).diagonal(dim1=-1, dim2=-2).sum(-1)
    return total


def _positive(diffusion: Tensor) -> Tensor:
    """(B,): whether it is positive definite; NaN is not."""
    found: Tensor = torch.linalg.eigvalsh(torch.nan_to_num(diffusion, nan=0.0))[..., 0] > 0
    return found
