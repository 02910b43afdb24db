"""The plane (cost, action) of a comparison."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_speedlimit.report.places import Group
from lightning_speedlimit.report.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plane_of(comparison: Result) -> Figure:
    """See `Comparison.figure`."""
    from lightning_speedlimit.report.figures import PlanePoint, plane

    if not comparison.at_loss:
        raise ValueError("the plane needs runs with a loss, got none; record_loss(loss) at every step")
    names = [group.name for group in comparison.groups]
    return plane(
        [
            PlanePoint(
                name=group.name,
                elapsed=group.values["cost"],
                action=group.values["action"],
                displacement=_scaled_displacement(group),
                elapsed_interval=group.cost_interval,
                action_interval=group.action_interval,
                on_frontier=group.beaten_by is None,
                place=names.index(group.name),
            )
            for group in comparison.at_loss
            if group.placed
        ],
        clock=comparison.groups[0].points[0].run.record.run.get("clock", "steps"),
        cost=comparison.axis.name,
    )


def _scaled_displacement(group: Group) -> float:
    """D, such that cost · A ≥ D² is τ · A ≥ D² of the mean, (mean D)² ≤ mean τ · mean A, at this cost per step."""
    cost, elapsed = group.values["cost"], group.values["elapsed"]
    return group.values["displacement"] * (math.sqrt(cost / elapsed) if elapsed > 0 and cost != elapsed else 1.0)
