"""Kantorovich potentials: what they prove about a plan, and how to improve them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_speedlimit.transport.clouds import row_parts

_CANDIDATES = 16  # columns of a row that a round of sweeps looks at
_WHOLE = 3  # sweeps over all columns before
_ROUNDS = 12
OPTIMAL = 1e-9  # a plan proved optimal to this, relative to its own cost, counts as optimal


def row_minima(costs: Tensor, offset: Tensor) -> Tensor:
    """(N,): min_j (C_ij + offset_j), without a second (N, M) matrix."""
    return torch.cat([(costs[part] + offset).amin(1) for part in row_parts(costs)])


def nearest(costs: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """(N,), (N,): min_j (C_ij + offset_j), and the j where it is."""
    found = [(costs[part] + offset).min(1) for part in row_parts(costs)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def column_minima(costs: Tensor, offset: Tensor) -> Tensor:
    """(M,): min_i (C_ij + offset_i)."""
    least = torch.full_like(costs[0], torch.inf)
    for part in row_parts(costs):
        torch.minimum(least, (costs[part] + offset[part, None]).amin(0), out=least)
    return least


def feasible(costs: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """f (N,), g (M,) with f_i + g_j ≤ C_ij, from any f: two c-transforms."""
    g = column_minima(costs, -f)
    f = row_minima(costs, -g)
    return f, g


class Pairing:
    """The plan i → σ(i) of a square cost matrix, and potentials that prove how far it is from optimal.

    With g_σ(i) = C_iσ(i) − f_i the plan's own pairs are tight, and f proves that no plan is cheaper by more than

        gap = Σ w_i (f_i − min_j (C_ij − g_j)) ≥ 0 ,

    0 where f is a fixed point of f_i ← min_j (C_ij − g_j): the max-plus sweeps of a shortest-path problem, which has
    a solution if and only if the plan is optimal.

    Args:
        costs: (N, N), lower bounds of the costs.
        columns: (N,), σ.
        own: (N,), the costs of the plan's own pairs.
        weights: (N,).
    """

    def __init__(self, costs: Tensor, columns: Tensor, own: Tensor, weights: Tensor) -> None:
        self.costs, self.columns, self.own, self.weights = costs, columns, own, weights

    @property
    def cost(self) -> float:
        return (self.weights @ self.own).item()

    def gap(self, f: Tensor, enough: float = math.inf) -> float:
        """How much cheaper than this pairing another plan can be at most, by what f proves; or some of it, > enough."""
        offset, total = self._offset(f), 0.0
        for part in row_parts(self.costs):
            left = (f[part] - (self.costs[part] + offset).amin(1)).clamp_(min=0)
            total += (self.weights[part] @ left).item()
            if total > enough:
                break
        return total

    def _offset(self, f: Tensor) -> Tensor:
        """−g (N,), in the order of the columns."""
        return torch.empty_like(f).index_copy_(0, self.columns, f - self.own)

    def has_cheaper_swap(self, enough: float) -> bool:
        """Whether two rows that exchange their partners save more than `enough`: no potential proves σ optimal then.

        For σ = identity only.
        """
        for part in row_parts(self.costs):
            both = self.own[part, None] + self.own
            saved = both * (1 - 1e-9) - (self.costs[part] + self.costs[:, part].T)  # costs are known to 1e-10
            if bool((saved * torch.minimum(self.weights[part, None], self.weights) > enough).any()):
                return True
        return False

    def improve(self, *starts: Tensor, enough: float, sweeps: int, patient: bool = True) -> tuple[Tensor, float]:
        """Sweeps over all columns, then over those that bind most, until the gap is at most `enough`; best (f, gap).

        Three sweeps over all prove a pairing of near particles. Then of each row the 16 columns of the least
        C_ij − g_j are taken, swept over until nothing falls any more, and joined by the next 16 while the gap over
        all columns shows that others bind.

        Args:
            starts: (N,) each; the one with the least gap is taken.
            enough: the gap to reach.
            sweeps: no more than this between two looks at all columns.
            patient: False gives up where `sweeps` reach no fixed point: where the pairing is not optimal there is none.
        """
        best, after, least = min(((f, *self._look(f)) for f in starts), key=lambda looked: looked[2])
        reduced, partners = [], []
        owner = torch.empty_like(self.columns).index_copy_(0, self.columns, torch.arange(len(best), device=best.device))
        for look in range(_WHOLE + _ROUNDS):
            if least <= enough:
                break
            f, settled = after, True
            if look >= _WHOLE:
                found = self._binding(f)
                partners.append(owner[found])
                reduced.append(self.costs.gather(1, found) - self.own[partners[-1]])
                f, settled = self._swept(f, torch.cat(reduced, 1), torch.cat(partners, 1), enough, sweeps)
            after, gap = self._look(f)
            if gap < least:
                best, least = f, gap
            if not settled and not patient:
                break
        return best, least

    def _look(self, f: Tensor) -> tuple[Tensor, float]:
        """What a sweep over all columns makes of f, and the gap that f leaves."""
        after = torch.minimum(f, row_minima(self.costs, self._offset(f)))
        return after, (self.weights @ (f - after)).item()

    def _binding(self, f: Tensor) -> Tensor:
        """(N, 16): the columns of each row's least C_ij − g_j."""
        offset, count = self._offset(f), min(_CANDIDATES, len(f))
        parts = ((self.costs[part] + offset).topk(count, 1, largest=False).indices for part in row_parts(self.costs))
        return torch.cat(list(parts))

    def _swept(self, f: Tensor, reduced: Tensor, partners: Tensor, enough: float, sweeps: int) -> tuple[Tensor, bool]:
        """f after f_i ← min_k (reduced_ik + f_partners_ik), and whether hardly anything fell in the last sweep."""
        for _ in range(sweeps):
            lower = torch.minimum(f, (reduced + f[partners]).amin(1))
            if (self.weights @ (f - lower)).item() <= enough / 4:
                return lower, True
            f = lower
        return f, False
