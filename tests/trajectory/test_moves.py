"""Weights that are moved outside of `step`: taken out where they can be, named where they cannot."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

BOUNDED = ("displacement", "straightness", "kinematic_efficiency", "speed_limit_time")
WEIGHTED = ("efficiency", "efficiency_lower", "efficiency_action")
KINDS = [(SGD, {"lr": 0.3}), (Adam, {"lr": 0.1}), (AdamW, {"lr": 0.1, "weight_decay": 0.5})]
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=[k.__name__ for k, _ in KINDS])


class Run:
    """Noisy steps under a meter; the sum of the steps' own motions is kept apart (float64)."""

    def __init__(self, kind: type[Optimizer], options: dict[str, Any], **meter: Any) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.weight, self.bias = nn.Parameter(self.draw(4, 3)), nn.Parameter(self.draw(3))
        self.parameters = [self.weight, self.bias]
        self.optimizer = kind(self.parameters, **options)
        self.meter = TrajectoryMeter(self.optimizer, **meter)
        self.travelled = [torch.zeros_like(p.detach()) for p in self.parameters]
        self.action = 0.0

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def step(self) -> None:
        for p in self.parameters:
            p.grad = self.draw(*p.shape)
        before = [p.detach().clone() for p in self.parameters]
        self.meter.record_loss(torch.tensor(10.0 - self.meter.steps, dtype=torch.float64))
        self.optimizer.step()
        for p, b, t in zip(self.parameters, before, self.travelled, strict=True):
            t.add_(p.detach() - b)
            self.action += float((p.detach() - b).square().sum())

    def compute(self) -> dict[str, float]:
        values = self.meter.compute()
        self.meter.close()
        return values

    @property
    def displacement(self) -> float:
        """‖Σ u_k‖: what the steps did, whatever else moved the weights."""
        return math.sqrt(sum(float(t.square().sum()) for t in self.travelled))


@torch.no_grad()
def clamp(run: Run) -> None:
    for p in run.parameters:
        p.clamp_(-0.5, 0.5)


def clamp_data(run: Run) -> None:
    for p in run.parameters:
        p.data.clamp_(-0.5, 0.5)


def assert_exact(run: Run) -> None:
    values = run.compute()
    # float64: differences of weights of size 1, summed over a dozen steps.
    assert values["displacement"] == pytest.approx(run.displacement, rel=1e-12)
    assert values["action"] == pytest.approx(run.action, rel=1e-12)
    efficiency = run.displacement**2 / (run.meter.steps * run.action)
    assert values["kinematic_efficiency"] == pytest.approx(efficiency, rel=1e-12)
    assert not set(BOUNDED) & set(run.meter.reasons)
    assert values["efficiency_action"] <= 1 + 1e-12
    assert math.isfinite(values["efficiency_action"])


def assert_unknown(run: Run, why: str) -> None:
    values = run.compute()
    for name in (*BOUNDED, *WEIGHTED):
        assert math.isnan(values[name]), name
        assert why in run.meter.reasons[name], name
    assert values["action"] == pytest.approx(run.action, rel=1e-12)  # the steps themselves are known


@kinds
def test_nothing_but_steps(kind: type[Optimizer], options: dict[str, Any]) -> None:
    run = Run(kind, options)
    for _ in range(12):
        run.step()
    assert_exact(run)


@kinds
@pytest.mark.parametrize("last", [True, False], ids=["after the last step too", "not after the last step"])
def test_clamping_from_the_first_step_is_taken_out(kind: type[Optimizer], options: dict[str, Any], last: bool) -> None:
    run = Run(kind, options)
    for k in range(12):
        run.step()
        if last or k < 11:
            clamp(run)
    assert_exact(run)


def test_without_taking_it_out_the_displacement_would_be_another() -> None:
    run = Run(*KINDS[0])
    start = [p.detach().clone() for p in run.parameters]
    for _ in range(12):
        run.step()
        clamp(run)
    moved = math.sqrt(sum(float((p.detach() - s).square().sum()) for p, s in zip(run.parameters, start, strict=True)))
    assert abs(moved / run.displacement - 1) > 0.01
    assert_exact(run)


@kinds
def test_clamping_one_parameter_only(kind: type[Optimizer], options: dict[str, Any]) -> None:
    run = Run(kind, options)
    for _ in range(8):
        run.step()
        with torch.no_grad():
            run.bias.mul_(0.5)
    assert_exact(run)


@kinds
@pytest.mark.mode(
    "weights edited through .data", "caveat", "noticed in the first two steps and in validations; elsewhere not seen"
)
def test_moving_through_data_from_the_start_is_noticed(kind: type[Optimizer], options: dict[str, Any]) -> None:
    run = Run(kind, options)
    for _ in range(6):
        run.step()
        clamp_data(run)
    assert_unknown(run, "through .data")


@kinds
def test_a_later_move_that_nobody_expected_makes_it_unknown(kind: type[Optimizer], options: dict[str, Any]) -> None:
    run = Run(kind, options)
    for k in range(12):
        run.step()
        if k == 6:
            clamp(run)
    assert_unknown(run, "moved outside of optimizer.step")


def test_a_move_after_the_last_step_is_noticed_too() -> None:
    run = Run(*KINDS[0])
    for _ in range(6):
        run.step()
    clamp(run)
    assert_unknown(run, "moved outside of optimizer.step")


@kinds
@pytest.mark.parametrize("move", [clamp, clamp_data], ids=["in place", "through data"])
def test_an_expected_move_is_taken_out(
    kind: type[Optimizer], options: dict[str, Any], move: Callable[[Run], None]
) -> None:
    run = Run(kind, options)
    for k in range(12):
        run.step()
        if k in (5, 8):
            run.meter.expect_moves()
            move(run)
    assert_exact(run)


def test_an_expected_move_that_does_not_come_changes_nothing() -> None:
    run = Run(*KINDS[0])
    for _ in range(6):
        run.step()
        run.meter.expect_moves()
    assert_exact(run)


def test_an_expectation_lasts_one_step() -> None:
    run = Run(*KINDS[0])
    for k in range(12):
        run.step()
        if k == 5:
            run.meter.expect_moves()
        if k == 7:
            clamp(run)
    assert_unknown(run, "moved outside of optimizer.step")


def test_several_moves_between_two_steps() -> None:
    run = Run(*KINDS[0])
    for k in range(10):
        run.step()
        if k == 6:
            run.meter.expect_moves()
            clamp(run)
            run.meter.compute()  # a log step between them
            run.meter.expect_moves()
            clamp_data(run)
            with torch.no_grad():
                run.weight.add_(1.0)
    assert_exact(run)


@kinds
@pytest.mark.parametrize("at", [0, 1, 7])
def test_swapping_and_restoring_is_no_move(kind: type[Optimizer], options: dict[str, Any], at: int) -> None:
    # Validation with averaged weights: the weights come back bitwise, their versions do not.
    run = Run(kind, options)
    for k in range(10):
        run.step()
        if k == at:
            run.meter.check_moves()
            held = [p.detach().clone() for p in run.parameters]
            with torch.no_grad():
                for p in run.parameters:
                    p.zero_()
                for p, h in zip(run.parameters, held, strict=True):
                    p.copy_(h)
            run.meter.forget_moves()
    assert_exact(run)


def test_a_move_before_the_swap_is_not_forgotten() -> None:
    run = Run(*KINDS[0])
    for k in range(10):
        run.step()
        if k == 7:
            clamp(run)
            run.meter.check_moves()
            run.meter.forget_moves()
    assert_unknown(run, "moved outside of optimizer.step")


def test_loading_a_start_before_the_first_step_is_no_move() -> None:
    # The measurement begins with the first gradient.
    run = Run(*KINDS[0])
    with torch.no_grad():
        run.weight.mul_(3.0)
    run.weight.data.add_(1.0)
    for _ in range(6):
        run.step()
    assert_exact(run)


def test_moves_of_a_sampled_run() -> None:
    run = Run(*KINDS[0], measure_every_n_steps=3)
    for _ in range(12):
        run.step()
        clamp(run)
    values = run.compute()
    assert values["displacement"] == pytest.approx(run.displacement, rel=1e-12)


def test_the_sketch_follows_the_moves_that_were_taken_out() -> None:
    run = Run(*KINDS[0])
    for _ in range(6):
        run.step()
        clamp(run)
    sketch = run.meter.sketch().double()
    run.meter.close()
    # 15 coordinates in 4093 buckets: exact but for float32.
    assert float(sketch.norm()) == pytest.approx(run.displacement, rel=1e-6)
