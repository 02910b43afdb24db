"""Sums that are kept apart by layer: whatever groups, types and sampled steps the layer is spread over."""

import math
from typing import Any

import pytest
import torch
from optimizer_cases import EXACT
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter


def pair(second: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(4, dtype=torch.float64)), nn.Parameter(torch.zeros(4, dtype=second))]


def straight(parameters: list[nn.Parameter], optimizers: list[Optimizer], **options: Any) -> dict[str, float]:
    """20 equal steps of 0.1 √8: the layer's path is straight and steady."""
    meter = TrajectoryMeter(optimizers, layer_of=lambda p: "all", **options)
    for _ in range(20):
        for p in parameters:
            p.grad = torch.ones_like(p)
        for optimizer in optimizers:
            optimizer.step()
    found = meter.compute_layers()["all"]
    meter.close()
    return found


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("spread", ["one group", "two groups", "two types", "two optimizers"])
def test_the_path_of_a_layer_is_that_of_its_own_motion(spread: str, every: int) -> None:
    a, b = parameters = pair(torch.float32 if spread == "two types" else torch.float64)
    groups: list[Any] = [{"params": [a]}, {"params": [b], "weight_decay": 0.0}] if spread == "two groups" else [a, b]
    optimizers: list[Optimizer] = [SGD(groups, lr=0.1)]
    if spread == "two optimizers":
        optimizers = [SGD([a], lr=0.1), SGD([b], lr=0.1)]
    found = straight(parameters, optimizers, measure_every_n_steps=every)
    close = {"rel": 1e-6 if spread == "two types" else EXACT}  # float32: updates of 0.1 between weights of up to 2
    assert found["path_length"] == pytest.approx(20 * 0.1 * math.sqrt(8), **close)
    assert found["straightness"] == pytest.approx(1.0, **close)
    assert found["steadiness"] == pytest.approx(1.0, **close)


class Signs(Optimizer):
    """u = −lr sign(g): no formula knows it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.sub_(0.05 * p.grad.sign())


@pytest.mark.parametrize("kind", [Signs, lambda p: SGD(p, lr=0.05)], ids=["effective", "sgd"])
def test_to_ask_for_layers_changes_no_number_of_the_run(kind: Any) -> None:
    """One effective mobility and one estimate of the noise for each group, not for each layer of it."""
    values = []
    for layer_of in (None, lambda p: f"{p.numel()}"):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (4, 9)]
        optimizer = kind(parameters)
        meter = TrajectoryMeter(optimizer, layer_of=layer_of)
        for _ in range(30):
            for p, curvature in zip(parameters, (1.0, 10.0), strict=True):
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.grad = curvature * p.detach() + 0.5 * noise
            meter.record_loss(sum((p.detach() ** 2).sum() for p in parameters))  # type: ignore[arg-type]
            optimizer.step()
        values.append(meter.compute())
        meter.close()
    assert values[1] == pytest.approx(values[0], rel=EXACT, nan_ok=True)


@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)])
def test_resumed_with_or_without_layers(named: tuple[bool, bool]) -> None:
    """Parameters keep the layers that they had; the numbers of the run are the same."""
    parameters = pair()
    optimizer = SGD(parameters, lr=0.1)
    state: dict[str, Any] | None = None
    for names in named:
        meter = TrajectoryMeter(optimizer, layer_of=(lambda p: f"{id(p)}") if names else None)
        if state is not None:
            meter.load_state_dict(state)
        for _ in range(5):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
        state = meter.state_dict()
        meter.close()
    assert meter.compute()["path_length"] == pytest.approx(10 * 0.1 * math.sqrt(8), rel=EXACT)
    layers = meter.compute_layers()
    each = math.sqrt(4) if named[0] else math.sqrt(8)
    assert [v["path_length"] for v in layers.values()] == pytest.approx([10 * 0.1 * each] * len(layers), rel=EXACT)
    assert len(layers) == (2 if named[0] else 1)


def test_a_layer_that_is_lost_takes_no_other_with_it() -> None:
    good, bad = parameters = pair()
    optimizer = SGD(parameters, lr=0.1)
    meter = TrajectoryMeter(optimizer, layer_of=lambda p: "good" if p is good else "bad")
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert bad.grad is not None
    bad.grad[0] = math.nan
    optimizer.step()
    meter.compute()
    found = meter.layers()
    assert found["good"]["displacement"] == pytest.approx(0.2, rel=EXACT)
    assert found["good"]["work_ito"] == pytest.approx(0.4, rel=EXACT)
    assert math.isnan(found["bad"]["displacement"])


@pytest.mark.parametrize("options", [{"measure_every_n_steps": 4}, {"coordinates": 600}])
def test_errors_do_not_depend_on_layers(options: dict[str, Any]) -> None:
    """Of one group they are added up before they are propagated."""

    def run(layers: bool) -> dict[str, float]:
        draw = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.zeros(2000, dtype=torch.float64)) for _ in range(3)]
        optimizer = SGD(parameters, lr=0.1)
        names = {id(p): f"layer {i}" for i, p in enumerate(parameters)}
        meter = TrajectoryMeter(optimizer, layer_of=(lambda p: names[id(p)]) if layers else None, **options)
        for _ in range(40):
            for p in parameters:
                p.grad = torch.randn(2000, generator=draw, dtype=torch.float64) + 0.3
            meter.record_loss(torch.tensor(1.0))
            optimizer.step()
        return meter.compute()

    apart, together = run(layers=True), run(layers=False)
    told = [name for name, value in together.items() if name.endswith("_se") and math.isfinite(value) and value > 0]
    assert {"action_se", "work_ito_se", "kinematic_efficiency_se"} <= set(told)
    for name in told:
        assert apart[name] == pytest.approx(together[name], rel=1e-6), name
