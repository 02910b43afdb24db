"""Runs in the plane of elapsed time and action, at equal loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.checks import arguments
from lightning_speedlimit.checks.guard import shown
from lightning_speedlimit.words import plain_text

from .style import ACTION_UNITS, GREY, INK, NothingToDraw, describe, drawable, figure, log_axis, look, short_name, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Box = tuple[float, float, float, float]

MOST_LIMITS = 3  # lines that the legend shows of the runs' limits
MOST_NAMED = 12  # of more points, those on the frontier alone are named
_KEPT_FREE = "frontier"  # the mark of a line that no name is put upon
_TITLE = "{} and action at the same loss"
_COSTS = {  # of the horizontal axis: name, label
    "steps": ("Elapsed time", "elapsed time τ (steps)"),
    "lr": ("Elapsed time", "elapsed time τ (sum of learning rates)"),
    **{name: (name.capitalize(), name) for name in ("samples", "tokens", "epochs", "seconds")},
}


@dataclass(frozen=True)
class PlanePoint:
    """One run, or the mean of several, where it reached the loss at which all are compared."""

    name: str
    elapsed: float
    """τ, clock, or what else is counted; positive."""
    action: float
    """A, parameter²/clock; positive."""
    displacement: float
    """D, parameter: τ·A ≥ D²; NaN draws no hyperbola. Times √(cost/τ) where another cost than τ is counted."""
    elapsed_interval: tuple[float, float] | None = None
    """(lower, upper) end of the interval of `elapsed`."""
    action_interval: tuple[float, float] | None = None
    """(lower, upper) end of A's interval, parameter²/clock."""
    on_frontier: bool = False
    """Whether no other point is lower in both."""
    place: int | None = None
    """In the palette; None: that among the points which are drawn."""

    def __post_init__(self) -> None:
        arguments.check_text("name", self.name)
        for name in ("elapsed", "action", "displacement"):
            arguments.number(name, getattr(self, name))
        for name in ("elapsed_interval", "action_interval"):
            arguments.check_interval(name, getattr(self, name))
        arguments.check_flag("on_frontier", self.on_frontier)


def plane(
    points: Sequence[PlanePoint], *, clock: str = "steps", cost: str | None = None, title: str | None = None
) -> Figure:
    """A against τ or another cost, both logarithmic, with each run's hyperbola τ·A = D² and the frontier.

    With this displacement a run could not have been below its hyperbola: on a logarithmic plane, the distance to it is
    1/kinematic efficiency. The frontier joins the runs that no other beats in both; what is above and to the right of
    it is beaten. Of more than 12 runs those on the frontier alone have a name, a colour and a hyperbola.

    Args:
        points: at least one with a positive τ and A; the others are named in a note below.
        clock: "steps" or "lr", the unit of τ.
        cost: what `elapsed` counts: "steps", "lr", "samples", "tokens", "epochs" or "seconds"; None: as the clock.

    Raises:
        ValueError: no point that can be drawn.
    """
    if not isinstance(points, Sequence) or not all(isinstance(point, PlanePoint) for point in points):
        raise TypeError(f"points got {shown(points)}, wanted a list of PlanePoint")
    arguments.check_among("clock", clock, "steps", "lr")
    if cost is not None:
        arguments.check_among("cost", cost, *_COSTS)
    spoken, label = _COSTS[cost or clock]
    title = _TITLE.format(spoken) if title is None else plain_text(arguments.check_text("title", title))
    placed = [p for p in points if _is_positive(p.elapsed) and _is_positive(p.action)]
    if not placed:
        raise NothingToDraw(
            f"the plane needs a point of positive time and action, got {len(points)} points and none; "
            "compare at a loss that a run has reached"
        )
    few = len(placed) <= MOST_NAMED
    named = [p for p in placed if few or p.on_frontier]
    with style():
        drawn, axes = figure(height=5.0)
        panel = axes[0, 0]
        log_axis(panel.xaxis, _reach(placed, "elapsed"), margin=0.12)
        log_axis(panel.yaxis, _reach(placed, "action"), margin=0.12)
        _draw_rest(panel, [p for p in placed if not few and not p.on_frontier])
        _draw_frontier(panel, [p for p in placed if p.on_frontier])
        limits = [
            line
            for index, point in enumerate(named)
            for line in _draw_point(panel, point, look(index if point.place is None else point.place))
        ]
        panel.set_xlabel(label)
        panel.set_ylabel(f"action A ({ACTION_UNITS[clock]})")
        panel.set_title(title)
        _draw_legend(panel, limits, frontier=sum(p.on_frontier for p in placed) > 1, rest=not few)
        missing = [short_name(p.name) for p in points if p not in placed]
        if missing:
            why = "not drawn, for their time or action is 0 or unknown"
            panel.set_xlabel(f"{panel.get_xlabel()}\n{why}: {_listed(missing)}")
        _name_points(drawn, panel, named, placed)
        describe(drawn, title, _text(placed))
    return drawn


def _is_positive(value: float) -> bool:
    return bool(drawable(value) > 0)


def _reach(points: Sequence[PlanePoint], which: str) -> list[float]:
    """All values, the ends of their intervals that a logarithmic axis has a place for, and the nearest hyperbola."""
    found = [getattr(p, which) for p in points]
    for interval in (getattr(p, f"{which}_interval") for p in points):
        found += [end for end in interval or () if _is_positive(end)]
    nearest = max((p for p in points if _is_positive(p.displacement)), key=_kinematic_efficiency, default=None)
    if nearest is not None:
        found.append(getattr(nearest, which) * min(_kinematic_efficiency(nearest), 1.0) ** 0.5)
    return found


def _kinematic_efficiency(point: PlanePoint) -> float:
    """D²/(τA)."""
    return point.displacement**2 / (point.elapsed * point.action)


def _draw_point(axes: Any, point: PlanePoint, shown: dict[str, Any]) -> list[Any]:
    """The lines of its limit: one, or none where D is not known."""
    limit: list[Any] = []
    colour = shown["color"]
    low, high = axes.get_xlim()
    if _is_positive(point.displacement):
        times = np.geomspace(low, high, 2)  # a straight line here
        limit = axes.plot(
            times,
            point.displacement**2 / times,
            color=colour,
            linewidth=0.9,
            linestyle=shown["linestyle"],
            alpha=0.8,
        )
    axes.errorbar(
        point.elapsed,
        point.action,
        xerr=_bars(point.elapsed, point.elapsed_interval),
        yerr=_bars(point.action, point.action_interval),
        color=colour,
        marker=shown["marker"],
        markersize=7,
        elinewidth=1,
        capsize=2,
        linestyle="none",
        zorder=4,
    )
    return limit


def _bars(value: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    """Lengths below and above; none where an end is unknown. One that reaches 0 leaves the logarithmic axis."""
    if interval is None or not np.isfinite(drawable(interval)).all():
        return None
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]]


def _draw_rest(axes: Any, points: Sequence[PlanePoint]) -> None:
    axes.plot([p.elapsed for p in points], [p.action for p in points], "o", color=GREY, markersize=3.5, zorder=2)


def _draw_frontier(axes: Any, points: Sequence[PlanePoint]) -> None:
    """The stairs below which no run came: to the right of one, and above the next; of one run there are none."""
    if len(points) > 1:
        ordered = sorted(points, key=lambda p: (p.elapsed, p.action))
        axes.plot(
            [p.elapsed for p in ordered],
            [p.action for p in ordered],
            drawstyle="steps-post",
            color=GREY,
            linewidth=4,
            alpha=0.5,
            solid_capstyle="round",
            zorder=1.5,
            gid=_KEPT_FREE,
        )


def _draw_legend(axes: Any, limits: Sequence[Any], *, frontier: bool, rest: bool) -> None:
    """Of what is to be seen, in its own colours and line styles."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D

    shown: dict[str, Any] = {}
    if seen := [line for line in limits if _crosses(axes, line)]:
        shown["a run's limit, τ·A = D²"] = tuple(seen[:MOST_LIMITS])
    if frontier:
        shown["frontier: beaten by none in both"] = Line2D([], [], color=GREY, linewidth=4, alpha=0.5)
    if rest:
        shown["beaten runs"] = Line2D([], [], color=GREY, marker="o", markersize=3.5, linestyle="none")
    if shown:
        axes.legend(
            list(shown.values()),
            list(shown),
            handler_map={tuple: HandlerTuple(ndivide=None)},
            handlelength=4.0,
            loc="upper right",
            bbox_to_anchor=(1.0, 1.09),
            ncols=3,
            borderaxespad=0,
        )


def _crosses(axes: Any, line: Any) -> bool:
    """Whether a falling line comes into the picture."""
    (low, high), ends = axes.get_ylim(), line.get_ydata()
    return bool(min(ends) < high and max(ends) > low)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _text(points: Sequence[PlanePoint]) -> str:
    frontier = [p for p in points if p.on_frontier] or list(points)[:MOST_NAMED]
    parts = [f"{p.name}: time {p.elapsed:.4g}, action {p.action:.3g}" for p in frontier]
    return f"{len(points)} runs. Beaten by none in both: " + "; ".join(parts) + "."


# --- names beside their points, none upon another


def _name_points(drawn: Figure, axes: Any, named: Sequence[PlanePoint], every: Sequence[PlanePoint]) -> None:
    """Each name at the nearest free place about its point; one that is not beside it gets a line to it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas: Any = FigureCanvasAgg(drawn)
    renderer = canvas.get_renderer()
    layout: Any = drawn.get_layout_engine()
    layout.execute(drawn)  # where the axes are, in pixels
    drawn.set_layout_engine("none")  # and there they stay
    pixel = drawn.dpi / 72
    at = {id(p): axes.transData.transform((p.elapsed, p.action)) for p in every}
    taken: list[Box] = [_about(at[id(p)], 4.5 * pixel) for p in every]
    taken += [box for line in axes.lines if line.get_gid() == _KEPT_FREE for box in _along(line)]
    taken += [box for p in named for box in _bar_boxes(axes, p)]
    inside = axes.get_window_extent(renderer)
    for point in named:
        label = axes.annotate(
            short_name(point.name),
            (point.elapsed, point.action),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=INK,  # the colours are too light for small letters; the marker beside it has them
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        )
        extent = Text.get_window_extent(label, renderer)  # without the line to the point
        size = np.array([extent.width, extent.height]) + 3 * pixel
        offset, ring = _free_place(at[id(point)], size, taken, inside.extents, 6 * pixel)
        label.set_position(tuple(offset / pixel))
        if ring == 0:
            label.arrow_patch.set_visible(False)
        taken.append(_box(at[id(point)] + offset, size))


def _free_place(
    point: npt.NDArray[np.float64], size: npt.NDArray[np.float64], taken: Sequence[Box], inside: Any, gap: float
) -> tuple[npt.NDArray[np.float64], int]:
    """The offset of a label's centre, and how far out it is: 0 is beside the point.

    On rings about the point, 16 places on each; where all are taken, that which covers least.
    """
    best, least, found = np.zeros(2), math.inf, 0
    for ring in range(24):
        for angle in np.pi / 8 * np.array([2, 14, 6, 10, 0, 8, 4, 12, 1, 15, 3, 13, 7, 9, 5, 11]):
            way = np.array([math.cos(angle), math.sin(angle)])
            offset = way * (size / 2 + gap * (1 + 2 * ring))
            box = _box(point + offset, size)
            covered = sum(_overlap(box, other) for other in taken) + _outside(box, inside)
            if covered < least:
                best, least, found = offset, covered, ring
            if covered == 0:
                return offset, ring
    return best, found


def _box(centre: npt.NDArray[np.float64], size: npt.NDArray[np.float64]) -> Box:
    (x, y), (width, height) = centre, size / 2
    return float(x - width), float(y - height), float(x + width), float(y + height)


def _along(line: Any) -> list[Box]:
    """The stairs of the frontier as boxes, pixels."""
    corners = line.get_transform().transform(line.get_path().vertices)
    x, y = corners[:, 0], corners[:, 1]
    turns = [(x0, y0, x1, y0) for x0, y0, x1 in zip(x, y, x[1:], strict=False)]
    turns += [(x1, min(y0, y1), x1, max(y0, y1)) for y0, x1, y1 in zip(y, x[1:], y[1:], strict=False)]
    return [(float(a) - 2, float(b) - 2, float(c) + 2, float(d) + 2) for a, b, c, d in turns]


def _bar_boxes(axes: Any, point: PlanePoint) -> list[Box]:
    """The error bars of a point as boxes, pixels; one whose end is at 0 or below reaches the edge of the picture."""
    edges = axes.get_xlim()[0], axes.get_ylim()[0]
    found = []
    for place, interval in enumerate((point.elapsed_interval, point.action_interval)):
        if _bars(1.0, interval) is not None and interval is not None:
            ends = np.array([[point.elapsed, point.action]] * 2)
            ends[:, place] = [end if _is_positive(end) else edges[place] for end in interval]
            (x0, y0), (x1, y1) = axes.transData.transform(ends)
            found.append((float(x0) - 2, float(y0) - 2, float(x1) + 2, float(y1) + 2))
    return found


def _about(centre: npt.NDArray[np.float64], radius: float) -> Box:
    return _box(centre, np.array([2 * radius, 2 * radius]))


def _overlap(a: Box, b: Box) -> float:
    """The area that both cover, pixels²."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: Box, inside: Any) -> float:
    """The area of the box that is not within, pixels²."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, (inside[0], inside[1], inside[2], inside[3]))
