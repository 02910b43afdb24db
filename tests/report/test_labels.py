"""What a run is called by: the peak of its rate under schedules of torch, the batch of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedules

from lightning_speedlimit import RunRecord, TrajectoryMeter
from lightning_speedlimit.report import compare
from lightning_speedlimit.report.labels import effective_batch, optimizer_title, peak_rates

Make = Callable[[torch.optim.Optimizer], Any]


def scheduled(schedule: Make, *, steps: int = 100, every: int = 9, rates: tuple[float, ...] = (3e-3,)) -> RunRecord:
    """AdamW with a group for each rate, under a schedule; rows every 9 steps, of which none need be at the peak."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates]
    optimizer = torch.optim.AdamW(groups)
    scheduler = schedule(optimizer)
    meter = TrajectoryMeter(optimizer)
    record = RunRecord(meter.description() | {"batch_size": 8})
    for step in range(1, steps + 1):
        for group in groups:
            group["params"][0].grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
        if step % every == 0:
            record.take(meter)
    return record


def warm_up(optimizer: torch.optim.Optimizer) -> Any:
    """A twentieth of the rate, then all of it after 50 steps, then a cosine."""
    rise = schedules.LinearLR(optimizer, 0.05, 1.0, 50)
    return schedules.SequentialLR(optimizer, [rise, schedules.CosineAnnealingLR(optimizer, 50)], [50])


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.OneCycleLR(optimizer, max_lr=[3e-3, 3e-2][: len(optimizer.param_groups)], total_steps=100)


@pytest.mark.parametrize(
    ("schedule", "title"),
    [
        (warm_up, "AdamW lr 0.003, batch 8"),
        (one_cycle, "AdamW lr 0.003, batch 8"),
        (lambda o: schedules.LambdaLR(o, lambda k: min(k / 40, (40 / max(k, 1)) ** 0.5)), "AdamW lr 0.003, batch 8"),
        (lambda o: schedules.CosineAnnealingLR(o, 100), "AdamW lr 0.003, batch 8"),
        (lambda o: schedules.ExponentialLR(o, 0.8), "AdamW lr 0.003, batch 8"),  # 0.0005 by the first row
        (lambda o: schedules.LambdaLR(o, lambda k: 0.1 + k / 10), "AdamW lr 0.0297, batch 8"),  # of row 99: 0.1 + 9.8
    ],
)
def test_a_run_is_called_by_the_peak_of_its_rate(schedule: Make, title: str) -> None:
    assert optimizer_title(scheduled(schedule)) == title


def test_a_warm_up_that_was_not_finished_has_come_so_far() -> None:
    record = scheduled(warm_up, steps=27)
    last = 3e-3 * (0.05 + 0.95 * 26 / 50)  # of step 27
    assert record.columns["learning_rate"][-1] == pytest.approx(last)
    assert optimizer_title(record) == f"AdamW lr {last:.3g}, batch 8"


def test_every_group_has_its_peak() -> None:
    assert peak_rates(scheduled(warm_up, rates=(3e-3, 3e-2))) == pytest.approx([3e-3, 3e-2])
    assert peak_rates(scheduled(one_cycle, rates=(3e-3, 3e-2))) == pytest.approx([3e-3, 3e-2])
    half = scheduled(warm_up, steps=27, rates=(3e-3, 3e-2))
    assert peak_rates(half)[1] == pytest.approx(10 * peak_rates(half)[0])
    assert peak_rates(RunRecord()) == []
    assert peak_rates(scheduled(warm_up), step=9)[0] < 1e-3


def test_the_comparison_calls_a_run_by_its_peak() -> None:
    found = compare({"a": scheduled(warm_up), "b": scheduled(warm_up, rates=(0.01,))}, by="step", at=90)
    assert {group.name: group.title for group in found.groups} == {
        "a": "AdamW lr 0.003, batch 8",
        "b": "AdamW lr 0.01, batch 8",
    }


@pytest.mark.parametrize(
    ("run", "batch", "words"),
    [
        ({"batch_size": 128}, 128, ", batch 128"),
        ({"batch_size": 128, "accumulate_grad_batches": 4}, 512, ", batch 512 (128 x 4)"),
        ({"batch_size": 8, "accumulate_grad_batches": 4, "world_size": 2}, 64, ", batch 64 (8 x 4 x 2)"),
        ({"batch_size": 8, "world_size": 2, "strategy": "ModelParallelStrategy"}, 8, ", batch 8"),
        ({"batch_size": 128, "accumulate_grad_batches": 4, "samples_per_step": 509.5}, 512, ", batch 512 (128 x 4)"),
        ({"batch_size": 1, "samples_per_step": 64}, 64, ", batch 64"),  # batches that a sampler made
        ({"samples_per_step": 63.8}, 63.8, ", batch 63.8"),
        ({"batch_size": None, "accumulate_grad_batches": None}, None, ""),
    ],
)
def test_the_batch_is_that_of_a_step(run: dict[str, Any], batch: float | None, words: str) -> None:
    assert effective_batch(run) == batch
    assert optimizer_title(run) == "run" + words
