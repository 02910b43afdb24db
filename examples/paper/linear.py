"""Linear regression and a perceptron: measured runs against the closed forms.

    python examples/paper/linear.py [--quick] [--output DIR]

Gradient flow on L = ½‖Xw − y‖² moves each mode alone. With λ_k = σ_k² of X = U diag(σ) Vᵀ and r = Uᵀ(Xw_0 − y):

    W₂² = Σ (1 − e^{−λt})² r²/λ,      loss drop = ½ Σ (1 − e^{−2λt}) r²,      η = W₂²/(t · loss drop).

Shown are

- gradient descent from one start, measured by `TrajectoryMeter`: the distance to the closed form is of first
  order in the learning rate;
- replicas from Gaussian starts of std s: r² + λ s² in the place of r², and W₂² certified to be the pairing's;
- a perceptron (one linear unit, labels ±1, weight decay) with Langevin noise, again by replicas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from common import COLOURS, LINES, MARKERS, Report, figure, number, parse, progress
from torch import Tensor, nn

from lightning_speedlimit import TrajectoryMeter
from lightning_speedlimit.ensemble import DistributionLimit, Estimate, Replicas, speed_limit, train_replicas
from lightning_speedlimit.theory import Curve, linear_regression, perceptron
from lightning_speedlimit.transport import wasserstein2_squared

DATA, WEIGHTS = 30, 60
SPECTRUM = (1.0, 0.01)  # largest and smallest λ
NOISE = 0.1  # of the targets
LEARNING_RATES = (0.2, 0.1, 0.05)  # lr·λ ≤ 0.2
TIMES = (0.4, 0.8, 1.6, 3.0, 6.0, 12.0, 22.0, 42.0, 80.0, 150.0, 240.0, 400.0)  # multiples of every learning rate

START_STD = 0.5
START_LR = 0.02
START_TIMES = (0.4, 1.0, 3.0, 10.0, 30.0, 80.0)


@dataclass(frozen=True)
class Scale:
    """How much is sampled."""

    horizon: float  # last time of gradient descent
    starts: int  # replicas from Gaussian starts
    start_horizon: float
    perceptrons: int


FULL = Scale(400.0, 500, 80.0, 2000)
QUICK = Scale(42.0, 80, 10.0, 400)

QUANTITIES = ("wasserstein2_squared", "loss_drop", "efficiency")


@dataclass(frozen=True)
class Regression:
    """½‖Xw − y‖² with a given spectrum, and a start."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def draw(cls, seed: int) -> Regression:
        """λ log-spaced, singular vectors at random; targets of a Gaussian teacher, and noise."""
        torch.manual_seed(seed)
        left, right = (torch.linalg.qr(torch.randn(n, DATA, dtype=torch.float64))[0] for n in (DATA, WEIGHTS))
        largest, smallest = map(math.log10, SPECTRUM)
        inputs = left * torch.logspace(largest, smallest, DATA, dtype=torch.float64).sqrt() @ right.T
        teacher, start = torch.randn(2, WEIGHTS, dtype=torch.float64)
        return cls(inputs, inputs @ teacher + NOISE * torch.randn(DATA, dtype=torch.float64), start)

    @cached_property
    def modes(self) -> tuple[Tensor, Tensor]:
        """λ_k and r_k² at the start."""
        left, singular, _ = torch.linalg.svd(self.inputs, full_matrices=False)
        return singular**2, (left.T @ (self.inputs @ self.weights - self.targets)) ** 2

    def loss(self, weights: Tensor) -> Tensor:
        return 0.5 * (self.inputs @ weights - self.targets).square().sum()

    def curve(self, times: Sequence[float] | Tensor, std: float = 0.0) -> Curve:
        return linear_regression(self.inputs, self.targets, times, weights=self.weights, std=std)

    def of_steps(self, lr: float, times: Sequence[float], std: float = 0.0) -> dict[str, Tensor]:
        """Gradient descent itself: (1 − lr·λ)ᵏ in the place of e^{−λt}, and r² + λ s² in the place of r²."""
        eigenvalues, strength = self.modes
        strength = strength + eigenvalues * std**2
        t = torch.tensor(times, dtype=torch.float64)
        left = (1 - lr * eigenvalues) ** (t / lr).round()[:, None]
        distance = ((1 - left) ** 2 * strength / eigenvalues).sum(1)
        drop = 0.5 * ((1 - left**2) * strength).sum(1)
        return {"wasserstein2_squared": distance, "loss_drop": drop, "efficiency": distance / (t * drop)}


# --- one start


def descend(problem: Regression, lr: float, times: Sequence[float]) -> dict[str, list[float]]:
    """Gradient descent from one start, read off a meter at these times: W₂² is the squared displacement."""
    weights = nn.Parameter(problem.weights.clone())
    optimizer = torch.optim.SGD([weights], lr=lr)
    meter = TrajectoryMeter(optimizer, clock="lr")
    first = problem.loss(weights).detach()
    read_at = {round(time / lr) for time in times}
    found: dict[str, list[float]] = {name: [] for name in (*QUANTITIES, "efficiency_action")}
    for step in progress(range(1, max(read_at) + 1), f"lr {lr:g}"):
        optimizer.zero_grad()
        problem.loss(weights).backward()
        optimizer.step()
        if step in read_at:
            meter.record_probe(first[None], problem.loss(weights)[None])  # the loss at θ_0 and here, not extrapolated
            values = meter.compute()
            found["wasserstein2_squared"].append(values["displacement"] ** 2)
            for name in ("loss_drop", "efficiency", "efficiency_action"):
                found[name].append(values[name])
    return found


def one_start(problem: Regression, scale: Scale) -> dict[str, Any]:
    """Measured and predicted, relative errors (root mean square over the times), and their orders in lr."""
    times = [time for time in TIMES if time <= scale.horizon]
    curve = problem.curve(times)
    truth = {
        "wasserstein2_squared": curve.wasserstein2_squared,
        "loss_drop": curve.entropy_production,
        "efficiency": curve.efficiency,
    }
    measured = [descend(problem, lr, times) for lr in LEARNING_RATES]
    found = [{name: relative(run[name], truth[name]) for name in QUANTITIES} for run in measured]
    steps = [problem.of_steps(lr, times) for lr in LEARNING_RATES]
    of_steps = [
        max(float(relative(m[name], s[name]).abs().max()) for name in QUANTITIES)
        for m, s in zip(measured, steps, strict=True)
    ]
    size = {name: [float(each[name].square().mean().sqrt()) for each in found] for name in QUANTITIES}
    return {
        "time": times,
        "learning_rate": LEARNING_RATES,
        "predicted": truth,
        "measured": measured,
        "error": size,
        "order": {name: orders(size[name]) for name in QUANTITIES},
        "largest_error_against_steps": of_steps,
    }


def relative(measured: Sequence[float], truth: Tensor) -> Tensor:
    return torch.tensor(measured, dtype=torch.float64) / truth - 1


def orders(errors: Sequence[float]) -> list[float]:
    """d ln(error)/d ln(lr) between neighbouring learning rates."""
    pairs = zip(errors, errors[1:], LEARNING_RATES, LEARNING_RATES[1:], strict=False)
    return [math.log(e / f) / math.log(a / b) for e, f, a, b in pairs]


# --- replicas


class Unit(nn.Module):
    """½‖scale·Xw − y‖² + ½κ‖w‖² of one linear unit, from Gaussian weights."""

    def __init__(self, mean: Tensor, std: float, scale: float = 1.0, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(mean + std * torch.randn_like(mean))
        self.scale, self.weight_decay = scale, weight_decay

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        residual = self.scale * (x @ self.w) - y
        return 0.5 * residual.square().sum() + 0.5 * self.weight_decay * self.w.square().sum()


def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return model(x, y)


def limits(found: Replicas, label: str) -> list[DistributionLimit]:
    """From the start to every later record."""
    arrays = found.times, found.positions, found.losses, found.temperature
    return [speed_limit(*arrays, end=end, entropy="gaussian") for end in progress(range(1, len(found.times)), label)]


def many_starts(problem: Regression, scale: Scale, seed: int) -> dict[str, Any]:
    """Replicas of gradient descent from N(w_0, s²), beside the closed form of the population."""
    times = [time for time in START_TIMES if time <= scale.start_horizon]
    record = [0, *(round(time / START_LR) for time in times)]
    torch.manual_seed(seed)
    found = train_replicas(
        [Unit(problem.weights, START_STD) for _ in range(scale.starts)],
        loss_of,
        (problem.inputs, problem.targets),
        lr=START_LR,
        steps=record[-1],
        record_at=record,
        seed=seed,
    )
    measured = limits(found, "starts")
    curve = problem.curve(times, START_STD)
    return {
        "time": times,
        "predicted": {
            "wasserstein2_squared": curve.wasserstein2_squared,
            "loss_drop": curve.entropy_production,
            "efficiency": curve.efficiency,
        },
        "predicted_of_steps": problem.of_steps(START_LR, times, START_STD),
        "measured": {name: [plain(getattr(each, name)) for each in measured] for name in QUANTITIES},
        "certificate": [
            {
                "method": each.transport.method,
                "upper_over_lower": each.transport.upper / each.transport.lower - 1,
                "identity_excess": each.transport.identity_excess,
            }
            for each in measured
        ],
        "unpaired": unpaired(found),
    }


def unpaired(found: Replicas) -> list[float]:
    """W₂² from the starts of one half to the ends of the other: what it costs not to know who came from where."""
    half = found.positions.shape[1] // 2
    start, ends = found.positions[0, :half], found.positions[1:, half : 2 * half]
    return [wasserstein2_squared(start, end).value for end in ends]


@dataclass(frozen=True)
class Perceptron:
    """½‖Xw/√d − y‖² + ½κ‖w‖² at temperature T, from N(0, s²)."""

    inputs: Tensor
    labels: Tensor
    std: float = 0.3
    temperature: float = 0.1
    weight_decay: float = 0.5
    lr: float = 0.0005
    times: tuple[float, ...] = (0.05, 0.1, 0.25, 0.6, 1.5)

    @classmethod
    def draw(cls, seed: int, data: int = 24, width: int = 5) -> Perceptron:
        """Gaussian inputs and the labels that a teacher gives them."""
        torch.manual_seed(seed)
        inputs, teacher = torch.randn(data, width, dtype=torch.float64), torch.randn(width, dtype=torch.float64)
        return cls(inputs, (inputs @ teacher).sign())

    def curve(self, times: Sequence[float] | Tensor) -> Curve:
        settings = {"std": self.std, "temperature": self.temperature, "weight_decay": self.weight_decay}
        return perceptron(self.inputs, self.labels, times, **settings)

    def train(self, replicas: int, seed: int) -> Replicas:
        record = [0, *(round(time / self.lr) for time in self.times)]
        width = self.inputs.shape[1]
        torch.manual_seed(seed)
        mean = torch.zeros(width, dtype=torch.float64)
        units = [Unit(mean, self.std, width**-0.5, self.weight_decay) for _ in range(replicas)]
        settings = {"lr": self.lr, "steps": record[-1], "temperature": self.temperature, "record_at": record}
        # Another seed than that of the starts: else the first noise would repeat the first replica's start.
        return train_replicas(units, loss_of, (self.inputs, self.labels), seed=seed + 1, **settings)


PERCEPTRON_QUANTITIES = (
    "wasserstein2_squared",
    "wasserstein2_squared_lower",
    "free_energy_drop",
    "loss_drop",
    "efficiency",
    "efficiency_lower",
)


def perceptrons(case: Perceptron, scale: Scale, seed: int) -> dict[str, Any]:
    """Replicas of the perceptron beside the closed form; Q is the drop of the free energy."""
    found = case.train(scale.perceptrons, seed)
    measured = limits(found, "perceptron")
    curve = case.curve(case.times)
    inputs = case.inputs / case.inputs.shape[1] ** 0.5
    return {
        "time": case.times,
        "inputs": case.inputs,
        "labels": case.labels,
        "curvature": torch.linalg.eigvalsh(inputs.T @ inputs) + case.weight_decay,
        "predicted": {
            "wasserstein2_squared": curve.wasserstein2_squared,
            "free_energy_drop": curve.entropy_production,
            "efficiency": curve.efficiency,
        },
        "measured": {name: [plain(getattr(each, name)) for each in measured] for name in PERCEPTRON_QUANTITIES},
        "fewer_replicas": fewer_replicas(found, float(curve.wasserstein2_squared[0])),
    }


def fewer_replicas(found: Replicas, truth: float) -> dict[str, Any]:
    """The clouds' W₂² at the first time, over the closed form's, for ensembles of several sizes."""
    replicas = found.positions.shape[1]
    sizes, rows = [replicas // 16, replicas // 4, replicas], []
    for size in sizes:
        groups = [slice(start, start + size) for start in range(0, replicas - size + 1, size)]
        values = [wasserstein2_squared(found.positions[0, group], found.positions[1, group]).value for group in groups]
        rows.append(sum(values) / len(values) / truth)
    return {"time": float(found.times[1]), "replicas": sizes, "ratio": rows}


# --- what is shown


def plain(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "standard_error": estimate.standard_error}


def points(axes: Any, x: Any, estimates: Sequence[dict[str, float]], i: int, label: str, **style: Any) -> None:
    """Markers with two standard errors each way."""
    errors = [2 * each["standard_error"] for each in estimates]
    style = {"fmt": MARKERS[i], "color": COLOURS[i], "capsize": 2, "elinewidth": 1, "label": label} | style
    axes.errorbar(x, [each["value"] for each in estimates], errors, **style)


def smooth(times: Sequence[float]) -> Tensor:
    return torch.logspace(math.log10(0.8 * times[0]), math.log10(1.25 * times[-1]), 100, dtype=torch.float64)


TIME = "τ  [parameter²/loss]"


def draw(panels: Any, found: dict[str, Any], problem: Regression, case: Perceptron) -> None:
    draw_efficiency(panels[0, 0], found["one_start"], problem)
    draw_collapse(panels[0, 1], found["one_start"])
    draw_order(panels[0, 2], found["one_start"])
    draw_starts(panels[1, 0], found["many_starts"], problem)
    draw_perceptron(panels[1, 1], found["perceptron"], case)
    draw_perceptron_efficiency(panels[1, 2], found["perceptron"], case)


def draw_efficiency(axes: Any, rows: dict[str, Any], problem: Regression) -> None:
    t = smooth(rows["time"])
    axes.plot(t, problem.curve(t).efficiency, color=COLOURS[0], label="closed form")
    for i, (lr, run) in enumerate(zip(LEARNING_RATES, rows["measured"], strict=True), 1):
        style = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": "", "markerfacecolor": "none"}
        axes.plot(rows["time"], run["efficiency"], label=f"SGD, lr {lr:g}", **style)
    axes.set(title="Regression from one start", xlabel=TIME, ylabel="efficiency η", xscale="log")
    axes.legend()


def draw_collapse(axes: Any, rows: dict[str, Any]) -> None:
    for i, (lr, run) in enumerate(zip(LEARNING_RATES, rows["measured"], strict=True), 1):
        error = 100 * relative(run["efficiency"], rows["predicted"]["efficiency"]) / lr
        axes.plot(rows["time"], error, color=COLOURS[i], marker=MARKERS[i], linestyle=LINES[i], label=f"lr {lr:g}")
    axes.axhline(0, color="#888888", linewidth=1)
    axes.set(title="The error of η is proportional to lr", xlabel=TIME, ylabel="error of η / lr  [%]", xscale="log")
    axes.legend()


def draw_order(axes: Any, rows: dict[str, Any]) -> None:
    rate = torch.tensor(LEARNING_RATES, dtype=torch.float64)
    labels = ("W₂²", "loss drop", "efficiency")
    for i, (label, name) in enumerate(zip(labels, QUANTITIES, strict=True)):
        errors = rows["error"][name]
        label = f"{label}, order {rows['order'][name][-1]:.2f}"
        axes.plot(rate, errors, color=COLOURS[i], marker=MARKERS[i], linestyle="", label=label)
        axes.plot(rate, errors[-1] * rate / rate[-1], color=COLOURS[i], linestyle=LINES[i], linewidth=1)
    axes.set(title="All errors: lines ∝ lr", xlabel="learning rate", ylabel="relative error, r.m.s. over τ")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(LEARNING_RATES, [f"{x:g}" for x in LEARNING_RATES])
    axes.set_xticks([], minor=True)
    axes.legend()


def draw_starts(axes: Any, rows: dict[str, Any], problem: Regression) -> None:
    t = smooth(rows["time"])
    curve = problem.curve(t, START_STD)
    axes.plot(t, curve.wasserstein2_squared, color=COLOURS[0], linestyle=LINES[0])
    points(axes, rows["time"], rows["measured"]["wasserstein2_squared"], 0, "W₂²  [parameter²]")
    axes.plot(t, curve.efficiency, color=COLOURS[1], linestyle=LINES[1])
    points(axes, rows["time"], rows["measured"]["efficiency"], 1, "efficiency η")
    style = {"color": COLOURS[2], "marker": MARKERS[2], "linestyle": "", "markerfacecolor": "none"}
    axes.plot(rows["time"], rows["unpaired"], label="W₂² without the pairing", **style)
    axes.set(title="Regression from Gaussian starts", xlabel=TIME, xscale="log", yscale="log")
    axes.legend()


def draw_perceptron(axes: Any, rows: dict[str, Any], case: Perceptron) -> None:
    t = smooth(rows["time"])
    curve = case.curve(t)
    axes.plot(t, curve.wasserstein2_squared, color=COLOURS[0], linestyle=LINES[0])
    points(axes, rows["time"], rows["measured"]["wasserstein2_squared"], 0, "W₂²  [parameter²]")
    axes.plot(t, curve.entropy_production, color=COLOURS[1], linestyle=LINES[1])
    points(axes, rows["time"], rows["measured"]["free_energy_drop"], 1, "free energy drop  [loss]")
    axes.set(title=f"Perceptron with Langevin noise, T = {case.temperature:g}", xlabel=TIME, xscale="log", yscale="log")
    axes.legend()


def draw_perceptron_efficiency(axes: Any, rows: dict[str, Any], case: Perceptron) -> None:
    t = smooth(rows["time"])
    axes.plot(t, case.curve(t).efficiency, color=COLOURS[0], label="closed form")
    points(axes, rows["time"], rows["measured"]["efficiency"], 1, "W₂² of the clouds")
    label = "W₂² from their moments"
    shifted = [1.06 * time for time in rows["time"]]
    points(axes, shifted, rows["measured"]["efficiency_lower"], 3, label, markerfacecolor="white")
    axes.set(title="Its efficiency: finite clouds bias W₂² upwards", xlabel=TIME, ylabel="efficiency η", xscale="log")
    axes.legend()


def tell(report: Report, found: dict[str, Any]) -> None:
    """The table: measured, predicted, difference (in % without sampling, in standard errors with it)."""
    report.say("", "measured", "s.e.", "predicted", "difference")
    rows = found["one_start"]
    for i, time in enumerate(rows["time"]):
        truth, value = float(rows["predicted"]["efficiency"][i]), rows["measured"][-1]["efficiency"][i]
        label = f"one start, lr {LEARNING_RATES[-1]:g}: efficiency at τ = {time:g}"
        report.say(label, number(value, 4), "", number(truth, 4), f"{100 * (value / truth - 1):+.2f} %")
    for name in QUANTITIES:
        measured = ", ".join(f"{order:.3f}" for order in rows["order"][name])
        report.say(f"order in lr of the error of {name.replace('_', ' ')}", measured, "", "1")
    for key, prediction in (("many_starts", "predicted_of_steps"), ("perceptron", "predicted")):
        rows, label = found[key], key.replace("_", " ")
        for name, estimates in rows["measured"].items():
            truths = rows[prediction].get(name.removesuffix("_lower"), [])
            for time, estimate, truth in zip(rows["time"], estimates, truths, strict=False):
                say(report, f"{label}: {name.replace('_', ' ')} at τ = {time:g}", estimate, float(truth))


def say(report: Report, label: str, estimate: dict[str, float], truth: float) -> None:
    value, error = estimate["value"], estimate["standard_error"]
    report.say(label, number(value, 4), number(error, 2), number(truth, 4), f"{(value - truth) / error:+.1f} s.e.")


def main() -> None:
    options = parse("Linear regression and a perceptron against their closed forms.")
    scale = QUICK if options.quick else FULL
    problem, case = Regression.draw(options.seed), Perceptron.draw(options.seed)
    if options.quick:
        case = replace(case, lr=4 * case.lr)  # few replicas see no error of this size
    eigenvalues, strength = problem.modes
    settings = {"eigenvalues": eigenvalues, "strength": strength, "std": START_STD, "lr_of_replicas": START_LR}
    of_case = {"std": case.std, "temperature": case.temperature, "weight_decay": case.weight_decay, "lr": case.lr}
    report = Report("linear", options, settings | {"perceptron": of_case, "scale": vars(scale)})
    found = {
        "one_start": one_start(problem, scale),
        "many_starts": many_starts(problem, scale, options.seed + 1),
        "perceptron": perceptrons(case, scale, options.seed + 2),
    }
    report.add(**found)
    tell(report, found)
    with figure(3, 2) as (drawn, panels):
        draw(panels, found, problem, case)
        report.save(drawn)


if __name__ == "__main__":
    main()
