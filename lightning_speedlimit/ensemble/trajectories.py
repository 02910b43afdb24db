"""What the functions of this room take: times (K,), positions (K, R, d), losses (K, R); checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_speedlimit.checks.tensors import tensor, whole
from lightning_speedlimit.ensemble.estimate import Sampled

Array = Tensor | npt.NDArray[np.floating]

BLOCKS = 40  # into which a sample is cut to see its own scatter: the error is then known to 1/√80, 11 %
MIN_BLOCKS = 8


def checked(times: Array, positions: Array) -> tuple[Tensor, Tensor]:
    """(K,) float64 on the host, and (K, R, d) as it is: finite, in order, fitting.

    Raises:
        TypeError: no tensors or arrays of a real floating type.
        ValueError: other shapes, times that do not increase, NaN or inf.
    """
    t = floating("times", times).detach().cpu().double()
    x = floating("positions", positions).detach()
    if t.ndim != 1 or len(t) < 2:
        raise ValueError(f"times must have shape (K,) with K of at least 2, got {tuple(t.shape)}; record two times")
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(
            f"positions must have shape (times, replicas, dimensions), none of them 0, got {tuple(x.shape)}; "
            "one trajectory is positions[:, None, :]"
        )
    if len(x) != len(t):
        raise ValueError(
            f"positions must hold one cloud for each of the {len(t)} times, got {len(x)}; "
            "the first dimension is the time"
        )
    if not bool(torch.isfinite(t).all()) or not bool((t.diff() > 0).all()):
        raise ValueError(f"times must be finite and increase, got {_shortened(t)}; sort them, drop what is twice")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("positions must be finite, got NaN or inf; drop the replicas that diverged")
    return t, x


def floating(name: str, value: Array) -> Tensor:
    if isinstance(value, np.ndarray):
        value = tensor(name, value)
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{name} must be a tensor or array of a real floating type, got {got}; use torch.as_tensor(…).double()"
        )
    return tensor(name, value)


def double(x: Tensor) -> Tensor:
    """In float64, on its device if that has it."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _shortened(t: Tensor) -> str:
    shown = ", ".join(f"{value:g}" for value in t[:6].tolist())
    return f"({shown}{', …' if len(t) > 6 else ''})"


@dataclass(frozen=True)
class Pairs:
    """x_t and x_{t+lag} of every replica, for every recorded t, in blocks to be compared with each other.

    A block is a group of replicas; with fewer replicas than blocks, a stretch of time of one replica.
    """

    positions: Tensor
    """(K, R, d)."""
    steps: int
    """Records between x_t and x_{t+lag}."""
    lag: float
    """The time between them."""
    groups: int
    segments: int

    @classmethod
    def of(cls, times: Array, positions: Array, steps: int, blocks: int, *, over_time: bool = True) -> Pairs:
        """Pairs of records `steps` apart, in about `blocks` blocks.

        Raises:
            TypeError, ValueError: as `checked`; unequal steps of time; fewer records than the lag needs.
        """
        t, x = checked(times, positions)
        whole("lag", steps, 1)
        whole("blocks", blocks, MIN_BLOCKS)
        count = len(t) - steps
        if count < 1:
            raise ValueError(f"lag must be below the number of records, {len(t)}, got {steps}; record more often")
        lags = t[steps:] - t[:-steps]
        lag = float(lags.mean())
        if float((lags - lag).abs().max()) > 1e-6 * lag:
            raise ValueError(
                f"times must be equally spaced, got steps from {float(lags.min()):g} to {float(lags.max()):g}; "
                "take a window of two records at a time: times[k : k + 2], positions[k : k + 2]"
            )
        replicas = x.shape[1]
        groups = min(replicas, blocks)
        segments = min(count, math.ceil(blocks / replicas)) if over_time else 1
        return cls(x, steps, lag, groups, segments)

    @property
    def blocks(self) -> int:
        return self.groups * self.segments

    @property
    def starts(self) -> int:
        return len(self.positions) - self.steps

    @property
    def samples(self) -> int:
        return self.starts * self.positions.shape[1]

    @property
    def dimensions(self) -> int:
        return int(self.positions.shape[2])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(P, r, d) and (P, r, d) in float64, block by block; neighbours in time are neighbours here."""
        replicas = self.positions.shape[1]
        for group in range(self.groups):
            mine = slice(group * replicas // self.groups, (group + 1) * replicas // self.groups)
            x = double(self.positions[:, mine])
            for segment in range(self.segments):
                first = segment * self.starts // self.segments
                last = (segment + 1) * self.starts // self.segments
                yield x[first:last], x[first + self.steps : last + self.steps]

    def too_few(self) -> str:
        """Why the sample does not show its own scatter; empty where it does."""
        if self.blocks >= MIN_BLOCKS:
            return ""
        return (
            f"{self.positions.shape[1]} replicas and {len(self.positions)} records make {self.blocks} blocks, and "
            f"{MIN_BLOCKS} are needed to see their scatter"
        )


def jackknife(full: Tensor, without: Tensor) -> Sampled:
    """Pseudo-values n·θ − (n−1)·θ_{−b} (B,) and their mean, which has no bias of order 1/n any more.

    `full` (), `without` (B,): a statistic of all blocks, and of all but one. Source: Quenouille 1956.
    """
    blocks = len(without)
    return Sampled.mean(blocks * full - (blocks - 1) * without)
