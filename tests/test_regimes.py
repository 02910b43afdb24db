"""Windows and regimes of a record, against trajectories whose efficiency and boundaries are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_speedlimit import RunRecord, TrajectoryMeter
from lightning_speedlimit.record import SKETCH_SIZE, Regime
from lightning_speedlimit.record.regimes import OVERLAP, SPACING, boundaries, log_spaced, scatter

Values = npt.NDArray[np.float64]


# --- records of known trajectories


def recorded(
    positions: Values, logged: npt.NDArray[np.int64], drop: Values | None = None, **columns: Values
) -> RunRecord:
    """The record of θ_0 … θ_K (K + 1, d), d ≤ 4093, on the clock "steps": a sketch of few dimensions is θ_t − θ_0
    itself. All work lowers the loss, unless `drop` (K + 1,) says how far it fell."""
    u = np.diff(positions, axis=0)
    work = np.concatenate([[0.0], np.cumsum(np.square(u).sum(1))])
    record = RunRecord({"clock": "steps"})
    for k in logged.tolist():
        row = {"elapsed": k, "action": work[k], "work_ito": 3.0 * work[k]}
        row["loss_drop"] = 3.0 * work[k] if drop is None else drop[k]
        record.append(k, row | {name: float(column[k]) for name, column in columns.items()})
        record.add_sketch(k, np.pad(positions[k] - positions[0], (0, SKETCH_SIZE - positions.shape[1])))
    return record


def steps_to(last: int, ratio: float = 1.02) -> npt.NDArray[np.int64]:
    """1 … last, about log-spaced."""
    raw = np.round(ratio ** np.arange(0, math.log(last) / math.log(ratio)))
    return np.unique(np.concatenate([raw, [last]])).astype(np.int64)


def every_50(last: int) -> npt.NDArray[np.int64]:
    return np.arange(50, last + 1, 50)


def path(velocity: Callable[[int], Values], steps: int) -> Values:
    return np.concatenate([np.zeros((1, 41)), np.cumsum([velocity(k) for k in range(steps)], axis=0)])


def straight(k: int) -> Values:
    return np.eye(41)[40]


def whirl(k: int) -> Values:
    """Unit steps around circles in 20 planes, once in 5 to 12 steps: the displacement stays below 4 for ever, and
    never comes back to 0."""
    angle = 2 * math.pi * k / np.linspace(5, 12, 20)
    return np.concatenate([np.cos(angle), np.sin(angle), [0.0]]) / 20**0.5


def switching(*parts: tuple[Callable[[int], Values], int]) -> Values:
    """Motions, each until a step."""

    def velocity(k: int) -> Values:
        return next(motion(k) for motion, until in parts if k < until)

    return path(velocity, parts[-1][1])


# --- windows


def test_a_window_by_hand() -> None:
    """From (0, 0) in steps (3, 0), (0, 4), (0, 4): D² = 9 + 64, A = 9 + 16 + 16, 3 steps; conversion ½ and ¼."""
    positions = np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0], [3.0, 8.0]])
    drop = np.array([0.0, 1.5 * 9, 1.5 * 9 + 0.75 * 16, 1.5 * 9 + 0.75 * 32])
    windows = recorded(positions, np.array([1, 2, 3]), drop).windows([0, 0, 1, 1], [1, 3, 3, 2])
    assert windows.first_step.tolist() == [0, 0, 1, 1]
    assert windows.displacement == pytest.approx([3, 73**0.5, 8, 4], rel=1e-6)  # sketches are float32
    assert windows.kinematic_efficiency == pytest.approx([1, 73 / (3 * 41), 1, 1], rel=1e-6)
    assert windows.conversion == pytest.approx([0.5, (1.5 * 9 + 0.75 * 32) / 123, 0.25, 0.25], rel=1e-12)
    assert windows.efficiency == pytest.approx([2, 73 / 41 / (1.5 * 9 + 0.75 * 32) * 41, 4, 4], rel=1e-6)
    assert windows.loss_drop == pytest.approx([13.5, 37.5, 24, 12], rel=1e-12)


def test_any_shape_and_scalars() -> None:
    record = recorded(switching((straight, 20)), np.arange(1, 21))
    assert record.windows(0, 20).efficiency.shape == ()
    assert record.windows(np.zeros((3, 1)), np.array([4, 5])).efficiency.shape == (3, 2)
    assert record.windows([], []).efficiency.shape == (0,)


def test_errors_of_both_ends_add_and_a_drop_below_two_of_them_has_no_efficiency() -> None:
    se = np.array([0.0, 3.0, 4.0, 20.0])
    record = recorded(path(straight, 3), np.array([1, 2, 3]), np.array([0.0, 10, 20, 80]), loss_drop_se=se)
    windows = record.windows([0, 1, 1, 2], [1, 2, 3, 3])
    # errors 3, 5, √409 = 20.2, √416 = 20.4; drops 10, 10, 70, 60
    assert windows.efficiency == pytest.approx([3 / 10, 3 / 10, 6 / 70, 3 / 60], rel=1e-6)
    assert windows.efficiency_se == pytest.approx([0.3 * 0.3, 0.3 * 0.5, 6 / 70 * 409**0.5 / 70, 0.05 * 416**0.5 / 60])
    record = recorded(path(straight, 3), np.array([1, 2, 3]), np.array([0.0, 10, 19, 10]), loss_drop_se=se)
    windows = record.windows([1, 2, 1], [2, 3, 3])
    assert np.isnan(windows.efficiency).all()  # 9 < 2 · 5; the loss rose; it stayed
    assert np.isfinite(windows.kinematic_efficiency).all()


def test_unknown_steps_and_columns_are_nan() -> None:
    positions = path(straight, 9)
    record = recorded(positions, np.array([3, 6, 9]))
    assert np.isnan(record.windows([0, 3, 4, 6], [5, 10, 9, 7]).efficiency).all()
    assert np.isnan(record.windows([0, 3, 4, 6], [5, 10, 9, 7]).displacement).all()
    bare = RunRecord({"clock": "steps"})
    bare.append(3, {"loss": 1.0})
    bare.add_sketch(3, np.ones(SKETCH_SIZE))
    assert math.isnan(bare.windows(0, 3).efficiency)
    assert float(bare.windows(0, 3).displacement) == pytest.approx(SKETCH_SIZE**0.5)


def test_a_window_has_to_start_before_it_ends() -> None:
    record = recorded(path(straight, 9), np.array([3, 6, 9]))
    for first, last, said in ((3, 3, "below last_step"), (6, 3, "below last_step"), (-3, 3, "wanted steps")):
        with pytest.raises(ValueError, match=said):
            record.windows(first, last)


def test_of_a_real_run_they_are_those_of_its_weights_and_gradients() -> None:
    """Plain tensors at every step; the record knows D² from sketches, to √(2/4093) = 2.2 % (four of these)."""
    x, y = torch.randn(64, 20), torch.randn(64, 3)
    model = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    meter, record = TrajectoryMeter(optimizer), RunRecord({"clock": "steps"})
    weights, works, squares, losses = [], [0.0], [0.0], []
    start = nn.functional.mse_loss(model(x), y).detach()
    for step in range(1, 61):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()  # type: ignore[union-attr]
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
        optimizer.step()
        u = nn.utils.parameters_to_vector(model.parameters()).detach().double() - weights[-1]
        works.append(works[-1] - float(gradient @ u))
        squares.append(squares[-1] + float(u @ u))
        with torch.no_grad():
            meter.record_probe(start[None], nn.functional.mse_loss(model(x), y)[None])
        values, sketch = meter.measure(sketch=True)
        assert sketch is not None
        record.append(step, values)
        record.add_sketch(step, sketch.numpy())
    with torch.no_grad():
        losses.append(nn.functional.mse_loss(model(x), y).item())
    weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
    first, last = np.array([0, 10, 20, 30]), np.array([60, 40, 30, 59])
    found = record.windows(first, last)
    for i, (s, t) in enumerate(zip(first, last, strict=True)):
        squared = float((weights[t] - weights[s]).square().sum())
        kinematic = squared / ((t - s) * (squares[t] - squares[s]))
        conversion = (losses[s] - losses[t]) / (works[t] - works[s])
        assert found.kinematic_efficiency[i] == pytest.approx(kinematic, rel=4 * (2 / 4093) ** 0.5)
        assert found.conversion[i] == pytest.approx(conversion, rel=1e-4)  # differences of float32 losses
        assert found.efficiency[i] == pytest.approx(found.kinematic_efficiency[i] / found.conversion[i], rel=1e-9)


# --- regimes of trajectories


@pytest.mark.parametrize("turn", [40, 130, 700])
@pytest.mark.parametrize("order", [(whirl, straight), (straight, whirl)])
def test_one_boundary_is_found_to_a_recorded_step(turn: int, order: tuple[Any, Any]) -> None:
    positions = switching((order[0], turn), (order[1], 6000))
    record = recorded(positions, steps_to(6000))
    first, second = record.regimes()
    assert (first.first_step, second.last_step) == (0, 6000)
    assert first.last_step == second.first_step
    # The longest turn of the whirl, and one recorded step, which are 2 % apart.
    assert abs(first.last_step - turn) <= 12 + 0.02 * turn
    for regime in (first, second):
        d = positions[regime.last_step] - positions[regime.first_step]
        # unit steps with conversion 1
        expected = float(d @ d) / (regime.last_step - regime.first_step) ** 2
        assert regime.efficiency == pytest.approx(expected, rel=1e-5)


def test_two_boundaries() -> None:
    record = recorded(switching((straight, 60), (whirl, 900), (straight, 20000)), steps_to(20000))
    found = record.regimes()
    assert len(found) == 3
    assert abs(found[0].last_step - 60) <= 13
    assert abs(found[1].last_step - 900) <= 30
    assert found[1].efficiency < 1e-3
    assert found[2].efficiency == pytest.approx(1, abs=0.01)
    assert all(a.last_step == b.first_step for a, b in pairwise(found))


def test_a_boundary_of_conversion_alone() -> None:
    """A straight path whose work lowers the loss from step 200 on: 10 % before, all of it after."""
    k = np.arange(5001.0)
    drop = 3 * np.where(k < 200, 0.1 * k, 20 + (k - 200))
    first, second = recorded(path(straight, 5000), steps_to(5000), drop).regimes()
    assert abs(first.last_step - 200) <= 4  # 2 %
    assert first.efficiency == pytest.approx(10, rel=0.05)
    assert second.efficiency == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("share", "found"), [(0.0, 2), (0.25, 1)])
def test_losses_with_large_errors_prove_no_boundary(share: float, found: int) -> None:
    """Efficiency 1.5, then 1; a standard error of a quarter of each drop leaves 4/3 · 25 % of a window's."""
    k = np.arange(5001.0)
    drop = np.where(k < 200, k / 1.5, 200 / 1.5 + (k - 200))
    record = recorded(path(straight, 5000), steps_to(5000), 3 * drop, loss_drop_se=3 * share * drop)
    assert len(record.regimes()) == found


@pytest.mark.parametrize(("turn", "logged"), [(5, steps_to(10000)), (5000, steps_to(10000)), (200, every_50(10000))])
def test_a_boundary_close_to_an_end_is_where_it_is(turn: int, logged: npt.NDArray[np.int64]) -> None:
    """Efficiency 0.1, then 1. No edge of a window that lies wholly on one side is within a factor of 2 of it."""
    k = np.arange(10001.0)
    drop = np.where(k < turn, 10 * k, 9 * turn + k)
    first, second = recorded(path(straight, 10000), logged, 3 * drop).regimes()
    assert abs(first.last_step - turn) <= 0.02 * turn
    assert (first.efficiency, second.efficiency) == pytest.approx((0.1, 1), rel=0.1)


def test_boundaries_on_the_clock_lr() -> None:
    """A rate of 1 until step 300 with efficiency 1, then of 0.01 with 0.1: τ_SL is in units of the clock."""
    tau = np.minimum(np.arange(10001.0), 300) + 0.01 * np.maximum(np.arange(10001.0) - 300, 0)
    record = RunRecord({"clock": "lr"})
    for k in range(1, 10001, 20):
        drop = min(tau[k], 300) + 10 * max(tau[k] - 300, 0)
        record.append(k, {"elapsed": tau[k], "action": tau[k], "work_ito": tau[k], "loss_drop": drop})
        record.add_sketch(k, np.pad(tau[k : k + 1], (0, SKETCH_SIZE - 1)))
    first, second = record.regimes()
    assert first.last_step == 301
    assert (first.efficiency, second.efficiency) == pytest.approx((1, 0.1), rel=0.01)


def test_a_loss_that_is_lost_at_the_end_moves_no_boundary() -> None:
    """NaN from step 3000 on: what lies after any boundary has no efficiency; the boundary stays near step 60."""
    k = np.arange(10001.0)
    drop = np.where(k < 60, 5 * k, 240 + k)
    drop[3000:] = math.nan
    first, second = recorded(path(straight, 10000), steps_to(10000), 3 * drop).regimes()
    assert abs(math.log(first.last_step / 60)) <= math.log(SPACING)
    assert math.isnan(second.efficiency)


def test_noisy_losses_of_a_constant_efficiency_make_no_boundary() -> None:
    """Drops k ± 20: of the early windows those are defined whose drop chance made too large, and η too small."""
    logged, rng = steps_to(10000, 1.05), np.random.default_rng(0)
    # Sketches cost most of the time, and are the same: one record, its drops replaced.
    state = recorded(path(straight, 10000), logged, loss_drop_se=np.full(10001, 20.0)).state_dict()
    invented = 0
    for _ in range(100):
        state["arrays"]["values"][state["columns"].index("loss_drop")] = logged + 20 * rng.normal(size=len(logged))
        invented += len(RunRecord.from_state_dict(state).regimes()) > 1
    assert invented <= 4  # 1 % expected; 20 without _CLEAR


@pytest.mark.parametrize("motion", [straight, whirl])
def test_one_motion_is_one_regime(motion: Callable[[int], Values]) -> None:
    assert len(recorded(path(motion, 5000), steps_to(5000)).regimes()) == 1


def test_diffusion_is_one_regime() -> None:
    """A random walk in many dimensions: η(s, t) = 1/(t − s), one power law."""
    walk = np.concatenate([np.zeros((1, 400)), np.random.default_rng(0).normal(size=(3000, 400)).cumsum(0)])
    assert len(recorded(walk, steps_to(3000, 1.1)).regimes()) == 1


@pytest.mark.parametrize(("a", "b"), [(1.5, 0.5), (1.5, 1.0), (1.5, 1.5), (1.2, 2.0), (1.5, 3.0)])
def test_scaling_flows_are_one_regime(a: float, b: float) -> None:
    """Gradient flow on λ_k = k^−a, r_k² = k^−b: θ_k = (1 − e^{−λt}) r/√λ, all work lowers the loss."""
    modes, times = np.arange(1, 4001.0), steps_to(3000, 1.1).astype(float)
    rate, residual = modes**-a, modes ** (-b / 2)
    record = RunRecord({"clock": "steps"})
    for t in times:
        drop = 0.5 * float(np.sum(-np.expm1(-2 * rate * t) * residual**2))
        record.append(int(t), {"elapsed": t, "action": drop, "work_ito": drop, "loss_drop": drop})
        record.add_sketch(int(t), np.pad(-np.expm1(-rate * t) * residual / rate**0.5, (0, SKETCH_SIZE - 4000)))
    assert len(record.regimes()) == 1


def test_two_time_scales_are_three_regimes() -> None:
    """Modes of rates 0.1 and 1e-4 with the same residual: between them a stretch where the fast one is nearly done
    and the slow one hardly has begun."""
    rate, times = np.array([0.1, 1e-4]), steps_to(3000, 1.05).astype(float)
    record = RunRecord({"clock": "steps"})
    for t in times:
        drop = 0.5 * float(np.sum(-np.expm1(-2 * rate * t)))
        record.append(int(t), {"elapsed": t, "action": drop, "work_ito": drop, "loss_drop": drop})
        record.add_sketch(int(t), np.pad(-np.expm1(-rate * t) / rate**0.5, (0, SKETCH_SIZE - 2)))
    first, idle, last = record.regimes()
    assert 10 <= first.last_step <= 40  # 1/λ to 4/λ, where 2 % of the fast mode are left
    assert 25 <= idle.last_step <= 70  # from t = ln(1000)/0.2 = 35 on the slow mode has more power than the fast one
    for regime in (first, idle, last):
        moved = np.exp(-rate * regime.first_step) - np.exp(-rate * regime.last_step)
        drop = 0.5 * np.sum(np.exp(-2 * rate * regime.first_step) - np.exp(-2 * rate * regime.last_step))
        elapsed = regime.last_step - regime.first_step
        assert regime.efficiency == pytest.approx(np.sum(moved**2 / rate) / (elapsed * drop), rel=1e-4)
    assert last.efficiency > 0.98  # one mode, one direction, hardly slowing down: λτ = 0.3


# --- boundaries of curves


def curve(windows: int, noise: float, slope: float, step: float, at: int, seed: int) -> tuple[Values, float]:
    """ln η of overlapping windows as means of narrow ones with independent noise, and the scatter of these."""
    k = np.arange(windows + OVERLAP - 1)
    narrow = np.random.default_rng(seed).normal(size=len(k)) * noise + slope * k * math.log(SPACING)
    narrow = narrow + np.where(k < at, -step, 0.0)
    return np.convolve(narrow, np.full(OVERLAP, 1 / OVERLAP), "valid"), scatter(narrow)


@pytest.mark.parametrize("windows", [6, 14, 30])
def test_noise_makes_no_boundary(windows: int) -> None:
    """At most 1 % of curves with one regime: constants and power laws, noise from 2 % to a factor of 2."""
    invented = 0
    for seed in range(400):
        noise, slope = (0.02, 0.1, 0.3, 0.7)[seed % 4], (0.0, -0.5, 0.5, -1.0, -1.5)[seed % 5]
        levels, error = curve(windows, noise, slope, 0.0, 0, seed)
        invented += bool(boundaries(levels, error))
    assert invented <= 4


def test_the_noise_has_to_be_known_to_be_told_from_boundaries() -> None:
    """The same curves without it: the guard of the test before can fail."""
    levels = [curve(20, 0.7, 0.0, 0.0, 0, seed)[0] for seed in range(50)]
    assert sum(bool(boundaries(level, 0.0)) for level in levels) > 10


@given(
    windows=st.integers(9, 40),
    step=st.floats(0.5, 5).flatmap(lambda s: st.sampled_from([s, -s])),
    place=st.floats(0, 1),
    level=st.floats(-10, 10),
)
def test_a_clear_step_is_found_where_it_is(windows: int, step: float, place: float, level: float) -> None:
    """Wherever two windows lie wholly on either side of it; to one edge, since windows that straddle do not count."""
    at = round(OVERLAP + 1 + place * (windows - 1 + OVERLAP - 2 * (OVERLAP + 1)))
    levels, error = curve(windows, 0.0, 0.0, step, at, 0)
    assert error == 0.0
    (found,) = boundaries(levels + level, 0.0)
    assert abs(found - at) <= 1


def test_what_is_undefined_is_passed_over() -> None:
    levels, error = curve(24, 0.02, 0.0, 2.0, 12, 0)
    levels[[0, 3, 14, 19, 23]] = math.nan
    assert boundaries(levels, error) == [12]
    assert boundaries(np.full(24, math.nan), 0.0) == []


def test_windows_with_large_errors_prove_nothing() -> None:
    levels, _ = curve(24, 0.0, 0.0, 2.0, 12, 0)
    assert boundaries(levels, 0.1) == [12]
    assert boundaries(levels, 3.0) == []


@pytest.mark.parametrize(("step", "found"), [(math.log(1.15), 0), (math.log(1.25), 1)])
def test_small_steps_are_no_regimes(step: float, found: int) -> None:
    """Below a factor of 1.2, however clear."""
    levels, _ = curve(60, 0.0, 0.0, step, 30, 0)
    assert len(boundaries(levels, 0.0)) == found


def test_one_window_apart_is_no_regime() -> None:
    for place in (0, 7, -1):
        levels = np.zeros(20)
        levels[place] = 0.3
        assert boundaries(levels, 0.0) == []


def test_a_slow_bend_is_one_regime() -> None:
    """Never more than 3 % from a straight line, though without noise."""
    k = np.arange(30.0)
    levels = 0.02 * k + 0.03 * np.sin(k / 5)
    assert boundaries(levels, 0.0) == []


def test_at_most_four() -> None:
    levels = np.repeat([0.0, 3.0, 0.0, 3.0, 0.0, 3.0, 0.0, 3.0], 12)
    assert len(boundaries(levels, 0.0)) == 3


def test_scatter_sees_noise_and_neither_slope_nor_a_jump() -> None:
    k = np.arange(400.0)
    noise = np.random.default_rng(0).normal(size=400) * 0.3
    assert scatter(noise) == pytest.approx(0.3, rel=4 * 1.17 / 400**0.5 * 1.5)  # the median's error, 4 of them
    assert scatter(0.01 * k + np.where(k < 200, 0.0, 5.0)) < 1e-12
    assert scatter(np.array([1.0, 2.0])) == 0.0
    with_gaps = noise.copy()
    with_gaps[::5] = math.nan
    assert scatter(with_gaps) == pytest.approx(0.3, rel=0.3)


def test_edges_are_recorded_steps_near_a_grid() -> None:
    """s · √2^k; 71 lies 34 % from 50 and from 100, and has none."""
    assert log_spaced(np.array([50, 100, 150, 200, 250, 300, 350, 400, 450])).tolist() == [
        50,
        -1,
        100,
        150,
        200,
        300,
        400,
    ]
    assert log_spaced(np.array([1])).tolist() == [1]
    assert log_spaced(np.arange(1, 12)).tolist() == [1, -1, 2, 3, 4, 6, 8, 11]


# --- of records


def test_the_unit_of_time_and_of_length_do_not_matter() -> None:
    positions = switching((whirl, 130), (straight, 4000))
    plain = recorded(positions, steps_to(4000)).regimes()
    scaled = recorded(1e3 * positions, steps_to(4000)).regimes()
    assert [r.last_step for r in plain] == [r.last_step for r in scaled]
    assert [r.efficiency for r in plain] == pytest.approx([r.efficiency for r in scaled], rel=1e-4)


def test_nothing_recorded_has_no_regime_and_little_has_one() -> None:
    assert RunRecord().regimes() == []
    bare = RunRecord({"clock": "steps"})
    bare.append(3, {"loss": 1.0})
    assert bare.regimes() == []  # no sketch
    (only,) = recorded(path(straight, 9), np.array([3, 6, 9])).regimes()
    assert only == Regime(0, 9, only.efficiency)
    assert only.efficiency == pytest.approx(1, rel=1e-5)


def test_a_row_of_step_0_is_the_start() -> None:
    plain = recorded(switching((whirl, 130), (straight, 4000)), steps_to(4000))
    with_start = recorded(switching((whirl, 130), (straight, 4000)), np.concatenate([[0], steps_to(4000)]))
    assert with_start.regimes() == plain.regimes()
    assert with_start.windows(0, 4000).efficiency == plain.windows(0, 4000).efficiency
    assert recorded(path(straight, 1), np.array([0])).regimes() == []


VALUES = st.one_of(st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e308, -1e308, 5e-324]))


@given(
    gaps=st.lists(st.sampled_from([1, 2, 10, 50, 1000, 10**15]), min_size=1, max_size=30),
    start=st.sampled_from([0, 1, 50]),
    motion=st.lists(VALUES, min_size=31, max_size=31),
    values=st.lists(st.one_of(st.none(), st.lists(VALUES, min_size=31, max_size=31)), min_size=5, max_size=5),
)
@pytest.mark.filterwarnings("error")
def test_any_record_has_regimes_without_gaps_and_warns_of_nothing(
    gaps: list[int], start: int, motion: list[float], values: list[list[float] | None]
) -> None:
    """As of a run that diverged; columns that are missing, NaN, infinite, or fall."""
    steps = np.cumsum([start, *gaps]).tolist()
    names = ("elapsed", "action", "work_ito", "loss_drop", "loss_drop_se")
    record = RunRecord({"clock": "steps"})
    for i, step in enumerate(steps):
        record.append(step, {name: v[i] for name, v in zip(names, values, strict=True) if v is not None})
        with np.errstate(over="ignore"):
            record.add_sketch(step, np.pad(np.array(motion[i : i + 1], np.float32), (0, SKETCH_SIZE - 1)))
    found = record.regimes()
    assert [r.first_step for r in found] == [0, *(r.last_step for r in found[:-1])]
    assert all(r.first_step < r.last_step for r in found)
    assert found[-1].last_step == steps[-1]


def test_a_loss_that_does_not_fall_has_one_regime_of_unknown_efficiency() -> None:
    (only,) = recorded(path(straight, 3000), steps_to(3000), np.zeros(3001)).regimes()
    assert math.isnan(only.efficiency)


def test_a_saved_record_has_the_same_regimes(tmp_path: Path) -> None:
    record = recorded(switching((whirl, 130), (straight, 4000)), steps_to(4000))
    record.save(tmp_path / "record")
    assert RunRecord.load(tmp_path / "record").regimes() == record.regimes()
    assert len(record.regimes()) == 2


def test_thinned_sketches_still_show_the_boundary() -> None:
    """4,000 log steps leave at most 512 sketches, evenly spaced: every 8th step."""
    record = recorded(switching((whirl, 600), (straight, 4000)), np.arange(1, 4001))
    assert len(record.sketch_steps) <= 512
    first, second = record.regimes()
    assert abs(first.last_step - 600) <= 16
    assert second.efficiency == pytest.approx(1, abs=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(60))
def test_no_record_is_too_strange(seed: int) -> None:
    """Columns that fall, stop, are infinite or missing, steps with gaps: regimes without gaps, no error, no warning."""
    random = np.random.default_rng(seed)
    steps = np.unique(np.exp(random.uniform(0, 8, random.integers(1, 80))).astype(int))
    record = RunRecord({"clock": "steps"})
    for step in steps.tolist():
        row = {name: random.normal() * step for name in ("elapsed", "action", "work_ito", "loss_drop")}
        row["loss_drop_se"] = random.choice([0.0, 1e-3, 1.0, math.inf, math.nan])
        row[str(random.choice(list(row)))] = random.choice([0.0, -1.0, math.inf, math.nan, 1e300])
        record.append(step, row)
        record.add_sketch(step, random.normal(size=SKETCH_SIZE) * random.choice([0.0, 1.0, 1e10]))
    found = record.regimes()
    assert found[0].first_step == 0
    assert found[-1].last_step == steps[-1]
    assert all(a.last_step == b.first_step for a, b in pairwise(found))
    assert all(r.first_step < r.last_step for r in found)
