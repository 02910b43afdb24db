"""Objects as they are at a moment, bit by bit, to compare with later and to put back."""

from __future__ import annotations

import copyreg
import pickle
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_speedlimit._reach import GENERATORS, is_users, named_by, reach

_ABSENT = object()


class Snapshot:
    """What the roots reach, as it is now; `restore` writes it back into the same objects."""

    def __init__(
        self, roots: Iterable[Any], *, leave: Collection[int] = (), names: Iterable[dict[str, Any]] = ()
    ) -> None:
        """Args: names: dictionaries of which only the entries are kept, not what these refer to."""
        self.reach = reach(roots, leave)
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._kept: list[_Kept] = [_of_dict(space) for space in names]
        for item in (*self.reach.own, *self.reach.around):
            if isinstance(item, Tensor):
                self._tensors += _tensor(item)
            else:
                self._kept += _kept(item)

    def changed(self) -> list[str]:
        """Types of the objects that are not what they were; reads devices once."""
        found = [k.name for k in self._kept if not k.same()]
        return found + ["Tensor"] * _differ(self._tensors)

    def restore(self) -> None:
        for kept in self._kept:
            if not kept.same():
                kept.restore()
        with torch.no_grad():
            for tensor, value in self._tensors:
                if not _alike(tensor, value):
                    tensor.data = value.clone()
                elif _other_bits(tensor.detach(), value):
                    tensor.detach().copy_(value)


@dataclass(frozen=True)
class _Kept:
    name: str
    same: Callable[[], bool]
    restore: Callable[[], Any]


def _kept(item: Any) -> list[_Kept]:
    """What can change about an object itself; what it refers to is kept for itself."""
    if isinstance(item, dict):
        return [_of_dict(item)]
    if isinstance(item, (list, deque)):
        entries = list(item)
        return [_Kept(type(item).__name__, lambda: _all_are(item, entries), lambda: _refill(item, entries))]
    if isinstance(item, set):
        members = set(item)
        ids = {id(x) for x in members}
        return [_Kept("set", lambda: {id(x) for x in item} == ids, lambda: _refill(item, members))]
    if isinstance(item, bytearray):
        content = bytes(item)
        return [_Kept("bytearray", lambda: item == content, lambda: item.__setitem__(slice(None), content))]
    if isinstance(item, np.ndarray):
        return [_of_array(item)]
    if isinstance(item, types.CellType):
        return [_of_attributes(item, ["cell_contents"])]
    if isinstance(item, types.FunctionType):
        return [_of_name(space, name) for names, space in named_by(item) for name in names]
    if isinstance(item, type):
        return [_of_class(item)] if is_users(item) else []
    if isinstance(item, GENERATORS):
        return _of_generator(item)
    slots = copyreg._slotnames(type(item)) if hasattr(type(item), "__slots__") else []  # type: ignore[attr-defined]
    return [_of_attributes(item, slots)] if slots else []


def _all_are(now: Iterable[Any], before: Collection[Any]) -> bool:
    now = list(now)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _refill(collection: Any, entries: Any) -> None:
    """The entries that a collection held, in itself: others may hold it too."""
    collection.clear()
    if isinstance(collection, (list, deque)):
        collection.extend(entries)
    else:
        collection.update(entries)


def _of_dict(space: dict[Any, Any]) -> _Kept:
    keys, values = list(space), list(space.values())

    def restore() -> None:
        kind = OrderedDict if isinstance(space, OrderedDict) else dict  # not what a class of one's own makes of it
        kind.clear(space)
        for key, value in zip(keys, values, strict=True):
            kind.__setitem__(space, key, value)

    return _Kept("dict", lambda: _all_are(space, keys) and _all_are(space.values(), values), restore)


def _of_name(space: dict[str, Any], name: str) -> _Kept:
    before = space.get(name, _ABSENT)

    def restore() -> None:
        if before is _ABSENT:
            space.pop(name, None)
        else:
            space[name] = before

    return _Kept(f"global {name}", lambda: space.get(name, _ABSENT) is before, restore)


def _of_class(cls: type) -> _Kept:
    before = {name: value for name, value in vars(cls).items() if not name.startswith("__")}

    def restore() -> None:
        for name in [n for n in vars(cls) if not n.startswith("__") and n not in before]:
            delattr(cls, name)
        for name, value in before.items():
            if vars(cls).get(name, _ABSENT) is not value:
                setattr(cls, name, value)

    def same() -> bool:
        now = {name: value for name, value in vars(cls).items() if not name.startswith("__")}
        return now.keys() == before.keys() and all(now[name] is value for name, value in before.items())

    return _Kept(f"class {cls.__name__}", same, restore)


def _of_attributes(item: Any, names: list[str]) -> _Kept:
    def now() -> dict[str, Any]:
        found = {}
        for name in names:
            try:
                found[name] = getattr(item, name)
            except (AttributeError, ValueError):  # a slot, a cell, that holds nothing
                found[name] = _ABSENT
        return found

    def restore() -> None:
        for name, value in before.items():
            if value is not _ABSENT:
                object.__setattr__(item, name, value)
            elif now()[name] is not _ABSENT:
                object.__delattr__(item, name)

    before = now()
    return _Kept(type(item).__name__, lambda: all(v is before[n] for n, v in now().items()), restore)


def _of_array(array: np.ndarray) -> _Kept:
    if array.dtype.hasobject:
        objects = array.ravel().tolist()
        return _Kept("ndarray", lambda: _all_are(array.ravel().tolist(), objects), lambda: _fill(array, objects))
    before = array.copy()
    content = before.tobytes()
    return _Kept("ndarray", lambda: array.tobytes() == content, lambda: np.copyto(array, before))


def _fill(array: np.ndarray, objects: list[Any]) -> None:
    for index, value in zip(np.ndindex(array.shape), objects, strict=True):
        array[index] = value


def _of_generator(item: Any) -> list[_Kept]:
    name = f"{type(item).__module__}.{type(item).__name__}"
    if isinstance(item, torch.Generator):
        state = item.get_state()
        return [_Kept(name, lambda: torch.equal(item.get_state(), state), lambda: item.set_state(state))]
    if isinstance(item, random.Random):
        drawn = item.getstate()
        return [_Kept(name, lambda: item.getstate() == drawn, lambda: item.setstate(drawn))]
    if isinstance(item, np.random.Generator):
        return []  # its bit generator is kept
    if isinstance(item, np.random.RandomState):
        place = item.get_state(legacy=False)
        return [
            _Kept(name, lambda: _bytes(item.get_state(legacy=False)) == _bytes(place), lambda: item.set_state(place))
        ]
    bits = item.state
    return [_Kept(name, lambda: _bytes(item.state) == _bytes(bits), lambda: setattr(item, "state", bits))]


def _bytes(state: Any) -> bytes:
    return pickle.dumps(state)


def _tensor(tensor: Tensor) -> list[tuple[Tensor, Tensor]]:
    if is_lazy(tensor) or tensor.is_meta:
        return []
    return [(tensor, tensor.detach().clone())]


def _differ(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    flags: dict[torch.device, list[Tensor]] = {}
    for tensor, value in pairs:
        if not _alike(tensor, value):
            return True
        flags.setdefault(tensor.device, []).append(_other_bits(tensor.detach(), value))
    return any(bool(torch.stack(found).any()) for found in flags.values())


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.layout, a.device) == (b.shape, b.dtype, b.layout, b.device)


def _other_bits(a: Tensor, b: Tensor) -> Tensor:
    """0-d: whether two tensors of one shape differ in a bit (NaN is itself, 0 is not −0)."""
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    if a.is_floating_point():
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
        a, b = a.contiguous().view(whole), b.contiguous().view(whole)
    return (a != b).any()
