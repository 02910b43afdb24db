"""The response so far of momentum, as mobility: attached midway, with sampled steps, and momentum without a limit."""

from typing import Any

import pytest
import torch
from optimizer_cases import EXACT
from torch import nn
from torch.optim import SGD, RMSprop

from lightning_speedlimit.trajectory import TrajectoryMeter, register_mobility


def walk(parameters: list[nn.Parameter], optimizer: Any, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in parameters:
            p.grad = p.detach() + torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()


def pair() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2)]


def test_attached_midway_to_several_groups() -> None:
    found = []
    for split in (False, True):
        parameters = pair()
        groups: list[Any] = [{"params": [p]} for p in parameters] if split else parameters
        optimizer = RMSprop(groups, lr=0.01, momentum=0.9)
        walk(parameters, optimizer, 60, seed=0)
        meter = TrajectoryMeter(optimizer, momentum_mobility="response")
        walk(parameters, optimizer, 3, seed=1)
        meter.close()
        found.append(torch.stack([meter.accumulated_mobility(p) for p in parameters]))
    torch.testing.assert_close(found[1], found[0], rtol=EXACT, atol=0.0)


@pytest.mark.parametrize("kind", [SGD, RMSprop])
def test_steps_that_are_not_measured_count(kind: Any) -> None:
    """m of the measured steps, each with the response of all steps before it."""
    (weight, _) = pair()
    optimizer = kind([weight], lr=0.01, momentum=0.9)
    meter = TrajectoryMeter(optimizer, momentum_mobility="response", measure_every_n_steps=5, seed=2)
    response, mobility = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for k in range(40):
        before = meter.measured
        walk([weight], optimizer, 1, seed=k)
        average = torch.ones(4) if kind is SGD else optimizer.state[weight]["square_avg"].sqrt() + 1e-8
        response = 0.9 * response + 1.0 / average
        if meter.measured > before:
            mobility += 0.01 * response
    meter.close()
    torch.testing.assert_close(meter.accumulated_mobility(weight), mobility * 40 / meter.measured, rtol=EXACT, atol=0.0)


@pytest.mark.parametrize("kind", [SGD, RMSprop])
def test_momentum_without_a_steady_response(kind: Any) -> None:
    """β = 1: the mobility is the effective one, for which Q = work_action is work_ito."""
    (weight, _) = pair()
    optimizer = kind([weight], lr=1e-4, momentum=1.0)
    meter = TrajectoryMeter(optimizer)
    walk([weight], optimizer, 8, seed=0)
    values = meter.compute()
    meter.close()
    assert values["efficiency_action"] == pytest.approx(values["kinematic_efficiency"], rel=EXACT)


def test_a_registered_mobility_is_no_response() -> None:
    """Whatever the options of its group are called."""

    class Own(SGD):
        pass

    register_mobility(Own, lambda optimizer, group, parameter: group["lr"])
    (weight, _) = pair()
    optimizer = Own([weight], lr=0.1, momentum=0.9)
    walk([weight], optimizer, 3, seed=0)
    meter = TrajectoryMeter(optimizer, momentum_mobility="response")
    walk([weight], optimizer, 3, seed=1)
    meter.close()
    assert meter.accumulated_mobility(weight).tolist() == pytest.approx([0.3] * 4, rel=EXACT)
