"""Optimizers with parameters twice, without hooks, that write into gradients, and one for each parameter."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import (
    EXACT,
    KINEMATIC,
    WORKS,
    Bare,
    Copies,
    Deaf,
    Inertial,
    Walk,
    Writer,
    assert_effective,
    assert_right,
)
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS = 10
THREE = ((4, 3), (5,), (2,))
# torch itself warns of it
twice = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")


@twice
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_twice_in_one_group(kind: type[Optimizer]) -> None:
    """It moves twice by its gradient: measured once, and no formula says what multiplies its force."""
    walk = Walk(lambda ps: kind([ps[0], ps[0], ps[1]], lr=0.05))
    for _ in range(STEPS):
        walk.backward()
        walk.step()
    assert_effective(assert_right(walk.meter, walk.copies), walk.copies)


@twice
def test_the_other_groups_keep_their_mobility() -> None:
    walk = Walk(lambda ps: SGD([{"params": [ps[0], ps[0]]}, {"params": ps[1:], "lr": 0.02}], lr=0.05), sizes=THREE)
    double, single = Copies(walk.parameters[:1]), Copies(walk.parameters[1:])
    for _ in range(STEPS):
        walk.backward()
        double.step(lambda: single.step(walk.step))
    values, a, b = assert_right(walk.meter, walk.copies), double.values(), single.values()
    # Σ u²/μ: of the one group its work, of the other Σ u²/lr; Σ (Δθ)²/m: D²/(K μ) with μ = A/work, and D²/(K lr)
    action = a["work_ito"] + b["action"] / 0.02
    assert values["work_action"] == pytest.approx(action, rel=EXACT)
    weighted = a["kinematic_efficiency"] * a["work_ito"] + b["displacement"] ** 2 / (STEPS * 0.02)
    assert values["efficiency_action"] == pytest.approx(weighted / action, rel=EXACT)


@pytest.mark.parametrize("second", [Adam, SGD])
def test_the_first_of_those_that_share_a_parameter_measures_it(second: type[Optimizer]) -> None:
    """What the second does to it is outside of the first one's steps."""
    with pytest.warns(UserWarning, match=second.__name__):
        walk = Walk(lambda ps: [SGD(ps[:2], lr=0.05), second(ps[1:], lr=0.02)], sizes=THREE)
    first, rest = Copies(walk.parameters[:2]), Copies(walk.parameters[2:])
    for _ in range(STEPS):
        walk.backward()
        first.step(walk.optimizers[0].step)
        rest.step(walk.optimizers[1].step)
        walk.meter.end_step()
    values, a, b = walk.meter.compute(), first.values(), rest.values()
    assert values["displacement"] == pytest.approx(math.hypot(a["displacement"], b["displacement"]), rel=EXACT)
    for name in ("action", "work_ito", "work_anti_ito"):  # sums over coordinates
        assert values[name] == pytest.approx(a[name] + b[name], rel=EXACT), name
    assert values["moved_outside"] == pytest.approx(a["moved_outside"], rel=EXACT)


def test_a_shared_parameter_that_a_third_is_given_later_is_measured_once() -> None:
    weights = [torch.zeros(n, requires_grad=True) for n in (5, 7, 3)]
    optimizers = [SGD(weights[:1], lr=0.1), SGD(weights[:2], lr=0.1), SGD(weights[2:], lr=0.1)]
    with pytest.warns(UserWarning, match="measured as those of SGD"):
        meter = TrajectoryMeter(optimizers)
    for step in range(3):
        if step == 1:
            optimizers[2].add_param_group({"params": weights[:1]})
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizers[0].step()
        optimizers[2].step()
    values = meter.compute()
    assert meter.measured_coordinates == 5 + 3  # the second has not stepped
    assert values["displacement"] == pytest.approx(0.3 * 8**0.5, rel=1e-6)  # the third's steps of the first are moves
    meter.close()


def test_a_shared_parameter_that_its_optimizer_hands_to_a_third_is_measured_there() -> None:
    weights = [torch.zeros(n, requires_grad=True) for n in (5, 7, 3)]
    optimizers = [SGD(weights[:2], lr=0.1), SGD(weights[:2], lr=0.1), SGD(weights[2:], lr=0.1)]
    with pytest.warns(UserWarning, match="measured as those of SGD"):
        meter = TrajectoryMeter(optimizers)
    for optimizer in optimizers[:2]:
        del optimizer.param_groups[0]["params"][0]
    optimizers[2].add_param_group({"params": weights[:1]})
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizers[2].step()
    values = meter.compute()
    assert (meter.measured_coordinates, values["moved_outside"]) == (5 + 3, 0.0)
    assert values["displacement"] == pytest.approx(0.3 * 8**0.5, rel=1e-6)
    meter.close()


@pytest.mark.parametrize("decay", [(0.1, 0.2), "cosine", {"matrices": 0.1}])
def test_an_option_of_this_name_may_be_anything(decay: Any) -> None:
    class Own(Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"weight_decay": decay})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data -= 0.1 * p.grad

    weight = torch.zeros(5, requires_grad=True)
    optimizer = Own([weight])
    meter = TrajectoryMeter(optimizer)
    for _ in range(3):
        weight.grad = torch.ones(5)
        optimizer.step()
    assert meter.compute()["displacement"] == pytest.approx(0.3 * 5**0.5, rel=1e-6)


@pytest.mark.parametrize("kind", [Bare, Deaf])
@pytest.mark.parametrize("place", [0, 1])
def test_one_whose_hooks_do_not_work_is_named_and_the_rest_measured(kind: type[Optimizer], place: int) -> None:
    def both(ps: Any) -> list[Optimizer]:
        return [SGD(ps[:1], lr=0.1), kind(ps[1:])][:: -1 if place == 0 else 1]

    with pytest.warns(UserWarning, match=kind.__name__):
        walk = Walk(both)
    copies = Copies(walk.parameters[:1])
    for _ in range(STEPS):
        walk.backward()
        walk.step(copies)
    assert_right(walk.meter, copies)
    assert (walk.meter.steps, walk.meter.compute()["elapsed"]) == (STEPS, STEPS)


@pytest.mark.parametrize("kind", [Bare, Deaf])
def test_if_no_hook_works_nothing_can_be_measured(kind: type[Optimizer]) -> None:
    with pytest.raises(TypeError, match=kind.__name__):
        Walk(kind)


# --- that write into the gradient ---------------------------------------------------------------------------

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "decay": lambda p: p.grad.add_(p, alpha=0.5),
    "decay through data": lambda p: p.grad.data.add_(p.data, alpha=0.5),
    "normalised": lambda p: p.grad.div_(p.grad.norm()),
    "replaced": lambda p: setattr(p, "grad", p.grad + 0.5 * p.detach()),
}


@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize("start", [0, 5], ids=["always", "from step 5"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_a_step_makes_of_the_gradient_does_not_matter(
    write: Callable[[Tensor], Any], start: int, closure: bool
) -> None:
    """The force is what the loss gave; decay and the like are part of the update."""
    walk = Walk(functools.partial(Writer, write=write, start=start))
    for _ in range(STEPS):
        if closure:
            walk.by_closure()
        else:
            walk.backward()
            walk.step()
    assert_effective(assert_right(walk.meter, walk.copies), walk.copies)


def test_moving_without_a_gradient_is_motion_without_work() -> None:
    walk = Walk(Inertial)
    for k in range(STEPS):
        walk.backward()
        if k >= 4:
            walk.parameters[0].grad = None
        walk.step()
    assert assert_right(walk.meter, walk.copies)["moved_outside"] == 0.0


def test_moving_without_any_gradient_is_no_known_work() -> None:
    """Nobody has said what the force was: another loop's batch, or none."""
    walk = Walk(Inertial)
    for k in range(STEPS):
        walk.backward()
        if k == 4:
            for p in walk.parameters:
                p.grad = None
        walk.step()
    values = assert_right(walk.meter, walk.copies, KINEMATIC)
    for name in (*WORKS, "work_action", "efficiency_action"):
        assert math.isnan(values[name]), name
        assert "no gradient" in walk.meter.reasons[name], name


@pytest.mark.parametrize("apart", [True, False], ids=["one for each", "all in one"])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_without_a_gradient_the_force_is_zero(kind: Any, apart: bool) -> None:
    """An update's far force is that of the next joint step, whether its parameter has a gradient there or not."""
    walk = Walk(lambda ps: [kind([p], lr=0.05) for p in ps] if apart else kind(ps, lr=0.05), sizes=THREE)
    for k in range(STEPS):
        walk.backward()
        for p, present in zip(walk.parameters, (True, k % 2 == 0, k < 7), strict=True):
            if not present:
                p.grad = None
        walk.step()
    assert_right(walk.meter, walk.copies, (*KINEMATIC, *WORKS))
    assert walk.meter.steps == STEPS
