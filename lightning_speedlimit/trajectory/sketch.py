"""A linear sketch of the displacement: 4093 buckets, one random sign per coordinate.

Coordinate i of the parameter whose first coordinate has the place p in the whole vector falls into the bucket

    b(i) = (p + i + r_{q mod 64}) mod 4093,    q = ⌊i / 4093⌋ its stretch,

with 64 fixed random rotations r. Without them b = (p + i) mod 4093, and adjacent columns of a matrix 4096 wide
would share buckets: its rows lie 4096 mod 4093 = 3 of them apart.
What is left: one column of a matrix exactly 4093 wide (or a multiple) has 64 buckets, one per rotation.

Of drawn coordinates each counts √weight times: the squared norm of the sketch is then that of all of them, in the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.runs import Member
from lightning_speedlimit.trajectory.sums import sum_dtype

BUCKETS = 4093  # prime: a power of two resonates with layer widths
ROTATIONS = 64
_ROTATION_SEED = 0xB0C5
_SIGN_SEED = 0x5EED
_WORD = 32
_PIECE = 1 << 16  # coordinates that are looked at together


@cache
def rotations() -> Tensor:
    """(64,) the rotations r, whole numbers in [0, 4093); drawn on the CPU, as the signs are."""
    generator = torch.Generator("cpu").manual_seed(_ROTATION_SEED)
    return torch.randint(BUCKETS, (ROTATIONS,), generator=generator, device="cpu")


def signed_buckets(pieces: Iterable[Tensor], position: int, size: int) -> Iterator[Tensor]:
    """b(i) of coordinates of one parameter, or b(i) + 4093 where their sign is −1: int16 on the host.

    Args:
        pieces: of the coordinates within the parameter. position: its place in the whole parameter vector.
        size: its number of coordinates.
    """
    generator = torch.Generator().manual_seed(_SIGN_SEED + position)
    words = torch.empty(-(-size // _WORD), dtype=torch.int32, device="cpu")
    words.random_(-(2**31), 2**31 - 1, generator=generator)
    for i in pieces:
        bucket = (position + i + rotations()[i // BUCKETS % ROTATIONS]) % BUCKETS
        sign = words[i // _WORD].bitwise_right_shift(_WORD - 1 - i % _WORD) & 1
        yield (bucket + BUCKETS * sign).short()


class Sketch:
    """The buckets of one vector's coordinates; 2 bytes for each.

    Args:
        members: of each of the coordinates' parameters, in their order.
    """

    def __init__(self, coordinates: Coordinates, members: Sequence[Member]) -> None:
        self._width, self._passes = coordinates.width, coordinates.passes
        buckets = torch.zeros(coordinates.count * coordinates.width, dtype=torch.int16, device="cpu")
        for i, (member, rows) in enumerate(zip(members, coordinates.rows, strict=True)):
            low = rows.start * coordinates.width
            places = (place + (member.first or 0) for place in coordinates.places(i))
            for found in signed_buckets(places, member.position, member.size):
                buckets[low : low + len(found)] = found
                low += len(found)
        self._buckets = buckets.to(coordinates.device)
        # Of what is drawn with the chance π the mean of the squared sum is right: a² R π (1 + (R − 1) π) = 1 for R
        # processes that hold the same coordinates and draw each its own; the weight is w = 1/(R π).
        whole = set(coordinates.shares) <= {1.0}
        self._shares = None if whole else coordinates.of_each(coordinates.shares, coordinates.weights.dtype)
        self._weights = None if coordinates.exact and whole else coordinates.weights

    def add(self, moved: Tensor, rows: slice, buckets: Tensor) -> None:
        """buckets (2·4093,) += the moved coordinates of some rows, by bucket and sign."""
        size = max(1, _PIECE // self._width)
        for low, part in zip(range(rows.start, rows.stop, size), torch.split(moved, size), strict=True):
            here = slice(low, low + len(part))
            own, factors = self._buckets[here.start * self._width : here.stop * self._width], self._factors(here)
            if self._passes is not None:
                self._passes.scatter(part, factors, own, buckets)
                continue
            values = part.to(buckets.dtype)
            if factors is not None:
                values = values * factors[:, None]  # in place it might be `moved`
            buckets.index_add_(0, own.int(), values.view(-1))

    def _factors(self, here: slice) -> Tensor | None:
        """What the coordinates of each row are multiplied by; None: 1."""
        if self._weights is None:
            return None
        weights = self._weights[here]
        missing = 0.0 if self._shares is None else 1.0 - self._shares[here]
        return weights * (weights + missing).rsqrt()

    @staticmethod
    def empty(device: torch.device) -> Tensor:
        return torch.zeros(2 * BUCKETS, dtype=sum_dtype(device), device=device)

    @staticmethod
    def signed(buckets: Tensor) -> Tensor:
        """(4093,): Σ s_i Δθ_i."""
        return buckets[:BUCKETS] - buckets[BUCKETS:]
