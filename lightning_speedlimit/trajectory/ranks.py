"""Several processes of one run: what each of them knows is put together, in one collective for each reading.

Three kinds of numbers: those that each process has alike (its "own" one is the run's), those of which the run's is
the mean over the processes (losses of their batches), and those of which it is the sum (what shards add up to).
"""

from __future__ import annotations

import zlib
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Share = Literal["own", "mean", "sum"]

_LEAST = 1024  # numbers in a collective: 8 KB, and room for a process that has a few more to tell than others
_MARKS = 1 << 20  # a mark's square times any number of processes is exact in float64

HEADER = 3  # failed, mark, mark²


class Ranks:
    """The processes of a group, as seen by one of them; every one of them must call `total`, in the same order."""

    def __init__(self, group: Any) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group got {group!r}, wanted a torch.distributed process group that this process is in: "
                "torch.distributed.group.WORLD after init_process_group, or None for one process"
            )
        self.group = group
        self.size: int = dist.get_world_size(group)

    def total(self, flat: Tensor) -> Tensor:
        """Σ over the processes of a vector: one all_reduce, whatever has to be told.

        It is filled up to a power of two: a process whose measurement has failed has less to tell, and two vectors
        of different lengths would stop the training.
        """
        size = max(_LEAST, 1 << (flat.numel() - 1).bit_length())
        filled = torch.cat([flat, flat.new_zeros(size - flat.numel())])
        dist.all_reduce(filled, group=self.group)
        return filled[: flat.numel()]


def mark(facts: object) -> float:
    """A number that differs (but for one in a million) where plain facts differ."""
    return float(zlib.crc32(repr(facts).encode()) % _MARKS)


def header(failed: bool, facts: object, device: torch.device) -> Tensor:
    """What the processes compare: whether one has failed, and whether all know the same facts."""
    own = mark(facts)
    return torch.tensor([float(failed), own, own * own], dtype=torch.float64).to(device)


def alike(total: Tensor, size: int) -> bool:
    """All marks were the same: size Σ x² = (Σ x)², which holds for equal numbers alone."""
    return size * float(total[2]) == float(total[1]) ** 2
