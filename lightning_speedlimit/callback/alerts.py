"""Alerts through the loggers that have them, as W&B, for findings that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning_speedlimit.checks import guard
from lightning_speedlimit.checks.guard import Say
from lightning_speedlimit.record import RunRecord

DIVERGENCE = "divergence"  # the finding's cause


class Alerts:
    """Says once of each finding on the loss's course that it holds: a loss that ran away, or stopped falling.

    Each of these rests on a test against the losses' own errors. The others say where work went, which is no alarm.

    Args:
        after: rows in a row at which it has to hold.
        loggers: that the alert goes to, where they take one; where none does it is said as a warning.
    """

    def __init__(self, after: int, loggers: Iterable[Any], say: Say) -> None:
        self._after, self._loggers, self._say = after, list(loggers), say
        self._held: dict[str, int] = {}
        self._found: dict[str, str] = {}  # at the last row
        self._given: set[str] = set()

    def look(self, record: RunRecord) -> None:
        """After each row. Never raises."""
        try:
            found = _on_the_course(record)
        except Exception as error:  # whatever numbers a training comes to
            self._say(f"SpeedLimit could not look for what to alert of: {guard.told(error)}", "alerts")
            return
        self._found, self._held = found, {cause: self._held.get(cause, 0) + 1 for cause in found}
        for cause, text in found.items():
            if self._held[cause] >= self._after and cause not in self._given:
                self._given.add(cause)
                held = f"It has held for {self._after} log steps." if self._after > 1 else ""
                self._alert(f"SpeedLimit: {cause}", f"{text} {held}".strip())

    def conclude(self) -> None:
        """At the end of a fit, however it ended: a loss that ran away has no more rows to hold for."""
        text = self._found.get(DIVERGENCE)
        if text is None or DIVERGENCE in self._given:
            return
        self._given.add(DIVERGENCE)
        rows = self._held[DIVERGENCE]
        held = f"It held at the last {rows} log steps of the fit" if rows > 1 else "It held at the fit's last log step"
        self._alert(f"SpeedLimit: {DIVERGENCE}", f"{text} {held}.")

    def _alert(self, title: str, text: str) -> None:
        taken = [self._give(logger, title, text) for logger in self._loggers]
        if not any(taken):
            self._say(f"{title}. {text}", title)

    def _give(self, logger: Any, title: str, text: str) -> bool:
        """Whether this logger took it."""
        try:
            alert = _way(logger)
            if alert is None:
                return False
            alert(title=title, text=text)
        except Exception as error:  # a server that is away, a logger of the user's own
            name = type(logger).__name__
            self._say(f"SpeedLimit could not give its alert to {name}: {guard.told(error)}", f"alerts: {name}")
            return False
        return True


def _way(logger: Any) -> Callable[..., Any] | None:
    """W&B's run has it; by what it can do: a logger's class comes from either namespace, or from neither."""
    alert = getattr(getattr(logger, "experiment", None), "alert", None)
    return alert if callable(alert) else None


def _on_the_course(record: RunRecord) -> dict[str, str]:
    """Cause → sentence and advice."""
    from lightning_speedlimit.report.findings import JudgedRun
    from lightning_speedlimit.report.findings_of_course import plateaued, rose

    last = {name: float(column[-1]) for name, column in record.columns.items()}
    run = JudgedRun(last, record)
    found = rose(run) or [finding for _, finding in plateaued(run)]
    return {finding.cause: finding.text for finding in found}
