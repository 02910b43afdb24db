"""Regimes of a run: stretches of one efficiency, told apart over log-spaced windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ._record_windows import Steps, Trajectory, Values

SPACING = 2**0.5  # between the edges of windows, as a ratio of steps
OVERLAP = 4  # edges that a window spans: its last step is 4 times its first
MOST = 4  # regimes
_FACTOR = 1.2  # by which the efficiencies of neighbours differ at least
_FLOOR = 0.05  # in ln η: what one power law may miss without being another regime; twice the sketch's error
_PLATEAU = 2  # windows of a regime at least that lie wholly in it
_BENDS = 5  # of a curve at least, to see its noise


@dataclass(frozen=True)
class Regime:
    """A stretch of a run with an efficiency of its own, clearly other than its neighbours'."""

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
    edges = log_spaced(steps[1:])
    bounds = [0, int(steps[-1])]
    if len(edges) > OVERLAP:
        wide = trajectory.windows(edges[:-OVERLAP], edges[OVERLAP:])
        narrow = trajectory.windows(edges[:-1], edges[1:])
        with np.errstate(invalid="ignore", divide="ignore"):
            noise = np.hypot(wide.efficiency_se / wide.efficiency, scatter(np.log(narrow.efficiency)))
            places = boundaries(np.log(edges), np.log(wide.efficiency), noise)
        bounds[1:1] = edges[places].tolist()
        for k in range(1, len(bounds) - 1):
            bounds[k] = _sharpened(trajectory, bounds[k - 1], bounds[k], bounds[k + 1])
    efficiency = trajectory.windows(bounds[:-1], bounds[1:]).efficiency
    return [Regime(s, t, float(e)) for s, t, e in zip(bounds, bounds[1:], efficiency, strict=False)]


def log_spaced(steps: Steps) -> Steps:
    """Some of the increasing steps: each the first that is at least √2 times the one chosen before."""
    chosen = [int(steps[0])]
    for step in steps.tolist():
        if step >= SPACING * chosen[-1]:
            chosen.append(step)
    return np.array(chosen, dtype=np.int64)


def scatter(values: Values) -> float:
    """σ of the noise on a smooth curve with few jumps: 1.4826 · median |y_{i−1} − 2y_i + y_{i+1}|/√6; 0 if unknown."""
    bends = values[:-2] - 2 * values[1:-1] + values[2:]
    bends = np.abs(bends[np.isfinite(bends)])
    return float(1.4826 * np.median(bends) / 6**0.5) if len(bends) >= _BENDS else 0.0


def boundaries(edges: Values, levels: Values, noise: npt.ArrayLike) -> list[int]:
    """The edges at which ln η steps from one level to another, where one power law is not as good.

    Binary segmentation: a stretch is divided at the edge where two levels beat one straight line the most, χ² of
    both over the windows that do not straddle it, if by more than ln(windows), which noise alone exceeds in less
    than one curve of a hundred; then its parts.

    Args:
        edges: (n + OVERLAP,) increasing: ln of the edges' steps.
        levels: (n,): ln η of the windows, each from an edge to the OVERLAP-th one after it; NaN where undefined.
        noise: () or (n,): standard errors of ln η.
    """
    sigma = np.hypot(np.broadcast_to(np.asarray(noise, dtype=np.float64), levels.shape), _FLOOR)
    centre = (edges[:-OVERLAP] + edges[OVERLAP:]) / 2
    found: list[int] = []
    stretches = [(0, len(edges) - 1)]
    while stretches and len(found) < MOST - 1:
        first, last = stretches.pop()
        split = _best_split(centre, levels, sigma, first, last)
        if split is not None:
            found.append(split)
            stretches += [(split, last), (first, split)]
    return sorted(found)


def _best_split(centre: Values, levels: Values, sigma: Values, first: int, last: int) -> int | None:
    """The edge between two of them that divides their windows best; None where one power law will do."""
    best, most = None, math.log(max(2, last - first - OVERLAP + 1))
    for edge in range(first + 1, last):
        left, right = (_within(levels, a, b) for a, b in ((first, edge), (edge, last)))
        if min(len(left), len(right)) < _PLATEAU:
            continue
        step = np.mean(levels[right]) - np.mean(levels[left])
        both = np.concatenate([left, right])
        # Neighbouring windows share all but a fraction 1/OVERLAP of their steps.
        gain = _misfit(levels, sigma, both, centre) - _misfit(levels, sigma, left) - _misfit(levels, sigma, right)
        if abs(step) >= math.log(_FACTOR) and gain / OVERLAP > most:
            best, most = edge, gain / OVERLAP
    return best


def _within(levels: Values, first: int, last: int) -> Any:
    """Which defined windows lie between two edges."""
    windows = np.arange(first, max(first, last - OVERLAP + 1))
    return windows[np.isfinite(levels[windows])]


def _misfit(levels: Values, sigma: Values, which: Any, slope_along: Values | None = None) -> float:
    """χ² of these windows about their weighted mean, or about a straight line."""
    y, weight = levels[which], 1 / sigma[which]
    columns = [np.ones_like(y)] if slope_along is None else [np.ones_like(y), slope_along[which]]
    design = np.stack(columns, 1) * weight[:, None]
    fitted = design @ np.linalg.lstsq(design, y * weight, rcond=None)[0]
    return float(np.square(y * weight - fitted).sum())


def _sharpened(trajectory: Trajectory, first: int, near: int, last: int) -> int:
    """The recorded step within a factor of 2 of `near` at which the run is divided best: of the greatest
    τ_SL(first, b) + τ_SL(b, last), since η < 1 wherever a window joins unlike motions."""
    steps = trajectory.steps
    reach = OVERLAP / 2 * math.log(SPACING)
    candidates = steps[(steps > first) & (steps < last) & (np.abs(np.log(np.maximum(steps, 1) / near)) <= reach)]
    before, after = trajectory.windows(first, candidates), trajectory.windows(candidates, last)
    limit = np.nan_to_num(before.efficiency) * (candidates - first) + np.nan_to_num(after.efficiency) * (
        last - candidates
    )
    return int(candidates[np.argmax(limit)])
