"""How far the neurons of each layer went, and how far up to a relabelling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.clouds import CLOUD_VALUES

from .runs import check_record
from .style import (
    COLOURS,
    GREY,
    INK,
    NothingToDraw,
    describe,
    drawable,
    figure,
    look,
    markers,
    number,
    short_name,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]

_ROW = 0.3  # inches
_MOST_NAMED = 60  # rows that have this height
MOST_LAYERS = 120  # a page draws a hundred in a second
_COLOURED = len(COLOURS)
_TITLE = "W₂ of each layer's neurons"


def layers(record: RunRecord) -> Figure:
    """√(N W₂²) of each layer's neurons between the start and the last measurement, and its way there.

    Left: W₂ (with its certified lower bound), and the displacement of the same neurons, which is W₂ where no
    relabelling shortens it; identity_excess is by how much its square is larger. Right, where it was measured more
    than once: W₂ over the steps. Of more than 120 layers those that moved most.

    Raises:
        ValueError: no clouds in the record, or none with a defined W₂.
    """
    check_record("record", record)
    clouds = record.clouds
    clouds |= {name: drawable(clouds[name]) for name in CLOUD_VALUES}
    known = np.isfinite(clouds["wasserstein2"]).any(1) if clouds["layers"] else np.zeros(0, dtype=bool)
    if not known.any():
        raise NothingToDraw(
            f"the figure of the layers needs clouds with a defined W₂, got {len(known)} measurements without; train "
            'with SpeedLimit(clouds="neurons")'
        )
    last, several = int(np.flatnonzero(known)[-1]), int(known.sum()) > 1
    every = len(clouds["layers"])
    clouds = _furthest(clouds, last)
    count = len(clouds["layers"])
    with style():
        row = _ROW if count <= _MOST_NAMED else _ROW * _MOST_NAMED / count
        height = max(1.4 + row * count, 3.4 if several else 0.0)
        drawn, axes = figure(2 if several else 1, height=height, width=8.6 if several else 6.0)
        _draw_last(axes[0, 0], clouds, last, small=row / _ROW)
        if count < every:
            axes[0, 0].set_ylabel(f"the {count} of {every:,} layers that moved most")
        if several:
            _draw_steps(axes[0, 1], clouds)
        describe(drawn, _TITLE, _text(clouds, last))
    return drawn


def _furthest(clouds: dict[str, Any], row: int) -> dict[str, Any]:
    """Of these layers the 120 whose neurons moved furthest, in their order."""
    order = np.argsort(-np.nan_to_num(clouds["displacement"][row], nan=-1.0), kind="stable")
    kept = np.sort(order[:MOST_LAYERS])
    of_layers = {"layers": [clouds["layers"][place] for place in kept], "particles": clouds["particles"][kept]}
    return clouds | of_layers | {name: clouds[name][:, kept] for name in CLOUD_VALUES}


def _draw_last(axes: Any, clouds: dict[str, Any], last: int, *, small: float) -> None:
    """One row for each layer, in the model's order."""
    places = np.arange(len(clouds["layers"]))
    reached, lower, moved, excess = (
        clouds[name][last] for name in ("wasserstein2", "wasserstein2_lower", "displacement", "identity_excess")
    )
    axes.hlines(places, reached, moved, color=GREY, linewidth=1.5, zorder=2)
    axes.plot(moved, places, "o", color=COLOURS[2], markerfacecolor="none", markersize=7, label="displacement")
    # The bar is there only where W₂ is not known to a part in a thousand.
    below = np.where(reached - lower > 1e-3 * reached, reached - lower, np.nan)
    axes.errorbar(reached, places, xerr=[below, np.zeros_like(below)], fmt="none", ecolor=COLOURS[1], capsize=3)
    axes.plot(reached, places, "o", color=COLOURS[1], label="W₂: √(N W₂²)")
    for place, end, value in zip(places, np.fmax(reached, moved), excess, strict=True):
        if np.isfinite(end):
            text = f"excess {number(float(f'{value:.2g}'))}" if np.isfinite(value) else "excess undefined"
            axes.annotate(
                text, (end, place), xytext=(8, 0), textcoords="offset points", va="center", fontsize=7.5 * small
            )
        else:
            axes.annotate("undefined", (0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(places, _labels(clouds), fontsize=8.5 * small)
    axes.set_ylim(len(places) - 0.5, -0.5)
    largest = float(np.nanmax(np.fmax(reached, moved), initial=0.0))
    axes.set_xlim(0, 1.38 * largest if largest > 0 else 1.0)
    axes.set_xlabel("parameter units")
    axes.set_title(f"{_TITLE}, step {clouds['step'][last]}", pad=20)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.1)


def _labels(clouds: dict[str, Any]) -> list[str]:
    return [
        f"{short_name(name, 60)} ({count})" for name, count in zip(clouds["layers"], clouds["particles"], strict=True)
    ]


def _draw_steps(axes: Any, clouds: dict[str, Any]) -> None:
    """A line for each layer; of many, the largest have a colour and a name and the rest are grey."""
    values: Values = clouds["wasserstein2"]
    final = np.array([column[np.isfinite(column)][-1] if np.isfinite(column).any() else -1.0 for column in values.T])
    named = set(np.argsort(-final, kind="stable")[:_COLOURED].tolist())
    order = [index for index in range(len(final)) if index in named]
    for index in range(len(final)):
        if index not in named:
            axes.plot(clouds["step"], values[:, index], color=GREY, linewidth=0.8)
    for place, index in enumerate(order):
        line, marked = values[:, index], markers(clouds["step"], values[:, index])
        axes.plot(clouds["step"], line, label=short_name(clouds["layers"][index], 60), markevery=marked, **look(place))
    axes.set_ylim(0, None)
    axes.set_xlabel("optimizer steps since the start")
    axes.set_ylabel("W₂ (parameter units)", color=INK)
    rest = len(final) - len(order)
    axes.set_title("over the steps" + (f" (grey: {rest} others)" if rest else ""), pad=20)
    axes.legend(loc="lower right", fontsize=7.5)


def _text(clouds: dict[str, Any], last: int) -> str:
    rows = zip(
        clouds["layers"],
        clouds["wasserstein2"][last],
        clouds["displacement"][last],
        clouds["identity_excess"][last],
        strict=True,
    )
    parts = [f"{name}: W₂ {w:.3g}, displacement {d:.3g}, identity excess {e:.2g}" for name, w, d, e in rows]
    return f"At step {clouds['step'][last]}. " + "; ".join(parts) + "."
