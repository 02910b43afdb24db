"""W₂ between Gaussians (Bures), and the lower bound that it is for any clouds with these moments."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.checks.tensors import tensor as dense


def gaussian_wasserstein2_squared(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """W₂² = |m_x − m_y|² + tr Σ_x + tr Σ_y − 2 tr (Σ_x^½ Σ_y Σ_x^½)^½ between two normal distributions.

    Also a lower bound of W₂² between any two distributions with these means and covariances (Gelbrich 1990,
    Math. Nachr. 147). Computed as min_O ‖A − BO‖² over orthogonal O, Σ_x = AAᵀ, Σ_y = BBᵀ, which does not
    cancel where the two are close; where they are singular it is known to about 1e-15 of tr Σ_x + tr Σ_y, upwards,
    as their eigenvalues are. Unit: that of the coordinates, squared.

    Args:
        mean_x, mean_y: (D,).
        cov_x, cov_y: (D, D), symmetric, positive semidefinite; singular ones too.

    Raises:
        TypeError: not tensors of a real floating type.
        ValueError: shapes that do not fit, non-finite or asymmetric values, a negative eigenvalue.
    """
    means = [_checked(name, mean, 1) for name, mean in (("mean_x", mean_x), ("mean_y", mean_y))]
    covs = [_checked(name, cov, 2) for name, cov in (("cov_x", cov_x), ("cov_y", cov_y))]
    size = len(means[0])
    for name, tensor, shape in (
        ("mean_y", means[1], (size,)),
        ("cov_x", covs[0], (size, size)),
        ("cov_y", covs[1], (size, size)),
    ):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} as mean_x says, got {tuple(tensor.shape)}; check the order"
            )
    factors = [_factor(name, cov) for name, cov in (("cov_x", covs[0]), ("cov_y", covs[1]))]
    return float((means[0] - means[1]).square().sum()) + procrustes_squared(*factors)


def procrustes_squared(a: Tensor, b: Tensor) -> float:
    """min over orthogonal O of ‖A − OB‖², for A (k, D) and B (l, D) of covariances AᵀA and BᵀB."""
    rows = max(len(a), len(b))
    a, b = (torch.cat([part, part.new_zeros(rows - len(part), part.shape[1])]) for part in (a, b))
    u, _, vh = torch.linalg.svd(a @ b.T)
    return float((a - u @ (vh @ b)).square().sum())


def _checked(name: str, value: Tensor, dimensions: int) -> Tensor:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of a real floating type, got {got}; use torch.as_tensor(…).double()")
    value = dense(name, value)
    if value.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimension(s), got shape {tuple(value.shape)}")
    value = (value.detach().cpu() if value.device.type == "mps" else value.detach()).double()
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, got NaN or inf; drop what has diverged")
    return value


def _factor(name: str, cov: Tensor) -> Tensor:
    """A with AᵀA = Σ."""
    size = cov.abs().max().item() if cov.numel() else 0.0
    if not torch.allclose(cov, cov.T, rtol=0, atol=1e-8 * size):
        raise ValueError(f"{name} must be symmetric, got an asymmetry beyond 1e-8 of its size; use (Σ + Σᵀ)/2")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    if cov.numel() and values[0].item() < -1e-8 * size:
        raise ValueError(
            f"{name} must be positive semidefinite, got the eigenvalue {values[0].item():g}; "
            "estimate it from centred samples"
        )
    factor: Tensor = values.clamp(min=0).sqrt()[:, None] * vectors.T
    return factor
