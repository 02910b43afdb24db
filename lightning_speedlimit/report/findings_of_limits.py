"""Findings on the numbers themselves: an efficiency above 1, what can't be told, and that nothing stands out."""

from __future__ import annotations

import math

from lightning_speedlimit.report.findings import Finding, JudgedRun
from lightning_speedlimit.report.findings_of_course import MEASURE_LONGER
from lightning_speedlimit.report.findings_of_work import noise_leads
from lightning_speedlimit.words import number, one_line

_ROUNDING = 1e-6  # sums in float64 over 10⁶ steps round to about 1e-10


def above_one(run: JudgedRun) -> list[Finding]:
    """η = η_action · (work_action/work_ito)/conversion, with η_action ≤ 1: which of the two quotients lifts it.

    An identity, where Q is the loss drop. The first quotient is inertia: updates that the present force does not
    account for. The second is work lost, or a loss that hardly fell.
    """
    efficiency = run["efficiency"]
    if not efficiency > 1 + _ROUNDING:
        return []
    evidence = {"efficiency": efficiency}
    sentence = f"The efficiency {number(efficiency)} is above 1, where it is no longer a bound: {_why(run, evidence)}."
    advice = "Read efficiency_action and kinematic_efficiency instead, which can't exceed 1."
    return [Finding("efficiency above 1", sentence, advice, evidence)]


def _why(run: JudgedRun, evidence: dict[str, float]) -> str:
    foreign = run.record.reasons.get("efficiency", "")
    if "effective mobility" in foreign:
        classes = dict.fromkeys(one_line(o.get("class", "one"), 60) for o in run.optimizers)
        names = " and ".join(classes) or "this optimizer"
        return f"{names} has no mobility formula, and an effective one takes its place"
    if (estimator := run.record.run.get("entropy_production") or "loss_drop") != "loss_drop":
        return f"it divides by {one_line(estimator, 60)} work, which undercounts what was dissipated"
    drop, error = run["loss_drop"], run["loss_drop_se"]
    if error > 0 and drop < 4 * error:
        evidence |= {"loss_drop": drop, "loss_drop_se": error}
        return f"the loss hardly fell, by {number(drop)} with a standard error of {number(error)}"
    inertia = run["work_action"] / run["work_ito"] if run["work_ito"] > 0 else math.nan
    lost = 1 / run.conversion if run.conversion > 0 else math.nan
    if math.isnan(inertia) or math.isnan(lost) or not run.balance_known:
        return "why is not to be told, as the works or the loss drop are undefined"
    if inertia >= lost:
        evidence["inertia"] = inertia
        return f"inertia, the updates' own work is {number(inertia)} times that along the gradients"
    evidence["conversion"] = run.conversion
    share = "noise_share" if noise_leads(run) else "bouncing_share"
    evidence[share] = run.shares[share]
    taken = f"{number(evidence[share])} of the work"
    if share == "noise_share":
        return f"batch noise, {taken}, moved the weights too (conversion {number(run.conversion)})"
    return f"learning rate x curvature is of order 1, {taken} was bouncing (conversion {number(run.conversion)})"


def undefined(run: JudgedRun) -> list[Finding]:
    """The factors that are missing, with their reasons."""
    names = [n for n in ("conversion", "signal_fraction", "straightness", "steadiness") if not math.isfinite(run[n])]
    if names:
        evidence = {name: run[name] for name in names}
        told = "; ".join(f"{n} is undefined{_reason(run, n)}" for n in names)
        return [Finding("undefined", f"Not everything could be judged: {told}.", "", evidence)]
    if run["work_ito"] <= 0:
        evidence = {"work_ito": run["work_ito"]}
        sentence = f"Where the work went is not to be told: it is {number(run['work_ito'])}, not positive."
        return [Finding("undefined", sentence, "", evidence)]
    if run.uncertain:
        evidence = run.evidence("conversion", "conversion_se")
        sentence = (
            f"Where the work went is not to be told: the conversion {number(run.conversion)} has a standard error "
            f"of {number(run['conversion_se'])}, as the loss drop is uncertain."
        )
        return [Finding("undefined", sentence, MEASURE_LONGER, evidence)]
    return []


def _reason(run: JudgedRun, name: str) -> str:
    reason = run.record.reasons.get(name)
    return f" ({reason.rstrip('. ')})" if reason else ""


def nothing(run: JudgedRun) -> Finding:
    evidence = run.evidence("conversion", "straightness", "steadiness")
    sentence = (
        f"Nothing stands out: {number(run.conversion)} of the work lowered the loss (straightness "
        f"{number(run['straightness'])}, steadiness {number(run['steadiness'])})."
    )
    return Finding("nothing", sentence, "", evidence)
