"""A measurement that is saved and restored goes on as if nothing had happened."""

import copy
import io
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS = 14


@dataclass(frozen=True)
class Case:
    kind: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    meter: dict[str, Any] = field(default_factory=dict)
    several: bool = False
    rounding: float = 0.0  # bitwise

    def optimizers(self, model: nn.Module) -> list[Optimizer]:
        parameters = list(model.parameters())
        if not self.several:
            groups: Any = [{"params": parameters[:2]}, {"params": parameters[2:]}]
            return [self.kind(groups, **self.options)]
        return [self.kind(parameters[:2], **self.options), optim.SGD(parameters[2:], lr=0.1, momentum=0.5)]


CASES = {
    "sgd": Case(optim.SGD, {"lr": 0.1}),
    "sgd L2": Case(optim.SGD, {"lr": 0.1, "weight_decay": 0.2}),
    "heavy ball": Case(optim.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.1}),
    "heavy ball, response": Case(optim.SGD, {"lr": 0.05, "momentum": 0.8}, {"momentum_mobility": "response"}),
    "nesterov": Case(optim.SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True}),
    "rmsprop": Case(optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "rmsprop, response": Case(optim.RMSprop, {"lr": 0.01, "momentum": 0.5}, {"momentum_mobility": "response"}),
    "adam": Case(optim.Adam, {"lr": 0.02}),
    "adam, clock lr": Case(optim.Adam, {"lr": 0.02}, {"clock": "lr"}),
    "amsgrad": Case(optim.Adam, {"lr": 0.02, "amsgrad": True, "weight_decay": 0.1}),
    "adamw": Case(optim.AdamW, {"lr": 0.02, "weight_decay": 0.5}),
    "adamw, sampled": Case(optim.AdamW, {"lr": 0.02, "weight_decay": 0.5}, {"measure_every_n_steps": 3}),
    # torch keeps NAdam's `mu_product` in float32 and restores it in float64: the training differs too.
    "nadam": Case(optim.NAdam, {"lr": 0.02}, rounding=1e-7),
    "radam": Case(optim.RAdam, {"lr": 0.02}),
    "adamax": Case(optim.Adamax, {"lr": 0.02}),
    "adagrad": Case(optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    "adadelta": Case(optim.Adadelta, {"lr": 1.0}),
    "rprop": Case(optim.Rprop, {"lr": 0.01}),
    "asgd": Case(optim.ASGD, {"lr": 0.05}),
    "maximize": Case(optim.SGD, {"lr": 0.1, "maximize": True}),
    "unknown changes": Case(optim.Adam, {"lr": 0.02}, {"gradient_changes": "unknown"}),
    "drawn coordinates": Case(optim.AdamW, {"lr": 0.02, "weight_decay": 0.5}, {"coordinates": 24}),
    "layers": Case(optim.Adam, {"lr": 0.02}, {"layer_of": lambda p: f"{p.dim()}-d"}),
    "two optimizers": Case(optim.AdamW, {"lr": 0.02, "weight_decay": 0.5}, {}, several=True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys(), scope="module")


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def meter_of(case: Case, optimizers: list[Optimizer]) -> TrajectoryMeter:
    return TrajectoryMeter(optimizers, **case.meter)


class Training:
    """A model, its optimizers and a meter that can be taken down and built anew at any step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = build()
        self.optimizers = case.optimizers(self.model)
        self.meter = meter_of(case, self.optimizers)

    def steps(self, first: int, last: int) -> None:
        for k in range(first, last):
            generator = torch.Generator().manual_seed(k)
            x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
            y = torch.randn(8, 2, generator=generator, dtype=torch.float64)
            loss = (self.model(x) - y).square().mean()
            self.model.zero_grad()
            loss.backward()
            self.meter.record_loss(loss)
            self.meter.observe_gradients()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            for optimizer in self.optimizers:
                optimizer.step()
            self.meter.end_step()

    def rebuild(self) -> None:
        """Another process: new model, new optimizers, new meter; only state dicts cross over."""
        weights = copy.deepcopy(self.model.state_dict())
        states = [copy.deepcopy(o.state_dict()) for o in self.optimizers]
        self.meter.close()
        self.model = build(seed=5)
        self.model.load_state_dict(weights)
        self.optimizers = self.case.optimizers(self.model)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self.meter = meter_of(self.case, self.optimizers)

    def resume(self) -> None:
        state = through_a_file(self.meter.state_dict())
        self.rebuild()
        self.meter.load_state_dict(state)


def through_a_file(thing: Any) -> Any:
    """torch.save, and torch.load that executes nothing."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def whole(case: Case) -> Training:
    """A training that nothing interrupts; no test goes on with it."""
    training = Training(case)
    training.steps(0, STEPS)
    return training


@cases
@pytest.mark.parametrize("stop", [0, 1, 13])
def test_a_restored_measurement_goes_on(case: Case, whole: Training, stop: int) -> None:
    training = Training(case)
    training.steps(0, stop)
    training.resume()
    assert training.meter.steps == stop
    training.steps(stop, STEPS)
    assert training.meter.compute() == pytest.approx(whole.meter.compute(), rel=case.rounding, abs=0.0, nan_ok=True)
    assert training.meter.reasons == whole.meter.reasons
    torch.testing.assert_close(training.meter.sketch(), whole.meter.sketch(), rtol=max(1e-7, case.rounding), atol=1e-9)
    layers = training.meter.compute_layers()
    for name, values in whole.meter.compute_layers().items():
        assert layers[name] == pytest.approx(values, rel=case.rounding, abs=0.0, nan_ok=True)


@cases
def test_restoring_twice(case: Case, whole: Training) -> None:
    training = Training(case)
    for first, last in ((0, 4), (4, 5), (5, STEPS)):
        training.steps(first, last)
        if last < STEPS:
            training.resume()
    assert training.meter.compute() == pytest.approx(whole.meter.compute(), rel=case.rounding, abs=0.0, nan_ok=True)


@pytest.mark.parametrize(("coordinates", "measured"), [("all", 100_000), (10_000, 10_000)])
def test_a_state_has_the_size_of_what_is_measured(coordinates: Any, measured: int) -> None:
    weight = nn.Parameter(torch.zeros(100_000))
    optimizer = optim.Adam([weight])
    meter = TrajectoryMeter(optimizer, coordinates=coordinates)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    file = io.BytesIO()
    torch.save(meter.state_dict(), file)
    meter.close()
    # float32: θ_0, θ_k, u_k, g_k and two of m; sums in float64 of each row of 256, or drawn unit of 8.
    assert 6 < file.getbuffer().nbytes / (4 * measured) < (6.2 if coordinates == "all" else 10)


def plain(thing: Any) -> bool:
    if isinstance(thing, dict):
        return all(isinstance(key, str | int) and plain(value) for key, value in thing.items())
    if isinstance(thing, list | tuple):
        return all(map(plain, thing))
    return thing is None or type(thing) in (bool, int, float, str) or type(thing) is Tensor


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@cases
def test_a_state_is_plain_and_apart_from_what_follows(case: Case) -> None:
    """Saving takes a copy, and so does loading."""
    training = Training(case)
    training.steps(0, 4)
    state = training.meter.state_dict()
    assert plain(state)
    frozen = copy.deepcopy(state)
    training.steps(4, 8)
    assert same(frozen, state)
    training = Training(case)
    training.steps(0, 4)
    training.rebuild()
    training.meter.load_state_dict(state)
    training.steps(4, 8)
    assert same(frozen, state)


# ---- what does not fit ---------------------------------------------------------------------------------


def saved(case: Case, steps: int = 3) -> dict[str, Any]:
    training = Training(case)
    training.steps(0, steps)
    found = training.meter.state_dict()
    training.meter.close()
    return found


def test_another_model_is_refused() -> None:
    state = saved(CASES["adam"])
    other = nn.Linear(7, 3).double()
    meter = TrajectoryMeter(optim.Adam([{"params": [other.weight]}, {"params": [other.bias]}]))
    # Saved: 4 × 6 weights and 6 biases, 6 × 2 and 2.
    with pytest.raises(ValueError, match=r"\[24, 6, 12, 2\].*got \[21, 3\]"):
        meter.load_state_dict(state)


def test_fewer_groups_are_refused() -> None:
    state = saved(CASES["adam"])
    meter = TrajectoryMeter(optim.Adam(list(build().parameters())[:2]))
    with pytest.raises(ValueError, match=r"\[24, 6, 12, 2\].*got \[24, 6\]"):
        meter.load_state_dict(state)


def test_another_number_of_optimizers_is_refused() -> None:
    state = saved(CASES["two optimizers"])
    meter = TrajectoryMeter(optim.Adam(build().parameters()))
    with pytest.raises(ValueError, match=r"2 optimizers, got 1"):
        meter.load_state_dict(state)


def test_another_kind_of_optimizer_is_refused() -> None:
    # Adam's m and SGD's have nothing in common.
    state = saved(CASES["adam"])
    training = Training(CASES["sgd"])
    with pytest.raises(ValueError, match=r"(?s)Adam.*SGD|SGD.*Adam"):
        training.meter.load_state_dict(state)


def test_a_used_meter_is_refused() -> None:
    state = saved(CASES["adam"])
    training = Training(CASES["adam"])
    training.steps(0, 2)
    with pytest.raises(ValueError, match=r"new meter, got one that has measured 2 steps"):
        training.meter.load_state_dict(state)
