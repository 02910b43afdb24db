"""The figures of the page: inline SVG, each with a caption that says how to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.report import figures
from lightning_speedlimit.report.figure_windows import log_spaced
from lightning_speedlimit.report.places import Point
from lightning_speedlimit.report.plane import plane_of
from lightning_speedlimit.report.results import Result
from lightning_speedlimit.report.runs import KEEP_SKETCHES, with_sketches
from lightning_speedlimit.words import number

MOST_DETAILED = 12  # runs with figures of their own: some 0.3 MB and a second each
MOST_BARS = 40  # rows of the balance of work that can be read
MOST_CURVES = 200
MOST_ROWS = 400  # log steps of a run that its figures show, besides those with a sketch: 10,000 would take a megabyte

BALANCE = (
    "All work of a run's updates along the gradients as one bar: up to its last step, while the words above are of the "
    "run up to where it is compared. Only the first part lowered the loss. Bouncing is steps that overshoot (half of "
    "u·H·u); batch noise is work that the next batch does not confirm. A part below 0 is drawn to the left: the loss "
    "is estimated, and small parts may be its error."
)
TRAJECTORIES = (
    "The weights of each run minus its first ones, in the plane of the two directions in which all of them moved most. "
    "The titles of the axes say how much of the motion that plane holds; what it does not hold is not to be seen here: "
    "mostly the turning by noise and bouncing, so that paths look straighter than they are."
)
CURVES = (
    "Left: the loss against what it cost. Right: the action (the squared lengths of all steps, added up) that it took "
    "to come down to a loss; lower is cheaper, and a run goes to the right in both."
)
OF_ONE_RUN = {
    "efficiency": (
        "Efficiency over the steps",
        "Each value is of the run from its start to that step. The band reaches down to the efficiency with the batch "
        "noise's random motion taken out. Below: the factors. Dotted lines part regimes, if there are several.",
    ),
    "windows": (
        "Efficiency of every window",
        "Each cell is the run from step s (upwards) to step t (to the right), as if it were a run of its own. A dark "
        "patch is a stretch that wasted time, whatever came before it. It is kinematic efficiency / conversion: with "
        "momentum or adaptive steps another number than the efficiency above.",
    ),
    "layer_motion": (
        "Which layer moves, turns, is noise",
        "Bars: each layer's share of the action; dots: its share of the squared displacement. A layer whose bar ends "
        "far beyond its dot paid for much motion and did not get far: it turns (low straightness). A signal fraction "
        "near 0 is work on batch noise, one below 0 is bouncing.",
    ),
    "layers": (
        "W₂ of each layer's neurons",
        "How far the neurons of a layer went, with and without their names: a displacement beyond W₂ means that "
        "neurons changed places.",
    ),
}


_TABLES = {"layers": "clouds", "layer_motion": "layers"}  # of the record


@dataclass(frozen=True)
class Picture:
    """A figure of the page, or why there is none."""

    key: str
    """Unique in the page: ends the element's id, and begins all within the figure."""
    title: str
    caption: str
    svg: str
    """Empty where there is nothing to draw."""
    missing: str = ""
    """Why, where there is nothing to draw."""


def plane(comparison: Result, prefix: str) -> Picture | None:
    """None where no run has a place in it."""
    if not any(group.placed for group in comparison.at_loss):
        return None
    words = comparison.axis.words
    caption = (
        f"Each mark is where a run's loss first came down to {number(comparison.loss_level)}; bars are intervals: of a "
        "single run where its loss ± 3 standard errors was that low, of several seeds 95 % of the mean. "
        f"Down and to the left is better: {words.less}, less action (what the motion cost). The thin line of a run is "
        f"τ·A = D²: the least action and {words.noun} that this change of its weights could have taken; the further a "
        "run is from its line, the more it wasted (of a run far from it the line may lie outside of the picture). The "
        "wide grey line, where there is one, is the frontier: runs on it are beaten by none in both."
    )
    title = f"{words.noun.capitalize()} and action at the same loss"
    return _picture(f"{prefix}-plane", title, caption, lambda: plane_of(comparison))


def of_all(comparison: Result, detailed: list[Point], prefix: str) -> dict[str, Picture]:
    """Curves, the balance of work, trajectories: of every run, or of the detailed ones where there are too many."""
    every = [point for group in comparison.groups for point in group.points]
    groups = {point.run.name: group.name for group in comparison.groups for point in group.points}

    def choose(most: int) -> tuple[list[Point], str]:
        if len(every) <= most:
            return every, ""
        return detailed, f" Of {len(every)} runs these are {len(detailed)}, the frontier's first."

    axis = comparison.axis
    trajectories = partial(figures.trajectories, groups=groups)
    curves = partial(figures.curves, groups=groups, cost="steps" if axis.name == "steps" else axis.key)
    drawn = {}
    for name, title, caption, draw, most in (
        ("curves", f"Loss against {axis.words.noun}", CURVES, curves, MOST_CURVES),
        ("balance", "Where the work went", BALANCE, figures.work_balance, MOST_BARS),
        ("trajectories", "The paths of the weights", TRAJECTORIES, trajectories, KEEP_SKETCHES),
    ):
        points, remark = choose(most)
        records = _records(points, sketches=name == "trajectories")
        drawn[name] = _picture(f"{prefix}-{name}", title, caption + remark, partial(draw, records))
    return drawn


def of_run(point: Point, prefix: str) -> list[Picture]:
    """Efficiency over steps, of windows, and per layer where clouds were measured."""
    whole = with_sketches(point.run)
    record = thinned(whole)
    remark = f" Of {len(whole):,} log steps {len(record):,} are shown." if len(record) < len(whole) else ""
    return [
        _picture(f"{prefix}-{name}", title, caption + remark, partial(getattr(figures, name), record))
        for name, (title, caption) in OF_ONE_RUN.items()
        if name not in ("layers", "layer_motion") or len(getattr(record, _TABLES[name])["layers"]) > 1
    ]


def thinned(record: RunRecord) -> RunRecord:
    """The record with at most 400 of its rows, evenly on a logarithmic axis, and those that have a sketch.

    Windows and regimes, which rest on sketches, are those of the whole.
    """
    steps = record.columns["step"]
    if len(steps) <= MOST_ROWS:
        return record
    kept = np.isin(steps, np.concatenate([log_spaced(steps[steps > 0], MOST_ROWS), record.sketch_steps]))
    state = record.state_dict()
    arrays = state["arrays"]
    arrays |= {"step": arrays["step"][kept], "values": arrays["values"][:, kept]}
    return RunRecord.from_state_dict(state)


def detailed_points(comparison: Result) -> list[Point]:
    """The runs with figures of their own: all of them, or, of more than 12, first runs of the frontier's groups first.

    Then their second runs, and so on; no others, as a page has to be read.
    """
    every = [point for group in comparison.groups for point in group.points]
    if len(every) <= MOST_DETAILED:
        return every
    groups = [group for group in comparison.groups if group.name in comparison.frontier] or list(comparison.groups)
    turns = max(len(group.points) for group in groups)
    found = [group.points[turn] for turn in range(turns) for group in groups if turn < len(group.points)]
    return found[:MOST_DETAILED]


def _records(points: list[Point], *, sketches: bool) -> Mapping[str, RunRecord]:
    return {point.run.name: with_sketches(point.run) if sketches else point.run.record for point in points}


def _picture(key: str, title: str, caption: str, draw: Callable[[], Any]) -> Picture:
    try:
        return Picture(key, title, caption, figures.svg(draw(), prefix=key))
    except figures.NothingToDraw as reason:
        return Picture(key, title, caption, "", missing=str(reason))
