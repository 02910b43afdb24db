"""Loss against steps, and action against loss, of several runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.words import amount, number

from .runs import named_records
from .style import (
    ACTION_UNITS,
    COLOURS,
    GREY,
    NothingToDraw,
    describe,
    drawable,
    figure,
    log_axis,
    look,
    places_of,
    short_name,
    signed_log_axis,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]
Curve = tuple[Values, Values, Values]

STRETCHES = 24
_NAMED = 2 * len(COLOURS)
_TITLE = "Loss against what it cost"
_COSTS = {
    "steps": "optimizer steps since the start",
    "elapsed": "elapsed time (clock)",
    "seconds": "seconds since the start",
}


def curves(
    runs: Mapping[str, RunRecord] | RunRecord, *, groups: Mapping[str, str] | None = None, cost: str = "steps"
) -> Figure:
    """Left: the loss L_K of each run against its cost. Right: the action A that it took to come to a loss.

    A point is the rows of one of 24 stretches of steps, of one length on the logarithmic axis: the median of
    their losses, at their last step and action. Axes are logarithmic; one whose values are not all positive is linear
    about 0. More than 14 runs are grey; replicas of a group have its colour.

    Args:
        groups: name of a run → its group; None: each run is one of its own.
        cost: of the left axis: "steps", or a column of the records, as "samples", "seconds" or "elapsed".

    Raises:
        ValueError: no run has a loss after step 0.
    """
    named = named_records(runs)
    found = {name: curve for name, record in named.items() if np.isfinite((curve := _curve(record, cost))[1]).any()}
    if not found:
        raise NothingToDraw(f"curves need a run with a loss, got {len(named)} without; record_loss(loss) at every step")
    with style():
        drawn, axes = figure(2, height=3.4, width=9.4)
        left, right = axes[0]
        places = places_of(found, groups)
        named_already: set[str] = set()
        few = len(set(places.values())) <= _NAMED
        for name, (paid, loss, action) in found.items():
            shown = look(places[name]) if few else {"color": GREY, "linewidth": 0.8}
            label = short_name(name if groups is None else groups[name])
            label = label if label not in named_already else f"_{label}"  # hidden in the legend
            named_already.add(label)
            _draw(left, paid, loss, shown, label)
            _draw(right, loss, action, shown, label)
        paid, losses, actions = (np.concatenate([curve[part] for curve in found.values()]) for part in range(3))
        log_axis(left.xaxis, paid)
        signed_log_axis(left.yaxis, losses)
        signed_log_axis(right.xaxis, losses)
        right.invert_xaxis()  # a run goes to the right in both
        log_axis(right.yaxis, actions)
        left.set_xlabel(_COSTS.get(cost, cost))
        left.set_ylabel("loss")
        right.set_xlabel("loss")
        clocks = {named[name].run.get("clock", "steps") for name in found}
        unit = ACTION_UNITS.get(clocks.pop(), "") if len(clocks) == 1 else ""
        right.set_ylabel(f"action A ({unit or 'parameter²/clock'})")
        left.set_title(_TITLE)
        if few:
            right.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
        describe(drawn, _TITLE, _text(found, "steps" if cost == "elapsed" else cost))
    return drawn


def _curve(record: RunRecord, cost: str) -> Curve:
    """(n,) each: costs at the ends of the stretches, median losses, actions; NaN where the record has none."""
    columns = record.columns
    rows = columns["step"] >= 1
    missing = np.full(len(columns["step"]), np.nan)
    step = columns["step"][rows].astype(np.float64)
    loss, action = (drawable(columns.get(name, missing)[rows]) for name in ("loss", "action"))
    paid = step if cost == "steps" else drawable(columns.get(cost, missing)[rows])
    if not len(step):
        return step, loss, action
    stretch = np.searchsorted(np.geomspace(step[0], step[-1], STRETCHES), step * (1 - 1e-12))
    ends = np.flatnonzero(np.diff(stretch, append=-1))
    median = [_median(loss[first:last]) for first, last in zip([0, *(ends[:-1] + 1)], ends + 1, strict=True)]
    return paid[ends], np.array(median), action[ends]


def _median(values: Values) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def _draw(axes: Any, x: Values, y: Values, shown: dict[str, Any], label: str) -> None:
    known = np.isfinite(x) & np.isfinite(y)
    axes.plot(np.where(known, x, np.nan), np.where(known, y, np.nan), label=label, **shown)


def _text(found: Mapping[str, Curve], cost: str) -> str:
    parts = []
    for name, (paid, loss, _) in list(found.items())[:_NAMED]:
        last = np.flatnonzero(np.isfinite(loss))[-1]
        parts.append(f"{name}: loss {number(loss[last])} after {amount(paid[last])} {cost}")
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(parts) + more + "."
