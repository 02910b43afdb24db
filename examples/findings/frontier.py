"""Optimizers in the plane of samples and action, to the same loss: is there a frontier that none passes?

Fixed before the runs. The loss to come to is that of Adam at 1e-3, batch 64, after 120 steps, held-out, on seed 100.
Rates are factors of 2 about a usual one, and on until the best is bracketed; batches 16, 64 and (for the MLP) 256, seed
0; up to 600 steps and four times Adam's samples. Corners of each optimizer, by that grid: the run of the fewest
samples, of the least action, and of the least samples × action. These are run again with seeds 1 to 5, and judged by
their means.

1. One frontier: samples^p × action = const, fitted on each task to the corners that no other one beats in both, is
   come to within a factor of 2 in action by some corner of each of the six optimizers.
2. The kinematic efficiency D²/(τ·A) at the fewest samples is between 0.2 and 0.4 for each optimizer and task.
3. No corner has τ·A below twice the smallest D² of all runs of its task. (τ·A ≥ D² of its own is a theorem.)
4. Made on the first task, before the corners of the second were run: the optimizers whose update is a mean of
   many gradients (momentum, Nesterov, Adam, AdamW) come each within a factor of 1.5 of one law fitted to their corners;
   SGD and RMSprop, whose update is of one batch, stay a factor of 3 and more above it.

    python examples/findings/frontier.py --data FOLDER --output docs/findings
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from frontier_shown import ENTRANTS, MEASURED, Row, draw, far_table, fewest_table, laws_table, planes, verdicts
from lab import Lab, begin
from sets import Set, load
from training import LOOKS
from trainings import Run, Training

Task = tuple[str, str]  # data, net
WANTED = ("samples", "action", "product")
SEARCHED = 100  # seed


@dataclass(frozen=True)
class Plan:
    """batches, and shares of the usual rate that the grid begins with: by net.

    far: (share, batch) of runs that nobody would choose, of each entrant in `far_for`, for the tasks in `far_at`.
    """

    tasks: tuple[Task, ...]
    shares: Mapping[str, tuple[float, ...]]
    batches: Mapping[str, tuple[int, ...]]
    brackets: bool = True
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    level_steps: int = 120
    most_steps: int = 600
    far: tuple[tuple[float, int], ...] = ((0.25, 512), (8.0, 16))
    far_for: tuple[str, ...] = ("SGD", "momentum", "Adam")
    far_at: tuple[Task, ...] = (("fashion-mnist", "MLP"),)


FULL = Plan(
    (("fashion-mnist", "MLP"), ("cifar10", "CNN")),
    {"MLP": (0.25, 0.5, 1.0, 2.0, 4.0), "CNN": (0.5, 1.0, 2.0)},
    {"MLP": (16, 64, 256), "CNN": (16, 64)},
)
QUICK = Plan(
    (("fashion-mnist", "MLP"),),
    {"MLP": (2.0,)},
    {"MLP": (16, 32)},
    brackets=False,
    seeds=(1, 2),
    level_steps=20,
    most_steps=96,
    far=((4.0, 32),),
    far_for=("Adam",),
)


class Experiment:
    def __init__(self, lab: Lab, plan: Plan) -> None:
        self.lab, self.plan = lab, plan
        self._sets: dict[str, Set] = {}

    def data(self, name: str) -> Set:
        if name not in self._sets:
            self._sets[name] = load(name, self.lab.options.data, 10_000, 500)
        return self._sets[name]

    def run(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Rows of the grid, of the corners, and of the runs that nobody would choose."""
        grid, corners, far = [], [], []
        for task in self.plan.tasks:
            level = self.level(task)
            own = [
                row
                for name in ENTRANTS
                for batch in self.plan.batches[task[1]]
                for row in self.bracketed(task, level, name, batch)
            ]
            grid += own
            corners += self.rows("corners", task, level, corners_of(own), self.plan.seeds)
            if task in self.plan.far_at:
                unusual = [
                    (name, share * ENTRANTS[name].rate, batch)
                    for name in self.plan.far_for
                    for share, batch in self.plan.far
                ]
                far += self.rows("far", task, level, unusual, self.plan.seeds)
        return grid, corners, far

    def bracketed(self, task: Task, level: float, name: str, batch: int) -> list[Row]:
        """Rates by factors of 2, until neither the lowest nor the highest has the fewest samples."""
        shares = list(self.plan.shares[task[1]])
        while True:
            settings = [(name, share * ENTRANTS[name].rate, batch) for share in sorted(shares)]
            rows = self.rows("grid", task, level, settings, (0,))
            costs = [math.inf if row["samples"] is None else row["samples"] for row in rows]
            if not self.plan.brackets or costs[0] == costs[-1] == math.inf or costs[0] > min(costs) < costs[-1]:
                return rows
            shares.append(min(shares) / 2 if costs[0] == min(costs) else max(shares) * 2)

    def level(self, task: Task) -> float:
        """The smoothed held-out loss of Adam, 1e-3, batch 64, after so many steps."""
        training = Training(*task, "Adam", 1e-3, 64, self.plan.level_steps, SEARCHED)

        def compute(_: Mapping[str, Any]) -> Row:
            losses = Run(training, self.data(task[0]), measured=False).go(looks=50).course.losses
            return {"level": fmean(losses[-LOOKS:])}

        return float(self.lab.rows("levels", [training.key], compute)[0]["level"])

    def rows(
        self, part: str, task: Task, level: float, settings: list[tuple[str, float, int]], seeds: tuple[int, ...]
    ) -> list[Row]:
        """Of each setting and seed; None of what is measured where the level is not come to."""
        trainings = {}
        for name, rate, batch in settings:
            steps = min(self.plan.most_steps, 4 * 64 * self.plan.level_steps // batch)
            for seed in seeds:
                entrant = ENTRANTS[name]
                training = Training(
                    *task, entrant.optimizer, rate, batch, steps, seed, optimizer_options=entrant.options
                )
                key = {"name": name} | {k: v for k, v in training.key.items() if k != "optimizer_options"}
                trainings[tuple(key.values())] = (key, training)

        def compute(key: Mapping[str, Any]) -> Row:
            return reached(trainings[tuple(key.values())][1], self.data(task[0]), level)

        return self.lab.rows(part, [key for key, _ in trainings.values()], compute)


def reached(training: Training, data: Set, level: float) -> Row:
    """What it took until the mean of the last five looks at the held-out loss was at the level.

    A look is due after 512 samples, or a step.
    """
    run = Run(training, data)
    looks = training.steps // min(16, max(1, 512 // training.batch))
    run.go(rows=1, looks=looks, level=level)
    losses = run.course.losses
    came = not run.course.diverged and len(losses) >= LOOKS and fmean(losses[-LOOKS:]) <= level
    found = run.meter.compute() if run.meter else {}
    row: Row = {name: found[name] if came else math.nan for name in MEASURED}
    row |= {"steps_taken": run.step if came else None, "samples": run.step * training.batch if came else None}
    return row | {"product": row["samples"] * row["action"] if came else math.nan}


def corners_of(rows: list[Row]) -> list[tuple[str, float, int]]:
    """Of one task: each optimizer's settings that are the best in something."""
    found = []
    for name in ENTRANTS:
        own = [row for row in rows if row["name"] == name and row["samples"] is not None]
        best = [min(own, key=lambda row, wanted=wanted: row[wanted]) for wanted in WANTED] if own else []
        found += [(row["name"], row["rate"], row["batch"]) for row in best]
    return list(dict.fromkeys(found))


def main() -> None:
    options = begin(__doc__)
    lab = Lab("frontier", options)
    grid, corners, far = Experiment(lab, QUICK if options.quick else FULL).run()
    found = planes(grid, corners)
    print("\n\n".join((verdicts(found), laws_table(found), fewest_table(found), far_table(found, far))))
    draw(lab, found, grid)


if __name__ == "__main__":
    main()
