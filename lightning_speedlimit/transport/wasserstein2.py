"""W₂² between two clouds of particles: a plan, and the proof of how good it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_speedlimit.checks.tensors import positive
from lightning_speedlimit.transport import plans, sinkhorn
from lightning_speedlimit.transport.clouds import Cloud, Clouds, check_finite
from lightning_speedlimit.transport.costs import EPS, MAX_PAIRS, Costs, direct, read, sharpen
from lightning_speedlimit.transport.duals import OPTIMAL, Pairing, column_minima, feasible, nearest, row_minima
from lightning_speedlimit.transport.moments import moment_bounds
from lightning_speedlimit.transport.plans import Plan

_UNDERFLOW = 1e-300  # squares below 2⁻¹⁰²² lose digits, and below 2⁻¹⁰⁷⁴ all of them: no more than this per sum
_COLD = 512  # particles up to which an assignment takes milliseconds on any costs
_SOLVED = 4096  # particles up to which one on a CPU, or a network simplex, needs no Sinkhorn potentials
_FLAT = 8  # coordinates up to which Sinkhorn potentials would have to be too sharp to help
_FREE = 0.45  # share of rows without a column of their own, above which a simplex is faster
_FEW = 0.05  # the same, up to which an assignment takes no longer than a few looks at all costs
_MISSED = 0.01  # share of the tolerance that rounding in an assignment may take without another proof
_SPARSE = 8192  # particles above which an assignment never sees more than the smallest reduced costs
_IDENTITY_SWEEPS = 128
_SWEEPS = 500  # over the columns that bind: each is a thousandth of one over all
_TRIES = ((0.3, 0.5), (0.1, 0.7), (0.03, 0.9))  # blur in units of the spacing, annealing ratio


@dataclass(frozen=True)
class Transport:
    """W₂² between two clouds, between certified bounds. Unit: that of the coordinates, squared; per particle."""

    value: float
    """Cost of the best plan found: W₂² where `lower` is near. From clouds that can be read once, a bound on it."""
    lower: float
    """Lower bound of W₂²: from a dual solution, or from what rounding may cost an exact assignment."""
    upper: float
    """Upper bound of W₂²: `value`, rounding of the sums and of the weights allowed for."""
    paired: float
    """Σ w_i |y_i − x_i|², what the pairing i → i costs; NaN where it is no plan (N ≠ M or other weights)."""
    identity_excess: float
    """paired / value − 1: 0 where i → i is optimal; NaN where `paired` is, or where only `value` is 0."""
    method: str
    """What found the plan."""
    matching: Tensor | None = field(repr=False, compare=False)
    """(N,) int64 on the host: x_i goes to y_matching[i]; None where the plan is no permutation."""
    converged: bool
    """Whether upper ≤ (1 + tolerance) · lower."""


def wasserstein2_squared(
    x: Cloud,
    y: Cloud,
    *,
    tolerance: float = 1e-3,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Transport:
    """W₂² = min over plans π of Σ π_ij |x_i − y_j|², with lower ≤ W₂² ≤ upper.

    Follows the scale of the data: no regularization is left in the value. In float64 on the device of the
    clouds; costs O(N·M) memory and O(N·M·D) time, and no second copy of the clouds. First the pairing i → i is
    tested for optimality, which is what trained replicas almost always show; then an exact assignment or network
    simplex, for N > 4096 on costs reduced by Sinkhorn potentials (geomloss). Equal clouds of one coordinate are
    sorted. Beyond 2²⁸ pairs the interval comes from the moments alone (`method="moments"`). Not differentiable.

    Args:
        x, y: (N, D) and (M, D); or iterables over blocks (N, d), (M, d) of coordinates, so that neither has to
            exist whole. What can be iterated over again is, for more accuracy where particles almost coincide.
        tolerance: upper/lower − 1 that is aimed at; `converged` tells whether it was reached. A smaller one makes
            the interval sharper; its floor is some 1e-12.
        weights_x, weights_y: (N,) and (M,), not negative; None: equal.
        process_group: its ranks hold different coordinates of the same particles; all get the same result.

    Raises:
        TypeError, ValueError: clouds that are no floating-point tensors, do not fit, are empty or not finite;
            weights that are negative or not finite; a tolerance that is not positive.

    Warns:
        UserWarning: half precision; weights that do not sum to 1 (they are divided by their sum).

    Source: Seroussi, Alemi, Helias, Ringel, arXiv:2307.14653, for its use; the sampling error of W₂ between
    two populations is not in the interval (61.3 instead of 32 between Gaussians √32 apart, D = 32, N = 2048).
    """
    tolerance = positive("tolerance", tolerance, "1e-3 is the default")
    clouds = Clouds(x, y, weights_x, weights_y, process_group)
    with torch.no_grad():
        return _measure(clouds, tolerance)


def _measure(clouds: Clouds, tolerance: float) -> Transport:
    blocks = clouds.blocks()
    first = next(blocks)
    blocks = chain([first], blocks)
    if (line := clouds.line()) is not None:
        return _sorted(*line, tolerance)
    if len(first[0]) * len(first[1]) > MAX_PAIRS:
        return _from_moments(clouds, blocks, tolerance)
    costs = read(clouds, blocks)
    sharpen(costs, clouds)
    solved = _solved(costs, tolerance) if clouds.decides else None
    return _certified(costs, clouds, Found(*clouds.from_first(solved)), tolerance)


class Found(NamedTuple):
    """A plan, and what is known of how good it is."""

    rows: Tensor
    columns: Tensor
    mass: Tensor
    f: Tensor
    """Potential of the rows."""
    method: str
    defect: float = 0.0
    """Mass by which the plan misses the weights."""
    least: float = -math.inf
    """What no plan costs less than, centred, where that is known without f."""


def _solved(costs: Costs, tolerance: float) -> Found:
    """The pairing i → i where displacements prove it, else by what is fastest for such costs."""
    if (f := _identity_potential(costs)) is not None:
        return _found(costs, None, f, "identity")
    if costs.uniform and not _by_sinkhorn(costs):
        return _assigned(costs, tolerance)
    if (f := _swept_identity(costs)) is not None:
        return _found(costs, None, f, "identity")
    return _assigned_by_potentials(costs, tolerance) if costs.uniform else _weighted(costs)


def _found(costs: Costs, columns: Tensor | None, f: Tensor, method: str, least: float = -math.inf) -> Found:
    """The permutation `columns`, None: i → i."""
    plan = Plan.permutation(torch.arange(len(f), device=f.device) if columns is None else columns, costs.weights[0])
    return Found(plan.rows, plan.columns, plan.mass, f, method, least=least)


def _identity(costs: Costs) -> tuple[Pairing, tuple[Tensor, Tensor], float] | None:
    """i → i, potentials that may prove it optimal, and the gap that counts as none; None where it is no plan."""
    if costs.diagonal is None or costs.plain is None or costs.along is None:
        return None
    w = costs.weights[0]
    pairing = Pairing(costs.lower, torch.arange(len(w), device=w.device), costs.diagonal, w)
    # −⟨x̃, d̃⟩ is the potential of every monotone symmetric affine map; 0 does for small displacements.
    return pairing, (torch.zeros_like(costs.diagonal), -costs.along), OPTIMAL * (w @ costs.plain).item()


def _identity_potential(costs: Costs) -> Tensor | None:
    """f that proves the pairing i → i optimal, from the displacements; None where they give none."""
    if (identity := _identity(costs)) is None:
        return None
    pairing, starts, enough = identity
    return next((f for f in starts if pairing.gap(f, enough) <= enough), None)


def _swept_identity(costs: Costs) -> Tensor | None:
    """f that proves it after sweeps, where no two rows had better exchange their partners."""
    if (identity := _identity(costs)) is None:
        return None
    pairing, starts, enough = identity
    if pairing.has_cheaper_swap(enough):
        return None
    f, gap = pairing.improve(*starts, enough=enough, sweeps=_IDENTITY_SWEEPS, patient=False)
    return f if gap <= enough else None


def _by_sinkhorn(costs: Costs) -> bool:
    """Whether an exact solver would be slower: for many particles in many dimensions, and where a GPU iterates."""
    count, host = len(costs.lower), costs.lower.device.type == "cpu"
    return costs.coordinates > _FLAT and count > (_SOLVED if host else _COLD)


def _sorted(x: Tensor, y: Tensor, tolerance: float) -> Transport:
    """On a line the k-th of x goes to the k-th of y: the optimum of every cost that is convex in the difference."""
    spread_x, spread_y = ((side - side.mean()).square().sum().item() for side in (x, y))
    check_finite(spread_x, spread_y, (y.mean() - x.mean()).square().item())
    columns = torch.empty_like(order := x.argsort())
    columns[order] = y.argsort()
    least, paired = ((to - x).square().mean().item() for to in (y[columns], y))
    value, method = least, "sorting"
    if paired - least <= OPTIMAL * paired:
        value, columns, method = paired, torch.arange(len(x), device="cpu"), "identity"
    exact = torch.equal(x, y.cpu()[columns.cpu()].to(y.device))
    return _transport(value, least, 1e-12 * value, paired, method, columns.cpu(), tolerance, exact=exact)


def _proved(costs: Costs, columns: Tensor, *starts: Tensor) -> tuple[Tensor, float, float]:
    """A potential of the matching, improved from the best start, its gap, and what the matching costs."""
    own = costs.lower.gather(1, columns[:, None])[:, 0]
    pairing = Pairing(costs.lower, columns, own, costs.weights[0])
    cost = pairing.cost + costs.shift
    f, gap = pairing.improve(*starts, enough=0.1 * OPTIMAL * cost, sweeps=_SWEEPS)
    return f, gap, cost


def _assigned(costs: Costs, tolerance: float) -> Found:
    """An assignment, or of more than `_COLD` rows, many of which share their best column, a network simplex.

    An assignment is exact but for rounding: no potential is asked for where that is little.
    """
    g = column_minima(costs.lower, torch.zeros_like(costs.roots[0]))
    f, columns = nearest(costs.lower, -g)
    free = 1 - torch.bincount(columns).count_nonzero().item() / len(f)
    if free > _FEW and len(f) > _COLD:
        if (swept := _swept_identity(costs)) is not None:
            return _found(costs, None, swept, "identity")
        if free > _FREE:
            plan, g = plans.program(costs.lower, torch.ones_like(f), torch.ones_like(f))
            return _found(costs, plan.columns, row_minima(costs.lower, -g), "network simplex")
    least = -math.inf
    if free:
        columns = plans.assignment(costs.lower - g if free > _FEW else costs.lower)
    cost = costs.lower.gather(1, columns[:, None]).mean().item()
    if free:
        missed = plans.assignment_error(len(f), costs.largest(centred=True))
        if missed <= _MISSED * tolerance * (cost + costs.shift):
            least = cost - missed
        else:
            f, _, _ = _proved(costs, columns, f)
    if costs.diagonal is not None and costs.diagonal.mean().item() - cost <= OPTIMAL * (cost + costs.shift):
        return _found(costs, None, f, "identity", least)
    return _found(costs, columns, f, "assignment", least)


def _assigned_by_potentials(costs: Costs, tolerance: float) -> Found:
    """Sinkhorn potentials make most reduced costs irrelevant, and nearly prove the matching already."""
    best: tuple[float, Found] | None = None
    small, exact = len(costs.lower) <= _SPARSE, None
    for sharpness, scaling in _TRIES:
        f = sinkhorn.potentials(costs.lower, costs.weights, sharpness=sharpness, scaling=scaling)
        columns, method = exact, "sinkhorn and assignment"
        if columns is None:
            columns, method = _reduced_assignment(costs, f, sparse=True), "sinkhorn and sparse assignment"
        f, gap, cost = _proved(costs, columns, f, torch.zeros_like(f))
        if gap > 0.1 * OPTIMAL * cost and small and exact is None:  # unproved: it may be the candidates' fault
            exact, method = _reduced_assignment(costs, f, sparse=False), "sinkhorn and assignment"
            if not torch.equal(exact, columns):
                columns = exact
                f, gap, cost = _proved(costs, columns, f)
        if best is None or cost + gap < best[0]:
            best = cost + gap, _found(costs, columns, f, method)
        if gap <= tolerance * cost / 2:
            break
    assert best is not None
    return best[1]


def _reduced_assignment(costs: Costs, f: Tensor, *, sparse: bool) -> Tensor:
    """(N,): the columns of an assignment on C − f − g, g the c-transform of f."""
    f, g = feasible(costs.lower, f)
    reduced = costs.lower - f[:, None]
    reduced -= g
    columns = plans.sparse_assignment(reduced) if sparse else None
    return plans.assignment(reduced) if columns is None else columns


def _weighted(costs: Costs) -> Found:
    """A plan between other weights or numbers."""
    (w, v), rounding = _in_units(costs.weights)
    rows, columns = (weight.nonzero()[:, 0] for weight in (w, v))
    lower = costs.lower[rows][:, columns] if len(rows) < len(w) or len(columns) < len(v) else costs.lower
    plan, g = plans.program(lower, w[rows], v[columns])
    plan = Plan(rows[plan.rows], columns[plan.columns], plan.mass)
    missing_w = torch.zeros_like(w).index_add_(0, plan.rows, plan.mass) - w
    missing_v = torch.zeros_like(v).index_add_(0, plan.columns, plan.mass) - v
    total = w.sum()
    defect = ((missing_w.abs().sum() + missing_v.abs().sum()) / total).item() + rounding
    f = row_minima(costs.lower[:, columns], -g)
    return Found(plan.rows, plan.columns, plan.mass / total, f, "linear program", defect=defect)


def _in_units(weights: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], float]:
    """The weights, and how far rounding may have taken their sums apart.

    Equal ones become integers of one total: 1/N and 1/M are no floats, and what is left over would travel far.
    """
    w, v = weights
    if not all(bool((weight == weight[0]).all()) for weight in weights):
        return weights, sum(0.0 if _is_dyadic(weight) else 2 * EPS for weight in weights)
    common = math.gcd(len(w), len(v))
    return (torch.full_like(w, len(v) // common), torch.full_like(v, len(w) // common)), 0.0


def _is_dyadic(weights: Tensor) -> bool:
    """Whether they are whole multiples of 2⁻⁵² that add up to 1: without rounding, then, in every order."""
    whole = weights / EPS
    return bool((whole == whole.round()).all()) and whole.sum().item() == 1 / EPS


def _certified(costs: Costs, clouds: Clouds, found: Found, tolerance: float) -> Transport:
    """The plan's cost by direct differences, and what f, or the solver's rounding, proves about any other plan."""
    rows, columns, mass, f = (part.to(costs.lower.device) for part in found[:4])
    identity = found.method == "identity"
    if identity and costs.diagonal is not None and costs.plain is not None:
        centred, plain, exact = costs.diagonal, costs.plain, costs.same
    elif clouds.rereadable:
        centred, plain, differences = direct(costs, clouds, rows, columns)
        exact = not differences.any()
    else:
        centred = costs.lower[rows, columns] + 2 * costs.uncertainty(rows, columns)
        plain = centred + costs.shift * (1 + 1e-13)  # Σ π (x_i − y_j) = −c
        exact = False
    w, v = costs.weights
    f = f - w @ f
    g = column_minima(costs.lower, -f)
    slack = mass @ (centred - f[rows] - g[columns])
    # Of C − f the minimum is rounded once in g and once here; what g leaves of it is small where the pair is tight.
    proved = (slack * (1 + 1e-12) + 1.5 * EPS * (v @ g.abs())).item()
    gap = max(min(proved, (mass @ centred).item() * (1 + 1e-12) - found.least), 0.0)
    value = (mass @ plain).item()
    paired = math.nan if costs.plain is None else (w @ costs.plain).item()
    matching = columns.cpu() if identity or costs.uniform else None
    error = costs.rounding * value + found.defect * costs.largest()
    exact_copy = bool(exact) and not found.defect
    return _transport(value, value - gap, error, paired, found.method, matching, tolerance, exact=exact_copy)


def _transport(
    value: float,
    lower: float,
    error: float,
    paired: float,
    method: str,
    matching: Tensor | None,
    tolerance: float,
    *,
    exact: bool,
) -> Transport:
    """The interval, widened by what rounding may have done; `exact`: every particle goes to its own copy."""
    upper = value if exact else value + error + _UNDERFLOW
    lower = max(lower - error - _UNDERFLOW, 0.0)
    nothing = 0.0 if paired == 0 else math.nan
    excess = paired / value - 1 if value else nothing
    return Transport(
        value=value,
        lower=lower,
        upper=upper,
        paired=paired,
        identity_excess=excess,
        method=method,
        matching=matching,
        converged=upper <= (1 + tolerance) * lower,
    )


def _from_moments(clouds: Clouds, blocks: Iterator[tuple[Tensor, Tensor]], tolerance: float) -> Transport:
    found = moment_bounds(clouds, blocks)
    value = found.independent if math.isnan(found.paired) else min(found.paired, found.independent)
    error = found.rounding * value
    return _transport(value, found.lower, error, found.paired, "moments", None, tolerance, exact=found.same)
