"""The small table of a record that holds its layers: one row, as of the last reading; columns are layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.checks.guard import shown
from lightning_speedlimit.words import plain_text

LAYER_VALUES = (
    "parameters",
    "displacement",
    "path_length",
    "action",
    "work_ito",
    "signal_fraction",
    "efficiency_action",
)
MAX_LAYERS = 1000  # of more those whose motion cost most
_MAX_TEXT = 200_000  # bytes of their names in record.json, which may have a megabyte

Layers = Mapping[str, Mapping[str, float]]
Values = npt.NDArray[np.float64]


def told(layers: Layers) -> Layers:
    """Of what a meter tells of its layers that which a record keeps; nothing where no layer has a name."""
    if not layers.keys() - {""}:
        return {}
    return {name: {v: x for v, x in values.items() if v in LAYER_VALUES} for name, values in layers.items()}


class LayerTable:
    """What each layer came to up to one step. Seven float64 numbers per layer; what is missing is NaN."""

    def __init__(self) -> None:
        self.step: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)  # one, or none
        self.names: list[str] = []
        self.values: Values = np.empty((len(LAYER_VALUES), 0))  # in the order of LAYER_VALUES

    def replace(self, step: int, layers: Layers) -> None:
        """What was there before is gone; no layers: nothing is there."""
        if step < 0 or (len(self.step) and step < self.step[0]):
            before = self.step[0] if len(self.step) else 0
            raise ValueError(f"step must not be negative or decrease, got {step} after {before}; start a new RunRecord")
        for name, values in layers.items():
            if values.keys() - set(LAYER_VALUES):
                raise ValueError(f"layers[{name!r:.60}] must have values among {LAYER_VALUES}, got {shown(values)}")
        chosen = _costliest({plain_text(name): values for name, values in layers.items()})
        self.step = np.array([step] if chosen else [], dtype=np.int64)
        self.names = list(chosen)
        rows = [[values.get(name, np.nan) for values in chosen.values()] for name in LAYER_VALUES]
        self.values = np.array(rows, dtype=np.float64).reshape(len(LAYER_VALUES), len(chosen))

    def columns(self) -> dict[str, Any]:
        """See `RunRecord.layers`."""
        found = dict(zip(LAYER_VALUES, self.values.copy(), strict=True))
        with np.errstate(all="ignore"):
            straightness = found["displacement"] ** 2 / found["path_length"] ** 2
        found["straightness"] = np.where(np.isfinite(straightness), straightness, np.nan)
        return {"step": int(self.step[0]) if len(self.step) else None, "layers": list(self.names), **found}

    @classmethod
    def restore(cls, step: npt.NDArray[np.int64], names: list[str], values: Values) -> LayerTable:
        table = cls()
        table.step, table.names, table.values = step.copy(), list(names), values.copy()
        return table


def _costliest(layers: Layers) -> Layers:
    """In their order: all of them, or of too many those with the largest action."""
    sizes = {name: len(json.dumps(name)) for name in layers}
    if len(layers) <= MAX_LAYERS and sum(sizes.values()) <= _MAX_TEXT:
        return layers
    order = sorted(layers, key=lambda name: -np.nan_to_num(layers[name].get("action", 0.0)))[:MAX_LAYERS]
    room = np.cumsum([sizes[name] for name in order]) <= _MAX_TEXT
    kept = {name for name, fits in zip(order, room, strict=True) if fits}
    return {name: values for name, values in layers.items() if name in kept}
