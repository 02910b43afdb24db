"""All figures of runs, in one style, and what they are written as. Each returns a matplotlib Figure of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_speedlimit.record import RunRecord

from .export import pixels, png, svg
from .figure_balance import work_balance
from .figure_curves import curves
from .figure_efficiency import efficiency
from .figure_layer_motion import layer_motion
from .figure_layers import layers
from .figure_plane import PlanePoint, plane
from .figure_trajectories import trajectories
from .figure_windows import windows
from .runs import check_record
from .style import NothingToDraw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "NothingToDraw",
    "PlanePoint",
    "available",
    "curves",
    "efficiency",
    "layer_motion",
    "layers",
    "pixels",
    "plane",
    "png",
    "svg",
    "trajectories",
    "windows",
    "work_balance",
]

OF_ONE_RUN: dict[str, Callable[[RunRecord], Figure]] = {
    "efficiency": efficiency,
    "windows": windows,
    "trajectories": trajectories,
    "work_balance": work_balance,
    "layers": layers,
}


def available(record: RunRecord) -> dict[str, Figure]:
    """The figures of one run that loggers get, as far as they can be drawn: name → Figure; all but `layer_motion`.

    Raises:
        ImportError: matplotlib is not installed (extra "report").
    """
    check_record("record", record)
    found = {}
    for name, draw in OF_ONE_RUN.items():
        with contextlib.suppress(NothingToDraw):
            found[name] = draw(record)
    return found
