"""Kantorovich potentials: what they prove about a plan, and how to improve them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.transport.clouds import BLOCK_BYTES, row_parts

OPTIMAL = 1e-9  # a plan proved optimal to this, relative to its own cost, counts as optimal


def row_minima(costs: Tensor, offset: Tensor) -> Tensor:
    """(N,): min_j (C_ij + offset_j), without a second (N, M) matrix."""
    return torch.cat([(costs[part] + offset).min(1).values for part in row_parts(costs)])


def column_minima(costs: Tensor, offset: Tensor) -> Tensor:
    """(M,): min_i (C_ij + offset_i)."""
    least = torch.full_like(costs[0], torch.inf)
    for part in row_parts(costs):
        torch.minimum(least, (costs[part] + offset[part, None]).min(0).values, out=least)
    return least


def feasible(costs: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """f (N,), g (M,) with f_i + g_j ≤ C_ij, from any f: two c-transforms."""
    g = column_minima(costs, -f)
    f = row_minima(costs, -g)
    return f, g


class Pairing:
    """The plan i → i of a square cost matrix, and potentials that prove how far it is from optimal.

    With g_j = C_jj − f_j the plan's own pairs are tight, and f proves that no plan is cheaper by more than

        gap = Σ w_i (f_i − min_j (C_ij − C_jj + f_j)) ≥ 0 ,

    0 where f is a fixed point of f_i ← min_j (C_ij − C_jj + f_j): the max-plus sweeps of a shortest-path
    problem, which has a solution if and only if the plan is optimal.

    Args:
        costs: (N, N), lower bounds of the costs.
        own: (N,), the costs of the plan's own pairs.
        weights: (N,).
    """

    def __init__(self, costs: Tensor, own: Tensor, weights: Tensor) -> None:
        self.costs, self.own, self.weights = costs, own, weights

    def gap(self, f: Tensor) -> float:
        """How much cheaper than this pairing another plan can be at most, by what f proves."""
        lowest = row_minima(self.costs, f - self.own)
        return (self.weights @ (f - lowest).clamp_(min=0)).item()

    def best_of(self, *starts: Tensor) -> tuple[Tensor, float]:
        """The potential with the least gap, and that gap."""
        return min(((f, self.gap(f)) for f in starts), key=lambda pair: pair[1])

    def has_cheaper_swap(self, enough: float) -> bool:
        """Whether exchanging two partners saves more than `enough`: then no potential proves it optimal."""
        for part in row_parts(self.costs):
            both = self.own[part, None] + self.own
            saved = both * (1 - 1e-9) - (self.costs[part] + self.costs[:, part].T)  # costs are known to 1e-10
            if bool((saved * torch.minimum(self.weights[part, None], self.weights) > enough).any()):
                return True
        return False

    def sweep(self, f: Tensor) -> Tensor:
        """One sweep, in blocks that use the blocks before them; returns the new f."""
        f = f.clone()
        step = max(1, min(BLOCK_BYTES // (8 * len(f)), -(-len(f) // 8)))
        for start in range(0, len(f), step):
            part = slice(start, start + step)
            f[part] = torch.minimum(f[part], (self.costs[part] + (f - self.own)).min(1).values)
        return f

    def improve(self, f: Tensor, *, sweeps: int, enough: float, patient: bool = True) -> tuple[Tensor, float]:
        """Sweeps until the gap is at most `enough` or `sweeps` are done; the best (f, gap).

        Args:
            f: (N,), where to start.
            sweeps: no more than this.
            enough: the gap to reach.
            patient: False gives up when 16 sweeps make the gap less than a tenth smaller: where the pairing is
                not optimal it never vanishes.
        """
        best, least = f, self.gap(f)
        checked = least
        for count in range(1, sweeps + 1):
            if least <= enough:
                break
            f = self.sweep(f)
            if count % 4 == 0 or count == sweeps:
                gap = self.gap(f)
                if gap < least:
                    best, least = f, gap
                if count % 16 == 0:
                    if not patient and gap > 0.9 * checked:
                        break
                    checked = gap
        return best, least
