"""What a meter can't use is refused at once, in words that say what and why."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_speedlimit import TrajectoryMeter


def test_what_is_no_state_is_refused() -> None:
    p = nn.Parameter(torch.zeros(3))
    meter = TrajectoryMeter(SGD([p], lr=0.1))
    for state in ({}, None, [], {"settings": meter.state_dict()["settings"]}):
        with pytest.raises(ValueError, match="wanted what state_dict"):
            meter.load_state_dict(state)  # type: ignore[arg-type]
    meter.close()


@pytest.mark.parametrize(
    ("argument", "error", "words"),
    [
        ({"seed": "a"}, ValueError, "seed got 'a', wanted a whole number"),
        ({"seed": 1.5}, ValueError, "seed got 1.5, wanted a whole number"),
        ({"seed": 2**70}, ValueError, "seed got 1180591620717411303424"),
        ({"layer_of": 3}, TypeError, "layer_of got 3, wanted a function"),
    ],
    ids=str,
)
def test_arguments_that_would_end_the_measurement_later(
    argument: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        TrajectoryMeter(SGD([nn.Parameter(torch.zeros(3))], lr=0.1), **argument)


def test_what_is_no_loss_is_refused() -> None:
    meter = TrajectoryMeter(SGD([nn.Parameter(torch.zeros(3))], lr=0.1))
    with pytest.raises(ValueError, match=r"shape \(3,\), wanted one number: loss.mean\(\)"):
        meter.record_loss(torch.ones(3))
    with pytest.raises(TypeError, match="record_loss got None"):
        meter.record_loss(None)  # type: ignore[arg-type]
    meter.close()


def test_an_optimizer_that_is_given_twice_is_measured_once() -> None:
    found = []
    for times in (1, 2):
        p = nn.Parameter(torch.zeros(3))
        optimizer = SGD([p], lr=0.1)
        meter = TrajectoryMeter([optimizer] * times)
        for k in range(4):
            p.grad = torch.arange(3.0) + k
            optimizer.step()
        found.append(meter.compute() | {"steps": meter.steps})
        meter.close()
    assert found[0]["steps"] == 4
    assert found[1] == pytest.approx(found[0], nan_ok=True)
