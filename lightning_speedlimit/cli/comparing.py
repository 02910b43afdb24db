"""`speedlimit compare`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_speedlimit.checks import arguments
from lightning_speedlimit.cli import terminal
from lightning_speedlimit.cli.complaints import Complaint, check_writable, from_user, writing
from lightning_speedlimit.report import Comparison, compare, compare_models, text
from lightning_speedlimit.report.alignment import By
from lightning_speedlimit.report.costs import Cost
from lightning_speedlimit.words import one_line


def compare_runs(
    runs: Sequence[Path],
    groups: Sequence[str],
    *,
    by: By,
    at: float | None,
    cost: Cost | None,
    split: bool,
    html: Path | None,
    json: bool,
) -> None:
    """Prints the comparison, and writes its page where one is wanted."""
    if html is not None:
        check_writable(html)
    sources = _sources(runs, groups)
    with from_user():
        several = compare_models(sources, by=by, at=at, cost=cost) if split else None
        found = several or [compare(sources, by=by, at=at, cost=cost)]
    if json:
        terminal.print_json([c.to_dict() for c in found] if split else found[0].to_dict())
    else:
        print_comparisons(found)
    if html is not None:
        write_page(html, found)
        print(f"The page is {html.resolve().as_uri()}", file=sys.stderr)  # where it is in no one's way


def write_page(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Writes the page, on which stands the command that is running."""
    from lightning_speedlimit.report import page

    with writing(path):
        page.write_page(path, comparisons, command=shlex.join(["speedlimit", *sys.argv[1:]]))


def _sources(runs: Sequence[Path], groups: Sequence[str]) -> Sequence[Path] | dict[str, list[Path]]:
    if bool(runs) == bool(groups):
        got = "both" if runs else "neither"
        raise Complaint(f"compare wants either RUN... or --group NAME=PATH, got {got}; speedlimit compare --help")
    named: dict[str, list[Path]] = {}
    for group in groups:
        name, separator, path = group.partition("=")
        if not (name and separator and path):
            raise Complaint(f"--group wants NAME=PATH, got {group!r}; as --group adamw=runs/adamw")
        with from_user():
            named.setdefault(name, []).append(arguments.path(f"--group {name}", path))
    return named or runs


def print_comparisons(comparisons: Sequence[Comparison]) -> None:
    """One below the other, with the number of parameters over each where there are several."""
    for i, comparison in enumerate(comparisons):
        if i:
            print()
        if len(comparisons) > 1:
            terminal.print_title(_model(comparison))
        if terminal.is_terminal():
            _print_for_terminal(comparison)
        else:
            print(comparison.table())


def _model(comparison: Comparison) -> str:
    run = comparison.groups[0].points[0].run.record.run
    count, name = run.get("parameters"), run.get("model")
    known = "number of parameters unknown" if count is None else f"{count:,} parameters"
    return f"{one_line(name, 60)}, {known}" if name else f"Model with {known}"


def _print_for_terminal(comparison: Comparison) -> None:
    """What `Comparison.table` says, laid out for the width; and a mark at the groups that none beats."""
    columns = text.shown_columns(comparison)
    marks = comparison.by == "loss" and len(comparison.groups) > 1
    console = terminal.console()
    console.print(text.heading(comparison))
    print()
    terminal.print_rows(text.head(comparison, columns), text.rows(comparison, columns, " *" if marks else ""))
    for line in text.left_away(comparison):
        console.print(line)
    if told := text.settings(comparison):
        print()
        terminal.print_title(told[0])
        print("\n".join(told[1:-1]))
    print(f"* beaten by none in both {comparison.axis.words.noun} and action\n" if marks else "")
    for sentence in (*text.measured(comparison), *comparison.verdict()):
        console.print(sentence)
    if places := text.order(comparison):
        print()
        terminal.print_title(text.order_title(comparison))
        terminal.print_rows(places[0], places[1:])
        console.print(text.order_sentence(comparison))
    for title, texts in (("What cost the most", text.costliest(comparison)), ("Beware", comparison.notes)):
        if texts:
            print()
            terminal.print_title(title)
            terminal.print_items(texts, width=text.WIDTH)
