"""The speed limit between the distributions of the replicas at two times."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_speedlimit.checks.tensors import choice, nonnegative, shown, whole
from lightning_speedlimit.ensemble.distance import extrapolated, sampled_distance, sampled_gelbrich
from lightning_speedlimit.ensemble.entropy import MAX_NEIGHBOUR_DIMENSIONS, sampled_gaussian, sampled_neighbours
from lightning_speedlimit.ensemble.estimate import Estimate, Sampled
from lightning_speedlimit.ensemble.normality import normality_p_value
from lightning_speedlimit.ensemble.trajectories import Array, checked, double, floating
from lightning_speedlimit.transport import Transport, wasserstein2_squared

EntropyEstimator = Literal["gaussian", "neighbours"]

_NORMAL = 0.01  # the least p of a cloud that is taken for normal


@dataclass(frozen=True)
class DistributionLimit:
    """τ ≥ W₂²(p_s, p_t)/(F_s − F_t): how close an ensemble came to the least time between its distributions.

    Standard errors are of the sampling of replicas, which have to be independent: with minibatches shared by
    all they tell only of other starts. Nothing is clipped; undefined is NaN with its reason.
    """

    elapsed: float
    """τ = t − s, time (parameter²/loss: steps × learning rate)."""
    temperature: float
    """T, loss."""
    replicas: int
    """R."""
    dimensions: int
    """d."""
    wasserstein2_squared: Estimate
    """W₂² between the distributions, parameter²: that of the clouds, `transport.value`, extrapolated to infinitely many
    replicas. Clouds are too far apart by about R^{−2/d}; halves of them show how far, and the error holds half of what
    was taken off, d/20 of it in more than ten dimensions. Blind where every replica is matched to itself (d much above
    log R and little diffusion): then it is E[D²] of the pairs, and `wasserstein2_squared_lower` the other end."""
    wasserstein2_squared_lower: Estimate
    """W₂² between normal distributions with the clouds' means and covariances, parameter²: for the distributions
    a lower bound (Gelbrich), exact if they are normal. Its bias of order 1/R is taken out."""
    transport: Transport
    """The plan behind W₂², with certified bounds `lower` ≤ W₂² ≤ `upper` for these clouds, parameter²."""
    loss_drop: Estimate
    """⟨L⟩_s − ⟨L⟩_t, loss."""
    entropy_change_gaussian: Estimate
    """S_t − S_s of normal distributions with the clouds' covariances, nats."""
    entropy_change_neighbours: Estimate
    """S_t − S_s from nearest neighbours, of any shape, nats."""
    entropy_estimator: EntropyEstimator
    """The one of them that the free energy is made with."""
    normality: tuple[float, float]
    """p of "the cloud is normal" at s and at t, by `normality_p_value`; NaN where the replicas are too few to test."""
    free_energy_drop: Estimate
    """T Σ_τ = F_s − F_t = loss_drop + T (S_t − S_s), loss: temperature × entropy production."""
    speed_limit_time: Estimate
    """τ_SL = W₂²/(F_s − F_t), time. NaN where the drop is below two of its standard errors."""
    efficiency: Estimate
    """η = τ_SL/τ, 1: at most 1 for continuous Langevin dynamics, up to sampling; NaN as `speed_limit_time`."""
    efficiency_lower: Estimate
    """`efficiency` with `wasserstein2_squared_lower`, 1: the lower end of what η may be."""
    efficiency_loss_drop: Estimate
    """W₂²/(τ · loss_drop), 1: `efficiency` at temperature 0, which needs no entropy; NaN as there."""


def speed_limit(
    times: Array,
    positions: Array,
    losses: Array,
    temperature: float,
    *,
    start: int = 0,
    end: int = -1,
    entropy: EntropyEstimator | Literal["auto"] = "auto",
    neighbours: int = 4,
    tolerance: float = 1e-3,
) -> DistributionLimit:
    """η = W₂²(p_s, p_t)/[(t − s)(F_s − F_t)], F = ⟨L⟩ − T·S: the speed limit of gradient flow or Langevin dynamics.

    Args:
        times: (K,), in units of the flow θ̇ = −∇L: steps × learning rate.
        positions: (K, R, d), the replicas' parameters at these times; only two times are read.
        losses: (K, R), the loss that the dynamics descends, not a minibatch's.
        temperature: T ≥ 0 of the Langevin noise, in units of the loss.
        start, end: which of the recorded times are s and t.
        entropy: what the free energy takes: "gaussian" (d + 2 replicas or more; an upper bound of each entropy
            where the clouds are not normal), "neighbours" (at most 10 dimensions), or "auto": "gaussian" where both
            clouds may be normal (p ≥ 0.01), else "neighbours". Fewer than 20 replicas hardly ever show that they
            are not normal. `entropy_estimator` says which one it was.
        neighbours: k of the nearest-neighbour entropy.
        tolerance: of the certified interval of W₂².

    Raises:
        TypeError, ValueError: arrays that do not fit, are not finite or not in order; settings out of range.

    NaN: what needs an entropy that the replicas cannot support, at a temperature above 0: with "auto" that of clouds
    that are not normal in more than 10 dimensions; ratios to a drop below two of its standard errors. Reasons are
    in the estimates.

    Source: Seroussi, Alemi, Helias, Ringel, arXiv:2307.14653; Aurell, Mejía-Monasterio, Muratore-Ginanneschi
    2011, PRL 106, for T > 0.
    """
    t, x = checked(times, positions)
    loss = _checked_losses(losses, x)
    _check_settings(temperature, entropy, neighbours)
    first, last = _index("start", start, len(t)), _index("end", end, len(t))
    if first >= last:
        raise ValueError(f"start must be before end, got records {first} and {last} of {len(t)}")
    elapsed = float(t[last] - t[first])
    begin, finish = double(x[first]), double(x[last])
    transport = wasserstein2_squared(begin, finish, tolerance=tolerance)
    gelbrich = sampled_gelbrich(begin, finish)
    distance = extrapolated(sampled_distance(begin, finish, transport), begin, finish, transport, gelbrich, tolerance)
    drop = Sampled.mean(double(loss[first] - loss[last]).to(begin.device))
    gaussian = sampled_gaussian(finish) - sampled_gaussian(begin)
    nearest = sampled_neighbours(finish, neighbours) - sampled_neighbours(begin, neighbours)
    normality = normality_p_value(begin), normality_p_value(finish)
    chosen, why = _chosen(entropy, normality, x.shape[2])
    free = drop
    if temperature > 0:
        change = gaussian if chosen == "gaussian" else nearest
        if entropy == "auto" and chosen == "neighbours" and not nearest.reason:
            warnings.warn(
                f"the replicas are not normal (p = {min(normality):.1g}): their entropy change is that of nearest "
                f"neighbours, {nearest.value:.3g}, not {gaussian.value:.3g} of normal clouds; "
                'entropy="neighbours" says the same without this warning',
                stacklevel=2,
            )
        free = drop + replace(change, reason=why or change.reason).times(temperature)
    limit = _ratio(distance, free, "free energy drop")
    return DistributionLimit(
        elapsed=elapsed,
        temperature=float(temperature),
        replicas=x.shape[1],
        dimensions=x.shape[2],
        wasserstein2_squared=distance.estimate(),
        wasserstein2_squared_lower=gelbrich.estimate(),
        transport=transport,
        loss_drop=drop.estimate(),
        entropy_change_gaussian=gaussian.estimate(),
        entropy_change_neighbours=nearest.estimate(),
        entropy_estimator=chosen,
        normality=normality,
        free_energy_drop=free.estimate(),
        speed_limit_time=limit.estimate(),
        efficiency=limit.times(1.0 / elapsed).estimate(),
        efficiency_lower=_ratio(gelbrich, free, "free energy drop").times(1.0 / elapsed).estimate(),
        efficiency_loss_drop=_ratio(distance, drop, "loss drop").times(1.0 / elapsed).estimate(),
    )


def _chosen(
    entropy: EntropyEstimator | Literal["auto"], normality: tuple[float, float], dimensions: int
) -> tuple[EntropyEstimator, str]:
    """The estimator, and why it cannot be had where "auto" found none."""
    if entropy != "auto":
        return entropy, ""
    rejected = [f"{p:.1g} at the {end}" for p, end in zip(normality, ("start", "end"), strict=True) if p < _NORMAL]
    if not rejected:
        return "gaussian", ""
    why = (
        f"the replicas are not normal (p = {' and '.join(rejected)}), which makes their normal entropy too large, and "
        f"nearest neighbours are blind in {dimensions} dimensions, more than {MAX_NEIGHBOUR_DIMENSIONS}; project the "
        'positions on fewer directions, or take entropy="gaussian" for an upper bound of each entropy'
    )
    return "neighbours", why if dimensions > MAX_NEIGHBOUR_DIMENSIONS else ""


def _ratio(distance: Sampled, drop: Sampled, name: str) -> Sampled:
    """distance/drop; NaN with the reason where the drop is not two standard errors above 0."""
    error = drop.standard_error
    why = drop.reason
    if not why and drop.value <= 0:
        why = f"the {name} is not positive ({drop.value:.3g}): there is no entropy production to divide by"
    if not why and drop.value < 2 * error:
        why = f"the {name}, {drop.value:.3g}, is below two of its standard errors ({error:.3g} each)"
    return Sampled.undefined(why, distance.influence) if why else distance.over(drop)


def _checked_losses(losses: Array, x: Tensor) -> Tensor:
    loss = floating("losses", losses).detach()
    if loss.shape != x.shape[:2]:
        raise ValueError(
            f"losses must have shape (times, replicas) = {tuple(x.shape[:2])}, got {tuple(loss.shape)}; "
            "one loss for each replica at each time"
        )
    if not bool(torch.isfinite(loss).all()):
        raise ValueError("losses must be finite, got NaN or inf; drop the replicas that diverged")
    return loss


def _check_settings(temperature: float, entropy: str, neighbours: int) -> None:
    nonnegative("temperature", temperature)
    choice("entropy", entropy, "auto", *get_args(EntropyEstimator))
    whole("neighbours", neighbours, 1)


def _index(name: str, value: int, records: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -records <= value < records:
        raise ValueError(f"{name} must be the number of a record, {-records} to {records - 1}, got {shown(value)}")
    return value % records
