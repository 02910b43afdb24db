"""How advice reads: what a run cost, what it bought, what to change, the physics; on one screen."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.summary_text import cost, gain
from lightning_speedlimit.record.tuning import Tuned
from lightning_speedlimit.report.advice import Advice, AtBatch
from lightning_speedlimit.report.diagnosis import diagnose
from lightning_speedlimit.report.interpolation import Interval
from lightning_speedlimit.words import amount, count, number, with_error

WIDTH = 92
_MOST_FINDINGS = 2
GREEDY = "along the path that was taken: what a whole run at another rate would take it does not tell"


def blocks(record: RunRecord, advice: Advice, width: int = WIDTH) -> list[tuple[str, list[str]]]:
    """(title, lines): cost, gain, what to change, notes on that if any, physics; texts wrapped to the width."""
    summary = record.summary()
    spent = ", ".join(f"{value} {name}" for name, value, _ in cost(summary))
    bought = "; ".join(f"{name} {value}" for name, value, _ in gain(summary))
    notes = [line for text in advice.cautions for line in _item(f"{text[0].upper()}{text[1:]}.", width)]
    return [
        ("What it cost", textwrap.wrap(spent, width)),
        ("What it bought", textwrap.wrap(bought, width)),
        ("What to change", _changes(record, advice, width)),
        *([("Notes", notes)] if notes else []),
        ("The physics", textwrap.wrap(summary.sentence(), width)),
    ]


def _changes(record: RunRecord, advice: Advice, width: int) -> list[str]:
    lines = [line for text in numbers(advice) for line in _item(text, width)]
    if advice.at_batches:
        lines += ["", *textwrap.wrap(caption(advice), width), *table(advice), ""]
    for finding in diagnose(record)[:_MOST_FINDINGS]:
        lines += _item(finding.text, width)
    return lines


def numbers(advice: Advice) -> list[str]:
    """The three numbers, one sentence each; of one that is not known why, and what to do about it."""
    share = _told("Noise share", advice.noise_share, "of the work went into the noise of single batches")
    size = "" if math.isnan(advice.batch) else f"; the batch is {in_full(advice.batch)}"
    if advice.mean_batch < advice.batch and amount(advice.mean_batch) != amount(advice.batch):
        size += f" ({amount(advice.mean_batch)} on average: the last batch of an epoch is short)"
    batch = _told("Critical batch", advice.critical_batch_size, f"{advice.unit}{size}", count)
    headroom = _told("Step headroom", advice.step_headroom, f"times the step would have gained most, {GREEDY}")
    if math.isfinite(advice.rate_multiple):
        headroom += f" Try the learning rate times {number(advice.rate_multiple, 2)}: fewer steps."
    return [share, batch, headroom]


def rate(advice: Advice, sign: str = "±") -> str:
    """ "Step headroom 3.8 ± 0.7: try the learning rate times 3.8."; empty where there is no headroom for sure."""
    if math.isnan(advice.rate_multiple):
        return ""
    headroom = with_error(advice.step_headroom.value, advice.step_headroom.standard_error, 2, sign=sign)
    return f"Step headroom {headroom}: try the learning rate times {number(advice.rate_multiple, 2)}."


def caption(advice: Advice) -> str:
    """What the table tells."""
    return (
        f"To the loss of step {advice.steps}, by steps ~ 1 + critical batch/batch, the learning rate tuned for each "
        "batch; in brackets the range from +/-2 standard errors of the critical batch:"
    )


def table(advice: Advice) -> list[str]:
    """A line for each batch."""
    heads = ["batch", "", "steps", advice.unit, "seconds"]
    rows = [[in_full(at.batch), multiple(at.multiple), *cells(at)] for at in advice.at_batches]
    if all(math.isnan(at.seconds) for at in advice.at_batches if at.multiple != 1):  # its own is in the cost
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]]


def cells(at: AtBatch) -> list[str]:
    """Steps, samples and seconds: "412 (390 to 431)"; "?" where not known."""
    return [
        _with_interval(at.steps, at.steps_interval),
        _with_interval(at.samples, at.samples_interval),
        amount(at.seconds),
    ]


def multiple(of_batch: float) -> str:
    """ "x 1/4", "x 2"; "this run"."""
    if of_batch == 1:
        return "this run"
    return f"x 1/{1 / of_batch:g}" if of_batch < 1 else f"x {of_batch:g}"


def _with_interval(x: float, interval: Interval) -> str:
    low, high = (amount(end) for end in interval)
    return amount(x) if low == high else f"{amount(x)} ({low} to {high})"


def in_full(batch: float) -> str:
    """Whole ones: "1,024"."""
    return f"{batch:,.0f}" if batch == round(batch, 6) // 1 else amount(batch)


def _told(name: str, tuned: Tuned, meaning: str, shown: Callable[[float], str] = number) -> str:
    if math.isnan(tuned.value):
        return f"{name}: not known, as {tuned.reason}."
    return f"{name}: {shown(tuned.value)} +/- {number(tuned.standard_error, 2)} {meaning}."


def _item(text: str, width: int) -> Sequence[str]:
    return textwrap.wrap(text, width, initial_indent="- ", subsequent_indent="  ", break_long_words=False)
