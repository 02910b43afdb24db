"""`speedlimit advise`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_speedlimit.cli import terminal
from lightning_speedlimit.cli.complaints import Complaint, from_user
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.folders import records_within
from lightning_speedlimit.report import diagnose, text
from lightning_speedlimit.report.advice import Advice, advise
from lightning_speedlimit.report.advice_text import WIDTH, blocks
from lightning_speedlimit.report.runs import read_all
from lightning_speedlimit.words import one_line, plain_text


def advise_run(run: Path, times: Sequence[Path], *, json: bool) -> None:
    """Prints what a change of the run would buy; on stderr which of the others can't be read."""
    with from_user():
        paths = records_within(run)
        if len(paths) > 1:
            raise Complaint(f"advise wants one run, got {run}, which holds {len(paths)}; name one, as {paths[0]}")
        record = RunRecord.load(paths[0], sketches=False)
        others = list(dict.fromkeys(path for folder in times for path in records_within(folder)))
        beside, left_out = read_all([p for p in others if p.resolve() != paths[0].resolve()], sketches=False)
    found = advise(record, beside.values())
    if json:
        terminal.print_json(_as_json(paths[0], record, found))
    else:
        _print(paths[0], record, found)
    for line in left_out:
        print(one_line(line, 2000), file=sys.stderr)


def _print(path: Path, record: RunRecord, found: Advice) -> None:
    terminal.print_title(f"{found.title}   {plain_text(str(path))}")
    width = min(terminal.console().width, WIDTH) if terminal.is_terminal() else WIDTH
    for title, lines in blocks(record, found, width):
        print()
        terminal.print_title(title)
        print("\n".join(lines))


def _as_json(path: Path, record: RunRecord, found: Advice) -> dict[str, Any]:
    summary = record.summary()
    cost = {name: getattr(summary, name) for name in ("steps", "samples", "tokens", "epochs", "seconds")}
    gain = {name: getattr(summary, name) for name in ("loss", "loss_se", "loss_drop", "loss_drop_se")}
    return {
        "path": str(path),
        "cost": text.plain(cost),
        "gain": text.plain(gain),
        "change": text.plain(dataclasses.asdict(found) | {"rate_multiple": found.rate_multiple}),
        "findings": [text.plain(dataclasses.asdict(finding)) for finding in diagnose(record)],
        "sentence": summary.sentence(),
    }
