"""Where the measured coordinates of some parameters lie in a vector, and how they are brought there.

A vector is a matrix of rows, each of contiguous coordinates of ONE parameter, with zeros where its last row is not
full: rows of 256 where all coordinates are measured, units of 8 where some are drawn (see draw.py).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_speedlimit.trajectory import compiled, cuts
from lightning_speedlimit.trajectory.cuts import Cuts
from lightning_speedlimit.trajectory.shards import are_sharded, local

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
    coordinates, which fill no unit.
    """

    member: int
    view: Tensor
    low: int | None = None
    high: int | None = None
    units: Tensor | None = None
    first: int = 0
    tail: Tensor | None = None


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
        self.drawn = [None if d is None else d.to(self.device, torch.int64, copy=True) for d in drawn]
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
        self.passes: compiled.Passes | None = None
        if self.on_host and self.dtype == torch.float32 and self._plain and compiled.LIBRARY is not None:
            self.passes = compiled.Passes(self.width, self.rows, self._sizes, self.drawn)
        together = not self.on_host or (self.exact and size <= _AT_ONCE and self.passes is None)
        number = 1 if together else max(1, round(size / _CACHED))
        self.stretch = max(1, -(-self.count // number))  # rows that are worked on at a time
        self.all_stretches = self.stretches(slice(0, self.count))
        self.walks = (
            self.all_stretches if self.passes is None else [slice(0, self.count)]
        )  # what `dots` takes at a time
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

    def prepared(self, tensors: Sequence[Tensor | None], first: int = 0) -> Sequence[Tensor | None]:
        """As `gather` takes them: strided, real, local; contiguous and flat where they lie in several stretches.

        Args:
            first: the parameter that the first one belongs to.
        Raises:
            ValueError: a parameter has another size than it had.
        """
        found = tensors
        if not self._plain or [t for t in tensors if t is not None and t.layout is not torch.strided]:
            found = [None if t is None else dense(t) for t in tensors]
        if self.exact and len(self.all_stretches) == 1:
            return found
        return [None if t is None else self._checked(t, i) for i, t in enumerate(found, first)]

    def _checked(self, tensor: Tensor, i: int) -> Tensor:
        if self.drawn[i] is None and not self._cut[i]:
            return tensor
        if tensor.numel() != (size := self._sizes[i]):
            raise ValueError(f"a parameter of {size} coordinates has {tensor.numel()} now: measure anew from there")
        return tensor.detach().contiguous().view(-1) if self._cut[i] else tensor.detach()

    def gather_all(self, tensors: Sequence[Tensor | None], into: Vector) -> Tensor:
        """The measured coordinates of one tensor for each parameter; zeros for None."""
        if self.passes is not None and (sources := self.passes.sources(tensors)) is not None:
            self.passes.gather(sources, into.rows)
            return into.rows
        tensors = self.prepared(tensors)
        for rows in self.all_stretches:
            self.gather(tensors, into, rows)
        return into.rows

    def gather(self, tensors: Sequence[Tensor | None], into: Vector, rows: slice, first: int = 0) -> Tensor:
        """Those at some rows, of tensors that are `prepared`; first: the parameter that the first one belongs to."""
        stretch = self._stretch(into, rows)
        if stretch.pads and into.last is not stretch:
            torch._foreach_zero_(stretch.pads)
        into.last = stretch
        if stretch.whole is not None and not any(map(operator.is_, tensors, repeat(None))):  # of all parameters
            torch._foreach_copy_(stretch.whole, tensors)  # type: ignore[arg-type]
            return stretch.found
        views, sources = list[Tensor](), list[Tensor]()
        for piece in stretch.pieces:
            tensor = tensors[piece.member - first]
            if tensor is None:
                piece.view.zero_()
                if piece.tail is not None:
                    piece.tail.zero_()
            elif piece.units is None:
                views.append(piece.view)
                sources.append(tensor if piece.low is None else tensor.reshape(-1)[piece.low : piece.high])
            elif tensor.is_contiguous():
                _take(piece, piece.units, tensor)
            else:
                self._take_strided(piece, tensor)
        if views:
            torch._foreach_copy_(views, sources)
        return stretch.found

    def holds(self, vector: Vector, tensors: Sequence[Tensor | None]) -> bool:
        """On the host: gathered now, they would be what the vector holds. On a device False: it is not known."""
        if not self.on_host or not self.all_stretches:
            return self.on_host
        if self.passes is not None and (sources := self.passes.sources(tensors)) is not None:
            return self.passes.holds(sources, vector.rows)
        room = self._room = self._room or Vector(self.room(), room=True)
        tensors = self.prepared(tensors)
        bits = torch.int64 if self.dtype == torch.float64 else torch.int32  # a NaN is not equal to itself
        pairs = ((self.gather(tensors, room, rows), vector.rows[rows]) for rows in self.all_stretches)
        return all(torch.equal(now.view(bits), known.view(bits)) for now, known in pairs)

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
            return _Piece(i, place[: high - low], low, high), high - low
        units = drawn[first : min(last, len(drawn))]
        used = len(units) * UNIT
        view, tail = place[:used].view(-1, UNIT), size % UNIT if last > len(drawn) else 0
        rest = place[used : used + tail] if tail else None
        return _Piece(i, view, units=units, first=first, tail=rest), used + tail

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
