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

    def hold(self, tensors: Sequence[Tensor | None], writes: int = 0) -> bool:
        """They are the same, each written to so many times in place (through .data it would leave no trace)."""
        if len(tensors) != len(self._marks):
            return False
        for mark, tensor in zip(self._marks, tensors, strict=True):
            if tensor is not None and mark is not None and mark[0]() is tensor:
                if mark[1] + writes != tensor._version or mark[2] != _address(tensor):
                    return False
            elif tensor is not None or mark is not None:
                return False
        return True


def _address(tensor: Tensor) -> int:
    """Changes where another tensor's memory was put in (`.data = …`); 0 of what has none."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # fake, sparse, functional and other tensors without storage
        return 0
