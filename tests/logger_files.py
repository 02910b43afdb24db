"""What loggers wrote, read back without Lightning and without the loggers: metric → [(step, value)].

W&B's file is a LevelDB log of protocol buffers: blocks of 32 kB, records of a header (checksum 4, length 2, type 1)
and data; types 1 a whole record, 2 its beginning, 3 its middle, 4 its end.
"""

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Metrics = dict[str, list[tuple[int, float]]]

_BLOCK = 32768


def of_csv(folder: Path) -> Metrics:
    """A CSVLogger's metrics.csv: rows that share a step are merged by name."""
    found: Metrics = {}
    (path,) = folder.rglob("metrics.csv")
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    found.setdefault(name, []).append((step, float(value)))
    return found


def of_tensorboard(folder: Path) -> Metrics:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = {event.parent for event in folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def images_of_tensorboard(folder: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Tag → [(step, content of a PNG file)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = {event.parent for event in folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(path), size_guidance={"images": 0})
    events.Reload()
    return {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in events.Tags()["images"]}


def of_mlflow(folder: Path) -> Metrics:
    """MLflow's file store: one file for each metric, lines of time, value, step."""
    found: Metrics = {}
    (place,) = folder.rglob("metrics")
    for path in place.rglob("*"):
        if path.is_file():
            lines = [line.split() for line in path.read_text().splitlines()]
            found[path.relative_to(place).as_posix()] = [(int(step), float(value)) for _, value, step in lines]
    return found


def of_wandb(folder: Path) -> Metrics:
    """W&B's offline file. x is `trainer/global_step`, under which Lightning logs everything."""
    found: Metrics = {}
    for row in _wandb_rows(folder):
        for name, value in row.items():
            if name != "trainer/global_step" and not name.startswith("_"):
                found.setdefault(name, []).append((int(row["trainer/global_step"]), float(value)))
    return found


def images_of_wandb(folder: Path) -> dict[str, tuple[int, Path]]:
    """Name → (step, file) of the last picture."""
    (files,) = folder.glob("wandb/offline-run-*/files")
    return {
        name.removesuffix("/filenames"): (int(row["trainer/global_step"]), files / value[0])
        for row in _wandb_rows(folder)
        for name, value in row.items()
        if name.endswith("/filenames")
    }


def alerts_of_wandb(folder: Path) -> list[tuple[str, str]]:
    """Title and text of each."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return [(r.alert.title, r.alert.text) for r in _wandb_records(path) if r.WhichOneof("record_type") == "alert"]


def _wandb_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of the history of a finished run."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    for record in _wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def _wandb_records(path: Path, patience: float = 30.0) -> list[Any]:
    """All records, the run's exit among them: W&B's own process writes, and `finish` does not wait for it."""
    from wandb.proto import wandb_internal_pb2

    latest = time.monotonic() + patience
    while True:
        found = [wandb_internal_pb2.Record.FromString(data) for data in _leveldb(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        if time.monotonic() > latest:
            raise TimeoutError(
                f"{path} holds {len(found)} records and no exit after {patience:.0f} s; was it finished?"
            )
        time.sleep(0.1)


def _leveldb(content: bytes) -> Iterator[bytes]:
    """What is whole so far: the file may be being written."""
    assert content[:4] in (b":W&B", b"")
    position, whole = 7, b""
    while position + 7 <= len(content):
        if _BLOCK - position % _BLOCK < 7:  # what is left of a block is too short for a header
            position += _BLOCK - position % _BLOCK
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        if kind == 0:
            return
        if position + 7 + length > len(content):
            return
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""
