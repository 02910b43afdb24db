"""A linear sketch of the displacement: 4093 buckets, one random sign per coordinate.

Coordinate i of the parameter whose first coordinate has the place p in the whole vector falls into the bucket

    b(i) = (p + i + r_{q mod 64}) mod 4093,    q = ⌊i / 4093⌋ its stretch,

with 64 fixed random rotations r. Without them b = (p + i) mod 4093, and adjacent columns of a matrix 4096 wide
would share buckets: its rows lie 4096 mod 4093 = 3 of them apart.
What is left: one column of a matrix exactly 4093 wide (or a multiple) has 64 buckets, one per rotation.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.sums import sum_dtype

BUCKETS = 4093  # prime: a power of two resonates with layer widths
ROTATIONS = 64
_ROTATION_SEED = 0xB0C5
_SIGN_SEED = 0x5EED
_WORD = 32


class Signs:
    """One fixed random sign per coordinate, kept as bits: 1/32 of the parameters' memory.

    Drawn on the CPU whatever the device, so that sketches of one model compare across machines.

    Args:
        count: coordinates of the parameter. offset: its place in the parameter vector.
        part: (low, high), the coordinates that will be asked for, low a multiple of 32; None: all.
    """

    def __init__(self, count: int, offset: int, device: torch.device, part: tuple[int, int] | None = None) -> None:
        generator = torch.Generator().manual_seed(_SIGN_SEED + offset)
        words = torch.empty(-(-count // _WORD), dtype=torch.int32)
        words.random_(-(2**31), 2**31 - 1, generator=generator)
        low, high = part or (0, count)
        self._first = low // _WORD
        self._words = words[self._first : -(-high // _WORD)].to(device, copy=True)
        self._shifts = torch.arange(_WORD, dtype=torch.int32, device=device)

    def apply(self, values: Tensor, start: int) -> Tensor:
        """s_i · values_i in float32 for the coordinates [start, start + len); start a multiple of 32."""
        first = start // _WORD - self._first
        words = self._words[first : first + -(-values.numel() // _WORD)]
        bits = torch.bitwise_left_shift(words[:, None], self._shifts[None, :]).view(-1)[: values.numel()]
        flipped = values.to(torch.float32, copy=True).view(torch.int32)
        return flipped.bitwise_xor_(bits & torch.iinfo(torch.int32).min).view(torch.float32)


@cache
def rotations() -> tuple[int, ...]:
    """The 64 rotations r_0 … r_63, whole numbers in [0, 4093); drawn on the CPU, as the signs are."""
    generator = torch.Generator().manual_seed(_ROTATION_SEED)
    return tuple(torch.randint(BUCKETS, (ROTATIONS,), generator=generator, device="cpu").tolist())


@cache
def _sources(device: torch.device) -> Tensor:
    """(64, 4093): at (j, b) the place (b − r_j) mod 4093 in a stretch from which bucket b is filled."""
    shifts = torch.tensor(rotations(), device="cpu")
    return (torch.arange(BUCKETS, device="cpu") - shifts[:, None]).remainder_(BUCKETS).to(device)


def piece_size(device: torch.device) -> int:
    """In how long pieces to walk through a parameter: whole stretches, and a multiple of 32 for the signs."""
    return BUCKETS * (ROTATIONS // 2 if device.type == "cpu" else ROTATIONS * 64)  # half a MiB stays in the cache


def pieces_of_shard(first: int, count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(low, high, start) of the pieces of the coordinates [first, first + count) of a parameter.

    [low, high) is counted from `first`; start ≤ first + low is the whole stretch's coordinate, a multiple of 32,
    that the piece is to be filled up from. Pieces end where rounds of 64 stretches do, or begin within one.
    """
    half = BUCKETS * (ROTATIONS // 2)  # of a round: whole stretches, and a multiple of 32
    low = 0
    while low < count:
        start = (first + low) // half * half
        end = start + (size if start % (2 * half) == 0 or size <= half else half)
        high = min(count, end - first)
        yield low, high, start
        low = high


class Stretches:
    """G_j = Σ of the stretches q ≡ j mod 64 of one parameter: rotated once, when all of it has been added.

    Args:
        count: the parameter's number of coordinates.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        rows = min(ROTATIONS, -(-count // BUCKETS))
        self._sums = torch.zeros(rows, BUCKETS, dtype=sum_dtype(device), device=device)

    def add(self, signed: Tensor, start: int) -> None:
        """G_j += Σ of a piece's stretches q ≡ j mod 64.

        Args:
            signed: the piece's coordinates times their signs.
            start: its first coordinate: a whole stretch's. It begins a round of 64 stretches or lies within one.
        """
        first = start // BUCKETS % ROTATIONS
        whole, rest = divmod(signed.numel(), BUCKETS)
        rounds, rows = divmod(whole, ROTATIONS)
        stretches = signed[: whole * BUCKETS].view(whole, BUCKETS)
        if rounds:
            many = stretches[: rounds * ROTATIONS].view(rounds, ROTATIONS, BUCKETS)
            self._sums += many.sum(0, dtype=self._sums.dtype)
        if rows:
            self._sums[first : first + rows] += stretches[rounds * ROTATIONS :]
        if rest:
            self._sums[first + rows, :rest] += signed[whole * BUCKETS :]

    def add_to(self, buckets: Tensor, position: int) -> None:
        """buckets[b] += Σ_j G_j[(b − position − r_j) mod 4093].

        Args:
            buckets: (4093,), float64 or float32; written in place.
            position: place of the parameter's first coordinate in the whole parameter vector.
        """
        rows = len(self._sums)
        if rows == 1:  # most parameters of most models: no index to look up
            buckets += self._sums[0].roll((position + rotations()[0]) % BUCKETS)
        else:
            buckets += self._sums.gather(1, _sources(buckets.device)[:rows]).sum(0).roll(position % BUCKETS)
