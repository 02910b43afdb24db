"""What training loops do in mid-run, and what a fault of the measurement may never do."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_speedlimit.trajectory import TrajectoryMeter, mobility, register_mobility

STEPS = 20


def weights(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]


def descend(parameters: list[Tensor]) -> Tensor:
    """½ Σ h θ², h from 0.2 to 1: gradients in place, loss back."""
    loss = torch.zeros((), dtype=torch.float64)
    for p in parameters:
        h = torch.linspace(0.2, 1.0, p.numel(), dtype=torch.float64).view_as(p)
        p.grad = (h * p.detach().double()).to(p.dtype)
        loss += 0.5 * (h * p.detach().double() ** 2).sum()
    return loss


def run(
    make: Callable[[list[Tensor]], Any], at: int = -1, then: Callable[[Any], None] | None = None
) -> dict[str, float]:
    parameters = weights()
    optimizer = make(parameters)
    meter = TrajectoryMeter(optimizer)
    for k in range(STEPS):
        meter.record_loss(descend(parameters))
        optimizer.step()
        if k == at and then is not None:
            then(optimizer)
    values = meter.compute()
    meter.close()
    return values


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_reloaded_optimizer_is_followed(kind: Any) -> None:
    # load_state_dict puts new group dicts in place of the old ones; the numbers of the training are the same.
    whole = run(lambda p: kind(p, lr=0.05))
    reloaded = run(lambda p: kind(p, lr=0.05), 7, lambda o: o.load_state_dict(o.state_dict()))
    for name, value in whole.items():
        assert reloaded[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name  # float64, the same additions


def test_a_parameter_that_leaves_is_not_met_again() -> None:
    parameters = weights()
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    last: list[Tensor] = []
    anti = 0.0
    for k in range(STEPS):
        descend(parameters)
        if k:
            stay = parameters if k < 10 else parameters[:1]
            anti -= sum(float((p.grad * u).sum()) for p, u in zip(stay, last, strict=False) if p.grad is not None)
        before = [p.detach().clone() for p in parameters]
        if k == 10:
            optimizer.param_groups.pop()
        optimizer.step()
        last = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
    values = meter.compute()
    assert values["work_anti_ito"] == pytest.approx(anti, rel=1e-12)
    assert len(meter.state_dict()["traces"][0]["sections"]) == 2
    meter.close()


class Strange(torch.optim.SGD):
    """SGD by another name, for which a mobility can be registered."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    "fault",
    [lambda *_: torch.ones(3, 5), lambda *_: next(iter(())), lambda *_: 1 / 0],
    ids=["shape", "StopIteration", "division"],
)
def test_a_fault_of_the_measurement_stops_the_measurement(
    fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mobility, "_REGISTERED", {})
    bare = weights()
    plain = Strange(bare, lr=0.1)
    for _ in range(5):
        descend(bare)
        plain.step()
    register_mobility(Strange, fault)
    parameters = weights()
    optimizer = Strange(parameters, lr=0.1)
    meter = TrajectoryMeter(optimizer)
    descend(parameters)
    with pytest.warns(UserWarning, match="measurement stopped at step 0"):
        optimizer.step()
    for _ in range(4):
        descend(parameters)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, bare, strict=True))
    values = meter.compute()
    assert all(math.isnan(value) for value in values.values())
    assert "measurement stopped" in meter.reasons["efficiency"]


def test_a_step_that_calls_its_parents_counts_once() -> None:
    torch.optim.SGD(weights(), lr=0.1)  # torch hooks a class's step when its first instance is made
    got = run(lambda p: Strange(p, lr=0.05))
    assert got["elapsed"] == STEPS
    assert got["kinematic_efficiency"] == pytest.approx(
        run(lambda p: torch.optim.SGD(p, lr=0.05))["kinematic_efficiency"]
    )


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_first_step_skipped_by_a_fused_optimizer(kind: Any) -> None:
    def values(fused: bool) -> dict[str, float]:
        parameters = weights(dtype=torch.float32)
        optimizer = kind(parameters, lr=0.05, fused=fused)
        meter = TrajectoryMeter(optimizer)
        for k in range(STEPS + fused):
            descend(parameters)
            if fused:
                optimizer.found_inf = torch.tensor(float(k == 0))
                optimizer.grad_scale = None
            optimizer.step()
        found = meter.compute()
        meter.close()
        return found

    fused, plain = values(True), values(False)
    for name in ("efficiency_action", "kinematic_efficiency", "elapsed", "path_length"):
        assert fused[name] == pytest.approx(plain[name], rel=1e-4), name  # two implementations of Adam in float32


@pytest.mark.parametrize("setting", [{"clock": "lr"}, {"measure_every_n_steps": 3}, {"momentum_mobility": "response"}])
def test_sums_of_other_settings_are_refused(setting: dict[str, Any]) -> None:
    parameters = weights()
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    meter = TrajectoryMeter(optimizer)
    descend(parameters)
    optimizer.step()
    state = meter.state_dict()
    meter.close()
    with pytest.raises(ValueError, match="got"):
        TrajectoryMeter(optimizer, **setting).load_state_dict(state)


class Drift(torch.optim.Optimizer):
    """Moves what has no gradient too."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.1)


def test_a_motion_without_gradient_is_no_free_displacement() -> None:
    parameters = weights()
    meter = TrajectoryMeter(Drift(parameters))
    for k in range(STEPS):
        descend(parameters)
        if k > 4:
            parameters[1].grad = None
        meter.optimizers[0].step()
    values = meter.compute()
    assert math.isnan(values["kinematic_efficiency"])
    assert "outside of optimizer.step" in meter.reasons["kinematic_efficiency"]
    meter.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decay_of_half_precision_weights_hides_no_motion(dtype: torch.dtype) -> None:
    # Σ g·u recomputed from the weights in float64, the decay lr·w·θ taken out; where the decay is below half an
    # ulp of θ (0.4 % in bfloat16, 0.05 % in float16) it does not happen, and 5 % are allowed for what that moves.
    parameters = weights(dtype=dtype)
    lr, decay = 1e-2, 1e-2
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    meter = TrajectoryMeter(optimizer)
    work = 0.0
    for _ in range(60):
        descend(parameters)
        before = [p.detach().double() for p in parameters]
        optimizer.step()
        for p, b in zip(parameters, before, strict=True):
            assert p.grad is not None
            work -= float((p.grad.double() * (p.detach().double() - b)).sum())
    got = meter.compute()["work_ito"]
    meter.close()
    assert got == pytest.approx(work, rel=0.05)


@pytest.mark.parametrize("keep", [False, True])
def test_clipping_by_more_than_one_factor(keep: bool) -> None:
    parameters = weights()
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    meter = TrajectoryMeter(optimizer, keep_raw_gradient=keep)
    work = 0.0
    for _ in range(STEPS):
        meter.record_loss(descend(parameters))
        raw = [p.grad.clone() for p in parameters if p.grad is not None]
        meter.observe_gradients(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters[:1], 0.1)  # one module alone
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        work -= sum(float((g * (p.detach() - b)).sum()) for g, p, b in zip(raw, parameters, before, strict=True))
    values = meter.compute()
    meter.close()
    if keep:
        assert values["work_ito"] == pytest.approx(work, rel=1e-12)
    else:
        assert math.isnan(values["work_ito"])
        assert math.isnan(values["efficiency"])
        assert "more than one factor" in meter.reasons["work_ito"]


def test_weights_in_another_tensor_are_noticed() -> None:
    parameters = weights()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    meter = TrajectoryMeter(optimizer)
    for k in range(STEPS):
        descend(parameters)
        optimizer.step()
        if k == 8:
            parameters[0].data = parameters[0].data + 5.0
    values = meter.compute()
    meter.close()
    assert math.isnan(values["displacement"])
