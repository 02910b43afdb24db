"""What a loss cost, on each axis: against crossings that plain numpy finds in the records."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from comparison_cases import Curve, decay, description, straight

from lightning_speedlimit import RunRecord, compare
from lightning_speedlimit.report import figures

COSTS = ("steps", "samples", "tokens", "epochs", "seconds")


def trained(loss: Curve, batch: int, **columns: Callable[[float], float]) -> RunRecord:
    """Rows every 10 of 500 steps, of so many samples each, 60 tokens in one, 6,000 samples in an epoch."""
    own: dict[str, Any] = {
        "samples": lambda k: batch * k,
        "tokens": lambda k: 60.0 * batch * k,
        "epochs": lambda k: batch * k / 6000,
        "seconds": lambda k: (0.002 + 1e-5 * batch) * k,
    }
    return straight(range(10, 501, 10), loss, run=description(batch_size=batch), columns=own | columns)


def read(record: RunRecord, cost: str, level: float) -> float:
    """The first point at which the chords of (cost, loss) come down to the level; both begin at 0 and at L_0."""
    columns = record.columns
    name = "step" if cost == "steps" else cost
    start = columns["loss"][-1] + columns["loss_drop"][-1]
    axis, loss = np.concatenate([[0], columns[name]]), np.concatenate([[start], columns["loss"]])
    end = int(np.flatnonzero(loss <= level)[0])
    share = (loss[end - 1] - level) / (loss[end - 1] - loss[end])
    return float(axis[end - 1] + share * (axis[end] - axis[end - 1]))


def two() -> dict[str, RunRecord]:
    """At the same loss the large batch took fewer steps, and more samples."""
    return {"small": trained(decay(100), 64), "large": trained(decay(40), 256)}


# --- each cost


@pytest.mark.parametrize("cost", COSTS)
def test_points_are_where_the_chords_on_that_axis_come_down(cost: Any) -> None:
    runs = two()
    found = compare(runs, at=0.3, cost=cost)
    assert found.axis.name == cost
    wanted = {name: read(record, cost, 0.3) for name, record in runs.items()}
    assert {group.name: group.values["cost"] for group in found.groups} == pytest.approx(wanted, rel=1e-12)
    assert [group.name for group in found.groups] == sorted(wanted, key=lambda name: wanted[name])
    for group in found.groups:
        low, high = group.cost_interval
        assert low <= wanted[group.name] <= high
    plain = found.to_dict()
    assert plain["cost"] == cost
    assert plain["groups"][0]["values"]["cost"] == pytest.approx(min(wanted.values()), rel=1e-12)


def test_uneven_batches_are_crossed_on_their_own_axis() -> None:
    """A batch that grows fourfold midway: samples are no multiple of steps."""
    grows = trained(decay(100), 64, samples=lambda k: 64.0 * k if k <= 100 else 6400 + 256.0 * (k - 100))
    found = compare({"grows": grows, "even": trained(decay(100), 64)}, at=0.2, cost="samples")
    by_name = {group.name: group.values for group in found.groups}
    assert by_name["grows"]["cost"] == pytest.approx(read(grows, "samples", 0.2), rel=1e-12)
    assert by_name["grows"]["cost"] > 1.5 * by_name["even"]["cost"]
    assert by_name["grows"]["step"] == by_name["even"]["step"]


def test_other_batches_are_compared_by_samples_and_steps_would_say_the_opposite() -> None:
    runs = two()
    found, steps = compare(runs, at=0.3), compare(runs, at=0.3, cost="steps")
    assert (found.axis.name, steps.axis.name) == ("samples", "steps")
    assert (found.winner, steps.winner) == ("small", "large")
    said = found.verdict()
    assert said[0].startswith("At loss 0.300, small needed the fewest samples (7,707 samples, ")
    counts = {name: read(record, "steps", 0.3) for name, record in runs.items()}
    assert said[1] == (
        f"Samples are counted (a step has 64 to 256); in steps large would be first ({counts['large']:.1f}, and small "
        f"{counts['small']:.0f})."
    )
    lines = found.table().splitlines()
    assert lines[2].split()[:3] == ["run", "samples", "steps"]
    assert lines[4].split()[:2] == ["small", "7,707"], "as the summary of a run writes its samples"
    assert not [note for note in found.notes if "samples" in note]
    asked = compare(runs, at=0.3, cost="seconds").verdict()
    assert not [text for text in asked if "Samples are counted" in text], "what was asked for needs no reason"
    assert 'steps have 64 to 256 samples, so that fewer steps are not fewer samples: cost="samples"' in steps.notes
    same = compare({"a": trained(decay(100), 64), "b": trained(decay(30), 256)}, at=0.3)
    assert same.winner == "a"  # 120 steps of 64 against 36 of 256
    quick = compare({"a": trained(decay(100), 64), "b": trained(decay(20), 256)}, at=0.3)
    assert quick.verdict()[1] == "Samples are counted (a step has 64 to 256); the first in steps is the same."


def test_batches_that_are_alike_are_compared_by_steps() -> None:
    """Of one size but for an epoch's last batch; and where samples are not known."""
    alike = {"a": trained(decay(100), 64), "b": trained(decay(40), 64, samples=lambda k: 61.0 * k)}
    assert compare(alike, at=0.3).axis.name == "steps"
    unknown = {"a": trained(decay(100), 64, samples=lambda k: math.nan), "b": trained(decay(40), 256)}
    assert compare(unknown, at=0.3).axis.name == "steps"
    known = compare(unknown | {"c": trained(decay(30), 64)}, at=0.3)
    assert known.axis.name == "steps", "not all have samples"
    assert any(note.startswith("steps have 64 to 256 samples") for note in known.notes)
    rates = {n: straight(range(1, 300), decay(50), run=description(clock="lr")) for n in "ab"}
    found = compare(rates)
    assert found.axis.name == "lr"
    assert found.table().splitlines()[2].startswith("run  learning rate, summed  steps")
    assert compare(rates, cost="steps").axis.key == "step"


@pytest.mark.parametrize("cost", ["samples", "tokens", "epochs", "seconds"])
def test_a_run_without_the_cost_is_named_with_the_reason_and_the_cure(cost: Any) -> None:
    lacking = trained(decay(50), 64, **{cost: lambda k: math.nan})
    lacking.amend({}, {cost: "nobody counted"})
    with pytest.raises(ValueError, match=rf"cost='{cost}' needs that column in every run, got none in lost \(nobody c"):
        compare({"kept": trained(decay(50), 64), "lost": lacking}, cost=cost)
    with pytest.raises(ValueError, match=r'or compare by cost="steps"'):
        compare({"bare": straight(range(1, 30), decay(9), columns={"seconds": lambda k: math.nan})}, cost=cost)


def test_a_cost_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"cost must be one of 'steps', 'samples', .*, got 'money'"):
        compare(two(), cost="money")  # type: ignore[arg-type]


def test_samples_that_are_lost_midway_leave_the_run_unplaced() -> None:
    """Resumed from a checkpoint without them."""
    broken = trained(decay(60), 64, samples=lambda k: 64.0 * k if k < 40 else math.nan)
    broken.amend({"samples": math.nan}, {"samples": "resumed without"})
    runs = {"a": trained(decay(50), 64), "b": trained(decay(55), 64), "broken": broken}
    found = compare(runs, at=0.2, cost="samples")
    assert found.frontier == ("a",)
    assert "The samples of broken are unknown: resumed without." in found.verdict()


def test_groups_have_the_mean_and_its_error_of_what_they_cost() -> None:
    records = [trained(decay(time), 64) for time in (90, 100, 110)]
    (group,) = compare({"A": records}, at=0.3, cost="samples").groups
    costs = [read(record, "samples", 0.3) for record in records]
    assert group.values["cost"] == pytest.approx(np.mean(costs), rel=1e-12)
    assert group.standard_errors["cost"] == pytest.approx(np.std(costs, ddof=1) / math.sqrt(3), rel=1e-9)
    low, high = group.cost_interval
    half = 4.302652730 * group.standard_errors["cost"]  # t(0.975; 2), and what may lie between two rows: a few samples
    share = math.exp(half / group.values["cost"])
    assert (low, high) == pytest.approx((group.values["cost"] / share, group.values["cost"] * share), abs=10)


def test_whoever_takes_less_of_both_beats_on_that_axis() -> None:
    """Fewer steps with more action trade; in samples the other has less of both."""
    runs = {"small": trained(decay(50), 8), "large": trained(decay(40), 32, action=lambda k: 0.04 * k)}
    assert set(compare(runs, at=0.3, cost="steps").frontier) == {"small", "large"}
    assert compare(runs, at=0.3, cost="samples").frontier == ("small",)


# --- the plane and the page


@pytest.mark.parametrize("cost", COSTS)
def test_the_plane_keeps_each_run_at_its_distance_from_its_limit(cost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """D²/(cost·A) with the D that is drawn is the kinematic efficiency, whatever is counted."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(figures, "plane", lambda points, **options: drawn.update(points=points, **options))
    found = compare(two(), at=0.3, cost=cost)
    found.figure()
    assert drawn["cost"] == cost
    for point, group in zip(drawn["points"], found.at_loss, strict=True):
        assert point.elapsed == group.values["cost"]
        limit = point.displacement**2 / (point.elapsed * point.action)
        assert limit == pytest.approx(group.values["kinematic_efficiency"], rel=1e-9)


def test_the_plane_is_labelled_with_what_is_counted() -> None:
    for cost, label in (("steps", "elapsed time τ (steps)"), ("samples", "samples"), ("seconds", "seconds")):
        figure = compare(two(), at=0.3, cost=cost).figure()  # type: ignore[arg-type]
        axes = figure.axes[0]
        assert axes.get_xlabel() == label
        assert axes.get_ylabel() == "action A (parameter²/step)"


def test_the_page_says_how_it_is_made_again(tmp_path: Any) -> None:
    path = tmp_path / "page.html"
    compare(two(), at=0.3).html(path)
    text = path.read_text("utf-8")
    assert "cost=&#39;samples&#39;" in text
    assert "Samples and action at the same loss" in text
