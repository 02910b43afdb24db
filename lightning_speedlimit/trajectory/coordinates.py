"""Which coordinates of some parameters are measured, and how they are brought together into one vector.

A vector is a matrix of rows, each of contiguous coordinates of ONE parameter, with zeros where its last row is not
full: rows of 256 where all coordinates are measured, units of 8 where some are drawn (see draw.py). A row then counts
for `weight` = 1/π rows of its kind. Sums over rows, weighted so, are a scalar product: Cauchy–Schwarz, and with it
every bound, holds for the drawn coordinates as for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_speedlimit.trajectory.gathering import UNIT, Gathering, Layout, Vector, dense, remember
from lightning_speedlimit.trajectory.shards import is_distributed, is_flat
from lightning_speedlimit.trajectory.sums import sum_dtype

HOST = ("cpu",)  # devices whose memory can be read without waiting for them
ROW = 256
_CACHED = 1 << 16  # coordinates of a stretch, of which a step's vectors stay in the cache of a core
_AT_ONCE = 1 << 19  # so few are worked on together: more calls would cost more than the cache saves
_CERTAIN = 1.0 + 1e-12  # 1/π of a unit that can't be missed, with its rounding
_LARGE = 2.0**-66  # beside it a row's products that float32 does not hold, below 256 · 2^−126, are nothing in float64
_LOOKED_AT = 16  # steps
_FEW = 4  # ways to divide the parameters, of layers and of groups, that are kept
# numpy's scalar products of rows go through the numbers once, torch's product and sum twice.
_row_dots: Callable[..., Any] = getattr(np, "vecdot", None) or functools.partial(np.einsum, "ij,ij->i")


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """At least float32: differences of half-precision weights are exact there."""
    double = parameter.dtype in (torch.float64, torch.complex128)
    return torch.float64 if double else torch.float32


class Coordinates:
    """The measured coordinates of some parameters on one device, in one dtype.

    Args:
        parameters: each once. drawn: for each the drawn units (ascending, whole ones), or None: all coordinates.
        weights: for each the 1/π of its drawn units. shares: of each, 1 over the processes that hold it alike.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        drawn: Sequence[Tensor | None],
        weights: Sequence[Tensor | None],
        shares: Sequence[float],
    ) -> None:
        self.parameters = list(parameters)
        self.dtype, self.device = compute_dtype(parameters[0]), parameters[0].device
        self.drawn = [None if d is None else d.to(self.device) for d in drawn]
        self.on_host = self.device.type in HOST
        self.inverse, self.shares = list(weights), list(shares)
        self.width = ROW if all(d is None for d in drawn) else UNIT
        self.shapes = [dense(p).shape for p in parameters]
        self.local = not any(is_distributed(p) or is_flat(p) for p in parameters)  # no shards
        # Products are scaled on their way into float32 sums: an update of 1e-22 squared is nothing there.
        self.scale = 1.0 if self.dtype == torch.float64 else 2.0**40
        self.unscaled = 1.0 / self.scale
        self._zero = torch.zeros((), dtype=self.dtype, device=self.device)
        self._ones = torch.ones(UNIT, dtype=self.dtype, device=self.device)
        self.held, self.judged = False, 0  # float32 holds the products of a step; steps that were asked of
        self.known = 0  # sums of a row, when they were last looked at
        self._arrays: dict[int, tuple[Tensor, Any]] = {}
        self._spread: dict[tuple[int, ...], Any] = {}
        self._cuts: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._place(weights, shares)
        size = self.count * self.width
        together = not self.on_host or (self.exact and size <= _AT_ONCE)
        number = 1 if together else max(1, round(size / _CACHED))
        self.stretch = max(1, -(-self.count // number))  # rows that are worked on at a time
        self.all_stretches = self.stretches(slice(0, self.count))
        self._filled = [i for i, rows in enumerate(self.rows) if rows.stop > rows.start]
        self._starts = np.array([self.rows[i].start for i in self._filled], dtype=np.int64)
        self._unweighted = self.exact and set(self.shares) <= {1.0}
        layout = Layout(self.rows, self.shapes, self.drawn, self.width, self.count)
        plain = self.local and not any(p.is_complex() for p in parameters)
        self._gathering = Gathering(layout, self.all_stretches, self.dtype, on_host=self.on_host, plain=plain)

    def _place(self, weights: Sequence[Tensor | None], shares: Sequence[float]) -> None:
        self.rows: list[slice] = []
        self.numbers: list[int] = []  # of each the coordinates that are measured
        self.counts: list[int]  # of each the units that may be missed
        spread, low = [], 0
        for shape, drawn, weight, share in zip(self.shapes, self.drawn, weights, shares, strict=True):
            tail = shape.numel() % UNIT
            if drawn is None or weight is None:
                count = -(-shape.numel() // self.width)
                spread.append(torch.full((count,), share, dtype=torch.float64))
                self.numbers.append(shape.numel())
            else:
                found = [weight.double().cpu(), torch.ones(int(tail > 0), dtype=torch.float64)]
                spread.append(torch.cat(found) * share)
                count = len(spread[-1])
                self.numbers.append(UNIT * len(drawn) + tail)
            self.rows.append(slice(low, low + count))
            low += count
        self.count = low
        self.counts = [
            0 if drawn is None else int((own > share * _CERTAIN).sum())
            for drawn, own, share in zip(self.drawn, spread, shares, strict=True)
        ]
        self.weights = torch.cat(spread).to(self.device, sum_dtype(self.device), non_blocking=True)  # (count,)

    @property
    def exact(self) -> bool:
        return self.width == ROW

    def zeros(self) -> Tensor:
        return torch.zeros(self.count, self.width, dtype=self.dtype, device=self.device)

    def row(self, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros, a number for each row."""
        return torch.zeros(self.count, dtype=dtype or self.dtype, device=self.device)

    def vector(self) -> Vector:
        """Zeros, to be gathered into."""
        return Vector(self.zeros())

    def room(self) -> Tensor:
        """Zeros, as many as a stretch may have."""
        return torch.zeros(min(self.stretch, self.count), self.width, dtype=self.dtype, device=self.device)

    def gather_all(self, tensors: Sequence[Tensor | None], into: Vector) -> Tensor:
        """The measured coordinates of one tensor for each parameter; zeros for None."""
        tensors = self.prepared(tensors)
        for rows in self.all_stretches:
            self.gather(tensors, into, rows)
        return into.rows

    def gather(self, tensors: Sequence[Tensor | None], into: Vector, rows: slice, first: int = 0) -> Tensor:
        """Those at some rows, of tensors that are `prepared`; first: the parameter that the first one belongs to."""
        return self._gathering.gather(tensors, into, rows, first)

    def prepared(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Strided, real, local."""
        return self._gathering.prepared(tensors)

    def holds(self, vector: Vector, tensors: Sequence[Tensor | None]) -> bool:
        """On the host: gathered now, they would be what the vector holds. On a device False: it is not known."""
        return self._gathering.holds(vector, tensors)

    def cut(self, kept: Tensor, rows: slice) -> Tensor:
        """Some rows of a tensor that stays as long as these coordinates: a view, made once."""
        key = id(kept), rows.start, rows.stop
        found = self._cuts.get(key)
        if found is None:
            whole = rows.start == 0 and rows.stop >= len(kept)
            found = remember(self._cuts, key, (kept, kept if whole else kept[rows]))
        return found[1]

    def dot(self, a: Tensor, b: Tensor, scratch: Tensor, out: Tensor) -> None:
        """out ← scale · Σ a b of each row; scratch: room as large as a.

        `sum` adds in pairs: 1e-7 in float32, where `torch.dot` is off by 5e-5. Of eight numbers `mv` is the faster.
        """
        product = torch.addcmul(self._zero, a, b, value=self.scale, out=scratch)
        torch.sum(product, 1, out=out) if self.exact else torch.mv(product, self._ones, out=out)

    def step_dot(self, a: Tensor, b: Tensor, scratch: Tensor, out: Tensor) -> None:
        """`dot` of views that are kept: by plain products, where `judge` has seen that float32 holds them."""
        if self.held:
            sums = self._array(out)
            _row_dots(self._array(a), self._array(b), out=sums)
            np.multiply(sums, self.scale, out=sums)
        elif self.on_host and not self.exact:  # a fourth of the time of mv
            torch.addcmul(self._zero, a, b, value=self.scale, out=scratch)
            np.dot(self._array(scratch), self._array(self._ones), out=self._array(out))
        else:
            self.dot(a, b, scratch, out)

    def _array(self, kept: Tensor) -> Any:
        found = self._arrays.get(id(kept))
        if found is None:
            found = remember(self._arrays, id(kept), (kept, kept.numpy()))
        return found[1]

    def judge(self, sums: Sequence[Tensor]) -> None:
        """From the run's sums of each row: whether the products of the next steps may be summed up plainly.

        They may where each sum is 0 or so large that what float32 loses of a step's products is nothing beside it, and
        no sum has just begun. It is looked at again every 16 steps: coordinates at rest may begin to move.
        """
        self.judged += 1
        if self.on_host and self.exact and not (self.held and self.judged % _LOOKED_AT):
            sizes = np.abs(np.concatenate([row.numpy() for row in sums]))
            some, known = np.count_nonzero(sizes), self.known == len(sums)
            self.held = bool(known and some > 0 and np.count_nonzero(sizes >= _LARGE) == some)
            self.known = len(sums)

    def squares(self, a: Tensor, out: Tensor) -> None:
        """out ← Σ a² of each row, in float64 where there is one: whatever its size, it is not lost."""
        torch.linalg.vector_norm(a, dim=1, dtype=out.dtype, out=out).square_()

    def total(self, row: Tensor) -> Tensor:
        """Σ weight x over a number x of each row."""
        return torch.dot(row.to(self.weights.dtype), self.weights)

    def totals(self, row: Tensor, places: Sequence[int], number: int) -> Tensor:
        """(number,): Σ weight x over a number x of each row, of the parameters at each place; places: of each one."""
        if self.on_host:
            own = row.numpy() if self._unweighted else row.numpy() * self._array(self.weights)
            sums = np.add.reduceat(own, self._starts, dtype=np.float64)
            return torch.from_numpy(np.bincount(self._spread_of(places), sums, number))
        weighted = row * self.weights
        found = weighted.new_zeros(number)
        if number == 1:
            return found.add_(weighted.sum())
        return found.index_add_(0, self._spread_of(places), weighted)

    def _spread_of(self, places: Sequence[int]) -> Any:
        """Places of the parameters that have rows, for numpy; on a device those of all rows."""
        key = tuple(places)
        found = self._spread.get(key)
        if found is None:
            own = [places[i] for i in self._filled]
            found = np.array(own, dtype=np.int64) if self.on_host else self.of_each(places)
            self._spread = {**self._spread, key: found} if len(self._spread) < _FEW else {key: found}
        return found

    def norm_squared(self, vector: Tensor) -> Tensor:
        """Σ weight x² over all rows of a vector."""
        own = self.row(self.weights.dtype)
        self.squares(vector, own)
        return self.total(own)

    def fast_norm_squared(self, vector: Tensor) -> Tensor:
        """The same by float32 products: for what is looked at in every step."""
        own = self.row()
        self.dot(vector, vector, torch.empty_like(vector), own)
        return self.total(own) / self.scale

    def scatter(self, rows: Tensor, i: int, elsewhere: float = 0.0) -> Tensor:
        """One parameter's coordinates of a vector, in its shape (complex: pairs); another number elsewhere."""
        shape, drawn, own = self.shapes[i], self.drawn[i], rows[self.rows[i]]
        if drawn is None:
            return own.reshape(-1)[: shape.numel()].reshape(shape).clone()
        flat, whole = rows.new_full((shape.numel(),), elsewhere), shape.numel() // UNIT * UNIT
        flat[:whole].view(-1, UNIT)[drawn] = own[: len(drawn)]
        if whole < shape.numel():
            flat[whole:] = own[-1, : shape.numel() - whole]
        return flat.reshape(shape)

    def stretches(self, rows: slice) -> list[slice]:
        """The rows in pieces that stay in the cache while they are worked on."""
        starts = range(rows.start, rows.stop, self.stretch)
        return [slice(low, min(low + self.stretch, rows.stop)) for low in starts]

    def rest(self, i: int) -> Tensor:
        """1 − π of parameter i's rows."""
        return 1.0 - self.shares[i] / self.weights[self.rows[i]]

    def of_each(self, numbers: Sequence[float]) -> Tensor:
        """(count,): a number of each parameter at all its rows."""
        lengths = torch.tensor([rows.stop - rows.start for rows in self.rows])
        spread = torch.repeat_interleave(torch.tensor(numbers), lengths, output_size=self.count)
        return spread.to(self.device, non_blocking=True)
