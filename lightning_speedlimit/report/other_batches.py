"""What the batch of m times as many samples is predicted to take to the same loss, each at its own best learning rate.

With r = B_c/B of K steps at batch B:

    steps at batch m·B = K (1 + r/m)/(1 + r)        samples = m times as many per step

Source: McCandlish, Kaplan, Amodei et al. 2018, arXiv:1812.06162: steps ∝ 1 + B_c/B.
"""

from __future__ import annotations

from lightning_speedlimit.record.tuning import Tuned
from lightning_speedlimit.report.alignment import CONFIDENCE
from lightning_speedlimit.report.interpolation import Interval


def share_of_steps(ratio: Tuned, multiple: float) -> tuple[float, Interval]:
    """(1 + r/m)/(1 + r), 1, and the same at r ± 2 standard errors.

    An r below 0 counts as 0: it is one that is lost in its error. NaN where r is.
    """

    def predicted(r: float) -> float:
        return (1 + max(r, 0.0) / multiple) / (1 + max(r, 0.0))

    error = CONFIDENCE * ratio.standard_error
    low, high = sorted((predicted(ratio.value - error), predicted(ratio.value + error)))
    return predicted(ratio.value), (low, high)


def rate_was_low(headroom: Tuned) -> bool:
    """Whether the headroom is told above 1: then the formula, which supposes tuned rates, does not hold for the run."""
    return headroom.value - headroom.standard_error > 1.0
