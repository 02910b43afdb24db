"""The draw of the measured coordinates: systematic, without replacement, by size and by the first gradient.

π ∝ ½ b + ½ c, capped at 1: b ∝ the unit's size over √(its parameter's size), c ∝ its Σ g² at the first step, each
normalised. Units are ordered by parameter and shuffled within stretches of it, so that each gets its part. Small
parameters are measured whole. (Särndal, Swensson, Wretman, Model Assisted Survey Sampling, 1992, §3.6.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.gathering import UNIT, dense

DEFAULT = 1 << 19
WHOLE = 256  # coordinates of a parameter up to which all are measured
LEAST = 64  # at least one coordinate of so many is measured, unless another number than the default was asked for
_PIECE = 1 << 20  # coordinates that are looked at together: the draw needs little memory whatever the model
_ROUNDS = 4  # of sharing out again what units with π = 1 do not need


class Draw:
    """Which coordinates of parameters are measured, within one budget for all that a meter follows.

    Args:
        coordinates: to measure, or "all". total: coordinates of all parameters that are there from the start.
    """

    def __init__(self, coordinates: int | str, total: int, seed: int) -> None:
        self.coordinates, self.total, self.seed = coordinates, total, seed
        self._met = 0

    def samples(self, parameters: Sequence[Tensor]) -> bool:
        """Not all of them would be measured."""
        here = sum(_sizes(parameters))
        return self._count(here) < here

    def _count(self, here: int) -> int:
        """How many of so many that have come to measure: their part of the budget."""
        total, allowed = max(self.total, self._met + here), self.coordinates
        if isinstance(allowed, str):
            return here
        if allowed == DEFAULT:
            allowed = max(allowed, total // LEAST)
        return here if allowed >= total else max(1, round(allowed * here / total))

    def met(self, parameters: Sequence[Tensor]) -> None:
        """These have been drawn from."""
        self._met += sum(_sizes(parameters))

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Iterable[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Of each parameter that has come its drawn units, ascending, and their 1/π; None and None: all of it.

        Args:
            gradients: the first ones; None where there is none yet.
        """
        sizes, seed = _sizes(parameters), self.seed + self._met
        count = self._count(sum(sizes))
        self._met += sum(sizes)
        drawn: list[Tensor | None] = [None] * len(sizes)
        inverse: list[Tensor | None] = [None] * len(sizes)
        if sum(sizes) <= count:
            return drawn, inverse
        large = {i: g for i, (n, g) in enumerate(zip(sizes, gradients, strict=True)) if n > WHOLE}
        left = count - sum(n if n <= WHOLE else n % UNIT for n in sizes)
        units = max(left, count // 2, UNIT) // UNIT  # small parameters leave the large ones half of it at least
        chances = _Chances([sizes[i] for i in large], list(large.values()), units)
        generator = torch.Generator().manual_seed(seed)
        passed = float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))
        for place, i in enumerate(large):
            first, found = 0, list[tuple[Tensor, Tensor]]()
            for piece in chances.of(place):
                order = torch.randperm(len(piece), generator=generator, device="cpu")
                after = passed + piece[order].double().cumsum(0)
                before = torch.cat([after.new_tensor([passed]), after[:-1]])
                taken = order[torch.floor(after + 1e-9) > torch.floor(before + 1e-9)].sort().values
                passed = float(after[-1]) % 1.0
                found.append((first + taken, 1.0 / piece[taken].double()))
                first += len(piece)
            drawn[i], inverse[i] = map(torch.cat, zip(*found, strict=True))
        return drawn, inverse


def _sizes(parameters: Sequence[Tensor]) -> list[int]:
    return [dense(p).numel() for p in parameters]


class _Chances:
    """π of each unit of some parameters, piece by piece: they add up to the number of units to draw."""

    def __init__(self, sizes: list[int], gradients: list[Tensor | None], units: int) -> None:
        self._sizes, self._gradients = sizes, gradients
        self._by_size = sum(n**0.5 for n in sizes)
        whole = math.fsum(float(s.sum()) for g in gradients if g is not None for s in _unit_squares(dense(g)))
        self._by_gradient = whole if math.isfinite(whole) else 0.0
        self._scale = float(units)
        for _ in range(_ROUNDS):
            certain, rest = 0, 0.0
            for i in range(len(sizes)):
                for piece in self.of(i):
                    capped = piece >= 1.0
                    certain += int(capped.sum())
                    rest += float(piece.masked_fill(capped, 0.0).sum(dtype=torch.float64))
            if rest <= 0.0 or units <= certain:
                break
            self._scale *= (units - certain) / rest

    def of(self, i: int) -> Iterator[Tensor]:
        """Of one parameter, float32 on the host; a last unit that is not full is measured apart."""
        count, gradient = self._sizes[i] // UNIT, self._gradients[i]
        even = UNIT / self._sizes[i] ** 0.5 / self._by_size
        if not self._by_gradient or gradient is None:
            most = _PIECE // UNIT
            for low in range(0, count, most):
                chance = min(self._scale * even, 1.0)
                yield torch.full((min(most, count - low),), chance, dtype=torch.float32, device="cpu")
            return
        for squares in _unit_squares(dense(gradient)):
            share = squares.mul_(0.5 / self._by_gradient).add_(0.5 * even)
            yield share.mul_(self._scale).clamp_(max=1.0).float()


def _unit_squares(gradient: Tensor) -> Iterator[Tensor]:
    """Σ g² of the full units, piece by piece, float64 on the host."""
    flat = gradient.reshape(-1)[: gradient.numel() // UNIT * UNIT]
    for piece in torch.split(flat, _PIECE) if len(flat) else ():
        norms = torch.linalg.vector_norm(piece.float().view(-1, UNIT), dim=1)
        yield norms.cpu().double().square_()
