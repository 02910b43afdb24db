"""The bounded shelf of sketches in a record."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.checks.guard import shown

SKETCH_SIZE = 4093
MAX_SKETCHES = 512


class SketchShelf:
    """At most 512 sketches of θ_t − θ_0, evenly spread over the log steps seen, first and last included.

    Log steps are counted ("ticks") as they are seen. A sketch stays when it comes at least `stride` ticks
    after the newest one that stays; any other is provisional: the last point of the trajectory until the
    next one takes its place. When the shelf is full every second sketch is dropped and `stride` doubles.
    """

    def __init__(self) -> None:
        self.stride = 1
        self.ticks_seen = 0
        self.last_is_provisional = False
        self.newest_step = -1
        self._steps: list[int] = []
        self._ticks: list[int] = []
        self._sketches: list[npt.NDArray[np.float32]] = []

    def see(self, step: int) -> None:
        """Counts a log step, once however often it is named."""
        if step > self.newest_step:
            self.newest_step = step
            self.ticks_seen += 1

    def wants_one(self) -> bool:
        """Whether a sketch of the newest log step seen would stay."""
        staying = self._ticks[:-1] if self.last_is_provisional else self._ticks
        return not staying or self.ticks_seen - staying[-1] >= self.stride

    def add(self, step: int, sketch: npt.ArrayLike) -> None:
        try:
            values = np.array(sketch, dtype=np.float32)  # a copy: the caller reuses its buffer
        except Exception as error:  # of a tensor on another device, of lists of lists
            raise TypeError(f"sketch got {shown(sketch)}, wanted an array of {SKETCH_SIZE} real numbers") from error
        if values.shape != (SKETCH_SIZE,):
            raise ValueError(f"sketch must have shape ({SKETCH_SIZE},), got {values.shape}; pass the raw sketch")
        if self._steps and step < self._steps[-1]:
            raise ValueError(f"step must not decrease, got {step} after {self._steps[-1]}; start a new RunRecord")
        self.see(step)
        if self._steps and step == self._steps[-1]:
            self._sketches[-1] = values
            return
        if self.last_is_provisional:
            self._drop_last()
        if self._ticks and self._ticks[-1] == self.ticks_seen:  # of an earlier row than the newest: no tick of its own
            self.ticks_seen += 1
        if len(self._steps) == MAX_SKETCHES:
            self._thin()
        self.last_is_provisional = not self.wants_one()
        self._steps.append(step)
        self._ticks.append(self.ticks_seen)
        self._sketches.append(values)

    def _drop_last(self) -> None:
        for column in (self._steps, self._ticks, self._sketches):
            del column[-1]
        self.last_is_provisional = False

    def _thin(self) -> None:
        for column in (self._steps, self._ticks, self._sketches):
            del column[1::2]
        self.stride *= 2

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        return np.array(self._steps, dtype=np.int64)

    @property
    def ticks(self) -> npt.NDArray[np.int64]:
        return np.array(self._ticks, dtype=np.int64)

    @property
    def sketches(self) -> npt.NDArray[np.float32]:
        if not self._sketches:
            return np.empty((0, SKETCH_SIZE), dtype=np.float32)
        return np.stack(self._sketches)

    def state(self, *, sketches: bool) -> dict[str, int]:
        """What it knows besides the sketches; without these none of them is provisional."""
        provisional = int(self.last_is_provisional and sketches)
        return {
            "stride": self.stride,
            "ticks_seen": self.ticks_seen,
            "newest_step": self.newest_step,
            "last_is_provisional": provisional,
        }

    @classmethod
    def restore(
        cls,
        steps: npt.NDArray[np.int64],
        ticks: npt.NDArray[np.int64],
        sketches: npt.NDArray[np.float32],
        state: Mapping[str, int],
    ) -> SketchShelf:
        """The shelf as it was: what it keeps next does not depend on having been away."""
        shelf = cls()
        shelf.stride, shelf.ticks_seen, shelf.newest_step = (
            state[name] for name in ("stride", "ticks_seen", "newest_step")
        )
        shelf.last_is_provisional = bool(state["last_is_provisional"])
        shelf._steps, shelf._ticks = steps.tolist(), ticks.tolist()
        shelf._sketches = [row.copy() for row in sketches]
        return shelf
