"""The matrix of squared distances between two clouds, each entry bounded from below, read in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_speedlimit.transport.clouds import BLOCK_BYTES, Clouds, check_finite, row_parts

EPS = torch.finfo(torch.float64).eps
MAX_PAIRS = 2**28  # entries of a matrix that is held: 2 GiB in float64, N = M = 16,384
_ACCURATE = 1e-10  # relative error of an entry above which it is computed anew by direct differences
_SLICE = 1024  # coordinates that one matrix product adds up: its chain of roundings is no longer
_MAX_DIRECT = 4 * 10**9  # pairs × coordinates that are worth doing so


@dataclass
class Costs:
    """Squared distances after the mean displacement is taken out: C̃_ij = |x_i − y_j + c|², c = ȳ − x̄.

    Centring changes the cost of every plan by the same amount, so potentials and gaps carry over.
    """

    lower: Tensor
    """(N, M) float64: C̃_ij minus a bound on its rounding error, at least 0."""
    diagonal: Tensor | None
    """(N,): |d_i − c|², d_i = y_i − x_i, from the displacements themselves; None where they are no plan."""
    along: Tensor | None
    """(N,): ⟨x_i − x̄, d_i − c⟩; None where `diagonal` is."""
    plain: Tensor | None
    """(N,): |d_i|², not centred; None where `diagonal` is."""
    shift: float
    """|c|²."""
    same: bool
    """Whether x_i = y_i for all i, in every digit."""
    coordinates: int
    chain: int
    """Roundings that one entry has gone through at most, one after the other: a slice, and the slices added up."""
    weights: tuple[Tensor, Tensor]
    """(N,), (M,): they sum to 1."""
    uniform: bool
    """N = M and all weights are equal: an optimal plan is a permutation."""
    roots: tuple[Tensor, Tensor]
    """|x_i − x̄| (N,) and |y_j − ȳ| (M,)."""

    def uncertainty(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Bound on an entry's error where it came from the Gram matrix; rows and columns broadcast.

        A chain of k roundings is off by at most ½ k ε of the sum of its terms' sizes; the three sums of an
        entry make (|x| + |y|)².
        """
        x, y = self.roots
        size = x[rows] + y[columns]
        bound: Tensor = EPS * ((8 + self.chain / 2) * size + 4 * self.shift**0.5) * size
        return bound

    @property
    def rounding(self) -> float:
        """Relative error of a sum of squares over all coordinates, read in blocks."""
        return 1e-12 + EPS * self.chain

    def largest(self, *, centred: bool = False) -> float:
        """What no pair of particles with a weight costs more than."""
        reach = [(root * (weight > 0)).max().item() for root, weight in zip(self.roots, self.weights, strict=True)]
        return float((sum(reach) + (0 if centred else math.sqrt(self.shift))) ** 2)

    def below(self, direct: Tensor) -> Tensor:
        """What the true cost is at least, where `direct` was computed from differences."""
        root = self.shift**0.5
        bound: Tensor = direct - EPS * ((64 + self.chain) * direct + 8 * root * direct.sqrt() + 16 * EPS * self.shift)
        return bound


def read(clouds: Clouds, blocks: Iterable[tuple[Tensor, Tensor]]) -> Costs:
    """Takes in both clouds once: Gram matrix, norms, displacements; summed over the ranks."""
    gram: Tensor | None = None
    n = 0
    for x, y in blocks:
        if not n:
            n, m = len(x), len(y)
            w, v = clouds.weights(n, m, x.device)
            paired = n == m and torch.equal(w, v)
            sums = x.new_zeros(5, max(n, m))  # |x̃|², |ỹ|², |d|², |d̃|², ⟨x̃, d̃⟩
            scalars = x.new_zeros(4)  # |c|², coordinates, slices, blocks in which x differs from y
        if paired:
            displacement = y - x
            sums[2] += displacement.square().sum(1)
            scalars[3] += displacement.any()
        x, y, d, c = _centred(x, y, w, v, paired=paired)
        sums[0, :n] += x.square().sum(1)
        sums[1, :m] += y.square().sum(1)
        if d is not None:
            sums[3] += d.square().sum(1)
            sums[4] += (x * d).sum(1)
        for start in range(0, x.shape[1], _SLICE):
            factors = x[:, start : start + _SLICE], y[:, start : start + _SLICE].T
            gram = torch.mm(*factors) if gram is None else gram.addmm_(*factors)
            scalars[2] += 1
        scalars[0] += c.square().sum()
        scalars[1] += x.shape[1]
    assert gram is not None  # clouds refuse to be empty
    clouds.sum(gram, sums, scalars)
    norm_x, norm_y = sums[0, :n], sums[1, :m]
    x_norm, y_norm, shift, coordinates, slices, differences = torch.stack(
        [norm_x.sum(), norm_y.sum(), *scalars]
    ).tolist()
    check_finite(x_norm, y_norm, shift)
    costs = Costs(
        lower=gram,
        diagonal=sums[3].clone() if paired else None,
        along=sums[4].clone() if paired else None,
        plain=sums[2].clone() if paired else None,
        shift=shift,
        same=paired and differences == 0,
        coordinates=int(coordinates),
        chain=min(int(coordinates), _SLICE) + int(slices),
        weights=(w, v),
        uniform=paired and bool((w == w[0]).all()),
        roots=(norm_x.sqrt(), norm_y.sqrt()),
    )
    _to_lower_bounds(costs, norm_x, norm_y)
    return costs


def _centred(
    x: Tensor, y: Tensor, w: Tensor, v: Tensor, *, paired: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x − x̄, y − ȳ, d − c (where paired) and c = ȳ − x̄ of one block; the same bits at each reading."""
    if paired:
        d = y - x
        mean = w @ x
        c = w @ d
        d -= c
        x = x - mean
        return x, x + d, d, c
    # Far from the origin the two means would be rounded apart by more than the particles differ.
    anchor = x[w.argmax()]
    x, y = x - anchor, y - anchor
    mean, other = w @ x, v @ y
    return x - mean, y - other, None, other - mean


def _to_lower_bounds(costs: Costs, norm_x: Tensor, norm_y: Tensor) -> None:
    """In place: from inner products to lower bounds of squared distances.

    The norms minus `uncertainty` are a matrix of rank three, which one product adds: a s² + b s with s = |x| + |y|.
    """
    x, y = costs.roots
    a, b = EPS * (8 + costs.chain / 2), 4 * EPS * costs.shift**0.5
    left = torch.stack([norm_x - x * (a * x + b), torch.ones_like(x), -2 * a * x], 1)
    right = torch.stack([torch.ones_like(y), norm_y - y * (a * y + b), y])
    costs.lower.addmm_(left, right, beta=-2).clamp_(min=0)
    if costs.diagonal is not None:
        costs.lower.diagonal().copy_(costs.below(costs.diagonal).clamp(min=0))


def sharpen(costs: Costs, clouds: Clouds) -> None:
    """Computes anew, by direct differences, the entries that rounding leaves uncertain by more than 1e-10.

    These are pairs much closer to each other than to the clouds' centres: duplicates, clusters, permuted
    weights. Where there are too many for that only those uncertain by more than 1e-8, 1e-6, … are.
    """
    if not clouds.rereadable:
        return
    rows, columns = clouds.from_first(_uncertain(costs) if clouds.decides else None)
    rows, columns = rows.to(costs.lower.device), columns.to(costs.lower.device)
    if len(rows):
        centred = direct(costs, clouds, rows, columns)[0]
        costs.lower[rows, columns] = costs.below(centred).clamp(min=0)


def _uncertain(costs: Costs) -> tuple[Tensor, Tensor]:
    """(P,), (P,): rows and columns of the entries to compute anew."""
    largest = costs.uncertainty(torch.arange(len(costs.lower), device=costs.lower.device), costs.roots[1].argmax())
    worst = _ACCURATE
    while True:
        found, limit = [], largest / worst
        for part in row_parts(costs.lower):
            block = costs.lower[part]
            # Only of these can it be so: one look at each entry finds them.
            near = _indices(block < limit[part, None])
            rows, columns = near // block.shape[1] + part.start, near % block.shape[1]
            error = costs.uncertainty(rows, columns)
            uncertain = error > worst * (block.flatten()[near] + error)
            if costs.diagonal is not None:
                uncertain &= rows != columns
            found.append(torch.stack([rows, columns])[:, uncertain])
        pairs = torch.cat(found, 1)
        if pairs.shape[1] * costs.coordinates <= _MAX_DIRECT:
            return pairs[0], pairs[1]
        worst *= 100


def _indices(mask: Tensor) -> Tensor:
    """Where the flattened mask is True; on the host numpy is six times as fast."""
    flat = mask.flatten()
    return torch.from_numpy(np.flatnonzero(flat.numpy())) if flat.device.type == "cpu" else flat.nonzero()[:, 0]


def direct(costs: Costs, clouds: Clouds, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P,) each: |x_i − y_j + c|² and |x_i − y_j|² of the pairs, from differences, and in how many blocks x_i ≠ y_j.

    Reads the clouds again.
    """
    w, v = costs.weights
    paired = costs.diagonal is not None
    sums = torch.zeros(3, len(rows), dtype=torch.float64, device=costs.lower.device)
    for x, y in clouds.blocks():
        c = _centred(x, y, w, v, paired=paired)[3]
        step = max(1, BLOCK_BYTES // (8 * x.shape[1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            difference = x[rows[part]] - y[columns[part]]
            sums[1, part] += difference.square().sum(1)
            sums[2, part] += difference.any(1)
            sums[0, part] += (difference + c).square().sum(1)
    clouds.sum(sums)
    return sums[0], sums[1], sums[2]
