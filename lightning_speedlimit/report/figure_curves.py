"""Loss against steps, and action against loss, of several runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record import RunRecord

from .runs import named_records
from .style import (
    COLOURS,
    GREY,
    NothingToDraw,
    describe,
    drawable,
    figure,
    log_axis,
    look,
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
_TITLE = "Loss against steps, and what it cost"


def curves(runs: Mapping[str, RunRecord] | RunRecord) -> Figure:
    """Left: the loss L_K of each run against its steps. Right: the action A that it took to come to a loss.

    A point stands for the rows of one of 24 stretches of steps, of one length on the logarithmic axis: the median of
    their losses, at their last step and action. Axes are logarithmic; one whose values are not all positive is linear
    about 0. More than 14 runs are grey.

    Raises:
        ValueError: no run has a loss after step 0.
    """
    named = named_records(runs)
    found = {name: curve for name, record in named.items() if np.isfinite((curve := _curve(record))[1]).any()}
    if not found:
        raise NothingToDraw(f"curves need a run with a loss, got {len(named)} without; record_loss(loss) at every step")
    with style():
        drawn, axes = figure(2, height=3.4, width=9.4)
        left, right = axes[0]
        for index, (name, (step, loss, action)) in enumerate(found.items()):
            shown = look(index) if len(found) <= _NAMED else {"color": GREY, "linewidth": 0.8}
            _draw(left, step, loss, shown, name)
            _draw(right, loss, action, shown, name)
        steps, losses, actions = (np.concatenate([curve[part] for curve in found.values()]) for part in range(3))
        log_axis(left.xaxis, steps)
        signed_log_axis(left.yaxis, losses)
        signed_log_axis(right.xaxis, losses)
        right.invert_xaxis()  # a run goes to the right in both
        log_axis(right.yaxis, actions)
        left.set_xlabel("optimizer steps since the start")
        left.set_ylabel("loss")
        right.set_xlabel("loss")
        right.set_ylabel("action A (parameter²/clock)")
        left.set_title(_TITLE)
        if len(found) <= _NAMED:
            right.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
        describe(drawn, _TITLE, _text(found))
    return drawn


def _curve(record: RunRecord) -> Curve:
    """(n,) each: last steps of the stretches, median losses, actions; NaN where the record has none."""
    columns = record.columns
    rows = columns["step"] >= 1
    missing = np.full(len(columns["step"]), np.nan)
    step = columns["step"][rows].astype(np.float64)
    loss, action = (drawable(columns.get(name, missing)[rows]) for name in ("loss", "action"))
    if not len(step):
        return step, loss, action
    stretch = np.searchsorted(np.geomspace(step[0], step[-1], STRETCHES), step * (1 - 1e-12))
    ends = np.flatnonzero(np.diff(stretch, append=-1))
    median = [_median(loss[first:last]) for first, last in zip([0, *(ends[:-1] + 1)], ends + 1, strict=True)]
    return step[ends], np.array(median), action[ends]


def _median(values: Values) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def _draw(axes: Any, x: Values, y: Values, shown: dict[str, Any], name: str) -> None:
    known = np.isfinite(x) & np.isfinite(y)
    axes.plot(np.where(known, x, np.nan), np.where(known, y, np.nan), label=short_name(name), **shown)


def _text(found: Mapping[str, Curve]) -> str:
    parts = []
    for name, (step, loss, _) in list(found.items())[:_NAMED]:
        last = np.flatnonzero(np.isfinite(loss))[-1]
        parts.append(f"{name}: loss {loss[last]:.3g} after {step[last]:.0f} steps")
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(parts) + more + "."
