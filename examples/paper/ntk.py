"""The neural tangent kernel predicts the efficiency of a network's training: the better, the wider it is.

    python examples/paper/ntk.py            # some four minutes on one core
    python examples/paper/ntk.py --quick    # a few seconds, to see that it works

A two-layer network f(x) = a·tanh(Wx/√d + b)/√n of width n, all weights drawn from N(0, 1) (the NTK parametrization:
the kernel K = JJᵀ, J = ∂f/∂θ, has a limit as n grows, and so has the learning rate), is trained on 40 points by
full-batch gradient descent, and measured step by step by `TrajectoryMeter`. With r_0 = f_{θ_0} − y in the
eigenbasis of its own kernel at the start, `theory.predict` says before the training (the theory page, §6)

    W₂²(t) = Σ (1 − e^{−λt})² r_0²/λ,   Q(t) = ½ Σ (1 − e^{−2λt}) r_0²,   η = W₂²/(t·Q).

It would be exact if J did not move. Shown: η measured and predicted; by how much they differ, against width and
against the motion of the kernel; which of W₂² and Q departs, and what of it the moving kernel explains; and what
share of both is owed to the initial function f_{θ_0}, by runs with f_{θ_0} subtracted.

Loss ½‖f − y‖², time t = learning rate × steps; only the run on handwritten digits uses nn.MSELoss, in its units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from common import COLOURS, LINES, MARKERS, Report, digits, figure, number, parse, progress
from torch import Tensor, nn

from lightning_speedlimit import TrajectoryMeter
from lightning_speedlimit.theory import empirical_ntk, ntk_eigenbasis, predict, split_initial

POINTS, INPUTS = 40, 4
FIRST = 2  # the times before are left out of the curves over time, but for η
STEP = 0.05  # learning rate × λ_1, the largest eigenvalue of the network's own kernel at the start


@dataclass(frozen=True)
class Plan:
    """What is run. Times are λ_1·t, in units in which the fastest mode of the kernel relaxes."""

    widths: tuple[int, ...]
    seeds: int
    times: tuple[float, ...]
    shown: tuple[float, ...]
    centred: tuple[int, ...]
    centred_seeds: int
    half: int
    half_seeds: int
    digits: int


FULL = Plan(
    widths=(64, 128, 256, 512, 1024, 2048, 4096),
    seeds=8,
    times=(0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 40, 50, 65, 80, 100),
    shown=(5, 20, 100),
    centred=(64, 1024),
    centred_seeds=5,
    half=1024,
    half_seeds=2,
    digits=1024,
)
QUICK = Plan((64, 1024), 2, (0.1, 0.2, 0.5, 1, 2, 3, 5, 7.5, 10), (5, 10), (64,), 2, 64, 1, 64)


# --- what is trained


class TwoLayers(nn.Module):
    """f(x) = a·tanh(Wx/√d + b)/√n in float64, W (n, d), b (n,), a (outputs, n), entries from N(0, 1)."""

    def __init__(self, inputs: int, width: int, outputs: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.W, self.b, self.a = normal(width, inputs), normal(width), normal(outputs, width)

    def forward(self, x: Tensor) -> Tensor:
        width, inputs = self.W.shape
        return torch.tanh(torch.addmm(self.b, x, self.W.T, alpha=inputs**-0.5)) @ self.a.T / width**0.5


class Centred(nn.Module):
    """f_θ(x) − f_{θ_0}(x): the same weights, the same kernel, and exactly 0 at the start."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.start = copy.deepcopy(network).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) - self.start(x)


class Linearised(nn.Module):
    """f_{θ_0} + J·(θ − θ_0) on the data it was made for: a network whose kernel cannot move."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("jacobian", jacobian(network, x))
        self.register_buffer("start", network(x).detach())
        self.change = nn.Parameter(torch.zeros_like(self.jacobian[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.start + (self.jacobian @ self.change).reshape(self.start.shape)


def jacobian(network: nn.Module, x: Tensor) -> Tensor:
    """J = ∂f/∂θ, (N·C, P), of the parameters that are trained."""
    moving = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    parts = torch.func.jacrev(lambda p: torch.func.functional_call(network, p, (x,)).flatten())(moving)
    return torch.cat([part.flatten(1) for part in parts.values()], 1)


def points(seed: int) -> tuple[Tensor, Tensor]:
    """40 inputs from N(0, 1) in 4 dimensions, and y = sin(2 u·x), u a unit vector."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(POINTS, INPUTS, generator=generator, dtype=torch.float64)
    u = torch.randn(INPUTS, generator=generator, dtype=torch.float64)
    return x, torch.sin(2 * x @ u / u.norm())[:, None]


def images(seed: int) -> tuple[Tensor, Tensor]:
    """40 of the handwritten digits, (40, 64), and their labels one-hot, (40, 10)."""
    x, labels = digits()
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:POINTS]
    return x[chosen].flatten(1).double(), nn.functional.one_hot(labels[chosen], 10).double()


# --- how it is trained and measured


def descend(
    module: nn.Module, data: tuple[Tensor, Tensor], lr: float, marks: Sequence[int], mean: bool = False
) -> Iterator[tuple[int, dict[str, float]]]:
    """Full-batch gradient descent; at each of the steps `marks`: the step, and what the meter says.

    The loss is recorded before every step and once after the last, so that the last window, of two losses, ends
    with L(θ_K) itself: the loss drop is exact.
    """
    x, y = data
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
    meter = TrajectoryMeter(optimizer, clock="lr", loss_window=2)
    for step in range(marks[-1] + 1):
        optimizer.zero_grad()
        outputs = module(x)
        loss = nn.functional.mse_loss(outputs, y) if mean else 0.5 * (outputs - y).square().sum()
        meter.record_loss(loss)
        if step in marks:
            yield step, meter.compute()
        if step < marks[-1]:
            loss.backward()
            optimizer.step()
    meter.close()


def stepwise(eigenvalues: Tensor, residual: Tensor, lr: float, step: int) -> tuple[float, float]:
    """W₂² = Σ (1 − qᵏ)² r²/λ,  Q = ½ Σ (1 − q²ᵏ) r²,  q = 1 − lr·λ: `gradient_flow` for k finite steps."""
    decay = (1 - lr * eigenvalues) ** step
    squares = residual.square()
    moving = eigenvalues > 0
    squared = ((1 - decay).square() * squares)[moving] / eigenvalues[moving]
    return squared.sum().item(), 0.5 * ((1 - decay.square()) * squares).sum().item()


def with_kernel(kernel: Tensor, residual: Tensor, lr: float, step: int) -> tuple[float, float]:
    """`stepwise` for any kernel (N, N) and residual (N,) on the data."""
    eigenvalues, basis = torch.linalg.eigh(kernel)
    return stepwise(eigenvalues.clamp_min(0), basis.T @ residual, lr, step)


class Replay:
    """Training in the linear model again, with the Jacobians that were measured along the run.

    From mark to mark J̄ = ½(J + J') is held, so that with K̄ = J̄J̄ᵀ
        r' = (1 − lr K̄)ᵏ r,   Δθ = −J̄ᵀ K̄⁻¹ (r − r').
    """

    def __init__(self, first: Tensor, residual: Tensor, lr: float) -> None:
        self.jacobian, self.residual, self.lr, self.step = first, residual, lr, 0
        self.change = torch.zeros_like(first[0])
        self._initial = residual

    def advance(self, jacobian: Tensor, step: int) -> tuple[float, float]:
        """(‖Δθ‖², ½‖r_0‖² − ½‖r‖²) at a later step, where the Jacobian was found to be this."""
        middle = 0.5 * (self.jacobian + jacobian)
        eigenvalues, basis = torch.linalg.eigh(middle @ middle.T)
        start = basis.T @ self.residual
        end = (1 - self.lr * eigenvalues) ** (step - self.step) * start
        self.change -= middle.T @ (basis @ ((start - end) / eigenvalues))
        self.residual, self.jacobian, self.step = basis @ end, jacobian, step
        drop = 0.5 * (self._initial.square().sum() - self.residual.square().sum())
        return self.change.square().sum().item(), drop.item()


@dataclass(frozen=True)
class Run:
    """One training at the marks (m,): (W₂², Q) of each account as (m, 2), and how far the kernel had moved.

    measured: by the meter. predicted: `theory.predict`, gradient flow. stepwise: the same for these finite steps.
    averaged: stepwise with the kernel's measured average over [0, t]. replayed: with the measured Jacobians.
    efficiency: the meter's. kernel_moved: ‖K_t − K_0‖/‖K_0‖. jacobian_moved: ‖J_t − J_0‖/‖J_0‖.
    """

    time: Tensor
    efficiency: Tensor
    measured: Tensor
    predicted: Tensor
    stepwise: Tensor
    averaged: Tensor
    replayed: Tensor
    kernel_moved: Tensor
    jacobian_moved: Tensor

    def predicted_efficiency(self) -> Tensor:
        return self.predicted[..., 0] / (self.time * self.predicted[..., 1])

    def departure(self, account: str) -> Tensor:
        """ln(measured/account) of η, W₂² and Q, (…, m, 3): the first is the second minus the third."""
        squared, drop = (self.measured / getattr(self, account)).log().unbind(-1)
        return torch.stack([squared - drop, squared, drop], -1)


def measure(module: nn.Module, data: tuple[Tensor, Tensor], times: Sequence[float], step_size: float = STEP) -> Run:
    """Trains with lr = step_size/λ_1 until λ_1·t is the last of the times, and takes all accounts on the way."""
    x, y = data
    eigenvalues, initial, goal = ntk_eigenbasis(module, x, y)
    lr = step_size / eigenvalues[-1].item()
    marks = [round(time / step_size) for time in times]
    curve = predict(module, x, y, [lr * mark for mark in marks])
    first = jacobian(module, x)
    kernel = last = first @ first.T
    residual = (module(x) - y).detach().flatten()
    replay, integral, before = Replay(first, residual, lr), torch.zeros_like(kernel), 0
    rows: list[dict[str, Any]] = []
    for step, values in descend(module, data, lr, marks):
        now = jacobian(module, x)
        integral += 0.5 * (last + now @ now.T) * (step - before)
        last, before = now @ now.T, step
        rows.append(
            {
                "efficiency": values["efficiency"],
                "measured": (values["displacement"] ** 2, values["loss_drop"]),
                "stepwise": stepwise(eigenvalues, initial - goal, lr, step),
                "averaged": with_kernel(integral / step, residual, lr, step),
                "replayed": replay.advance(now, step),
                "kernel_moved": (last - kernel).norm() / kernel.norm(),
                "jacobian_moved": (now - first).norm() / first.norm(),
            }
        )
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    predicted = torch.stack([curve.wasserstein2_squared, curve.entropy_production], 1)
    return Run(time=curve.time, predicted=predicted, **columns)


def stack(runs: Sequence[Run]) -> Run:
    """Several seeds as one, each field with the seeds as its first dimension."""
    return Run(**{field.name: torch.stack([getattr(run, field.name) for run in runs]) for field in fields(Run)})


# --- what is asked of the runs


def slope(widths: Sequence[int], sizes: Tensor) -> tuple[float, float]:
    """d ln⟨size⟩/d ln width by least squares, ⟨⟩ over seeds; its error from the scatter about the line.

    Args:
        sizes: (widths, seeds), positive. With two widths the error is NaN.
    """
    x = torch.tensor(widths, dtype=torch.float64).log()
    y = sizes.mean(1).log()
    x, y = x - x.mean(), y - y.mean()
    found = (x @ y) / (x @ x)
    scatter = (y - found * x).square().sum() / (len(widths) - 2) if len(widths) > 2 else math.nan
    return found.item(), float(scatter / (x @ x)) ** 0.5


def by_width(plan: Plan, runs: dict[int, Run]) -> dict[str, Any]:
    """At the times shown: departures of each seed, their means, and how they scale with width."""
    found: dict[str, Any] = {}
    for time in plan.shown:
        at = plan.times.index(time)

        def of(values: Callable[[Run], Tensor], at: int = at) -> Tensor:
            """(widths, seeds) or (widths, seeds, 3)."""
            return torch.stack([values(runs[width])[:, at] for width in plan.widths])

        departure, flow, turning = (
            of(lambda run, name=name: run.departure(name)) for name in ("stepwise", "predicted", "averaged")
        )
        kernel, jacobians = of(lambda run: run.kernel_moved), of(lambda run: run.jacobian_moved)
        squared = of(lambda run: run.measured)[..., 0]
        size, size_from_flow = departure[..., 0].expm1().abs(), flow[..., 0].expm1().abs()
        found[f"{time:g}"] = {
            "efficiency_measured": of(lambda run: run.efficiency).mean(1),
            "efficiency_predicted": of(lambda run: run.predicted_efficiency()).mean(1),
            "log_ratio": departure[..., 0],
            "log_ratio_mean": departure[..., 0].mean(1),
            "log_ratio_error": error_of_mean(departure[..., 0], 1),
            "relative_departure": size.mean(1),
            "relative_departure_error": error_of_mean(size, 1),
            "relative_departure_from_flow": size_from_flow.mean(1),
            "step_alone": (flow - departure)[..., 0].expm1().abs().mean(1),
            "rms_wasserstein2_squared": rms(departure[..., 1], 1),
            "rms_loss_drop": rms(departure[..., 2], 1),
            "turning_mean": turning[..., 0].mean(1),
            "turning_error": error_of_mean(turning[..., 0], 1),
            "kernel_moved": kernel,
            "rms_log_ratio_over_kernel_moved": rms(departure[..., 0], 1) / kernel.mean(1),
            "slopes": {
                "efficiency": slope(plan.widths, size),
                "efficiency_from_flow": slope(plan.widths, size_from_flow),
                "wasserstein2_squared": slope(plan.widths, departure[..., 1].expm1().abs()),
                "loss_drop": slope(plan.widths, departure[..., 2].expm1().abs()),
                "kernel_moved": slope(plan.widths, kernel),
                "jacobian_moved": slope(plan.widths, jacobians),
                "kernel_moved_over_wasserstein2_squared": slope(plan.widths, kernel / squared),
                "jacobian_moved_over_wasserstein2": slope(plan.widths, jacobians / squared.sqrt()),
            },
        }
    return found


def error_of_mean(values: Tensor, dim: int) -> Tensor:
    return values.std(dim) / values.shape[dim] ** 0.5


def rms(values: Tensor, dim: int = 0) -> Tensor:
    return values.square().mean(dim).sqrt()


QUANTITIES = ("efficiency", "wasserstein2_squared", "loss_drop")
ACCOUNTS = ("stepwise", "averaged", "replayed")


def splits(plan: Plan, runs: dict[int, Run]) -> dict[str, Any]:
    """ln(measured/account) of η, W₂², Q: over time for the narrowest, and its size at the times shown for both ends."""
    narrow, wide = plan.widths[0], plan.widths[-1]
    at = [plan.times.index(time) for time in plan.shown]
    curves = {
        account: {
            name: {"mean": values[..., i].mean(0), "error": error_of_mean(values[..., i], 0)}
            for i, name in enumerate(QUANTITIES)
            if name != "efficiency" or account == "stepwise"
        }
        for account in ACCOUNTS
        for values in [runs[narrow].departure(account)[:, FIRST:]]
    }
    sizes = {
        str(width): {
            account: {name: rms(runs[width].departure(account)[:, at, i]) for i, name in enumerate(QUANTITIES)}
            for account in ACCOUNTS
        }
        for width in (narrow, wide)
    }
    return {"width": narrow, "curves": curves, "rms": sizes}


def half_step(plan: Plan, data: tuple[Tensor, Tensor], runs: dict[int, Run], seed: int) -> dict[str, Any]:
    """ln(measured/account) of η at the times shown, for some runs and the same with half the step."""
    at = [plan.times.index(time) for time in plan.shown]
    again = [
        measure(network(plan.half, s, seed), data, plan.times, STEP / 2)
        for s in progress(range(plan.half_seeds), "half the step")
    ]
    whole, halved = runs[plan.half], stack(again)
    kept = slice(plan.half_seeds)
    return {
        "width": plan.half,
        "step_size": STEP / 2,
        "from_flow": whole.departure("predicted")[kept, at, 0],
        "from_flow_at_half": halved.departure("predicted")[:, at, 0],
        "stepwise": whole.departure("stepwise")[kept, at, 0],
        "stepwise_at_half": halved.departure("stepwise")[:, at, 0],
    }


def linear_control(plan: Plan, data: tuple[Tensor, Tensor], seed: int) -> dict[str, Any]:
    """The narrowest network with its Jacobian held: what is left of the departure is the step's, and known."""
    run = measure(Linearised(network(plan.widths[0], 0, seed), data[0]), data, plan.times)
    at = [plan.times.index(time) for time in plan.shown]
    return {
        "width": plan.widths[0],
        "from_flow": run.departure("predicted")[at, 0],
        "stepwise": run.departure("stepwise")[:, 0].abs().max(),
    }


def initial_shares(plan: Plan, data: tuple[Tensor, Tensor], runs: dict[int, Run], seed: int) -> dict[str, Any]:
    """1 − V(f_{θ_0} subtracted)/V(as drawn), V = W₂² or Q: from both trainings, and by `theory.split_initial`."""
    found: dict[str, Any] = {}
    for width in plan.centred:
        plain, seeds = runs[width], plan.centred_seeds
        networks = [network(width, s, seed) for s in range(seeds)]
        shares = [split_initial(*ntk_eigenbasis(one, *data), plain.time[s]) for s, one in enumerate(networks)]
        bar = progress(networks, f"centred, width {width}", seeds)
        centred = stack([measure(Centred(one), data, plan.times) for one in bar])  # moves the networks
        measured = 1 - (centred.measured / plain.measured[:seeds])[:, FIRST:]
        pairs = [torch.stack([share.wasserstein2_squared, share.entropy_production], 1) for share in shares]
        predicted = torch.stack(pairs)[:, FIRST:]
        found[str(width)] = {
            name: {
                "measured": measured[..., i].mean(0),
                "error": error_of_mean(measured[..., i], 0),
                "predicted": predicted[..., i].mean(0),
                "rms_difference_at_the_end": rms(measured[..., i] - predicted[..., i])[-1],
                "each_measured_at_the_end": measured[:, -1, i],
                "each_predicted_at_the_end": predicted[:, -1, i],
            }
            for i, name in enumerate(QUANTITIES[1:])
        }
        at = [plan.times.index(time) for time in plan.shown]
        found[str(width)]["rms_departure"] = rms(plain.departure("stepwise")[:seeds, at, 0])
        found[str(width)]["rms_departure_centred"] = rms(centred.departure("stepwise")[:, at, 0])
    return found


def on_digits(plan: Plan, seed: int) -> dict[str, Any]:
    """Ten outputs and nn.MSELoss: its curve in its own time t' = t·N·C/2, from the same `predict`."""
    x, y = images(seed)
    module = TwoLayers(x.shape[1], plan.digits, y.shape[1], seed)
    kernel = empirical_ntk(module, x)
    largest = torch.linalg.eigvalsh(kernel)[-1].item() * 2 / y.numel()  # of the mean-reduced loss
    lr = STEP / largest
    marks = [round(time / STEP) for time in plan.times if time >= 1]
    curve = predict(module, x, y, [lr * mark for mark in marks], reduction="mean")
    found = [values for _, values in progress(descend(module, (x, y), lr, marks, mean=True), "digits", len(marks))]
    return {
        "width": plan.digits,
        "learning_rate": lr,
        "scaled_time": [mark * STEP for mark in marks],
        "measured": [values["efficiency"] for values in found],
        "predicted": curve.efficiency,
        "wasserstein2_squared_ratio": found[-1]["displacement"] ** 2 / curve.wasserstein2_squared[-1],
        "loss_drop_ratio": found[-1]["loss_drop"] / curve.entropy_production[-1],
        "kernel_moved": (empirical_ntk(module, x) - kernel).norm() / kernel.norm(),
    }


def network(width: int, number: int, seed: int) -> TwoLayers:
    return TwoLayers(INPUTS, width, 1, 1_000_000 * seed + 10_000 * (number + 1) + width)


def curve_of(run: Run) -> dict[str, Tensor]:
    """One run's η, measured and by `theory.predict`."""
    return {"measured": run.efficiency, "predicted": run.predicted_efficiency()}


# --- what is shown


def tell(report: Report, plan: Plan, results: dict[str, Any]) -> None:
    """The table: measured, predicted, difference."""
    report.say("", "measured", "predicted", "difference")
    for time, found in results["by_width"].items():
        report.say(f"efficiency at λ1 t = {time}, mean of {plan.seeds} seeds; mean |ratio − 1|")
        for i, width in enumerate(plan.widths):
            report.say(
                f"  width {width}",
                number(found["efficiency_measured"][i], 4),
                number(found["efficiency_predicted"][i], 4),
                f"{100 * found['relative_departure_from_flow'][i]:.2f} %",
            )
        report.say("  slopes against width (step's own effect taken out)")
        for name, label, expected in (
            ("efficiency", "|ratio − 1|", -1),
            ("kernel_moved_over_wasserstein2_squared", "motion of K, over W2²", -1),
            ("jacobian_moved_over_wasserstein2", "motion of J, over W2", -0.5),
        ):
            _say(report, f"    {label}", found["slopes"][name][0], expected)
    control, half = results["linearised"], results["half_step"]
    report.say("linearised, largest |ratio − 1|", number(control["stepwise"].item()), "0")
    change = (half["stepwise_at_half"] - half["stepwise"]).abs().max().item()
    report.say("half the step changes |ratio − 1| by at most", number(change), "0")
    for width, found in results["initial"].items():
        for name, symbol in (("wasserstein2_squared", "W2²"), ("loss_drop", "loss drop")):
            share = found[name]
            name = f"share of {symbol} owed to f at θ_0, width {width}, at the end"
            _say(report, name, share["measured"][-1].item(), share["predicted"][-1].item())
    found = results["digits"]
    _say(report, f"digits, width {plan.digits}: efficiency", found["measured"][-1], found["predicted"][-1].item())


def _say(report: Report, name: str, measured: float, predicted: float) -> None:
    report.say(name, number(measured, 4), number(predicted, 4), f"{measured - predicted:+.1e}")


TIME = "λ₁·t  (t = learning rate × steps)"


def draw_efficiency(axis: Any, plan: Plan, results: dict[str, Any]) -> None:
    curves = [(f"width {width}", plan.times, curve) for width, curve in results["curves"].items()]
    found = results["digits"]
    curves.append((f"digits, width {found['width']}", found["scaled_time"], found))
    for n, (name, times, curve) in enumerate(curves):
        axis.plot(times, curve["predicted"], linestyle=LINES[n], color=COLOURS[n], label=f"{name}: predicted")
        axis.plot(times, curve["measured"], MARKERS[n], color=COLOURS[n], mfc="none", label="measured")
    axis.set(xscale="log", yscale="log", xlabel=TIME, ylabel="efficiency η")
    axis.set_title("(a) The kernel at θ₀ predicts the efficiency")
    axis.legend(loc="lower left")


def draw_widths(axis: Any, plan: Plan, results: dict[str, Any]) -> None:
    widths = torch.tensor(plan.widths, dtype=torch.float64)
    for n, (time, found) in enumerate(results["by_width"].items()):
        size, (exponent, error) = found["relative_departure"], found["slopes"]["efficiency"]
        line = (size.log().mean() + exponent * (widths.log() - widths.log().mean())).exp()
        name = f"λ₁t = {time}: slope {exponent:.2f}".replace("-", "−") + (
            "" if math.isnan(error) else f" ± {error:.2f}"
        )
        axis.errorbar(
            widths, size, found["relative_departure_error"], fmt=MARKERS[n], color=COLOURS[n], mfc="none", capsize=2
        )
        axis.plot(widths, line, linestyle=LINES[n], color=COLOURS[n], label=name)
    low = min(found["relative_departure"].min().item() for found in results["by_width"].values())
    axis.set(xscale="log", yscale="log", xlabel="width n", ylabel="mean |η measured/predicted − 1|")
    axis.set_ylim(bottom=low / 12)
    axis.set_xticks(plan.widths, [str(width) for width in plan.widths])
    axis.minorticks_off()
    axis.set_title("(b) Wider is closer")
    axis.legend(loc="lower left")


def draw_kernel(axis: Any, plan: Plan, results: dict[str, Any]) -> None:
    low, high = math.inf, 0.0
    for n, (time, found) in enumerate(results["by_width"].items()):
        moved = found["kernel_moved"].flatten()
        low, high = min(low, moved.min().item()), max(high, moved.max().item())
        size = found["log_ratio"].expm1().abs().flatten()
        axis.plot(moved, size, MARKERS[n], color=COLOURS[n], mfc="none", label=f"λ₁t = {time}")
    axis.plot([low, high], [low, high], "-", color="#777777", lw=1, label="equal to it")
    axis.set(xscale="log", yscale="log", xlabel="motion of the kernel, ‖K_t − K_0‖/‖K_0‖")
    axis.set(ylabel="|η measured/predicted − 1|")
    axis.set_title("(c) It goes with the motion of the kernel")
    axis.legend(loc="upper left")


def draw_split(axis: Any, plan: Plan, results: dict[str, Any]) -> None:
    names = {"wasserstein2_squared": "W₂²", "loss_drop": "loss drop Q", "efficiency": "η: the difference"}
    for n, (name, label) in enumerate(names.items()):
        found = results["splits"]["curves"]["stepwise"][name]
        _bars(axis, plan.times[FIRST:], found, n, label)
    axis.set_title(f"(d) Width {results['splits']['width']}: what departs, and when")
    _finish_ratio(axis, "upper left")


def draw_causes(axis: Any, plan: Plan, results: dict[str, Any]) -> None:
    curves = results["splits"]["curves"]
    accounts = (
        ("averaged", "wasserstein2_squared", "W₂², with the mean kernel"),
        ("averaged", "loss_drop", "Q, with the mean kernel"),
        ("replayed", "wasserstein2_squared", "W₂², with all Jacobians"),
        ("replayed", "loss_drop", "Q, with all Jacobians"),
    )
    for n, (account, name, label) in enumerate(accounts):
        _bars(axis, plan.times[FIRST:], curves[account][name], n, label)
    axis.set_title("(e) The same, with what moved put in")
    _finish_ratio(axis, "lower left")


def _bars(axis: Any, times: Sequence[float], found: dict[str, Tensor], n: int, label: str) -> None:
    style = {"color": COLOURS[n], "linestyle": LINES[n], "marker": MARKERS[n], "mfc": "none", "lw": 0.8}
    axis.errorbar(times, 100 * found["mean"], 100 * found["error"], label=label, capsize=2, **style)


def _finish_ratio(axis: Any, place: str) -> None:
    axis.axhline(0, color="#777777", lw=1)
    axis.set(xscale="log", xlabel=TIME, ylabel="ln(measured/predicted)  (%)")
    axis.legend(loc=place)


def draw_shares(axis: Any, plan: Plan, results: dict[str, Any]) -> None:
    n, times = 0, plan.times[FIRST:]
    for width, found in results["initial"].items():
        for name, symbol in (("loss_drop", "loss drop"), ("wasserstein2_squared", "W₂²")):
            share = found[name]
            style = {"color": COLOURS[n], "fmt": MARKERS[n], "mfc": "none", "capsize": 2, "lw": 0.8}
            axis.plot(times, 100 * share["predicted"], linestyle=LINES[n], color=COLOURS[n])
            axis.errorbar(
                times, 100 * share["measured"], 100 * share["error"], label=f"{symbol}, width {width}", **style
            )
            n += 1
    axis.set(xscale="log", xlabel=TIME, ylabel="share of the initial function (%)", ylim=(0, None))
    axis.set_title("(f) What f at θ₀ costs; lines predicted")
    axis.legend(loc="lower left")


PANELS = (draw_efficiency, draw_widths, draw_kernel, draw_split, draw_causes, draw_shares)


def settings(plan: Plan) -> dict[str, Any]:
    return {
        "points": POINTS,
        "inputs": INPUTS,
        "step_size_times_lambda_1": STEP,
        "widths": plan.widths,
        "seeds": plan.seeds,
        "centred_seeds": plan.centred_seeds,
        "times": plan.times,
    }


def main() -> None:
    options = parse(__doc__.splitlines()[0])
    plan, data, seed = QUICK if options.quick else FULL, points(options.seed), options.seed
    report = Report("ntk", options, settings(plan))
    found: dict[int, list[Run]] = {width: [] for width in plan.widths}
    jobs = [(width, s) for width in plan.widths for s in range(plan.seeds)]
    for width, s in progress(jobs, "widths and seeds", len(jobs)):
        found[width].append(measure(network(width, s, seed), data, plan.times))
    runs = {width: stack(of_width) for width, of_width in found.items()}
    results = {
        "curves": {str(width): curve_of(found[width][0]) for width in (plan.widths[0], plan.widths[-1])},
        "by_width": by_width(plan, runs),
        "splits": splits(plan, runs),
        "half_step": half_step(plan, data, runs, seed),
        "linearised": linear_control(plan, data, seed),
        "initial": initial_shares(plan, data, runs, seed),
        "digits": on_digits(plan, seed),
    }
    report.add(**results)
    tell(report, plan, results)
    with figure(3, 2, width=4.3, height=3.5) as (drawn, axes):
        for panel, axis in zip(PANELS, axes.flat, strict=True):
            panel(axis, plan, results)
        report.save(drawn)


if __name__ == "__main__":
    main()
