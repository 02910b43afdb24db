"""The one door for records: what comes through has the types, shapes and order of a record; behind it nothing doubts.

Reading executes nothing (no pickle) and trusts nothing: it must be a regular file, its size is checked before it is
read, the types of record.json before they are used, and every array against these before its data are read. Messages do
not name the folder: who asked for it does.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record.files import (
    DATA_NAME,
    JSON_NAME,
    LONGEST_INTEGER,
    MAX_DATA_BYTES,
    MAX_JSON_BYTES,
    RecordData,
    expected_arrays,
    from_json,
    sha256,
)
from lightning_speedlimit.record.layers import MAX_LAYERS
from lightning_speedlimit.record.schema import (
    DOCUMENT,
    FORMAT,
    FORMAT_VERSION,
    MAX_INTEGER,
    MAX_NESTING,
    SKETCH_STATE,
    RecordError,
    check,
    check_nesting,
)
from lightning_speedlimit.record.sketches import MAX_SKETCHES
from lightning_speedlimit.words import one_line, plain_text

_MAX_ARRAY_HEADER = 1024  # an .npy header of one or two dimensions takes 128 bytes
_DAMAGED = "the record is damaged"

LONGEST_REASON = 1000  # characters: one may hold another library's error


def read_folder(folder: Path, *, sketches: bool = True) -> RecordData:
    """Reads a record; raises RecordError for anything that is not exactly one, but for what `checked` sees.

    sketches: False leaves them out, after the checksum of the whole file.
    """
    try:
        document, arrays = _read(folder, sketches=sketches)
    except OSError as error:
        raise RecordError(f"can't be read: {error.strerror or error}; copy it again, or fix its permissions") from error
    run = from_json(document["run"])
    check(run, {"type": "object"}, "run")  # and not a number that JSON has no word for
    check_nesting(run, "run", MAX_NESTING - 2)  # as what can be written
    return RecordData(
        run=run,
        reasons=document["reasons"],
        columns=document["columns"],
        sketch_state={
            key: document["sketches"][key] * (sketches or key != "last_is_provisional")
            for key in SKETCH_STATE["required"]
        },
        cloud_layers=_clouds(document)["layers"],
        layer_names=document.get("layers", []),
        **arrays,
    )


def _read(folder: Path, *, sketches: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    for _ in range(3):
        text = read_json_text(folder)
        document = parse(text)
        name = document["data"]["file"]
        try:
            with _open_regular(folder / name) as file:
                return document, _read_arrays(file, document, sketches=sketches)
        except FileNotFoundError:
            if read_json_text(folder) == text:  # else a running training has just replaced it: again
                raise RecordError(f"{name} is missing, {JSON_NAME} names it; copy all of it") from None
    raise RecordError("it is rewritten faster than it can be read; try again")


def _open_regular(path: Path) -> IO[bytes]:
    """A pipe or a device would be waited for, or never end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RecordError(f"{path.name} is no regular file; pass the folder that a run wrote")
    return os.fdopen(descriptor, "rb")


# --- record.json


def read_json_text(folder: Path) -> bytes:
    try:
        with _open_regular(folder / JSON_NAME) as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise RecordError(f"{JSON_NAME} is missing; pass the folder that a run or record.save() wrote") from None
    if len(text) > MAX_JSON_BYTES:
        raise RecordError(f"{JSON_NAME} has more than {MAX_JSON_BYTES} bytes; this is no record of a run")
    return text


def parse(text: bytes) -> dict[str, Any]:
    """Every field that anything reads, and the size that they add up to."""
    try:
        document: dict[str, Any] = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{JSON_NAME} is no valid JSON: {error}; {_DAMAGED}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise RecordError(f"{JSON_NAME} is no {FORMAT!r}; pass the folder that a run wrote")
    version: Any = document.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise RecordError(
            f"format_version {version:.3g}, this version reads up to {FORMAT_VERSION}; "
            "upgrade: pip install --upgrade lightning-speedlimit"
        )
    check_nesting(document, JSON_NAME)
    check(document, DOCUMENT, JSON_NAME)
    if not DATA_NAME.fullmatch(document["data"]["file"]):
        raise RecordError(f"data.file must be a file name data-<checksum>.npz, got {document['data']['file']!r:.80}")
    claimed = sum(dtype.itemsize * math.prod(shape) for dtype, shape in _shapes(document).values())
    if max(claimed, document["data"]["size"]) > MAX_DATA_BYTES:
        raise RecordError(
            f"{JSON_NAME} claims {max(claimed, document['data']['size'])} bytes of arrays, more than {MAX_DATA_BYTES}; "
            "this is no record of a run"
        )
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not in the JSON standard")


def _integer(text: str) -> int:
    """One that a float can hold, whoever counts with it."""
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"a number of {len(text)} digits, wanted {LONGEST_INTEGER} at most")
    return int(text)


def _clouds(document: dict[str, Any]) -> Any:
    """What record.json says of clouds; version 1 knew none."""
    return document.get("clouds", {"rows": 0, "layers": []})


def _shapes(document: dict[str, Any]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    clouds = _clouds(document)
    sizes = document["rows"], len(document["columns"]), document["sketches"]["count"]
    return expected_arrays(*sizes, clouds["rows"], len(clouds["layers"]), len(document.get("layers", [])))


# --- arrays


def _read_arrays(file: IO[bytes], document: dict[str, Any], *, sketches: bool) -> dict[str, Any]:
    data = document["data"]
    size = os.fstat(file.fileno()).st_size
    if size != data["size"]:
        raise RecordError(f"{data['file']} has {size} bytes, wanted {data['size']}; copy the folder again")
    checksum = sha256(file)
    if checksum != data["sha256"]:
        raise RecordError(f"{data['file']} has sha256 {checksum}, wanted {data['sha256']!r:.80}; copy the folder again")
    file.seek(0)
    shapes = _shapes(document)
    try:
        with zipfile.ZipFile(file) as archive:
            names = sorted(member.filename for member in archive.infolist())
            if names != sorted(f"{name}.npy" for name in shapes):
                raise RecordError(f"{data['file']} holds {names!r:.200}, wanted {sorted(shapes)}; {_DAMAGED}")
            wanted = [name for name in shapes if sketches or name != "sketches"]
            found = {name: _read_array(archive, name, *shapes[name]) for name in wanted}
    except RecordError:
        raise
    except Exception as error:  # zipfile's own, struct's, UnicodeDecodeError, …: whatever such bytes bring about
        raise RecordError(f"{data['file']} is no archive: {error!s:.200}; copy the folder again") from error
    return found if sketches else found | _no_sketches()


def _no_sketches() -> dict[str, Any]:
    shapes = expected_arrays(0, 0, 0, 0, 0, 0)
    return {name: np.empty(*reversed(shapes[name])) for name in ("sketch_steps", "sketch_ticks", "sketches")}


def _read_array(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """One array; its size and its header must be those that are wanted before its data are read."""
    member = archive.getinfo(f"{name}.npy")
    wanted = dtype.itemsize * math.prod(shape)
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise RecordError(
            f"{name} is compressed or encrypted, wanted plain; the record was not written by this package"
        )
    if not wanted <= member.file_size <= wanted + _MAX_ARRAY_HEADER:
        raise RecordError(f"{name} declares {member.file_size} bytes, wanted {wanted}; {_DAMAGED}")
    with archive.open(member) as stream:
        magic, length = stream.read(8), int.from_bytes(stream.read(2), "little")
        header = stream.read(min(length, _MAX_ARRAY_HEADER)).strip()
        expected = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
        if (magic, header) != (b"\x93NUMPY\x01\x00", expected):  # compared, not parsed
            raise RecordError(f"{name} declares {magic + header!r:.200}, wanted the header {expected!r}; {_DAMAGED}")
        content = stream.read(wanted + 1)
    if len(content) != wanted:
        raise RecordError(f"{name} holds {len(content)} bytes, wanted {wanted}; {_DAMAGED}")
    return np.frombuffer(content, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


# --- what must hold wherever the data come from


def checked(data: RecordData) -> RecordData:
    """The same with text fit for a terminal; raises RecordError for types, shapes or an order that no record has."""
    data = replace(
        data,
        reasons=plain_reasons(data.reasons),
        columns=list(map(plain_text, data.columns)),
        cloud_layers=list(map(plain_text, data.cloud_layers)),
        layer_names=list(map(plain_text, data.layer_names)),
    )
    for name, (dtype, shape) in expected_arrays(*data.counts).items():
        array = getattr(data, name)
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise RecordError(f"{name} must be {dtype} {shape}, got {got}; {_DAMAGED}")
    if len(set(data.columns)) != len(data.columns) or "step" in data.columns:
        raise RecordError(f"column names must differ and not be 'step', got {data.columns!r:.200}")
    if len(set(data.cloud_layers)) != len(data.cloud_layers) or not _within(data.cloud_particles, 1):
        raise RecordError(
            f"layers of clouds must differ and have at least one particle each, got {data.cloud_layers!r:.200} with "
            f"{data.cloud_particles.tolist()!r:.200}"
        )
    if data.cloud_layers and not len(data.cloud_step):
        raise RecordError(f"clouds of {data.cloud_layers!r:.200} must have at least one row, got none; {_DAMAGED}")
    if len(set(data.layer_names)) != len(data.layer_names) or len(data.layer_names) > MAX_LAYERS:
        raise RecordError(f"layers must differ and be {MAX_LAYERS} at most, got {data.layer_names!r:.200}; {_DAMAGED}")
    for name in ("step", "sketch_steps", "sketch_ticks", "cloud_step", "layer_step"):
        array = getattr(data, name)
        if not _within(array, 0) or (array[1:] <= array[:-1]).any():
            raise RecordError(f"{name} must increase, from 0 or more to 2^53 at most; {_DAMAGED}")
    check(data.sketch_state, SKETCH_STATE, "sketch_state")
    if len(data.sketch_steps) > MAX_SKETCHES:
        raise RecordError(f"a record holds at most {MAX_SKETCHES} sketches, got {len(data.sketch_steps)}")
    return data


def plain_reasons(reasons: Mapping[Any, Any]) -> dict[str, str]:
    """Name → a sentence on one line."""
    return {plain_text(str(name)): one_line(str(reason), LONGEST_REASON) for name, reason in reasons.items()}


def _within(array: npt.NDArray[np.int64], least: int) -> bool:
    return bool(((array >= least) & (array <= MAX_INTEGER)).all())
