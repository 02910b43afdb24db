"""Transport plans: permutations by scipy's assignment, plans between weights by POT's network simplex."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from lightning_speedlimit.transport.costs import EPS
from lightning_speedlimit.transport.duals import OPTIMAL, feasible

CANDIDATES = 32  # smallest reduced costs per row and per column that a sparse problem keeps
_ROUNDS = 4
_PIVOTS = 10**8


@dataclass(frozen=True)
class Plan:
    """Mass m from row i to column j."""

    rows: Tensor
    columns: Tensor
    mass: Tensor

    @classmethod
    def permutation(cls, columns: Tensor, weights: Tensor) -> Plan:
        """i → columns_i, with the whole weight of i."""
        return cls(torch.arange(len(columns), device=columns.device), columns, weights)


def assignment(reduced: Tensor) -> Tensor:
    """(N,): the column of each row in an exact minimum of Σ R_{i,σ(i)} (scipy, shortest augmenting paths)."""
    return torch.from_numpy(linear_sum_assignment(reduced.cpu().numpy())[1]).to(reduced.device)


def assignment_error(count: int, largest: float) -> float:
    """What rounding adds at most to the mean cost of `assignment`'s permutation of `count` rows, 0 ≤ R ≤ `largest`.

    The shortest augmenting paths keep potentials (u between −R and R, v between −2R and 0) whose reduced costs are ≥ 0,
    and 0 at the pairs found. Each of the `count` paths rounds those of a pair four times at most, by ½ ε · 2R, and the
    last one its length three times, by ½ ε · 4R: of the pairs found and of the others.
    """
    return 16 * EPS * (count + 2) * largest


def sparse_assignment(reduced: Tensor) -> Tensor | None:
    """(N,): the same among the smallest reduced costs of each row and column; None where these hold none."""
    rows, columns = _candidates(reduced)
    values = reduced[rows, columns]
    top = values.max().item() or 1.0
    shape = (len(reduced), reduced.shape[1])
    # An explicit zero would count as "no edge".
    graph = csr_array(((values / top + 1).cpu().numpy(), (rows.cpu().numpy(), columns.cpu().numpy())), shape=shape)
    try:
        return torch.from_numpy(min_weight_full_bipartite_matching(graph)[1].astype(np.int64)).to(reduced.device)
    except ValueError:
        return None  # no full matching among the candidates


def _candidates(reduced: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns, each pair once, of the smallest entries of every row and every column."""
    n, m = reduced.shape
    by_row = reduced.topk(min(CANDIDATES, m), dim=1, largest=False).indices
    by_column = reduced.topk(min(CANDIDATES, n), dim=0, largest=False).indices
    keys = [
        (torch.arange(n, device=reduced.device)[:, None] * m + by_row).flatten(),
        (by_column * m + torch.arange(m, device=reduced.device)).flatten(),
    ]
    pairs = torch.unique(torch.cat(keys))
    return pairs // m, pairs % m


def program(costs: Tensor, w: Tensor, v: Tensor) -> tuple[Plan, Tensor]:
    """A plan of least cost between positive weights of one sum, and the potential g that proves it (POT).

    The network simplex compares reduced costs with the rounding of its potentials, which are as large as the largest
    cost. So it gets C − f − g, and again those of its own potentials, cut off far above what the plan uses, until
    they prove the plan: mostly once.
    """
    from ot.lp import emd  # takes seconds to import, and most clouds do not need it

    f, g = feasible(costs, torch.zeros_like(w))
    cap, least = math.inf, math.inf
    for _ in range(_ROUNDS):
        reduced = costs - f[:, None]
        reduced -= g
        reduced.clamp_(min=0, max=cap)  # of large costs rounding leaves negative ones, on which the simplex fails
        unit = reduced.max().item() or 1.0
        reduced /= unit
        masses, log = emd(*(side.cpu().numpy() for side in (w, v, reduced)), numItermax=_PIVOTS, log=True)
        found = torch.from_numpy(masses)
        rows, columns = found.nonzero(as_tuple=True)
        plan = Plan(*(side.to(costs.device) for side in (rows, columns, found[rows, columns])))
        own = costs[plan.rows, plan.columns]
        f, g = feasible(costs, f + unit * torch.from_numpy(log["u"]).to(f))
        left = own - f[plan.rows] - g[plan.columns]
        gap = (plan.mass @ left + EPS * (v @ g.abs())).item()
        if gap >= least:
            break
        least, best, cap = gap, (plan, g), 1e3 * left.max().item()
        if gap <= 0.1 * OPTIMAL * (plan.mass @ own).item():
            break
    return best
