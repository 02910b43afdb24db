"""What was run: what all runs share, and what tells the groups apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_speedlimit.record.summary_text import measured_share
from lightning_speedlimit.report.places import Group
from lightning_speedlimit.report.results import Result
from lightning_speedlimit.words import one_line

MOST_SETTINGS = 300  # of the 18 that are there when nobody adds one
_LONGEST = 120  # characters of what tells a group apart
# In the title, or of the run and not of what was set.
_NOT_SET = {"optimizers", "batch_size", "accumulate_grad_batches", "world_size", "samples_per_step", "tokens_per_step"}
_NOT_SET |= {"logger", "versions", "device", "measured_coordinates", "optimized_coordinates", "stretch"}
# From the data and the batch, which are told.
_FOLLOWS = {"batches_per_epoch", "samples_without_replacement"}
_OF_THE_FIT = {"ended", "written", "pause"}  # how it ended, when, and how often it is written: no settings at all


@dataclass(frozen=True)
class Settings:
    """What was run, from the records: what all runs share, and what tells the groups apart."""

    same: tuple[tuple[str, str], ...]
    """(name, value)."""
    differing: tuple[str, ...]
    """Names."""
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """(group, its values of these names)."""


def settings_of(comparison: Result) -> Settings:
    """Every entry of `record.run`; replicas of a group that differ are listed with "or"."""
    said = {group.name: _of_group(group) for group in comparison.groups}
    keys = list(dict.fromkeys(key for values in said.values() for key in values))
    same, differing, follows = [], [], _following(comparison)
    for key in keys[:MOST_SETTINGS]:
        found = {values.get(key, "not recorded") for values in said.values()}
        if len(found) == 1:
            same.append((_spoken(key), found.pop()))
        elif key not in follows:
            differing.append(key)
    if len(keys) > MOST_SETTINGS:
        same.append(("more", f"{len(keys) - MOST_SETTINGS:,} settings, in the records"))
    rows = [(group, tuple(v.get(key, "not recorded") for key in differing)) for group, v in said.items()]
    return Settings(tuple(same), tuple(map(_spoken, differing)), tuple(rows))


def _of_group(group: Group) -> dict[str, str]:
    runs = [point.run.record.run for point in group.points]
    keys = dict.fromkeys(key for run in runs for key, _ in _entries(run))
    found = [dict(_entries(run)) for run in runs]
    return {key: " or ".join(dict.fromkeys(_setting(key, run.get(key)) for run in found)) for key in keys}


def _following(comparison: Result) -> set[str]:
    """What tells no runs apart: how many coordinates are measured at most, too, where all were."""
    runs = [point.run.record.run for group in comparison.groups for point in group.points]
    all_measured = all(run.get("measured_coordinates") is not None and measured_share(run) is None for run in runs)
    return _FOLLOWS | {"coordinates"} if all_measured else _FOLLOWS


def _entries(run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of `record.run`; hyper-parameters one by one."""
    for key, value in run.items():
        if key == "hparams" and isinstance(value, Mapping):
            yield from ((f"hparams.{name}", item) for name, item in value.items())
        elif key not in _OF_THE_FIT:
            yield key, value


def apart(comparison: Result) -> dict[str, str]:
    """Group → what tells it from the others: "SGD lr 0.1, batch 128; width 64"; none where nothing does."""
    titles = {group.name: group.title for group in comparison.groups if not group.title.endswith(group.name)}
    titles = titles if len({group.title for group in comparison.groups}) > 1 else {}
    said, follows = {group.name: _of_group(group) for group in comparison.groups}, _following(comparison)
    keys = dict.fromkeys(key for values in said.values() for key in values if key not in _NOT_SET | follows)
    differing = [key for key in keys if len({values.get(key) for values in said.values()}) > 1]
    found = {}
    for name, values in said.items():
        told = ", ".join(f"{_spoken(key.removeprefix('hparams.'))} {values[key]}" for key in differing if key in values)
        found[name] = one_line("; ".join(part for part in (titles.get(name, ""), told) if part), _LONGEST)
    return {name: text for name, text in found.items() if text}


def _spoken(key: str) -> str:
    return key.replace("_", " ")


def _setting(key: str, value: Any) -> str:
    if key == "optimizers" and value is not None:
        return " + ".join(_optimizer(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{inner} {_setting('', item)}" for inner, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_setting("", item) for item in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value}"


def _optimizer(optimizer: Mapping[str, Any]) -> str:
    """ "AdamW(lr=0.001, betas=[0.9, 0.999])": what is None was not set and is left out."""
    groups = [
        ", ".join(f"{key}={value}" for key, value in group.items() if value is not None)
        for group in optimizer.get("groups", [])
    ]
    return f"{optimizer.get('class', 'optimizer')}({'; '.join(dict.fromkeys(groups))})"
