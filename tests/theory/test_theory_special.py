"""The quotients that are 0/0 at zero, against decimal arithmetic."""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from lightning_speedlimit.theory.special import log1p_ratio, log1p_remainder, relaxed

ROUNDING = 1e-15  # five operations of 1.1e-16, and the function's own last digit


def tensor(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("x", [-0.5, -0.3, -1e-3, -1e-9, -1e-200, 1e-300, 1e-12, 0.01, 0.5, 0.9, 1.0])
def test_logarithms(x: float) -> None:
    with localcontext() as context:
        context.prec = 700
        exact = Decimal(x)
        log = (1 + exact).ln()
        ratio, remainder = float(log / exact), float((exact - log) / exact**2)
    assert log1p_ratio(tensor(x)).item() == pytest.approx(ratio, rel=ROUNDING, abs=0)
    assert log1p_remainder(tensor(x)).item() == pytest.approx(remainder, rel=ROUNDING, abs=0)


def test_logarithms_at_zero() -> None:
    assert log1p_ratio(tensor(0.0)).item() == 1
    assert log1p_remainder(tensor(0.0)).item() == 0.5


@pytest.mark.parametrize("time", [1e-300, 1e-5, 0.7, 1.0, 3.0, 1e5])
@pytest.mark.parametrize("rate", [-1e-3, 5e-324, 1e-12, 0.4, 20.0, 1e300])
def test_relaxed(rate: float, time: float) -> None:
    with localcontext() as context:
        context.prec = 700
        x = Decimal(rate) * Decimal(time)
        expected = float((1 - (-x).exp()) / (Decimal(rate) * Decimal(min(time, 1.0))))
    # 5e-324 times 0.7 is rounded to itself or to 0; both are the limit at 0. The growing e^{−x} takes x's rounding.
    rounding = ROUNDING * max(1.0, -rate * time)
    assert relaxed(tensor(rate), tensor(time)).item() == pytest.approx(expected, rel=rounding, abs=0)


def test_relaxed_at_zero() -> None:
    assert [relaxed(tensor(0.0), tensor(t)).item() for t in (0.0, 0.5, 7.0)] == [1.0, 1.0, 7.0]
    assert relaxed(tensor(3.0), tensor(0.0)).item() == 1
    assert relaxed(tensor(-1.0), tensor(1e4)).item() == math.inf
