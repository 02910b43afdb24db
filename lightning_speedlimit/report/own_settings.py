"""matplotlib's settings for who draws here alone: other threads see, and set, those of before."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

_OWN: ContextVar[dict[str, Any] | None] = ContextVar("own_settings", default=None)  # each thread has its own
_DRAWING = threading.RLock()


@contextmanager
def own_settings(settings: Mapping[str, Any]) -> Iterator[None]:
    """Within, this thread reads these (valid) values of `matplotlib.rcParams`, and others as before.

    No value of `rcParams` is changed. Most of what a figure is made of is read from there and nowhere else: ticks are
    made anew whenever a figure is drawn, fonts and dashes are looked up, and the SVG writer takes no arguments. So
    the object gets, for as long as this lasts, a class that answers this thread otherwise. What is set within, by
    whatever thread, is set for all, and stays. One thread at a time, as matplotlib promises nothing to several.
    """
    import matplotlib

    shared: Any = matplotlib.rcParams
    with _DRAWING:
        kind: Any = type(shared)
        token = _OWN.set({**(_OWN.get() or {}), **settings})
        shared.__class__ = _answering(kind)
        try:
            yield
        finally:
            shared.__class__ = kind
            _OWN.reset(token)


@cache
def _answering(kind: Any) -> Any:
    """A class like `kind`, a dictionary's, that reads `_OWN` first. A copy of one of its objects is of `kind`.

    Without `super()`, which raises where the object gets its class back while another thread is within.
    """
    if hasattr(kind, "_reads_own"):
        return kind

    def read(self: Any, name: str) -> Any:
        own = _OWN.get()
        return own[name] if own is not None and name in own else kind.__getitem__(self, name)

    def write(self: Any, name: str, value: Any) -> None:
        own = _OWN.get()
        if own is not None:
            own.pop(name, None)  # who sets it here means it here
        kind.__setitem__(self, name, value)

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return kind(*args, **kwargs)

    members = {"__getitem__": read, "__setitem__": write, "__new__": new, "_reads_own": True}
    return type(kind.__name__, (kind,), members)
