"""Two clouds as pairs of float64 blocks of coordinates: never whole in memory, checked as they pass."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Cloud = Tensor | Iterable[Tensor]

BLOCK_BYTES = 2**23  # of one float64 block of one cloud; about ten of them are held at a time
_PART_BYTES = 2**20  # of the rows of a matrix that one core's cache holds while several operations pass over them
_HALF = (torch.float16, torch.bfloat16)
_PACKAGE = str(Path(__file__).parents[1])


class Clouds:
    """x (N, D) and y (M, D), read in blocks over the coordinates, with the weights of their particles.

    Args:
        x, y: tensors, or iterables over blocks (N, d_b), (M, d_b) of coordinates, in the same order.
        weights_x, weights_y: (N,), (M,), not negative; None: 1/N, 1/M.
        process_group: its ranks hold different coordinates of the same particles.

    Raises:
        TypeError: not tensors of a floating type.
        ValueError: shapes, widths, devices or weights that do not fit, empty or non-finite clouds.
    """

    def __init__(
        self,
        x: Cloud,
        y: Cloud,
        weights_x: Tensor | None = None,
        weights_y: Tensor | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if isinstance(x, Tensor) != isinstance(y, Tensor):
            raise TypeError(
                f"x and y must both be tensors or both be iterables of blocks, got {_kind(x)} and {_kind(y)}; "
                "wrap the tensor in a list: [x]"
            )
        if x is y and isinstance(x, Iterator):
            raise ValueError("x and y must not be one iterator, each would get every other block; make two of them")
        for name, cloud in (("x", x), ("y", y)):
            if isinstance(cloud, Tensor):
                _check_block(name, cloud)
            elif not isinstance(cloud, Iterable):
                raise TypeError(f"{name} must be a tensor (N, D) or an iterable of blocks, got {_kind(cloud)}")
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape[1] != y.shape[1]:
            raise ValueError(
                f"x and y must have the same number of coordinates, got {tuple(x.shape)} and {tuple(y.shape)}; "
                "particles are rows: transpose, or compare clouds of one space"
            )
        self._x, self._y, self.group = x, y, process_group
        # An iterator is its own iterator: what it gave is gone.
        self.rereadable = all(isinstance(c, Tensor) or iter(c) is not c for c in (x, y))
        self._given = (weights_x, weights_y)
        self._warned = False
        self._only: tuple[Tensor, Tensor] | None = None  # the block, where tensors have no second one

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (N, w), (M, w) of float64 blocks, each at most `BLOCK_BYTES`."""
        if self._only is not None:
            yield self._only
            return
        for x, y in self._pairs():
            width = max(1, BLOCK_BYTES // (8 * max(len(x), len(y))))
            if isinstance(self._x, Tensor) and x.shape[1] <= width:
                self._only = _float64(x), _float64(y)
                yield self._only
                return
            for start in range(0, x.shape[1], width):
                part = slice(start, start + width)
                yield _float64(x[:, part]), _float64(y[:, part])

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self._x, Tensor) and isinstance(self._y, Tensor):
            _check_devices(self._x, self._y)
            self._warn_half(self._x, self._y)
            yield self._x.detach(), self._y.detach()
            return
        xs, ys, done = iter(self._x), iter(self._y), object()
        rows: tuple[int, int] | None = None
        count = 0
        while True:
            x, y = next(xs, done), next(ys, done)
            if x is done and y is done:
                break
            if not isinstance(x, Tensor) or not isinstance(y, Tensor):
                if x is done or y is done:
                    short, long = ("x", "y") if x is done else ("y", "x")
                    raise ValueError(
                        f"{short} ended after {count} blocks, {long} went on; "
                        "both must give the same coordinates in the same order"
                    )
                name, block = ("y", y) if isinstance(x, Tensor) else ("x", x)
                raise TypeError(f"{name} must give tensors (N, d), got {_kind(block)} as block {count}")
            _check_block(f"block {count} of x", x)
            _check_block(f"block {count} of y", y)
            _check_devices(x, y)
            if x.shape[1] != y.shape[1]:
                raise ValueError(
                    f"block {count} of x and y must hold the same coordinates, got {tuple(x.shape)} and "
                    f"{tuple(y.shape)}; cut both at the same places"
                )
            rows = rows or (len(x), len(y))
            if rows != (len(x), len(y)):
                raise ValueError(
                    f"every block must hold all particles, {rows[0]} of x and {rows[1]} of y as block 0 did, got "
                    f"{len(x)} and {len(y)} in block {count}; cut along the coordinates, not the particles"
                )
            self._warn_half(x, y)
            count += 1
            yield x.detach(), y.detach()
        if not count:
            raise ValueError("x and y must not be empty, got no blocks; an iterator can be read once only")

    def _warn_half(self, x: Tensor, y: Tensor) -> None:
        for name, cloud in (("x", x), ("y", y)):
            if cloud.dtype in _HALF and not self._warned:
                self._warned = True
                _warn(
                    f"{name} is {cloud.dtype}: rounding of the weights themselves is then part of W₂² (bfloat16 "
                    "checkpoints that moved by 1e-3 of their norm: 92 %); use clouds stored in float32"
                )

    def weights(self, n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(N,), (M,) float64, each summing to 1."""
        given_x, given_y = self._given
        return _normalised("weights_x", given_x, n, device), _normalised("weights_y", given_y, m, device)

    def line(self) -> tuple[Tensor, Tensor] | None:
        """x (N,) and y (N,) where as many particles have one coordinate and one weight, and all are here; else None."""
        if self.group is not None or not self.rereadable or self._given != (None, None):
            return None
        if isinstance(self._x, Tensor) and self._x.shape[1] > 1:
            return None
        blocks = self.blocks()
        x, y = next(blocks)
        if x.shape != y.shape or x.shape[1] > 1 or next(blocks, None) is not None:
            return None
        return x[:, 0], y[:, 0]

    # -- ranks -----------------------------------------------------------------------------------------------

    def sum(self, *tensors: Tensor) -> None:
        """Adds each tensor over the ranks, in place."""
        if self.group is not None:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    def from_first(self, values: tuple[Any, ...] | None) -> tuple[Any, ...]:
        """Rank 0's values on every rank: the ranks then take the same decisions, whatever their machines."""
        if self.group is None:
            assert values is not None
            return values
        device = next((v.device for v in values or () if isinstance(v, Tensor)), None)
        host = None if values is None else tuple(v.cpu() if isinstance(v, Tensor) else v for v in values)
        box: list[Any] = [host]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        return tuple(v.to(device) if isinstance(v, Tensor) and device is not None else v for v in box[0])

    @property
    def decides(self) -> bool:
        """Whether this rank solves; the others wait for what it found."""
        return self.group is None or dist.get_rank(self.group) == 0


def check_finite(x: float, y: float, shift: float) -> None:
    """Raises where the sums of a reading show it: the spreads of x and y, and |ȳ − x̄|²."""
    wrong = "x" if not math.isfinite(x) else "y" if not math.isfinite(y) else "the distance of x and y"
    if not math.isfinite(x + y + shift):
        raise ValueError(
            f"{wrong} must be finite, got NaN or inf among its values (or values so large that their squares are, "
            "beyond 1e150); drop the diverged particles, or scale both clouds down"
        )


def row_parts(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows that take little in float64: no second matrix of the same size is made."""
    size = min(BLOCK_BYTES, _PART_BYTES) if matrix.device.type == "cpu" else BLOCK_BYTES
    step = max(1, size // (8 * max(1, matrix.shape[1])))
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _warn(message: str) -> None:
    """A UserWarning that points at the line outside of this package which led to it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_block(name: str, cloud: Tensor) -> None:
    if cloud.ndim != 2:
        raise ValueError(
            f"{name} must have shape (particles, coordinates), got {tuple(cloud.shape)}; "
            "use flatten(1), or unsqueeze(0) for one particle"
        )
    if not cloud.dtype.is_floating_point:
        cure = "torch.view_as_real(x).flatten(1)" if cloud.dtype.is_complex else ".to(torch.float64)"
        raise TypeError(f"{name} must be of a real floating type, got {cloud.dtype}; use {cure}")
    if not cloud.numel():
        raise ValueError(f"{name} must not be empty, got shape {tuple(cloud.shape)}; at least one particle in 1-D")
    if cloud.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {cloud.layout}; use .to_dense()")


def _check_devices(x: Tensor, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device, got {x.device} and {y.device}; move one: y.to(x.device)")


def _float64(block: Tensor) -> Tensor:
    """In float64 on its device; on the host where the device has none."""
    return (block.cpu() if block.device.type == "mps" else block).to(torch.float64)


def _normalised(name: str, given: Tensor | None, count: int, device: torch.device) -> Tensor:
    if given is None:
        return _equal(count, device)
    if not isinstance(given, Tensor) or given.shape != (count,):
        raise ValueError(
            f"{name} must be a tensor of shape ({count},), one weight per particle, got {_kind(given)}; "
            "torch.as_tensor makes one of a list or an array"
        )
    if given.is_complex():
        raise TypeError(f"{name} must be real, got {given.dtype}; use .abs(), or .real")
    weights = _float64(given.detach()).to(device)
    total, least = math.fsum(weights.tolist()), weights.min().item()
    if not math.isfinite(total) or least < 0 or total <= 0:
        raise ValueError(
            f"{name} must be finite, not negative, and not all zero, got least {least:g} and sum {total:g}; "
            "drop the particles that should not count"
        )
    if abs(total - 1) > 1e-6:
        _warn(f"{name} sums to {total:g}, not 1: it was divided by its sum")
    return _equal(count, device) if bool((weights == weights[0]).all()) else weights / total


def _equal(count: int, device: torch.device) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64, device=device)
