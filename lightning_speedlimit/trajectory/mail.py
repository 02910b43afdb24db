"""One device-to-host copy for all that a log step reads; with several processes, after one collective."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.ranks import Ranks, Share
from lightning_speedlimit.trajectory.sums import RunningSum, sum_dtype


class Mail:
    """Collect named tensors on their device; `deliver` brings them all to the host in a single copy."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Tensor, Share]] = []

    def put(self, name: str, tensor: Tensor, share: Share = "own") -> None:
        """share: how the number of the run follows from those of its processes."""
        self._entries.append((name, tensor.detach(), share))

    def extend(self, other: Mail) -> None:
        """All that the other one has collected."""
        self._entries += other._entries

    def shared(self) -> list[tuple[str, int]]:
        """What other processes must have alike for theirs to add: names and sizes."""
        return [(name, tensor.numel()) for name, tensor, share in self._entries if share != "own"]

    def put_sum(self, name: str, total: RunningSum, share: Share = "own") -> None:
        """A running sum; its correction, where it carries one, travels along and is subtracted on the host."""
        for part in total.parts():
            self.put(name, part, share)

    def deliver(self, ranks: Ranks | None = None, room: int = 0) -> dict[str, Tensor]:
        """float64 host tensors by name; of two entries of one name the second is subtracted from the first.

        Args:
            ranks: the processes to put together; None: this one alone. All of them must call it.
            room: see `Ranks.total`.
        """
        if not self._entries:
            return {}
        home = self._entries[0][1].device
        entries = self._entries
        if ranks is not None:
            entries = sorted(entries, key=lambda entry: entry[2] == "own")  # a stable order: what is shared first
        flat = torch.cat([t.to(home, sum_dtype(home), non_blocking=True).reshape(-1) for _, t, _ in entries])
        if ranks is not None:
            shared = sum(t.numel() for _, t, share in entries if share != "own")
            flat = torch.cat([ranks.total(flat[:shared], room), flat[shared:]])
        pieces = torch.split(flat.cpu().double(), [t.numel() for _, t, _ in entries])
        found: dict[str, Tensor] = {}
        for (name, tensor, share), piece in zip(entries, pieces, strict=True):
            value = piece.reshape(tensor.shape)
            if ranks is not None and share == "mean":
                value = value / ranks.size
            found[name] = found[name] - value if name in found else value
        return found
