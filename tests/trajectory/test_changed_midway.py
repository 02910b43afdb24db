"""Runs whose optimizer, gradients or weights are changed midway in ways that a tidy loop never does.

Each expectation is added up once more in float64 from copies that the loop keeps: θ before and after each step,
and the gradient before anything clipped it.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter, mobility, register_mobility

EXACT = 1e-9  # float64 trainings: some hundred additions leave 1e-13, and ratios of sums lose a few digits
SINGLE = 1e-5  # float32: 6e-8 for each gradient, update and tile sum, and dozens of them add


def weights(n: int = 6, *, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter((torch.arange(1, n + 1, dtype=torch.float64) / n * scale).to(dtype))


def bowl(*parameters: Tensor) -> Tensor:
    """Σ ½ h_i θ_i² with curvatures from 0.1 to 1."""
    return sum(  # type: ignore[return-value]
        (0.5 * torch.linspace(0.1, 1.0, p.numel(), dtype=p.dtype) * p**2).sum() for p in parameters
    )


def flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1).clone() for p in parameters])


@dataclass
class Tape:
    """A loop without hooks that keeps plain copies of the parameters it was given."""

    parameters: list[Tensor]
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    raw: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(
        self,
        optimizer: Optimizer,
        meter: TrajectoryMeter | None,
        loss: Callable[[], Tensor],
        clip: Callable[[], Any] | None = None,
    ) -> None:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        self.losses.append(float(value.detach()))
        self.raw.append(flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]))
        if meter is not None:
            meter.record_loss(value)
        if clip is not None:
            if meter is not None:
                meter.observe_gradients(optimizer)
            clip()
        self.before.append(flat(self.parameters))
        optimizer.step()
        self.after.append(flat(self.parameters))

    @property
    def updates(self) -> list[Tensor]:
        return [b - a for a, b in zip(self.before, self.after, strict=True)]

    @property
    def ito(self) -> float:
        return -math.fsum(float(g @ u) for g, u in zip(self.raw, self.updates, strict=True))

    @property
    def squares(self) -> list[float]:
        return [float(u @ u) for u in self.updates]

    @property
    def displacement(self) -> float:
        return float((self.after[-1] - self.before[0]).norm())

    @property
    def kinematic(self) -> float:
        return self.displacement**2 / (len(self.updates) * math.fsum(self.squares))


def same(got: dict[str, float], wanted: dict[str, float]) -> None:
    """Bitwise, NaN for NaN."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == value or (math.isnan(got[name]) and math.isnan(value)), name


# --- 1. The optimizer's groups --------------------------------------------------------------------------------


def sgd(parameters: list[Tensor], **options: Any) -> Optimizer:
    return torch.optim.SGD(parameters, **({"lr": 0.01} | options))


RELOADED: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "SGD with momentum": lambda p: sgd(p, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


@pytest.mark.parametrize("make", RELOADED.values(), ids=RELOADED.keys())
def test_loading_the_optimizers_own_state_interrupts_nothing(make: Callable[[list[Tensor]], Optimizer]) -> None:
    """It replaces the groups by new dictionaries; rates and decays that change afterwards stand in these alone."""
    found = []
    for reload in (False, True):
        p = weights()
        optimizer = make([p])
        meter = TrajectoryMeter(optimizer)
        tape = Tape([p])
        for k in range(12):
            if k == 5:
                if reload:
                    old = optimizer.param_groups[0]
                    optimizer.load_state_dict(optimizer.state_dict())
                    assert optimizer.param_groups[0] is not old
                optimizer.param_groups[0]["lr"] *= 3.0
                optimizer.param_groups[0]["weight_decay"] = 0.2
            tape.step(optimizer, meter, lambda p=p: bowl(p))
        found.append(meter.compute())
    same(found[1], found[0])
    assert found[1]["kinematic_efficiency"] == pytest.approx(tape.kinematic, rel=EXACT)


def test_a_rate_changed_in_the_loaded_groups_is_the_one_that_counts() -> None:
    p = weights()
    optimizer = sgd([p])
    meter = TrajectoryMeter(optimizer, clock="lr")
    tape, rates = Tape([p]), []
    for k in range(10):
        if k == 4:
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.param_groups[0]["lr"] = 0.05
        rates.append(optimizer.param_groups[0]["lr"])
        tape.step(optimizer, meter, lambda: bowl(p))
    action = math.fsum(q / r for q, r in zip(tape.squares, rates, strict=True))
    values = meter.compute()
    assert values["elapsed"] == pytest.approx(math.fsum(rates), rel=EXACT)
    assert values["action"] == pytest.approx(action, rel=EXACT)
    # μ = lr for all coordinates: m = Σ lr and Σ u²/μ is the action on this clock
    bound = tape.displacement**2 / math.fsum(rates) / action
    assert values["efficiency_action"] == pytest.approx(bound, rel=EXACT)


def leave_the_list(optimizer: Optimizer, q: Tensor) -> None:
    params = optimizer.param_groups[-1]["params"]
    del params[next(i for i, p in enumerate(params) if p is q)]


def leave_by_another_list(optimizer: Optimizer, q: Tensor) -> None:
    group = optimizer.param_groups[-1]
    group["params"] = [p for p in group["params"] if p is not q]


def leave_with_the_group(optimizer: Optimizer, q: Tensor) -> None:
    optimizer.param_groups.pop()


@pytest.mark.parametrize(
    ("leave", "apart"),
    [(leave_the_list, False), (leave_by_another_list, False), (leave_the_list, True), (leave_with_the_group, True)],
    ids=["the list", "another list", "an emptied group", "the group"],
)
def test_a_parameter_that_leaves(leave: Callable[[Optimizer, Tensor], None], apart: bool) -> None:
    """Its last gradient stays in `.grad`: no force of the run any more, neither for u_k nor for ‖g‖."""
    p, q = weights(), weights(3, scale=4.0)
    optimizer = sgd([{"params": [p]}, {"params": [q]}] if apart else [p, q])  # type: ignore[list-item]
    meter = TrajectoryMeter(optimizer)
    tape = Tape([p, q])
    for k in range(8):
        if k == 4:
            leave(optimizer, q)
        tape.step(optimizer, meter, lambda k=k: bowl(p) if k >= 4 else bowl(p, q))
        assert q.grad is not None
    forces = [torch.cat([g[:6], g[6:] if k < 4 else torch.zeros(3)]) for k, g in enumerate(tape.raw)]
    anti = -math.fsum(float(f @ u) for f, u in zip(forces[1:], tape.updates, strict=False))
    values = meter.compute()
    assert values["work_ito"] == pytest.approx(tape.ito, rel=EXACT)
    assert values["work_anti_ito"] == pytest.approx(anti, rel=EXACT)
    assert values["grad_norm"] == pytest.approx(float(forces[-1].norm()), rel=EXACT)
    assert values["displacement"] == pytest.approx(tape.displacement, rel=EXACT)
    assert values["kinematic_efficiency"] == pytest.approx(tape.kinematic, rel=EXACT)
    # each coordinate's own clock: q's stopped after 4 steps
    travelled = (tape.after[-1] - tape.before[0]) ** 2
    weighted = float(travelled[:6].sum()) / (8 * 0.01) + float(travelled[6:].sum()) / (4 * 0.01)
    assert values["efficiency_action"] == pytest.approx(weighted / (math.fsum(tape.squares) / 0.01), rel=EXACT)
    assert meter.steps == 8


def test_clipping_after_a_parameter_has_left() -> None:
    """The clip factor is that of the gradients which the optimizer uses."""
    p, q = weights(), weights(3, scale=4.0)
    optimizer = sgd([p, q])
    meter = TrajectoryMeter(optimizer)
    tape = Tape([p, q])
    for k in range(8):
        if k == 4:
            leave_the_list(optimizer, q)
        clipped = [p] if k >= 4 else [p, q]
        tape.step(
            optimizer,
            meter,
            lambda k=k: bowl(p) if k >= 4 else bowl(p, q),
            lambda clipped=clipped: nn.utils.clip_grad_norm_(clipped, 0.2),
        )
    values = meter.compute()
    assert values["work_ito"] == pytest.approx(tape.ito, rel=EXACT)
    assert "work_ito" not in meter.reasons


# --- 2. A fault of the measurement ----------------------------------------------------------------------------


def raises(error: type[Exception]) -> Any:
    def fault() -> Tensor:
        raise error("this mobility is broken")

    return fault


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (raises(ZeroDivisionError), "ZeroDivisionError: this mobility is broken"),
    "ends an iteration": (raises(StopIteration), "StopIteration: this mobility is broken"),
    "wrong shape": (lambda: torch.zeros(3, 99), "RuntimeError"),
    "no number": (lambda: "fast", "TypeError"),
}


@pytest.fixture
def broken() -> Iterator[type[Optimizer]]:
    class Broken(torch.optim.SGD):
        fault: Any = None
        calls = 0

    yield Broken
    mobility._REGISTERED.pop(Broken, None)


@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_measurement_and_not_the_training(broken: Any, fault: str, closure: bool) -> None:
    call, why = FAULTS[fault]

    def answer(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Any:
        broken.calls += 1
        return group["lr"] if broken.calls <= 3 else call()

    register_mobility(broken, answer)
    trained = []
    for measured in (False, True):
        p = weights()
        optimizer = broken([p], lr=0.05, momentum=0.9)
        meter = TrajectoryMeter(optimizer) if measured else None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(8):
                value = bowl(p)
                optimizer.zero_grad()
                value.backward()
                if meter is not None:
                    meter.record_loss(value)
                returned = optimizer.step((lambda v=value: v) if closure else None)
                assert returned is (value if closure else None)
        trained.append(p.detach().clone())
    assert torch.equal(trained[0], trained[1])
    assert broken.calls == 4  # the measurement stopped where it failed
    assert [why in str(w.message) for w in said] == [True], [str(w.message) for w in said]
    assert meter is not None
    values = meter.compute()
    assert values
    assert all(math.isnan(v) for v in values.values())
    assert all(why in meter.reasons[name] and "step 3" in meter.reasons[name] for name in values)
    assert meter.compute_layers() == {}
    assert not meter.sketch().any()
    restored = TrajectoryMeter(optimizer)
    restored.load_state_dict(meter.state_dict())
    bowl(p).backward()
    optimizer.step()
    assert all(math.isnan(v) for v in restored.compute().values())  # steps are missing from its sums for good
    assert why in restored.reasons["kinematic_efficiency"]


# --- 3., 4. Steps that a loss scaler skips --------------------------------------------------------------------


def test_a_joint_step_in_which_one_was_skipped() -> None:
    """K counts it: else the other's straight path at constant speed would be faster than possible."""
    p, q = weights(dtype=torch.float32), nn.Parameter(torch.zeros(3))
    plain, fused = torch.optim.SGD([q], lr=0.01), torch.optim.Adam([p], lr=1e-6, fused=True)
    meter = TrajectoryMeter([plain, fused])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    thetas = [flat([p, q])]
    for k in range(20):
        fused.zero_grad()
        scaler.scale(bowl(p)).backward()
        q.grad = torch.ones(3)
        assert p.grad is not None
        if k % 2:
            p.grad[0] = math.inf
        plain.step()
        scaler.step(fused)
        scaler.update()
        meter.end_step()
        thetas.append(flat([p, q]))
    action = math.fsum(float((b - a) @ (b - a)) for a, b in pairwise(thetas))
    wanted = float((thetas[-1] - thetas[0]).square().sum()) / (20 * action)
    values = meter.compute()
    assert values["elapsed"] == 20
    assert values["kinematic_efficiency"] == pytest.approx(wanted, rel=SINGLE)
    assert values["kinematic_efficiency"] <= 1 + SINGLE  # 1 in exact numbers: q goes straight, p hardly at all


def test_a_joint_step_in_which_all_were_skipped_is_none() -> None:
    p, q = weights(dtype=torch.float32), weights(3, dtype=torch.float32)
    both = [torch.optim.Adam([x], lr=0.01, fused=True) for x in (p, q)]
    meter = TrajectoryMeter(both)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(6):
        for optimizer in both:
            optimizer.zero_grad()
        scaler.scale(bowl(p, q)).backward()
        for x in (p, q):
            assert x.grad is not None
            if k == 2:
                x.grad[0] = math.inf
        for optimizer in both:
            scaler.step(optimizer)
        scaler.update()
        meter.end_step()
    assert meter.compute()["elapsed"] == 5


# --- 5. A state of other settings -----------------------------------------------------------------------------


def halfway(**options: Any) -> tuple[Tensor, Optimizer, TrajectoryMeter]:
    p = weights()
    optimizer = sgd([p], momentum=0.5)
    meter = TrajectoryMeter(optimizer, **options)
    for _ in range(12):
        Tape([p]).step(optimizer, meter, lambda: bowl(p))
    return p, optimizer, meter


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        ({"clock": "steps"}, {"clock": "lr"}),
        ({"clock": "lr"}, {"clock": "steps"}),
        ({"measure_every_n_steps": 4}, {"measure_every_n_steps": 1}),
        ({"measure_every_n_steps": 1}, {"measure_every_n_steps": 4}),
        ({"momentum_mobility": "response"}, {"momentum_mobility": "steady"}),
    ],
    ids=str,
)
def test_sums_of_other_definitions_do_not_go_on(saved: dict[str, Any], now: dict[str, Any]) -> None:
    _, optimizer, meter = halfway(**saved)
    meter.close()
    other = TrajectoryMeter(optimizer, **now)
    with pytest.raises(ValueError, match="saved measurement was made with") as caught:
        other.load_state_dict(meter.state_dict())
    wanted, got = str(caught.value).split(", got ")
    assert repr(next(iter(saved.values()))) in wanted
    assert repr(next(iter(now.values()))) in got
    assert other.steps == 0


@pytest.mark.parametrize(("saved", "now"), [(3, 10), (10, 3)])
def test_the_saved_loss_window_goes_on(saved: int, now: int) -> None:
    found = []
    for resumed in (False, True):
        p, optimizer, meter = halfway(loss_window=saved)
        if resumed:
            meter.close()
            following = TrajectoryMeter(optimizer, loss_window=now)
            following.load_state_dict(meter.state_dict())
            meter = following
        for _ in range(12):
            Tape([p]).step(optimizer, meter, lambda p=p: bowl(p))
        found.append(meter.compute())
    assert math.isfinite(found[0]["loss_drop"])
    same(found[1], found[0])


# --- 6. A step within a step ----------------------------------------------------------------------------------


class Inherited(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
def test_a_step_that_calls_its_parents_counts_once(closure: bool) -> None:
    torch.optim.Adam([weights()])  # torch hooks a class's step when its first object is made
    p = weights()
    optimizer = Inherited([p], lr=0.01)
    meter = TrajectoryMeter(optimizer)
    tape = Tape([p])
    for _ in range(20):
        if closure:

            def evaluate() -> Tensor:
                optimizer.zero_grad()
                value = bowl(p)
                value.backward()
                assert p.grad is not None
                tape.raw.append(flat([p.grad]))
                return value

            tape.before.append(flat([p]))
            optimizer.step(evaluate)
            tape.after.append(flat([p]))
        else:
            tape.step(optimizer, meter, lambda: bowl(p))
    anti = -math.fsum(float(g @ u) for g, u in zip(tape.raw[1:], tape.updates, strict=False))
    values = meter.compute()
    assert (meter.steps, values["elapsed"]) == (20, 20)
    assert values["work_ito"] == pytest.approx(tape.ito, rel=EXACT)
    assert values["work_anti_ito"] == pytest.approx(anti, rel=EXACT)
    assert values["kinematic_efficiency"] == pytest.approx(tape.kinematic, rel=EXACT)


# --- 7. Steps without a gradient ------------------------------------------------------------------------------


def test_a_parameter_that_rests_without_a_gradient_is_known() -> None:
    p, q = weights(), weights(3)
    optimizer = sgd([p, q])
    meter = TrajectoryMeter(optimizer)
    tape = Tape([p, q])
    for k in range(8):
        tape.step(optimizer, meter, lambda k=k: bowl(p) if k % 2 else bowl(p, q))
    assert meter.compute()["kinematic_efficiency"] == pytest.approx(tape.kinematic, rel=EXACT)


# --- 8. Weight decay below the weights' precision -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [1e-2, 1e-3])
def test_decoupled_decay_of_half_precision_weights(dtype: torch.dtype, rate: float) -> None:
    """A weight that rounding kept in place made no update, though its decay would have moved it.

    Decay takes lr·w ≤ 1e-4 of a weight, less than half an ulp (at least 2^-9 of it, and 2^-12): where θ changed it
    was the gradient's doing.
    """
    conversions = {}
    for decay in (0.0, 1e-2):
        torch.manual_seed(0)
        p, target = nn.Parameter(torch.randn(2000).to(dtype)), torch.randn(2000)
        optimizer = torch.optim.AdamW([p], lr=rate, weight_decay=decay, eps=1e-4)
        meter = TrajectoryMeter(optimizer, loss_window=2)
        tape = Tape([p])
        for _ in range(60):
            tape.step(optimizer, meter, lambda p=p, target=target: 0.5 * (p.float() - target).square().sum())
        updates = [(b - a + rate * decay * a) * (a != b) for a, b in zip(tape.before, tape.after, strict=True)]
        ito = -math.fsum(float(g @ u) for g, u in zip(tape.raw, updates, strict=True))
        anti = -math.fsum(float(g @ u) for g, u in zip(tape.raw[1:], updates, strict=False))
        values = meter.compute()
        # updates are differences of float32 copies of weights of order 1: 1e-7 of 1e-3 each, at random signs
        assert values["work_ito"] == pytest.approx(ito, rel=1e-4)
        assert values["work_anti_ito"] == pytest.approx(anti, rel=1e-4)
        conversions[decay] = values["conversion"]
    # The loss is ½‖θ − t‖²: u·H·u/2 over f·u is |u|/2|f|, 1 % for steps of 1e-2 (or an ulp) and forces of order 1.
    assert conversions[0.0] == pytest.approx(1.0, abs=0.03)
    assert conversions[1e-2] == pytest.approx(conversions[0.0], abs=0.02)


# --- 9. Clipping by more than one factor ----------------------------------------------------------------------

LARGE = 2 * 131_072 + 1000


def by_module(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        nn.utils.clip_grad_norm_([p], 0.5)


def by_value(parameters: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_value_(parameters, 0.3)


UNEVEN: dict[str, tuple[Callable[[list[nn.Parameter]], None], list[int]]] = {
    "module by module": (by_module, [40, 7]),
    "by value": (by_value, [40, 7]),
    "module by module, large": (by_module, [LARGE, LARGE // 2]),
    "by value in one parameter": (by_value, [LARGE]),
}


@pytest.mark.parametrize("how", UNEVEN)
def test_clipping_by_more_than_one_factor(how: str) -> None:
    clip, sizes = UNEVEN[how]
    parameters = [weights(n, scale=s) for n, s in zip(sizes, (3.0, 0.5), strict=False)]
    optimizer = sgd(list(parameters), lr=1e-3)
    meter = TrajectoryMeter(optimizer)
    tape = Tape(list(parameters))
    for _ in range(6):
        tape.step(optimizer, meter, lambda: bowl(*parameters), lambda: clip(parameters))
    values = meter.compute()
    anti = -math.fsum(float(g @ u) for g, u in zip(tape.raw[1:], tape.updates, strict=False))
    assert values["kinematic_efficiency"] == pytest.approx(tape.kinematic, rel=EXACT)
    assert values["work_ito"] == pytest.approx(tape.ito, rel=EXACT)
    assert values["work_anti_ito"] == pytest.approx(anti, rel=EXACT)
    # The mobility is the effective one.
    assert values["efficiency_action"] == pytest.approx(tape.kinematic, rel=EXACT)
    # Steps of 1e-3 on curvatures of at most 1: loss and work differ by 5e-4, and by as much where L_K is extrapolated
    assert values["conversion"] == pytest.approx(1.0, abs=2e-3)


def test_by_value_that_clips_nothing_is_one_factor() -> None:
    parameters = [weights(40), weights(7)]
    optimizer = sgd(list(parameters), lr=1e-3)
    meter = TrajectoryMeter(optimizer)
    tape = Tape(list(parameters))
    for _ in range(6):
        tape.step(optimizer, meter, lambda: bowl(*parameters), lambda: nn.utils.clip_grad_value_(parameters, 100.0))
    assert meter.compute()["work_ito"] == pytest.approx(tape.ito, rel=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_by_one_factor_is_none_of_these(dtype: torch.dtype) -> None:
    """Norms of parameters whose gradients differ by 1e4, all times one factor, agree to rounding."""
    parameters = [weights(LARGE, scale=3.0, dtype=dtype), weights(7, scale=1e-4, dtype=dtype)]
    optimizer = sgd(list(parameters), lr=1e-3)
    meter = TrajectoryMeter(optimizer)
    tape = Tape(list(parameters))
    for _ in range(4):
        tape.step(optimizer, meter, lambda: bowl(*parameters), lambda: nn.utils.clip_grad_norm_(parameters, 0.5))
    values = meter.compute()
    # float32: updates of 1e-6 of weights of 1, rounded to 5 % each but without a common sign over 3e5 of them
    assert values["work_ito"] == pytest.approx(tape.ito, rel=1e-3 if dtype == torch.float32 else EXACT)
    assert not {"work_ito", "work_anti_ito", "work_action", "efficiency_action"} & set(meter.reasons)


# --- 10. A foreign optimizer's decay --------------------------------------------------------------------------


@pytest.mark.parametrize("registered", [False, True], ids=["", "registered"])
def test_a_foreign_optimizers_decay_is_part_of_its_update(registered: bool) -> None:
    """Nothing tells whether its `weight_decay` is inside the gradient: no L2 term in any work."""

    class Foreign(Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * p.grad)

    if registered:
        register_mobility(Foreign, lambda optimizer, group, parameter: group["lr"])
    try:
        p = weights()
        optimizer = Foreign([p], {"lr": 0.01, "weight_decay": 0.5})
        meter = TrajectoryMeter(optimizer, loss_window=2)
        tape = Tape([p])
        for _ in range(50):
            tape.step(optimizer, meter, lambda: bowl(p))
        values = meter.compute()
    finally:
        mobility._REGISTERED.pop(Foreign, None)
    assert values["work_ito"] == pytest.approx(tape.ito, rel=EXACT)
    drop = tape.losses[0] - (2 * tape.losses[-1] - tape.losses[-2])
    assert values["loss_drop"] == pytest.approx(drop, rel=EXACT)
    assert values["efficiency_action"] == pytest.approx(
        # both are D²/(K lr) over Σ u²/lr: an effective mobility cancels out of it, and a registered one is lr
        tape.displacement**2 / (50 * math.fsum(tape.squares)),
        rel=EXACT,
    )
    action = math.fsum(tape.squares) / 0.01 if registered else tape.ito
    assert values["work_action"] == pytest.approx(action, rel=EXACT)


def test_decay_that_a_wrapper_takes_back_is_part_of_the_update() -> None:
    """Its groups are those of the AdamW within, with the flag that their decay is decoupled."""

    class Masked(Optimizer):
        """Every second update is undone, decay included."""

        def __init__(self, base: Optimizer) -> None:
            super().__init__(base.param_groups, {})
            self.base, self.count = base, 0
            self.param_groups = base.param_groups

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            before = [p.clone() for p in self.param_groups[0]["params"]]
            self.base.step()
            self.count += 1
            for p, old in zip(self.param_groups[0]["params"], before, strict=True):
                p.copy_(old if self.count % 2 else p)

    p = weights()
    optimizer = Masked(torch.optim.AdamW([p], lr=0.01, weight_decay=0.5))
    assert optimizer.param_groups[0]["decoupled_weight_decay"]
    meter, tape = TrajectoryMeter(optimizer), Tape([p])
    for _ in range(20):
        tape.step(optimizer, meter, lambda: bowl(p))
    values = meter.compute()
    assert tape.squares[0] == 0.0 < tape.squares[1]
    assert values["work_ito"] == pytest.approx(tape.ito, rel=EXACT)
    assert values["work_decay"] == 0.0
