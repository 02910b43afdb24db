"""Transport plans from scipy: permutations by assignment, plans between weights by linear programming."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from lightning_speedlimit.transport.duals import OPTIMAL, feasible

CANDIDATES = 32  # smallest reduced costs per row and per column that a sparse problem keeps
DENSE_PROGRAM = 2**15  # N·M up to which a linear program holds every pair


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


def _candidates(reduced: Tensor, extra: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Rows and columns, each pair once, of the smallest entries of every row and every column, and `extra`."""
    n, m = reduced.shape
    by_row = reduced.topk(min(CANDIDATES, m), dim=1, largest=False).indices
    by_column = reduced.topk(min(CANDIDATES, n), dim=0, largest=False).indices
    keys = [
        (torch.arange(n, device=reduced.device)[:, None] * m + by_row).flatten(),
        (by_column * m + torch.arange(m, device=reduced.device)).flatten(),
    ]
    if extra is not None:
        keys.append(extra[0] * m + extra[1])
    pairs = torch.unique(torch.cat(keys))
    return pairs // m, pairs % m


def program(costs: Tensor, f: Tensor, g: Tensor, weights: tuple[Tensor, Tensor]) -> tuple[Plan, Tensor] | None:
    """A vertex plan of least cost between weights and its potential f (scipy's HiGHS, dual simplex).

    The solver's tolerance is absolute, 1e-7 of the largest cost: so it gets reduced costs C − f − g, and again
    the reduced costs of its own potentials, magnified by 1e4, until they are proved (iterative refinement). None where
    the solver gives up.
    """
    w, v = weights
    rows, columns, mass = _northwest(w, v, torch.argsort(f), torch.argsort(g))
    dense = costs.numel() <= DENSE_PROGRAM
    first = Plan(rows, columns, mass)
    scale = None
    best: tuple[Plan, Tensor] | None = None
    for _ in range(5):
        reduced = costs - f[:, None] - g
        if dense:
            rows, columns = torch.ones_like(reduced).nonzero(as_tuple=True)
        else:
            rows, columns = _candidates(reduced, (rows, columns))
        values = reduced[rows, columns]
        scale = values.max().item() if scale is None else scale * 1e-4
        if scale <= 0:
            return best or (first, f)  # every plan costs the same
        solved = _solve((values / scale).clamp(max=1e6), rows, columns, w, v)
        if solved is None:
            break
        mass, change = solved
        keep = mass > 0
        rows, columns = rows[keep], columns[keep]
        mass = _on_forest(rows, columns, mass[keep], weights)
        f, g = feasible(costs, f + scale * change)
        best = Plan(rows, columns, mass), f
        cost = mass @ costs[rows, columns]
        gap = mass @ (costs[rows, columns] - f[rows] - g[columns])
        if gap <= 0.1 * OPTIMAL * cost:
            break
    return best


def _solve(costs: Tensor, rows: Tensor, columns: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """Masses of the pairs, with exact marginals, and the potential of the rows; N·M ≥ pairs."""
    n, m, pairs = len(w), len(v), len(costs)
    entries = np.tile(np.arange(pairs), 2)
    sides = np.concatenate([rows.cpu().numpy(), n + columns.cpu().numpy()])
    constraints = csr_array((np.ones(2 * pairs), (sides, entries)), shape=(n + m, pairs))
    # The tolerance on the masses is absolute too: the smaller of the mean weights is 1e3. The last constraint
    # follows from the others up to rounding.
    unit = 1e3 * max(n, m) / w.sum().item()
    marginals = torch.cat([w, v]).cpu().numpy() * unit
    options = {"primal_feasibility_tolerance": 1e-10}
    found = linprog(
        costs.cpu().numpy(),
        A_eq=constraints[:-1],
        b_eq=marginals[:-1],
        bounds=(0, None),
        method="highs-ds",
        options=options,
    )
    if found.status != 0:
        return None
    mass = torch.from_numpy(np.maximum(found.x, 0.0)).to(w) / unit
    return mass, torch.from_numpy(np.asarray(found.eqlin.marginals[:n])).to(w)


def _on_forest(rows: Tensor, columns: Tensor, mass: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """The masses anew, from the marginals: a vertex has no cycles, so leaf by leaf they follow without tolerance.

    Where there is a cycle the masses stay as they are.
    """
    left = torch.cat(weights).tolist()
    ends = list(zip(rows.tolist(), (columns + len(weights[0])).tolist(), strict=True))
    edges: list[set[int]] = [set() for _ in left]
    for edge, pair in enumerate(ends):
        for node in pair:
            edges[node].add(edge)
    exact = [-1.0] * len(ends)
    leaves = [node for node, around in enumerate(edges) if len(around) == 1]
    while leaves:
        leaf = leaves.pop()
        if not edges[leaf]:
            continue  # the other end of its edge was a leaf too
        edge = edges[leaf].pop()
        other = sum(ends[edge]) - leaf
        exact[edge] = max(left[leaf], 0.0)
        left[other] -= exact[edge]
        edges[other].remove(edge)
        if len(edges[other]) == 1:
            leaves.append(other)
    return mass if any(edges) else mass.new_tensor(exact)


def rounded(plan: Plan, weights: tuple[Tensor, Tensor]) -> Plan:
    """The plan with exactly these marginals: scaled down to them, the rest filled in (Altschuler et al. 2017)."""
    w, v = weights
    rows, columns, mass = plan.rows, plan.columns, plan.mass
    for index, wanted in ((rows, w), (columns, v)):
        have = torch.zeros_like(wanted).index_add_(0, index, mass)
        mass = mass * (wanted / have.clamp(min=torch.finfo(mass.dtype).tiny)).clamp(max=1)[index]
    left_rows = (w - torch.zeros_like(w).index_add_(0, rows, mass)).clamp(min=0)
    left_columns = (v - torch.zeros_like(v).index_add_(0, columns, mass)).clamp(min=0)
    more = _northwest(left_rows, left_columns, *(torch.arange(len(side), device=w.device) for side in weights))
    joined = (torch.cat(pair) for pair in zip((rows, columns, mass), more, strict=True))
    return Plan(*joined)


def _northwest(w: Tensor, v: Tensor, row_order: Tensor, column_order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and masses of the monotone plan between the weights in these orders."""
    ends_w, ends_v = w[row_order].cumsum(0), v[column_order].cumsum(0)
    ends = torch.cat([ends_w, ends_v]).sort().values
    mass = ends.diff(prepend=ends.new_zeros(1))
    middle = ends - mass / 2
    keep = mass > 0
    rows = torch.searchsorted(ends_w, middle[keep]).clamp(max=len(w) - 1)
    columns = torch.searchsorted(ends_v, middle[keep]).clamp(max=len(v) - 1)
    return row_order[rows], column_order[columns], mass[keep]


def greedy(costs: Tensor, f: Tensor, g: Tensor, weights: tuple[Tensor, Tensor]) -> Plan:
    """A plan that fills the cheapest reduced costs first: feasible, near-optimal where f and g are."""
    rows, columns = _candidates(costs - f[:, None] - g)
    order = (costs[rows, columns] - f[rows] - g[columns]).argsort()
    left_w, left_v = (weight.cpu().numpy().copy() for weight in weights)
    mass = np.zeros(len(order))
    for k, (i, j) in enumerate(zip(rows[order].tolist(), columns[order].tolist(), strict=True)):
        mass[k] = min(left_w[i], left_v[j])
        left_w[i] -= mass[k]
        left_v[j] -= mass[k]
    keep = torch.from_numpy(mass > 0).to(rows.device)
    taken = torch.from_numpy(mass).to(costs)[keep]
    return rounded(Plan(rows[order][keep], columns[order][keep], taken), weights)
