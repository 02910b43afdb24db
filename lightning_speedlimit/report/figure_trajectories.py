"""Runs in the plane of the two directions in which they moved most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.record import SKETCH_SIZE, RunRecord

from .runs import named_records
from .style import COLOURS, GREY, INK, NothingToDraw, describe, figure, look, number, places_of, short_name, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]

MOST_ROWS = 600  # sketches that the directions are found from, of all runs together: an eigenproblem of that size
_FEWEST = 8  # of each run
_NAMED = 2 * len(COLOURS)  # runs that have a colour and a name
_TITLE = "Trajectories in the plane of their two main directions"


@dataclass(frozen=True)
class Plane:
    """Runs projected onto two common directions."""

    steps: dict[str, npt.NDArray[np.int64]]
    """Name → (n,): 0 and the steps of the sketches."""
    paths: dict[str, Values]
    """Name → (n, 2): ⟨θ_t − θ_0, v_1⟩, ⟨θ_t − θ_0, v_2⟩, parameter; the first is the start, 0."""
    shares: tuple[float, float]
    """The part of the mean of |θ_t − θ_0|² that lies in each direction, no unit; each run counts the same."""


def trajectories(runs: Mapping[str, RunRecord] | RunRecord, *, groups: Mapping[str, str] | None = None) -> Figure:
    """θ_t − θ_0 of each run, from its sketches, in the plane of the two main directions of all runs together.

    The directions are the first two right singular vectors of the sketches of all runs, each run scaled to the same
    sum of squares; the start is the origin and no mean is taken off. Runs from other starts than each other's are each
    drawn from their own: only their directions can be compared then. Two directions of a path in many dimensions
    always make smooth curves, of pure diffusion too: the share says how much of the motion they show.

    Args:
        runs: name → record, all of one model; or one record.
        groups: name of a run → its group, whose colour it has; None: each run is one of its own.

    Raises:
        ValueError: no run with a sketch of some motion, or runs of models of different sizes.
    """
    named = named_records(runs)
    found = plane_of(named)
    with style():
        drawn, axes = figure(height=4.6, width=6.4)
        panel = axes[0, 0]
        places = places_of(found.paths, groups)
        for name, path in found.paths.items():
            _draw(panel, found.steps[name], path, name, places[name], few=len(found.paths) <= _NAMED)
        panel.plot(0, 0, marker="*", markersize=12, color=INK, linestyle="none", label="start", zorder=4)
        panel.plot([], [], marker="o", markersize=7, color=GREY, linestyle="none", label="end")
        if len(found.paths) == 1:
            panel.lines[0].set_label("path")
            (name,) = found.paths
            _name_steps(panel, found.steps[name], found.paths[name])
        panel.set_aspect("equal", adjustable="datalim")
        panel.margins(0.08)
        panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
        panel.set_title(f"{_TITLE}: {_percent(sum(found.shares))} of the motion", fontsize=9.5)
        panel.set_xlabel(f"direction 1 (parameter units): {_percent(found.shares[0])} of the motion")
        panel.set_ylabel(f"direction 2: {_percent(found.shares[1])}")
        describe(drawn, _TITLE, _text(found))
    return drawn


def plane_of(runs: Mapping[str, RunRecord]) -> Plane:
    """The numbers of the figure.

    Raises:
        ValueError: no run with a sketch of some motion, or runs of models of different sizes.
    """
    _check_one_model(runs)
    moving = {name: record for name, record in runs.items() if len(_moves(record)[0])}
    if not moving:
        raise NothingToDraw(
            f"trajectories need a run with sketches of some motion, got {len(runs)} without; sketches are kept on log "
            "steps, and left out of a record that was loaded or saved without them"
        )
    each = max(MOST_ROWS // len(moving), _FEWEST)
    directions = _directions([_thinned(_moves(record)[1], each) for record in moving.values()])
    steps, paths, shares = {}, {}, []
    for name, record in moving.items():
        at, sketches = _moves(record)
        path = sketches @ directions.T
        shares.append(np.square(path).sum(0) / np.square(sketches).sum())
        steps[name] = np.concatenate([[0], at])
        paths[name] = np.concatenate([np.zeros((1, 2)), path])
    first, second = np.mean(shares, axis=0)
    return Plane(steps, paths, (float(first), float(second)))


def _check_one_model(runs: Mapping[str, RunRecord]) -> None:
    sizes = {
        record.run["parameters"]: name for name, record in runs.items() if record.run.get("parameters") is not None
    }
    if len(sizes) > 1:
        got = ", ".join(f"{size} ({name})" for size, name in sizes.items())
        raise ValueError(f"trajectories need runs of one model, got models of {got} parameters; draw each apart")


def _moves(record: RunRecord) -> tuple[npt.NDArray[np.int64], Values]:
    """The steps and the sketches that are finite and not all 0, (n,) and (n, 4093)."""
    steps, sketches = record.sketch_steps, record.sketches.astype(np.float64)
    known = np.isfinite(sketches).all(1) & (steps > 0)
    if not sketches[known].any():
        return np.empty(0, np.int64), np.empty((0, SKETCH_SIZE))
    return steps[known], sketches[known]


def _thinned(rows: Values, most: int) -> Values:
    """At most so many rows, evenly, the last among them."""
    if len(rows) <= most:
        return rows
    return np.asarray(rows[np.linspace(0, len(rows) - 1, most).round().astype(int)])


def _directions(sketches: list[Values]) -> Values:
    """(2, 4093): the first two right singular vectors of all rows, each run scaled to the sum of squares 1.

    By the eigenvectors of X Xᵀ, which is smaller. The signs are such that the runs end at positive coordinates, taken
    together; a direction in which nothing moves is 0.
    """
    scaled = np.concatenate([rows / np.linalg.norm(rows) for rows in sketches])
    squares, vectors = np.linalg.eigh(scaled @ scaled.T)
    found = np.zeros((2, scaled.shape[1]))
    ends = np.stack([rows[-1] / np.linalg.norm(rows) for rows in sketches])
    for place in range(min(2, len(squares))):
        if squares[-1 - place] > 1e-12 * squares[-1]:  # below is the rounding of the float64 products
            found[place] = vectors[:, -1 - place] @ scaled / squares[-1 - place] ** 0.5
            found[place] *= -1 if (ends @ found[place]).sum() < 0 else 1
    return found


def _draw(axes: Any, steps: npt.NDArray[np.int64], path: Values, name: str, index: int, *, few: bool) -> None:
    """The path, a marker wherever the step has doubled, and one at the end; grey where runs are too many to name."""
    if few:
        axes.plot(*path.T, label=short_name(name), markevery=_doublings(steps), **look(index) | {"markersize": 4})
    else:
        axes.plot(*path.T, color=GREY, linewidth=0.8)
    mark = look(index)["marker"] if few else "o"
    colour = COLOURS[index % len(COLOURS)] if few else GREY
    axes.plot(*path[-1], marker=mark, markersize=8 if few else 4, color=colour, zorder=3)


def _doublings(steps: npt.NDArray[np.int64]) -> list[int]:
    """The first recorded step, and the next ones each at least twice the one before."""
    found: list[int] = []
    for place in range(1, len(steps)):
        if not found or steps[place] >= 2 * steps[found[-1]]:
            found.append(place)
    return found


def _name_steps(axes: Any, steps: npt.NDArray[np.int64], path: Values) -> None:
    """The numbers of the marked steps of a run, from the last on, where they do not come too near each other."""
    size = np.abs(path).max()
    named: list[Values] = []
    for place in (len(steps) - 1, *reversed(_doublings(steps))):
        if all(np.linalg.norm(path[place] - other) > 0.09 * size for other in [*named, np.zeros(2)]):
            named.append(path[place])
            axes.annotate(
                f"{steps[place]}", path[place], xytext=(5, 5), textcoords="offset points", fontsize=8, color=INK
            )


def _percent(share: float) -> str:
    return f"{number(float(f'{100 * share:.3g}'))} %"


def _text(found: Plane) -> str:
    runs = ", ".join(
        f"{name}: {steps[-1]} steps, ends at ({path[-1, 0]:.3g}, {path[-1, 1]:.3g})"
        for (name, path), steps in zip(list(found.paths.items())[:12], found.steps.values(), strict=False)
    )
    more = f" and {len(found.paths) - 12} more" if len(found.paths) > 12 else ""
    return (
        f"The directions hold {_percent(found.shares[0])} and {_percent(found.shares[1])} of the motion. {runs}{more}."
    )
