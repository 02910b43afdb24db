"""Keeps the record of one fit on disk: in a folder that no other fit writes in, now and then, and in the end."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from lightning_speedlimit.record import lock
from lightning_speedlimit.record.run import RunRecord

FINISHED = "finished"  # how a fit ends that no exception does
WRITE_EVERY = 30.0  # seconds; longer in proportion where a write takes more than `_QUICK`
_EARLY = (2.0, 5.0, 10.0)  # seconds after the first writes of a fit, which are small: who watches it sees them soon
_QUICK = 1.5  # seconds: 5 % of the time
_LOCK_NAME = ".fit.lock"


class RecordKeeper:
    """Writes a fit's record into `folder`, or into one beside it while another fit, of any process, writes there.

    Attributes:
        wanted: the folder that was asked for.
        folder: where the record lies; known for good after the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.wanted = self.folder = folder
        self._lock: lock.Lock | None = None
        self._claimed = False
        self._next = -math.inf
        self._writes = 0
        self._slow = 0.0  # the pause that the last write would have, by how long it took, s

    def write(self, record: RunRecord, *, ended: str | None = None) -> None:
        """Saves the record, unless the last time was less than `WRITE_EVERY` ago, or `_EARLY` in the beginning.

        On disk its `run` has three marks more: "ended", None for as long as the fit goes on, "written", s since 1970,
        and "pause", s that may go by until the next write has begun. A slow write may double it once, no more.

        Args:
            ended: how the fit ended, `FINISHED` or the name of an exception: save it in any case, with that mark.

        Raises:
            OSError: the folder can't be written; the next write tries again.
        """
        start = time.monotonic()
        if start < self._next and ended is None:
            return
        pause = max(WRITE_EVERY, self._slow)
        try:
            self._claim()
            self._save(record, {"ended": ended, "written": time.time(), "pause": pause})
        finally:
            end = time.monotonic()
            self._slow = WRITE_EVERY * (end - start) / _QUICK
            usual = min([WRITE_EVERY, *_EARLY[self._writes : self._writes + 1]])
            self._writes += 1
            self._next = end + min(max(usual, self._slow), 2 * pause)

    def _save(self, record: RunRecord, marks: dict[str, Any]) -> None:
        """The record itself, which is in checkpoints and is the user's to save elsewhere, has no marks."""
        run = record.run
        record.run = run | marks
        try:
            record.save(self.folder)
        finally:
            record.run = run

    def release(self) -> None:
        """Leaves the folder to others. Again: nothing happens."""
        if self._lock is not None:
            self._lock.release()
        self._lock, self._claimed = None, False

    def _claim(self) -> None:
        """Locks the folder for as long as the fit lasts; where another one has it, a new one that is named after it.

        Where the file system has no locks it is shared: the record there is then the last one that was written.
        """
        if self._claimed:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock.take(self.folder / _LOCK_NAME)
        except BlockingIOError:
            self.folder = _new_beside(self.wanted)
            self._lock = lock.take(self.folder / _LOCK_NAME)
        self._claimed = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no claim."""
        return self.__dict__ | {"_lock": None, "_claimed": False}


def _new_beside(folder: Path) -> Path:
    """ "speed_limit-2", or the first number that there is not yet."""
    whole = Path(os.path.abspath(folder))  # "." has no name
    number = 2
    while True:
        found = whole.parent / f"{whole.name}-{number}"
        try:
            found.mkdir()
            return found
        except FileExistsError:
            number += 1
