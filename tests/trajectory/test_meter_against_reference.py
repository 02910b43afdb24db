"""Every number of the meter against plain sums over a recorded run, whatever complicates the training."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from trajectory_cases import ROUNDING, Classifier, batches, gradients
from trajectory_reference import Measured, Run, divided, flat, measure

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS = 14

# The recorded losses fall on a line, so that any extrapolation to θ_0 and θ_K gives FALL: how losses are
# extrapolated has its own tests.
FALL = 0.7

DIRECT = (
    "displacement",
    "path_length",
    "action",
    "elapsed",
    "step_norm",
    "grad_norm",
    "grad_norm_clipped",
    "straightness",
    "steadiness",
    "kinematic_efficiency",
    "speed_limit_time",
    "work_ito",
    "work_action",
    "efficiency_action",
)
# Sums in which terms of both signs cancel: their error is a part of work_ito, not of themselves.
CANCELLING = ("work_anti_ito", "work_stratonovich")


@dataclass(frozen=True)
class Setting:
    """One training: the optimizers of a model and what happens on the way."""

    optimizers: Callable[[Classifier], list[Optimizer]]
    clip: float | None = None
    schedule: Callable[[int], float] | None = None
    absent: tuple[int, ...] = ()
    meter: dict[str, Any] = field(default_factory=dict)
    sign: float = 1.0


def one(kind: type, **options: Any) -> Callable[[Classifier], list[Optimizer]]:
    return lambda model: [kind(model.parameters(), **options)]


def two_groups(model: Classifier) -> list[Optimizer]:
    first = [*model.first.parameters(), *model.side.parameters()]
    rest = [*model.second.parameters(), *model.head.parameters()]
    groups = [
        {"params": first, "lr": 0.2, "weight_decay": 0.05},
        {"params": rest, "lr": 0.05, "momentum": 0.8},
    ]
    return [torch.optim.SGD(groups)]


def three_optimizers(model: Classifier) -> list[Optimizer]:
    return [
        torch.optim.SGD(model.first.parameters(), lr=0.1, momentum=0.8, nesterov=True),
        torch.optim.AdamW([*model.second.parameters(), *model.side.parameters()], lr=0.01, weight_decay=0.2),
        torch.optim.RMSprop(model.head.parameters(), lr=0.005, weight_decay=0.05),
    ]


def with_an_unknown_one(model: Classifier) -> list[Optimizer]:
    return [
        torch.optim.Adam([*model.first.parameters(), *model.side.parameters()], lr=0.01),
        torch.optim.Rprop([*model.second.parameters(), *model.head.parameters()], lr=0.01),
    ]


O = torch.optim  # noqa: E741
WARM_UP = Setting(one(O.Adam, lr=0.01), schedule=lambda k: min(1.0, k / 4))
SETTINGS = {
    "sgd": Setting(one(O.SGD, lr=0.1)),
    "sgd momentum dampening": Setting(one(O.SGD, lr=0.1, momentum=0.8, dampening=0.2)),
    "sgd clipped with L2": Setting(one(O.SGD, lr=0.1, momentum=0.8, weight_decay=0.1), clip=0.3),
    "sgd maximize": Setting(one(O.SGD, lr=0.1, maximize=True, weight_decay=0.1), sign=-1.0),
    "sgd momentum response": Setting(one(O.SGD, lr=0.1, momentum=0.8), meter={"momentum_mobility": "response"}),
    "sgd warm-up on lr": Setting(one(O.SGD, lr=0.1), schedule=WARM_UP.schedule, meter={"clock": "lr"}),
    "adam": Setting(one(O.Adam, lr=0.01)),
    "adam warm-up": WARM_UP,
    "adam warm-up on lr": Setting(WARM_UP.optimizers, schedule=WARM_UP.schedule, meter={"clock": "lr"}),
    "adam clipped with L2": Setting(one(O.Adam, lr=0.01, weight_decay=0.1), clip=0.3),
    "sgd clipped warm-up": Setting(one(O.SGD, lr=0.1), clip=0.3, schedule=WARM_UP.schedule),
    "adam clipped warm-up": Setting(one(O.Adam, lr=0.01), clip=0.3, schedule=WARM_UP.schedule),
    "adam amsgrad maximize": Setting(
        one(O.Adam, lr=0.01, betas=(0.8, 0.9), amsgrad=True, weight_decay=0.1, maximize=True), sign=-1.0
    ),
    "adam fused": Setting(one(O.Adam, lr=0.01, fused=True)),
    "adam foreach absent": Setting(one(O.Adam, lr=0.01, foreach=True), absent=(3, 4, 9)),
    "adam absent at first": Setting(one(O.Adam, lr=0.01), absent=(0, 1, 2)),
    "adamw": Setting(one(O.AdamW, lr=0.01, weight_decay=0.3)),
    "adamw clipped": Setting(one(O.AdamW, lr=0.01, weight_decay=0.3), clip=0.3),
    "nadam": Setting(one(O.NAdam, lr=0.01, weight_decay=0.1)),
    "nadam decoupled": Setting(one(O.NAdam, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    "radam": Setting(one(O.RAdam, lr=0.01)),
    "adamax": Setting(one(O.Adamax, lr=0.01)),
    "adagrad": Setting(one(O.Adagrad, lr=0.05, lr_decay=0.1)),
    "adadelta": Setting(one(O.Adadelta, lr=1.0)),
    "rmsprop centered momentum": Setting(one(O.RMSprop, lr=0.002, centered=True, momentum=0.8)),
    "rmsprop response": Setting(one(O.RMSprop, lr=0.002, momentum=0.8), meter={"momentum_mobility": "response"}),
    "sgd absent momentum": Setting(one(O.SGD, lr=0.1, momentum=0.8), absent=(2, 3, 8)),
    "two groups": Setting(two_groups, clip=0.5),
    "three optimizers": Setting(three_optimizers, clip=0.4),
    "three optimizers absent": Setting(three_optimizers, absent=(0, 5)),
    "one without a formula": Setting(with_an_unknown_one),
    "adafactor": Setting(one(O.Adafactor, lr=0.02)) if hasattr(O, "Adafactor") else Setting(one(O.Rprop)),
}


def train(setting: Setting, dtype: torch.dtype, **options: Any) -> tuple[TrajectoryMeter, Run, list[Optimizer]]:
    model = Classifier(0, dtype)
    optimizers = setting.optimizers(model)
    meter = TrajectoryMeter(optimizers if len(optimizers) > 1 else optimizers[0], **(setting.meter | options))
    run = Run(*optimizers, meter=meter, joint=len(optimizers) > 1)
    bases = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    for k, (x, y) in enumerate(batches(1, STEPS, dtype)):
        if setting.schedule is not None:
            for optimizer, base in zip(optimizers, bases, strict=True):
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * setting.schedule(k)
        loss = nn.functional.cross_entropy(model(x, side=k not in setting.absent), y)
        gradients(loss, optimizers)
        run.step(straight_line(k, setting.sign), clip=setting.clip)
    return meter, run.finish(straight_line(STEPS, setting.sign)), optimizers


def straight_line(k: int, sign: float) -> Tensor:
    return torch.tensor(sign * (2.0 - FALL * k / STEPS), dtype=torch.float64)


def assert_agrees(values: dict[str, float], expected: Measured, rounding: float) -> None:
    """Every quantity by name, in one message."""
    drop = FALL + expected["l2_drop"]
    wanted = {name: expected[name] for name in DIRECT}
    wanted |= {
        "loss_drop": drop,
        "conversion": divided(drop, expected["work_ito"]),
        "efficiency": expected["numerator"] / drop,
        "entropy_production": drop,
    }
    wrong = {
        name: (values[name], value)
        for name, value in wanted.items()
        if values[name] != pytest.approx(value, rel=rounding, nan_ok=True)
    }
    for name in CANCELLING:
        if abs(values[name] - expected[name]) > rounding * abs(expected["work_ito"]):
            wrong[name] = (values[name], expected[name])
    if abs(values["signal_fraction"] - expected["signal_fraction"]) > 10 * rounding:
        # A ratio of two sums of a size: a few roundings.
        wrong["signal_fraction"] = (values["signal_fraction"], expected["signal_fraction"])
    assert not wrong, "\n".join(f"{name}: got {got!r}, wanted {value!r}" for name, (got, value) in wrong.items())


# Where single precision takes a way of its own: sums of products, of weights from states, and of several optimizers.
IN_SINGLE = (
    *("sgd", "sgd clipped with L2", "adam", "adam clipped with L2", "adam fused", "adam foreach absent", "adamw"),
    *("rmsprop centered momentum", "adadelta", "three optimizers", "one without a formula", "adafactor"),
)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*[(name, torch.float64) for name in SETTINGS], *[(name, torch.float32) for name in IN_SINGLE]],
    ids=str,
)
def test_every_value(name: str, dtype: torch.dtype) -> None:
    setting = SETTINGS[name]
    meter, run, optimizers = train(setting, dtype)
    expected = measure(
        run,
        clock=setting.meter.get("clock", "steps"),
        momentum_mobility=setting.meter.get("momentum_mobility", "steady"),
    )
    values = meter.compute()
    meter.close()
    assert_agrees(values, expected, ROUNDING[dtype])
    assert values["learning_rate"] == pytest.approx(optimizers[0].param_groups[0]["lr"], nan_ok=True) or (
        math.isnan(values["learning_rate"]) and len({g["lr"] for o in optimizers for g in o.param_groups}) > 1
    )


@pytest.mark.parametrize("estimator", ["loss_drop", "ito", "stratonovich", "anti_ito", "action"])
@pytest.mark.parametrize("name", ["sgd", "adam clipped with L2", "adamw", "three optimizers"])
def test_efficiency_divides_by_the_chosen_estimator(name: str, estimator: str) -> None:
    meter, run, _ = train(SETTINGS[name], torch.float64, entropy_production=estimator)
    expected = measure(run)
    production = FALL + expected["l2_drop"] if estimator == "loss_drop" else expected[f"work_{estimator}"]
    values = meter.compute()
    meter.close()
    assert values["entropy_production"] == pytest.approx(production, rel=1e-9)
    if production > 0:
        assert values["efficiency"] == pytest.approx(expected["numerator"] / production, rel=1e-9)
    else:  # an entropy production that is no production: undefined, and said so
        assert math.isnan(values["efficiency"])
        assert meter.reasons["efficiency"]


@pytest.mark.parametrize("kind", [O.SGD, O.Adam], ids=lambda kind: kind.__name__)
def test_clipping_by_value_keeps_the_raw_gradient_and_makes_the_mobility_effective(kind: type) -> None:
    # No scalar c_k turns the clipped gradient into the raw one: works need a copy of it, and
    # η = kinematic efficiency × work_ito/Q.
    model = Classifier(0)
    optimizer = kind(model.parameters(), lr=0.02)
    meter = TrajectoryMeter(optimizer, gradient_changes="clipping")
    path = raw_work = action = 0.0
    start = torch.cat([flat(p) for p in model.parameters()])
    for k, (x, y) in enumerate(batches(1, STEPS)):
        gradients(nn.functional.cross_entropy(model(x), y), [optimizer])
        raw = torch.cat([flat(p.grad) for p in model.parameters()])
        meter.record_loss(straight_line(k, 1.0))
        meter.observe_gradients(optimizer)
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
        before = torch.cat([flat(p) for p in model.parameters()])
        optimizer.step()
        update = torch.cat([flat(p) for p in model.parameters()]) - before
        path += float(update.norm())
        action += float(update @ update)
        raw_work -= float(raw @ update)
    meter.record_loss(straight_line(STEPS, 1.0))
    values = meter.compute()
    meter.close()
    distance = float((before + update - start).norm())
    assert values["path_length"] == pytest.approx(path, rel=1e-9)
    assert values["work_ito"] == pytest.approx(raw_work, rel=1e-9)
    assert values["conversion"] == pytest.approx(FALL / raw_work, rel=1e-9)
    kinematic = distance**2 / (STEPS * action)
    assert values["kinematic_efficiency"] == pytest.approx(kinematic, rel=1e-9)
    assert values["efficiency_action"] == pytest.approx(kinematic, rel=1e-9)
    assert values["efficiency"] == pytest.approx(kinematic * raw_work / FALL, rel=1e-9)


INERTIA = {  # c, β
    "sgd": (one(O.SGD, lr=0.1), 1.0, 0.0),
    "heavy ball": (one(O.SGD, lr=0.1, momentum=0.8), 1 / (1 - 0.8), 0.8),
    "dampened": (one(O.SGD, lr=0.1, momentum=0.8, dampening=0.2), 1 / (1 - 0.8), 0.8),
    "nesterov": (one(O.SGD, lr=0.1, momentum=0.8, nesterov=True), 1 / (1 - 0.8**2), 0.8),
    "adam": (one(O.Adam, lr=0.01, betas=(0.8, 0.99)), 1 / (1 - 0.8), 0.8),
    "adamw": (one(O.AdamW, lr=0.01, betas=(0.8, 0.99), weight_decay=0.3), 1 / (1 - 0.8), 0.8),
}


@pytest.mark.parametrize("fall", [FALL, 0.1 * FALL])
@pytest.mark.parametrize("name", INERTIA)
def test_random_motion_is_what_the_work_balance_says(name: str, fall: float) -> None:
    make, gain, memory = INERTIA[name]
    meter, run, _ = train(Setting(make), torch.float64)
    meter.record_probe(torch.full((2,), fall, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    expected = measure(run)
    values = meter.compute()
    meter.close()
    work, anti = expected["work_ito"], expected["work_anti_ito"]
    anti *= work / (2 * expected["work_stratonovich"] - anti)  # the last update has met no gradient
    fallen = fall - decay_work(run)
    noise, curvature = max(work + anti - 2 * fallen, 0.0), max(2 * (fallen - anti), 0.0)
    assert noise > 0 or fall == FALL, "the smaller loss drop leaves noise"
    q = 2 * STEPS * (1 + memory) * curvature / noise if noise else 0.0
    share = 1.0 if q == 0 else ((1 + 3 * q) ** (2 / 3) - 1) / (2 * q)
    most = gain * noise / STEPS
    assert values["efficiency_low"] == pytest.approx((expected["numerator"] - most) / fall, rel=1e-9)
    assert values["efficiency_drift"] == pytest.approx((expected["numerator"] - share * most) / fall, rel=1e-9)


def decay_work(run: Run) -> float:
    """Σ f_k·v_k, v_k = −lr w θ_k of decoupled decay."""
    moves = [move for step in run.steps for move in step.values()]
    return -sum(float(move.force @ move.before) * move.lr * move.decoupled for move in moves)


def test_the_lr_clock_is_undefined_for_groups_that_differ() -> None:
    meter, run, _ = train(SETTINGS["two groups"], torch.float64, clock="lr")
    expected = measure(run)
    values = meter.compute()
    meter.close()
    for name in ("elapsed", "action", "kinematic_efficiency", "steadiness", "speed_limit_time"):
        assert math.isnan(values[name]), name
        assert meter.reasons[name], name
    # The weighted limit has no clock.
    assert values["efficiency_action"] == pytest.approx(expected["efficiency_action"], rel=1e-9)


def test_motion_at_learning_rate_zero_makes_the_action_undefined() -> None:
    class Nudge(torch.optim.SGD):
        """Moves whatever the learning rate."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["params"][0].sub_(0.1)

    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = Nudge([weight], lr=0.0)
    meter = TrajectoryMeter(optimizer, clock="lr")
    weight.grad = torch.ones_like(weight)
    meter.record_loss(torch.tensor(1.0))
    optimizer.step()
    values = meter.compute()
    assert math.isnan(values["action"])
    assert meter.reasons["action"]
    assert values["displacement"] == pytest.approx(0.1 * 3**0.5, rel=1e-12)


@pytest.mark.parametrize("kind", [O.SGD, O.Adam, O.AdamW, O.RMSprop, O.Adagrad, O.NAdam], ids=lambda k: k.__name__)
def test_complex_parameters_are_pairs_of_reals(kind: type) -> None:
    generator = torch.Generator().manual_seed(2)

    def draw() -> Tensor:
        return torch.randn(3, 2, generator=generator, dtype=torch.complex128)

    weight, target = draw().requires_grad_(), draw()
    optimizer = kind([weight], lr=0.05)
    meter = TrajectoryMeter(optimizer)
    run = Run(optimizer, meter=meter)
    for k in range(STEPS):
        gradients((weight - target + 0.3 * draw()).abs().square().sum(), [optimizer])
        run.step(straight_line(k, 1.0))
    run.finish(straight_line(STEPS, 1.0))
    values = meter.compute()
    meter.close()
    assert_agrees(values, measure(run), ROUNDING[torch.complex128])


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_under_a_loss_scaler_are_unscaled(fused: bool) -> None:
    # A fused optimizer gets scaled gradients and divides by `grad_scale` itself; others get them unscaled.
    def run_once(scale: float | None) -> dict[str, float]:
        model = Classifier(3, torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
        meter = TrajectoryMeter(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for k, (x, y) in enumerate(batches(4, STEPS, torch.float32)):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            meter.record_loss(straight_line(k, 1.0))
            scaler.step(optimizer)
            scaler.update()
        values = meter.compute()
        meter.close()
        return values

    plain, scaled = run_once(None), run_once(1024.0)
    for name in ("work_ito", "work_anti_ito", "work_action", "efficiency", "efficiency_action", "grad_norm"):
        # Powers of two scale without rounding, up to ε and subnormal numbers.
        assert scaled[name] == pytest.approx(plain[name], rel=1e-5), name


def test_the_raw_gradient_is_taken_as_it_is_without_clipping_news() -> None:
    """Clipping that nobody tells of looks like a gradient of that size: §2 then counts the clipped work."""
    weight = torch.full((4,), 2.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    weight.grad = torch.ones_like(weight)
    torch.nn.utils.clip_grad_norm_([weight], 0.5)
    meter.record_loss(torch.tensor(1.0))
    optimizer.step()
    values = meter.compute()
    assert values["work_ito"] == pytest.approx(0.1 * 0.25, rel=1e-6)  # clip_grad_norm_ adds 1e-6 to the norm
    assert values["grad_norm"] == pytest.approx(0.5, rel=1e-5)


def test_alternating_optimizers_make_joint_steps_without_being_told() -> None:
    """A joint step ends when an optimizer that already moved in it steps again."""
    model = Classifier(0)
    optimizers = three_optimizers(model)
    meter = TrajectoryMeter(optimizers)
    run = Run(*optimizers, meter=meter, joint=False)
    for k, (x, y) in enumerate(batches(1, STEPS)):
        gradients(nn.functional.cross_entropy(model(x), y), optimizers)
        run.step(straight_line(k, 1.0))
    run.finish(straight_line(STEPS, 1.0))
    values = meter.compute()
    meter.close()
    assert_agrees(values, measure(run), 1e-9)


def test_optimizers_may_step_at_different_rates() -> None:
    """Three steps of one to one of the other: K counts joint steps, D and A all motion."""
    model = Classifier(0)
    often = torch.optim.Adam([*model.head.parameters(), *model.side.parameters()], lr=0.01)
    seldom = torch.optim.SGD([*model.first.parameters(), *model.second.parameters()], lr=0.1, momentum=0.8)
    meter = TrajectoryMeter([often, seldom])
    run = Run(often, seldom, meter=meter, joint=True)
    for k, (x, y) in enumerate(batches(1, STEPS)):
        gradients(nn.functional.cross_entropy(model(x), y), [often, seldom])
        run.step(straight_line(k, 1.0), only=(0, 1) if k % 3 == 2 else (0,))
    run.finish(straight_line(STEPS, 1.0))
    values, expected = meter.compute(), measure(run)
    meter.close()
    # What the next force is, for an optimizer that skips the next step, is left open: no f_{k+1} here.
    for name in DIRECT:
        assert values[name] == pytest.approx(expected[name], rel=1e-9), name


def odd_parameters(dtype: torch.dtype) -> list[Tensor]:
    """A scalar, an empty one, a transposed one, channels last, and one of more elements than any tile."""
    generator = torch.Generator().manual_seed(8)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        p.requires_grad_()
        for p in (
            draw(),
            draw(0, 3),
            draw(4, 5).t(),
            draw(2, 3, 4, 5).to(memory_format=torch.channels_last),
            draw(1_200_001),
            draw(7),
        )
    ]


@pytest.mark.parametrize("kind", [O.SGD, O.Adam, O.AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_odd_shapes_and_layouts(kind: type, dtype: torch.dtype) -> None:
    parameters = odd_parameters(dtype)
    optimizer = kind(parameters, lr=0.01, weight_decay=0.1)
    meter = TrajectoryMeter(optimizer, coordinates="all")
    run = Run(optimizer, meter=meter)
    for k in range(3):
        for number, p in enumerate(parameters):
            ramp = torch.linspace(-1, 2, p.numel(), dtype=torch.float64).reshape(p.shape)
            # Contiguous, whatever the parameter's layout; the last one's comes and goes.
            p.grad = None if number == 5 and k == 1 else (torch.sin(3 * ramp + k) + 0.2).to(dtype)
        run.step(straight_line(k, 1.0))
    run.finish(straight_line(3, 1.0))
    values, expected = meter.compute(), measure(run)
    for name in DIRECT:
        assert values[name] == pytest.approx(expected[name], rel=ROUNDING[dtype]), name
    for p in parameters[2:4]:
        got = meter.accumulated_mobility(p).double().reshape(-1)
        torch.testing.assert_close(got, expected.mobility[p], rtol=ROUNDING[dtype], atol=0.0)
    meter.close()


@pytest.mark.parametrize("empty", [(0,), (0, 1), (2,), (5,), (0, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("kind", [O.SGD, O.Adam, O.Rprop], ids=lambda kind: kind.__name__)
def test_steps_without_any_gradient(kind: type, empty: tuple[int, ...]) -> None:
    """They take time and move nothing, wherever they stand."""
    weight = torch.ones(6, dtype=torch.float64, requires_grad=True)
    optimizer = kind([weight], lr=0.05)
    meter = TrajectoryMeter(optimizer)
    run = Run(optimizer, meter=meter)
    for k in range(6):
        weight.grad = None if k in empty else weight.detach() * torch.linspace(0.2, 1, 6, dtype=torch.float64)
        run.step(1.0 - 0.1 * k)
    values, expected = meter.compute(), measure(run)
    meter.close()
    for name in DIRECT:
        if name in ("step_norm", "grad_norm", "grad_norm_clipped"):
            continue  # of the last step, or of the last with a gradient: left open
        assert values[name] == pytest.approx(expected[name], rel=1e-9), name


@pytest.mark.parametrize("every", [2, 3, 5])
def test_measuring_some_steps_is_exact_where_all_are_alike(every: int) -> None:
    # Sums over the measured steps are scaled to all of them; here every step adds the same.
    steps = 20
    weight = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.25)
    meter = TrajectoryMeter(optimizer, measure_every_n_steps=every)
    for k in range(steps):
        weight.grad = -torch.linspace(1, 2, 6, dtype=torch.float64)
        meter.record_loss(straight_line(k, 1.0))
        optimizer.step()
    values = meter.compute()
    meter.close()
    squared = float(torch.linspace(1, 2, 6, dtype=torch.float64).square().sum())
    wanted = {
        "elapsed": steps,
        "displacement": steps * 0.25 * squared**0.5,
        "path_length": steps * 0.25 * squared**0.5,
        "action": steps * 0.25**2 * squared,
        "work_ito": steps * 0.25 * squared,
        "work_action": steps * 0.25 * squared,
        "kinematic_efficiency": 1.0,
        "efficiency_action": 1.0,
    }
    assert {name: values[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)


def test_a_run_that_does_not_move_has_no_efficiency_and_says_why() -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.0)
    meter = TrajectoryMeter(optimizer)
    for _ in range(4):
        weight.grad = torch.ones_like(weight)
        meter.record_loss(torch.tensor(1.0))
        optimizer.step()
    values = meter.compute()
    meter.close()
    assert (values["displacement"], values["path_length"], values["work_ito"]) == (0.0, 0.0, 0.0)
    for name in ("kinematic_efficiency", "straightness", "efficiency", "efficiency_action", "conversion"):
        assert math.isnan(values[name]), name
        assert "finite" not in meter.reasons[name], "0/0 is no overflow"


def test_the_sketch_keeps_the_distance() -> None:
    meter, run, _ = train(SETTINGS["adam"], torch.float32)
    sketch = meter.sketch()
    meter.close()
    assert (sketch.shape, sketch.dtype, sketch.device.type) == ((4093,), torch.float32, "cpu")
    # Four standard errors of √(2/4093) = 2.2 %.
    squared = measure(run)["displacement"] ** 2
    assert float(sketch.double().square().sum()) == pytest.approx(squared, rel=4 * (2 / 4093) ** 0.5)


@pytest.mark.parametrize("name", ["sgd clipped with L2", "adamw", "rmsprop response", "adafactor", "three optimizers"])
def test_a_restored_meter_goes_on_as_if_nothing_had_happened(name: str) -> None:
    setting = SETTINGS[name]
    whole, _, _ = train(setting, torch.float64)
    expected = whole.compute()
    whole.close()

    model = Classifier(0)
    optimizers = setting.optimizers(model)
    meter: TrajectoryMeter | None = None
    run: Run | None = None
    for k, (x, y) in enumerate(batches(1, STEPS)):
        if k in (0, 6):
            saved = None if meter is None else copy.deepcopy(meter.state_dict())
            states = [optimizer.state_dict() for optimizer in optimizers]
            if meter is not None:
                meter.close()
                fresh = Classifier(7)
                fresh.load_state_dict(model.state_dict())
                model, optimizers = fresh, setting.optimizers(fresh)
                for optimizer, state in zip(optimizers, states, strict=True):
                    optimizer.load_state_dict(copy.deepcopy(state))
            meter = TrajectoryMeter(optimizers if len(optimizers) > 1 else optimizers[0], **setting.meter)
            if saved is not None:
                meter.load_state_dict(saved)
            run = Run(*optimizers, meter=meter, joint=len(optimizers) > 1)
        gradients(nn.functional.cross_entropy(model(x), y), optimizers)
        assert run is not None
        run.step(straight_line(k, setting.sign), clip=setting.clip)
    assert run is not None
    assert meter is not None
    run.finish(straight_line(STEPS, setting.sign))
    values = meter.compute()
    meter.close()
    assert values == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_the_meter_changes_nothing() -> None:
    def weights(measured: bool) -> list[Tensor]:
        model = Classifier(0, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        meter = TrajectoryMeter(optimizer) if measured else None
        for x, y in batches(1, STEPS, torch.float32):
            loss = nn.functional.cross_entropy(model(x), y)
            gradients(loss, [optimizer])
            if meter is not None:
                meter.record_loss(loss)
            optimizer.step()
            if meter is not None:
                meter.compute()
        return [flat(p) for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))
