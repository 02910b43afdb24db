"""W₂ between groups of replicas, from the sketches of where they came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from lightning_speedlimit.report.places import Point
from lightning_speedlimit.report.runs import with_sketches

MOST_GROUPS = 12  # pairs grow with the square
MOST_RUNS = 64  # sketches of 4093 numbers in each cloud


@dataclass(frozen=True)
class GroupDistance:
    """W₂ between the displacements θ − θ_0 of two groups' runs, where they are compared: per run, parameter.

    W₂² = min over pairings of mean |Δθ_a − Δθ_b|², from sketches (distances within 2.2 %). Where all runs start from
    the same weights that is W₂ of the weights themselves. Two samples of one distribution are not at distance 0
    either: `within` says how far replicas of one group lie from each other.
    """

    first: str
    second: str
    wasserstein2: float
    """parameter."""
    lower: float
    """Certified lower end for these clouds, parameter."""
    within: float
    """Root mean square distance between replicas of one group, over both groups, parameter."""


def group_distances(groups: Sequence[tuple[str, Sequence[Point]]]) -> tuple[GroupDistance, ...]:
    """Of all pairs of groups that have at least two runs with sketches each; none for more than 12 such groups."""
    large = [(name, points) for name, points in groups if 2 <= len(points) <= MOST_RUNS]
    if not 2 <= len(large) <= MOST_GROUPS:
        return ()
    clouds = [(name, cloud) for name, cloud in ((name, _cloud(points)) for name, points in large) if cloud is not None]
    return tuple(_distance(a, b) for a, b in combinations(clouds, 2))


def _cloud(points: Sequence[Point]) -> Any:
    """(runs, 4093): each run's sketch nearest to the step at which it is compared; None where one has none."""
    rows = []
    for point in points:
        record = with_sketches(point.run)
        steps = record.sketch_steps
        if not len(steps):
            return None
        rows.append(record.sketches[int(np.abs(steps - point.values["step"]).argmin())])
    return np.stack(rows).astype(np.float64)


def _distance(a: tuple[str, Any], b: tuple[str, Any]) -> GroupDistance:
    import torch

    from lightning_speedlimit.transport import wasserstein2_squared

    found = wasserstein2_squared(torch.from_numpy(a[1]), torch.from_numpy(b[1]))
    within = [float(((x - y) ** 2).sum()) for _, cloud in (a, b) for x, y in combinations(cloud, 2)]
    return GroupDistance(
        a[0],
        b[0],
        wasserstein2=math.sqrt(max(found.value, 0.0)),
        lower=math.sqrt(max(found.lower, 0.0)),
        within=math.sqrt(math.fsum(within) / len(within)),
    )
