"""Langevin dynamics against its moments' equations in full matrices, decimal arithmetic, and its symmetries."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from theory_cases import diffuse, draw, exact_langevin, extrapolated

from lightning_speedlimit.theory import Curve, gradient_flow, langevin

# Twenty operations of 1.1e-16; where terms cancel, at most half of a value is lost, twice.
ROUNDING = 4e-14


def at(curve: Curve, index: int = 0) -> tuple[float, float, float]:
    return tuple(
        x.reshape(-1)[index].item() for x in (curve.wasserstein2_squared, curve.entropy_production, curve.efficiency)
    )


@pytest.mark.parametrize("heat", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("time", [0.05, 1.0])
def test_direct_integration(heat: float, time: float) -> None:
    # A minimum, a valley, a saddle; the matrices of the other route are not diagonal.
    curvature = torch.tensor([3.0, 0.4, 0.0, -0.8], dtype=torch.float64)
    mean, std = draw(1, 4), torch.tensor([0.5, 2.0, 0.7, 1.0], dtype=torch.float64)
    basis = torch.linalg.qr(draw(2, 4, 4)).Q
    hessian, cov = basis * curvature @ basis.T, basis * std.square() @ basis.T
    steps = (250, 500, 1000)  # h·time = 3 at most
    squared, work = extrapolated(lambda n: diffuse(hessian, basis @ mean, cov, heat, time, n), steps).tolist()
    curve = langevin(curvature, mean, std, heat, time)
    assert at(curve) == pytest.approx((squared, work, squared / (time * work)), rel=1e-6)


def test_wasserstein2_by_quantiles() -> None:
    # In one dimension W₂² = ∫ (F₀⁻¹ − F_t⁻¹)² du; h = 2, T = 0.5, t = 0.3.
    decay = math.exp(-0.6)
    end, start = norm(decay, math.sqrt(decay**2 * 4 + 0.25 * (1 - decay**2))), norm(1.0, 2.0)
    # In z = Φ⁻¹(u), where the integrand is smooth.
    expected, _ = quad(lambda z: (start.ppf(norm.cdf(z)) - end.ppf(norm.cdf(z))) ** 2 * norm.pdf(z), -8, 8)
    squared = at(langevin(2.0, 1.0, 2.0, 0.5, 0.3))[0]
    assert squared == pytest.approx(expected, rel=1e-6)  # quadrature; beyond 8 sigma lies 1e-14


# h s_0² over T on both sides of every branch; 1 ± 2⁻²⁰ is near equilibrium, and its square is exact.
BALANCES = [1e-9, 0.3, 0.6, 1 - 2.0**-20, 1.0, 1 + 2.0**-20, 1.3, 1.5, 50.0, 1e9]


@pytest.mark.parametrize("std", BALANCES)
@pytest.mark.parametrize("time", [1e-100, 1e-9, 1e-3, 0.25, 1.0, 6.0, 100.0])
@pytest.mark.parametrize("h", [1.0, -1.0, 0.0, 4.0])
def test_accuracy(h: float, time: float, std: float) -> None:
    expected = exact_langevin(h, 0.0, std, 1.0, time)
    squared, production, efficiency = at(langevin(h, 0.0, std, 1.0, time))
    if expected[1] == 0:  # in equilibrium
        assert (squared, production) == (0, 0)
        assert math.isnan(efficiency)
        return
    assert squared == pytest.approx(expected[0], rel=ROUNDING, abs=0)
    assert production == pytest.approx(expected[1], rel=ROUNDING, abs=0)
    assert efficiency == pytest.approx(expected[2], rel=ROUNDING, abs=0)


@pytest.mark.parametrize("heat", [0.0, 1e-12, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("time", [1e-6, 0.5, 20.0])
def test_accuracy_with_a_mean(heat: float, time: float) -> None:
    expected = exact_langevin(1.5, -2.0, 0.8, heat, time)
    assert at(langevin(1.5, -2.0, 0.8, heat, time)) == pytest.approx(expected, rel=ROUNDING, abs=0)


def test_from_the_equilibrium_variance_it_is_tanh() -> None:
    # Only the mean moves, at constant variance T/h: THEORY §5.
    z = torch.logspace(-8, 3, 50, dtype=torch.float64)
    expected = torch.tanh(z / 2) / (z / 2)
    curve = langevin(4.0, 3.0, 0.5, 1.0, z / 4)
    torch.testing.assert_close(curve.efficiency, expected, rtol=ROUNDING, atol=0)


def test_starts_with_efficiency_one() -> None:
    curve = langevin([2.0, 0.0, -1.0], [1.0, 0.0, 0.3], [0.1, 0.2, 3.0], 0.7, [0.0, 1e-12])
    assert at(curve, 0) == (0.0, 0.0, pytest.approx(1.0, rel=ROUNDING))
    assert curve.efficiency[1].item() == pytest.approx(1.0, abs=1e-9)  # falls by some h t, with (T/s²) ~ 1e2


def test_temperature_zero_is_gradient_flow() -> None:
    h, m, times = draw(0, 6).square(), draw(1, 6), torch.logspace(-4, 3, 9, dtype=torch.float64)
    cold, flow = langevin(h, m, 0.0, 0.0, times), gradient_flow(h, h.sqrt() * m, times)
    for name in ("wasserstein2_squared", "entropy_production", "efficiency"):
        torch.testing.assert_close(getattr(cold, name), getattr(flow, name), rtol=ROUNDING, atol=0)


def test_tends_to_gradient_flow_as_the_temperature_falls() -> None:
    h, m, s, times = draw(0, 6).square(), draw(1, 6), 0.3, torch.tensor([0.1, 1.0, 10.0])
    cold = langevin(h, m, s, 0.0, times).efficiency
    errors = [(langevin(h, m, s, 100.0**-k, times).efficiency - cold).abs().max().item() for k in range(1, 7)]
    # The width that is left in the end is √(T/h): each error is a tenth of the one before, at small T.
    assert all(late < early / 5 for early, late in pairwise(errors[1:])), errors
    assert errors[-1] < 1e-5


def test_long_after_it_is_boltzmann() -> None:
    # F_0 − F_∞ = T·KL(p_0‖Boltzmann): here h = 2, T = 0.5, v_∞ = 1/4, m_0 = 1, s_0 = 3.
    kl = 0.5 * (9 / 0.25 - 1 - math.log(9 / 0.25)) + 0.5 * 1 / 0.25
    squared, production, efficiency = at(langevin(2.0, 1.0, 3.0, 0.5, 1e3))
    assert production == pytest.approx(0.5 * kl, rel=ROUNDING)
    assert squared == pytest.approx(1 + (3 - 0.5) ** 2, rel=ROUNDING)
    assert efficiency == pytest.approx(squared / (1e3 * production), rel=ROUNDING, abs=0)


def test_a_point_at_positive_temperature_produces_infinite_entropy() -> None:
    curve = langevin([1.0, 2.0], [1.0, 1.0], [0.0, 1.0], 0.5, [0.0, 1e-9, 1.0, 100.0])
    assert curve.entropy_production.tolist() == [0.0, math.inf, math.inf, math.inf]
    assert curve.efficiency.tolist() == [0.0] * 4
    # Its W₂² is finite: (1 − e^{−t})² and v_t for the first, with the second mode by §5.
    first = (1 - math.exp(-1)) ** 2 + 0.5 * (1 - math.exp(-2))
    second = exact_langevin(2.0, 1.0, 1.0, 0.5, 1.0)[0]
    assert curve.wasserstein2_squared[2].item() == pytest.approx(first + second, rel=ROUNDING)


@pytest.mark.parametrize("time", [1e160, 1e300])
def test_an_age_after_it_is_boltzmann(time: float) -> None:
    # As above with h = 2, T = 0.5, m_0 = 1, s_0 = 3; and one that diffuses freely: v = s_0² + 2Tt ≫ s_0².
    kl = 0.5 * (9 / 0.25 - 1 - math.log(9 / 0.25)) + 0.5 * 1 / 0.25
    squared = 1 + (3 - 0.5) ** 2
    expected = (squared, 0.5 * kl, squared / (0.5 * kl) / time)
    assert at(langevin(2.0, 1.0, 3.0, 0.5, time)) == pytest.approx(expected, rel=ROUNDING, abs=0)
    production = 0.5 * 0.5 * (math.log(time) - math.log(9))
    expected = (time, production, 1 / production)
    assert at(langevin(0.0, 1.0, 3.0, 0.5, time)) == pytest.approx(expected, rel=ROUNDING, abs=0)


@pytest.mark.parametrize("std", [1e-100, 1e-155, 1e-160, 1e-200])
def test_a_narrow_start_is_no_point(std: float) -> None:
    # v − s_0² = 2Tt beside which s_0² is nothing (or below the smallest float64): Q = ½ T ln(2Tt/s_0²).
    for time in (1e-12, 1.0, 1e9):
        heat = 0.5
        production = heat * (0.5 * math.log(2 * heat * time) - math.log(std))
        expected = (2 * heat * time, production, 2 * heat / production)
        assert at(langevin(0.0, 0.0, std, heat, time)) == pytest.approx(expected, rel=ROUNDING, abs=0)


@pytest.mark.parametrize("heat", [5e-324, 1e-310, 1e-300])
def test_tiny_temperatures_are_gradient_flow(heat: float) -> None:
    for h, time in ((3.0, 1e3), (1e10, 1.0), (3.0, 0.2)):
        expected = at(langevin(h, 2.0, 0.5, 0.0, time))
        assert at(langevin(h, 2.0, 0.5, heat, time)) == pytest.approx(expected, rel=ROUNDING, abs=0)


def test_a_steep_potential() -> None:
    # h² is above the largest float64; all is over at once: W₂² = m² + s², Q = ½ h (m² + s²).
    found = at(langevin(1e200, 2.0, 0.5, 0.0, [1e-3, 1.0]), 1)
    assert found == pytest.approx((4.25, 0.5e200 * 4.25, 2e-200), rel=ROUNDING, abs=0)


def test_rest_on_a_maximum_is_rest() -> None:
    # Where e^{−ht} overflows too: the second mode has nothing to run away with.
    times = [0.0, 0.5, 400.0, 800.0]
    alone, both = langevin(1.0, 1.0, 0.5, 0.0, times), langevin([1.0, -1.0], [1.0, 0.0], [0.5, 0.0], 0.0, times)
    for name in ("wasserstein2_squared", "entropy_production", "efficiency"):
        assert torch.equal(getattr(both, name), getattr(alone, name))


def test_nan_where_nothing_moves_or_overflows() -> None:
    assert langevin(2.0, 0.0, 0.5, 0.5, [0.0, 1.0]).efficiency.isnan().all()  # equilibrium
    assert langevin([0.0, 1.0], [5.0, 0.0], [1.0, 0.0], 0.0, [0.0, 1.0]).efficiency.isnan().all()
    assert langevin(-1.0, 1.0, 1.0, 1.0, 1e4).efficiency.isnan()
    assert not langevin(-1.0, 1.0, 1.0, 1.0, 300.0).efficiency.isnan()


# --- properties -------------------------------------------------------------------------------------------

modes = st.lists(
    st.tuples(
        st.sampled_from([0.0, -1.0, 1.0]).flatmap(lambda s: st.floats(-4, 2).map(lambda e: s * 10.0**e)),
        st.floats(-10, 10),
        st.just(0.0) | st.floats(-4, 3).map(lambda e: 10.0**e),
    ),
    min_size=1,
    max_size=6,
).map(lambda rows: torch.tensor(rows, dtype=torch.float64).T)
heats = st.just(0.0) | st.floats(-4, 3).map(lambda e: 10.0**e)
times = st.just(0.0) | st.floats(-8, 0.3).map(lambda e: 10.0**e)  # h t ≥ −200


def near_equilibrium(mode: torch.Tensor, heat: float) -> bool:
    """Whether T − h s² loses digits: W₂² and Q then carry them, and only their ratio does not."""
    balance = mode[0] * mode[2].square()
    return bool(((balance - heat).abs() < 1e-3 * heat).any())


@given(modes, heats, times)
def test_efficiency_is_a_share(mode: torch.Tensor, heat: float, time: float) -> None:
    squared, production, efficiency = at(langevin(*mode, heat, time))
    assert squared >= 0
    assert production >= 0
    if not math.isnan(efficiency):
        assert efficiency <= 1 + ROUNDING


@given(modes, heats, times, st.integers(-8, 8), st.integers(-4, 4))
def test_scaling(mode: torch.Tensor, heat: float, time: float, loss: int, length: int) -> None:
    # L → sL, T → sT at t/s, and x → cx, h → h/c²: W₂² → c² W₂², Q → s Q. Powers of two: no rounding is added.
    s, c = 2.0**loss, 2.0**length
    squared, production, efficiency = at(langevin(*mode, heat, time))
    h, m, std = mode
    scaled = at(langevin(s / c**2 * h, c * m, c * std, s * heat, time * c**2 / s))
    expected = (c**2 * squared, s * production, efficiency)
    assert scaled == pytest.approx(expected, rel=ROUNDING, abs=1e-250, nan_ok=True)


@given(modes, modes, heats, times)
def test_modes_add(a: torch.Tensor, b: torch.Tensor, heat: float, time: float) -> None:
    together = at(langevin(*torch.cat([a, b], 1), heat, time))
    apart = [at(langevin(*mode, heat, time)) for mode in (a, b)]
    for which in (0, 1):
        assert together[which] == pytest.approx(apart[0][which] + apart[1][which], rel=ROUNDING, abs=0)


@given(modes, heats, times)
def test_order_of_modes_does_not_matter(mode: torch.Tensor, heat: float, time: float) -> None:
    expected = at(langevin(*mode, heat, time))
    assert at(langevin(*mode.flip(1), heat, time)) == pytest.approx(expected, rel=ROUNDING, abs=0, nan_ok=True)


@given(modes, heats, times, times)
def test_entropy_production_adds_over_time(mode: torch.Tensor, heat: float, first: float, second: float) -> None:
    # The state at the end of the first stretch is the start of the second. Within 1e-3 of equilibrium the
    # restart's rounding, 1e-16/1e-3, would be all that is seen.
    h, m, s = mode
    if near_equilibrium(mode, heat) or (heat > 0 and (s == 0).any()):
        return
    decay = torch.exp(-h * first)
    gained = torch.where(h == 0, 2 * first, -torch.expm1(-2 * h * first) / h)
    middle = (h, m * decay, (s.square() * decay.square() + heat * gained).sqrt())
    if near_equilibrium(torch.stack(middle), heat):
        return
    whole = at(langevin(*mode, heat, first + second))[1]
    parts = at(langevin(*mode, heat, first))[1] + at(langevin(*middle, heat, second))[1]
    assert parts == pytest.approx(whole, rel=1e-9, abs=0)
