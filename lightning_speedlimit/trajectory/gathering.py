"""Bringing the measured coordinates of tensors together, stretch by stretch: all, or the units that are drawn."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_speedlimit.trajectory.shards import local

_Key = TypeVar("_Key")
_View = TypeVar("_View")
_PLAIN = (Tensor, torch.nn.Parameter)
UNIT = 8  # contiguous coordinates that are drawn together
_MOST = 1 << 14  # views that are kept: other parameters may be without a gradient at each step


def remember(views: dict[_Key, _View], key: _Key, view: _View) -> _View:
    """Keeps a view that was made, among not too many."""
    if len(views) >= _MOST:
        views.clear()
    views[key] = view
    return view


def dense(tensor: Tensor) -> Tensor:
    """Detached, strided (sparse gradients are coalesced: their raw values count duplicates apart), real, local."""
    tensor = local(tensor).detach()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().to_dense() if tensor.layout == torch.sparse_coo else tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class Layout(NamedTuple):
    """Of each parameter its rows, its shape, and the units that are drawn of it (None: all of it is measured)."""

    rows: list[slice]
    shapes: list[torch.Size]
    drawn: list[Tensor | None]
    width: int
    length: int


class _Piece(NamedTuple):
    """Neighbouring coordinates of one parameter.

    view: where they go. low, high: the first and the end, where all are measured; None: the whole parameter. units:
    the drawn ones; first: the place of the first of them. arrays: on the host these and the view, for numpy. tail:
    room for the parameter's last coordinates, which fill no unit.
    """

    member: int
    view: Tensor
    low: int | None = None
    high: int | None = None
    units: Tensor | None = None
    first: int = 0
    arrays: tuple[Any, Any] | None = None
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
        self.stretches: dict[tuple[int, int], _Stretch] = {}
        self.pieces = 0  # of these
        self.last: _Stretch | None = None


class Gathering:
    """See the module.

    Args:
        stretches: all rows, in pieces that are worked on at a time. on_host: the device's memory can be read without
            waiting for it. plain: there are neither shards nor complex parameters.
    """

    def __init__(
        self, layout: Layout, stretches: list[slice], dtype: torch.dtype, *, on_host: bool, plain: bool
    ) -> None:
        self._layout, self._stretches, self._dtype = layout, stretches, dtype
        self._on_host, self._plain = on_host, plain
        self._room: Vector | None = None
        self._exact = all(d is None for d in layout.drawn)
        self._offsets: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def prepared(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Strided, real, local; contiguous where they may lie in several stretches."""
        found = tensors
        if not self._plain or not all(t is None or t.layout is torch.strided for t in tensors):
            found = [None if t is None else dense(t) for t in tensors]
        if self._exact and len(self._stretches) > 1 and not all(t is None or t.is_contiguous() for t in found):
            found = [None if t is None else t.contiguous() for t in found]
        return found

    def gather(self, tensors: Sequence[Tensor | None], into: Vector, rows: slice, first: int = 0) -> Tensor:
        """The measured coordinates at some rows, of one prepared tensor for each parameter; zeros for None.

        Args:
            first: the parameter that the first tensor belongs to.
        """
        stretch = self._stretch(into, rows)
        if stretch.pads and into.last is not stretch:
            torch._foreach_zero_(stretch.pads)
        into.last = stretch
        if stretch.whole is not None and all(t is not None for t in tensors):  # of all parameters
            torch._foreach_copy_(stretch.whole, tensors)  # type: ignore[arg-type]
            return stretch.found
        views, sources = list[Tensor](), list[Tensor]()
        for piece in stretch.pieces:
            tensor = tensors[piece.member - first]
            if tensor is None:
                piece.view.zero_()
                if piece.tail is not None:
                    piece.tail.zero_()
            elif piece.low is None and piece.units is None:
                views.append(piece.view)
                sources.append(tensor)
            elif tensor.numel() != (size := self._layout.shapes[piece.member].numel()):
                raise ValueError(f"a parameter of {size} coordinates has {tensor.numel()} now: measure anew from there")
            elif piece.units is None:
                views.append(piece.view)
                sources.append(tensor.reshape(-1)[piece.low : piece.high])
            else:
                self._take(piece, tensor.detach())
        if views:
            torch._foreach_copy_(views, sources)
        return stretch.found

    def holds(self, vector: Vector, tensors: Sequence[Tensor | None]) -> bool:
        """On the host: gathered now, they would be what the vector holds. On a device False: it is not known."""
        if not self._on_host or not self._stretches:
            return self._on_host
        if self._exact and self._plain:
            known = _as_they_are(self._stretch(vector, slice(0, self._layout.length)).pieces, tensors, self._dtype)
            if known is not None:
                return known
        self._room = self._room or Vector(torch.zeros_like(vector.rows[self._stretches[0]]), room=True)
        tensors, room = self.prepared(tensors), self._room
        pairs = ((self.gather(tensors, room, rows), vector.rows[rows]) for rows in self._stretches)
        return all(np.array_equal(now.numpy(), known.numpy()) for now, known in pairs)

    def _stretch(self, into: Vector, rows: slice) -> _Stretch:
        key = rows.start, rows.stop
        found = into.stretches.get(key)
        if found is None:
            found = self._made(into, rows)
            into.pieces += len(found.pieces)
            if into.pieces > max(_MOST, 4 * len(self._layout.rows)):
                into.stretches.clear()
                into.pieces = len(found.pieces)
            into.stretches[key] = found
        return found

    def _made(self, into: Vector, rows: slice) -> _Stretch:
        layout, offset = self._layout, rows.start if into.room else 0
        flat, width = into.rows.view(-1), layout.width
        pieces, pads = list[_Piece](), list[Tensor]()
        for i, own in enumerate(layout.rows):
            low, high = max(own.start, rows.start), min(own.stop, rows.stop)
            if low < high:
                place = flat[(low - offset) * width : (high - offset) * width]
                piece, used = self._piece(i, low - own.start, high - own.start, place)
                pieces.append(piece)
                if used < len(place) and into.room:
                    pads.append(place[used:])
        found = into.rows[rows.start - offset : rows.stop - offset]
        whole = len(pieces) == len(layout.rows) and all(p.low is None and p.units is None for p in pieces)
        return _Stretch(found, pieces, pads, [p.view for p in pieces] if whole else None)

    def _piece(self, i: int, first: int, last: int, place: Tensor) -> tuple[_Piece, int]:
        """Of some of a parameter's rows, and how many coordinates it has."""
        shape, drawn = self._layout.shapes[i], self._layout.drawn[i]
        size = shape.numel()
        if drawn is None:
            low, high = first * self._layout.width, min(last * self._layout.width, size)
            if high - low == size:
                return _Piece(i, place[:size].view(shape)), size
            return _Piece(i, place[: high - low], low, high), high - low
        units = drawn[first : min(last, len(drawn))]
        used = len(units) * UNIT
        view, tail = place[:used].view(-1, UNIT), size % UNIT if last > len(drawn) else 0
        arrays = (units.numpy(), view.numpy()) if self._on_host else None
        rest = place[used : used + tail] if tail else None
        return _Piece(i, view, units=units, first=first, arrays=arrays, tail=rest), used + tail

    def _take(self, piece: _Piece, tensor: Tensor) -> None:
        """The drawn units of a parameter."""
        view, units = piece.view, piece.units
        assert units is not None
        if not tensor.is_contiguous():
            self._take_strided(piece, tensor)
            return
        whole = tensor.numel() // UNIT * UNIT
        if piece.arrays is not None and tensor.dtype is view.dtype:  # half the time of index_select
            (numbers, into), values = piece.arrays, tensor.numpy().reshape(-1)
            values[:whole].reshape(-1, UNIT).take(numbers, 0, out=into, mode="clip")
            if piece.tail is not None:
                piece.tail.numpy()[:] = values[whole:]
            return
        flat = tensor.view(-1)
        if tensor.dtype == view.dtype:
            torch.index_select(flat[:whole].view(-1, UNIT), 0, units, out=view)
        else:
            view.copy_(flat[:whole].view(-1, UNIT).index_select(0, units))
        if piece.tail is not None:
            piece.tail.copy_(flat[whole:])

    def _take_strided(self, piece: _Piece, tensor: Tensor) -> None:
        """From another memory order (channels_last): by each coordinate's place in it, without copying the whole."""
        drawn = self._layout.drawn[piece.member]
        assert drawn is not None
        key = piece.member, tuple(tensor.stride())
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
        values, offsets = tensor.as_strided((extent,), (1,)), self._offsets[key]
        here = offsets[piece.first * UNIT :][: piece.view.numel()]
        piece.view.copy_(values.index_select(0, here).view(-1, UNIT))
        if piece.tail is not None:
            piece.tail.copy_(values.index_select(0, offsets[len(drawn) * UNIT :]))


def _as_they_are(pieces: list[_Piece], tensors: Sequence[Tensor | None], dtype: torch.dtype) -> bool | None:
    """Whether whole parameters are there bit by bit; None: not all of the tensors can be compared so."""
    for piece in pieces:
        tensor = tensors[piece.member]
        if _memcmp is None or type(tensor) not in _PLAIN or tensor is None or tensor.dtype is not dtype:
            return None  # a tensor of another class may have no memory of its own
        if not (tensor.is_cpu and tensor.is_contiguous() and tensor.shape == piece.view.shape and tensor.data_ptr()):
            return None
        if _memcmp(tensor.data_ptr(), piece.view.data_ptr(), tensor.nbytes):
            return False
    return True


def _found_memcmp() -> Callable[[int, int, int], int] | None:
    try:
        found = ctypes.CDLL(None).memcmp
    except (OSError, TypeError, AttributeError):  # Windows
        return None
    found.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
    return found


_memcmp = _found_memcmp()  # a fourth of the time of gathering and comparing
