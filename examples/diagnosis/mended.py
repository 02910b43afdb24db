"""Does the advice help? Each finding's run, and the same after each piece of advice, until the same loss.

    python examples/diagnosis/mended.py [--quick] [--output DIR]

Runs end at the first look, every 5 steps, at which the loss on all data is at most the target: digits 0.15,
transformer 2.4, or what the case says. Batches are independent; numbers are means over seeds. Where what was advised
did not help, the advice was changed or dropped: docs/diagnosis.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from runs import Problem, Run, Setting, digits, replace, save, train, transformer

from lightning_speedlimit.report.diagnosis import diagnose

SHOWN = ("action", "straightness", "steadiness", "conversion", "signal_fraction", "kinematic_efficiency", "efficiency")
HEAD = (
    "setting",
    "steps",
    "examples",
    "action",
    "conversion",
    "straightness",
    "steadiness",
    "efficiency",
    "told first",
)
SEEDS = {"digits": (10, 11), "transformer": (10, 11)}
MAX_STEPS = {"digits": 3500, "transformer": 600}


@dataclass(frozen=True)
class Case:
    """A run in which something is low, and what was tried: name → setting."""

    cause: str
    problem: str
    before: Setting
    tried: dict[str, Setting]
    target: float | None = None
    """Loss on all data at which its runs end; None: the problem's."""


SGD, MOMENTUM, ADAM = "SGD", "momentum", "Adam"
DIGITS, TRANSFORMER = "digits", "transformer"
CASES = (
    Case(
        "noise",
        DIGITS,
        Setting(SGD, 0.1, 16),
        {
            "momentum 0.9, lr / 10": Setting(MOMENTUM, 0.01, 16),
            "batch x 4": Setting(SGD, 0.1, 64),
            "lr / 3": Setting(SGD, 0.033, 16),
            "lr decays linearly": Setting(SGD, 0.1, 16, schedule="decay", horizon=1000),
        },
    ),
    Case(
        "noise",
        DIGITS,
        Setting(ADAM, 3.3e-3, 16),
        {
            "batch x 4": Setting(ADAM, 3.3e-3, 64),
            "beta_1 0.97": Setting(ADAM, 3.3e-3, 16, beta=0.97),
            "lr / 3": Setting(ADAM, 1.1e-3, 16),
            "lr decays linearly": Setting(ADAM, 3.3e-3, 16, schedule="decay", horizon=400),
        },
    ),
    Case(
        "noise",
        TRANSFORMER,
        Setting(SGD, 0.2, 4),
        {
            "momentum 0.9, lr / 10": Setting(MOMENTUM, 0.02, 4),
            "batch x 4": Setting(SGD, 0.2, 16),
        },
    ),
    Case(
        "noise",
        TRANSFORMER,
        Setting(ADAM, 3.3e-3, 4),
        {
            "batch x 4": Setting(ADAM, 3.3e-3, 16),
            "beta_1 0.97": Setting(ADAM, 3.3e-3, 4, beta=0.97),
            "lr / 3": Setting(ADAM, 1.1e-3, 4),
            "lr decays linearly": Setting(ADAM, 3.3e-3, 4, schedule="decay", horizon=200),
        },
    ),
    Case(
        "bouncing",
        DIGITS,
        Setting(SGD, 0.3, 256),
        {
            "momentum 0.9, lr / 10": Setting(MOMENTUM, 0.03, 256),
            "lr / 3": Setting(SGD, 0.1, 256),
            "batch x 4": Setting(SGD, 0.3, 1024),
        },
    ),
    Case(
        "bouncing",
        DIGITS,
        Setting(MOMENTUM, 0.2, 256),
        {
            "lr / 3": Setting(MOMENTUM, 0.067, 256),
            "momentum 0.5": Setting(MOMENTUM, 0.2, 256, beta=0.5),
            "batch x 4": Setting(MOMENTUM, 0.2, 1024),
        },
    ),
    Case(
        "bouncing",
        TRANSFORMER,
        Setting(SGD, 0.3, 64),
        {
            "momentum 0.9, lr / 10": Setting(MOMENTUM, 0.03, 64),
            "lr / 3": Setting(SGD, 0.1, 64),
        },
    ),
    Case(
        "bouncing",
        TRANSFORMER,
        Setting(MOMENTUM, 0.4, 64),
        {
            "lr / 3": Setting(MOMENTUM, 0.13, 64),
            "momentum 0.5": Setting(MOMENTUM, 0.4, 64, beta=0.5),
        },
    ),
    Case(
        "uneven speed",
        DIGITS,
        Setting(MOMENTUM, 0.03, 256, schedule="exponential", horizon=250),
        {
            "constant, lr / 3": Setting(MOMENTUM, 0.01, 256),
            "the same over twice the steps": Setting(MOMENTUM, 0.03, 256, schedule="exponential", horizon=500),
        },
    ),
    Case(
        "uneven speed",
        TRANSFORMER,
        Setting(ADAM, 3.3e-3, 16, schedule="exponential", horizon=50),
        {
            "constant, lr / 3": Setting(ADAM, 1.1e-3, 16),
            "the same over twice the steps": Setting(ADAM, 3.3e-3, 16, schedule="exponential", horizon=100),
        },
    ),
    Case(
        "uneven speed",
        DIGITS,
        Setting(MOMENTUM, 0.05, None),
        {
            "lr rises fivefold to it": Setting(MOMENTUM, 0.05, None, schedule="rise", horizon=800),
            "lr rises fivefold to twice it": Setting(MOMENTUM, 0.1, None, schedule="rise", horizon=600),
        },
        target=0.005,
    ),
    Case(
        "curved path",
        DIGITS,
        Setting(MOMENTUM, 0.03, 512),
        {
            "batch x 4": Setting(MOMENTUM, 0.03, None),
            "lr / 3": Setting(MOMENTUM, 0.01, 512),
            "Adam": Setting(ADAM, 1e-3, 512),
        },
        target=0.01,
    ),
    Case(
        "curved path",
        TRANSFORMER,
        Setting(ADAM, 1.1e-3, 16),
        {
            "batch x 4": Setting(ADAM, 1.1e-3, 64),
            "lr / 3": Setting(ADAM, 3.7e-4, 16),
            "momentum": Setting(MOMENTUM, 0.03, 64),
        },
        target=2.2,
    ),
)
QUICK = (Case("noise", "digits", Setting(SGD, 0.1, 16), {"batch x 4": Setting(SGD, 0.1, 64)}),)


def row(problem: Problem, setting: Setting, seeds: Sequence[int], max_steps: int) -> dict[str, Any]:
    """Means over seeds; `told`: the causes that the diagnosis of each run names."""
    done = [train(problem, setting, seed, max_steps=max_steps, oracle=False) for seed in seeds]
    summaries = [run.record.summary() for run in done]
    steps = np.array([summary.steps for summary in summaries])
    found: dict[str, Any] = {"setting": setting.name, "steps": steps.mean(), "steps_se": standard_error(steps)}
    found["examples"] = found["steps"] * (setting.batch or problem.size)
    found |= {name: np.mean([getattr(summary, name) for summary in summaries]) for name in SHOWN}
    found["reached"] = all(run.reached for run in done)
    return found | {"told": [causes(run) for run in done]}


def standard_error(values: Any) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def causes(run: Run) -> list[str]:
    return [finding.cause for finding in diagnose(run.record)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one case and seed, to see that everything works")
    parser.add_argument("--output", type=Path, default=Path("docs"), metavar="DIR", help="folder of diagnosis.json")
    options = parser.parse_args()
    started = time.monotonic()
    problems = {problem.name: problem for problem in (digits(), transformer())}
    results = []
    for case in QUICK if options.quick else CASES:
        problem = problems[case.problem]
        if case.target is not None:
            problem = replace(problem, target=case.target)
        seeds = SEEDS[case.problem][:1] if options.quick else SEEDS[case.problem]
        most = 60 if options.quick else MAX_STEPS[case.problem]
        rows = {
            name: row(problem, setting, seeds, most) for name, setting in {"before": case.before, **case.tried}.items()
        }
        results.append({"cause": case.cause, "problem": case.problem, "target": problem.target, "rows": rows})
        print(f"{case.problem}, {case.cause}: {len(rows)} settings, {time.monotonic() - started:.0f} s", flush=True)
    content = {"quick": options.quick, "seeds": SEEDS, "cases": results, "seconds": time.monotonic() - started}
    save(options.output / "diagnosis.json", "mended", content)
    show(results)


def show(results: Sequence[dict[str, Any]]) -> None:
    """The table of docs/diagnosis.md: each case begins with the run before, in bold."""
    print(f"\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for case in results:
        for name, numbers in case["rows"].items():
            print(f"| {' | '.join(cells(case, name, numbers))} |")


def cells(case: dict[str, Any], name: str, numbers: dict[str, Any]) -> list[str]:
    """One row of the table."""
    steps = f"{numbers['steps']:.0f}" + ("" if numbers["reached"] else " (not reached)")
    factors = [f"{numbers[key]:.2f}" for key in ("straightness", "steadiness", "efficiency")]
    told = ", ".join(dict.fromkeys(causes[0] for causes in numbers["told"]))
    before = f"**{case['cause']}, {case['problem']} to {case['target']:g}: {numbers['setting']}**"
    setting = before if name == "before" else f"{name}: {numbers['setting']}"
    return [
        setting,
        steps,
        f"{numbers['examples']:,.0f}",
        f"{numbers['action']:.3g}",
        f"{numbers['conversion']:.2f}",
        *factors,
        told,
    ]


if __name__ == "__main__":
    main()
