"""Unequal numbers of particles and unequal weights against POT, whose solution must prove itself by its dual."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transport_cases import Draw
from transport_reference import bounds_by_duality, by_assignment, by_emd2, direct_costs

from lightning_speedlimit.transport import Transport, plans, sinkhorn, wasserstein2, wasserstein2_squared

AGREES = 1e-9  # asked for; a program is solved to 1e-10 of its own value
PROVED = 1e-11  # primal over dual of the reference


def dirichlet(draw: Draw, n: int, *, sharpness: float = 1.0) -> Tensor:
    """n weights that sum to 1; small sharpness: a few hold nearly all."""
    concentration = torch.full((n,), sharpness, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(draw.integer(0, 2**31))
        w = torch.distributions.Dirichlet(concentration).sample()
    return w / w.sum()


def with_zeros(draw: Draw, n: int) -> Tensor:
    w = dirichlet(draw, n)
    w[draw.order(n)[: n // 2]] = 0
    return w / w.sum()


def equal(_: Draw, n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def sharp(draw: Draw, n: int) -> Tensor:
    return dirichlet(draw, n, sharpness=0.05)


WEIGHTS = (equal, dirichlet, with_zeros, sharp)
Weights = Callable[[Draw, int], Tensor]


def assert_agrees(found: Transport, costs: np.ndarray, w: Tensor, v: Tensor) -> None:
    below, above = bounds_by_duality(costs, w.numpy(), v.numpy())
    assert above - below <= PROVED * above
    assert found.lower <= above * (1 + 1e-14)  # a plan's cost in float64, of at most 600 terms
    assert found.upper >= below * (1 - 1e-14)
    assert found.value == pytest.approx(above, rel=AGREES, abs=0)
    assert found.converged


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.__name__)
def test_against_pot(kind: Weights, seed: int) -> None:
    draw = Draw(seed)
    largest = 300 if seed % 8 == 0 else 60
    n, m, d = draw.integer(1, largest), draw.integer(1, largest), draw.integer(1, 20)
    x, y = draw.normal(n, d), draw.normal(m, d) + draw.uniform(0, 3)
    if seed % 3 == 0:
        x, y = x.float(), y.float()
    w, v = kind(draw, n), WEIGHTS[seed % len(WEIGHTS)](draw, m)
    costs = direct_costs(x, y)
    found = wasserstein2_squared(x, y, weights_x=w, weights_y=v)
    assert_agrees(found, costs, w, v)
    assert found.value == pytest.approx(by_emd2(costs, w.numpy(), v.numpy()), rel=AGREES, abs=0)


@pytest.mark.parametrize("seed", range(10))
def test_as_many_particles_of_other_weights(seed: int) -> None:
    draw = Draw(seed)
    n, d = draw.integer(2, 80), draw.integer(1, 20)
    x, y, w, v = draw.normal(n, d), draw.normal(n, d), dirichlet(draw, n), with_zeros(draw, n)
    found = wasserstein2_squared(x, y, weights_x=w, weights_y=v)
    assert_agrees(found, direct_costs(x, y), w, v)
    assert np.isnan(found.paired)
    assert np.isnan(found.identity_excess)
    assert found.matching is None
    assert found.method == "linear program"


@pytest.mark.parametrize("seed", range(10))
def test_common_weights_that_are_not_equal(seed: int) -> None:
    draw = Draw(seed)
    n, d = draw.integer(2, 80), draw.integer(1, 20)
    x, y, w = draw.normal(n, d), draw.normal(n, d), dirichlet(draw, n)
    found = wasserstein2_squared(x, y, weights_x=w, weights_y=w)
    assert_agrees(found, direct_costs(x, y), w, w)
    assert found.paired == pytest.approx((w @ (y - x).square().sum(1)).item(), rel=1e-12)
    assert found.identity_excess == found.paired / found.value - 1
    assert found.matching is None


# ---- clusters: W₂² far below the largest cost --------------------------------------------------------------

# The truth is an assignment between copies of the particles, as many of each as its weight says.


def clusters(draw: Draw, n: int, m: int, d: int, spread: float) -> tuple[Tensor, Tensor]:
    centres = draw.normal(4, d)
    x, y = (centres[torch.arange(count) % 4] + spread * draw.normal(count, d) for count in (n, m))
    return x, y


def shares(draw: Draw, n: int, units: int) -> Tensor:
    """Integers; those of each of four clusters sum to `units`."""
    counts = torch.zeros(n, dtype=torch.int64)
    for cluster in range(4):
        members = torch.arange(cluster, n, 4)
        cuts = torch.randint(0, units + 1, (len(members) - 1,), generator=draw.generator).sort().values
        counts[members] = torch.cat([cuts, torch.tensor([units])]).diff(prepend=torch.tensor([0]))
    return counts


def by_copies(x: Tensor, y: Tensor, times_x: Tensor, times_y: Tensor) -> float:
    return by_assignment(direct_costs(x.repeat_interleave(times_x, 0), y.repeat_interleave(times_y, 0)))


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_clusters_of_unequal_weights(spread: float) -> None:
    for seed in range(10):
        draw = Draw(seed)
        n, m, d = draw.integer(4, 80), draw.integer(4, 80), draw.integer(1, 10)
        x, y = clusters(draw, n, m, d, spread)
        times_x, times_y = shares(draw, n, 128), shares(draw, m, 128)
        expected = by_copies(x, y, times_x, times_y)
        # multiples of 1/512: exact
        found = wasserstein2_squared(x, y, weights_x=times_x.double() / 512, weights_y=times_y.double() / 512)
        assert found.lower <= expected <= found.upper, seed
        assert found.value == pytest.approx(expected, rel=AGREES, abs=0), seed
        assert found.converged, seed


@pytest.mark.parametrize("sizes", [(12, 20), (28, 36), (44, 36), (60, 36), (100, 300)], ids=str)
@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_clusters_of_unequal_sizes(spread: float, sizes: tuple[int, int]) -> None:
    # 1/N and 1/M are no floats: what their rounding leaves over, 1e-17 of the mass, must not travel between clusters.
    n, m = sizes
    copies = math.lcm(n, m)
    x, y = clusters(Draw(n + m), n, m, 5, spread)
    expected = by_copies(x, y, torch.tensor(copies // n), torch.tensor(copies // m))
    found = wasserstein2_squared(x, y)
    assert found.lower <= expected <= found.upper
    assert found.converged
    if spread >= 1e-4:
        assert found.value == pytest.approx(expected, rel=AGREES, abs=0)


def test_the_same_cloud_with_other_numbers_of_copies() -> None:
    # W₂ = 0: the value is what the rounding of 1/N leaves, a few 1e-16 of the squared distances, and lower is 0.
    for n, copies in ((7, 3), (10, 3), (11, 7), (49, 3)):
        x = Draw(n).normal(n, 3)
        found = wasserstein2_squared(x, x.repeat(copies, 1))
        assert found.lower == 0
        assert 0 <= found.value <= 1e-15 * direct_costs(x, x).max()


# ---- other routes ------------------------------------------------------------------------------------------


def pairs() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """x, y, their weights: equal ones of other numbers, and random ones with zeros."""
    found = []
    for seed in range(12):
        draw = Draw(seed)
        n, m, d = draw.integer(1, 120), draw.integer(1, 120), draw.integer(1, 20)
        x, y = draw.normal(n, d), draw.normal(m, d) + draw.uniform(0, 2)
        if seed % 4 == 0 and min(n, m) >= 4:
            x, y = clusters(draw, n, m, d, 1e-4)
        found.append((x, y, WEIGHTS[seed % 4](draw, n), WEIGHTS[seed % 3](draw, m)))
    return found


def assert_interval(found: Transport, costs: np.ndarray, w: Tensor, v: Tensor) -> None:
    below, above = bounds_by_duality(costs, w.numpy(), v.numpy())
    rounding = 1e-15 * costs.max()  # of the reference's masses
    assert above - below <= PROVED * above + rounding
    assert found.lower <= above + rounding
    assert found.upper >= below - rounding
    assert found.converged == (found.upper <= 1.001 * found.lower)


def test_beyond_the_size_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasserstein2, "_PROGRAM", 0)
    for x, y, w, v in pairs():
        found = wasserstein2_squared(x, y, weights_x=w, weights_y=v)
        assert found.method == "sinkhorn and greedy"
        assert_interval(found, direct_costs(x, y), w, v)


def test_beyond_the_size_of_a_program_with_potentials(monkeypatch: pytest.MonkeyPatch) -> None:
    # Potentials are what makes the interval of some use: a plan within 10 %, a proof within 3 %, on such clouds.
    monkeypatch.setattr(wasserstein2, "_PROGRAM", 0)
    monkeypatch.setattr(plans, "DENSE_PROGRAM", 0)
    draw = Draw(0)
    x, y, w, v = draw.normal(150, 3), draw.normal(200, 3) + 1, equal(draw, 150), dirichlet(draw, 200)
    costs = direct_costs(x, y)
    found = wasserstein2_squared(x, y, weights_x=w, weights_y=v)
    assert found.method == "sinkhorn and greedy"
    assert_interval(found, costs, w, v)
    expected = by_emd2(costs, w.numpy(), v.numpy())
    assert found.upper <= 1.1 * expected
    assert found.lower >= 0.97 * expected


def test_a_program_over_the_smallest_costs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Potentials first, then 32 candidates per row and column: what is left out is checked by the dual.
    monkeypatch.setattr(plans, "DENSE_PROGRAM", 0)
    for x, y, w, v in pairs():
        found = wasserstein2_squared(x, y, weights_x=w, weights_y=v)
        assert found.method == "linear program"
        assert_interval(found, direct_costs(x, y), w, v)


@pytest.mark.parametrize("candidates", [1, 2])
def test_a_program_with_too_few_candidates_is_still_sound(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "DENSE_PROGRAM", 0)
    monkeypatch.setattr(plans, "CANDIDATES", candidates)
    for x, y, w, v in pairs():
        assert_interval(wasserstein2_squared(x, y, weights_x=w, weights_y=v), direct_costs(x, y), w, v)


def test_a_solver_that_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_solve", lambda *_: None)
    for x, y, w, v in pairs():
        found = wasserstein2_squared(x, y, weights_x=w, weights_y=v)
        assert found.method == "sinkhorn and greedy"
        assert_interval(found, direct_costs(x, y), w, v)


def test_a_solver_that_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    # Masses and potentials at random: the plan is completed to the right marginals, the dual proves what it can.
    def lie(costs: Tensor, rows: Tensor, columns: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(len(costs))
        return torch.rand(len(costs), generator=generator).double(), torch.randn(len(w), generator=generator).double()

    monkeypatch.setattr(plans, "_solve", lie)
    for x, y, w, v in pairs():
        assert_interval(wasserstein2_squared(x, y, weights_x=w, weights_y=v), direct_costs(x, y), w, v)


def test_potentials_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "DENSE_PROGRAM", 0)
    monkeypatch.setattr(
        sinkhorn, "potentials", lambda costs, *_, **__: costs.mean() * torch.randn(len(costs)).to(costs)
    )
    for x, y, w, v in pairs():
        assert_interval(wasserstein2_squared(x, y, weights_x=w, weights_y=v), direct_costs(x, y), w, v)


def test_an_interval_beside_the_truth_would_be_noticed() -> None:
    x, y, w, v = pairs()[1]
    costs = direct_costs(x, y)
    found = wasserstein2_squared(x, y, weights_x=w, weights_y=v)
    assert_agrees(found, costs, w, v)
    for factor in (1 + 1e-8, 1 - 1e-8):
        fields = {name: getattr(found, name) for name in Transport.__dataclass_fields__}
        fields |= {name: factor * fields[name] for name in ("value", "lower", "upper")}
        with pytest.raises(AssertionError):
            assert_agrees(Transport(**fields), costs, w, v)
        with pytest.raises(AssertionError):
            assert_interval(Transport(**fields), costs, w, v)


# ---- plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_rounded_plans_have_the_marginals(seed: int) -> None:
    draw = Draw(seed)
    n, m = draw.integer(1, 30), draw.integer(1, 30)
    w, v = with_zeros(draw, n), dirichlet(draw, m)
    rows, columns = torch.ones(n, m).nonzero(as_tuple=True)
    mass = torch.rand(n * m, generator=draw.generator).double()
    plan = plans.rounded(plans.Plan(rows, columns, mass), (w, v))
    assert (plan.mass >= 0).all()
    for index, wanted in ((plan.rows, w), (plan.columns, v)):
        marginal = torch.zeros_like(wanted).index_add_(0, index, plan.mass)
        assert torch.allclose(marginal, wanted, rtol=0, atol=1e-15)
