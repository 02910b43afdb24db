"""Arguments that are not tensors: each error names the argument, what it got, what it wanted."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.checks.guard import look, shown

MOST_STEPS = 2**53  # exact in float64
MOST_LOSSES = 1_000_000  # of a window at each end of the run: it is kept on the device
_LONGEST_PATH = 4096  # what Linux takes


def check_flag(name: str, got: object) -> None:
    if not isinstance(got, bool):
        raise TypeError(f"{name} got {shown(got)}, wanted True or False")


def check_name(name: str, got: object) -> None:
    """A text with something in it, or None."""
    if got is None:
        return
    if not isinstance(got, str):
        raise TypeError(f"{name} got {shown(got)}, wanted the name of a logged metric, or None")
    if not got.strip():
        raise ValueError(f"{name} got {got!r}, wanted the name of a logged metric, or None")


def check_text(name: str, got: object) -> str:
    if not isinstance(got, str):
        raise TypeError(f"{name} got {shown(got)}, wanted text; use str(…)")
    return got


def check_among(name: str, got: object, *among: str) -> None:
    if not isinstance(got, str) or got not in among:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, among))}, got {shown(got)}")


def check_choice(name: str, got: object, wanted: tuple[str, ...]) -> None:
    if not isinstance(got, str) or got not in wanted:
        raise ValueError(f"{name} got {shown(got)}, wanted one of {', '.join(map(repr, wanted))}")


def check_at_least(name: str, got: object, least: int, most: int = 2**63 - 1) -> None:
    if isinstance(got, bool) or not isinstance(got, int) or got < least:
        raise ValueError(f"{name} got {shown(got)}, wanted a whole number of at least {least}")
    if got > most:
        raise ValueError(f"{name} got {shown(got)}, wanted a whole number from {least} to {most:,}")


def check_coordinates(got: object) -> None:
    if isinstance(got, str) and got == "all":
        return
    if isinstance(got, bool) or not isinstance(got, int) or got < 1:
        raise ValueError(f"coordinates got {shown(got)}, wanted a whole number of at least 1, or 'all'")
    check_at_least("coordinates", got, 1)


def check_kind(name: str, got: object, kind: type, wanted: str) -> None:
    if not isinstance(got, kind):
        raise TypeError(f"{name} got {shown(got)}, wanted {wanted}")


def whole(name: str, got: Any, least: int = 0, most: int = MOST_STEPS) -> int:
    """A whole number of Python, NumPy or torch."""
    found = None if isinstance(got, bool) else look(operator.index, None, got)
    if found is None:
        raise TypeError(f"{name} got {shown(got)}, wanted a whole number; use int(…)")
    if not least <= found <= most:
        raise ValueError(f"{name} got {shown(got)}, wanted a whole number from {least} to {most:,}")
    return found


def number(name: str, got: Any) -> float:
    """A real number, or a tensor or an array of one; NaN and infinities are numbers too."""
    try:
        if isinstance(got, Real) or hasattr(got, "dtype"):
            return float(got)
    except OverflowError as error:
        raise ValueError(f"{name} got {shown(got)}, wanted a number that float64 has") from error
    except Exception as error:  # of several values, complex, on no device
        raise TypeError(f"{name} got {shown(got)}, wanted one real number; use float(…)") from error
    raise TypeError(f"{name} got {shown(got)}, wanted a number; use float(…)")


def numbers(name: str, got: Any) -> dict[str, float]:
    """Text → number, NaN and infinities among them."""
    return {key: number(f"{name}[{key!r:.60}]", value) for key, value in _table(name, got, "numbers").items()}


def texts(name: str, got: Any) -> dict[str, str]:
    """Text → text."""
    return {key: check_text(f"{name}[{key!r:.60}]", value) for key, value in _table(name, got, "texts").items()}


def tables(name: str, got: Any) -> dict[str, dict[str, float]]:
    """Text → text → number."""
    return {key: numbers(f"{name}[{key!r:.60}]", value) for key, value in _table(name, got, "tables").items()}


def _table(name: str, got: Any, of: str) -> dict[str, Any]:
    check_kind(name, got, Mapping, f"names with {of}, as a dict")
    for key in got:
        check_text(f"a key of {name}", key)
    return dict(got)


def steps(name: str, got: Any) -> npt.NDArray[np.int64]:
    """An array of whole numbers, of any shape."""
    found = look(np.asarray, None, got)
    if found is None or (found.dtype.kind not in "iu" and found.size and not _is_whole(found)):
        raise TypeError(f"{name} got {shown(got)}, wanted steps: whole numbers to 2^53; use np.asarray(…, dtype=int)")
    if found.size and not 0 <= found.min() <= found.max() <= MOST_STEPS:
        raise ValueError(f"{name} got {found.min()} to {found.max()}, wanted steps: whole numbers from 0 to 2^53")
    return found.astype(np.int64)


def _is_whole(found: npt.NDArray[Any]) -> bool:
    return found.dtype.kind == "f" and bool(np.isfinite(found).all() and (found == np.floor(found)).all())


def check_interval(name: str, got: Any) -> None:
    """Two numbers, or None."""
    if got is None:
        return
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise TypeError(f"{name} got {shown(got)}, wanted a pair (lower, upper), or None")
    for place, end in enumerate(got):
        number(f"{name}[{place}]", end)


def path(name: str, got: object, wanted: str = "a file or folder") -> Path:
    """A place on this machine, "~" expanded."""
    found = look(os.fspath, None, got) if isinstance(got, str | os.PathLike) else None
    if not isinstance(found, str):
        raise TypeError(f"{name} got {shown(got)}, wanted a path as text or a pathlib.Path")
    if not found.strip():
        raise ValueError(f"{name} got {found!r}, wanted {wanted}; '.' is the working directory")
    if "://" in found or "\0" in found or look(os.fsencode, None, found) is None or len(found) > _LONGEST_PATH:
        raise ValueError(f"{name} got {found!r:.100}, wanted {wanted} of this machine")
    try:
        return Path(found).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} got {shown(found)}, wanted {wanted}: {error}; write it out") from error


def folder(name: str, got: object) -> Path | None:
    """As `path`; None stays None."""
    return None if got is None else path(name, got, "a folder")
