"""From sums on the host to the numbers that a user sees, each with the reason where it is undefined."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_speedlimit.trajectory.losses import LossDrop

Estimator = Literal["loss_drop", "ito", "stratonovich", "anti_ito", "action"]
Kind = Literal["scalar", "diagonal", "effective"]
NAN = math.nan


@dataclass(frozen=True)
class SectionTotals:
    """Sums over the run of one section; see `bank.SUMS`. Squares in parameter², works in loss units.

    weighted: Σ (Δθ_i)²/m_i. noise_gain: c, steady over instantaneous response (NaN where unknown).
    """

    layer: str
    kind: Kind
    sums: dict[str, float]
    displacement_squared: float
    free_displacement_squared: float
    weighted: float
    noise_gain: float

    def numerator(self, steps: float) -> float:
        """Σ (Δθ_i)²/m_i; an effective mobility Σ‖u‖²/work_ito has m = steps × it. NaN where work_ito ≤ 0."""
        if self.kind != "effective":
            return self.weighted
        work, squares = self.sums["work_ito"], self.sums["free_squares"]
        if squares == 0.0:
            return 0.0
        return ratio(self.free_displacement_squared * work, steps * squares) if work > 0 else NAN

    def plus(self, other: SectionTotals) -> SectionTotals:
        """Both as one section: of one group and layer, met by the same gradients."""
        sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return replace(
            self,
            sums=sums | {"noise_weight": self.sums["noise_weight"]},
            displacement_squared=self.displacement_squared + other.displacement_squared,
            free_displacement_squared=self.free_displacement_squared + other.free_displacement_squared,
            weighted=self.weighted + other.weighted,
        )

    @property
    def work_action(self) -> float:
        """Σ u²/μ, which is work_ito where μ is the effective one."""
        return self.sums["work_ito"] if self.kind == "effective" else self.sums["work_action"]

    @property
    def noise(self) -> float:
        """N = c Σ lr_k n_k / Σ lr_k, with Σ n_k clamped to [0, work_ito]."""
        raw = self.sums["work_ito_met"] - self.sums["work_anti_ito"]
        if raw <= 0.0 or self.sums["noise_weight"] <= 0.0:
            return NAN if math.isnan(raw) else 0.0
        clamped = min(raw, max(0.0, self.sums["work_ito"]))
        return self.noise_gain * max(0.0, self.sums["noise"]) / self.sums["noise_weight"] * clamped / raw


@dataclass(frozen=True)
class RunTotals:
    """What a measurement knows on the host.

    steps: K, joint steps. measured: those measured. elapsed: τ on the chosen clock. action, path_length: of the
    whole parameter vector, scaled to all steps. sampling_se: standard errors of sums that were sampled.
    """

    sections: list[SectionTotals]
    steps: float
    measured: float
    elapsed: float
    path_length: float
    action: float
    loss: LossDrop | None
    gradient_norm: float
    clipped_norm: float
    step_norm: float
    learning_rate: float
    unknown_moves: int = 0
    silent_moves: bool = False
    uneven_clipping: bool = False
    lost: tuple[str, ...] = ()  # what cannot be known since the measurement was resumed without it
    no_formula: tuple[str, ...] = ()
    sampling_se: dict[str, float] = field(default_factory=dict)
    coarse_mobility: bool = False  # so many additions to float32 numbers that their rounding shows
    no_loss: str = ""  # why there is none, where it is not for want of recording
    no_path: str = ""  # why the path length is unknown


def ratio(numerator: float, denominator: float) -> float:
    """x/y; NaN for 0/0 and for x/0."""
    return numerator / denominator if denominator != 0.0 else NAN


class Estimates:
    """All numbers of a run, `values`, and `reasons` for those that are NaN or need a warning."""

    def __init__(self, run: RunTotals, estimator: Estimator) -> None:
        self.run, self.estimator = run, estimator
        self.values: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        self._kinematic()
        self._works()
        if run.uneven_clipping:
            self._drop_works()
        self._efficiencies()
        self._standard_errors()
        self._non_finite()

    def _total(self, name: str) -> float:
        return math.fsum(section.sums[name] for section in self.run.sections)

    def _kinematic(self) -> None:
        """D, ℓ, A; straightness D²/ℓ², steadiness ℓ²/(τA), their product, τ_SL = D²/A."""
        run, values = self.run, self.values
        squared = math.fsum(s.displacement_squared for s in run.sections)
        squared = NAN if self._unknown_displacement() else squared
        path, action, elapsed = run.path_length, run.action, run.elapsed
        values |= {
            "displacement": math.sqrt(squared),
            "path_length": path,
            "action": action,
            "elapsed": elapsed,
            "straightness": ratio(squared, path**2),
            "steadiness": ratio(path**2, elapsed * action),
            "kinematic_efficiency": ratio(squared, elapsed * action),
            "speed_limit_time": ratio(squared, action),
            "grad_norm": run.gradient_norm,
            "grad_norm_clipped": run.clipped_norm,
            "step_norm": run.step_norm,
            "learning_rate": run.learning_rate,
        }
        if run.no_path:
            for name in ("path_length", "straightness", "steadiness"):
                self.reasons[name] = run.no_path
        if path == 0.0:
            for name in ("straightness", "steadiness", "kinematic_efficiency", "speed_limit_time"):
                self.reasons[name] = "the weights have not moved"
        if math.isnan(elapsed):
            for name in ("elapsed", "action", "steadiness", "kinematic_efficiency", "speed_limit_time"):
                self.reasons[name] = (
                    'the clock "lr" needs one learning rate for all parameter groups, got several; use clock="steps"'
                )
        elif math.isnan(action) and math.isfinite(path):
            for name in ("action", "steadiness", "kinematic_efficiency", "speed_limit_time"):
                self.reasons[name] = 'weights moved in a step whose learning rate was 0; use clock="steps"'

    def _unknown_displacement(self) -> bool:
        run = self.run
        why = None
        if run.lost:
            why = f"unknown since the run was resumed without {', '.join(run.lost)}"
        elif run.unknown_moves:
            why = (
                f"weights were moved outside of optimizer.step {run.unknown_moves} times by an unknown amount "
                "(clamping, averaging or loading weights between steps)"
            )
        elif run.silent_moves:
            why = "weights are moved outside of optimizer.step through .data, which leaves no trace to follow"
        for name in (
            "displacement",
            "straightness",
            "kinematic_efficiency",
            "speed_limit_time",
            "efficiency",
            "efficiency_lower",
            "efficiency_action",
        ):
            if why:
                self.reasons[name] = why
        return why is not None

    def _works(self) -> None:
        """The estimates of Q (loss units), conversion = loss_drop/work_ito, signal = anti_ito/ito."""
        values, loss = self.values, self.run.loss
        values |= {name: self._total(name) for name in ("work_ito", "work_anti_ito")}
        met = self._total("work_ito_met")
        values["work_stratonovich"] = 0.5 * (met + values["work_anti_ito"])
        if met == 0.0:
            values["work_anti_ito"] = values["work_stratonovich"] = NAN
            for name in ("work_anti_ito", "work_stratonovich", "signal_fraction"):
                self.reasons[name] = "no step has met the next gradient yet"
        values["work_action"] = math.fsum(s.work_action for s in self.run.sections)
        values["loss_drop"] = NAN if loss is None else loss.value + self._total("l2_drop")
        values["loss_drop_se"] = NAN if loss is None else loss.standard_error
        values["loss"] = NAN if loss is None else loss.last
        values["loss_se"] = NAN if loss is None else loss.last_error
        if loss is None:
            for name in ("loss_drop", "loss", "conversion"):
                self.reasons[name] = self.run.no_loss or "no loss was recorded"
        elif math.isnan(loss.value):
            for name in ("loss_drop", "loss", "conversion"):
                self.reasons[name] = "a recorded loss is not finite"
        if values["work_ito"] == 0.0:
            self.reasons.setdefault("conversion", "no work was done: the weights have not moved")
        values["conversion"] = ratio(values["loss_drop"], values["work_ito"])
        values["signal_fraction"] = ratio(values["work_anti_ito"], met)

    def _drop_works(self) -> None:
        """Without the raw gradient, works are known only where clipping was by one factor."""
        for name in ("work_ito", "work_anti_ito", "work_stratonovich", "work_action", "conversion", "signal_fraction"):
            self.values[name] = NAN
            self.reasons[name] = (
                "gradients were changed by more than one factor before the step (clipped by value, or module by "
                "module); TrajectoryMeter(keep_raw_gradient=True) measures that, and in Lightning clipping in "
                "configure_gradient_clipping"
            )

    def _efficiencies(self) -> None:
        """η = Σ (Δθ_i)²/m_i / Q; its lower end with the diffusion taken out; with Q = work_action, ≤ 1."""
        values, run = self.values, self.run
        name = "loss_drop" if self.estimator == "loss_drop" else f"work_{self.estimator}"
        produced = values["entropy_production"] = values[name]
        if name in self.reasons:
            self.reasons["entropy_production"] = self.reasons[name]
        numerator = math.fsum(section.numerator(run.steps) for section in run.sections)
        if "displacement" in self.reasons or run.uneven_clipping:
            numerator = NAN
        noise = math.fsum(section.noise for section in run.sections)
        values["efficiency"] = ratio(numerator, produced)
        values["efficiency_lower"] = ratio(numerator - noise, produced)
        values["efficiency_action"] = ratio(numerator, values["work_action"])
        self._undefined_efficiency(produced, name)

    def _undefined_efficiency(self, produced: float, name: str) -> None:
        values, reasons = self.values, self.reasons
        why: str | None = None
        se = values["loss_drop_se"]
        if math.isnan(produced):
            why = reasons.get(name, f"{name} is not finite")
        elif self.estimator == "loss_drop" and math.isfinite(se) and produced < 2.0 * se:
            why = f"the loss drop, {produced:.3g}, is below two of its standard errors ({se:.3g} each)"
        elif produced <= 0.0:
            why = f"{name} is not positive ({produced:.3g}): there is no entropy production to divide by"
        if why is not None:
            for key in ("efficiency", "efficiency_lower"):
                values[key] = NAN
                reasons.setdefault(key, why)
        if any(s.kind == "effective" and not s.sums["work_ito"] > 0.0 for s in self.run.sections):
            for key in ("efficiency", "efficiency_lower", "efficiency_action"):
                reasons.setdefault(key, "an effective mobility needs positive work_ito")
        if math.isnan(values["efficiency_lower"]):
            unknown = ", ".join(self.run.no_formula)
            reasons.setdefault("efficiency_lower", f"the noise's share is unknown for {unknown or 'this run'}")
        self._caveats()
        if self.run.uneven_clipping:
            for key in ("efficiency", "efficiency_lower", "efficiency_action"):
                reasons[key] = reasons["work_ito"]
        if math.isinf(values["work_action"]):
            values["efficiency_action"] = NAN
            reasons["efficiency_action"] = "weights moved in a step whose gradient was clipped to 0"
        if values["work_action"] == 0.0:
            reasons.setdefault("efficiency_action", "the weights have not moved")

    def _caveats(self) -> None:
        """What to know of a defined efficiency: an effective mobility; curvature that passed for noise.

        To second order in the step n = (f_k − f_{k+1})·u_k is batch noise + u·H·u, and loss_drop − work_anti_ito
        is half of u·H·u.
        """
        values, reasons = self.values, self.reasons
        for name in ("efficiency", "efficiency_lower", "efficiency_action"):
            if self.run.coarse_mobility:
                reasons.setdefault(
                    name,
                    "the accumulated mobility is float32: after 2·10⁶ steps each addition may be off by an eighth of "
                    "itself, after 1.7·10⁷ it may stop growing and the efficiency is too large",
                )
        if math.isfinite(values["efficiency"]) and any(s.kind == "effective" for s in self.run.sections):
            names = ", ".join(self.run.no_formula) or "clipping by value"
            reasons.setdefault(
                "efficiency", f"with the effective mobility of {names}: kinematic efficiency / conversion"
            )
        taken = self._total("work_ito_met") - values["work_anti_ito"]
        curvature = ratio(2.0 * (values["loss_drop"] - values["work_anti_ito"]), taken)
        lowered = values["efficiency_lower"] < values["efficiency"]
        if lowered and curvature > 0.5:
            reasons.setdefault(
                "efficiency_lower",
                "a loose end: more than half of what was taken out as noise is curvature (bouncing)",
            )

    def _standard_errors(self) -> None:
        """Of the estimated values: from the loss windows, and from sampled steps."""
        values, sampled = self.values, self.run.sampling_se
        se = values["loss_drop_se"]
        relative = abs(ratio(se, values["loss_drop"]))
        values["conversion_se"] = abs(values["conversion"]) * relative
        values["efficiency_se"] = abs(values["efficiency"]) * relative if self.estimator == "loss_drop" else NAN
        if not sampled:
            return
        action, path = (
            ratio(sampled["action"], values["action"]),
            ratio(sampled["path_length"], values["path_length"]),
        )
        work = ratio(sampled["work_action"], values["work_action"])
        values |= {
            "action_se": sampled["action"],
            "path_length_se": sampled["path_length"],
            "work_ito_se": sampled["work_ito"],
            "work_action_se": sampled["work_action"],
            "kinematic_efficiency_se": abs(values["kinematic_efficiency"] * action),
            "straightness_se": abs(2.0 * values["straightness"] * path),
            "efficiency_action_se": abs(values["efficiency_action"] * work),
        }

    def _non_finite(self) -> None:
        """Every other NaN or infinity comes from gradients, losses or weights that were not finite."""
        unmeasured = self.run.measured == 0
        for name, value in self.values.items():
            if unmeasured and math.isnan(value):
                self.reasons.setdefault(name, "no step has been measured yet")
            elif not math.isfinite(value) and not name.endswith("_se") and name not in self.reasons:
                self.reasons[name] = "a gradient, a loss or a weight was not finite"
