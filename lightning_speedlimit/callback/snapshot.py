"""Objects as they are at a moment, bit by bit, to compare with later and to put back."""

from __future__ import annotations

import copyreg
import pickle
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_speedlimit.callback.reach import GENERATORS, NotIsolated, is_users, named_by, reach

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
                kept.put(kept.before)
        with torch.no_grad():
            for tensor, value in self._tensors:
                if not _alike(tensor, value):
                    tensor.data = value.clone()
                elif _other_bits(tensor.detach(), value):
                    tensor.detach().copy_(value)


class _Kept:
    """What an object held: the same objects, and the same bytes."""

    def __init__(self, name: str, now: Callable[[], list[Any]], put: Callable[[list[Any]], Any]) -> None:
        self.name, self.now, self.put, self.before = name, now, put, now()

    def same(self) -> bool:
        now = self.now()
        pairs = zip(now, self.before, strict=False)
        return len(now) == len(self.before) and all(a is b or (type(a) is bytes and a == b) for a, b in pairs)


def _kept(item: Any) -> list[_Kept]:
    """What can change about an object itself; what it refers to is kept for itself."""
    name = type(item).__name__
    if isinstance(item, dict):
        return [_of_dict(item)]
    if isinstance(item, (list, deque)):
        return [_Kept(name, lambda: list(item), lambda before: _refill(item, item.extend, before))]
    if isinstance(item, set):
        return [_Kept(name, lambda: sorted(item, key=id), lambda before: _refill(item, item.update, before))]
    if isinstance(item, bytearray):
        return [_Kept(name, lambda: [bytes(item)], lambda before: item.__setitem__(slice(None), before[0]))]
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


def _refill(collection: Any, add: Callable[[list[Any]], None], entries: list[Any]) -> None:
    collection.clear()
    add(entries)


def _of_dict(space: dict[Any, Any]) -> _Kept:
    def put(before: list[Any]) -> None:
        kind = OrderedDict if isinstance(space, OrderedDict) else dict  # not what a class of one's own makes of it
        kind.clear(space)
        for key, value in _pairs(before):
            kind.__setitem__(space, key, value)

    return _Kept("dict", lambda: [*space, *space.values()], put)


def _pairs(entries: list[Any]) -> Iterator[tuple[Any, Any]]:
    half = len(entries) // 2
    return zip(entries[:half], entries[half:], strict=True)


def _of_name(space: dict[str, Any], name: str) -> _Kept:
    def put(before: list[Any]) -> None:
        if before[0] is _ABSENT:
            del space[name]
        else:
            space[name] = before[0]

    return _Kept(f"global {name}", lambda: [space.get(name, _ABSENT)], put)


def _of_class(cls: type) -> _Kept:
    def now() -> list[Any]:
        names = [name for name in vars(cls) if not name.startswith("__")]
        return [*names, *(vars(cls)[name] for name in names)]

    def put(before: list[Any]) -> None:
        wanted, found = dict(_pairs(before)), dict(_pairs(now()))
        for name in found.keys() - wanted.keys():
            delattr(cls, name)
        for name, value in wanted.items():
            if found.get(name, _ABSENT) is not value:
                setattr(cls, name, value)

    return _Kept(f"class {cls.__name__}", now, put)


def _of_attributes(item: Any, names: list[str]) -> _Kept:
    def get(name: str) -> Any:
        try:
            return getattr(item, name)
        except (AttributeError, ValueError):  # a slot, a cell, that holds nothing
            return _ABSENT

    def put(before: list[Any]) -> None:
        for name, value in zip(names, before, strict=True):
            if value is not _ABSENT:
                object.__setattr__(item, name, value)
            elif get(name) is not _ABSENT:
                object.__delattr__(item, name)

    return _Kept(type(item).__name__, lambda: [get(name) for name in names], put)


def _of_array(array: Any) -> _Kept:
    def put(before: list[Any]) -> None:
        if array.dtype.hasobject:
            array.flat = before
        else:
            np.copyto(array, np.frombuffer(before[0], array.dtype).reshape(array.shape))

    return _Kept("ndarray", lambda: array.ravel().tolist() if array.dtype.hasobject else [array.tobytes()], put)


def _of_generator(item: Any) -> list[_Kept]:
    if isinstance(item, np.random.Generator):
        return []  # its bit generator is kept
    get, put = _state_of(item)
    name = f"{type(item).__module__}.{type(item).__name__}"
    return [_Kept(name, lambda: [pickle.dumps(get())], lambda before: put(pickle.loads(before[0])))]


def _state_of(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """How its state is read and set."""
    if isinstance(generator, torch.Generator):
        return lambda: generator.get_state().numpy(), lambda state: generator.set_state(torch.from_numpy(state))
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if isinstance(generator, np.random.RandomState):
        return lambda: generator.get_state(legacy=False), generator.set_state
    return lambda: generator.state, lambda state: setattr(generator, "state", state)


def _tensor(tensor: Tensor) -> list[tuple[Tensor, Tensor]]:
    if is_lazy(tensor) or tensor.is_meta:
        return []
    if tensor.layout != torch.strided:
        raise NotIsolated(f"a tensor of {tensor.layout} can't be compared with what it was")
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
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    if a.is_floating_point():
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
        a, b = a.contiguous().view(whole), b.contiguous().view(whole)
    return (a != b).any()
