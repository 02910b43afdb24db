"""Whether tensors are the ones that were there, as they were: by identity and version, without a sync."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor


class Marks:
    """Of tensors, some of which may be None; keeps none of them alive (an address alone is soon another's)."""

    def __init__(self, tensors: Sequence[Tensor | None] = ()) -> None:
        try:
            self._marks = [None if t is None else (weakref.ref(t), t._version, t.data_ptr()) for t in tensors]
        except (RuntimeError, NotImplementedError):
            self._marks = [None if t is None else (weakref.ref(t), t._version, _address(t)) for t in tensors]

    def hold(self, tensors: Sequence[Tensor | None]) -> bool:
        """They are the same, and nothing has been written to them (through .data it would leave no trace)."""
        if len(tensors) != len(self._marks):
            return False
        for mark, tensor in zip(self._marks, tensors, strict=True):
            if mark is None or tensor is None:
                if not (mark is None and tensor is None):
                    return False
            elif mark[0]() is not tensor or mark[1] != tensor._version or mark[2] != _address(tensor):
                return False
        return True

    def writes(self, tensors: Sequence[Tensor | None]) -> int | None:
        """How many times each of them has been written to; None where that differs, or another has taken its place."""
        found: set[int | None] = set()
        for mark, tensor in zip(self._marks, tensors, strict=True):
            if mark is not None and tensor is not None:
                found.add(tensor._version - mark[1] if mark[0]() is tensor else None)
            elif mark is not None or tensor is not None:
                found.add(None)
        return found.pop() if len(found) == 1 else None


def _address(tensor: Tensor) -> int:
    """Changes where another tensor's memory was put in (`.data = …`); 0 of what has none."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # fake, sparse, functional and other tensors without storage
        return 0
