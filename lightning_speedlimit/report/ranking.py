"""Which groups beat which, as far as their intervals tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_speedlimit.report.alignment import By
from lightning_speedlimit.report.interpolation import Interval
from lightning_speedlimit.report.places import Group

ROUNDING = 1e-9


def with_beaten(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Each with the group that beats it: where several do, one that does so clearly, then the cheapest."""
    found = []
    for group in groups:
        better = [other for other in groups if _beats(other, group)]
        better.sort(key=lambda other: (not _clearly(other, group), other.values["action"]))
        name = better[0].name if better else None
        found.append(replace(group, beaten_by=name, clearly=bool(better) and _clearly(better[0], group)))
    return tuple(found)


def _beats(a: Group, b: Group) -> bool:
    """Less of one, no more of the other; who reached the loss beats nobody who did not: that is told otherwise."""
    pairs = [(a.values[key], b.values[key]) for key in ("cost", "action")]
    return not any(_less(y, x) for x, y in pairs) and any(_less(x, y) for x, y in pairs) and a.placed and b.placed


def _clearly(a: Group, b: Group) -> bool:
    """Both intervals apart."""
    return below(a.cost_interval, b.cost_interval) and below(a.action_interval, b.action_interval)


def below(a: Interval, b: Interval) -> bool:
    """Whether one interval ends before the other begins; no where either end is unknown."""
    return _less(a[1], b[0])


def _less(a: float, b: float) -> bool:
    """By more than sums over a long run round to, about 1e-10."""
    return a < b and not math.isclose(a, b, rel_tol=ROUNDING)


def ranking_interval(group: Group, by: By) -> Interval:
    """Of what the groups are ranked by."""
    return group.cost_interval if by == "loss" else group.loss_interval


def rivals(groups: Sequence[Group], by: By) -> list[Group]:
    """Those that may be the first: at the same loss also who did not get there yet; else who has a loss there."""
    return [group for group in groups if by == "loss" or math.isfinite(group.values["loss"])]


def winner(groups: Sequence[Group], by: By) -> str | None:
    """The first, where its interval keeps apart from all others."""
    compared = rivals(groups, by)
    if len(compared) < 2 or not compared[0].reached:
        return None
    first = ranking_interval(compared[0], by)
    return compared[0].name if all(below(first, ranking_interval(other, by)) for other in compared[1:]) else None
