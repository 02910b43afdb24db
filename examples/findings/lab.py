"""What the findings share: arguments, a file of rows that a stopped experiment goes on with, statistics over seeds."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Figures and readers of data that the other experiments have already.
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "paper"))
sys.path.insert(2, str(Path(__file__).resolve().parents[1] / "tuning"))

from common import COLOURS, LINES, MARKERS, figure, number, plain, save_picture
from matplotlib.figure import Figure
from scipy import stats
from sets import synthesize
from training import Results
from trainings import UNUSUAL

__all__ = ["COLOURS", "LINES", "MARKERS", "Figure", "Lab", "Mean", "Options", "begin", "figure", "mean_of", "number"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line said. data: folder of the sets, synthetic ones where quick."""

    quick: bool
    data: Path
    output: Path
    more: argparse.Namespace


def begin(
    description: str | None, parser: argparse.ArgumentParser | None = None, output: str = "findings_runs"
) -> Options:
    """--data, --output, --quick, and what `parser` has besides."""
    parser = parser or argparse.ArgumentParser()
    parser.description = description
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--data", type=_folder, metavar="DIR", help="with cifar10/, mnist/, fashion-mnist/ as published"
    )
    parser.add_argument("--output", type=Path, default=Path(output), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="shortened, on synthetic pictures: to see that it works")
    found = parser.parse_args()
    if found.quick and found.data is None:
        found.data = found.output / "data"
        synthesize(found.data)
    if found.data is None:
        parser.error("wanted --data with the folder of cifar10/, mnist/ and fashion-mnist/, got none; or --quick")
    return Options(found.quick, found.data, found.output, found)


def _folder(name: str) -> Path | None:
    """None for no name, as an empty variable of make hands it in."""
    return Path(name) if name else None


class Lab:
    """One experiment: NAME.json, whose rows are not computed again, and NAME.png."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self.results = Results(options.output / f"{name}.json")

    def rows(
        self, part: str, keys: Sequence[Mapping[str, Any]], compute: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> list[Row]:
        """One row for each key: the key, what `compute` finds, and the processor seconds that it took.

        Rows that the file has are taken from there, each other one is written as soon as it is known.
        """
        left = [key for key in keys if self.find(part, key) is None]
        started = time.monotonic()
        for done, key in enumerate(left):
            self._say(f"{self.name}, {part}: {done} of {len(left)} runs", started, done, len(left))
            before = time.process_time()
            found = {**key, **compute(key)}
            self.results.add(part, plain(found | {"seconds": time.process_time() - before}))
        if left:
            self._say(f"{self.name}, {part}: all {len(left)} runs", started, len(left), len(left))
        return [row for key in keys if (row := self.find(part, key)) is not None]

    def find(self, part: str, key: Mapping[str, Any]) -> Row | None:
        """The row of this key; not of one that sets more of a training than this does."""
        wanted = plain(key)
        return next(
            (
                row
                for row in self.results.parts.get(part, [])
                if wanted.items() <= row.items() and not (row.keys() - wanted.keys()) & UNUSUAL
            ),
            None,
        )

    def of(self, part: str, **key: Any) -> list[Row]:
        """All rows of the part that have these values."""
        return [row for row in self.results.parts.get(part, []) if key.items() <= row.items()]

    def _say(self, what: str, started: float, done: int, of: int) -> None:
        spent = time.monotonic() - started
        rest = f", about {spent / done * (of - done) / 60:.0f} min left" if 0 < done < of else ""
        print(f"{what}{rest}", file=sys.stderr, flush=True) if not self.options.quick else None

    @property
    def seconds(self) -> float:
        """Of processor time, of all rows."""
        return math.fsum(row.get("seconds", 0.0) for rows in self.results.parts.values() for row in rows)

    @contextmanager
    def picture(self, columns: int = 1, rows: int = 1, **size: float) -> Iterator[tuple[Figure, Any]]:
        """A figure of panels, saved as NAME.png at the end."""
        with figure(columns, rows, **size) as (drawn, axes):
            yield drawn, axes
            path = self.options.output / f"{self.name}.png"
            save_picture(drawn, path)
        print(f"\n{path} and {self.name}.json: {self.seconds:.0f} s of processor time in all")


@dataclass(frozen=True)
class Mean:
    """Of values over seeds. error: the standard error of the mean, NaN for one value; count: how many were finite."""

    value: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.1g}"

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's, two-sided."""
        half = float(stats.t.ppf(0.5 + level / 2, self.count - 1)) * self.error if self.count > 1 else math.nan
        return self.value - half, self.value + half


def mean_of(values: Sequence[float | None]) -> Mean:
    """Over those that are known; of pairs, hand in their differences."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return Mean(math.nan, math.nan, 0)
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Mean(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    return Mean(mean, math.sqrt(variance / len(known)), len(known))
