"""From sums on the host to the numbers that a user sees, each with the reason where it is undefined."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np

from lightning_speedlimit.trajectory.random_motion import random_motion
from lightning_speedlimit.trajectory.run_totals import NAN, SHIFT, Numbers, RunTotals, added, ratio

Estimator = Literal["loss_drop", "ito", "stratonovich", "anti_ito", "action"]


class Estimates:
    """All numbers of a run, `values`, and `reasons` for those that are NaN or need a warning."""

    @np.errstate(all="ignore")  # what is not finite is NaN, with its reason
    def __init__(self, run: RunTotals, estimator: Estimator) -> None:
        self.run, self.estimator = run.merged(), estimator
        self.reasons: dict[str, str] = {}
        self.values = {name: float(value) for name, value in estimates(self.run, estimator).items()}
        self._kinematic()
        self._works()
        self._efficiencies()
        self._standard_errors()
        self._non_finite()

    def _say(self, names: Iterable[str], why: str) -> None:
        for name in names:
            self.reasons.setdefault(name, why)

    def _kinematic(self) -> None:
        run, values = self.run, self.values
        if run.no_path:
            self._say(("path_length", "straightness", "steadiness"), run.no_path)
        if values["action"] == 0.0:
            self._say(_RATIOS, "the weights have not moved")
        if run.single and run.sum("displacement_squared") > 0.0 and run.sum("squares") < self._least:
            lost = ("path_length", "action", *_RATIOS, "step_norm", *WORKS)
            self._drop(lost, "updates are so small that their squares are lost in float32's range")
        timed = ("action", "steadiness", "kinematic_efficiency", "speed_limit_time")
        if math.isnan(run.elapsed):
            why = 'the clock "lr" needs one learning rate for all parameter groups, got several; use clock="steps"'
            self._say(("elapsed", *timed), why)
        elif run.per_rate and math.isnan(values["action"]) and math.isfinite(run.sum("squares")):
            self._say(timed, 'weights moved in a step whose learning rate was 0; use clock="steps"')
        if run.moved > NOTICED * run.sum("path_length"):
            self.reasons["displacement"] = (
                f"weights were moved outside of optimizer.step before {run.moves:.0f} steps, by {run.moved:.3g} in all "
                f"(root sum of squares): the displacement, {values['displacement']:.3g}, is of the steps alone"
            )
            if run.unkept:
                self._drop(("net_displacement",), "weights were moved through .data on a device: that leaves no mark")
            else:
                self.reasons["displacement"] += f"; from the first weights to the last {values['net_displacement']:.3g}"

    def _works(self) -> None:
        run, values = self.run, self.values
        if run.sum("work_met") == 0.0 and run.sum("work_anti_ito") == 0.0:
            unmet = ("work_anti_ito", "work_stratonovich", "signal_fraction", *WITHOUT_RANDOM_MOTION)
            values |= dict.fromkeys(unmet, NAN)
            self._say(unmet, "no step has met the next gradient yet")
        if values["gradient_signal"] == 0.0 and values["gradient_noise"] == 0.0:
            values |= dict.fromkeys(GRADIENTS, NAN)
            self._say(GRADIENTS, "no gradient has met the one before it" if run.overlaps else _BY_WORKS)
        if run.loss is None:
            self._say(("loss_drop", "loss", "conversion"), run.no_loss or "no loss was recorded")
        elif math.isnan(run.loss.value):
            self._say(("loss_drop", "loss", "conversion"), "a recorded loss is not finite")
        if run.no_work:
            self._drop(WORKS, run.no_work)
        for name in ("work_ito", "work_action"):
            if name in self.reasons:
                continue
            if run.single and values["action"] > 0.0 and 0.0 < abs(values[name]) < self._least:
                self._drop(WORKS, f"{name} is {values[name]:.1g}: products of so small numbers are lost in float32")
            elif run.single and values["action"] > 0.0 and values[name] == 0.0 and run.step_norm < _SMALL:
                self._drop(WORKS, f"{name} is 0: products of updates of {run.step_norm:.1g} are lost in float32")
        if values["work_ito"] == 0.0:
            self._say(("conversion",), "no work was done: the weights have not moved")

    @property
    def _least(self) -> float:
        """Below it as much may have been lost to float32's smallest number in all coordinates and steps."""
        return 100.0 * _TINY * max(1.0, self.run.coordinates) * max(1.0, self.run.measured)

    def _drop(self, names: Iterable[str], why: str) -> None:
        for name in names:
            self.values[name] = NAN
            self.reasons[name] = why

    def _efficiencies(self) -> None:
        values, reasons = self.values, self.reasons
        name = _production(self.estimator)
        produced = values["entropy_production"] = values[name]
        if name in reasons:
            reasons["entropy_production"] = reasons[name]
        se = values["loss_drop_se"]
        why: str | None = None
        if math.isnan(produced):
            why = reasons.get(name, f"{name} is not finite")
        elif self.estimator == "loss_drop" and math.isfinite(se) and produced < 2.0 * se:
            why = f"the loss drop, {produced:.3g}, is below two of its standard errors ({se:.3g} each)"
        elif produced <= 0.0:
            why = f"{name} is not positive ({produced:.3g}): there is no entropy production to divide by"
        if why is not None:
            values |= dict.fromkeys(EFFICIENCIES, NAN)
            self._say(EFFICIENCIES, why)
        if any(s.effective and not s.sums["work_ito"] > 0.0 for s in self.run.sections):
            self._say((*EFFICIENCIES, "efficiency_action"), "an effective mobility needs positive work_ito")
        if math.isnan(values["efficiency_low"]):
            why = "the random motion is known of SGD, Adam and AdamW alone, where their mobility is"
            if math.isnan(values["loss_drop"]):
                why = f"the noise in the work is told by the loss drop: {reasons.get('loss_drop', 'it is NaN')}"
            self._say(WITHOUT_RANDOM_MOTION, why)
        if math.isfinite(values["efficiency"]) and any(s.effective for s in self.run.sections):
            names = ", ".join(self.run.no_formula) or "clipping by value"
            self._say(("efficiency",), f"with the effective mobility of {names}: kinematic efficiency / conversion")
        if not math.isfinite(values["work_action"]) and math.isfinite(values["work_ito"]):
            self._drop(("work_action", "efficiency_action"), "weights moved in a step whose gradient was clipped to 0")
        if values["work_action"] == 0.0:
            self._say(("efficiency_action",), "the weights have not moved")

    def _standard_errors(self) -> None:
        """√Σ over the errors' directions of the change of each value: linearised, by central differences."""
        run, values = self.run, self.values
        names = [name for name in values if name not in _WITHOUT_ERRORS]
        if not run.sampled:
            names = ["conversion", *EFFICIENCIES]
        variances = dict.fromkeys(names, 0.0)
        for shifted in run.shifted():
            found = estimates(shifted, self.estimator)
            for name in names:
                if np.ndim(found[name]):  # else it does not depend on what is shifted
                    change = (found[name][0] - found[name][1]) / (2.0 * SHIFT)
                    variances[name] += float(change @ change)
        for name in names:
            known = math.isfinite(values[name]) and not (run.sampled and run.unspread)
            values[f"{name}_se"] = math.sqrt(variances[name]) if known else NAN
        if run.sampled and values["work_decay"] == 0.0:
            values["work_decay_se"] = 0.0  # not even by rounding
        if not run.sampled and self.estimator != "loss_drop":
            values["efficiency_se"] = NAN

    def _non_finite(self) -> None:
        """Every other NaN or infinity comes from gradients, losses or weights that were not finite."""
        unmeasured = self.run.measured == 0
        for name, value in self.values.items():
            if math.isinf(value):
                self.values[name] = NAN
            if unmeasured and math.isnan(value):
                self._say((name,), "no step has been measured yet")
            elif self.run.coordinates == 0.0 and math.isnan(value):
                self._say((name,), "no parameter of the optimizers has required gradients: none is measured")
            elif not math.isfinite(value) and not name.endswith("_se"):
                self._say((name,), "a gradient, a loss or a weight was not finite, or beyond the range of its products")


_BY_WORKS = "of SGD without momentum the works tell the signal and the noise of gradients"
NOTICED = 1e-6  # of the path length: moves below are rounding
_TINY = 2.0**-166  # float32's smallest normal number over the scale of its products
_SMALL = 1e-22  # well above the square root of it
_RATIOS = ("straightness", "steadiness", "kinematic_efficiency", "speed_limit_time")
WITHOUT_RANDOM_MOTION = ("efficiency_low", "efficiency_drift")
EFFICIENCIES = ("efficiency", *WITHOUT_RANDOM_MOTION)
_WORK = ("work_ito", "work_anti_ito", "work_stratonovich", "work_action")
WORKS = (*_WORK, "conversion", "signal_fraction", *EFFICIENCIES, "efficiency_action")
GRADIENTS = ("gradient_signal", "gradient_noise")
_WITHOUT_ERRORS = ("elapsed", "learning_rate", "moved_outside", "loss_drop", "loss_drop_se", "loss", "loss_se")


def estimates(run: RunTotals, estimator: Estimator) -> dict[str, Numbers]:
    """The numbers of a run by their definitions, whether they mean something there or not.

    D, ℓ, A; straightness D²/ℓ², steadiness ℓ²/(τA), their product, τ_SL = D²/A; the estimates of Q;
    Σ g_k·g_{k−1} and Σ (‖g_k‖² − g_k·g_{k−1}); conversion = loss_drop/work_ito, signal = anti_ito/ito;
    η = Σ (Δθ_i)²/m_i / Q; its low end and the drift's estimate, with random motion taken out; and with Q = work_action,
    ≤ 1.
    """
    loss, elapsed, path, squared = run.loss, run.elapsed, run.path_length, run.sum("displacement_squared")
    action = run.sum("action" if run.per_rate else "squares") if not math.isnan(elapsed) else NAN
    ito, met, anti = (run.sum(name) for name in ("work_ito", "work_met", "work_anti_ito"))
    drop = NAN if loss is None else loss.value + run.sum("l2_drop")
    work_action = added(s.work_action for s in run.sections)
    numerator = added(s.numerator(run.steps) for s in run.sections)
    most, left = random_motion(run, drop)
    values = {
        "work_ito": ito,
        "work_anti_ito": anti,
        "work_stratonovich": 0.5 * (met + anti),
        "work_action": work_action,
        "work_decay": run.sum("work_decay"),
        "gradient_signal": run.sum("gradient_signal"),
        "gradient_noise": run.sum("gradient_noise"),
        "displacement": np.sqrt(squared),
        "net_displacement": np.sqrt(run.sum("net_squared")),
        "path_length": path,
        "action": action,
        "elapsed": elapsed,
        "straightness": ratio(squared, path * path),
        "steadiness": ratio(path * path, elapsed * action),
        "kinematic_efficiency": ratio(squared, elapsed * action),
        "speed_limit_time": ratio(squared, action),
        "grad_norm": run.gradient_norm,
        "grad_norm_clipped": run.clipped_norm,
        "step_norm": run.step_norm,
        "learning_rate": run.learning_rate,
        "moved_outside": run.moved,
        "loss_drop": drop,
        "loss_drop_se": NAN if loss is None else loss.standard_error,
        "loss": NAN if loss is None else loss.last,
        "loss_se": NAN if loss is None else loss.last_error,
        "conversion": ratio(drop, ito),
        "signal_fraction": ratio(anti, met),
    }
    produced = values[_production(estimator)]
    return values | {
        "entropy_production": produced,
        "efficiency": ratio(numerator, produced),
        "efficiency_low": ratio(numerator - most, produced),
        "efficiency_drift": ratio(numerator - left, produced),
        "efficiency_action": ratio(numerator, work_action),
    }


def _production(estimator: Estimator) -> str:
    """The value that is Q."""
    return estimator if estimator == "loss_drop" else f"work_{estimator}"


LAYER_VALUES = (
    "displacement",
    "path_length",
    "action",
    "straightness",
    "steadiness",
    "kinematic_efficiency",
    "efficiency_action",
    "signal_fraction",
    "work_ito",
)


def of_layers(run: RunTotals, estimator: Estimator) -> dict[str, dict[str, float]]:
    """LAYER_VALUES of each layer, by its name."""
    found: dict[str, dict[str, float]] = {}
    for name in sorted({section.layer for section in run.sections}):
        values = Estimates(run.layer(name), estimator).values
        found[name] = {key: values[key] for key in LAYER_VALUES}
    return found
