"""What the initial weights cost on real images: θ_0 with f = 0 against the usual start.

    python examples/paper/initial_weights.py --data FOLDER --output docs/paper    # some minutes; resumable
    python examples/paper/initial_weights.py --data FOLDER --quick                # seconds, to see that it works

16 images of CIFAR-10 or Fashion-MNIST, one-hot labels, nn.MSELoss, full-batch descent in float64 with learning rate ×
λ_1 = 0.1 until λ_1 t = 10; the FCN (four hidden layers of 64) and the CNN (8 channels) of `images.py`, from PyTorch's
and from He's start; five seeds, each with its own images and weights. Three trainings from the same weights, which
have the same kernel at the start:

    usual     f
    copy      f_θ(x) − f_{θ_0}(x): a frozen copy of the start is subtracted
    twin      [f_θ(x) − f_θ'(x)]/√2, θ' = θ at the start: both are trained (FCN only)

What the initial function costs is 1 − V(f = 0)/V(usual), V = W₂², loss drop Q, or η (so also τ_SL = t η) at the same
time; negative where the start with f = 0 has more. The theory page's split (§6) says it before the training.

Statements, fixed before the runs, at λ_1 t = 1, 3, 10, for each set, network and start:

    1  The mean share over the seeds, measured with the copy, is the predicted one to 0.05, for W₂² and for Q.
    2  The usual start costs efficiency: η is higher with f = 0, by the mean of paired differences over two standard
       errors, at λ_1 t = 10.
    3  Copy and twin agree: W₂² and Q at λ_1 t = 10 within 5 % in the mean over the seeds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import image_sets as sets
import torch
from common import COLOURS, LINES, MARKERS, print_table
from images import BUILD, he
from ntk import Centred, error_of_mean
from own_kernel import Data, Modes, ratio, trained
from torch import Tensor, nn

from lightning_speedlimit.theory import split_initial

NAME = "initial_weights"
STEP = 0.1  # learning rate × λ_1
SHARED = ("W₂²", "Q", "η")
CLOSE = 0.05


@dataclass(frozen=True)
class Plan:
    """times: λ_1 t; shown: those of the statements."""

    images: int
    times: tuple[float, ...]
    shown: tuple[float, ...]


FULL = Plan(16, (0.5, 1, 2, 3, 5, 7.5, 10), (1, 3, 10))
QUICK = Plan(4, (0.5, 1), (0.5, 1))
DATA, STARTS = ("CIFAR-10", "Fashion-MNIST"), ("PyTorch", "He")


class Twin(nn.Module):
    """[f_θ(x) − f_θ'(x)]/√2, θ' = θ at the start: f = 0, and the kernel of one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.first, self.second = network, copy.deepcopy(network)

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) - self.second(x)) / 2**0.5


MADE: dict[str, Callable[[nn.Module], nn.Module]] = {"usual": lambda network: network, "copy": Centred, "twin": Twin}


def measure(model: str, start: str, seed: int, data: Data, plan: Plan) -> sets.Row:
    """W₂² and Q of the three trainings at the times, and the shares that the split predicts."""
    x, y = (part.double() for part in data)
    torch.manual_seed(seed)
    network = BUILD[model](x)
    network = (he(network) if start == "He" else network).double()
    modes = Modes.of(network, (x, y))
    lr = STEP / modes.eigenvalues[0].item()
    marks = [round(time / STEP) for time in plan.times]
    elapsed = lr * torch.tensor(marks, dtype=torch.float64)
    share = split_initial(modes.eigenvalues, modes.initial, modes.targets, elapsed)
    efficiency = 1 - share.from_zero.efficiency / share.actual.efficiency
    tricks = [name for name in MADE if model == "FCN" or name != "twin"]
    return {
        "times": list(plan.times),
        "initial_loss_share": (modes.initial.square().sum() / modes.targets.square().sum()),
        "elapsed": elapsed,
        **{name: trained(MADE[name](copy.deepcopy(network)), (x, y), lr, marks) for name in tricks},
        "predicted": torch.stack([share.wasserstein2_squared, share.entropy_production, efficiency], 1),
        "predicted_efficiency": torch.stack([share.actual.efficiency, share.from_zero.efficiency], 1),
    }


# --- what the statements ask


def shares(runs: Sequence[sets.Row], zero: str = "copy") -> Tensor:
    """(seeds, times, 3): 1 − V(f = 0)/V(usual) of W₂², Q and η, measured."""
    usual, other = (torch.tensor([run[name] for run in runs], dtype=torch.float64) for name in ("usual", zero))
    return 1 - torch.cat([other / usual, (ratio(other) / ratio(usual))[..., None]], -1)


def predicted(runs: Sequence[sets.Row]) -> Tensor:
    return torch.tensor([run["predicted"] for run in runs], dtype=torch.float64)


def efficiency(runs: Sequence[sets.Row], name: str) -> Tensor:
    """(seeds, times)."""
    values, elapsed = (torch.tensor([run[part] for run in runs], dtype=torch.float64) for part in (name, "elapsed"))
    return ratio(values) / elapsed


def gained(runs: Sequence[sets.Row]) -> tuple[float, float]:
    """Mean of η(f = 0) − η(usual) over seeds at the last time, and its standard error."""
    differences = (efficiency(runs, "copy") - efficiency(runs, "usual"))[:, -1]
    return differences.mean().item(), error_of_mean(differences, 0).item()


def between_tricks(runs: Sequence[sets.Row]) -> Tensor:
    """(2,): the mean over seeds of twin/copy − 1 at the last time, W₂² and Q."""
    twin, frozen = (torch.tensor([run[name] for run in runs], dtype=torch.float64)[:, -1] for name in ("twin", "copy"))
    return (twin / frozen - 1).mean(0)


def groups(lab: sets.Lab) -> dict[tuple[str, str, str], list[sets.Row]]:
    every = {
        (name, model, start): lab.of("runs", set=name, model=model, start=start)
        for name in DATA
        for model in BUILD
        for start in STARTS
    }
    return {key: runs for key, runs in every.items() if runs}


def verdicts(lab: sets.Lab, shown: Sequence[float]) -> dict[str, dict[tuple[str, str, str], bool]]:
    found: dict[str, dict[tuple[str, str, str], bool]] = {"1 split": {}, "2 costs η": {}, "3 copy, twin": {}}
    for key, runs in groups(lab).items():
        at = [runs[0]["times"].index(time) for time in shown]
        off = (shares(runs) - predicted(runs)).mean(0)[at, :2].abs().max()
        mean, error = gained(runs)
        found["1 split"][key] = bool(off <= CLOSE)
        found["2 costs η"][key] = mean > 2 * error
        if "twin" in runs[0]:
            found["3 copy, twin"][key] = bool(between_tricks(runs).abs().max() <= CLOSE)
    return found


# --- what is shown


def tell(lab: sets.Lab, shown: Sequence[float]) -> None:
    table: list[Sequence[str]] = [("", "λ₁t", *(f"{name}: measured, predicted" for name in SHARED), "η usual, f = 0")]
    for key, runs in groups(lab).items():
        measured, said = shares(runs), predicted(runs)
        for time in shown:
            at = runs[0]["times"].index(time)
            pairs = [(measured[:, at, i], said[:, at, i].mean()) for i in range(len(SHARED))]
            cells = [f"{found.mean():.3f} ± {error_of_mean(found, 0):.3f}, {goal:.3f}" for found, goal in pairs]
            both = ", ".join(f"{efficiency(runs, name)[:, at].mean():.3f}" for name in ("usual", "copy"))
            table.append((", ".join(key), f"{time:g}", *cells, both))
        mean, error = gained(runs)
        twin = ", ".join(f"{value:+.1%}" for value in between_tricks(runs)) if "twin" in runs[0] else "not trained"
        table.append(("", "", f"η gained {mean:+.3f} ± {error:.3f}", f"twin/copy {twin}"))
    for statement, found in verdicts(lab, shown).items():
        failed = "; ".join(", ".join(key) for key, stands in found.items() if not stands)
        table.append((f"statement {statement}", f"{sum(found.values())} of {len(found)}", failed))
    table.append(("processor seconds", f"{lab.seconds:.0f}"))
    print_table(table)


def draw(axes: Any, lab: sets.Lab) -> None:
    """Shares of W₂² and η over time, of both starts; below for the CNN."""
    for row, model in enumerate(BUILD):
        for column, (i, start) in enumerate((i, start) for start in STARTS for i in (0, 2)):
            axis = axes[row, column]
            for k, name in enumerate(DATA):
                runs = lab.of("runs", set=name, model=model, start=start)
                if runs:
                    draw_share(axis, runs, i, k, name)
            axis.axhline(0, color="#999999", linewidth=1)
            axis.set(xscale="log", xlabel="time λ₁t", ylabel=f"share of {SHARED[i]}")
            axis.set_title(f"{model}, {start}'s start: {SHARED[i]}")
    axes[0, 2].legend(loc="center left")


def draw_share(axis: Any, runs: Sequence[sets.Row], i: int, k: int, name: str) -> None:
    values, times = shares(runs)[..., i], runs[0]["times"]
    colour, label = COLOURS[k + 1], f"{name}, measured"
    axis.errorbar(
        times, values.mean(0), error_of_mean(values, 0), marker=MARKERS[k], color=colour, linestyle="none", label=label
    )
    axis.plot(times, predicted(runs)[..., i].mean(0), color=colour, linestyle=LINES[k], label=f"{name}, predicted")


def main() -> None:
    lab = sets.begin(NAME, "What the initial function costs in W₂², loss drop and η, on images.", 5)
    run(lab, QUICK if lab.options.quick else FULL)


def run(lab: sets.Lab, plan: Plan) -> None:
    def compute(key: Mapping[str, Any]) -> sets.Row:
        data = sets.load(lab.options.data, key["set"], plan.images, key["seed"])
        return measure(key["model"], key["start"], key["seed"], data, plan)

    keys = [
        {"set": name, "model": model, "start": start, "seed": seed}
        for seed in lab.options.more.seeds
        for name in DATA
        for model in BUILD
        for start in STARTS
    ]
    lab.rows("runs", keys, compute)
    tell(lab, plan.shown)
    with lab.picture(4, 2, width=3.4, height=2.9) as (_, axes):
        draw(axes, lab)


if __name__ == "__main__":
    main()
