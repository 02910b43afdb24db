"""What `speedlimit watch` shows: of one run its last rows and where the work goes, of several a line each.

For a terminal as something that rich draws again and again, else as lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_speedlimit.cli import terminal
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.fit_state import FitState
from lightning_speedlimit.report import diagnose
from lightning_speedlimit.report.alignment import values_at
from lightning_speedlimit.report.findings import UNCERTAIN
from lightning_speedlimit.report.labels import optimizer_title
from lightning_speedlimit.words import number, plain_text, with_error

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

WIDTH = 92  # of lines of text at most
_BAR = 40  # characters of all the work
_MOST_FINDINGS = 2
_BESIDE_ROWS = 19  # lines of a screen
_FEWEST_ROWS, _MOST_ROWS = 3, 12

# Heading, column, whether it has a standard error.
_COLUMNS = (
    ("loss", "loss", False),
    ("noise share", "noise_share", True),
    ("critical batch", "critical_batch_size", True),
    ("step headroom", "step_headroom", True),
    ("efficiency", "efficiency", False),
)
_SHARES = (
    ("lowered the loss", "useful_share"),
    ("was lost to bouncing", "bouncing_share"),
    ("was lost to batch noise", "noise_share"),
)


class View(NamedTuple):
    """One screen."""

    title: str
    lines: Sequence[str]
    """Below the title, as whether the fit goes on."""
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    shares: Sequence[tuple[str, float]] = ()
    """Of the work, 1, by name."""
    findings: Sequence[str] = ()


def of_run(path: Path, record: RunRecord, state: FitState, *, rows: int, notes: Iterable[str] = ()) -> View:
    """Args: rows: how many of the last ones. notes: further lines below the title."""
    title = f"{optimizer_title(record)}   {plain_text(str(path))}"
    findings = [f.text for f in diagnose(record)] if len(record) else []
    return View(
        title,
        [f"Fit: {state.sentence}", *notes],
        ["step", *(head for head, _, _ in _COLUMNS)],
        [[step, *values] for step, values in last_rows(record, rows)],
        _work(record),
        findings[:_MOST_FINDINGS],
    )


def of_several(title: str, runs: Sequence[tuple[str, RunRecord, FitState]], *, rows: int) -> View:
    """The first so many of the runs, by name, the last row of each."""
    heads = ["run", "fit", "step", *(head for head, _, _ in _COLUMNS)]
    found = []
    for name, record, state in runs[:rows]:
        step, values = next(iter(last_rows(record, 1)), ("0", ["?"] * len(_COLUMNS)))
        found.append([name, state.word, step, *values])
    more = [f"{len(runs) - rows} more, written earlier, are not shown"] if len(runs) > rows else []
    return View(title, more, heads, found)


def last_rows(record: RunRecord, count: int) -> list[tuple[str, list[str]]]:
    """Step and cells of the last rows, at most so many."""
    columns, chosen = record.columns, range(max(0, len(record) - count), len(record))
    return [(str(columns["step"][i]), [_cell(columns, i, *of[1:]) for of in _COLUMNS]) for i in chosen]


def line(step: str, values: Sequence[str]) -> str:
    """A row by itself, each value behind its name."""
    named = [f"{head} {value}" for (head, _, _), value in zip(_COLUMNS, values, strict=True)]
    return "   ".join([f"step {step}", *named])


def _cell(columns: dict[str, Any], row: int, name: str, has_error: bool) -> str:
    def of(column: str) -> float:
        return float(columns[column][row]) if column in columns else math.nan

    return with_error(of(name), of(f"{name}_se") if has_error else math.nan)


def _work(record: RunRecord) -> list[tuple[str, float]]:
    """Of the whole run; nothing while that can't be told, as the loss drop is uncertain."""
    values = values_at(record)
    if not values["work_ito"] > 0 or values["conversion_se"] > UNCERTAIN:
        return []
    return [(name, values[share]) for name, share in _SHARES if math.isfinite(values[share])]


# --- on a terminal


def rows_that_fit(view: str) -> int:
    """How many rows of a table the terminal has room for; `view`: "run" or "several"."""
    height = terminal.console().height if terminal.is_terminal() else _BESIDE_ROWS + _MOST_ROWS
    if view == "several":
        return max(_FEWEST_ROWS, height - 8)
    return min(max(_FEWEST_ROWS, height - _BESIDE_ROWS), _MOST_ROWS)


def drawn(view: View, *, footer: str = "") -> Group:
    """For rich, within the terminal's width."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(view.title, style="bold", overflow="fold"), *map(Text, view.lines)]
    if view.rows:
        parts += [Text(), terminal.first_columns(view.heads, view.rows)]
    if view.shares:
        parts += [Text(), Text("Where the work goes", style="bold"), _bars(view.shares)]
    if view.findings:
        parts += [Text(), Text("What costs the most so far", style="bold")]
        parts.append(_items(view.findings))
    if footer:
        parts += [Text(), Text(footer, style="dim")]
    return Group(*parts)


def _bars(shares: Sequence[tuple[str, float]]) -> Table:
    """A share below 0 has no bar, one above 1 a full one: the number says how much it is."""
    from rich.bar import Bar
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, share in shares:
        table.add_row(name, number(share), Bar(1.0, 0.0, max(share, 0.0), width=_BAR))
    return table


def _items(texts: Sequence[str]) -> Table:
    """Each wrapped under itself."""
    from rich.table import Table

    found = Table.grid(padding=(0, 1))
    found.add_column()
    found.add_column(max_width=WIDTH - 2)
    for text in texts:
        found.add_row("-", text)
    return found


# --- as lines


def plain(view: View) -> str:
    """The same for a pipe."""
    import textwrap

    from lightning_speedlimit.report.text import aligned

    blocks = ["\n".join([view.title, *view.lines])]
    if view.rows:
        blocks.append("\n".join(aligned([view.heads, *view.rows])))
    if view.shares:
        blocks.append(
            "\n".join(["Where the work goes", *(f"{name:<25}{number(share)}" for name, share in view.shares)])
        )
    if view.findings:
        wrapped = [textwrap.fill(f, WIDTH, initial_indent="- ", subsequent_indent="  ") for f in view.findings]
        blocks.append("\n".join(["What costs the most so far", *wrapped]))
    return "\n\n".join(blocks)
