"""Findings on what a loss did as time went: it ran away, it stopped falling; and on clipped gradients."""

from __future__ import annotations

import math

from lightning_speedlimit.report.alignment import SURE
from lightning_speedlimit.report.findings import Finding, JudgedRun
from lightning_speedlimit.words import number

_ROUNDING = 1e-12  # of a loss, to which its drop since the start is known, and so is the start
MEASURE_LONGER = "Measure longer, or the loss with probe_batches=4."
MOSTLY = 0.5  # of the log steps, from which on clipping is worth a finding: a convention
_SMALLER = "Try a quarter of the learning rate: it cured 9 of 9 runs that had run away."  # docs/tuning.md
_SMALLER_OR_DATA = f"{_SMALLER[:-1]}; a value in the data that is not finite does it too."


def rose(run: JudgedRun) -> list[Finding]:
    """A loss that ran away: its start and end where the rows tell them, else that the conversion is clearly below 0."""
    found = run.divergence
    if found is None:
        return _rose_by_conversion(run)
    step = found.step if found.lost is None else found.lost.by
    evidence = {"step": float(step)}
    if math.isfinite(found.start) and not abs(found.start) < _ROUNDING * abs(found.loss):
        evidence["loss_start"] = found.start
        evidence |= {"loss_start_se": found.start_error} if found.start_error > 0 else {}
    rates = run.until("learning_rate", step)
    where = ""
    if len(rates) and math.isfinite(rates[-1]):
        evidence["learning_rate"] = float(rates[-1])
        where = f", where the learning rate was {number(rates[-1])}"
    start = number(found.start) + (f" +/- {number(found.start_error)}" if found.start_error > 0 else "")
    if found.lost is not None:
        evidence["last_finite_step"] = float(found.lost.after)
        told = f"; it began at {start}" if "loss_start" in evidence else ""
        sentence = f"{found.lost.sentence[0].upper()}{found.lost.sentence[1:]}{where}{told}."
        return [Finding("divergence", sentence, _SMALLER_OR_DATA, evidence)]
    if found.loss - found.start > SURE * found.error:
        evidence["loss"] = found.loss
        began = f"from {start} " if "loss_start" in evidence else ""  # rounded off beside the last
        sentence = (
            f"The loss rose {began}to {number(found.loss)}: it is beyond its start from step {found.step} on{where}."
        )
    elif found.work > max(abs(found.loss), found.error):
        evidence = {name: evidence[name] for name in ("step", "learning_rate") if name in evidence}
        evidence |= {"work_per_step": found.work, "loss": found.loss}
        sentence = (
            f"The loss ran away from step {found.step} on{where}: a step's work along its gradient is "
            f"{number(found.work)} in the mean, and the loss {number(found.loss)}."
        )
    else:
        evidence["loss_se"] = found.error
        sentence = (
            f"The loss ran away from step {found.step} on{where}: it scatters so that it is known to "
            f"{number(found.error)} alone, and it began at {start}."
        )
    return [Finding("divergence", sentence, _SMALLER, evidence)]


def no_clear_fall(run: JudgedRun) -> list[Finding]:
    """A loss drop below 3 of its standard errors: what the work went into, and a larger batch, is no matter then."""
    if run.clearly_fell:
        return []
    drop, error = number(run["loss_drop"]), number(run["loss_drop_se"])
    sentence = f"No clear drop in loss: {drop} +/- {error}."
    return [Finding("no clear fall", sentence, MEASURE_LONGER, run.evidence("loss_drop", "loss_drop_se"))]


def _rose_by_conversion(run: JudgedRun) -> list[Finding]:
    if not run.conversion + SURE * _known(run["conversion_se"]) < 0:
        return []
    sentence = f"The loss rose: the conversion is {number(run.conversion)}."
    return [Finding("divergence", sentence, _SMALLER, run.evidence("conversion"))]


def plateaued(run: JudgedRun) -> list[tuple[float, Finding]]:
    """Steps in which the loss did not fall: the time was K/k of what it had taken to get there."""
    found = run.plateau
    if found is None:
        return []
    last = float(run.record.columns["step"][run.record.columns["step"] <= run.step][-1])
    evidence = {"step": float(found.step), "steps_since": last - found.step}
    kept = run.rate_kept(found.step)
    rate = ""
    if math.isfinite(kept):
        evidence["rate_kept"] = kept
        rate = f", with the learning rate at {number(kept)} of its largest"
    evidence |= {"fall": found.fall, "fall_se": found.error, "drop": found.drop}
    sentence = (
        f"The loss stopped falling at step {found.step}{rate}: in the {last - found.step:.0f} steps since it fell by "
        f"{number(found.fall)} +/- {number(found.error)}, of {number(found.drop)} in all."
    )
    return [(math.log(last / found.step), Finding("plateau", sentence, "", evidence))]


def clipping(run: JudgedRun) -> list[Finding]:
    """Most gradients were clipped: the threshold sets how long they are."""
    found = run.clipped
    if found is None or found.share < MOSTLY:
        return []
    sentence = (
        f"Gradients were clipped at {number(found.share)} of the log steps, to {number(found.kept)} of their length "
        "in the median: there the threshold sets how long they are."
    )
    return [Finding("clipping", sentence, "", {"clipped_share": found.share, "length_kept": found.kept})]


def _known(error: float) -> float:
    return 0.0 if math.isnan(error) else error
