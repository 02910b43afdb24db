"""What the experiments share: arguments, a progress bar, one style of figures, one form of results."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the fastest for tensors this small; and the same sums everywhere
os.environ.setdefault("MKL_NUM_THREADS", "1")

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

torch.set_num_threads(1)

T = TypeVar("T")

# Okabe and Ito's colours, which the colour-blind tell apart, from dark to light, so that they also differ in
# greyscale. Line styles and markers go with them.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
_STYLE: dict[str, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
SIGNIFICANT = 6  # digits of the numbers in a result file


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    quick: bool
    seed: int
    output: Path
    more: argparse.Namespace


def parse(description: str, parser: argparse.ArgumentParser | None = None) -> Options:
    """--quick, --seed, --output, and what `parser` has besides."""
    parser = parser or argparse.ArgumentParser()
    parser.description = description
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a shortened version, to see that everything works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("paper_runs"), metavar="DIR", help="folder of the figure and the numbers"
    )
    found = parser.parse_args()
    return Options(found.quick, found.seed, found.output, found)


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar on a terminal's stderr and nothing in a pipe."""
    bar = tqdm(items, desc=label, total=total, leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True)
    yield from bar


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images (N, 1, 8, 8) of handwritten digits in float32, 0 to 1, and their labels (N,)."""
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)


@contextmanager
def figure(columns: int = 1, rows: int = 1, *, width: float = 4.2, height: float = 3.4) -> Iterator[tuple[Figure, Any]]:
    """A figure of panels in the one style, closed at the end; the panels come as `plt.subplots` gives them."""
    with plt.rc_context(_STYLE):
        drawn, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows))
        try:
            yield drawn, axes
        finally:
            plt.close(drawn)


def save_picture(drawn: Figure, path: Path) -> None:
    drawn.savefig(path, metadata={"Software": None})
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(192)  # a third of the bytes, no less to see
    few.save(path, optimize=True)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; all but the first flush right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    for row in rows:
        print("  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip())


class Report:
    """The result of one experiment: NAME.json and NAME.png in a folder, and a table on the terminal."""

    def __init__(self, name: str, options: Options, settings: Mapping[str, Any]) -> None:
        self.name, self._output = name, options.output
        self._started = time.monotonic()
        self._settings = {"seed": options.seed, "quick": options.quick, **settings}
        self._results: dict[str, Any] = {}
        self._rows: list[Sequence[str]] = []

    def add(self, **results: Any) -> None:
        """Numbers, lists, dicts and tensors that the result file will hold."""
        self._results |= results

    def say(self, *row: str) -> None:
        """One row of the table that the terminal shows; the first one is its head."""
        self._rows.append(row)

    def save(self, drawn: Figure) -> None:
        """Writes both files and prints the table."""
        self._output.mkdir(parents=True, exist_ok=True)
        environment = {"torch": torch.__version__, "python": platform.python_version()}
        content = {"settings": self._settings, "environment": environment, "results": self._results}
        path = self._output / f"{self.name}.json"
        path.write_text(json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        picture = path.with_suffix(".png")
        save_picture(drawn, picture)
        print_table(self._rows)
        print(f"\n{picture} and {path.name}, after {time.monotonic() - self._started:.0f} s")


def number(value: float, digits: int = 3) -> str:
    """For a table: so many significant digits; "undefined" for NaN."""
    return "undefined" if math.isnan(value) else f"{value:.{digits}g}"


def plain(value: Any) -> Any:
    """JSON has no NaN, tensors or arrays: null and lists, numbers to six digits."""
    if isinstance(value, Tensor | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    exact = float(value)
    return float(f"{exact:.{SIGNIFICANT}g}") if math.isfinite(exact) else None
