"""Does it help to multiply the learning rate by the step headroom of a run's first stretch?

    python examples/tuning/headroom.py --data FOLDER [--tasks mnist …] [--output docs]     # after sweep.py
    python examples/tuning/headroom.py --quick

Batch 64; SGD, momentum 0.9, Adam at ⅛, ¼, ½ and all of the rate that was best in the sweep of another seed (momentum: a
tenth of SGD's). The headroom is that of the first 200 steps. It is followed once, from the start again, where it is
told from 1 by a standard error: the rate times the headroom, at most times 4. Where it is NaN because no curvature can
be told from 0, the rate times 4, counted by itself. Counted are steps to the sweep's levels before and after, up to
twelve times those of the sweep's best run. All of this was fixed before any of it was seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sweep import FULL, LEVELS, QUICK, Plan, fastest, levels
from tasks import TASKS, Task, blobs
from training import OPTIMIZERS, Results, Setting

BATCH, MEASURED, MOST = 64, 200, 4.0
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of the best rate
PATIENCE = 12  # times the fewest steps of the sweep
SEED = 10


def cases(results: Results, task: Task, optimizer: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """A row for each rate: before, what the headroom says, and after."""
    swept = "SGD" if optimizer == "momentum" else optimizer
    runs = [r for r in results.parts.get("runs", []) if (r["task"], r["optimizer"], r["seed"]) == (task.name, swept, 0)]
    best = fastest(runs, "far")
    if BATCH not in best:
        raise SystemExit(f"headroom.py got no sweep of {task.name} with {swept} at batch {BATCH}; run sweep.py first")
    wanted = levels(results, task, swept, plan)
    most = round(PATIENCE * best[BATCH]["far"])
    right = best[BATCH]["rate"] * (0.1 if optimizer == "momentum" else 1.0)

    def run(rate: float) -> dict[str, Any]:
        setting = Setting(task.name, optimizer, BATCH, float(f"{rate:.6g}"), SEED, MEASURED)
        return results.run(task, setting, wanted, most, "headroom_runs")

    for share in SHARES:
        before = run(right * share)
        factor = advised(before)
        case = {"task": task.name, "optimizer": optimizer, "share": share, "rate": before["rate"]}
        case |= {"headroom": before["step_headroom"], "headroom_se": before["step_headroom_se"], "factor": factor}
        case |= {f"{level}_before": before[level] for level in LEVELS}
        after = run(right * share * factor) if factor else {}
        yield case | {f"{level}_after": after.get(level) for level in LEVELS}


def advised(run: dict[str, Any]) -> float | None:
    """What the rate is to be multiplied by; None where the headroom is not told from 1, or not known."""
    headroom, error = run["step_headroom"], run["step_headroom_se"]
    if headroom is None:
        return MOST if run["step_headroom_reason"].startswith("the curvature along the updates") else None
    return None if abs(headroom - 1) <= error else min(headroom, MOST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="blobs, to see that everything works")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with the folders mnist and fashion-mnist")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--output", type=Path, default=Path("docs"), metavar="DIR", help="folder of tuning.json")
    options = parser.parse_args()
    results, plan = Results(options.output / "tuning.json"), QUICK if options.quick else FULL
    found = []
    for task in [blobs()] if options.quick else [TASKS[name](options.data) for name in options.tasks]:
        for optimizer in OPTIMIZERS:
            for case in cases(results, task, optimizer, plan):
                found.append(case)
                print(*(f"{name} {value}" for name, value in case.items()), flush=True)
    results.replace("headroom", found)


if __name__ == "__main__":
    main()
