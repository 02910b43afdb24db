"""Batches in the state of a checkpoint: plain types and tensors, which `torch.load(weights_only=True)` takes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (type(None), bool, float, str)
_LARGEST = 2**63  # of whole numbers


class NotPlain(TypeError):
    """A type that a checkpoint would hold as code."""


def why_not_plain(state: Any) -> str | None:
    """The first type in a state that `weights_only` might refuse; None where it takes them all."""
    kind = type(state)
    if kind in _PLAIN or (kind is int and -_LARGEST <= state < _LARGEST):
        return None
    if kind is Tensor:
        return None if state.layout == torch.strided and not vars(state) else f"a tensor of layout {state.layout}"
    if kind is dict:
        inner = [*state, *state.values()]
    elif kind in (list, tuple):
        inner = state
    else:
        return f"{kind.__module__}.{kind.__qualname__}"
    return next((why for why in map(why_not_plain, inner) if why is not None), None)


def encoded(batch: Any, device: torch.device) -> Any:
    """A batch of tensors, numpy arrays and plain types in dicts, lists and tuples; which tensors were on `device`.

    Raises:
        NotPlain: another type is among them.
    """
    kind = type(batch)
    if kind is dict:
        keys = next((why for why in map(why_not_plain, batch) if why is not None), None)
        if keys is not None:
            raise NotPlain(keys)
        return {"dict": [[key, encoded(value, device)] for key, value in batch.items()]}
    if kind in (list, tuple):
        return {kind.__name__: [encoded(value, device) for value in batch]}
    if isinstance(batch, (np.ndarray, np.generic)):
        return _encoded_array(batch)
    why = why_not_plain(batch)
    if why is not None:
        raise NotPlain(why)
    if kind is Tensor:
        return {"tensor": batch.detach().cpu(), "moves": batch.device == device}
    return {"plain": batch}


def _encoded_array(batch: Any) -> dict[str, Any]:
    array, file = np.asarray(batch), io.BytesIO()
    if type(batch) not in (np.ndarray, array.dtype.type) or array.dtype.hasobject:
        raise NotPlain(f"{type(batch).__module__}.{type(batch).__qualname__} of {array.dtype}")
    np.save(file, array, allow_pickle=False)
    content = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return {"array": content, "scalar": not isinstance(batch, np.ndarray)}


def decoded(state: dict[str, Any], device: torch.device) -> Any:
    """The batch that `encoded` made plain; its tensors on the device that they were on."""
    if "dict" in state:
        return {key: decoded(value, device) for key, value in state["dict"]}
    if "list" in state:
        return [decoded(value, device) for value in state["list"]]
    if "tuple" in state:
        return tuple(decoded(value, device) for value in state["tuple"])
    if "array" in state:
        array = np.load(io.BytesIO(state["array"].numpy().tobytes()), allow_pickle=False)
        return array[()] if state["scalar"] else array
    if "tensor" in state:
        return state["tensor"].to(device if state["moves"] else "cpu")
    return state["plain"]
