"""Locks between those who write in one folder, processes or threads; a process that dies frees its own."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 10.0  # seconds; a write takes tens of milliseconds
_LOOK_EVERY = 0.005  # seconds
_TRIES = 100


class Lock:
    """An exclusive lock on a file that is there for as long as it is held."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._descriptor = descriptor
        self._free = weakref.finalize(self, _free, path, descriptor)
        _held.add(self)

    def release(self) -> None:
        """Again: nothing happens."""
        self._free()

    def leave_to_the_parent(self) -> None:
        """In a forked child, whose copy of the descriptor would keep the lock alive beyond the parent's death."""
        if self._free.detach() is not None:
            os.close(self._descriptor)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_held):
        lock.leave_to_the_parent()


if fcntl is not None:
    os.register_at_fork(after_in_child=_after_fork)


def take(path: Path) -> Lock | None:
    """The lock on `path`, which is made for it; None where the system has no locks, or lets no such file be made.

    Raises:
        BlockingIOError: somebody else holds it.
    """
    if fcntl is None:
        return None
    for _ in range(_TRIES):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:  # some network file systems
            os.close(descriptor)
            return None
        if _is_at(path, descriptor):
            return Lock(path, descriptor)
        os.close(descriptor)  # its holder removed it meanwhile, with the lock
    return None  # a file system on which no file is found again


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Within, nobody else holds the lock on `path`. Yields False where there are no locks, and nothing is promised.

    Raises:
        TimeoutError: somebody else has held it for `PATIENCE`.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            lock = take(path)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(
                    f"{path.parent} has been written by somebody else for {PATIENCE:g} s: end what holds {path.name}, "
                    "or save to another folder"
                ) from None
            time.sleep(_LOOK_EVERY)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there, mine = os.lstat(path), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _free(path: Path, descriptor: int) -> None:
    """Removed while it is held, so that nobody can lock a file that is about to go."""
    try:
        if _is_at(path, descriptor):
            with contextlib.suppress(OSError):
                os.unlink(path)
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
