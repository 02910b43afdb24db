"""Parts of a run as runs of their own, against the meter that saw only that part; a run against its earlier self."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison_cases import decay, description, straight

from lightning_speedlimit import RunRecord, TrajectoryMeter, compare
from lightning_speedlimit.report.alignment import values_at

SWITCH, STEPS = 40, 100


def train(*, sketches: bool = True) -> tuple[RunRecord, RunRecord]:
    """One run of SGD with a record of all of it, and one of a second meter from step 40 on."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    whole = TrajectoryMeter(optimizer, loss_window=2)
    part: TrajectoryMeter | None = None
    records = RunRecord(whole.description() | {"loss_window": 2}), RunRecord(whole.description() | {"loss_window": 2})
    generator = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        if step == SWITCH + 1:
            part = TrajectoryMeter(optimizer, loss_window=2)
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        loss = (model(x) - x.sum(1, keepdim=True) - 1 + torch.randn(8, 1, generator=generator).double()).square()
        loss = loss.mean()
        optimizer.zero_grad()
        loss.backward()
        for meter in filter(None, (whole, part)):
            meter.record_loss(loss)
        optimizer.step()
        if step % 5 == 0:
            records[0].take(whole, {"samples": 8 * step})
            if part is not None:
                records[1].take(part, {"samples": 8 * (step - SWITCH)})
    if not sketches:
        return RunRecord.from_state_dict(records[0].state_dict(sketches=False)), records[1]
    return records


def test_sums_and_the_path_are_those_of_a_meter_that_began_there() -> None:
    whole, alone = train()
    part = whole.stretch(SWITCH)
    assert part.columns["step"].tolist() == alone.columns["step"].tolist()
    for name in ("elapsed", "path_length", "action", "work_ito", "samples", "step_norm", "learning_rate"):
        assert part.columns[name] == pytest.approx(alone.columns[name], rel=1e-9), name
    # Sketches are float32, and of 5 coordinates in 4093 buckets none share one.
    for name in ("displacement", "straightness", "kinematic_efficiency", "steadiness", "speed_limit_time"):
        assert part.columns[name] == pytest.approx(alone.columns[name], rel=1e-5), name
    assert part.sketches == pytest.approx(alone.sketches, abs=1e-6)
    assert part.run["stretch"] == {"start": SWITCH, "stop": STEPS}
    # The loss between two ends, each extrapolated.
    losses = dict(zip(whole.columns["step"].tolist(), whole.columns["loss"], strict=True))
    assert part.columns["loss_drop"][-1] == pytest.approx(losses[SWITCH] - losses[STEPS], rel=1e-9)
    assert part.columns["conversion"][-1] == pytest.approx(part.columns["loss_drop"][-1] / part.columns["work_ito"][-1])


def test_errors_of_a_stretch_are_those_of_both_its_ends() -> None:
    """A loss drop has the errors of two losses; an action of drawn steps that of the steps within alone."""
    record = straight(range(10, 101, 10), decay(50), loss_se=0.03, columns={"action_se": lambda k: 0.01 * math.sqrt(k)})
    part = record.stretch(40)
    assert part.columns["loss_drop_se"] == pytest.approx(np.full(6, math.hypot(0.03, 0.03)))
    assert part.columns["action_se"] == pytest.approx(0.01 * np.sqrt(part.columns["step"]))
    assert record.stretch(0, 40).columns["loss_drop_se"] == pytest.approx(np.full(4, 0.03))
    assert part.columns["loss_se"] == pytest.approx(np.full(6, 0.03))


def test_a_stretch_from_the_start_is_the_run_so_far() -> None:
    whole, _ = train()
    part = whole.stretch(0, SWITCH)
    rows = whole.columns["step"] <= SWITCH
    for name in ("step", "elapsed", "displacement", "action", "loss", "loss_drop", "samples", "straightness"):
        assert part.columns[name] == pytest.approx(whole.columns[name][rows], rel=1e-5), name
    assert math.isnan(part.summary().efficiency)
    assert part.reasons["efficiency"].startswith("of a stretch: record.windows()")
    again = whole.stretch(10, 90).stretch(30, 60)
    assert again.run["stretch"] == {"start": 40, "stop": 70}
    assert again.columns["action"] == pytest.approx(whole.stretch(40, 70).columns["action"], rel=1e-12)


def test_what_a_stretch_knows_is_kept_on_disk(tmp_path: Path) -> None:
    part = train()[0].stretch(SWITCH)
    part.save(tmp_path)
    assert RunRecord.load(tmp_path).columns["action"].tolist() == part.columns["action"].tolist()
    wanted = values_at(part, 30)["kinematic_efficiency"]
    assert part.windows(0, 30).kinematic_efficiency == pytest.approx(wanted, rel=1e-5)


def test_ends_between_rows_are_those_of_the_rows_before() -> None:
    whole, _ = train()
    part = whole.stretch(SWITCH + 3, STEPS - 1)
    assert part.run["stretch"] == {"start": SWITCH, "stop": STEPS - 5}
    assert part.columns["step"][0] == 5


def test_without_a_sketch_of_its_start_the_way_is_unknown() -> None:
    part = train(sketches=False)[0].stretch(SWITCH)
    assert np.isnan(part.columns["displacement"]).all()
    assert part.reasons["displacement"] == f"no sketch of step {SWITCH}, where the stretch begins"
    assert np.isfinite(part.columns["action"]).all()


@pytest.mark.parametrize(("start", "stop"), [(100, None), (40, 40), (60, 20), (500, 900)])
def test_a_stretch_without_a_row_is_refused(start: int, stop: int | None) -> None:
    with pytest.raises(ValueError, match=r"a stretch needs a row after its start, got .* of rows from step 5 to 100"):
        train()[0].stretch(start, stop)
    with pytest.raises(ValueError, match="of no rows"):
        RunRecord().stretch()


# --- compared


def saved(folder: Path, **settings: Any) -> Path:
    straight(range(10, 401, 10), decay(100), run=description(**settings)).save(folder)
    return folder


def test_two_stretches_of_one_run_by_their_names(tmp_path: Path) -> None:
    path = saved(tmp_path / "adamw")
    found = compare([f"{path}@0:100", f"{path}@100:200"], by="step")
    assert {group.name for group in found.groups} == {"adamw@0:100", "adamw@100:200"}
    drops = {group.name: group.values["loss_drop"] for group in found.groups}
    losses = [math.exp(-k / 100) for k in (0, 100, 200)]
    assert drops == pytest.approx({"adamw@0:100": losses[0] - losses[1], "adamw@100:200": losses[1] - losses[2]})
    said = found.verdict()
    assert said == [
        "adamw@100:200 took 100 steps for a loss drop of 0.233; adamw@0:100 took 100 steps for a loss drop of 0.632.",
        "adamw@100:200 has the lowest loss after 100 steps.",
    ]
    assert "loss drop" in found.table().splitlines()[2]
    assert found.at_loss == ()
    open_end = compare([f"{path}@300:", f"{path}@:100", path], by="step")
    assert {group.name for group in open_end.groups} == {"adamw@300:400", "adamw@0:100", "adamw"}


def test_stretches_that_have_no_loss_in_common_are_told_how_to_be_compared(tmp_path: Path) -> None:
    path = saved(tmp_path / "adamw")
    with pytest.raises(ValueError, match=r'behind adamw@200:400 at its start: .*compare them by="step"'):
        compare([f"{path}@0:200", f"{path}@200:400"])
    with pytest.raises(ValueError, match=rf"{path}: a stretch needs a row"):
        compare([f"{path}@500:600"])


def test_stretches_of_two_runs_over_the_same_losses_are_compared_at_one(tmp_path: Path) -> None:
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    straight(range(10, 801, 10), decay(200), run=description()).save(slow)
    saved(fast)
    found = compare([f"{slow}@200:600", f"{fast}@100:300"])  # both from e^-1 to e^-3
    assert found.winner == "fast@100:300"
    assert found.groups[0].values["elapsed"] == pytest.approx(200, rel=1e-9)
    assert found.groups[1].values["elapsed"] == pytest.approx(400, rel=1e-9)


def test_stretches_of_records_and_of_seeds(tmp_path: Path) -> None:
    record = straight(range(10, 401, 10), decay(100))
    found = compare([record.stretch(0, 100), record.stretch(100, 200)], by="step")
    assert {g.name for g in found.groups} == {f"SGD lr 0.1, batch 8, steps {a} to {a + 100}" for a in (0, 100)}
    for seed in (0, 1):
        saved(tmp_path / "adamw" / f"seed_{seed}")
    (group,) = compare(f"{tmp_path}/adamw@100:200", by="step").groups
    assert (group.name, len(group.points)) == ("@100:200", 2) or len(group.points) == 2


def test_a_folder_whose_name_looks_like_a_stretch_is_a_folder(tmp_path: Path) -> None:
    path = saved(tmp_path / "run@1:2")
    assert len(compare(path).groups[0].points[0].run.record) == 40


def test_a_run_against_its_earlier_self(tmp_path: Path) -> None:
    """The same folders at another time, or a copy of its record: two runs, which can't be told apart."""
    for day in ("monday", "tuesday"):
        saved(tmp_path / day / "version_0" / "speed_limit")
    found = compare([tmp_path / "monday", tmp_path / "tuesday"])
    assert {group.name for group in found.groups} == {"monday", "tuesday"}
    assert found.winner is None
    assert "no clear winner" in found.verdict()[0]
    own = tmp_path / "monday" / "version_0"
    shutil.copytree(own / "speed_limit", own / "speed_limit-2")
    beside = compare(tmp_path / "monday")
    assert len({group.name for group in beside.groups}) == 2
    now, before = straight(range(10, 401, 10), decay(80)), straight(range(10, 401, 10), decay(100))
    later = compare([before, now])
    assert [group.name for group in later.groups] == ["SGD lr 0.1, batch 8 (2)", "SGD lr 0.1, batch 8"]
    assert later.winner == "SGD lr 0.1, batch 8 (2)"
