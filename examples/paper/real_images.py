"""The paper's images at their size: an FCN and a CNN on CIFAR-10, MNIST and Fashion-MNIST by small steps.

    python examples/paper/real_images.py --data FOLDER --output docs/paper    # a quarter of an hour; resumable
    python examples/paper/real_images.py --data FOLDER --quick                # seconds, to see that it works

The networks, the training and what is read from its record are those of `images.py` (five Linear layers; three
convolutions and a Linear layer; PyTorch's start, no preprocessing).

    squared error    FCN: 512 images of CIFAR-10, 256 of the others, 1024 steps; CNN: 256 images, 512 steps. nn.MSELoss,
                     learning rate × λ_1 = 0.1, the full batch, and (one seed of CIFAR-10) batches of 64
    cross entropy    one seed of 10,000 images of CIFAR-10, batches of 500, half that learning rate, 640 steps; and, of
                     the FCN, batches of 100. That was the first run, and the reason for the larger batches: most of its
                     D² may be the noise's

Statements, fixed before the runs. Each is counted over all of its runs, and stands if it holds in all:

    1  A run of the full batch has a first regime (`record.regimes()`) that ends within the first tenth of its steps
       and has a lower η than the next.
    2  At least 0.9 of that regime's loss drop and squared displacement is carried by the ten first modes of the
       kernel at the start (of 60 of the images), one mode per output.
    3  Up to the end of that regime (λ_1 t = 5 where there is none) gradient flow in the network's own kernel, of the
       same images, has η(0, t) to within 10 %; at the end of the run it has not.
    4  Powers λ_k ~ k^−a, r_k² ~ k^−b, fitted to that kernel over as many k as they are fair for, tell the slope of
       its η over this window, (1 − b)/a (0 for b < 1), to 0.1.
    5  Statement 1 holds for cross entropy.

Share of the parameters: the share of each layer in D² before and after the boundary, and the participation
(Σ Δ²)²/(P Σ Δ⁴), the share of the P parameters that D² would be of if so many moved equally far and the others not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import image_sets as sets
import images
import torch
from common import COLOURS, LINES, Options, figure, number, print_table, save_picture
from images import BUILD, CLASSES, Data, Run, Start
from own_kernel import Modes
from power_laws import Spectrum, fit_powers, slopes_over
from torch import Tensor, nn

from lightning_speedlimit.theory import power_law_exponent

NAME = "real_images"
EARLY = 5.0  # λ_1 t, where there is no boundary
CLOSE, SHORT, CARRIED = 0.1, 0.1, 0.9  # of the statements


@dataclass(frozen=True)
class Plan:
    """examples, steps: of squared error. many, many_steps: of cross entropy."""

    examples: dict[tuple[str, str], int]  # of a set and a model
    steps: dict[str, int]
    many: int
    many_steps: int
    batch: int  # of squared error
    many_batch: int
    small_batch: int  # of cross entropy, once
    probed: int
    kernel_images: int
    per_octave: int


FULL = Plan(
    {(name, model): 512 if (name, model) == ("CIFAR-10", "FCN") else 256 for name in sets.SETS for model in BUILD},
    {"FCN": 1024, "CNN": 512},
    many=10_000,
    many_steps=640,
    batch=64,
    many_batch=500,
    small_batch=100,
    probed=2000,
    kernel_images=60,
    per_octave=16,
)
QUICK = Plan({("CIFAR-10", "CNN"): 16, ("MNIST", "FCN"): 12}, {"FCN": 48, "CNN": 48}, 48, 48, 8, 16, 8, 32, 10, 4)


def network(model: str, data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return BUILD[model](data[0])


def squared_error(model: str, batch: int, seed: int, data: Data, plan: Plan) -> sets.Row:
    """One run of nn.MSELoss, and which directions and layers carry it."""
    start = network(model, data, seed)
    before = Start.of(start, data, plan.kernel_images)
    how = replace(images.FULL, steps=plan.steps[model], per_octave=plan.per_octave)
    run = images.train(copy.deepcopy(start), data, before.learning_rate, batch, how, seed, model)
    row = described(run, start, len(data[0])) | {"learning_rate": before.learning_rate, "gap": before.gap}
    row["directions"] = images.directions(start, data, run, row["marked"], plan.kernel_images)
    return row


def cross_entropy(model: str, batch: int, seed: int, data: Data, plan: Plan) -> sets.Row:
    """One run of nn.CrossEntropyLoss by minibatches; η is of the loss on the probe."""
    start = network(model, data, seed)
    before = Start.of(start, data, plan.kernel_images)
    how = replace(images.FULL, steps=plan.many_steps, per_octave=plan.per_octave)
    lr, loss = before.learning_rate / 2, nn.functional.cross_entropy
    run = images.train(copy.deepcopy(start), data, lr, batch, how, seed, model, loss, plan.probed)
    with torch.no_grad():
        right = torch.cat([run_outputs(start, run, part).argmax(1) for part in data[0].split(500)]) == data[1].argmax(1)
    return described(run, start, len(data[0])) | {
        "learning_rate": lr,
        "gap": before.gap,
        "accuracy": right.double().mean(),
    }


def run_outputs(start: nn.Module, run: Run, x: Tensor) -> Tensor:
    """Of the network as it ended."""
    ended = copy.deepcopy(start)
    nn.utils.vector_to_parameters(run.weights[max(run.weights)], ended.parameters())
    return ended(x)


def described(run: Run, start: nn.Module, examples: int) -> sets.Row:
    """What the record says, and where in the weights the motion was, on both sides of the first boundary.

    marked: that boundary, or the log step at the middle of the run where there is none.
    """
    found = images.curves(run)
    first, last = images.flat(start), run.weights[max(run.weights)]
    bounds = images.boundaries(run.record)
    marked = bounds[0] if bounds else images.middle(run)
    sides = {"before": (first, run.weights[marked]), "after": (run.weights[marked], last)}
    for kept in ("regimes", "regimes_with_exact_losses"):
        found[kept] = [[r["first_step"], r["last_step"], r["efficiency"]] for r in found[kept]]
    steps = found["cumulative"]["step"]
    found["cumulative"]["loss_drop"] = run.record.windows(0, steps).loss_drop.tolist()
    found["cumulative"]["squared_displacement"] = [
        (run.weights[step] - first).double().square().sum().item() for step in steps
    ]
    return found | {
        "examples": examples,
        "parameters": len(first),
        "first_loss": run.first_loss,
        "boundary": bounds[0] if bounds else None,
        "marked": marked,
        "loss_at_mark": run.first_loss - float(run.record.windows(0, marked).loss_drop),
        "layers": {side: layer_shares(start, b - a) for side, (a, b) in sides.items()},
        "participation": {side: participation(b - a) for side, (a, b) in sides.items()},
    }


def layer_shares(start: nn.Module, moved: Tensor) -> list[float]:
    """Of each layer, weights and biases, in ‖Δθ‖²."""
    sizes = [sum(part.numel() for part in layer.parameters()) for layer in start.children()]
    parts = moved.double().square().split([size for size in sizes if size])
    return [(part.sum() / moved.double().square().sum()).item() for part in parts]


def participation(moved: Tensor) -> float:
    """(Σ Δ²)²/(P Σ Δ⁴): 1 where all P parameters move equally far, 1/P where one does."""
    squares = moved.double().square()
    return (squares.sum().square() / (len(squares) * squares.square().sum())).item()


def own_kernel(model: str, seed: int, data: Data, run: sets.Row) -> sets.Row:
    """The network's kernel on its images: spectrum, fitted powers, and the flow's η(0, t) at the run's steps."""
    modes = Modes.of(network(model, data, seed), data)
    moving = modes.eigenvalues > 0
    true = Spectrum(modes.eigenvalues[moving].numpy(), modes.residual[moving].square().numpy())
    steps = torch.tensor(run["cumulative"]["step"], dtype=torch.float64)
    predicted = modes.flow(run["learning_rate"] * steps)
    k, rates, strength = true.binned
    return {
        "modes": len(true.eigenvalues),
        "predicted": predicted.efficiency,
        "predicted_loss_drop": predicted.entropy_production,
        "residual_share_of_first_modes": share_before(true, CLASSES),
        **fitted(true),
        "k": k,
        "eigenvalues": rates,
        "squared_residual": strength,
    }


def share_before(true: Spectrum, modes: int) -> float:
    """Of the first modes in Σ r²."""
    return true.squared_residual[:modes].sum() / true.squared_residual.sum()


def fitted(true: Spectrum) -> sets.Row:
    """The powers, and d ln η/d ln t over their window by them and by the true spectrum; "fit" null: none are fair."""
    try:
        fit = fit_powers(true)
    except RuntimeError:
        return {"fit": None, "slope_of_powers": math.nan, "slope": math.nan}
    window = 1 / true.eigenvalues[[fit.first - 1, fit.last - 1]]
    return {
        "fit": asdict(fit),
        "slope_of_powers": power_law_exponent(fit.a, fit.b) if fit.a + fit.b > 1 else math.nan,
        "slope": slopes_over(true, window)["efficiency"],
        "window": window,
        "residual_share_before_window": share_before(true, fit.first - 1),
    }


# --- what the statements ask


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
    until = run["boundary"] or EARLY / images.STEP
    ratios = [a / b - 1 for a, b in zip(measured(run), kernel["predicted"], strict=True)]
    early = [abs(ratio) for step, ratio in zip(run["cumulative"]["step"], ratios, strict=True) if step <= until]
    return max(early), ratios[-1]


def powers_tell(kernel: sets.Row) -> bool:
    slopes = kernel["slope"], kernel["slope_of_powers"]
    return None not in slopes and abs(slopes[0] - slopes[1]) <= CLOSE


def full_batches(rows: sets.Rows, **key: Any) -> list[sets.Row]:
    return [run for run in rows.of("squared error", **key) if run["batch"] == run["examples"]]


def large_batches(rows: sets.Rows, **key: Any) -> list[sets.Row]:
    runs = rows.of("cross entropy", **key)
    return [run for run in runs if run["batch"] == max(run["batch"] for run in runs)]


def diffusion(run: sets.Row) -> float:
    """What η would be by noise alone: D² = lr² Σ‖g‖² of steps that do not add up, η = 1/(steps × conversion)."""
    return 1 / (run["cumulative"]["step"][-1] * run["conversion"])


def verdicts(rows: sets.Rows) -> dict[str, list[bool]]:
    runs = full_batches(rows)
    pairs = [(run, own) for run in runs for own in rows.of("kernel", **key_of(run))]
    off = [departures(*pair) for pair in pairs]
    return {
        "1 short, less optimal": [short_and_less_optimal(run) for run in runs],
        "2 ten first modes": [bool(carried(run)) for run in runs if carried(run) is not None],
        "3 own kernel, early": [early <= CLOSE for early, _ in off],
        "3 own kernel, not at the end": [abs(late) > CLOSE for _, late in off],
        "4 powers": [powers_tell(own) for _, own in pairs],
        "5 cross entropy": [short_and_less_optimal(run) for run in large_batches(rows)],
    }


def key_of(run: sets.Row) -> dict[str, Any]:
    return {name: run[name] for name in ("set", "model", "seed")}


# --- what is shown


def tell(rows: sets.Rows) -> None:
    table: list[Sequence[str]] = [("", "regimes: steps (η)", "loss there", "trough", "at step", "rises ×")]
    for part in ("squared error", "cross entropy"):
        for run in sorted(rows.of(part), key=lambda run: (run["set"], run["model"], -run["batch"], run["seed"])):
            low = run["trough"]
            table.append(
                (
                    f"{run['set']}, {run['model']}, {part}, batch {run['batch']}, seed {run['seed']}",
                    ", ".join(f"{a}–{b} ({number(e or math.nan)})" for a, b, e in run["regimes"]),
                    number(run["loss_at_mark"]),
                    *(number(low[name] or math.nan) for name in ("efficiency", "step", "rise")),
                )
            )
    table += [(""), ("own kernel", "early", "at the end", "a", "b", "slope, by powers")]
    for own in rows.of("kernel"):
        (run,) = full_batches(rows, **key_of(own))
        early, late = departures(run, own)
        slopes = ", ".join(number(value or math.nan, 2) for value in (own["slope"], own["slope_of_powers"]))
        powers = (number(own["fit"][name]) for name in "ab") if own["fit"] else ("none", "none")
        table.append((f"{own['set']}, {own['model']}", f"{early:.1%}", f"{late:+.0%}", *powers, slopes))
    for statement, found in verdicts(rows).items():
        table.append((f"statement {statement}", f"{sum(found)} of {len(found)}"))
    every = [row for part in rows.results.parts.values() for row in part]
    table.append(("processor seconds", f"{sets.seconds(every):.0f}"))
    print_table(table)


def draw(axes: Any, rows: sets.Rows) -> None:
    for row, model in zip(axes, BUILD, strict=True):
        for axis, name in zip(row[:3], sets.SETS, strict=True):
            draw_runs(axis, rows, name, model)
        draw_entropy(row[3], rows, model)
        draw_spectra(row[4], rows, model)
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="lower left")


def draw_runs(axis: Any, rows: sets.Rows, name: str, model: str) -> None:
    """η(0, t) of the seeds, the first one's own kernel, and its batches of 64; vertical: its boundaries."""
    for run in full_batches(rows, set=name, model=model):
        first = run["seed"] == 0
        label = {"label": "full batch; pale: other seeds"} if first else {}
        axis.plot(run["cumulative"]["step"], measured(run), color=COLOURS[1], alpha=1 if first else 0.4, **label)
        for own in rows.of("kernel", **key_of(run)):
            axis.plot(
                run["cumulative"]["step"], own["predicted"], color=COLOURS[0], linestyle="--", label="own kernel's flow"
            )
        if first:
            for regime in run["regimes"][:-1]:
                axis.axvline(regime[1], color="#999999", linewidth=1)
    for run in rows.of("squared error", set=name, model=model):
        if run["batch"] < run["examples"]:
            axis.plot(run["cumulative"]["step"], measured(run), color=COLOURS[2], linestyle=":", label="batches of 64")
    axis.set(xscale="log", yscale="log", xlabel="step t", ylabel="efficiency η(0, t)", ylim=(0.02, 2.5))
    axis.set_title(f"{name}, {model}")


def draw_entropy(axis: Any, rows: sets.Rows, model: str) -> None:
    for k, run in enumerate(large_batches(rows, model=model)):
        windows, whole = run["windows"], run["cumulative"]
        shown = [value if value > 0 else math.nan for value in measured(run)]  # noise has any sign
        axis.plot(whole["step"], shown, color=COLOURS[1], alpha=0.4 if k else 1, label=None if k else "(0, t)")
        label = None if k else "windows (t, 4t)"
        axis.plot(
            windows["first_step"], windows["efficiency"], "o", color=COLOURS[2], alpha=0.4 if k else 1, label=label
        )
    axis.set(xscale="log", yscale="log", xlabel="step t", ylabel="efficiency η", ylim=(0.02, 2.5))
    axis.set_title(f"CIFAR-10, {model}, cross entropy")


def draw_spectra(axis: Any, rows: sets.Rows, model: str) -> None:
    for k, name in enumerate(sets.SETS):
        for own in rows.of("kernel", set=name, model=model, seed=0):
            scale, residual = own["eigenvalues"][0], sum(own["squared_residual"])
            style = {"color": COLOURS[k + 1], "linestyle": LINES[k]}
            axis.plot(own["k"], [value / scale for value in own["eigenvalues"]], label=f"λ, {name}", **style)
            values = [value / residual for value in own["squared_residual"]]
            axis.plot(own["k"], values, "o", color=COLOURS[k + 1], mfc="none", markersize=3, label=f"r², {name}")
    axis.set(xscale="log", yscale="log", xlabel="mode k", ylabel="λ/λ₁, and r² (share)")
    axis.set_title(f"{model}: kernel and residual")


def main() -> None:
    options = sets.begin("η and its regimes, and the networks' own kernels, on real images.", 2)
    images.quieten_lightning()
    run(options, QUICK if options.quick else FULL)


def run(options: Options, plan: Plan) -> None:
    rows = sets.Rows(options.output / f"{NAME}.json")
    for seed in options.more.seeds:
        for (name, model), examples in plan.examples.items():
            data = sets.load(options.more.data, name, examples, seed)
            noisy = (plan.batch,) if (name, seed) == ("CIFAR-10", 0) else ()
            for batch in (examples, *noisy):
                one = {"set": name, "model": model, "seed": seed, "batch": batch}
                found = rows.get("squared error", one, partial(squared_error, model, batch, seed, data, plan))
                if batch == examples and seed == 0:
                    rows.get("kernel", key_of(one), partial(own_kernel, model, seed, data, found))
    if 0 in options.more.seeds:
        data = sets.load(options.more.data, "CIFAR-10", plan.many, 0)
        for model, batch in (("FCN", plan.small_batch), *((model, plan.many_batch) for model in BUILD)):
            one = {"set": "CIFAR-10", "model": model, "seed": 0, "batch": batch}
            rows.get("cross entropy", one, partial(cross_entropy, model, batch, 0, data, plan))
    tell(rows)
    with figure(5, 2, width=3.2, height=3.0) as (drawn, axes):
        draw(axes, rows)
        save_picture(drawn, options.output / f"{NAME}.png")
    print(f"\n{NAME}.png and {NAME}.json in {options.output}")


if __name__ == "__main__":
    main()
