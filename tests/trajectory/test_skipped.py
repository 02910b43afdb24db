"""Steps that a loss scaler skips: a fused optimizer steps and leaves θ alone, any other does not step at all.

The two must measure the same: the update before the skipped step then meets the gradient after it.
"""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS = 14
# float32 trainings whose kernels order their operations otherwise: an ulp (6e-8) per step, carried on by 14 steps.
SAME = 1e-4
# A loop records a loss at the count of steps, in which those are that a fused optimizer began and left out.
FROM_LOSSES = ("loss", "entropy", "conversion", "efficiency")
RECIPES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {"lr": 0.05}),
    (SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
    (Adam, {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1}),
    (AdamW, {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.5}),
]
recipes = pytest.mark.parametrize(("kind", "options"), RECIPES, ids=["-".join([k.__name__, *o]) for k, o in RECIPES])


def run(
    kind: type[Optimizer],
    options: dict[str, Any],
    skipped: set[int],
    *,
    fused: bool,
    **meter: Any,
) -> Any:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = kind(model.parameters(), fused=fused, **options)
    measured = TrajectoryMeter(optimizer, loss_window=2, **meter)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    for k in range(STEPS):
        generator = torch.Generator().manual_seed(k)
        x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        if k in skipped:
            model[0].weight.grad[0, 0] = math.inf  # type: ignore[union-attr, index]
        else:
            measured.record_loss(loss)
        scaler.step(optimizer)
        scaler.update()
    values = measured.compute()
    measured.close()
    return values


SKIPPED: list[set[int]] = [set(), {0}, {5}, {5, 6}, {STEPS - 1}]
# torch leaves the momentum of a fused SGD uninitialized where its first step is skipped.
CASES = [(*recipe, s) for recipe in RECIPES for s in SKIPPED if not (0 in s and "momentum" in recipe[1])]


@pytest.mark.parametrize(("kind", "options", "skipped"), CASES)
def test_a_fused_step_that_is_skipped_leaves_no_trace(
    kind: type[Optimizer], options: dict[str, Any], skipped: set[int]
) -> None:
    fused, other = (run(kind, options, skipped, fused=flag) for flag in (True, False))
    for name, value in other.items():
        if name.startswith(FROM_LOSSES) and name != "efficiency_action":
            continue
        assert fused[name] == pytest.approx(value, rel=SAME, abs=SAME * abs(other["work_ito"]), nan_ok=True), name


@recipes
def test_infinite_gradients_do_not_reach_sampled_sums(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """Skipped steps among the measured ones and after them, where only the gradient is looked at."""
    values = run(kind, options, {3, 4, 7, 8, 9}, fused=True, measure_every_n_steps=3)
    for name in ("work_ito", "work_anti_ito", "work_action", "path_length", "displacement", "efficiency_action"):
        assert math.isfinite(values[name]), name
