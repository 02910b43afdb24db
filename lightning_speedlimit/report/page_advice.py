"""The table of the page that says what other batches would take: a row for each run, a column for each multiple."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_speedlimit.record.tuning import Tuned
from lightning_speedlimit.report.advice import MULTIPLES, Advice, AtBatch, advise
from lightning_speedlimit.report.advice_text import GREEDY, multiple
from lightning_speedlimit.report.page_table import Cell
from lightning_speedlimit.report.places import Point
from lightning_speedlimit.words import amount, listed, number, with_error

CAPTION = (
    "Steps that another batch would take to the loss at which a run ended, or stopped falling: as 1 + critical "
    "batch/batch, the learning rate tuned for each batch. Below them the range from ±2 standard errors of the "
    "critical batch, the samples, and seconds where a run of that batch is there to tell them. Headroom: the multiple "
    f"of the steps that would have gained most, {GREEDY}. ? means undefined."
)
_HEADS = ("batch", "critical batch", "headroom", "noise share, whole run")


@dataclass(frozen=True)
class AdviceRow:
    """One run."""

    name: str
    cells: tuple[Cell, ...]
    remarks: tuple[str, ...]
    """Why a number is not known, and what the numbers do not hold for."""


@dataclass(frozen=True)
class AdviceTable:
    """Headings but for the first, and rows."""

    heads: tuple[str, ...]
    rows: tuple[AdviceRow, ...]
    caption: str = CAPTION

    @property
    def remarks(self) -> list[str]:
        """Each once, behind the names of all runs that it is of: what all share first, what one has alone together."""
        names: dict[str, list[str]] = {}
        for row in self.rows:
            for remark in row.remarks:
                names.setdefault(remark, []).append(row.name)
        shared = {remark: found for remark, found in names.items() if len(found) > 1}
        told: dict[tuple[str, ...], list[str]] = {}
        for remark, found in sorted(shared.items(), key=lambda item: -len(item[1])):
            told.setdefault(tuple(found), []).append(remark)
        for row in self.rows:
            if own := [remark for remark in row.remarks if remark not in shared]:
                told[(row.name,)] = own
        return [f"{listed(found)}: {'; '.join(remarks)}." for found, remarks in told.items()]


def advice_table(points: Sequence[Point], all_points: Sequence[Point]) -> AdviceTable:
    """What is known of the runs of `points`; the time per step comes from all."""
    records = [point.run.record for point in all_points]
    found = [(point.run.name, advise(point.run.record, records)) for point in points]
    return AdviceTable((*_HEADS, *map(multiple, MULTIPLES)), tuple(_row(name, advice) for name, advice in found))


def _row(name: str, advice: Advice) -> AdviceRow:
    at = {found.multiple: found for found in advice.at_batches}
    told = (advice.critical_batch_size, advice.step_headroom, advice.noise_share)
    cells = [
        _cell(amount(advice.batch), advice.unit if math.isfinite(advice.batch) else ""),
        _cell(_number(advice.critical_batch_size)),
        _cell(_number(advice.step_headroom), _rate(advice)),
        _cell(_number(advice.noise_share)),
        *(_predicted(at[m], advice.unit) if m in at else _cell("?") for m in MULTIPLES),
    ]
    names = ("critical batch", "headroom", "noise share")
    missing = [f"{n} not known, as {t.reason}" for n, t in zip(names, told, strict=True) if t.reason]
    return AdviceRow(name, tuple(cells), (*missing, *advice.cautions))


def _number(tuned: Tuned) -> str:
    return with_error(tuned.value, tuned.standard_error)


def _rate(advice: Advice) -> str:
    """What to try, where the steps have headroom."""
    return "" if math.isnan(advice.rate_multiple) else f"try the rate x {number(advice.rate_multiple, 2)}"


def _predicted(at: AtBatch, unit: str) -> Cell:
    low, high = (amount(end) for end in at.steps_interval)
    lines = [] if low == high else [f"{low} to {high}"]
    lines += [f"{amount(at.samples)} {unit}"] if math.isfinite(at.samples) else []
    lines += [f"{amount(at.seconds)} s"] if math.isfinite(at.seconds) else []
    return _cell(amount(at.steps), *lines)


def _cell(text: str, *lines: str) -> Cell:
    return Cell(text, "" if text == "?" else text, "\n".join(line for line in lines if line))
