"""`speedlimit watch`: looks at the files of records now and then, and never locks or writes anything."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.cli import terminal, watch_view
from lightning_speedlimit.cli.complaints import from_user
from lightning_speedlimit.cli.watch_view import View
from lightning_speedlimit.record import RecordError, RunRecord
from lightning_speedlimit.record.files import JSON_NAME
from lightning_speedlimit.record.fit_state import FitState, fit_state
from lightning_speedlimit.record.folders import USUAL_NAME, NoRecord, records_within
from lightning_speedlimit.words import one_line, plain_text

LOOK_EVERY = 1.0  # seconds: at the times of the files
SEARCH_EVERY = 10.0  # seconds: for runs that have begun since
FOOTER = "Ctrl-C ends the watching, not the training."
_LEAVE = "Ctrl-C ends, --once does not wait"
_FIRST_ROWS = 8  # of what has been written before the watch, in lines of a single run


class Watched:
    """One record, read again when its file has been replaced.

    Attributes:
        record: as it was read last; None: not yet.
        problem: why it could not be read the last time.
        written: when it was, by the file, s since 1970.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: RunRecord | None = None
        self.problem: str | None = None
        self.written = -math.inf
        self._seen: tuple[int, int, int] | None = None

    def look(self) -> None:
        try:
            found = (self.path / JSON_NAME).stat()
        except OSError as error:
            self.problem = f"{plain_text(str(self.path))} can't be read now: {error.strerror or error}"
            return
        seen = found.st_mtime_ns, found.st_ino, found.st_size
        if seen == self._seen:
            return
        try:
            self.record = RunRecord.load(self.path, sketches=False)
        except RecordError as error:  # perhaps it is being copied: again at the next look
            self.problem = one_line(str(error), 2000)
            return
        self.problem, self.written, self._seen = None, found.st_mtime, seen

    @property
    def state(self) -> FitState:
        assert self.record is not None
        return fit_state(self.record, self.path)


class Watch:
    """All records that a folder is, or holds.

    Attributes:
        waits_for: why there is none yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waits_for = ""
        self._runs: dict[Path, Watched] = {}
        self._searched = -math.inf

    def look(self) -> None:
        """Raises RecordError where the folder is none."""
        now = time.monotonic()
        if now - self._searched >= SEARCH_EVERY or not self._runs:
            self._search(now)
        self._read()
        if self.over and self._searched != now:  # unless another one has begun since
            self._search(now)
            self._read()

    def _search(self, now: float) -> None:
        self._searched = now
        try:
            self._runs = {path: self._runs.get(path, Watched(path)) for path in records_within(self.folder)}
        except NoRecord:
            self.waits_for = "no such folder" if not self.folder.exists() else "SpeedLimit writes at the first log step"

    def _read(self) -> None:
        for run in self._runs.values():
            run.look()

    @property
    def read(self) -> list[Watched]:
        """Those that could be read, the one written last first."""
        return sorted((run for run in self._runs.values() if run.record is not None), key=lambda run: -run.written)

    @property
    def running(self) -> list[Watched]:
        """Those of them that go on."""
        return [run for run in self.read if run.state.kind == "running"]

    @property
    def problems(self) -> list[str]:
        return [run.problem for run in self._runs.values() if run.problem is not None]

    @property
    def over(self) -> bool:
        """All runs that there are have ended."""
        runs = self._runs.values()
        return bool(runs) and all(run.record is not None and run.state.kind == "ended" for run in runs)

    def name(self, run: Watched) -> str:
        """Of one of several runs: where it lies in the folder, without the part that all have."""
        path = run.path.relative_to(self.folder)
        return plain_text(str(path.parent if path.name == USUAL_NAME and path.parent != Path() else path))

    def view(self) -> View:
        """The only run that goes on, or that there is; else a line for each."""
        runs = self.read
        if not runs:
            return View(self.waiting, self.problems)
        going = self.running
        chosen = going if len(going) == 1 else runs
        if len(chosen) == 1 and chosen[0].record is not None:
            others = [
                f"One of {len(runs)} runs in {plain_text(str(self.folder))}: the others have not been written lately"
            ]
            return watch_view.of_run(
                chosen[0].path,
                chosen[0].record,
                chosen[0].state,
                rows=watch_view.rows_that_fit("run"),
                notes=[*(others if len(runs) > 1 else []), *self.problems],
            )
        several = [(self.name(run), run.record, run.state) for run in runs if run.record is not None]
        title = f"{len(several)} runs in {plain_text(str(self.folder))}, {len(going)} of them running"
        found = watch_view.of_several(title, several, rows=watch_view.rows_that_fit("several"))
        return found._replace(lines=[*found.lines, *self.problems])

    @property
    def waiting(self) -> str:
        """For what, where no run goes on."""
        if self.read:
            return f"Waiting for a run that goes on in {plain_text(str(self.folder))}; {_LEAVE}"
        return f"Waiting for a run in {plain_text(str(self.folder))}: {self.waits_for or 'none can be read'}; {_LEAVE}"


def watch_run(folder: Path, *, once: bool) -> None:
    """Until all runs have ended or Ctrl-C; once: what there is, and no more."""
    watch = Watch(folder)
    if once:
        _show_once(watch)
        return
    try:
        if terminal.is_terminal() and not terminal.console().is_dumb_terminal:
            _draw(watch)
        else:
            _print(watch)
    except KeyboardInterrupt:  # how one leaves
        return


def _show_once(watch: Watch) -> None:
    with from_user():
        records_within(watch.folder)  # says why there is none
        watch.look()
        if not watch.read:
            raise RecordError(watch.problems[0])
    view = watch.view()
    if terminal.is_terminal():
        terminal.console().print(watch_view.drawn(view))
    else:
        print(watch_view.plain(view))


def _looks(watch: Watch) -> Iterator[None]:
    """After each look; the last one when all runs are over."""
    while True:
        with from_user():
            watch.look()
        yield
        if watch.over:
            return
        time.sleep(LOOK_EVERY)


def _draw(watch: Watch) -> None:
    from rich.live import Live

    with Live(console=terminal.console(), auto_refresh=False, vertical_overflow="crop") as live:
        for _ in _looks(watch):
            live.update(watch_view.drawn(watch.view(), footer="" if watch.over else FOOTER), refresh=True)


class _Printed:
    """Which rows of a record are new: all behind those that it had before, and all of a fit that began anew."""

    def __init__(self) -> None:
        self._rows: npt.NDArray[np.float64] | None = None

    def new(self, record: RunRecord, at_first: int) -> int:
        """How many of the last rows; of a record that was never seen `at_first` at most."""
        columns, undefined = record.columns, np.full(len(record), math.nan)
        now = np.column_stack([columns["step"], *(columns.get(name, undefined) for name in ("loss", "seconds"))])
        before, self._rows = self._rows, now
        if before is None:
            return min(at_first, len(now))
        both = min(len(before), len(now))
        other = ~np.isclose(before[:both], now[:both], rtol=0.0, atol=0.0, equal_nan=True).all(axis=1)
        if other.any():  # anew from here on: at 0, or where a resumed fit left the one before it
            return len(now) - int(other.argmax())
        return len(now) - both if len(now) >= len(before) else len(now)


def _print(watch: Watch) -> None:
    """A line for each new row, for each change of whether a fit goes on, and for each new problem."""
    printed: dict[Path, _Printed] = {}
    said: dict[object, str] = {}

    def say(key: object, text: str, value: str | None = None) -> None:
        """Where it is another one than the last of this key."""
        if said.get(key) != (value or text):
            said[key] = value or text
            print(text, flush=True)

    for _ in _looks(watch):
        several = len(watch.read) > 1
        for run in reversed(watch.read):
            assert run.record is not None
            name = watch.name(run) if several else plain_text(str(run.path))
            count = printed.setdefault(run.path, _Printed()).new(run.record, 1 if several else _FIRST_ROWS)
            for step, values in watch_view.last_rows(run.record, count):
                print(f"{f'{name}   ' if several else ''}{watch_view.line(step, values)}", flush=True)
            say(run.path, f"{name}   {run.state.sentence}", run.state.kind)
        for problem in watch.problems:
            say(problem, problem)
        if not watch.over and not watch.running:
            say("waits", watch.waiting)
