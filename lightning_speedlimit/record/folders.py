"""Where records lie: in the folder that is named, or somewhere below it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightning_speedlimit.record.files import JSON_NAME
from lightning_speedlimit.record.schema import RecordError
from lightning_speedlimit.words import listed

USUAL_NAME = "speed_limit"  # the last part of every run's folder, which tells nothing


class NoRecord(RecordError):
    """There is none, which may come yet."""


def records_within(folder: Path) -> list[Path]:
    """The folder itself where it is a record, else every record below it, in natural order ("run 2" before "run 10").

    Raises:
        NoRecord: there is none.
        RecordError: the folder is a file, or can't be looked into.
    """
    try:
        if not folder.exists():
            raise NoRecord(f"no such folder: {folder}; pass the folder of a run, or one that holds runs")
        if folder.is_file():
            raise RecordError(f"{folder} is a file, wanted a folder; pass the folder that holds {JSON_NAME}")
        if os.path.lexists(folder / JSON_NAME):  # what it is, reading says
            return [folder]
        found = sorted((path.parent for path in folder.rglob(JSON_NAME)), key=lambda path: _natural(str(path)))
    except OSError as error:  # a name that is too long, rights that are missing
        raise RecordError(f"{folder} can't be looked into: {error.strerror or error}; name another folder") from error
    if not found:
        raise NoRecord(
            f"{folder} holds no record: got no {JSON_NAME} in it or below; pass the folder that SpeedLimit wrote "
            f"(mostly …/{USUAL_NAME}), or one above it"
        )
    return found


def record_within(folder: Path) -> Path:
    """The only record that the folder is, or holds.

    Raises:
        RecordError: there is none, or there are several, which are listed.
    """
    found = records_within(folder)
    if len(found) > 1:
        raise RecordError(f"{folder} holds {len(found)} records: {listed(list(map(str, found)))}; name one of them")
    return found[0]


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
