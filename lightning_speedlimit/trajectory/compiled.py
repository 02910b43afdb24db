"""The passes of rows.c over measured coordinates, where it was built: float32 on the host.

Where there is no such pass (see docs/measuring.md) torch does the same, operation by operation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)  # a tensor of another class may have no memory of its own
_POINTERS = (
    *("theta", "update", "gradient", "mobility", "travelled", "decayed", "squares", "work"),
    *("free_squares", "decay_work", "action_work", "l2_drop"),
)
_NUMBERS = ("scale", "share", "coarse", "numerator", "epsilon", "clip")


class Step(ctypes.Structure):
    """What `close_step` is to do; see rows.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_float) for name in _NUMBERS),
    ]

    def take(self, **tensors: Tensor) -> None:
        """Their memory, which has to stay."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor.data_ptr())


class _Term(ctypes.Structure):
    _fields_ = (("sum", ctypes.c_void_p), ("row", ctypes.c_void_p), ("n", ctypes.c_int64), ("factor", ctypes.c_double))


def _found() -> ctypes.CDLL | None:
    """The library beside this file, of the same version as it."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for suffix in EXTENSION_SUFFIXES:
        try:
            library = ctypes.CDLL(str(Path(__file__).with_name(f"_rows{suffix}")))
            version, size = library.version, library.size_of_step
        except (OSError, AttributeError):  # there is none, or one that is not of here
            continue
        if (version(), size()) != (VERSION, ctypes.sizeof(Step)):
            continue
        many: list[Any] = [integer, integer, pointer, pointer]
        each: list[tuple[Any, list[Any]]] = [
            (library.gather, [pointer, *many]),
            (library.holds, [pointer, *many]),
            (library.dots, [integer, *many, ctypes.c_float, pointer]),
            (library.close_step, [pointer, *many, pointer]),
            (library.add, [integer, pointer]),
            (library.totals, [pointer, integer, pointer, integer, pointer, pointer, ctypes.c_double, pointer]),
            (library.squares, many),
            (library.scatter, [*many, pointer, pointer]),
            (library.norm_squared, [integer, pointer]),
        ]
        for function, arguments in each:
            function.argtypes, function.restype = arguments, None
        library.holds.restype, library.norm_squared.restype = ctypes.c_int, ctypes.c_double
        return library
    return None


VERSION = 4  # of what is asked of rows.c, and of what it does
LIBRARY = _found()


def _address(tensor: Tensor) -> int | None:
    """Where its numbers lie, one after the other; None where torch has to read them."""
    if type(tensor) not in _PLAIN or tensor.dtype is not torch.float32 or not tensor.is_cpu:
        return None
    if tensor.layout is not torch.strided or not tensor.is_contiguous() or tensor.is_neg():
        return None
    address = tensor.data_ptr()
    return None if address % tensor.itemsize else address


def norm_squared(tensor: Tensor) -> float | None:
    """Σ x², added up in float64; None where there is no pass for it."""
    library: Any = LIBRARY
    if library is None or (address := _address(tensor)) is None:
        return None
    return float(library.norm_squared(tensor.numel(), address))


class Sources(NamedTuple):
    """Where tensors lie, and they themselves: their memory stays as long as these are kept."""

    addresses: Any
    tensors: Sequence[Tensor | None]


class Passes:
    """Over the rows of one layout.

    Args:
        rows: of each parameter. sizes: their coordinates. drawn: their units, int64, or None.
    """

    def __init__(self, width: int, rows: Sequence[slice], sizes: Sequence[int], drawn: Sequence[Tensor | None]) -> None:
        self._made_of = width, rows, sizes, drawn
        self._library: Any = LIBRARY
        self._width, self._sizes = width, list(sizes)
        # An empty tensor lies nowhere, which rows.c takes for all units.
        self._drawn = [d if d is None else d.contiguous() if len(d) else d.new_zeros(1) for d in drawn]
        units = [0 if own is None else own.data_ptr() for own in self._drawn]
        pieces = [(r.start, r.stop - r.start, n, u) for r, n, u in zip(rows, sizes, units, strict=True)]
        self._pieces = np.array(pieces, dtype=np.int64)

    def __reduce__(self) -> tuple[type[Passes], tuple[Any, ...]]:
        """A copy has addresses of its own."""
        return Passes, self._made_of

    def sources(self, tensors: Sequence[Tensor | None], first: int = 0) -> Sources | None:
        """Where they lie; None where torch has to bring them. first: the parameter that the first one belongs to."""
        found = (ctypes.c_void_p * len(tensors))()
        for i, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if (address := _address(tensor)) is None or tensor.numel() != self._sizes[first + i]:
                return None
            found[i] = address
        return Sources(found, tensors)

    def gather(self, sources: Sources, into: Tensor, first: int = 0) -> None:
        """into ← the measured coordinates of a tensor for each parameter from the first on; zeros for None."""
        addresses = sources.addresses
        self._library.gather(self._from(first), len(addresses), self._width, addresses, into.data_ptr())

    def holds(self, sources: Sources, known: Tensor) -> bool:
        """Gathered, they would be what is known, bit by bit."""
        addresses, pieces = sources.addresses, self._pieces.ctypes.data
        return bool(self._library.holds(pieces, len(addresses), self._width, addresses, known.data_ptr()))

    def dots(self, pairs: Sequence[tuple[Tensor, Tensor, Tensor]], scale: float) -> None:
        """out ← scale · Σ a b of each row, of (a, b, out)."""
        number = len(pairs)
        a, b, out = ((ctypes.c_void_p * number)(*(t.data_ptr() for t in each)) for each in zip(*pairs, strict=True))
        self._library.dots(len(pairs[0][2]), self._width, number, a, b, scale, out)

    def add(self, terms: Sequence[tuple[int, Tensor, float]]) -> None:
        """sum ← sum + factor · row, of several (where the sum lies, row, factor); sums are float64."""
        known: Any = [(place, row.data_ptr(), len(row), factor) for place, row, factor in terms]
        self._library.add(len(terms), (_Term * len(terms))(*known))

    def totals(self, row: Tensor, weights: Tensor | None, scale: float, places: Any, into: Any) -> None:
        """into[place] ← + scale Σ weight x over a number x of each row of the parameters there; None: weights of 1."""
        pieces, number, wide = self._pieces.ctypes.data, len(self._sizes), row.dtype == torch.float64
        pointer = None if weights is None else weights.data_ptr()
        self._library.totals(pieces, number, places.ctypes.data, wide, row.data_ptr(), pointer, scale, into.ctypes.data)

    def squares(self, a: Tensor, out: Tensor) -> None:
        """out ← Σ a² of each row, float64."""
        self._library.squares(len(a), self._width, a.data_ptr(), out.data_ptr())

    def scatter(self, a: Tensor, shares: Tensor | None, buckets: Tensor, into: Tensor) -> None:
        """into[bucket] ← + share · a; buckets: int16, of each coordinate. shares: float64, of each row; None: 1."""
        pointer = None if shares is None else shares.data_ptr()
        self._library.scatter(len(a), self._width, a.data_ptr(), pointer, buckets.data_ptr(), into.data_ptr())

    def close_step(self, members: range, parameters: Sources, averages: Sources | None, step: Step) -> None:
        """Of some parameters; averages: v of each, where μ has a denominator."""
        here = ctypes.byref(parameters.addresses, members.start * ctypes.sizeof(ctypes.c_void_p))
        v = None if averages is None else averages.addresses
        self._library.close_step(self._from(members.start), len(members), self._width, here, v, ctypes.byref(step))

    def _from(self, first: int) -> int:
        """Where a parameter's piece lies, and those after it."""
        return int(self._pieces.ctypes.data + first * self._pieces.strides[0])
