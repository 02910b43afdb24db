"""Runs whose efficiency is known in closed form: THEORY §3, §4 and §6."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from trajectory_cases import LinearRegression, convergence_order
from trajectory_reference import Run, measure

from lightning_speedlimit.trajectory import TrajectoryMeter

Make = Callable[[list[Tensor], float], torch.optim.Optimizer]

# 12 modes over two decades, and 8 directions that no datum sees.
REGRESSION = LinearRegression.random(0, [10.0 ** (-k / 6) for k in range(12)], 20)

# A window of two: the line through two losses, read at one of them, is that loss itself.
EXACT_LOSSES = 2


def descend(
    make: Make,
    lr: float,
    steps: int,
    *,
    loss: Callable[[Tensor], Tensor] = REGRESSION.loss,
    start: Tensor = REGRESSION.start,
    clip: float | None = None,
    **options: Any,
) -> tuple[dict[str, float], Run]:
    """Full-batch training; the loss is recorded at θ_0 … θ_K."""
    theta = start.clone().requires_grad_()
    optimizer = make([theta], lr)
    meter = TrajectoryMeter(optimizer, loss_window=EXACT_LOSSES, **options)
    run = Run(optimizer, meter=meter)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        run.step(value.detach(), clip=clip)
    run.finish(loss(theta).detach())
    values = meter.compute()
    meter.close()
    return values, run


def sgd(**options: Any) -> Make:
    return lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, **options)


def adam(**options: Any) -> Make:
    return lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, **options)


# --- gradient flow ----------------------------------------------------------------------------------------

TIME = 6.0
FIRST_ORDER = pytest.approx(1, abs=0.1)  # at 300 steps and more the second order is a few per cent


def errors_against_flow(make: Make, clock_rate: float, **options: Any) -> list[float]:
    """|η − η_flow| at lr, lr/2, lr/4; `clock_rate` is the flow's time per step in units of lr."""
    out = []
    for steps in (300, 600, 1200):
        values, _ = descend(make, TIME / (steps * clock_rate), steps, **options)
        out.append(abs(values["efficiency"] - REGRESSION.flow_efficiency(TIME)))
    return out


def test_gradient_descent_tends_to_gradient_flow_at_first_order() -> None:
    """By whichever work the entropy production is estimated: their ratio to the loss drop tends to one."""
    runs = [descend(sgd(), TIME / steps, steps)[0] for steps in (300, 600, 1200)]
    for production in ("loss_drop", "work_ito", "work_action"):
        found = [values["efficiency"] * values["loss_drop"] / values[production] for values in runs]
        errors = [abs(efficiency - REGRESSION.flow_efficiency(TIME)) for efficiency in found]
        assert errors[0] < 0.01, production
        assert convergence_order(errors) == [FIRST_ORDER, FIRST_ORDER], production


@pytest.mark.parametrize("options", [{"momentum": 0.8}, {"momentum": 0.8, "nesterov": True}], ids=["heavy", "nesterov"])
def test_momentum_follows_the_rescaled_flow(options: dict[str, Any]) -> None:
    # Time runs 1/(1 − β) times faster: the steady mobility.
    errors = errors_against_flow(sgd(**options), 1 / (1 - 0.8))
    assert errors[-1] < 0.01
    assert convergence_order(errors) == [FIRST_ORDER, FIRST_ORDER]


def test_displacement_and_loss_drop_of_gradient_flow() -> None:
    steps = 1000
    squared, drop = REGRESSION.flow(TIME)
    values, _ = descend(sgd(), TIME / steps, steps, clock="lr")
    rounding = TIME / steps  # first order: lr times the largest curvature, 1
    assert values["displacement"] ** 2 == pytest.approx(squared, rel=rounding)
    assert values["loss_drop"] == pytest.approx(drop, rel=rounding)
    assert values["elapsed"] == pytest.approx(TIME, rel=1e-9)
    # On the clock "lr" A = Σ‖u‖²/lr, which is work_ito for plain SGD.
    assert values["action"] == pytest.approx(values["work_ito"], rel=1e-9)
    assert values["kinematic_efficiency"] == pytest.approx(REGRESSION.flow_efficiency(TIME), rel=2 * rounding)


def test_both_readings_of_the_speed_limit_time_agree_for_plain_sgd() -> None:
    # §1: D²/A; §2: D²/Q. With the clock "lr" and Q = work_ito they are one.
    values, run = descend(sgd(), 0.05, 40, clock="lr", entropy_production="ito")
    expected = measure(run, clock="lr")
    assert values["speed_limit_time"] == pytest.approx(expected["displacement"] ** 2 / expected["action"], rel=1e-9)
    assert values["speed_limit_time"] == pytest.approx(expected["displacement"] ** 2 / expected["work_ito"], rel=1e-9)


# --- one mode, a large step -------------------------------------------------------------------------------


@pytest.mark.parametrize("product", [0.1, 1.0, 1.9])
def test_one_step_on_one_mode_exceeds_the_flow_bound(product: float) -> None:
    # u = −a x, D² = a² x², loss drop ½ h x² (1 − (1 − a)²): η = 2/(2 − a) with a = lr·h: 1.05, 2, 20.
    curvature = 3.0
    start = torch.tensor([0.7], dtype=torch.float64)
    values, _ = descend(sgd(), product / curvature, 1, loss=lambda x: 0.5 * curvature * x.square().sum(), start=start)
    assert values["efficiency"] == pytest.approx(2 / (2 - product), rel=1e-9)
    assert values["efficiency_action"] == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("product", [0.1, 1.5, 1.9])
def test_bouncing_shows_in_every_factor(product: float) -> None:
    # x_k = (1 − a)^k x_0; q = 1 − a. All sums are geometric.
    steps, curvature = 12, 2.0
    q = 1 - product
    lr = product / curvature
    values, _ = descend(
        sgd(),
        lr,
        steps,
        loss=lambda x: 0.5 * curvature * x.square().sum(),
        start=torch.ones(1, dtype=torch.float64),
        clock="lr",
    )
    displacement = 1 - q**steps
    path = product * sum(abs(q) ** k for k in range(steps))
    action = product**2 * sum(q ** (2 * k) for k in range(steps)) / lr
    drop = 0.5 * curvature * (1 - q ** (2 * steps))
    assert values["straightness"] == pytest.approx(displacement**2 / path**2, rel=1e-9)
    assert values["steadiness"] == pytest.approx(path**2 / (steps * lr * action), rel=1e-9)
    assert values["efficiency"] == pytest.approx(displacement**2 / (steps * lr * drop), rel=1e-9)
    assert values["conversion"] == pytest.approx(drop / action, rel=1e-9)
    assert values["conversion"] == pytest.approx((2 - product) / 2, rel=1e-9)
    assert values["efficiency_action"] <= 1 + 1e-12
    # f_{k+1}·u_k = q f_k·u_k at every step, so over the known ones as well.
    assert values["signal_fraction"] == pytest.approx(q, rel=1e-9)


# --- conversion -------------------------------------------------------------------------------------------

RUNS: list[tuple[str, Make, float, float | None]] = [
    ("heavy ball", sgd(momentum=0.8), 0.01, None),
    ("rmsprop", lambda p, lr: torch.optim.RMSprop(p, lr=lr, alpha=0.9), 0.01, None),
    ("sgd clipped by norm", sgd(), 0.05, 0.5),
    ("heavy ball clipped with L2", sgd(momentum=0.8, weight_decay=0.3), 0.01, 0.5),
    ("adam clipped with L2", adam(betas=(0.8, 0.95), weight_decay=0.3), 0.01, 0.5),
]


@pytest.mark.parametrize(("make", "lr", "clip"), [run[1:] for run in RUNS], ids=[run[0] for run in RUNS])
def test_conversion_tends_to_one_with_the_step(make: Make, lr: float, clip: float | None) -> None:
    # Σ f·u is the loss drop to first order of the step, whatever the mobility: the error halves with lr.
    errors = []
    for halved in (0, 1, 2):
        values, _ = descend(make, lr / 2**halved, 100 * 2**halved, clip=clip)
        errors.append(abs(values["conversion"] - 1))
    # The transient of Adam's denominators and of the momentum has a length in steps, so its share halves too;
    # orders are read off three finite steps: 1 to within 0.35.
    assert convergence_order(errors) == [pytest.approx(1, abs=0.35)] * 2
    assert errors[-1] < 0.1


def test_clipped_work_would_not_convert() -> None:
    # THEORY: gradient descent clipped at 1 has conversion 3.98 without the division by c_k, 1.00 with it.
    start = 3 * torch.ones(20, dtype=torch.float64)
    values, run = descend(sgd(), 1e-3, 500, clip=1.0, loss=lambda x: 0.5 * x.square().sum(), start=start)
    naive = sum(float(move.seen @ -move.update) for step in run.steps for move in step.values())
    drop = run.losses[0] - run.losses[-1]
    assert drop / naive > 3  # ‖g‖ = 13 throughout, the clip 1
    assert values["conversion"] == pytest.approx(1, abs=1e-3)  # first order: lr h/2 = 5e-4


# --- Adam -------------------------------------------------------------------------------------------------


def rescaled_adam(scale: float) -> tuple[dict[str, float], float]:
    """The regression's loss times `scale`; ε = 0 makes Adam's path the same."""
    values, _ = descend(adam(betas=(0.9, 0.99), eps=0.0), 0.01, 150, loss=lambda theta: scale * REGRESSION.loss(theta))
    plain = values["displacement"] ** 2 / (150 * 0.01 * values["loss_drop"])
    return values, plain


def test_weighted_efficiency_has_no_unit_and_the_plain_one_is_nonsense() -> None:
    # Multiplying the loss by s leaves Adam's path as it is, divides the mobility by s and multiplies the loss
    # drop by s: the weighted efficiency stays, D²/(τ_lr Q) goes like 1/s.
    (one, plain_one), (small, plain_small) = rescaled_adam(1.0), rescaled_adam(2.0**-10)
    assert small["efficiency"] == pytest.approx(one["efficiency"], rel=1e-9)
    assert small["efficiency_action"] == pytest.approx(one["efficiency_action"], rel=1e-9)
    assert small["conversion"] == pytest.approx(one["conversion"], rel=1e-9)
    assert plain_small == pytest.approx(plain_one * 2**10, rel=1e-9)
    assert plain_small > 10
    assert 0 < small["efficiency"] < 1


# --- drift and noise, THEORY §4 ---------------------------------------------------------------------------

PARTICLES = 4000
NOISY_STEPS = 100


def noisy_run(make: Make, lr: float, drift: float, noise: float, steps: int, drop: float) -> dict[str, float]:
    """`PARTICLES` independent coordinates under force drift + noise·ξ, and a loss that falls on a line."""
    theta = torch.zeros(PARTICLES, dtype=torch.float64, requires_grad=True)
    optimizer = make([theta], lr)
    meter = TrajectoryMeter(optimizer)
    generator = torch.Generator().manual_seed(11)
    for k in range(steps):
        xi = torch.randn(PARTICLES, generator=generator, dtype=torch.float64)
        theta.grad = -(drift + noise * xi)
        meter.record_loss(torch.tensor(-drop * k / steps, dtype=torch.float64))
        optimizer.step()
    meter.record_loss(torch.tensor(-drop, dtype=torch.float64))
    values = meter.compute()
    meter.close()
    return values


def test_the_interval_ends_at_the_drift_and_at_the_drift_with_its_noise() -> None:
    # After time K lr = 1 with force ½ and noise K^½: drift² = 0.25 and noise 1 per particle. Started from a
    # point W₂² = 1.25, from a wide cloud 0.25; over the loss drop of 0.25 per particle these are the efficiencies.
    values = noisy_run(sgd(), 1 / NOISY_STEPS, 0.5, NOISY_STEPS**0.5, NOISY_STEPS, drop=0.25 * PARTICLES)
    # Per particle D² = (½ + ξ)²: variance 2 + 1; four standard errors of the mean of 4000, over 0.25.
    sampling = 16 * (3 / PARTICLES) ** 0.5
    assert values["efficiency"] == pytest.approx(5, abs=sampling)
    # N/K = 1 per particle, of which Σ f_{k+1}·u_k/K leaves 1/√K = 0.1 by chance: four standard errors more.
    more = 16 * 0.1 / PARTICLES**0.5
    assert values["efficiency_low"] == pytest.approx(1, abs=sampling + more)


DIFFUSIONS: list[tuple[str, Make]] = [
    ("sgd", sgd()),
    ("heavy ball", sgd(momentum=0.9)),
    ("nesterov", sgd(momentum=0.9, nesterov=True)),
    ("adam", adam(betas=(0.9, 0.99))),
]


@pytest.mark.parametrize("make", [d[1] for d in DIFFUSIONS], ids=[d[0] for d in DIFFUSIONS])
def test_pure_diffusion_is_taken_out_with_its_inertia(make: Make) -> None:
    # Without the factor c (steady over instantaneous response, 10 for β = 0.9) nine tenths would be left.
    values = noisy_run(make, 0.01, 0.0, 1.0, 400, drop=1.0)
    assert values["efficiency"] > 0
    # √(2/4000) = 2 % sampling; the diffusion over K steps is short of the steady one by 1/((1 − β) K), 2.5 %
    # per moment of the momentum's memory: 10 % covers four standard errors.
    assert abs(values["efficiency_low"]) < 0.1 * values["efficiency"]


# --- the losses at both ends ------------------------------------------------------------------------------


def loss_estimates(seeds: Iterable[int], noise: float) -> list[tuple[float, float]]:
    """(loss drop, its standard error) of an exponential decay under noise, 200 steps, a window of 50."""
    out = []
    for seed in seeds:
        theta = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([theta], lr=0.1)
        meter = TrajectoryMeter(optimizer, loss_window=50)
        xi = noise * torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        theta.grad = torch.ones(1)
        for k in range(200):
            meter.record_loss(DECAY * math.exp(-k / DECAY_STEPS) + xi[k])
            optimizer.step()
        values = meter.compute()
        meter.close()
        out.append((values["loss_drop"], values["loss_drop_se"]))
    return out


DECAY, DECAY_STEPS = 2.0, 400.0
TRUE_DROP = DECAY * (1 - math.exp(-200 / DECAY_STEPS))


def test_extrapolation_of_a_smooth_loss() -> None:
    (drop, _) = loss_estimates([0], noise=0.0)[0]
    # A line through 50 steps of a decay over 400 is off by A (50/400)²/12 at an end: 0.13 % of A = 2.
    # A plain window mean would be off by 25/400 = 6 % of A.
    assert drop == pytest.approx(TRUE_DROP, abs=2 * DECAY * (50 / DECAY_STEPS) ** 2 / 12)


def test_the_standard_error_of_the_loss_drop_keeps_its_promise() -> None:
    runs = 60
    scores = [abs(drop - TRUE_DROP) / error for drop, error in loss_estimates(range(runs), noise=0.1)]
    within_one = sum(score < 1 for score in scores) / runs
    within_two = sum(score < 2 for score in scores) / runs
    # A normal error's 68 % and 95 % at least, give or take three standard deviations of 60 draws: it also holds a bend
    # that noise might hide, and without one it is up to three times what the estimate is off by.
    assert within_one > 0.683 - 3 * (0.683 * 0.317 / runs) ** 0.5
    assert within_two > 0.954 - 3 * (0.954 * 0.046 / runs) ** 0.5
    assert sum(score**2 for score in scores) / runs > 1 / 9


def test_a_drop_below_two_standard_errors_is_no_efficiency() -> None:
    theta = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    xi = torch.randn(200, generator=torch.Generator().manual_seed(0))
    theta.grad = torch.ones(1)
    for k in range(200):
        meter.record_loss(xi[k])  # falls by nothing
        optimizer.step()
    values = meter.compute()
    assert abs(values["loss_drop"]) < 2 * values["loss_drop_se"]
    assert math.isnan(values["efficiency"])
    assert meter.reasons["efficiency"]
