"""A comparison that shows itself: as text, as a figure, as a page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_speedlimit.report import text, verdict
from lightning_speedlimit.report.plane import plane_of
from lightning_speedlimit.report.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Comparison(Result):
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

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the records, as JSON knows it: NaN and infinities are None."""
        return text.as_json(self)

    def figure(self) -> Figure:
        """The plane (cost, action) at the same loss, with each group's hyperbola τ·A = D² and the frontier.

        Raises:
            ValueError: no loss at which to compare. ImportError: the extra "report" is not installed.
        """
        return plane_of(self)

    def html(self, path: str | os.PathLike[str]) -> None:
        """Writes the page: one file that opens from disk, without network.

        Raises:
            ImportError: the extra "report" is not installed. OSError: the file can't be written.
        """
        from lightning_speedlimit.report.page import write_page

        write_page(path, [self])
