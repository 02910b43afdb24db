"""The pairing i → i is called optimal where it is, and nowhere else.

Judged by scipy's assignment on direct float64 differences from a cold start, and for N ≤ 6 by all permutations.
"""

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor
from transport_cases import MONOTONE, Draw, circle
from transport_reference import by_assignment, by_brute_force, direct_costs

from lightning_speedlimit.transport import wasserstein2, wasserstein2_squared
from lightning_speedlimit.transport.duals import Pairing

# Identity counts as optimal where a proof leaves at most 1e-9 of its cost: ten times more must be seen.
SEEN = 1e-8
AGREES = 1e-10  # both evaluate a matching by differences; costs enter the assignment to 1e-10 of themselves


# ---- i → i is not optimal --------------------------------------------------------------------------------


def turned_circle(draw: Draw) -> tuple[Tensor, Tensor]:
    """Small displacements with a small Lipschitz constant, and none of them needed."""
    n = draw.integer(10, 120)
    x, y = circle(n, turn=draw.integer(1, min(5, n // 3)))
    return x, y + 1e-4 * draw.normal(n, 2)


def turned_circle_in_many_dimensions(draw: Draw) -> tuple[Tensor, Tensor]:
    x, y = turned_circle(draw)
    frame = draw.rotation(20)[:2]
    noise = 1e-3 * draw.normal(len(x), 20)
    return x @ frame + noise, y @ frame + noise


def cycles(draw: Draw) -> tuple[Tensor, Tensor]:
    """Some particles hand their places on in a cycle of any length; all move a little."""
    n, d = draw.integer(2, 100), draw.integer(1, 40)
    x = draw.normal(n, d)
    y = x + 10 ** draw.uniform(-7, -2) * draw.normal(n, d)
    members = draw.order(n)[: draw.integer(2, n)]
    y[members] = y[members.roll(1)]
    return x, y


def near_pair_exchanged(draw: Draw) -> tuple[Tensor, Tensor]:
    """Only the two nearest particles exchange partners."""
    n, d = draw.integer(2, 100), draw.integer(1, 40)
    x = draw.normal(n, d)
    distance = torch.cdist(x, x).fill_diagonal_(math.inf)
    i, j = divmod(int(distance.argmin()), n)
    y = x + 0.1 * distance.min() * draw.normal(n, d) / d**0.5
    y[[i, j]] = y[[j, i]]
    return x, y


def common_motion_hides_an_exchange(draw: Draw) -> tuple[Tensor, Tensor]:
    """All move by up to 2000 times the root of what the exchange costs: its excess falls to some 1e-7."""
    x, y = near_pair_exchanged(draw)
    saved = by_identity(x, y) - by_assignment(direct_costs(x, y))
    return x, y + math.sqrt(saved * 10 ** draw.uniform(0, 6.5)) * draw.normal(1, x.shape[1]) / x.shape[1] ** 0.5


def independent_clouds(draw: Draw) -> tuple[Tensor, Tensor]:
    n, d = draw.integer(20, 100), draw.integer(1, 40)
    return draw.normal(n, d), draw.normal(n, d)


NOT_OPTIMAL = (
    turned_circle,
    turned_circle_in_many_dimensions,
    cycles,
    near_pair_exchanged,
    common_motion_hides_an_exchange,
    independent_clouds,
)
NOT_OPTIMAL_CLOUDS = 1000


def by_identity(x: Tensor, y: Tensor) -> float:
    return (x.double() - y.double()).square().sum(1).mean().item()


@pytest.mark.parametrize("kind", NOT_OPTIMAL, ids=lambda kind: kind.__name__)
def test_no_identity_is_certified_that_is_not_optimal(kind: Callable[[Draw], tuple[Tensor, Tensor]]) -> None:
    tested = 0
    for seed in range(NOT_OPTIMAL.index(kind), NOT_OPTIMAL_CLOUDS, len(NOT_OPTIMAL)):
        x, y = kind(Draw(seed))
        if seed % 4 == 0:
            x, y = x.float(), y.float()
        expected, identity = by_assignment(direct_costs(x, y)), by_identity(x, y)
        if identity <= expected * (1 + SEEN):
            continue
        tested += 1
        found = wasserstein2_squared(x, y)
        assert found.method != "identity", seed
        assert found.lower <= expected <= found.upper, seed
        assert found.value == pytest.approx(expected, rel=AGREES, abs=0), seed
        excess = identity / expected - 1
        assert found.identity_excess > 0, seed
        assert found.identity_excess == pytest.approx(excess, abs=2 * AGREES * (1 + excess)), seed
    assert tested > 0.95 * NOT_OPTIMAL_CLOUDS / len(NOT_OPTIMAL)  # (almost) every cloud is what its name says


@pytest.mark.parametrize("turn", [1, 3, 50])
@pytest.mark.parametrize("n", [100, 600])
def test_a_circle_turned_onto_itself(n: int, turn: int) -> None:
    found = wasserstein2_squared(*circle(n, turn=turn))
    assert found.value == found.lower == found.upper == 0
    assert found.paired == pytest.approx((2 * math.sin(math.pi * turn / n)) ** 2, rel=1e-12)  # the chord
    assert math.isnan(found.identity_excess)
    assert found.matching is not None
    assert torch.equal(found.matching, torch.arange(n).add(n - turn).remainder(n))
    assert found.converged


def test_a_turned_circle_in_float32_whose_turn_was_computed() -> None:
    # 100 points turned by 3 places through a matrix: W₂ is what float32 leaves, the displacement 0.19.
    x, _ = circle(100, turn=0)
    angle = 2 * math.pi * 3 / 100
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    x, y = x.float(), (x @ turn.double()).float()
    found = wasserstein2_squared(x, y)
    assert found.value == pytest.approx(by_assignment(direct_costs(x, y)), rel=AGREES)
    assert found.value < 1e-14  # (6e-8)² per coordinate
    assert found.paired == pytest.approx((2 * math.sin(angle / 2)) ** 2, rel=1e-6)
    assert found.method != "identity"


def test_every_small_cloud_against_all_permutations() -> None:
    identity_was_optimal = 0
    for seed in range(400):
        draw = Draw(seed)
        n, d = draw.integer(1, 6), draw.integer(1, 3)
        x = draw.normal(n, d)
        y = x + draw.one_of(0.1, 0.5, 2.0) * draw.normal(n, d)
        if seed % 2:  # a grid, full of ties and duplicates
            x, y = (2 * x).round(), (2 * y).round()
        costs = direct_costs(x, y)
        expected = by_brute_force(costs)
        found = wasserstein2_squared(x, y)
        assert found.lower <= expected <= found.upper, seed
        assert found.value == pytest.approx(expected, rel=1e-12, abs=0), seed
        optimal = by_identity(x, y) <= expected * (1 + 1e-12)
        assert (found.method == "identity") == optimal, seed
        identity_was_optimal += optimal
    assert 100 < identity_was_optimal < 300


# ---- i → i is optimal ------------------------------------------------------------------------------------


def assert_identity(x: Tensor, y: Tensor) -> None:
    found = wasserstein2_squared(x, y)
    assert found.method == "identity"
    assert found.identity_excess == 0
    assert found.value == found.paired == pytest.approx(by_identity(x, y), rel=1e-12, abs=0)
    assert found.lower <= found.value <= found.upper
    assert found.converged
    assert found.matching is not None
    assert torch.equal(found.matching, torch.arange(len(x)))


@pytest.mark.parametrize("kind", MONOTONE, ids=lambda kind: kind.__name__)
def test_gradients_of_convex_functions_are_certified(kind: Callable[..., tuple[Tensor, Tensor]]) -> None:
    for seed in range(100):
        draw = Draw(seed)
        x, y = kind(draw, draw.integer(2, 200), draw.integer(1, 70))
        assert_identity(*((x.float(), y.float()) if seed % 2 else (x, y)))


@pytest.mark.parametrize(("n", "d"), [(800, 3), (800, 500), (2000, 2), (2000, 64)])
@pytest.mark.parametrize("kind", MONOTONE, ids=lambda kind: kind.__name__)
def test_gradients_of_convex_functions_beyond_the_cold_assignment(
    kind: Callable[..., tuple[Tensor, Tensor]], n: int, d: int
) -> None:
    assert_identity(*kind(Draw(n + d), n, d))


@pytest.mark.parametrize("n", [5, 50])
def test_the_optimal_matching_put_in_order_is_certified(n: int) -> None:
    # Any clouds: once y is sorted by the optimal matching, i → i is optimal.
    for seed in range(50):
        draw = Draw(seed)
        x, y = draw.normal(n, 3), draw.normal(n, 3)
        matching = wasserstein2_squared(x, y).matching
        assert matching is not None
        assert_identity(x, y[matching])


# ---- the certificate itself ------------------------------------------------------------------------------


def test_a_fixed_point_exists_exactly_where_identity_is_optimal() -> None:
    # All cycles of a 4-particle cloud, by hand: Σ C_iσ(i) ≥ Σ C_ii for every permutation σ or not.
    for seed in range(200):
        draw = Draw(seed)
        x = draw.normal(4, 2)
        costs = torch.cdist(x, x + 0.7 * draw.normal(4, 2)).square()
        own, weights = costs.diagonal().clone(), torch.full((4,), 0.25, dtype=torch.float64)
        best = min(sum(costs[i, j].item() for i, j in enumerate(order)) for order in permutations(range(4)))
        optimal = own.sum().item() <= best * (1 + 1e-12)
        pairing = Pairing(costs, torch.arange(4), own, weights)
        _, gap = pairing.improve(torch.zeros_like(own), enough=0, sweeps=64, patient=False)
        assert (gap <= 1e-14) == optimal, seed
        if not optimal:
            assert gap >= (own.sum().item() - best) / 4 * (1 - 1e-12), seed  # never promises more than is true


def test_a_certificate_that_always_accepts_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pairing, "gap", lambda self, f, enough=0.0: 0.0)
    with pytest.raises(AssertionError):
        test_no_identity_is_certified_that_is_not_optimal(cycles)
    with pytest.raises(AssertionError):
        test_every_small_cloud_against_all_permutations()


def test_a_certificate_that_never_accepts_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasserstein2, "OPTIMAL", -1.0)
    with pytest.raises(AssertionError):
        test_gradients_of_convex_functions_are_certified(MONOTONE[0])
    with pytest.raises(AssertionError):
        test_every_small_cloud_against_all_permutations()
