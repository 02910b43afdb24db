"""Optimizers that move before they evaluate their closure, and wrappers that move the weights around a step."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from optimizer_cases import (
    KINEMATIC,
    WORKS,
    Around,
    Averager,
    Climber,
    Lookahead,
    ScheduleFree,
    Sharpness,
    Walk,
    assert_effective,
    assert_right,
)
from torch import nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

STEPS = 10
Make = Callable[[Any], Optimizer]
# Whether a gradient that is there before the step is the force; else it is that of the closure's first evaluation.
OWN: dict[str, Make] = {"SAM": Sharpness, "SAM through data": functools.partial(Sharpness, data=True)}
FIRST: dict[str, Make] = {
    "SAM that evaluates twice": functools.partial(Sharpness, first=True),
    "SAM that evaluates twice through data": functools.partial(Sharpness, first=True, data=True),
    "schedule-free": ScheduleFree,
    "LBFGS": functools.partial(LBFGS, lr=0.1, max_iter=3),
    "SGD": functools.partial(SGD, lr=0.1),
}


@pytest.mark.parametrize("clear", ["None", "zero", "stay"])  # what becomes of the gradients after the step
@pytest.mark.parametrize("name", [*OWN, *FIRST])
def test_the_force_is_the_gradient_before_the_first_move(name: str, clear: str) -> None:
    """Gradients that are left from the last step, and zeros, are not new."""
    walk = Walk((OWN | FIRST)[name])
    for k in range(STEPS):
        walk.meter.record_loss(2.0 - 0.1 * k)
        returned = walk.by_closure(own=name in OWN)
        assert returned.requires_grad, "what the step returns is the closure's own loss"
        if clear != "stay":
            walk.optimizers[0].zero_grad(set_to_none=clear == "None")
    values = assert_right(walk.meter, walk.copies)
    if name != "SGD":
        assert_effective(values, walk.copies)
    assert values["moved_outside"] == 0.0, "a move within a step is none"


@pytest.mark.parametrize("name", ["SAM that evaluates twice", "SGD"])
def test_clipping_within_the_closure(name: str) -> None:
    walk = Walk(FIRST[name])

    def clip() -> None:
        walk.meter.observe_gradients(walk.optimizers[0])
        nn.utils.clip_grad_norm_(walk.parameters, 1.0)

    action = 0.0
    for _ in range(STEPS):
        walk.by_closure(prepare=clip)
        factor = min(1.0, 1.0 / float(walk.copies.raw[-1].norm()))
        action += float(walk.copies.updates[-1].square().sum()) / (0.1 * factor)
    values = assert_right(walk.meter, walk.copies)
    if name == "SGD":
        # clip_grad_norm_ divides by the norm + 1e-6, so its factor is known to 1e-6 here
        assert values["work_action"] == pytest.approx(action, rel=1e-5)
    else:
        assert_effective(values, walk.copies)


def test_steps_with_and_without_a_closure() -> None:
    walk = Walk(FIRST["SGD"])
    for k in range(STEPS):
        if k % 3 == 0:
            walk.by_closure()
        else:
            walk.backward()
            walk.step()
    assert_right(walk.meter, walk.copies)


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize(("wrapper", "apart"), [(Lookahead, 3), (Climber, 0), (Averager, 0)])
def test_what_a_wrapper_moves_is_told_apart(wrapper: type[Around], apart: int, kind: type[Optimizer]) -> None:
    """D is what the base's steps did; the force is the gradient that it was given.

    `apart`: the steps before which the weights were not where the base had left them.
    """
    walk = Walk(lambda parameters: kind(parameters, lr=0.1))
    outer: Any = wrapper(walk)
    for _ in range(STEPS):
        walk.backward()
        outer.step()
    values = assert_right(walk.meter, walk.copies, (*KINEMATIC, *WORKS, "moved_outside"))
    assert sum(move > 0 for move in walk.copies.moves()) == apart
    assert ("displacement" in walk.meter.reasons) == (apart > 0)
    assert str(apart) in walk.meter.reasons.get("displacement", "0")
    assert 0 < values["efficiency_action"] <= 1 + 1e-12
