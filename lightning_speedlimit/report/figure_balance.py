"""Where the work of runs went."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_speedlimit.record import RunRecord

from .alignment import work_shares
from .runs import named_records
from .style import GREY, INK, NothingToDraw, describe, drawable, figure, number, short_name, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Label, colour and hatch of each part; dark, middle and light in greyscale.
_PARTS = {
    "loss": ("lowered the loss", "#0072B2", ""),
    "bouncing": ("bouncing", "#E69F00", "////"),
    "noise": ("batch noise", "#CCCCCC", ""),
}
_TITLE = "Where the work went"
_ROW = 0.34  # inches
_MOST_NAMED = 40  # rows that have this height
_SEEN = 0.002  # width of a part that can be seen


def shares_of_work(record: RunRecord) -> dict[str, float]:
    """The parts of `work_shares` at a run's last row, under the names of this figure."""
    conversion, signal = _last(record)
    shares = work_shares(conversion, signal, record.run)
    parts = {"loss": shares["useful_share"], "bouncing": shares["bouncing_share"], "noise": shares["noise_share"]}
    return {name: float(drawable(share)) for name, share in parts.items()}


def work_balance(runs: Mapping[str, RunRecord] | RunRecord) -> Figure:
    """Bars of 1 = all work Σ f·u of a run: the parts that lowered the loss, went into bouncing and into batch noise.

    The parts of a bar add up to 1. A negative part is drawn to the left of 0, and those to the right then reach beyond
    1: the losses' errors, few steps, or batches that are not independent do that.

    Raises:
        ValueError: no run has a conversion and a signal fraction.
    """
    named = named_records(runs)
    found = {name: shares_of_work(record) for name, record in named.items()}
    if not any(_is_known(parts) for parts in found.values()):
        raise NothingToDraw(
            f"the balance of work needs a run with a conversion and a signal fraction, got {len(found)} without; "
            "record the loss and take two steps at least, or see record.summary() for why they are undefined"
        )
    with style():
        row = _ROW if len(found) <= _MOST_NAMED else _ROW * _MOST_NAMED / len(found)
        drawn, axes = figure(height=1.5 + row * len(found))
        panel = axes[0, 0]
        for place, parts in enumerate(found.values()):
            _draw_bar(panel, place, parts, words=row == _ROW)
        for position, line in ((0, "-"), (1, "--")):
            panel.axvline(position, color=INK, linewidth=0.8, linestyle=line)
        panel.set_yticks(
            range(len(found)), list(map(short_name, found)), fontsize=9 if row == _ROW else max(9 * row / _ROW, 3)
        )
        panel.set_ylim(len(found) - 0.5, -0.5)
        panel.tick_params(axis="y", length=0)
        panel.grid(visible=False, axis="y")
        panel.set_xlabel(_axis_label(found))
        _draw_legend(panel)
        describe(drawn, _TITLE, _text(found))
    return drawn


def _last(record: RunRecord) -> tuple[float, float]:
    summary = record.summary()
    return summary.conversion, summary.signal_fraction


def _is_known(parts: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in parts.values())


def _draw_bar(axes: Any, place: int, parts: Mapping[str, float], *, words: bool) -> None:
    """Positive parts one after the other to the right of 0, negative ones to its left."""
    if not _is_known(parts):
        axes.text(0.01, place, "undefined", va="center", fontsize=8, color=GREY)
        return
    ends = {True: 0.0, False: 0.0}
    for name, value in parts.items():
        _, colour, hatch = _PARTS[name]
        begin = ends[value >= 0]
        axes.barh(place, value, left=begin, height=0.62, color=colour, hatch=hatch, edgecolor="white", linewidth=0.8)
        ends[value >= 0] += value
        if words and abs(value) >= 0.07 * _span(parts):
            axes.text(
                begin + value / 2,
                place,
                _percent(value),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if name == "loss" else "black",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0} if hatch else None,
            )


def _span(parts: Mapping[str, float]) -> float:
    return sum(abs(value) for value in parts.values())


def _draw_legend(axes: Any) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=c, hatch=h, edgecolor="white", label=label) for label, c, h in _PARTS.values()]
    axes.legend(handles=patches, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.2)
    axes.set_title(_TITLE, pad=20)  # above the legend: names may leave the axes little width


def _axis_label(found: Mapping[str, Mapping[str, float]]) -> str:
    label = "part of the work Σ f·u (no unit)"
    if any(value < -_SEEN for parts in found.values() if _is_known(parts) for value in parts.values()):
        label += "\nnegative parts to the left of 0: each bar adds up to 1"
    return label


def _percent(value: float) -> str:
    return f"{number(float(f'{100 * value:.2g}'))} %"


def _text(found: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        f"{name}: "
        + (
            ", ".join(f"{_PARTS[part][0]} {_percent(value)}" for part, value in parts.items())
            if _is_known(parts)
            else "undefined"
        )
        for name, parts in found.items()
    ]
    return "Parts of the work. " + "; ".join(lines) + "."
