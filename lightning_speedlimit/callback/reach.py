"""What an object reaches, by data and by code."""

from __future__ import annotations

import dis
import enum
import functools
import gc
import logging
import random
import sys
import sysconfig
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

MOST_OBJECTS = 1_000_000
_ATOMS = (type(None), bool, int, float, complex, str, bytes, range, types.CodeType, enum.Enum, np.dtype, np.generic)
_LEFT = (types.ModuleType, torch.dtype, torch.device, logging.Logger, logging.Handler)
GENERATORS = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)
_MUTABLE = (dict, list, set, deque, bytearray, np.ndarray, Tensor, Module, *GENERATORS)
_SHARED = (type, types.FunctionType, types.BuiltinFunctionType, weakref.ref)  # a deep copy refers to the same
_WRAPPERS = (tuple, frozenset, types.MethodType, types.CellType, partial, property, classmethod, staticmethod)
_NAMES = ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME")


class NotIsolated(RuntimeError):
    """A copy of a module would not be one, or changed what it was copied from."""


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
        return {id(x) for x in self.own if isinstance(x, (*_MUTABLE, Iterator)) or is_users(type(x))}


def reach(roots: Iterable[Any], leave: Collection[int] = ()) -> Reach:
    """What the roots refer to.

    Args:
        leave: ids of objects that are not entered.

    Raises:
        NotIsolated: too many objects; an iterator (a file, too) in the code's globals, which can't be wound back.
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
            raise NotIsolated(f"it refers to more than {MOST_OBJECTS:,} objects: keep data sets out of the module")
        waiting += parts(item)
    return found


def _is_followed(item: Any) -> bool:
    """Whether an object that code refers to is the user's data or code."""
    if isinstance(item, Iterator):
        raise NotIsolated(f"its code uses a {type(item).__name__} outside of it, which can't be wound back")
    return isinstance(item, (*_MUTABLE, *_SHARED, *_WRAPPERS)) or is_users(type(item))


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
    names = getattr(item, "__dict__", None)
    own = isinstance(names, dict) and not isinstance(item, types.MethodType)  # a method has its function's
    return [*gc.get_referents(item), *([names] if own else [])]


def _parts_and_code(item: Any) -> list[Any]:
    return _parts(item) + _code_of(item)


def _code_of(item: Any) -> list[Any]:
    """What a copy shares: closures, defaults, globals that the user's functions name, what the user's classes hold."""
    if isinstance(item, types.FunctionType):
        inner = [item.__closure__, item.__defaults__, item.__kwdefaults__, vars(item)]
        return inner + [value for names, space in named_by(item) for value in map(space.get, names)]
    if isinstance(item, types.BuiltinFunctionType):
        return [item.__self__]
    if isinstance(item, weakref.ref):
        return [item()]
    if isinstance(item, type) and is_users(item):
        return [*item.__mro__, *vars(item).values()]
    return []


def named_by(function: types.FunctionType) -> list[tuple[list[str], dict[str, Any]]]:
    """The names of globals that a function reads or writes, and of attributes of the user's modules among them."""
    if not is_users(function):
        return []
    names, attributes = _globals_of(function.__code__)
    space = function.__globals__
    modules = [m for m in map(space.get, names) if isinstance(m, types.ModuleType) and _users_module(m.__name__)]
    return [(sorted(names), space), *((sorted(attributes), vars(m)) for m in modules)]


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


def is_users(item: Any) -> bool:
    return _users_module(_home(item))


def _home(item: Any) -> str:
    """The module that a class, or a function's code, is of: a wrapper carries the name of what it wraps."""
    found = item.__globals__.get("__name__") if isinstance(item, types.FunctionType) else item.__module__
    return found if isinstance(found, str) else ""


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
    home = _home(item if isinstance(item, (type, types.FunctionType)) else type(item))
    return home.partition(".")[0] == __name__.partition(".")[0]
