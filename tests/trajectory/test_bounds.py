"""The bounds of THEORY §1 and §3 hold for every optimizer of torch and every run that can be thought up.

Cauchy–Schwarz leaves no room beyond rounding. A run has at most 16 steps, and a float32 sum of 16 terms is
off by at most 16 · 6e-8 = 1e-6 of itself: that is the tolerance. Equality is reached (a straight run at
constant speed), so a tolerance below 0 would fail, and the last tests show what breaks the bound.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from trajectory_reference import FORMULAS, Run, flat, measure

from lightning_speedlimit.trajectory import TrajectoryMeter

ROUNDING = 1e-6
STEPS = 16
BOUNDED = ("straightness", "steadiness", "kinematic_efficiency", "efficiency_action")

OPTIMIZERS = sorted(
    (
        value
        for value in vars(torch.optim).values()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    ),
    key=lambda kind: kind.__name__,
)
REAL_ONLY = {"Adafactor", "LBFGS", "Muon", "SparseAdam"}


@dataclass(frozen=True)
class Plan:
    """A run, drawn by hypothesis."""

    options: dict[str, Any]
    dtype: torch.dtype
    seed: int
    scales: tuple[float, ...]
    steps: int
    noise: float
    gradients: tuple[str, ...]
    warm_up: int
    clip: float | None
    clock: str


def accepted(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in inspect.signature(kind).parameters}


@st.composite
def plans(draw: st.DrawFn, kind: type) -> Plan:
    choose = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    name = kind.__name__
    options = {
        "lr": choose(1e-4, 1e-2, 0.3),
        "momentum": choose(0.0, 0.5, 0.9),
        "weight_decay": choose(0.0, 0.0, 0.1, 1.0),
        "maximize": choose(False, False, True),
        "amsgrad": choose(False, True),
        "centered": choose(False, True),
        "lr_decay": choose(0.0, 0.1),
        "decoupled_weight_decay": choose(False, True),
        "foreach": choose(None, False, True),
        "max_iter": choose(1, 3),
        "betas": choose((0.9, 0.999), (0.5, 0.9), (0.0, 0.9)),
    }
    if name in ("Muon", "SparseAdam", "LBFGS"):
        options.pop("foreach")
    if name == "Rprop":
        options.pop("lr")  # Rprop's step is not its learning rate
    if kind is torch.optim.SGD and options["momentum"] > 0:
        nesterov = choose(False, True)
        options |= {"nesterov": nesterov, "dampening": 0.0 if nesterov else choose(0.0, 0.3)}
    dtypes = [torch.float32, torch.float32, torch.float64]
    if name not in REAL_ONLY:
        dtypes += [torch.complex64, torch.bfloat16]
    return Plan(
        options=accepted(kind, options),
        dtype=choose(*dtypes),
        seed=draw(st.integers(0, 10_000)),
        scales=tuple(draw(st.lists(st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6]), min_size=1, max_size=3))),
        steps=draw(st.integers(1, STEPS)),
        noise=choose(0.0, 0.1, 10.0),
        gradients=tuple(draw(st.lists(st.sampled_from(["full", "full", "zero", "none"]), min_size=1, max_size=5))),
        warm_up=0 if name == "Rprop" else choose(0, 0, 3),
        clip=None if name in ("LBFGS", "SparseAdam") else choose(None, None, 0.1),
        clock=choose("steps", "lr") if name != "Rprop" else "steps",
    )


class Potential(torch.nn.Module):
    """Σ ¼|θ|² + Re⟨noise, θ⟩ over parameters of several scales; the first has two names and is used twice."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(parameters)
        self.tied = self.weights[0]
        self.frozen = torch.nn.Parameter(torch.ones(2, 2, dtype=parameters[0].dtype), requires_grad=False)

    def forward(self, noise: list[Tensor], factor: float) -> Tensor:
        pairs = [*zip(self.weights, noise, strict=True), (self.tied, noise[0])]
        terms = [0.25 * p.abs().square().sum() + (p * n.conj()).sum().real for p, n in pairs]
        return factor * sum(terms[1:], terms[0])


def follow(kind: type, plan: Plan) -> tuple[TrajectoryMeter, Run]:
    """Noisy descent, with steps whose gradients are zero or absent."""
    generator = torch.Generator().manual_seed(plan.seed)

    def draw(scale: float) -> Tensor:
        real, imaginary = scale * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        return (torch.complex(real, imaginary) if plan.dtype.is_complex else real).to(plan.dtype)

    model = Potential([torch.nn.Parameter(draw(scale)) for scale in plan.scales])
    optimizer = kind(model.parameters(), **plan.options)
    meter = TrajectoryMeter(optimizer, clock=plan.clock)
    run = Run(optimizer, meter=meter)
    for k in range(plan.steps):
        what = plan.gradients[k % len(plan.gradients)]
        if plan.warm_up:
            optimizer.param_groups[0]["lr"] = plan.options["lr"] * min(1.0, k / plan.warm_up)
        noise = [draw(plan.noise * scale) for scale in plan.scales]

        def closure(noise: list[Tensor] = noise, what: str = what) -> Tensor:
            optimizer.zero_grad()
            loss = model(noise, 0.0 if what == "zero" else 1.0)
            if what != "none":
                loss.backward()
            for p in model.weights:
                if kind.__name__ == "SparseAdam" and p.grad is not None:
                    p.grad = p.grad.to_sparse(1)
            return loss

        run.step(closure().item(), clip=plan.clip, closure=closure if kind.__name__ == "LBFGS" else None)
    return meter, run.finish()


def assert_bounds(meter: TrajectoryMeter) -> dict[str, float]:
    values = meter.compute()
    for name in BOUNDED:
        if math.isnan(values[name]):
            assert meter.reasons.get(name), f"{name} is NaN without a reason"
        else:
            assert -ROUNDING <= values[name] <= 1 + ROUNDING, f"{name} = {values[name]!r}"
    return values


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=15)
def test_no_run_breaks_a_bound(kind: type, data: st.DataObject) -> None:
    plan = data.draw(plans(kind))
    meter, run = follow(kind, plan)
    try:
        values = assert_bounds(meter)
    finally:
        meter.close()
    expected = measure(run, clock=plan.clock)
    # NaN is no way out: the kinematic limit is defined wherever something moved ...
    if expected["path_length"] > 0 and not math.isnan(expected["action"]):
        assert not math.isnan(values["kinematic_efficiency"])
    # ... and the weighted one wherever a force moved something, or the effective mobility is positive.
    # (What is left after a decoupled decay is taken out may be its rounding alone.)
    visible = 8 * torch.finfo(plan.dtype).eps
    moves = [move for step in run.steps for move in step.values()]
    forced = any((move.update.abs() > visible * move.before.abs()).any() for move in moves)
    if forced and (kind in FORMULAS or expected["work_ito"] > 0):
        assert not math.isnan(values["efficiency_action"])


def joint_run(seed: int, *, groups: int, steps: int) -> TrajectoryMeter:
    """Two optimizers on one model, the second of several groups, under noise and decay."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [(10.0**e * torch.randn(5, generator=generator)).requires_grad_() for e in range(-2, groups)]
    adam = torch.optim.AdamW(parameters[:2], lr=0.05, weight_decay=0.3)
    sgd = torch.optim.SGD(
        [{"params": [p], "lr": 0.02 * (i + 1), "momentum": 0.3 * i} for i, p in enumerate(parameters[2:])]
    )
    meter = TrajectoryMeter([adam, sgd])
    run = Run(adam, sgd, meter=meter, joint=True)
    for k in range(steps):
        for p in parameters:
            p.grad = 0.3 * p.detach() + torch.randn(5, generator=generator)
        run.step(5.0 - k)
    return meter


@given(seed=st.integers(0, 10_000), groups=st.integers(1, 3), steps=st.integers(1, STEPS))
@settings(max_examples=25)
def test_several_optimizers_and_groups_keep_the_bounds(seed: int, groups: int, steps: int) -> None:
    meter = joint_run(seed, groups=groups, steps=steps)
    values = assert_bounds(meter)
    meter.close()
    assert not math.isnan(values["kinematic_efficiency"])
    assert not math.isnan(values["efficiency_action"])


# --- the bounds are tight, and can be broken ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.25}),
        (torch.optim.Adam, {"lr": 0.25}),
        (torch.optim.Adamax, {"lr": 0.25}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_straight_run_at_constant_speed_reaches_the_bounds(kind: type, options: dict[str, Any]) -> None:
    # Constant gradient: u is the same at every step, so D² = τ A and (Δθ)²/m = Σ u²/μ.
    weight = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = kind([weight], **options)
    meter = TrajectoryMeter(optimizer)
    run = Run(optimizer, meter=meter)
    for k in range(STEPS):
        weight.grad = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
        run.step(-float(k))
    values = assert_bounds(meter)
    for name in BOUNDED:
        # ε = 1e-8 beside |g| = 1, and Adam's first v̂ is off by 1e-13.
        assert values[name] == pytest.approx(1, abs=1e-7), name


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad], ids=lambda k: k.__name__)
def test_large_tensors_in_single_precision_reach_the_bounds_too(kind: type) -> None:
    # Many equal terms in float32: a sum of them must not drift, and 1e-5 is allowed to it.
    weight = torch.zeros(1_200_001, requires_grad=True)
    optimizer = kind([weight], lr=0.003)
    meter = TrajectoryMeter(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    values = meter.compute()
    meter.close()
    for name in BOUNDED:
        assert values[name] == pytest.approx(1, abs=1e-5), name


def test_decay_taken_for_the_force_would_break_the_bound() -> None:
    # THEORY §2: Δθ without the decayed part against works without it. A noisy run with w = 1.
    torch.manual_seed(1)
    weight = (30 * torch.randn(200, dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.05, weight_decay=1.0)
    meter = TrajectoryMeter(optimizer)
    run = Run(optimizer, meter=meter)
    for k in range(STEPS):
        weight.grad = torch.randn_like(weight)
        run.step(-float(k))
    expected = measure(run)
    naive = ((flat(weight) - run.start[weight]) ** 2 / expected.mobility[weight]).sum() / expected["work_action"]
    assert naive > 2
    values = assert_bounds(meter)
    assert values["efficiency_action"] == pytest.approx(expected["efficiency_action"], rel=1e-9)


def test_work_ito_is_no_bound_for_adam() -> None:
    # Only Q = work_action is a theorem: here inertia carries Adam on while the force points back.
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1, betas=(0.9, 0.9))
    meter = TrajectoryMeter(optimizer, entropy_production="ito")
    for k in range(12):
        weight.grad = torch.tensor([-1.0 if k < 6 else 0.3], dtype=torch.float64)
        meter.record_loss(torch.tensor(-float(k)))
        optimizer.step()
    values = assert_bounds(meter)
    assert values["efficiency"] > 1


@pytest.mark.parametrize(("momentum", "second", "expected"), [(0.5, 0.2, 1.142857), (0.9, -1.298, 5570)])
def test_work_ito_is_no_bound_for_heavy_ball_with_dampening(momentum: float, second: float, expected: float) -> None:
    # The first step is dampened by nothing, and carries on where the second force is weak, or points back.
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=momentum, dampening=momentum)
    meter = TrajectoryMeter(optimizer, entropy_production="ito")
    for k, force in enumerate((1.0, second)):
        weight.grad = torch.tensor([-force], dtype=torch.float64)
        meter.record_loss(torch.tensor(-float(k)))
        optimizer.step()
    last = momentum + (1 - momentum) * second
    assert (1 + last) ** 2 / (2 * (1 + second * last)) == pytest.approx(expected, rel=0.01)  # (u_0 + u_1)²/2 lr W
    assert assert_bounds(meter)["efficiency"] == pytest.approx(expected, rel=0.01)


def test_work_ito_is_no_bound_for_heavy_ball_with_clipping() -> None:
    """Three gradients of 1 fill the buffer; one of −G against it, clipped to −1, does not turn it, and takes the work.

    Buffers 1, 1.9, 2.71, and 0.9·2.71 − 1 = 1.439: W = lr(5.61 − 1.439 G), and G = 3.8 adds 1/G to three mobilities.
    """
    efficiencies = []
    for clip in (1.0, math.inf):
        weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        meter = TrajectoryMeter(optimizer, entropy_production="ito")
        for k, gradient in enumerate((-1.0, -1.0, -1.0, 3.8)):
            weight.grad = torch.tensor([gradient], dtype=torch.float64)
            meter.record_loss(torch.tensor(-float(k)))
            meter.observe_gradients()
            torch.nn.utils.clip_grad_norm_([weight], clip)
            optimizer.step()
        efficiencies.append(assert_bounds(meter)["efficiency"])
        meter.close()
    moved, mobility, work = 5.61 + 1.439, 10 * (3 + 1 / 3.8), 5.61 - 1.439 * 3.8  # each in units of lr
    assert efficiencies[0] == pytest.approx(moved**2 / mobility / work, rel=1e-4)  # torch adds 1e-6 to the norm
    assert efficiencies[0] > 10
    assert efficiencies[1] < 1, "the clipping, not the run, breaks it"
