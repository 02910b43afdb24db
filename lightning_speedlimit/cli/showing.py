"""`speedlimit show`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_speedlimit import _summary_text
from lightning_speedlimit.cli import terminal
from lightning_speedlimit.cli.complaints import from_user
from lightning_speedlimit.record import Regime, RunRecord
from lightning_speedlimit.report import diagnose, text
from lightning_speedlimit.report.runs import optimizer_title, records_within


def show_runs(folder: Path, *, json: bool) -> None:
    """The run in the folder; of several a line each."""
    with from_user():
        paths = records_within(folder)
        if len(paths) == 1:
            record = RunRecord.load(paths[0])
        else:
            records = [RunRecord.load(path, sketches=json) for path in paths]
    if len(paths) == 1:
        terminal.print_json(_as_json(paths[0], record)) if json else _print_run(paths[0], record)
    elif json:
        terminal.print_json([_as_json(path, record) for path, record in zip(paths, records, strict=True)])
    else:
        _print_several(paths, records)


def _print_run(path: Path, record: RunRecord) -> None:
    summary = record.summary()
    if terminal.is_terminal():
        terminal.print_title(f"{optimizer_title(record.run)}   {path}")
        print()
        terminal.print_meanings(_summary_text.headline(summary))
        print()
        terminal.print_title("What it rests on")
        terminal.print_meanings(_summary_text.quantities(summary))
        notes = _summary_text.remarks(summary)
        if notes:
            print()
            terminal.print_title("Beware")
            terminal.print_items(notes, width=_summary_text.WIDTH)
    else:
        print(summary)
    for title, items in (("Regimes", _regimes(record.regimes())), ("What cost the most", _causes(record))):
        if items:
            print()
            terminal.print_title(title)
            terminal.print_items(items, width=_summary_text.WIDTH)


def _regimes(regimes: Sequence[Regime]) -> list[str]:
    """A line for each; of one alone no efficiency, as the run's own stands above, in which mobilities are known."""
    if len(regimes) == 1:
        return [f"steps {regimes[0].first_step} to {regimes[0].last_step}: one, without a clear change"]
    return [
        f"steps {r.first_step} to {r.last_step}: efficiency {text.number(r.efficiency)} (kinematic / conversion in it)"
        for r in regimes
    ]


def _causes(record: RunRecord) -> list[str]:
    return [f"{finding.sentence} {finding.advice}".strip() for finding in diagnose(record)]


def _print_several(paths: Sequence[Path], records: Sequence[RunRecord]) -> None:
    """Paths as they can be asked for."""
    rows = []
    for path, record in zip(paths, records, strict=True):
        s = record.summary()
        rows.append([str(path), str(s.steps), *map(text.number, (s.loss, s.efficiency, s.conversion))])
    terminal.print_rows(["run", "steps", "loss", "efficiency", "conversion"], rows)
    print(f"\n{len(paths)} runs. One of them: speedlimit show {paths[0]}")


def _as_json(path: Path, record: RunRecord) -> dict[str, Any]:
    summary = record.summary()
    values = {f.name: getattr(summary, f.name) for f in dataclasses.fields(summary) if f.name not in ("reasons", "run")}
    return {
        "path": str(path),
        "run": text.plain(record.run),
        "summary": text.plain(values),
        "reasons": record.reasons,
        "sentence": summary.sentence(),
        "regimes": [text.plain(dataclasses.asdict(regime)) for regime in record.regimes()],
        "findings": [text.plain(dataclasses.asdict(finding)) for finding in diagnose(record)],
    }
