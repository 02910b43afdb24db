"""Findings on what a run's work was lost to: the noise of its batches, and bouncing."""

from __future__ import annotations

import math

from lightning_speedlimit.report.findings import Finding, JudgedRun
from lightning_speedlimit.words import number

NOISE_LEAD = -0.05  # by how much the share of noise must exceed that of bouncing to be named first: fitted, see there
SECOND_SHARE = 0.25  # of the work: from here on the smaller of noise and bouncing is named too: a convention


def waste(run: JudgedRun) -> list[tuple[float, Finding]]:
    """Noise and bouncing, with −ln conversion divided between them as the work is."""
    if not run.wasteful:
        return []
    noise, bouncing = run.shares["noise_share"], run.shares["bouncing_share"]
    total = math.inf if run.conversion <= 0 else -math.log(run.conversion)
    shares, findings = (noise, bouncing), (_noise(run), _bouncing(run))
    if not noise_leads(run):
        shares, findings = shares[::-1], findings[::-1]
    if shares[1] < SECOND_SHARE:
        return [(total, findings[0])]
    costs = sorted((total * share / (noise + bouncing) for share in shares), reverse=True)
    return list(zip(costs, findings, strict=True))  # the lead says which is first, also where it has the smaller share


def noise_leads(run: JudgedRun) -> bool:
    return run.shares["noise_share"] > run.shares["bouncing_share"] + NOISE_LEAD


def _noise(run: JudgedRun) -> Finding:
    evidence = run.evidence("noise_share", "conversion", "straightness")
    sentence = (
        f"Batch noise took {number(evidence['noise_share'])} of the work{_turns(evidence)}; "
        f"{number(evidence['conversion'])} lowered the loss."
    )
    return Finding("noise", sentence, _larger_batch(run), evidence)


def _larger_batch(run: JudgedRun) -> str:
    """The one remedy that held-out runs bear out, in steps: docs/tuning.md."""
    batch = run.batch
    larger = "four times the batch" if batch is None else f"a batch of {4 * batch:g} instead of {batch:g}"
    if run.steps_per_epoch is not None and run.steps_per_epoch < 4:
        larger = "all data in each batch"
    return f"Try {larger} at the same learning rate: fewer steps, but more data."


def _bouncing(run: JudgedRun) -> Finding:
    evidence = run.evidence("bouncing_share", "conversion", "straightness")
    sentence = (
        f"Bouncing took {number(evidence['bouncing_share'])} of the work: the steps overshoot{_turns(evidence)}; "
        f"{number(evidence['conversion'])} lowered the loss."
    )
    return Finding("bouncing", sentence, "", evidence)


def _turns(evidence: dict[str, float]) -> str:
    """The straightness, where it is known."""
    straightness = evidence["straightness"]
    if math.isnan(straightness):
        del evidence["straightness"]
        return ""
    return f" (straightness {number(straightness)})"
