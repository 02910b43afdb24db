"""Values that no argument, or hardly any, can use; and which errors about them say too little."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Unshowable:
    """Also refuses to be compared, iterated, and asked whether it is true."""

    def __repr__(self) -> str:
        raise RuntimeError("it must not be looked at")

    __eq__ = __iter__ = __bool__ = __len__ = __float__ = __fspath__ = __repr__  # type: ignore[assignment]
    __hash__ = object.__hash__


def nested(depth: int) -> Any:
    found: Any = {}
    for _ in range(depth):
        found = {"a": [found]}
    return found


BAD: dict[str, Any] = {
    "a huge int": 10**400,
    "a longer int": 10**5000,
    "a negative": -1,
    "zero": 0,
    "a fraction": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "a bool": True,
    "a complex": 1j,
    "a word": "gaussian?",
    "bytes": b"1",
    "nothing": None,
    "an object": object(),
    "a list": [],
    "a list of words": ["a", "b"],
    "a ragged list": [[1.0], [1.0, 2.0]],
    "a list with a huge int": [0.5, 10**400],
    "a dict": {"a": 1},
    "an empty tensor": torch.zeros(0),
    "a scalar tensor": torch.tensor(1.0),
    "a tensor of nan": torch.full((3, 2), math.nan),
    "a tensor of another shape": torch.ones(2, 2, 2, 2),
    "an integer tensor": torch.ones(3, 2, dtype=torch.int64),
    "a complex tensor": torch.ones(3, 2, dtype=torch.complex64),
    "a sparse tensor": torch.ones(3, 2).to_sparse(),
    "a meta tensor": torch.ones(3, 2, device="meta"),
    "an array of objects": np.array([object(), object()]),
    "an array of words": np.array(["a", "b"]),
    "a function": lambda: None,
}

# Of what records, comparisons and figures take: names, paths, tables.
MORE_BAD: dict[str, Any] = BAD | {
    "an empty word": "",
    "a blank": " \t",
    "a word with a zero": "a\0b",
    "half of a pair": "\ud800",
    "a long word": "x" * 10_000,
    "an address": "s3://bucket/run",
    "a path that is not there": Path("not there") / "run",
    "an unshowable object": Unshowable(),
    "a class": dict,
    "a dict of numbers": {1: 2},
    "a dict of words": {"a": "b"},
    "a dict of dicts": {"a": {"b": 1}},
    "a dict of nothing": {"a": None},
    "a dict of objects": {"a": object()},
    "a dict of huge ints": {"a": 10**400},
    "a dict of tensors": {"a": torch.ones(3)},
    "a dict of lists": {"a": ["b", 1]},
    "an odd key": {Unshowable(): 1.0},
    "a deep dict": nested(500),
    "a list of nothing": [None],
    "a list of objects": [object()],
    "a set": {1, 2},
    "an iterator that is used up": iter([]),
}


def unclear_errors(
    call: Callable[..., Any],
    good: Mapping[str, Any],
    values: Mapping[str, Any],
    skipped: Collection[tuple[str, str]] = (),
    also_said: Collection[str] = (),
) -> list[str]:
    """Each argument in turn takes each bad value, the others stay good; what is accepted is fine.

    An error is clear where it is a TypeError or ValueError that names an argument, or says one of `also_said`: the
    words of others name neither what was wrong nor what was got.
    """
    call(**good)
    found = []
    for argument, (kind, value) in itertools.product(good, values.items()):
        if (argument, kind) in skipped:
            continue
        try:
            call(**(dict(good) | {argument: value}))
        except (TypeError, ValueError) as error:
            said = str(error)
            if not any(word in said for word in (*good, *also_said)) or len(said) > 1000:
                found.append(f"{argument} = {kind}: {error!r:.200}")
        except Exception as error:
            found.append(f"{argument} = {kind}: {type(error).__name__}: {error!s:.200}")
    return found
