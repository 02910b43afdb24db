"""Short-time currents φ(x) ∘ dx with φ from polynomials, and their moments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from lightning_speedlimit.ensemble.trajectories import Pairs

MAX_CURRENTS = 1000
MAX_DEGREE = 1000
_VALUES = 2**22  # numbers that a part of the sample is expanded to at a time
_JITTER = 1e-11  # of a current's variance: below what can be told from dependence


@dataclass(frozen=True)
class Currents:
    """J_i = φ_i(x̄)·Δx, x̄ = (x_t + x_{t+lag})/2: odd under exchange of the two ends of the pair.

    φ: every monomial of the coordinates of x̄ up to `degree`, times every unit vector.
    """

    centre: Tensor
    scale: Tensor
    degree: int

    @classmethod
    def of(cls, pairs: Pairs, degree: int) -> Currents:
        """Coordinates are centred and scaled by their spread: this changes no span, only the rounding.

        Raises:
            ValueError: more than 1000 currents.
        """
        d = pairs.dimensions
        count = math.comb(d + degree, degree) * d
        if count > MAX_CURRENTS:
            raise ValueError(
                f"degree {degree} in {d} dimensions makes {count} currents, at most {MAX_CURRENTS} are fitted; lower "
                "it, or project the positions on fewer directions: a bound stays a bound"
            )
        sums = torch.zeros(2, d, dtype=torch.float64, device="cpu")
        first = pairs.positions[0, 0].cpu().double()
        for x, _ in pairs:
            away = x.cpu() - first
            sums += torch.stack([away.sum((0, 1)), away.square().sum((0, 1))])
        mean, square = sums / pairs.samples
        spread = (square - mean.square()).clamp(min=0).sqrt()
        return cls(first + mean, torch.where(spread > 0, spread, 1.0), degree)

    @property
    def count(self) -> int:
        d = len(self.centre)
        return math.comb(d + self.degree, self.degree) * d

    def parts(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """(n, B) of the pairs in (P, r, d), (P, r, d), part by part."""
        d = len(self.centre)
        x, y = x.reshape(-1, d), y.reshape(-1, d)
        centre, scale = self.centre.to(x.device), self.scale.to(x.device)
        step = max(1, _VALUES // self.count)
        for start in range(0, len(x), step):
            a, b = x[start : start + step], y[start : start + step]
            basis = _monomials(((a + b) / 2 - centre) / scale, self.degree)
            yield (basis[:, :, None] * ((b - a) / scale)[:, None, :]).flatten(1)


def _monomials(z: Tensor, degree: int) -> Tensor:
    """(n, M): all products of at most `degree` of the columns of z (n, d)."""
    columns = [torch.ones_like(z[:, 0])]
    last: dict[tuple[int, ...], Tensor] = {(): columns[0]}
    for order in range(1, degree + 1):
        powers = list(combinations_with_replacement(range(z.shape[1]), order))
        last = {power: last[power[:-1]] * z[:, power[-1]] for power in powers}
        columns += last.values()
    return torch.stack(columns, 1)


@dataclass(frozen=True)
class CurrentMoments:
    """Sums over a part of the sample: Σ J (…, B), Σ J Jᵀ (…, B, B), and the number of pairs (…)."""

    first: Tensor
    second: Tensor
    samples: Tensor

    @classmethod
    def of(cls, currents: Currents, pairs: Pairs) -> CurrentMoments:
        """One row for each block."""
        first, second, samples = [], [], []
        for x, y in pairs:
            total: Tensor | None = None
            square: Tensor | None = None
            for part in currents.parts(x, y):
                total = part.sum(0) if total is None else total + part.sum(0)
                square = part.T @ part if square is None else square.addmm_(part.T, part)
            assert total is not None
            assert square is not None
            first.append(total)
            second.append(square)
            samples.append(float(x.shape[0] * x.shape[1]))
        one = first[0]
        return cls(torch.stack(first), torch.stack(second), one.new_tensor(samples))

    def grouped(self, groups: Tensor, count: int) -> CurrentMoments:
        """Rows added up by their group, `groups` (rows,)."""

        def add(rows: Tensor) -> Tensor:
            return torch.zeros(count, *rows.shape[1:], dtype=rows.dtype, device=rows.device).index_add_(0, groups, rows)

        return CurrentMoments(add(self.first), add(self.second), add(self.samples))

    def without_each(self) -> CurrentMoments:
        """All rows but one, for each of them."""
        return CurrentMoments(
            self.first.sum(0) - self.first,
            self.second.sum(0) - self.second,
            self.samples.sum() - self.samples,
        )

    def optimal(self) -> tuple[Tensor, Tensor]:
        """w = 2 S⁻¹μ (…, B) and w·μ = 2 μᵀS⁻¹μ (…): the current of the best ratio 2⟨J⟩²/Var J, and that ratio."""
        mean, covariance = self._mean_and_covariance()
        weights = 2.0 * _solved(covariance, mean)
        return weights, (weights * mean).sum(-1)

    def pull(self, gradient: Tensor) -> Tensor:
        """(rows,): by how much gradient·w, w the optimal weights of all rows, moves with each row's share of them.

        dw = S⁻¹ Σ (φ − μ)(2 − (φ − μ)·w), to first order: μ and S both move.
        """
        n = self.samples
        whole = self.grouped(torch.zeros_like(n, dtype=torch.int64), 1)
        (mean,), (covariance,) = whole._mean_and_covariance()
        weights, h = 2.0 * _solved(covariance, mean), _solved(covariance, gradient)
        centred = self.first @ h - n * (mean @ h)
        both = self.second @ weights @ h - (self.first @ h) * (mean @ weights) - (mean @ h) * (self.first @ weights)
        both = both + n * (mean @ h) * (mean @ weights)
        pull: Tensor = 2.0 * centred - both + n * (h @ covariance @ weights)
        return pull

    def _mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        mean = self.first / self.samples[..., None]
        return mean, self.second / self.samples[..., None, None] - mean[..., :, None] * mean[..., None, :]


def _solved(covariance: Tensor, vector: Tensor) -> Tensor:
    """S⁻¹v (…, B)."""
    size = covariance.diagonal(dim1=-1, dim2=-2).clamp(min=0).sqrt()
    # A coordinate that rests makes no current.
    size = torch.where(size > 0, size, 1.0)
    scaled = covariance / (size[..., :, None] * size[..., None, :])
    scaled.diagonal(dim1=-1, dim2=-2).add_(_JITTER)
    found: Tensor = torch.linalg.solve(scaled, vector / size) / size
    return found
