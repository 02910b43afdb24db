"""A record kept by hand in a plain loop: `RunRecord(meter.description())`, and `record.take(meter)` on log steps."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_speedlimit import RunRecord, TrajectoryMeter
from lightning_speedlimit.record import MAX_SKETCHES


def loop(steps: int, every: int = 1, samples: int | None = None) -> tuple[RunRecord, list[torch.Tensor]]:
    """SGD on a linear regression: the record, and θ before each step and after the last."""
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    meter = TrajectoryMeter(optimizer)
    record = RunRecord(meter.description())
    weights = [flat(model)]
    for step in range(1, steps + 1):
        x = torch.randn(8, 5, dtype=torch.float64)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        meter.record_loss(loss)
        optimizer.step()
        weights.append(flat(model))
        if step % every == 0:
            record.take(meter, None if samples is None else {"samples": samples * step})
    meter.close()
    return record, weights


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def test_rows_are_the_meters() -> None:
    record, weights = loop(12, every=4)
    columns = record.columns
    assert columns["step"].tolist() == record.sketch_steps.tolist() == [4, 8, 12]
    moved = [float((weights[k] - weights[0]).norm()) for k in (4, 8, 12)]
    assert columns["displacement"] == pytest.approx(moved, rel=1e-12)  # float64 sums of a dozen terms
    # 6 coordinates in 4093 buckets share none: the sketch is the displacement itself, in float32
    assert np.linalg.norm(record.sketches.astype(float), axis=1) == pytest.approx(moved, rel=1e-6)


def test_samples_are_told_with_the_row() -> None:
    record, _ = loop(6, every=2, samples=8)
    assert record.columns["samples"].tolist() == [16, 32, 48]
    assert "samples" not in loop(2)[0].columns


def test_what_was_run_is_in_it() -> None:
    record, _ = loop(2)
    run = record.run
    assert run["clock"] == "steps"
    assert run["parameters"] == 6
    [optimizer] = run["optimizers"]
    assert optimizer["class"] == "SGD"
    [group] = optimizer["groups"]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.05, 0.5, False)
    assert "params" not in group


def test_the_wall_clock_goes_on_after_loading(tmp_path: Path) -> None:
    record, _ = loop(3)
    seconds = record.columns["seconds"]
    assert (np.diff(seconds) > 0).all()
    assert seconds[0] > 0
    record.save(tmp_path)
    again = RunRecord.load(tmp_path)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    for _ in range(4):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
    time.sleep(0.02)
    again.take(meter)
    added = again.columns["seconds"][-1] - seconds[-1]
    assert 0.018 <= added < 60  # the pause since loading, not since another process began


def test_a_long_run_keeps_its_last_point() -> None:
    steps = MAX_SKETCHES + 89
    record, weights = loop(steps)
    assert len(record.sketch_steps) <= MAX_SKETCHES
    assert record.sketch_steps[-1] == steps
    last = float((weights[-1] - weights[0]).norm())
    assert float(np.linalg.norm(record.sketches[-1].astype(float))) == pytest.approx(last, rel=1e-6)


def test_settings_that_are_tensors_become_numbers() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(3))], lr=torch.tensor(0.125), betas=(0.5, 0.75))
    [group] = TrajectoryMeter(optimizer).description()["optimizers"][0]["groups"]
    assert group["lr"] == 0.125
    assert list(group["betas"]) == [0.5, 0.75]


def test_a_loop_that_records_no_loss_is_told_how() -> None:
    optimizer = torch.optim.SGD([weights := torch.nn.Parameter(torch.ones(3))], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    record = RunRecord(meter.description())
    for _ in range(5):
        weights.grad = weights.detach().clone()
        optimizer.step()
        record.take(meter)
    assert record.reasons["loss_drop"] == "no loss was recorded: call meter.record_loss(loss) at each step"
    assert str(record.summary()).count("no loss was recorded") == 1


def test_a_record_made_before_the_first_step_says_how_much_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Linear(300, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    meter = TrajectoryMeter(optimizer, coordinates=512)
    record = RunRecord(meter.description())
    assert record.run["measured_coordinates"] is None
    for _ in range(3):
        model(torch.randn(8, 300)).square().mean().backward()
        optimizer.step()
    record.take(meter)
    measured, there = record.run["measured_coordinates"], record.run["optimized_coordinates"]
    assert there == 3010
    assert abs(measured - 512) <= 16
    assert "of 3,010 coordinates" in str(record.summary())
    meter.close()
