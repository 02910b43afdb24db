"""W₂² of the distributions from few replicas: what the clouds add is taken off, and the error says what may be left."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from stated_errors import CLOUDS, clouds

from lightning_speedlimit.ensemble import DistributionLimit, speed_limit
from lightning_speedlimit.ensemble.distance import extrapolated, sampled_distance, sampled_gelbrich
from lightning_speedlimit.ensemble.estimate import Sampled
from lightning_speedlimit.transport import wasserstein2_squared


def limit_of(begin: np.ndarray, end: np.ndarray) -> DistributionLimit:
    losses = np.array([[1.0], [0.0]]) + 0.01 * np.random.default_rng(7).standard_normal((2, len(begin)))
    return speed_limit(np.array([0.0, 1.0]), np.stack([begin, end]), losses, 0.0)


@pytest.mark.parametrize(("d", "replicas"), [(3, 60), (6, 60), (6, 61), (10, 60)])
def test_two_errors_cover_the_distributions_distance(d: int, replicas: int) -> None:
    # 20 draws at 0.9: fewer than 14 once in 400. Of the clouds' own distance none in six and ten dimensions.
    found = clouds(d, replicas, temperature=1.0, time=0.3, draws=20)
    assert found["covered"] >= 14
    assert found["covered without"] < 14, "the guard: there is a bias to take off"
    assert found["stated"] < found["of the clouds"] - found["truth"], "the error is less than what was taken off"


@pytest.mark.parametrize(("replicas", "d", "cuts"), [(60, 1, 4), (60, 6, 4), (61, 6, 4), (60, 20, 4), (1100, 2, 1)])
def test_what_is_taken_off_is_what_halves_are_farther_apart_by(replicas: int, d: int, cuts: int) -> None:
    """(W_½ − W)/(2^{2/d} − 1), by scipy's assignment of the same halves; ½ or d/20 of it is in the error."""
    random = np.random.default_rng(replicas + d)
    x, y = random.standard_normal((replicas, d)), 3 + random.standard_normal((replicas, d))

    def between(part: np.ndarray) -> float:
        costs = cdist(x[part], y[part], "sqeuclidean")
        return float(costs[linear_sum_assignment(costs)].mean())

    generator, halves, whole = torch.Generator().manual_seed(0), [], between(np.arange(replicas))
    for _ in range(cuts):
        order = torch.randperm(replicas, generator=generator).numpy()
        one, other = np.split(order, [-(-replicas // 2)])
        halves.append((len(one) * between(one) + len(other) * between(other)) / replicas)
    # No more than down to the means' distance, less what chance adds to its square.
    moved = y - x
    most = whole - float(np.square(moved.mean(0)).sum() - moved.var(0, ddof=1).sum() / replicas)
    off = min(most, (np.mean(halves) - whole) / (2 ** (1.0 if d == 1 else 2 / d) - 1))
    clouds = torch.from_numpy(x), torch.from_numpy(y)
    transport = wasserstein2_squared(*clouds)
    found = extrapolated(
        sampled_distance(*clouds, transport), *clouds, transport, Sampled.undefined("none", clouds[0][:, 0]), 1e-3
    )
    assert found.value == pytest.approx(whole - off, rel=1e-9)
    assert found.systematic == pytest.approx(min(most, off * max(0.5, d / 20)), rel=1e-6)


def test_ratios_hold_what_is_left_of_the_bias() -> None:
    random = np.random.default_rng(0)
    begin = random.standard_normal((60, 6))
    found = limit_of(begin, 0.5 * begin + random.standard_normal((60, 6)))
    distance, ratio = found.wasserstein2_squared, found.efficiency
    assert distance.value < found.transport.value
    assert distance.standard_error > 0.4 * (found.transport.value - distance.value)
    assert ratio.value == pytest.approx(distance.value / found.loss_drop.value)
    # The loss drop is known to 0.2 %.
    assert ratio.standard_error == pytest.approx(distance.standard_error / found.loss_drop.value, rel=0.05)


def test_where_no_replica_changes_partner_nothing_is_taken_off() -> None:
    """A gradient flow's map is one; it has no bias to show."""
    begin = np.random.default_rng(1).standard_normal((41, 6))
    end = begin * np.linspace(0.1, 1.5, 6) + 2.0
    found = limit_of(begin, end)
    own = ((begin - end) ** 2).sum(1)
    assert found.wasserstein2_squared.value == pytest.approx(own.mean(), rel=1e-12)
    assert found.wasserstein2_squared.standard_error == pytest.approx(own.std(ddof=1) / math.sqrt(41), rel=1e-9)


def test_no_more_is_taken_off_than_means_and_covariances_allow() -> None:
    """In 40 dimensions R^{−1/20} alone would make W₂² negative."""
    random = np.random.default_rng(2)
    for replicas in (30, 60):  # without and with a covariance
        x, y = (torch.from_numpy(random.standard_normal((replicas, 40)) + shift) for shift in (0.0, 0.3))
        transport, gelbrich = wasserstein2_squared(x, y), sampled_gelbrich(x, y)
        assert math.isnan(gelbrich.value) == (replicas == 30)
        found = extrapolated(sampled_distance(x, y, transport), x, y, transport, gelbrich, 1e-3)
        # ‖Δm‖² = 3.6; without bias from 30 or 60 replicas, with variance 8·3.6/R + 8·40/R².
        scatter = math.sqrt(8 * 3.6 / replicas + 8 * 40 / replicas**2)
        assert -4 * scatter < found.value - 3.6 < transport.value - 3.6
        assert found.value - 3.6 < 2 * found.standard_error
        assert found.standard_error < transport.value


def test_what_is_systematic_does_not_average_away() -> None:
    terms = torch.ones(100, dtype=torch.float64) + 1e-9 * torch.arange(100, dtype=torch.float64)
    part = Sampled(4.0, terms, systematic=0.3)
    assert part.standard_error == pytest.approx(0.3)
    assert part.times(-2.0).standard_error == pytest.approx(0.6)
    assert (part + part.times(2.0)).systematic == pytest.approx(math.hypot(0.3, 0.6))
    assert (part - part).systematic == pytest.approx(math.hypot(0.3, 0.3))
    below = Sampled(-2.0, terms, systematic=0.1)
    assert part.over(below).systematic == pytest.approx(math.hypot(0.3, 2 * 0.1) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(10))
def test_the_table_of_coverage(case: int) -> None:

    found: dict[str, Any] = clouds(*CLOUDS[case], draws=100, seed=1)
    assert found["covered"] >= found["least"] == 81
