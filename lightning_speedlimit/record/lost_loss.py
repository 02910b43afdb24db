"""Where in a run the loss ceased to be a number."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_NOT_FINITE = re.compile("(a recorded loss|a gradient, a loss or a weight) (is|was) not finite")  # a meter's reasons
BECAME = "the loss became NaN or infinite between steps"


@dataclass(frozen=True)
class LostLoss:
    """A loss that was NaN or infinite from some step on, up to the last row."""

    after: int
    """Step of the last row before it; 0: the start."""
    by: int
    """Step of the first row with it."""

    @property
    def sentence(self) -> str:
        """Without its first capital, and without a full stop."""
        return f"{BECAME} {self.after} and {self.by}"


def is_not_finite(reason: str) -> bool:
    """Whether a value's reason is that a loss, or what it comes of, was no number."""
    return _NOT_FINITE.search(reason) is not None


def lost_loss(
    columns: Mapping[str, npt.NDArray[Any]], reasons: Mapping[str, str], until: float = math.inf
) -> LostLoss | None:
    """Between which rows the loss was lost, of the rows up to a step.

    None where the last of them has a loss, and where nothing says that a recorded one was not finite: a loss that
    was not recorded is NaN too.
    """
    steps = columns["step"][columns["step"] <= until]
    loss = np.asarray(columns.get("loss", ()), dtype=np.float64)[: len(steps)]
    if not len(loss) or np.isfinite(loss[-1]) or not (is_not_finite(reasons.get("loss", "")) or np.isinf(loss).any()):
        return None
    known = np.flatnonzero(np.isfinite(loss))
    first = int(known[-1]) + 1 if len(known) else 0
    return LostLoss(int(steps[first - 1]) if first else 0, int(steps[first]))
