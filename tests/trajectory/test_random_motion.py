"""The random motion in a displacement: noisy descent of a quadratic, where drift, diffusion and work are known."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.estimates import Estimates
from lightning_speedlimit.trajectory.losses import LossDrop
from lightning_speedlimit.trajectory.mobility import UNKNOWN, Inertia
from lightning_speedlimit.trajectory.random_motion import mean_inertia, random_motion, share_left
from lightning_speedlimit.trajectory.run_totals import NOW, RunTotals, SectionTotals
from lightning_speedlimit.trajectory.sums import SUMS

PARTICLES, RATE, NOISE, START = 20_000, 0.05, 2.0, 1.5


def wells(curvature: float, steps: int, **options: Any) -> tuple[dict[str, float], torch.Tensor]:
    """One step size, L = ½ h Σ θ² with gradient noise, from one start; the exact loss is known at both ends."""
    generator = torch.Generator().manual_seed(8)
    theta = torch.full((PARTICLES,), START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], RATE, **options)
    meter = TrajectoryMeter(optimizer)
    for _ in range(steps):
        theta.grad = curvature * theta.detach() + NOISE * torch.randn(PARTICLES, generator=generator).double()
        optimizer.step()
    ends = torch.stack([torch.full_like(theta, START), theta.detach()])
    losses = (0.5 * curvature * ends.square().sum(1)).expand(2, 2).T  # a probe of two batches without noise
    meter.record_probe(losses[0].clone(), losses[1].clone())
    values = meter.compute()
    meter.close()
    return values, theta.detach()


@pytest.mark.parametrize(("curvature", "steps"), [(0.2, 30), (1.0, 30), (1.0, 120), (4.0, 60)])
def test_a_well_with_noise(curvature: float, steps: int) -> None:
    """θ_{k+1} = rθ_k − lr σ ξ, r = 1 − lr h: mean r^k θ_0, variance (lr σ)² (1 − r^{2k})/(1 − r²)."""
    values, _ = wells(curvature, steps)
    r, time = 1 - RATE * curvature, RATE * steps
    mean = START * r**steps
    variance = (RATE * NOISE) ** 2 * (1 - r ** (2 * steps)) / (1 - r * r)
    drop = 0.5 * curvature * PARTICLES * (START**2 - mean**2 - variance)
    drift = PARTICLES * (START - mean) ** 2 / time / drop
    assert values["efficiency"] == pytest.approx(drift + PARTICLES * variance / time / drop, rel=0.03)
    # To second order in the step, which a quadratic is, N = Σ lr σ² and C = h Σ ‖u‖²; m = K lr.
    noise = PARTICLES * RATE * NOISE**2 * steps
    forces = sum(
        curvature**2 * (START**2 * r ** (2 * k) + (RATE * NOISE) ** 2 * (1 - r ** (2 * k)) / (1 - r * r)) + NOISE**2
        for k in range(steps)
    )
    q = 2 * steps * curvature * RATE**2 * PARTICLES * forces / noise
    most = noise / steps / drop
    # Four standard errors of Σ f_{k+1}·u_k by chance, lr σ² √(K/20,000), are 5 % of N/K at the most, K being 120.
    assert values["efficiency_low"] == pytest.approx(values["efficiency"] - most, abs=0.05 * most)
    share = ((1 + 3 * q) ** (2 / 3) - 1) / (2 * q)
    assert values["efficiency_drift"] == pytest.approx(values["efficiency"] - share * most, abs=0.05 * most)
    # One mode has (1 − e^−q)/q in place of s; at large q less is left than s says, never more than all of it.
    sampling = 0.03 * values["efficiency"]
    assert values["efficiency_low"] - sampling <= drift <= values["efficiency"] + sampling
    if curvature * time < 1:
        assert abs(values["efficiency_drift"] - drift) < 0.2 * most


def test_the_share_that_curvature_leaves() -> None:
    assert share_left(0.0) == 1.0
    assert share_left(1e-9) == pytest.approx(1 - 0.5e-9, abs=1e-15)
    assert share_left(21.0) == pytest.approx(15 / 42, rel=1e-14)  # 64^⅔ = 16
    assert share_left(math.inf) == 0.0
    assert math.isnan(share_left(math.nan))


@given(st.floats(0, 1e6), st.floats(1.001, 100))
def test_the_share_falls_from_one(q: float, times: float) -> None:
    assert 0.0 < share_left(q) <= 1.0
    assert share_left(times * q) <= share_left(q) * (1 + 1e-12)


def section(inertia: Inertia, **sums: float) -> SectionTotals:
    known = dict.fromkeys(("squares", "work_met", "work_anti_ito", "work_ito", "work_decay", "weighted"), 0.0)
    return SectionTotals("", "0", False, {**known, **sums}, inertia)


def run_of(*sections: SectionTotals, drop: float = 1.0, error: float = 0.0, steps: float = 40.0) -> RunTotals:
    loss = LossDrop(drop, error, drop, 0.0, 0.0)
    return RunTotals(list(sections), steps, steps, steps, steps, loss, 1.0, 1.0, 1.0, 1.0, 0.1)


@given(
    numerator=st.floats(0, 1e3),
    work=st.floats(1e-3, 1e3),
    anti=st.floats(-1e3, 1e3),
    drop=st.floats(1e-3, 1e3),
    decay=st.floats(-10, 10),
    memory=st.floats(0, 0.99),
)
def test_the_estimate_lies_between_the_ends(
    numerator: float, work: float, anti: float, drop: float, decay: float, memory: float
) -> None:
    """Of whatever works."""
    inertia = Inertia(1 / (1 - memory), memory)
    sums = {"work_ito": 1.02 * work, "work_met": work, "work_anti_ito": anti, "work_decay": decay, "squares": 1.0}
    most, left = random_motion(run_of(section(inertia, **sums)), drop)
    low, likely, high = ((numerator - share) / drop for share in (most, left, 0.0))
    assert low <= likely <= high
    assert all(map(math.isfinite, (low, likely)))


def test_groups_count_by_their_noise() -> None:
    quick, slow = Inertia(1.0, 0.0), Inertia(10.0, 0.9)
    noisy = section(slow, squares=1.0, work_met=3.0, work_anti_ito=0.0, work_ito=3.0)
    calm = section(quick, squares=1.0, work_met=2.0, work_anti_ito=1.0, work_ito=2.0)
    assert mean_inertia([noisy, calm]) == pytest.approx(((3 * 10 + 1) / 4, 3 * 0.9 / 4))
    still = replace(calm, inertia=UNKNOWN, sums=dict.fromkeys(calm.sums, 0.0))
    assert mean_inertia([noisy, still]) == slow, "what has not moved does not count"
    assert math.isnan(mean_inertia([noisy, replace(calm, inertia=UNKNOWN)]).gain)
    silent = [replace(s, sums={**s.sums, "work_anti_ito": 5.0}) for s in (calm, noisy)]
    assert mean_inertia(silent) == slow, "no noise: the longest memory"


SCHEDULES = {
    "linear": lambda k: 1 - k / STEPS,
    "cosine": lambda k: 0.5 + 0.5 * math.cos(math.pi * k / STEPS),
    "a hundredth after half": lambda k: 1.0 if k < STEPS / 2 else 0.01,
}
STEPS = 400


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_diffusion_under_a_schedule_is_taken_out(kind: str, schedule: str, on_device: bool) -> None:
    """No force but noise: all of D² is diffusion, Σ lr² of its variance, whatever the rates are.

    With K steps in place of (Σ lr)²/Σ lr² a third to a half of it would be left.
    """
    generator = torch.Generator().manual_seed(9)
    theta = torch.zeros(4000, dtype=torch.float64, requires_grad=True)
    rate: Any = torch.tensor(0.01, dtype=torch.float64) if on_device else 0.01
    more = {"sgd": {}, "momentum": {"momentum": 0.9}, "adam": {"betas": (0.9, 0.99)}}[kind]
    optimizer = (torch.optim.Adam if kind == "adam" else torch.optim.SGD)([theta], lr=rate, **more)
    meter = TrajectoryMeter(optimizer)
    for k in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * SCHEDULES[schedule](k)
        theta.grad = torch.randn(4000, generator=generator).double()
        optimizer.step()
    meter.record_probe(torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    values = meter.compute()
    meter.close()
    # 2 % by the sample; momentum's memory is 1/((1 − β) K_eff) = 4 % and more short of its steady diffusion.
    assert abs(values["efficiency_low"]) < 0.15 * values["efficiency"]


@pytest.mark.parametrize("kind", ["NAdam", "RAdam", "RMSprop", "Adamax", "Adagrad", "Adadelta"])
def test_the_ends_of_others_are_not_told(kind: str) -> None:
    """Noise alone: what c N/K says of their diffusion is wrong by factors, as μ or the momentum changes by itself."""
    theta = torch.zeros(50, requires_grad=True)
    meter = TrajectoryMeter(getattr(torch.optim, kind)([theta], lr=0.01))
    for _ in range(20):
        theta.grad = torch.randn(50)
        meter.optimizers[0].step()
    meter.record_probe(torch.ones(2), torch.zeros(2))
    values = meter.compute()
    meter.close()
    assert math.isfinite(values["efficiency"])
    for name in ("efficiency_low", "efficiency_drift"):
        assert math.isnan(values[name])
        assert "SGD, Adam and AdamW alone" in meter.reasons[name]


def test_why_an_end_is_undefined() -> None:
    """No formula, no loss, no second step, a loss drop within its error: each with its reason."""
    sums = {"squares": 1.0, "work_met": 3.0, "work_anti_ito": 1.0, "work_ito": 3.0, "weighted": 1.0}
    whole = {**dict.fromkeys(_ALL, 0.0), **sums}
    known = SectionTotals("", "0", False, whole, Inertia(1.0, 0.0))
    cases = {
        "random motion is known of SGD, Adam": run_of(replace(known, inertia=UNKNOWN)),
        "no step has met the next gradient": run_of(
            replace(known, sums={**whole, "work_met": 0.0, "work_anti_ito": 0.0})
        ),
        "below two of its standard errors": run_of(known, error=0.6),
        "told by the loss drop: no loss was recorded": replace(run_of(known), loss=None),
    }
    for reason, run in cases.items():
        found = Estimates(run, "ito" if run.loss is None else "loss_drop")
        for name in ("efficiency_low", "efficiency_drift"):
            assert math.isnan(found.values[name]), reason
            assert math.isnan(found.values[f"{name}_se"]), reason
            assert reason in found.reasons[name]
    assert math.isfinite(Estimates(cases["told by the loss drop: no loss was recorded"], "ito").values["efficiency"])
    fine = Estimates(run_of(known), "loss_drop")
    assert not {"efficiency_low", "efficiency_drift"} & set(fine.reasons)


def test_the_loss_drops_error_is_in_both() -> None:
    """d low/dd of (M − (W + a − 2d)/K)/d, W = a' = …: in plain numbers."""
    sums = {"squares": 1.0, "work_met": 4.0, "work_anti_ito": 0.5, "work_ito": 4.0, "weighted": 2.0}
    known = SectionTotals("", "0", False, {**dict.fromkeys(_ALL, 0.0), **sums}, Inertia(1.0, 0.0))
    values = Estimates(run_of(known, error=0.05, steps=10.0), "loss_drop").values

    def low(drop: float) -> float:
        return (2.0 - (4.5 - 2 * drop) / 10) / drop

    def drift(drop: float) -> float:
        noise, curvature = 4.5 - 2 * drop, 2 * (drop - 0.5)
        q = 20 * curvature / noise
        return (2.0 - ((1 + 3 * q) ** (2 / 3) - 1) / (2 * q) * noise / 10) / drop

    for name, of in (("efficiency_low", low), ("efficiency_drift", drift)):
        assert values[name] == pytest.approx(of(1.0), rel=1e-12)
        assert values[f"{name}_se"] == pytest.approx(0.05 * abs(of(1.001) - of(0.999)) / 0.002, rel=1e-4)


BALANCE = ("work_met", "work_anti_ito")
_ALL = (*SUMS, *NOW, "waiting", "work_ito")
