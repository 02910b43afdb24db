"""Beyond 512 particles: exact and certified by every solver, and where Sinkhorn's potentials come in whatever they do.

The truth is scipy's assignment on the direct costs from a cold start. Sinkhorn is for more than 4096 particles; the
tests of it lower that number.
"""

import functools
from collections.abc import Callable
from fractions import Fraction
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from geomloss import SamplesLoss
from torch import Tensor
from transport_cases import Draw, features, independent, lazy, lazy_and_permuted
from transport_reference import by_assignment, direct_costs

from lightning_speedlimit.transport import Transport, plans, sinkhorn, wasserstein2, wasserstein2_squared

EXACT = 1e-12  # one matching, evaluated by differences on both sides
SIZES = [(600, 2), (700, 64), (800, 3), (1000, 64), (1500, 64)]
KINDS = (lazy, features, independent)

Kind = Callable[[Draw, int, int], tuple[Tensor, Tensor]]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@functools.cache
def solved(kind: Kind, n: int, d: int) -> tuple[Tensor, Tensor, np.ndarray, float]:
    """x, y in float32 as weights are stored, their costs and W₂²."""
    x, y = (cloud.float() for cloud in kind(Draw(n + d), n, d))
    costs = direct_costs(x, y)
    return x, y, costs, by_assignment(costs)


def assert_exact(found: Transport, costs: np.ndarray, expected: float) -> None:
    assert found.value == pytest.approx(expected, rel=EXACT, abs=0)
    assert_certified(found, costs, expected, tolerance=1e-3)


def assert_certified(found: Transport, costs: np.ndarray, expected: float, tolerance: float) -> None:
    assert found.upper <= (1 + tolerance) * found.lower
    assert found.converged
    assert_sound(found, costs, expected)


def assert_sound(found: Transport, costs: np.ndarray, expected: float) -> None:
    assert found.lower <= expected <= found.upper
    assert found.lower <= found.value <= found.upper
    assert found.matching is not None
    assert torch.equal(found.matching.sort().values, torch.arange(len(costs)))
    assert found.value == pytest.approx(costs[np.arange(len(costs)), found.matching.numpy()].mean(), rel=EXACT)


@pytest.fixture
def by_sinkhorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasserstein2, "_SOLVED", 512)
    monkeypatch.setattr(wasserstein2, "_FLAT", 1)


@pytest.mark.parametrize("sinkhorn", [True, False])
@pytest.mark.parametrize(("n", "d"), SIZES)
@kinds
def test_exact_and_certified(kind: Kind, n: int, d: int, sinkhorn: bool, request: pytest.FixtureRequest) -> None:
    if sinkhorn:
        request.getfixturevalue("by_sinkhorn")
    x, y, costs, expected = solved(kind, n, d)
    found = wasserstein2_squared(x, y)
    assert_exact(found, costs, expected)
    if kind is not lazy:
        assert found.method.startswith("sinkhorn and ") == sinkhorn
        assert sinkhorn or found.upper <= (1 + 1e-8) * found.lower
        assert found.identity_excess == pytest.approx(found.paired / expected - 1, rel=1e-9)
        assert found.identity_excess > 1e-4


@pytest.mark.parametrize(("n", "d"), [(600, 3), (700, 64)])
def test_permuted_weights(n: int, d: int) -> None:
    # r down to 1e-7, and no pair i → i is near: the costs of interest are 1e-14 of the others.
    for seed in range(2):
        x, y = lazy_and_permuted(Draw(seed), n, d)
        costs = direct_costs(x, y)
        assert_exact(wasserstein2_squared(x, y), costs, by_assignment(costs))


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6, 1e-9])
def test_the_tolerance_that_is_asked_for(tolerance: float) -> None:
    x, y, costs, expected = solved(features, 700, 64)
    found = wasserstein2_squared(x, y, tolerance=tolerance)
    assert_certified(found, costs, expected, tolerance)


def test_a_tolerance_that_is_not_reached_is_admitted() -> None:
    x, y, costs, expected = solved(features, 700, 64)
    found = wasserstein2_squared(x, y, tolerance=1e-14)  # below the rounding of the value
    assert not found.converged
    assert_sound(found, costs, expected)


@pytest.mark.parametrize(("n", "d"), [(600, 2), (700, 64), (1000, 64)])
@kinds
@pytest.mark.usefixtures("by_sinkhorn")
def test_the_sparse_route(kind: Kind, n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasserstein2, "_SPARSE", 0)
    x, y, costs, expected = solved(kind, n, d)
    found = wasserstein2_squared(x, y)
    assert_certified(found, costs, expected, tolerance=1e-3)
    assert found.method == ("sinkhorn and sparse assignment" if kind is not lazy or d == 2 else "identity")


@pytest.mark.usefixtures("by_sinkhorn")
def test_the_sparse_route_with_too_few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    # One candidate per row and column holds no full matching: the whole matrix is taken instead.
    monkeypatch.setattr(wasserstein2, "_SPARSE", 0)
    monkeypatch.setattr(plans, "CANDIDATES", 1)
    x, y, costs, expected = solved(independent, 600, 2)
    assert_sound(wasserstein2_squared(x, y), costs, expected)


# ---- which solver -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("particles", "coordinates", "device", "found"),
    [
        (4096, 64, "cpu", False),
        (4097, 9, "cpu", True),
        (4097, 8, "cpu", False),
        (512, 64, "meta", False),  # any device that is no CPU
        (513, 9, "meta", True),
        (4097, 8, "meta", False),
    ],
)
def test_sinkhorn_is_for_many_particles_in_many_dimensions(
    particles: int, coordinates: int, device: str, found: bool
) -> None:
    costs = SimpleNamespace(lower=torch.empty(particles, 1, device=device), coordinates=coordinates)
    assert wasserstein2._by_sinkhorn(costs) == found


SOLVERS = {
    "assignment": lambda draw: (draw.normal(600, 2), draw.normal(600, 2)),
    "network simplex": lambda draw: (draw.normal(600, 2), 10 * draw.normal(600, 2)),
}


@pytest.mark.parametrize("method", SOLVERS)
def test_a_solver_by_how_many_rows_share_their_best_column(method: str) -> None:
    x, y = SOLVERS[method](Draw(0))
    costs = direct_costs(x, y)
    found = wasserstein2_squared(x, y)
    assert found.method == method
    assert_exact(found, costs, by_assignment(costs))
    assert found.upper <= (1 + 1e-8) * found.lower
    sharper = wasserstein2_squared(x, y, tolerance=1e-9)
    assert sharper.value == found.value
    assert sharper.upper <= (1 + 1e-10) * sharper.lower


@pytest.mark.parametrize("n", [2, 3, 5])
def test_an_assignment_misses_no_more_than_rounding_explains(n: int) -> None:
    # Rows and columns each add a large cost to all plans alike; what tells the plans apart is as small as rounding.
    missed = []
    for seed in range(200):
        draw = Draw(seed)
        costs = draw.normal(n, 1).square() + draw.normal(n).square() + 1e-15 * draw.normal(n, n).square()
        exact = [[Fraction(cost) for cost in row] for row in costs.tolist()]
        means = {order: sum(map(list.__getitem__, exact, order)) / n for order in permutations(range(n))}
        mean = means[tuple(plans.assignment(costs).tolist())]
        missed.append(float(mean - min(means.values())) / plans.assignment_error(n, costs.max().item()))
    assert 0 < max(missed) < 0.5  # it does miss the least


def test_what_an_assignment_may_have_missed_is_in_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = SOLVERS["assignment"](Draw(0))
    least = wasserstein2_squared(x, y).lower
    monkeypatch.setattr(plans, "assignment_error", lambda count, largest: 1e-7)
    found = wasserstein2_squared(x, y)
    assert found.lower == pytest.approx(least - 1e-7, abs=1e-9)


def test_best_columns_that_no_two_rows_share_are_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "assignment", None)  # would be called to no purpose
    draw = Draw(0)
    x = draw.normal(600, 8)
    order = draw.order(600)
    found = wasserstein2_squared(x, x[order] + 1e-3 * draw.normal(600, 8))
    assert found.method == "assignment"
    assert found.matching is not None
    assert torch.equal(order[found.matching], torch.arange(600))
    assert found.upper <= (1 + 1e-10) * found.lower


@pytest.mark.parametrize("thin", [1e-3, 1e-6])
def test_clouds_that_are_nearly_on_a_line(thin: float) -> None:
    # Neighbours along the line hand each other on: the longest chains for potentials to run along.
    draw = Draw(5)
    x, y = (torch.cat([draw.normal(700, 1), thin * draw.normal(700, 2)], 1) for _ in range(2))
    costs = direct_costs(x, y)
    assert_exact(wasserstein2_squared(x, y), costs, by_assignment(costs))


# ---- whatever Sinkhorn does --------------------------------------------------------------------------------


def noise(costs: Tensor, *_: object, **__: object) -> Tensor:
    return costs.mean() * torch.randn(len(costs), generator=torch.Generator().manual_seed(0)).to(costs)


def huge(costs: Tensor, *_: object, **__: object) -> Tensor:
    return 1e6 * noise(costs)


def zeros(costs: Tensor, *_: object, **__: object) -> Tensor:
    return torch.zeros_like(costs[:, 0])


@pytest.mark.usefixtures("by_sinkhorn")
@pytest.mark.parametrize("garbage", [noise, zeros, huge], ids=lambda garbage: garbage.__name__)
@pytest.mark.parametrize(("kind", "n", "d"), [(features, 600, 2), (features, 700, 64), (independent, 600, 2)])
def test_exact_and_sound_without_potentials(
    kind: Kind, n: int, d: int, garbage: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinkhorn, "potentials", garbage)
    x, y, costs, expected = solved(kind, n, d)
    found = wasserstein2_squared(x, y)
    assert found.method.startswith("sinkhorn and ")
    assert found.value == pytest.approx(expected, rel=EXACT, abs=0)
    assert_sound(found, costs, expected)
    assert found.converged == (found.upper <= 1.001 * found.lower)


@pytest.mark.usefixtures("by_sinkhorn")
def test_sound_with_potentials_that_drown_the_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1e15 mean costs: the reduced costs are rounding, so that no matching found on them need be the best.
    monkeypatch.setattr(sinkhorn, "potentials", lambda costs, *_, **__: 1e15 * noise(costs))
    x, y, costs, expected = solved(features, 600, 2)
    found = wasserstein2_squared(x, y)
    assert_sound(found, costs, expected)
    assert found.converged == (found.upper <= 1.001 * found.lower)


@pytest.mark.usefixtures("by_sinkhorn")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_potentials_that_are_not_finite_become_zeros(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(self: SamplesLoss, *given: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(given)
        f, g = torch.zeros(1, len(given[0])), torch.zeros(1, len(given[2]))
        f[0, 3] = bad
        return f, g

    monkeypatch.setattr(SamplesLoss, "forward", broken)
    x, y, costs, expected = solved(features, 700, 64)
    equal = torch.full((700,), 1 / 700, dtype=torch.float64)
    f = sinkhorn.potentials(torch.from_numpy(costs), (equal, equal), sharpness=0.1, scaling=0.5)
    assert torch.equal(f, torch.zeros(700, dtype=torch.float64))
    found = wasserstein2_squared(x, y)
    assert len(calls) > 1
    assert found.value == pytest.approx(expected, rel=EXACT, abs=0)
    assert_sound(found, costs, expected)


def test_good_potentials_are_near_the_dual_optimum() -> None:
    # What the room uses Sinkhorn for. f and its transform prove W₂² to within a blur² of 0.1 spacings.
    _, _, costs, expected = solved(independent, 700, 64)
    equal = torch.full((700,), 1 / 700, dtype=torch.float64)
    f = sinkhorn.potentials(torch.from_numpy(costs), (equal, equal), sharpness=0.1, scaling=0.7).numpy()
    g = (costs - f[:, None]).min(0)
    dual = (costs - g).min(1).mean() + g.mean()
    assert 0.99 * expected < dual <= expected
    g = costs.min(0)  # from f = 0 it proves less
    assert (costs - g).min(1).mean() + g.mean() < dual


# ---- slow --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@kinds
def test_few_dimensions_and_many_particles(kind: Kind) -> None:
    x, y, costs, expected = solved(kind, 1500, 3)
    assert_exact(wasserstein2_squared(x, y), costs, expected)


@pytest.mark.slow
def test_learned_features_of_4096_neurons() -> None:
    x, y = (cloud.float() for cloud in features(Draw(0), 4096, 64))
    found = wasserstein2_squared(x, y)
    assert found.converged
    assert found.upper <= 1.001 * found.lower
    assert found.method == "assignment"
    assert found.matching is not None
    assert torch.equal(found.matching.sort().values, torch.arange(4096))
    expected = (x.double() - y.double()[found.matching]).square().sum(1).mean().item()
    assert found.value == pytest.approx(expected, rel=EXACT, abs=0)
    assert found.identity_excess > 1e-4
