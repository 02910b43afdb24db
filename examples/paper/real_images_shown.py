"""What the runs of `real_images.py` show: its statements' verdicts, its tables, its figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import image_sets as sets
from common import COLOURS, LINES, number, print_table
from images import BUILD, STEP
from lab import mean_of

EARLY = 5.0  # λ_1 t, where there is no boundary
CLOSE, SHORT, CARRIED = 0.1, 0.1, 0.9  # of the statements


def key_of(run: sets.Row) -> dict[str, Any]:
    return {name: run[name] for name in ("set", "model", "seed")}


def measured(run: sets.Row) -> list[float]:
    """η(0, t) = D²/(lr t Q) with D² of the weights themselves, not of a sketch; NaN where the loss did not move."""
    found = run["cumulative"]
    rows = zip(found["step"], found["squared_displacement"], found["loss_drop"], strict=True)
    return [squared / (run["learning_rate"] * step * drop) if drop else math.nan for step, squared, drop in rows]


def short_and_less_optimal(run: sets.Row) -> bool:
    regimes = run["regimes"]
    if len(regimes) < 2 or None in (regimes[0][2], regimes[1][2]):
        return False
    return regimes[0][1] <= SHORT * regimes[-1][1] and regimes[0][2] < regimes[1][2]


def carried(run: sets.Row) -> bool | None:
    """None: no boundary."""
    parts = run["directions"]["before"]
    return run["boundary"] and min(parts["loss_drop"], parts["squared_displacement"]) >= CARRIED


def departures(run: sets.Row, kernel: sets.Row) -> tuple[float, float]:
    """The largest |η measured/predicted − 1| up to the boundary, or λ_1 t = 5, and that at the end."""
    # lr·λ_1 is 0.1 for the kernel of some images; that of all has another λ_1 by a little.
    until = run["boundary"] or EARLY / STEP
    ratios = [a / b - 1 for a, b in zip(measured(run), kernel["predicted"], strict=True)]
    early = [abs(ratio) for step, ratio in zip(run["cumulative"]["step"], ratios, strict=True) if step <= until]
    return max(early), ratios[-1]


def powers_tell(kernel: sets.Row) -> bool:
    slopes = kernel["slope"], kernel["slope_of_powers"]
    return None not in slopes and abs(slopes[0] - slopes[1]) <= CLOSE


def whole(lab: sets.Lab, **key: Any) -> list[sets.Row]:
    return [run for run in lab.of("squared error", **key) if run["batch"] == run["examples"]]


def large_batches(lab: sets.Lab, **key: Any) -> list[sets.Row]:
    runs = lab.of("cross entropy", **key)
    return [run for run in runs if run["batch"] == max(run["batch"] for run in runs)]


def diffusion(run: sets.Row) -> float:
    """What η would be by noise alone: D² = lr² Σ‖g‖² of steps that do not add up, η = 1/(steps × conversion)."""
    return 1 / (run["cumulative"]["step"][-1] * run["conversion"])


def verdicts(lab: sets.Lab) -> dict[str, list[bool]]:
    runs = whole(lab)
    pairs = [(run, own) for run in runs for own in lab.of("kernel", **key_of(run))]
    off = [departures(*pair) for pair in pairs]
    return {
        "1 short, less optimal": [short_and_less_optimal(run) for run in runs],
        "2 ten first modes": [bool(carried(run)) for run in runs if carried(run) is not None],
        "3 own kernel, early": [early <= CLOSE for early, _ in off],
        "3 own kernel, not at the end": [abs(late) > CLOSE for _, late in off],
        "4 powers": [powers_tell(own) for _, own in pairs],
        "5 cross entropy": [short_and_less_optimal(run) for run in large_batches(lab)],
    }


# --- what is shown


def tell(lab: sets.Lab) -> None:
    table: list[Sequence[str]] = [("", "regimes: steps (η)", "loss there", "trough", "at step", "rises ×")]
    for part in ("squared error", "cross entropy"):
        for run in sorted(lab.of(part), key=lambda run: (run["set"], run["model"], -run["batch"], run["seed"])):
            low = run["trough"]
            table.append(
                (
                    f"{run['set']}, {run['model']}, {part}, batch {run['batch']}, seed {run['seed']}",
                    ", ".join(f"{a}–{b} ({number(e or math.nan)})" for a, b, e in run["regimes"]),
                    number(run["loss_at_mark"]),
                    *(number(low[name] or math.nan) for name in ("efficiency", "step", "rise")),
                )
            )
    table += kernel_rows(lab)
    for statement, found in verdicts(lab).items():
        table.append((f"statement {statement}", f"{sum(found)} of {len(found)}"))
    table.append(("processor seconds", f"{lab.seconds:.0f}"))
    print_table(table)


def kernel_rows(lab: sets.Lab) -> list[Sequence[str]]:
    """Of each kernel, and means over the seeds with their standard errors."""
    table: list[Sequence[str]] = [(""), ("own kernel", "early", "at the end", "a", "b", "slope", "by powers")]
    for name, model in dict.fromkeys((own["set"], own["model"]) for own in lab.of("kernel")):
        kernels = lab.of("kernel", set=name, model=model)
        for own in kernels:
            early, late = departures(whole(lab, **key_of(own))[0], own)
            cells = (number(value, 2) for value in powers_of(own))
            table.append((f"{name}, {model}, seed {own['seed']}", f"{early:.1%}", f"{late:+.0%}", *cells))
        means = [str(mean_of(values)) for values in zip(*map(powers_of, kernels), strict=True)]
        table.append((f"{name}, {model}", "", "", *means))
    return table


def powers_of(own: sets.Row) -> list[float]:
    """a, b, the slope of η over their window, and that by them; NaN where no powers are fair."""
    fit = own["fit"] or {}
    found = fit.get("a"), fit.get("b"), own["slope"], own["slope_of_powers"]
    return [math.nan if value is None else value for value in found]


def draw(axes: Any, lab: sets.Lab) -> None:
    for row, model in zip(axes, BUILD, strict=True):
        for axis, name in zip(row[:3], sets.SETS, strict=True):
            draw_runs(axis, lab, name, model)
        draw_entropy(row[3], lab, model)
        draw_spectra(row[4], lab, model)
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="lower left")


def draw_runs(axis: Any, lab: sets.Lab, name: str, model: str) -> None:
    """η(0, t) of the seeds, the first one's own kernel, and its batches of 64; vertical: its boundaries."""
    for run in whole(lab, set=name, model=model):
        first = run["seed"] == 0
        label = {"label": "full batch; pale: other seeds"} if first else {}
        axis.plot(run["cumulative"]["step"], measured(run), color=COLOURS[1], alpha=1 if first else 0.4, **label)
        if first:
            (own,) = lab.of("kernel", **key_of(run))
            steps = run["cumulative"]["step"]
            axis.plot(steps, own["predicted"], color=COLOURS[0], linestyle="--", label="own kernel's flow")
            for regime in run["regimes"][:-1]:
                axis.axvline(regime[1], ymin=0.3, color="#999999", linewidth=1)
    for run in lab.of("squared error", set=name, model=model):
        if run["batch"] < run["examples"]:
            axis.plot(run["cumulative"]["step"], measured(run), color=COLOURS[2], linestyle=":", label="batches of 64")
    axis.set(xscale="log", yscale="log", xlabel="step t", ylabel="efficiency η(0, t)", ylim=(0.02, 2.5))
    axis.set_title(f"{name}, {model}")


def draw_entropy(axis: Any, lab: sets.Lab, model: str) -> None:
    for k, run in enumerate(large_batches(lab, model=model)):
        windows, whole = run["windows"], run["cumulative"]
        shown = [value if value > 0 else math.nan for value in measured(run)]  # noise has any sign
        axis.plot(whole["step"], shown, color=COLOURS[1], alpha=0.4 if k else 1, label=None if k else "(0, t)")
        label = None if k else "windows (t, 4t)"
        axis.plot(
            windows["first_step"], windows["efficiency"], "o", color=COLOURS[2], alpha=0.4 if k else 1, label=label
        )
    axis.set(xscale="log", yscale="log", xlabel="step t", ylabel="efficiency η", ylim=(0.02, 2.5))
    axis.set_title(f"CIFAR-10, {model}, cross entropy")


def draw_spectra(axis: Any, lab: sets.Lab, model: str) -> None:
    for k, name in enumerate(sets.SETS):
        for own in lab.of("kernel", set=name, model=model, seed=0):
            scale, residual = own["eigenvalues"][0], sum(own["squared_residual"])
            style = {"color": COLOURS[k + 1], "linestyle": LINES[k]}
            axis.plot(own["k"], [value / scale for value in own["eigenvalues"]], label=f"λ, {name}", **style)
            values = [value / residual for value in own["squared_residual"]]
            axis.plot(own["k"], values, "o", color=COLOURS[k + 1], mfc="none", markersize=3, label=f"r², {name}")
    axis.set(xscale="log", yscale="log", xlabel="mode k", ylabel="λ/λ₁, and r² (share)")
    axis.set_title(f"{model}: kernel and residual")
