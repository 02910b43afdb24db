"""Langevin dynamics on a quadratic potential: Gaussians stay Gaussian, mode by mode."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.checks.tensors import Values, instants, modes, nonnegative
from lightning_speedlimit.theory.curve import Curve, curve_from_rates, mode_blocks, sum_rates
from lightning_speedlimit.theory.special import log1p_ratio, log1p_remainder, relaxed


def langevin(curvature: Values, mean: Values, std: Values, temperature: float, times: Values) -> Curve:
    """m = e^{−ht} m_0, v = e^{−2ht} s_0² + (T/h)(1 − e^{−2ht}),  W₂² = Σ (m − m_0)² + (√v − s_0)²,  Q = F_0 − F_t.

    dθ = −∇L dt + √(2T) dW on L = ½ Σ h x², started from independent Gaussians. Q = T × entropy production is the
    drop of the free energy F = ⟨L⟩ − T·S. A single mode with s_0² = T/h has η = tanh(ht/2)/(ht/2).

    Args:
        curvature: (n,) or a number: h, loss/parameter². Any sign: h = 0 diffuses freely (v = s_0² + 2Tt), h < 0
            runs away from a maximum.
        mean: (n,) or a number: m_0, measured from the extremum of the mode.
        std: (n,) or a number: s_0 ≥ 0, parameter units.
        temperature: T ≥ 0, loss units; T = 0 is gradient flow (then any start with these two moments will do).
        times: any shape, ≥ 0.

    Returns:
        the curve. A mode with s_0 = 0 at T > 0 starts at entropy −∞: Q = inf for t > 0 and efficiency 0 at all
        times, t = 0 as the limit included. NaN efficiency: where nothing moves (equilibrium, or T = 0 in a
        minimum or a flat valley), and where an unstable mode overflows (h t below about −350; W₂² is then
        inf or NaN), unless it is at rest on its maximum.
        Near equilibrium W₂² and Q are as accurate as T − h s_0² is in float64; their ratio is not affected.

    Raises:
        TypeError, ValueError: complex, empty or non-finite values, shapes that differ, negative std,
            temperature or times.

    Source: Aurell, Mejía-Monasterio, Muratore-Ginanneschi, PRL 106, 250601 (2011); arXiv:2307.14653.
    """
    h, m, s = modes(curvature=curvature, mean=mean, std=std)
    if s.min() < 0:
        raise ValueError(f"std must not be negative, got {s.min().item():g}; it is the square root of the variance")
    heat = nonnegative("temperature", temperature)
    t = instants(times).to(h.device)

    def rates(t: Tensor, h: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        of_speed, of_power = _variance_rates(t, h, s, heat)
        force = h * m
        still = force == 0  # on a maximum too, where the factors overflow
        drift = torch.where(still, 0.0, force * relaxed(h, t))  # (m_0 − m)/τ
        work = torch.where(still, 0.0, 0.5 * force * drift * (1 + torch.exp(-h * t)))
        return drift.square() + of_speed, work + of_power

    blocks = ((h[part], m[part], s[part]) for part in mode_blocks(len(h), t))
    return curve_from_rates(t, *sum_rates(t, blocks, rates))


def _variance_rates(t: Tensor, h: Tensor, s: Tensor, heat: float) -> tuple[Tensor, Tensor]:
    """((√v − s_0)/τ)² and the variance's part of (F_0 − F_t)/τ, τ = min(t, 1), with limits at t = 0."""
    unit = t.clamp(max=1)
    excess = heat - h * s.square()
    gain = 2 * relaxed(2 * h, t)
    change = torch.where(excess == 0, 0.0, excess * gain)  # (v − s_0²)/τ
    end = (s.square() * torch.exp(-2 * h * t) + heat * unit * gain).sqrt()
    # No sum of widths: at T > 0, t = 0 the infinite power below decides. No change: on a maximum too.
    speed = torch.where((end + s == 0) | (change == 0), 0.0, change / (end + s))
    return speed.square(), _variance_power(unit, h, s, heat, excess, change, end)


def _variance_power(
    unit: Tensor, h: Tensor, s: Tensor, heat: float, excess: Tensor, change: Tensor, end: Tensor
) -> Tensor:
    """[T ln(v/v_0) − h (v − v_0)]/2τ with v_0 = s_0² and √v = `end`, inf where s_0 = 0 < T.

    From v_0 within a factor of 2 of equilibrium the two terms cancel: there c = T − h v_0 and ε = v/v_0 − 1 give
    [c ε − T (ε − ln(1 + ε))]/2τ, where at most half is lost.
    """
    start = s.square()
    growth = torch.where(change == 0, 0.0, change / start)  # ε/τ
    epsilon = unit * growth
    # Where T/h is below the smallest number, so is T ln v beside h v_0.
    widths = (end / s).clamp(min=torch.finfo(end.dtype).tiny)
    log_ratio = torch.where(
        (epsilon < -0.5) | (epsilon > 1),  # 1 + ε would lose the digits that v has, or overflow
        2 * heat * widths.log() / unit,
        heat * growth * log1p_ratio(epsilon),
    )
    apart = 0.5 * (log_ratio - h * change)
    close = 0.5 * growth * (excess - heat * epsilon * log1p_remainder(epsilon))
    balance = h * start
    power = torch.where((balance >= heat / 2) & (balance <= 2 * heat), close, apart)
    return torch.where((s == 0) & (heat > 0), torch.inf, power)
