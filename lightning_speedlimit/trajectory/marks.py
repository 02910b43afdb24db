"""Whether tensors are the ones that were there, as they were: by memory and version, without a sync."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, UntypedStorage

_NO_MEMORY = (RuntimeError, NotImplementedError)  # of sparse, functional and other tensors


class Marks:
    """Of tensors, some of which may be None; keeps none of them alive.

    Addresses are soon another's, and weak references to tensors would forbid `torch.utils.swap_tensors`, by which
    modules change some parameters. So what is kept are weak references to their memory: no other has its number then.
    """

    def __init__(self, tensors: Sequence[Tensor | None] = ()) -> None:
        self._memory: list[int] = []
        self._others: list[Any] = []
        self._marks: list[tuple[int, ...] | None] = []
        for tensor in tensors:
            self._marks.append(None if tensor is None else self._marked(tensor))

    def _marked(self, tensor: Tensor) -> tuple[int, ...]:
        """What tells the tensor, whose memory is referred to from here on."""
        try:
            memory = tensor.untyped_storage()
            self._memory.append(memory._weak_ref())  # type: ignore[arg-type]
        except _NO_MEMORY:
            self._others.append(weakref.ref(tensor))
            return _mark(tensor, 0)
        try:
            return id(tensor), memory._cdata, tensor._version, tensor.data_ptr()
        except _NO_MEMORY:
            return _mark(tensor, 0)

    def __del__(self, free: Callable[[int], object] = UntypedStorage._free_weak_ref) -> None:
        for memory in self._memory:
            free(memory)

    def __reduce__(self) -> tuple[type[Marks], tuple[()]]:
        """A copy knows nothing: it would free the same references once more."""
        return Marks, ()

    def hold(self, tensors: Sequence[Tensor | None], writes: int = 0) -> bool:
        """They are the same, each written to so many times in place (through .data it would leave no trace)."""
        return len(tensors) == len(self._marks) and self._marks == _marks(tensors, writes)


def _marks(tensors: Sequence[Tensor | None], writes: int) -> list[tuple[int, ...] | None]:
    """What tells the tensors, and the writes to them but for so many."""
    if writes:
        return [None if t is None else _mark(t, writes * n) for t, n in zip(tensors, _alike(tensors), strict=True)]
    try:
        return [
            None if t is None else (id(t), t.untyped_storage()._cdata, t._version - writes, t.data_ptr())
            for t in tensors
        ]
    except _NO_MEMORY:
        return [None if t is None else _mark(t, writes) for t in tensors]


def _alike(tensors: Sequence[Tensor | None]) -> list[int]:
    """How many count their writes together: views of one tensor, as a bucket of several processes' gradients, do."""
    bases = [None if t is None else t._base for t in tensors]
    numbers = Counter(map(id, bases))
    return [1 if base is None else numbers[id(base)] for base in bases]


def _mark(tensor: Tensor, writes: int) -> tuple[int, ...]:
    """Of one that lacks something: in inference mode no writes are counted."""
    version = 0 if tensor.is_inference() else tensor._version - writes
    try:
        memory = tensor.untyped_storage()._cdata
    except _NO_MEMORY:
        return id(weakref.ref(tensor)), version  # there is one of a tensor, as long as it is kept
    try:
        return id(tensor), memory, version, tensor.data_ptr()
    except _NO_MEMORY:
        return id(tensor), memory, version
