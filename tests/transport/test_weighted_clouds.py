"""Unequal numbers of particles and unequal weights against POT, whose solution must prove itself by its dual."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from transport_cases import Draw
from transport_reference import bounds_by_duality, by_assignment, by_emd2, direct_costs

from lightning_speedlimit.transport import Transport, wasserstein2_squared

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


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_clusters_of_other_shares(spread: float) -> None:
    # Much of the mass has to leave its cluster: no pair of a plan is among the nearest ones.
    draw = Draw(7)
    centres = 3 * draw.normal(6, 3)
    x, y = (
        centres[torch.randint(0, 6, (count,), generator=draw.generator)] + spread * draw.normal(count, 3)
        for count in (500, 450)
    )
    assert_agrees(wasserstein2_squared(x, y), direct_costs(x, y), equal(draw, 500), equal(draw, 450))


def test_many_copies_of_few_points() -> None:
    draw = Draw(0)
    x, y = draw.normal(300, 3)[torch.arange(300) % 10], draw.normal(400, 3)[torch.arange(400) % 7]
    assert_agrees(wasserstein2_squared(x, y), direct_costs(x, y), equal(draw, 300), equal(draw, 400))


@pytest.mark.slow
def test_thousands_of_particles_of_other_numbers() -> None:
    draw = Draw(0)
    x, y = draw.normal(2100, 16), draw.normal(2000, 16)
    assert_agrees(wasserstein2_squared(x, y), direct_costs(x, y), equal(draw, 2100), equal(draw, 2000))


def test_common_weights_of_many_particles() -> None:
    draw = Draw(0)
    x, w = draw.normal(1100, 4), dirichlet(draw, 1100)
    y = x + 0.2 * draw.normal(1100, 4)
    found = wasserstein2_squared(x, y, weights_x=w, weights_y=w)
    expected = by_emd2(direct_costs(x, y), w.numpy(), w.numpy())
    assert found.value == pytest.approx(expected, rel=AGREES, abs=0)
    assert found.lower <= expected * (1 + 1e-12)  # masses of the reference: 1e-16 at up to 1e3 times the value
    assert found.converged
    assert found.identity_excess > 0


@pytest.mark.parametrize("move", [1e-1, 1e-3, 1e-5, 1e-6, 1e-7, 1e-8])
def test_rounding_of_weights_that_travels(move: float) -> None:
    # Every particle splits in two that stay near. 1e-16 of the mass is left over, and goes as far as it must.
    for seed in range(30):
        draw = Draw(seed)
        x, w, share = draw.normal(5), dirichlet(draw, 5), torch.rand(5, generator=draw.generator).double()
        y, v = torch.cat([x, x]) + move * draw.normal(10), torch.cat([w * share, w * (1 - share)])
        v = v / v.sum()
        truth = on_a_line(x, w, y, v)
        found = wasserstein2_squared(x[:, None], y[:, None], weights_x=w, weights_y=v)
        assert Fraction(found.lower) <= truth <= Fraction(found.upper), seed
        if move >= 1e-3:
            assert found.converged, seed


def on_a_line(x: Tensor, w: Tensor, y: Tensor, v: Tensor) -> Fraction:
    """W₂² of the floats as they are, by the monotone plan, without rounding."""
    sides = []
    for points, weights in ((x, w), (y, v)):
        masses = [Fraction(weight) for weight in weights.tolist()]
        pairs = zip((Fraction(point) for point in points.tolist()), masses, strict=True)
        sides.append([[point, mass / sum(masses)] for point, mass in sorted(pairs)])
    first, second = (iter(side) for side in sides)
    total, a, b = Fraction(0), next(first), next(second)
    while a is not None and b is not None:
        mass = min(a[1], b[1])
        total += mass * (a[0] - b[0]) ** 2
        a[1], b[1] = a[1] - mass, b[1] - mass
        a = a if a[1] else next(first, None)
        b = b if b[1] else next(second, None)
    return total


def test_rounding_of_potentials_that_are_large() -> None:
    # Between clusters the potentials differ by 1e3, and are known to 1e-13 only: ten times W₂² here.
    w, v = torch.tensor([1, 2, 3, 2] * 4).double() / 32, torch.full((16,), 1 / 16).double()
    for seed in range(100):
        draw = Draw(seed)
        centres = torch.tensor([0.0, 10.0, 37.0, 91.0]).double()[:, None]
        x, y = ((centres + 1e-7 * draw.normal(4, 4)).flatten() for _ in range(2))
        found = wasserstein2_squared(x[:, None], y[:, None], weights_x=w)
        assert Fraction(found.lower) <= on_a_line(x, w, y, v) <= Fraction(found.upper), seed


@pytest.mark.parametrize("far", [1e4, 1e9, 1e12])
def test_a_particle_far_away_without_weight(far: float) -> None:
    draw = Draw(0)
    x, y = draw.normal(20, 3), draw.normal(30, 3) + 1e-3
    below, above = bounds_by_duality(direct_costs(x, y), np.full(20, 1 / 20), np.full(30, 1 / 30))
    more = torch.cat([torch.full((1, 3), far, dtype=torch.float64), x])
    w = torch.cat([torch.zeros(1), torch.full((20,), 0.05)]).double()
    for found in (
        wasserstein2_squared(more, y, weights_x=w),
        wasserstein2_squared(iter([more]), iter([y]), weights_x=w),
    ):
        assert found.lower <= above * (1 + 1e-14)  # the reference's own sums
        assert found.upper >= below * (1 - 1e-14)
        assert found.converged


@pytest.mark.parametrize("n", [3, 7, 49, 100])
def test_equal_weights_that_are_said(n: int) -> None:
    draw = Draw(n)
    x, y = draw.normal(n, 3), draw.normal(n, 3)
    plain = wasserstein2_squared(x, y)
    for weights in (torch.full((n,), 1 / n, dtype=torch.float64), torch.full((n,), 1 / n)):
        said = wasserstein2_squared(x, y, weights_x=weights)
        assert said == plain
        assert said.matching is not None


def test_a_solver_that_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    # Masses and potentials at random: what the marginals miss widens the interval, the dual proves what it can.
    def lie(w: np.ndarray, v: np.ndarray, costs: np.ndarray, **_: object) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        random = np.random.default_rng(len(w))
        return random.random(costs.shape) * w[:, None] * v, {"u": random.normal(size=len(w))}

    monkeypatch.setattr(ot.lp, "emd", lie)
    for x, y, w, v in pairs():
        assert_interval(wasserstein2_squared(x, y, weights_x=w, weights_y=v), direct_costs(x, y), w, v)


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])
def test_a_plan_that_is_right_with_potentials_that_are_not(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = ot.lp.emd

    def blur(*given: np.ndarray, **options: object) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        masses, log = solve(*given, **options)
        return masses, {"u": log["u"] + scale * np.random.default_rng(0).normal(size=len(masses))}

    monkeypatch.setattr(ot.lp, "emd", blur)
    for x, y, w, v in pairs():
        assert_interval(wasserstein2_squared(x, y, weights_x=w, weights_y=v), direct_costs(x, y), w, v)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20, 1e60, 1e100])
@pytest.mark.parametrize(("n", "m"), [(8, 5), (5, 8), (30, 20)])
def test_clouds_of_very_different_particles_at_any_scale(scale: float, n: int, m: int) -> None:
    # Rounding of the largest costs leaves reduced costs below 0: at 1e20 and more that is below −1.
    for seed in range(20):
        draw = Draw(seed)
        x = draw.normal(n, 3) * 10.0 ** torch.randint(-20, 20, (n, 1), generator=draw.generator).double()
        y = draw.normal(m, 3)
        x, y = scale * x, scale * y
        found = wasserstein2_squared(x, y)
        _, above = bounds_by_duality(direct_costs(x, y) / direct_costs(x, y).max(), *(np.ones(k) / k for k in (n, m)))
        assert found.value == pytest.approx(above * direct_costs(x, y).max(), rel=AGREES), seed
        assert found.lower <= found.value <= found.upper, seed
        assert found.converged, seed


@pytest.mark.parametrize("power", [10, 20, 60])
def test_clouds_far_apart_or_full_of_ties_at_large_scales(power: int) -> None:
    for seed in range(10):
        draw = Draw(seed)
        x, y = draw.normal(7, 2), draw.normal(4, 2)
        for a, b in ((x, y + 10.0**power), (x.round(), y.round()), (x * 10.0 ** -(power // 2), y)):
            a, b = a * 10.0**power, b * 10.0**power
            costs = direct_costs(a, b)
            _, above = bounds_by_duality(costs / costs.max(), np.ones(7) / 7, np.ones(4) / 4)
            found = wasserstein2_squared(a, b)
            assert found.value == pytest.approx(above * costs.max(), rel=AGREES), seed
            assert found.converged, seed


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
