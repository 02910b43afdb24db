"""Parameters that change their group or leave it: what is known by group goes with them."""

from typing import Any

import pytest
import torch
from optimizer_cases import EXACT
from torch import nn
from torch.optim import SGD, Adam

from lightning_speedlimit.trajectory import TrajectoryMeter


def draw(parameters: list[nn.Parameter], generator: torch.Generator) -> None:
    for p in parameters:
        p.grad = p.detach() + 0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64)


def three() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64)) for _ in range(3)]


def run(split_at: int | None, **options: Any) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """split_at: from this step on the middle one of three parameters is in a group of its own, of the same rate."""
    parameters, generator = three(), torch.Generator().manual_seed(1)
    optimizer = SGD(parameters, lr=0.1)
    meter = TrajectoryMeter(optimizer, layer_of=lambda p: "all", **options)
    for k in range(12):
        if k == split_at:
            optimizer.param_groups[0]["params"] = parameters[::2]
            optimizer.add_param_group({"params": [parameters[1]]})
        draw(parameters, generator)
        meter.record_loss(sum((p.detach() ** 2).sum() for p in parameters))  # type: ignore[arg-type]
        optimizer.step()
    values = meter.compute()
    meter.close()
    return values, meter.layers()


@pytest.mark.parametrize("clock", ["steps", "lr"])
@pytest.mark.parametrize("split_at", [0, 1, 6, 11])
def test_a_group_of_its_own_from_midway(split_at: int, clock: str) -> None:
    (values, layers), (whole, whole_layers) = run(split_at, clock=clock), run(None, clock=clock)
    for name, value in whole.items():
        assert values[name] == pytest.approx(value, rel=EXACT, nan_ok=True), name
    assert layers["all"] == pytest.approx(whole_layers["all"], rel=EXACT)


def test_a_group_that_moves_up_keeps_its_own_memory() -> None:
    """The first group goes: the random motion of the other one is still without the first one's momentum."""

    def lower(leaves: bool) -> float:
        parameters, generator = three(), torch.Generator().manual_seed(1)
        groups = [{"params": parameters[:1], "lr": 1e-9, "momentum": 0.5}, {"params": parameters[1:]}]
        optimizer = SGD(groups if leaves else groups[1:], lr=0.1)
        meter = TrajectoryMeter(optimizer)
        for k in range(12):
            if leaves and k == 6:
                del optimizer.param_groups[0]
            draw(parameters, generator)
            meter.record_loss(sum((p.detach() ** 2).sum() for p in parameters[1:]))  # type: ignore[arg-type]
            optimizer.step()
        values = meter.compute()
        meter.close()
        return values["efficiency_low"]

    # What the first group does in six steps of 1e-9 is nothing beside the rest.
    assert lower(leaves=True) == pytest.approx(lower(leaves=False), rel=1e-6)


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_parameter_that_leaves_before_a_step_is_measured(seed: int, kind: Any) -> None:
    parameters, generator = three(), torch.Generator().manual_seed(1)
    optimizer = kind([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
    meter = TrajectoryMeter(optimizer, measure_every_n_steps=6, seed=seed)
    action, last = 0.0, 0
    for k in range(20):
        if k == 1:
            del optimizer.param_groups[1]
        draw(parameters, generator)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        if meter.measured > last:
            action += sum(float(((p.detach() - b) ** 2).sum()) for p, b in zip(parameters, before, strict=True))
        last = meter.measured
    values = meter.compute()
    meter.close()
    assert values["action"] == pytest.approx(20 / last * action, rel=EXACT)


def test_the_mobility_of_one_that_has_left_with_its_group() -> None:
    parameters, generator = three(), torch.Generator().manual_seed(1)
    optimizer = SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    for k in range(6):
        if k == 4:
            del optimizer.param_groups[1]
        draw(parameters, generator)
        optimizer.step()
    meter.close()
    assert meter.accumulated_mobility(parameters[2]).tolist() == pytest.approx([0.4] * 4, rel=EXACT)
    assert meter.accumulated_mobility(parameters[0]).tolist() == pytest.approx([0.6] * 4, rel=EXACT)


def test_moved_is_what_a_measured_step_has_moved() -> None:
    """Whatever the optimizer did before the meter came."""
    parameters, generator = three(), torch.Generator().manual_seed(1)
    optimizer = Adam(parameters, lr=0.1)
    draw(parameters, generator)
    optimizer.step()
    meter = TrajectoryMeter(optimizer)
    parameters[0].grad = None
    optimizer.step()
    meter.close()
    assert [meter.recorder.has_moved(p) for p in parameters] == [False, True, True]
