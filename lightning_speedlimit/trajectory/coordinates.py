"""Which coordinates of some parameters are measured, and how they are brought together into one vector.

A vector is a matrix of rows, each of contiguous coordinates of ONE parameter, with zeros where its last row is not
full: rows of 256 where all coordinates are measured, units of 8 where some are drawn (see draw.py). A row then counts
for `weight` = 1/π rows of its kind. Sums over rows, weighted so, are a scalar product: Cauchy–Schwarz, and with it
every bound, holds for the drawn coordinates as for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.shards import is_distributed, is_flat, local
from lightning_speedlimit.trajectory.sums import sum_dtype

HOST = ("cpu",)  # devices whose memory can be read without waiting for them
UNIT = 8  # contiguous coordinates that are drawn together
ROW = 256
_CACHED = 1 << 18
_CERTAIN = 1.0 + 1e-12  # 1/π of a unit that can't be missed, with its rounding


def dense(tensor: Tensor) -> Tensor:
    """Detached, strided (sparse gradients are coalesced: their raw values count duplicates apart), real, local."""
    tensor = local(tensor).detach()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().to_dense() if tensor.layout == torch.sparse_coo else tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """At least float32: differences of half-precision weights are exact there."""
    double = parameter.dtype in (torch.float64, torch.complex128)
    return torch.float64 if double else torch.float32


class Vector:
    """A matrix of rows, and where each parameter's coordinates lie in it: in its shape, or as drawn units.

    arrays: of drawn units on the host, the views once more, for numpy.
    """

    def __init__(self, rows: Tensor, views: list[Tensor], tails: dict[int, Tensor], arrays: dict[int, Any]) -> None:
        self.rows, self.views, self.tails, self.arrays = rows, views, tails, arrays


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
        self._plain = self.local and not any(p.is_complex() for p in parameters)
        # Products are scaled on their way into float32 sums: an update of 1e-22 squared is nothing there.
        self.scale = 1.0 if self.dtype == torch.float64 else 2.0**40
        self.unscaled = 1.0 / self.scale
        self._zero = torch.zeros((), dtype=self.dtype, device=self.device)
        self._ones = torch.ones(UNIT, dtype=self.dtype, device=self.device)
        self._cuts: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._offsets: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._place(weights, shares)
        size = _CACHED if self.on_host else self.count * self.width
        self.stretch = max(1, size // self.width)  # rows that are worked on at a time
        self.all_stretches = self.stretches(slice(0, self.count))

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
        """Zeros, ready to be gathered into."""
        rows = self.zeros()
        flat, views, tails, arrays = rows.view(-1), list[Tensor](), dict[int, Tensor](), dict[int, Any]()
        for i, (place, shape, drawn) in enumerate(zip(self.rows, self.shapes, self.drawn, strict=True)):
            begin = place.start * self.width
            if drawn is None:
                views.append(flat[begin : begin + shape.numel()].view(shape))
                continue
            views.append(rows[place.start : place.start + len(drawn)])
            if self.on_host:
                arrays[i] = views[i].numpy()
            if shape.numel() % UNIT:
                tails[i] = flat[(place.stop - 1) * UNIT :][: shape.numel() % UNIT]
        return Vector(rows, views, tails, arrays)

    def gather(self, tensors: Sequence[Tensor | None], into: Vector, members: range | None = None) -> Tensor:
        """The measured coordinates of one tensor for each parameter; zeros for None.

        Args:
            members: the parameters that the tensors belong to; the rows of others stay as they are.
        """
        members = range(len(self.parameters)) if members is None else members
        found = [t for t in tensors if t is not None]
        if not self._plain or any(t.layout is not torch.strided for t in found):
            found = [dense(t) for t in found]
        if self.exact and len(found) == len(into.views):
            torch._foreach_copy_(into.views, found)
            return into.rows
        whole: tuple[list[Tensor], list[Tensor]] = [], []
        given = iter(found)
        for i, tensor in zip(members, tensors, strict=True):
            if tensor is None:
                into.rows[self.rows[i]].zero_()
            elif self.drawn[i] is None:
                whole[0].append(into.views[i])
                whole[1].append(next(given))
            else:
                self._gather_drawn(i, next(given), into)
        if whole[0]:
            torch._foreach_copy_(*whole)
        return into.rows

    def _gather_drawn(self, i: int, tensor: Tensor, into: Vector) -> None:
        view, drawn, array = into.views[i], self.drawn[i], into.arrays.get(i)
        assert drawn is not None
        tensor = tensor.detach()
        if not tensor.is_contiguous():
            self._gather_strided(i, tensor, into)
            return
        whole, same = tensor.numel() // UNIT * UNIT, tensor.dtype == view.dtype
        if array is not None and same:  # half the time of index_select
            units = tensor.numpy().reshape(-1)[:whole].reshape(-1, UNIT)
            units.take(drawn.numpy(), 0, out=array, mode="clip")
        elif same:
            torch.index_select(tensor.view(-1)[:whole].view(-1, UNIT), 0, drawn, out=view)
        else:
            view.copy_(tensor.view(-1)[:whole].view(-1, UNIT).index_select(0, drawn))
        if i in into.tails:
            into.tails[i].copy_(tensor.view(-1)[whole:])

    def _gather_strided(self, i: int, tensor: Tensor, into: Vector) -> None:
        """From another memory order (channels_last): by each coordinate's place in it, without copying the whole."""
        drawn = self.drawn[i]
        assert drawn is not None
        key = i, tuple(tensor.stride())
        if key not in self._offsets:
            whole = tensor.numel() // UNIT * UNIT
            tail = torch.arange(whole, tensor.numel(), device=drawn.device)
            index = torch.cat([(drawn[:, None] * UNIT + torch.arange(UNIT, device=drawn.device)).view(-1), tail])
            offset = torch.zeros_like(index)
            for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
                offset += index % size * stride
                index = index // size
            self._offsets[key] = offset
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        values = tensor.as_strided((extent,), (1,)).index_select(0, self._offsets[key])
        into.views[i].copy_(values[: drawn.numel() * UNIT].view(-1, UNIT))
        if i in into.tails:
            into.tails[i].copy_(values[drawn.numel() * UNIT :])

    def cut(self, kept: Tensor, rows: slice) -> Tensor:
        """Some rows of a tensor that stays as long as these coordinates: a view, made once."""
        key = id(kept), rows.start, rows.stop
        found = self._cuts.get(key)
        if found is None:
            whole = rows.start == 0 and rows.stop >= len(kept)
            found = self._cuts[key] = kept, kept if whole else kept[rows]
        return found[1]

    def dot(self, a: Tensor, b: Tensor, scratch: Tensor, out: Tensor) -> None:
        """out ← scale · Σ a b of each row; scratch: room as large as a.

        `sum` adds in pairs: 1e-7 in float32, where `torch.dot` is off by 5e-5. Of eight numbers `mv` is the faster.
        """
        product = torch.addcmul(self._zero, a, b, value=self.scale, out=scratch)
        torch.sum(product, 1, out=out) if self.exact else torch.mv(product, self._ones, out=out)

    def squares(self, a: Tensor, out: Tensor) -> None:
        """out ← Σ a² of each row, in float64 where there is one: whatever its size, it is not lost."""
        torch.linalg.vector_norm(a, dim=1, dtype=out.dtype, out=out).square_()

    def total(self, row: Tensor) -> Tensor:
        """Σ weight x over a number x of each row."""
        return torch.dot(row.to(self.weights.dtype), self.weights)

    def norm_squared(self, vector: Tensor) -> Tensor:
        """Σ weight x² over all rows of a vector."""
        own = self.row(self.weights.dtype)
        self.squares(vector, own)
        return self.total(own)

    def fast_norm_squared(self, vector: Tensor) -> Tensor:
        """The same by float32 products: for what is looked at in every step."""
        return self.total(torch.sum(torch.addcmul(self._zero, vector, vector, value=self.scale), 1)) / self.scale

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

    def scratch(self) -> Tensor:
        """Room for one stretch."""
        size = min(self.stretch, self.count)
        return torch.empty(size, self.width, dtype=self.dtype, device=self.device)

    def rest(self, i: int) -> Tensor:
        """1 − π of parameter i's rows."""
        return 1.0 - self.shares[i] / self.weights[self.rows[i]]

    def of_each(self, numbers: Sequence[float]) -> Tensor:
        """(count,): a number of each parameter at all its rows."""
        lengths = torch.tensor([rows.stop - rows.start for rows in self.rows])
        spread = torch.repeat_interleave(torch.tensor(numbers), lengths, output_size=self.count)
        return spread.to(self.device, non_blocking=True)
