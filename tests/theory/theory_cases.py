"""Other routes to the closed forms: Euler's method extrapolated to step 0, and decimal arithmetic."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Euler's error is a power series in the step. Three runs cancel its first two terms; with λ·time ≤ 15 the third
# is 6e-8 of the value, and an eighth of that with twice the steps. Used with `rel=1e-6`.
STEPS = (800, 1600, 3200)


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation returned."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def extrapolated(run: Callable[[int], Tensor], steps: tuple[int, int, int] = STEPS) -> Tensor:
    """The limit of run(number of steps), twice extrapolated (Richardson); each number twice the one before."""
    coarse, middle, fine = (run(number) for number in steps)
    first, second = 2 * middle - coarse, 2 * fine - middle
    return (4 * second - first) / 3


def descend(jacobian: Tensor, targets: Tensor, start: Tensor, time: float, steps: int) -> Tensor:
    """(W₂², Q) of gradient descent on ½‖Jθ − y‖² in parameter space: squared displacement, and ∫‖∇L‖² dt."""
    theta, step, work = start.clone(), time / steps, 0.0
    for _ in range(steps):
        gradient = jacobian.T @ (jacobian @ theta - targets)
        theta = theta - step * gradient
        work += step * gradient.square().sum().item()
    return torch.tensor([(theta - start).square().sum().item(), work], dtype=torch.float64)


def root(matrix: Tensor) -> Tensor:
    """The square root of a covariance."""
    values, basis = torch.linalg.eigh(matrix)
    return basis * values.clamp(min=0).sqrt() @ basis.T


def bures(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """W₂² of two Gaussians: |Δm|² + tr(A + B − 2 (√A B √A)^½)."""
    half = root(cov_a)
    cross = root(half @ cov_b @ half)
    return float((mean_a - mean_b).square().sum() + (cov_a + cov_b - 2 * cross).trace())


def diffuse(hessian: Tensor, mean: Tensor, cov: Tensor, heat: float, time: float, steps: int) -> Tensor:
    """(W₂², Q) of Langevin dynamics on ½ xᵀHx by its moments' equations in full matrices.

    dm = −Hm dt, dΣ = (2T − HΣ − ΣH) dt, and Q = ∫ E|ν|² dt with the local mean velocity ν = −Hx + T Σ⁻¹(x − m).
    """
    m, sigma, step, work = mean.clone(), cov.clone(), time / steps, 0.0
    eye = torch.eye(len(mean), dtype=torch.float64)
    for _ in range(steps):
        force = hessian @ m
        slope = hessian - heat * torch.linalg.inv(sigma) if heat else hessian
        work += step * (force.square().sum() + (slope @ sigma @ slope.T).trace()).item()
        m = m - step * force
        sigma = sigma + step * (2 * heat * eye - hessian @ sigma - sigma @ hessian)
    return torch.tensor([bures(mean, cov, m, sigma), work], dtype=torch.float64)


def exact_langevin(h: float, m: float, s: float, heat: float, time: float) -> tuple[float, float, float]:
    """(W₂², Q, η) of one mode as THEORY §5 writes them, in 250 digits: cancellation does not matter there."""
    with localcontext() as context:
        context.prec = 250
        h_, m_, s_, heat_, t_ = (Decimal(x) for x in (h, m, s, heat, time))
        factor = (-h_ * t_).exp()
        end = factor * m_
        variance = factor**2 * s_**2 + (heat_ / h_ * (1 - factor**2) if h else 2 * heat_ * t_)
        squared = (end - m_) ** 2 + (variance.sqrt() - s_) ** 2
        energy = h_ * (m_**2 + s_**2 - end**2 - variance) / 2
        entropy = heat_ * (variance / s_**2).ln() / 2 if heat else Decimal(0)
        production = energy + entropy
        efficiency = float(squared / (t_ * production)) if production else math.nan
        return float(squared), float(production), efficiency


def exact_flow(eigenvalues: list[float], residual: list[float], time: float) -> tuple[float, float, float]:
    """(W₂², Q, η) of THEORY §6 in 400 digits; modes with λ = 0 left out."""
    with localcontext() as context:
        context.prec = 400
        squared, drop, t_ = Decimal(0), Decimal(0), Decimal(time)
        for value, r in zip(map(Decimal, eigenvalues), map(Decimal, residual), strict=True):
            if value:
                squared += (1 - (-value * t_).exp()) ** 2 * r**2 / value
                drop += (1 - (-2 * value * t_).exp()) * r**2 / 2
        return float(squared), float(drop), float(squared / (t_ * drop))
