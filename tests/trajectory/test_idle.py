"""m_i = Σ_{k: u_{k,i} ≠ 0} c_k μ_{k,i}: a coordinate's own clock stands still while it rests."""

from typing import Any

import pytest
import torch
from optimizer_cases import EXACT, Copies
from torch import nn
from torch.optim import SGD

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS, RATE = 12, 0.1
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize": {"maximize": True},
    "momentum": {"momentum": 0.8},  # rests until its first gradient
    "falling rate": {},
    "clipped": {},
}


@pytest.mark.parametrize("name", CASES)
def test_idle_steps_do_not_count(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
    bias = nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64))
    optimizer = SGD([weight, bias], lr=RATE, **CASES[name])
    meter, copies = TrajectoryMeter(optimizer), Copies([weight, bias])
    mobilities = []
    for k in range(STEPS):
        awake = torch.tensor([1, k >= 5, 0, k % 3 == 0, k < 8])
        weight.grad = awake * (1 + torch.rand(5, generator=generator, dtype=torch.float64))
        bias.grad = torch.rand(2, generator=generator, dtype=torch.float64)
        rate, factor = RATE / (1 + k if name == "falling rate" else 1), 1.0
        optimizer.param_groups[0]["lr"] = rate
        if name == "clipped":
            meter.observe_gradients(optimizer)
            raw = copies.gradient().norm()
            nn.utils.clip_grad_norm_([weight, bias], 0.5)
            factor = float(copies.gradient().norm() / raw)
        copies.step(optimizer.step)
        mobilities.append(factor * rate / (1 - CASES[name].get("momentum", 0.0)))
    m = torch.tensor(mobilities, dtype=torch.float64) @ torch.stack([(u != 0).double() for u in copies.updates])
    moved = torch.tensor([True, True, False, True, True, True, True])
    assert torch.equal(m > 0, moved)
    found = [torch.as_tensor(meter.accumulated_mobility(p), dtype=torch.float64).expand(len(p)) for p in (weight, bias)]
    # of a coordinate that never moved the clock does not matter: 0/0 counts 0
    torch.testing.assert_close(torch.cat(found)[moved], m[moved], rtol=EXACT, atol=0.0)
    distance = sum(copies.updates)
    weighted = float((distance[moved].square() / m[moved]).sum())
    spent = sum(float(u.square().sum()) / mu for u, mu in zip(copies.updates, mobilities, strict=True))
    values = meter.compute()
    assert values["work_action"] == pytest.approx(spent, rel=EXACT)
    assert values["efficiency_action"] == pytest.approx(weighted / spent, rel=EXACT)
    assert values["efficiency_action"] <= 1 + 1e-12
