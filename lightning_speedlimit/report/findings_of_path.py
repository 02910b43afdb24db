"""Findings on a path that bends, and on a speed that changes. No remedy held where it was not found."""

from __future__ import annotations

import math

from lightning_speedlimit.report.findings import Finding, JudgedRun
from lightning_speedlimit.words import number

# Conventions: a factor below one half doubles the least time.
STRAIGHT_ENOUGH = 0.5  # straightness/conversion; gradient flow on digits has 0.77
STEADY_ENOUGH = 0.5  # gradient flow on digits has 0.58
LOADED = 0.6  # share of the path that one half of the time has to hold to be called the heavy one
DECAYED = 0.5  # a rate below this share of the largest is a schedule's doing


def curved(run: JudgedRun) -> list[tuple[float, Finding]]:
    """What turning is left when the lost work is taken out, straightness/conversion, where little is lost."""
    straightness = run["straightness"]
    if not run.balance_known or run.wasteful or math.isnan(straightness):
        return []
    left = straightness / min(run.conversion, 1.0)
    if left >= STRAIGHT_ENOUGH:
        return []
    evidence = run.evidence("straightness", "conversion") | {"straightness_over_conversion": left}
    sentence = (
        f"The path turns, and lost work explains little of it: the straightness is {number(straightness)}, "
        f"{number(left)} of what it would be with that alone ({number(run.conversion)}, the conversion)."
    )
    cost = -math.log(left) if left > 0 else math.inf
    return [(cost, Finding("curved path", sentence, "", evidence))]


def uneven(run: JudgedRun) -> list[tuple[float, Finding]]:
    """Steadiness, and where the burst was."""
    steadiness = run["steadiness"]
    if math.isnan(steadiness) or steadiness >= STEADY_ENOUGH:
        return []
    evidence = run.evidence("steadiness")
    where, first_half = "", run.first_half
    if math.isfinite(first_half):
        evidence["first_half"] = first_half
        where = f": the first half of the time holds {number(first_half)} of the path"
    sentence = f"The speed changed: steadiness {number(steadiness)}{where}{_loading(run, evidence)}."
    cost = -math.log(steadiness) if steadiness > 0 else math.inf
    return [(cost, Finding("uneven speed", sentence, "", evidence))]


def _loading(run: JudgedRun, evidence: dict[str, float]) -> str:
    """Front or back, and whether the schedule did it: not where the loss had stopped falling before the rate did."""
    first_half = evidence.get("first_half", math.nan)
    if math.isnan(first_half):
        return ""
    if first_half <= 1 - LOADED:
        return ", a crawl and then a burst"
    if first_half < LOADED:
        return ", with bursts in both"
    kept = run.rate_kept()
    if math.isnan(kept):
        return ", a burst and then a crawl"
    evidence["rate_kept"] = kept
    end = f"{number(kept)} of its largest"
    if kept >= DECAYED:
        return f", a burst and then a crawl: the gradients fell, the learning rate is at {end}"
    if run.plateau is not None and run.rate_kept(run.plateau.step) >= DECAYED:
        return f", a burst and then a crawl: the loss stopped falling before the learning rate fell to {end}"
    return f", a burst and then a crawl, as the learning rate fell to {end}"
