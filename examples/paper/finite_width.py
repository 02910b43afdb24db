"""Finite width against the tangent kernel on CIFAR-10: how the departure of η falls.

    python examples/paper/finite_width.py --data FOLDER --output docs/paper    # some minutes; resumable
    python examples/paper/finite_width.py --data FOLDER --quick                # seconds, to see that it works

24 images (12 for the CNN), one-hot labels, nn.MSELoss, He's start, full-batch descent in float64 with learning rate ×
λ_1 = 0.1 until λ_1 t = 6; λ_1 is the largest rate of the network's own kernel at the start. Five seeds, each with its
own images and weights. An FCN with two hidden layers of 32 … 2048, and the CNN of `images.py` with 4 … 64 channels
(twice as many in its second and third layer). The prediction is that of so many steps in the kernel at the start
(`own_kernel.Modes`), so that the step's own size is no part of the departure

    d = max_t |η measured/predicted − 1| .

The FCN takes an image as its 24 coordinates in the span of the images, with weights of the variance that He's start
has for all 3072 pixels: gradients lie in that span, so D², loss and kernel are those of the full first layer.

Statements, fixed before the runs; slopes are d ln d/d ln width by least squares, per seed:

    1  The mean slope of d over the seeds is −1 within two standard errors, for either network.
    2  So is that of the kernel's motion ‖K_t − K_0‖/‖K_0‖.
    3  At the largest width d is below 5 % in every seed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import image_sets as sets
import torch
from common import COLOURS, MARKERS, print_table
from images import cnn, fcn, he
from ntk import error_of_mean, slope
from own_kernel import Data, Modes, ratio, tangent_kernel, trained
from torch import Tensor, nn

NAME = "finite_width"
STEP = 0.1  # learning rate × λ_1
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Plan:
    """times: λ_1 t at which η is compared."""

    widths: dict[str, tuple[int, ...]]
    images: dict[str, int]
    times: tuple[float, ...]


FULL = Plan(
    {"FCN": (32, 64, 128, 256, 512, 1024, 2048), "CNN": (4, 8, 16, 32, 64)},
    images={"FCN": 24, "CNN": 12},
    times=(0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6),
)
QUICK = Plan({"FCN": (8, 32), "CNN": (1, 2)}, images={"FCN": 6, "CNN": 4}, times=(0.5, 1, 2))


def in_their_span(x: Tensor) -> Tensor:
    """(N, N): the coordinates of images (N, …) in an orthonormal basis of their span."""
    return torch.linalg.qr(x.flatten(1).T)[1].T


def network(model: str, width: int, x: Tensor, seed: int) -> nn.Module:
    """In float64, from He's start; the first layer of the FCN has that of all pixels."""
    torch.manual_seed(seed)
    made = he(fcn(x, width, hidden=2) if model == "FCN" else cnn(x, width)).double()
    if model == "FCN":
        with torch.no_grad():
            made[1].weight.mul_((x.shape[1] / PIXELS) ** 0.5)
    return made


def measure(model: str, width: int, seed: int, data: Data, plan: Plan) -> sets.Row:
    """η measured and predicted at the times, and how far the kernel had moved at the last."""
    x, y = (part.double() for part in data)
    x = in_their_span(x) if model == "FCN" else x
    start = network(model, width, x, seed)
    modes = Modes.of(start, (x, y))
    lr = STEP / modes.eigenvalues[0].item()
    marks = [round(time / STEP) for time in plan.times]
    elapsed = lr * torch.tensor(marks, dtype=torch.float64)
    ended = copy.deepcopy(start)
    found = trained(ended, (x, y), lr, marks)
    predicted = torch.tensor([modes.descent(lr, mark) for mark in marks], dtype=torch.float64)
    moved = tangent_kernel(ended, x) - modes.kernel
    return {
        "times": list(plan.times),
        "parameters": sum(part.numel() for part in start.parameters()),
        "gap": modes.eigenvalues[9] / modes.eigenvalues[10],
        "loss_left": 1 - found[-1, 1] / modes.residual.square().sum() * 2,
        "efficiency": ratio(found) / elapsed,
        "predicted": ratio(predicted) / elapsed,
        "flow": modes.flow(elapsed).efficiency,
        "departure": (ratio(found) / ratio(predicted) - 1).abs().max(),
        "wasserstein2_squared": found[-1, 0] / predicted[-1, 0] - 1,
        "loss_drop": found[-1, 1] / predicted[-1, 1] - 1,
        "kernel_moved": moved.norm() / modes.kernel.norm(),
    }


# --- what the statements ask


def by_width(lab: sets.Lab, model: str, name: str) -> tuple[list[int], Tensor]:
    """Widths, and (widths, seeds) of one quantity."""
    runs = lab.of("runs", model=model)
    widths = sorted({run["width"] for run in runs})
    return widths, torch.tensor(
        [[abs(run[name]) for run in runs if run["width"] == width] for width in widths]
    ).double()


def slopes(lab: sets.Lab, model: str, name: str) -> tuple[float, float]:
    """Mean over seeds of d ln(value)/d ln(width), and its standard error."""
    widths, values = by_width(lab, model, name)
    each = torch.tensor([slope(widths, one[:, None])[0] for one in values.unbind(1)])
    return each.mean().item(), error_of_mean(each, 0).item()


def verdicts(lab: sets.Lab) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for model in FULL.widths:
        for statement, name in (("1 departure", "departure"), ("2 kernel", "kernel_moved")):
            mean, error = slopes(lab, model, name)
            found[f"{statement}, {model}"] = abs(mean + 1) <= 2 * error
        found[f"3 widest, {model}"] = bool((by_width(lab, model, "departure")[1][-1] < 0.05).all())
    return found


# --- what is shown


def tell(lab: sets.Lab) -> None:
    table: list[Sequence[str]] = [("", "d in %", "kernel moved in %", "W₂² in %", "Q in %", "loss left")]
    for model in FULL.widths:
        names = ("departure", "kernel_moved", "wasserstein2_squared", "loss_drop")
        columns = [by_width(lab, model, name)[1] for name in names]
        left = by_width(lab, model, "loss_left")[1].mean(1)
        for k, width in enumerate(by_width(lab, model, "departure")[0]):
            cells = [f"{100 * c[k].mean():.3g} ± {100 * error_of_mean(c[k], 0):.2g}" for c in columns]
            table.append((f"{model} {width}", *cells, f"{left[k]:.3f}"))
        each = [slopes(lab, model, name) for name in names]
        table.append((f"{model}, slope", *(f"{mean:.2f} ± {error:.2f}" for mean, error in each)))
    table += [(f"statement {name}", "holds" if stands else "fails") for name, stands in verdicts(lab).items()]
    table.append(("processor seconds", f"{lab.seconds:.0f}"))
    print_table(table)


def draw(axes: Any, lab: sets.Lab) -> None:
    for axis, model in zip(axes[:2], FULL.widths, strict=True):
        widths, _ = by_width(lab, model, "departure")
        for k, width in enumerate((widths[0], widths[len(widths) // 2], widths[-1])):
            run = lab.of("runs", model=model, width=width)[0]
            times = run["times"]
            axis.plot(times, run["predicted"], color=COLOURS[k], linestyle="--")
            axis.plot(times, run["efficiency"], MARKERS[k], color=COLOURS[k], mfc="none", label=f"width {width}")
        axis.set(xlabel="time λ₁t", ylabel="efficiency η(0, t)", ylim=(0, None))
        axis.set_title(f"{model}, seed 0; dashed: own kernel")
        axis.legend(loc="lower left")
    for axis, (name, title) in zip(axes[2:], SHOWN.items(), strict=True):
        for k, model in enumerate(FULL.widths):
            widths, values = by_width(lab, model, name)
            mean, error = values.mean(1), error_of_mean(values, 1)
            label = f"{model}, slope {slopes(lab, model, name)[0]:.2f}".replace("-", "−")
            axis.errorbar(widths, mean, error, marker=MARKERS[k], color=COLOURS[k + 1], capsize=2, label=label)
            axis.plot(widths, [mean[-1] * widths[-1] / width for width in widths], ":", color=COLOURS[k + 1])
        axis.set(xscale="log", yscale="log", xlabel="width (neurons or channels)", ylabel=title)
        axis.set_title("Mean of the seeds; dotted: 1/width")
        axis.set_ylim(top=4 * axis.get_ylim()[1])
        axis.legend(loc="upper right")


SHOWN = {"departure": "largest departure of η", "kernel_moved": "kernel's motion ‖K_t − K₀‖/‖K₀‖"}


def main() -> None:
    lab = sets.begin(NAME, "η of networks of many widths, and of their own kernels, on CIFAR-10.", 5)
    run(lab, QUICK if lab.options.quick else FULL)


def run(lab: sets.Lab, plan: Plan) -> None:
    def compute(key: Mapping[str, Any]) -> sets.Row:
        data = sets.load(lab.options.data, "CIFAR-10", plan.images[key["model"]], key["seed"])
        return measure(**key, data=data, plan=plan)

    keys = [
        {"model": model, "width": width, "seed": seed}
        for seed in lab.options.more.seeds
        for model, widths in plan.widths.items()
        for width in widths
    ]
    lab.rows("runs", keys, compute)
    tell(lab)
    with lab.picture(4, width=3.7, height=3.4) as (_, axes):
        draw(axes, lab)


if __name__ == "__main__":
    main()
