"""What the runs to one loss say: corners, the law of those that none beats, verdicts, tables, the figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from lab import COLOURS, LINES, MARKERS, Lab, Mean, Row, mean_of

MEASURED = ("action", "displacement", "path_length", "kinematic_efficiency", "straightness", "steadiness", "conversion")

AVERAGING = ("momentum", "Nesterov", "Adam", "AdamW")  # whose update is a mean of many gradients


@dataclass(frozen=True)
class Entrant:
    """An optimizer with its usual rate."""

    optimizer: str
    rate: float
    options: Mapping[str, Any]


ENTRANTS = {
    "SGD": Entrant("SGD", 0.1, {}),
    "momentum": Entrant("momentum", 0.02, {}),
    "Nesterov": Entrant("momentum", 0.02, {"nesterov": True}),
    "RMSprop": Entrant("RMSprop", 5e-4, {}),
    "Adam": Entrant("Adam", 2e-3, {}),
    "AdamW": Entrant("AdamW", 2e-3, {}),
}


@dataclass(frozen=True)
class Corner:
    """Means over seeds; came: how many seeds came to the level."""

    task: str
    name: str
    rate: float
    batch: int
    came: int
    of: int
    means: Mapping[str, Mean]

    def __getitem__(self, what: str) -> float:
        return self.means[what].value


def gathered(rows: list[Row]) -> list[Corner]:
    """Of the rows of several seeds; those that came to the level with most of their seeds."""
    groups = dict[tuple[Any, ...], list[Row]]()
    for row in rows:
        groups.setdefault((f"{row['data']} {row['net']}", row["name"], row["rate"], row["batch"]), []).append(row)
    found = []
    for setting, own in groups.items():
        means = {what: mean_of([row[what] for row in own]) for what in ("samples", "steps_taken", "product", *MEASURED)}
        means["bought"] = mean_of([bought(row) for row in own])
        corner = Corner(*setting, sum(row["samples"] is not None for row in own), len(own), means)
        found.append(corner)
    return [corner for corner in found if 2 * corner.came > corner.of]


def bought(row: Row) -> float:
    """τ·A, parameter²."""
    return row["steps_taken"] * row["action"] if row["samples"] is not None else math.nan


def unbeaten(corners: list[Corner]) -> list[Corner]:
    """Those that no other one beats in both samples and action."""
    return [
        c
        for c in corners
        if not any(o["samples"] <= c["samples"] and o["action"] <= c["action"] and o is not c for o in corners)
    ]


@dataclass(frozen=True)
class Law:
    """action = factor · samples^−p."""

    p: float
    factor: float
    scatter: float
    """The largest quotient of a corner it was fitted to and the law, or its inverse."""

    def action(self, samples: Any) -> Any:
        return self.factor * samples**-self.p


def law(corners: list[Corner]) -> Law:
    """Least squares in the logarithms; NaN for fewer than two."""
    if len(corners) < 2:
        return Law(math.nan, math.nan, math.nan)
    x, y = (np.log([c[what] for c in corners]) for what in ("samples", "action"))
    slope, offset = np.polyfit(x, y, 1)
    return Law(-float(slope), math.exp(offset), math.exp(float(np.abs(y - slope * x - offset).max())))


@dataclass(frozen=True)
class Plane:
    """One task. over: optimizer → the least quotient of its corners' action and the law's; fewest: its corner of the
    fewest samples. smallest: D² of all runs, parameter²."""

    task: str
    corners: list[Corner]
    front: list[Corner]
    law: Law
    over: dict[str, float]
    fewest: dict[str, Corner]
    smallest: float

    @property
    def averaged(self) -> Law:
        """Of the corners that none beats, of those alone that average gradients."""
        return law(unbeaten([corner for corner in self.corners if corner.name in AVERAGING]))

    @property
    def near(self) -> list[bool]:
        """Of each optimizer: is one of its corners within a factor of 2 of the law, above it or below?"""
        within = {c.name for c in self.corners if 0.5 <= c["action"] / float(self.law.action(c["samples"])) <= 2}
        return [name in within for name in self.over]

    @property
    def apart(self) -> bool:
        """Those that average are within a factor of 1.5 of their law, and no other within 3."""
        over = over_law(self.corners, self.averaged)
        return all(over[name] <= 1.5 if name in AVERAGING else over[name] >= 3 for name in over)

    @property
    def least_bought(self) -> float:
        """The least τ·A of the corners, over the smallest D²."""
        return min(corner["bought"] for corner in self.corners) / self.smallest


def over_law(corners: list[Corner], fitted: Law) -> dict[str, float]:
    """Optimizer → the least quotient of its corners' action and the law's."""
    return {
        name: min(c["action"] / float(fitted.action(c["samples"])) for c in corners if c.name == name)
        for name in dict.fromkeys(corner.name for corner in corners)
    }


def planes(grid: list[Row], corners: list[Row]) -> list[Plane]:
    found = []
    every = gathered(corners)
    for task in dict.fromkeys(corner.task for corner in every):
        own = [corner for corner in every if corner.task == task]
        front = unbeaten(own)
        over = over_law(own, law(front))
        fewest = {name: min((c for c in own if c.name == name), key=lambda c: c["samples"]) for name in over}
        squares = [
            row["displacement"] ** 2
            for row in [*grid, *corners]
            if f"{row['data']} {row['net']}" == task and row["displacement"] is not None
        ]
        found.append(Plane(task, own, front, law(front), over, fewest, min(squares)))
    return found


def verdicts(found: list[Plane]) -> str:
    over = [value for plane in found for value in plane.over.values()]
    missing = len(found) * len(ENTRANTS) - len(over)
    near = sum(sum(plane.near) for plane in found)
    kinematic = [c["kinematic_efficiency"] for plane in found for c in plane.fewest.values()]
    within = sum(0.2 <= value <= 0.4 for value in kinematic)
    least, later = [plane.least_bought for plane in found], found[1:]
    return "\n".join(
        [
            "| statement | wanted | found | |",
            "|---|---|---|---|",
            f"| 1. each optimizer comes within a factor of 2 of one law | {len(over) + missing} of "
            f"{len(over) + missing} | {near}; the farthest {max(over):.2g} | {said(near == len(over) + missing)} |",
            f"| 2. kinematic efficiency at the fewest samples from 0.2 to 0.4 | {len(kinematic)} of {len(kinematic)} "
            f"| {within}; {min(kinematic):.2g} to {max(kinematic):.2g} | {said(within == len(kinematic))} |",
            f"| 3. τ·A is twice the smallest D² and more | {len(least)} of {len(least)} tasks "
            f"| {sum(x >= 2 for x in least)}; {min(least):.2g} to {max(least):.2g} times "
            f"| {said(all(x >= 2 for x in least))} |",
            f"| 4. those that average share a law, the others are above it | {len(later)} of {len(later)} later tasks "
            f"| {sum(plane.apart for plane in later)} "
            f"| {said(all(plane.apart for plane in later)) if later else 'not tested'} |",
        ]
    )


def said(holds: bool) -> str:
    return "holds" if holds else "fails"


def laws_table(found: list[Plane]) -> str:
    lines = [
        f"| task | p | scatter | {' | '.join(ENTRANTS)} | least τ·A / smallest D² |",
        f"|---|---|---|{'---|' * len(ENTRANTS)}---|",
    ]
    for plane in found:
        for name, fitted in ((plane.task, plane.law), (f"{plane.task}, law of those that average", plane.averaged)):
            over = over_law(plane.corners, fitted)
            cells = " | ".join(f"{over[other]:.2g}" if other in over else "never" for other in ENTRANTS)
            lines.append(f"| {name} | {fitted.p:.2f} | {fitted.scatter:.2f} | {cells} | {plane.least_bought:.2f} |")
    return "\n".join(lines)


def fewest_table(found: list[Plane]) -> str:
    lines = [
        "| fewest samples | rate, batch | samples | steps | action | D | kinematic | straightness | steadiness "
        "| conversion |",
        f"|{'---|' * 10}",
    ]
    for plane in found:
        for name, c in plane.fewest.items():
            cells = (f"{c['samples']:,.0f} ± {c.means['samples'].error:.0f}", f"{c['steps_taken']:.0f}")
            values = ("action", "displacement", "kinematic_efficiency", "straightness", "steadiness", "conversion")
            lines.append(
                f"| {plane.task}, {name} | {c.rate:.3g}, {c.batch} | {' | '.join(cells)} "
                f"| {' | '.join(str(c.means[value]) for value in values)} |"
            )
    return "\n".join(lines)


def far_table(found: list[Plane], far: list[Row]) -> str:
    """Runs that nobody would choose, over the law of their task."""
    lines = ["| run | samples | action / law | kinematic | τ·A / smallest D² |", "|---|---|---|---|---|"]
    known, came = {plane.task: plane for plane in found}, gathered(far)
    if not came:
        return f"Of {len(far)} runs {sum(row['samples'] is not None for row in far)} came to the loss."
    for c in came:
        plane = known[c.task]
        over = c["action"] / float(plane.law.action(c["samples"]))
        lines.append(
            f"| {c.task}, {c.name} {c.rate:.3g}, batch {c.batch} | {c['samples']:,.0f} | {over:.2g} "
            f"| {c.means['kinematic_efficiency']} | {c['bought'] / plane.smallest:.3g} |"
        )
    return "\n".join(lines)


def draw(lab: Lab, found: list[Plane], grid: list[Row]) -> None:
    with lab.picture(len(found), width=4.1, height=3.9) as (_, panels):
        for plane, panel in zip(found, np.atleast_1d(panels), strict=True):
            for i, name in enumerate(ENTRANTS):
                style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": "none"}
                rows = [
                    row
                    for row in grid
                    if row["name"] == name and f"{row['data']} {row['net']}" == plane.task and row["samples"]
                ]
                panel.plot([r["samples"] for r in rows], [r["action"] for r in rows], alpha=0.35, **style)
                own = [c for c in plane.corners if c.name == name]
                panel.plot([c["samples"] for c in own], [c["action"] for c in own], label=name, markersize=8, **style)
            span = np.array([min(c["samples"] for c in plane.front), max(c["samples"] for c in plane.front)])
            panel.plot(span, plane.law.action(span), color="#666666", linestyle=LINES[1], label="law of the unbeaten")
            panel.set(xscale="log", yscale="log", xlabel="samples to the loss, thousands", title=plane.task)
            panel.set_xticks([4e3, 8e3, 16e3, 32e3], ["4", "8", "16", "32"])
            panel.set_xticks([], minor=True)
        np.atleast_1d(panels)[0].set(ylabel="action to the loss, parameter² per step")
        np.atleast_1d(panels)[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
