"""A linear sketch of the displacement: 4093 buckets, one random sign per coordinate.

Coordinate i of the parameter whose first coordinate has the place p in the whole vector falls into the bucket

    b(i) = (p + i + r_{q mod 64}) mod 4093,    q = ⌊i / 4093⌋ its stretch,

with 64 fixed random rotations r. Without them b = (p + i) mod 4093, and adjacent columns of a matrix 4096 wide
would share buckets: its rows lie 4096 mod 4093 = 3 of them apart.
What is left: one column of a matrix exactly 4093 wide (or a multiple) has 64 buckets, one per rotation.

Of drawn coordinates each counts √weight times: the squared norm of the sketch is then that of all of them, in the mean.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.coordinates import UNIT, Coordinates
from lightning_speedlimit.trajectory.sums import sum_dtype

BUCKETS = 4093  # prime: a power of two resonates with layer widths
ROTATIONS = 64
_ROTATION_SEED = 0xB0C5
_SIGN_SEED = 0x5EED
_WORD = 32
_PIECE = 1 << 20


@cache
def rotations() -> Tensor:
    """(64,) the rotations r, whole numbers in [0, 4093); drawn on the CPU, as the signs are."""
    generator = torch.Generator().manual_seed(_ROTATION_SEED)
    return torch.randint(BUCKETS, (ROTATIONS,), generator=generator, device="cpu")


def signed_buckets(index: Tensor, position: int, size: int) -> Tensor:
    """b(i) of coordinates of one parameter, or b(i) + 4093 where their sign is −1: int32 on the host.

    Args:
        index: the coordinates within the parameter. position: its place in the whole parameter vector.
        size: its number of coordinates.
    """
    generator = torch.Generator().manual_seed(_SIGN_SEED + position)
    words = torch.empty(-(-size // _WORD), dtype=torch.int32)
    words.random_(-(2**31), 2**31 - 1, generator=generator)
    found = []
    for i in torch.split(index, _PIECE):
        bucket = (position + i + rotations()[i // BUCKETS % ROTATIONS]) % BUCKETS
        sign = words[i // _WORD].bitwise_right_shift(_WORD - 1 - i % _WORD) & 1
        found.append((bucket + BUCKETS * sign).int())
    return torch.cat(found) if found else index.int()


class Sketch:
    """The buckets of one vector's coordinates; 4 bytes for each.

    Args:
        positions: of each parameter its place in the whole parameter vector. firsts: where in the whole parameter
            this process's coordinates begin. sizes: of the whole parameters.
    """

    def __init__(self, coordinates: Coordinates, positions: list[int], firsts: list[int], sizes: list[int]) -> None:
        self._width = coordinates.width
        buckets = torch.zeros(coordinates.count * coordinates.width, dtype=torch.int32)
        for i, rows in enumerate(coordinates.rows):
            index = firsts[i] + _measured(coordinates, i)
            low = rows.start * coordinates.width
            buckets[low : low + len(index)] = signed_buckets(index, positions[i], sizes[i])
        self._buckets = buckets.to(coordinates.device)
        # Of what is drawn with the chance π the mean of the squared sum is right: a² R π (1 + (R − 1) π) = 1 for R
        # processes that hold the same coordinates and draw each its own; the weight is w = 1/(R π).
        w, chance = coordinates.weights, 1.0 if coordinates.rest is None else 1.0 - coordinates.rest
        plain = coordinates.exact and set(coordinates.shares) <= {1.0}
        self._roots = None if plain else (w / (1.0 + 1.0 / w - chance)).sqrt()

    def add(self, moved: Tensor, rows: slice, buckets: Tensor) -> None:
        """buckets (2·4093,) += the moved coordinates of some rows, by bucket and sign."""
        values = moved.to(buckets.dtype)
        if self._roots is not None:
            values = values * self._roots[rows, None]
        low, high = rows.start * self._width, rows.stop * self._width
        buckets.index_add_(0, self._buckets[low:high], values.reshape(-1))

    @staticmethod
    def empty(device: torch.device) -> Tensor:
        return torch.zeros(2 * BUCKETS, dtype=sum_dtype(device), device=device)

    @staticmethod
    def signed(buckets: Tensor) -> Tensor:
        """(4093,): Σ s_i Δθ_i."""
        return buckets[:BUCKETS] - buckets[BUCKETS:]


def _measured(coordinates: Coordinates, i: int) -> Tensor:
    """The measured coordinates of parameter i, in the order in which they lie in a vector."""
    size, drawn = coordinates.shapes[i].numel(), coordinates.drawn[i]
    if drawn is None:
        return torch.arange(size)
    units = (drawn.cpu()[:, None] * UNIT + torch.arange(UNIT)).view(-1)
    return torch.cat([units, torch.arange(size // UNIT * UNIT, size)])
