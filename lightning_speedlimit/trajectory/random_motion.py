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

from collections.abc import Sequence

import numpy as np

from lightning_speedlimit.trajectory.mobility import UNKNOWN, Inertia
from lightning_speedlimit.trajectory.run_totals import Numbers, RunTotals, SectionTotals, ratio


def random_motion(run: RunTotals, loss_drop: Numbers) -> tuple[Numbers, Numbers]:
    """cN/K, the most that it can be, and s cN/K, what is left of it. Loss unit, ≥ 0.

    NaN without loss drop, and where the optimizer's c is not known.

    Args:
        loss_drop: d, with what decoupled decay did to the loss, which is taken out here.
    """
    work, met, anti = (run.sum(name) for name in ("work_ito", "work_met", "work_anti_ito"))
    completing = np.where(met > 0.0, ratio(work, met), 1.0)  # the last update has met no gradient yet
    fallen, anti = loss_drop - run.sum("work_decay"), anti * completing
    noise = np.maximum(0.0, work + anti - 2.0 * fallen)
    curvature = np.maximum(0.0, 2.0 * (fallen - anti))
    inertia = mean_inertia(run.sections)
    most = inertia.gain * noise / run.lasting
    q = ratio(2.0 * run.lasting * (1.0 + inertia.memory) * curvature, noise)
    return most, most * share_left(np.where(noise > 0.0, q, 0.0))


def share_left(q: Numbers) -> Numbers:
    """s = ((1 + 3q)^⅔ − 1)/2q: 1 at q = 0, falling as q^−⅓. No unit; q ≥ 0."""
    root = np.cbrt(1.0 + 3.0 * q)  # r: with 3q = r³ − 1 it is 3(r + 1)/2(r² + r + 1), and nothing cancels
    return 1.5 / (root + 1.0 / (root + 1.0))


def mean_inertia(sections: Sequence[SectionTotals]) -> Inertia:
    """Of the groups, weighted with W − a of each; the longest memory where none shows noise; NaN: one is unknown."""
    moved = [s for s in sections if np.any(s.sums["squares"] != 0.0)]
    known = {s.inertia for s in moved}
    if len(known) == 1:
        return known.pop()
    if not moved or any(np.isnan(gain) for gain, _ in known):
        return UNKNOWN
    weights = [np.maximum(0.0, s.sums["work_met"] - s.sums["work_anti_ito"]) for s in moved]
    whole, longest = sum(weights), max(known)

    def mean(place: int) -> Numbers:
        weighted = sum(w * s.inertia[place] for w, s in zip(weights, moved, strict=True))
        return np.where(whole == 0.0, longest[place], ratio(weighted, whole))

    return Inertia(mean(0), mean(1))
