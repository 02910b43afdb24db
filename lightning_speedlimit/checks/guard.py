"""Between the measurement and a training: no fault of ours, no object of others, no filter on warnings ends it."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

_LOGGER = logging.getLogger("lightning_speedlimit")
_LONGEST = 500  # characters of what others say

_Hook = TypeVar("_Hook", bound=Callable[..., None])
_Seen = TypeVar("_Seen")
_Otherwise = TypeVar("_Otherwise")


class Say(Protocol):
    """Tells the user something, once for each key (None: the message itself)."""

    def __call__(self, message: str, key: str | None = None) -> None: ...


def never_raising(hook: _Hook) -> _Hook:
    """For a callback's hooks: a fault of the measurement ends the measurement, never the training.

    The callback's `_stop_measuring` gets the fault. What is no `Exception` (Ctrl-C) goes its way.
    """

    @functools.wraps(hook)
    def guarded(callback: Any, *args: Any, **kwargs: Any) -> None:
        try:
            hook(callback, *args, **kwargs)
        except Exception as error:
            callback._stop_measuring(error)

    return cast(_Hook, guarded)


def look(at: Callable[..., _Seen], otherwise: _Otherwise, *at_what: Any) -> _Seen | _Otherwise:
    """What an object of others shows; `otherwise` where looking at it raises (a property may do anything)."""
    try:
        return at(*at_what)
    except Exception:
        return otherwise


def told(error: BaseException) -> str:
    """An exception's kind and message; of one whose `str` raises, its kind."""
    message = look(str, "", error)
    return _cut(f"{type(error).__name__}: {message}" if message else type(error).__name__)


def shown(value: object) -> str:
    """The repr of an argument, cut; of one whose repr raises, its class."""
    return _cut(look(repr, f"an object of {type(value).__name__}", value))


def warn(message: str, *, stacklevel: int) -> None:
    """A warning that never raises: where a filter makes errors of warnings, it is logged instead.

    Args:
        stacklevel: 1 is the caller of this function.
    """
    try:
        warnings.warn(message, stacklevel=stacklevel + 1)
    except Exception:  # a filter, a `showwarning` of the user's own, a stream that is closed
        with contextlib.suppress(Exception):  # there is nobody left to tell
            _LOGGER.warning(message)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
