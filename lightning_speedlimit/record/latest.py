"""The tuning numbers of a run as it is now: of its last rows, as many as it takes to know them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_speedlimit.record.tuning import Columns, Tuned, Tuning

_SHORT = 16  # rows of a run that is looked at as a whole
_KNOWN = {"critical_batch_size": (0.0, 0.3), "step_headroom": (0.0, 0.3), "noise_share": (0.1, 0.0)}


def latest(columns: Columns, run: Mapping[str, Any], reasons: Mapping[str, str] | None = None) -> dict[str, Tuned]:
    """Of the last row's steps, or as many rows before as it takes: the last 2, 4, 8, …, a half; all of a short run.

    What a run was like in its beginning would come and go from one row to the next.

    So many that the standard error is at most 0.1 of a noise share, and 0.3 of the value of the others.
    """
    rows, found, wanting = len(columns["step"]), dict[str, Tuned](), dict(_KNOWN)
    length, most = 1, rows if rows <= _SHORT else rows // 2
    steps = "all steps" if most == rows else "the last half of the steps"
    while wanting:
        length = min(length, most)
        tuning = Tuning(columns, run, None if length >= rows else rows - 1 - length, reasons=reasons)
        for name, tuned in tuning.only(wanting).items():
            absolute, relative = _KNOWN[name]
            if tuned.standard_error <= absolute + relative * abs(tuned.value):
                found[name] = tuned
                del wanting[name]
            elif length >= most:
                known = f"{tuned.value:.2g} +/- {tuned.standard_error:.1g}"
                found[name] = Tuned.undefined(tuned.reason or f"even of {steps} it is but {known}")
                del wanting[name]
        length *= 2
    return found
