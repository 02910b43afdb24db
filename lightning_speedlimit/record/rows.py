"""The table of a record: rows are log steps, columns what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.checks import arguments
from lightning_speedlimit.words import plain_text

_FIRST_CAPACITY = 64


def row_of(values: Mapping[str, float]) -> dict[str, float]:
    """Column → number, checked; `step` is none of them."""
    if isinstance(values, Mapping) and "step" in values:
        raise ValueError("values must not hold 'step': it is what the row is known by; rename the column")
    return {plain_text(name): value for name, value in arguments.numbers("values", values).items()}


class Meter(Protocol):
    """What `RunRecord.take` asks of a `TrajectoryMeter`."""

    reasons: dict[str, str]

    @property
    def steps(self) -> int: ...

    @property
    def measured_coordinates(self) -> int | None: ...

    @property
    def optimized_coordinates(self) -> int | None: ...

    def measure(self, *, sketch: bool) -> tuple[dict[str, float], Any]: ...

    def layers(self) -> dict[str, dict[str, float]]: ...


class RowTable:
    """Columns of float64 over steps that do not decrease; n rows cost O(n) copies."""

    def __init__(self) -> None:
        self._count = 0
        self._step = np.empty(_FIRST_CAPACITY, dtype=np.int64)
        self._values: dict[str, npt.NDArray[np.float64]] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def names(self) -> list[str]:
        """Of the columns but `step`."""
        return list(self._values)

    @property
    def last_step(self) -> int | None:
        """Of the last row; None where there is none."""
        return int(self._step[self._count - 1]) if self._count else None

    def add(self, step: int, row: Mapping[str, float]) -> None:
        """A row for the same step replaces the last one; a column not given is NaN in it, a new one NaN before it."""
        last = self.last_step
        if step < (last or 0):
            raise ValueError(f"step must not be negative or decrease, got {step} after {last}; start a new RunRecord")
        if step != last:
            self._grow()
            self._count += 1
        self._step[self._count - 1] = step
        for column in self._values.values():
            column[self._count - 1] = np.nan
        self.amend(row)

    def amend(self, row: Mapping[str, float]) -> None:
        """Columns of the last row, added or replaced."""
        for name, value in row.items():
            if name not in self._values:
                self._values[name] = np.full(len(self._step), np.nan)
            self._values[name][self._count - 1] = value

    def _grow(self) -> None:
        """Doubles the capacity when it is used up."""
        if self._count < len(self._step):
            return
        self._step = np.concatenate([self._step, np.zeros_like(self._step)])
        for name, column in self._values.items():
            self._values[name] = np.concatenate([column, np.full_like(column, np.nan)])

    def views(self) -> dict[str, npt.NDArray[Any]]:
        """`step` first, then the columns; of the table's own memory, not to be written to."""
        rows = slice(self._count)
        return {"step": self._step[rows]} | {name: column[rows] for name, column in self._values.items()}

    @classmethod
    def restore(cls, step: npt.NDArray[np.int64], names: Sequence[str], values: npt.NDArray[np.float64]) -> RowTable:
        """values: (columns, rows)."""
        table = cls()
        table._count = len(step)
        spare = max(_FIRST_CAPACITY - len(step), 0)
        table._step = np.concatenate([step, np.zeros(spare, dtype=np.int64)])
        table._values = {
            name: np.concatenate([column, np.full(spare, np.nan)]) for name, column in zip(names, values, strict=True)
        }
        return table
