"""Parameters that several optimizers of one meter hold, from the start or from midway: each is measured once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.optim import SGD, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

SIZES = (5, 7, 3)
RATE = 0.1


class Walk:
    """A has the first two of three weights, B the last; all gradients are 1, each step takes 0.1 off a coordinate."""

    def __init__(self) -> None:
        self.weights = [torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in SIZES]
        self.a, self.b = SGD(self.weights[:2], lr=RATE), SGD(self.weights[2:], lr=RATE)
        self.meter = self.metered()

    def metered(self) -> TrajectoryMeter:
        return TrajectoryMeter([self.a, self.b])

    def steps(self, number: int, *which: Optimizer) -> None:
        for _ in range(number):
            for weight in self.weights:
                weight.grad = torch.ones_like(weight)
            for optimizer in which or (self.a, self.b):
                optimizer.step()
            self.meter.end_step()

    def give(self, optimizer: Optimizer, number: int = 1) -> None:
        optimizer.param_groups[0]["params"].append(self.weights[number])

    def take(self, optimizer: Optimizer, number: int = 1) -> None:
        group = optimizer.param_groups[0]
        group["params"] = [p for p in group["params"] if p is not self.weights[number]]

    def work(self) -> float:
        """Σ ‖u‖²/lr of the measured steps, which is their work: each coordinate's step adds 0.1."""
        return self.meter.compute()["work_ito"]


def counted(*steps: int) -> pytest.approx:  # type: ignore[valid-type]
    """The work of so many measured steps of each weight."""
    return pytest.approx(sum(RATE * n * size for n, size in zip(steps, SIZES, strict=True)), rel=1e-12)


SHARED = "1 parameters in both SGD and SGD: they are measured as those of SGD"


def test_one_that_another_is_given_midway_is_measured_once() -> None:
    walk = Walk()
    walk.steps(2)
    walk.give(walk.b)
    with pytest.warns(UserWarning, match=SHARED) as said:
        walk.steps(3)
    assert len([w for w in said if SHARED in str(w.message)]) == 1
    assert walk.work() == counted(5, 5, 5)
    assert walk.meter.measured_coordinates == sum(SIZES)
    # B's steps of it, but for the last, which A's next step will see
    assert walk.meter.compute()["moved_outside"] == pytest.approx(RATE * (2 * 7) ** 0.5, rel=1e-12)


@pytest.mark.filterwarnings("ignore:optimizers got")
def test_when_the_first_lets_go_the_second_goes_on() -> None:
    walk = Walk()
    walk.steps(2)
    walk.give(walk.b)
    walk.steps(1)
    walk.take(walk.a)
    walk.steps(4)
    assert walk.work() == counted(7, 3 + 4, 7)


@pytest.mark.filterwarnings("ignore:optimizers got")
def test_the_second_goes_on_with_what_was_shared_from_the_start() -> None:
    """Its own groups do not change when the first lets go."""
    walk = Walk()
    walk.meter.close()
    walk.give(walk.b)
    walk.meter = walk.metered()
    walk.steps(2)
    walk.take(walk.a)
    walk.steps(3)
    assert walk.work() == counted(5, 2 + 3, 5)


@pytest.mark.filterwarnings("ignore:optimizers got")
def test_it_comes_back_to_the_first_and_is_measured_by_the_one_that_kept_it() -> None:
    walk = Walk()
    walk.steps(2)
    walk.give(walk.b)
    walk.take(walk.a)
    walk.steps(2)  # B's
    walk.give(walk.a)
    walk.steps(2)  # still B's, and A's steps are moves
    assert walk.work() == counted(6, 2 + 2 + 2, 6)
    walk.take(walk.b)
    walk.steps(3)  # A's again
    assert walk.work() == counted(9, 6 + 3, 9)
    walk.steps(1, walk.b)
    assert walk.work() == counted(9, 9, 10)


@pytest.mark.filterwarnings("ignore:optimizers got")
@pytest.mark.parametrize("let_go", [False, True])
def test_a_saved_measurement_knows_whose_they_are(let_go: bool) -> None:
    """B's rate is three times A's: the work tells who of them measures the second weight."""
    walk = Walk()
    walk.b.param_groups[0]["lr"] = 3 * RATE
    walk.steps(2)
    walk.give(walk.b)
    if let_go:  # then it is B's, though A is the first to have it again
        walk.take(walk.a)
        walk.steps(1)
        walk.give(walk.a)
    walk.steps(1)
    state = walk.meter.state_dict()
    walk.meter.close()
    walk.meter = walk.metered()
    walk.meter.load_state_dict(state)
    walk.steps(2)
    total = 5 + let_go
    assert walk.work() == counted(total, 2 + 3 * 4 if let_go else 5, 3 * total)
    walk.take(walk.b if let_go else walk.a)
    walk.steps(1)
    assert walk.work() == counted(total + 1, 2 + 3 * 4 + 1 if let_go else 5 + 3, 3 * (total + 1))


def test_a_third_that_looked_before_the_second_took_it_leaves_it_to_the_second() -> None:
    walk = Walk()
    extra = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    walk.meter.close()
    third = SGD([extra], lr=RATE)
    walk.meter = TrajectoryMeter([walk.a, walk.b, third])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for optimizer in (walk.b, third):
            walk.give(optimizer)
        walk.steps(2)
        walk.take(walk.a)
        walk.meter.state_dict()  # all of them look at their groups
        walk.steps(2, walk.a, walk.b, third)
    assert walk.work() == counted(4, 2 + 2, 4)
