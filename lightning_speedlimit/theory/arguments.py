"""Arguments as float64 tensors, checked: each error names the argument, what it got, what it wanted, the cure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Values = Tensor | Sequence[float] | float
Reduction = Literal["sum", "mean"]


def float64(value: Values) -> Tensor:
    """Detached and in float64, on its device; on the host where the device has no float64."""
    if not isinstance(value, Tensor):
        return torch.as_tensor(value, dtype=torch.float64)
    tensor = value.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def finite(name: str, value: Values) -> Tensor:
    """The float64 tensor; a ValueError where it is empty, a TypeError where it is complex."""
    if hasattr(value, "dtype") and torch.as_tensor(value).is_complex():  # NumPy's too: else only a warning
        raise TypeError(f"{name} must be real, got {value.dtype}; pass real and imaginary parts as separate values")
    tensor = float64(value)
    if not tensor.numel():
        raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}; pass at least one value")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or inf among its values; drop them, or use large numbers")
    return tensor


def modes(**values: Values) -> list[Tensor]:
    """One value per mode each, (n,): scalars are repeated, lengths must agree."""
    tensors = {name: finite(name, value) for name, value in values.items()}
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            raise ValueError(f"{name} must have shape (modes,), got {tuple(tensor.shape)}; use flatten()")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.ndim}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{', '.join(shapes)} must have one value per mode each, got shapes {shapes}")
    device = next(iter(tensors.values())).device
    shape = next(iter(shapes.values()), (1,))
    return [tensor.to(device).expand(shape) for tensor in tensors.values()]


def instants(times: Values) -> Tensor:
    """Times of any shape, not negative."""
    tensor = finite("times", times)
    if tensor.min() < 0:
        raise ValueError(f"times must not be negative, got {tensor.min().item():g}; time starts at 0")
    return tensor


def nonnegative(name: str, value: float) -> float:
    """A plain number ≥ 0."""
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number ≥ 0, got {value!r}; 0 turns it off")
    return float(value)


def loss_factor(reduction: Reduction, residuals: int) -> float:
    """What multiplies ½‖f − y‖²: 1, or 2/(N·C) for `nn.MSELoss` over N·C residuals."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' (½‖f − y‖²) or 'mean' (nn.MSELoss), got {reduction!r}")
    return 1.0 if reduction == "sum" else 2.0 / residuals
