"""Entropy production rates from trajectories alone, against systems whose rate is solved another way."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from ensemble_cases import CHAIN_RATES, HeavyTails, Linear, QuarticRelaxation, Whirl, chain, euler, rotating
from scipy.linalg import logm
from stated_errors import rates

from lightning_speedlimit.ensemble import (
    Estimate,
    entropy_production_bound,
    entropy_production_linear,
    entropy_production_polynomial,
)
from lightning_speedlimit.ensemble import currents as currents_room
from lightning_speedlimit.ensemble.currents import CurrentMoments
from lightning_speedlimit.ensemble.matrices import logarithm
from lightning_speedlimit.ensemble.trajectories import Pairs, jackknife
from lightning_speedlimit.ensemble.uncertainty import _mean_of_blocks

PLANE = rotating([1.0], [1.0], 0.5)
TEN = rotating([0.5, 1.0, 1.5, 2.0, 1.0], [1.0, 1.0, 1.0, 0.5, 2.0], 0.5)
WHIRL = Whirl(temperature=0.5, turn=1.0)


def test_the_cases_have_the_rates_that_they_say() -> None:
    assert PLANE.rate == pytest.approx(2.0)  # 2ω²/h
    assert TEN.rate == pytest.approx(0.5 + 2.0 + 4.5 + 16.0 + 1.0)
    for beads, rate in CHAIN_RATES.items():
        assert chain(beads).rate == pytest.approx(rate, abs=5e-4)  # the digits of the paper
    # A gradient flow in its steady state produces none.
    assert Linear(np.diag([1.0, 2.0]), 0.3 * np.eye(2)).rate == pytest.approx(0.0, abs=1e-12)


# --- the bound


@pytest.mark.parametrize(
    ("system", "lag", "replicas"), [(PLANE, 0.02, 3000), (TEN, 0.01, 1500)], ids=["2 dimensions", "10 dimensions"]
)
def test_the_bound_is_close_below_the_rate_of_rotating_systems(system: Linear, lag: float, replicas: int) -> None:
    found = entropy_production_bound(*system.sample(lag, 101, replicas, seed=1))
    # Of the relation a finite lag leaves its logarithm.
    for bound, least in (
        (found.rate, 0.9 * system.rate),
        (found.uncertainty_relation, math.log1p(0.9 * system.rate * lag) / lag),
    ):
        assert least < bound.value < system.rate + 4 * bound.standard_error
        assert bound.standard_error < 0.04 * system.rate
    assert found.samples == 100 * replicas
    assert found.lag == pytest.approx(lag)
    d = len(system.drift)
    assert found.currents == d * (d + 1)


def test_the_bound_is_close_below_the_rate_of_a_quartic_whirl() -> None:
    start = WHIRL.start(3000, seed=0)
    data = euler(WHIRL.force, WHIRL.temperature, start, step=1e-3, lag=0.01, records=101, seed=1)
    found = {degree: entropy_production_bound(*data, degree=degree) for degree in (1, 3)}
    bound = found[3].rate
    assert 0.9 * WHIRL.rate < bound.value < WHIRL.rate + 4 * bound.standard_error
    assert bound.standard_error < 0.04 * WHIRL.rate
    # Its force is of third degree: linear currents see three quarters of it.
    assert found[1].rate.value < 0.85 * WHIRL.rate
    assert found[3].currents == 20


@pytest.mark.parametrize("lag", [1, 5, 20, 60])
def test_in_a_steady_state_it_is_a_bound_at_every_lag(lag: int) -> None:
    """A fast rotation, 50 nats/time and 0.5 to 30 nats per lag; what the relation promises for short lags only."""
    system = rotating([5.0], [1.0], 0.5)
    found = entropy_production_bound(*system.sample(0.01, 161, 1000, seed=2), lag=lag)
    assert 0 < found.rate.value < system.rate + 4 * found.rate.standard_error
    assert found.rate.value > 0.85 * system.rate or lag > 1


@pytest.mark.parametrize("degree", [1, 3, 5])
def test_far_replicas_of_a_law_with_heavy_tails_do_not_take_the_bound_away(degree: int) -> None:
    """Without the cut-off one pair of weight e^{−J} makes it −10⁷⁰ and worse; a polynomial is no D⁻¹ν here."""
    case = HeavyTails(temperature=0.5, turn=1.5)
    assert case.rate == pytest.approx(0.75)  # ω²/6T
    data = euler(case.force, case.temperature, case.start(1000, 0), step=5e-3, lag=0.02, records=51, seed=500)
    found = entropy_production_bound(*data, degree=degree)
    for bound in (found.rate, found.uncertainty_relation):
        assert 0.4 * case.rate < bound.value < case.rate + 4 * bound.standard_error
        assert bound.standard_error < 0.2 * case.rate


def test_away_from_the_steady_state_the_bound_is_above_by_no_more_than_it_says() -> None:
    """A cloud that trebles over the lag: KL(p_{t+lag}‖p_t)/lag is 6.6 beside 8.4, and not 0: the guard."""
    start, lag = (np.zeros(2), 0.05 * np.eye(2)), 0.1
    nodes, weights = np.polynomial.legendre.leggauss(20)
    moments = [PLANE.moved(*start, lag * (node + 1) / 2) for node in nodes]
    truth = sum(w / 2 * PLANE.rate_of(*m) for w, m in zip(weights, moments, strict=True))
    change = PLANE.moved(*start, lag)[1] / 0.05
    divergence = (np.trace(change) - 2 - np.linalg.slogdet(change)[1]) / 2
    found = entropy_production_bound(*PLANE.sample(lag, 2, 20_000, seed=8, start=start)).rate
    assert truth + 4 * found.standard_error < found.value < truth + divergence / lag + 4 * found.standard_error


@pytest.mark.parametrize(("mean", "lag"), [(4.0, 0.5), (5.0, 0.5), (3.0, 1.0)])
def test_the_relation_at_a_long_lag_is_below_the_rate_of_a_relaxing_mean(mean: float, lag: float) -> None:
    # dx = −x dt + √2 dW from N(m, 1): σ = m², falling as e^{−2t}.
    rng = np.random.default_rng(0)
    kept = math.exp(-lag)
    x = mean + rng.normal(size=(4000, 1))
    y = kept * x + math.sqrt(1 - kept**2) * rng.normal(size=x.shape)
    truth = mean**2 * (1 - kept**2) / (2 * lag)
    found = entropy_production_bound(np.array([0.0, lag]), np.stack([x, y])).uncertainty_relation
    assert 0 < found.value < truth
    assert math.expm1(found.value * lag) / lag > truth  # what it says without the logarithm: the guard


def test_what_is_not_seen_lowers_the_bound() -> None:
    times, positions = TEN.sample(0.01, 101, 800, seed=3)
    whole = entropy_production_bound(times, positions).rate
    part = entropy_production_bound(times, positions[:, :, :4]).rate
    assert 0 < part.value < whole.value


def test_fitting_noise_does_not_raise_the_bound() -> None:
    """Equilibrium in ten dimensions: the same currents evaluated where they were fitted show 2B/𝒯 = 2.2."""
    equilibrium = Linear(np.diag(np.linspace(0.5, 2.0, 10)), np.eye(10))
    values, errors = [], []
    for seed in range(5):
        found = entropy_production_bound(*equilibrium.sample(0.01, 51, 200, seed=seed))
        assert found.currents == 110
        values.append(found.rate.value)
        errors.append(found.rate.standard_error)
    assert np.mean(values) < 4 * np.mean(errors) / math.sqrt(5)
    # What choosing costs, as the docstring says: 2.5·B/𝒯 = 2.75.
    assert np.mean(values) == pytest.approx(-2.75, abs=0.8 + 4 * np.mean(errors) / math.sqrt(5))


def test_the_error_of_the_bound_is_its_scatter() -> None:
    found = [entropy_production_bound(*PLANE.sample(0.05, 41, 100, seed=seed)).rate for seed in range(60)]
    deviation = np.std([e.value for e in found], ddof=1)
    stated = math.sqrt(np.mean([e.standard_error**2 for e in found]))
    assert stated == pytest.approx(deviation, rel=4 / math.sqrt(120))  # of a standard deviation of 60


@pytest.mark.parametrize(
    ("turn", "lag", "records", "replicas", "start"),
    [(5.0, 0.2, 3, 400, None), (1.0, 0.2, 2, 2000, (np.array([5.0, 0.0]), 0.3 * np.eye(2)))],
    ids=["steady", "far away"],
)
def test_at_a_long_lag_the_error_of_the_bound_knows_that_the_current_was_chosen(
    turn: float, lag: float, records: int, replicas: int, start: tuple[np.ndarray, np.ndarray] | None
) -> None:
    """10 nats per lag, where the error of a given current is 0.6 of the scatter; and a current mostly cut off."""
    system = rotating([turn], [1.0], 0.5)
    found = [entropy_production_bound(*system.sample(lag, records, replicas, s, start=start)).rate for s in range(100)]
    deviation = np.std([e.value for e in found], ddof=1)
    stated = math.sqrt(np.mean([e.standard_error**2 for e in found]))
    assert stated == pytest.approx(deviation, rel=4 / math.sqrt(200))  # of a standard deviation of 100


def test_no_single_pair_decides_the_bound_far_from_the_steady_state() -> None:
    """With no cut-off at the log of the number of pairs it reaches −10⁹."""
    start = np.array([3.0, 0.0]), 0.05 * np.eye(2)
    found = [entropy_production_bound(*PLANE.sample(0.3, 2, 2000, seed, start=start)).rate for seed in range(100)]
    assert min(e.value for e in found) > 0
    assert max(e.standard_error for e in found) < 20


def test_blocks_of_unequal_size_do_not_widen_the_error() -> None:
    samples = torch.arange(1.0, 9.0, dtype=torch.float64)
    found = _mean_of_blocks(3.0 * samples, samples, 0.5)  # every pair gives 3
    assert found.value == pytest.approx(6.0)
    assert found.standard_error == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize(("replicas", "blocks"), [(1, 40), (9, 45), (45, 40), (40, 40)])
def test_every_pair_is_in_one_of_the_blocks(replicas: int, blocks: int) -> None:
    positions = torch.randn(73, replicas, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = Pairs.of(torch.arange(73.0), positions, 2, 40)
    assert pairs.blocks == blocks
    x, y = (torch.cat([part.reshape(-1, 2) for part in side]) for side in zip(*pairs, strict=True))
    assert pairs.samples == len(x) == 71 * replicas
    both = torch.cat([positions[:-2], positions[2:]], 2).reshape(-1, 4)
    assert sorted(torch.cat([x, y], 1).tolist()) == sorted(both.tolist())


def test_the_jackknife_of_the_plain_variance_is_the_unbiased_one() -> None:
    x = torch.tensor([1.0, 4.0, -2.0, 0.5, 7.0], dtype=torch.float64)
    without = torch.stack([torch.cat([x[:r], x[r + 1 :]]).var(correction=0) for r in range(5)])
    assert jackknife(x.var(correction=0), without).value == pytest.approx(float(x.var()), rel=1e-14)


def test_the_pull_of_a_row_is_what_weighing_it_more_does() -> None:
    """Against a difference quotient of the optimal weights."""
    random = np.random.default_rng(0)
    rows = torch.from_numpy(random.standard_normal((9, 50, 4)) @ random.standard_normal((4, 4)) + 0.3)
    gradient = torch.from_numpy(random.standard_normal(4))
    moments = CurrentMoments(rows.sum(1), rows.mT @ rows, torch.full((9,), 50.0, dtype=torch.float64))
    step, slopes = 1e-5, []
    for row in range(9):
        ahead, behind = (
            CurrentMoments(*(part.sum(0) + way * step * part[row] for part in vars(moments).values())).optimal()[0]
            for way in (1, -1)
        )
        slopes.append(float(gradient @ (ahead - behind)) / (2 * step) * 450)
    # The quotient is off by step², and by rounding over step.
    np.testing.assert_allclose(moments.pull(gradient).numpy(), slopes, rtol=1e-7, atol=1e-7)


def test_correlated_samples_are_not_counted_as_independent() -> None:
    """One long trajectory sampled densely: blocks of time see what neighbours share."""
    found = [entropy_production_linear(*PLANE.sample(0.05, 4001, 1, seed=seed), lag=10) for seed in range(40)]
    deviation = np.std([e.value for e in found], ddof=1)
    stated = math.sqrt(np.mean([e.standard_error**2 for e in found]))
    assert stated == pytest.approx(deviation, rel=4 / math.sqrt(80))


# --- the linear rate


@pytest.mark.parametrize("system", [PLANE, TEN, chain(3)], ids=["plane", "ten", "chain"])
@pytest.mark.parametrize("lag", [0.05, 0.4])
def test_the_linear_rate_at_short_and_long_lags(system: Linear, lag: float) -> None:
    found = entropy_production_linear(*system.sample(lag, 101, 500, seed=4))
    assert found.value == pytest.approx(system.rate, abs=4 * found.standard_error)
    assert found.standard_error < 0.1 * system.rate


def test_the_jackknife_takes_the_bias_out() -> None:
    """Equilibrium, few samples: a plain quadratic form is 2·45/𝒯 too large, of 45 antisymmetric pairs."""
    equilibrium = Linear(np.eye(10), np.eye(10))
    found = [entropy_production_linear(*equilibrium.sample(0.1, 101, 40, seed=seed)) for seed in range(20)]
    bias = 2 * 45 / (4000 * 0.1)
    mean = np.mean([e.value for e in found])
    assert abs(mean) < 0.25 * bias
    assert np.mean([e.standard_error for e in found]) < bias


def test_the_jackknife_takes_the_bias_of_110_currents_out() -> None:
    """Equilibrium: evaluated where they were fitted they show 2B/𝒯, and more when extrapolated."""
    equilibrium = Linear(np.eye(10), np.eye(10))
    found = [
        entropy_production_polynomial(*equilibrium.sample(0.02, 52, 100, seed=seed), degree=1) for seed in range(10)
    ]
    assert abs(np.mean([e.value for e in found])) < 0.25 * 2 * 110 / (5000 * 0.02)


def test_linear_rates_of_a_relaxing_ensemble() -> None:
    start = np.array([2.0, 0.0]), np.diag([0.1, 0.8])
    times, positions = PLANE.sample(0.25, 5, 3000, seed=5, start=start)
    for k in range(4):
        nodes, weights = np.polynomial.legendre.leggauss(20)
        moments = [PLANE.moved(*start, times[k] + 0.25 * (n + 1) / 2) for n in nodes]
        truth = sum(w / 2 * PLANE.rate_of(*m) for w, m in zip(weights, moments, strict=True))
        window = times[k : k + 2], positions[k : k + 2]
        found = entropy_production_linear(*window, stationary=False)
        assert found.value == pytest.approx(truth, abs=4 * found.standard_error)
        assert found.standard_error < 0.1 * truth
    whole = entropy_production_linear(times, positions, stationary=False)
    singles = [
        entropy_production_linear(times[k : k + 2], positions[k : k + 2], stationary=False).value for k in range(4)
    ]
    assert whole.value == pytest.approx(np.mean(singles), rel=0.05)  # the same mean, the dynamics from all four


def test_one_window_in_which_the_rate_falls_to_a_sixth() -> None:
    """The mean of its two ends would be a third more."""
    start = np.array([3.0, 0.0]), np.diag([0.1, 0.8])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    moments = [PLANE.moved(*start, (node + 1) / 2) for node in nodes]
    truth = sum(w / 2 * PLANE.rate_of(*m) for w, m in zip(weights, moments, strict=True))
    ends = [PLANE.rate_of(*PLANE.moved(*start, time)) for time in (0.0, 1.0)]
    assert np.mean(ends) > 1.2 * truth
    found = entropy_production_linear(*PLANE.sample(1.0, 2, 20_000, seed=6, start=start), stationary=False)
    assert found.value == pytest.approx(truth, abs=4 * found.standard_error)
    assert found.standard_error < 0.04 * truth


# --- the polynomial rate


def test_the_polynomial_rate_of_a_quartic_whirl() -> None:
    start = WHIRL.start(1500, seed=0)
    data = euler(WHIRL.force, WHIRL.temperature, start, step=1e-3, lag=0.01, records=101, seed=1)
    found = entropy_production_polynomial(*data, degree=3)
    # The rest of second order in the lag, and Euler's step: 2 % of the rate.
    assert found.value == pytest.approx(WHIRL.rate, abs=4 * found.standard_error + 0.02 * WHIRL.rate)
    assert found.standard_error < 0.06 * WHIRL.rate


def test_the_polynomial_rate_extrapolates_the_lag() -> None:
    data = PLANE.sample(0.05, 101, 1500, seed=6)
    found, bound = entropy_production_polynomial(*data, degree=1), entropy_production_bound(*data)
    assert abs(found.value - PLANE.rate) < 4 * found.standard_error
    assert bound.uncertainty_relation.value < 0.95 * PLANE.rate


def ratio(time: float) -> float:
    """r(time) of the plane: J = x₁y₂ − x₂y₁ has mean 2sρ sin θ and variance 4s²ρ² sin²θ + 2s²(1 − ρ²)."""
    kept = math.exp(-2 * time)
    turned = 2 * kept * math.sin(time) ** 2
    return 2 * turned / (turned + 1 - kept) / time


@pytest.mark.parametrize(("lag", "rest"), [(0.05, 0.026), (0.2, 0.226), (0.3, 0.37)])
def test_the_polynomial_rates_error_holds_the_rest_of_second_order(lag: float, rest: float) -> None:
    once, twice = ratio(lag), ratio(2 * lag)
    assert PLANE.rate - (2 * once - twice) == pytest.approx(rest, rel=0.1)
    found = [entropy_production_polynomial(*PLANE.sample(lag, 51, 100, seed=s), degree=1) for s in range(20)]
    values = np.array([e.value for e in found])
    stated = np.array([e.standard_error for e in found])
    assert values.mean() == pytest.approx(2 * once - twice, abs=4 * values.std() / math.sqrt(20))
    # 20 draws at 0.9: fewer than 14 once in 400.
    assert (abs(values - PLANE.rate) < 2 * stated).sum() >= 14
    if lag > 0.1:
        assert (abs(values - PLANE.rate) < 2 * values.std()).sum() < 14, "the guard: their scatter does not cover"
        # And it is that of both parts; the scatter is known to 1/√40, and a fifth of the squares at most.
        assert stated.mean() == pytest.approx(math.hypot(values.std(), 2 * (once - twice) ** 2 / once), rel=0.15)


def test_replicas_at_rest_produce_nothing() -> None:
    data = np.arange(6.0), np.ones((6, 30, 2))
    assert entropy_production_polynomial(*data) == Estimate(0.0, 0.0)
    assert entropy_production_bound(*data).rate == Estimate(0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("lag", "degree"), [(0.02, 1), (0.05, 3), (0.1, 1), (0.2, 1), (0.3, 1)])
def test_how_often_the_polynomial_rate_is_covered(lag: float, degree: int) -> None:
    found = rates(lag, degree, draws=100, seed=1000)
    assert found["covered"] >= found["least"] == 81


# --- a relaxing quartic potential


def test_rates_of_a_relaxing_quartic() -> None:
    """p_t is no normal law, and the truth comes from the Fokker–Planck equation; one window of two records."""
    case = QuarticRelaxation(temperature=0.5, mean=1.2, deviation=0.3)
    random = np.random.default_rng(0)
    start = case.mean + case.deviation * random.standard_normal((40_000, 1))
    times, positions = euler(case.force, case.temperature, start, step=1e-3, lag=0.02, records=16, seed=1)
    truth = case.rates(times + 0.01)
    for k in (2, 14):
        window = times[k : k + 2], positions[k : k + 2]
        bound = entropy_production_bound(*window, degree=3).rate
        assert bound.value < truth[k] + 4 * bound.standard_error
        assert bound.value > 0.9 * truth[k] - 4 * bound.standard_error
        assert bound.standard_error < 0.08 * truth[k]
    pooled = entropy_production_bound(times, positions, degree=3).rate
    mean = truth[:15].mean()
    assert 0.7 * mean < pooled.value < mean + 4 * pooled.standard_error  # the rate falls by half: one w is less


# --- units


def test_the_rate_has_the_unit_of_inverse_time_and_no_length() -> None:
    times, positions = PLANE.sample(0.1, 51, 100, seed=7)
    turn = np.array([[1e3, 5.0], [0.0, 1e-3]])
    for estimate in (
        entropy_production_linear,
        lambda t, x: entropy_production_bound(t, x).rate,
        lambda t, x: entropy_production_polynomial(t, x, degree=2),
    ):
        plain, other = estimate(times, positions), estimate(60.0 * times, positions @ turn.T + 7.0)
        assert other.value == pytest.approx(plain.value / 60.0, rel=1e-5)  # the condition number is 1e6
        assert other.standard_error == pytest.approx(plain.standard_error / 60.0, rel=1e-4)


def test_far_from_the_origin_and_in_tiny_units_the_rates_are_the_same() -> None:
    times, positions = PLANE.sample(0.1, 51, 100, seed=7)
    for moved in (positions + 1e5, 1e-60 * positions):
        plain, other = (entropy_production_bound(times, x, degree=3) for x in (positions, moved))
        assert other.rate.value == pytest.approx(plain.rate.value, rel=1e-6)  # 1e5 of a float64 leaves 1e-11 of x
        assert other.rate.standard_error == pytest.approx(plain.rate.standard_error, rel=1e-6)


def test_a_coordinate_given_twice_changes_nothing() -> None:
    times, positions = PLANE.sample(0.05, 41, 200, seed=0)
    plain, twice = (entropy_production_bound(times, x) for x in (positions, np.concatenate([positions, positions], 2)))
    for name in ("rate", "uncertainty_relation"):
        a, b = getattr(plain, name), getattr(twice, name)
        assert b.value == pytest.approx(a.value, rel=1e-4)  # rounding through a singular matrix
        assert b.standard_error == pytest.approx(a.standard_error, rel=1e-4)
    assert "depends on others" in entropy_production_linear(times, np.concatenate([positions, positions], 2)).reason


def test_samples_taken_in_parts_are_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    data = PLANE.sample(0.1, 51, 100, seed=7)
    estimates = (lambda: entropy_production_bound(*data).rate, lambda: entropy_production_polynomial(*data, degree=1))
    whole = [estimate() for estimate in estimates]
    monkeypatch.setattr(currents_room, "_VALUES", 200)  # 33 pairs of 6 currents, a block has 125
    for before, estimate in zip(whole, estimates, strict=True):
        assert estimate().value == pytest.approx(before.value, rel=1e-9)
        assert estimate().standard_error == pytest.approx(before.standard_error, rel=1e-9)


def test_tensors_arrays_and_float32_agree() -> None:
    times, positions = PLANE.sample(0.1, 51, 100, seed=7)
    plain = entropy_production_linear(times, positions).value
    tensors = torch.from_numpy(times), torch.from_numpy(positions)
    assert entropy_production_linear(*tensors).value == plain
    assert entropy_production_linear(times, positions.astype(np.float32)).value == pytest.approx(plain, rel=1e-5)


# --- the matrix logarithm


@pytest.mark.parametrize("d", [1, 2, 5, 12])
@pytest.mark.parametrize("size", [0.01, 0.5, 2.0])
def test_the_logarithm_is_scipys(d: int, size: float) -> None:
    random = np.random.default_rng(d)
    matrices = np.eye(d) + size * random.standard_normal((6, d, d)) / math.sqrt(d)
    matrices = np.stack([m @ m.T + 0.3 * (m - m.T) for m in matrices])
    found = logarithm(torch.from_numpy(matrices)).numpy()
    for ours, matrix in zip(found, matrices, strict=True):
        # The condition of the matrices is up to 1e5.
        np.testing.assert_allclose(ours, logm(matrix).real, atol=1e-9)


@pytest.mark.parametrize("size", [0.15, 0.3, 0.6, 3.0, 14.0])
def test_the_logarithm_undoes_the_exponential(size: float) -> None:
    random = np.random.default_rng(0)
    turned = np.linalg.qr(random.standard_normal((50, 4, 4)))[0]
    exponents = turned @ np.diag([size, -size, 0.3 * size, 0.0]) @ turned.swapaxes(1, 2)
    matrices = turned @ np.diag(np.exp([size, -size, 0.3 * size, 0.0])) @ turned.swapaxes(1, 2)
    # Rounding, and that of the largest eigenvalue seen from the smallest one.
    tolerance = 1e-14 + 1e-15 * math.exp(2 * size)
    np.testing.assert_allclose(logarithm(torch.from_numpy(matrices)).numpy(), exponents, rtol=0, atol=tolerance)
    larger = logarithm(torch.from_numpy(1e6 * matrices)).numpy() - math.log(1e6) * np.eye(4)
    np.testing.assert_allclose(larger, exponents, rtol=0, atol=10 * tolerance)


def test_a_negative_eigenvalue_has_no_logarithm() -> None:
    matrices = torch.stack([torch.diag(torch.tensor([-1.0, 2.0])), torch.diag(torch.tensor([1.0, math.e]))]).double()
    found = logarithm(matrices)
    assert bool(torch.isnan(found[0]).all())
    torch.testing.assert_close(found[1], torch.diag(torch.tensor([0.0, 1.0])).double(), atol=1e-7, rtol=0)


# --- what cannot be told


def test_too_little_is_nan_with_a_reason() -> None:
    times, positions = PLANE.sample(0.1, 3, 3, seed=0)
    for estimate in (entropy_production_linear, entropy_production_polynomial):
        assert "and 8 are needed to see their scatter" in estimate(times, positions).reason
    times, positions = TEN.sample(0.1, 3, 20, seed=0)
    assert (
        "40 samples cannot choose among 110 currents, 551 can" in entropy_production_bound(times, positions).rate.reason
    )
    assert "20 replicas cannot show" in entropy_production_linear(times, positions, stationary=False).reason
    assert math.isnan(entropy_production_bound(times, positions).uncertainty_relation.value)


def test_a_lag_too_long_is_nan_with_a_reason() -> None:
    """After thirty relaxation times the propagator is noise, and its logarithm would be a plausible number."""
    for stationary in (True, False):
        for seed in range(10):
            data = PLANE.sample(30.0, 5, 300, seed=seed)
            found = entropy_production_linear(*data, stationary=stationary)
            assert math.isnan(found.value)
            assert "would be told from noise: shorten the lag" in found.reason
    assert entropy_production_linear(*PLANE.sample(0.5, 5, 300, seed=0)).reason == ""


@pytest.mark.parametrize(
    ("growth", "turn", "noise", "stationary"),
    # A cloud that grows is in no steady state; and no steady noise is narrow after a turn of 1.2 per lag.
    [(1.3, 0.2, [0.1, 0.1], True), (0.95, 1.2, [0.3, 1e-3], False)],
    ids=["growing", "narrow"],
)
def test_noise_that_no_diffusion_makes_is_nan(growth: float, turn: float, noise: list[float], stationary: bool) -> None:
    random = np.random.default_rng(0)
    start = random.standard_normal((400, 2))
    turned = growth * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    end = start @ turned.T + random.standard_normal((400, 2)) * noise
    found = entropy_production_linear(np.arange(2.0), np.stack([start, end]), stationary=stationary)
    assert math.isnan(found.value)
    assert "the noise found is not positive" in found.reason


def test_times_are_not_cut_apart_where_each_has_its_own_distribution() -> None:
    """Fewer replicas than blocks: each is a block."""
    start = np.array([2.0, 0.0]), np.diag([0.1, 0.8])
    times, positions = PLANE.sample(0.1, 4, 30, seed=5, start=start)
    few, many = (entropy_production_linear(times, positions, stationary=False, blocks=b) for b in (30, 40))
    assert many == few
    assert many.value > 0


def test_a_coordinate_at_rest_is_named_by_the_linear_rate_and_ignored_by_the_bound() -> None:
    times, positions = PLANE.sample(0.05, 41, 200, seed=0)
    resting = np.concatenate([positions, np.ones_like(positions[:, :, :1])], 2)
    assert "leave it out" in entropy_production_linear(times, resting).reason
    plain, more = (entropy_production_bound(times, x).rate.value for x in (positions, resting))
    assert more == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"times": np.array([0.0, 1.0, 3.0])}, ValueError, r"equally spaced, got steps from 1 to 2; take a window"),
        ({"lag": 3}, ValueError, "lag must be below the number of records, 3, got 3"),
        ({"lag": 0}, ValueError, "lag must be a whole number of at least 1, got 0"),
        ({"blocks": 2}, ValueError, "blocks must be a whole number of at least 8, got 2"),
        ({"positions": np.ones((3, 4, 1), dtype=int)}, TypeError, "positions must be a tensor or array"),
    ],
    ids=str,
)
def test_bad_input_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"times": np.arange(3.0), "positions": np.random.default_rng(0).standard_normal((3, 4, 1))}
    for estimate in (entropy_production_bound, entropy_production_linear):
        with pytest.raises(error, match=message):
            estimate(**(good | changed))


def test_bad_settings_of_the_bound_are_named() -> None:
    times, positions = TEN.sample(0.1, 3, 20, seed=0)
    with pytest.raises(ValueError, match=r"degree 4 in 10 dimensions makes 10010 currents, .* or project"):
        entropy_production_bound(times, positions, degree=4)
    with pytest.raises(ValueError, match="degree must be a whole number of at least 0, got -1"):
        entropy_production_bound(times, positions, degree=-1)
    with pytest.raises(ValueError, match="folds must be at most 8, got 9"):
        entropy_production_bound(times, positions, folds=9)
    with pytest.raises(ValueError, match="folds must be a whole number of at least 2, got 1"):
        entropy_production_bound(times, positions, folds=1)
    with pytest.raises(ValueError, match="lag must be below the number of records, 3, got 4"):
        entropy_production_polynomial(times, positions, lag=2)
