"""Where the measured coordinates of some parameters lie in a vector, and how they are brought there.

A vector is a matrix of rows, each of contiguous coordinates of ONE parameter, with zeros where its last row is not
full: rows of 256 where all coordinates are measured, units of 8 where some are drawn (see draw.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_speedlimit.trajectory import compiled
from lightning_speedlimit.trajectory.shards import are_sharded, local

HOST = ("cpu",)  # devices whose memory can be read without waiting for them
ROW = 256
UNIT = 8  # contiguous coordinates that are drawn together
_PIECE = 1 << 16  # coordinates that are looked at together


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


class _Place(NamedTuple):
    """Of one parameter in a vector.

    whole: all of its measured coordinates, in its shape where these are all. units: the drawn ones. tail: its last
    coordinates, which fill no unit.
    """

    whole: Tensor
    units: Tensor | None
    tail: Tensor | None


class Vector:
    """The measured coordinates of some parameters, a matrix of rows; what no coordinate fills is 0."""

    def __init__(self, layout: Layout) -> None:
        self.rows, self._layout = layout.zeros(), layout

    @functools.cached_property
    def places(self) -> list[_Place]:
        """Of each parameter."""
        known = self._layout
        return [self._place(*of) for of in zip(known.rows, known.shapes, known.drawn, known.numbers, strict=True)]

    def _place(self, rows: slice, shape: torch.Size, drawn: Tensor | None, number: int) -> _Place:
        whole = self.rows[rows].view(-1)[:number]
        if drawn is None:
            return _Place(whole.view(shape), None, None)
        full = UNIT * len(drawn)
        return _Place(whole, whole[:full].view(-1, UNIT), whole[full:] if full < number else None)


class Layout:
    """The measured coordinates of some parameters on one device, in one dtype.

    Args:
        parameters: each once. drawn: for each the drawn units (ascending, whole ones), or None: all coordinates.
    """

    def __init__(self, parameters: Sequence[Tensor], drawn: Sequence[Tensor | None]) -> None:
        self.parameters, self.shapes = list(parameters), [dense(p).shape for p in parameters]
        self.dtype, self.device = compute_dtype(parameters[0]), parameters[0].device
        self.on_host = self.device.type in HOST
        self.drawn = [None if d is None else d.to(self.device, torch.int64, copy=True) for d in drawn]
        self.exact = all(d is None for d in drawn)
        self.width = ROW if self.exact else UNIT
        self.local = not are_sharded(self.parameters)
        self._plain = self.local and not any(p.is_complex() for p in parameters)
        self.rows: list[slice] = []
        self.count, self._sizes = 0, [shape.numel() for shape in self.shapes]
        for size, units in zip(self._sizes, drawn, strict=True):
            low, length = self.count, -(-size // self.width) if units is None else len(units) + (size % UNIT > 0)
            self.count += length
            self.rows.append(slice(low, self.count))
        self.passes: compiled.Passes | None = None
        if self.on_host and self.dtype == torch.float32 and self._plain and compiled.LIBRARY is not None:
            self.passes = compiled.Passes(self.width, self.rows, self._sizes, self.drawn)
        self._offsets: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    @property
    def numbers(self) -> list[int]:
        """Of each parameter the coordinates that are measured."""
        return [n if d is None else UNIT * len(d) + n % UNIT for n, d in zip(self._sizes, self.drawn, strict=True)]

    def pieces(self) -> list[slice]:
        """The rows, so many at a time that what is made of them takes little memory."""
        size = (_PIECE if self.on_host else 256 * _PIECE) // self.width
        return [slice(low, min(low + size, self.count)) for low in range(0, self.count, size)]

    def zeros(self) -> Tensor:
        return torch.zeros(self.count, self.width, dtype=self.dtype, device=self.device)

    def row(self, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros, a number for each row."""
        return torch.zeros(self.count, dtype=dtype or self.dtype, device=self.device)

    def vector(self) -> Vector:
        """Zeros, to be gathered into."""
        return Vector(self)

    def gather(self, tensors: Sequence[Tensor | None], into: Vector, first: int = 0) -> Tensor:
        """The measured coordinates of a tensor for each parameter; zeros for None. Others stay as they are.

        Args:
            first: the parameter that the first tensor belongs to.
        Raises:
            ValueError: a parameter has another size than it had.
        """
        if self.passes is not None and (known := self.passes.sources(tensors, first)) is not None:
            self.passes.gather(known, into.rows, first)
            return into.rows
        places, sources = list[Tensor](), list[Tensor]()
        for i, tensor in enumerate(tensors, first):
            place, drawn = into.places[i], self.drawn[i]
            if tensor is None:
                place.whole.zero_()
                continue
            values = self._checked(tensor, i)
            if drawn is None:
                places.append(place.whole)
                sources.append(values)
            elif values.is_contiguous():
                _take(drawn, values, place)
            else:
                place.whole.copy_(self._strided(values, i))
        if places:
            torch._foreach_copy_(places, sources)
        return into.rows

    def _checked(self, tensor: Tensor, i: int) -> Tensor:
        """Strided, real, local."""
        values = tensor if self._plain and tensor.layout is torch.strided else dense(tensor)
        if values.numel() != (size := self._sizes[i]):
            raise ValueError(f"a parameter of {size} coordinates has {values.numel()} now: measure anew from there")
        return values if values.shape == self.shapes[i] else values.reshape(self.shapes[i])

    @functools.cached_property
    def room(self) -> Vector:
        """For what is gathered to be looked at, and soon written over."""
        return self.vector()

    def holds(self, known: Vector, tensors: Sequence[Tensor | None]) -> bool:
        """On the host: gathered now, they would be what is known, bit by bit. On a device False: it can't be seen."""
        if not self.on_host:
            return False
        if self.passes is not None and (sources := self.passes.sources(tensors)) is not None:
            return self.passes.holds(sources, known.rows)
        bits = torch.int64 if self.dtype == torch.float64 else torch.int32  # a NaN is not equal to itself
        return torch.equal(self.gather(tensors, self.room).view(bits), known.rows.view(bits))

    def places(self, i: int) -> Iterator[Tensor]:
        """Parameter i's measured coordinates within it, in the order in which they lie in a vector, on the host."""
        size, drawn, first = self.shapes[i].numel(), self.drawn[i], 0
        if drawn is not None:
            first = size // UNIT * UNIT
            for units in torch.split(drawn.cpu(), _PIECE // UNIT):
                yield (units[:, None] * UNIT + torch.arange(UNIT, device="cpu")).view(-1)
        for low in range(first, size, _PIECE):
            yield torch.arange(low, min(low + _PIECE, size), device="cpu")

    def scatter(self, rows: Tensor, i: int, elsewhere: float = 0.0) -> Tensor:
        """One parameter's coordinates of a vector, in its shape (complex: pairs); another number elsewhere."""
        own, found = rows[self.rows[i]].reshape(-1), rows.new_full(self.shapes[i], elsewhere)
        for places in self.places(i):
            found.view(-1)[places.to(self.device)] = own[: len(places)]
            own = own[len(places) :]
        return found

    def _strided(self, tensor: Tensor, i: int) -> Tensor:
        """From another memory order (channels_last): by each coordinate's place in it, without copying the whole."""
        key = i, tuple(tensor.stride())
        if key not in self._offsets:
            index = torch.cat(list(self.places(i))).to(self.device)
            offset = torch.zeros_like(index)
            for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
                offset += index % size * stride
                index = index // size
            self._offsets[key] = offset
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.as_strided((extent,), (1,)).index_select(0, self._offsets[key])


def _take(drawn: Tensor, tensor: Tensor, place: _Place) -> None:
    """The drawn units of a contiguous tensor."""
    assert place.units is not None
    flat, whole = tensor.view(-1), tensor.numel() // UNIT * UNIT
    if tensor.dtype is place.units.dtype:
        torch.index_select(flat[:whole].view(-1, UNIT), 0, drawn, out=place.units)
    else:
        place.units.copy_(flat[:whole].view(-1, UNIT).index_select(0, drawn))
    if place.tail is not None:
        place.tail.copy_(flat[whole:])
