"""Is the diagnosis right? Runs with a known truth: thresholds are fixed on some and judged on others.

    python examples/diagnosis/truth.py [--quick] [--output DIR]

Many settings of SGD, momentum and Adam, each over learning rate × batch, on digits and with a small transformer. An
oracle by plain tensors (`runs.py`) knows what each run spent its work on. The truth of a run is, fixed beforehand,

    nothing    at least half of the work lowered the loss
    noise      else, where batch noise took more than bouncing
    bouncing   else

The thresholds of `lightning_speedlimit.report.diagnosis` come from the digits of seed 0 ("fit"); judged are digits of
seed 1, digits drawn without replacement as a DataLoader does, and the transformer. A second truth asks what would
have helped: which of four times the batch and a third of the learning rate raises the conversion more.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from runs import Problem, Setting, digits, save, train, transformer

from lightning_speedlimit.report import diagnosis

CAUSES = ("noise", "bouncing", "nothing")
USEFUL = 0.5  # of the truth, fixed beforehand
MAX_STEPS = {"digits": 400, "transformer": 150}
KEPT = ("conversion", "signal_fraction", "straightness", "steadiness", "efficiency", "efficiency_action")
KEPT += ("conversion_se", "work_ito", "work_action", "loss_drop", "loss_drop_se", "action", "elapsed", "displacement")
USEFUL_GRID = tuple(round(0.3 + 0.05 * i, 2) for i in range(9))
LEAD_GRID = tuple(round(-0.2 + 0.05 * i, 2) for i in range(9))


def grid(rates: dict[str, Sequence[float]], batches: Sequence[int | None]) -> list[Setting]:
    return [Setting(name, lr, batch) for name, lrs in rates.items() for lr, batch in product(lrs, batches)]


DIGITS = grid(
    {"SGD": (0.033, 0.1, 0.3), "momentum": (0.011, 0.033, 0.1), "Adam": (1.1e-3, 3.3e-3, 1e-2)}, (16, 64, 256, None)
)
EPOCHS = grid({"SGD": (0.033, 0.1, 0.3), "momentum": (0.011, 0.033, 0.1), "Adam": (1.1e-3, 3.3e-3, 1e-2)}, (64, 256))
TRANSFORMER = grid({"SGD": (0.1, 0.3), "momentum": (0.033, 0.1), "Adam": (3.3e-3, 1e-2)}, (4, 16, 64))
QUICK = [Setting("SGD", 0.1, 16), Setting("SGD", 0.3, None), Setting("momentum", 0.033, 256)]


def collect(problem: Problem, settings: Iterable[Setting], *, group: str, seed: int, max_steps: int) -> list[Any]:
    """One entry for each setting: what the meter says, and what is true."""
    found = []
    for setting in settings:
        run = train(problem, setting, seed, max_steps=max_steps, epochs=group == "epochs")
        values = run.record.summary()
        entry: dict[str, Any] = {"group": group, "optimizer": setting.optimizer, "lr": setting.lr}
        entry |= {"batch": setting.batch, "steps": values.steps, "reached": run.reached, "loss": run.loss}
        entry["truth"] = {**run.truth, "cause": true_cause(run.truth)}
        entry["measured"] = {name: getattr(values, name) for name in KEPT}
        entry["told"] = told(diagnosis.diagnose(run.record))
        print(group, setting.name, entry["told"], entry["truth"], flush=True)
        found.append(entry)
    return found


def true_cause(shares: dict[str, float]) -> str:
    if shares["useful"] >= USEFUL:
        return "nothing"
    return "noise" if shares["noise"] > shares["bouncing"] else "bouncing"


def told(findings: Sequence[diagnosis.Finding]) -> str:
    """What the diagnosis says of the work: the first of its findings on it; "nothing" where there is none.

    A loss that rose is bouncing: the curvature took more than the slope gave.
    """
    causes = ["bouncing" if finding.cause == "divergence" else finding.cause for finding in findings]
    if "undefined" in causes:
        return "undefined"
    return next((cause for cause in causes if cause in ("noise", "bouncing")), "nothing")


def fit(runs: Sequence[Any]) -> dict[str, Any]:
    """The thresholds that are right most often; of several, those nearest to no shift of either."""

    def right(useful: float, lead: float) -> int:
        return sum(by_thresholds(run["measured"], useful, lead) == run["truth"]["cause"] for run in runs)

    pairs = list(product(USEFUL_GRID, LEAD_GRID))
    best = max(right(*pair) for pair in pairs)
    good = [pair for pair in pairs if right(*pair) == best]
    useful, lead = min(good, key=lambda pair: math.hypot(pair[0] - USEFUL, pair[1]))
    return {"useful_conversion": useful, "noise_lead": lead, "right": best, "of": len(runs), "as_good": good}


def by_thresholds(values: dict[str, float], useful: float, lead: float) -> str:
    """The rule of the diagnosis, with thresholds of one's own."""
    conversion, signal = values["conversion"], values["signal_fraction"]
    if conversion >= useful:
        return "nothing"
    return "noise" if 1 - 2 * conversion + signal > conversion - signal + lead else "bouncing"


def by_signal_alone(values: dict[str, float], low_signal: float) -> str:
    """What does not work: little signal for noise, much of it for bouncing."""
    if values["conversion"] >= USEFUL:
        return "nothing"
    return "noise" if values["signal_fraction"] < low_signal else "bouncing"


def signal_alone(fitted: Sequence[Any], judged: Sequence[Any]) -> dict[str, Any]:
    """How often the rule without the balance is right, with the threshold that is best on the runs of the fit."""

    def right(runs: Sequence[Any], threshold: float) -> int:
        return sum(by_signal_alone(run["measured"], threshold) == run["truth"]["cause"] for run in runs)

    threshold = max((round(-1 + 0.05 * i, 2) for i in range(41)), key=lambda value: right(fitted, value))
    return {"threshold": threshold, "right": right(judged, threshold), "of": len(judged)}


def confusion(runs: Sequence[Any]) -> dict[str, dict[str, int]]:
    """[what is true][what is told]: runs."""
    counts = Counter((run["truth"]["cause"], run["told"]) for run in runs)
    return {true: {said: counts[true, said] for said in (*CAUSES, "undefined")} for true in CAUSES}


def counterfactual(runs: Sequence[Any]) -> list[dict[str, Any]]:
    """Runs that waste most of their work and have both neighbours: four times the batch, and a third of the rate."""
    found = []
    for run in runs:
        larger = neighbour(runs, run, batch=4 * run["batch"] if run["batch"] else -1, lr=run["lr"])
        slower = neighbour(runs, run, batch=run["batch"], lr=run["lr"] / 3)
        if larger is None or slower is None or run["told"] not in ("noise", "bouncing"):
            continue
        gains = {name: other["measured"]["conversion"] for name, other in (("batch", larger), ("rate", slower))}
        steps = {"steps_batch": larger["steps"], "steps_rate": slower["steps"], "steps": run["steps"]}
        helped = "noise" if gains["batch"] > gains["rate"] else "bouncing"
        name = {key: run[key] for key in ("group", "optimizer", "lr", "batch", "told")}
        found.append(name | {"conversion": run["measured"]["conversion"], **gains, **steps, "helped": helped})
    return found


def neighbour(runs: Sequence[Any], run: Any, *, batch: int | None, lr: float) -> Any:
    """The run of the same group and optimizer there; rates that differ by rounding (0.1/3 and 0.033) are the same."""
    for other in runs:
        same = other["group"] == run["group"] and other["optimizer"] == run["optimizer"] and other["batch"] == batch
        if same and math.isclose(other["lr"], lr, rel_tol=0.05):
            return other
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few settings, to see that everything works")
    parser.add_argument("--output", type=Path, default=Path("docs"), metavar="DIR", help="folder of diagnosis.json")
    options = parser.parse_args()
    started = time.monotonic()
    images, letters = digits(), transformer()
    if options.quick:
        runs = collect(images, QUICK, group="fit", seed=0, max_steps=150)
        runs += collect(letters, [Setting("Adam", 3.3e-3, 16)], group="transformer", seed=1, max_steps=10)
    else:
        runs = collect(images, DIGITS, group="fit", seed=0, max_steps=MAX_STEPS["digits"])
        runs += collect(images, DIGITS, group="digits", seed=1, max_steps=MAX_STEPS["digits"])
        runs += collect(images, EPOCHS, group="epochs", seed=2, max_steps=MAX_STEPS["digits"])
        runs += collect(letters, TRANSFORMER, group="transformer", seed=1, max_steps=MAX_STEPS["transformer"])
    groups = list(dict.fromkeys(run["group"] for run in runs))
    by_group = {group: [run for run in runs if run["group"] == group] for group in groups}
    content = {
        "quick": options.quick,
        "useful_of_the_truth": USEFUL,
        "fit": fit(by_group["fit"]),
        "confusion": {group: confusion(members) for group, members in by_group.items()},
        "by_signal_alone": {group: signal_alone(by_group["fit"], members) for group, members in by_group.items()},
        "counterfactual": counterfactual([run for run in runs if run["group"] != "fit"]),
        "seconds": time.monotonic() - started,
        "runs": runs,
    }
    save(options.output / "diagnosis.json", "truth", content)
    show(content)


def show(content: dict[str, Any]) -> None:
    """The tables of docs/diagnosis.md."""
    print(f"\nthresholds: {content['fit']}\nby signal alone: {content['by_signal_alone']}\n")
    print("| runs, truth | told noise | told bouncing | told nothing | right |\n|---|---|---|---|---|")
    for group, table in content["confusion"].items():
        for true, told_of_it in table.items():
            cells = " | ".join(str(told_of_it[cause]) for cause in CAUSES)
            print(f"| {group}, {true} | {cells} | {told_of_it[true]} of {sum(told_of_it.values())} |")
    rows = content["counterfactual"]
    for cause in ("noise", "bouncing"):
        members = [row for row in rows if row["told"] == cause]
        right = sum(row["helped"] == cause for row in members)
        print(f"told {cause}: its advice raised the conversion more in {right} of {len(members)}")


if __name__ == "__main__":
    main()
