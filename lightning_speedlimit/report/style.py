"""The one look of all figures: colours, axes and their ticks. The user's matplotlib is as it was afterwards."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.words import plain_text

from .own_settings import own_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1a1a1a"  # text, axes and the first line; not #000000, which matplotlib's SVG leaves unsaid
GRID = "#dddddd"
GREY = "#999999"  # what stays in the background, on white and on black
UNDEFINED = "#bbbbbb"

# Okabe and Ito's colours, which the colour-blind tell apart, from dark to light, so that they also differ in
# greyscale. Markers and line styles go with them.
COLOURS = (INK, "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))

WIDTH = 7.2  # inches
LARGEST = 1e100  # that is drawn; matplotlib squares and divides
_STYLE: dict[str, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": INK,
    "hatch.linewidth": 0.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in the name of a run is one
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MARKERS = 12  # of a line at most, but for points without neighbours
_DECADES_ON_ITS_OWN = 0.6  # below so many its ticks are round numbers, as on a linear axis
_DECADES_WITHOUT_MINOR = 2.0  # below so many decades a logarithmic axis also names 2 and 5: one power may be all it has
ACTION_UNITS = {"steps": "parameter²/step", "lr": "parameter²/learning rate"}  # clock → unit


class NothingToDraw(ValueError):
    """What a figure would show is undefined or was not measured; the message says what it needs."""


@contextmanager
def style(**more: Any) -> Iterator[None]:
    """matplotlib's own defaults and this style for what is drawn within, by this thread; nothing is set for others.

    Threads wait for each other here. While it lasts, all of them go without the warning of letters that a font lacks.
    """
    import matplotlib

    own: dict[str, Any] = {key: value for key, value in matplotlib.rcParamsDefault.items() if "backend" not in key}
    ours: Any = matplotlib.RcParams(_STYLE | more)  # checked
    with own_settings({**own, **ours}), _glyphs_may_be_missing():
        yield


@contextmanager
def _glyphs_may_be_missing() -> Iterator[None]:
    """No warning of it: names of runs may hold letters that the font lacks; a page's reader has fonts of their own."""
    filters: Any = warnings.filters
    entry = ("ignore", re.compile("Glyph .* missing from", re.IGNORECASE), UserWarning, None, 0)
    filters.insert(0, entry)
    try:
        yield
    finally:
        now: Any = warnings.filters  # another list, where a thread has begun or ended a catch_warnings
        for there in [filters] if now is filters else [filters, now]:
            with suppress(ValueError):
                there.remove(entry)


def figure(
    columns: int = 1, rows: int = 1, *, height: float, width: float = WIDTH, **grid: Any
) -> tuple[Figure, npt.NDArray[Any]]:
    """An empty figure and its (rows, columns) axes, to be called and filled within `style()`."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(rows, columns, squeeze=False, **grid)


def describe(drawn: Figure, title: str, text: str) -> None:
    """What a screen reader says of the figure; `svg` takes it from here."""
    drawn.set_label(f"{title}\n{text}")


def short_name(name: str, longest: int = 36) -> str:
    """A name as figures have room for it: one line, cut; and not begun by "_", which legends leave out."""
    text = " ".join(plain_text(name).split()) or "?"
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return f" {text}" if text.startswith("_") else text


def look(index: int) -> dict[str, Any]:
    """Colour, line style and marker of the index-th line; the 7 colours come again with other lines and markers."""
    turn, place = divmod(index, len(COLOURS))
    other = (place + turn) % len(COLOURS)
    return {"color": COLOURS[place], "linestyle": LINES[other], "marker": MARKERS[other]}


def places_of(names: Iterable[str], groups: Mapping[str, str] | None) -> dict[str, int]:
    """Name → index for `look`: replicas of one group share theirs. groups: name → group; None: each is its own."""
    own = {name: name if groups is None else groups[name] for name in names}
    order = list(dict.fromkeys(own.values() if groups is None else groups.values()))
    return {name: order.index(group) for name, group in own.items()}


def markers(step: npt.ArrayLike, values: npt.ArrayLike) -> list[int]:
    """Which points of a line get a marker: a dozen evenly on a logarithmic axis, and those between undefined ones."""
    places, known = np.asarray(step, dtype=np.float64), np.isfinite(np.asarray(values, dtype=np.float64))
    beside = np.concatenate([[False], known, [False]])
    alone = np.flatnonzero(known & ~beside[:-2] & ~beside[2:])
    defined = np.flatnonzero(known & (places > 0))
    if len(defined) > _MARKERS:
        wanted = np.geomspace(places[defined[0]], places[defined[-1]], _MARKERS)
        defined = defined[np.searchsorted(places[defined], wanted).clip(max=len(defined) - 1)]
    return sorted({*defined.tolist(), *alone.tolist()})


def drawable(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The values, NaN for what no axis has room for: infinities, sizes beyond 10^±100 (of a run that diverged)."""
    found = np.asarray(values, dtype=np.float64)
    sizes = np.abs(found)
    return np.where((sizes < LARGEST) & ((sizes > 1 / LARGEST) | (sizes == 0)), found, np.nan)


# --- axes


def number(value: float) -> str:
    """A tick's number without mathematics mode: 0.01, 2, 1000, 3·10⁻⁵, −1."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    if -3 <= power <= 4:
        text = f"{value:.6g}"
    else:
        factor = f"{value / 10.0**power:.4g}"
        text = f"10{str(power).translate(_SUPERSCRIPTS)}"
        text = text if factor == "1" else f"−{text}" if factor == "-1" else f"{factor}·{text}"
    return text.replace("-", "−")


def log_axis(axis: Any, values: npt.ArrayLike, *, margin: float = 0.04) -> None:
    """A logarithmic axis that holds all positive values, ticks at powers of ten, and at 2 and 5 where few of these.

    Linear, as it was, where none is positive.
    """
    positive = _finite(values)
    positive = positive[positive > 0]
    if not len(positive):  # as of a run that did not move: nothing that such an axis could show
        return
    _set_scale(axis, "log")
    low, high = positive.min(), positive.max()
    room = 10 ** (margin * max(math.log10(high / low), 0.3))
    _set_limits(axis, low / room, high * room)
    _name_powers(axis, low, high)


def signed_log_axis(axis: Any, values: npt.ArrayLike) -> None:
    """A logarithmic axis for positive values; with others among them, linear about 0 and logarithmic on both sides.

    Nothing is left out, and one value of 30 leaves room for the others.
    """
    finite = _finite(values)
    if not len(finite) or finite.min() > 0:
        return log_axis(axis, finite)
    sizes = np.abs(finite[finite != 0])
    # What most values are larger than: linear below.
    threshold = 10.0 ** math.floor(math.log10(np.quantile(sizes, 0.05))) if len(sizes) else 1.0
    threshold = max(threshold, float(sizes.max(initial=0.0)) * 1e-4)
    _set_scale(axis, "symlog", linthresh=threshold, linscale=0.4)
    low, high = finite.min(), finite.max()
    _set_limits(axis, low * 1.3 if low < 0 else -0.15 * threshold, high * 1.3 if high > 0 else 0.3 * threshold)
    _name_signed_powers(axis, threshold, low, high)
    return None


def _finite(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    flat = np.asarray(values, dtype=np.float64).ravel()
    return flat[np.isfinite(flat)]


def _set_scale(axis: Any, scale: str, **options: Any) -> None:
    getattr(axis.axes, f"set_{axis.axis_name}scale")(scale, **options)


def _set_limits(axis: Any, low: float, high: float) -> None:
    getattr(axis.axes, f"set_{axis.axis_name}lim")(low, high)


def _name_powers(axis: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    decades = math.log10(high / low)
    if decades < _DECADES_ON_ITS_OWN:
        axis.set_major_locator(MaxNLocator(5))
    elif decades < _DECADES_WITHOUT_MINOR:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def _name_signed_powers(axis: Any, threshold: float, low: float, high: float) -> None:
    """Ticks at 0 and at the powers of ten above the threshold: those next to 0 would stand in each other's way."""
    from matplotlib.ticker import NullFormatter

    def powers(most: float) -> list[float]:
        first, last = round(math.log10(threshold)) + 1, math.floor(math.log10(max(most, threshold)) + 1e-9)
        every = 1 + max(last - first, 0) // 6
        return [10.0**power for power in range(first, last + 1, every)]

    ticks = [-t for t in powers(-low)] + [0.0] + powers(high)
    axis.set_ticks(ticks, [number(t) for t in ticks])
    axis.set_minor_formatter(NullFormatter())
