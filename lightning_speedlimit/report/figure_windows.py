"""The efficiency of every window of a run as a heat map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record import RunRecord

from .runs import check_record
from .style import INK, LINES, UNDEFINED, NothingToDraw, describe, drawable, figure, log_axis, number, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]

MOST_EDGES = 40
_DECADES = 3.0  # of colour; what is lower is drawn as its lower end, which the colour bar says
_TITLE = "Efficiency η(s, t) of every window from step s to step t"


@dataclass(frozen=True)
class Heat:
    """η of all windows between some recorded steps."""

    ends: npt.NDArray[np.int64]
    """(n,) steps t."""
    starts: npt.NDArray[np.int64]
    """(n,) steps s: 0, and all ends but the last."""
    efficiency: Values
    """(n, n): η(s, t) in row s and column t, no unit; NaN where undefined and where s ≥ t."""


def windows(record: RunRecord) -> Figure:
    """η(s, t) = D²(s, t)/[(τ_t − τ_s)(A_t − A_s)] ÷ conversion(s, t), t to the right and s upwards.

    The lowest row is s = 0: the efficiency of the run so far. Where η is undefined, or not positive, cells are
    hatched. At most 40 steps that have a sketch, evenly on a logarithmic axis.

    Raises:
        ValueError: fewer than two steps with a sketch, or no window between them has a positive efficiency.
    """
    check_record("record", record)
    heat = heat_of(record)
    regimes = record.regimes()
    with style():
        drawn, axes = figure(height=4.9, width=6.4)
        panel = axes[0, 0]
        across = _cell_edges(heat.ends.astype(np.float64))
        up = np.concatenate([[across[0] ** 2 / across[1]], across[:-1]])  # 0 has no place on a logarithmic axis
        _draw_cells(drawn, panel, across, up, heat)
        for regime in regimes[:-1]:
            _draw_boundary(panel, regime.last_step, up)
        log_axis(panel.xaxis, across, margin=0)
        log_axis(panel.yaxis, up, margin=0)
        panel.set_xlim(across[0], across[-1])
        panel.set_ylim(up[0], across[-1])
        _name_start(panel, (up[0] * up[1]) ** 0.5, up[1])
        panel.grid(visible=False)
        panel.set_title(_TITLE)
        panel.set_xlabel("end of the window t, optimizer steps")
        panel.set_ylabel("start of the window s, optimizer steps")
        panel.text(0.03, 0.97, _legend(len(regimes) > 1), transform=panel.transAxes, va="top", fontsize=8)
        describe(drawn, _TITLE, _text(heat))
    return drawn


def heat_of(record: RunRecord) -> Heat:
    """The numbers of the heat map.

    Raises:
        ValueError: fewer than two steps with a sketch, or no window between them has a positive efficiency.
    """
    steps = record.sketch_steps
    ends = log_spaced(steps[np.isin(steps, record.columns["step"]) & (steps > 0)], MOST_EDGES)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    found = np.full((len(ends), len(ends)), np.nan)
    if len(ends):
        i, j = np.nonzero(starts[:, None] < ends)
        found[i, j] = drawable(record.windows(starts[i], ends[j]).efficiency)
    if len(ends) < 2 or not (found > 0).any():
        raise NothingToDraw(
            f"the heat map needs two steps with a sketch and a window of positive efficiency, got {len(ends)} steps "
            f"and {int((found > 0).sum())} windows; log more often, or see record.summary() for why it is undefined"
        )
    return Heat(ends, starts, found)


def log_spaced(steps: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """At most so many of these increasing steps, the first and the last among them, evenly in log(step)."""
    if len(steps) <= most:
        return steps
    wanted = np.geomspace(steps[0], steps[-1], most)
    right = np.searchsorted(steps, wanted).clip(1, len(steps) - 1)
    nearer = np.where(wanted - steps[right - 1] < steps[right] - wanted, right - 1, right)
    return np.asarray(steps[np.unique(nearer)])


def _cell_edges(centres: Values) -> Values:
    """(n + 1,): the geometric means between neighbours, and as far beyond the first and the last."""
    between = np.sqrt(centres[:-1] * centres[1:])
    return np.concatenate([[centres[0] ** 2 / between[0]], between, [centres[-1] ** 2 / between[-1]]])


def _draw_cells(drawn: Figure, axes: Any, across: Values, up: Values, heat: Heat) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = np.where(heat.efficiency > 0, heat.efficiency, np.nan)
    high, low = np.nanmax(positive), np.nanmin(positive)
    lowest = max(low, high / 10**_DECADES)
    few = high / lowest < 10
    if few:  # colours of what differs by little say little: half a decade at least
        middle, half = (high * lowest) ** 0.5, max((high / lowest) ** 0.5, 10**0.25)
        lowest, high = middle / half, middle * half
    norm = LogNorm(lowest, high)
    # As one picture: hundreds of cells of their own would show seams, and take a hundred kilobytes in a page.
    mesh = axes.pcolormesh(across, up, np.ma.masked_invalid(positive), cmap="cividis", norm=norm, rasterized=True)
    bar = drawn.colorbar(mesh, ax=axes, extend="min" if low < lowest else "neither", pad=0.02)
    bar.set_label("η (no unit)")
    bar.ax.grid(visible=False)
    if few:
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    if lowest < 1 < high:
        bar.ax.axhline(1, color=INK, linewidth=1.2)
    undefined = (heat.starts[:, None] < heat.ends) & np.isnan(positive)
    _hatch(axes, across, up, undefined)


def _hatch(axes: Any, across: Values, up: Values, which: npt.NDArray[np.bool_]) -> None:
    """One outline per stretch of cells in a row: a hatch for each cell would not join."""
    from matplotlib.collections import PolyCollection

    corners = []
    for row, cells in enumerate(which):
        ends = np.flatnonzero(np.diff(np.concatenate([[False], cells, [False]]).astype(np.int8)))
        for first, last in zip(ends[::2], ends[1::2], strict=True):
            left, right, low, high = across[first], across[last], up[row], up[row + 1]
            corners.append([(left, low), (right, low), (right, high), (left, high)])
    if corners:
        axes.add_collection(
            PolyCollection(corners, facecolor="none", edgecolor=UNDEFINED, hatch="////", linewidth=0, zorder=1.2)
        )


def _draw_boundary(axes: Any, step: int, up: Values) -> None:
    """The windows that begin, and those that end, where one regime gives way to the next."""
    line = {"color": INK, "linewidth": 0.9, "linestyle": LINES[3]}
    axes.plot([step, step], [up[0], step], **line)
    axes.plot([step, axes.get_xlim()[1]], [step, step], **line)


def _name_start(axes: Any, place: float, above: float) -> None:
    """A tick "0" at the row of the start, below those of the logarithmic axis."""
    low, high = axes.get_ylim()
    ticks = [t for t in axes.yaxis.get_major_locator().tick_values(low, high) if above < t <= high]
    axes.set_yticks([place, *ticks], ["0", *(number(t) for t in ticks)])
    axes.set_yticks([], minor=True)


def _legend(several: bool) -> str:
    lines = [
        "lowest row: from the start",
        "hatched: undefined (the loss did not",
        "fall by two standard errors) or ≤ 0",
    ]
    return "\n".join(lines + (["dotted: where a regime ends"] if several else []))


def _text(heat: Heat) -> str:
    known = heat.efficiency[heat.efficiency > 0]
    asked = int((heat.starts[:, None] < heat.ends).sum())
    return (
        f"{len(known)} of {asked} windows between {len(heat.ends)} steps, {heat.ends[0]} to {heat.ends[-1]}, have a "
        f"positive efficiency, from {known.min():.2g} to {known.max():.2g}, the median {np.median(known):.2g}."
    )
