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

_LEAST = 1024  # numbers in a collective: 8 KB
_MARKS = 1 << 20  # a mark's square times any number of processes is exact in float64

MOST = 1 << 16  # steps between two readings: 3 MB
_SPREAD_OF_CLIPPING = 1e-7  # variance of a ratio of squares over shards: float32 sums leave 1e-13


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
        self.rank: int = dist.get_rank(group)

    def total(self, flat: Tensor, room: int) -> Tensor:
        """Σ over the processes of a vector: one all_reduce, whatever has to be told.

        Args:
            room: numbers that every process has room for. One whose measurement has failed has less to tell, and
                two vectors of different lengths would end the training.
        """
        size = max(_LEAST, 1 << (max(room, flat.numel()) - 1).bit_length())
        filled = torch.cat([flat, flat.new_zeros(size - flat.numel())])
        dist.all_reduce(filled, group=self.group)
        return filled[: flat.numel()]


def header(failed: bool, facts: object, device: torch.device) -> Tensor:
    """What the processes compare: whether one has failed, and a number that (but for one in a million) differs where
    the plain facts that they know differ."""
    mark = float(zlib.crc32(repr(facts).encode()) % _MARKS)
    return torch.tensor([float(failed), mark, mark * mark], dtype=torch.float64, device="cpu").to(device)


def alike(total: Tensor, size: int) -> bool:
    """All marks were the same: size Σ x² = (Σ x)², which holds for equal numbers alone."""
    return size * float(total[2]) == float(total[1]) ** 2


class Rows:
    """What is not linear in shards or steps, step by step: kept on the device from one reading to the next."""

    def __init__(self) -> None:
        self.count, self.full = 0, False
        self._rows: Tensor | None = None

    def append(self, row: Tensor) -> None:
        """row: (n,)."""
        if self.count == MOST:
            self.full = True
            return
        if self._rows is None or self.count == len(self._rows):
            more = row.new_zeros(max(64, self.count), len(row))
            self._rows = more if self._rows is None else torch.cat([self._rows, more])
        self._rows[self.count] = row
        self.count += 1

    @property
    def rows(self) -> Tensor | None:
        return None if self._rows is None or not self.count else self._rows[: self.count]

    def clear(self) -> None:
        self.count, self.full = 0, False

    def state_dict(self) -> Tensor | None:
        return None if self.rows is None else self.rows.detach().cpu().clone()

    def load_state_dict(self, rows: Tensor | None, device: torch.device) -> None:
        self._rows = None if rows is None else rows.to(device)
        self.count = 0 if rows is None else len(rows)


def norms_row(squared: Tensor, norms: Tensor) -> Tensor:
    """‖u‖², ‖g‖², ‖g_clipped‖² and ‖g_clipped‖⁴/‖g‖² of this process's shards."""
    raw, clipped = norms.unbind()
    ratio = torch.where(raw > 0, clipped * clipped / raw, torch.zeros_like(raw))
    return torch.stack([squared, raw, clipped, ratio])


def lengths_and_unevenness(total: Tensor) -> tuple[Tensor, bool]:
    """‖u‖ of each step of the whole, and whether shards were clipped by several factors, from sums over processes."""
    squares, raw, clipped, ratio = total.unbind(1)
    # Σ_r (c_r² − c²)² ‖g_r‖² = Σ_r ‖g'_r‖⁴/‖g_r‖² − ‖g'‖⁴/‖g‖² is 0 where one factor c clips every shard.
    apart = ratio * raw - clipped * clipped
    return squares.sqrt(), bool((apart > _SPREAD_OF_CLIPPING * clipped * clipped).any())
