"""Arguments that are neither numbers nor choices: flags, names, folders."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_speedlimit._guard import shown


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


def folder(name: str, got: object) -> Path | None:
    """A folder of this machine, "~" expanded; None stays None."""
    if got is None:
        return None
    if not isinstance(got, str | os.PathLike) or not isinstance(path := os.fspath(got), str):
        raise TypeError(f"{name} got {shown(got)}, wanted a path as text or a pathlib.Path, or None")
    if not path.strip():
        raise ValueError(f"{name} got {path!r}, wanted a folder, or None; '.' is the working directory")
    if "://" in path or "\0" in path:
        raise ValueError(f"{name} got {shown(path)}, wanted a folder of this machine, or None")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} got {shown(path)}, wanted a folder: {error}; write it out") from error
