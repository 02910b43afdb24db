"""What a summary says: the right figures, readable without the documentation, and true in every case."""

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedlimit.record import RunRecord, Summary
from lightning_speedlimit.words import count, listed, number

# SGD lr 0.1, batch 128 on digits, about as in the trade-off table of the theory.
ROW = {
    "samples": 128.0 * 620,
    "loss": 0.1012,
    "learning_rate": 0.1,
    "efficiency": 0.49,
    "efficiency_low": 0.48,
    "efficiency_drift": 0.485,
    "efficiency_action": 0.021,
    "kinematic_efficiency": 0.05,
    "straightness": 0.056,
    "steadiness": 0.9,
    "speed_limit_time": 31.2,
    "conversion": 0.12,
    "signal_fraction": 0.11,
    "displacement": 3.2,
    "path_length": 13.5,
    "action": 0.3266,
    "elapsed": 620.0,
    "step_norm": 0.02,
    "loss_drop": 2.2,
    "loss_drop_se": 0.013,
    "entropy_production": 2.2,
    "work_ito": 18.3,
    "work_stratonovich": 10.1,
    "work_anti_ito": 2.01,
    "work_action": 18.4,
    "grad_norm": 0.85,
    "grad_norm_clipped": 0.5,
}
NAN = math.nan


def summary_of(
    changes: dict[str, float] | None = None, reasons: dict[str, str] | None = None, **run: object
) -> Summary:
    """Of a run at constant rates: half, and slightly more, of what could be gained by longer steps was."""
    sgd = {"optimizers": [{"class": "SGD", "groups": [{"lr": 0.1, "momentum": 0.0}]}]}
    record, sums = RunRecord(run if "optimizers" in run else {**run, **sgd}), ("loss_drop", "work_ito", "work_anti_ito")
    for tenth in range(1, 10):
        record.append(
            62 * tenth, {"loss": 2.3, "samples": 128.0 * 62 * tenth, **{n: ROW[n] * tenth / 10 for n in sums}}
        )
    record.append(620, {**ROW, **(changes or {})}, reasons)
    return record.summary()


def squeezed(text: object) -> str:
    return re.sub(r"\s+", " ", str(text))


def test_the_summary_is_the_last_row() -> None:
    summary = summary_of({"not_a_field": 1.0}, {"efficiency": "noisy"}, clock="lr")
    assert summary.steps == 620
    assert {name: getattr(summary, name) for name in ROW} == ROW
    assert math.isnan(summary.efficiency_se)
    assert summary.reasons == {"efficiency": "noisy"}
    assert summary.run["clock"] == "lr"
    with pytest.raises(dataclasses.FrozenInstanceError):
        summary.loss = 0.0  # type: ignore[misc]


def test_a_record_with_the_former_lower_end_shows_without_it() -> None:
    former = {"efficiency_low": NAN, "efficiency_drift": NAN, "efficiency_lower": 0.47}
    text = squeezed(summary_of(former, {"efficiency_lower": "a loose end: curvature"}))
    assert "efficiency 0.490" in text
    assert "interval" not in text
    assert "efficiency_lower" not in text
    assert "0.470" not in text
    assert "not recorded: efficiency_low, efficiency_drift" in text


def test_an_empty_record_is_all_nan() -> None:
    summary = RunRecord().summary()
    assert summary.steps == 0
    assert all(math.isnan(value) for value in vars(summary).values() if isinstance(value, float))
    said = "Nothing was measured: the record has no rows; in a plain loop call record.take(meter) on your log steps."
    assert said in squeezed(summary)
    assert summary.sentence() == said
    assert max(map(len, str(summary).splitlines())) <= 92


@pytest.mark.parametrize(
    ("versions", "cure"),
    [
        ({"torch": "2.13"}, "call record.take(meter) on your log steps."),
        (
            {"torch": "2.13", "pytorch_lightning": "2.6"},
            "its fit did not come to a log step whose steps were measured.",
        ),
        ({"torch": "2.13", "transformers": "5.0"}, "its fit did not come to a log step whose steps were measured."),
    ],
)
def test_a_record_without_rows_says_what_makes_them(versions: dict[str, str], cure: str) -> None:
    """A meter that measured steps, and was never taken from, leaves none in its record."""
    assert RunRecord({"versions": versions}).summary().sentence().endswith(cure)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (0.001, "0.00100"),
        (0.00099996, "0.00100"),  # rounds up into the plain range
        (0.0009, "0.000900"),
        (12345.6, "12346"),
        (100000.0, "100000"),
        (123456.0, "123456"),
        (9_999_999.0, "1.00e+07"),
        (0.00009, "9.00e-05"),
        (9.999, "10.0"),
        (-0.0504, "-0.0504"),
        (NAN, "?"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_have_three_digits(x: float, text: str) -> None:
    assert number(x) == text


@pytest.mark.parametrize(
    ("x", "text"),
    [
        *((48.0, "48"), (95.99, "96"), (0.0, "0"), (-3.0, "-3"), (48.5, "48.5"), (0.188, "0.188"), (999.9, "1,000")),
        *((17970.0, "17,970"), (1521.4, "1,521"), (NAN, "?"), (math.inf, "inf"), (2e9, "2.00e+09")),
    ],
)
def test_counts_have_no_zeros_behind_the_point(x: float, text: str) -> None:
    assert count(x) == text


# --- the table


def test_the_table_says_the_headline_in_words() -> None:
    text = squeezed(summary_of())
    for line in [
        "steps 620",
        "loss 0.101",
        "efficiency 0.490 least time for this loss drop / time taken; best 1",
        "interval 0.480 to 0.490 without the batches' random motion; estimate 0.485",
        "kinematic efficiency 0.0500 straightness x steadiness",
        "straightness 0.0560",
        "steadiness 0.900",
        "conversion 0.120",
        "signal fraction 0.110",
        "speed limit 31.2 steps this displacement could not have been done in fewer than 31.2 steps "
        "on the same action budget",
        "loss drop 2.20 +/- 0.013",
        "entropy production 2.20 x temperature, unit of the loss, by loss_drop",
        "gradient norm 0.850 of the last step, before clipping",
        "as applied 0.500 of the last step, after clipping",
    ]:
        assert line in text
    assert "undefined" not in text
    assert "sampled" not in text


def test_the_table_follows_the_clock_and_the_estimator() -> None:
    text = squeezed(summary_of(clock="lr", entropy_production="ito"))
    assert "could not have been done in a time (sum of learning rates) below 31.2" in text
    assert "fewer than" not in text
    assert "by ito" in text
    assert "for this loss drop" not in text


def test_undefined_values_and_caveats_have_a_line_each() -> None:
    reasons = {
        "efficiency": "the loss drop is below two standard errors",
        "conversion": "anticorrelated batches",
    }
    text = str(summary_of({"efficiency": NAN, "work_action": NAN}, reasons))
    assert "efficiency is undefined: the loss drop is below two standard errors" in text
    assert "conversion: anticorrelated batches" in text
    assert "not recorded: work_action" in text
    assert "interval 0.480" not in text, "one end is undefined"


def test_values_beyond_their_bound_are_explained() -> None:
    text = squeezed(summary_of({"efficiency": 1.3, "straightness": 1.2}))
    assert "efficiency is above 1: noise, learning rate x curvature of order 1, inertia" in text
    assert "straightness is above 1: updates alone" in text
    # A reason that the run itself gave is the better one: no second line.
    assert "efficiency is above 1" not in squeezed(summary_of({"efficiency": 1.3}, {"efficiency": "momentum"}))
    assert "efficiency is negative" in squeezed(summary_of({"efficiency": -0.3}))


def test_sampled_runs_say_so() -> None:
    text = squeezed(summary_of({"kinematic_efficiency_se": 0.002}))
    assert "kinematic efficiency 0.0500 +/- 0.0020 straightness x steadiness; sampled" in text


def test_drawn_coordinates_are_said_with_their_errors() -> None:
    errors = {"displacement": 0.1, "path_length": 0.3, "action": 0.0071, "straightness": 0.004, "steadiness": 0.012}
    errors |= {"speed_limit_time": 0.8, "signal_fraction": 0.02, "entropy_production": 0.05, "grad_norm": 0.031}
    changes = {f"{name}_se": error for name, error in errors.items()}
    run = {"measured_coordinates": 1048576, "optimized_coordinates": 9812345, "parameters": 20000000}
    text = squeezed(summary_of(changes, **run))
    for line in [
        "measured: 1,048,576 of 9,812,345 coordinates (10.7 %), values +/- standard error",
        "displacement 3.20 +/- 0.10 straight distance",
        "path length 13.5 +/- 0.30 sum",
        "action 0.327 +/- 0.0071 sum",
        "straightness 0.0560 +/- 0.0040 1:",
        "steadiness 0.900 +/- 0.012 1:",
        "speed limit 31.2 +/- 0.80 steps this displacement could not have been done in fewer than 31.2 steps",
        "signal fraction 0.110 +/- 0.020 share",
        "entropy production 2.20 +/- 0.050 x temperature",
        "gradient norm 0.850 +/- 0.031 of",
    ]:
        assert line in text
    assert summary_of(changes, **run).action_se == 0.0071


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"parameters": 100},
        {"measured_coordinates": None, "parameters": 100},  # before the first step
        {"measured_coordinates": 100, "parameters": 100},
        {"measured_coordinates": 60, "trainable_parameters": 60, "parameters": 100},  # the others are frozen
        {"measured_coordinates": 60, "optimized_coordinates": 60, "trainable_parameters": 80, "parameters": 100},
        {"measured_coordinates": 200, "parameters": 100},  # complex
    ],
)
def test_exact_runs_do_not_speak_of_it(run: dict[str, object]) -> None:
    assert str(summary_of(**run)) == str(summary_of())


# --- clouds

CLOUDS = {
    "wasserstein2": 3.0,
    "wasserstein2_lower": 3.0,
    "identity_excess": 3.3**2 / 3.0**2 - 1,
    "kinematic_efficiency_wasserstein2": 0.0441,
}


def test_clouds_have_their_lines() -> None:
    summary = summary_of(CLOUDS)
    assert {name: getattr(summary, name) for name in CLOUDS} == CLOUDS
    text = squeezed(summary)
    for line in [
        "of clouds 0.0441 the same with W2 of clouds for the displacement",
        "W2 of clouds 3.00 the same, neurons of a layer free to swap names identity",  # no interval: no words
        "identity excess 0.210 displacement^2 / W2^2 - 1; 0: none swapped",
        # 1 − 3/3.3
        "neurons changed places: relabelling them shortens the displacement by 9.1 %, a sign of feature learning",
    ]:
        assert line in text
    assert max(map(len, str(summary).splitlines())) <= 92


def test_without_clouds_there_is_no_word_of_them() -> None:
    text = str(summary_of())
    for word in ("W2", "cloud", "identity", "neurons", "wasserstein"):
        assert word not in text


@pytest.mark.parametrize(
    ("changes", "reasons", "wanted"),
    [
        ({"identity_excess": 0.0}, {}, "no neurons changed places: no relabelling shortens the displacement"),
        ({"identity_excess": 0.009}, {}, None),
        ({"identity_excess": 0.0}, {"identity_excess": "too many neurons"}, None),  # the pairing is only a bound
        ({"identity_excess": 0.0, "wasserstein2": 0.0}, {}, None),  # nothing moved
        ({"identity_excess": 8.0}, {"identity_excess": "too many"}, "shortens the displacement by 67 %"),
        ({"identity_excess": NAN}, {"identity_excess": "only changed places"}, "is undefined: only changed places"),
    ],
)
def test_whether_neurons_changed_places(changes: dict[str, float], reasons: dict[str, str], wanted: str | None) -> None:
    text = squeezed(summary_of(CLOUDS | changes, reasons))
    if wanted is None:
        assert "changed places" not in text
    else:
        assert wanted in text


def test_a_wide_interval_of_clouds_is_given() -> None:
    text = squeezed(summary_of(CLOUDS | {"wasserstein2_lower": 1.234}))
    assert "free to swap names; at least 1.23" in text


def test_reasons_that_clouds_share_take_one_line() -> None:
    reasons = {**dict.fromkeys(CLOUDS, "within an epoch"), "loss": "within an epoch"}
    text = squeezed(summary_of(dict.fromkeys(CLOUDS, NAN), reasons))
    assert f"{listed(list(CLOUDS))} are undefined: within an epoch" in text
    assert "loss: within an epoch" in text
    assert text.count("within an epoch") == 2


def test_a_lost_loss_takes_one_line_that_says_when() -> None:
    """However many values are undefined by it, those of the tuning among them."""
    names = [name for name in ROW if name not in ("samples", "elapsed", "learning_rate", "loss_drop_se")]
    reasons = dict.fromkeys(names, "a gradient, a loss or a weight was not finite, or beyond the range of its products")
    reasons |= dict.fromkeys(("loss", "loss_drop", "conversion"), "a recorded loss is not finite")
    text = squeezed(summary_of(dict.fromkeys(names, NAN), reasons))
    said = "The loss became NaN or infinite between steps 558 and 620; everything after is undefined"
    assert text.count(said) == 1
    assert "not finite" not in text
    assert "undefined:" not in text
    assert "are NaN" not in text


def test_of_one_lost_loss_what_the_weights_tell_stays() -> None:
    names = ["loss", "loss_drop", "conversion"]
    text = squeezed(summary_of(dict.fromkeys(names, NAN), dict.fromkeys(names, "a recorded loss is not finite")))
    assert "loss, loss_drop, conversion" in text
    assert "are undefined: the loss became NaN or infinite between steps 558 and 620" in text
    assert "everything after" not in text
    assert "displacement 3.20" in text


def test_a_loss_that_was_lost_at_once_was_lost_after_the_start() -> None:
    record = RunRecord()
    for step in (50, 100):
        record.append(step, {"loss": NAN, "loss_drop": NAN}, {"loss": "a recorded loss is not finite"})
    assert "The loss became NaN or infinite between steps 0 and 50;" in squeezed(record.summary())


def test_a_weight_alone_that_was_not_finite_takes_one_line_too() -> None:
    """The loss is there: what is undefined is named, and nothing else."""
    names = ["displacement", "action", "straightness", "steadiness", "path_length", "grad_norm", "work_action"]
    why = "a gradient, a loss or a weight was not finite"
    text = squeezed(summary_of(dict.fromkeys(names, NAN), dict.fromkeys(names, why)))
    assert f"{', '.join(names[:6])} and 1 more are undefined: {why}" in text
    assert text.count(why) == 1
    assert "became" not in text


def test_without_a_loss_one_line_says_what_to_do() -> None:
    """The tuning numbers have the loss's reason, not one of their own."""
    missing = ["loss", "loss_drop", "conversion", "entropy_production", "efficiency"]
    record = RunRecord({"optimizers": [{"class": "SGD", "groups": [{"lr": 0.1, "momentum": 0.0}]}]})
    rows = {**ROW, **dict.fromkeys(missing, NAN)}
    for step in (10, 20, 30, 40):
        record.append(step, rows, dict.fromkeys(missing, "no loss was recorded: log it"))
    text = squeezed(record.summary())
    assert text.count("no loss was recorded: log it") == 1
    assert "loss_drop is NaN" not in text
    assert record.tuning()["noise_share"].reason == "no loss was recorded: log it"
    assert record.tuning(to=30)["noise_share"].reason == "loss_drop is NaN", "why is known of the last row alone"


values = st.one_of(st.floats(), st.floats(-2, 2))
rows = st.fixed_dictionaries({}, optional=dict.fromkeys([*ROW, *CLOUDS, "efficiency_se", "conversion_se"], values))


@given(row=rows, clock=st.sampled_from(["steps", "lr"]))
def test_the_table_is_aligned_and_narrow_for_any_values(row: dict[str, float], clock: str) -> None:
    record = RunRecord({"clock": clock})
    record.append(3, row, {"loss": "a reason that goes on and on " * 6})
    lines = str(record.summary()).splitlines()
    # -1.23e+308 +/- 1.2e+308 is wider than its column by 6 characters; no value can be wider.
    assert max(map(len, lines)) <= 96
    assert all(line == line.rstrip() for line in lines)


def test_the_table_of_an_ordinary_run_fits_into_92_columns() -> None:
    reasons = {"efficiency": "the loss drop is below two standard errors of the estimate " * 3}
    for clock in ("steps", "lr"):
        assert max(map(len, str(summary_of({"conversion_se": 0.004}, reasons, clock=clock)).splitlines())) <= 92


# --- the sentence


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "620 steps moved the weights 3.20 along a path of 13.5 (straightness 0.0560): turning, not "
            "changes of speed (steadiness 0.900), is where the time went; "
            "12.0 % of the work lowered the loss.",
        ),
        (
            {"straightness": 0.95, "steadiness": 0.3},
            "changes of speed, not turning (straightness 0.950), is where",
        ),
        (
            {"straightness": 0.2, "steadiness": 0.5},
            "turning, more than changes of speed (steadiness 0.500), is",
        ),
        ({"straightness": 0.5, "steadiness": 0.5}, "turning and changes of speed cost the same"),
        ({"straightness": 0.99, "steadiness": 0.95}, "a nearly straight path at nearly constant speed"),
        (
            {"straightness": 0.99, "steadiness": 0.95, "loss_drop": -0.5, "conversion": -0.03},
            "along a path of 13.5; the loss rose by 0.500: a way up, however straight and steady; none of the work",
        ),
        (  # within three standard errors of 0
            {"straightness": 0.99, "steadiness": 0.95, "loss_drop": -0.03},
            "a nearly straight path at nearly constant speed",
        ),
        ({"loss_drop": -1e-9, "loss_drop_se": NAN}, "the loss rose by 1.00e-09"),
        ({"straightness": 1.3}, "a factor above 1 says that updates alone"),
        (
            {"straightness": NAN},
            "(steadiness 0.900), and whether turning or changes of speed cost more time is undef",
        ),
        ({"displacement": NAN}, "how far the weights moved is undefined (because)"),
        ({"displacement": 0.0, "path_length": 0.0}, "620 steps did not move the weights"),
        ({"conversion": -0.1}, "none of the work lowered the loss (conversion -0.100)"),
        ({"conversion": 1.5}, "the loss fell by 1.50 times the work counted (conversion above 1)"),
        ({"conversion": NAN}, "what share of the work lowered the loss is undefined."),
        # Both negative would make a positive quotient: the sign of the work decides.
        (
            {"work_ito": -1.0, "conversion": 0.5},
            "the updates did no work along the gradients (work_ito -1.00)",
        ),
        (
            {"efficiency": 1.3},
            "efficiency 1.30 is above 1: noise, learning rate x curvature of order 1, inertia, or",
        ),
    ],
)
def test_the_sentence_says_what_was_measured(changes: dict[str, float], expected: str) -> None:
    assert expected in summary_of(changes, {"displacement": "because."}).sentence()


def test_the_sentence_does_not_praise_a_run_whose_loss_was_lost() -> None:
    lost = {"loss": NAN, "loss_drop": NAN, "conversion": NAN, "straightness": 0.99, "steadiness": 0.95}
    sentence = summary_of(lost, {"loss": "a recorded loss is not finite", "conversion": "why"}).sentence()
    assert "along a path of 13.5; the loss became NaN or infinite between steps 558 and 620; what share" in sentence
    assert "diverged" not in sentence, "the weights are there"
    assert "nearly straight" not in sentence
    gone = {name: NAN for name in ROW if name not in ("samples", "elapsed", "learning_rate")}
    assert "620: the run diverged" in summary_of(gone, {"loss": "a recorded loss is not finite"}).sentence()


@given(row=rows)
def test_the_sentence_is_true_for_any_values(row: dict[str, float]) -> None:
    record = RunRecord()
    record.append(7, row)
    summary = record.summary()
    sentence = summary.sentence()
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "nan" not in sentence
    straight, steady = summary.straightness, summary.steadiness
    if ": turning, " in sentence:
        assert straight < steady
    if ": changes of speed, " in sentence:
        assert steady < straight
    if "% of the work lowered" in sentence:
        assert 0 < summary.conversion <= 1
        assert not summary.work_ito <= 0
    # Above 1 is always said. 1e-6: what float64 sums can round to, with room.
    said = "efficiency" in sentence and "above 1: noise" in sentence
    assert said == (summary.efficiency > 1 + 1e-6)
    assert not re.search(r"\b(should|try|use a|lower the|raise the|increase|reduce)\b", sentence), "no advice"


def test_one_step_is_singular() -> None:
    record = RunRecord()
    record.append(1, {**ROW})
    assert record.summary().sentence().startswith("1 step moved")
