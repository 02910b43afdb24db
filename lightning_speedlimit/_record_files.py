"""A record on disk: one folder, `record.json` beside one file of plain arrays.

Writing survives a kill at any moment: the arrays go into a file named after their checksum, then
`record.json`, which names that file, is replaced atomically, then older array files are deleted.
Reading executes nothing (no pickle) and trusts nothing: every size, type and shape is checked against
`record.json` and against a cap before anything of that size is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ._record_clouds import CLOUD_VALUES
from ._record_sketches import MAX_SKETCHES, SKETCH_SIZE

FORMAT = "lightning-speedlimit record"
FORMAT_VERSION = 2  # 1: had no clouds; a record without any is still written as 1
JSON_NAME = "record.json"

MAX_DATA_BYTES = 2 * 1024**3  # 10⁶ log steps of 250 columns: far beyond any run, well below a machine's memory
MAX_JSON_BYTES = 64 * 1024**2
_MAX_ARRAY_HEADER = 1024  # an .npy header of one or two dimensions takes 128 bytes
_DATA_NAME = re.compile(r"data-[0-9a-f]{32}\.npz")
_LEFTOVER_NAME = re.compile(r"data-[0-9a-f]{32}\.npz|\.writing-[0-9]+-(data|json)\.tmp")
_FLOAT_KEY = "__float__"


class RecordError(ValueError):
    """A record that can't be read: what was found, what was wanted, and the cure."""


@dataclass(frozen=True)
class RecordData:
    """All that a record holds, as plain values and arrays."""

    run: dict[str, Any]
    reasons: dict[str, str]
    columns: list[str]
    step: npt.NDArray[np.int64]  # (rows,)
    values: npt.NDArray[np.float64]  # (columns, rows)
    sketch_steps: npt.NDArray[np.int64]  # (sketches,)
    sketch_ticks: npt.NDArray[np.int64]  # (sketches,)
    sketches: npt.NDArray[np.float32]  # (sketches, 4093)
    sketch_state: dict[str, int]  # stride, ticks_seen, newest_step, last_is_provisional (0 or 1)
    cloud_layers: list[str] = field(default_factory=list)
    cloud_step: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # (cloud rows,)
    cloud_particles: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # (layers,)
    cloud_values: npt.NDArray[np.float64] = field(  # (4, cloud rows, layers), in the order of CLOUD_VALUES
        default_factory=lambda: np.empty((len(CLOUD_VALUES), 0, 0))
    )

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """Rows, columns, sketches, cloud rows and layers: what `expected_arrays` asks for."""
        return len(self.step), len(self.columns), len(self.sketch_steps), len(self.cloud_step), len(self.cloud_layers)


# The names of the integers in RecordData.sketch_state, each with the least value it can have.
SKETCH_STATE = {"stride": 1, "ticks_seen": 0, "newest_step": -1, "last_is_provisional": 0}


def expected_arrays(
    rows: int, columns: int, sketches: int, cloud_rows: int, layers: int
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Name → type and shape of every array in the data file; of clouds, where there are any."""
    clouds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "cloud_step": (np.dtype("<i8"), (cloud_rows,)),
        "cloud_particles": (np.dtype("<i8"), (layers,)),
        "cloud_values": (np.dtype("<f8"), (len(CLOUD_VALUES), cloud_rows, layers)),
    }
    return {
        "step": (np.dtype("<i8"), (rows,)),
        "values": (np.dtype("<f8"), (columns, rows)),
        "sketch_steps": (np.dtype("<i8"), (sketches,)),
        "sketch_ticks": (np.dtype("<i8"), (sketches,)),
        "sketches": (np.dtype("<f4"), (sketches, SKETCH_SIZE)),
        **(clouds if cloud_rows else {}),
    }


# --- what JSON can hold


def to_json(value: Any, where: str = "run") -> Any:
    """Plain JSON values; a float that JSON has no word for becomes {"__float__": "nan"}."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT_KEY: str(float(value))}
    if isinstance(value, list | tuple):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"keys of {where} must be strings, got {key!r}; use str(key)")
        return {_escaped(key): to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(
        f"{where} must be JSON-able (None, bool, int, float, str, list, dict), "
        f"got {type(value).__name__}; convert it, e.g. with str() or float()"
    )


def from_json(value: Any) -> Any:
    """The inverse of `to_json` (tuples come back as lists)."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_FLOAT_KEY} and value[_FLOAT_KEY] in ("nan", "inf", "-inf"):
            return float(value[_FLOAT_KEY])
        return {_unescaped(key): from_json(item) for key, item in value.items()}
    return value


def _escaped(key: str) -> str:
    return "\\" + key if key.lstrip("\\") == _FLOAT_KEY else key


def _unescaped(key: str) -> str:
    return key[1:] if key.startswith("\\") and key.lstrip("\\") == _FLOAT_KEY else key


# --- writing


def write_folder(folder: Path, data: RecordData) -> None:
    """Writes the record; whatever happens, the folder holds the record before or this one, whole."""
    clouds = {"rows": len(data.cloud_step), "layers": data.cloud_layers}
    document: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION if clouds["rows"] else 1,
        "run": to_json(data.run),
        "reasons": data.reasons,
        "columns": data.columns,
        "rows": len(data.step),
        "sketches": {"count": len(data.sketch_steps), "size": SKETCH_SIZE, **data.sketch_state},
        **({"clouds": clouds} if clouds["rows"] else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporaries = [folder / f".writing-{os.getpid()}-{kind}.tmp" for kind in ("data", "json")]
    try:
        document["data"] = _write_arrays(folder, temporaries[0], data)
        text = json.dumps(document, indent=1, allow_nan=False)
        with open(temporaries[1], "wb") as file:
            file.write(text.encode("ascii"))
            _flush_to_disk(file)
        os.replace(temporaries[1], folder / JSON_NAME)
        _flush_folder(folder)
    except OSError:
        for path in temporaries:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    _delete_leftovers(folder, keep=document["data"]["file"])


def _write_arrays(folder: Path, temporary: Path, data: RecordData) -> dict[str, Any]:
    """Writes the data file under a name made from its content; returns its name, size and checksum."""
    shapes = expected_arrays(*data.counts)
    arrays: dict[str, Any] = {
        name: np.ascontiguousarray(getattr(data, name), dtype=dtype).reshape(shape)
        for name, (dtype, shape) in shapes.items()
    }
    with open(temporary, "w+b") as file:
        np.savez(file, **arrays)
        file.flush()
        file.seek(0)
        checksum = _sha256(file)
        _flush_to_disk(file)
        size = file.seek(0, os.SEEK_END)
    name = f"data-{checksum[:32]}.npz"
    os.replace(temporary, folder / name)
    _flush_folder(folder)
    return {"file": name, "size": size, "sha256": checksum}


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _flush_to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where the system lets a folder be opened."""
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
            with contextlib.suppress(OSError):  # open in a reader on Windows; the next write tries again
                os.unlink(path)


# --- reading


def read_folder(folder: Path, *, sketches: bool = True) -> RecordData:
    """Reads and checks a record; raises RecordError for anything that is not exactly one.

    sketches: False leaves them out, after the checksum of the whole file.
    """
    if not folder.is_dir():
        raise RecordError(f"no record at {folder}: got no folder; pass the folder that holds {JSON_NAME}")
    for _ in range(3):
        text = _read_json_text(folder)
        document = _check_document(_parse(text, folder), folder)
        try:
            with open(folder / document["data"]["file"], "rb") as file:
                arrays = _read_arrays(file, document, sketches=sketches)
            break
        except FileNotFoundError:
            if _read_json_text(folder) == text:  # else a running training has just replaced it: again
                name = document["data"]["file"]
                raise RecordError(f"{folder / name} is missing, {JSON_NAME} names it; copy all of it") from None
        except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise RecordError(f"the data file of {folder} can't be read: {error}; copy it again") from error
    else:
        raise RecordError(f"{folder} is being rewritten faster than it can be read; try again")
    keys = SKETCH_STATE.keys()
    data = RecordData(
        run=from_json(document["run"]),
        reasons=document["reasons"],
        columns=document["columns"],
        sketch_state={key: document["sketches"][key] * (sketches or key != "last_is_provisional") for key in keys},
        cloud_layers=_clouds(document)["layers"],
        **arrays,
    )
    check_data(data)
    return data


def _read_json_text(folder: Path) -> bytes:
    path = folder / JSON_NAME
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise RecordError(f"{path} is missing; pass the folder that a run or record.save() wrote") from None
    except OSError as error:
        raise RecordError(f"{path} can't be read: {error}") from error
    if len(text) > MAX_JSON_BYTES:
        raise RecordError(f"{path} has more than {MAX_JSON_BYTES} bytes; this is no record of a run")
    return text


def _parse(text: bytes, folder: Path) -> dict[str, Any]:
    try:
        document = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{folder / JSON_NAME} is no valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise RecordError(f"{folder / JSON_NAME} is no {FORMAT!r}; pass the folder that a run wrote")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not in the JSON standard")


def _check_document(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Every field of record.json that reading relies on, and the size that they add up to."""
    version: Any = document.get("format_version")
    if not _is_integer(version, 1):
        raise RecordError(f"format_version of {folder} must be an integer from 1, got {version!r}")
    if version > FORMAT_VERSION:
        raise RecordError(
            f"{folder} has format_version {version}, this version reads up to {FORMAT_VERSION}; "
            "upgrade: pip install --upgrade lightning-speedlimit"
        )
    want = "{} of {} must be {}, got {!r:.80}; the record is damaged".format
    columns, reasons, data = document.get("columns"), document.get("reasons"), document.get("data")
    sketches = document.get("sketches")
    if not isinstance(document.get("run"), dict):
        raise RecordError(want("run", folder, "an object", document.get("run")))
    if not isinstance(reasons, dict) or not all(isinstance(text, str) for text in reasons.values()):
        raise RecordError(want("reasons", folder, "an object of strings", reasons))
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise RecordError(want("columns", folder, "a list of strings", columns))
    if not _is_integer(document.get("rows"), 0):
        raise RecordError(want("rows", folder, "an integer from 0", document.get("rows")))
    least = {"count": 0, "size": SKETCH_SIZE, **SKETCH_STATE}
    if not isinstance(sketches, dict) or not all(_is_integer(sketches.get(k), low) for k, low in least.items()):
        raise RecordError(want("sketches", folder, f"an object of integers {sorted(least)}", sketches))
    if sketches["size"] != SKETCH_SIZE:
        raise RecordError(want("sketches.size", folder, SKETCH_SIZE, sketches["size"]))
    if sketches["count"] > MAX_SKETCHES:
        raise RecordError(want("sketches.count", folder, f"at most {MAX_SKETCHES}", sketches["count"]))
    clouds = _clouds(document)
    if not isinstance(clouds, dict) or not _is_integer(clouds.get("rows"), 0):
        raise RecordError(want("clouds", folder, "an object with rows, an integer from 0, and layers", clouds))
    if not isinstance(clouds.get("layers"), list) or not all(isinstance(name, str) for name in clouds["layers"]):
        raise RecordError(want("clouds.layers", folder, "a list of strings", clouds.get("layers")))
    if not isinstance(data, dict) or not _is_integer(data.get("size"), 1) or not isinstance(data.get("sha256"), str):
        raise RecordError(want("data", folder, "an object with file, size and sha256", data))
    if not isinstance(data.get("file"), str) or not _DATA_NAME.fullmatch(data["file"]):
        raise RecordError(want("data.file", folder, "a file name data-<checksum>.npz", data.get("file")))
    if _claimed_bytes(document) > MAX_DATA_BYTES or data["size"] > MAX_DATA_BYTES:
        raise RecordError(
            f"{folder} claims {max(_claimed_bytes(document), data['size'])} bytes of arrays, "
            f"more than {MAX_DATA_BYTES}; this is no record of a run"
        )
    return document


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _clouds(document: dict[str, Any]) -> Any:
    """What record.json says of clouds; version 1 knew none."""
    return document.get("clouds", {"rows": 0, "layers": []})


def _shapes(document: dict[str, Any]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    clouds = _clouds(document)
    sizes = document["rows"], len(document["columns"]), document["sketches"]["count"]
    return expected_arrays(*sizes, clouds["rows"], len(clouds["layers"]))


def _claimed_bytes(document: dict[str, Any]) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in _shapes(document).values())


def _read_arrays(file: IO[bytes], document: dict[str, Any], *, sketches: bool) -> dict[str, Any]:
    data = document["data"]
    size = os.fstat(file.fileno()).st_size
    if size != data["size"]:
        raise RecordError(f"{data['file']} has {size} bytes, wanted {data['size']}; copy the folder again")
    checksum = _sha256(file)
    if checksum != data["sha256"]:
        raise RecordError(f"{data['file']} has sha256 {checksum}, wanted {data['sha256']}; copy the folder again")
    file.seek(0)
    shapes = _shapes(document)
    with zipfile.ZipFile(file) as archive:
        names = sorted(member.filename for member in archive.infolist())
        if names != sorted(f"{name}.npy" for name in shapes):
            raise RecordError(f"{data['file']} holds {names}, wanted {sorted(shapes)}; the record is damaged")
        found = {name: _read_array(archive, name, *shapes[name]) for name in shapes if sketches or name != "sketches"}
    return found if sketches else found | _no_sketches()


def _no_sketches() -> dict[str, Any]:
    shapes = expected_arrays(0, 0, 0, 0, 0)
    return {name: np.empty(*reversed(shapes[name])) for name in ("sketch_steps", "sketch_ticks", "sketches")}


def _read_array(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """One array, its declared size, type and shape checked before its data are read."""
    member = archive.getinfo(f"{name}.npy")
    wanted = dtype.itemsize * math.prod(shape)
    if member.compress_type != zipfile.ZIP_STORED:
        raise RecordError(f"{name} is compressed, wanted plain; the record was not written by this package")
    if not wanted <= member.file_size <= wanted + _MAX_ARRAY_HEADER:
        raise RecordError(f"{name} declares {member.file_size} bytes, wanted {wanted}; the record is damaged")
    with archive.open(member) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            if version != (1, 0):
                raise ValueError(f"got .npy version {version}, wanted (1, 0)")
            header = np.lib.format.read_array_header_1_0(stream, max_header_size=_MAX_ARRAY_HEADER)
        except ValueError as error:
            raise RecordError(f"{name} has no valid array header: {error}") from error
        if header != (shape, False, dtype):
            raise RecordError(
                f"{name} declares shape {header[0]} and type {header[2]}, wanted {shape} and {dtype}; "
                "the record is damaged"
            )
        content = stream.read(wanted + 1)
    if len(content) != wanted:
        raise RecordError(f"{name} holds {len(content)} bytes, wanted {wanted}; the record is damaged")
    return np.frombuffer(content, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="))


# --- what must hold wherever the data come from


def check_data(data: RecordData) -> None:
    """Raises RecordError where types, shapes or order are not those of a record."""
    for name, (dtype, shape) in expected_arrays(*data.counts).items():
        array = getattr(data, name)
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise RecordError(f"{name} must be {dtype} {shape}, got {got}; the record is damaged")
    if len(set(data.columns)) != len(data.columns) or "step" in data.columns:
        raise RecordError(f"column names must differ and not be 'step', got {data.columns}")
    if len(set(data.cloud_layers)) != len(data.cloud_layers) or (data.cloud_particles < 1).any():
        raise RecordError(
            f"layers of clouds must differ and have at least one particle each, got {data.cloud_layers} with "
            f"{data.cloud_particles.tolist()}"
        )
    if data.cloud_layers and not len(data.cloud_step):
        raise RecordError(f"clouds of {data.cloud_layers} must have at least one row, got none; the record is damaged")
    for name in ("step", "sketch_steps", "sketch_ticks", "cloud_step"):
        array = getattr(data, name)
        if (array[:1] < 0).any() or (np.diff(array) <= 0).any():
            raise RecordError(f"{name} must increase from 0 or more; the record is damaged")
    state = data.sketch_state
    if state.keys() != SKETCH_STATE.keys() or not all(_is_integer(state[k], low) for k, low in SKETCH_STATE.items()):
        raise RecordError(f"sketch_state must hold the integers {sorted(SKETCH_STATE)}, got {state}")
    if len(data.sketch_steps) > MAX_SKETCHES:
        raise RecordError(f"a record holds at most {MAX_SKETCHES} sketches, got {len(data.sketch_steps)}")
