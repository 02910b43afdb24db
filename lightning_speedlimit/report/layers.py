"""What the layers of a run say: which moves, which turns, which works on noise; as rows and in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.words import UNDEFINED, number, one_line

OWN = "(the model's own)"
HEADS = ("layer", "parameters", "moved", "action", "work", "straightness", "signal fraction")
MEANING = (
    "moved, action, work: shares of the squared displacement, of the action and of the work of all layers. "
    "straightness: (displacement / path length)² of the layer's own motion; low: it turns or bounces. "
    "signal fraction: the part of its work that the next batch confirms; near 0: noise, below 0: bouncing"
)
_SMALL = 0.5  # of an equal share: layers that did less are not named for what they did badly
_LONGEST = 80  # characters of a name


@dataclass(frozen=True)
class Layer:
    """One layer of a run at its last reading; NaN where undefined."""

    name: str
    parameters: float
    moved: float
    """D² over the sum of all layers' D², 1."""
    action: float
    """Action over that of all layers, 1."""
    work: float
    """Σ f_k·u_k over that of all layers, 1; below 0 where it climbed."""
    straightness: float
    """D²/ℓ², 1."""
    signal_fraction: float
    """Σ f_{k+1}·u_k / Σ f_k·u_k, 1."""


def layers_of(record: RunRecord) -> list[Layer]:
    """In the model's order; none where the record has none."""
    table = record.layers
    with np.errstate(all="ignore"):  # of a run that diverged
        shares = [_shares(values) for values in (table["displacement"] ** 2, table["action"], table["work_ito"])]
    names = [one_line(name, _LONGEST) or OWN for name in table["layers"]]
    columns = (table["parameters"], *shares, table["straightness"], table["signal_fraction"])
    return [Layer(name, *map(float, values)) for name, *values in zip(names, *columns, strict=True)]


def _shares(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total = np.nansum(values)
    found = values / total if total != 0 else np.full_like(values, np.nan)
    return np.where(np.isfinite(found), found, np.nan)


def rows(layers: Sequence[Layer]) -> list[list[str]]:
    """A row for each, as text, under `HEADS`."""
    return [
        [
            layer.name,
            f"{layer.parameters:,.0f}" if math.isfinite(layer.parameters) else UNDEFINED,
            *map(_percent, (layer.moved, layer.action, layer.work)),
            number(layer.straightness, 2),
            number(layer.signal_fraction, 2),
        ]
        for layer in layers
    ]


def sentences(layers: Sequence[Layer]) -> list[str]:
    """Which moved furthest, which turned most, which worked most on noise; nothing of a single layer."""
    if len(layers) < 2:
        return []
    found = []
    if (most := _extreme(layers, "moved", of=None, least=False)) is not None:
        found.append(
            f"{most.name} moved furthest: {_percent(most.moved)} of the squared displacement, for "
            f"{_percent(most.action)} of the action"
        )
    if (turned := _extreme(layers, "straightness", of="action", least=True)) is not None:
        found.append(
            f"{turned.name} turned most: straightness {number(turned.straightness, 2)}, with "
            f"{_percent(turned.action)} of the action"
        )
    if (noisy := _extreme(layers, "signal_fraction", of="work", least=True)) is not None:
        share, bounced = noisy.signal_fraction, noisy.signal_fraction < 0
        what = "bounced most: the next batch took back" if bounced else "worked most on noise: the next batch confirmed"
        found.append(f"{noisy.name} {what} {_percent(abs(share))} of its work, which is {_percent(noisy.work)} of all")
    return found


def _extreme(layers: Sequence[Layer], value: str, *, of: str | None, least: bool) -> Layer | None:
    """Of those whose share of `of` is no trifle."""
    enough = _SMALL / len(layers)
    known = [
        layer
        for layer in layers
        if math.isfinite(getattr(layer, value)) and (of is None or getattr(layer, of) >= enough)
    ]
    return (min if least else max)(known, key=lambda layer: getattr(layer, value), default=None)


def _percent(share: float) -> str:
    return f"{number(100 * share, 2)} %" if math.isfinite(share) else UNDEFINED
