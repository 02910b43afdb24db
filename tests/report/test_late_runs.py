"""Runs that were measured from a later step on: left out of comparisons, and said so wherever they are shown."""

from pathlib import Path

import pytest
from comparison_cases import reaching

from lightning_speedlimit import RunRecord, compare
from lightning_speedlimit.cli.showing import show_runs
from lightning_speedlimit.report import compare_models
from lightning_speedlimit.report.alignment import By

SAID = "Left out: late (measured only from step 96 on), for what came before is in none of their numbers."


def late(elapsed: float = 1.0, step: int = 96, **settings: object) -> RunRecord:
    """It would win: it needs least."""
    return reaching(elapsed, 0.01, since_step=step, **settings)


@pytest.mark.parametrize("by", ["loss", "step", "time"])
def test_a_run_measured_only_from_a_later_step_on_wins_nothing(by: By) -> None:
    runs = {"slow": reaching(9, 3), "fast": reaching(5, 1), "late": late(3)}
    if by == "time":
        for record in runs.values():
            record.append(999, {"seconds": 4.0, "loss": 0.1, "loss_se": 0.0})
    found = compare(runs, by=by)
    assert sorted(group.name for group in found.groups) == ["fast", "slow"]
    assert found.frontier == ("fast",)
    assert found.late == ("late (measured only from step 96 on)",)
    assert found.verdict()[-1] == SAID
    assert SAID in " ".join(found.table().split())
    assert SAID in found.to_dict()["verdict"]


def test_a_run_alone_is_left_with_the_reason() -> None:
    assert compare({"fast": reaching(5, 1), "late": late()}).verdict() == [
        "One run: there is nothing to compare it with.",
        SAID,
    ]


def test_one_late_seed_is_left_out_of_its_group() -> None:
    found = compare({"A": [reaching(5, 1), reaching(5.5, 1), late()], "B": reaching(9, 3)})
    assert {group.name: len(group.points) for group in found.groups} == {"A": 2, "B": 1}
    assert found.late == ("A 3 (measured only from step 96 on)",)


def test_of_each_model_its_own() -> None:
    first, second = compare_models({"a": reaching(4, 1), "late": late(), "b": late(parameters=20)})
    assert first.late == ("late (measured only from step 96 on)",)
    assert second.late == ()
    assert second.verdict()[0].startswith("All were measured only from step 96 on")


def test_all_from_one_step_on_are_compared_and_it_is_said_first() -> None:
    found = compare({"a": late(4), "b": late(9)})
    assert [group.name for group in found.groups] == ["a", "b"]
    assert found.verdict()[0] == (
        "All were measured only from step 96 on: their costs and actions are without what was before."
    )


def test_different_later_steps_have_no_start_in_common() -> None:
    with pytest.raises(ValueError, match=r"got a \(measured only from step 96 on\) and b \(.* step 40 on\); resume"):
        compare({"a": late(), "b": late(step=40)})


def test_resumed_with_its_state_is_as_the_others() -> None:
    """Such a run has no later start; 0 is the start."""
    found = compare({"a": reaching(5, 1, since_step=0), "b": reaching(9, 3)})
    assert [group.name for group in found.groups] == ["a", "b"]
    assert found.late == ()
    assert not any("measured only" in text for text in (*found.verdict(), *found.notes))


def test_its_summary_and_sentence_begin_with_it() -> None:
    summary = late().summary()
    assert str(summary).splitlines()[2].startswith("Measured only from step 96 on: what the 96 steps before it cost")
    assert summary.sentence().startswith("from step 96 on, 2 steps moved")
    assert "Measured only" not in str(reaching(5, 1).summary())
    assert reaching(5, 1).summary().sentence().startswith("10 steps moved")


def test_show_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late().save(tmp_path / "late")
    show_runs(tmp_path / "late", json=False)
    assert "Measured only from step 96 on: what the 96 steps before it cost" in capsys.readouterr().out
    reaching(5, 1).save(tmp_path / "whole")
    show_runs(tmp_path, json=False)
    out = capsys.readouterr().out
    assert "2 from 96 on" in out
    assert '"from 96 on": measured only from step 96 of the training on' in out
