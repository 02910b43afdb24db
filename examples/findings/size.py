"""Does efficiency scale with size? Four widths × four depths, each at its own best rate, at equal loss.

    python examples/findings/size.py --data FOLDER --output docs/paper

SGD with momentum 0.9, batch 64, 10,000 pictures: an MLP on Fashion-MNIST until the held-out loss is 0.6, a CNN on
CIFAR-10 until it is 1.9. A size's rate is the one that gets there in the fewest steps, of those a factor 2 apart,
with a seed that is not measured.

Fixed before the runs. y = c · width^a · depth^b over the 16 sizes of a family (means over seeds), errors by leaving
out one size at a time:

1  Efficiency does not scale with size: the 95 % intervals of a and of b lie within ±0.1, in both families.
2  Displacement does not scale with width, |a| ≤ 0.1, so that relative to θ_0 it falls as width^−½: a = −0.5 ± 0.15.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from lab import COLOURS, LINES, MARKERS, Lab, Mean, Options, Row, begin, mean_of
from scipy import stats
from sets import Set, load
from trainings import Run, Training, flat

FAMILIES = {
    "MLP": {"data": "fashion-mnist", "widths": (16, 32, 64, 128), "level": 0.6},
    "CNN": {"data": "cifar10", "widths": (2, 4, 8, 16), "level": 1.9},
}
QUICK = {"MLP": 2.1, "CNN": 2.2}  # levels
DEPTHS = (1, 2, 3, 4)
RATE, BATCH, EXAMPLES, HELD, MOST, LOOK_EVERY, TUNED_BY = 0.02, 64, 10_000, 500, 1500, 5, 100
NOTED = ("efficiency", "kinematic_efficiency", "straightness", "steadiness", "conversion", "displacement")
FITTED = (*NOTED, "relative_displacement", "steps", "critical_batch_size")
WITHIN, HALF = 0.1, 0.15  # of the statements


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5, help="of the four corners; three of the other sizes")
    options = begin(__doc__, parser)
    lab, sets = Lab("size", options), dict[str, Set]()
    levels = QUICK if options.quick else {net: family["level"] for net, family in FAMILIES.items()}

    def data(net: str) -> Set:
        name = FAMILIES[net]["data"]
        return sets[name] if name in sets else sets.setdefault(name, load(name, options.data, EXAMPLES, HELD))

    rates = {size: tuned(lab, size, levels[size[0]], data) for size in sizes(options)}

    def compute(key: Mapping[str, Any]) -> Row:
        return measured(key, levels[key["net"]], data(key["net"]))

    keys = [
        {"net": net, "width": width, "depth": depth, "rate": rate, "seed": seed}
        for (net, width, depth), rate in rates.items()
        for seed in range(seeds(net, width, depth, options))
    ]
    rows = lab.rows("runs", keys, compute)
    lab.results.replace("exponents", [fit for net in FAMILIES for fit in exponents(rows, net)])
    three = ("width", "depth", "rate")  # of the tuned rates what is theirs
    lab.results.replace("with rate", [fit for net in FAMILIES for fit in exponents(rows, net, three)])
    print(size_table(rows), end="\n\n")
    print(exponent_table(lab.results.parts["exponents"]), end="\n\n")
    print(exponent_table(lab.results.parts["with rate"], three))
    draw(lab, rows)


Size = tuple[str, int, int]


def sizes(options: Options) -> list[Size]:
    """Family, width, depth."""
    few = slice(0, 2) if options.quick else slice(None)
    return [(net, width, depth) for net in FAMILIES for width in FAMILIES[net]["widths"][few] for depth in DEPTHS[few]]


def seeds(net: str, width: int, depth: int, options: Options) -> int:
    corner = width in FAMILIES[net]["widths"][::3] and depth in DEPTHS[::3]
    return options.more.seeds if corner else min(3, options.more.seeds)


def tuned(lab: Lab, size: Size, level: float, data: Callable[[str], Set]) -> float:
    """Of the rates that are powers of two times the first one, the one that gets to the level soonest.

    From the first one on, a step up or down at a time, until both neighbours are slower. A run is given up when it
    has taken as many steps as the best one.
    """
    net, width, depth = size
    cost: dict[int, float] = {}

    def tried(power: int) -> float:
        if power not in cost:
            most = int(min([MOST, *cost.values()]))
            key = {"net": net, "width": width, "depth": depth, "rate": RATE * 2.0**power, "seed": TUNED_BY}

            def compute(key: Mapping[str, Any]) -> Row:
                run = trained(key, level, data(net), most, measured=False)
                return {"given_up": most, "steps": run.step if came_to(level, run) else math.inf}

            (row,) = lab.rows("tuning", [key], compute)
            cost[power] = math.inf if row["steps"] is None else row["steps"]
        return cost[power]

    best = 0
    while (better := min((best, best + 1, best - 1), key=tried)) != best:
        best = better
    return RATE * 2.0**best


def trained(key: Mapping[str, Any], level: float, data: Set, most: int, *, measured: bool) -> Run:
    options = {"width": key["width"], "depth": key["depth"]}
    training = Training(data.name, key["net"], "momentum", key["rate"], BATCH, most, key["seed"], net_options=options)
    run = Run(training, data, measured=measured)
    return run.go(rows=most // 10, looks=most // LOOK_EVERY, level=level)


def came_to(level: float, run: Run) -> bool:
    return not math.isnan(run.course.passed(level))


def measured(key: Mapping[str, Any], level: float, data: Set) -> Row:
    """One run to the level, and what its meter says there."""
    run = trained(key, level, data, MOST, measured=True)
    assert run.meter is not None
    values, now = run.meter.compute(), flat(run.network)
    start = flat(Run(run.training, data, measured=False).network)
    return {
        "parameters": len(now),
        "steps": run.step,
        "arrived": came_to(level, run),
        **{name: values[name] for name in NOTED},
        "relative_displacement": ((now - start).norm() / start.norm()).item(),
        "critical_batch_size": run.record.tuning()["critical_batch_size"].value,
    }


# --- what it says


def cells(rows: list[Row], net: str, name: str) -> dict[tuple[int, int], Mean]:
    """(width, depth) → mean over the seeds that came to the level."""
    found: dict[tuple[int, int], list[float | None]] = {}
    for row in rows:
        if row["net"] == net and row["arrived"]:
            found.setdefault((row["width"], row["depth"]), []).append(row[name])
    return {size: mean_of(values) for size, values in found.items()}


def exponents(rows: list[Row], net: str, by: tuple[str, ...] = ("width", "depth")) -> list[Row]:
    """a and b of y = c · width^a · depth^b, with jackknife errors over the sizes and the residual's spread."""
    found = []
    rates = {(row["width"], row["depth"]): row["rate"] for row in rows if row["net"] == net}
    for name in FITTED:
        known = [
            (*({"width": w, "depth": d, "rate": rates[w, d]}[part] for part in by), mean.value)
            for (w, d), mean in cells(rows, net, name).items()
            if mean.value > 0
        ]
        if len(known) <= 1 + len(by):  # one is left out
            continue
        logs = np.log(np.array(known, dtype=np.float64))
        design = np.column_stack([np.ones(len(logs)), logs[:, :-1]])
        fit = np.linalg.lstsq(design, logs[:, -1], rcond=None)[0]
        left = [np.arange(len(logs)) != out for out in range(len(logs))]
        parts = np.array([np.linalg.lstsq(design[keep], logs[keep, -1], rcond=None)[0] for keep in left])
        error = np.sqrt((len(parts) - 1) / len(parts) * ((parts - parts.mean(0)) ** 2).sum(0))
        half = stats.t.ppf(0.975, len(parts) - 1) * error
        scatter = float(np.std(logs[:, -1] - design @ fit))
        row = {"net": net, "quantity": name, "sizes": len(logs), "scatter": scatter}
        for at, part in enumerate(by, 1):
            row |= {part: float(fit[at]), f"{part}_se": float(error[at]), f"{part}_half": float(half[at])}
        found.append(row)
    return found


def size_table(rows: list[Row]) -> str:
    names = ("efficiency", "straightness", "steadiness", "conversion", "displacement", "steps")
    lines = [f"| family, width × depth | rate | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for net, width, depth in dict.fromkeys((row["net"], row["width"], row["depth"]) for row in rows):
        cell = [row for row in rows if (row["net"], row["width"], row["depth"]) == (net, width, depth)]
        values = [str(mean_of([row[name] if row["arrived"] else None for row in cell])) for name in names]
        lines.append(f"| {net}, {width} × {depth} | {cell[0]['rate']:g} | {' | '.join(values)} |")
    return "\n".join(lines)


def exponent_table(fits: list[Row], by: tuple[str, ...] = ("width", "depth")) -> str:
    """Exponents with the half width of their 95 % intervals."""
    lines = ["| quantity | " + " | ".join(f"{net}, {part}" for net in FAMILIES for part in by) + " |"]
    lines.append("|---" * (1 + len(by) * len(FAMILIES)) + "|")
    for name in FITTED:
        found = {fit["net"]: fit for fit in fits if fit["quantity"] == name}
        values = [
            f"{found[net][part]:.2f} ± {found[net][part + '_half']:.2f}" if net in found else "unknown"
            for net in FAMILIES
            for part in by
        ]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(values)} |".replace("| -", "| −"))
    return "\n".join(lines)


def draw(lab: Lab, rows: list[Row]) -> None:
    """Efficiency, straightness and displacement against width, a line a depth; MLP above, CNN below."""
    with lab.picture(3, 2, width=3.6, height=2.8) as (drawn, axes):
        for at, net in enumerate(FAMILIES):
            for panel, name in zip(axes[at], ("efficiency", "straightness", "displacement"), strict=True):
                found = cells(rows, net, name)
                for number, depth in enumerate(sorted({d for _, d in found})):
                    points = [(w, mean) for (w, d), mean in sorted(found.items()) if d == depth]
                    panel.errorbar(
                        [w * 1.02**number for w, _ in points],
                        [mean.value for _, mean in points],
                        [mean.error for _, mean in points],
                        color=COLOURS[number],
                        marker=MARKERS[number],
                        ls=LINES[number],
                        label=f"depth {depth}",
                    )
                panel.set_xscale("log", base=2)
                panel.set_ylim(bottom=0)
                widths = sorted({w for w, _ in found})
                panel.set_xticks(widths, [str(w) for w in widths])
                panel.minorticks_off()
                unit = " (parameter)" if name == "displacement" else ""
                panel.set_title(f"{net}, {FAMILIES[net]['data']}: {name}{unit}")
                panel.set_xlabel("width: neurons" if net == "MLP" else "width: channels of the first layer")
        drawn.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


if __name__ == "__main__":
    main()
