"""The table of the page: a row for each group, its numbers as text and as values to sort by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_speedlimit.report.places import Group
from lightning_speedlimit.report.results import Result
from lightning_speedlimit.report.settings import apart
from lightning_speedlimit.report.text import COUNTS, headings, shown_columns
from lightning_speedlimit.words import count_with_error, interval, number, with_error

# What a column tells, in one or two sentences; {where} is where the runs are compared.
MEANINGS: Mapping[str, str] = {
    "cost": "What the run took to where it is compared ({where}): {cost}.{interval_by_loss}",
    "step": "Optimizer steps up to there.",
    "seconds": "Wall-clock seconds of the fit up to there. They depend on the machine.",
    "loss": "Training loss there, extrapolated from the last losses, so that it is not one batch's.{interval}",
    "loss_drop": "How far the loss fell from the start of the stretch.",
    "action": "What the motion cost: the squared lengths of all updates, each over its clock increment (1 on the clock "
    '"steps"), added up. The same path in half the steps costs twice the action.{interval_by_loss}',
    "efficiency": "Least time in which gradient flow could make this change of the weights for this loss drop, over "
    "the time taken. 1 is the thermodynamic limit; steps that are not small can exceed it. It is no ranking: blind to "
    "batch noise, and high for a slow run that wastes nothing; who beats whom is seen in cost and action.",
    "kinematic_efficiency": "Straightness × steadiness: the least time for this displacement on the same action, over "
    "the time taken. Never above 1.",
    "straightness": "(Distance from first to last weights / length of the path)². Low: the path turns, from noise, "
    "oscillation or curvature. Never above 1.",
    "steadiness": "Path length² / (time × action). 1: constant speed. Low: a burst, then a crawl. Never above 1.",
    "conversion": "Loss drop / work of the updates along the gradients. Low: the work went into batch noise or "
    "bouncing.",
}
_ROUNDING = 1e-12  # of a mean: replicas at the same loss differ by less
_INTERVAL = " Below it the 95 % interval."
_INTERVAL_BY_LOSS = " Below it the interval."  # of what: the caption of the plane
STANDING = (
    "At loss {level}: on the frontier, if no other needed both {less} and less action; else the one that did, and "
    "whether the intervals of both keep apart."
)


@dataclass(frozen=True)
class Column:
    """A heading that sorts."""

    key: str
    heading: str
    meaning: str
    numeric: bool
    sort: str
    """What `aria-sort` is at first: "ascending" for what the rows are ordered by, else "none"."""


@dataclass(frozen=True)
class Cell:
    """What one place of the table shows, and the value that it is sorted by."""

    text: str
    value: str
    """Decimal number, or text for names; empty: undefined, sorted last."""
    detail: str = ""
    """A second, smaller line."""


@dataclass(frozen=True)
class Row:
    """One group."""

    name: str
    title: str
    """Its optimizers, where the name is another, and the settings that differ; empty without either."""
    seeds: int
    cells: tuple[Cell, ...]
    on_frontier: bool


@dataclass(frozen=True)
class Table:
    """Headings and rows; `columns` has one more entry, the first, than a row has cells."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    replicas: bool
    """Whether any group has several runs, so that numbers are means."""


def table_of(comparison: Result) -> Table:
    """The table of `Result.table`, with intervals, and for each group its standing in the plane."""
    shown = shown_columns(comparison)
    ranked_by = "cost" if comparison.by == "loss" else "loss"
    words = {"where": comparison.where, "cost": comparison.axis.words.heading, "level": number(comparison.loss_level)}
    words |= {"less": comparison.axis.words.less, "interval": "" if comparison.by == "loss" else _INTERVAL}
    words |= {"interval_by_loss": _INTERVAL_BY_LOSS if comparison.by == "loss" else ""}
    replicas = any(len(group.points) > 1 for group in comparison.groups)
    columns = [Column("name", "group" if replicas else "run", "Its name, from its folder.", False, "none")]
    if comparison.at_loss:
        columns.append(Column("standing", "standing", STANDING.format(**words), True, "none"))
    columns += [
        Column(key, heading, MEANINGS[key].format(**words), True, "ascending" if key == ranked_by else "none")
        for heading, (_, key, _) in zip(headings(comparison, shown), shown, strict=True)
    ]
    at_loss = {group.name: group for group in comparison.at_loss}
    told = apart(comparison)
    rows = [
        _row(group, at_loss.get(group.name), [(key, digits) for _, key, digits in shown], comparison, told)
        for group in comparison.groups
    ]
    return Table(tuple(columns), tuple(rows), replicas)


def _row(
    group: Group, at_loss: Group | None, shown: list[tuple[str, int]], comparison: Result, told: Mapping[str, str]
) -> Row:
    with_interval = ("cost", "action") if comparison.by == "loss" else ("loss",)
    cells = [] if at_loss is None else [standing(at_loss, comparison.loss_level)]
    cells += [_cell(group, key, digits, interval_too=key in with_interval) for key, digits in shown]
    return Row(
        name=group.name,
        title=told.get(group.name, "" if group.title == group.name else group.title),
        seeds=len(group.points),
        cells=tuple(cells),
        on_frontier=group.name in comparison.frontier,
    )


def _cell(group: Group, key: str, digits: int, *, interval_too: bool) -> Cell:
    """A mean ± its standard error, and below it the interval of what the verdict rests on."""
    value, error = group.values[key], group.standard_errors[key]
    bounds = getattr(group, f"{key}_interval") if interval_too and math.isfinite(value) else (value, value)
    error = error if error > _ROUNDING * abs(value) else math.nan
    return Cell(
        text=count_with_error(value, error) if key in COUNTS else with_error(value, error, digits),
        value=repr(float(value)) if math.isfinite(value) else "",
        detail="" if bounds[0] == bounds[1] or math.isnan(value) else interval(bounds),
    )


def standing(group: Group, level: float) -> Cell:
    """Where a group of `Result.at_loss` stands; sorted from the frontier to the clearly beaten."""
    if not group.reached:
        return Cell(f"did not get to loss {number(level)}", "")
    if not group.placed:
        return Cell("cost or action unknown", "")
    if group.beaten_by is None:
        return Cell("frontier", "0")
    if group.clearly:
        return Cell(f"beaten by {group.beaten_by}", "2", "clearly")
    return Cell(f"behind {group.beaten_by}", "1", "not clearly")
