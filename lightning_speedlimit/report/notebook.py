"""What a notebook shows of a summary, a run, a comparison: sentences, figures, tables; inline, all text escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_speedlimit.record import RunRecord, Summary, summary_text
from lightning_speedlimit.report import figures, text
from lightning_speedlimit.report import layers as layer_words
from lightning_speedlimit.report.diagnosis import diagnose
from lightning_speedlimit.report.labels import optimizer_title
from lightning_speedlimit.report.layers import layers_of
from lightning_speedlimit.report.page import check_installed, templates
from lightning_speedlimit.report.page_figures import thinned
from lightning_speedlimit.report.plane import plane_of
from lightning_speedlimit.report.results import Result
from lightning_speedlimit.report.verdict import verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OPEN = 3  # tables of a run that are not folded: its cost, what it bought, what to change


@dataclass(frozen=True)
class Table:
    """Rows that begin with a name; without heads the cells are words, else numbers."""

    title: str
    rows: Sequence[Sequence[str]]
    heads: Sequence[str] = ()
    folded: bool = False


@dataclass(frozen=True)
class Shown:
    """What the template shows, in this order; folded tables come last."""

    title: str
    sentences: Sequence[str]
    tables: Sequence[Table]
    figures: Sequence[str] = ()
    """As <svg> elements."""
    lists: Sequence[tuple[str, Sequence[str]]] = ()
    """Title and items; not shown where there are none."""


def html(shown: object) -> str:
    """HTML of a Summary, a RunRecord or a Comparison, to be put into a page.

    Raises:
        ImportError: the extra "report" is not installed. TypeError: something else.
    """
    check_installed()
    if isinstance(shown, Summary):
        found = _of_summary(shown)
    elif isinstance(shown, RunRecord):
        found = _of_record(shown)
    elif isinstance(shown, Result):
        found = _of_comparison(shown)
    else:
        raise TypeError(f"shown got {type(shown).__name__}, wanted a Summary, a RunRecord or a Comparison")
    return str(templates().get_template("notebook.html.j2").render(shown=found))


def _of_summary(summary: Summary) -> Shown:
    tables = [Table(title, rows) for title, rows in summary_text.parts(summary).items()]
    return Shown(
        "Speed limit of a training run", [summary.sentence()], tables, lists=[("Beware", summary_text.remarks(summary))]
    )


def _of_record(record: RunRecord) -> Shown:
    of_summary, few = _of_summary(record.summary()), thinned(record)
    tables = [Table(t.title, t.rows, folded=place >= _OPEN) for place, t in enumerate(of_summary.tables)]
    if len(found := layers_of(record)) > 1:
        tables.append(Table("Layer by layer", layer_words.rows(found), layer_words.HEADS, folded=True))
    causes = [finding.text for finding in diagnose(record)] if len(record) else []
    title = optimizer_title(record)
    return Shown(
        title,
        of_summary.sentences,
        tables,
        _drawn(lambda: figures.efficiency(few), lambda: figures.work_balance({title: few})),
        [("What cost the most", causes), *of_summary.lists],
    )


def _of_comparison(comparison: Result) -> Shown:
    columns = text.shown_columns(comparison)
    rows, title = text.rows(comparison, columns), "What it cost, what it bought"
    if len(comparison.groups) > 1:
        rows = text.rows(comparison, columns, " *")
        title += f"; * beaten by none in both {comparison.axis.words.noun} and action"
    tables = [Table(title, rows, text.head(comparison, columns))]
    if places := text.order(comparison):
        tables.append(Table(text.order_title(comparison), places[1:], places[0], folded=True))
    return Shown(
        text.heading(comparison),
        [*text.measured(comparison), *verdict(comparison)],
        tables,
        _drawn(lambda: plane_of(comparison)) if any(group.placed for group in comparison.at_loss) else [],
        [("What cost the most", text.costliest(comparison)), ("Beware", comparison.notes)],
    )


def _drawn(*draw: Callable[[], Figure]) -> list[str]:
    """Those that have something to show."""
    found = []
    for one in draw:
        try:
            found.append(figures.svg(one()))
        except figures.NothingToDraw:
            continue
    return found
