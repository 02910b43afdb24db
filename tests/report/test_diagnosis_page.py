"""docs/diagnosis.md: its thresholds, confusion table and what helped, recomputed from docs/diagnosis.json."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from lightning_speedlimit import RunRecord
from lightning_speedlimit.report import diagnosis
from lightning_speedlimit.report.findings import USEFUL_CONVERSION
from lightning_speedlimit.report.findings_of_work import NOISE_LEAD

ROOT = Path(__file__).parents[2]
HELD_OUT = ("digits", "epochs", "transformer")
CAUSES = ("noise", "bouncing", "nothing")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return dict(json.loads((ROOT / "docs" / "diagnosis.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "diagnosis.md").read_text(encoding="utf-8")


def one_line(page: str) -> str:
    return re.sub(r"\s+", " ", page)


def runs(found: dict[str, Any], group: str) -> list[dict[str, Any]]:
    return [run for run in found["truth"]["runs"] if run["group"] == group]


def truth(run: dict[str, Any]) -> str:
    """As the page defines it, from the oracle's shares."""
    shares = run["truth"]
    if shares["useful"] >= 0.5:
        return "nothing"
    return "noise" if shares["noise"] > shares["bouncing"] else "bouncing"


def told(run: dict[str, Any]) -> str:
    """By the diagnosis as it is now, from what the meter said then."""
    record = RunRecord({"batch_size": run["batch"]})
    values = {name: math.nan if value is None else value for name, value in run["measured"].items()}
    record.append(run["steps"], values)
    causes = [finding.cause for finding in diagnosis.diagnose(record)]
    return next((cause for cause in causes if cause in ("noise", "bouncing", "undefined")), "nothing")


def test_the_results_are_of_the_full_run(found: dict[str, Any]) -> None:
    assert not found["truth"]["quick"]
    assert not found["mended"]["quick"]
    assert {group: len(runs(found, group)) for group in ("fit", *HELD_OUT)} == {
        "fit": 36,
        "digits": 36,
        "epochs": 18,
        "transformer": 18,
    }


def test_the_oracle_s_shares_add_up(found: dict[str, Any]) -> None:
    for run in found["truth"]["runs"]:
        shares = run["truth"]
        assert shares["noise"] + shares["bouncing"] + shares["useful"] == pytest.approx(1, abs=1e-5)  # six digits
        assert truth(run) == shares["cause"]
        if run["batch"] is None:
            assert shares["noise"] == pytest.approx(0, abs=1e-4)  # float32 gradients of the same batch


def test_the_thresholds_are_those_of_the_fit(found: dict[str, Any], page: str) -> None:
    """Most often right on the runs of the fit; of several as good, those nearest to (0.5, 0)."""

    def right(useful: float, lead: float) -> int:
        count = 0
        for run in runs(found, "fit"):
            c, s = run["measured"]["conversion"], run["measured"]["signal_fraction"]
            cause = "nothing" if c >= useful else "noise" if (1 - 2 * c + s) > (c - s) + lead else "bouncing"
            count += cause == truth(run)
        return count

    grid = list(product([0.3 + 0.05 * i for i in range(9)], [-0.2 + 0.05 * i for i in range(9)]))
    best = max(right(*pair) for pair in grid)
    nearest = min((pair for pair in grid if right(*pair) == best), key=lambda p: math.hypot(p[0] - 0.5, p[1]))
    assert pytest.approx(nearest) == (USEFUL_CONVERSION, NOISE_LEAD)
    assert f"right in {best} of the {len(runs(found, 'fit'))} runs" in one_line(page)


def test_the_confusion_table_is_that_of_the_runs(found: dict[str, Any], page: str) -> None:
    for group in ("fit", *HELD_OUT):
        counts = Counter((truth(run), told(run)) for run in runs(found, group))
        for true in CAUSES:
            cells = [counts[true, said] for said in CAUSES]
            all_of_it = sum(n for (t, _), n in counts.items() if t == true)
            row = f"| {group}, {true} | {' | '.join(map(str, cells))} | {counts[true, true]} of {all_of_it} |"
            assert row in page
    held_out = [run for group in HELD_OUT for run in runs(found, group)]
    right = sum(truth(run) == told(run) for run in held_out)
    assert f"right in {right} of {len(held_out)}" in one_line(page)
    assert right >= 0.9 * len(held_out)


def test_the_signal_alone_is_worse(found: dict[str, Any], page: str) -> None:
    """Its threshold is the best one on the same runs of the fit."""

    def right(group: str, threshold: float) -> int:
        count = 0
        for run in runs(found, group):
            c, s = run["measured"]["conversion"], run["measured"]["signal_fraction"]
            cause = "nothing" if c >= 0.5 else "noise" if s < threshold else "bouncing"
            count += cause == truth(run)
        return count

    threshold = max([-1 + 0.05 * i for i in range(41)], key=lambda value: right("fit", value))
    by_signal = sum(right(group, threshold) for group in HELD_OUT)
    number = sum(len(runs(found, group)) for group in HELD_OUT)
    assert f"{by_signal} of {number}" in one_line(page)
    assert by_signal < sum(truth(run) == told(run) for group in HELD_OUT for run in runs(found, group))


def test_what_was_tried_is_on_the_page(found: dict[str, Any], page: str) -> None:
    for case in found["mended"]["cases"]:
        for name, row in case["rows"].items():
            steps = f"{row['steps']:.0f}" + ("" if row["reached"] else " (not reached)")
            factors = " | ".join(
                f"{row[key]:.2f}" for key in ("conversion", "straightness", "steadiness", "efficiency")
            )
            line = f"{row['setting']}** | " if name == "before" else f"| {name}: {row['setting']} | "
            line += f"{steps} | {row['examples']:,.0f} | {row['action']:.3g} | {factors} |"
            assert line in page


def cases(found: dict[str, Any], cause: str, optimizer: str) -> list[dict[str, Any]]:
    """The rows of the cases of a cause in which the run before was this optimizer's."""
    chosen = [case["rows"] for case in found["mended"]["cases"] if case["cause"] == cause]
    return [rows for rows in chosen if rows["before"]["setting"].startswith(optimizer)]


def held_out_neighbours(
    found: dict[str, Any], cause: str
) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Held-out runs that are told this cause, with four times the batch, and with a third of the rate; {}: none."""
    held_out = [run for group in HELD_OUT for run in runs(found, group)]
    places = {(r["group"], r["optimizer"], f"{r['lr']:.1g}", r["batch"]): r for r in held_out}
    neighbours = []
    for run in (run for run in held_out if told(run) == cause):
        at = run["group"], run["optimizer"]
        larger = places.get((*at, f"{run['lr']:.1g}", 4 * (run["batch"] or 0)), {})
        neighbours.append((run, larger, places.get((*at, f"{run['lr'] / 3:.1g}", run["batch"]), {})))
    return neighbours


def test_the_advice_that_is_given_held_in_runs_that_it_was_not_made_on(found: dict[str, Any], page: str) -> None:
    """A larger batch against noise: fewer steps, more data, in at least 8 of 10."""
    pairs = [(a, b) for a, b, _ in held_out_neighbours(found, "noise") if b and a["reached"] and b["reached"]]
    steps = [b["steps"] / a["steps"] for a, b in pairs]
    data = [4 * ratio for ratio in steps]
    assert len(pairs) >= 10
    assert {a["group"] for a, _ in pairs} == set(HELD_OUT)
    fewer = sum(few < 1 < more for few, more in zip(steps, data, strict=True))
    assert fewer >= 0.8 * len(pairs)
    text = one_line(page)
    assert f"told noise, {len(pairs)} came to the loss" in text
    assert (
        f"All {fewer} took fewer steps with the larger one ({statistics.median(steps):.2g} times in the median, "
        in text
    )
    assert f"{min(steps):.2f} to {max(steps):.2f}) and more data ({statistics.median(data):.1f} times, " in text
    assert f"{min(data):.2f} to {max(data):.1f})" in text
    assert f"{fewer} of {len(pairs)} held-out runs" in text


def test_a_lower_rate_against_bouncing_took_more_steps(found: dict[str, Any], page: str) -> None:
    pairs = [(a, c) for a, _, c in held_out_neighbours(found, "bouncing") if c]
    more = sum(c["steps"] > a["steps"] or not c["reached"] for a, c in pairs)
    assert more == len(pairs)
    assert f"{more} of {len(pairs)} held-out runs" in one_line(page)
    assert f"{len(pairs)} have a neighbour with a third of the rate. All {more} took more steps" in one_line(page)


def test_what_was_withdrawn_is_told_with_its_figures(found: dict[str, Any], page: str) -> None:
    """What the trials of the table showed, and why that was not enough."""
    text = one_line(page)
    rows = [case for cause in ("noise", "bouncing") for case in cases(found, cause, "SGD")]
    pairs = [(case["before"], case["momentum 0.9, lr / 10"]) for case in rows]
    percent = [100 * (after["steps"] / before["steps"] - 1) for before, after in pairs]
    less = [before["action"] / after["action"] for before, after in pairs]
    assert len(pairs) == 4
    assert f"a few percent more steps and data ({min(percent):.0f} to {max(percent):.0f})" in text
    assert f"and {min(less):.0f} to {max(less):.0f} times less action" in text
    assert "It failed outside: 44 % more steps on a CNN with BatchNorm" in text
    for rows_of_one in cases(
        found, "bouncing", "momentum"
    ):  # a lower rate: the action falls by more than the steps grow
        more_steps = rows_of_one["lr / 3"]["steps"] / rows_of_one["before"]["steps"]
        assert rows_of_one["before"]["action"] / rows_of_one["lr / 3"]["action"] > more_steps > 1
    early, falling = cases(found, "uneven speed", "Adam"), cases(found, "uneven speed", "momentum")
    for rows_of_one in [*early, falling[0]]:
        share = rows_of_one["constant, lr / 3"]["steps"] / rows_of_one["before"]["steps"]
        assert 0.25 <= share < 0.35
        assert rows_of_one["constant, lr / 3"]["action"] < 1.05 * rows_of_one["before"]["action"]
    before, after = falling[1]["before"], falling[1]["lr rises fivefold to twice it"]
    assert max(after[key] / before[key] for key in ("steps", "action")) < 0.9


def test_what_is_not_advised_did_not_help_in_both(found: dict[str, Any]) -> None:
    digits, letters = cases(found, "noise", "Adam")
    decays, before = digits["lr decays linearly"], digits["before"]
    assert decays["steps"] > 1.15 * before["steps"]  # steps and action are bought for each other
    assert decays["action"] > before["action"] / 1.25
    assert letters["lr decays linearly"]["steps"] < 1.05 * letters["before"]["steps"]
    digits, letters = cases(found, "bouncing", "momentum")
    assert digits["momentum 0.5"]["steps"] > digits["lr / 3"]["steps"]
    assert digits["momentum 0.5"]["action"] > digits["lr / 3"]["action"]
    for rows in (digits, letters):
        assert rows["momentum 0.5"]["conversion"] < 0.5
    (digits,), (letters,) = cases(found, "curved path", "momentum"), cases(found, "curved path", "Adam")
    for rows in (digits, letters):
        assert rows["lr / 3"]["straightness"] < 1.1 * rows["before"]["straightness"]
    assert digits["batch x 4"]["straightness"] > 1.9 * digits["before"]["straightness"]


def test_what_would_have_helped(found: dict[str, Any], page: str) -> None:
    """Conversions of the neighbours in the grid, looked up in the runs."""
    held_out = [run for group in HELD_OUT for run in runs(found, group)]
    places = {(r["group"], r["optimizer"], f"{r['lr']:.1g}", r["batch"]): r for r in held_out}
    gains: dict[str, list[tuple[float, float, float, float]]] = {"noise": [], "bouncing": []}
    for run in held_out:
        at = run["group"], run["optimizer"]
        larger = places.get((*at, f"{run['lr']:.1g}", 4 * (run["batch"] or 0)))
        slower = places.get((*at, f"{run['lr'] / 3:.1g}", run["batch"]))
        if larger and slower and told(run) in gains:
            now, *others = (r["measured"]["conversion"] for r in (run, larger, slower))
            steps = [r["steps"] / run["steps"] for r in (larger, slower)]
            gains[told(run)].append((*(other / now for other in others), *steps))
    noise, bouncing = gains["noise"], gains["bouncing"]
    raised = [sum(gain[i] > 1 for gain in noise) for i in (0, 1)]
    more = sum(batch > rate for batch, rate, *_ in noise)
    text = one_line(page)
    assert f"told noise, {len(noise)} have both neighbours" in text
    assert (
        f"in {raised[0]} of them and a third of the learning rate in {raised[1]}; the batch by more in {more}." in text
    )
    rate_more = sum(rate > batch for batch, rate, *_ in bouncing)
    assert f"told bouncing it is {len(bouncing)} runs, and the rate by more in {rate_more}" in text
    medians = [statistics.median(gain[i] for gain in noise) for i in (2, 3)]
    assert f"({medians[1]:.1f} times as many in the median" in text
    assert f"with the batch {medians[0]:.1f} times;" in text


def test_the_cases_have_what_they_are_about(found: dict[str, Any]) -> None:
    """Each run before the advice is told its own cause, in most seeds."""
    for case in found["mended"]["cases"]:
        named = [case["cause"] in causes for causes in case["rows"]["before"]["told"]]
        assert sum(named) > len(named) / 2, (case["problem"], case["cause"])


def run_script(name: str, output: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "diagnosis" / name), "--quick", "--output", str(output)],
        cwd=output,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return dict(json.loads((output / "diagnosis.json").read_text(encoding="utf-8")))


@pytest.mark.slow
def test_the_scripts_do_what_they_say(tmp_path: Path) -> None:
    result = run_script("truth.py", tmp_path)["truth"]
    assert [run["truth"]["cause"] for run in result["runs"][:3]] == ["noise", "bouncing", "nothing"]
    assert [run["told"] for run in result["runs"][:3]] == ["noise", "bouncing", "nothing"]
    both = run_script("mended.py", tmp_path)
    assert both["truth"] == result, "the other part stays"
    (case,) = both["mended"]["cases"]
    assert case["rows"]["batch x 4"]["conversion"] > case["rows"]["before"]["conversion"]
