"""The last word on a run, as a value that prints itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_speedlimit.checks import arguments
from lightning_speedlimit.display import Displayed
from lightning_speedlimit.record import summary_text
from lightning_speedlimit.record.summary_values import SummaryValues
from lightning_speedlimit.words import number

_TOLD = ("loss", "efficiency", "noise_share", "straightness", "steadiness", "conversion")


@dataclass(frozen=True)
class Summary(SummaryValues, Displayed):
    """How close a run came to the speed limit, and why it fell short. `print` shows it as a table.

    Undefined is NaN, with the reason in `reasons`. Nothing is clipped into its range. Units: "parameter" is
    the unit of the weights, "loss" that of the loss, "clock" a step (clock "steps") or a unit of learning
    rate (clock "lr"). The formulas are those of Seroussi, Alemi, Helias, Ringel, Speed Limits for Deep
    Learning, arXiv:2307.14653, and of Cauchy–Schwarz, D² ≤ ℓ² ≤ τA.
    """

    @classmethod
    def from_row(
        cls, steps: int, values: Mapping[str, float], *, reasons: Mapping[str, str], run: Mapping[str, Any]
    ) -> Summary:
        """The summary of one row of a record; columns that it has no field for are left out."""
        steps, reasons = arguments.whole("steps", steps), arguments.texts("reasons", reasons)
        arguments.check_kind("run", run, Mapping, "what was run, as a dict")
        names = {f.name for f in dataclasses.fields(cls)} - {"steps", "reasons", "run"}
        known = {name: value for name, value in arguments.numbers("values", values).items() if name in names}
        return cls(steps=steps, reasons=reasons, run=dict(run), **known)

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={number(getattr(self, name))}" for name in _TOLD)
        return f"Summary(steps={self.steps}, {told}; print() shows all)"

    def __str__(self) -> str:
        return summary_text.table(self)

    def sentence(self) -> str:
        """One sentence: what the run did, what cost it the most, and the figures that this rests on."""
        return summary_text.sentence(self)
