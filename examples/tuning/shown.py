"""The figure and the tables of docs/tuning.md, from tuning.json.

python examples/tuning/shown.py [--output docs]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sweep import LEVELS
from training import Results

from lightning_speedlimit.report.style import COLOURS, GREY, MARKERS, describe, figure, log_axis, number, style

Row = Mapping[str, Any]
WORST = 2.0  # how far off a count may be
SMALLEST = 16  # batch
HIGHEST = 8.0  # steps after / before, of the figure
KINDS = ("short", "whole", "fitted")


# --- sweeps


def off(ratios: Iterable[float]) -> list[float]:
    """By which factor, whatever the side."""
    return [math.exp(abs(math.log(ratio))) for ratio in ratios]


def judged(ratios: Iterable[float | None]) -> tuple[int, float, float, int]:
    """How many are known, by which factor they are off in the median and at worst, how many within 2."""
    factors = off(ratio for ratio in ratios if ratio is not None)
    if not factors:
        return 0, math.nan, math.nan, 0
    return len(factors), median(factors), max(factors), sum(factor <= WORST for factor in factors)


def guesses(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """What was predicted over what was needed: by each B_c, and by two guesses without one."""
    found: dict[str, list[float | None]] = {
        "B_c of the first 300 steps": [row["ratio_short"] for row in rows],
        "B_c of the run to the level": [row["ratio_whole"] for row in rows],
        "as many steps at any batch": [row["first"] / row["needed"] for row in rows],
        "as many samples": [row["first"] / row["needed"] * SMALLEST / row["batch"] for row in rows],
        "B_c fitted to the sweep afterwards": [row["ratio_fitted"] for row in rows],
    }
    return found


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Predictions by level, task and optimizer."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: LEVELS.index(row["level"])):
        found.setdefault((row["level"], row["task"], row["optimizer"]), []).append(row)
    return found


def sweep_table(rows: Sequence[Row]) -> str:
    lines = [
        "| level | task, optimizer | B_c: 300 steps | to the level | fitted | off: 300 steps | to the level | fitted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (level, task, optimizer), mine in groups(rows).items():
        seeds = list({row["seed"]: row for row in mine}.values())
        cells = [sizes(seeds, f"critical_{name}") for name in KINDS]
        for name in KINDS:
            _, middle, worst, _ = judged(row[f"ratio_{name}"] for row in mine)
            cells.append(f"{percent(middle)}, {worst:.2f} ×")
        lines.append(f"| {level} | {task}, {optimizer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes(rows: Sequence[Row], name: str) -> str:
    return ", ".join("not known" if row[name] is None else f"{row[name]:.0f}" for row in rows)


def verdict_table(rows: Sequence[Row]) -> str:
    """Of each way to predict: off by, in the median and at worst, and how many within a factor of 2."""
    columns = {f"{level}, all": [row for row in rows if row["level"] == level] for level in LEVELS}
    for level in LEVELS:
        for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
            columns[f"{level}, {optimizer}"] = [r for r in rows if (r["level"], r["optimizer"]) == (level, optimizer)]
    found = {name: guesses(mine) for name, mine in columns.items()}
    lines = [f"| predicted with | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for guess in found[f"{LEVELS[0]}, all"]:
        cells = []
        for column in found.values():
            known, middle, worst, within = judged(column[guess])
            cells.append(f"{percent(middle)}, {worst:.2f} ×, {within} of {known}")
        lines.append(f"| {guess} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(factor: float) -> str:
    return f"{100 * (factor - 1):.0f} %"


# --- headroom


def saved(case: Row, level: str) -> float | None:
    """Steps after / before; None where one of the two did not get there, or nothing was advised."""
    before, after = case[f"{level}_before"], case[f"{level}_after"]
    return after / before if before and after else None


def outcome(case: Row, level: str) -> str:
    if case["factor"] is None:
        return "left alone"
    ratio = saved(case, level)
    if ratio is not None:
        return f"{ratio:.2f}"
    return "never there, now there" if case[f"{level}_after"] else "not there any more"


def headroom_table(cases: Sequence[Row]) -> str:
    lines = [
        "| task | optimizer | rate | of the best | headroom | followed by | steps before (far) | after / before, near |"
        " after / before, far |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        known = case["headroom"] is not None
        headroom = f"{case['headroom']:.2g} ± {case['headroom_se']:.1g}" if known else "not known"
        factor = f"{case['factor']:.2g}" if case["factor"] else "not"
        before = f"{case['far_before']:.0f}" if case["far_before"] else "never"
        lines.append(
            f"| {case['task']} | {case['optimizer']} | {case['rate']:.3g} | {case['share']:g} | {headroom} | {factor} |"
            f" {before} | {outcome(case, 'near')} | {outcome(case, 'far')} |"
        )
    return "\n".join(lines)


def fell(cases: Sequence[Row], level: str) -> tuple[int, int, float]:
    """In how many the steps fell, of how many followed, and after/before in the median (a run that got lost: ∞)."""
    ratios = [saved(c, level) or (0.0 if c[f"{level}_after"] else math.inf) for c in cases if c["factor"]]
    return sum(ratio < 1 for ratio in ratios), len(ratios), median(ratios) if ratios else math.nan


def headroom_verdict(cases: Sequence[Row]) -> str:
    lines = [
        "| headroom | cases | steps to near fell | after / before | steps to far fell | after / before |",
        "|---|---|---|---|---|---|",
    ]
    kinds = {
        "no curvature to be told": [c for c in cases if c["factor"] and c["headroom"] is None],
        "4 and more": [c for c in cases if c["factor"] and c["headroom"] and c["factor"] >= 4],
        "1 to 4": [c for c in cases if c["factor"] and 1 < c["factor"] < 4],
        "below 1": [c for c in cases if c["factor"] and c["factor"] < 1],
    }
    for name, mine in kinds.items():
        near, far = fell(mine, "near"), fell(mine, "far")
        lines.append(f"| {name} | {len(mine)} | {near[0]} | {near[2]:.2f} | {far[0]} | {far[2]:.2f} |")
    return "\n".join(lines)


# --- figure


def draw(results: Results, path: Path) -> None:
    rows, cases = results.parts["predictions"], results.parts.get("headroom", [])
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    with style():
        drawn, axes = figure(len(tasks), len(optimizers) + 1, height=2.3 * len(optimizers) + 3.0)
        for place, optimizer in enumerate(optimizers):
            for axis, task in zip(axes[place], tasks, strict=True):
                mine = [row for row in rows if (row["task"], row["optimizer"]) == (task, optimizer)]
                _sweep(axis, f"{task}, {optimizer}", mine)
            axes[place, 0].set_ylabel("steps to the level")
        for axis, task in zip(axes[-1], tasks, strict=True):
            _headroom(axis, task, [case for case in cases if case["task"] == task])
        axes[-1, 0].set_ylabel("steps after / before")
        axes[-1, 0].legend(loc="upper right")
        drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        describe(drawn, "Predicted and counted", "Steps to a loss by batch size, and what following the headroom did.")
        drawn.savefig(path, dpi=130)


def _sweep(axis: Any, title: str, rows: Sequence[Row]) -> None:
    """Points: what each batch size needed. Lines: what was predicted; a colour a level, seeds together."""
    heights = []
    for level, colour, marker in zip(LEVELS, COLOURS[1:], MARKERS, strict=False):
        mine = [row for row in rows if row["level"] == level]
        for seed in dict.fromkeys(row["seed"] for row in mine):
            of_seed = [row for row in mine if row["seed"] == seed]
            first, label = of_seed[0]["first"], level if seed == mine[0]["seed"] else None
            batches, needed = [SMALLEST, *(r["batch"] for r in of_seed)], [first, *(r["needed"] for r in of_seed)]
            axis.plot(batches, needed, marker, color=colour, label=label and f"{level}, needed", linestyle="none")
            heights += needed
            for name, line in (("short", "-"), ("whole", ":")):
                said = [first, *((r[f"ratio_{name}"] or math.nan) * r["needed"] for r in of_seed)]
                what = "300 steps" if name == "short" else "run to the level"
                axis.plot(batches, said, line, color=colour, lw=1.0, label=label and f"{level}, by {what}")
                heights += said
    axis.set_title(title)
    axis.set_xlabel("batch size, samples")
    log_axis(axis.xaxis, [SMALLEST, 1024])
    named(axis.xaxis, [SMALLEST, 64, 256, 1024])
    log_axis(axis.yaxis, heights)
    named(axis.yaxis, [tick for tick in (20, 50, 100, 200, 500, 1000) if min(heights) <= tick <= max(heights)])


def _headroom(axis: Any, title: str, cases: Sequence[Row]) -> None:
    """By the factor that the rate was multiplied with; crosses: NaN was taken for 4. Lost runs: at the upper edge."""
    axis.axhline(1.0, color=GREY, lw=1.0)
    for place, optimizer in enumerate(dict.fromkeys(case["optimizer"] for case in cases)):
        for marker, told in ((MARKERS[place], True), ("x", False)):
            mine = [c for c in cases if c["factor"] and c["optimizer"] == optimizer and bool(c["headroom"]) == told]
            ratios = [min(saved(case, "far") or HIGHEST, HIGHEST) for case in mine]
            factors = [case["factor"] for case in mine]
            axis.plot(factors, ratios, marker, color=COLOURS[place], label=optimizer if told else None)
    axis.set_title(title)
    axis.set_xlabel("factor of the rate")
    log_axis(axis.xaxis, [0.5, 4.0])
    log_axis(axis.yaxis, [0.25, HIGHEST])
    named(axis.xaxis, [0.5, 1, 2, 4])
    named(axis.yaxis, [0.25, 0.5, 1, 2, 4, 8])


def named(axis: Any, ticks: Sequence[float]) -> None:
    """These ticks and no others."""
    axis.set_ticks(ticks, [number(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs"), metavar="DIR", help="folder of tuning.json")
    options = parser.parse_args()
    results = Results(options.output / "tuning.json")
    rows, cases = results.parts["predictions"], results.parts.get("headroom", [])
    print(verdict_table(rows), sweep_table(rows), headroom_verdict(cases), headroom_table(cases), sep="\n\n")
    draw(results, options.output / "tuning.png")


if __name__ == "__main__":
    main()
