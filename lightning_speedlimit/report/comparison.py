"""A comparison that shows itself: as text, as a figure, as a page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_speedlimit.display import Displayed, Page
from lightning_speedlimit.record.frames import data_frame
from lightning_speedlimit.report import text, verdict
from lightning_speedlimit.report.plane import plane_of
from lightning_speedlimit.report.results import Result
from lightning_speedlimit.words import listed, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_LONGEST = 200  # characters of the names in a repr


@dataclass(frozen=True)
class Comparison(Result, Displayed):
    """Runs at one loss, step or time, and what follows. `print` shows it as text.

    τ·A ≥ D²: steps trade against action, so at the same loss one group beats another when it took less of both
    (the plane of cost and action); where their intervals overlap no winner is named.
    """

    def verdict(self) -> list[str]:
        """Sentences: who cost the least, in samples or steps and in action; who is beaten by none, who by whom."""
        return verdict.verdict(self)

    def table(self) -> str:
        """Plain text: a row for each group, the verdict, and what to beware of."""
        return text.table(self)

    def __repr__(self) -> str:
        groups, runs = len(self.groups), sum(len(group.points) for group in self.groups)
        frontier = f"; frontier: {one_line(listed(self.frontier, 5), _LONGEST)}" if self.frontier else ""
        return f"Comparison({groups} groups, {runs} runs, {self.where}{frontier}; print() shows all)"

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the records, as JSON knows it: NaN and infinities are None."""
        return text.as_json(self)

    def to_dataframe(self) -> DataFrame:
        """A pandas frame with a row for each run, indexed by `group` and `run`: its numbers where it is compared.

        The columns are those of `Point.values`; both ends of the intervals (`cost_low`, `cost_high`, and the same of
        "action" and "loss"); and `beaten_by`, of its group. Means over seeds: `frame.groupby("group").mean(
        numeric_only=True)`.

        Raises:
            ImportError: pandas is not installed (extra "pandas").
        """
        return data_frame(*text.as_columns(self))

    def figure(self) -> Figure:
        """The plane (cost, action) at the same loss, with each group's hyperbola τ·A = D² and the frontier.

        Raises:
            ValueError: no loss at which to compare. ImportError: the extra "report" is not installed.
        """
        return plane_of(self)

    def html(self, path: str | os.PathLike[str] | None = None) -> Page:
        """The page: one document that opens from disk, without network; a notebook shows it in a frame.

        Args:
            path: a file to write it to as well; None: none.

        Raises:
            ImportError: the extra "report" is not installed. OSError: the file can't be written.
        """
        from lightning_speedlimit.report.page import page, write_page

        return Page(page([self]) if path is None else write_page(path, [self]))
