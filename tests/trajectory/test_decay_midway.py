"""Decoupled decay that begins in the middle of a run: what moved before it stays in the sums without it."""

from typing import Any

import pytest
import torch
from optimizer_cases import EXACT
from torch import nn
from torch.optim import AdamW, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

RATE, DECAY, STEPS = 0.01, 0.5, 30


class Root(Optimizer):
    """u = −lr sign(g) √|g| − lr w θ: no formula knows it."""

    def __init__(self, parameters: Any, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "decoupled_weight_decay": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * p.grad.sign() * p.grad.abs().sqrt())


@pytest.mark.parametrize("kind", [AdamW, Root])
@pytest.mark.parametrize("begins", [0, 1, 17])
@pytest.mark.parametrize("saved", [False, True])
def test_the_weighted_displacement_is_of_all_steps(begins: int, kind: Any, saved: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(3.0 * torch.randn(7, generator=generator, dtype=torch.float64))
    optimizer = kind([weight], lr=RATE, weight_decay=0.0)
    meter = TrajectoryMeter(optimizer)
    travelled, mobility = torch.zeros_like(weight.data), torch.zeros_like(weight.data)
    work = action = squares = 0.0
    for k in range(STEPS):
        if k == begins:
            optimizer.param_groups[0]["weight_decay"] = DECAY
        if k == 20 and saved:
            state = meter.state_dict()
            meter.close()
            meter = TrajectoryMeter(optimizer)
            meter.load_state_dict(state)
        weight.grad = weight.detach() + torch.randn(7, generator=generator, dtype=torch.float64)
        before, gradient = weight.detach().clone(), weight.grad.clone()
        optimizer.step()
        update = weight.detach() - before + RATE * (DECAY if k >= begins else 0.0) * before
        travelled += update
        work -= float(gradient @ update)
        squares += float(update @ update)
        if kind is AdamW:
            state_of = optimizer.state[weight]
            mu = RATE / ((state_of["exp_avg_sq"] / (1.0 - 0.999 ** (k + 1))).sqrt() + 1e-8)
            mobility += mu
            action += float((update**2 / mu).sum())
    values = meter.compute()
    meter.close()
    if kind is AdamW:
        wanted = float((travelled**2 / mobility).sum()) / action
    else:  # one effective mobility: m = K Σ‖u‖²/work, and Q = work
        wanted = float(travelled @ travelled) / (STEPS * squares)
    assert values["efficiency_action"] == pytest.approx(wanted, rel=EXACT)
    assert values["work_ito"] == pytest.approx(work, rel=EXACT)
