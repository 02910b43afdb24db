"""Curves that are known at rows alone: where they come down to a level, and how far they can be from their chords.

A curve that bends one way lies, between two rows, between its chord there and the extensions of the neighbouring
chords: a convex one below the chord and above both extensions, a concave one the other way round. That is O(h²) wide
for rows h apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Interval = tuple[float, float]


def first_below(steps: Values, values: Values, level: float) -> tuple[float, float, float]:
    """Where values come down to a level for the first time: not before, by the chord, not after. NaN: nowhere.

    Args:
        steps: (rows,), increasing. values: (rows,); NaN where they are not known: the chord spans such rows, and the
            level may be met anywhere among them. One that is infinite tells nothing of the way to it.
    """
    since, known = float(steps[0]), np.flatnonzero(~np.isnan(values))
    steps, values = steps[known], values[known]
    below = np.flatnonzero(values <= level)
    if not len(below):
        return math.nan, math.nan, math.nan
    place = int(below[0])
    end = float(steps[place])
    if place == 0:
        return since, end, end
    start = float(steps[place - 1])
    if not math.isfinite(values[place - 1]):
        return start, end, end
    if known[place] - known[place - 1] > 1:
        return start, _meets(steps, values, place - 1, level), end
    if values[place] == level:
        return end, end, end
    ends = []
    if place > 1 and math.isfinite(values[place - 2]):
        ends.append(_clipped(_meets(steps, values, place - 2, level), start, end, never=end))
    if place + 1 < len(values) and math.isfinite(values[place + 1]):
        ends.append(_clipped(_meets(steps, values, place, level), start, end, never=start))
    return _around(_meets(steps, values, place - 1, level), ends, start, end)


def time_above(steps: Values, values: Values, level: float, between: Interval) -> float:
    """How long the chords are above a level from one step to another, steps; rows that are not finite are left out.

    Args:
        steps: (rows,), increasing. values: (rows,). between: within the rows.
    """
    known = np.isfinite(values)
    inner = (steps > between[0]) & (steps < between[1]) & known
    at = np.concatenate([[between[0]], steps[inner], [between[1]]])
    y = np.interp(at, steps[known], values[known])
    low, high = np.minimum(y[:-1], y[1:]), np.maximum(y[:-1], y[1:])
    crosses = (low <= level) & (high > level)
    share = np.where(crosses, (high - level) / np.where(crosses, high - low, 1.0), low > level)
    return float(np.sum(share * np.diff(at)))


def read_between(steps: Values, values: Values, step: float) -> Interval:
    """Within which a curve is at a step, for one that does not leave its rows' range; NaN beyond the rows.

    Args:
        steps: (rows,), increasing. values: (rows,).
    """
    if not steps[0] <= step <= steps[-1]:
        return math.nan, math.nan
    after = int(np.searchsorted(steps, step))
    if steps[after] == step:
        return float(values[after]), float(values[after])
    low, high = sorted((float(values[after - 1]), float(values[after])))
    ends = [
        _clipped(_line(steps, values, row, step), low, high, never=math.nan)
        for row in (after - 2, after)
        if 0 <= row < len(values) - 1 and math.isfinite(values[row] + values[row + 1])
    ]
    first, _, last = _around(_line(steps, values, after - 1, step), ends, low, high)
    return first, last


def _meets(steps: Values, values: Values, row: int, level: float) -> float:
    """The step at which the line through a row and the next comes down to the level; NaN where it does not fall."""
    fall = float(values[row] - values[row + 1])
    share = (float(values[row]) - level) / fall if fall > 0 else math.nan
    return float(steps[row] + share * (steps[row + 1] - steps[row]))


def _line(steps: Values, values: Values, row: int, step: float) -> float:
    """The value at a step on the line through a row and the next."""
    share = (step - steps[row]) / (steps[row + 1] - steps[row])
    return float(values[row] + share * (values[row + 1] - values[row]))


def _clipped(value: float, low: float, high: float, *, never: float) -> float:
    return never if math.isnan(value) else min(max(value, low), high)


def _around(chord: float, ends: Sequence[float], low: float, high: float) -> tuple[float, float, float]:
    """The chord's number between the ends of where the curve's is; without neighbours anywhere from low to high."""
    if not ends:
        return low, chord, high
    if max(ends) <= chord:  # bends one way: beyond the nearer of the two
        return max(ends), chord, chord
    if min(ends) >= chord:
        return chord, chord, min(ends)
    return min(ends), chord, max(ends)
