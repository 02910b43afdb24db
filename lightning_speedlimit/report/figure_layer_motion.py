"""Which layer moves, which turns, which works on noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_speedlimit.record import RunRecord

from .layers import Layer, layers_of, sentences
from .runs import check_record
from .style import COLOURS, GREY, INK, NothingToDraw, describe, drawable, figure, short_name, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW = 0.27  # inches
_MOST_NAMED = 60  # rows that have this height
MOST_LAYERS = 120
_TITLE = "Which layer moves, turns, is noise"


def layer_motion(record: RunRecord) -> Figure:
    """Each layer's share of the action and of the squared displacement; its straightness; its signal fraction.

    Of more than 120 layers those with the largest action.

    Raises:
        ValueError: the record has less than two layers.
    """
    check_record("record", record)
    every = layers_of(record)
    if len(every) < 2:
        raise NothingToDraw(
            f"the figure of the layers' motion needs a record with two layers at least, got {len(every)}; records of "
            "SpeedLimit have them, those of a TrajectoryMeter with layer_of"
        )
    kept = sorted(range(len(every)), key=lambda i: -np.nan_to_num(every[i].action))[:MOST_LAYERS]
    shown = [every[i] for i in sorted(kept)]
    with style():
        row = _ROW if len(shown) <= _MOST_NAMED else _ROW * _MOST_NAMED / len(shown)
        drawn, axes = figure(3, height=1.6 + row * len(shown), width=8.6, sharey=True, width_ratios=[1.6, 1, 1])
        _draw_shares(axes[0, 0], shown)
        _draw_values(axes[0, 1], [layer.straightness for layer in shown], "straightness", COLOURS[3], 0.0)
        _draw_values(axes[0, 2], [layer.signal_fraction for layer in shown], "signal fraction", COLOURS[4], None)
        panel = axes[0, 0]
        panel.set_yticks(
            range(len(shown)), [short_name(layer.name, 44) for layer in shown], fontsize=min(8.5, 29 * row)
        )
        panel.set_ylim(len(shown) - 0.4, -0.6)
        if len(shown) < len(every):
            panel.set_ylabel(f"the {len(shown)} of {len(every):,} layers with the largest action")
        describe(drawn, _TITLE, _text(shown))
    return drawn


def _draw_shares(axes: Any, layers: Sequence[Layer]) -> None:
    places = range(len(layers))
    action, moved = (drawable([getattr(layer, name) for layer in layers]) for name in ("action", "moved"))
    axes.barh(places, action, height=0.62, color=COLOURS[6], label="share of the action")
    axes.plot(moved, places, "o", color=INK, markersize=4, label="of the squared displacement")
    axes.set_xlim(0, None)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("share of all layers (no unit)")
    axes.set_title("moves", pad=34)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=1, borderaxespad=0.1)
    axes.grid(visible=False, axis="y")


def _draw_values(axes: Any, values: Sequence[float], name: str, colour: str, low: float | None) -> None:
    """A line from 0 to each, so that signs are seen."""
    known, places = drawable(values), np.arange(len(values))
    axes.hlines(places, 0, known, color=GREY, linewidth=1.2)
    axes.plot(known, places, "o", color=colour)
    axes.axvline(0, color=INK, linewidth=0.8)
    if low is not None:
        axes.set_xlim(low, None)
    axes.set_xlabel(f"{name} (no unit)")
    axes.set_title({"straightness": "turns where low", "signal fraction": "is noise where low"}[name], pad=34)
    axes.grid(visible=False, axis="y")


def _text(layers: Sequence[Layer]) -> str:
    parts = [
        f"{layer.name}: action {layer.action:.2g}, displacement {layer.moved:.2g}, straightness "
        f"{layer.straightness:.2g}, signal {layer.signal_fraction:.2g}"
        for layer in layers
    ]
    return "; ".join([*sentences(layers), *parts]) + "."
