"""The entropy that is taken by default: of normal clouds where they may be normal, else of nearest neighbours."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_speedlimit.ensemble import DistributionLimit, speed_limit
from lightning_speedlimit.ensemble.limit import _chosen
from lightning_speedlimit.ensemble.normality import _p_values, normality_p_value

Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal(random: np.random.Generator, replicas: int, d: int = 1) -> np.ndarray:
    return random.standard_normal((replicas, d))


def wells(random: np.random.Generator, replicas: int) -> np.ndarray:
    """±1, each N(·, 0.1²): what a double well makes of a cloud at its top."""
    return random.choice([-1.0, 1.0], (replicas, 1)) + 0.1 * random.standard_normal((replicas, 1))


def ring(random: np.random.Generator, replicas: int) -> np.ndarray:
    """Radius N(3, 0.2²), any angle: 2π e^{…} below."""
    radius, angle = 3 + 0.2 * random.standard_normal(replicas), 2 * np.pi * random.random(replicas)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def tails(random: np.random.Generator, replicas: int) -> np.ndarray:
    """Four of five N(0, 0.1²), the fifth N(0, 2²)."""
    return np.where(random.random((replicas, 1)) < 0.8, 0.1, 2.0) * random.standard_normal((replicas, 1))


def entropy_of_tails() -> float:
    x = np.linspace(-20, 20, 400_001)
    p = 0.8 * stats.norm.pdf(x, scale=0.1) + 0.2 * stats.norm.pdf(x, scale=2.0)
    return float(-(p * np.log(p)).sum() * (x[1] - x[0]))


NORMAL = 0.5 * math.log(2 * math.pi * math.e)
# Of the ring: p = N(r; 3, 0.04)/(2πr), S = S_r + log 2π + ⟨log r⟩, ⟨log r⟩ = log 3 − 0.04/18.
SHAPES: dict[str, tuple[Draw, int, float]] = {
    "two wells": (wells, 1, NORMAL + math.log(0.1) + math.log(2)),
    "ring": (ring, 2, NORMAL + math.log(0.2) + math.log(2 * math.pi) + math.log(3) - 0.04 / 18),
    "heavy tails": (tails, 1, entropy_of_tails()),
}


def between(begin: np.ndarray, end: np.ndarray, **options: str) -> DistributionLimit:
    """Losses 3 ± 0.1 → 0 ± 0.1 at temperature 1."""
    losses = 0.1 * np.random.default_rng(9).standard_normal((2, len(begin))) + np.array([[3.0], [0.0]])
    return speed_limit(np.array([0.0, 1.0]), np.stack([begin, end]), losses, 1.0, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backwards", [False, True], ids=["end", "start"])
def test_a_cloud_that_is_not_normal_is_noticed_at_either_end(shape: str, backwards: bool) -> None:
    draw, d, entropy = SHAPES[shape]
    random = np.random.default_rng(1)
    clouds = normal(random, 400, d), draw(random, 400)
    truth = (entropy - d * NORMAL) * (-1 if backwards else 1)
    with pytest.warns(UserWarning, match="not normal .*nearest neighbours"):
        found = between(*(clouds[::-1] if backwards else clouds))
    assert found.entropy_estimator == "neighbours"
    assert min(found.normality) < 0.01 < max(found.normality)
    drop = found.free_energy_drop
    assert drop.value == pytest.approx(found.loss_drop.value + found.entropy_change_neighbours.value)
    assert abs(drop.value - 3 - truth) < 4 * drop.standard_error
    # The guard: of normal clouds it would be another number, by more than its stated error.
    gaussian = found.entropy_change_gaussian
    assert abs(gaussian.value - truth) > 2 * gaussian.standard_error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = between(*(clouds[::-1] if backwards else clouds), entropy="gaussian")
        nearest = between(*(clouds[::-1] if backwards else clouds), entropy="neighbours")
    assert asked.entropy_estimator == "gaussian"
    assert nearest.free_energy_drop == found.free_energy_drop


def test_a_cloud_in_two_wells_keeps_its_efficiency() -> None:
    """Halves of N(0, 0.3²) go to ±1: quantiles are matched, and the normal entropy would halve the efficiency."""
    random = np.random.default_rng(2)
    begin = 0.3 * normal(random, 600)
    end = np.sign(begin) + 0.1 * normal(random, 600)
    grid = (np.arange(100_000) + 0.5) / 100_000
    start = 0.3 * stats.norm.ppf(grid)
    finish = np.sign(start) + 0.1 * stats.norm.ppf((2 * grid) % 1.0)
    truth = np.mean((start - finish) ** 2) / (1.0 + math.log(0.1 / 0.3) + math.log(2))
    losses = 0.02 * normal(random, 1200).reshape(2, 600) + np.array([[1.0], [0.0]])
    arrays = np.array([0.0, 1.0]), np.stack([begin, end]), losses, 1.0
    with pytest.warns(UserWarning, match="not normal"):
        found = speed_limit(*arrays).efficiency
    assert abs(found.value - truth) < 4 * found.standard_error
    assert speed_limit(*arrays, entropy="gaussian").efficiency.value < 0.5 * truth


def test_normal_clouds_take_the_normal_entropy_without_a_word() -> None:
    random = np.random.default_rng(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for d in (1, 3, 12):
            found = between(normal(random, 200, d), 2 + 0.5 * normal(random, 200, d))
            assert found.entropy_estimator == "gaussian"
            assert min(found.normality) > 0.01
            asked = between(normal(random, 200, d), normal(random, 200, d), entropy="gaussian")
            assert asked.normality != found.normality


@pytest.mark.parametrize(
    ("normality", "chosen"),
    [
        ((0.01, 0.01), "gaussian"),
        ((0.00999, 1.0), "neighbours"),
        ((1.0, 0.00999), "neighbours"),
        ((math.nan, 0.5), "gaussian"),  # too few replicas to test
        ((math.nan, 0.001), "neighbours"),
    ],
    ids=str,
)
def test_the_level_is_one_in_a_hundred_at_either_end(normality: tuple[float, float], chosen: str) -> None:
    assert _chosen("auto", normality, 10) == (chosen, "")
    assert bool(_chosen("auto", normality, 11)[1]) == (chosen == "neighbours")
    for asked in ("gaussian", "neighbours"):
        assert _chosen(asked, normality, 11) == (asked, "")


def test_in_many_dimensions_what_is_not_normal_has_no_entropy() -> None:
    """Neither estimator holds: NaN, and why; at temperature 0 none is needed."""
    random = np.random.default_rng(4)
    begin, end = normal(random, 300, 12), random.laplace(size=(300, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an entropy that is not taken
        found = between(begin, end)
    for name in ("free_energy_drop", "efficiency", "efficiency_lower", "speed_limit_time"):
        estimate = getattr(found, name)
        assert math.isnan(estimate.value), name
        assert "not normal (p = " in estimate.reason
        assert "at the end" in estimate.reason
        assert 'or take entropy="gaussian"' in estimate.reason
    assert found.efficiency_loss_drop.value > 0
    assert math.isfinite(between(begin, end, entropy="gaussian").efficiency.value)
    losses = np.array([[1.0], [0.0]]) + 0.01 * normal(random, 600).reshape(2, 300)
    cold = speed_limit(np.array([0.0, 1.0]), np.stack([begin, end]), losses, 0.0)
    assert math.isfinite(cold.efficiency.value)


def test_the_test_has_no_unit_and_no_direction() -> None:
    random = np.random.default_rng(5)
    cloud = torch.from_numpy(np.concatenate([wells(random, 100), normal(random, 100, 2)], 1))
    turn = torch.diag(torch.tensor([1e-6, 1.0, 1e3]).double()) @ torch.from_numpy(random.standard_normal((3, 3)))
    turned = normality_p_value(cloud @ turn.T + 7.0)
    assert turned == pytest.approx(normality_p_value(cloud), rel=1e-4)
    assert turned < 0.01


def test_too_few_replicas_have_no_test() -> None:
    assert math.isnan(normality_p_value(torch.randn(4, 3, dtype=torch.float64)))
    assert math.isnan(normality_p_value(torch.zeros(30, 2, dtype=torch.float64)))


@pytest.mark.parametrize(("replicas", "d"), [(60, 2), (30, 1)])
def test_each_tests_p_is_uniform_where_the_cloud_is_normal(replicas: int, d: int) -> None:
    """By drawing clouds: four standard deviations of 600 draws, and what the asymptotic laws leave, 0.05 at most."""
    generator = torch.Generator().manual_seed(0)
    clouds = torch.randn(600, replicas, d, dtype=torch.float64, generator=generator)
    p = np.array([_p_values(cloud) for cloud in clouds])
    for level in (0.02, 0.1, 0.5):  # what large p are is of no use
        error = 4 * math.sqrt(level * (1 - level) / 600) + 0.05 * 2 * min(level, 1 - level)
        np.testing.assert_allclose((p < level).mean(0), level, rtol=0, atol=error)
    assert normality_p_value(clouds[0]) == min(1.0, 3 * p[0].min())


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "d"), [(12, 1), (60, 1), (60, 6), (400, 3), (60, 40)])
def test_few_normal_clouds_are_taken_for_others(replicas: int, d: int) -> None:
    """At most 2 of 100: of 1000 draws at most 20 + 2.6 √(1000 · 0.02 · 0.98) = 31."""
    clouds = torch.randn(1000, replicas, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert sum(normality_p_value(cloud) < 0.01 for cloud in clouds) <= 31
