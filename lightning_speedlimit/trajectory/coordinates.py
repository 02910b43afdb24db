"""The measured coordinates of some parameters: weighted sums of products of their vectors.

A row that was drawn counts for `weight` = 1/π rows of its kind. Sums over rows, weighted so, are a scalar product:
Cauchy–Schwarz, and with it every bound, holds for the drawn coordinates as for all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_speedlimit.trajectory.gathering import UNIT, Layout
from lightning_speedlimit.trajectory.sums import sum_dtype

_CERTAIN = 1.0 + 1e-12  # 1/π of a unit that can't be missed, with its rounding
_FEW = 4  # ways to divide the parameters, of layers and of groups, that are kept


class Coordinates(Layout):
    """The measured coordinates of some parameters on one device, in one dtype, and what each row counts.

    weights: (count,). counts: of each parameter the units that may be missed.

    Args:
        parameters, drawn: see Layout. inverse: of each the 1/π of its drawn units. shares: of each, 1 over the
            processes that hold it alike.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        drawn: Sequence[Tensor | None],
        inverse: Sequence[Tensor | None],
        shares: Sequence[float],
    ) -> None:
        super().__init__(parameters, drawn)
        self.inverse, self.shares = list(inverse), list(shares)
        # Products are scaled on their way into float32 sums: an update of 1e-22 squared is nothing there.
        self.scale = 1.0 if self.dtype == torch.float64 else 2.0**40
        self.unscaled = 1.0 / self.scale
        self._zero = torch.zeros((), dtype=self.dtype, device=self.device)
        self._ones = torch.ones(UNIT, dtype=self.dtype, device=self.device)
        self._spread: dict[tuple[int, ...], Any] = {}
        self._unweighted = self.exact and set(self.shares) <= {1.0}
        weights = torch.ones(self.count, dtype=torch.float64, device="cpu")
        self.counts = []
        for rows, own, share in zip(self.rows, inverse, shares, strict=True):
            if own is not None:
                weights[rows.start : rows.start + len(own)] = own
            self.counts.append(0 if own is None else int((weights[rows] > _CERTAIN).sum()))
            weights[rows] *= share
        self.weights = weights.to(self.device, sum_dtype(self.device), non_blocking=True)

    @functools.cached_property
    def scratch(self) -> tuple[Tensor, Tensor]:
        """Two matrices of rows for what is needed at once, where torch walks operation by operation."""
        return self.zeros(), self.zeros()

    def dots(self, pairs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """out ← scale · Σ a b of each row, of several (a, b, out).

        `sum` adds in pairs: 1e-7 in float32, where `torch.dot` is off by 5e-5. Of eight numbers `mv` is the faster.
        """
        if self.passes is not None:
            self.passes.dots(pairs, self.scale)
            return
        for a, b, out in pairs:
            product = torch.addcmul(self._zero, a, b, value=self.scale)
            torch.sum(product, 1, out=out) if self.exact else torch.mv(product, self._ones, out=out)

    def squares(self, a: Tensor, out: Tensor) -> None:
        """out ← Σ a² of each row, in float64 where there is one: whatever its size, it is not lost."""
        if self.passes is not None:
            self.passes.squares(a, out)
        else:
            torch.linalg.vector_norm(a, dim=1, dtype=out.dtype, out=out).square_()

    def total(self, row: Tensor) -> Tensor:
        """Σ weight x over a number x of each row."""
        return torch.dot(row.to(self.weights.dtype), self.weights)

    def totals(self, row: Tensor, places: Sequence[int], number: int, scale: float = 1.0) -> Tensor:
        """(number,): scale Σ weight x over a number x of each row, of the parameters at each place.

        Args:
            places: of each parameter.
        """
        spread = self._spread_of(places, number)
        if self.passes is not None:
            found = np.zeros(number)
            self.passes.totals(row, None if self._unweighted else self.weights, scale, spread, found)
            return torch.from_numpy(found)
        weighted, sums = row * self.weights, torch.zeros(number, dtype=self.weights.dtype, device=self.device)
        sums = sums.add_(weighted.sum()) if number == 1 else sums.index_add_(0, spread, weighted)
        return sums.mul_(scale)

    def _spread_of(self, places: Sequence[int], number: int) -> Any:
        """Of the parameters for passes; else those of all rows."""
        key = (number, *places)
        found = self._spread.get(key)
        if found is None:
            if max(places, default=0) >= number:
                raise IndexError(f"totals got the place {max(places)} of {number}")
            own = np.array(places, dtype=np.int64)
            found = own if self.passes is not None else self.of_each(places, torch.int64)
            self._spread = {**self._spread, key: found} if len(self._spread) < _FEW else {key: found}
        return found

    def fast_norm_squared(self, vector: Tensor) -> Tensor:
        """Σ weight x² over all rows of a vector, by float32 products: for what is looked at in every step."""
        own = self.row()
        self.dots([(vector, vector, own)])
        return self.total(own) / self.scale

    def variance_weights(self) -> Tensor:
        """(count,): n/(n − 1) (1 − π), n the units of the row's parameter that may be missed; 1 − π where n is 1."""
        corrected = [n / max(n - 1, 1) for n in self.counts]
        missed = 1.0 - self.of_each(self.shares, self.weights.dtype) / self.weights
        return missed * self.of_each(corrected, self.weights.dtype)

    def of_each(self, numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
        """(count,): a number of each parameter at all its rows."""
        lengths = torch.tensor([rows.stop - rows.start for rows in self.rows], dtype=torch.int64, device="cpu")
        known = torch.tensor(numbers, dtype=dtype, device="cpu")
        spread = torch.repeat_interleave(known, lengths, output_size=self.count)
        return spread.to(self.device, non_blocking=True)
