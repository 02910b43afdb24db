"""Writing a record: whole or not at all, whoever else writes in its folder, and at whatever moment all ends.

The arrays go into a new file; then `record.json`, which names that file, is replaced atomically; then the file that it
named before is deleted. A file that `record.json` does not name is nobody's, so nothing that is named is ever changed
or deleted, with or without locks. A lock keeps writers apart for tidiness: whoever holds it alone deletes what killed
writers left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from lightning_speedlimit.record import lock
from lightning_speedlimit.record.files import (
    DATA_NAME,
    JSON_NAME,
    MAX_JSON_BYTES,
    RecordData,
    expected_arrays,
    from_json,
    sha256,
    to_json,
)
from lightning_speedlimit.record.reading import checked, parse, read_json_text
from lightning_speedlimit.record.schema import FORMAT, FORMAT_VERSION, RUN, RecordError, check
from lightning_speedlimit.record.sketches import SKETCH_SIZE

LOCK_NAME = ".writing.lock"
_LEFTOVER_NAME = re.compile(rf"{DATA_NAME.pattern}|\.writing-[0-9a-f]+(-data|-json)?\.tmp")  # the latter: 0.1.0


def write_folder(folder: Path, data: RecordData) -> None:
    """Writes the record; whatever happens, the folder holds the record before or this one, whole.

    Raises:
        RecordError: it would be one that `read_folder` refuses, as when `run` is larger than record.json may be.
        OSError: the folder can't be written (read-only, full), or another process keeps it locked.
    """
    data = checked(data)
    folder.mkdir(parents=True, exist_ok=True)
    with lock.alone(folder / LOCK_NAME) as locked:
        before = _named(folder)
        name = f"data-{secrets.token_hex(16)}.npz"  # of no generator that a training draws from
        written = _write_arrays(folder / name, data, like=None if before is None else folder / before)
        try:
            text = json.dumps({**_document(data), "data": {"file": name, **written}}, indent=1, allow_nan=False)
            _check(text.encode("ascii"))
            _flush_folder(folder)
            replace_file(folder / JSON_NAME, text.encode("ascii"))
        except BaseException:  # Ctrl-C too, which may come when record.json has just been replaced
            if _named(folder) != name:
                _unlink(folder / name)
            raise
        if locked:
            _delete_leftovers(folder, keep=name)
        elif before is not None:
            _unlink(folder / before)


def _document(data: RecordData) -> dict[str, Any]:
    clouds = {"rows": len(data.cloud_step), "layers": data.cloud_layers}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION if data.layer_names else 2 if clouds["rows"] else 1,
        "run": to_json(data.run),
        "reasons": data.reasons,
        "columns": data.columns,
        "rows": len(data.step),
        "sketches": {"count": len(data.sketch_steps), "size": SKETCH_SIZE, **data.sketch_state},
        **({"clouds": clouds} if clouds["rows"] else {}),
        **({"layers": data.layer_names} if data.layer_names else {}),
    }


def _check(text: bytes) -> None:
    """What reading would refuse is not written: the record before it stays."""
    if len(text) > MAX_JSON_BYTES:
        raise RecordError(
            f"{JSON_NAME} would have {len(text)} bytes, wanted at most {MAX_JSON_BYTES}: keep less in record.run, in "
            "reasons or in names"
        )
    check(from_json(parse(text)["run"]), RUN, "run")


def _write_arrays(path: Path, data: RecordData, like: Path | None) -> dict[str, Any]:
    """Writes the data file; returns its size and checksum."""
    arrays: dict[str, Any] = {
        name: np.ascontiguousarray(getattr(data, name), dtype=dtype).reshape(shape)
        for name, (dtype, shape) in expected_arrays(*data.counts).items()
    }
    with _new_file(path, like=like) as file:
        np.savez(file, **arrays)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return {"size": size, "sha256": sha256(file)}


def replace_file(path: Path, content: bytes) -> None:
    """Writes a whole file at once: `path` holds what it held, or `content`. A link in its place is not followed."""
    temporary = path.with_name(f".writing-{secrets.token_hex(16)}.tmp")
    with _new_file(temporary, like=path) as file:
        file.write(content)
    try:
        os.replace(temporary, path)
    except BaseException:
        _unlink(temporary)
        raise
    _flush_folder(path.parent)


@contextlib.contextmanager
def _new_file(path: Path, like: Path | None) -> Iterator[IO[bytes]]:
    """A file that was not there, with the mode of `like` where that is one; on the disk in the end, or gone."""
    mode, own = (0o666, False) if like is None else _mode(like)
    with open(path, "x+b", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        try:
            if own and hasattr(os, "fchmod"):  # the umask has taken its part; Windows has neither
                os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            _unlink(path)
            raise


def _mode(path: Path) -> tuple[int, bool]:
    """The mode that a user gave to a file, and whether it is this user's own: else the umask still limits it."""
    try:
        found = os.lstat(path)
    except OSError:
        return 0o666, False
    if not stat.S_ISREG(found.st_mode):
        return 0o666, False
    return stat.S_IMODE(found.st_mode) & 0o777, hasattr(os, "geteuid") and found.st_uid == os.geteuid()


def _named(folder: Path) -> str | None:
    """The data file that record.json names; None where there is none, or it is no record's."""
    try:
        return str(parse(read_json_text(folder))["data"]["file"])
    except (OSError, RecordError):
        return None


def _flush_folder(folder: Path) -> None:
    """Makes a new name last through a power cut, where the system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse this
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete_leftovers(folder: Path, *, keep: str) -> None:
    for path in list(folder.iterdir()):
        if path.name != keep and _LEFTOVER_NAME.fullmatch(path.name):
            _unlink(path)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # open in a reader on Windows; the next write tries again
        os.unlink(path)
