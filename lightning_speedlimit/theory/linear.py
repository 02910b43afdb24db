"""Linear regression and the linear perceptron: closed forms straight from the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_speedlimit.checks.tensors import Reduction, Values, finite, loss_factor, nonnegative
from lightning_speedlimit.theory.curve import Curve
from lightning_speedlimit.theory.diffusion import langevin
from lightning_speedlimit.theory.flow import gradient_flow


def linear_regression(
    inputs: Tensor,
    targets: Tensor,
    times: Values,
    *,
    weights: Tensor | None = None,
    std: float = 0.0,
    reduction: Reduction = "sum",
) -> Curve:
    """Gradient flow on ½‖Xw − y‖²: `gradient_flow` with λ = σ², r² = (Uᵀ(X⟨w_0⟩ − y))² + σ² s², X = U diag(σ) Vᵀ.

    The map w_0 → w_t is the gradient of a convex function, so pairing each start with its own end is the optimal
    transport, and W₂² holds for every distribution of w_0 with this mean and covariance s²·1.

    Args:
        inputs: X (N, d); a bias is a column of ones.
        targets: y (N,) or (N, C).
        times: any shape, ≥ 0.
        weights: mean of w_0, (d,) or (d, C) as the targets; None: 0.
        std: s ≥ 0 of each weight around it, independent. 0: one run.
        reduction: "sum", or "mean" for `nn.MSELoss` over N·C residuals (loss and time in its units).

    Returns:
        the curve; NaN efficiency where nothing moves (the start fits all that inputs can reach: where it does so
        up to float64's rounding, 1e-16 of the targets, the curve is that of the rounding).

    Raises:
        TypeError, ValueError: shapes that do not fit, complex, empty or non-finite values, negative std or times.

    Source: arXiv:2307.14653, linear regression.
    """
    data = _Regression.of(inputs, targets, weights, reduction)
    strength = data.residual.square().sum(1) + data.outputs * (data.singular * nonnegative("std", std)).square()
    return gradient_flow(data.singular.square(), strength.sqrt(), times)


def perceptron(
    inputs: Tensor,
    targets: Tensor,
    times: Values,
    *,
    weights: Tensor | None = None,
    std: float = 0.0,
    temperature: float = 0.0,
    weight_decay: float = 0.0,
    reduction: Reduction = "sum",
) -> Curve:
    """`langevin` on ½‖Xw/√d − y‖² + ½ κ‖w‖²: h = σ²/d + κ, and h = κ in the directions that no input has.

    One linear unit x·w/√d trained with white noise of temperature T from Gaussian weights: the paper's Langevin
    setting, at every time (the factor 1/√d and κ are conventions of this function). T = 0, κ = 0 is
    `linear_regression` on X/√d.

    Args:
        inputs: X (N, d).
        targets: y (N,): labels ±1, a teacher's outputs, any numbers.
        times: any shape, ≥ 0.
        weights: mean of w_0, (d,); None: 0.
        std: s ≥ 0 of each weight around it, independent Gaussians. 0 at T > 0: efficiency 0, see `langevin`.
        temperature: T ≥ 0, loss units.
        weight_decay: κ ≥ 0, inside the gradient, loss/parameter². Without it directions that no input has
            diffuse freely.
        reduction: "sum", or "mean" for `nn.MSELoss` over N residuals; the weight decay's term is not divided.

    Returns:
        the curve, NaN efficiency as in `langevin`.

    Raises:
        TypeError, ValueError: as `linear_regression`, and for negative temperature or weight_decay.

    Source: arXiv:2307.14653, linear regression under Langevin dynamics.
    """
    inputs, targets = finite("inputs", inputs), finite("targets", targets)
    if targets.ndim != 1:
        raise ValueError(f"targets must have shape (N,), got {tuple(targets.shape)}; a perceptron has one output")
    width = max(1, inputs.shape[-1]) if inputs.ndim == 2 else 1
    data = _Regression.of(inputs, targets, weights, reduction, scale=width**-0.5)
    decay = nonnegative("weight_decay", weight_decay)
    curvature = data.singular.square() + decay
    seen, unseen = data.mean_and_rest
    pull = data.singular * data.residual[:, 0] + decay * seen  # gradient of the loss at the mean, mode by mode
    mean = torch.where(curvature == 0, 0.0, pull / curvature)
    # All directions that no input has are alike, and only the sum of the squares of their means counts.
    idle = torch.full((width - len(seen),), decay, dtype=torch.float64, device=mean.device)
    shared = torch.full_like(idle, unseen / max(1, len(idle)) ** 0.5)
    return langevin(torch.cat([curvature, idle]), torch.cat([mean, shared]), std, temperature, times)


@dataclass(frozen=True, eq=False)
class _Regression:
    """√c·(scale·Xw − y) in the singular basis of the inputs; ½ its square is the loss."""

    singular: Tensor
    """σ ≥ 0, (k,), k = min(N, d); what rounding left of zeros is 0."""
    residual: Tensor
    """(k, C) at the mean weights."""
    right: Tensor
    """Vᵀ, (k, d)."""
    weights: Tensor
    """(d, C)."""

    @property
    def outputs(self) -> int:
        return self.weights.shape[1]

    @property
    def mean_and_rest(self) -> tuple[Tensor, float]:
        """Vᵀw (k,), and the norm of what is left of w outside; for one output."""
        seen = self.right @ self.weights[:, 0]
        return seen, float(torch.linalg.vector_norm(self.weights[:, 0] - self.right.T @ seen))

    @classmethod
    def of(
        cls, inputs: Tensor, targets: Tensor, weights: Tensor | None, reduction: Reduction, scale: float = 1.0
    ) -> _Regression:
        x = finite("inputs", inputs)
        y = finite("targets", targets).to(x.device)
        if x.ndim != 2:
            raise ValueError(f"inputs must have shape (N, d), got {tuple(x.shape)}; use flatten(1)")
        if y.ndim not in (1, 2) or len(y) != len(x):
            raise ValueError(f"targets must have shape ({len(x)},) or ({len(x)}, outputs), got {tuple(y.shape)}")
        shape = (x.shape[1], *y.shape[1:])
        w = torch.zeros(shape, dtype=x.dtype, device=x.device) if weights is None else finite("weights", weights)
        if w.shape != shape:
            raise ValueError(f"weights must have shape {shape}, one per input and output, got {tuple(w.shape)}")
        factor = loss_factor(reduction, y.numel()) ** 0.5
        x, y, w = x * (factor * scale), (y * factor).reshape(len(y), -1), w.reshape(len(w), -1).to(x.device)
        left, singular, right = torch.linalg.svd(x, full_matrices=False)
        rounding = max(x.shape) * torch.finfo(x.dtype).eps * singular[0]
        return cls(torch.where(singular > rounding, singular, 0.0), left.T @ (x @ w - y), right, w)
