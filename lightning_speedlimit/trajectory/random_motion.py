"""The share that random motion may have in Σ (Δθ_i)²/m_i, from the work balance of one run.

To second order in the step and with independent batches, with W = Σ f_k·u_k, a = Σ f_{k+1}·u_k and the loss drop d

    N = W + a − 2d      what the updates gained on their own batches alone
    C = 2(d − a)        curvature, Σ u·H·u

Steps whose noise is not held back would have spread by cN/K in this measure, c = steady over instantaneous response:
Σ lr² of the noise's variance over m = Σ lr, K = (Σ lr)²/Σ lr² where the rate is not constant. Curvature pulls the
weights back while they spread: s cN/K is left,

    s = ((1 + 3q)^⅔ − 1)/2q,     q = 2K(1 + β)C/N

The slope of s at q = 0 is that of one mode of a quadratic loss, (1 − e^−q)/q; that it falls as q^−⅓ and not as 1/q, and
so the exponent, comes from trainings. docs/findings/interval.md has how far it is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_speedlimit.trajectory.mobility import UNKNOWN, Inertia
from lightning_speedlimit.trajectory.run_totals import NAN, RunTotals, SectionTotals

EXPONENT = 2.0 / 3.0


class RandomMotion(NamedTuple):
    """most: cN/K. left: s cN/K. Loss unit, ≥ 0; NaN without loss drop, before a step has met the next gradient, and
    where the optimizer's c is not known."""

    most: float
    left: float


def random_motion(run: RunTotals, loss_drop: float) -> RandomMotion:
    """Args: loss_drop: d, with what decoupled decay did to the loss, which is taken out here."""
    work, met, anti = (run.sum(name) for name in ("work_ito", "work_met", "work_anti_ito"))
    if met == 0.0 and anti == 0.0:
        return RandomMotion(NAN, NAN)
    completing = work / met if met > 0.0 else 1.0  # the last update has met no gradient yet
    fallen, anti = loss_drop - run.sum("work_decay"), anti * completing
    noise, curvature = _positive(work + anti - 2.0 * fallen), _positive(2.0 * (fallen - anti))
    inertia = mean_inertia(run.sections)
    steps = run.steps if math.isnan(run.lasting) else run.lasting
    most = inertia.gain * noise / steps
    q = 2.0 * steps * (1.0 + inertia.memory) * curvature / noise if noise > 0.0 else 0.0
    return RandomMotion(most, most * share_left(q))


def share_left(q: float) -> float:
    """s = ((1 + 3q)^⅔ − 1)/2q: 1 at q = 0, falling as q^−⅓. No unit; q ≥ 0."""
    if not q > 0.0:
        return q + 1.0  # NaN stays
    return math.expm1(EXPONENT * math.log1p(2.0 * q / EXPONENT)) / (2.0 * q)


def mean_inertia(sections: Sequence[SectionTotals]) -> Inertia:
    """Of the groups, weighted with W − a of each; the longest memory where none shows noise; NaN: one is unknown."""
    moved = [s for s in sections if s.sums["squares"] != 0.0]
    known = {s.inertia for s in moved}
    if len(known) == 1:
        return known.pop()
    weights = [_positive(s.sums["work_met"] - s.sums["work_anti_ito"]) for s in moved]
    whole = math.fsum(weights)
    if not moved or math.isnan(whole) or any(math.isnan(gain) for gain, _ in known):
        return UNKNOWN
    if whole == 0.0:
        return max(known)
    each = list(zip(weights, (s.inertia for s in moved), strict=True))
    return Inertia(*(math.fsum(w * inertia[place] for w, inertia in each) / whole for place in (0, 1)))


def _positive(value: float) -> float:
    """Clamped at 0; NaN stays."""
    return 0.0 if value < 0.0 else value
