"""An optimizer's state made anew, loaded or written to of some parameters alone: each counts its own steps."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import EXACT, Walk
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS, RATE, CHANGED = 12, 0.02, 6
SIZES = ((4, 3), (5,), (6,))


class Mobilities:
    """u and μ = lr/(√v̂ + ε) of each parameter, by its own count of steps, as the optimizer's state has them then."""

    def __init__(self, optimizer: Optimizer, parameters: list[Any]) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self.action, self.travelled, self.m = 0.0, [0.0] * len(parameters), [0.0] * len(parameters)

    def step(self, step: Callable[[], Any], *, measured: bool = True) -> None:
        there = [p.grad is not None for p in self.parameters]
        before = [p.detach().clone() for p in self.parameters]
        step()
        for i, (p, old) in enumerate(zip(self.parameters, before, strict=True)):
            self.travelled[i] = self.travelled[i] + (p.detach() - old)
            if there[i] and measured:
                state, update = self.optimizer.state[p], p.detach() - old
                corrected = state["exp_avg_sq"] / (1.0 - 0.999 ** float(state["step"]))
                mu = RATE / (corrected.sqrt() + 1e-8)
                self.m[i] = self.m[i] + mu
                self.action += float((update.square() / mu).sum())

    @property
    def weighted(self) -> float:
        return math.fsum(float((t**2 / m).sum()) for t, m in zip(self.travelled, self.m, strict=True))


def popped(optimizer: Optimizer, weight: Tensor) -> None:
    optimizer.state.pop(weight)


def emptied(optimizer: Optimizer, weight: Tensor) -> None:
    optimizer.state[weight] = {}


def zeroed(optimizer: Optimizer, weight: Tensor) -> None:
    for entry in optimizer.state[weight].values():
        entry.zero_()


def replaced(optimizer: Optimizer, weight: Tensor) -> None:
    optimizer.state[weight]["step"] = torch.tensor(1.0)


def loaded(optimizer: Optimizer, weight: Tensor) -> None:
    """From where this parameter had come later than the others."""
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["step"] -= 4.0
    optimizer.load_state_dict(state)


def all_emptied(optimizer: Optimizer, weight: Tensor) -> None:
    optimizer.state.clear()


@pytest.mark.parametrize("attached", [0, 3], ids=["from the start", "midway"])
@pytest.mark.parametrize("change", [popped, emptied, zeroed, replaced, loaded, all_emptied])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_of_one_parameter(kind: Any, change: Callable[[Optimizer, Tensor], None], attached: int) -> None:
    walk = Walk(lambda ps: kind(ps, lr=RATE, weight_decay=0.0), sizes=SIZES)
    optimizer, known = walk.optimizers[0], Mobilities(walk.optimizers[0], walk.parameters)
    walk.meter.close()
    for k in range(STEPS):
        if k == attached:
            meter = TrajectoryMeter(optimizer)
        if k == CHANGED:
            change(optimizer, walk.parameters[1])
        walk.backward()
        if k < attached:
            optimizer.step()
        else:
            known.step(optimizer.step)
    values = meter.compute()
    assert values["work_action"] == pytest.approx(known.action, rel=EXACT)
    assert values["efficiency_action"] == pytest.approx(known.weighted / known.action, rel=EXACT)


def test_of_sampled_steps_those_in_between_count() -> None:
    """One parameter has no gradient in steps that are not measured."""
    walk = Walk(lambda ps: Adam(ps, lr=RATE), sizes=SIZES)
    walk.meter.close()
    meter = TrajectoryMeter(walk.optimizers[0], measure_every_n_steps=3)
    known = Mobilities(walk.optimizers[0], walk.parameters)
    for _ in range(STEPS):
        measured = meter._joint.measuring()
        walk.backward()
        if not measured:
            walk.parameters[1].grad = None
        known.step(walk.optimizers[0].step, measured=measured)
    assert meter.measured == STEPS // 3
    assert {float(walk.optimizers[0].state[p]["step"]) for p in walk.parameters} == {STEPS // 3, STEPS}
    values = meter.compute()
    assert values["work_action"] == pytest.approx(3.0 * known.action, rel=EXACT)


def test_a_decay_that_is_decoupled_from_midway_on() -> None:
    """Before it L2 is part of the force, from then on decay is no work."""
    walk, decay = Walk(lambda ps: Adam(ps, lr=RATE, weight_decay=0.1), sizes=SIZES), 0.1
    work = 0.0
    for k in range(STEPS):
        walk.optimizers[0].param_groups[0]["decoupled_weight_decay"] = apart = k >= CHANGED
        walk.backward()
        force, before = -walk.copies.gradient(), walk.copies.weights()
        walk.step()
        update = walk.copies.updates[-1]
        work += float((force @ (update + RATE * decay * before)) if apart else ((force - decay * before) @ update))
    assert walk.meter.compute()["work_ito"] == pytest.approx(work, rel=EXACT)


def test_a_group_of_which_this_process_holds_nothing() -> None:
    """Without a gradient its optimizer has no state: no formula is asked for parameters without coordinates."""
    empty, parameter = torch.nn.Parameter(torch.zeros(0)), torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([{"params": [empty]}, {"params": [parameter]}], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    empty._fsdp_flattened = True  # type: ignore[attr-defined]
    for _ in range(3):
        parameter.grad = torch.ones(3)
        optimizer.step()
    assert meter.recorder.failure is None
    assert meter.compute()["work_action"] > 0.0
    meter.close()
