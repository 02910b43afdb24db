"""Views that are made once, and kept among not too many."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

_Key = TypeVar("_Key")
_View = TypeVar("_View")
MOST = 1 << 14  # that are kept: other parameters may be without a gradient at each step


def remember(views: dict[_Key, _View], key: _Key, view: _View) -> _View:
    """Keeps a view that was made, among not too many."""
    if len(views) >= MOST:
        views.clear()
    views[key] = view
    return view


class Cuts:
    """Some rows of tensors that stay: views, made once."""

    def __init__(self, *kept: Tensor) -> None:
        self._kept = kept
        self._found: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def at(self, rows: slice) -> tuple[Tensor, ...]:
        key = rows.start, rows.stop
        found = self._found.get(key)
        if found is None:
            found = remember(self._found, key, tuple(tensor[rows] for tensor in self._kept))
        return found
