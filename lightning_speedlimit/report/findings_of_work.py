"""Findings on what a run's work was lost to: the noise of its batches, and bouncing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_speedlimit.report.findings import Finding, JudgedRun
from lightning_speedlimit.report.other_batches import rate_was_low, share_of_steps
from lightning_speedlimit.words import count, number

NOISE_LEAD = -0.05  # by how much the share of noise must exceed that of bouncing to be named first: fitted, see there
_TIMES = 4  # the batch, as it was tried
_STEPS_ALONE = "It saves steps only: it helps if a larger batch costs you no more time per step."
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
    if run.steps_per_epoch is not None and run.steps_per_epoch < _TIMES:
        return f"Try all data in each batch at the same learning rate. {_STEPS_ALONE}"
    batch, tokens = run.batch, run.tokens_per_step
    larger = "four times the batch" if batch is None else f"a batch of {_TIMES * batch:g} instead of {batch:g}"
    if batch is not None and math.isfinite(tokens):  # the critical batch is in tokens then
        larger = f"a batch of {_TIMES * batch:g} sequences ({count(_TIMES * tokens)} tokens) instead of {batch:g}"
    return f"Try {larger} at the same learning rate. {_STEPS_ALONE}{_expected(run)}"


def _expected(run: JudgedRun) -> str:
    """Shares of steps and data, where the critical batch is known; of tuned rates, as the formula has it."""
    ratio = run.tuning.only(["critical_batches"])["critical_batches"]
    if math.isnan(ratio.value) or rate_was_low(run.tuning.step_headroom):
        return ""
    share, ends = share_of_steps(ratio, _TIMES)
    steps, data = _with_ends(share, ends), _with_ends(_TIMES * share, [_TIMES * end for end in ends])
    return f" Expected, the rate tuned to it: {steps} times the steps, {data} times the data."


def _with_ends(value: float, ends: Sequence[float]) -> str:
    """ "0.44 (0.40 to 0.48)"."""
    low, high = (number(end, 2) for end in ends)
    return number(value, 2) + (f" ({low} to {high})" if low != high else "")


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
