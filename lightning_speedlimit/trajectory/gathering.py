"""Where the measured coordinates of some parameters lie in a vector, and how they are brought there.

A vector is a matrix of rows, each of contiguous coordinates of ONE parameter, with zeros where its last row is not
full: rows of 256 where all coordinates are measured, units of 8 where some are drawn (see draw.py).
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_speedlimit.trajectory import cuts
from lightning_speedlimit.trajectory.cuts import Cuts
from lightning_speedlimit.trajectory.shards import are_sharded, local

Source = Tensor | tuple[Any, Any] | None  # on the host of drawn units: rows of 8 and what fills none, for numpy
_PLAIN = (Tensor, torch.nn.Parameter)
HOST = ("cpu",)  # devices whose memory can be read without waiting for them
ROW = 256
UNIT = 8  # contiguous coordinates that are drawn together
_CACHED = 1 << 16  # coordinates of a stretch, of which a step's vectors stay in the cache of a core
_AT_ONCE = 1 << 19  # so few are worked on together: more calls would cost more than the cache saves
_PIECE = 1 << 16  # places that are looked at together


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


class _Piece(NamedTuple):
    """Neighbouring rows of one parameter.

    view: where their coordinates go. low, high: the first coordinate and the end, where all are measured; None: the
    whole parameter. units: the drawn ones; first: the place of the first of them. tail: room for the parameter's last
    coordinates, which fill no unit. numbers, into, rest: on the host units, view and tail for numpy.
    """

    member: int
    view: Tensor
    low: int | None = None
    high: int | None = None
    units: Tensor | None = None
    first: int = 0
    tail: Tensor | None = None
    numbers: Any = None
    into: Any = None
    rest: Any = None


class _Stretch(NamedTuple):
    """found: the rows. pads: what no coordinate fills, where other stretches have left something."""

    found: Tensor
    pieces: list[_Piece]
    pads: list[Tensor]
    whole: list[Tensor] | None  # the views, where they are whole parameters, and all of them


class Vector:
    """A matrix of rows: of all coordinates, or room for one stretch after the other."""

    def __init__(self, rows: Tensor, *, room: bool = False) -> None:
        self.rows, self.room = rows, room
        self._cuts = Cuts(rows)
        self.stretches: dict[tuple[int, int], _Stretch] = {}
        self.pieces = 0  # of these
        self.last: _Stretch | None = None

    def at(self, rows: slice) -> Tensor:
        """Some of its rows."""
        return self._cuts.at(rows)[0]


class Layout:
    """The measured coordinates of some parameters on one device, in one dtype.

    Args:
        parameters: each once. drawn: for each the drawn units (ascending, whole ones), or None: all coordinates.
    """

    def __init__(self, parameters: Sequence[Tensor], drawn: Sequence[Tensor | None]) -> None:
        self.parameters, self.shapes = list(parameters), [dense(p).shape for p in parameters]
        self.dtype, self.device = compute_dtype(parameters[0]), parameters[0].device
        self.on_host = self.device.type in HOST
        self.drawn = [None if d is None else d.to(self.device) for d in drawn]
        self.exact = all(d is None for d in drawn)
        self.width = ROW if self.exact else UNIT
        self.local = not are_sharded(self.parameters)
        self._plain = self.local and not any(p.is_complex() for p in parameters)
        self.rows: list[slice] = []
        self.count, self._sizes = 0, [shape.numel() for shape in self.shapes]
        for shape, units in zip(self.shapes, drawn, strict=True):
            size = shape.numel()
            low, length = self.count, -(-size // self.width) if units is None else len(units) + (size % UNIT > 0)
            self.count += length
            self.rows.append(slice(low, self.count))
        size = self.count * self.width
        together = not self.on_host or (self.exact and size <= _AT_ONCE)
        number = 1 if together else max(1, round(size / _CACHED))
        self.stretch = max(1, -(-self.count // number))  # rows that are worked on at a time
        self.all_stretches = self.stretches(slice(0, self.count))
        self._cut = [self.exact and len(self.stretches(rows)) > 1 for rows in self.rows]
        self._offsets: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._room: Vector | None = None

    @property
    def numbers(self) -> list[int]:
        """Of each parameter the coordinates that are measured."""
        return [n if d is None else UNIT * len(d) + n % UNIT for n, d in zip(self._sizes, self.drawn, strict=True)]

    def stretches(self, rows: slice) -> list[slice]:
        """The rows in pieces that stay in the cache while they are worked on, cut at the same places for all."""
        starts = range(rows.start // self.stretch * self.stretch, rows.stop, self.stretch)
        found = [slice(max(low, rows.start), min(low + self.stretch, rows.stop)) for low in starts]
        return found if rows.start < rows.stop else []

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

    def prepared(self, tensors: Sequence[Tensor | None], first: int = 0) -> Sequence[Source]:
        """As `gather` takes them: strided, real, local; flat where they lie in several stretches.

        Args:
            first: the parameter that the first one belongs to.
        Raises:
            ValueError: a parameter has another size than it had.
        """
        if not self._plain or [t for t in tensors if t is not None and t.layout is not torch.strided]:
            tensors = [None if t is None else dense(t) for t in tensors]
        if self.exact and len(self.all_stretches) == 1:
            return tensors
        return [None if t is None else self._source(t, i) for i, t in enumerate(tensors, first)]

    def _source(self, tensor: Tensor, i: int) -> Source:
        drawn = self.drawn[i] is not None
        if not (drawn or self._cut[i]):
            return tensor
        if tensor.numel() != (size := self._sizes[i]):
            raise ValueError(f"a parameter of {size} coordinates has {tensor.numel()} now: measure anew from there")
        tensor = tensor.detach() if tensor.requires_grad else tensor
        tensor = tensor if drawn else tensor.contiguous()
        if self.on_host and tensor.dtype is self.dtype and tensor.is_contiguous():
            values, whole = tensor.numpy().reshape(-1), size - size % UNIT if drawn else 0
            return values[:whole].reshape(-1, UNIT), values[whole:]
        return tensor

    def gather_all(self, tensors: Sequence[Tensor | None], into: Vector) -> Tensor:
        """The measured coordinates of one tensor for each parameter; zeros for None."""
        sources = self.prepared(tensors)
        for rows in self.all_stretches:
            self.gather(sources, into, rows)
        return into.rows

    def gather(self, sources: Sequence[Source], into: Vector, rows: slice, first: int = 0) -> Tensor:
        """Those at some rows, of tensors that are `prepared`; first: the parameter that the first one belongs to."""
        stretch = self._stretch(into, rows)
        if stretch.pads and into.last is not stretch:
            torch._foreach_zero_(stretch.pads)
        into.last = stretch
        if stretch.whole is not None and not any(map(operator.is_, sources, repeat(None))):  # of all parameters
            torch._foreach_copy_(stretch.whole, sources)  # type: ignore[arg-type]
            return stretch.found
        views, values = list[Tensor](), list[Tensor]()
        for piece in stretch.pieces:
            source = sources[piece.member - first]
            if isinstance(source, tuple):
                units, rest = source
                if piece.units is None:
                    np.copyto(piece.into, rest[piece.low : piece.high])
                    continue
                units.take(piece.numbers, 0, out=piece.into, mode="clip")  # half the time of index_select
                if piece.tail is not None:
                    piece.rest[:] = rest
            elif source is None:
                piece.view.zero_()
                if piece.tail is not None:
                    piece.tail.zero_()
            elif piece.units is None:
                views.append(piece.view)
                values.append(source if piece.low is None else source.reshape(-1)[piece.low : piece.high])
            elif source.is_contiguous():
                _take(piece, piece.units, source)
            else:
                self._take_strided(piece, source)
        if views:
            torch._foreach_copy_(views, values)
        return stretch.found

    def holds(self, vector: Vector, tensors: Sequence[Tensor | None]) -> bool:
        """On the host: gathered now, they would be what the vector holds. On a device False: it is not known."""
        if not self.on_host or not self.all_stretches:
            return self.on_host
        if self.exact and self._plain and (known := self._as_they_are(vector.rows, tensors)) is not None:
            return known
        room = self._room = self._room or Vector(self.room(), room=True)
        sources = self.prepared(tensors)
        pairs = ((self.gather(sources, room, rows), vector.rows[rows]) for rows in self.all_stretches)
        return all(np.array_equal(now.numpy(), known.numpy()) for now, known in pairs)

    def _as_they_are(self, known: Tensor, tensors: Sequence[Tensor | None]) -> bool | None:
        """Whether they are there bit by bit; None: not all of them can be compared so."""
        start, length = known.data_ptr(), self.width * self.dtype.itemsize
        for tensor, shape, rows in zip(tensors, self.shapes, self.rows, strict=True):
            if _memcmp is None or type(tensor) not in _PLAIN or tensor is None or tensor.dtype is not self.dtype:
                return None  # a tensor of another class may have no memory of its own
            if not (tensor.is_cpu and tensor.is_contiguous() and tensor.shape == shape and (own := tensor.data_ptr())):
                return None
            if _memcmp(own, start + rows.start * length, tensor.nbytes):
                return False
        return True

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

    def _stretch(self, into: Vector, rows: slice) -> _Stretch:
        key = rows.start, rows.stop
        found = into.stretches.get(key)
        if found is None:
            found = self._made(into, rows)
            into.pieces += len(found.pieces)
            if into.pieces > max(cuts.MOST, 4 * len(self.rows)):
                into.stretches.clear()
                into.pieces = len(found.pieces)
            into.stretches[key] = found
        return found

    def _made(self, into: Vector, rows: slice) -> _Stretch:
        offset = rows.start if into.room else 0
        flat, pieces, pads = into.rows.view(-1), list[_Piece](), list[Tensor]()
        for i, own in enumerate(self.rows):
            low, high = max(own.start, rows.start), min(own.stop, rows.stop)
            if low < high:
                place = flat[(low - offset) * self.width : (high - offset) * self.width]
                piece, used = self._piece(i, low - own.start, high - own.start, place)
                pieces.append(piece)
                if used < len(place) and into.room:
                    pads.append(place[used:])
        here = into.rows[rows.start - offset : rows.stop - offset]
        whole = len(pieces) == len(self.rows) and all(p.low is None and p.units is None for p in pieces)
        return _Stretch(here, pieces, pads, [p.view for p in pieces] if whole else None)

    def _piece(self, i: int, first: int, last: int, place: Tensor) -> tuple[_Piece, int]:
        """Of some of a parameter's rows, and how many coordinates it has."""
        shape, drawn = self.shapes[i], self.drawn[i]
        size = shape.numel()
        if drawn is None:
            low, high = first * self.width, min(last * self.width, size)
            if high - low == size and not self._cut[i]:
                return _Piece(i, place[:size].view(shape)), size
            view = place[: high - low]
            return _Piece(i, view, low, high, into=view.numpy() if self.on_host else None), high - low
        units = drawn[first : min(last, len(drawn))]
        used = len(units) * UNIT
        view, tail = place[:used].view(-1, UNIT), size % UNIT if last > len(drawn) else 0
        rest = place[used : used + tail] if tail else None
        piece = _Piece(i, view, units=units, first=first, tail=rest)
        if self.on_host:
            piece = piece._replace(numbers=units.numpy(), into=view.numpy())
        if self.on_host and rest is not None:
            piece = piece._replace(rest=rest.numpy())
        return piece, used + tail

    def _take_strided(self, piece: _Piece, tensor: Tensor) -> None:
        """From another memory order (channels_last): by each coordinate's place in it, without copying the whole."""
        key = piece.member, tuple(tensor.stride())
        if key not in self._offsets:
            index = torch.cat(list(self.places(piece.member))).to(self.device)
            offset = torch.zeros_like(index)
            for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
                offset += index % size * stride
                index = index // size
            self._offsets[key] = offset
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        values, offsets = tensor.as_strided((extent,), (1,)), self._offsets[key]
        here = offsets[piece.first * UNIT :][: piece.view.numel()]
        piece.view.copy_(values.index_select(0, here).view(-1, UNIT))
        if piece.tail is not None:
            piece.tail.copy_(values.index_select(0, offsets[-len(piece.tail) :]))


def _take(piece: _Piece, units: Tensor, tensor: Tensor) -> None:
    """The drawn units of a contiguous tensor."""
    flat, whole = tensor.view(-1), tensor.numel() // UNIT * UNIT
    if tensor.dtype is piece.view.dtype:
        torch.index_select(flat[:whole].view(-1, UNIT), 0, units, out=piece.view)
    else:
        piece.view.copy_(flat[:whole].view(-1, UNIT).index_select(0, units))
    if piece.tail is not None:
        piece.tail.copy_(flat[whole:])


def _found_memcmp() -> Callable[[int, int, int], int] | None:
    try:
        found = ctypes.CDLL(None).memcmp
    except (OSError, TypeError, AttributeError):  # Windows
        return None
    found.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
    return found


_memcmp = _found_memcmp()  # a fourth of the time of gathering and comparing
