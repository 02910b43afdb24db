"""How close a run came to the limit, and the factors of that, over its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record import Regime, RunRecord

from .runs import check_record
from .style import (
    GREY,
    INK,
    LINES,
    NothingToDraw,
    describe,
    drawable,
    figure,
    log_axis,
    look,
    markers,
    number,
    signed_log_axis,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]

_EFFICIENCIES = {
    "efficiency": "efficiency η",
    "efficiency_action": "by action (≤ 1)",
    "kinematic_efficiency": "kinematic (≤ 1)",
}
_FACTORS = {
    "straightness": "straightness (≤ 1)",
    "steadiness": "steadiness (≤ 1)",
    "conversion": "conversion",
    "signal_fraction": "signal fraction",
}
_WITHOUT = ("efficiency_low", "efficiency_drift")
_TITLE = "How close to the speed limit"


def efficiency(record: RunRecord) -> Figure:
    """η with its interval, the guaranteed efficiencies, and the factors, against steps on a logarithmic axis.

    Each value is of the run from its start to that step. Nothing is clipped: the axes hold every defined value, and
    turn linear about 0 where some are 0 or negative. Regimes, where there are several, are divided by vertical lines.

    Raises:
        ValueError: no row after step 0 has one of these values.
    """
    check_record("record", record)
    step, columns = _defined(record)
    regimes = record.regimes()
    with style():
        drawn, axes = figure(1, 2, height=5.6, sharex=True)
        upper, lower = axes[:, 0]
        _draw_interval(upper, step, columns)
        for panel, names, first in ((upper, _EFFICIENCIES, 0), (lower, _FACTORS, len(_EFFICIENCIES))):
            for place, (name, label) in enumerate(names.items()):
                _draw(panel, step, columns[name], first + place, label)
            panel.axhline(1, color=INK, linewidth=0.8, linestyle=LINES[1], zorder=1.5)
            shown = [columns[name] for name in names] + ([columns[name] for name in _WITHOUT] if panel is upper else [])
            signed_log_axis(panel.yaxis, np.concatenate([*shown, [1.0]]))
            if panel.get_legend_handles_labels()[0]:
                panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
        log_axis(lower.xaxis, step)
        _draw_regimes(upper, lower, regimes)
        upper.set_title(_TITLE, pad=18 if len(regimes) > 1 else 6)
        upper.set_ylabel("efficiency (no unit)")
        lower.set_title("What it is made of")
        lower.set_ylabel("factor (no unit)")
        lower.set_xlabel("optimizer steps since the start")
        describe(drawn, _TITLE, _text(step, columns, regimes))
    return drawn


def _defined(record: RunRecord) -> tuple[Values, dict[str, Values]]:
    """Steps from 1 on, and the columns at these; a column that the record lacks is NaN."""
    found = record.columns
    rows = found["step"] >= 1
    step = found["step"][rows].astype(np.float64)
    missing = np.full(len(found["step"]), np.nan)
    names = (*_WITHOUT, *_EFFICIENCIES, *_FACTORS)
    columns = {name: drawable(found.get(name, missing)[rows]) for name in names}
    if not any(np.isfinite(columns[name]).any() for name in (*_EFFICIENCIES, *_FACTORS)):
        raise NothingToDraw(
            f"the figure of the efficiency needs a row in which an efficiency or a factor is defined, got {len(step)} "
            "rows after the start without one; record.summary() says why"
        )
    return step, columns


def _draw(axes: Any, step: Values, values: Values, index: int, label: str) -> None:
    known = np.isfinite(values)
    if known.any():
        axes.plot(step, np.where(known, values, np.nan), label=label, markevery=markers(step, values), **look(index))


def _draw_interval(axes: Any, step: Values, columns: dict[str, Values]) -> None:
    low, high, estimate = columns["efficiency_low"], columns["efficiency"], columns["efficiency_drift"]
    if np.isfinite(low).any():
        axes.fill_between(
            step,
            low,
            high,
            color=GREY,
            alpha=0.35,
            linewidth=0,
            label="interval of η without\nthe batches' random motion",
        )
    if np.isfinite(estimate).any():
        axes.plot(step, estimate, color=INK, linewidth=0.9, linestyle=LINES[3], label="an estimate within it")


def _draw_regimes(upper: Any, lower: Any, regimes: list[Regime]) -> None:
    """A line at each boundary; above the upper panel, the efficiency of each regime as a window of its own."""
    if len(regimes) < 2:
        return
    for panel in (upper, lower):
        for regime in regimes[:-1]:
            panel.axvline(regime.last_step, color=INK, linewidth=0.9, linestyle=LINES[3])
    left, right = lower.get_xlim()
    for place, regime in enumerate(regimes):
        low, high = max(regime.first_step, left), min(regime.last_step, right)
        upper.annotate(
            _regime_label(place, regime),
            xy=((low * high) ** 0.5, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
    for regime in regimes[:-1]:
        lower.annotate(
            f"step {regime.last_step}",
            xy=(regime.last_step, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
        )


def _regime_label(place: int, regime: Regime) -> str:
    found = number(float(f"{regime.efficiency:.2g}")) if np.isfinite(regime.efficiency) else "undefined"
    return f"regime {place + 1}: η {found}"


def _text(step: Values, columns: dict[str, Values], regimes: list[Regime]) -> str:
    """For those who do not see it: the last values, and the regimes."""
    last = {label: columns[name][-1] for name, label in (_EFFICIENCIES | _FACTORS).items()}
    values = ", ".join(f"{label} {value:.2g}" for label, value in last.items() if np.isfinite(value))
    parts = [f"After {step[-1]:.0f} steps: {values or 'nothing is defined'}."]
    if len(regimes) > 1:
        parts += [
            f"{_regime_label(place, r)}, steps {r.first_step} to {r.last_step}." for place, r in enumerate(regimes)
        ]
    return " ".join(parts)
