"""The speed limit between distributions: Langevin replicas on a quadratic against its closed form."""

import dataclasses
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from ensemble_cases import Quadratic
from torch import Tensor

from lightning_speedlimit.ensemble import DistributionLimit, Estimate, Replicas, speed_limit, train_replicas
from lightning_speedlimit.ensemble.distance import sampled_distance, sampled_gelbrich
from lightning_speedlimit.ensemble.estimate import Sampled
from lightning_speedlimit.transport import gaussian_wasserstein2_squared, wasserstein2_squared


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# One mode narrows and one widens; displacement and diffusion are alike.
CASE = Quadratic(vector(1.0, 3.0), vector(1.5, -0.8), vector(0.4, 0.9), 0.3)
LINE = Quadratic(vector(1.0), vector(1.5), vector(0.2), 0.5)
LR = 1e-3  # its own error is of this relative size: a tenth of the standard errors
STEPS = (0, 200, 400, 700, 1000, 1500)


@cache
def replicas(case: Quadratic = CASE, count: int = 500) -> Replicas:
    return train_replicas(
        case.module,
        lambda model: model(),
        replicas=count,
        lr=LR,
        steps=STEPS[-1],
        temperature=case.temperature,
        record_at=STEPS,
        seed=10_000,
    )


def limit(found: Replicas, end: int = -1, **options: Any) -> DistributionLimit:
    return speed_limit(found.times, found.positions, found.losses, found.temperature, end=end, **options)


def deviations(estimate: Estimate, truth: float) -> float:
    return (estimate.value - truth) / estimate.standard_error


@pytest.mark.parametrize("end", range(1, 6))
@pytest.mark.parametrize("case", [LINE, CASE], ids=["one mode", "two modes"])
def test_langevin_replicas_meet_the_closed_form(case: Quadratic, end: int) -> None:
    found = limit(replicas(case), end)
    distance = float(case.wasserstein2_squared(vector(found.elapsed)))
    drop = case.free_energy_drop(found.elapsed)
    assert found.elapsed == pytest.approx(STEPS[end] * LR)
    # Four standard errors, fixed seed.
    assert abs(deviations(found.wasserstein2_squared, distance)) < 4
    assert abs(deviations(found.wasserstein2_squared_lower, distance)) < 4
    assert abs(deviations(found.free_energy_drop, drop)) < 4
    assert abs(deviations(found.loss_drop, case.loss_drop(found.elapsed))) < 4
    assert abs(deviations(found.efficiency_lower, distance / drop / found.elapsed)) < 4
    assert abs(deviations(found.speed_limit_time, distance / drop)) < 4
    assert abs(deviations(found.efficiency, distance / drop / found.elapsed)) < 4
    assert found.transport.lower <= found.transport.value <= found.transport.upper
    assert found.transport.upper - found.transport.lower < 1e-3 * found.transport.value
    # And the errors are small enough to tell something: what is 10 % off is seen at the last time.
    assert end < 5 or found.efficiency.standard_error < 0.05 * found.efficiency.value


@pytest.mark.parametrize("end", [2, 5])
def test_both_entropies_agree_with_the_closed_form(end: int) -> None:
    found = limit(replicas(), end)
    variances = CASE.moments(vector(0.0, found.elapsed))[1]
    truth = float((variances[1] / variances[0]).log().sum() / 2)
    assert abs(deviations(found.entropy_change_gaussian, truth)) < 4
    assert abs(deviations(found.entropy_change_neighbours, truth)) < 4
    other = limit(replicas(), end, entropy="neighbours")
    assert other.entropy_estimator == "neighbours"
    assert abs(deviations(other.free_energy_drop, CASE.free_energy_drop(found.elapsed))) < 4
    assert other.free_energy_drop.value != found.free_energy_drop.value
    assert other.free_energy_drop.value == pytest.approx(
        found.loss_drop.value + CASE.temperature * found.entropy_change_neighbours.value, rel=1e-12
    )


def test_errors_are_the_scatter_over_ensembles() -> None:
    """Thirty ensembles of 60: the stated errors are their standard deviations, correlations of the terms included."""
    count, size = 30, 60
    found = [limit(cut(replicas(CASE, 1800), slice(i * size, (i + 1) * size))) for i in range(count)]
    for name in ("wasserstein2_squared", "free_energy_drop", "efficiency", "efficiency_lower", "loss_drop"):
        estimates = [getattr(each, name) for each in found]
        values = torch.tensor([e.value for e in estimates])
        stated = math.sqrt(sum(e.standard_error**2 for e in estimates) / count)
        # A standard deviation of 30 is known to 1/√58; four of that.
        assert stated == pytest.approx(float(values.std()), rel=4 / math.sqrt(58)), name


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_the_error_of_the_distance_is_its_scatter(shift: float) -> None:
    """From N(0, 1) to an independent N(shift, 4): potentials −x² and y²/2, far from the cost of each pair."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(300):
        x, y = (torch.randn(40, 1, dtype=torch.float64, generator=generator) for _ in range(2))
        y = 2.0 * y + shift
        found.append(sampled_distance(x, y, wasserstein2_squared(x, y)).estimate())
    stated = math.sqrt(sum(e.standard_error**2 for e in found) / 300)
    deviation = float(torch.tensor([e.value for e in found]).std())
    assert stated == pytest.approx(deviation, rel=4 / math.sqrt(600) + 0.05)  # 0.05: 40 replicas, first order


def test_the_error_of_the_distance_to_two_clusters_is_its_scatter() -> None:
    """No affine map: x goes to ±5, and the potential is −5|x|."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        x, y, side = (torch.randn(40, 1, dtype=torch.float64, generator=generator) for _ in range(3))
        y = 0.1 * y + 5.0 * side.sign()
        found.append(sampled_distance(x, y, wasserstein2_squared(x, y)).estimate())
    stated = math.sqrt(sum(e.standard_error**2 for e in found) / 200)
    assert stated == pytest.approx(float(torch.tensor([e.value for e in found]).std()), rel=4 / math.sqrt(400) + 0.05)


def test_what_a_replica_adds_to_the_lower_distance_is_what_goes_with_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(400, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    y = y @ vector(2.0, 0.5).diag() + vector(3.0, -1.0)

    def plain(kept: Tensor) -> float:
        return gaussian_wasserstein2_squared(*(m for c in (x[kept], y[kept]) for m in (c.mean(0), torch.cov(c.T))))

    every = torch.arange(400)
    gone = torch.tensor([plain(every) - plain(every[every != r]) for r in range(0, 400, 20)], dtype=torch.float64)
    added = sampled_gelbrich(x, y).influence
    # To first order: 1/400 of what one of 400 adds.
    torch.testing.assert_close(399 * gone, (added - added.mean())[::20], rtol=0.02, atol=0.02 * float(added.std()))


def test_a_cloud_that_ends_at_one_place_has_no_lower_distance() -> None:
    x = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert "all at one place" in sampled_gelbrich(x, torch.zeros_like(x)).reason


def test_the_error_of_a_ratio_knows_what_its_parts_share() -> None:
    terms = torch.arange(1.0, 9.0, dtype=torch.float64)
    part = Sampled.mean(terms)
    assert part.times(3.0).over(part).standard_error == pytest.approx(0.0, abs=1e-15)
    other = Sampled.mean(terms.flip(0))
    # d(x/y) = dx/y − x dy/y², and dx = −dy here.
    assert part.over(other).standard_error == pytest.approx(2 * part.standard_error / part.value)
    assert (part - part).standard_error == 0.0


def test_the_bias_of_few_replicas_is_taken_out_of_the_lower_value() -> None:
    """Clouds of 12 around centres 1 apart in 3 dimensions: plugged in, covariances of 12 add 0.3."""
    shift = vector(1.0, 0.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    corrected, plain = [], []
    for _ in range(300):
        x, y = (torch.randn(12, 3, dtype=torch.float64, generator=generator) for _ in range(2))
        found = sampled_gelbrich(x, y + shift)
        corrected.append(found.value)
        moments = [m for cloud in (x, y + shift) for m in (cloud.mean(0), torch.cov(cloud.T))]
        plain.append(gaussian_wasserstein2_squared(*moments))
    error = float(torch.tensor(corrected).std()) / math.sqrt(300)
    assert sum(plain) / 300 > 1.5
    assert sum(corrected) / 300 == pytest.approx(1.0, abs=4 * error + 0.05)  # 0.05: of second order in 1/R


def cut(found: Replicas, part: slice) -> Replicas:
    return dataclasses.replace(found, positions=found.positions[:, part], losses=found.losses[:, part])


# --- the order in the step size


def at_rate(
    lr: float, temperature: float, count: int, modes: int, mean: float = 1.0, deviation: float = 0.5
) -> tuple[DistributionLimit, Quadratic]:
    case = Quadratic(*(torch.full((modes,), x, dtype=torch.float64) for x in (1.0, mean, deviation)), temperature)
    found = train_replicas(
        case.module, lambda m: m(), replicas=count, lr=lr, steps=round(1 / lr), temperature=temperature, seed=500
    )
    return limit(found), case


def test_without_noise_the_error_is_of_first_order_in_the_step() -> None:
    """Gradient descent from one place: W₂², loss drop and efficiency, all without sampling error."""
    errors = []
    for lr in (0.02, 0.01):
        case = Quadratic(vector(1.0, 2.0), vector(1.0, -1.0), vector(0.0, 0.0), 0.0)
        found = limit(train_replicas(case.module, lambda m: m(), replicas=3, lr=lr, steps=round(1 / lr)))
        distance, drop = float(case.wasserstein2_squared(vector(1.0))), case.loss_drop(1.0)
        values = (found.wasserstein2_squared, found.free_energy_drop, found.efficiency)
        errors.append([v.value / t - 1 for v, t in zip(values, (distance, drop, distance / drop), strict=True)])
    orders = [math.log2(coarse / fine) for coarse, fine in zip(*errors, strict=True)]
    assert orders == pytest.approx([1.0] * 3, abs=0.05)  # the next order of lr = 0.02


def test_with_noise_the_error_is_of_first_order_in_the_step() -> None:
    """⟨L⟩ of 4000 modes that diffuse from the minimum: its error is 15 % at lr 0.2, its sampling error 0.3 %."""
    errors, scatter = [], []
    for lr in (0.2, 0.1):
        found, case = at_rate(lr, 0.5, 80, 4000, mean=0.0, deviation=0.0)
        truth = case.loss_drop(found.elapsed)
        errors.append(found.loss_drop.value / truth - 1)
        scatter.append(abs(found.loss_drop.standard_error / truth))
    order = math.log2(errors[0] / errors[1])
    uncertainty = math.hypot(*(s / e for s, e in zip(scatter, errors, strict=True))) / math.log(2)
    assert uncertainty < 0.1
    assert order == pytest.approx(1.0, abs=4 * uncertainty + 0.1)  # 0.1: the next order of lr = 0.2


# --- what few replicas support


def test_more_dimensions_than_replicas_leave_what_needs_no_entropy() -> None:
    found, case = at_rate(0.05, 0.5, 6, 20)
    for name in ("entropy_change_gaussian", "entropy_change_neighbours", "free_energy_drop", "efficiency"):
        estimate = getattr(found, name)
        assert math.isnan(estimate.value), name
        assert "6 replicas cannot show a covariance in 20 dimensions" in estimate.reason
        assert "W₂², the loss drop and the efficiency at temperature 0 need none" in estimate.reason
    # Six replicas hardly know their own error: the exact process does, x_1 = x_0/e + √(T (1 − 1/e²)) ξ.
    draw = np.random.default_rng(0)
    start = draw.normal(1.0, 0.5, (20_000, 20))
    end = start / math.e + math.sqrt(0.5 * -math.expm1(-2)) * draw.normal(size=start.shape)
    error = 0.5 * (start**2 - end**2).sum(1).std() / math.sqrt(6)
    assert found.loss_drop.value == pytest.approx(case.loss_drop(1.0), abs=4 * error)
    assert found.wasserstein2_squared.value > 0
    assert found.efficiency_loss_drop.value == pytest.approx(
        found.wasserstein2_squared.value / found.loss_drop.value / found.elapsed
    )


def test_at_temperature_zero_no_entropy_is_needed() -> None:
    found, _ = at_rate(0.05, 0.0, 4, 20)
    assert found.efficiency.value == found.efficiency_loss_drop.value
    assert 0 < found.efficiency.value < 1.1  # gradient descent at lr·h = 0.05 exceeds the flow's 1 by 5 % at most
    assert found.free_energy_drop.value == found.loss_drop.value
    assert found.efficiency.standard_error > 0
    assert math.isnan(found.efficiency_lower.value)


def test_one_replica_has_values_without_errors() -> None:
    found, _ = at_rate(0.05, 0.0, 1, 3)
    assert found.efficiency.value > 0
    assert math.isnan(found.efficiency.standard_error)
    assert "one replica" in found.efficiency.reason
    assert math.isnan(found.loss_drop.standard_error)


def test_a_start_from_one_place_has_no_entropy_and_says_so() -> None:
    case = Quadratic(vector(1.0, 1.0), vector(1.0, 1.0), vector(0.0, 0.0), 0.3)
    found = train_replicas(
        case.module, lambda m: m(), replicas=30, lr=0.05, steps=20, temperature=0.3, record_at=(0, 10, 20)
    )
    assert "all at one place" in limit(found).efficiency.reason
    assert math.isfinite(limit(found, start=1).efficiency.value)
    # W₂² from one place is the mean squared distance from it.
    moved = (found.positions[-1] - found.positions[0]).square().sum(1)
    assert limit(found).wasserstein2_squared.value == pytest.approx(float(moved.mean()), rel=1e-9)
    assert limit(found).wasserstein2_squared.standard_error == pytest.approx(float(moved.std()) / math.sqrt(30))


def test_a_drop_below_two_errors_divides_nothing() -> None:
    equilibrium = Quadratic(vector(1.0), vector(0.0), vector(math.sqrt(0.5)), 0.5)
    found = train_replicas(equilibrium.module, lambda m: m(), replicas=50, lr=0.01, steps=20, temperature=0.5, seed=3)
    result = limit(found)
    assert math.isnan(result.efficiency.value)
    assert math.isnan(result.speed_limit_time.value)
    assert "free energy drop" in result.efficiency.reason
    assert math.isfinite(result.free_energy_drop.value)
    positions, losses = torch.randn(2, 9, 1, dtype=torch.float64), torch.zeros(2, 9, dtype=torch.float64)
    losses[0] = torch.arange(9.0) - 3.0  # a mean of 1 ± 0.91
    few = speed_limit(vector(0.0, 1.0), positions, losses, 0.0)
    assert few.loss_drop.value == 1.0
    assert math.isnan(few.efficiency.value)
    assert "the free energy drop, 1, is below two of its standard errors (0.913 each)" in few.efficiency.reason
    losses[0] += 1.0
    assert math.isfinite(speed_limit(vector(0.0, 1.0), positions, losses, 0.0).efficiency.value)


def test_the_unit_of_length_does_not_matter() -> None:
    found = replicas()
    scale = 1e-5
    scaled = speed_limit(found.times, scale * found.positions, found.losses, CASE.temperature)
    plain = limit(found)
    assert scaled.wasserstein2_squared.value == pytest.approx(scale**2 * plain.wasserstein2_squared.value, rel=1e-9)
    assert scaled.wasserstein2_squared.standard_error == pytest.approx(
        scale**2 * plain.wasserstein2_squared.standard_error, rel=1e-6
    )
    assert scaled.free_energy_drop.value == pytest.approx(plain.free_energy_drop.value, rel=1e-9)


# --- input


GOOD: dict[str, Any] = {
    "times": vector(0.0, 1.0, 2.0),
    "positions": torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)),
    "losses": torch.ones(3, 4),
    "temperature": 0.1,
}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"times": vector(0.0)}, ValueError, r"times must have shape \(K,\) with K of at least 2, got \(1,\)"),
        ({"times": vector(0.0, 2.0, 1.0)}, ValueError, r"increase, got \(0, 2, 1\); sort them"),
        ({"times": vector(0.0, 1.0)}, ValueError, "for each of the 2 times, got 3"),
        ({"times": [0.0, 1.0, 2.0]}, TypeError, "times must be a tensor or array .*, got list"),
        ({"positions": torch.ones(3, 4)}, ValueError, r"one trajectory is positions\[:, None, :\]"),
        ({"positions": torch.full((3, 4, 2), math.inf)}, ValueError, "positions must be finite"),
        ({"losses": torch.ones(3)}, ValueError, r"= \(3, 4\), got \(3,\)"),
        ({"losses": torch.full((3, 4), math.nan)}, ValueError, "losses must be finite"),
        ({"temperature": -0.1}, ValueError, "temperature must be a finite number ≥ 0, got -0.1"),
        ({"start": 2, "end": 1}, ValueError, "start must be before end, got records 2 and 1 of 3"),
        ({"end": 3}, ValueError, "end must be the number of a record, -3 to 2, got 3"),
        ({"entropy": "exact"}, ValueError, "entropy must be one of auto, gaussian, neighbours, got 'exact'"),
        ({"neighbours": 0}, ValueError, "neighbours must be a whole number"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be"),
    ],
    ids=str,
)
def test_bad_input_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        speed_limit(**(GOOD | changed))
