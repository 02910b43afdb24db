"""One device-to-host copy for all that a log step reads."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.sums import RunningSum, sum_dtype


class Mail:
    """Collect named tensors on their device; `deliver` brings them all to the host in a single copy."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Tensor]] = []

    def put(self, name: str, tensor: Tensor) -> None:
        self._entries.append((name, tensor.detach()))

    def put_sum(self, name: str, total: RunningSum) -> None:
        """A running sum; its correction, where it carries one, travels along and is subtracted on the host."""
        for part in total.parts():
            self.put(name, part)

    def deliver(self) -> dict[str, Tensor]:
        """float64 host tensors by name; of two entries of one name the second is subtracted from the first."""
        if not self._entries:
            return {}
        home = self._entries[0][1].device
        flat = torch.cat([t.to(home, sum_dtype(home), non_blocking=True).reshape(-1) for _, t in self._entries])
        pieces = torch.split(flat.cpu().double(), [t.numel() for _, t in self._entries])
        found: dict[str, Tensor] = {}
        for (name, tensor), piece in zip(self._entries, pieces, strict=True):
            value = piece.reshape(tensor.shape)
            found[name] = found[name] - value if name in found else value
        return found
