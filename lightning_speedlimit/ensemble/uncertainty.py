"""Entropy production from short-time currents: a lower bound, and the rate where polynomials span it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_speedlimit.checks.tensors import whole
from lightning_speedlimit.ensemble.currents import MAX_DEGREE, CurrentMoments, Currents
from lightning_speedlimit.ensemble.estimate import Estimate, Sampled
from lightning_speedlimit.ensemble.trajectories import BLOCKS, MIN_BLOCKS, Array, Pairs, jackknife

_SAMPLES_PER_CURRENT = 4
_LIMIT = 5.0  # standard deviations of a current, beyond which it is cut off


@dataclass(frozen=True)
class RateBound:
    """Lower bounds of a rate of entropy production, evaluated on pairs that the current was not chosen on."""

    rate: Estimate
    """⟨J − e^{−J} + 1⟩/lag, nats/time: in a steady state at most σ at every lag; else KL(p_{t+lag}‖p_t)/lag may add."""
    uncertainty_relation: Estimate
    """log(1 + 2⟨J⟩²/Var J)/lag, nats/time: in a steady state at most σ at every lag, and in all as it vanishes."""
    lag: float
    """Between the two ends of a pair, time."""
    samples: int
    """Pairs."""
    currents: int
    """B, among whose combinations J was chosen: what choosing costs is about 2.5·B/(samples · lag), nats/time."""


def entropy_production_bound(
    times: Array, positions: Array, *, degree: int = 1, lag: int = 1, folds: int = 5, blocks: int = BLOCKS
) -> RateBound:
    """σ ≥ max_w 2⟨J⟩²/(lag · Var J), J = w(x̄)∘Δx, w a polynomial of the midpoint x̄: from trajectories alone, nats/time.

    The best w is 2S⁻¹μ, in closed form, μ and S the mean and covariance of the currents. It is found on all folds
    but one and evaluated on that one, so that fitting noise lowers the value, never raises it. `rate` evaluates
    the same current by ⟨J − e^{−J} + 1⟩, which a steady state bounds by lag · σ at any lag and for any current
    that is odd under time reversal; the relation is taken in its form for finite lags, 2⟨J⟩²/Var J ≤ e^{lag·σ} − 1.
    Both tend to σ as lag → 0 and as w comes to span D⁻¹ν, ν the mean local velocity: degree 1 does for a linear system.

    Away from the steady state it bounds the mean rate over the window, up to KL(p_{t+lag}‖p_t)/lag, which
    vanishes with the lag; take windows: times[k : k + 2], positions[k : k + 2].

    Args:
        times: (K,), equally spaced; any unit, the rate's is its inverse.
        positions: (K, R, d): independent replicas, or one long trajectory. Projections or some coordinates of a
            system will do: what is not seen lowers the bound.
        degree: of the polynomials; C(d + degree, degree)·d currents, at most 1000.
        lag: records between the two ends of a pair. Short, but lag·samples is the time that the error shrinks with.
        folds: parts for cross-fitting.
        blocks: of replicas, or of time where these are few, for the standard error; each has to be longer than
            the correlations.

    Raises:
        TypeError, ValueError: as the arrays and settings do not fit.

    NaN: fewer than 4 pairs per current, or than 8 blocks.

    Source: Otsubo, Ito, Dechant, Sagawa 2020, Phys. Rev. E 101, 062106 (short-time uncertainty relation); Hasegawa, Van
    Vu 2019, PRL 123, 110602 (the relation at a finite lag); Van Vu,
    Vo, Hasegawa 2020, ibid. 042138 (the best current in a basis); Kim, Bae, Lee, Jeong 2020, PRL 125, 140604
    (J − e^{−J}, a variational form of the relative entropy of a pair and its reverse).
    """
    pairs = Pairs.of(times, positions, lag, blocks)
    currents = Currents.of(pairs, whole("degree", degree, 0, MAX_DEGREE))
    whole("folds", folds, 2)
    if folds > MIN_BLOCKS:
        raise ValueError(f"folds must be at most {MIN_BLOCKS}, got {folds}; 5 is plenty")
    why = pairs.too_few() or _unsupported(pairs, currents, 1 - 1 / folds)
    relation = rate = Estimate.undefined(why)
    if not why:
        rate, relation = _held_out(pairs, currents, folds)
    return RateBound(rate, relation, pairs.lag, pairs.samples, currents.count)


def _unsupported(pairs: Pairs, currents: Currents, share: float) -> str:
    wanted = int(_SAMPLES_PER_CURRENT * currents.count / share) + 1
    if pairs.samples >= wanted:
        return ""
    return (
        f"{pairs.samples} samples cannot choose among {currents.count} currents, {wanted} can; lower the degree, or "
        "project the positions on fewer directions"
    )


def _held_out(pairs: Pairs, currents: Currents, folds: int) -> tuple[Estimate, Estimate]:
    """⟨J − e^{−J} + 1⟩/lag and 2⟨J⟩ − ½ Var J over lag, J of each fold chosen on the others.

    The second is the relation 2⟨J⟩²/Var J for a J of the best size: it is not squared, so it has no bias. It is
    largest at that J, so that the choice adds nothing to its error to first order; to the first's it does.

    J is cut off at ±c, which leaves it odd and both of them bounds: without it one far pair of a law with heavy
    tails, of a weight e^{−J}, is all that there is. c is the lesser of 5 standard deviations, √(2w·μ) where J was
    chosen, and log of the number of pairs: J = −c comes at most e^{−c} as often as J = c, where J is right.
    """
    fold = torch.arange(pairs.blocks, device="cpu") * folds // pairs.blocks
    moments = CurrentMoments.of(currents, pairs)
    device = moments.first.device
    weights, ratio = moments.grouped(fold.to(device), folds).without_each().optimal()
    cut = (_LIMIT * (2.0 * ratio.clamp(min=0)).sqrt()).clamp(max=math.log(pairs.samples))
    sums = torch.zeros(pairs.blocks, 3, dtype=torch.float64, device="cpu")
    gradient = torch.zeros_like(weights[0])
    for block, (x, y) in enumerate(pairs):
        most = cut[fold[block]]
        for part in currents.parts(x, y):
            whole_j = part @ weights[fold[block]]
            j = whole_j.clamp(-most, most)
            backward = torch.exp(-j)
            sums[block] += torch.stack([j.sum(), j.square().sum(), (j - backward + 1.0).sum()]).cpu()
            gradient += torch.where(j == whole_j, 1.0 + backward, 0.0) @ part
    n = moments.samples.cpu()
    pull = moments.pull(gradient / pairs.samples).cpu()
    mean = sums[:, 0].sum() / n.sum()
    centred = sums[:, 1] - 2.0 * mean * sums[:, 0] + n * mean.square()
    relation = _at_finite_lag(_mean_of_blocks(2.0 * sums[:, 0] - 0.5 * centred, n, pairs.lag), pairs.lag)
    return _mean_of_blocks(sums[:, 2], n, pairs.lag, pull), relation


def _at_finite_lag(relation: Estimate, lag: float) -> Estimate:
    """log(1 + r·lag)/lag of r = 2⟨J⟩²/(lag · Var J), at most r; what noise left below 0 stays as it is."""
    grown = 1.0 + max(0.0, relation.value * lag)
    value = math.log(grown) / lag if grown > 1 else relation.value
    return Estimate(value, relation.standard_error / grown, relation.reason)


def _mean_of_blocks(sums: Tensor, samples: Tensor, lag: float, pull: Tensor | float = 0.0) -> Estimate:
    """Σ sums/Σ samples over the lag, with the scatter of the blocks; `pull`: what else each of them moves."""
    blocks, total = len(sums), samples.sum()
    mean = sums.sum() / total
    influence = (sums - mean * samples + pull) * blocks / total
    return Sampled(float(mean) / lag, influence / lag).estimate()


def entropy_production_polynomial(
    times: Array, positions: Array, *, degree: int = 3, lag: int = 1, blocks: int = BLOCKS
) -> Estimate:
    """σ ≈ 2r(lag) − r(2 lag), r = 2 μᵀS⁻¹μ/lag: the rate, where D⁻¹ν is a polynomial of this degree, nats/time.

    The same currents as `entropy_production_bound`, but an estimate and no bound: what is linear in the lag is
    extrapolated away, and the bias of fitting B currents, 2B/(samples · lag), by a jackknife over blocks, which
    also gives the standard error. A rest of second order in the lag stays: where r falls as 1/(1 + c·lag), it is
    2[r(lag) − r(2 lag)]²/r(lag), and that is in the error (a plane that turns by 0.2 a lag: 1.76 ± 0.26 where 2 is
    true, 0.12 without). What the polynomials miss is in neither.

    Args, Raises, NaN: as `entropy_production_bound`; at least 2·lag + 1 records. A steady state, or a window over
    which the distribution hardly changes.

    Source: as `entropy_production_bound`.
    """
    found: list[tuple[Tensor, Tensor]] = []
    pairs = Pairs.of(times, positions, 2 * whole("lag", lag, 1), blocks)
    for half in (False, True):
        if half:  # the same blocks, for the difference of both to have their common scatter
            pairs = replace(pairs, steps=lag, lag=pairs.lag / 2)
        currents = Currents.of(pairs, whole("degree", degree, 0, MAX_DEGREE))
        why = pairs.too_few() or _unsupported(pairs, currents, 1 - 1 / pairs.blocks)
        if why:
            return Estimate.undefined(why)
        moments = CurrentMoments.of(currents, pairs)
        whole_sample = moments.grouped(torch.zeros(pairs.blocks, dtype=torch.int64, device=moments.first.device), 1)
        found.append((whole_sample.optimal()[1][0] / pairs.lag, moments.without_each().optimal()[1] / pairs.lag))
    (twice, twice_without), (once, once_without) = found
    # Less what noise alone makes of the square.
    slope = jackknife(once - twice, once_without - twice_without)
    rest = 2.0 * max(0.0, slope.value**2 - slope.standard_error**2) / (float(once) or 1.0)
    return replace(jackknife(2.0 * once - twice, 2.0 * once_without - twice_without), systematic=rest).estimate()
