"""Where output goes: rich tables that fit a terminal, plain text into a pipe, JSON where asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Rows = Sequence[Sequence[str]]

_LEAST_NAME = 12  # characters of a first column that is folded
_BETWEEN = 3  # spaces between two columns of rich's


def is_terminal() -> bool:
    """Whether someone looks at it."""
    return sys.stdout.isatty()


@cache
def console() -> Console:
    """Takes names of runs as they are: no markup, no emoji, no numbers in colour."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def print_json(value: Any) -> None:
    """Of `value`, which holds no NaN any more (`report.text.plain`)."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_rows(heads: Sequence[str], rows: Rows) -> None:
    """A table: the first column names the rows; numbers to the right.

    Where it is wider than the terminal its columns go on below, each part with the names again.
    """
    if not is_terminal():
        from lightning_speedlimit.report.text import aligned

        print("\n".join(aligned([heads, *rows])))
        return
    for part, columns in enumerate(_parts(heads, rows, console().width)):
        if part:
            print()
        console().print(_chosen(heads, rows, columns))


def first_columns(heads: Sequence[str], rows: Rows) -> Table:
    """As many as fit the terminal; what is drawn again and again has no room for the others below."""
    return _chosen(heads, rows, _parts(heads, rows, console().width)[0])


def print_meanings(rows: Rows) -> None:
    """Name, value, meaning, the last one wrapped; on a terminal."""
    found = _table(["", "", ""], rows, header=False)
    found.columns[1].justify = found.columns[2].justify = "left"
    for column in found.columns[:2]:
        column.no_wrap = True
    console().print(found)


def print_title(text: str) -> None:
    """A line that stands over what follows."""
    if is_terminal():
        console().print(text, style="bold")
    else:
        print(text)


def print_items(texts: Sequence[str], *, width: int) -> None:
    """A list, each item wrapped under itself: to the terminal's width, else to `width`."""
    import textwrap

    width = console().width if is_terminal() else width
    for text in texts:
        print(textwrap.fill(text, width, initial_indent="- ", subsequent_indent="  ", break_long_words=False))


def _chosen(heads: Sequence[str], rows: Rows, columns: Sequence[int]) -> Table:
    return _table([heads[i] for i in columns], [[row[i] for i in columns] for row in rows])


def _parts(heads: Sequence[str], rows: Rows, width: int) -> list[list[int]]:
    """Indices of the columns of each part: the first one in all, then as many as fit."""
    widths = [max(len(row[i]) for row in [heads, *rows]) + _BETWEEN for i in range(len(heads))]
    widest = max(widths[1:], default=0)
    widths[0] = min(widths[0], max(width - widest, _LEAST_NAME))
    parts, used = [[0]], widths[0]
    for i in range(1, len(heads)):
        if used + widths[i] > width and len(parts[-1]) > 1:
            parts.append([0])
            used = widths[0]
        parts[-1].append(i)
        used += widths[i]
    return parts


def _table(heads: Sequence[str], rows: Rows, *, header: bool = True) -> Table:
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD if header else None, show_header=header, show_edge=False, pad_edge=False)
    for i, head in enumerate(heads):
        if i == 0:
            found.add_column(head, overflow="fold")
        else:
            found.add_column(head, justify="right", no_wrap=True) if header else found.add_column(head)
    for row in rows:
        found.add_row(*row)
    return found
