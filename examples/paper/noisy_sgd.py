"""Noisy SGD in steps of a usual size against the gradient flow that the paper's bound is of.

    python examples/paper/noisy_sgd.py --data FOLDER --output docs/paper     # some ten minutes of one core; resumable
    python examples/paper/noisy_sgd.py --quick                               # shortened, on synthetic pictures

1,000 pictures of CIFAR-10, cross entropy, an MLP 3072-300-300-10 (1.0 M parameters) and a CNN (0.27 M), each from one
θ_0. The flow is full-batch descent in steps of T/640, T = 4; its own error is told by the same in steps of T/320.
Against it, to the same flow time T = learning rate × steps: the full batch, and batches of 32, 128 and 512 drawn with
replacement from the same pictures, at rates T/320, T/101, T/32 and T/10 (1.5 decades), five seeds of batches each.
λ is the largest eigenvalue of the loss's Hessian over all pictures, at its largest over the flow.

    distance    ‖θ_T − θ_flow‖ / ‖θ_flow − θ_0‖
    scatter     its part by noise: the standard deviation of θ_T over the seeds, over ‖θ_flow − θ_0‖
    bias        its part that all seeds share: bias² = distance² of the seeds' mean, less scatter²/5
    loss drop   of all pictures, from θ_0 to θ_T, exact; so are conversion = drop / Σ lr ‖g‖², and efficiency
                = ‖θ_T − θ_0‖² / (T × drop)

Stated before the full run, for both networks; "gentle" are settings with lr·λ at most 1:

    1  scatter is √(lr/B): its slope in logarithms over the gentle settings is 0.5 within 0.1
    2  full-batch descent has a distance below 10 % where it is gentle, and above where lr·λ is more than 2
    3  in all gentle settings the loss drop is within 10 % of the flow's
    4  in all gentle settings of batch 32 the conversion is below ½: it is gone long before the loss is
    5  in all gentle settings efficiency is above the flow's by a factor within 0.1 of 1 + scatter²
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "findings"))

import torch
from lab import COLOURS, LINES, MARKERS, Lab, Row, begin, mean_of
from sets import Set, load
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import rounded

from lightning_speedlimit import TrajectoryMeter

BATCHES = (32, 128, 512)
GENTLE, EDGE = 1.0, 2.0  # lr·λ
CLOSE = 0.1


@dataclass(frozen=True)
class Plan:
    """steps: of the runs, from the smallest rate on; the flow takes twice the first. looks: at λ, over the flow."""

    images: int = 1000
    time: float = 4.0
    steps: tuple[int, ...] = (320, 101, 32, 10)
    seeds: int = 5
    looks: int = 8
    width: int = 300


FULL, QUICK = Plan(), Plan(images=80, time=0.4, steps=(12, 4, 2), seeds=2, looks=1, width=16)


def mlp(plan: Plan) -> nn.Module:
    width = plan.width
    layers = (nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def cnn(plan: Plan) -> nn.Module:
    """Two convolutions of stride 2, and most parameters in the layer behind them."""
    convolutions = (nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
    hidden = max(8, 128 * plan.width // FULL.width)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2048, hidden), nn.ReLU(), nn.Linear(hidden, 10))


NETS = {"MLP": mlp, "CNN": cnn}


class Start:
    """A network at θ_0 with its pictures; each run leaves from there."""

    def __init__(self, net: str, data: Set, plan: Plan) -> None:
        torch.manual_seed(0)
        self.network, self.data, self.plan = NETS[net](plan), data, plan
        self.begin = self.flat()
        self.loss_begin = self.whole_loss()

    def flat(self) -> Tensor:
        """θ (P,) float64, a copy."""
        return nn.utils.parameters_to_vector(self.network.parameters()).detach().double().clone()

    def loss(self, index: Tensor | slice) -> Tensor:
        return cross_entropy(self.network(self.data.inputs[index]), self.data.targets[index])

    @torch.no_grad()
    def whole_loss(self) -> float:
        return float(self.loss(slice(None)))

    def descend(self, steps: int, batch: int = 0, seed: int = 0, looks: int = 0) -> tuple[Row, Tensor]:
        """From θ_0 to the flow time T in so many steps; what was measured, and θ_T. batch: 0 for all pictures."""
        nn.utils.vector_to_parameters(self.begin.float(), self.network.parameters())
        rate, draw = self.plan.time / steps, torch.Generator().manual_seed(1000 * seed + batch)
        optimizer = torch.optim.SGD(self.network.parameters(), rate)
        meter, sharpness = TrajectoryMeter(optimizer, coordinates="all"), [self.sharpness()] if looks else []
        for step in range(1, steps + 1):
            index = torch.randint(self.plan.images, (batch,), generator=draw) if batch else slice(None)
            loss = self.loss(index)
            optimizer.zero_grad()
            loss.backward()
            meter.record_loss(loss.detach())
            meter.observe_gradients(optimizer)
            optimizer.step()
            if looks and step % (steps // looks) == 0:
                sharpness.append(self.sharpness())
        found = meter.compute()
        meter.close()
        row = self.told(found, steps) | ({"sharpness": [rounded(value) for value in sharpness]} if looks else {})
        return row, self.flat()

    def told(self, found: Mapping[str, float], steps: int) -> Row:
        drop = self.loss_begin - self.whole_loss()
        slope = 2 * drop - found["work_anti_ito"]
        return {
            "rate": self.plan.time / steps,
            "drop": drop,
            "displacement": found["displacement"],
            "straightness": found["straightness"],
            "efficiency": found["displacement"] ** 2 / (self.plan.time * drop),
            "conversion": drop / found["work_ito"],
            "noise_share": 1 - slope / found["work_ito"],
        }

    def sharpness(self, rounds: int = 12) -> float:
        """λ of all pictures where the network is, by power iteration from a fixed start."""
        weights, draw = list(self.network.parameters()), torch.Generator().manual_seed(0)
        gradient = torch.autograd.grad(self.loss(slice(None)), weights, create_graph=True)
        vector, largest = [torch.randn(part.shape, generator=draw) for part in weights], math.nan
        for _ in range(rounds):
            norm = math.sqrt(sum(float(part.square().sum()) for part in vector))
            vector = [part / norm for part in vector]
            turned = torch.autograd.grad(gradient, weights, vector, retain_graph=True)
            largest = sum(float((a * b).sum()) for a, b in zip(turned, vector, strict=True))
            vector = list(turned)
        return largest


class Experiment:
    """The rows of one results file."""

    def __init__(self, lab: Lab, data: Set, plan: Plan) -> None:
        self.lab, self.data, self.plan = lab, data, plan
        self.flows: dict[str, tuple[Start, Row, Tensor]] = {}

    def flow_of(self, net: str) -> tuple[Start, Row, Tensor]:
        if net not in self.flows:
            start = Start(net, self.data, self.plan)
            self.flows[net] = (start, *start.descend(2 * self.plan.steps[0], looks=self.plan.looks))
        return self.flows[net]

    def flow(self, key: Mapping[str, Any]) -> Row:
        start, row, end = self.flow_of(key["net"])
        return row | {"parameters": len(end), "loss_begin": start.loss_begin}

    def full(self, key: Mapping[str, Any]) -> Row:
        start, _, end = self.flow_of(key["net"])
        row, there = start.descend(key["steps"])
        return row | {"distance": float((there - end).norm() / (end - start.begin).norm())}

    def noisy(self, key: Mapping[str, Any]) -> Row:
        """All seeds of one setting: values by seed, and how far they are from the flow and from one another."""
        start, _, end = self.flow_of(key["net"])
        runs = [start.descend(key["steps"], key["batch"], seed) for seed in range(self.plan.seeds)]
        ends, unit = torch.stack([there for _, there in runs]), float((end - start.begin).norm())
        variance = float(ends.var(0).sum())
        shared = float((ends.mean(0) - end).square().sum()) - variance / len(runs)
        row: Row = {name: [rounded(row[name]) for row, _ in runs] for name in runs[0][0] if name != "rate"}
        row |= {"rate": runs[0][0]["rate"], "scatter": math.sqrt(variance) / unit, "bias_squared": shared / unit**2}
        return row | {"distance": [rounded(float((there - end).norm()) / unit) for there in ends]}

    def run(self) -> None:
        for net in NETS:
            self.lab.rows("flow", [{"net": net}], self.flow)
            self.lab.rows("full batch", [{"net": net, "steps": steps} for steps in self.plan.steps], self.full)
            keys = [{"net": net, "steps": steps, "batch": b} for steps in self.plan.steps for b in BATCHES]
            self.lab.rows("noisy", keys, self.noisy)


# --- what it says

SHOWN = {  # ticks
    "distance": (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
    "efficiency": (0.9, 1, 1.2, 1.5, 2, 3, 5),
    "conversion": (0.01, 0.03, 0.1, 0.3, 1),
}


def sharpest(parts: Mapping[str, Sequence[Row]], net: str) -> float:
    """λ: the largest over the flow."""
    return max(next(row for row in parts["flow"] if row["net"] == net)["sharpness"])


def of(parts: Mapping[str, Sequence[Row]], part: str, net: str, most: float = math.inf) -> list[Row]:
    """Rows of a network with lr·λ of `most` at most."""
    edge = sharpest(parts, net)
    return [row for row in parts[part] if row["net"] == net and row["rate"] * edge <= most]


def slope_of_scatter(rows: Sequence[Row]) -> float:
    """d ln scatter / d ln(lr/B) by least squares."""
    x = torch.tensor([math.log(row["rate"] / row["batch"]) for row in rows], dtype=torch.float64)
    y = torch.tensor([math.log(row["scatter"]) for row in rows], dtype=torch.float64)
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def verdicts(parts: Mapping[str, Sequence[Row]], net: str) -> dict[str, bool]:
    """Statement → whether it holds."""
    (flow,), edge = of(parts, "flow", net), sharpest(parts, net)
    gentle, full = of(parts, "noisy", net, GENTLE), of(parts, "full batch", net)
    drops = [mean_of(row["drop"]).value / flow["drop"] - 1 for row in gentle]
    risen = [mean_of(row["efficiency"]).value / flow["efficiency"] - 1 - row["scatter"] ** 2 for row in gentle]
    return {
        "1 scatter": abs(slope_of_scatter(gentle) - 0.5) <= 0.1,
        "2 full batch": all(row["distance"] < CLOSE for row in full if row["rate"] * edge <= GENTLE)
        and all(row["distance"] > CLOSE for row in full if row["rate"] * edge > EDGE),
        "3 loss drop": all(abs(drop) <= CLOSE for drop in drops),
        "4 conversion": all(mean_of(row["conversion"]).value < 0.5 for row in gentle if row["batch"] == BATCHES[0]),
        "5 efficiency": all(abs(rise) <= CLOSE for rise in risen),
    }


def table(parts: Mapping[str, Sequence[Row]], net: str) -> str:
    """Markdown; of the noisy settings means and standard errors over the seeds, of the others one run."""
    edge = sharpest(parts, net)
    shown = "distance | scatter | loss drop | straightness | efficiency | conversion | noise share"
    lines = [f"| batch | rate | lr·λ | {shown} |", f"|{'---|' * 10}"]
    for part in ("flow", "full batch", "noisy"):
        for row in sorted(of(parts, part, net), key=lambda row: (row.get("batch", 0), row["rate"])):
            names = ("drop", "straightness", "efficiency", "conversion", "noise_share")
            cells = [told(row.get("distance")), f"{row['scatter']:.3f}" if "scatter" in row else ""]
            batch = row.get("batch", "flow" if part == "flow" else "all")
            cells += [told(known(row, name)) for name in names]
            lines.append(f"| {batch} | {row['rate']:.3g} | {row['rate'] * edge:.2g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def known(row: Row, name: str) -> Any:
    """A value, or those of the seeds; an efficiency is none where a loss did not fall."""
    drops = row["drop"] if isinstance(row["drop"], list) else [row["drop"]]
    return [] if name == "efficiency" and min(drops) <= 0 else row[name]


def told(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        mean = mean_of(value)
        return f"{mean.value:.3f} ± {mean.error:.1g}" if mean.count else "undefined"
    return f"{value:.3f}"


def draw(axes: Any, parts: Mapping[str, Sequence[Row]]) -> None:
    titles = ("Distance from the flow at T", "Loss drop / the flow's", "Efficiency / the flow's", "Conversion")
    for line, net in zip(axes, NETS, strict=True):
        (flow,), edge = of(parts, "flow", net), sharpest(parts, net)
        for axis, name, title in zip(line, ("distance", "drop", "efficiency", "conversion"), titles, strict=True):
            unit = flow[name] if name in ("drop", "efficiency") else 1.0
            for at, batch in enumerate((None, *BATCHES)):
                rows = of(parts, "noisy" if batch else "full batch", net)
                rows = sorted((row for row in rows if row.get("batch") == batch), key=lambda row: row["rate"])
                means = [mean_of(known(row, name) if batch else [row[name]]) for row in rows]
                axis.errorbar(
                    [row["rate"] * edge for row in rows],
                    [mean.value / unit for mean in means],
                    [0.0 if math.isnan(mean.error) else mean.error / unit for mean in means],
                    color=COLOURS[at],
                    marker=MARKERS[at],
                    linestyle=LINES[at],
                    capsize=2,
                    label=f"batch {batch}" if batch else "all pictures",
                )
            axis.axvline(EDGE, color="#999999", linewidth=1)
            axis.set(xscale="log", xlabel="learning rate × largest λ (line: 2)", title=f"{net}: {title}")
            axis.set_xticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
            axis.minorticks_off()
            if name in SHOWN:
                axis.set(yscale="log", ylim=(SHOWN[name][0], 1.2 * SHOWN[name][-1]))
                axis.set_yticks(SHOWN[name], [f"{tick:g}" for tick in SHOWN[name]])
                axis.minorticks_off()
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def verdict_table(parts: Mapping[str, Sequence[Row]]) -> str:
    found = {net: verdicts(parts, net) for net in NETS}
    slopes = [f"{slope_of_scatter(of(parts, 'noisy', net, GENTLE)):.2f}" for net in NETS]
    lines = [f"| statement | {' | '.join(NETS)} |", f"|---|{'---|' * len(NETS)}"]
    for name in found["MLP"]:
        lines.append(f"| {name} | {' | '.join('holds' if found[net][name] else 'fails' for net in NETS)} |")
    return "\n".join([*lines, f"| slope of scatter | {' | '.join(slopes)} |"])


def show(lab: Lab) -> None:
    parts = lab.results.parts
    for said in (verdict_table(parts), *(table(parts, net) for net in NETS)):
        print(f"{said}\n")
    with lab.picture(4, 2, width=3.4, height=3.0) as (_, axes):
        draw(axes, parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shown", action="store_true", help="nothing is run: table and figure of what is in the file")
    options = begin(__doc__, parser)
    plan, lab = QUICK if options.quick else FULL, Lab("noisy_sgd", options)
    if not options.more.shown:
        Experiment(lab, load("cifar10", options.data, plan.images), plan).run()
    show(lab)


if __name__ == "__main__":
    main()
