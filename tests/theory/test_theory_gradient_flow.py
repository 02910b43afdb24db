"""Gradient flow against gradient descent with ever smaller steps, decimal arithmetic, and its own symmetries."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from theory_cases import descend, draw, exact_flow, extrapolated
from torch import Tensor

from lightning_speedlimit.theory import Curve, gradient_flow, langevin, power_law, split_initial

# Ten operations per mode of 1.1e-16 each, sums of up to 8 modes.
ROUNDING = 1e-14


def at(curve: Curve, index: int = 0) -> tuple[float, float, float]:
    return tuple(
        x.reshape(-1)[index].item() for x in (curve.wasserstein2_squared, curve.entropy_production, curve.efficiency)
    )


@pytest.mark.parametrize(("data", "parameters"), [(5, 9), (9, 5)], ids=["wide", "tall"])
@pytest.mark.parametrize("time", [0.02, 0.5, 3.0])
def test_direct_integration(data: int, parameters: int, time: float) -> None:
    jacobian, targets, start = 0.4 * draw(1, data, parameters), draw(2, data), draw(3, parameters)
    squared, work = extrapolated(lambda steps: descend(jacobian, targets, start, time, steps)).tolist()
    eigenvalues, basis = torch.linalg.eigh(jacobian @ jacobian.T)
    residual = basis.T @ (jacobian @ start - targets)
    curve = gradient_flow(eigenvalues.clamp(min=0), residual, time)
    assert at(curve) == pytest.approx((squared, work, squared / (time * work)), rel=1e-6)


@pytest.mark.parametrize("x", [1e-300, 1e-12, 1e-8, 1e-3, 0.5, 1.0, 5.0, 50.0, 1e3, 1e5, 1e160, 1e300])
def test_accuracy_from_zero_to_infinity(x: float) -> None:
    # λ from 2⁻²⁰ to 2³ around λt = x; the last mode never moves.
    eigenvalues, residual = [2.0**-20, 0.25, 1.0, 8.0, 0.0], [3.0, -1.5, 0.5, 1e-3, 7.0]
    expected = exact_flow(eigenvalues, residual, x)
    squared, drop, efficiency = at(gradient_flow(eigenvalues, residual, x))
    assert efficiency == pytest.approx(expected[2], rel=ROUNDING, abs=0)
    if x > 1e-100:  # else its square is below the smallest float64
        assert squared == pytest.approx(expected[0], rel=ROUNDING, abs=0)
    assert drop == pytest.approx(expected[1], rel=ROUNDING, abs=0)


@pytest.mark.parametrize(
    ("eigenvalue", "time", "squared", "drop", "efficiency"),
    [  # r = 3. λt → 0: λt²r², λtr², 1; λt → ∞: r²/λ, r²/2, 2/(λt).
        (1e-300, 1e200, 9e100, 9e-100, 1.0),
        (1e-300, 1e280, 9e260, 9e-20, 1.0),
        (1e-150, 1e300, 9e150, 4.5, 2e-150),
        (1e300, 1e-200, 9e-300, 4.5, 2e-100),
        (1e200, 1e-300, 0.0, 9e-100, 1.0),  # W₂² = 9e-400
        (1e200, 1e200, 9e-200, 4.5, 0.0),  # η = 2e-400
        (5e-324, 1.0, 9 * 5e-324, 9 * 5e-324, 1.0),
    ],
)
def test_extreme_eigenvalues_and_times(
    eigenvalue: float, time: float, squared: float, drop: float, efficiency: float
) -> None:
    found = at(gradient_flow([eigenvalue], [3.0], time))
    assert found == pytest.approx((squared, drop, efficiency), rel=ROUNDING, abs=0)


def test_large_residuals_at_extremes() -> None:
    # λ r² and t Q are above the largest float64; r²/λ, r²/2 and 2/(λt) are not.
    assert at(gradient_flow(1e300, 1e10, 1.0)) == pytest.approx((1e-280, 0.5e20, 2e-300), rel=ROUNDING, abs=0)
    assert at(gradient_flow(1.0, 1e50, 1e250)) == pytest.approx((1e100, 0.5e100, 2e-250), rel=ROUNDING, abs=0)


def test_single_mode_is_tanh() -> None:
    z = torch.logspace(-10, 4, 60, dtype=torch.float64)
    expected = torch.tanh(z / 2) / (z / 2)
    torch.testing.assert_close(gradient_flow([3.0], [0.7], z / 3).efficiency, expected, rtol=ROUNDING, atol=0)


def test_limits() -> None:
    curve = gradient_flow([0.5, 2.0], [1.0, 3.0], [0.0, 1e6])
    assert at(curve, 0) == (0.0, 0.0, 1.0)
    # At the end: Σ r²/λ and ½ Σ r².
    squared, drop = 1 / 0.5 + 9 / 2, (1 + 9) / 2
    assert at(curve, 1) == pytest.approx((squared, drop, squared / (1e6 * drop)), rel=ROUNDING, abs=0)


def test_zero_modes_stay() -> None:
    times = torch.logspace(-3, 6, 10, dtype=torch.float64)
    without, with_zeros = gradient_flow([1.0], [2.0], times), gradient_flow([1.0, 0.0, 0.0], [2.0, 5.0, -1e9], times)
    for name in ("wasserstein2_squared", "entropy_production", "efficiency"):
        torch.testing.assert_close(getattr(with_zeros, name), getattr(without, name), rtol=0, atol=0)


def test_nan_where_nothing_moves() -> None:
    curve = gradient_flow([1.0, 0.0], [0.0, 4.0], [0.0, 1.0])
    assert curve.wasserstein2_squared.tolist() == curve.entropy_production.tolist() == [0.0, 0.0]
    assert curve.efficiency.isnan().all()


def test_shape_type_and_graph() -> None:
    eigenvalues = torch.ones(3, dtype=torch.float32, requires_grad=True)
    times = torch.rand(2, 3, 4)
    curve = gradient_flow(eigenvalues, 1.0, times)
    for x in (curve.time, curve.wasserstein2_squared, curve.entropy_production, curve.efficiency):
        assert x.shape == times.shape
        assert x.dtype == torch.float64
        assert not x.requires_grad
    assert gradient_flow(1.0, 1.0, 0.5).efficiency.shape == ()
    with pytest.raises(AttributeError, match="cannot assign"):
        curve.time = times


@pytest.mark.gpu
def test_all_follow_the_first_argument_to_its_device() -> None:
    eigenvalues, residual, times = draw(0, 3).square(), draw(1, 3), draw(2, 4).square()
    for function, rest in ((gradient_flow, ()), (langevin, (0.5, 0.7)), (split_initial, (draw(3, 3),))):
        expected = function(eigenvalues, residual, *rest, times)
        found = function(eigenvalues.cuda(), residual, *rest, times)
        if function is split_initial:
            torch.testing.assert_close(found.entropy_production.cpu(), expected.entropy_production)
            expected, found = expected.actual, found.actual
        assert found.efficiency.is_cuda
        torch.testing.assert_close(found.efficiency.cpu(), expected.efficiency)
    assert power_law(1.5, 0.5, 10, times.cuda()).efficiency.is_cuda


def test_the_curve_keeps_its_times() -> None:
    times = torch.ones(2, dtype=torch.float64)
    curve = gradient_flow(1.0, 1.0, times)
    times += 1
    assert curve.time.tolist() == [1.0, 1.0]


# --- properties -------------------------------------------------------------------------------------------


def magnitudes(low: int, high: int) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


modes = st.lists(
    st.tuples(st.just(0.0) | magnitudes(-12, 6), st.just(0.0) | magnitudes(-6, 6)), min_size=1, max_size=8
).map(lambda pairs: torch.tensor(pairs, dtype=torch.float64).T)
times = st.just(0.0) | magnitudes(-12, 12)


@given(modes, times)
def test_efficiency_is_a_share(mode: Tensor, time: float) -> None:
    efficiency = at(gradient_flow(*mode, time))[2]
    if (mode[0] * mode[1]).any():
        assert 0 <= efficiency <= 1 + ROUNDING
    else:
        assert math.isnan(efficiency)


@given(modes, times, magnitudes(-6, 6))
def test_scaling(mode: Tensor, time: float, scale: float) -> None:
    # λ → sλ at t/s: the same path in a shorter time, W₂² smaller by s.
    assume((mode[0] * mode[1]).any())
    squared, drop, efficiency = at(gradient_flow(*mode, time))
    scaled = at(gradient_flow(scale * mode[0], mode[1], time / scale))
    assert scaled == pytest.approx((squared / scale, drop, efficiency), rel=ROUNDING, abs=0)


@given(modes, modes, times)
def test_modes_add(a: Tensor, b: Tensor, time: float) -> None:
    together = at(gradient_flow(*torch.cat([a, b], 1), time))
    apart = [at(gradient_flow(*mode, time)) for mode in (a, b)]
    for which in (0, 1):
        assert together[which] == pytest.approx(apart[0][which] + apart[1][which], rel=ROUNDING, abs=0)


@given(modes, times, st.randoms(use_true_random=False))
def test_order_of_modes_does_not_matter(mode: Tensor, time: float, random: object) -> None:
    order = list(range(mode.shape[1]))
    random.shuffle(order)
    expected = at(gradient_flow(*mode, time))
    assert at(gradient_flow(*mode[:, order], time)) == pytest.approx(expected, rel=ROUNDING, abs=0, nan_ok=True)


def test_blocks_of_modes_do_not_matter() -> None:
    # 300 modes × 5000 times are two blocks; each time alone is one.
    eigenvalues, residual = draw(0, 300).square(), draw(1, 300)
    times = torch.logspace(-3, 3, 5000, dtype=torch.float64)
    many = gradient_flow(eigenvalues, residual, times)
    for index in (0, 2500, 4999):
        alone = at(gradient_flow(eigenvalues, residual, times[index]))
        assert at(many, index) == pytest.approx(alone, rel=1e-13)  # sums of 300


def test_more_times_than_a_block_holds() -> None:
    times = torch.linspace(0, 3, 2**20 + 1, dtype=torch.float64)
    many = gradient_flow([1.0, 0.3], [0.5, 2.0], times)
    assert at(many, -1) == pytest.approx(at(gradient_flow([1.0, 0.3], [0.5, 2.0], 3.0)), rel=ROUNDING)
