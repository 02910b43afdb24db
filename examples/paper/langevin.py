"""Langevin dynamics on a quadratic: replicas of a run against the closed form, and what else could be divided by.

    python examples/paper/langevin.py [--quick] [--output DIR]

dθ = −∇L dt + √(2T) dW on L = ½ Σ h_i x_i², from independent Gaussians N(m_0, s_0²). Shown are

- one mode that starts with its equilibrium's variance, s_0² = T/h: η = tanh(hτ/2)/(hτ/2), wherever the mean is;
- three modes that narrow or widen: W₂², the free energy's drop and η, and what the loss drop alone would give;
- the error of a finite step, and its order;
- the trajectory's own action in the place of the entropy production: it diverges as the step shrinks;
- the rate of entropy production, bounded from short pieces of the same trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import COLOURS, LINES, MARKERS, Options, Report, figure, number, parse, progress
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn

from lightning_speedlimit import TrajectoryMeter
from lightning_speedlimit.ensemble import (
    DistributionLimit,
    Estimate,
    Replicas,
    entropy_production_bound,
    gaussian_entropy,
    speed_limit,
    train_replicas,
)
from lightning_speedlimit.optim import Langevin
from lightning_speedlimit.theory import Curve, langevin
from lightning_speedlimit.transport import gaussian_wasserstein2_squared


@dataclass(frozen=True)
class Case:
    """L = ½ Σ h x² at temperature T, started from N(m_0, s_0²) in each mode."""

    curvature: tuple[float, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    temperature: float

    @property
    def modes(self) -> int:
        return len(self.curvature)

    def potential(self, copies: int = 1) -> Potential:
        return Potential(self, copies)

    def curve(self, times: Tensor) -> Curve:
        return langevin(*map(vector, (self.curvature, self.mean, self.deviation)), self.temperature, times)

    def moments(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """m = e^{−ht} m_0,  v = e^{−2ht} s_0² + (T/h)(1 − e^{−2ht}); (times, modes)."""
        h, m, s = map(vector, (self.curvature, self.mean, self.deviation))
        decay = torch.exp(-h * times[:, None])
        return decay * m, decay**2 * s**2 + self.temperature / h * (1 - decay**2)

    def moments_of_steps(self, lr: float, steps: int) -> tuple[Tensor, Tensor]:
        """m_k = aᵏ m_0,  v_k = a²ᵏ s_0² + 2T lr (1 − a²ᵏ)/(1 − a²),  a = 1 − lr·h: after k steps; (modes,)."""
        h, m, s = map(vector, (self.curvature, self.mean, self.deviation))
        a = 1 - lr * h
        left = a ** (2 * steps)
        return a**steps * m, left * s**2 + 2 * self.temperature * lr * (1 - left) / (1 - a**2)

    def come_to(self, mean: Tensor, variance: Tensor) -> tuple[float, float]:
        """W₂² = Σ (m − m_0)² + (√v − s_0)² and F_0 − F = ½ Σ h (m_0² + s_0² − m² − v) + ½ T Σ ln(v/s_0²)."""
        h, m, s = map(vector, (self.curvature, self.mean, self.deviation))
        distance = (mean - m) ** 2 + (variance.sqrt() - s) ** 2
        drop = h * (m**2 + s**2 - mean**2 - variance) + self.temperature * (variance / s**2).log()
        return float(distance.sum()), 0.5 * float(drop.sum())

    def loss_drop(self, times: Tensor) -> Tensor:
        """⟨L⟩_0 − ⟨L⟩_t, ⟨L⟩ = ½ Σ h (m² + v)."""
        mean, variance = self.moments(torch.cat([torch.zeros(1, dtype=torch.float64), times]))
        loss = 0.5 * (vector(self.curvature) * (mean**2 + variance)).sum(1)
        return loss[0] - loss[1:]

    def rate(self, times: Tensor) -> Tensor:
        """Σ̇ = Σ [h²m² + (h − T/v)² v]/T, nats/time."""
        mean, variance = self.moments(times)
        h = vector(self.curvature)
        power = (h * mean) ** 2 + (h - self.temperature / variance) ** 2 * variance
        return power.sum(1) / self.temperature

    def squared_force(self, time: float) -> float:
        """∫ ⟨‖∇L‖²⟩ dt = ∫ Σ h² (m² + v) dt = Σ ½ h (m_0² + s_0² − T/h)(1 − e^{−2ht}) + h T t."""
        h, m, s = map(vector, (self.curvature, self.mean, self.deviation))
        away = m**2 + s**2 - self.temperature / h
        return float((0.5 * h * away * -torch.expm1(-2 * h * time) + h * self.temperature * time).sum())


class Potential(nn.Module):
    """Σ over copies of ½ Σ h x²: copies do not feel each other, so they are replicas that cost no module each."""

    def __init__(self, case: Case, copies: int) -> None:
        super().__init__()
        mean, deviation = vector(case.mean), vector(case.deviation)
        self.x = nn.Parameter(mean + deviation * torch.randn(copies, case.modes, dtype=torch.float64))
        self.register_buffer("curvature", vector(case.curvature))

    def forward(self) -> Tensor:
        return 0.5 * (self.curvature * self.x**2).sum()


STATIONARY = Case((1.0,), (3.0,), (math.sqrt(0.5),), 0.5)  # s_0² = T/h
RELAXING = Case((0.5, 2.0, 5.0), (1.5, -0.8, 0.5), (0.3, 0.6, 0.1), 0.3)  # widens, narrows, widens
STATIONARY_TIMES = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
RELAXING_TIMES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
FINE = {"stationary": 0.005, "relaxing": 0.002}  # learning rates: lr·h ≤ 0.01
WINDOWS = ((0.05, 0.01), (0.1, 0.01), (0.2, 0.02), (0.4, 0.04), (0.8, 0.08))  # start of a window, its lag
HORIZON = 0.2  # where steps of several sizes are compared
COARSE = (0.04, 0.02, 0.01)  # learning rates: lr·h ≤ 0.2


@dataclass(frozen=True)
class Scale:
    """How much is sampled."""

    stationary: tuple[int, int]  # ensembles, replicas in each
    relaxing: int  # replicas between which W₂² is computed
    pool: int  # replicas of the same run from which rates are bounded
    blocks: int  # for the order in the step: so many times
    copies: int  # this many copies
    action: int  # copies whose action is measured


FULL = Scale((8, 500), 2000, 20_000, 40, 50_000, 20_000)
QUICK = Scale((1, 500), 400, 3000, 20, 4000, 2000)


# --- what is measured


def train(case: Case, lr: float, times: Iterable[float], replicas: int, seed: int, copies: int = 1) -> Replicas:
    """Replicas recorded at 0 and at these times."""
    record = sorted({0, *(round(time / lr) for time in times)})
    torch.manual_seed(seed)
    starts = [case.potential(copies) for _ in range(replicas)]
    settings = {"lr": lr, "steps": record[-1], "temperature": case.temperature, "record_at": record}
    # Another seed than that of the starts: else the first noise would repeat the first replica's start.
    return train_replicas(starts, lambda model: model(), seed=seed + 1, **settings)


def limit_at(found: Replicas, time: float, group: slice) -> DistributionLimit:
    """The speed limit from 0 to a time, between some of the replicas."""
    end = int((found.times - time).abs().argmin())
    return speed_limit(
        found.times, found.positions[:, group], found.losses[:, group], found.temperature, end=end, entropy="gaussian"
    )


def averaged(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over independent ensembles."""
    error = math.sqrt(sum(e.standard_error**2 for e in estimates)) / len(estimates)
    return Estimate(sum(e.value for e in estimates) / len(estimates), error)


def stationary(scale: Scale, seed: int) -> dict[str, Any]:
    """η of one mode with the variance of equilibrium, beside tanh(hτ/2)/(hτ/2)."""
    ensembles, size = scale.stationary
    found = train(STATIONARY, FINE["stationary"], STATIONARY_TIMES, ensembles * size, seed)
    rows: dict[str, list[Any]] = {"time": list(STATIONARY_TIMES), "efficiency": [], "efficiency_lower": []}
    for time in progress(STATIONARY_TIMES, "one mode"):
        limits = [limit_at(found, time, slice(i * size, (i + 1) * size)) for i in range(ensembles)]
        rows["efficiency"].append(plain(averaged([each.efficiency for each in limits])))
        rows["efficiency_lower"].append(plain(averaged([each.efficiency_lower for each in limits])))
    half = STATIONARY.curvature[0] * vector(STATIONARY_TIMES) / 2
    return rows | {"predicted": torch.tanh(half) / half}


MEASURED = (
    "wasserstein2_squared",
    "wasserstein2_squared_lower",
    "free_energy_drop",
    "loss_drop",
    "efficiency",
    "efficiency_lower",
    "efficiency_loss_drop",
)


def relaxing(found: Replicas, scale: Scale) -> dict[str, Any]:
    """W₂², drops and efficiencies of three modes, beside the closed form."""
    times = vector(RELAXING_TIMES)
    limits = [limit_at(found, time, slice(scale.relaxing)) for time in progress(RELAXING_TIMES, "three modes")]
    curve, drop = RELAXING.curve(times), RELAXING.loss_drop(times)
    return {
        "time": times,
        "measured": {name: [plain(getattr(each, name)) for each in limits] for name in MEASURED},
        "certified_gap": [each.transport.upper / each.transport.lower - 1 for each in limits],
        "predicted": {
            "wasserstein2_squared": curve.wasserstein2_squared,
            "free_energy_drop": curve.entropy_production,
            "loss_drop": drop,
            "efficiency": curve.efficiency,
            "efficiency_loss_drop": curve.wasserstein2_squared / (times * drop),
        },
    }


def fewer_replicas(found: Replicas, scale: Scale) -> dict[str, Any]:
    """The cloud's W₂² at the first time, over the closed form's, for ensembles of several sizes."""
    truth = float(RELAXING.curve(vector(RELAXING_TIMES[:1])).wasserstein2_squared)
    sizes, rows = [scale.relaxing // 16, scale.relaxing // 4, scale.relaxing], []
    for size in sizes:
        groups = [slice(start, start + size) for start in range(0, scale.relaxing, size)]
        mean = averaged([limit_at(found, RELAXING_TIMES[0], group).wasserstein2_squared for group in groups])
        rows.append({"value": mean.value / truth, "standard_error": mean.standard_error / truth})
    return {"time": RELAXING_TIMES[0], "replicas": sizes, "ratio": rows}


def rates(found: Replicas) -> dict[str, Any]:
    """Bounds of Σ̇ from pairs of positions one lag apart, beside the closed form's mean over the lag."""
    rows: dict[str, list[Any]] = {name: [] for name in ("time", "lag", "bound", "relation", "exact")}
    for start, lag in progress(WINDOWS, "rates"):
        first, last = (int((found.times - time).abs().argmin()) for time in (start, start + lag))
        pair = torch.tensor([first, last])
        bound = entropy_production_bound(found.times[pair], found.positions[pair])
        nodes = start + lag * (torch.arange(100, dtype=torch.float64) + 0.5) / 100
        rows["time"].append(start + lag / 2)
        rows["lag"].append(lag)
        rows["bound"].append(plain(bound.rate))
        rows["relation"].append(plain(bound.uncertainty_relation))
        rows["exact"].append(float(RELAXING.rate(nodes).mean()))
    return rows


# --- steps that are not small


QUANTITIES = ("wasserstein2_squared", "free_energy_drop", "efficiency")


def step_sizes(scale: Scale, seed: int) -> dict[str, Any]:
    """W₂², free energy drop and η at one time for several learning rates: relative errors and their orders."""
    truth = RELAXING.curve(vector([HORIZON]))
    predicted = (truth.wasserstein2_squared, truth.entropy_production, truth.efficiency)
    exact = dict(zip(QUANTITIES, map(float, predicted), strict=True))
    errors: dict[str, list[Estimate]] = {name: [] for name in QUANTITIES}
    discrete: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    for i, lr in enumerate(progress(COARSE, "step sizes")):
        found = train(RELAXING, lr, [HORIZON], scale.blocks, seed + 10 * i, scale.copies)
        clouds = found.positions.unflatten(2, (scale.copies, RELAXING.modes))
        blocks = [of_normal_clouds(clouds[0, block], clouds[1, block]) for block in range(scale.blocks)]
        for name in QUANTITIES:
            values = torch.tensor([block[name] / exact[name] - 1 for block in blocks])
            error = float(values.std()) / math.sqrt(scale.blocks)
            errors[name].append(Estimate(float(values.mean()), error))
        distance, drop = RELAXING.come_to(*RELAXING.moments_of_steps(lr, round(HORIZON / lr)))
        for name, value in zip(QUANTITIES, (distance, drop, distance / (HORIZON * drop)), strict=True):
            discrete[name].append(value / exact[name] - 1)
    return {
        "time": HORIZON,
        "learning_rate": COARSE,
        "predicted": exact,
        "relative_error": {name: [plain(e) for e in found] for name, found in errors.items()},
        "relative_error_of_euler": discrete,
        "order": {name: plain(order(found)) for name, found in errors.items()},
        "order_of_euler": {
            name: order([Estimate(value, 0.0) for value in found]).value for name, found in discrete.items()
        },
    }


def of_normal_clouds(start: Tensor, end: Tensor) -> dict[str, float]:
    """W₂² and F_0 − F_t from means and covariances: the clouds are normal, and too large for a plan."""
    moments = [part for cloud in (start, end) for part in (cloud.mean(0), torch.cov(cloud.T))]
    distance = gaussian_wasserstein2_squared(*moments)
    loss = [0.5 * float((vector(RELAXING.curvature) * cloud**2).sum(1).mean()) for cloud in (start, end)]
    entropy = [gaussian_entropy(cloud).value for cloud in (start, end)]
    drop = loss[0] - loss[1] + RELAXING.temperature * (entropy[1] - entropy[0])
    return dict(zip(QUANTITIES, (distance, drop, distance / (HORIZON * drop)), strict=True))


def order(errors: Sequence[Estimate]) -> Estimate:
    """d ln(error)/d ln(lr) from the largest to the smallest step, with its standard error."""
    span = math.log(COARSE[0] / COARSE[-1])
    ratio = errors[0].value / errors[-1].value
    scatter = math.hypot(*(e.standard_error / e.value for e in (errors[0], errors[-1])))
    return Estimate(math.log(ratio) / span if ratio > 0 else math.nan, scatter / span)


def action(scale: Scale, seed: int) -> dict[str, Any]:
    """A = Σ‖u_k‖²/lr per replica, measured along the trajectory, and the efficiency that it would give.

    E A = 2dTτ/lr + ∫⟨‖∇L‖²⟩dt + O(lr), d modes: the first term is the noise's, and no property of the motion.
    """
    curve = RELAXING.curve(vector([HORIZON]))
    noise = 2 * RELAXING.modes * RELAXING.temperature * HORIZON
    rows: dict[str, list[float]] = {"learning_rate": list(COARSE), "action": [], "predicted": [], "efficiency": []}
    for lr in progress(COARSE, "actions"):
        found = trajectory_action(lr, scale.action, seed)
        rows["action"].append(found)
        rows["predicted"].append(noise / lr + RELAXING.squared_force(HORIZON))
        rows["efficiency"].append(float(curve.wasserstein2_squared) / (HORIZON * found))
    return rows | {"entropy_production": float(curve.entropy_production), "true_efficiency": float(curve.efficiency)}


def trajectory_action(lr: float, copies: int, seed: int) -> float:
    """Mean over copies, parameter²/time."""
    torch.manual_seed(seed)
    model = RELAXING.potential(copies)
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = Langevin(model.parameters(), lr, RELAXING.temperature, generator=generator)
    meter = TrajectoryMeter(optimizer, clock="lr")
    for _ in range(round(HORIZON / lr)):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return meter.compute()["action"] / copies


# --- what is shown


def vector(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def plain(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "standard_error": estimate.standard_error}


def column(estimates: Sequence[dict[str, float]], name: str) -> list[float]:
    return [each[name] for each in estimates]


def points(axes: Any, x: Any, estimates: Sequence[dict[str, float]], i: int, label: str, **style: Any) -> None:
    """Markers with two standard errors each way."""
    errors = [2 * e for e in column(estimates, "standard_error")]
    style = {"fmt": MARKERS[i], "color": COLOURS[i], "capsize": 2, "elinewidth": 1, "label": label} | style
    axes.errorbar(x, column(estimates, "value"), errors, **style)


HOLLOW = {"markerfacecolor": "white"}


def draw(panels: Any, found: dict[str, Any]) -> None:
    draw_stationary(panels[0, 0], found["stationary"])
    draw_drops(panels[0, 1], found["relaxing"])
    draw_efficiencies(panels[0, 2], found["relaxing"])
    draw_order(panels[1, 0], found["step_sizes"])
    draw_action(panels[1, 1], found["action"])
    draw_rates(panels[1, 2], found["rates"])


def draw_stationary(axes: Any, rows: dict[str, Any]) -> None:
    t = torch.linspace(0.01, 4.4, 200)
    axes.plot(t, torch.tanh(t / 2) / (t / 2), color=COLOURS[0], label="tanh(hτ/2)/(hτ/2)")
    points(axes, rows["time"], rows["efficiency"], 1, "replicas")
    axes.set(title="One mode, s₀² = T/h", xlabel="h τ", ylabel="efficiency η", ylim=(0.4, 1.05))
    axes.legend()


def smooth_times() -> Tensor:
    return torch.logspace(math.log10(0.04), math.log10(2.0), 100, dtype=torch.float64)


def draw_drops(axes: Any, rows: dict[str, Any]) -> None:
    t, measured = smooth_times(), rows["measured"]
    curve = RELAXING.curve(t)
    lines = (curve.wasserstein2_squared, curve.entropy_production, RELAXING.loss_drop(t))
    labels = ("W₂²  [parameter²]", "free energy drop  [loss]", "loss drop  [loss]")
    names = ("wasserstein2_squared", "free_energy_drop", "loss_drop")
    for i, (line, label, name) in enumerate(zip(lines, labels, names, strict=True)):
        axes.plot(t, line, color=COLOURS[i], linestyle=LINES[i])
        points(axes, rows["time"], measured[name], i, label)
    axes.set(title="Three modes: lines closed form", xlabel="τ  [parameter²/loss]", xscale="log", yscale="log")
    axes.legend()


def draw_efficiencies(axes: Any, rows: dict[str, Any]) -> None:
    t, measured = smooth_times(), rows["measured"]
    curve = RELAXING.curve(t)
    axes.axhline(1.0, color="#888888", linewidth=1)
    axes.text(2.0, 1.02, "speed limit", ha="right", va="bottom", fontsize=8, color="#555555")
    axes.plot(t, curve.efficiency, color=COLOURS[1])
    axes.plot(t, curve.wasserstein2_squared / (t * RELAXING.loss_drop(t)), color=COLOURS[2], linestyle=LINES[1])
    points(axes, rows["time"], measured["efficiency_loss_drop"], 2, "Q = loss drop alone")
    points(axes, rows["time"], measured["efficiency"], 1, "Q = free energy drop")
    label = "the same, W₂² from moments"
    points(axes, [1.06 * float(x) for x in rows["time"]], measured["efficiency_lower"], 3, label, **HOLLOW)
    axes.set(title="The entropy is needed", xlabel="τ  [parameter²/loss]", ylabel="W₂²/(τ Q)", xscale="log")
    axes.set_ylim(bottom=0)
    axes.legend()


def draw_order(axes: Any, rows: dict[str, Any]) -> None:
    rate = vector(rows["learning_rate"])
    labels = ("W₂²", "free energy drop", "efficiency")
    for i, (label, name) in enumerate(zip(labels, QUANTITIES, strict=True)):
        errors = [e | {"value": abs(e["value"])} for e in rows["relative_error"][name]]
        order = rows["order"][name]
        points(axes, rate, errors, i, f"{label}, order {order['value']:.2f} ± {order['standard_error']:.2f}")
        line = vector(rows["relative_error_of_euler"][name]).abs()
        axes.plot(rate, line, color=COLOURS[i], linestyle=LINES[i], linewidth=1)
    axes.set(title=f"Error of a finite step at τ = {HORIZON:g}", xlabel="learning rate", ylabel="|relative error|")
    rates_axis(axes, rate)
    axes.set_ylim(top=3 * axes.get_ylim()[1])
    axes.legend(loc="upper left")


def rates_axis(axes: Any, rate: Tensor) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(rate.tolist(), [f"{x:g}" for x in rate.tolist()])
    axes.set_xticks([], minor=True)


def draw_action(axes: Any, rows: dict[str, Any]) -> None:
    rate = vector(rows["learning_rate"])
    axes.plot(rate, rows["action"], color=COLOURS[2], marker=MARKERS[2], linestyle="", label="trajectory's action")
    axes.plot(rate, rows["predicted"], color=COLOURS[2], linestyle=LINES[1], label="2dTτ/lr + ∫⟨‖∇L‖²⟩dt")
    label = "free energy drop, what η needs"
    axes.axhline(rows["entropy_production"], color=COLOURS[0], label=label)
    axes.set(title=f"The trajectory's own action, τ = {HORIZON:g}", xlabel="learning rate", ylabel="Q  [loss]")
    rates_axis(axes, rate)
    axes.set_ylim(top=4 * max(rows["action"]))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()


def draw_rates(axes: Any, rows: dict[str, Any]) -> None:
    t = smooth_times()
    axes.plot(t, RELAXING.rate(t), color=COLOURS[0], label="Σ [h²m² + (h − T/v)² v]/T")
    points(axes, rows["time"], rows["relation"], 1, "2⟨J⟩²/(lag Var J)")
    points(axes, [1.06 * x for x in rows["time"]], rows["bound"], 3, "⟨J − exp(−J) + 1⟩/lag", **HOLLOW)
    axes.set(
        title="Rate of entropy production, from short pieces", xlabel="time  [parameter²/loss]", ylabel="nats/time"
    )
    axes.set(xscale="log", yscale="log")
    axes.legend()


def tell(report: Report, found: dict[str, Any]) -> None:
    """The table: measured, predicted, and how many standard errors lie between."""
    report.say("", "measured", "s.e.", "predicted", "difference/s.e.")
    rows = found["stationary"]
    for time, value, truth in zip(rows["time"], rows["efficiency"], rows["predicted"].tolist(), strict=True):
        say(report, f"one mode: efficiency at hτ = {time:g}", value, truth)
    rows = found["relaxing"]
    for name in ("wasserstein2_squared", "free_energy_drop", "efficiency", "efficiency_lower", "efficiency_loss_drop"):
        truths = rows["predicted"][name.removesuffix("_lower")].tolist()
        for time, value, truth in zip(RELAXING_TIMES, rows["measured"][name], truths, strict=True):
            say(report, f"three modes: {name.replace('_', ' ')} at τ = {time:g}", value, truth)
    for name in QUANTITIES:
        rows = found["step_sizes"]
        predicted = rows["relative_error_of_euler"][name]
        for lr, value, truth in zip(COARSE, rows["relative_error"][name], predicted, strict=True):
            say(report, f"lr {lr:g}: relative error of {name.replace('_', ' ')}", value, truth)
        say(report, f"order in lr of {name.replace('_', ' ')}", rows["order"][name], rows["order_of_euler"][name])
    rows = found["action"]
    for lr, value, truth in zip(COARSE, rows["action"], rows["predicted"], strict=True):
        report.say(f"lr {lr:g}: the trajectory's own action", number(value), "", number(truth))
    for lr, value in zip(COARSE, rows["efficiency"], strict=True):
        report.say(
            f"lr {lr:g}: efficiency from it (true prediction)", number(value), "", number(rows["true_efficiency"])
        )
    rows = found["rates"]
    for time, value, truth in zip(rows["time"], rows["relation"], rows["exact"], strict=True):
        say(report, f"bound of the rate at time {time:g}, nats/time", value, truth)


def told(estimate: dict[str, float]) -> tuple[str, str]:
    return number(estimate["value"], 4), number(estimate["standard_error"], 2)


def say(report: Report, label: str, estimate: dict[str, float], truth: float) -> None:
    apart = (estimate["value"] - truth) / estimate["standard_error"]
    report.say(label, *told(estimate), number(truth, 4), f"{apart:+.1f}")


def run(options: Options, scale: Scale) -> dict[str, Any]:
    """All results."""
    recorded = [*RELAXING_TIMES, *(time for start, lag in WINDOWS for time in (start, start + lag))]
    pool = train(RELAXING, FINE["relaxing"], recorded, scale.pool, options.seed + 100_000)
    return {
        "stationary": stationary(scale, options.seed),
        "relaxing": relaxing(pool, scale),
        "fewer_replicas": fewer_replicas(pool, scale),
        "step_sizes": step_sizes(scale, options.seed + 200_000),
        "action": action(scale, options.seed + 300_000),
        "rates": rates(pool),
    }


def main() -> None:
    options = parse("Langevin dynamics on a quadratic against its closed form.")
    scale = QUICK if options.quick else FULL
    cases = {"stationary": vars(STATIONARY), "relaxing": vars(RELAXING), "learning_rates": FINE}
    report = Report("langevin", options, cases | {"scale": vars(scale)})
    found = run(options, scale)
    report.add(**found)
    tell(report, found)
    with figure(3, 2) as (drawn, panels):
        draw(panels, found)
        report.save(drawn)


if __name__ == "__main__":
    main()
