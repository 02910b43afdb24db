"""Lazy or feature learning, told by the neurons alone: does `identity_excess` follow the tangent kernel?

    python examples/findings/lazy_or_feature.py --data FOLDER --output docs/findings

α (h_θ − h_θ₀) is trained with the loss divided by α² (Chizat, Oyallon, Bach, arXiv:1812.07956): lazy as α or the
width grows. A layer's identity_excess is displacement²/W₂² − 1 of its neurons between the start and the end, 0 where
no two changed places. The witness is the kernel on 12 held-out images, ‖K_t − K_0‖/‖K_0‖.

Fixed before the runs (after single runs of another seed, which showed that weights hardly ever meet), over the 12
settings, 3 widths × 4 scales, of each of eight families:

1  Particles as the package takes them, a neuron's weights: identity_excess of the hidden layers together ranks the
   settings as the kernel's movement does, Spearman ≥ 0.8 (mean over seeds), where a picture is two numbers; with
   whole pictures it is blind, below 0.001 in all settings.
2  Particles as functions, what a neuron computes of 64 held-out images: Spearman ≥ 0.8 in all families.
3  A function's excess above 0.01 means that the kernel moved by more than its size, and below that it did not: right
   in 90 % of the settings (means over seeds) of each family.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from lab import COLOURS, MARKERS, Lab, Options, Row, begin, mean_of
from nets import NETS
from scipy.stats import spearmanr
from sets import PICTURES, Set, load
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from trainings import Run, Training

from lightning_speedlimit.theory import empirical_ntk
from lightning_speedlimit.transport import wasserstein2_squared

SMALL, TWO = ", 4 x 4", ", 2 numbers"  # pixels averaged; the two principal components
SHAPES = {name + SMALL: (PICTURES[name][0], 4, 4) for name in ("fashion-mnist", "cifar10")}
SHAPES |= {name + TWO: (1, 1, 2) for name in ("fashion-mnist", "cifar10")}
WIDTHS = {"MLP": (8, 32, 128), "CNN": (4, 8, 16)}
SCALES = (0.25, 1.0, 4.0, 16.0)
FAMILIES = tuple(
    (data + part, net)
    for part, net in (("", "MLP"), ("", "CNN"), (SMALL, "MLP"), (TWO, "MLP"))
    for data in ("fashion-mnist", "cifar10")
)
SPEED = 1.0  # of the outputs: rate × mean diagonal of the kernel at the start, the same for all
BATCH, STEPS, EXAMPLES, WITNESSES, SHOWN = 64, 200, 10_000, 12, 64
PARTICLES = ("weights", "function", "function, out", "function, 8", "function, 2")  # of a neuron
FEW = {"function, 8": 8, "function, 2": 2}  # principal directions of the start's
FAILING = {"4 neurons": {"width": 4}, "random labels": {}}
EXCESS, MOVED, RIGHT, RANKED, BLIND = 0.01, 1.0, 0.9, 0.8, 1e-3  # of the statements


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = begin(__doc__, parser)
    PICTURES.update(SHAPES)  # for the networks
    lab, sets = Lab("lazy_or_feature", options), dict[str, Set]()

    def compute(key: Mapping[str, Any]) -> Row:
        if key["data"] not in sets:
            sets[key["data"]] = pictures(key["data"], options)
        return learnt(key, sets[key["data"]], 20 if options.quick else STEPS)

    grid = lab.rows("grid", settings(options), compute)
    lab.rows("failing", failing(options), compute)
    lab.results.replace("ranks", ranks(grid))
    print(rank_table(lab.results.parts["ranks"]), end="\n\n")
    print(layer_table(lab.results.parts["ranks"]), end="\n\n")
    print(alarm_table(grid), end="\n\n")
    print(failing_table(lab.results.parts["failing"]))
    draw(lab, grid)


def settings(options: Options) -> list[Row]:
    families, scales, widths = FAMILIES, SCALES, WIDTHS
    if options.quick:
        families, scales, widths = (FAMILIES[2], FAMILIES[6]), (0.25, 4.0), {"MLP": (8, 16), "CNN": (2, 4)}
    return [
        {"data": data, "net": net, "width": width, "alpha": alpha, "seed": seed}
        for data, net in families
        for width in widths[net]
        for alpha in scales
        for seed in options.more.seeds
    ]


def failing(options: Options) -> list[Row]:
    """On purpose: few neurons, of which none can take another's place; and labels that no feature tells."""
    families = FAMILIES[6:7] if options.quick else (FAMILIES[0], FAMILIES[3], FAMILIES[6])
    middle = {"MLP": 32, "CNN": 8}
    return [
        {"case": case, "data": data, "net": net, "width": middle[net], "alpha": 1.0, "seed": seed, **changed}
        for case, changed in FAILING.items()
        for data, net in families
        for seed in options.more.seeds
    ]


def pictures(name: str, options: Options) -> Set:
    """The set, its pictures averaged down to 4 × 4 pixels, or their first two principal components."""
    whole = load(name.removesuffix(SMALL).removesuffix(TWO), options.data, EXAMPLES)
    parts = whole.inputs, whole.held_inputs
    if name.endswith(SMALL):
        parts = tuple(avg_pool2d(part, whole.inputs.shape[-1] // 4) for part in parts)
    if name.endswith(TWO):
        torch.manual_seed(0)
        basis = torch.pca_lowrank(parts[0].flatten(1), 10, niter=10)[2][:, :2]
        parts = tuple((part.flatten(1) @ basis)[:, None, None] for part in parts)
    mean, spread = parts[0].mean(), parts[0].std()
    return replace(whole, name=name, inputs=(parts[0] - mean) / spread, held_inputs=(parts[1] - mean) / spread)


class Scaled(Run):
    """Trains α (h_θ − h_θ₀) by SGD on the loss over α²: the same speed of the outputs, as long as h is linear."""

    def __init__(self, training: Training, data: Set, alpha: float) -> None:
        super().__init__(training, data, measured=False)
        self.alpha, self.start = alpha, deepcopy(self.network).requires_grad_(False)
        with torch.no_grad():
            self._before = torch.cat([self.start(part) for part in data.inputs.split(1000)])

    def loss(self, index: Tensor) -> Tensor:
        """Mean cross entropy over α² of the training samples at `index`, nats."""
        scores = self.alpha * (self.network(self.data.inputs[index]) - self._before[index])
        return cross_entropy(scores, self.data.targets[index]) / self.alpha**2

    @torch.no_grad()
    def held_loss(self) -> float:
        """Not divided."""
        x, y = self.data.held_inputs, self.data.held_targets
        return float(cross_entropy(self.alpha * (self.network(x) - self.start(x)), y))


def learnt(key: Mapping[str, Any], data: Set, steps: int) -> Row:
    """Trains once; how far the kernel moved, and each hidden layer's identity_excess, by kind of particle."""
    options = {"width": key["width"], "depth": 2}
    torch.manual_seed(key["seed"])
    kernel = empirical_ntk(NETS[key["net"]](key["data"], **options), data.held_inputs[:WITNESSES])
    rate = SPEED / kernel.diagonal().mean().item()
    if key.get("case") == "random labels":
        shuffled = torch.randperm(len(data.targets), generator=torch.Generator().manual_seed(key["seed"]))
        data = replace(data, targets=data.targets[shuffled])
    training = Training(key["data"], key["net"], "SGD", rate, BATCH, steps, key["seed"], net_options=options)
    run = Scaled(training, data, key["alpha"])
    while run.step < steps:
        run.advance()
    now = empirical_ntk(run.network, data.held_inputs[:WITNESSES])
    found = {
        "rate": rate,
        "held_loss": run.held_loss(),
        "kernel_moved": ((now - kernel).norm() / kernel.norm()).item(),
        "kernel_turned": 1 - ((now * kernel).sum() / (now.norm() * kernel.norm())).item(),
    }
    return found | excesses(run.start, run.network, data.held_inputs[:SHOWN])


def excesses(start: nn.Module, end: nn.Module, shown: Tensor) -> Row:
    """`particle/layer`: identity_excess of each hidden layer; `particle`: of both together, Σ paired/Σ W₂² − 1."""
    found: Row = {}
    for particle in PARTICLES:
        paired = least = 0.0
        clouds = zip(neurons(start, shown, particle), neurons(end, shown, particle), strict=True)
        for layer, (before, now) in enumerate(clouds):
            if particle in FEW:
                basis = torch.linalg.svd(before, full_matrices=False)[2][: FEW[particle]].T
                before, now = before @ basis, now @ basis
            moved = wasserstein2_squared(before, now)
            found[f"{particle}/{layer + 1}"] = moved.identity_excess
            paired, least = paired + len(now) * moved.paired, least + len(now) * moved.value
        found[particle] = paired / least - 1
    return found


@torch.no_grad()
def neurons(network: nn.Module, shown: Tensor, particle: str) -> Iterator[Tensor]:
    """(N, D) float64 of each hidden layer.

    weights: a neuron's row with its bias. function: its value before the ReLU for the pictures shown, at all places of
    a map, over √ of their number. out: and the outgoing weights.
    """
    weighted = [part for part in network.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    values: list[Tensor] = []
    hooks = [part.register_forward_hook(lambda _, __, value: values.append(value)) for part in weighted]
    network(shown)
    for hook in hooks:
        hook.remove()
    for layer, value, following in zip(weighted, values, weighted[1:], strict=False):
        if particle == "weights":
            cloud = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1)
        else:
            cloud = value.transpose(0, 1).flatten(1)
            cloud = cloud / cloud.shape[1] ** 0.5
        if "out" in particle:
            outgoing = following.weight.reshape(len(following.weight), len(cloud), -1)  # (outer, neurons, places)
            cloud = torch.cat([cloud, outgoing.transpose(0, 1).flatten(1)], 1)
        yield cloud.double()


# --- what it says


def family(row: Mapping[str, Any]) -> str:
    return f"{row['data']}, {row['net']}"


def ranks(grid: list[Row]) -> list[Row]:
    """Each family and particle: rank correlation with the kernel's movement over the settings, and statement 3."""
    found = []
    for name in dict.fromkeys(map(family, grid)):
        rows = [row for row in grid if family(row) == name]
        seeds = sorted({row["seed"] for row in rows})
        for particle in (*PARTICLES, "weights/1", "weights/2"):
            each = [
                spearmanr(*([row[k] for row in rows if row["seed"] == seed] for k in ("kernel_moved", particle)))
                if any(row[particle] for row in rows if row["seed"] == seed)
                else None
                for seed in seeds
            ]
            over = mean_of([None if one is None else float(one.statistic) for one in each])
            points = means(rows, particle)
            right = [(excess > EXCESS) == (moved > MOVED) for moved, excess, _ in points]
            found.append(
                {
                    "family": name,
                    "particle": particle,
                    "spearman": over.value,
                    "spearman_se": over.error,
                    "seeds": over.count,
                    "largest": max(row[particle] for row in rows),
                    "right": sum(right) / len(right),
                }
            )
    return found


def means(rows: list[Row], particle: str) -> list[tuple[float, float, float]]:
    """Each setting: the kernel's movement and the excess, means over seeds, and the error of the excess."""
    cells: dict[tuple[int, float], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["width"], row["alpha"]), []).append(row)
    found = []
    for cell in cells.values():
        excess = mean_of([row[particle] for row in cell])
        found.append((mean_of([row["kernel_moved"] for row in cell]).value, excess.value, excess.error))
    return found


def rank_table(ranked: list[Row]) -> str:
    """Spearman ± standard error over the seeds in which not all are 0; settings that statement 3 is right in."""
    lines = [f"| family | {' | '.join(PARTICLES)} | right by function |", "|---" * (2 + len(PARTICLES)) + "|"]
    for name in dict.fromkeys(row["family"] for row in ranked):
        rows = {row["particle"]: row for row in ranked if row["family"] == name}
        cells = [correlation(rows[particle]) for particle in PARTICLES]
        lines.append(f"| {name} | {' | '.join(cells)} | {rows['function']['right']:.0%} |".replace("%", " %"))
    return "\n".join(lines)


def layer_table(ranked: list[Row]) -> str:
    """Weights, layer by layer: the largest excess of all runs, and the rank correlation."""
    lines = ["| family | first layer, largest | Spearman | second layer, largest | Spearman |", "|---" * 5 + "|"]
    for name in dict.fromkeys(row["family"] for row in ranked):
        rows = [row for row in ranked if row["family"] == name and "/" in row["particle"]]
        cells = [part for row in rows for part in (f"{row['largest']:.2g}", correlation(row))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def alarm_table(grid: list[Row]) -> str:
    """Each particle as an alarm, excess above 0.001 (mean over seeds), of a kernel that moved by more than its size.

    Seen: alarms where it did; false: where it did not; and by how much it moved at the least where there was an alarm.
    """
    lines = ["| particle | seen | false | kernel moved at least | falls with α |", "|---" * 5 + "|"]
    families = list(dict.fromkeys(map(family, grid)))
    for particle in PARTICLES:
        points = [point for name in families for point in means([r for r in grid if family(r) == name], particle)]
        by_moved = {
            kind: [excess > BLIND for moved, excess, _ in points if (moved > MOVED) is kind] for kind in (True, False)
        }
        least = min(moved for moved, excess, _ in points if excess > BLIND)
        cells = [f"{sum(by_moved[kind])} of {len(by_moved[kind])}" for kind in (True, False)]
        lines.append(f"| {particle} | {' | '.join(cells)} | {least:.2g} | {falling(grid, particle)} |")
    return "\n".join(lines)


def falling(grid: list[Row], particle: str) -> str:
    """Of all families and widths those where the mean never rises with α, and ends lower than it began."""
    found = []
    for name, width in dict.fromkeys((family(row), row["width"]) for row in grid):
        rows = sorted((r for r in grid if (family(r), r["width"]) == (name, width)), key=lambda row: row["alpha"])
        values = [excess for _, excess, _ in means(rows, particle)]
        found.append(values == sorted(values, reverse=True) and values[0] > values[-1])
    return f"{sum(found)} of {len(found)}"


def correlation(row: Row) -> str:
    if not row["seeds"]:
        return "all 0"
    error = "" if row["spearman_se"] is None else f" ± {row['spearman_se']:.2f}"
    return f"{row['spearman']:.2f}{error}" + ("" if row["seeds"] >= 5 else f", {row['seeds']} of 5 seeds")


def failing_table(rows: list[Row]) -> str:
    lines = ["| case | family | kernel moved | weights | function | held-out loss |", "|---" * 6 + "|"]
    for case, name in dict.fromkeys((row["case"], family(row)) for row in rows):
        cell = [row for row in rows if (row["case"], family(row)) == (case, name)]
        values = [str(mean_of([row[k] for row in cell])) for k in ("kernel_moved", "weights", "function", "held_loss")]
        lines.append(f"| {case} | {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def draw(lab: Lab, grid: list[Row]) -> None:
    """Excess against the kernel's movement, a point a setting: weights above, functions below."""
    families = list(dict.fromkeys(map(family, grid)))
    groups = {
        "whole pictures": [name for name in families if SMALL not in name and TWO not in name],
        "4 × 4 pixels": [name for name in families if SMALL in name],
        "2 numbers": [name for name in families if TWO in name],
    }
    groups = {title: names for title, names in groups.items() if names}
    looks = {name.replace(SMALL, "").replace(TWO, ""): at for at, name in reversed(list(enumerate(families)))}
    handles = dict[str, Any]()
    with lab.picture(len(groups), 2, width=3.6, height=2.9) as (drawn, axes):
        for column, (title, names) in enumerate(groups.items()):
            for panel, particle in zip(axes[:, column], ("weights", "function"), strict=True):
                for name in names:
                    points = sorted(means([row for row in grid if family(row) == name], particle))
                    label = name.replace(SMALL, "").replace(TWO, "")
                    look: dict[str, Any] = {"fmt": MARKERS[looks[label]], "color": COLOURS[looks[label] + 1]}
                    handles[label] = panel.errorbar(*zip(*points, strict=True), lw=0.8, **look)
                panel.set_xscale("log")
                panel.set_yscale("symlog", linthresh=1e-3)
                panel.set_ylim(-3e-4, 3)
                panel.axvline(MOVED, color="grey", lw=0.8, ls=":")
                panel.axhline(EXCESS, color="grey", lw=0.8, ls=":")
                panel.set_title(f"{title}: neurons as {particle.replace('function', 'functions')}")
            axes[1][column].set_xlabel("kernel moved, of its size at the start")
        for row in axes:
            row[0].set_ylabel("identity excess")
        drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)


if __name__ == "__main__":
    main()
