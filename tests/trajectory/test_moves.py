"""Weights that are moved between steps: what a sampled run, a layer and the sketch make of it."""

import math
from typing import Any

import pytest
import torch
from optimizer_cases import Walk
from torch import Tensor, nn
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
    for name in ("displacement", "moved_outside", "net_displacement"):
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


def reloading(**options: Any) -> tuple[TrajectoryMeter, Walk, list[Tensor]]:
    """The best weights are loaded in the middle, and a later state once more; with what they were."""
    walk = Walk(lambda parameters: Adam(parameters, lr=0.05))
    walk.meter.close()
    meter = TrajectoryMeter(walk.optimizers, **options)
    best: list[Tensor] = []
    for k in range(STEPS):
        walk.backward()
        walk.step()
        if k == 2:
            best = [p.detach().clone() for p in walk.parameters]
        if k in (STEPS // 2, STEPS - 3):
            for p, value in zip(walk.parameters, best, strict=True):
                with torch.no_grad():
                    p.copy_(value)
    meter.close()
    return meter, walk, best


@pytest.mark.parametrize("options", [{}, {"measure_every_n_steps": 2}], ids=str)
def test_both_displacements_are_told_where_weights_are_loaded(options: dict[str, Any]) -> None:
    meter, walk, _ = reloading(**options)
    values, expected = meter.compute(), walk.copies.values()
    assert values["displacement"] == pytest.approx(expected["displacement"], rel=1e-12)
    assert values["net_displacement"] == pytest.approx(expected["net_displacement"], rel=1e-12)
    assert abs(values["displacement"] / values["net_displacement"] - 1) > 0.1
    reason = meter.reasons["displacement"]
    for name in ("displacement", "net_displacement"):
        assert f"{values[name]:.3g}" in reason


def test_where_nothing_moves_the_weights_but_the_steps_they_are_one() -> None:
    walk = Walk(lambda parameters: Adam(parameters, lr=0.05))
    for _ in range(STEPS):
        walk.backward()
        walk.step()
    values = walk.meter.compute()
    assert values["net_displacement"] == values["displacement"] > 0
    assert all(motion.moves.origin is None for follower in walk.meter._followers for motion in follower.motions)


def test_the_first_weights_survive_a_checkpoint() -> None:
    meter, walk, _ = reloading()
    again = TrajectoryMeter(walk.optimizers)
    again.load_state_dict(meter.state_dict())
    again.close()
    assert again.compute() == pytest.approx(meter.compute(), rel=1e-12, nan_ok=True)


def test_drawn_coordinates_estimate_both() -> None:
    torch.manual_seed(5)
    weight = nn.Parameter(torch.randn(20_000, dtype=torch.float64))
    optimizer = SGD([weight], lr=0.1)
    meter, exact = TrajectoryMeter(optimizer, coordinates=4000), TrajectoryMeter(optimizer, coordinates="all")
    for k in range(6):
        if k == 3:
            with torch.no_grad():
                weight.mul_(0.9)
        weight.grad = weight.detach().sin()
        optimizer.step()
    found, wanted = meter.compute(), exact.compute()
    for name in ("displacement", "net_displacement"):
        assert found[name] == pytest.approx(wanted[name], abs=4 * found[f"{name}_se"])  # four standard errors
        assert 0 < found[f"{name}_se"] < 0.1 * found[name]


@pytest.mark.parametrize("coordinates", [96, 400])
def test_errors_of_both_displacements_are_those_of_the_drawn_units(coordinates: int) -> None:
    """Hájek's variance of Σ w_i ‖Δ_i‖² over units of 8, by plain sums over what the state says was drawn."""
    generator = torch.Generator().manual_seed(5)
    weight = nn.Parameter(torch.randn(1000, generator=generator, dtype=torch.float64))
    scale = torch.logspace(-1, 1, 1000, dtype=torch.float64)
    optimizer = SGD([weight], lr=0.1)
    meter = TrajectoryMeter(optimizer, coordinates=coordinates)
    first, travelled = weight.detach().clone(), torch.zeros(1000, dtype=torch.float64)
    for k in range(6):
        weight.grad = scale * torch.randn(1000, generator=generator, dtype=torch.float64)
        before = weight.detach().clone()
        optimizer.step()
        travelled += weight.detach() - before
        if k == 3:
            weight.data.mul_(0.5)
    values, (motion,) = meter.compute(), meter.state_dict()["followers"][0]["motions"]
    drawn, weights = motion["drawn"][0], motion["weights"][0]
    for name, delta in (("displacement", travelled), ("net_displacement", weight.detach() - first)):
        units = weights * delta.view(-1, 8)[drawn].square().sum(1)
        rest = 1 - 1 / weights
        missed = int((rest > 1e-12).sum())
        apart = units - (rest * units).sum() / rest.sum()
        error = (missed / (missed - 1) * (rest * apart.square()).sum()).sqrt()
        expected = float(units.sum()) ** 0.5
        assert values[name] == pytest.approx(expected, rel=1e-12)
        # Central differences of 1e-3 of an error: off by 1e-6 of it, squared.
        assert values[f"{name}_se"] == pytest.approx(float(error) / (2 * expected), rel=1e-5)
