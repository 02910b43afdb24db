"""Power-law spectra: THEORY §6's figures, and slopes that tend to its exponents."""

import math
from itertools import pairwise

import pytest
import torch
from theory_cases import LargestTensor, descend, extrapolated

from lightning_speedlimit.theory import gradient_flow, power_law, power_law_exponent

DECADES = 10.0 ** torch.arange(2, 7, dtype=torch.float64)
MODES = 10**6


def slopes(a: float, b: float, times: torch.Tensor, modes: int = MODES) -> list[float]:
    """d ln η/d ln t between neighbouring times."""
    efficiency = power_law(a, b, modes, times).efficiency
    return (efficiency.log().diff() / times.log().diff()).tolist()


@pytest.mark.parametrize(
    ("a", "b", "measured", "digits"),
    [(1.5, 0.5, -0.005, 3), (1.5, 1.5, -0.339, 3), (1.2, 2.0, -0.80, 2), (1.5, 3.0, -0.99, 2)],
)
def test_the_figures_of_the_theory(a: float, b: float, measured: float, digits: int) -> None:
    (slope,) = slopes(a, b, torch.tensor([1e4, 1e5], dtype=torch.float64))
    assert round(slope, digits) == measured


# One decade after another, as far as 1 ≪ t ≪ P^a goes. The last of (1.2, 2) from 1e5 to 1e6, P^a = 1.6e7.
@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(1.5, 0.5, 0.0), (1.5, 1.5, -1 / 3), (1.2, 2.0, -5 / 6), (1.5, 3.0, -1.0), (2.0, 2.0, -1 / 2)],
)
def test_slopes_tend_to_the_exponents(a: float, b: float, expected: float) -> None:
    assert abs(b - 1) >= 0.5
    distances = [abs(slope - expected) for slope in slopes(a, b, DECADES)]
    assert all(late < early for early, late in pairwise(distances)), distances
    assert distances[-1] < 0.03, distances
    assert power_law_exponent(a, b) == pytest.approx(expected, rel=1e-15)


def test_logarithms_on_the_boundaries() -> None:
    # b = 1: η ~ 1/ln t, slope −1/ln t; b = 1 + a: η ~ ln t/t, slope −1 + 1/ln t, both up to the constant beside
    # ln t: 1/slope is a line of ln t with slope 1 (one more decade adds ln 10, to the 5 % of corrections ~ t^{-1/a}).
    for b, sign in ((1.0, -1), (2.5, 1)):
        offsets = [sign / (slope - power_law_exponent(1.5, b)) for slope in slopes(1.5, b, DECADES)]
        assert offsets[-1] - offsets[-2] == pytest.approx(math.log(10), rel=0.05)


def test_is_gradient_flow_on_that_spectrum() -> None:
    k = torch.arange(1, 2001, dtype=torch.float64)
    times = torch.tensor([[0.0, 0.5], [30.0, 1e4]], dtype=torch.float64)
    curve, direct = power_law(1.3, 0.7, 2000, times), gradient_flow(k**-1.3, k**-0.35, times)
    for name in ("time", "wasserstein2_squared", "entropy_production", "efficiency"):
        torch.testing.assert_close(getattr(curve, name), getattr(direct, name), rtol=1e-12, atol=0)  # sums of 2000


def test_direct_integration() -> None:
    # λ = k^{−1.2}, r² = k^{−0.6} as the diagonal of a Jacobian and the targets from θ = 0.
    k = torch.arange(1, 41, dtype=torch.float64)
    jacobian, targets, time = torch.diag(k**-0.6), k**-0.3, 4.0
    squared, work = extrapolated(lambda n: descend(jacobian, targets, torch.zeros_like(k), time, n)).tolist()
    curve = power_law(1.2, 0.6, 40, [0.0, time])
    found = (curve.wasserstein2_squared[1], curve.entropy_production[1], curve.efficiency[1])
    assert found == pytest.approx((squared, work, squared / (time * work)), rel=1e-6)
    assert curve.efficiency[0].item() == pytest.approx(1, rel=1e-14)  # two sums of 40


def test_nan_only_where_the_residual_overflows() -> None:
    assert power_law(1.0, -200.0, 10, [0.0, 1.0]).efficiency.isfinite().all()
    assert power_law(1.0, -400.0, 10, [0.0, 1.0]).efficiency.isnan().all()  # 10⁴⁰⁰


def test_exponent_by_region() -> None:
    assert power_law_exponent(1.5, 0.2) == power_law_exponent(1.5, 1.0) == 0
    assert power_law_exponent(2.0, 1.5) == -0.25
    assert power_law_exponent(2.0, 1.125) == -0.0625
    assert power_law_exponent(2.0, 3.0) == power_law_exponent(2.0, 3.5) == power_law_exponent(2.0, 7.0) == -1
    # Negative b: the labels grow with k; the kernel falls faster.
    assert power_law_exponent(3.0, -1.0) == 0
    with pytest.raises(ValueError, match=r"kernel_exponent \+ residual_exponent must be above 1, got 0.5 \+ 0.5"):
        power_law_exponent(0.5, 0.5)


def test_memory_stays_in_blocks() -> None:
    # 5·10⁴ modes × 500 times are 200 MB in one piece; no tensor is larger than a block of 8 MiB or the modes.
    with LargestTensor() as largest:
        power_law(1.5, 0.5, 50_000, torch.logspace(0, 3, 500))
    assert 2**22 < largest.bytes <= 2**23
