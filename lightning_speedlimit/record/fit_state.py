"""Whether the fit that writes a record goes on, by what it wrote last and how long ago that is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lightning_speedlimit.record.files import JSON_NAME
from lightning_speedlimit.record.keeper import FINISHED, WRITE_EVERY
from lightning_speedlimit.record.run import RunRecord
from lightning_speedlimit.words import amount, one_line

_PATIENCE = 3.0  # times the longest pause between two writes that is usual: a convention

Kind = Literal["running", "silent", "ended", "unknown"]


@dataclass(frozen=True)
class FitState:
    """What a record tells of the fit that writes it."""

    kind: Kind
    """"running": not ended, and written lately; "silent": not ended, and not written for longer than is usual;
    "unknown": whoever wrote it, as a loop of one's own, does not say."""
    seconds: float
    """Since it was written, s."""
    by: str | None = None
    """Name of the exception that ended the fit."""

    @property
    def word(self) -> str:
        """For a table."""
        return {"running": "running", "silent": "not ended", "ended": "ended", "unknown": "?"}[self.kind]

    @property
    def sentence(self) -> str:
        """ "still running, last written 12 s ago"."""
        ago = f"{duration(self.seconds)} ago"
        return {
            "running": f"still running, last written {ago}",
            "silent": f"not ended: last written {ago}, killed or still running",
            "ended": f"ended {ago}" + (f" by {self.by}" if self.by else ""),
            "unknown": f"last written {ago}",
        }[self.kind]


def fit_state(record: RunRecord, folder: Path) -> FitState:
    """Of a record that was read from this folder.

    A fit writes at a log step when 30 s have gone by since the last write, or as long as its record says, where the
    disk is slow. It is called silent after three times that and the longest time between two of its rows. The age is
    that of the file or, where it is a copy, of its content.
    """
    seconds = _age(record, folder)
    if "ended" not in record.run:
        return FitState("unknown", seconds)
    ended = record.run["ended"]
    if ended is not None:
        return FitState("ended", seconds, None if ended == FINISHED else one_line(ended, 60))
    pause = record.run.get("pause") or 0.0
    usual = max(WRITE_EVERY, pause if math.isfinite(pause) else 0.0) + _longest_pause(record)
    return FitState("running" if seconds <= _PATIENCE * usual else "silent", seconds)


def _age(record: RunRecord, folder: Path) -> float:
    """Seconds; clocks of two machines may differ: never negative."""
    try:
        times = [(folder / JSON_NAME).stat().st_mtime]
    except OSError:  # removed since it was read
        times = []
    written = record.run.get("written")
    if written is not None and math.isfinite(written):
        times.append(float(written))
    return max(time.time() - min(times), 0.0) if times else math.inf


def _longest_pause(record: RunRecord) -> float:
    """Between two rows, or before the first one, s; 0 where they have no times."""
    seconds = record.columns.get("seconds", np.empty(0))
    pauses = np.diff(seconds[np.isfinite(seconds)], prepend=0.0)
    return float(pauses.max(initial=0.0))


def duration(seconds: float) -> str:
    """ "12 s", "5 min", "3 h", "4 days"."""
    for unit, length, most in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{int(seconds / length)} {unit}"
    return f"{amount(seconds // 86400)} days"
