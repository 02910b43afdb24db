"""What was run, in plain types and few words: the optimizers and their settings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence, Set, Sized
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MAX_TEXT = 200  # characters of a text; the rest is cut
MAX_ITEMS = 16  # of a list, a dict or a tensor; larger ones are told by their kind and size alone
MAX_SETTING = 1000  # characters of a setting as JSON
MAX_SETTINGS = 50  # of a group
MAX_OPTIMIZERS = 200_000  # characters of all groups of all optimizers: a fifth of what a record may say of its run
_DEPTH = 3  # of lists in lists
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The optimizers, the number of their coordinates, and the library."""
    parameters = {id(p): p for o in optimizers for g in o.param_groups for p in g["params"]}
    known = [p for p in parameters.values() if not isinstance(p, torch.nn.UninitializedParameter)]
    return {
        "optimizers": describe_optimizers(optimizers),
        "parameters": sum(p.numel() for p in known),
        "versions": {"torch": str(torch.__version__)},
    }


def describe_optimizers(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """For each its class and the settings of its groups, at most 200 kB in all, whatever the settings are.

    Reads settings that are small tensors, and so syncs for these. Groups beyond the limit are counted in
    `groups_left_out`.
    """
    found, room = [], MAX_OPTIMIZERS
    for optimizer in optimizers:
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            described = _group(group)
            room -= len(json.dumps(described))
            if room < 0:
                break
            groups.append(described)
        left_out = len(optimizer.param_groups) - len(groups)
        told = {"class": _cut(type(optimizer).__name__), "groups": groups}
        found.append(told | ({"groups_left_out": left_out} if left_out else {}))
    return found


def _group(group: Mapping[Any, Any]) -> dict[str, Any]:
    settings = [(_text(key), value) for key, value in group.items() if not (isinstance(key, str) and key == "params")]
    found = {name: plain(value) for name, value in settings[:MAX_SETTINGS]}
    return found | ({"settings_left_out": len(settings) - MAX_SETTINGS} if len(settings) > MAX_SETTINGS else {})


def plain(value: Any) -> Any:
    """A setting as JSON knows it, of 1,000 characters at most; never raises.

    Numbers and small tensors, arrays, lists and dicts of them are themselves; a large one is "list of 4,000,000" or
    "float32 tensor (2000, 2000)"; a text is cut; what is none of these is told by its `str`.
    """
    try:
        found = _plain(value, _DEPTH)
        return found if len(json.dumps(found)) <= MAX_SETTING else _kind(value)
    except Exception:  # an object of the user's own, whose methods may do anything
        return f"{_cut(type(value).__name__)} that can't be told"


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return int(value) if value.bit_length() <= 64 else f"integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return _cut(str(value))
    if _is_array(value):
        return _numbers(value, depth)
    if isinstance(value, Sized) and (depth == 0 or len(value) > MAX_ITEMS):
        return _kind(value)
    if isinstance(value, Mapping):
        return {_text(key): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, Set):
        return sorted((_plain(item, depth - 1) for item in value), key=str)
    return _text(value)


def _is_array(value: Any) -> bool:
    """A tensor, or an array or number of numpy, JAX, pandas, …."""
    return all(hasattr(value, name) for name in ("dtype", "shape", "tolist")) and not isinstance(value, type)


def _numbers(value: Any, depth: int) -> Any:
    """A tensor or an array; a large one, and one without numbers in it (meta, sparse, of objects), by its kind."""
    if math.prod(value.shape) > MAX_ITEMS or str(value.dtype) == "object":
        return _kind(value)
    try:
        numbers = value.tolist()
    except Exception:
        return _kind(value)
    return _text(value) if _is_array(numbers) else _plain(numbers, depth)  # numpy's longdouble stays one


def _kind(value: Any) -> str:
    if _is_array(value):
        name = "tensor" if isinstance(value, Tensor) else "array"
        return f"{str(value.dtype).removeprefix('torch.')} {name} {tuple(value.shape)}"
    return f"{_cut(type(value).__name__)} of {len(value):,}" if isinstance(value, Sized) else type(value).__name__


def _text(value: Any) -> str:
    """Without addresses, which differ between two runs of the same."""
    try:
        return _cut(_ADDRESS.sub("", str(value)))
    except Exception:
        return f"{_cut(type(value).__name__)} that can't be told"


def _cut(text: str) -> str:
    text = text[: MAX_TEXT - 1] + "…" if len(text) > MAX_TEXT else text
    return text.encode("utf-8", "replace").decode()  # half characters can be written, and printed nowhere
