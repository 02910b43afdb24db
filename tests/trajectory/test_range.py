"""Numbers at the ends of what a type can hold: right, or NaN that names the range; never inf, and no exception."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import KINEMATIC, Copies, assert_right
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS = 6
# What a reader sees of a number. Squares near the smallest float32 are rounded to 1e-5 of themselves and worse:
# where that exceeds a thousandth the value has to be NaN.
SEEN = 1e-3
# Sizes of weights, gradients and rate; those that are safe have no product that leaves the range of float32 (of
# float64 for float64), though the last but one has a sum that does.
SIZES = [
    (torch.bfloat16, 1e-20, 1e-20, 1e-2),
    (torch.bfloat16, 1e20, 1e20, 1e-1),
    (torch.float32, 1e-19, 1e-19, 1e-1),
    (torch.float32, 1e-30, 1e-30, 1e-1),
    (torch.float32, 1e18, 1e18, 1e-1),
    (torch.float32, 1e22, 1e22, 1e-1),
    (torch.float32, 1e-4, 1e25, 1e-30),
    (torch.float32, 1.0, 1e-25, 1e24),
    (torch.float64, 1e170, 1e170, 1e-1),
]
SAFE = [
    (torch.bfloat16, 1e-16, 1e-16, 1e-1),
    (torch.float16, 1e-3, 1e-1, 1e-2),
    (torch.float32, 1e-15, 1e-15, 1e-1),
    (torch.float64, 1e-60, 1e-60, 1e-1),
]


def expected(copies: Copies) -> dict[str, float]:
    """The sums of vectors of order 1, and then the powers of their sizes: 0 or inf only where the result is."""
    size = max(float(u.abs().max()) for u in copies.updates)
    slope = max(float(g.abs().max()) for g in copies.raw)
    scaled = Copies([])
    scaled.before = [0 * u for u in copies.updates]
    scaled.after = [u / size for u in copies.updates]
    scaled.raw = [g / slope for g in copies.raw]
    values = scaled.values()
    del values["moved_outside"]
    values["net_displacement"] = values["displacement"]
    factors = dict.fromkeys(("displacement", "net_displacement", "path_length", "step_norm"), size)
    factors |= dict.fromkeys(("work_ito", "work_anti_ito", "work_stratonovich"), size * slope)
    return {name: value * factors.get(name, 1.0) for name, value in values.items()} | {
        "action": values["action"] * size * size,
        "speed_limit_time": values["kinematic_efficiency"] * STEPS,
        "grad_norm": float(scaled.raw[-1].norm()) * slope,
    }


@pytest.mark.parametrize("sizes", [*SIZES, *SAFE], ids=str)
def test_right_or_the_range_is_named(sizes: tuple[torch.dtype, float, float, float]) -> None:
    dtype, weight_size, gradient_size, rate = sizes
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> Tensor:
        number = 100_000 if scale == 1e18 else 40
        return ((0.5 + torch.randn(number, generator=generator, dtype=torch.float64)) * scale).to(dtype)

    weight = nn.Parameter(draw(weight_size))
    optimizer = SGD([weight], lr=rate)
    meter, copies = TrajectoryMeter(optimizer), Copies([weight])
    for _ in range(STEPS):
        weight.grad = draw(gradient_size)
        copies.step(optimizer.step)
    values = meter.compute()
    assert not any(math.isinf(value) for value in values.values())
    for name, value in expected(copies).items():
        if math.isnan(values[name]) and sizes not in SAFE:
            assert re.search("range|float(32|64)", meter.reasons[name]), name
        else:
            assert values[name] == pytest.approx(value, rel=SEEN, abs=0.0), name
    assert math.isnan(values["efficiency_action"]) or values["efficiency_action"] <= 1 + SEEN


# --- compute() never raises ---------------------------------------------------------------------------------


class Odd:
    """Two optimizers of a kind, with something wrong at some step."""

    def __init__(self, kind: str, odd: str, **meter: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(n, generator=generator)) for n in (6, 4)]
        self.optimizers = [KINDS[kind]([p]) for p in self.parameters]
        self.meter = TrajectoryMeter(self.optimizers, loss_window=2, layer_of=lambda p: str(p.numel()), **meter)
        self.copies = Copies(self.parameters)
        for k in range(STEPS):
            for p in self.parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            self.loss, self.rate = 2.0 - 0.1 * k, 0.1
            ODDITIES[odd](self, k)
            for optimizer in self.optimizers:
                optimizer.param_groups[0]["lr"] = self.rate
            self.meter.record_loss(torch.tensor(self.loss, dtype=torch.float64))
            self.copies.step(lambda: [optimizer.step() for optimizer in self.optimizers])
            self.meter.end_step()

    def scale(self, factor: float) -> None:
        for p in self.parameters:
            p.grad.mul_(factor)

    def clip(self, factor: float) -> None:
        self.meter.observe_gradients()
        self.scale(factor)

    def clip_to_nothing(self) -> None:
        """1e-30/1e20 is 0 in float32."""
        self.scale(1e20)
        self.meter.observe_gradients()
        nn.utils.clip_grad_norm_(self.parameters, 1e-30)


KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": functools.partial(SGD, lr=0.1),
    "momentum": functools.partial(SGD, lr=0.1, momentum=0.9),
    "Adam": functools.partial(Adam, lr=0.1),
}
ODDITIES: dict[str, Callable[[Odd, int], Any]] = {
    "a clip factor of 0 while momenta go on": lambda run, k: run.clip(0.0 if k >= 3 else 0.5),
    "a clip factor that is 0 by rounding": lambda run, k: run.clip_to_nothing(),
    "a clip factor of 1e-44": lambda run, k: run.clip(1e-44 if k == 3 else 1.0),
    "an infinite gradient": lambda run, k: run.scale(math.inf if k == 3 else 1.0),
    "a NaN gradient": lambda run, k: run.scale(math.nan if k == 3 else 1.0),
    "no gradient": lambda run, k: run.scale(0.0),
    "infinite losses": lambda run, k: setattr(run, "loss", {0: -math.inf, 5: math.inf}.get(k, 1.0)),
    "losses whose difference is infinite": lambda run, k: setattr(run, "loss", 1.7e308 if k < 3 else -1.7e308),
    "a rate of 0": lambda run, k: setattr(run, "rate", 0.0 if k < 3 else 0.1),
    "an infinite rate": lambda run, k: setattr(run, "rate", math.inf if k == 4 else 0.1),
}


@pytest.mark.parametrize("clock", ["steps", "lr"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", ODDITIES)
def test_no_exception_and_no_infinity(odd: str, kind: str, clock: str) -> None:
    run = Odd(kind, odd, clock=clock)
    values = run.meter.compute()
    for name, value in values.items():
        assert not math.isinf(value), name
        assert name.endswith("_se") or not math.isnan(value) or run.meter.reasons[name], name
    for layer, sums in run.meter.layers().items():
        assert not any(math.isinf(value) for value in sums.values()), layer


@pytest.mark.parametrize("kind", ["momentum", "Adam"])
@pytest.mark.parametrize("odd", [name for name in ODDITIES if "clip" in name or "losses" in name])
def test_the_motion_itself_is_known(odd: str, kind: str) -> None:
    run = Odd(kind, odd)
    if not any(float(u.norm()) for u in run.copies.updates):
        assert run.meter.compute()["displacement"] == 0.0
    else:
        # float32: updates are differences of weights of 1 that are known to 6e-8
        assert_right(run.meter, run.copies, KINEMATIC, rel=1e-5)
