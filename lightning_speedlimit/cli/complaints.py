"""What the user can fix, told from faults of the program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class Complaint(Exception):
    """Ends the command with this text: what, got, wanted, cure."""


@contextlib.contextmanager
def from_user() -> Iterator[None]:
    """Around what checks the user's input: its ValueErrors (RecordError among them) and TypeErrors are complaints."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise Complaint(str(error)) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes to `path`: where the system refuses, it is a complaint."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Complaint(
            f"can't write {path}: {error.strerror or error}; name a place that exists, has room and may be written to"
        ) from error


def check_writable(path: Path) -> None:
    """Before any work: `path` can be a new file."""
    with writing(path):  # as for a name that is too long
        is_folder, is_in_folder = path.is_dir(), path.parent.is_dir()
        is_special = path.exists() and not (path.is_file() or is_folder)
    if is_folder:
        raise Complaint(
            f"can't write {path}: it is a folder, wanted the name of a file; add one, as {path / 'report.html'}"
        )
    if is_special:
        raise Complaint(f"can't write {path}: it is a pipe or a device, wanted the name of a file; name another one")
    if not is_in_folder:
        raise Complaint(f"can't write {path}: there is no folder {path.parent}; make it, or name another place")
