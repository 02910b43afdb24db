"""Who beats whom, how surely, and how that is said: against brute force, simulation and parsed text."""

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from comparison_cases import decay, description, reaching, straight
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_speedlimit
from lightning_speedlimit import Comparison, RunRecord, compare
from lightning_speedlimit.report import compare_models, figures
from lightning_speedlimit.report.settings import apart, settings_of
from lightning_speedlimit.report.text import COLUMNS
from lightning_speedlimit.words import count_with_error, interval, number, with_error

# Places in the plane; few values, so that ties and duplicates come up.
PLACES = st.lists(
    st.tuples(st.sampled_from([2.0, 3.0, 4.5, 7.0, 11.5]), st.sampled_from([0.5, 1.0, 2.0, 6.0])),
    min_size=2,
    max_size=9,
)


def at_half(places: list[tuple[float, float]], **options: Any) -> Comparison:
    """Runs that reach the loss ½ at these (τ, A)."""
    return compare({f"r{i}": reaching(*place) for i, place in enumerate(places)}, at=0.5, **options)


def standing(comparison: Comparison) -> dict[str, tuple[str | None, bool]]:
    return {group.name: (group.beaten_by, group.clearly) for group in comparison.at_loss}


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


# --- drawn coordinates

SHARE = {"measured_coordinates": 1048576, "optimized_coordinates": 9812345}
ERRORS = {"action_se": lambda k: 0.001 * k, "straightness": lambda k: 0.5, "straightness_se": lambda k: 0.25}


def drawn(time: float = 10.0, **settings: Any) -> RunRecord:
    return straight(range(1, 31), decay(time), run=description(**settings), columns=ERRORS)


def test_drawn_coordinates_are_said_with_their_errors() -> None:
    found = compare({"a": drawn(**SHARE)}, by="step", at=20)
    (group,) = found.groups
    assert group.standard_errors["action"] == pytest.approx(0.02, rel=1e-12)
    assert group.standard_errors["straightness"] == pytest.approx(0.25, rel=1e-12)
    said = "measured: 1,048,576 of 9,812,345 coordinates (10.7 %), values ± standard error"
    assert said in found.table().splitlines()
    assert "0.200 ± 0.020" in found.table()
    between = compare({"a": drawn(**SHARE)}, by="step", at=20.5).groups[0]  # linear between two rows
    assert between.standard_errors["action"] == pytest.approx(0.0205, rel=1e-12)
    mixed = compare({"a": drawn(**SHARE), "b": drawn(9.0)}, by="step", at=20)
    assert said.replace(" (10.7 %)", " (10.7 %) in a") in mixed.table().splitlines()
    assert math.isnan(mixed.groups[0].standard_errors["action"])  # b, with the lower loss, is exact
    replicas = compare({"a": [drawn(**SHARE), drawn(9.0, **SHARE)]}, by="step", at=20)
    assert said in replicas.table().splitlines()
    assert replicas.groups[0].standard_errors["action"] == 0.0  # of the spread


def test_exact_runs_do_not_speak_of_drawn_coordinates() -> None:
    plain, exact = (compare({"a": drawn(**run)}, by="step", at=20) for run in ({}, dict.fromkeys(SHARE, 10)))
    assert plain.table() == exact.table()
    assert "measured" not in exact.table()
    assert "±" not in exact.table()
    assert exact.to_dict()["groups"] == plain.to_dict()["groups"]


# --- who beats whom


@given(PLACES)
def test_dominance_is_the_brute_force_one(places: list[tuple[float, float]]) -> None:
    found = at_half(places)
    names = [f"r{i}" for i in range(len(places))]
    beaten = {
        n: {m for m, q in zip(names, places, strict=True) if beats(q, p)} for n, p in zip(names, places, strict=True)
    }
    for group in found.at_loss:
        if group.beaten_by is None:
            assert not beaten[group.name]
        else:
            assert group.beaten_by in beaten[group.name]
    assert set(found.frontier) == {name for name in names if not beaten[name]}
    for name in names:
        assert not beaten[name] or beaten[name] & set(found.frontier), "who is beaten is beaten from the frontier too"
    steps = [places[names.index(name)][0] for name in found.frontier]
    assert steps == sorted(steps), "from the fastest to the cheapest"


@settings(max_examples=40)
@given(places=PLACES, seed=st.randoms(use_true_random=False), scale=st.sampled_from([1e-3, 0.5, 40.0]))
def test_neither_the_order_of_the_runs_nor_the_scale_of_the_weights_matters(
    places: list[tuple[float, float]], seed: Any, scale: float
) -> None:
    named = {f"r{i}": place for i, place in enumerate(places)}
    shuffled = list(named)
    seed.shuffle(shuffled)
    there = compare({name: reaching(*named[name]) for name in named}, at=0.5)
    again = compare({name: reaching(named[name][0], scale**2 * named[name][1]) for name in shuffled}, at=0.5)
    assert set(there.frontier) == set(again.frontier)
    assert there.winner == again.winner
    free = {name for name, (beaten_by, _) in standing(there).items() if beaten_by is None}
    assert free == {name for name, (beaten_by, _) in standing(again).items() if beaten_by is None}
    assert {n: c for n, (_, c) in standing(there).items()} == {n: c for n, (_, c) in standing(again).items()}


def test_of_several_that_beat_it_the_clear_and_then_the_cheap_one_is_named() -> None:
    found = at_half([(20.0, 20.0), (10.0, 10.0), (12.0, 8.0), (20.0, 5.0)])
    assert standing(found) == {"r0": ("r2", True), "r1": (None, False), "r2": (None, False), "r3": (None, False)}


def test_ties_and_duplicates_beat_nobody() -> None:
    found = at_half([(4.0, 1.0), (4.0, 1.0)])
    assert set(found.frontier) == {"r0", "r1"}
    assert found.winner is None
    tie = at_half([(4.0, 1.0), (4.0, 2.0)])
    assert standing(tie) == {"r0": (None, False), "r1": ("r0", False)}, "not apart in the steps"
    assert tie.winner is None


def test_the_last_digits_of_a_sum_decide_nothing() -> None:
    def run(action: float) -> RunRecord:
        return straight(range(1, 150), lambda k: 1 - k / 200, speed=math.sqrt(action / 100))

    found = compare({"a": run(1.0), "b": run(1.0 + 1e-12)}, at=0.5)
    assert standing(found) == {"a": (None, False), "b": (None, False)}
    assert "no clear winner on action: a (1) overlaps with b" in found.verdict()[0]
    assert standing(compare({"a": run(1.0), "b": run(1.0 + 1e-6)}, at=0.5))["b"] == ("a", False)


def test_clear_verdicts_need_both_intervals_apart() -> None:
    """Losses on a line with error s: τ within ±3s/slope, and the action in proportion."""

    def run(steps: float, loss_se: float) -> RunRecord:
        return straight(range(1, int(2 * steps)), lambda k: 1 - 0.5 * k / steps, speed=0.1, loss_se=loss_se)

    apart = compare({"fast": run(100, 0.005), "slow": run(110, 0.005)}, at=0.5)  # 100 ± 3, 110 ± 3.3
    assert apart.winner == "fast"
    assert standing(apart)["slow"] == ("fast", True)
    assert apart.groups[0].elapsed_interval == pytest.approx((97, 103), abs=1e-9)
    assert apart.groups[0].action_interval == pytest.approx((0.97, 1.03), abs=1e-9)
    near = compare({"fast": run(100, 0.02), "slow": run(110, 0.02)}, at=0.5)  # 100 ± 12, 110 ± 13.2
    assert near.winner is None
    assert standing(near)["slow"] == ("fast", False)
    told = " ".join(near.verdict())
    assert "no clear winner on steps: fast (100 steps, 88 to 112) overlaps with slow" in told
    assert "is beaten by" not in told
    assert "Behind, but not clearly: slow (behind fast)." in told


def test_sampled_steps_widen_the_action() -> None:
    def sampled(loss: Callable[[float], float], error: float) -> RunRecord:
        return straight(range(1, 300), loss, columns={"action_se": lambda k: error})

    found = compare({"a": sampled(lambda k: 1 - k / 200, 0.3), "b": sampled(lambda k: 1 - k / 300, 0.3)}, at=0.5)
    assert found.groups[0].action_interval == pytest.approx((math.exp(-0.6), math.exp(0.6)), abs=1e-9)
    assert standing(found)["b"] == ("a", False), "1.5 ± 0.6 is not apart from 1 ± 0.6"
    assert compare({"a": sampled(lambda k: 1 - k / 200, 3.0)}, at=0.5).groups[0].action_interval[0] > 0


def test_rows_that_are_far_apart_make_no_winner_of_one_curve() -> None:
    """Three records of one run: what the chords say differs by steps, and by nothing that is known."""
    curves = {f"every {n}": straight(range(n, 500, n), decay(50)) for n in (1, 10, 50)}
    for by, at in (("loss", 0.3), ("step", 60.0)):
        found = compare(curves, by=by, at=at)  # type: ignore[arg-type]
        assert found.winner is None, by
        assert not any(group.clearly for group in found.at_loss)
        assert not [text for text in found.verdict() if "needed the" in text and "no clear winner" not in text]
    truth = -50 * math.log(0.3)
    for group in compare(curves, at=0.3).groups:
        assert group.elapsed_interval[0] <= truth <= group.elapsed_interval[1]
        assert group.action_interval[0] <= 0.01 * truth <= group.action_interval[1]
    replicas = {
        name: [straight(range(n, 500, n), decay(time)) for time in (49.9, 50.0, 50.1)]
        for name, n in (("coarse", 50), ("fine", 1))
    }
    assert compare(replicas, at=0.3).winner is None, "all replicas are read off their chords too late alike"


def test_a_noisy_run_is_no_winner_for_the_row_at_which_it_dips() -> None:
    """One curve, L = 1 − k/4000, with errors of 0.05 and 0.005 that last for 50 steps as means of 50 losses do."""
    generator = np.random.default_rng(5)

    def run(error: float) -> RunRecord:
        noise = error * np.convolve(generator.normal(size=2060), np.ones(50) / math.sqrt(50), mode="valid")
        return straight(range(25, 2000, 25), lambda k: 1 - k / 4000 + (noise[int(k)] if k else 0), loss_se=error)

    trials = 200
    winners = [compare({"noisy": run(0.05), "quiet": run(0.005)}).winner for _ in range(trials)]
    # 5 % are allowed; three standard errors of 200 trials are 4.6 %.
    assert sum(name is not None for name in winners) / trials < 0.05 + 0.046


def test_replicas_with_rows_far_apart_hold_the_truth_between_them() -> None:
    """Three seeds that are almost alike: their spread is small against what lies between two rows."""
    for bend in (1.0, -1.0):  # below its chords and above them

        def curve(time: float, bend: float = bend) -> Callable[[float], float]:
            return lambda k: math.exp(-k / time) if bend > 0 else 2 - math.exp(k / time)

        times, level = (99.9, 100.0, 100.1), curve(100)(60)
        (group,) = compare({"A": [straight(range(40, 401, 40), curve(time)) for time in times]}, at=level).groups
        low, high = group.elapsed_interval
        assert low <= 60 <= high
        spread = 4.31 * float(np.std([0.6 * time for time in times], ddof=1)) / math.sqrt(3)
        assert not group.values["elapsed"] - spread <= 60 <= group.values["elapsed"] + spread, "which is not enough"


# --- runs that did not get there


def test_a_run_that_stopped_early_is_not_behind() -> None:
    long, short = straight(range(1, 501), decay(100)), straight(range(1, 101), decay(50))
    found = compare({"long": long, "short": short}, at=0.1)  # 230 steps; the other would have needed 115, and has 100
    assert found.winner is None
    assert [group.reached for group in found.groups] == [True, False]
    assert found.groups[1].elapsed_interval == (100, math.inf)
    assert found.frontier == ("long",)
    assert found.verdict() == [
        "At loss 0.100, long is alone: it took 230 steps.",
        "Left out: short, never below 0.135.",
    ]
    later = compare({"long": long, "stuck": straight(range(1, 501), decay(400))}, at=0.1)
    assert later.winner == "long", "who has no such loss after 500 steps took more than 230"


def test_a_run_that_may_have_got_there_within_its_error() -> None:
    sure = straight(range(1, 501), lambda k: 1 - k / 500)
    near = straight(range(1, 501), lambda k: 1 - k / 1000, loss_se=0.07)
    found = compare({"sure": sure, "near": near}, at=0.45)  # near: 0.5 at the end, ± 0.21; 0.45 + 0.21 at step 340
    assert found.groups[1].elapsed_interval == pytest.approx((340, math.inf), abs=1e-6)
    assert found.winner == "sure", "275 steps are fewer than 340"
    early = compare({"sure": sure, "near": near}, at=0.61)
    assert early.groups[1].elapsed_interval[0] == pytest.approx(180, abs=1e-6)
    assert early.winner is None, "195 steps are not"


def test_a_seed_that_did_not_get_there_leaves_the_group_out() -> None:
    there = [straight(range(1, 301), decay(time)) for time in (48, 50, 52)]
    short = [there[0], straight(range(1, 51), decay(40)), there[2]]
    other = [straight(range(1, 501), decay(time)) for time in (95, 100, 105)]
    found = compare({"short": short, "other": other}, at=0.2)
    by_name = {group.name: group for group in found.groups}
    assert not by_name["short"].reached
    assert math.isnan(by_name["short"].values["elapsed"])
    assert by_name["short"].elapsed_interval == (50, math.inf), "from what the shortest took"
    assert found.winner is None
    assert found.frontier == ("other",)
    assert found.verdict()[-1] == "Left out: short, never below 0.287."  # of the run that came least far


def test_nobody_got_there() -> None:
    found = at_half([(4.0, 1.0), (5.0, 2.0)])
    nobody = compare({"a": reaching(4, 1), "b": reaching(5, 2)}, at=-3.0)
    assert nobody.winner is None
    assert nobody.frontier == ()
    assert nobody.verdict() == [
        "At loss -3.00, there is nothing to compare.",
        "Left out: a, never below 0; b, never below 0.",
    ]
    assert "?" in nobody.table()
    assert found.frontier == ("r0",)


def test_an_action_that_is_unknown_is_not_a_loss_that_was_missed() -> None:
    """The clock "lr" with several rates: τ and A are undefined, and the loss was reached all the same."""
    lost = straight(range(1, 301), decay(50), columns={"elapsed": lambda k: math.nan, "action": lambda k: math.nan})
    no_action = straight(range(1, 301), decay(60), columns={"action": lambda k: math.nan})
    known = [straight(range(1, 301), decay(time)) for time in (70, 80)]
    found = compare({"lost": lost, "no action": no_action, "a": known[0], "b": known[1]}, at=0.2)
    assert all(group.reached for group in found.groups)
    assert found.frontier == ("a",)
    assert found.winner is None, "whoever has no τ may have been the first"
    told = " ".join(found.verdict())
    assert "did not get" not in told
    assert "The elapsed time of lost is unknown." in told
    assert "The action of no action is unknown." in told
    assert "At loss 0.200, a needed the fewest steps" in told
    reason = RunRecord(lost.run)
    reason.append(10, {"loss": 0.1, "loss_drop": 0.9}, {"elapsed": "groups have several rates"})
    two = compare({"lost": reason, "a": known[0]}, at=0.2).verdict()
    assert two[1] == "The elapsed time of lost is unknown: groups have several rates."


def test_a_run_that_broke_down_sets_the_level_where_it_was_last_seen() -> None:
    broken = straight(range(1, 101), decay(50), columns={"loss": lambda k: decay(50)(k) if k < 20 else math.nan})
    well = straight(range(1, 301), decay(50))
    found = compare({"well": well, "broken": broken})
    assert found.set_by == "broken"
    assert found.at == pytest.approx(math.exp(-19 / 50), abs=1e-12)
    last = compare({"well": well, "broken": broken}, by="step")
    assert (last.at, last.set_by) == (100, "broken")
    assert last.winner is None
    assert last.verdict()[:2] == [
        "broken has no finite loss after 100 steps.",
        "No two runs have a loss after 100 steps.",
    ]


# --- where they are compared


def test_the_level_is_the_lowest_that_all_surely_reached() -> None:
    deep, shallow = (
        straight(range(1, 201), lambda k: 1 - k / 250, loss_se=0.01),
        straight(range(1, 201), lambda k: 1 - k / 400, loss_se=0.01),
    )
    found = compare({"deep": deep, "shallow": shallow})
    assert found.at == pytest.approx(0.5 + 0.03, abs=1e-12)
    assert found.set_by == "shallow"
    assert found.loss_level == found.at
    assert "the lowest that shallow clearly reached" in found.table()
    asked = compare({"deep": deep, "shallow": shallow}, at=0.7)
    assert (asked.at, asked.set_by) == (0.7, None)
    assert asked.groups[0].values["elapsed"] == pytest.approx(75, abs=1e-9)


def test_by_step_and_by_time() -> None:
    slow = straight(range(10, 301, 10), decay(100), columns={"seconds": lambda k: 0.1 * k})
    fast = straight(range(10, 201, 10), decay(50), columns={"seconds": lambda k: 0.3 * k})
    runs = {"slow": slow, "fast": fast}
    step = compare(runs, by="step")
    assert (step.at, step.set_by) == (200, "fast")
    assert [group.name for group in step.groups] == ["fast", "slow"], "by the loss"
    assert step.winner == "fast"
    assert step.groups[1].values["loss"] == pytest.approx(math.exp(-2), abs=1e-12)
    assert "fast has the lowest loss after 200 steps." in step.verdict()
    time = compare(runs, by="time")
    assert time.at == pytest.approx(30, abs=1e-9)
    assert time.set_by == "slow"
    assert time.winner == "slow", "300 steps of the slow one, 100 of the fast one"
    assert time.groups[0].values["loss"] == pytest.approx(math.exp(-3), abs=1e-12)
    assert time.groups[1].values["loss"] == pytest.approx(math.exp(-2), abs=1e-12)
    for found in (step, time):
        assert found.loss_level == pytest.approx(math.exp(-3), abs=1e-12), "the plane is at the same loss all the same"
        assert {group.name for group in found.at_loss} == {"slow", "fast"}
        assert found.frontier == ("fast",)
    assert compare({"a": slow, "b": slow.from_state_dict(slow.state_dict())}, by="step").set_by is None, "all end there"
    cut = straight(range(10, 201, 10), decay(50), columns={"seconds": lambda k: 0.1 * k if k < 150 else math.nan})
    assert compare({"slow": slow, "cut": cut}, by="time").at == pytest.approx(14, abs=1e-9), "the last that is known"
    late = compare(runs, by="step", at=250)
    assert late.winner is None
    assert late.verdict()[:2] == ["fast ended before.", "No two runs have a loss after 250 steps."]


def test_losses_at_one_step_are_told_apart_by_their_errors() -> None:
    def run(level: float, error: float) -> RunRecord:
        return straight(range(1, 101), lambda k: 1 - (1 - level) * k / 100, loss_se=error)

    assert compare({"a": run(0.5, 0.01), "b": run(0.55, 0.01)}, by="step").winner == "a"
    close = compare({"a": run(0.5, 0.02), "b": run(0.55, 0.02)}, by="step")
    assert close.winner is None
    assert "No run has clearly the lowest loss after 100 steps: the intervals overlap." in close.verdict()
    assert close.groups[0].loss_interval == pytest.approx((0.46, 0.54), abs=1e-9)


def test_arguments_are_checked() -> None:
    run = reaching(4, 1)
    with pytest.raises(ValueError, match=r"by must be one of 'loss', 'step', 'time', got 'epoch'"):
        compare(run, by="epoch")  # type: ignore[arg-type]
    for by, at in (("step", 0.0), ("time", -1.0), ("loss", math.nan), ("loss", math.inf)):
        with pytest.raises(ValueError, match=f"at must be a {by} that runs can reach"):
            compare(run, by=by, at=at)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no steps in SGD lr 0\.1.*train for at least one"):
        compare(RunRecord(description()))
    dark = straight(range(1, 10), lambda k: math.nan)
    with pytest.raises(ValueError, match=r'no run has a finite loss.*by="step"'):
        compare(dark)
    without = straight(range(1, 10), decay(5), columns={"seconds": lambda k: math.nan})
    for runs in ({"timed": dark, "without": without}, {"without": without, "timed": dark}):
        with pytest.raises(ValueError, match=r"no wall-clock times to compare by in without; compare by=\"loss\""):
            compare(runs, by="time")
    alone = compare({"a": dark, "b": straight(range(1, 10), lambda k: math.nan)}, by="step")
    assert alone.at_loss == ()
    assert math.isnan(alone.loss_level)
    assert alone.verdict()[-1].startswith("The losses are unknown")
    with pytest.raises(ValueError, match="needs runs with a loss"):
        alone.figure()


def test_other_models_and_clocks_are_refused_with_the_cure() -> None:
    small, large = reaching(4, 1), reaching(4, 1, parameters=2000)
    with pytest.raises(ValueError, match=r"same models.*10 parameters: small; 2,000 parameters: large; compare each"):
        compare({"small": small, "large": large})
    rates = reaching(4, 1, clock="lr")
    with pytest.raises(ValueError, match=r"same clocks.*steps: a; lr: b; train all with the same SpeedLimit\(clock="):
        compare({"a": small, "b": rates})
    split = compare_models({"small": small, "large": large, "small 2": reaching(5, 1)})
    assert [[group.name for group in found.groups] for found in split] == [["small", "small 2"], ["large"]]


def test_one_run_alone() -> None:
    found = compare(reaching(4, 1))
    assert found.winner is None
    assert found.frontier == ("SGD lr 0.1, batch 8",)
    assert found.verdict() == ["One run: there is nothing to compare it with."]
    assert found.table().startswith("Compared at the same loss, 0\n")
    assert compare({"A": [reaching(4, 1), reaching(5, 1)]}).verdict() == [
        "One group: there is nothing to compare it with."
    ]


def test_notes_say_what_to_beware_of() -> None:
    a, b = reaching(4, 1), reaching(5, 1)
    assert compare([a, b]).notes == (
        "one run each: the intervals know nothing of other seeds (folders named seed_0, seed_1, … are one group; "
        "others by --group NAME=PATH, or a list in Python)",
    )
    assert compare({"A": [a, b, reaching(6, 1)]}).notes == ()
    assert compare({"A": [a, b], "B": a}).notes == (
        "two seeds in A: too few for a narrow interval (12.7 standard errors to either side, of three seeds 4.3); "
        "run one more",
    )
    sampled = compare([a, reaching(5, 1, measure_every_n_steps=4, monitor="val")]).notes
    assert any("sample of the steps" in note and "SGD lr 0.1, batch 8 (2)" in note for note in sampled)
    assert any("different monitored losses (None, val)" in note for note in sampled)


# --- replicas


def test_a_group_is_the_mean_of_its_runs_with_students_interval() -> None:
    taus, actions = [90.0, 100.0, 116.0], [1.0, 1.5, 1.1]
    group = compare({"A": [reaching(t, a) for t, a in zip(taus, actions, strict=True)]}, at=0.5).groups[0]
    for key, values in (("elapsed", taus), ("action", actions)):
        mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(3)
        assert group.values[key] == pytest.approx(mean, rel=1e-12)
        assert group.standard_errors[key] == pytest.approx(error, rel=1e-9)
        bounds = group.elapsed_interval if key == "elapsed" else group.action_interval
        # t(0.975; 2 degrees of freedom) = 4.302652730, from a table; the error of ln x̄ is error/x̄
        ends = (math.log(mean) - 4.302652730 * error / mean, math.log(mean) + 4.302652730 * error / mean)
        assert [math.log(end) for end in bounds] == pytest.approx(ends, rel=1e-8)
    single = compare({"A": reaching(90.0, 1.0)}, at=0.5).groups[0]
    assert math.isnan(single.standard_errors["elapsed"])


@pytest.mark.parametrize("taus", [(2.0, 20.0), (10.0, 11.0), (1.0, 40.0, 3.0)])
def test_what_cannot_be_below_zero_has_no_interval_that_is(taus: tuple[float, ...]) -> None:
    group = compare({"A": [reaching(tau, 1 / tau) for tau in taus]}, at=0.5).groups[0]
    for key in ("cost", "elapsed", "action"):
        low, high = getattr(group, f"{key}_interval")
        assert 0 < low < group.values[key if key != "cost" else "elapsed"] < high


def test_a_loss_below_zero_keeps_its_own_interval() -> None:
    sunk = [straight(range(1, 30), lambda k, s=s: s - k / 10) for s in (0.9, 1.0, 1.3)]
    (group,) = compare({"A": sunk}, by="step", at=20).groups
    low, high = group.loss_interval
    assert low < group.values["loss"] < 0
    assert high - group.values["loss"] == pytest.approx(group.values["loss"] - low, rel=1e-9)


def test_students_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    trials, held = 300, 0
    for _ in range(trials):
        taus = generator.normal(12.0, 1.0, 3)
        group = compare({"A": [reaching(tau, 1.0) for tau in taus]}, at=0.5).groups[0]
        held += group.elapsed_interval[0] <= 12.0 <= group.elapsed_interval[1]
    assert held / trials == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / trials))


def test_the_plane_gets_the_groups_that_have_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(figures, "plane", lambda points, **options: drawn.update(points=points, **options))
    line: Callable[[float], float] = lambda k: 1 - k / 200  # noqa: E731 - a formula
    blind = straight(range(1, 150), line, run=description(clock="lr"), columns={"action": lambda k: math.nan})
    fast, slow = (straight(range(1, 150), line, speed=v, run=description(clock="lr")) for v in (0.1, 0.3))
    short = straight(range(1, 20), line, run=description(clock="lr"))
    compare({"A": [fast, slow], "B": fast, "blind": blind, "short": short}, at=0.5).figure()
    assert drawn["clock"] == "lr"
    assert {point.name: point.on_frontier for point in drawn["points"]} == {"B": True, "A": False}
    (mean,) = [point for point in drawn["points"] if point.name == "A"]
    assert (mean.elapsed, mean.action) == pytest.approx((100, 5.0), rel=1e-9)
    # (mean D)² ≤ (mean √(τA))² ≤ mean τ · mean A for any group; mean D² need not be.
    assert mean.displacement == pytest.approx((10 + 30) / 2, rel=1e-9)


# --- as text


def cell_values(text: str) -> list[float]:
    """The numbers of a row behind its name, "?" as NaN, errors left out."""
    return [math.nan if cell == "?" else float(cell) for cell in re.split(r"\s{2,}", re.sub(r" ± \S+", "", text))[1:]]


def test_the_table_shows_the_values() -> None:
    runs = {"a": straight(range(1, 301), decay(50)), "b": straight(range(1, 301), decay(90), speed=0.02)}
    found = compare(runs)
    lines = found.table().splitlines()
    assert lines[0] == f"Compared at the same loss, {number(found.at)}, the lowest that b clearly reached"
    assert set(lines[3]) == {"-"}
    heads = re.split(r"\s{2,}", lines[2])
    assert heads[0] == "run"
    keys = {heading: (key, digits) for heading, key, digits in COLUMNS}
    for line, group in zip(lines[4:6], found.groups, strict=True):
        assert line.split("  ")[0] == group.name
        for heading, shown in zip(heads[1:], cell_values(line), strict=True):
            key, digits = keys[heading]
            # so many significant digits: half a unit of the last
            assert shown == pytest.approx(group.values[key], rel=0.5 * 10 ** (1 - digits))
    assert "efficiency" not in heads, "a column that nobody has a number for is left out"
    assert max(map(len, lines)) <= 110


def test_what_cost_the_most_comes_with_what_to_try() -> None:
    """c = 0.2, s = 0.1: noise took 1 − 2·0.2 + 0.1 = 0.7 of the work. A line holds one name, however long."""
    works: dict[str, Callable[[float], float]] = {
        "work_ito": lambda k: k / 40,
        "work_anti_ito": lambda k: k / 400,
        "work_stratonovich": lambda k: 0.5 * (k / 40 + k / 400),
    }
    noisy = straight(range(1, 101), lambda k: 1 - k / 200, columns=works)
    noisy.run["batch_size"] = 32
    name = "a name\twith\nbreaks " + "and many letters " * 10
    text = " ".join(compare({name: noisy, "other": noisy}, at=0.6).table().split())
    assert "Batch noise took 0.700 of the work" in text
    assert "a batch of 128 instead of 32" in text
    row = next(line for line in compare({name: noisy, "other": noisy}, at=0.6).table().splitlines() if "…" in line)
    assert row.startswith("a name with breaks and many letters")
    assert row.index("…") == 59


def test_errors_of_replicas_are_shown() -> None:
    found = compare({"A": [reaching(90, 1), reaching(110, 1)], "B": reaching(200, 3)}, at=0.5)
    row = next(line for line in found.table().splitlines() if line.startswith("A (2 seeds)"))
    assert "100 ± 10" in row
    assert found.table().splitlines()[2].startswith("group")


def test_sentences_name_what_the_intervals_allow() -> None:
    found = at_half([(10.0, 10.0), (20.0, 2.0), (40.0, 30.0)])
    assert found.verdict() == [
        "At loss 0.500, r0 needed the fewest steps (10 steps); r1 needed the least action (2).",
        "At loss 0.500, r0 and r1 are beaten by none in steps and action: neither is better on both.",
        "r2 is beaten by r1: 2.0 times the steps, 15 times the action.",
    ]
    best = at_half([(10.0, 1.0), (20.0, 2.0)]).verdict()
    assert best[1] == "At loss 0.500, no other took fewer steps or less action than r0."
    groups = {"A": [reaching(10, 1), reaching(10, 1.0)], "B": [reaching(20, 0.5), reaching(22, 0.5)]}
    assert "are beaten by none in steps and action in the mean:" in compare(groups, at=0.5).verdict()[1]
    rates = compare({n: reaching(*p, clock="lr") for n, p in {"a": (10.0, 9.0), "b": (20.0, 2.0)}.items()}, at=0.5)
    assert rates.verdict()[0].startswith("At loss 0.500, a needed the least time (10 learning rate, summed)")
    assert rates.verdict()[1].endswith("are beaten by none in time and action: neither is better on both.")


def test_a_run_that_starts_below_the_level() -> None:
    """A pretrained one is there before its first step: 0 of both, by which nothing can be divided."""
    scratch = straight(range(1, 201), decay(50))
    found = compare({"scratch": scratch, "pretrained": straight(range(1, 101), decay(50, start=0.01))}, at=0.5)
    steps = 50 * math.log(2)
    assert found.frontier == ("pretrained",)
    assert found.verdict()[-1] == (
        f"scratch is beaten by pretrained: {steps:.1f} steps against 0, {0.01 * steps:.3f} action against 0."
    )
    assert "time or action is 0 or unknown: pretrained" in found.figure().axes[0].get_xlabel()


def test_many_runs() -> None:
    generator = np.random.default_rng(3)
    places = [
        (float(t), float(a)) for t, a in zip(generator.uniform(2, 9, 200), generator.uniform(1, 9, 200), strict=True)
    ]
    found = at_half(places)
    verdict = found.verdict()
    assert len(verdict) <= 11
    beaten = next(int(text.split()[0]) for text in verdict if text.endswith(" are beaten clearly."))
    assert beaten == sum(group.clearly for group in found.at_loss)
    few = at_half([(2.0, 1.0), *places[:11]])
    told = sum("is beaten by" in text for text in few.verdict())
    more = next(int(text.split()[0]) for text in few.verdict() if text.endswith("more are beaten clearly."))
    assert told == 7
    assert told + more == sum(group.clearly for group in few.at_loss)
    shown = found.table().split("\n\n")[1].splitlines()
    assert sum(line.startswith("r") for line in shown) == 1 + 5, "the heading and the first ones"
    assert shown[-1] == "195 more: in the page (--html) and in JSON (--json)"
    assert len(json.loads(json.dumps(found.to_dict(), allow_nan=False))["groups"]) == 200


def test_json_has_no_nan_and_says_the_same() -> None:
    runs: dict[str, Any] = {
        "A": [straight(range(1, 301), decay(time)) for time in (48, 50, 52)],
        "late": straight(range(1, 31), decay(50)),
        "blind": straight(range(1, 301), decay(50), columns={"action": lambda k: math.nan}),
    }
    found = compare(runs, at=0.2)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["at"] == 0.2
    assert plain["winner"] is None
    assert plain["frontier"] == ["A"]
    assert plain["verdict"] == found.verdict()
    by_name = {group["name"]: group for group in plain["groups"]}
    assert by_name["late"]["elapsed_interval"] == [30, None]
    assert by_name["late"]["values"]["elapsed"] is None
    assert by_name["blind"]["values"]["action"] is None
    expected = {group.name: group for group in found.groups}["A"]
    assert by_name["A"]["values"]["elapsed"] == expected.values["elapsed"]
    assert [run["name"] for run in by_name["A"]["runs"]] == ["A 1", "A 2", "A 3"]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 3, "0"),
        (123.4, 3, "123"),
        (12.34, 3, "12.3"),
        (0.01234, 3, "0.0123"),
        (123456.0, 3, "123456"),
        (1.5e-5, 3, "1.50e-05"),
        (2.5e9, 2, "2.5e+09"),
        (-0.5, 2, "-0.50"),
        (math.nan, 3, "?"),
        (math.inf, 3, "inf"),
        (-math.inf, 3, "-inf"),
    ],
)
def test_numbers(value: float, digits: int, text: str) -> None:
    assert number(value, digits) == text


@given(st.floats(-1e300, 1e300), st.integers(1, 6))
def test_a_number_reads_back_to_its_digits(value: float, digits: int) -> None:
    assert float(number(value, digits)) == pytest.approx(value, rel=0.51 * 10 ** (1 - digits), abs=1e-300)


def test_intervals_and_errors() -> None:
    assert interval((96.0, 123.0)) == "96 to 123"
    assert interval((96.0, math.inf)) == "at least 96"
    assert interval((96.0, 96.01)) == "96"
    assert interval((0.0, 5949.0)) == "at most 5,949"
    assert interval((0.0, 0.0)) == "0"
    assert with_error(123.0, 4.0) == "123 ± 4.0"
    assert with_error(123.0, math.nan) == "123"
    assert with_error(0.251, 3.9e-17) == "0.251", "replicas at the same loss differ by rounding"
    assert with_error(0.251, 1e-6) == "0.251 ± 1.0e-06"
    assert count_with_error(24000.0, 1234.4) == "24,000 ± 1,234"
    assert count_with_error(24000.0, 7e-13) == "24,000"
    assert count_with_error(96.2, 12.34) == "96.2 ± 12"
    assert interval((1745.0, 4770.2)) == "1,745 to 4,770"
    assert with_error(0.0, 0.5) == "0 ± 0.50"


# --- the package


def test_comparing_needs_neither_torch_nor_lightning_to_be_imported() -> None:
    script = (
        "import sys; from lightning_speedlimit import compare, Comparison, RunRecord; "
        "print([m for m in ('torch', 'pytorch_lightning', 'lightning', 'matplotlib') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"


def test_every_name_of_the_package_is_there() -> None:
    for name in lightning_speedlimit.__all__:
        assert getattr(lightning_speedlimit, name).__name__ == name
        assert name in dir(lightning_speedlimit)
    with pytest.raises(AttributeError, match=r"no attribute 'speed'; it has .*RunRecord.*compare"):
        lightning_speedlimit.speed  # noqa: B018 - the access is what is tested


def test_print_and_str() -> None:
    found = at_half([(10.0, 10.0), (20.0, 2.0)])
    assert str(found) == found.table()
    assert [t for t in itertools.chain(found.verdict()) if "None" in t or "nan" in t] == []


def test_at_the_same_loss_all_have_that_loss() -> None:
    """Between its first dip and where it surely had come down a noisy loss is anything; the runs are at the level."""
    jagged = straight(range(1, 101), lambda k: 1 - k / 100 + 0.02 * (-1) ** k, loss_se=0.02)
    smooth = straight(range(1, 101), lambda k: 1 - k / 100)
    comparison = compare({"jagged": jagged, "smooth": smooth}, at=0.503)
    assert [group.values["loss"] for group in comparison.groups] == [0.503, 0.503]


def test_what_follows_from_batch_and_data_tells_no_runs_apart() -> None:
    def run(batch: int, coordinates: int | str, measured: int = 10) -> RunRecord:
        told = {"batch_size": batch, "batches_per_epoch": 1024 // batch, "samples_without_replacement": 1024 + batch}
        told |= {"coordinates": coordinates, "measured_coordinates": measured, "optimized_coordinates": 10}
        return straight(range(1, 21), decay(10), run=description(**told))

    found = compare({"one": run(8, 524288), "two": run(16, "all")})
    assert apart(found) == {"one": "SGD lr 0.1, batch 8", "two": "SGD lr 0.1, batch 16"}
    assert settings_of(found).differing == ("batch size",)
    sampled = compare({"one": run(8, 5, measured=5), "two": run(8, "all")})
    assert "coordinates" in settings_of(sampled).differing, "where they were not all measured it matters"


def test_a_name_that_is_one_word_of_the_settings_is_told_with_them() -> None:
    runs = {"momentum": reaching(100, 1.0), "SGD lr 0.1": reaching(150, 1.0)}
    for record, momentum in zip(runs.values(), (0.9, 0.0), strict=True):
        record.run["optimizers"] = [{"class": "SGD", "groups": [{"lr": 0.1, "momentum": momentum}]}]
        record.run.pop("batch_size", None)
    assert apart(compare(runs)) == {"momentum": "SGD lr 0.1 momentum 0.9"}
