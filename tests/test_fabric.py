"""The meter in Fabric's loops: the optimizer wrapped or not, any precision, clipped or not."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from callback_cases import batches
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from style_cases import ALL, Diary, sums
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS = 8
F32 = torch.float32


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def amp() -> Any:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3))


CASES: dict[str, tuple[dict[str, Any], torch.dtype, float]] = {
    "32-true": ({}, torch.float64, 1e-9),
    "bf16-mixed": ({"precision": "bf16-mixed"}, F32, 1e-5),
    "16-mixed": ({"plugins": amp}, F32, 1e-5),
    "16-true": ({"precision": "16-true"}, F32, 1e-5),
}
MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.05),
    "Adam": lambda p: Adam(p, lr=0.01, eps=1e-4),
    "Adam fused": lambda p: Adam(p, lr=0.01, eps=1e-4, fused=True),
}


def train(
    settings: dict[str, Any],
    make: Callable[[Any], Optimizer],
    dtype: torch.dtype,
    measured: str | None,
    clip: float = 0,
) -> tuple[Diary, TrajectoryMeter | None, Tensor]:
    """A Fabric loop; `measured`: which optimizer the meter gets."""
    options = {name: value() if name == "plugins" else value for name, value in settings.items()}
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    model, diary = network(dtype), Diary()
    inner = diary.follow(make(model.parameters()))
    module, optimizer = fabric.setup(model, inner)
    scaler = getattr(fabric._precision, "scaler", None)
    given: dict[str, Any] = {"wrapped": optimizer, "inner": inner}
    meter = None if measured is None else TrajectoryMeter(given[measured], loss_window=2)
    for x, y in batches(STEPS, dtype=dtype):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(x), y)
        fabric.backward(loss)
        diary.see(model, 1.0 if scaler is None else scaler.get_scale())
        diary.losses.append(float(loss.detach()))
        if meter is not None:
            meter.record_loss(loss)
        if clip:
            if meter is not None:
                meter.observe_gradients(given[measured or ""])
            fabric.clip_gradients(module, optimizer, max_norm=clip)
        optimizer.step()
    return diary, meter, torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def assert_agrees(diary: Diary, meter: TrajectoryMeter, rel: float) -> None:
    got, wanted = meter.compute(), sums(diary)
    meter.close()
    for name in ALL:
        spare = rel * abs(wanted["work_ito"]) if name.startswith("work") else rel * diary.losses[0]
        assert got[name] == pytest.approx(wanted[name], rel=rel, abs=spare if "work" in name or "loss" in name else 0)


@pytest.mark.mode("Fabric, through TrajectoryMeter", "measured")
@pytest.mark.parametrize("measured", ["wrapped", "inner"])
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("case", CASES)
def test_a_fabric_loop(case: str, kind: str, measured: str) -> None:
    settings, dtype, rel = CASES[case]
    _, _, without = train(settings, MAKE[kind], dtype, None)
    diary, meter, weights = train(settings, MAKE[kind], dtype, measured)
    assert torch.equal(weights, without)
    assert meter is not None
    assert len(diary.entries) == STEPS
    assert_agrees(diary, meter, rel)


@pytest.mark.mode("Fabric, through TrajectoryMeter", "measured")
@pytest.mark.parametrize("measured", ["wrapped", "inner"])
def test_fabrics_clipping(measured: str) -> None:
    """With `observe_gradients` before it, whichever of the two optimizers is named."""
    diary, meter, weights = train({}, MAKE["SGD"], torch.float64, measured, clip=0.3)
    assert meter is not None
    assert torch.equal(weights, train({}, MAKE["SGD"], torch.float64, None, clip=0.3)[2])
    assert any(float(e.used[k].norm()) < 0.9 * float(e.raw[k].norm()) for e in diary.entries for k in e.raw)
    assert_agrees(diary, meter, 1e-9)


class Slow(Optimizer):
    """Holds an optimizer and moves the weights itself after it: no wrapper to look through."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.5)


def test_an_optimizer_that_holds_another_is_no_wrapper() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Slow(SGD([weight], lr=0.25))
    meter = TrajectoryMeter(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    moved = meter.compute()["displacement"]
    meter.close()
    assert moved == pytest.approx(math.sqrt(3) * (1 - 0.375), rel=1e-12)  # (1 − 0.25)·0.5
