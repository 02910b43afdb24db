"""Can the record of one run say whether the model is too small or too large for its compute?

    python examples/findings/compute_optimal.py --data FOLDER --output docs/findings

Adam at a constant rate, tuned for each width with a seed that is not measured; MLPs with two hidden layers on
Fashion-MNIST (all 60,000 pictures) and transformers of two layers on text. Compute is 6 · parameters · samples
(letters for text). One run serves all budgets that it passes: its held-out loss there is the mean of five looks in
the last tenth, and its record is read as if it ended there. The optimal width of a budget has the lowest loss, mean
over seeds; budgets whose optimum is the smallest or the largest width are left out, as the true one may lie beyond.

Fixed before the runs:

1  At the optimal width, efficiency is the same for all budgets: each within 15 % of their mean, in both families.
2  A number of the record tells too small (narrower than optimal) from too large (wider): with the threshold of all
   other budgets it is right in 80 % of the runs of a budget, in both families. Rival: samples per parameter, which
   needs no record.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from lab import COLOURS, MARKERS, Lab, Options, Row, begin, mean_of
from nets import NETS
from sets import Set, load
from tasks import CONTEXT
from training import rounded
from trainings import Run, Training

FAMILIES: dict[str, dict[str, Any]] = {
    "MLP": {"data": "fashion-mnist", "batch": 64, "rate": 2e-3, "widths": (4, 8, 16, 32, 64, 128), "most": 1300},
    "transformer": {"data": "text", "batch": 32, "rate": 4e-3, "widths": (8, 16, 32, 64, 96), "most": 1400},
}
QUICK, QUICK_BUDGETS = {"MLP": (2, 4, 8)}, (1e5, 2e5, 4e5)
BUDGETS = {"MLP": tuple(0.5e6 * 2**k for k in range(7)), "transformer": tuple(1e6 * 2**k for k in range(4))}
FEWEST, HELD, TUNED_BY = 24, 500, 100
OF_THE_RUN = ("efficiency", "kinematic_efficiency", "straightness", "steadiness", "conversion", "signal_fraction")
OF_THE_LAST_HALF = ("critical_batch_size", "step_headroom", "noise_share")
NUMBERS = (*OF_THE_RUN, *OF_THE_LAST_HALF)
RIVAL = "samples per parameter"
WITHIN, RIGHT = 0.15, 0.8  # of the statements


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = begin(__doc__, parser)
    lab = Lab("compute_optimal", options)
    for net, widths in (
        QUICK if options.quick else {net: family["widths"] for net, family in FAMILIES.items()}
    ).items():
        data = load(FAMILIES[net]["data"], options.data, held=HELD)
        keys = [
            {"net": net, "width": width, "rate": tuned(lab, net, width, data, options), "seed": seed}
            for width in widths
            for seed in options.more.seeds
        ]
        lab.rows("runs", keys, lambda key, data=data: along(key, data, steps_of(key, options), measured=True))
    points = spread(lab.results.parts["runs"])
    lab.results.replace("optimal", optimal(points))
    lab.results.replace("told", told(points))
    print(optimal_table(lab.results.parts["optimal"]), end="\n\n")
    print(told_table(lab.results.parts["told"]))
    draw(lab, points)


def parameters(net: str, width: int) -> int:
    return sum(part.numel() for part in NETS[net](FAMILIES[net]["data"], width=width).parameters())


def steps_of(key: Mapping[str, Any], options: Options) -> dict[int, int]:
    """Budget (its number) → steps of this width, where they are neither too few to measure nor too many to wait for.

    A budget is a number of parameters · steps; its compute 6 · batch · that (· letters of a window).
    """
    count = parameters(key["net"], key["width"])
    budgets = QUICK_BUDGETS if options.quick else BUDGETS[key["net"]]
    found = {at: round(budget / count) for at, budget in enumerate(budgets)}
    return {at: steps for at, steps in found.items() if FEWEST <= steps <= FAMILIES[key["net"]]["most"]}


def tuned(lab: Lab, net: str, width: int, data: Set, options: Options) -> float:
    """Of rates a factor 2 apart the one with the lowest loss at the middle budget; both its neighbours are worse."""
    loss: dict[int, float] = {}

    def tried(power: int) -> float:
        if power not in loss:
            key = {"net": net, "width": width, "rate": FAMILIES[net]["rate"] * 2.0**power, "seed": TUNED_BY}
            budgets = list(steps_of(key, options).items())
            middle = dict(budgets[len(budgets) // 2 :][:1])
            (row,) = lab.rows("tuning", [key], lambda key: along(key, data, middle, measured=False))
            loss[power] = row["loss"][0] if row["loss"][0] is not None else math.inf
        return loss[power]

    best = 0
    while (better := min((best, best + 1, best - 1), key=tried)) != best:
        best = better
    return float(FAMILIES[net]["rate"] * 2.0**best)


def along(key: Mapping[str, Any], data: Set, stops: Mapping[int, int], *, measured: bool) -> Row:
    """One run past its budgets; lists with an entry a budget."""
    family, last = FAMILIES[key["net"]], max(stops.values())
    options = {"width": key["width"]}
    training = Training(
        family["data"], key["net"], "Adam", key["rate"], family["batch"], last, key["seed"], net_options=options
    )
    run = Run(training, data, measured=measured)
    looks = {round(steps * (1 - 0.025 * back)) for steps in stops.values() for back in range(5)}
    rows = sorted({round(steps * part / 8) for steps in stops.values() for part in range(1, 9)})
    losses: dict[int, float] = {}
    found: Row = {"budget": list(stops), "steps": list(stops.values()), "loss": []}
    while run.step < last:
        run.advance()
        if run.step in looks:
            losses[run.step] = run.held_loss()
        if run.meter and run.step in rows:
            run.record.take(run.meter, {"samples": float(training.batch * run.step)})
        if run.step in stops.values():
            near = [losses[step] for step in losses if step >= 0.895 * run.step]
            found["loss"].append(rounded(fmean(near)))
            if run.meter:
                values = run.meter.compute()
                recent = run.record.tuning(after=max(step for step in rows if step <= run.step / 2 + 1))
                for name in NUMBERS:
                    value = values[name] if name in values else recent[name].value
                    found.setdefault(name, []).append(rounded(value))
    if run.meter:
        run.meter.close()
    return found


# --- what it says


def spread(runs: list[Row]) -> list[Row]:
    """A row for each run and budget."""
    found = []
    for run in runs:
        each = {name: values for name, values in run.items() if isinstance(values, list)}
        count = parameters(run["net"], run["width"])
        for at in range(len(run["budget"])):
            point = {name: values[at] for name, values in each.items()}
            samples = point["steps"] * FAMILIES[run["net"]]["batch"] * (CONTEXT if run["net"] == "transformer" else 1)
            point |= {"compute": 6.0 * count * samples, "parameters": count, RIVAL: samples / count}
            found.append({name: run[name] for name in ("net", "width", "seed")} | point)
    return found


def optimal(points: list[Row]) -> list[Row]:
    """Each budget that three widths or more have: the width of the lowest loss, and the numbers there."""
    found = []
    for net, budget in dict.fromkeys((point["net"], point["budget"]) for point in points):
        here = [point for point in points if (point["net"], point["budget"]) == (net, budget)]
        losses = {w: mean_of([p["loss"] for p in here if p["width"] == w]) for w in {p["width"] for p in here}}
        best = min(losses, key=lambda width: losses[width].value)
        there = [point for point in here if point["width"] == best]
        row = {"net": net, "budget": budget, "compute": there[0]["compute"], "width": best, "loss": losses[best].value}
        row |= {"loss_se": losses[best].error, "steps": there[0]["steps"], "widths": len(losses)}
        row["inside"] = min(losses) < best < max(losses)
        for name in (*NUMBERS, RIVAL):
            mean = mean_of([point[name] for point in there])
            row |= {name: mean.value, f"{name}_se": mean.error}
        found.append(row)
    return sorted(found, key=lambda row: (row["net"], row["budget"]))


def told(points: list[Row]) -> list[Row]:
    """Each family and number: how often it tells too small from too large, its threshold taken from other budgets."""
    found = []
    best = {(row["net"], row["budget"]): row["width"] for row in optimal(points) if row["inside"]}
    for net in dict.fromkeys(name for name, _ in best):
        known = [p for p in points if p["net"] == net and (net, p["budget"]) in best]
        known = [
            p | {"larger": p["width"] > best[net, p["budget"]]} for p in known if p["width"] != best[net, p["budget"]]
        ]
        for name in (*NUMBERS, RIVAL):
            shares = []
            for budget in sorted({p["budget"] for p in known}):
                rest = [p for p in known if p["budget"] != budget and p[name] is not None]
                here = [p for p in known if p["budget"] == budget]
                if rest:
                    cut, sign = threshold([p[name] for p in rest], [p["larger"] for p in rest])
                    right = [p[name] is not None and (sign * p[name] > sign * cut) == p["larger"] for p in here]
                    shares.append(fmean(right))
            over = mean_of(shares)
            row = {"net": net, "number": name, "budgets": over.count, "least": min(shares, default=math.nan)}
            found.append(row | {"right": over.value, "right_se": over.error})
    return found


def threshold(values: Sequence[float], larger: Sequence[bool]) -> tuple[float, int]:
    """The cut, and +1 where values above it are too large, −1 where below: most right, both kinds counting alike."""
    order = np.argsort(values)
    sorted_values, kinds = np.asarray(values, dtype=np.float64)[order], np.asarray(larger)[order]
    weights = np.where(kinds, 1 / max(1, kinds.sum()), -1 / max(1, (~kinds).sum()))
    above = weights.sum() - np.cumsum(weights)[:-1]  # of those after each cut
    if not len(above):
        return float(sorted_values[0]), 1
    at = int(np.argmax(np.abs(above)))
    return float(sorted_values[at : at + 2].mean()), 1 if above[at] > 0 else -1


def optimal_table(rows: list[Row]) -> str:
    names = ("efficiency", "straightness", "steadiness", "critical_batch_size")
    head = ("family", "compute", "optimal width", "steps", "loss", *(name.replace("_", " ") for name in names), RIVAL)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        width = f"{row['width']}" if row["inside"] else f"{row['width']} (the edge)"
        cells = [row["net"], f"{row['compute']:.2g}", width, str(row["steps"])]
        cells += [shown(row[name], row[f"{name}_se"]) for name in ("loss", *names)]
        cells.append(f"{row[RIVAL]:.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value: float | None, error: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g} ± {error or 0.0:.1g}"


def told_table(rows: list[Row]) -> str:
    """Share of the runs told rightly, mean over budgets; in brackets the worst budget."""
    if not rows:
        return "No budget has its optimum between two widths."
    nets = list(dict.fromkeys(row["net"] for row in rows))
    lines = [f"| number | {' | '.join(nets)} |", "|---" * (1 + len(nets)) + "|"]
    for name in (*NUMBERS, RIVAL):
        found = {row["net"]: row for row in rows if row["number"] == name}
        cells = [share(found[net]) for net in nets]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share(row: Row) -> str:
    if row["right"] is None:
        return "unknown"
    return f"{row['right']:.0%} ({row['least']:.0%})".replace("%", " %")


def draw(lab: Lab, points: list[Row]) -> None:
    """Loss, efficiency and conversion against parameters, a line a budget; the optimal width is ringed."""
    nets = list(dict.fromkeys(point["net"] for point in points))
    best = {(row["net"], row["budget"]): row["width"] for row in optimal(points)}
    panels = ("loss", "efficiency", "critical_batch_size")
    titles = {"loss": "held-out loss (nats)", "critical_batch_size": "critical batch size (samples)"}
    with lab.picture(len(panels), len(nets), width=3.8, height=3.0) as (drawn, axes):
        for row, net, place in zip(np.atleast_2d(axes), nets, ("upper", "lower"), strict=False):
            for panel, name in zip(row, panels, strict=True):
                for at, budget in enumerate(sorted({p["budget"] for p in points if p["net"] == net})):
                    here = [p for p in points if (p["net"], p["budget"]) == (net, budget)]
                    sizes = sorted({p["width"] for p in here})
                    means = [mean_of([p[name] for p in here if p["width"] == w]) for w in sizes]
                    x = [parameters(net, w) for w in sizes]
                    look: dict[str, Any] = {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)]}
                    compute = f"{here[0]['compute'] / 1e9:.3g}"
                    panel.errorbar(x, [m.value for m in means], [m.error for m in means], label=compute, **look)
                    ringed = sizes.index(best[net, budget])
                    panel.plot(x[ringed], means[ringed].value, "o", ms=11, mfc="none", mec=look["color"])
                panel.set_xscale("log")
                panel.set_yscale("log" if name == "critical_batch_size" else "linear")
                panel.set_title(f"{net}: {titles.get(name, name)}")
                panel.set_xlabel("parameters")
            handles = row[0].get_legend_handles_labels()
            drawn.legend(*handles, loc=f"outside right {place}", title=f"{net},\n10⁹ flop")


if __name__ == "__main__":
    main()
