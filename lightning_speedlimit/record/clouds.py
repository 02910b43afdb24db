"""The small table of a record that holds the clouds: rows are steps, columns are layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.checks.guard import shown
from lightning_speedlimit.words import plain_text

CLOUD_VALUES = ("wasserstein2", "wasserstein2_lower", "identity_excess", "displacement")


class CloudTable:
    """What each layer's neurons did between the start and a step, one row per step at which they were compared.

    Layers may come later (a layer that is unfrozen): they are NaN in the earlier rows, as is a layer that a
    row does not give. Four float64 numbers per layer and row.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._particles: dict[str, int] = {}
        self._rows: list[npt.NDArray[np.float64]] = []  # (4, layers known then)

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, layers: Mapping[str, Mapping[str, float]]) -> None:
        """The row of `step`; a row for the same step replaces the last one.

        Args:
            layers: name → its `particles` and the values named in `CLOUD_VALUES`; what is missing is NaN.
        """
        last = self._steps[-1] if self._steps else 0
        if step < last:
            raise ValueError(f"step must not be negative or decrease, got {step} after {last}; start a new RunRecord")
        known = {"particles", *CLOUD_VALUES}
        for name, values in layers.items():
            if values.keys() - known or not 1 <= values.get("particles", 0) <= 2**53:
                raise ValueError(
                    f"layers[{name!r:.60}] must have at least one of particles, and values among {CLOUD_VALUES}, "
                    f"got {shown(values)}"
                )
        layers = {plain_text(name): values for name, values in layers.items()}
        self._particles |= {name: int(values["particles"]) for name, values in layers.items()}
        row = np.full((len(CLOUD_VALUES), len(self._particles)), np.nan)
        for column, name in enumerate(self._particles):
            given = layers.get(name, {})
            row[:, column] = [given.get(value, np.nan) for value in CLOUD_VALUES]
        if self._steps and step == self._steps[-1]:
            self._rows[-1] = row
            return
        self._steps.append(step)
        self._rows.append(row)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        return np.array(self._steps, dtype=np.int64)

    @property
    def layers(self) -> list[str]:
        return list(self._particles)

    @property
    def particles(self) -> npt.NDArray[np.int64]:
        return np.array(list(self._particles.values()), dtype=np.int64)

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """(4, rows, layers), in the order of `CLOUD_VALUES`."""
        table = np.full((len(CLOUD_VALUES), len(self._rows), len(self._particles)), np.nan)
        for place, row in enumerate(self._rows):
            table[:, place, : row.shape[1]] = row
        return table

    @classmethod
    def restore(
        cls,
        *,
        steps: npt.NDArray[np.int64],
        layers: list[str],
        particles: npt.NDArray[np.int64],
        values: npt.NDArray[np.float64],
    ) -> CloudTable:
        table = cls()
        table._steps = steps.tolist()
        table._particles = dict(zip(layers, particles.tolist(), strict=True))
        table._rows = [values[:, place].copy() for place in range(len(table._steps))]
        return table
