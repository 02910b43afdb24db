"""Runs to be compared: records, or folders of them, each with a name and the group that it is a replica of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lightning_speedlimit.checks import arguments
from lightning_speedlimit.checks.guard import look, shown
from lightning_speedlimit.record import RecordError, RunRecord
from lightning_speedlimit.record.folders import USUAL_NAME, records_within
from lightning_speedlimit.report.labels import optimizer_title
from lightning_speedlimit.words import plain_text

Source = RunRecord | str | os.PathLike[str]
Sources = Source | Iterable[Source] | Mapping[str, Source | Iterable[Source]]

_Of = TypeVar("_Of")

Stretch = tuple[int, int | None]  # of a run: from step, to step

KEEP_SKETCHES = 24  # runs at most whose sketches are read at once: 8 MB each

_WANTED = "records or folders of them: one, several, or a mapping of groups"
_LEFT_OUT = "left out: "
_SETTINGS = ("optimizers", "batch_size", "accumulate_grad_batches")  # that replicas have in common
_STRETCH = re.compile(r"@(\d*):(\d*)$")  # of a path
_SEED = re.compile(r"[\s_.\-]*(?<![a-z])(seed|replica)[\s_.=\-]*\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    name: str
    """Unique in the comparison: from its folder, else from its optimizer."""
    group: str
    """Runs of one group are replicas: the same settings, other seeds."""
    record: RunRecord
    path: Path | None = None
    """Folder of the record; None: it came as an object."""


class Gathered(NamedTuple):
    """Runs to be compared, and what is not among them."""

    runs: list[Run]
    left_out: list[str]
    """Of each folder whose record can't be read a line that says why."""


def gather(sources: Sources) -> Gathered:
    """Every record among the sources, named, and put into groups; those that are damaged are left out.

    Args:
        sources: a record, a folder (of a record, or one that holds records somewhere within; with "@1000:2000" behind
            it that stretch of them), or several of them: each a group of its own, but that folders whose names differ
            in a seed alone ("adam/seed_0", "adam/seed_1") are one. Or a mapping: name of the group → what it consists
            of.

    Raises:
        RecordError: a folder without a record, or none that can be read.
        ValueError: nothing given; runs of one group whose optimizers differ; two groups of one name.
    """
    if isinstance(sources, Mapping):
        groups = [_of_group(name, source) for name, source in _told_apart(sources).items()]
        found = [run for group in groups for run in group.runs]
        left_out = [line for group in groups for line in group.left_out]
        runs = [replace(run, name=name) for run, name in zip(found, _unique(found), strict=True)]
    else:
        runs, left_out = _named(_several(sources))
    if not runs and left_out:
        raise none_is_left(left_out)
    if not runs:
        raise ValueError("compare needs at least one run, got none; pass records, or folders that hold them")
    _check_groups(runs)
    return Gathered(runs, left_out)


def read_all(paths: Sequence[Path], *, sketches: bool) -> tuple[dict[Path, RunRecord], list[str]]:
    """The records of these folders in their order, and a line for each that can't be read.

    In threads: checksums are most of the work, and leave Python free.
    """
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(_load, sketches=sketches), paths))
    left_out = [f"{_LEFT_OUT}{error}" for error in found if isinstance(error, RecordError)]
    return {p: record for p, record in zip(paths, found, strict=True) if isinstance(record, RunRecord)}, left_out


def none_is_left(left_out: Sequence[str]) -> RecordError:
    """What to raise where every record was left out: why the first was."""
    more = f" (and {len(left_out) - 1} more that can't be read)" if len(left_out) > 1 else ""
    return RecordError(left_out[0].removeprefix(_LEFT_OUT) + more)


def _load(path: Path, *, sketches: bool) -> RunRecord | RecordError:
    try:
        return RunRecord.load(path, sketches=sketches)
    except RecordError as error:
        return error


def with_sketches(run: Run) -> RunRecord:
    """The run's record with its sketches, read again where they were left out; without, where they are gone since."""
    if run.path is None or len(run.record.sketch_steps):
        return run.record
    found = _load(run.path, sketches=True)
    return found if isinstance(found, RunRecord) else run.record


def _several(sources: Source | Iterable[Source]) -> list[Source]:
    if isinstance(sources, RunRecord | str | os.PathLike):
        return [sources]
    found: list[Source] | None = None if isinstance(sources, bytes) else look(list, None, sources)
    if found is None:
        raise TypeError(f"runs got {shown(sources)}, wanted {_WANTED}")
    return found


def _name(name: Any) -> str:
    if not isinstance(name, str | int | float):
        raise TypeError(f"names of groups of runs must be text, got {shown(name)}; use str(…)")
    return str(name)


def _told_apart(groups: Mapping[Any, _Of]) -> dict[str, _Of]:
    """By names as text; 1 and "1" would be one group, and what they hold its replicas."""
    found: dict[str, _Of] = {}
    for name, source in groups.items():
        text = plain_text(_name(name))
        if text in found:
            raise ValueError(f"names of groups of runs must differ, got {text!r} twice; give each a name of its own")
        found[text] = source
    return found


def _named(sources: Sequence[Source]) -> Gathered:
    """Each run a group of its own, but for seeds; names are what tells the runs' folders apart.

    Each run once, however often it is named: twice it would be two replicas that agree to the last digit.
    """
    folders: dict[Path, Path] = {}  # as they were named first
    wanted: dict[tuple[Path, Stretch | None], None] = {}
    for source in sources:
        if not isinstance(source, RunRecord):
            folder, stretch = _split(arguments.path("runs", source, "a folder of runs"))
            for path in records_within(folder):
                wanted[folders.setdefault(path.resolve(), path), stretch] = None
    paths = list(folders.values())
    loaded, left_out = read_all(paths, sketches=len(paths) <= KEEP_SKETCHES)
    told = _labels([_as_named(path, record) for path, record in loaded.items()])
    labels = dict(zip(loaded, map(plain_text, told), strict=True))
    runs = [_run(labels[path], loaded[path], path, stretch) for path, stretch in wanted if path in loaded]
    records = {id(source): source for source in sources if isinstance(source, RunRecord)}.values()
    runs += [Run(title, title, record) for record in records for title in [optimizer_title(record)]]
    names = _unique(runs)  # of one name, but told apart: no replicas
    runs = [
        run if run.name == name else replace(run, name=name, group=name) for run, name in zip(runs, names, strict=True)
    ]
    return Gathered(runs, left_out)


def _split(source: str | os.PathLike[str]) -> tuple[Path, Stretch | None]:
    """The folder, and which steps are wanted: "runs/adamw@1000:2000"."""
    text = os.fspath(source)
    match = _STRETCH.search(text)
    if match is None or os.path.exists(text):
        return Path(text), None
    return Path(text[: match.start()]), (int(match[1] or 0), int(match[2]) if match[2] else None)


def _run(label: str, record: RunRecord, path: Path, stretch: Stretch | None) -> Run:
    """Raises ValueError for a stretch without a row."""
    group = _without_seed(label)
    if stretch is None:
        return Run(label, group, record, path)
    try:
        part = record.stretch(*stretch)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    suffix = "@{start}:{stop}".format(**part.run["stretch"])
    return Run(label + suffix, group + suffix, part)  # its record is nowhere on disk


def _without_seed(label: str) -> str:
    """ "adam" of "adam/seed_0" and of "seed_0/adam"."""
    parts = [_SEED.sub("", part).strip(" _.-") for part in label.split("/")]
    return "/".join(part for part in parts if part) or "run"


def _of_group(name: str, source: Source | Iterable[Source]) -> Gathered:
    runs, left_out = _named(_several(source))
    if len(runs) == 1:
        return Gathered([replace(runs[0], name=name, group=name)], left_out)
    return Gathered([replace(run, name=f"{name} {place}", group=name) for place, run in enumerate(runs, 1)], left_out)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The parts of the paths in which they differ; of a single one, the last that tells something."""
    parts = [_telling(path) for path in paths]
    if len(parts) < 2:
        return [part[-1] if part else "run" for part in parts]
    same = _alike(parts)
    ends = _alike([part[same:][::-1] for part in parts])
    cut = [part[same : len(part) - ends] for part in parts]
    return ["/".join(part) or whole[-1] for part, whole in zip(cut, parts, strict=True)]


def _as_named(path: Path, record: RunRecord) -> Path:
    """The folder, with the name that its logger's run was given in the place of the id that the folder is called by."""
    told = record.run.get("logger") or {}
    known, name = told.get("id"), told.get("name", "").replace("/", "_")
    path = path.resolve()
    return Path(*(name if part == known and name else part for part in path.parts))


def _alike(parts: Sequence[tuple[str, ...]]) -> int:
    """How many parts at the start all have in common."""
    return next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), min(map(len, parts)))


def _telling(path: Path) -> tuple[str, ...]:
    parts = path.resolve().parts
    return parts[:-1] if parts[-1:] == (USUAL_NAME,) and len(parts) > 1 else parts


def _unique(runs: Sequence[Run]) -> list[str]:
    """The runs' names, with a number behind every one that came before."""
    names: list[str] = []
    for run in runs:
        name, count = run.name, 1
        while name in names:
            count += 1
            name = f"{run.name} ({count})"
        names.append(name)
    return names


def named_records(runs: Mapping[str, RunRecord] | RunRecord) -> dict[str, RunRecord]:
    """What figures of several runs take: a single record is named "run"."""
    if isinstance(runs, RunRecord):
        return {"run": runs}
    arguments.check_kind("runs", runs, Mapping, "a RunRecord, or a mapping: name → RunRecord")
    for name, record in runs.items():
        check_record(f"runs[{arguments.check_text('a name among runs', name)!r:.60}]", record)
    return dict(runs)


def check_record(name: str, got: object) -> None:
    arguments.check_kind(name, got, RunRecord, "a RunRecord; RunRecord.load(folder) gives one")


def _check_groups(runs: Sequence[Run]) -> None:
    """Replicas differ in their seeds alone: optimizers of other settings in one group would be averaged unseen."""
    settings: dict[str, tuple[str, Any]] = {}
    for run in runs:
        own = [run.record.run.get(key) for key in _SETTINGS]
        name, first = settings.setdefault(run.group, (run.name, own))
        if first != own:
            raise ValueError(
                f"runs of the group {run.group!r} must be replicas, got {name!r} ({_short(first)}) and {run.name!r} "
                f"({_short(own)}); give them groups of their own: compare({{'one': …, 'other': …}})"
            )


def _short(settings: Any) -> str:
    return optimizer_title(dict(zip(_SETTINGS, settings, strict=True)))
