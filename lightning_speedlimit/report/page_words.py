"""What the page says in words: the answer, the settings of the runs, how to make the page again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from lightning_speedlimit.report.places import Point
from lightning_speedlimit.report.results import Result
from lightning_speedlimit.report.verdict import leaders, verdict
from lightning_speedlimit.words import listed, number, one_line, plain_text

_DISTRIBUTION = "lightning-speedlimit"


# --- the answer


def heading(comparison: Result) -> str:
    """ "5 runs at the same loss, 0.130"."""
    return f"{count(comparison)} {comparison.where}"


def count(comparison: Result) -> str:
    """ "5 runs", "9 runs in 3 groups"."""
    groups, runs = len(comparison.groups), sum(len(group.points) for group in comparison.groups)
    several = f" in {groups} group{'s' if groups > 1 else ''}" if groups < runs else ""
    return f"{runs} run{'s' if runs > 1 else ''}{several}"


def name(comparison: Result) -> str:
    """What tells it from the page's other comparisons: the folder that its runs have in common, else its model."""
    runs = [point.run for group in comparison.groups for point in group.points]
    paths = [run.path for run in runs if run.path is not None]
    if len(runs) > 1 and len(paths) == len(runs) and (common := os.path.commonpath([p.resolve() for p in paths])):
        return plain_text(Path(common).name or common)
    models = dict.fromkeys(run.record.run["model"] for run in runs if run.record.run.get("model"))
    return one_line(", ".join(models) or runs[0].name, 200)


def answer(comparison: Result) -> str:
    """The headline, one sentence for who does not know the plane: who needed the least, and who more of both."""
    placed = [group for group in comparison.at_loss if group.placed]
    if comparison.by != "loss" or len(placed) < 2:
        return verdict(comparison)[0]
    clear = [group for group in placed if group.beaten_by is not None and group.clearly]
    close = [group for group in placed if group.beaten_by is not None and not group.clearly]
    absent = [group for group in comparison.at_loss if not group.placed]
    told = leaders(placed, comparison.axis.words, intervals=False)
    parts = [f"To loss {number(comparison.loss_level)}, {told}"]
    for groups, words in (
        (clear, "took more of both"),
        (close, f"{'seem' if len(close) > 1 else 'seems'} to have taken more, but within the error"),
        (absent, "can't be placed"),
    ):
        if groups:
            parts.append(f"{listed([group.name for group in groups], 5)} {words}")
    return "; ".join(parts) + "."


# --- how to make it again


def python_call(comparisons: Sequence[Result]) -> str:
    """Python that makes the page again; records that came as objects stand as "…"."""
    calls = [_compare_call(comparison) for comparison in comparisons]
    if len(calls) == 1:
        return f"from lightning_speedlimit import compare\n\n{calls[0]}.html('report.html')"
    body = "".join(f"    {call.replace(chr(10), chr(10) + '    ')},\n" for call in calls)
    return (
        "from lightning_speedlimit import compare\n"
        "from lightning_speedlimit.report.page import write_page\n\n"
        f"write_page('report.html', [\n{body}])"
    )


def _compare_call(comparison: Result) -> str:
    """With the groups by name, and `at` where it was asked for."""
    lines = [f"    {group.name!r}: [{', '.join(map(_source, group.points))}]," for group in comparison.groups]
    at = f", at={comparison.at!r}" if comparison.set_by is None else ""
    cost = "" if comparison.axis.name == "lr" else f", cost={comparison.axis.name!r}"
    return "\n".join(["compare({", *lines, f"}}, by={comparison.by!r}{at}{cost})"])


def _source(point: Point) -> str:
    return "…" if point.run.path is None else repr(str(point.run.path))


def versions(comparisons: Sequence[Result]) -> list[tuple[str, str]]:
    """(who, with what): of this package now, and what the runs were made with."""
    try:
        here = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:  # run from its source folder
        here = "not installed"
    found: dict[str, None] = {}
    for comparison in comparisons:
        for group in comparison.groups:
            for point in group.points:
                if said := point.run.record.run.get("versions"):
                    found[", ".join(f"{library} {version}" for library, version in said.items())] = None
    runs = "; ".join(found) or "not recorded"
    return [("This page", f"{_DISTRIBUTION} {here}"), ("The runs", runs)]
