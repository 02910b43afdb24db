"""Why values of a run are NaN: in the words of the whole run, and on as few lines as that takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy.typing as npt

from lightning_speedlimit.record.lost_loss import BECAME, is_not_finite, lost_loss
from lightning_speedlimit.record.summary_values import SummaryValues
from lightning_speedlimit.record.tuning import TUNING, Tuned
from lightning_speedlimit.words import listed

# Of what the critical batch is made (its own reason tells), and what former versions had.
_WITHIN = ("gradient_signal", "gradient_noise", "efficiency_lower")
_MOST_REASONS = 100
_MOST_NAMES = 6
NO_LOSS = "no loss was recorded"  # a meter's reason


def of_run(
    columns: Mapping[str, npt.NDArray[Any]], reasons: Mapping[str, str], tuned: Mapping[str, Tuned]
) -> dict[str, str]:
    """Those of the last row, with the whole run's of what `tuned` holds; of a loss that was lost where that was."""
    found = {name: why for name, why in reasons.items() if name not in TUNING}
    if "work_ito" in columns:
        found |= {name: number.reason for name, number in tuned.items() if number.reason}
    lost = lost_loss(columns, reasons)
    if lost is None:
        return found
    return {name: lost.sentence if is_not_finite(why) else why for name, why in found.items()}


def with_cure(reasons: Mapping[str, str], cure: str) -> dict[str, str]:
    """The same; where no loss was recorded with what to do about it."""
    return {name: why.replace(NO_LOSS, f"{NO_LOSS}: {cure}") for name, why in reasons.items()}


def lines(s: SummaryValues) -> list[str]:
    """One for each reason, however many values are undefined by it, or have it to beware of.

    A hundred are more than anyone reads.
    """
    found: dict[tuple[str, bool], list[str]] = {}
    for name, reason in islice(s.reasons.items(), _MOST_REASONS):
        if name not in _WITHIN:
            undefined = math.isnan(value) if isinstance(value := getattr(s, name, None), float) else False
            found.setdefault((reason, undefined), []).append(name)
    told = [_line(s, s.reasons[names[0]], names, undefined) for (_, undefined), names in found.items()]
    left_out = len(s.reasons) - _MOST_REASONS
    return told + ([f"{left_out:,} more reasons are in the record"] if left_out > 0 else [])


def _line(s: SummaryValues, reason: str, names: list[str], undefined: bool) -> str:
    if undefined and reason.startswith(BECAME) and math.isnan(s.path_length):
        return f"{reason[0].upper()}{reason[1:]}; everything after is undefined"
    told = f" {'are' if len(names) > 1 else 'is'} undefined" if undefined else ""
    return f"{listed(names, _MOST_NAMES)}{told}: {reason}"
