"""Quotients that are 0/0 at zero, to the last digits on both sides of it."""

from __future__ import annotations

import torch
from torch import Tensor

# Beyond it a term of the series below is less than 1/9^18 = 7e-18 of the first.
_TERMS = 18


def relaxed(rate: Tensor, times: Tensor) -> Tensor:
    """(1 − e^{−λt})/(λτ), and t/τ at λτ = 0 (1 at t = 0), where τ = min(t, 1): no power of t over- or underflows."""
    x = rate * times.clamp(max=1)
    return torch.where(x == 0, times.clamp(min=1), -torch.expm1(-rate * times) / x)


def log1p_ratio(x: Tensor) -> Tensor:
    """ln(1 + x)/x, and 1 at x = 0."""
    return torch.where(x == 0, 1.0, torch.log1p(x) / x)


def log1p_remainder(x: Tensor) -> Tensor:
    """(x − ln(1 + x))/x², and 1/2 at x = 0; only for −1/2 ≤ x ≤ 1.

    With s = x/(2 + x), so that |s| ≤ 1/3: ln(1 + x) = 2 artanh s, whose first terms cancel x by hand.
    """
    s = x / (2 + x)
    series = torch.zeros_like(s)
    for k in reversed(range(_TERMS)):
        series = series * s.square() + 1 / (2 * k + 3)
    return 0.5 * (1 - s) - 2 * s * series / (2 + x).square()
