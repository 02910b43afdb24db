"""Subsets of the paper's images in full pixels: an FCN and a CNN on CIFAR-10, MNIST and Fashion-MNIST by small steps.

    python examples/paper/real_images.py --data FOLDER --output docs/paper    # some twenty minutes; resumable
    python examples/paper/real_images.py --data FOLDER --quick                # seconds, to see that it works

The networks, the training and what is read from its record are those of `images.py` (five Linear layers; three
convolutions and a Linear layer; PyTorch's start, no preprocessing).

    squared error    FCN: 512 images of CIFAR-10, 256 of the others, 1024 steps; CNN: 256 images, 512 steps. nn.MSELoss,
                     learning rate × λ_1 = 0.1, the full batch, and (first seed of CIFAR-10) batches of 64
    cross entropy    10,000 images of CIFAR-10, batches of 500, half that learning rate, 640 steps; and (first seed of
                     the FCN) batches of 100. That was the first run, and the reason for the larger batches: most of
                     its D² may be the noise's

Statements, fixed before the runs. Each is counted over all of its runs, and stands if it holds in all. The third seed,
and the kernels and cross entropy of the second and third, were run after the others had been looked at:

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import image_sets as sets
import images
import torch
from images import BUILD, CLASSES, Data, Run, Start
from own_kernel import Modes
from power_laws import Spectrum, fit_powers, slopes_over
from real_images_shown import draw, key_of, tell, whole
from torch import Tensor, nn

from lightning_speedlimit.theory import power_law_exponent

NAME = "real_images"


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


def main() -> None:
    lab = sets.begin(NAME, "η and its regimes, and the networks' own kernels, on real images.", 3)
    images.quieten_lightning()
    run(lab, QUICK if lab.options.quick else FULL)


def run(lab: sets.Lab, plan: Plan) -> None:
    learn_squared_error(lab, plan)
    learn_classes(lab, plan)
    tell(lab)
    with lab.picture(5, 2, width=3.2, height=3.0) as (_, axes):
        draw(axes, lab)


def learn_squared_error(lab: sets.Lab, plan: Plan) -> None:
    """All full batches with their kernels; and batches of a few images for the first seed of CIFAR-10."""

    def data_of(key: Mapping[str, Any]) -> Data:
        return sets.load(lab.options.data, key["set"], plan.examples[key["set"], key["model"]], key["seed"])

    for seed in lab.options.more.seeds:
        full = [
            {"set": name, "model": model, "seed": seed, "batch": examples}
            for (name, model), examples in plan.examples.items()
        ]
        few = [key | {"batch": plan.batch} for key in full if (key["set"], seed) == ("CIFAR-10", 0)]
        lab.rows(
            "squared error",
            full + few,
            lambda key: squared_error(key["model"], key["batch"], key["seed"], data_of(key), plan),
        )
        lab.rows(
            "kernel",
            [key_of(key) for key in full],
            lambda key: own_kernel(key["model"], key["seed"], data_of(key), whole(lab, **key)[0]),
        )


def learn_classes(lab: sets.Lab, plan: Plan) -> None:
    """Cross entropy on CIFAR-10; small batches for the FCN's first seed."""
    keys = [
        {"set": "CIFAR-10", "model": model, "seed": seed, "batch": batch}
        for seed in lab.options.more.seeds
        for model, batch in (("FCN", plan.small_batch), *((model, plan.many_batch) for model in BUILD))
        if seed == 0 or batch != plan.small_batch
    ]

    def compute(key: Mapping[str, Any]) -> sets.Row:
        data = sets.load(lab.options.data, key["set"], plan.many, key["seed"])
        return cross_entropy(key["model"], key["batch"], key["seed"], data, plan)

    lab.rows("cross entropy", keys, compute)


if __name__ == "__main__":
    main()
