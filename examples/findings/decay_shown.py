"""What the runs at different paces say: means over seeds, verdicts, tables, the figure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, median
from typing import Any

import numpy as np
from decay_runs import INERTIA, LOOKS, PACES, ROWS, Row, promise_of
from lab import COLOURS, MARKERS, Lab, Mean, mean_of
from scipy.stats import spearmanr
from trainings import Course


def settings_of(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """ "data net, optimizer" → its rows."""
    for name, found in groupby(rows, lambda row: f"{row['data']} {row['net']}, {row['optimizer']}"):
        yield name, list(found)


def over_seeds(rows: list[Row], pace: str, name: str) -> list[float]:
    """By seed, in order."""
    return [nan_or(row[name]) for row in rows if row["pace"] == pace]


def nan_or(value: float | None) -> float:
    return math.nan if value is None else value


def at_equal_loss(rows: list[Row]) -> list[Row]:
    """(pace, seed, steps, action) at the loss that all of one seed reach."""
    found = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        runs = [row for row in rows if row["seed"] == seed]
        level = max(row["end"] for row in runs if row["end"] is not None)
        for row in runs:
            course, every = Course(), max(1, row["steps"] // LOOKS)
            for look, loss in enumerate(row["losses"]):
                course.add(look * every, math.inf if loss is None else loss)
            step = course.passed(level)
            grid = np.arange(len(row["actions"]) + 1) * max(2, row["steps"] // ROWS)
            action = np.interp(step, grid, [0.0, *map(nan_or, row["actions"])]) if math.isfinite(step) else math.nan
            found.append({"pace": row["pace"], "seed": seed, "passed": step, "paid": float(action)})
    return found


def less(left: list[float], right: list[float]) -> Mean:
    """Paired by seed."""
    return mean_of([a - b for a, b in zip(left, right, strict=True)])


@dataclass(frozen=True)
class Ends:
    """Of one setting: pace → held-out loss at the end, and by how much that is above linear's, paired by seed;
    steps, action to the loss that all reach, and others, over linear's: geometric means over seeds."""

    name: str
    end: dict[str, Mean]
    above: dict[str, Mean]
    shares: dict[str, dict[str, float]]


def compared(rows: list[Row]) -> list[Ends]:
    found = []
    for name, runs in settings_of(rows):
        ends = {pace: over_seeds(runs, pace, "end") for pace in PACES}
        equal = at_equal_loss(runs)
        shares = {
            pace: {
                what: ratio(over_seeds(source, pace, what), over_seeds(source, "linear", what))
                for source, what in ((equal, "passed"), (equal, "paid"), (runs, "action"), (runs, "last_noise"))
            }
            for pace in PACES
        }
        above = {pace: less(ends[pace], ends["linear"]) for pace in PACES}
        found.append(Ends(name, {pace: mean_of(ends[pace]) for pace in PACES}, above, shares))
    return found


def ratio(left: list[float], right: list[float]) -> float:
    """Geometric mean of the quotients; NaN without a positive one."""
    logs = [math.log(a / b) for a, b in zip(left, right, strict=True) if a > 0 and b > 0]
    return math.exp(fmean(logs)) if logs else math.nan


@dataclass(frozen=True)
class Gain:
    """Means over seeds, nats. smoothed: predicted with the d of the batches' mean losses. simple: N/(4(1 − β) n)."""

    name: str
    rate: float
    gain: Mean
    held: Mean
    predicted: Mean
    smoothed: Mean
    simple: Mean

    def share(self, predicted: Mean) -> float:
        """Measured over predicted."""
        return self.gain.value / predicted.value

    def within(self, predicted: Mean) -> bool:
        return 1 / 1.5 <= self.share(predicted) <= 1.5


def gains_of(rows: list[Row]) -> list[Gain]:
    found = []
    for name, runs in settings_of(rows):
        for rate, group in groupby(runs, lambda row: row["rate"]):
            own = list(group)
            measured = (mean_of([row[what] for row in own]) for what in ("gain", "held_gain"))
            plain, smooth = ([promise_of(row, smoothed=smoothed) for row in own] for smoothed in (False, True))
            told = (mean_of([p.gain for p in plain]), mean_of([p.gain for p in smooth]))
            found.append(Gain(name, rate, *measured, *told, mean_of([p.simple for p in smooth])))
    return found


def ranks(gains: list[Gain], predicted: list[Mean]) -> float:
    """Spearman's correlation of what is measured and predicted; NaN for less than three."""
    known = [(p.value, g.gain.value) for g, p in zip(gains, predicted, strict=True) if math.isfinite(p.value)]
    return float(spearmanr(*zip(*known, strict=True)).statistic) if len(known) > 2 else math.nan


def verdicts(ends: list[Ends], gains: list[Gain]) -> str:
    least = [end for end in ends if min(PACES, key=lambda pace: end.shares[pace]["paid"]) == "constant speed"]
    lower = [end for end in ends if end.above["constant speed"].value < -2 * end.above["constant speed"].error]
    higher = [end for end in ends if end.above["constant speed"].value > 2 * end.above["constant speed"].error]
    count = len(ends)
    rows = [
        ("1. constant speed has the least action at equal loss", "3 of 4 settings", f"{len(least)} of {count}"),
        (
            "2. constant speed never ends lower than linear",
            f"0 of {count}",
            f"{len(lower)} lower, {len(higher)} higher",
        ),
    ]
    holds = [len(least) >= 0.75 * count, not lower]
    for name, predicted in (
        ("3", [gain.predicted for gain in gains]),
        ("3, with the smoothed loss", [gain.smoothed for gain in gains]),
    ):
        near = sum(gain.within(told) for gain, told in zip(gains, predicted, strict=True))
        rank = ranks(gains, predicted)
        rows += [
            (f"{name}: the gain is within a factor of 1.5", "80 %", f"{near} of {len(gains)}"),
            (f"{name}: rank correlation", "0.8", f"{rank:.2f}"),
        ]
        holds += [near >= 0.8 * len(gains), rank >= 0.8]
    lines = [f"| {' | '.join(row)} | {said(held)} |" for row, held in zip(rows, holds, strict=True)]
    return "\n".join(["| statement | wanted | found | |", "|---|---|---|---|", *lines])


def said(holds: bool) -> str:
    return "holds" if holds else "fails"


def ends_table(ends: list[Ends]) -> str:
    head = f"| held-out loss at the end | {' | '.join(PACES)} |\n|{'---|' * (len(PACES) + 1)}"
    return "\n".join([head, *(f"| {e.name} | {' | '.join(str(e.end[pace]) for pace in PACES)} |" for e in ends)])


def paces_table(ends: list[Ends], rows: list[Row]) -> str:
    """Medians over settings."""
    lines = [
        "| schedule | steps to equal loss | action to it | action at the end | noise work, last fifth "
        "| steadiness | straightness | conversion |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pace in PACES:
        shares = (
            median(e.shares[pace][what] for e in ends if math.isfinite(e.shares[pace][what]))
            for what in ("passed", "paid", "action", "last_noise")
        )
        plain = (
            median(nan_or(row[what]) for row in rows if row["pace"] == pace)
            for what in ("steadiness", "straightness", "conversion")
        )
        lines.append(f"| {pace} | {' | '.join(f'{x:.2f}' for x in shares)} | {' | '.join(f'{x:.3g}' for x in plain)} |")
    return "\n".join(lines)


def gains_table(gains: list[Gain], silent: list[Gain]) -> str:
    lines = [
        "| setting | rate | measured | predicted | measured / it | with the smoothed loss | measured / it "
        "| N/(4(1 − β)n) | held-out |",
        f"|{'---|' * 9}",
    ]
    for gain, name in [(g, g.name) for g in gains] + [(g, f"{g.name}, full batch") for g in silent]:
        told = (
            cell
            for predicted in (gain.predicted, gain.smoothed)
            for cell in (told_by(predicted), f"{gain.share(predicted):.2f}" if predicted.count else "")
        )
        cells = (name, f"{gain.rate:.3g}", str(gain.gain), *told, told_by(gain.simple), str(gain.held))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def told_by(predicted: Mean) -> str:
    """With how many seeds, where not all tell it."""
    of = f" ({predicted.count} seeds)" if predicted.count < 5 else ""
    return f"{predicted}{of}" if predicted.count else "none"


def draw(lab: Lab, ends: list[Ends], gains: list[Gain]) -> None:
    with lab.picture(3, width=4.6, height=4.0) as (_, (final, plane, gain)):
        names = [e.name.replace("fashion-mnist", "Fashion").replace("cifar10", "CIFAR") for e in ends]
        for i, pace in enumerate(PACES):
            style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": "none", "label": pace}
            if pace != "linear":
                places = [at + 0.12 * (i - 2) for at in range(len(ends))]
                above, errors = zip(*((e.above[pace].value, e.above[pace].error) for e in ends), strict=True)
                final.errorbar(above, places, xerr=errors, **style)
            plane.plot([e.shares[pace]["passed"] for e in ends], [e.shares[pace]["paid"] for e in ends], **style)
        final.axvline(0, color=COLOURS[1], linewidth=1)
        final.set(title="Loss at equal steps", xlabel="held-out loss above linear decay's, nats")
        final.set_yticks(range(len(ends)), names, fontsize=8)
        final.invert_yaxis()
        plane.set(yscale="log", title="At the loss that all reach")
        plane.set(xlabel="steps, over linear decay's", ylabel="action, over linear decay's")
        plane.legend(loc="best")
        draw_gains(gain, gains)


def draw_gains(panel: Any, gains: list[Gain]) -> None:
    for i, optimizer in enumerate(INERTIA):
        own = [g for g in gains if g.name.endswith(optimizer)]
        style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": "none"}
        panel.plot([g.predicted.value for g in own], [g.gain.value for g in own], alpha=0.4, fillstyle="none", **style)
        across, up = [g.smoothed.error for g in own], [g.gain.error for g in own]
        x, y = [g.smoothed.value for g in own], [g.gain.value for g in own]
        panel.errorbar(x, y, up, across, label=optimizer, **style)
    panel.plot([], [], "o", color=COLOURS[0], alpha=0.4, fillstyle="none", label="with the record's loss")
    span = np.array([0.0, max(panel.get_xlim()[1], panel.get_ylim()[1])])
    panel.plot(span, span, color="#666666", linewidth=1, label="as predicted")
    panel.fill_between(span, span / 1.5, span * 1.5, color="#dddddd", label="within a factor of 1.5")
    panel.set(title="What 100 steps of decay gain", xlabel="predicted before them, nats", ylabel="measured, nats")
    panel.legend(loc="upper left")
