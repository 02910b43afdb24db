"""At which loss runs are compared: one that most of them reached, and that tells them apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from lightning_speedlimit.report.alignment import Timeline
from lightning_speedlimit.report.interpolation import Interval
from lightning_speedlimit.words import listed, number

# A run whose loss fell by less than this share of what the best one's did has not learned.
LEARNED = 0.1
# Where a run ends, noise decides when it was there: levels at such shares of the way to the lowest are tried besides.
SHARES = (1.0, 0.9, 0.75)
NAN = math.nan


@dataclass(frozen=True)
class Level:
    """The groups at one loss."""

    name: str
    """ "early", "middle", "late"."""
    loss: float
    order: tuple[tuple[str, float], ...]
    """(group, mean of what it cost), the cheapest first: of the groups whose runs all got there."""


def fair_level(
    timelines: Mapping[Any, Timeline], key: str = "elapsed", groups: Mapping[Any, str] | None = None
) -> tuple[float, Any]:
    """A loss at which to compare, and the run that got no lower; None: all kept ones did. NaN, None without losses.

    Each run came for sure (loss + 3 standard errors) to a lowest loss l_i, from a start L_0 (the median). At l_i there
    are n_i runs that came as low: the level is the l_i of the largest n_i · (L_0 − l_i), runs times how far down, so
    that one run that did not come near does not hold up the others. Two are kept where two have learned. Of that level
    and those at 90 % and 75 % of the way to it (of ln L where losses are above 0), it is the one of the most pairs of
    runs that are clearly apart, times that share of the way; the lowest of equal ones.

    Of the runs whose loss fell, if there are any: the others, at a rate far too high or too low, would have all
    compared before the first step.

    Args:
        key: the column of what runs cost.
        groups: run → its group: replicas need not be apart. None: each run is one of its own.
    """
    fell = {name: timeline for name, timeline in timelines.items() if timeline.fell} or dict(timelines)
    lowest = {name: timeline.lowest_sure() for name, timeline in fell.items()}
    lowest = {name: level for name, level in lowest.items() if math.isfinite(level)}
    if not lowest:
        return NAN, None
    starts = [float(fell[name].loss[0]) for name in lowest]
    starts = [start for start in starts if math.isfinite(start)]
    start, best = median(starts) if starts else NAN, min(lowest.values())
    if not best < start:  # not known, or of runs that did not learn
        name = max(lowest, key=lambda name: lowest[name])
        return lowest[name], name
    learned = {name: level for name, level in lowest.items() if start - level >= LEARNED * (start - best)}
    ranked = sorted(learned, key=lambda name: learned[name])
    worth = {count: count * (start - learned[name]) for count, name in enumerate(ranked, 1)}
    count = max((c for c in worth if c >= min(2, len(ranked))), key=lambda c: (worth[c], c))
    kept, level = ranked[:count], learned[ranked[count - 1]]
    levels = [_on_the_way(start, level, share) for share in SHARES]
    names = np.array([str(name if groups is None else groups[name]) for name in kept])
    apart = [_pairs_apart([fell[name].cost_interval(key, at) for name in kept], names) for at in levels]
    chosen = max(range(len(SHARES)), key=lambda place: (apart[place] * SHARES[place], SHARES[place]))
    return (level, ranked[count - 1]) if chosen == 0 else (levels[chosen], None)


def check_below_starts(timelines: Mapping[Any, Timeline], level: float) -> None:
    """Raises ValueError for a loss that all runs had behind them when they began: each came to it for nothing."""
    starts = [float(timeline.loss[0]) for timeline in timelines.values()]
    if not all(start <= level for start in starts):  # an unknown start is no reason
        return
    lowest = min((timeline.lowest for timeline in timelines.values()), key=lambda low: (math.isnan(low), low))
    every = "the starting loss" if len(starts) == 1 else "both starting losses" if len(starts) == 2 else "all starts"
    raise ValueError(
        f"at must be a loss that a run came down to, got {number(level)}: not below {every} "
        f"({listed([number(start) for start in starts], 4)}); choose between {number(lowest)} and {number(max(starts))}"
    )


def _pairs_apart(intervals: Sequence[Interval], groups: Any) -> int:
    """Of runs of different groups."""
    low, high = np.array(intervals).T
    return int(((high[:, None] < low[None, :]) & (groups[:, None] != groups[None, :])).sum())


def three_levels(groups: Mapping[str, Sequence[Timeline]], key: str, level: float) -> tuple[Level, ...]:
    """The groups at a third and two thirds of the way from the start to a level, and there; empty without a start."""
    starts = [float(t.loss[0]) for timelines in groups.values() for t in timelines if t.fell]
    starts = [start for start in starts if math.isfinite(start)]
    start = median(starts) if starts else NAN
    if not level < start:
        return ()
    losses = [_on_the_way(start, level, part / 3) for part in (1, 2, 3)]
    return tuple(
        Level(name, loss, _order(groups, key, loss))
        for name, loss in zip(("early", "middle", "late"), losses, strict=True)
    )


def _on_the_way(start: float, level: float, share: float) -> float:
    """Of ln L where losses are above 0, as a loss falls fast at first; else of L."""
    if share == 1:
        return level
    return start * (level / start) ** share if level > 0 else start + share * (level - start)


def _order(groups: Mapping[str, Sequence[Timeline]], key: str, loss: float) -> tuple[tuple[str, float], ...]:
    costs = {
        name: float(np.mean([np.interp(t.crossing(loss).step, t.steps, t.column(key, 0.0)) for t in timelines]))
        for name, timelines in groups.items()
    }
    return tuple(sorted(((n, c) for n, c in costs.items() if math.isfinite(c)), key=lambda item: item[1]))
