"""Mobility: what multiplies the force. THEORY §3: under a constant gradient u = μ f, for every flag."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from trajectory_cases import FORMULA_RECIPES, ROUNDING, Recipe, recipe_ids
from trajectory_reference import Run, counted_mobilities, flat, measure, mobilities

from lightning_speedlimit.trajectory import TrajectoryMeter, register_mobility

# Six decades, both signs.
FORCES = torch.cat([10.0 ** torch.linspace(-4, 2, 7), -(10.0 ** torch.linspace(-4, 2, 7))]).double()

# u is a difference of parameters: off by 1e-16 · 0.5/1e-5 = 5e-12 of it for the smallest force, less else
# (they grow with their u). What momentum has not settled is 2e-11. 1e-9 leaves both room.
CONSTANT_FORCE = 1e-9


def decouples(recipe: Recipe) -> bool:
    return recipe.kind is torch.optim.AdamW or bool(recipe.options.get("decoupled_weight_decay", False))


def decayed(recipe: Recipe) -> list[Recipe]:
    """With every kind of weight decay that the optimizer offers."""
    out = [recipe.but(weight_decay=0.02)]
    if "decoupled_weight_decay" in inspect.signature(recipe.kind).parameters:  # Adam: from torch 2.6 on
        out.append(recipe.but(weight_decay=0.02, decoupled_weight_decay=True))
    return out


VARIANTS = [
    variant
    for recipe in FORMULA_RECIPES
    for variant in (
        recipe.but(foreach=False),
        recipe.but(foreach=True),
        recipe.but(maximize=True),
        *decayed(recipe),
        *[d.but(maximize=True) for d in decayed(recipe)],
    )
] + [
    recipe.but(fused=True, weight_decay=0.02)
    for recipe in FORMULA_RECIPES
    if recipe.kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
]


def push(recipe: Recipe, parameter: Tensor, force: Tensor) -> None:
    """The gradient under which −(g + w θ) is the force, whatever the decay and the sign."""
    decay = 0.0 if decouples(recipe) else recipe.options.get("weight_decay", 0.0)
    sign = -1.0 if recipe.options.get("maximize", False) else 1.0
    parameter.grad = -sign * (force + decay * parameter.detach())


def increment(now: Tensor | float, before: Tensor | float) -> Tensor:
    return torch.as_tensor(now, dtype=torch.float64) - torch.as_tensor(before, dtype=torch.float64)


def constant_force_error(recipe: Recipe, steps: int, **options: Any) -> list[float]:
    """max_i |u_i/(μ_i f_i) − 1| at each step of a run under a constant force."""
    parameter = torch.full_like(FORCES, 0.5).requires_grad_()
    optimizer = recipe([parameter])
    meter = TrajectoryMeter(optimizer, **options)
    drift = recipe.options["lr"] * recipe.options.get("weight_decay", 0.0) if decouples(recipe) else 0.0
    errors, last = [], 0.0
    for k in range(steps):
        push(recipe, parameter, FORCES)
        before = flat(parameter)
        meter.record_loss(torch.tensor(-float(k)))
        optimizer.step()
        update = flat(parameter) - before + drift * before
        total = meter.accumulated_mobility(parameter)
        mobility, last = increment(total, last), total
        errors.append(float((update / (mobility * FORCES) - 1).abs().max()))
    meter.close()
    return errors


@pytest.mark.parametrize("recipe", VARIANTS, ids=recipe_ids(VARIANTS))
def test_update_is_mobility_times_force(recipe: Recipe) -> None:
    errors = constant_force_error(recipe, recipe.settled + 10)
    assert max(errors[recipe.settled - 1 :]) < CONSTANT_FORCE


WITH_MOMENTUM = [recipe for recipe in FORMULA_RECIPES if recipe.options.get("momentum")]


@pytest.mark.parametrize("recipe", WITH_MOMENTUM, ids=recipe_ids(WITH_MOMENTUM))
def test_response_mobility_is_exact_from_the_first_step(recipe: Recipe) -> None:
    assert max(constant_force_error(recipe, 40, momentum_mobility="response")) < CONSTANT_FORCE


@pytest.mark.parametrize("recipe", WITH_MOMENTUM, ids=recipe_ids(WITH_MOMENTUM))
def test_steady_mobility_is_not_the_first_response(recipe: Recipe) -> None:
    # u_0 is lr (times 1 + β for Nesterov), the steady mobility (1 − d)/(1 − β) of it: far from u = μ f.
    assert constant_force_error(recipe, 1)[0] > 0.1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop], ids=lambda k: k.__name__)
def test_learning_rate_may_be_a_tensor(kind: type) -> None:
    recipe = Recipe(kind, {"lr": torch.tensor(0.01, dtype=torch.float64), "foreach": False})
    assert max(constant_force_error(recipe, 12)) < CONSTANT_FORCE


@pytest.mark.parametrize("recipe", FORMULA_RECIPES, ids=recipe_ids(FORMULA_RECIPES))
def test_the_reference_obeys_its_own_definition(recipe: Recipe) -> None:
    parameter = torch.zeros_like(FORCES).requires_grad_()
    run = Run(recipe([parameter]))
    for _ in range(40):
        push(recipe, parameter, FORCES)
        run.step()
    moves = [step[parameter] for step in run.steps]
    for move, mobility in zip(moves, mobilities(moves, "response"), strict=True):
        torch.testing.assert_close(move.update, mobility * move.force, rtol=CONSTANT_FORCE, atol=0.0)


# --- the guard can fail -----------------------------------------------------------------------------------


def test_a_wrong_formula_is_caught() -> None:
    class Misjudged(torch.optim.Adam):
        """Adam, whose mobility is registered without the correction of v."""

    def uncorrected(optimizer: Any, group: dict[str, Any], parameter: Tensor) -> Tensor:
        return group["lr"] / (optimizer.state[parameter]["exp_avg_sq"].sqrt() + group["eps"])

    register_mobility(Misjudged, uncorrected)
    errors = constant_force_error(Recipe(Misjudged, {"lr": 0.01}), 12)
    # v is 0.1 % of g² after one step and 1.2 % after twelve: u is 1/√0.001 and 1/√0.012 times smaller.
    assert errors[0] == pytest.approx(1 - math.sqrt(0.001), abs=1e-3)  # ε = 1e-8 against |g| = 1e-4
    assert min(errors) > 0.5


def test_a_registered_formula_is_used() -> None:
    class Cubic(torch.optim.Optimizer):
        """u_i = −lr c_i g_i with a fixed preconditioner, which the package cannot know."""

        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(parameters, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(group["lr"] * preconditioner * parameter.grad)

    preconditioner = torch.linspace(0.5, 3, FORCES.numel(), dtype=torch.float64)
    register_mobility(Cubic, lambda optimizer, group, parameter: group["lr"] * preconditioner)
    assert max(constant_force_error(Recipe(Cubic, {"lr": 0.1}), 5)) < CONSTANT_FORCE


# --- against the reference, at every step -----------------------------------------------------------------


def random_run(recipe: Recipe, *, dtype: torch.dtype, clip: float | None = None, **options: Any) -> None:
    """Random gradients over decades, a schedule, zero and absent gradients: m after every step."""
    generator = torch.Generator().manual_seed(3)
    scale = 10.0 ** torch.linspace(-3, 1, 12, dtype=torch.float64)
    one = torch.randn(12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    other = torch.randn(3, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    optimizer = recipe([one, other])
    meter = TrajectoryMeter(optimizer, **options)
    run = Run(optimizer, meter=meter)
    base = optimizer.param_groups[0]["lr"]
    got: dict[Tensor, list[Tensor]] = {one: [], other: []}
    for k in range(16):
        optimizer.param_groups[0]["lr"] = base * min(1.0, (k + 1) / 4) * (1 + math.cos(0.2 * k)) / 2
        noise = torch.randn(24, generator=generator, dtype=torch.float64)
        one.grad = ((noise[:12] + 0.5) * scale).to(dtype)
        one.grad[0] = 0  # idle for good
        if k < 5:
            one.grad[1] = 0  # idle at first
        other.grad = None if k % 3 == 1 else (noise[12:] - 0.3).reshape(3, 4).to(dtype)
        run.step(10.0 - 0.1 * k, clip=clip)
        for parameter in (one, other):
            if parameter.grad is not None:
                got[parameter].append(meter.accumulated_mobility(parameter).double().reshape(-1))
    meter.close()
    for parameter in (one, other):
        mobility = counted_mobilities(run, parameter, options.get("momentum_mobility", "steady"))
        expected = torch.stack(mobility).cumsum(0)
        torch.testing.assert_close(torch.stack(got[parameter]), expected, rtol=ROUNDING[dtype], atol=0.0)


RANDOM = [
    variant
    for recipe in FORMULA_RECIPES
    for variant in (recipe, recipe.but(weight_decay=0.02, maximize=True))
    # Decoupled decay has a test of its own below: there u = 0 is hidden by rounding.
    if not decouples(variant) or variant.options["weight_decay"] == 0
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("recipe", RANDOM, ids=recipe_ids(RANDOM))
def test_accumulated_mobility_at_every_step(recipe: Recipe, dtype: torch.dtype) -> None:
    random_run(recipe, dtype=dtype)


@pytest.mark.parametrize("recipe", FORMULA_RECIPES, ids=recipe_ids(FORMULA_RECIPES))
def test_accumulated_mobility_of_clipped_gradients(recipe: Recipe) -> None:
    random_run(recipe, dtype=torch.float64, clip=1.0)


@pytest.mark.parametrize("recipe", WITH_MOMENTUM, ids=recipe_ids(WITH_MOMENTUM))
def test_accumulated_response_mobility(recipe: Recipe) -> None:
    random_run(recipe, dtype=torch.float64, momentum_mobility="response")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
        Recipe(torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
        Recipe(torch.optim.RAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ],
    ids=str,
)
def test_decay_alone_is_no_motion_of_the_force(recipe: Recipe, dtype: torch.dtype) -> None:
    # Coordinates without a gradient shrink, and θ_{k+1} − θ_k + lr w θ_k is then a rounding error, not u.
    random_run(recipe, dtype=dtype)


# --- without a formula ------------------------------------------------------------------------------------


def effective_run(kind: str, clock: str) -> tuple[TrajectoryMeter, Run]:
    torch.manual_seed(5)
    matrix = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(6, 4, dtype=torch.float64)
    scale = torch.linspace(0.3, 2.0, 4, dtype=torch.float64)
    options: dict[str, dict[str, Any]] = {
        "LBFGS": {"lr": 0.2, "max_iter": 1},
        "Rprop": {"lr": 0.02},
        "ASGD": {"lr": 0.05},
        "SparseAdam": {"lr": 0.05},
        "Muon": {"lr": 0.05, "weight_decay": 0.0},
        "Adafactor": {"lr": 0.05, "weight_decay": 0.0},
    }
    optimizer = getattr(torch.optim, kind)([matrix], **options[kind])
    meter = TrajectoryMeter(optimizer, clock=clock, entropy_production="ito")
    run = Run(optimizer, meter=meter)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (scale * (matrix - target) ** 2).sum()
        loss.backward()
        if kind == "SparseAdam":
            matrix.grad = matrix.grad.to_sparse(1)
        return loss

    for k in range(12):
        closure()
        run.step(5.0 - 0.25 * k, closure=closure if kind == "LBFGS" else None)
    return meter, run.finish(5.0 - 0.25 * 12)


# Muon is recent.
NO_FORMULA = [
    name for name in ("LBFGS", "Rprop", "ASGD", "SparseAdam", "Muon", "Adafactor") if hasattr(torch.optim, name)
]


@pytest.mark.parametrize("clock", ["steps", "lr"])
@pytest.mark.parametrize("kind", NO_FORMULA)
def test_without_a_formula_the_mobility_is_effective(kind: str, clock: str) -> None:
    """η = kinematic efficiency (steps) × work_ito/Q, so the kinematic one itself for Q = work_ito."""
    meter, run = effective_run(kind, clock)
    expected = measure(run)
    values = meter.compute()
    close = {"rel": ROUNDING[torch.float64]}
    assert values["work_ito"] == pytest.approx(expected["work_ito"], **close)
    assert values["efficiency"] == pytest.approx(expected["kinematic_efficiency"], **close)
    # For one scalar μ per group, work_action is work_ito.
    assert values["efficiency_action"] == pytest.approx(expected["kinematic_efficiency"], **close)
    meter.close()


def test_effective_mobility_by_loss_drop_is_kinematic_over_conversion() -> None:
    torch.manual_seed(6)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Rprop([weight], lr=0.01)
    meter = TrajectoryMeter(optimizer)
    run = Run(optimizer, meter=meter)
    for k in range(8):
        weight.grad = weight.detach().clone()
        run.step(2.0 - 0.125 * k)
    run.finish(1.0)
    expected = measure(run)
    drop = 1.0  # the losses above are a straight line from 2 to 1
    values = meter.compute()
    assert values["conversion"] == pytest.approx(drop / expected["work_ito"], rel=1e-9)
    assert values["efficiency"] == pytest.approx(
        expected["kinematic_efficiency"] * expected["work_ito"] / drop, rel=1e-9
    )


def test_effective_mobility_needs_positive_work() -> None:
    class Uphill(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.1 * parameter.grad)

    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    optimizer = Uphill([weight])
    meter = TrajectoryMeter(optimizer)
    for k in range(4):
        weight.grad = torch.ones_like(weight)
        meter.record_loss(torch.tensor(3.0 - k))
        optimizer.step()
    values = meter.compute()
    assert values["work_ito"] == pytest.approx(-4 * 0.1 * 4)
    assert math.isnan(values["efficiency"])
    assert math.isnan(values["efficiency_action"])
    assert {"efficiency", "efficiency_action"} <= set(meter.reasons)
