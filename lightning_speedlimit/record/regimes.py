"""Regimes of a run: stretches of one efficiency, told apart over log-spaced windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record.windows import Steps, Trajectory, Values

SPACING = 2**0.5  # between the edges of windows, as a ratio of steps
OVERLAP = 4  # edges that a window spans: its last step is 4 times its first
MOST = 4  # regimes
_FACTOR = 1.2  # by which the windows of neighbours differ at least in the mean
_FLOOR = 0.05  # in ln η: what one power law may miss without being another regime; twice the sketch's error
_PLATEAU = 2  # windows of a regime at least that lie wholly in it
_SLOPE = 4  # windows at least that a slope is told from
_BENDS = 5  # of a curve at least, to see its noise
_CLEAR = 0.25  # relative standard error of η at most; of windows that just pass 2 errors chance made η too low
_OFF = 0.12  # in ln(steps): how far from its edge a recorded step may be


@dataclass(frozen=True)
class Regime:
    """A stretch of a run whose windows (t, 4t) differ clearly from its neighbours'.

    As wholes two neighbours may have like efficiencies, and one that joins them far less: two unlike motions.
    """

    first_step: int
    """Step that it starts from: 0, or the last step of the regime before."""
    last_step: int
    """Its last step: the boundary to the next one, or the last recorded step."""
    efficiency: float
    """η(first_step, last_step), no unit; NaN where the loss did not fall by two standard errors in it."""


def regimes(trajectory: Trajectory) -> list[Regime]:
    """The regimes of a trajectory, in order, without gaps; none where nothing is recorded."""
    steps = trajectory.steps
    if len(steps) < 2:
        return []
    near, last = _coarse(trajectory), int(steps[-1])
    bounds = [0]
    for coarse, end in pairwise([*near, last]):
        within = steps[(steps > bounds[-1]) & (steps < end)]  # some are: windows of both sides end there
        bounds.append(_sharpened(trajectory, bounds[-1], coarse, end, within))
    bounds.append(last)
    efficiency = trajectory.windows(bounds[:-1], bounds[1:]).efficiency
    return [Regime(s, t, float(e)) for s, t, e in zip(bounds, bounds[1:], efficiency, strict=False)]


def _coarse(trajectory: Trajectory) -> list[int]:
    """Steps near which the efficiency of windows changes."""
    edges = log_spaced(trajectory.steps[1:])
    if len(edges) <= OVERLAP:
        return []
    levels, relative = _log_efficiency(trajectory, edges, OVERLAP)
    noise = np.hypot(relative, scatter(_log_efficiency(trajectory, edges, 1)[0]))
    return [int(trajectory.steps[1] * SPACING**edge) for edge in boundaries(levels, noise)]


def log_spaced(steps: Steps) -> Steps:
    """The steps next to s, √2 s, 2s, …, s the first of these increasing steps; −1 where none is within 12 %."""
    count = 1 + int(math.log(steps[-1] / steps[0]) / math.log(SPACING) + 0.5)
    grid = math.log(steps[0]) + math.log(SPACING) * np.arange(count)
    off = np.abs(np.log(steps)[:, None] - grid)
    return np.where(off.min(0) <= _OFF, steps[off.argmin(0)], -1)


def _log_efficiency(trajectory: Trajectory, edges: Steps, width: int) -> tuple[Values, Values]:
    """ln η of the windows from each edge to the `width`-th after it, and its standard error; NaN where not clear."""
    first, last = edges[:-width], edges[width:]
    known = (first >= 0) & (last > first)
    found = trajectory.windows(first[known], last[known])
    efficiency = np.where(found.efficiency > 0, found.efficiency, math.nan)
    relative = found.efficiency_se / efficiency
    levels, error = np.full((2, len(first)), np.nan)
    levels[known] = np.where(relative <= _CLEAR, np.log(efficiency), math.nan)
    error[known] = relative
    return levels, error


def scatter(values: Values) -> float:
    """σ of the noise on a smooth curve with few jumps: 1.4826 · median |y_{i−1} − 2y_i + y_{i+1}|/√6; 0 if unknown."""
    bends = values[:-2] - 2 * values[1:-1] + values[2:]
    bends = np.abs(bends[np.isfinite(bends)])
    return float(1.4826 * np.median(bends) / 6**0.5) if len(bends) >= _BENDS else 0.0


def boundaries(levels: Values, noise: npt.ArrayLike) -> list[int]:
    """The edges at which ln η changes from one level, or one power law, to another.

    Binary segmentation: a stretch is divided at the edge where two levels, or two straight lines, beat one line by
    the most in χ², if each further parameter lowers it by ln(windows), as in Schwarz's criterion; then its parts.

    Args:
        levels: (n,): ln η of the windows from edge i to edge i + OVERLAP; NaN where undefined.
        noise: () or (n,): standard errors of ln η.
    """
    sigma = np.hypot(np.broadcast_to(np.asarray(noise, dtype=np.float64), levels.shape), _FLOOR)
    found: list[int] = []
    stretches = [(0, len(levels) + OVERLAP - 1)]
    while stretches and len(found) < MOST - 1:
        first, last = stretches.pop(0)
        gains = {edge: _gain(levels, sigma, first, edge, last) for edge in range(first + 1, last)}
        split = max(gains, key=lambda edge: gains[edge], default=first)
        if gains.get(split, 0.0) > 0.0:
            found.append(split)
            stretches += [(first, split), (split, last)]
    return sorted(found)


def _gain(levels: Values, sigma: Values, first: int, edge: int, last: int) -> float:
    """By how much two levels (one parameter more, the edge) or two lines (three more) beat one line; −inf where
    too few windows tell, or the two sides do not differ."""
    left, right = _within(levels, first, edge), _within(levels, edge, last)
    every = _within(levels, first, last)
    fewest = min(len(left), len(right))
    if fewest < _PLATEAU or abs(np.mean(levels[right]) - np.mean(levels[left])) < math.log(_FACTOR):
        return -math.inf
    one = np.square((levels - _fitted(levels, sigma, every, slope=True)) / sigma)[every].sum()

    def beaten(parameters: int, *, slope: bool) -> float:
        """A window that straddles the edge may show anything between the two sides."""
        before, after = (_fitted(levels, sigma, side, slope=slope) for side in (left, right))
        low, high = np.minimum(before, after), np.maximum(before, after)
        low[left], high[left], low[right], high[right] = before[left], before[left], after[right], after[right]
        two = np.square((levels - levels.clip(low, high)) / sigma)[every].sum()
        # Neighbouring windows share all but a fraction 1/OVERLAP of their steps.
        return float(one - two) / OVERLAP - parameters * math.log(len(every))

    gain = beaten(1, slope=False)
    return max(gain, beaten(3, slope=True)) if fewest >= _SLOPE else gain


def _within(levels: Values, first: int, last: int) -> Any:
    """Which defined windows lie between two edges."""
    windows = np.arange(first, max(first, last - OVERLAP + 1))
    return windows[np.isfinite(levels[windows])]


def _fitted(levels: Values, sigma: Values, which: Any, *, slope: bool) -> Values:
    """(n,): the weighted mean of these windows, or the straight line through them, at all windows."""
    x = np.arange(len(levels), dtype=np.float64)
    design = np.stack([np.ones_like(x), x] if slope else [np.ones_like(x)], 1)
    weight = 1 / sigma[which]
    found = np.linalg.lstsq(design[which] * weight[:, None], levels[which] * weight, rcond=None)[0]
    return np.asarray(design @ found, dtype=np.float64)


def _sharpened(trajectory: Trajectory, first: int, near: int, last: int, steps: Steps) -> int:
    """Which of these steps divides the stretch best; the nearest to `near` where none has two sides that are defined.

    Best is the greatest τ_SL(first, b) + τ_SL(b, last): a window that joins unlike motions loses some of it. Within
    one window of `near`, a factor of 4: in the first and the last stretch a boundary can lie beyond every edge with
    windows on both of its sides.
    """
    off = np.abs(np.log(steps / near))
    times = trajectory.speed_limit_times(first, steps) + trajectory.speed_limit_times(steps, last)
    times = np.where(off <= OVERLAP * math.log(SPACING), times, math.nan)
    return int(steps[off.argmin() if np.isnan(times).all() else np.nanargmax(times)])
