"""Does the critical batch size of one short run predict a sweep over batch sizes?

    python examples/tuning/sweep.py --data FOLDER [--tasks mnist …] [--optimizers SGD …] [--seeds N] [--output docs]
    python examples/tuning/sweep.py --quick         # blobs instead of data; seconds

Each batch size is tuned by itself: learning rates ½, 1, 2, 4 times a centre, which scales with the square root of the
batch (Adam: its fourth root), and more by factors of 2 where the best is at the edge. Counted are steps until the
smoothed loss of a fixed evaluation set has come down to a level; the best rate takes the fewest. Predicted from the
first 300 steps of one run at the smallest batch, at the rate that is best there, B_c of these 300 steps:

    steps(B) = steps(16) · (1 + B_c/B) / (1 + B_c/16)

Fixed before any of it was seen: the levels, which a run of another seed at the smallest batch and the centre rate had
come to after 300 steps ("near": within what B_c is known of) and after 1,500 ("far"); B_c of all the 300 steps.
Beside it is the same with B_c of that whole run, up to the level: what the run itself could say once it is there.
That was added when the first task had been seen. It goes on where it was stopped: runs that are in the file are not
made again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import TASKS, Task, blobs
from training import ROW_EVERY, Results, Setting, train

SLOWER = 1.3  # times the fewest steps: then a run is not the best, and ends
EXTENSIONS = 3  # of the grid of rates, to each side
CEILING = 6  # times the steps of the far level that the pilot took: then a run ends
MORE = 2  # times the steps of the next smaller batch: then a run ends
LEVELS = ("near", "far")


@dataclass(frozen=True)
class Plan:
    batches: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    measured: int = 300
    near: int = 300
    far: int = 1500
    pilot: int = 100  # the seed of the run that sets the levels


FULL, QUICK = Plan(), Plan(batches=(16, 32, 64), measured=100, near=60, far=160)


def levels(results: Results, task: Task, optimizer: str, plan: Plan) -> dict[str, float]:
    key = {"task": task.name, "optimizer": optimizer}
    found = results.find("levels", key)
    if found is None:
        pilot = Setting(task.name, optimizer, plan.batches[0], task.rates[optimizer], plan.pilot)
        course, _ = train(task, pilot, -math.inf, plan.far + 64)
        found = results.add("levels", {**key, "near": course.at(plan.near), "far": course.at(plan.far)})
    return {name: float(found[name]) for name in LEVELS}


def tune(results: Results, task: Task, optimizer: str, batch: int, seed: int, ceiling: int, plan: Plan) -> int:
    """Runs the grid of one batch size. Returns the fewest steps to the far level, or the ceiling."""
    wanted = levels(results, task, optimizer, plan)
    smallest = plan.batches[0]
    centre = task.rates[optimizer] * (batch / smallest) ** (0.25 if optimizer == "Adam" else 0.5)
    steps: dict[int, dict[str, float]] = {}

    def run(power: int) -> None:
        fewest = min((found["far"] for found in steps.values()), default=math.inf)
        measured = plan.measured if batch == smallest else 0
        setting = Setting(task.name, optimizer, batch, centre * 2.0**power, seed, measured)
        row = results.run(task, setting, wanted, math.ceil(min(ceiling, SLOWER * fewest + 2 * plan.near / batch)))
        steps[power] = {name: math.inf if row[name] is None else row[name] for name in LEVELS}

    for power in (0, 1, 2, -1):
        run(power)
    for _ in range(EXTENSIONS):
        best = {min(steps, key=lambda power, name=name: steps[power][name]) for name in LEVELS}
        edges = {min(steps): -1, max(steps): 1}
        for edge in best & edges.keys():
            run(edge + edges[edge])
    return int(min(ceiling, min(found["far"] for found in steps.values())))


def sweep(results: Results, task: Task, optimizer: str, seed: int, plan: Plan) -> None:
    ceiling = CEILING * plan.far
    for batch in plan.batches:
        fewest = tune(results, task, optimizer, batch, seed, ceiling, plan)
        print(f"{task.name}, {optimizer}, seed {seed}, batch {batch}: {fewest} steps", flush=True)
        ceiling = math.ceil(MORE * fewest)
    measure_to_the_level(results, task, optimizer, seed, plan)


def measure_to_the_level(results: Results, task: Task, optimizer: str, seed: int, plan: Plan) -> None:
    """The best runs of the smallest batch once more, measured until they are at the level."""
    mine = of(results, task.name, optimizer, seed)
    for level, loss in levels(results, task, optimizer, plan).items():
        best = fastest(mine, level).get(plan.batches[0])
        if best is not None:
            setting = measured_to(best, level)
            results.run(task, setting, {level: loss}, setting.measured, "to_the_level")


def measured_to(run: dict[str, Any], level: str) -> Setting:
    """The same run, measured until it is at the level."""
    steps = ROW_EVERY * math.ceil(run[level] / ROW_EVERY)
    return Setting(run["task"], run["optimizer"], run["batch"], run["rate"], run["seed"], steps)


def of(results: Results, task: str, optimizer: str, seed: int) -> list[dict[str, Any]]:
    """The sweep's runs of one task, optimizer and seed."""
    key = (task, optimizer, seed)
    return [r for r in results.parts.get("runs", []) if (r["task"], r["optimizer"], r["seed"]) == key]


# --- what was predicted


def predicted(steps: float, smallest: int, batch: int, critical: float) -> float:
    """steps(B) from those of the smallest batch."""
    return steps * (1 + critical / batch) / (1 + critical / smallest)


def fitted(needed: dict[int, float]) -> float:
    """The B_c with which the law comes closest to all counts, by least squares of the logarithm: known afterwards."""
    smallest = min(needed)

    def misfit(critical: float) -> float:
        wrong = (math.log(predicted(needed[smallest], smallest, b, critical) / s) for b, s in needed.items())
        return sum(error**2 for error in wrong)

    return min((10 ** (power / 100) for power in range(501)), key=misfit)


def predictions(results: Results) -> Iterator[dict[str, Any]]:
    """A row for each task, optimizer, seed, level and batch size above the smallest."""
    for task, optimizer, seed in dict.fromkeys((r["task"], r["optimizer"], r["seed"]) for r in results.parts["runs"]):
        for level in LEVELS:
            best = fastest(of(results, task, optimizer, seed), level)
            smallest = min(best)
            key = {"task": task, "optimizer": optimizer, "seed": seed, "level": level}
            needed = {batch: best[batch][level] for batch in sorted(best)}
            whole = results.find("to_the_level", vars(measured_to(best[smallest], level))) or {}
            sizes = {
                "short": best[smallest]["critical_batch_size"],
                "whole": whole.get("critical_batch_size"),
                "fitted": fitted(needed),
            }
            for batch in list(needed)[1:]:
                row = {**key, "batch": batch, "rate": best[batch]["rate"], "first": needed[smallest]}
                row["needed"] = needed[batch]
                for name, critical in sizes.items():
                    said = math.nan if critical is None else predicted(needed[smallest], smallest, batch, critical)
                    row |= {f"critical_{name}": critical, f"ratio_{name}": said / needed[batch]}
                yield row


def fastest(runs: list[dict[str, Any]], level: str) -> dict[int, dict[str, Any]]:
    """batch → the run that came down to the level in the fewest steps."""
    best: dict[int, dict[str, Any]] = {}
    for row in runs:
        if row[level] is not None and (row["batch"] not in best or row[level] < best[row["batch"]][level]):
            best[row["batch"]] = row
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seconds of blobs, to see that everything works")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with the folders mnist and fashion-mnist")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=("SGD", "Adam"), default=["SGD", "Adam"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("docs"), metavar="DIR", help="folder of tuning.json")
    options = parser.parse_args()
    results, plan = Results(options.output / "tuning.json"), QUICK if options.quick else FULL
    for task in [blobs()] if options.quick else [TASKS[name](options.data) for name in options.tasks]:
        for optimizer in options.optimizers:
            for seed in options.seeds:
                sweep(results, task, optimizer, seed, plan)
    results.replace("predictions", predictions(results))


if __name__ == "__main__":
    main()
