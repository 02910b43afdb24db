"""`speedlimit show`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_speedlimit.cli import terminal
from lightning_speedlimit.cli.complaints import from_user
from lightning_speedlimit.record import Regime, RunRecord, late, summary_text
from lightning_speedlimit.record.fit_state import fit_state
from lightning_speedlimit.record.folders import records_within
from lightning_speedlimit.report import diagnose, text
from lightning_speedlimit.report import layers as layer_words
from lightning_speedlimit.report.labels import optimizer_title
from lightning_speedlimit.report.layers import layers_of
from lightning_speedlimit.report.runs import none_is_left, read_all
from lightning_speedlimit.words import number, one_line, plain_text

_LONGEST_NAME = 40  # characters of what a logger's run is called


def show_runs(folder: Path, *, json: bool, layers: bool = False) -> None:
    """The run in the folder; of several a line each, and on stderr one for each that can't be read.

    layers: of a single run that is printed, a table of them too; JSON has them always.
    """
    with from_user():
        paths = records_within(folder)
        records, left_out = read_all(paths, sketches=json or len(paths) == 1)
        if not records:
            raise none_is_left(left_out)
    if len(paths) == 1:
        [(path, record)] = records.items()
        terminal.print_json(_as_json(path, record)) if json else _print_run(path, record)
        if layers and not json:
            _print_layers(record)
    elif json:
        terminal.print_json([_as_json(path, record) for path, record in records.items()])
    else:
        _print_several(records)
    for line in left_out:
        print(one_line(line, 2000), file=sys.stderr)


def _print_run(path: Path, record: RunRecord) -> None:
    summary, state = record.summary(), fit_state(record, path)
    if terminal.is_terminal():
        terminal.print_title(f"{optimizer_title(record)}   {plain_text(str(path))}")
    if state.kind != "unknown":
        print(f"Fit: {state.sentence}")
    if terminal.is_terminal():
        if since := late.sentence(record.run):
            terminal.console().print(since)
        for title, rows in summary_text.parts(summary).items():
            print()
            terminal.print_title(title)
            terminal.print_meanings(rows)
        notes = summary_text.remarks(summary)
        if notes:
            print()
            terminal.print_title("Beware")
            terminal.print_items(notes, width=summary_text.WIDTH)
    else:
        print(summary)
    for title, items in (("Regimes", _regimes(record.regimes())), ("What cost the most", _causes(record))):
        if items:
            print()
            terminal.print_title(title)
            terminal.print_items(items, width=summary_text.WIDTH)


def _print_layers(record: RunRecord) -> None:
    """In the model's order, so that blocks stay together."""
    found, step = layers_of(record), record.layers["step"]
    print()
    if not found:
        print("Layers are not known: the run has none with names, or was recorded by an older version.")
        return
    terminal.print_title(f"Layers, at step {step}")
    terminal.print_rows(layer_words.HEADS, layer_words.rows(found))
    terminal.print_items([layer_words.MEANING, *layer_words.sentences(found)], width=summary_text.WIDTH)


def _regimes(regimes: Sequence[Regime]) -> list[str]:
    """A line for each; of one alone no efficiency, as the run's own stands above, in which mobilities are known."""
    if len(regimes) == 1:
        return [f"steps {regimes[0].first_step} to {regimes[0].last_step}: one, without a clear change"]
    return [
        f"steps {r.first_step} to {r.last_step}: efficiency {number(r.efficiency)} (kinematic / conversion in it)"
        for r in regimes
    ]


def _causes(record: RunRecord) -> list[str]:
    return [finding.text for finding in diagnose(record)]


def _print_several(records: Mapping[Path, RunRecord]) -> None:
    """Paths as they can be asked for; whether they go on, where any tells."""
    rows, begun = [], {path: late.since(record.run) for path, record in records.items()}
    states = [fit_state(record, path) for path, record in records.items()]
    told = any(state.kind != "unknown" for state in states)
    for (path, record), state in zip(records.items(), states, strict=True):
        s = record.summary()
        values = map(number, (s.loss, s.efficiency, s.conversion))
        steps = f"{s.steps} from {begun[path]} on" if begun[path] else str(s.steps)
        rows.append([_path_and_name(path, record), steps, *values, *([state.word] if told else [])])
    terminal.print_rows(["run", "steps", "loss", "efficiency", "conversion", *(["fit"] if told else [])], rows)
    runs = "1 run" if len(rows) == 1 else f"{len(rows)} runs"
    if since := next(filter(None, begun.values()), 0):
        print(f'\n"from {since} on": measured only from step {since} of the training on; what was before is not known.')
    print(f"\n{runs}. One of them: speedlimit show {plain_text(str(next(iter(records))))}")


def _path_and_name(path: Path, record: RunRecord) -> str:
    """ "project/x3f/speed_limit (calm-owl)": W&B and MLflow call folders by ids, and their pages by names."""
    name = one_line((record.run.get("logger") or {}).get("name", ""), _LONGEST_NAME)
    return plain_text(str(path)) + (f" ({name})" if name else "")


def _as_json(path: Path, record: RunRecord) -> dict[str, Any]:
    summary, state = record.summary(), fit_state(record, path)
    values = {f.name: getattr(summary, f.name) for f in dataclasses.fields(summary) if f.name not in ("reasons", "run")}
    return {
        "path": str(path),
        "fit": text.plain({"state": state.kind, "ended_by": state.by, "seconds_since_written": state.seconds}),
        "run": text.plain(record.run),
        "summary": text.plain(values),
        "reasons": record.reasons,
        "sentence": summary.sentence(),
        "regimes": [text.plain(dataclasses.asdict(regime)) for regime in record.regimes()],
        "layers": [text.plain(dataclasses.asdict(layer)) for layer in layers_of(record)],
        "findings": [text.plain(dataclasses.asdict(finding)) for finding in diagnose(record)],
    }
