"""Power-law spectra: how the efficiency of gradient flow scales with time."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.checks.tensors import Values, instants, number, whole
from lightning_speedlimit.theory.curve import Curve, curve_from_rates, mode_blocks, sum_rates
from lightning_speedlimit.theory.flow import flow_rates

MAX_MODES = 10**10


def power_law(kernel_exponent: float, residual_exponent: float, modes: int, times: Values) -> Curve:
    """`gradient_flow` with λ_k = k^{−a}, r_k² = k^{−b}, k = 1 … P, in blocks of modes.

    Args:
        kernel_exponent: a > 0.
        residual_exponent: b, any finite number.
        modes: P ≥ 1, at most 10¹⁰: each is summed.
        times: any shape, ≥ 0, in units of 1/λ_1.

    Returns:
        the curve (λ_1 = r_1² = 1 set the units); its efficiency is 1 at t = 0, and NaN only where P^{−b} overflows.

    Raises:
        TypeError, ValueError: exponents, modes or times out of these ranges.

    Source: arXiv:2307.14653, the scaling assumptions on kernel and labels.
    """
    a, b = _exponents(kernel_exponent, residual_exponent)
    whole("modes", modes, 1, MAX_MODES)
    t = instants(times)

    def block(part: slice) -> tuple[Tensor, Tensor]:
        k = torch.arange(part.start + 1, part.stop + 1, dtype=torch.float64, device=t.device)
        return k**-a, k**-b

    return curve_from_rates(t, *sum_rates(t, map(block, mode_blocks(modes, t)), flow_rates))


def power_law_exponent(kernel_exponent: float, residual_exponent: float) -> float:
    """d ln η/d ln t → 0 for b ≤ 1, (1 − b)/a for 1 < b < 1 + a, −1 for b ≥ 1 + a, where 1 ≪ t ≪ P^a.

    The front k* ~ t^{1/a} splits the sums. Q is carried by it for b < 1 and by the first modes for b > 1; W₂²
    by it for b < 1 + a and by the first modes beyond. On both boundaries a logarithm comes on top and is
    approached slowly: η ~ 1/ln t at b = 1, η ~ ln t/t at b = 1 + a.

    Args:
        kernel_exponent: a > 0.
        residual_exponent: b > 1 − a: else the last modes carry both sums at all times, and no law of t holds.

    Raises:
        ValueError: exponents out of these ranges.
    """
    a, b = _exponents(kernel_exponent, residual_exponent)
    if a + b <= 1:
        raise ValueError(
            f"kernel_exponent + residual_exponent must be above 1, got {a:g} + {b:g}; "
            "below, the number of modes carries both sums: use power_law with that number"
        )
    if b <= 1:
        return 0.0
    return (1 - b) / a if b < 1 + a else -1.0


def _exponents(kernel_exponent: float, residual_exponent: float) -> tuple[float, float]:
    a, b = number("kernel_exponent", kernel_exponent), number("residual_exponent", residual_exponent)
    if a <= 0:
        raise ValueError(f"kernel_exponent must be above 0, got {a:g}; eigenvalues fall as k^-exponent")
    return a, b
