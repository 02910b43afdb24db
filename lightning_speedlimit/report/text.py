"""How a comparison reads: a table of plain text, sentences, JSON."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_speedlimit.record.summary_text import measured_share
from lightning_speedlimit.report.advice import advise
from lightning_speedlimit.report.advice_text import rate
from lightning_speedlimit.report.places import Group
from lightning_speedlimit.report.results import Result
from lightning_speedlimit.report.settings import apart
from lightning_speedlimit.report.verdict import verdict
from lightning_speedlimit.words import count, count_with_error, listed, number, with_error

WIDTH = 100
MOST_ROWS, FIRST_ROWS = 16, 5  # of more groups than that the table shows so many
_LONGEST, _SHORT = 60, 20  # letters of a name in a table, and where several stand in a line
_DETAILS = ("kinematic_efficiency", "straightness", "steadiness")

_ENDS = [(name, end, i) for name in ("cost", "action", "loss") for i, end in enumerate(("low", "high"))]

COUNTS = ("cost", "step")  # of the keys below: thousands apart

# Heading, key in the values, significant digits: what a row of the table shows.
COLUMNS = (
    ("cost", "cost", 3),
    ("steps", "step", 3),
    ("seconds", "seconds", 3),
    ("loss", "loss", 3),
    ("loss drop", "loss_drop", 3),
    ("action", "action", 3),
    ("efficiency", "efficiency", 2),
    ("kinematic", "kinematic_efficiency", 2),
    ("straightness", "straightness", 2),
    ("steadiness", "steadiness", 2),
    ("conversion", "conversion", 2),
)


def table(comparison: Result) -> str:
    """A heading, a row for each group, the verdict, the order at three losses, the findings, what to beware of."""
    columns = shown_columns(comparison)
    lines = [heading(comparison), "", *aligned([head(comparison, columns), *rows(comparison, columns)])]
    lines += [*left_away(comparison), "", *settings(comparison)]
    for text in measured(comparison):
        lines += [*textwrap.wrap(text, WIDTH, subsequent_indent="  "), ""]
    lines += [line for text in verdict(comparison) for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]
    if places := order(comparison):
        lines += ["", order_title(comparison), *aligned(places), order_sentence(comparison)]
    for title, texts in (("What cost the most", costliest(comparison)), ("Beware", comparison.notes)):
        if texts:
            lines += ["", title, *(line for text in texts for line in _item(text))]
    return "\n".join(lines)


def head(comparison: Result, columns: Sequence[tuple[str, str, int]]) -> list[str]:
    """Of the table of groups."""
    first = "run" if all(len(group.points) == 1 for group in comparison.groups) else "group"
    return [first, *headings(comparison, columns)]


def rows(comparison: Result, columns: Sequence[tuple[str, str, int]], mark: str = "") -> list[list[str]]:
    """Of the table: all groups, or the first of many. mark: behind the names of those on the frontier."""
    marked = comparison.frontier if mark else ()
    return [
        [label(group) + (mark if group.name in marked else ""), *cells(group, columns)] for group in _shown(comparison)
    ]


def settings(comparison: Result) -> list[str]:
    """A line for each group of the table with what tells it from the others, and an empty one."""
    told, width = apart(comparison), max(len(label(group)) for group in _shown(comparison))
    lines = [f"{label(group):<{width}}  {told[group.name]}" for group in _shown(comparison) if group.name in told]
    return ["What tells them apart", *lines, ""] if lines else []


def left_away(comparison: Result) -> list[str]:
    """How many groups the table does not show."""
    count = len(comparison.groups) - len(_shown(comparison))
    return [f"{count} more: in the page (--html) and in JSON (--json)"] if count else []


def _shown(comparison: Result) -> Sequence[Group]:
    return comparison.groups if len(comparison.groups) <= MOST_ROWS else comparison.groups[:FIRST_ROWS]


# --- the order at three losses


def order_title(comparison: Result) -> str:
    """ "Who was first, in samples"."""
    return f"Who was first, in {comparison.axis.words.heading}"


def order(comparison: Result) -> list[list[str]]:
    """Heading and a row for each of three losses: the first groups with what each took; empty of a single group."""
    if len(comparison.groups) < 2 or not comparison.levels:
        return []
    places = min(len(comparison.groups), 3 if len(comparison.groups) <= MOST_ROWS else 2)
    found = [["loss", *("first", "second", "third")[:places]]]
    for level in comparison.levels:
        first = [f"{_cut(name, _SHORT)} ({count(cost)})" for name, cost in level.order[:places]]
        found.append([number(level.loss), *first, *["nobody else"] * (places - len(first))])
    return found


def order_sentence(comparison: Result) -> str:
    """Whether the means keep their order, of the groups that are there at all three losses."""
    there = set.intersection(*({name for name, _ in level.order} for level in comparison.levels))
    orders = [[name for name, _ in level.order if name in there] for level in comparison.levels]
    if any({name for name, _ in level.order} != there for level in comparison.levels):
        return "Not all of them are known at all three."
    if all(found == orders[-1] for found in orders):
        return "The order does not change on the way."
    if orders[0][0] == orders[1][0] == orders[2][0]:
        return "The first stays the first; behind it the order changes on the way."
    return f"The order changes on the way: {orders[0][0]} is first early, {orders[-1][0]} late."


def heading(comparison: Result) -> str:
    """ "Compared at the same loss, 0.138, where …"."""
    return f"Compared {comparison.where}{_set_by(comparison)}"


def measured(comparison: Result) -> list[str]:
    """Of which share of their coordinates the runs were measured, in one sentence; none where all were."""
    found: dict[str, list[str]] = {}
    for group in comparison.groups:
        share = measured_share(group.points[0].run.record.run)
        if share is not None:
            found.setdefault(share, []).append(group.name)
    if not found:
        return []
    alone = len(found) == 1 and len(next(iter(found.values()))) == len(comparison.groups)
    shares = [share if alone else f"{share} in {listed(names)}" for share, names in found.items()]
    return [f"measured: {'; '.join(shares)}, values ± standard error"]


def costliest(comparison: Result) -> list[str]:
    """For each group its first finding, and what to try. A name as "version_0" is told with its settings.

    Where its steps have headroom, that too; a finding that nothing stands out is left out then.
    """
    groups = comparison.groups if len(comparison.groups) <= MOST_ROWS else comparison.groups[:1]
    said = [(group, _first_finding(group)) for group in groups]
    return [f"{_introduced(group)}: {text}" for group, text in said if text]


def _first_finding(group: Group) -> str:
    headroom = rate(advise(group.points[0].run.record))
    found = [f for f in group.findings[:1] if not (headroom and f.cause == "nothing")]
    return " ".join(part for part in (*(f.text for f in found), headroom) if part)


def _introduced(group: Group) -> str:
    return group.name if group.title.startswith(group.name) else f"{group.name} ({group.title})"


def _item(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ")


def shown_columns(comparison: Result) -> list[tuple[str, str, int]]:
    """What is counted, and of the others those that any group has a number for; of many runs the most telling ones."""
    axis, many = comparison.axis, len(comparison.groups) > MOST_ROWS
    counted = {"seconds"} if axis.name == "seconds" else {"step"} if axis.name == "steps" else set()
    counted |= set(_DETAILS) if many else set()
    counted |= set() if any(group.stretched for group in comparison.groups) else {"loss_drop"}
    return [
        c
        for c in COLUMNS
        if c[1] not in counted and (c[1] == "cost" or any(math.isfinite(g.values[c[1]]) for g in comparison.groups))
    ]


def headings(comparison: Result, columns: Sequence[tuple[str, str, int]]) -> list[str]:
    """Of the columns; the first is what is counted."""
    return [comparison.axis.words.heading, *(heading for heading, *_ in columns[1:])]


def label(group: Group) -> str:
    """The name on one line, cut, with the number of replicas where there are several."""
    name = _cut(group.name, _LONGEST)
    return name if len(group.points) == 1 else f"{name} ({len(group.points)} seeds)"


def _cut(name: str, most: int) -> str:
    """On one line."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most - 1]}…"


def cells(group: Group, columns: Sequence[tuple[str, str, int]]) -> list[str]:
    """A row's numbers, means with standard errors."""
    found = [(key, digits, group.values[key], group.standard_errors[key]) for _, key, digits in columns]
    return [
        count_with_error(value, error) if key in COUNTS else with_error(value, error, digits)
        for key, digits, value, error in found
    ]


def _set_by(comparison: Result) -> str:
    if comparison.set_by is None:
        return ""
    if len(comparison.groups) < 2:
        return ""
    if comparison.by == "loss":
        return f", the lowest that {comparison.set_by} clearly reached"
    return f", where {comparison.set_by} ended first"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of plain text, its heading underlined; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


# --- JSON


def as_json(comparison: Result) -> dict[str, Any]:
    """Plain values; NaN and infinities are None, as JSON has no word for them."""
    return {
        "by": comparison.by,
        "at": plain(comparison.at),
        "set_by": comparison.set_by,
        "cost": comparison.axis.name,
        "winner": comparison.winner,
        "frontier": list(comparison.frontier),
        "loss_level": plain(comparison.loss_level),
        "levels": [plain(dataclasses.asdict(level)) for level in comparison.levels],
        "groups": [_group_json(group) for group in comparison.groups],
        "at_loss": [_group_json(group) for group in comparison.at_loss],
        "distances": [plain(dataclasses.asdict(distance)) for distance in comparison.distances],
        "verdict": verdict(comparison),
        "notes": list(comparison.notes),
    }


def as_columns(comparison: Result) -> tuple[dict[str, list[Any]], dict[str, list[str]]]:
    """See `Comparison.to_dataframe`: columns and index, an entry for each run."""
    rows, index = [], []
    for group in comparison.groups:
        for point in group.points:
            ends = {f"{name}_{end}": getattr(point, f"{name}_interval")[i] for name, end, i in _ENDS}
            rows.append({**point.values, **ends, "beaten_by": group.beaten_by})
            index.append((group.name, point.run.name))
    groups, runs = zip(*index, strict=True)
    return {key: [row[key] for row in rows] for key in rows[0]}, {"group": list(groups), "run": list(runs)}


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "title": group.title,
        "values": plain(group.values),
        "standard_errors": plain(group.standard_errors),
        "cost_interval": plain(group.cost_interval),
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
                "cost_interval": plain(point.cost_interval),
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
