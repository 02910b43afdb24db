"""What a measurement cannot do: it says so, and gives no number that looks right."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter


def bowl(optimizers: list[Optimizer], meter: TrajectoryMeter, steps: int = 6) -> dict[str, float]:
    """L = Σ (w − 1)²/2 for descending groups; the others climb away from 1."""
    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    for _ in range(steps):
        loss = sum((0.5 * (p - 1) ** 2).sum() for p in parameters)
        assert isinstance(loss, torch.Tensor)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        meter.record_loss(loss)
        for optimizer in optimizers:
            optimizer.step()
    return meter.compute()


def weights(number: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64)) for _ in range(number)]


# --- both signs of the loss


def both_ways(apart: bool) -> list[Optimizer]:
    a, b = weights(2)
    if apart:
        return [SGD([a], lr=0.1), SGD([b], lr=0.1, maximize=True)]
    return [SGD([{"params": [a]}, {"params": [b], "maximize": True}], lr=0.1)]


@pytest.mark.mode(
    "groups that maximize beside others that minimize",
    "caveat",
    'loss_drop is NaN, and efficiency unless entropy_production="ito" or another work is chosen',
)
@pytest.mark.parametrize("apart", [True, False])
def test_a_loss_that_some_descend_and_others_climb_has_no_drop(apart: bool) -> None:
    optimizers = both_ways(apart)
    meter = TrajectoryMeter(optimizers, loss_window=2)
    values = bowl(optimizers, meter)
    for name in ("loss_drop", "entropy_production", "efficiency", "efficiency_low", "efficiency_drift", "conversion"):
        assert math.isnan(values[name]), name
        assert "maximize" in meter.reasons[name], name
    meter.close()
    # Each walks by its own force: gradients of 1 that shrink or grow by a tenth at each step, 3 coordinates each.
    force = [(0.9**k, 1.1**k) for k in range(6)]
    assert values["work_ito"] == pytest.approx(0.1 * 3 * math.fsum(a * a + b * b for a, b in force), rel=1e-12)
    optimizers = both_ways(apart)
    meter = TrajectoryMeter(optimizers, loss_window=2, entropy_production="ito")
    assert bowl(optimizers, meter)["efficiency"] > 0
    meter.close()


@pytest.mark.parametrize("maximize", [False, True])
def test_one_sign_for_all_is_a_drop_or_a_rise(maximize: bool) -> None:
    optimizers: list[Optimizer] = [SGD(weights(2), lr=0.1, maximize=maximize)]
    meter = TrajectoryMeter(optimizers, loss_window=2)
    losses = [6 * 0.5 * (1.1 if maximize else 0.9) ** (2 * k) for k in range(6)]
    drop = losses[0] - (2 * losses[-1] - losses[-2])
    assert bowl(optimizers, meter)["loss_drop"] == pytest.approx(-drop if maximize else drop, rel=1e-12)
    meter.close()


def test_a_group_that_never_moved_has_no_sign() -> None:
    """Frozen, it neither climbs nor descends."""
    a, b = weights(2)
    b.requires_grad_(False)
    optimizer = SGD([{"params": [a]}, {"params": [b], "maximize": True}], lr=0.1)
    meter = TrajectoryMeter(optimizer, loss_window=2)
    assert bowl([optimizer], meter)["loss_drop"] > 0
    meter.close()
