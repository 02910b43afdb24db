"""Vectors to work in are shared, and weights are compared where they lie: what was there before must not count."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_speedlimit import TrajectoryMeter, register_mobility
from lightning_speedlimit.trajectory import compiled
from lightning_speedlimit.trajectory.losses import extrapolate

KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "AdamW": (AdamW, {"lr": 0.01}),
    "Adam L2": (Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop centered": (RMSprop, {"lr": 0.01, "centered": True}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("idle", [0, 1, 3])
def test_readings_between_steps_leave_nothing_in_the_rooms(kind: str, idle: int) -> None:
    """A reading works over all rows; a step in those of some, with other ends."""
    found = []
    for reads in (False, True):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(n)) for n in (10, 300, 300, 300)]
        meter = TrajectoryMeter(KINDS[kind][0](parameters, **KINDS[kind][1]), coordinates="all")
        for k in range(24):
            for i, p in enumerate(parameters):
                p.grad = None if i == idle else torch.randn_like(p)
            meter.optimizers[0].step()
            if reads and k < 23:
                meter.compute()
        found.append(meter.compute())
        meter.close()
    assert math.isfinite(found[0]["work_action"])
    assert found[0] == pytest.approx(found[1], nan_ok=True, rel=1e-12)


def test_gradients_without_memory_of_their_own() -> None:
    """What functional collectives return has no address: it is not looked at there."""
    found = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(300))
        optimizer = SGD([p], lr=0.1)
        meter = TrajectoryMeter(optimizer)
        for _ in range(4):
            gradient: Tensor = torch.randn(300)
            p.grad = AsyncCollectiveTensor(gradient) if wrapped else gradient
            meter.observe_gradients()
            optimizer.step()
        found.append(meter.compute())
        meter.close()
    assert math.isfinite(found[0]["work_ito"])
    assert found[0] == pytest.approx(found[1], nan_ok=True, rel=1e-6)


@pytest.mark.parametrize(("size", "coordinates"), [(300, "all"), (3000, 64)], ids=["all", "drawn"])
@pytest.mark.parametrize("library", [compiled.LIBRARY, None], ids=["compiled", "torch"])
@pytest.mark.parametrize("by", [2, 0])
def test_weights_of_another_size(
    size: int, coordinates: Any, by: int, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurement ends, and says so; nothing beyond the vector is read, and one number is not taken for all."""
    monkeypatch.setattr(compiled, "LIBRARY", library)
    p = nn.Parameter(torch.randn(size))
    optimizer = SGD([p], lr=0.1)
    meter = TrajectoryMeter(optimizer, coordinates=coordinates)
    p.grad = torch.ones(size)
    optimizer.step()
    p.data, p.grad = torch.randn(by * size or 1), torch.ones(by * size or 1)
    with pytest.warns(UserWarning, match="the measurement stopped at step 1"):
        optimizer.step()
    assert math.isnan(meter.compute()["action"])


@pytest.mark.parametrize("library", [compiled.LIBRARY, None], ids=["compiled", "torch"])
def test_weights_of_another_shape(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many in the same order are the same."""
    monkeypatch.setattr(compiled, "LIBRARY", library)
    p = nn.Parameter(torch.zeros(30, 40))
    optimizer = SGD([p], lr=0.5)
    meter = TrajectoryMeter(optimizer, coordinates="all")
    for shape in ((30, 40), (30, 40), (1200,), (1200,)):
        if p.shape != torch.Size(shape):
            p.data = p.data.view(shape)
        p.grad = torch.ones(shape)
        optimizer.step()
    assert meter.compute()["displacement"] == pytest.approx(4 * 0.5 * 1200**0.5, rel=1e-6)
    meter.close()


def test_a_sign_of_zero_is_no_move() -> None:
    p = nn.Parameter(torch.zeros(300))
    optimizer = SGD([p], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    for _ in range(3):
        p.grad = torch.arange(300.0).clamp_max(1.0)
        optimizer.step()
        p.data[0] *= -1.0
    values = meter.compute()
    assert values["moved_outside"] == 0.0
    assert values["net_displacement"] == pytest.approx(values["displacement"])
    assert meter.recorder.followers[0].motions[0].moves.origin is None
    meter.close()


def test_a_state_of_the_host_is_gone_on_with_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled passes are of the host alone."""
    p = nn.Parameter(torch.randn(300))
    optimizer = SGD([p], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    for _ in range(4):
        p.grad = torch.randn(300)
        optimizer.step()
    action = meter.compute()["action"]
    state = meter.state_dict()
    meter.close()
    monkeypatch.setattr("lightning_speedlimit.trajectory.gathering.HOST", ())
    resumed = TrajectoryMeter(optimizer)
    resumed.load_state_dict(state)
    assert resumed.recorder.followers[0].motions[0].coordinates.passes is None
    p.grad = torch.randn(300)
    optimizer.step()
    # lr² ‖g‖² more; the update is rounded to the ulp of θ, 6e-8 of numbers ten times as large
    assert resumed.compute()["action"] - action == pytest.approx(float(0.01 * p.grad.square().sum()), rel=1e-5)
    resumed.close()


class Plain(SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)


def test_a_registered_mobility_of_0_with_clipping() -> None:
    """Where μ is 0 nothing has moved: its share of the work is 0, whatever the clipping."""
    register_mobility(Plain, lambda optimizer, group, p: group["lr"] * (p.grad != 0))
    p = nn.Parameter(torch.randn(300))
    optimizer = Plain([p], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    squares = 0.0
    for _ in range(3):
        p.grad = torch.arange(300.0).clamp_max(1.0)
        meter.observe_gradients()
        nn.utils.clip_grad_norm_([p], 0.5)
        optimizer.step()
        squares += 299 * (0.1 * 0.5 / 299**0.5) ** 2 / (0.1 * 0.5 / 299**0.5)  # Σ u²/μ, μ = c lr
    assert meter.compute()["work_action"] == pytest.approx(squares, rel=1e-5)
    meter.close()


def test_losses_whose_squares_are_beyond_all_range() -> None:
    found = extrapolate(list(range(12)), [1e200 * (k % 3) for k in range(12)], 12)
    assert not found.bias_squared < 0.0
