"""Weights that are moved between steps: what a sampled run, a layer and the sketch make of it."""

import math
from typing import Any

import pytest
import torch
from optimizer_cases import Walk
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS = 12
KINDS = [(SGD, {"lr": 0.3}), (Adam, {"lr": 0.1}), (AdamW, {"lr": 0.1, "weight_decay": 0.5})]
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=[k.__name__ for k, _ in KINDS])


def clamped(kind: type[Optimizer], options: dict[str, Any], **meter: Any) -> tuple[TrajectoryMeter, Walk]:
    """Weights are clamped after every step; the walk keeps copies of what its steps did."""
    walk = Walk(lambda parameters: kind(parameters, **options))
    walk.meter.close()
    found = TrajectoryMeter(walk.optimizers, **meter)
    for _ in range(STEPS):
        walk.backward()
        walk.step()
        for p in walk.parameters:
            p.data.clamp_(-0.5, 0.5)
    found.close()
    return found, walk


@kinds
def test_moves_of_a_sampled_run(kind: type[Optimizer], options: dict[str, Any]) -> None:
    meter, walk = clamped(kind, options, measure_every_n_steps=3)
    values, expected = meter.compute(), walk.copies.values()
    # Both are state functions, of all steps whichever were measured: float64, differences of weights of size 1.
    for name in ("displacement", "moved_outside"):
        assert values[name] == pytest.approx(expected[name], rel=1e-12), name
    assert f"before {STEPS - 1} steps" in meter.reasons["displacement"]


@kinds
def test_the_sketch_is_of_the_steps_alone(kind: type[Optimizer], options: dict[str, Any]) -> None:
    meter, walk = clamped(kind, options)
    # 17 coordinates in 4093 buckets: exact but for float32.
    assert float(meter.sketch().double().norm()) == pytest.approx(walk.copies.values()["displacement"], rel=1e-6)


def test_layers_are_of_the_steps_alone() -> None:
    meter, walk = clamped(SGD, {"lr": 0.3}, layer_of=lambda p: f"{p.dim()}")
    travelled = sum(walk.copies.updates)
    found, first = meter.compute_layers(), walk.parameters[0].numel()
    for name, part in (("2", travelled[:first]), ("1", travelled[first:])):
        assert found[name]["displacement"] == pytest.approx(float(part.norm()), rel=1e-12)


@kinds
def test_several_moves_between_two_steps(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """Their sum counts, and numbers read between them change nothing."""
    walk = Walk(lambda parameters: kind(parameters, **options))
    for k in range(STEPS):
        walk.backward()
        walk.step()
        if k == 6:
            for p in walk.parameters:
                p.data.add_(1.0)
                assert math.isfinite(walk.meter.compute()["displacement"])
                with torch.no_grad():
                    p.mul_(0.5)
    values, expected = walk.meter.compute(), walk.copies.values()
    assert values["moved_outside"] == pytest.approx(expected["moved_outside"], rel=1e-12)
    assert values["displacement"] == pytest.approx(expected["displacement"], rel=1e-12)
    assert "before 1 steps" in walk.meter.reasons["displacement"]


def test_moves_of_one_that_is_not_finite_are_said() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = SGD([weight], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    for k in range(4):
        weight.grad = torch.ones(3)
        optimizer.step()
        weight.data[0] = math.inf if k == 1 else 0.0
    values = meter.compute()
    meter.close()
    assert all(not math.isinf(v) for v in values.values())
    assert meter.reasons["displacement"]
