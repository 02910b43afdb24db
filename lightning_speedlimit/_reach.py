"""What an object reaches, by data and by code, and whether it is bit by bit as it was."""

from __future__ import annotations

import copyreg
import dis
import enum
import functools
import gc
import logging
import pickle
import random
import sys
import sysconfig
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

MOST_OBJECTS = 1_000_000
_ATOMS = (type(None), bool, int, float, complex, str, bytes, range, types.CodeType, enum.Enum, np.dtype, np.generic)
_LEFT = (types.ModuleType, torch.dtype, torch.device, logging.Logger, logging.Handler)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)
_MUTABLE = (dict, list, set, deque, bytearray, np.ndarray, Tensor, Module, *_GENERATORS)
_SHARED = (type, types.FunctionType, types.BuiltinFunctionType, weakref.ref)  # a deep copy refers to the same
_WRAPPERS = (tuple, frozenset, types.MethodType, types.CellType, partial, property, classmethod, staticmethod)
_NAMES = ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME")
_ABSENT = object()


class Unreachable(RuntimeError):
    """Something that can be neither copied nor put back."""


@dataclass(frozen=True)
class Reach:
    """All that some objects refer to, each once.

    own: data, which a deep copy copies. around: what a copy shares with it: functions and their closures, the
    user's classes, and the globals that the user's code names. Installed packages are left out.
    """

    own: list[Any]
    around: list[Any]

    @property
    def ids(self) -> set[int]:
        """Of what a deep copy must not share: what can change of the objects' own."""
        return {id(x) for x in self.own if isinstance(x, (*_MUTABLE, Iterator)) or _users(type(x))}


def reach(roots: Iterable[Any], leave: Collection[int] = ()) -> Reach:
    """What the roots refer to.

    Args:
        leave: ids of objects that are not entered.

    Raises:
        Unreachable: too many objects; an iterator (a file, too) in the code's globals, which can't be wound back.
    """
    seen = set(leave)
    own = _followed(roots, seen, _parts, lambda item: True)
    around = _followed([part for item in own for part in _code_of(item)], seen, _parts_and_code, _is_followed)
    return Reach(own, around)


def _followed(
    roots: Iterable[Any], seen: set[int], parts: Callable[[Any], list[Any]], enters: Callable[[Any], bool]
) -> list[Any]:
    waiting, found = list(roots), []
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (*_ATOMS, *_LEFT)) or _ours(item) or not enters(item):
            continue
        seen.add(id(item))
        found.append(item)  # and so it lives, and no other object gets its id
        if len(seen) > MOST_OBJECTS:
            raise Unreachable(f"it refers to more than {MOST_OBJECTS:,} objects: keep data sets out of the module")
        waiting += parts(item)
    return found


def _is_followed(item: Any) -> bool:
    """Whether an object that code refers to is the user's data or code."""
    if isinstance(item, Iterator):
        raise Unreachable(f"its code uses a {type(item).__name__} outside of it, which can't be wound back")
    return isinstance(item, (*_MUTABLE, *_SHARED, *_WRAPPERS)) or _users(type(item))


def _parts(item: Any) -> list[Any]:
    """What an object holds as data."""
    if isinstance(item, _SHARED):
        return []
    if isinstance(item, Tensor):
        return [vars(item)]
    if isinstance(item, np.ndarray):
        return item.ravel().tolist() if item.dtype.hasobject else []
    if isinstance(item, np.random.Generator):
        return [item.bit_generator]
    names = None if isinstance(item, types.MethodType) else getattr(item, "__dict__", None)  # a method has its function's
    return [*gc.get_referents(item), *([names] if isinstance(names, dict) else [])]


def _parts_and_code(item: Any) -> list[Any]:
    return _parts(item) + _code_of(item)


def _code_of(item: Any) -> list[Any]:
    """What a copy shares: closures, defaults, globals that the user's functions name, what the user's classes hold."""
    if isinstance(item, types.FunctionType):
        inner = [item.__closure__, item.__defaults__, item.__kwdefaults__, vars(item)]
        return inner + [value for names, space in _named(item) for value in map(space.get, names)]
    if isinstance(item, types.BuiltinFunctionType):
        return [item.__self__]
    if isinstance(item, weakref.ref):
        return [item()]
    if isinstance(item, type) and _users(item):
        return [*item.__mro__, *vars(item).values()]
    return []


def _named(function: types.FunctionType) -> list[tuple[list[str], dict[str, Any]]]:
    """The names of globals that a function reads or writes, and of attributes of the user's modules among them."""
    if not _users(function):
        return []
    names, attributes = _globals_of(function.__code__)
    space = function.__globals__
    modules = [m for m in map(space.get, names) if isinstance(m, types.ModuleType) and _users_module(m.__name__)]
    return [(sorted(names), space), *((sorted(attributes & vars(m).keys()), vars(m)) for m in modules)]


@functools.lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Names of globals, and all names, of a code object and of those within it."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in _NAMES}
    every = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more, all_of_them = _globals_of(inner)
            names, every = names | more, every | all_of_them
    return frozenset(names), frozenset(every)


def _users(item: Any) -> bool:
    return _users_module(getattr(item, "__module__", None) or "")


@functools.lru_cache(maxsize=4096)
def _users_module(name: str) -> bool:
    """Whether a module is neither Python's nor an installed package."""
    if name == "__main__":
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return False
    path = Path(file).resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not path.is_relative_to(Path(sysconfig.get_paths()["stdlib"]).resolve())


def _ours(item: Any) -> bool:
    home = item.__module__ if isinstance(item, (type, types.FunctionType)) else type(item).__module__
    return isinstance(home, str) and home.partition(".")[0] == __name__.partition(".")[0]


# -- what it was, bit by bit -----------------------------------------------------------------------------------------


class Snapshot:
    """What the roots reach, as it is now; `restore` writes it back into the same objects."""

    def __init__(self, roots: Iterable[Any], *, leave: Collection[int] = (), names: Iterable[dict[str, Any]] = ()) -> None:
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
                if tensor.shape != value.shape or tensor.dtype != value.dtype:
                    tensor.data = value.clone()
                else:
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
        return [_of_names(space, names) for names, space in _named(item)]
    if isinstance(item, type):
        return [_of_class(item)] if _users(item) else []
    if isinstance(item, _GENERATORS):
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


def _of_names(space: dict[str, Any], names: Iterable[str]) -> _Kept:
    before = {name: space.get(name, _ABSENT) for name in names}

    def restore() -> None:
        for name, value in before.items():
            if value is _ABSENT:
                space.pop(name, None)
            else:
                space[name] = value

    return _Kept("global", lambda: all(space.get(n, _ABSENT) is v for n, v in before.items()), restore)


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
        return [_Kept(name, lambda: _bytes(item.get_state(legacy=False)) == _bytes(place), lambda: item.set_state(place))]
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
        if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.layout != value.layout:
            return True
        flags.setdefault(tensor.device, []).append(_other_bits(tensor.detach(), value))
    return any(bool(torch.stack(found).any()) for found in flags.values())


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
