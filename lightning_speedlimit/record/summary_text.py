"""How a summary reads: a table of plain text, and one sentence."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from lightning_speedlimit.record import late, why
from lightning_speedlimit.record.lost_loss import BECAME, is_not_finite
from lightning_speedlimit.record.summary_values import SummaryValues
from lightning_speedlimit.record.tuning import TUNING
from lightning_speedlimit.words import count, count_with_error, number, one_line, with_error

WIDTH = 92
_NAME_WIDTH = 22
_VALUE_WIDTH = 19

ABOVE_ONE = "noise, learning rate x curvature of order 1, inertia, or a loss that hardly fell can do this"
OUTSIDE_MOVES = (
    "updates alone, measured at every step, can't do this: weights were moved outside of the steps, "
    "or steps were sampled"
)

# Values that are there only where clouds were measured.
CLOUDS = ("wasserstein2", "wasserstein2_lower", "identity_excess", "kinematic_efficiency_wasserstein2")
COSTS = ("samples", "tokens", "epochs", "seconds")
_CHANGED_PLACES = 0.01  # identity_excess above which neurons are said to have changed places

# How many coordinates there are to measure: the first that a record tells (frozen parameters are none).
_THERE = ("optimized_coordinates", "trainable_parameters", "parameters")

# Sums in float64 over 10⁶ steps round to about 1e-10; what is above this is no rounding.
_ROUNDING = 1e-6

Row = tuple[str, str, str]


def _told(s: SummaryValues, name: str) -> str:
    """A value with its standard error, where it has one."""
    return with_error(getattr(s, name), getattr(s, f"{name}_se"), undefined="undefined", sign="+/-")


def measured_share(run: Mapping[str, Any]) -> str | None:
    """ "1,048,576 of 9,812,345 coordinates (10.7 %)"; None where all of them were measured, or nothing tells."""
    measured = run.get("measured_coordinates")
    there = next((run[name] for name in _THERE if run.get(name) is not None), None)
    if measured is None or there is None or measured >= there:
        return None
    return f"{measured:,} of {there:,} coordinates ({100 * measured / there:.3g} %)"


def table(summary: SummaryValues) -> str:
    """Cost, gain, what to change; then the physics; then a line for everything undefined or to beware of."""
    blocks = ["Speed limit of a training run", "-" * WIDTH]
    if _is_empty(summary):
        return "\n".join([*blocks, *textwrap.wrap(_nothing(summary), WIDTH), *_notes(summary)])
    blocks += ["\n\n".join(f"{title}\n{_lines(rows)}" for title, rows in parts(summary).items())]
    if since := late.sentence(summary.run):
        blocks[2:2] = [*textwrap.wrap(since, WIDTH), ""]
    notes = _notes(summary)
    return "\n".join([*blocks, *(["", *notes] if notes else [])])


def parts(summary: SummaryValues) -> dict[str, list[Row]]:
    """Title → rows, in the order in which a run is asked about."""
    return {
        "What it cost": cost(summary),
        "What it bought": gain(summary),
        **({"What to change": changes(summary)} if _is_tuned(summary) else {}),
        "How close to the speed limit": headline(summary),
        "What that rests on": quantities(summary),
    }


def _is_empty(summary: SummaryValues) -> bool:
    values = [v for v in vars(summary).values() if isinstance(v, float)]
    return summary.steps == 0 and all(math.isnan(v) for v in values)


def _nothing(s: SummaryValues) -> str:
    """Of a record without rows, and what makes them: a record does not know of a meter's steps until it takes them."""
    cure = "in a plain loop call record.take(meter) on your log steps"
    if s.run.get("versions", {}).keys() - {"torch"}:  # a Trainer's run
        cure = "its fit did not come to a log step whose steps were measured"
    return f"Nothing was measured: the record has no rows; {cure}."


def _lines(rows: list[Row]) -> str:
    """Three columns; the meaning is wrapped under itself."""
    lines = []
    for name, value, meaning in rows:
        start = f"{name:<{_NAME_WIDTH}}{value:<{_VALUE_WIDTH}} "
        lines += textwrap.wrap(
            meaning, WIDTH, initial_indent=start, subsequent_indent=" " * (_NAME_WIDTH + _VALUE_WIDTH + 1)
        )
    return "\n".join(lines)


def _clock_is_steps(summary: SummaryValues) -> bool:
    return bool(summary.run.get("clock", "steps") == "steps")


def _estimator(summary: SummaryValues) -> str:
    return one_line(summary.run.get("entropy_production") or "loss_drop", 60)


def cost(s: SummaryValues) -> list[Row]:
    """Name, value, meaning: what was paid."""
    axes = [
        ("samples", s.samples, "seen, all processes together"),
        ("tokens", s.tokens, "seen, all processes together"),
        ("epochs", s.epochs, "passes over the training data"),
        ("seconds", s.seconds, "wall-clock time, validation included"),
    ]
    known = [(name, count(value), meaning) for name, value, meaning in axes if math.isfinite(value)]
    return [("steps", str(s.steps), "optimizer steps taken so far"), *known]


def gain(s: SummaryValues) -> list[Row]:
    return [
        ("loss", _told(s, "loss"), "at the last row"),
        ("loss drop", _told(s, "loss_drop"), "loss at the start - loss at the end"),
    ]


def _is_tuned(s: SummaryValues) -> bool:
    """Records of plain numbers are not."""
    return any(math.isfinite(getattr(s, name)) or name in s.reasons for name in TUNING)


def changes(s: SummaryValues) -> list[Row]:
    """Name, value, meaning: what noise and curvature leave to gain, over the whole run."""
    unit = "tokens" if math.isfinite(s.tokens) else "samples"
    return [
        ("noise share", _told(s, "noise_share"), "share of the work spent on the noise of single batches"),
        (
            "critical batch",
            count_with_error(s.critical_batch_size, s.critical_batch_size_se, undefined="undefined", sign="+/-"),
            f"{unit}; in a smaller batch noise outweighs the gradient, in a larger one it does not",
        ),
        (
            "step headroom",
            _told(s, "step_headroom"),
            "above 1: longer steps would have lowered the loss more",
        ),
    ]


def headline(s: SummaryValues) -> list[Row]:
    """Name, value, meaning: the efficiencies and what they are made of."""
    cost = "for this loss drop" if _estimator(s) == "loss_drop" else f"at this work ({_estimator(s)})"
    return [
        (
            "efficiency",
            _told(s, "efficiency"),
            f"least time {cost} / time taken; best 1",
        ),
        *_interval_row(s),
        (
            "  by action",
            _told(s, "efficiency_action"),
            "at most 1 when every step is measured",
        ),
        (
            "kinematic efficiency",
            _told(s, "kinematic_efficiency"),
            "straightness x steadiness" + ("; sampled" if math.isfinite(s.kinematic_efficiency_se) else ""),
        ),
        ("  straightness", _told(s, "straightness"), "1: a straight path; low: the path turns"),
        ("  steadiness", _told(s, "steadiness"), "1: constant speed; low: a burst, then a crawl"),
        *_cloud_rows(
            "  of clouds",
            s.kinematic_efficiency_wasserstein2,
            "the same with W2 of clouds for the displacement",
        ),
        (
            "conversion",
            _told(s, "conversion"),
            "loss drop / work; low: noise or bouncing took it",
        ),
        ("signal fraction", _told(s, "signal_fraction"), "share of the work that the next batch confirms"),
        _limit_row(s),
    ]


def _interval_row(s: SummaryValues) -> list[Row]:
    """A line where both ends are defined, else none."""
    if math.isnan(s.efficiency_low) or math.isnan(s.efficiency):
        return []
    ends = f"{number(s.efficiency_low)} to {number(s.efficiency)}"
    estimate = "" if math.isnan(s.efficiency_drift) else f"; estimate {number(s.efficiency_drift)}"
    return [("  interval", ends, f"without the batches' random motion{estimate}")]


def _limit_row(s: SummaryValues) -> Row:
    """τ_SL in the words of the clock."""
    value = number(s.speed_limit_time)
    if math.isnan(s.speed_limit_time):
        return ("speed limit", value, "least time for this displacement on the same action budget")
    if _clock_is_steps(s):
        meaning = f"this displacement could not have been done in fewer than {value} steps"
        return ("speed limit", f"{_told(s, 'speed_limit_time')} steps", f"{meaning} on the same action budget")
    meaning = f"this displacement could not have been done in a time (sum of learning rates) below {value}"
    return ("speed limit", _told(s, "speed_limit_time"), f"{meaning} on the same action budget")


def _cloud_rows(name: str, value: float, meaning: str) -> list[Row]:
    """A line where clouds were measured, else none."""
    return [] if math.isnan(value) else [(name, number(value), meaning)]


def quantities(s: SummaryValues) -> list[Row]:
    """Name, value, meaning: what was added up."""
    time = "steps" if _clock_is_steps(s) else "sum of learning rates"
    return [
        ("time elapsed", number(s.elapsed), f"on the clock of the action ({time})"),
        ("displacement", _told(s, "displacement"), "straight distance from first to last weights"),
        *_net_row(s),
        *_cloud_rows("  W2 of clouds", s.wasserstein2, _meaning_of_wasserstein2(s)),
        *_cloud_rows("  identity excess", s.identity_excess, "displacement^2 / W2^2 - 1; 0: none swapped"),
        ("path length", _told(s, "path_length"), "sum of the lengths of all updates"),
        ("action", _told(s, "action"), "sum of squared update lengths / clock increment"),
        (
            "entropy production",
            _told(s, "entropy_production"),
            f"x temperature, unit of the loss, by {_estimator(s)}",
        ),
        ("gradient norm", _told(s, "grad_norm"), "of the last step, before clipping"),
        ("  as applied", _told(s, "grad_norm_clipped"), "of the last step, after clipping"),
    ]


def _net_row(s: SummaryValues) -> list[Row]:
    """A line where something else than the steps moved the weights, else none."""
    if not abs(s.net_displacement - s.displacement) > _ROUNDING * s.path_length:
        return []
    return [
        ("  with moves outside", _told(s, "net_displacement"), "the same with what moved the weights between steps")
    ]


def _meaning_of_wasserstein2(s: SummaryValues) -> str:
    meaning = "the same, neurons of a layer free to swap names"
    if s.wasserstein2_lower < s.wasserstein2 and number(s.wasserstein2_lower) != number(s.wasserstein2):
        meaning += f"; at least {number(s.wasserstein2_lower)}"
    return meaning


def _notes(s: SummaryValues) -> list[str]:
    return [line for note in remarks(s) for line in textwrap.wrap(note, WIDTH, subsequent_indent="  ")]


def remarks(s: SummaryValues) -> list[str]:
    """What was measured; a line for every reason given, values beyond their bound, neurons that changed places."""
    share = measured_share(s.run)
    notes = [] if share is None else [f"measured: {share}, values +/- standard error"]
    notes += why.lines(s)
    for name in ("efficiency", "efficiency_action", "kinematic_efficiency", "straightness", "steadiness"):
        value = getattr(s, name)
        if value > 1 + _ROUNDING and name not in s.reasons:
            notes.append(f"{name} is above 1: {ABOVE_ONE if name == 'efficiency' else OUTSIDE_MOVES}")
    if s.efficiency < 0 and "efficiency" not in s.reasons:
        notes.append(f"efficiency is negative: what it divides by, {_estimator(s)}, is (the loss rose?)")
    notes += _places(s)
    unexplained = [
        name
        for name in vars(s)
        if _is_value(s, name) and math.isnan(getattr(s, name)) and name not in s.reasons and not _may_be_absent(name)
    ]
    if unexplained and not _is_empty(s):
        notes.append(f"not recorded: {', '.join(unexplained)}")
    return notes


def _places(s: SummaryValues) -> list[str]:
    """Whether neurons changed places; nothing where little can be said."""
    excess = s.identity_excess
    if excess > _CHANGED_PLACES:
        shorter = number(100 * (1 - (1 + excess) ** -0.5), 2)
        return [
            f"neurons changed places: relabelling them shortens the displacement by {shorter} %, a sign of feature "
            "learning"
        ]
    if excess == 0 and s.wasserstein2 > 0 and "identity_excess" not in s.reasons:
        return ["no neurons changed places: no relabelling shortens the displacement"]
    return []


def _is_value(s: SummaryValues, name: str) -> bool:
    return isinstance(getattr(s, name, None), float)


def _may_be_absent(name: str) -> bool:
    """A standard error is there only where its value is estimated, W₂ only where clouds are measured.

    Records of plain numbers have no `net_displacement`, samples and critical batch.
    """
    return name.endswith("_se") or name in (*CLOUDS, *COSTS, *TUNING, "net_displacement", "work_decay")


# --- one sentence


def sentence(s: SummaryValues) -> str:
    """What the run did; what cost the time; what became of the work."""
    if _is_empty(s):
        return _nothing(s)
    away = _away(s)
    parts = [_motion(s, judged=not away), *([away] if away else []), _work(s)]
    if s.efficiency > 1 + _ROUNDING:
        parts.append(f"efficiency {number(s.efficiency)} is above 1: {ABOVE_ONE}")
    return "; ".join(parts) + "."


def _away(s: SummaryValues) -> str:
    """Of a loss that rose beyond three standard errors, or was lost, that no way to it is a good one; "" of others."""
    lost = s.reasons.get("loss", "")
    if lost.startswith(BECAME) or is_not_finite(lost):
        return lost.rstrip(". ") + (": the run diverged" if math.isnan(s.path_length) else "")
    if s.loss_drop < -3 * (0 if math.isnan(s.loss_drop_se) else s.loss_drop_se):
        return f"the loss rose by {number(-s.loss_drop)}: a way up, however straight and steady"
    return ""


def _motion(s: SummaryValues, *, judged: bool) -> str:
    steps = f"{s.steps} step{'' if s.steps == 1 else 's'}"
    if since := late.since(s.run):
        steps = f"from step {since} on, {steps}"
    if s.displacement == 0 and s.path_length == 0:
        return f"{steps} did not move the weights"
    if math.isnan(s.displacement) or math.isnan(s.path_length):
        return f"after {steps} how far the weights moved is {_undefined(s, 'displacement', 'path_length')}"
    moved = f"{steps} moved the weights {number(s.displacement)} along a path of {number(s.path_length)}"
    return f"{moved}{_what_cost_the_time(s)}" if judged else moved


def _what_cost_the_time(s: SummaryValues) -> str:
    """τ/τ_SL = 1/straightness × 1/steadiness: the smaller factor cost more time."""
    straight, steady = s.straightness, s.steadiness
    if math.isnan(straight) or math.isnan(steady):
        known = "".join(
            f" ({name} {number(value)})"
            for name, value in (("straightness", straight), ("steadiness", steady))
            if not math.isnan(value)
        )
        why = _undefined(s, "straightness", "steadiness", "kinematic_efficiency")
        return f"{known}, and whether turning or changes of speed cost more time is {why}"
    both = f"straightness {number(straight)}, steadiness {number(steady)}"
    if max(straight, steady) > 1 + _ROUNDING:
        return f" ({both}), and a factor above 1 says that {OUTSIDE_MOVES}"
    if min(straight, steady) >= 0.9:
        return f" ({both}): a nearly straight path at nearly constant speed"
    if number(straight) == number(steady):
        return f" ({both}): turning and changes of speed cost the same"
    causes = [(straight, "straightness", "turning"), (steady, "steadiness", "changes of speed")]
    (low, low_name, cause), (high, high_name, other) = sorted(causes)
    # A factor of 0.8 and more lengthened the run by a quarter at most: not where the time went.
    comparison = "not" if high >= 0.8 else "more than"
    return (
        f" ({low_name} {number(low)}): {cause}, {comparison} {other} ({high_name} {number(high)}), "
        "is where the time went"
    )


def _work(s: SummaryValues) -> str:
    if s.work_ito <= 0:
        return f"the updates did no work along the gradients (work_ito {number(s.work_ito)})"
    if math.isnan(s.conversion):
        why = _undefined(s, "conversion", "loss_drop", "work_ito")
        return f"what share of the work lowered the loss is {why}"
    if s.conversion > 1:
        return f"the loss fell by {number(s.conversion)} times the work counted (conversion above 1)"
    if s.conversion > 0:
        return f"{number(100 * s.conversion)} % of the work lowered the loss"
    return f"none of the work lowered the loss (conversion {number(s.conversion)})"


def _undefined(s: SummaryValues, *names: str) -> str:
    reason = next((s.reasons[name] for name in names if name in s.reasons), None)
    return "undefined" if reason is None else f"undefined ({reason.rstrip('. ')})"
