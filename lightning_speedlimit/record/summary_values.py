"""The last word on a run: its figures, with their formulas and units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_NAN = float("nan")


@dataclass(frozen=True)
class SummaryValues:
    """Figures of a run; see `Summary`."""

    steps: int = 0
    """Step of the last row, steps."""
    samples: float = _NAN
    """Samples that these steps saw, all processes together."""
    tokens: float = _NAN
    """The same in tokens, where batches are of tokens."""
    epochs: float = _NAN
    """The same in passes over the training data."""
    seconds: float = _NAN
    """Wall-clock time since the start, validation included, s."""
    loss: float = _NAN
    """Loss at the last row, loss: L_K."""
    loss_se: float = _NAN
    """Standard error of `loss`, loss; with a probe that between its batches."""
    learning_rate: float = _NAN
    """Learning rate of the last step; it has the optimizer's own unit."""

    noise_share: float = _NAN
    """N/W, 1: the share of the work that updates did on the noise of their own batches, N = W − (2d − a) with
    W = work_ito, a = work_anti_ito, d = loss_drop of the run."""
    critical_batch_size: float = _NAN
    """B_c = tr Σ/‖F‖², samples (tokens, where these are counted): the batch whose noise is as large as the gradient.
    B·N/(2d − a) for SGD without momentum, else by the overlap of neighbouring gradients. Over the whole run."""
    step_headroom: float = _NAN
    """(2d − a)/2(d − a), 1: the multiple of the steps at which the loss would have fallen most, to second order."""
    noise_share_se: float = _NAN
    """Standard errors of these three, in their units."""
    critical_batch_size_se: float = _NAN
    step_headroom_se: float = _NAN

    efficiency: float = _NAN
    """η = Σ (Δθ_i)²/m_i / Q, 1: shortest time between two distributions of weights divided by the time taken,
    at the entropy production Q; m_i is the accumulated mobility. Without the random motion that batches cause it is
    between `efficiency_low` and this."""
    efficiency_low: float = _NAN
    """[Σ (Δθ_i)²/m_i − cN/K] / Q, 1: `efficiency` without all the random motion that the batches' noise could cause,
    N = W + a − 2d ≥ 0 with W = work_ito, a = work_anti_ito, d = loss_drop; c: steady over instantaneous response of the
    optimizer; K = (Σ lr)²/Σ lr². NaN but for SGD, Adam and AdamW."""
    efficiency_drift: float = _NAN
    """[Σ (Δθ_i)²/m_i − s cN/K] / Q, 1: an estimate between the two, with s ≤ 1 the share of the random motion that
    curvature leaves, ((1 + 3q)^⅔ − 1)/2q with q = 4K(1 + β)(d − a)/N, β the optimizer's memory. On the high side in
    long runs."""
    efficiency_action: float = _NAN
    """Σ (Δθ_i)²/m_i / work_action, 1: at most 1 for every run measured at every step."""
    efficiency_se: float = _NAN
    """Standard error of `efficiency`, 1."""
    efficiency_action_se: float = _NAN
    """Standard error of `efficiency_action`, 1."""

    kinematic_efficiency: float = _NAN
    """D²/(τA) = straightness × steadiness, 1: at most 1 for every run measured at every step."""
    kinematic_efficiency_se: float = _NAN
    """Standard error of `kinematic_efficiency`, 1: finite only where coordinates or steps were sampled."""
    straightness: float = _NAN
    """D²/ℓ², 1: 1 is a straight path; low: the path turns."""
    steadiness: float = _NAN
    """ℓ²/(τA), 1: 1 is constant speed; low: a burst, then a crawl."""
    speed_limit_time: float = _NAN
    """τ_SL = D²/A, clock: the same displacement on the same action took no less."""

    kinematic_efficiency_wasserstein2: float = _NAN
    """W²/(τA), 1, W = `wasserstein2`: at most `kinematic_efficiency`. τ times it is the least time, on the same
    action, of any dynamics that joins the same clouds of neurons, whichever neuron becomes which. NaN where either
    part is."""

    conversion: float = _NAN
    """loss_drop / work_ito, 1: low is work spent on gradient noise or bouncing; can exceed 1."""
    conversion_se: float = _NAN
    """Standard error of `conversion`, 1."""
    signal_fraction: float = _NAN
    """work_anti_ito / work_ito, 1: the share of the work that the next minibatch confirms; may be < 0."""

    displacement: float = _NAN
    """D = ‖Σ u_k‖, parameter: ‖θ_K − θ_0‖ where nothing but the steps moved the weights."""
    net_displacement: float = _NAN
    """‖θ_K − θ_0‖, parameter, whatever moved the weights."""
    wasserstein2: float = _NAN
    """W = √(Σ_layers N W₂² + Σ (Δθ_i)² of what is in no cloud), parameter: D up to a relabelling of each layer's N
    neurons; W₂² is between their clouds at the start and now, per neuron. At most D, and never below W₂ itself.
    NaN without `clouds="neurons"`, within an epoch, and where D is."""
    wasserstein2_lower: float = _NAN
    """The same from certified lower bounds of W₂², parameter: W₂ itself lies in [wasserstein2_lower, wasserstein2]."""
    identity_excess: float = _NAN
    """D²/W² − 1 over the same parameters, 1: 0 where no relabelling shortens the displacement, as in lazy training;
    larger where neurons changed places, as in feature learning. NaN where W is, and where only W is 0."""
    path_length: float = _NAN
    """ℓ = Σ ‖u_k‖, parameter."""
    action: float = _NAN
    """A = Σ ‖u_k‖²/Δ_k, parameter²/clock."""
    elapsed: float = _NAN
    """τ = Σ Δ_k, clock."""
    step_norm: float = _NAN
    """‖u_k‖ of the last step, parameter."""

    loss_drop: float = _NAN
    """L_0 − L_K, loss."""
    loss_drop_se: float = _NAN
    """Standard error of `loss_drop`, loss."""
    entropy_production: float = _NAN
    """Q, temperature × entropy production by the chosen estimator, loss."""
    work_ito: float = _NAN
    """Σ f_k·u_k, loss: also counts the gradient noise."""
    work_stratonovich: float = _NAN
    """½ Σ (f_k + f_{k+1})·u_k, loss: counts half of the noise."""
    work_anti_ito: float = _NAN
    """Σ f_{k+1}·u_k, loss: counts no noise of batch k where batches are independent."""
    work_decay: float = _NAN
    """Σ f_k·v_k with v_k = −lr w θ_k, loss: what decoupled weight decay took off the loss; 0 without it."""
    work_action: float = _NAN
    """Σ_k Σ_i u_{k,i}²/μ_{k,i}, loss: the Q for which efficiency ≤ 1 is a theorem."""

    grad_norm: float = _NAN
    """‖g_k‖ of the last step before clipping, loss/parameter."""
    grad_norm_clipped: float = _NAN
    """‖g_k‖ of the last step as the optimizer got it, loss/parameter."""

    efficiency_low_se: float = _NAN
    """Standard errors, in the units of their values; those from `straightness_se` on are finite only where coordinates
    or steps were sampled."""
    efficiency_drift_se: float = _NAN
    straightness_se: float = _NAN
    steadiness_se: float = _NAN
    speed_limit_time_se: float = _NAN
    signal_fraction_se: float = _NAN
    displacement_se: float = _NAN
    net_displacement_se: float = _NAN
    path_length_se: float = _NAN
    action_se: float = _NAN
    step_norm_se: float = _NAN
    entropy_production_se: float = _NAN
    work_ito_se: float = _NAN
    work_stratonovich_se: float = _NAN
    work_anti_ito_se: float = _NAN
    work_action_se: float = _NAN
    work_decay_se: float = _NAN
    grad_norm_se: float = _NAN
    grad_norm_clipped_se: float = _NAN

    reasons: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Name → why its value is NaN, or what to beware of."""
    run: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)
    """What was run, as the record holds it."""
