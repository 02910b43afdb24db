"""A record on disk: one folder, `record.json` beside one file of plain arrays, which it names.

What both `writing` and `reading` know.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.checks.guard import shown
from lightning_speedlimit.record.clouds import CLOUD_VALUES
from lightning_speedlimit.record.layers import LAYER_VALUES
from lightning_speedlimit.record.schema import MAX_NESTING
from lightning_speedlimit.record.sketches import SKETCH_SIZE
from lightning_speedlimit.words import plain_text

JSON_NAME = "record.json"

MAX_DATA_BYTES = 2 * 1024**3  # 10⁶ log steps of 250 columns: far beyond any run, well below a machine's memory
MAX_JSON_BYTES = 1024**2  # settings, names and reasons: some kilobytes
LONGEST_INTEGER = 300  # digits: a float can hold it
DATA_NAME = re.compile(r"data-[0-9a-f]{32}\.npz")
_FLOAT_KEY = "__float__"
_MAX_NESTING = MAX_NESTING - 2  # of `run`: record.json is around it, and a number that JSON lacks is an object


@dataclass(frozen=True)
class RecordData:
    """All that a record holds, as plain values and arrays."""

    run: dict[str, Any]
    reasons: dict[str, str]
    columns: list[str]
    step: npt.NDArray[np.int64]  # (rows,)
    values: npt.NDArray[np.float64]  # (columns, rows)
    sketch_steps: npt.NDArray[np.int64]  # (sketches,)
    sketch_ticks: npt.NDArray[np.int64]  # (sketches,)
    sketches: npt.NDArray[np.float32]  # (sketches, 4093)
    sketch_state: dict[str, int]  # stride, ticks_seen, newest_step, last_is_provisional (0 or 1)
    cloud_layers: list[str] = field(default_factory=list)
    cloud_step: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # (cloud rows,)
    cloud_particles: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # (layers,)
    cloud_values: npt.NDArray[np.float64] = field(  # (4, cloud rows, layers), in the order of CLOUD_VALUES
        default_factory=lambda: np.empty((len(CLOUD_VALUES), 0, 0))
    )
    layer_names: list[str] = field(default_factory=list)
    layer_step: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # (1,); (0,): none
    layer_values: npt.NDArray[np.float64] = field(  # (7, layers), in the order of LAYER_VALUES
        default_factory=lambda: np.empty((len(LAYER_VALUES), 0))
    )

    @property
    def counts(self) -> tuple[int, int, int, int, int, int]:
        """Rows, columns, sketches, cloud rows, their layers, and layers: what `expected_arrays` asks for."""
        clouds = len(self.cloud_step), len(self.cloud_layers)
        return len(self.step), len(self.columns), len(self.sketch_steps), *clouds, len(self.layer_names)


def expected_arrays(
    rows: int, columns: int, sketches: int, cloud_rows: int, cloud_layers: int, layers: int
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Name → type and shape of every array in the data file; of clouds and layers, where there are any."""
    clouds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "cloud_step": (np.dtype("<i8"), (cloud_rows,)),
        "cloud_particles": (np.dtype("<i8"), (cloud_layers,)),
        "cloud_values": (np.dtype("<f8"), (len(CLOUD_VALUES), cloud_rows, cloud_layers)),
    }
    of_layers: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "layer_step": (np.dtype("<i8"), (1,)),
        "layer_values": (np.dtype("<f8"), (len(LAYER_VALUES), layers)),
    }
    return {
        "step": (np.dtype("<i8"), (rows,)),
        "values": (np.dtype("<f8"), (columns, rows)),
        "sketch_steps": (np.dtype("<i8"), (sketches,)),
        "sketch_ticks": (np.dtype("<i8"), (sketches,)),
        "sketches": (np.dtype("<f4"), (sketches, SKETCH_SIZE)),
        **(clouds if cloud_rows else {}),
        **(of_layers if layers else {}),
    }


# --- what JSON can hold


def to_json(value: Any, where: str = "run", depth: int = 1) -> Any:
    """Plain JSON values; a float that JSON has no word for becomes {"__float__": "nan"}; text is plain text."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, int) and abs(value) < 10 ** (LONGEST_INTEGER - 1):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT_KEY: str(float(value))}
    if depth > _MAX_NESTING and isinstance(value, list | tuple | dict):
        raise TypeError(f"run must not be nested more than {_MAX_NESTING} deep, got more; use str() somewhere within")
    if isinstance(value, list | tuple):
        return [to_json(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"keys of {where} must be strings, got {shown(key)}; use str(key)")
        return {_escaped(plain_text(key)): to_json(i, f"{where}[{key!r}]", depth + 1) for key, i in value.items()}
    raise TypeError(
        f"{where} must be JSON-able (None, bool, int below 10^{LONGEST_INTEGER - 1}, float, str, list, dict), "
        f"got {type(value).__name__}; convert it, e.g. with str() or float()"
    )


def from_json(value: Any) -> Any:
    """The inverse of `to_json` (tuples come back as lists)."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_FLOAT_KEY} and value[_FLOAT_KEY] in ("nan", "inf", "-inf"):
            return float(value[_FLOAT_KEY])
        return {_unescaped(key): from_json(item) for key, item in value.items()}
    return value


def _escaped(key: str) -> str:
    return "\\" + key if key.lstrip("\\") == _FLOAT_KEY else key


def _unescaped(key: str) -> str:
    return key[1:] if key.startswith("\\") and key.lstrip("\\") == _FLOAT_KEY else key


def sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
