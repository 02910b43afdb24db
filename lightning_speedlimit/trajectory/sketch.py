"""A linear sketch of the displacement: 4093 strided buckets, one random sign per coordinate."""

from __future__ import annotations

import torch
from torch import Tensor

BUCKETS = 4093  # prime: a power of two resonates with layer widths
_SIGN_SEED = 0x5EED
_WORD = 32


class Signs:
    """One fixed random sign per coordinate, kept as bits: 1/32 of the parameters' memory.

    Drawn on the CPU whatever the device, so that sketches of one model compare across machines.
    """

    def __init__(self, count: int, offset: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(_SIGN_SEED + offset)
        words = torch.empty(-(-count // _WORD), dtype=torch.int32)
        words.random_(-(2**31), 2**31 - 1, generator=generator)
        self._words = words.to(device)
        self._shifts = torch.arange(_WORD, dtype=torch.int32, device=device)

    def apply(self, values: Tensor, start: int) -> Tensor:
        """s_i · values_i in float32 for the coordinates [start, start + len); start a multiple of 32."""
        first = start // _WORD
        words = self._words[first : first + -(-values.numel() // _WORD)]
        bits = torch.bitwise_left_shift(words[:, None], self._shifts[None, :]).view(-1)[: values.numel()]
        flipped = values.to(torch.float32, copy=True).view(torch.int32)
        return flipped.bitwise_xor_(bits & torch.iinfo(torch.int32).min).view(torch.float32)


def add_to_buckets(buckets: Tensor, signed: Tensor, position: int) -> None:
    """buckets[(position + i) mod 4093] += signed_i, for i = 0 … n − 1.

    Args:
        buckets: (4093,), float64 or float32; written in place.
        signed: (n,), the coordinates times their signs.
        position: place of the first coordinate in the whole parameter vector.
    """
    whole = signed.numel() // BUCKETS * BUCKETS
    part = torch.zeros(BUCKETS, dtype=buckets.dtype, device=signed.device)
    if whole:
        part += signed[:whole].view(-1, BUCKETS).sum(0, dtype=buckets.dtype)
    part[: signed.numel() - whole] += signed[whole:]
    buckets += part.roll(position % BUCKETS)
