"""Where a run came down to a loss, and its numbers there: against closed forms, plain sums, and the exact work."""

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import callback_cases
import numpy as np
import pytest
import torch
from comparison_cases import Curve, decay, description, straight
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedlimit import RunRecord, TrajectoryMeter
from lightning_speedlimit.report.alignment import Timeline, values_at, work_shares
from lightning_speedlimit.report.interpolation import first_below, read_between, time_above
from lightning_speedlimit.report.levels import fair_level
from lightning_speedlimit.trajectory.losses import drop as losses_drop

ROUNDING = 1e-12  # a dozen operations in float64 on numbers of order 1 to 500


def crossing(record: RunRecord, level: float) -> Any:
    return Timeline(record).crossing(level)


# --- crossings


@pytest.mark.parametrize("level", [0.9, 0.5, 0.1, 0.013])
def test_an_exponential_is_crossed_where_its_logarithm_says(level: float) -> None:
    found = crossing(straight(range(1, 500), decay(50)), level)
    truth = -50 * math.log(level)
    # The chord lies above a convex curve by at most h² L″/8, so that it comes down later by at most (1/8)·h²·L″/|L′|,
    # with L″/|L′| = 1/50, and the slope changes by 2 % at most within a row.
    assert truth <= found.step <= truth + 1.02 / 400
    assert found.earliest <= truth <= found.latest
    assert found.latest - found.earliest < 3 * 1.02 / 400, "the extensions of the chords leave two such gaps more"


def test_the_error_of_a_crossing_falls_with_the_square_of_the_rows_distance() -> None:
    # Levels in the middle of a row: there the chord is farthest from the curve.
    errors, widths = [], []
    spacings = [16, 8, 4, 2, 1]
    for h in spacings:
        found = crossing(straight(range(h, 640, h), decay(80)), math.exp(-(96 + h / 2) / 80))
        errors.append(found.step - (96 + h / 2))
        widths.append(found.latest - found.earliest)
    for values in (errors, widths):
        orders = np.diff(np.log(values)) / np.diff(np.log(spacings))
        # the next term of the chord's error is relatively h/(4·80): 5 % of a factor of four is 0.07 of an order
        np.testing.assert_allclose(orders, 2, atol=0.1)


def test_a_power_law_and_a_first_interval_that_bends() -> None:
    curve: Curve = lambda k: (1 + k) ** -0.5  # noqa: E731 - a formula
    for level in (0.9, 0.5, 0.2):
        found = crossing(straight(range(10, 400, 10), curve), level)
        assert found.earliest <= level**-2 - 1 <= found.latest


@given(
    time=st.floats(3, 200),
    spacing=st.integers(1, 60),
    share=st.floats(0.01, 0.99),
    bend=st.sampled_from([-1.0, 1.0]),
)
def test_a_curve_that_bends_one_way_is_in_the_interval(time: float, spacing: int, share: float, bend: float) -> None:
    # convex: e^{−k/T}; concave: 2 − e^{k/T}, up to where it is −1
    end = max(spacing, int(4 * time if bend > 0 else 1.1 * time))

    def curve(k: float) -> float:
        return math.exp(-k / time) if bend > 0 else 2 - math.exp(k / time)

    record = straight(range(spacing, end + spacing, spacing), curve)
    truth = share * end
    found = crossing(record, curve(truth))
    # a flat tail turns rounding of the loss (1e-16) into e^4·T·1e-16 steps
    assert found.earliest - 1e-9 * time <= truth <= found.latest + 1e-9 * time
    assert found.latest - found.earliest <= spacing + 1e-9 * time, "never wider than the rows are apart"


def test_the_interval_is_where_the_loss_and_three_standard_errors_cross() -> None:
    # On a line L = 1 − k/1000 with error s, L ± 3s cross 3000 s steps before and after.
    found = crossing(straight(range(1, 1000), lambda k: 1 - k / 1000, loss_se=0.01), 0.5)
    assert found.step == pytest.approx(500, abs=1e-9)
    assert (found.earliest, found.latest) == pytest.approx((470, 530), abs=1e-9)
    assert found.read == pytest.approx((500, 500), abs=1e-9), "a line is known between its rows"


def test_an_error_that_is_not_known_or_of_an_earlier_version() -> None:
    line: Curve = lambda k: 1 - k / 1000  # noqa: E731 - a formula
    unknown = straight(range(1, 1000), line, columns={"loss_se": lambda k: math.nan})
    assert crossing(unknown, 0.5).latest == pytest.approx(500, abs=1e-9)
    old = RunRecord(description())
    for k in range(1, 1000):
        old.append(k, {"loss": line(k), "loss_drop": k / 1000, "loss_drop_se": 0.02})
    found = crossing(old, 0.5)
    assert (found.earliest, found.latest) == pytest.approx((440, 560), abs=1e-9)
    endless = straight(range(1, 1000), line, columns={"loss_se": lambda k: math.inf})
    assert crossing(endless, 0.5).latest == math.inf


def test_a_loss_that_is_not_reached() -> None:
    record = straight(range(1, 101), lambda k: 1 - k / 1000, loss_se=0.01)
    found = crossing(record, 0.7)
    assert math.isnan(found.step)
    assert math.isnan(found.earliest), "0.9 − 0.03 at the end is above 0.7"
    assert found.latest == math.inf
    near = crossing(record, 0.89)
    assert math.isnan(near.step)
    assert near.earliest == pytest.approx(80, abs=1e-9), "1 − k/1000 − 0.03 = 0.89"
    assert crossing(record, 0.975).earliest == 0, "1 − 0.03 at the start is not above 0.975"
    assert crossing(record, 1.02).latest == pytest.approx(10, abs=1e-9), "1 + 0.03 at the start is not below 1.02"
    surely_not = crossing(record, 0.905)
    assert surely_not.step == pytest.approx(95, abs=1e-9)
    assert surely_not.latest == math.inf, "0.9 + 0.03 at the end is above 0.905"


def test_losses_that_are_not_finite_in_between() -> None:
    def holes(k: float) -> float:
        return math.nan if 30 < k < 60 else 1 - k / 100

    # rows at 10, 20, 30, (40, 50 are NaN), 60, …: the loss came down to 0.5 anywhere from 30 to 60
    found = crossing(straight(range(10, 100, 10), lambda k: 1 - k / 100, columns={"loss": holes}), 0.5)
    assert (found.earliest, found.latest) == (30, 60)
    assert found.step == pytest.approx(50, abs=1e-9), "where the chord over the hole meets it, not at its end"
    assert crossing(straight(range(10, 100, 10), lambda k: 1 - k / 100, columns={"loss": holes}), 0.85).step == (
        pytest.approx(15, abs=1e-9)
    )
    gone = straight(range(10, 100, 10), lambda k: 1 - k / 100, columns={"loss": lambda k: math.nan})
    assert math.isnan(crossing(gone, 0.5).step)
    assert math.isnan(Timeline(gone).lowest_sure())


def test_a_loss_that_jumped_from_infinity() -> None:
    curve = {10: math.inf, 20: 0.4, 30: 0.3}
    found = crossing(straight([10, 20, 30], lambda k: 1 - k / 100, columns={"loss": lambda k: curve[int(k)]}), 0.5)
    assert (found.earliest, found.step, found.latest) == (10, 20, 20)


def test_levels_at_and_above_the_start_and_within_the_first_row() -> None:
    record = straight(range(50, 500, 50), decay(50))
    for level in (1.0, 1.5):
        found = crossing(record, level)
        assert (found.step, found.earliest, found.latest) == (0, 0, 0)
    first = crossing(record, 0.6)
    assert 0 <= first.earliest <= -50 * math.log(0.6) <= first.step < 50
    alone = crossing(straight([50], decay(50)), 0.6)
    assert (alone.earliest, alone.latest) == (0, 50), "one row tells nothing of the way to it"


def test_a_level_that_is_a_rows_own_is_crossed_there() -> None:
    for place in (400, 490):  # within and at the end
        record = straight(range(10, 500, 10), decay(50))
        found = crossing(record, math.exp(-place / 50))
        assert (found.earliest, found.step, found.latest) == (place, place, place)


def test_a_concave_loss_and_one_that_stands_still() -> None:
    # falling ever faster: the chord comes down too early, and the crossing is before that of the nearer extension
    steps = np.array([0.0, 10.0, 20.0, 30.0])
    first, at, last = first_below(steps, np.array([1.0, 0.9, 0.6, 0.1]), 0.7)
    assert (first, at) == pytest.approx((10 + 20 / 3, 10 + 20 / 3), abs=1e-12)
    assert last == pytest.approx(18, abs=1e-12), "0.6 + 0.05 (20 − s) = 0.7; the chord before meets it at 30"
    # flat behind it: the extension backwards never rises, so that it may have come down at once
    first, at, last = first_below(steps, np.array([1.0, 0.8, 0.5, 0.5]), 0.7)
    assert first == pytest.approx(10, abs=1e-12)
    assert at == pytest.approx(10 + 10 / 3, abs=1e-12)
    assert last == pytest.approx(15, abs=1e-12), "0.8 − 0.02 (s − 10) = 0.7"


def test_a_start_that_is_unknown_may_have_been_anywhere_before() -> None:
    record = straight(range(50, 500, 50), decay(50), columns={"loss_drop": lambda k: math.nan})
    found = crossing(record, 0.6)
    assert (found.earliest, found.step, found.latest) == (0, 50, 50)


def test_a_loss_that_rises_again_counts_where_it_first_came_down() -> None:
    record = straight(range(1, 301), lambda k: 1 + 0.5 * math.cos(math.pi * k / 100))
    assert crossing(record, 1.0).step == pytest.approx(50, abs=1e-3)  # an inflection: O(h³) off the chord
    assert Timeline(record).lowest_sure() == pytest.approx(0.5, abs=1e-12)


def test_losses_below_zero() -> None:
    found = crossing(straight(range(1, 200), lambda k: -k / 10), -5.05)
    assert found.step == pytest.approx(50.5, abs=1e-9)


def test_a_loss_that_is_climbed_is_its_negative() -> None:
    run = description()
    run["optimizers"][0]["groups"][0]["maximize"] = True
    record = straight(range(1, 100), lambda k: k / 100, run=run, columns={"loss_drop": lambda k: k / 100})
    timeline = Timeline(record)
    assert timeline.loss[0] == pytest.approx(0, abs=ROUNDING)
    assert timeline.crossing(-0.5).step == pytest.approx(50, abs=1e-9)


def test_the_start_is_read_where_the_windows_are_full_and_the_l2_term_is_least() -> None:
    # loss_drop = L_0 − L_k + ½w(‖θ_0‖² − ‖θ_k‖²); here the L2 term falls as −k/500, and early L_0 is not yet known.
    def drop(k: float) -> float:
        return (1 - math.exp(-k / 50)) - k / 500 + (0.3 if k < 40 else 0.0)

    run = description(loss_window=40)
    record = straight(range(10, 500, 10), decay(50), run=run, columns={"loss_drop": drop})
    assert Timeline(record).loss[0] == pytest.approx(1 - 40 / 500, abs=ROUNDING)
    short = straight(range(10, 40, 10), decay(50), run=run, columns={"loss_drop": drop})
    assert Timeline(short).loss[0] == pytest.approx(1 - 30 / 500 + 0.3, abs=ROUNDING), "else the last"
    silent = straight(range(10, 500, 10), decay(50), columns={"loss_drop": drop})
    assert Timeline(silent).loss[0] == pytest.approx(1 - 50 / 500, abs=ROUNDING), "the callback's own window is 50"


def test_a_row_of_step_0_is_the_start_itself() -> None:
    with_start, without = straight(range(0, 500, 10), decay(50)), straight(range(10, 500, 10), decay(50))
    assert crossing(with_start, 0.3) == crossing(without, 0.3)
    assert Timeline(with_start).at(123.0) == pytest.approx(Timeline(without).at(123.0), nan_ok=True)


def test_rows_that_begin_late_and_are_uneven() -> None:
    steps = [137, 140, 190, 400]
    record = straight(steps, lambda k: 1 - k / 1000)
    for level in (0.95, 0.862, 0.83, 0.7):
        assert crossing(record, level).step == pytest.approx(1000 * (1 - level), abs=1e-9)


# --- what is read between two rows


def test_sums_are_read_between_chord_and_extensions() -> None:
    # A = √k is concave: above the chord, and below both extensions.
    steps = np.arange(0.0, 101.0, 10.0)
    for k in (12.0, 35.0, 77.7):
        low, high = read_between(steps, np.sqrt(steps), k)
        assert low <= math.sqrt(k) <= high
        assert high - low < 2 * (10**2 / 8) / (4 * (k - 10) ** 1.5) + 0.1, "O(h² A″)"
    assert read_between(steps, np.sqrt(steps), 30.0) == (math.sqrt(30), math.sqrt(30))
    assert all(map(math.isnan, read_between(steps, np.sqrt(steps), 100.1)))
    assert all(map(math.isnan, read_between(steps, np.sqrt(steps), math.nan)))
    assert read_between(np.array([0.0, 10.0]), np.array([0.0, 3.0]), 5.0) == (0, 3), "two rows: anywhere between them"


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=12), st.floats(0, 1))
def test_what_is_read_stays_within_the_rows_and_holds_the_chord(increments: list[float], share: float) -> None:
    values = np.concatenate([[0.0], np.cumsum(increments)])
    steps = np.arange(len(values), dtype=float)
    k = share * steps[-1]
    low, high = read_between(steps, values, k)
    chord = float(np.interp(k, steps, values))
    slack = 1e-12 * values[-1]
    assert low - slack <= chord <= high + slack
    assert values[math.floor(k)] - slack <= low
    assert high <= values[min(math.ceil(k), len(values) - 1)] + slack


def test_rows_that_are_not_known_are_as_if_left_out() -> None:
    steps, values = np.arange(0.0, 80.0, 10.0), np.array([1.0, 0.8, 0.61, 0.45, 0.32, 0.21, 0.13, 0.1])
    for unknown in ([], [1], [3], [1, 3, 6], [3, 4], [5]):  # 0.25 is met between the rows 4 and 5
        gaps = values.copy()
        gaps[unknown] = np.nan
        fewer = np.delete(steps, unknown), np.delete(values, unknown)
        first, at, last = first_below(steps, gaps, 0.25)
        assert at == pytest.approx(np.interp(-0.25, -fewer[1], fewer[0]), abs=1e-12)
        beside = {4, 5} & set(unknown)
        assert (first, last) == (
            (max(fewer[0][fewer[1] > 0.25]), min(fewer[0][fewer[1] <= 0.25]))
            if beside
            else first_below(*fewer, 0.25)[::2]
        )


def test_what_is_not_known_at_first_may_have_been_down() -> None:
    steps = np.arange(0.0, 50.0, 10.0)
    assert first_below(steps, np.array([np.nan, np.nan, 0.5, 0.4, 0.3]), 0.8) == (0, 20, 20)


def test_neighbours_that_are_not_finite_do_not_count() -> None:
    steps = np.arange(0.0, 50.0, 10.0)
    first, at, last = first_below(steps, np.array([np.nan, np.nan, 1.0, 0.5, np.nan]), 0.8)
    assert (first, last) == (20, 30)
    assert at == pytest.approx(24, abs=1e-12)
    first, at, last = first_below(steps, np.array([np.inf, np.inf, np.inf, 0.5, 0.4]), 0.8)
    assert (first, at, last) == (20, 30, 30)
    first, _, last = first_below(steps, np.array([np.inf, 2.0, 1.0, 0.5, -np.inf]), 0.8)
    assert (first, last) == pytest.approx((22, 24), abs=1e-12), "the chord before falls by 0.1 a step"


# --- the numbers there


def test_numbers_between_rows_of_straight_motion_are_exact() -> None:
    record = straight(range(20, 401, 20), lambda k: 1 - k / 1000, speed=0.3)
    found = values_at(record, 133.3)
    assert found["step"] == 133.3
    expected = {
        "elapsed": 133.3,
        "displacement": 0.3 * 133.3,
        "path_length": 0.3 * 133.3,
        "action": 0.09 * 133.3,
        "seconds": 1.333,
        "loss": 1 - 0.1333,
        "loss_drop": 0.1333,
        "straightness": 1.0,
        "steadiness": 1.0,
        "kinematic_efficiency": 1.0,
        "speed_limit_time": 133.3,
        "conversion": 1.0,
        "signal_fraction": 1.0,
        "useful_share": 1.0,
        "bouncing_share": 0.0,
        "noise_share": 0.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=ROUNDING * 100)


def test_ratios_are_made_of_interpolated_sums() -> None:
    """Against numpy.interp of the columns, with a motion that turns and slows down."""
    shape: dict[str, Curve] = {
        "displacement": lambda k: 2 * math.sqrt(k),
        "path_length": lambda k: 3 * k**0.7,
        "action": lambda k: 4 * k**0.4,
        "work_ito": lambda k: 0.02 * k,
        "work_anti_ito": lambda k: -0.003 * k,
        "work_stratonovich": lambda k: 0.008 * k,
        "work_action": lambda k: 0.05 * k,
        "entropy_production": lambda k: 0.01 * k,
        "efficiency": lambda k: 0.5 + k / 1000,
        "efficiency_low": lambda k: 0.4 + k / 2000,
        "efficiency_drift": lambda k: 0.45 + k / 1500,
        "efficiency_action": lambda k: 0.3 - k / 4000,
    }
    record = straight(range(25, 500, 25), decay(50), columns=shape)
    found = values_at(record, 60.0)
    columns = {name: np.concatenate([[0.0], column]) for name, column in record.columns.items()}

    def at(column: Any) -> float:
        return float(np.interp(60.0, columns["step"], column))

    squared, path, action = at(columns["displacement"]) ** 2, at(columns["path_length"]) ** 2, at(columns["action"])
    met = 2 * at(columns["work_stratonovich"]) - at(columns["work_anti_ito"])
    expected = {
        "straightness": squared / path,
        "steadiness": path / (60 * action),
        "kinematic_efficiency": squared / (60 * action),
        "speed_limit_time": squared / action,
        "conversion": at(columns["loss_drop"]) / at(columns["work_ito"]),
        "signal_fraction": at(columns["work_anti_ito"]) / met,
        "efficiency": at(columns["efficiency"] * columns["entropy_production"]) / at(columns["entropy_production"]),
        "efficiency_low": at(columns["efficiency_low"] * columns["entropy_production"]) / 0.6,
        "efficiency_drift": at(columns["efficiency_drift"] * columns["entropy_production"]) / 0.6,
        "efficiency_action": at(columns["efficiency_action"] * columns["work_action"]) / at(columns["work_action"]),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=ROUNDING)


def test_before_the_first_row_ratios_are_those_of_the_first_row() -> None:
    constant: dict[str, Curve] = {
        "efficiency": lambda k: 0.5,
        "efficiency_low": lambda k: 0.3,
        "efficiency_action": lambda k: 0.4,
    }
    record = straight(range(10, 101, 10), lambda k: 1 - k / 200, columns=constant)
    found = values_at(record, 2.5)
    assert found["entropy_production"] == pytest.approx(0.0125, rel=ROUNDING)
    ratios = (found["efficiency"], found["efficiency_low"], found["efficiency_action"], found["straightness"])
    assert ratios == pytest.approx((0.5, 0.3, 0.4, 1.0), rel=ROUNDING)


def test_numbers_beyond_the_run_and_at_its_start_are_undefined() -> None:
    record = straight(range(10, 101, 10), decay(50))
    for step in (100.5, -1.0, math.nan, math.inf):
        assert all(map(math.isnan, values_at(record, step).values())), step
    start = values_at(record, 0.0)
    assert start["elapsed"] == start["action"] == start["displacement"] == 0
    assert start["loss"] == pytest.approx(1.0, abs=ROUNDING)
    for name in ("straightness", "steadiness", "kinematic_efficiency", "conversion", "efficiency", "useful_share"):
        assert math.isnan(start[name]), name


def test_a_column_that_is_missing_is_undefined_and_the_others_are_there() -> None:
    record = RunRecord({})
    record.append(10, {"loss": 0.5, "loss_drop": 0.5, "elapsed": 10.0})
    found = values_at(record, 10)
    assert found["loss"] == 0.5
    assert math.isnan(found["action"])
    assert math.isnan(found["straightness"])


def test_by_time() -> None:
    record = straight(range(10, 101, 10), decay(50), columns={"seconds": lambda k: 2.0 + 0.1 * k})
    timeline = Timeline(record)
    assert timeline.step_of_time(7.05) == pytest.approx(50.5, abs=1e-9)
    assert timeline.step_of_time(1.5) == pytest.approx(5.0, abs=1e-9), "3 seconds at step 10, 0 at the start"
    assert timeline.step_of_time(12.0) == pytest.approx(100, abs=1e-9)
    assert math.isnan(timeline.step_of_time(12.1))
    assert math.isnan(timeline.step_of_time(-0.1))
    assert math.isnan(Timeline(straight([10], decay(50), columns={"seconds": lambda k: math.nan})).step_of_time(1.0))


@pytest.mark.parametrize("make", [callback_cases.sgd(), callback_cases.sgd(momentum=0.9), torch.optim.AdamW])
def test_the_last_row_is_what_the_summary_says(tmp_path: Path, make: Any) -> None:
    callback = callback_cases.quiet(loss_window=10)
    module = callback_cases.Regressor(make)
    callback_cases.trainer(tmp_path, callback, log_every_n_steps=7).fit(
        module, callback_cases.loader(callback_cases.batches(40))
    )
    record = callback.record
    found, summary = values_at(record), record.summary()
    compared = 0
    for field in dataclasses.fields(summary):
        value = getattr(summary, field.name)
        if field.name in found and isinstance(value, float):
            compared += 1
            assert found[field.name] == pytest.approx(value, rel=ROUNDING, nan_ok=True), field.name
    assert compared >= 25
    assert found["step"] == summary.steps == 40
    assert found["loss_se"] > 0


# --- what the work is made of


def test_shares_of_the_work_add_up() -> None:
    for conversion, signal in ((0.3, -0.2), (1.2, 0.9), (-0.5, 0.1)):
        found = work_shares(conversion, signal, {})
        assert sum(found.values()) == pytest.approx(1, abs=ROUNDING)
        assert found == pytest.approx(
            {
                "useful_share": conversion,
                "bouncing_share": conversion - signal,
                "noise_share": 1 - 2 * conversion + signal,
            },
            abs=ROUNDING,
        )
    assert all(map(math.isnan, work_shares(math.nan, 0.5, {}).values()))


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("lr", [0.02, 0.3])
def test_shares_of_the_work_are_those_of_the_exact_forces(lr: float, noise: float) -> None:
    """SGD on ½ Σ h x² with additive noise n on the gradient: F = −h x and n are known at every step.

    W = Σ (F + n)·u, bouncing = ½ Σ u·h·u, noise = Σ n·u: on a quadratic there is no third order.
    """
    curvature = torch.tensor([0.2, 1.0, 4.0], dtype=torch.float64)
    weights = torch.nn.Parameter(torch.tensor([2.0, -1.0, 1.5], dtype=torch.float64))
    start = weights.detach().clone()
    optimizer = torch.optim.SGD([weights], lr=lr)
    meter = TrajectoryMeter(optimizer, loss_window=2)
    generator = torch.Generator().manual_seed(4)
    work = bouncing = wasted = pulls = last = 0.0
    steps = 400
    for _ in range(steps):
        jolt = noise * torch.randn(3, generator=generator, dtype=torch.float64)
        force = -curvature * weights.detach() + jolt
        weights.grad = -force
        before = weights.detach().clone()
        optimizer.step()
        update = weights.detach() - before
        last = float(force @ update)
        work += last
        pulls += float((force - jolt) @ (force - jolt))
        bouncing += 0.5 * float(update @ (curvature * update))
        wasted += float(jolt @ update)
    drop = 0.5 * float(curvature @ (start**2 - weights.detach() ** 2))
    assert work - bouncing - wasted == pytest.approx(drop, rel=1e-9), "the identity itself"
    values = meter.compute()
    # The sums that met the next force lack the last step. Anti-Itô work has the next batch's noise in it,
    # Σ n_{k+1}·u_k, of mean 0 and standard deviation σ √(Σ|u|²) = σ √(lr·W).
    found = work_shares(drop / values["work_ito"], values["signal_fraction"], {})
    assert values["work_ito"] == pytest.approx(work, rel=1e-9)
    slack = 1e-9 + (2 * last + 4 * noise * math.sqrt(lr * work)) / work
    assert slack < 0.15, "tight enough to tell noise from bouncing"
    expected = {"useful_share": drop / work, "bouncing_share": bouncing / work, "noise_share": wasted / work}
    assert found == pytest.approx(expected, abs=slack)
    if noise:
        # n·u = lr (n·F + n·n): of mean lr σ² for each of 3 weights, of variance lr² (σ²|F|² + 2·3·σ⁴)
        spread = lr * math.sqrt(noise**2 * pulls + 6 * steps * noise**4)
        assert wasted == pytest.approx(3 * steps * lr * noise**2, abs=4 * spread)


# --- the level of several runs


def test_the_common_level_is_the_lowest_that_all_surely_reached() -> None:
    lines = {
        "deep": straight(range(1, 101), lambda k: 1 - k / 110, loss_se=0.01),
        "shallow": straight(range(1, 101), lambda k: 1 - k / 200, loss_se=0.02),
        "lost": straight(range(1, 101), lambda k: math.nan),
    }
    timelines = {name: Timeline(record) for name, record in lines.items()}
    level, name = fair_level(timelines)
    assert level == pytest.approx(0.5 + 0.06, abs=ROUNDING)
    assert name == "shallow"
    for kept in ("deep", "shallow"):
        assert timelines[kept].crossing(level).latest <= 100
    level, nobody = fair_level({"lost": timelines["lost"]})
    assert math.isnan(level)
    assert nobody is None


def test_runs_that_did_not_learn_set_no_fair_level() -> None:
    """Of a sweep the lowest and the highest rate: their level is above all starts, where nobody has taken a step."""
    wild = {11: -0.5, 12: 7.0}
    lines = {
        "good": straight(range(1, 101), lambda k: 2 - k / 100, loss_se=0.01),
        "dead": straight(range(1, 101), lambda k: 2.0 - 1e-4 * k, loss_se=0.01),
        "blown": straight(range(1, 101), lambda k: wild.get(k, 2.0 + k), loss_se=3.0),
    }
    timelines = {name: Timeline(record) for name, record in lines.items()}
    assert [timeline.fell for timeline in timelines.values()] == [True, False, False]
    level, name = fair_level(timelines)
    assert level == pytest.approx(1 + 0.03, abs=ROUNDING)
    assert name == "good"
    assert math.isnan(timelines["blown"].crossing(level).step), "one estimate below it, of an error of 3, is noise"
    assert timelines["blown"].crossing(2.5).step == 0, "but it began below this one"
    level, name = fair_level({name: timelines[name] for name in ("dead", "blown")})
    assert name == "blown", "of these alone, as before"
    assert level == pytest.approx(-0.5 + 9, abs=ROUNDING)


@pytest.mark.parametrize("lost", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_lost_warns_of_nothing(lost: float) -> None:
    record = straight(range(1, 101), lambda k: 1 - k / 200 if k < 80 else lost)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Timeline(record).crossing(0.75).step == pytest.approx(50, abs=ROUNDING)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_noise_does_not_bring_the_crossing_forward(noise: float) -> None:
    """L(k) = 2 e^(−k/200) + 0.1 with noise of each batch: the first row below 0.6 comes long before step 277."""
    truth = 200 * math.log(2 / (0.6 - 0.1))
    steps = np.arange(801)
    found, first_rows = [], []
    for seed in range(9):
        losses = 2 * np.exp(-steps / 200) + 0.1 + noise * np.random.default_rng(seed).standard_normal(len(steps))
        record = RunRecord({"clock": "steps"})
        for k in range(10, 801, 10):
            known = slice(max(0, k - 50), k)
            drop = losses_drop(
                (list(range(min(50, k))), losses[: min(50, k)].tolist()),
                (steps[known].tolist(), losses[known].tolist()),
                k,
            )
            record.append(k, {"loss": drop.last, "loss_se": drop.last_error, "loss_drop": drop.value})
        found.append(Timeline(record).crossing(0.6).step)
        columns = record.columns
        first_rows.append(columns["step"][columns["loss"] <= 0.6][0])
    error = 4 * np.std(found, ddof=1) / 3  # four standard errors of the mean of 9
    assert np.mean(found) == pytest.approx(truth, abs=error)
    if noise > 0.1:
        assert np.mean(first_rows) < truth - error, "the first row would have been told from the truth"


@pytest.mark.parametrize(
    ("values", "between", "above"),
    [
        ([2.0, 0.0], (0.0, 10.0), 5.0),  # a chord through the level 1 in its middle
        ([2.0, 0.0], (4.0, 10.0), 1.0),
        ([2.0, 0.0, 2.0, 0.0], (0.0, 30.0), 15.0),
        ([1.0, 1.0], (0.0, 10.0), 0.0),  # at the level is not above it
        ([2.0, 2.0], (1.0, 4.0), 3.0),
        ([2.0, math.nan, 0.0], (0.0, 20.0), 10.0),  # the chord over what is missing
        ([3.0, 0.0], (0.0, 10.0), 20 / 3),
    ],
)
def test_the_time_above_a_level(values: list[float], between: tuple[float, float], above: float) -> None:
    steps = 10.0 * np.arange(len(values))
    assert time_above(steps, np.array(values), 1.0, between) == pytest.approx(above, rel=1e-12)


def test_where_each_step_sees_all_data_nothing_is_noise() -> None:
    """c = 1/4 and s = 0 are half noise by the balance; all of what did not lower the loss is bouncing here."""
    works: dict[str, Curve] = {
        "work_ito": lambda k: k / 50,
        "work_anti_ito": lambda k: 0.0,
        "work_stratonovich": lambda k: k / 100,
    }
    for batches, shares in ((1, (0.25, 0.75, 0.0)), (2, (0.25, 0.25, 0.5))):
        record = straight(range(1, 51), lambda k: 1 - k / 200, columns=works)
        record.run["batches_per_epoch"] = batches
        found = values_at(record)
        names = ("useful_share", "bouncing_share", "noise_share")
        assert [found[name] for name in names] == pytest.approx(shares, rel=1e-12, abs=1e-15)
