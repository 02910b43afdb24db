"""Gradient flow on a quadratic loss, and what of it is owed to the initial function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_speedlimit.checks.tensors import Values, instants, modes
from lightning_speedlimit.theory.curve import Curve, curve_from_rates, mode_blocks, sum_rates
from lightning_speedlimit.theory.special import relaxed


def gradient_flow(eigenvalues: Values, residual: Values, times: Values) -> Curve:
    """W₂² = Σ (1 − e^{−λt})² r²/λ,  Q = ½ Σ (1 − e^{−2λt}) r²: gradient flow on L = ½‖f − y‖², f linear in θ.

    Modes with λ = 0 do not move. The entropy production is the loss drop.

    Args:
        eigenvalues: (n,), λ ≥ 0 of the kernel K = JJᵀ, loss units/parameter² (where f has unit √loss).
        residual: (n,), r = f_{θ_0} − y in the kernel's eigenbasis, √loss; its signs do not matter.
        times: any shape, ≥ 0, in units of learning rate × steps.

    Returns:
        the curve; its efficiency is 1 at t = 0, and NaN at all times where no mode moves (λ r² = 0 for all).

    Raises:
        TypeError, ValueError: complex, empty or non-finite values, shapes that differ, negative λ or times.

    Source: arXiv:2307.14653, section on kernels; a single mode has η = tanh(λt/2)/(λt/2).
    """
    rates, strength = modes(eigenvalues=eigenvalues, residual=residual)
    _check_eigenvalues(rates)
    t = instants(times).to(rates.device)
    return curve_from_rates(t, *_flow(rates, strength, t))


@dataclass(frozen=True, eq=False)
class InitialShare:
    """1 − (value with f_{θ_0} = 0)/(value): the share owed to a non-zero initial function. No unit, float64.

    Negative where the initial function brings the start nearer to the targets. At t = 0 the limit;
    NaN where nothing moves from f_{θ_0}. Known also where W₂² or the loss drop themselves under- or overflow.

    Attributes:
        wasserstein2_squared: share of W₂², of the shape of the times.
        entropy_production: share of the loss drop, likewise.
        actual: the curve from f_{θ_0}.
        from_zero: the curve with the same kernel from f_{θ_0} = 0.
    """

    wasserstein2_squared: Tensor
    entropy_production: Tensor
    actual: Curve
    from_zero: Curve


def split_initial(eigenvalues: Values, initial: Values, targets: Values, times: Values) -> InitialShare:
    """1 − V(r = −y)/V(r = f_{θ_0} − y), V = W₂² or Q of `gradient_flow`.

    Args:
        eigenvalues: (n,), λ ≥ 0 of the kernel.
        initial: (n,), f_{θ_0} on the data in the kernel's eigenbasis.
        targets: (n,), y in the same basis. From a module all three come from `ntk_eigenbasis`.
        times: any shape, ≥ 0.

    Raises:
        TypeError, ValueError: as `gradient_flow`.
    """
    rates, start, goal = modes(eigenvalues=eigenvalues, initial=initial, targets=targets)
    _check_eigenvalues(rates)
    t = instants(times).to(rates.device)
    # Shares have no unit: in those of the largest rate and residual nothing under- or overflows.
    rate, size, size_0 = (_size(part) for part in (rates, start - goal, goal))
    scaled = (t * rate).clamp(max=torch.finfo(t.dtype).max)
    actual, from_zero = (_flow(rates / rate, part, scaled) for part in ((start - goal) / size, goal / size_0))
    factor = (size_0 / size) ** 2
    speed_share, power_share = (
        1 - factor * zero / torch.where(value == 0, torch.nan, value)
        for value, zero in zip(actual, from_zero, strict=True)
    )
    return InitialShare(
        wasserstein2_squared=speed_share,
        entropy_production=power_share,
        actual=curve_from_rates(t, *_flow(rates, start - goal, t)),
        from_zero=curve_from_rates(t, *_flow(rates, goal, t)),
    )


def flow_rates(times: Tensor, eigenvalues: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """λ r² φ² and λ r² φ (1 + e^{−λt})/2, φ = (1 − e^{−λt})/(λτ): the terms of W₂²/τ² and Q/τ; `strength` is r²."""
    phi = relaxed(eigenvalues, times)
    moving = eigenvalues * phi * strength
    return moving * phi, moving * (1 + 0.5 * torch.expm1(-eigenvalues * times))


def _flow(eigenvalues: Tensor, residual: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    strength = residual.square()
    blocks = ((eigenvalues[part], strength[part]) for part in mode_blocks(len(eigenvalues), times))
    return sum_rates(times, blocks, flow_rates)


def _size(values: Tensor) -> Tensor:
    """The power of 2 above the largest of the values: dividing by it loses no digit. 1 where all are 0."""
    largest = values.abs().max()
    return torch.where(largest == 0, 1.0, torch.exp2(largest.log2().ceil().clamp(-1022, 1023)))


def _check_eigenvalues(eigenvalues: Tensor) -> None:
    least = torch.min(eigenvalues).item()
    if least < 0:
        raise ValueError(
            f"eigenvalues must not be negative, got {least:g}; a kernel JJᵀ has none: set those that rounding left to 0"
        )
