"""Differential entropy of the distribution that a cloud of replicas was drawn from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_speedlimit.checks.tensors import whole
from lightning_speedlimit.ensemble.estimate import Estimate, Sampled
from lightning_speedlimit.ensemble.trajectories import Array, double, floating

MAX_NEIGHBOUR_DIMENSIONS = 10  # 1000 normal replicas, 4 neighbours: off by 0.12 nats there, 1.3 at 20
_SINGULAR = 1e-13  # a direction with less than this of the variance, coordinates scaled to 1, has none


def gaussian_entropy(positions: Array) -> Estimate:
    """S = ½ log det(2πe Σ) of the normal distribution with the cloud's covariance, nats.

    Σ is estimated from R replicas, and log det of it is too small by a known amount, Σ_i [ψ((R−1−i)/2) −
    log((R−1)/2)], i < d: that is taken out. Exact in expectation for normal clouds; for any other S is above
    the entropy. Standard error: jackknife over the replicas, which have to be independent.

    Args:
        positions: (R, d).

    NaN: R ≤ d + 1; a cloud that is flat in some direction, whose entropy is −∞.

    Source: the bias is that of a Wishart determinant, e.g. Ahmed & Gokhale 1989, IEEE Trans. Inf. Theory 35.
    """
    return sampled_gaussian(_cloud(positions)).estimate()


def neighbour_entropy(positions: Array, *, neighbours: int = 4) -> Estimate:
    """S = ψ(R) − ψ(k) + log V_d + (d/R) Σ_r log ε_r, nats; ε_r: distance to the k-th nearest replica.

    Assumes no shape. The cloud is made isotropic first (the distances of the white cloud, plus ½ log det Σ).
    What is left of the bias grows with d and with edges and tails (300 uniform replicas in 5 dimensions: 0.65
    nats, ten standard errors, which do not know of it): that of a change between two times mostly cancels where
    the shape stays. Standard error: jackknife, up to 60 % too large in one or two dimensions.

    Args:
        positions: (R, d).
        neighbours: k ≥ 1; more of them scatter less and blur more.

    NaN: R ≤ d + 1 or R ≤ k + 1; d > 10; more than k replicas at one place; a cloud flat in some direction.

    Source: Kozachenko & Leonenko 1987; Kraskov, Stögbauer, Grassberger 2004, Phys. Rev. E 69.
    """
    return sampled_neighbours(_cloud(positions), whole("neighbours", neighbours, 1)).estimate()


def _cloud(positions: Array) -> Tensor:
    x = floating("positions", positions).detach()
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"positions must have shape (replicas, dimensions), got {tuple(x.shape)}; one time at a time")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("positions must be finite, got NaN or inf; drop the replicas that diverged")
    return double(x)


def sampled_gaussian(x: Tensor) -> Sampled:
    """`gaussian_entropy` of (R, d) float64, with what each replica adds."""
    replicas, d = x.shape
    why, white, log_root = whitened(x)
    if why:
        return Sampled.undefined(why, x[:, 0])
    value = 0.5 * d * math.log(2 * math.pi * math.e) + log_root
    # Without replica r the scatter matrix W loses R/(R−1) x̃x̃ᵀ: a determinant of rank one. What is the same for
    # all r does not count.
    lost = 0.5 * torch.log1p(-white.square().sum(1) * replicas / (replicas - 1) ** 2)
    return Sampled(value - _log_root_bias(replicas, d), -(replicas - 1) * lost)


def _log_root_bias(replicas: int, d: int) -> float:
    """E[½ log det Σ̂] − ½ log det Σ = ½ Σ_i [ψ((R−1−i)/2) − log((R−1)/2)], i < d."""
    halves = (replicas - 1 - torch.arange(d, dtype=torch.float64, device="cpu")) / 2
    return 0.5 * float((torch.special.digamma(halves) - math.log((replicas - 1) / 2)).sum())


def whitened(x: Tensor) -> tuple[str, Tensor, float]:
    """Why it cannot be; the cloud with covariance 1; ½ log det of the covariance it had."""
    replicas, d = x.shape
    if replicas <= d + 1:
        return (
            f"{replicas} replicas cannot show a covariance in {d} dimensions, d + 2 can; "
            "W₂², the loss drop and the efficiency at temperature 0 need none",
            x,
            math.nan,
        )
    centred = x - x.mean(0)
    scale = centred.square().mean(0).sqrt()
    size = x.abs().amax(0)
    if bool((scale <= 1e-14 * size).any()):
        return "the replicas are all at one place in some coordinate: their entropy is −∞; take a later time", x, 0.0
    centred = centred / scale
    values, vectors = torch.linalg.eigh(centred.T @ centred / (replicas - 1))
    if float(values[0]) < _SINGULAR * d:
        return "the replicas all lie in one hyperplane: their entropy is −∞; drop the dependent coordinates", x, 0.0
    log_root = 0.5 * float(values.log().sum()) + float(scale.log().sum())
    return "", centred @ (vectors / values.sqrt()), log_root


def sampled_neighbours(x: Tensor, k: int) -> Sampled:
    """`neighbour_entropy` of (R, d) float64, with what each replica adds."""
    replicas, d = x.shape
    why, white, log_root = whitened(x)
    if not why and d > MAX_NEIGHBOUR_DIMENSIONS:
        why = (
            f"nearest neighbours are blind in {d} dimensions (in {MAX_NEIGHBOUR_DIMENSIONS} their bias is 0.1 nats for "
            "1000 normal replicas); take the normal entropy"
        )
    if not why and replicas < k + 2:
        why = f"{replicas} replicas have no {k + 1} neighbours each"
    if why:
        return Sampled.undefined(why, x[:, 0])
    distances, indices = _nearest(white, k + 1)
    kth, following = distances[:, k - 1], distances[:, k]
    if bool((kth == 0).any()):
        return Sampled.undefined(f"more than {k} replicas are at one place: raise neighbours", x[:, 0])
    terms = d * kth.log()
    constant = log_root + _digamma(replicas) - _digamma(k) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1)
    # Without replica r its neighbours' k-th nearest is what was the next one.
    gain = torch.zeros_like(terms)
    gain.index_add_(0, indices[:, :k].flatten(), (d * (following / kth).log()).repeat_interleave(k))
    return Sampled(float(terms.mean()) + constant, terms - gain)


def _digamma(n: int) -> float:
    return float(torch.special.digamma(torch.tensor(float(n), dtype=torch.float64, device="cpu")))


def _nearest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(R, count), (R, count): distances to the nearest others in ascending order, and who they are."""
    rows = max(1, 2**22 // len(x))
    found = []
    for start in range(0, len(x), rows):
        part = torch.cdist(x[start : start + rows], x, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(part), device=x.device)
        part[own, start + own] = math.inf
        found.append(part.topk(count, dim=1, largest=False))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
