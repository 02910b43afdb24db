"""What the estimates say of themselves: curvature that passes for noise, and standard errors."""

import pytest
import torch

from lightning_speedlimit.trajectory import TrajectoryMeter


def lower_end(curvature: float, noise: float) -> tuple[dict[str, float], dict[str, str]]:
    """Gradient descent on ½ h θ² with additive gradient noise; the loss is the exact one."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.full((50,), 3.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    for _ in range(60):
        drawn = noise * torch.randn(50, generator=generator, dtype=torch.float64)
        weight.grad = curvature * weight.detach() + drawn
        meter.record_loss(0.5 * curvature * (weight.detach() ** 2).sum())
        optimizer.step()
    values = meter.compute()
    meter.close()
    return values, meter.reasons


def test_curvature_that_passes_for_noise_is_named() -> None:
    # lr h = 1.5: θ changes its sign at every step, and f_k − f_{k+1} is u·H·u alone: there is no noise at all.
    values, reasons = lower_end(curvature=15.0, noise=0.0)
    assert values["efficiency_lower"] < values["efficiency"]
    assert "curvature" in reasons["efficiency_lower"]
    # lr h = 0.01 and noise as large as the force: u·H·u is 1 % of what is taken out.
    values, reasons = lower_end(curvature=0.1, noise=0.3)
    assert values["efficiency_lower"] < values["efficiency"]
    assert "efficiency_lower" not in reasons


def test_standard_errors_follow_the_loss_drop() -> None:
    # conversion = loss_drop/work_ito and efficiency = numerator/loss_drop: both have its
    # relative error, to first order.
    values, _ = lower_end(curvature=0.1, noise=0.3)
    relative = values["loss_drop_se"] / values["loss_drop"]
    assert values["conversion_se"] == pytest.approx(relative * values["loss_drop"] / values["work_ito"], rel=1e-12)
    assert values["efficiency_se"] == pytest.approx(relative * values["efficiency"], rel=1e-12)
