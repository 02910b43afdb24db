"""What to do about a run that has too few rows to tell a number's error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_ROWS = 8  # aimed at
# How each library has rows more often, by its name among the run's versions.
_SETTINGS = {
    "pytorch_lightning": "Trainer(log_every_n_steps={})",
    "lightning": "Trainer(log_every_n_steps={})",
    "transformers": "TrainingArguments(logging_steps={})",
}


def too_few(wanted: int, rows: int, steps: float, run: Mapping[str, Any]) -> str:
    """ "4 log steps are needed, got 3: log more often, as with Trainer(log_every_n_steps=10), or train longer"."""
    told = f"{wanted} log steps are needed, got {rows}"
    if not steps >= wanted:
        return f"{told}: train longer"
    every = _round_below(steps / _ROWS)
    setting = next((s for name, s in _SETTINGS.items() if name in (run.get("versions") or {})), "")
    how = setting.format(every) or ("a row every step" if every == 1 else f"a row every {every} steps")
    return f"{told}: log more often, as with {how}, or train longer"


def _round_below(x: float) -> int:
    """The largest of 1, 2, 5, 10, 20, … that is not above x; 1 of what is below it."""
    if not x >= 1:
        return 1
    power = 10 ** math.floor(math.log10(x))
    return int(power * max(digit for digit in (1, 2, 5) if digit * power <= x))
