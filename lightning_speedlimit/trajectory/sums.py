"""Running sums that stay on the device, as exact as float64 or, without it, as pairs of float32."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32 (kept in compensated pairs)."""
    return torch.float32 if device.type == "mps" else torch.float64


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class RunningSum:
    """S ← S + x for a tensor of any shape: float64, or float32 with Kahan's correction carried along.

    Kahan, "Pruning inverse rounding errors in summation", CACM 8(1), 1965: the pair (sum, correction)
    has an error of 2ε, whatever the number of terms.
    """

    def __init__(self, *shape: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or sum_dtype(device)
        self.value = torch.zeros(shape, dtype=self.dtype, device=device)
        self.correction = None if self.dtype == torch.float64 else torch.zeros_like(self.value)

    def add_(self, increment: Tensor) -> None:
        if self.correction is None:
            self.value += increment
            return
        corrected = increment.to(self.dtype) - self.correction
        total = self.value + corrected
        self.correction = (total - self.value) - corrected
        self.value = total

    def parts(self) -> list[Tensor]:
        """The tensors whose float64 difference is the sum: [value] or [value, correction]."""
        return [self.value] if self.correction is None else [self.value, self.correction]

    def load_(self, value: Tensor) -> None:
        """Take over a float64 host value."""
        self.value = value.to(self.value.device, self.dtype).reshape(self.value.shape).clone()
        if self.correction is not None:
            rest = self.value.cpu().double() - value.cpu().double().reshape(self.value.shape)
            self.correction = rest.to(self.value.device, self.dtype)

    def host(self) -> Tensor:
        """The sum as a float64 tensor on the host (a device sync)."""
        first, *rest = (part.detach().cpu().double() for part in self.parts())
        return first - rest[0] if rest else first.clone()
