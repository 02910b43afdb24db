"""How a comparison reads: a table of plain text, sentences, JSON."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_speedlimit._summary_text import measured_share
from lightning_speedlimit.report.comparison import below, rivals

if TYPE_CHECKING:
    from lightning_speedlimit.report.comparison import Comparison, Group

WIDTH = 100
UNDEFINED = "?"
_LONGEST = 60  # letters of a name in a table
_ROUNDING = 1e-9  # relative: of sums and means in float64

# Heading, key in the values, significant digits: what a row of the table shows.
COLUMNS = (
    ("steps", "elapsed", 3),
    ("seconds", "seconds", 3),
    ("loss", "loss", 3),
    ("action", "action", 3),
    ("efficiency", "efficiency", 2),
    ("kinematic", "kinematic_efficiency", 2),
    ("straightness", "straightness", 2),
    ("steadiness", "steadiness", 2),
    ("conversion", "conversion", 2),
)


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, all of the integer part; "?" undefined."""
    if math.isnan(value):
        return UNDEFINED
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def with_error(value: float, error: float, digits: int = 3) -> str:
    """ "123 ± 4": the error with two digits at most; alone where that is unknown, or mere rounding."""
    told = math.isfinite(error) and error > _ROUNDING * abs(value)
    return number(value, digits) + (f" ± {number(error, 2)}" if told else "")


def interval(bounds: tuple[float, float]) -> str:
    """ "96 to 123"; "at least 96" where the end is not within the run."""
    low, high = bounds
    if math.isinf(high):
        return f"at least {number(low)}"
    return number(low) if number(low) == number(high) else f"{number(low)} to {number(high)}"


def where(comparison: Comparison) -> str:
    """ "at the same loss, 0.138"."""
    unit = {"loss": "at the same loss, {}", "step": "after {} steps", "time": "after {} seconds"}[comparison.by]
    return unit.format(number(comparison.at))


def clock_word(comparison: Comparison) -> str:
    """What τ counts."""
    clock = comparison.groups[0].points[0].run.record.run.get("clock", "steps")
    return "steps" if clock == "steps" else "learning rate, summed"


def table(comparison: Comparison) -> str:
    """A heading, a row for each group, the verdict, the findings, what to beware of."""
    columns = shown_columns(comparison)
    head = ["run" if all(len(g.points) == 1 for g in comparison.groups) else "group", *headings(comparison, columns)]
    rows = [[label(group), *cells(group, columns)] for group in comparison.groups]
    lines = [heading(comparison), "", *aligned([head, *rows]), ""]
    for text in measured(comparison):
        lines += [*textwrap.wrap(text, WIDTH, subsequent_indent="  "), ""]
    lines += [line for text in comparison.verdict() for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]
    for title, texts in (("What cost the most", costliest(comparison)), ("Beware", comparison.notes)):
        if texts:
            lines += ["", title, *(line for text in texts for line in _item(text))]
    return "\n".join(lines)


def heading(comparison: Comparison) -> str:
    """ "Compared at the same loss, 0.138, where …"."""
    return f"Compared {where(comparison)}{_set_by(comparison)}"


def measured(comparison: Comparison) -> list[str]:
    """Of which share of their coordinates the runs were measured, in one sentence; none where all were."""
    found: dict[str, list[str]] = {}
    for group in comparison.groups:
        share = measured_share(group.points[0].run.record.run)
        if share is not None:
            found.setdefault(share, []).append(group.name)
    if not found:
        return []
    alone = len(found) == 1 and len(next(iter(found.values()))) == len(comparison.groups)
    shares = [share if alone else f"{share} in {_listed(names)}" for share, names in found.items()]
    return [f"measured: {'; '.join(shares)}, values ± standard error"]


def costliest(comparison: Comparison) -> list[str]:
    """For each group that has a finding its first, and what to try. A name as "version_0" is told with its settings."""
    return [
        f"{_introduced(group)}: {finding.sentence} {finding.advice}".rstrip()
        for group in comparison.groups
        for finding in group.findings[:1]
    ]


def _introduced(group: Group) -> str:
    return group.name if group.title.startswith(group.name) else f"{group.name} ({group.title})"


def _item(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ")


def shown_columns(comparison: Comparison) -> list[tuple[str, str, int]]:
    """Those that any group has a number for."""
    return [c for c in COLUMNS if c[1] == "elapsed" or any(math.isfinite(g.values[c[1]]) for g in comparison.groups)]


def headings(comparison: Comparison, columns: Sequence[tuple[str, str, int]]) -> list[str]:
    """Of the columns; the first is what the clock counts."""
    return [clock_word(comparison), *(heading for heading, *_ in columns[1:])]


def label(group: Group) -> str:
    """The name on one line, cut, with the number of replicas where there are several."""
    name = " ".join(group.name.split())
    name = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
    return name if len(group.points) == 1 else f"{name} ({len(group.points)} seeds)"


def cells(group: Group, columns: Sequence[tuple[str, str, int]]) -> list[str]:
    """A row's numbers, means with standard errors."""
    return [with_error(group.values[key], group.standard_errors[key], digits) for _, key, digits in columns]


def _set_by(comparison: Comparison) -> str:
    if comparison.set_by is None:
        return ""
    least = "got clearly no lower" if comparison.by == "loss" else "ended first"
    return f", where {comparison.set_by} {least}" if len(comparison.groups) > 1 else ""


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of plain text, its heading underlined; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


# --- the verdict


def verdict(comparison: Comparison) -> list[str]:
    """Sentences; each claim of a winner rests on intervals that do not overlap."""
    if len(comparison.groups) < 2:
        one = "One run" if len(comparison.groups[0].points) == 1 else "One group"
        return [f"{one}: there is nothing to compare it with."]
    sentences = _ranking(comparison) if comparison.by != "loss" else []
    if not comparison.at_loss:
        return [*sentences, "The losses are unknown, so that steps and action can't be compared at the same one."]
    at = f"at loss {number(comparison.loss_level)}"
    absent = [group.name for group in comparison.at_loss if not group.reached]
    there = [group for group in comparison.at_loss if group.reached]
    groups = [group for group in there if group.placed]
    if absent:
        sentences.append(f"{_listed(absent)} did not get to loss {number(comparison.loss_level)}.")
    sentences += [_unknown(group) for group in there if not group.placed]
    if len(groups) < 2:
        return [*sentences, f"That leaves {groups[0].name if groups else 'none'}: there is nothing to compare {at}."]
    if len(groups) < len(comparison.at_loss):
        at = f"among the others, {at}"
    clock = clock_word(comparison)
    return [*sentences, _extreme(groups, at, clock), _free(groups, at, clock), *_losers(groups, clock)]


def _ranking(comparison: Comparison) -> list[str]:
    """Who has the lowest loss at the same step or time, and who has none there."""
    ended = [group.name for group in comparison.groups if not group.reached]
    known = rivals(comparison.groups, comparison.by)
    unknown = [group.name for group in comparison.groups if group.reached and group not in known]
    told = [f"{_listed(ended)} ended before."] if ended else []
    told += [f"{_listed(unknown)} has no finite loss {where(comparison)}."] if unknown else []
    if len(known) < 2:
        return [*told, f"No two runs have a loss {where(comparison)}."]
    if comparison.winner is not None:
        return [*told, f"{comparison.winner} has the lowest loss {where(comparison)}."]
    return [*told, f"No run has clearly the lowest loss {where(comparison)}: the intervals overlap."]


def _unknown(group: Group) -> str:
    """Why a group has no place in the plane."""
    key = "action" if math.isfinite(group.values["elapsed"]) else "elapsed"
    reasons = [point.run.record.reasons.get(key) for point in group.points]
    why = next((f": {reason}" for reason in reasons if reason), "")
    return f"The {'action' if key == 'action' else 'elapsed time'} of {group.name} is unknown{why}."


def _extreme(groups: Sequence[Group], at: str, clock: str) -> str:
    """Who was the fastest and who the cheapest, as far as that can be told."""
    told = []
    for key, least, unit in (
        ("elapsed", "fewest steps" if clock == "steps" else "least time", f" {clock}"),
        ("action", "least action", ""),
    ):
        first, *others = sorted(groups, key=lambda group: group.values[key])
        bounds = getattr(first, f"{key}_interval")
        near = [other.name for other in others if not below(bounds, getattr(other, f"{key}_interval"))]
        value = f"{number(first.values[key])}{unit}"
        if interval(bounds) != number(first.values[key]):
            value += f", {interval(bounds)}"
        if near:
            told.append(
                f"who needed the {least} can't be told: {first.name} ({value}) overlaps with {_listed(near, 3)}"
            )
        else:
            told.append(f"{first.name} needed the {least} ({value})")
    return f"{_capital(at)}, {told[0]}; {told[1]}."


def _free(groups: Sequence[Group], at: str, clock: str) -> str:
    """Who is on the frontier, of the means."""
    names = [group.name for group in groups if group.beaten_by is None]
    means = " in the mean" if any(len(group.points) > 1 for group in groups) else ""
    if len(names) == 1:
        less = "fewer steps" if clock == "steps" else "less time"
        return f"{_capital(at)}, no other took {less} or less action than {names[0]}{means}."
    time = "steps" if clock == "steps" else "time"
    return f"{_capital(at)}, {_listed(names)} are beaten by none{means}: these trade {time} for action."


def _losers(groups: Sequence[Group], clock: str) -> list[str]:
    """Beaten clearly, and those of which that can't be told."""
    by_name = {group.name: group for group in groups}
    time = "steps" if clock == "steps" else "time"
    sentences, unclear = [], []
    for group in groups:
        if group.beaten_by is None:
            continue
        other = by_name[group.beaten_by]
        if group.clearly:
            elapsed, action = (_times(group, other, *what) for what in (("elapsed", time), ("action", "action")))
            sentences.append(f"{group.name} is beaten by {other.name}: {elapsed}, {action}.")
        else:
            unclear.append(f"{group.name} (behind {other.name})")
    if len(sentences) > 8:
        sentences = [*sentences[:7], f"{len(sentences) - 7} more are beaten clearly."]
    return sentences + ([f"Behind, but within the intervals: {_listed(unclear, 6)}."] if unclear else [])


def _times(group: Group, other: Group, key: str, word: str) -> str:
    """ "2.0 times the steps"; "40.0 steps against 0" where the other was there at its start."""
    value, least = group.values[key], other.values[key]
    return f"{number(value / least, 2)} times the {word}" if least else f"{number(value)} {word} against 0"


def _listed(names: Sequence[str], most: int = 10) -> str:
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- JSON


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Plain values; NaN and infinities are None, as JSON has no word for them."""
    return {
        "by": comparison.by,
        "at": plain(comparison.at),
        "set_by": comparison.set_by,
        "winner": comparison.winner,
        "frontier": list(comparison.frontier),
        "loss_level": plain(comparison.loss_level),
        "groups": [_group_json(group) for group in comparison.groups],
        "at_loss": [_group_json(group) for group in comparison.at_loss],
        "distances": [plain(dataclasses.asdict(distance)) for distance in comparison.distances],
        "verdict": comparison.verdict(),
        "notes": list(comparison.notes),
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "title": group.title,
        "values": plain(group.values),
        "standard_errors": plain(group.standard_errors),
        "elapsed_interval": plain(group.elapsed_interval),
        "action_interval": plain(group.action_interval),
        "loss_interval": plain(group.loss_interval),
        "beaten_by": group.beaten_by,
        "clearly": group.clearly,
        "findings": [plain(dataclasses.asdict(finding)) for finding in group.findings],
        "runs": [
            {
                "name": point.run.name,
                "path": None if point.run.path is None else str(point.run.path),
                "values": plain(point.values),
                "elapsed_interval": plain(point.elapsed_interval),
                "action_interval": plain(point.action_interval),
                "loss_interval": plain(point.loss_interval),
            }
            for point in group.points
        ],
    }


def plain(value: Any) -> Any:
    """Values as JSON knows them: NaN and infinities are None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    return float(value) if math.isfinite(value) else None
