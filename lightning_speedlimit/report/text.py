"""How a comparison reads: a table of plain text, sentences, JSON."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lightning_speedlimit.report.comparison import Comparison, Group

WIDTH = 100
UNDEFINED = "?"

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
    """ "123 ± 4": the error with two digits at most; alone where it is unknown."""
    return number(value, digits) + (f" ± {number(error, 2)}" if math.isfinite(error) else "")


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
    lines += [line for text in comparison.verdict() for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]
    for title, texts in (("What cost the most", costliest(comparison)), ("Beware", comparison.notes)):
        if texts:
            lines += ["", title, *(line for text in texts for line in _item(text))]
    return "\n".join(lines)


def heading(comparison: Comparison) -> str:
    """ "Compared at the same loss, 0.138, where …"."""
    return f"Compared {where(comparison)}{_set_by(comparison)}"


def costliest(comparison: Comparison) -> list[str]:
    """A sentence for each group that has a finding: its first."""
    return [f"{group.name}: {finding.sentence}" for group in comparison.groups for finding in group.findings[:1]]


def _item(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ")


def shown_columns(comparison: Comparison) -> list[tuple[str, str, int]]:
    """Those that any group has a number for."""
    return [c for c in COLUMNS if c[1] == "elapsed" or any(math.isfinite(g.values[c[1]]) for g in comparison.groups)]


def headings(comparison: Comparison, columns: Sequence[tuple[str, str, int]]) -> list[str]:
    """Of the columns; the first is what the clock counts."""
    return [clock_word(comparison), *(heading for heading, *_ in columns[1:])]


def label(group: Group) -> str:
    """The name, with the number of replicas where there are several."""
    return group.name if len(group.points) == 1 else f"{group.name} ({len(group.points)} seeds)"


def cells(group: Group, columns: Sequence[tuple[str, str, int]]) -> list[str]:
    """A row's numbers, means with standard errors."""
    return [with_error(group.values[key], group.standard_errors[key], digits) for _, key, digits in columns]


def _set_by(comparison: Comparison) -> str:
    if comparison.set_by is None:
        return ""
    least = "got surely no lower" if comparison.by == "loss" else "ended first"
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
        return ["One run: there is nothing to compare it with."]
    sentences = [_ranking(comparison)] if comparison.by != "loss" else []
    groups = comparison.at_loss
    if not groups:
        return [*sentences, "The losses are unknown, so that steps and action can't be compared at the same one."]
    at = f"at loss {number(comparison.loss_level)}"
    absent = [group.name for group in groups if not group.reached]
    groups = tuple(group for group in groups if group.reached)
    if absent:
        sentences.append(f"{_listed(absent)} did not get to loss {number(comparison.loss_level)}.")
    if len(groups) < 2:
        return [*sentences, f"{_listed([g.name for g in groups]) or 'No run'} alone got there: nothing to compare."]
    sentences += [_extreme(groups, at, comparison), _free(groups, at)]
    sentences += _losers(groups)
    return sentences


def _ranking(comparison: Comparison) -> str:
    reached = [group for group in comparison.groups if group.reached]
    if not reached:
        return f"No run got so far ({where(comparison)})."
    if comparison.winner is not None:
        return f"{comparison.winner} has the lowest loss {where(comparison)}."
    return f"No run has clearly the lowest loss {where(comparison)}: the intervals overlap."


def _extreme(groups: Sequence[Group], at: str, comparison: Comparison) -> str:
    """Who was the fastest and who the cheapest, as far as that can be told."""
    word = clock_word(comparison)
    told = []
    for key, least, unit in (
        ("elapsed", "fewest steps" if word == "steps" else "least time", f" {word}"),
        ("action", "least action", ""),
    ):
        first, *others = sorted(groups, key=lambda group: group.values[key])
        bounds = getattr(first, f"{key}_interval")
        rivals = [g.name for g in others if getattr(g, f"{key}_interval")[0] <= bounds[1]]
        value = f"{number(first.values[key])}{unit}, {interval(bounds)}"
        if rivals:
            told.append(
                f"who needed the {least} can't be told: {first.name} ({value}) overlaps with {_listed(rivals, 3)}"
            )
        else:
            told.append(f"{first.name} needed the {least} ({value})")
    return _capital(f"{at[0].upper()}{at[1:]}, {told[0]}; {told[1]}.")


def _free(groups: Sequence[Group], at: str) -> str:
    names = [group.name for group in groups if group.beaten_by is None]
    kept = "is" if len(names) == 1 else "are"
    return f"Beaten by none in both: {_listed(names)} {kept} on the frontier {at}; these trade steps for action."


def _losers(groups: Sequence[Group]) -> list[str]:
    """Beaten clearly, and those of which that can't be told."""
    by_name = {group.name: group for group in groups}
    sentences, unclear = [], []
    for group in groups:
        if group.beaten_by is None:
            continue
        other = by_name[group.beaten_by]
        if group.clearly:
            steps, action = (group.values[key] / other.values[key] for key in ("elapsed", "action"))
            sentences.append(
                f"{group.name} is beaten by {other.name}: {number(steps, 2)} times the time, "
                f"{number(action, 2)} times the action."
            )
        else:
            unclear.append(f"{group.name} (behind {other.name})")
    if unclear:
        sentences.append(f"Behind in both, but within the intervals: {_listed(unclear, 6)}.")
    return sentences if len(sentences) <= 8 else [*sentences[:7], f"{len(sentences) - 7} more are beaten."]


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
