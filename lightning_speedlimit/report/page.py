"""Comparisons as one HTML page that opens from disk and asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_speedlimit.checks import arguments
from lightning_speedlimit.checks.guard import shown
from lightning_speedlimit.record.writing import replace_file
from lightning_speedlimit.report import layers, page_figures, page_words
from lightning_speedlimit.report.advice import advise
from lightning_speedlimit.report.advice_text import rate
from lightning_speedlimit.report.layers import layers_of
from lightning_speedlimit.report.page_advice import AdviceTable, advice_table
from lightning_speedlimit.report.page_figures import Picture
from lightning_speedlimit.report.page_table import Table, table_of
from lightning_speedlimit.report.places import Group
from lightning_speedlimit.report.results import Result
from lightning_speedlimit.report.settings import Settings, settings_of
from lightning_speedlimit.report.text import measured
from lightning_speedlimit.report.verdict import verdict
from lightning_speedlimit.words import number, plain_text

MOST_OPEN = 12  # groups whose findings are shown at once; those of the others are folded

_CURE = 'pip install "lightning-speedlimit[report]"'


@dataclass(frozen=True)
class RunDetails:
    """A run with figures of its own."""

    name: str
    sentence: str
    summary: str
    """As `print(record.summary())` shows it."""
    pictures: tuple[Picture, ...]
    layers: tuple[tuple[str, ...], ...]
    """Heading and a row for each layer; empty where they are not known."""
    layer_words: str


@dataclass(frozen=True)
class Section:
    """One comparison as the template shows it."""

    prefix: str
    """Begins every id in it."""
    heading: str
    compared: str
    """ "at the same loss, 0.130"."""
    comparison: Result
    answer: str
    verdict: tuple[str, ...]
    curves: page_figures.Picture
    plane: Picture | None
    table: Table
    measured: tuple[str, ...]
    """Of which share of their coordinates the runs were measured, where not of all."""
    pictures: tuple[Picture, ...]
    advice: AdviceTable
    """Of the runs with figures of their own."""
    headrooms: Mapping[str, str]
    """Group → what rate its first run is to be tried with; empty: none."""
    runs: tuple[RunDetails, ...]
    left_out: int
    """Runs without figures of their own."""
    settings: Settings

    @property
    def open_groups(self) -> tuple[Group, ...]:
        """Those whose findings are shown at once."""
        return self.comparison.groups[:MOST_OPEN]

    @property
    def folded_groups(self) -> tuple[Group, ...]:
        """The others."""
        return self.comparison.groups[MOST_OPEN:]


def write_page(path: str | os.PathLike[str], comparisons: Sequence[Result], *, command: str | None = None) -> str:
    """Writes the page of `page` to a file, at once: who reads it meanwhile sees the old one or the new one. Returns it.

    Raises:
        ValueError: no comparison; a path that is no regular file. ImportError: the extra "report" is not installed.
        OSError: the file can't be written.
    """
    target = arguments.path("path", path)
    if target.exists() and not target.is_file():  # root would replace a device, /dev/null too, by the page
        raise ValueError(
            f"path got {shown(str(target))}, wanted the name of a file: that is a folder, a pipe, a device"
        )
    content = page(comparisons, command=command)
    try:
        replace_file(target, content.encode())
    except OSError as error:
        raise OSError(
            error.errno, f"the page can't be written ({error.strerror}); give a file in a folder that exists", str(path)
        ) from error
    return content


def page(comparisons: Sequence[Result], *, command: str | None = None) -> str:
    """One self-contained HTML document: a section for each comparison, in this order. The same ones, the same text.

    Args:
        comparisons: one, or several, as one for each model.
        command: the command line that makes the page again; None: shown as the Python that does.

    Raises:
        ValueError: no comparison. ImportError: the extra "report" is not installed.
    """
    from lightning_speedlimit.report.results import Result

    if not isinstance(comparisons, Sequence) or not all(isinstance(one, Result) for one in comparisons):
        raise TypeError(f"comparisons got {shown(comparisons)}, wanted a list: pass [compare(runs)]")
    if command is not None:
        arguments.check_text("command", command)
    if not comparisons:
        raise ValueError("comparisons: the page needs at least one, got none; pass [compare(runs)]")
    check_installed()
    files = templates()
    script = files.get_template("page.js").render()
    sections = [
        _section(comparison, place, several=len(comparisons) > 1) for place, comparison in enumerate(comparisons)
    ]
    only = sections[0].comparison
    several = f"Speed limits of {len(sections)} comparisons"
    return str(
        files.get_template("page.html.j2").render(
            title=page_words.heading(only) if len(sections) == 1 else several,
            headline=sections[0].answer.removesuffix(".") if len(sections) == 1 else several,
            sections=sections,
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
            command=None if command is None else plain_text(command),
            python=page_words.python_call(comparisons),
            layer_meaning=layers.MEANING,
            versions=page_words.versions(comparisons),
        )
    )


def check_installed() -> None:
    """Both at once: the first figure would come after a minute's work, and the template after that."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the page needs matplotlib and jinja2, got {error}; {_CURE}") from error


def templates() -> Any:
    """Everything that is put in is escaped; a name that a template lacks is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: number(float(value))
    environment.filters["spoken"] = lambda name: name.replace("_", " ")
    return environment


def _section(comparison: Result, place: int, *, several: bool) -> Section:
    prefix = f"c{place + 1}"
    told = page_words.answer(comparison)
    detailed = page_figures.detailed_points(comparison)
    every = [point for group in comparison.groups for point in group.points]
    pictures = page_figures.of_all(comparison, detailed, prefix)
    return Section(
        prefix=prefix,
        heading=(f"{page_words.name(comparison)}: " if several else "") + page_words.heading(comparison),
        compared=comparison.where,
        comparison=comparison,
        answer=told,
        verdict=tuple(sentence for sentence in verdict(comparison) if sentence != told),
        curves=pictures.pop("curves"),
        plane=page_figures.plane(comparison, prefix),
        table=table_of(comparison),
        measured=tuple(measured(comparison)),
        pictures=tuple(pictures.values()),
        advice=advice_table(detailed, every),
        headrooms={group.name: rate(advise(group.points[0].run.record)) for group in comparison.groups},
        runs=tuple(_details(point, f"{prefix}-r{index + 1}") for index, point in enumerate(detailed)),
        left_out=len(every) - len(detailed),
        settings=settings_of(comparison),
    )


def _details(point: Any, prefix: str) -> RunDetails:
    summary, found = point.run.record.summary(), layers_of(point.run.record)
    table = (layers.HEADS, *map(tuple, layers.rows(found))) if len(found) > 1 else ()
    return RunDetails(
        name=point.run.name,
        sentence=summary.sentence(),
        summary=str(summary),
        pictures=tuple(page_figures.of_run(point, prefix)),
        layers=table,
        layer_words="; ".join(layers.sentences(found)),
    )
