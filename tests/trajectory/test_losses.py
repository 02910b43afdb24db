"""L_0 − L_K from noisy losses: lines are exact, curves converge, and the standard error is honest."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stated_errors import DROPS, drops
from torch import Tensor, nn

from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.losses import LossWindows, _without_jumps, drop, extrapolate, paired_drop

CPU = torch.device("cpu")


def normal(seed: int, count: int, sigma: float) -> list[float]:
    return (sigma * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).tolist()


def windows(losses: list[float], size: int) -> tuple[tuple[list[int], list[float]], tuple[list[int], list[float]]]:
    """The first and the last `size` of the losses of steps 0, 1, …"""
    steps = list(range(len(losses)))
    return (steps[:size], losses[:size]), (steps[-size:], losses[-size:])


# ---- without noise -------------------------------------------------------------------------------------


@given(
    steps=st.lists(st.integers(0, 5000), min_size=2, max_size=60, unique=True),
    target=st.integers(-100, 6000),
    level=st.floats(-10, 10),
    slope=st.floats(-0.1, 0.1),
)
def test_a_straight_line_is_exact_at_any_target(steps: list[int], target: int, level: float, slope: float) -> None:
    found = extrapolate(steps, [level + slope * step for step in steps], target)
    # Weights of an extrapolation by `lever` spans add rounding of that many ε of losses up to 10 + 0.1·6000,
    # squared where the short windows nearest to the target are the longest lever.
    span = min(abs(a - b) for a in steps for b in steps if a != b)
    lever = 1 + (max(map(abs, steps)) + abs(target)) / span
    assert found.value == pytest.approx(level + slope * target, rel=0, abs=1e-12 * 610 * lever)
    assert sum(found.weights.values()) == pytest.approx(1, abs=1e-12 * lever)


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_losses(count: int) -> None:
    found = extrapolate([4, 6][:count], [3.0, 2.0][:count], 0)
    assert found.value == pytest.approx(3.0 if count == 1 else 5.0, rel=1e-12)
    error = drop(([4, 6][:count], [3.0, 2.0][:count]), ([4, 6][:count], [3.0, 2.0][:count]), 10)
    assert error.standard_error == 0.0, "nothing tells noise from descent"


def test_a_decay_converges_with_its_rate() -> None:
    # A line through points that a curve L″ bends is off by O(L″ · steps²): second order in the rate, whatever
    # window is chosen as long as it is the same one.
    rates = [0.04, 0.02, 0.01, 0.005]
    errors = []
    for rate in rates:
        losses = [2.0 * math.exp(-rate * k) for k in range(201)]
        found = drop(*windows(losses, 50), 200)
        errors.append(abs(found.value - (losses[0] - losses[-1])))
        # A line through all 50 would be off by A (50 r)²/12 at the start, a window mean by A·25 r.
        assert errors[-1] < 2.0 * (50 * rate) ** 2 / 12
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(orders) > 1.7, (errors, orders)


def test_missing_steps_do_not_matter_to_a_line() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = sorted(torch.randperm(300, generator=generator)[:40].tolist())
    losses = [3.0 - 0.004 * step for step in steps]
    found = drop((steps[:15], losses[:15]), (steps[-15:], losses[-15:]), 300)
    assert (found.first, found.last) == pytest.approx((3.0, 3.0 - 0.004 * 300), rel=1e-10)


# ---- with noise ----------------------------------------------------------------------------------------


def scores(true: list[float], sigma: float, size: int, seeds: int) -> tuple[list[float], list[float], list[float]]:
    """Over seeds of the noise: (estimate − truth)/se, the estimates, the standard errors."""
    estimates, errors = [], []
    for seed in range(seeds):
        losses = [a + b for a, b in zip(true, normal(seed, len(true), sigma), strict=True)]
        found = drop(*windows(losses, size), len(true) - 1)
        estimates.append(found.value)
        errors.append(found.standard_error)
    truth = true[0] - true[-1]
    return [(e - truth) / se for e, se in zip(estimates, errors, strict=True)], estimates, errors


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_the_standard_error_is_honest_where_a_window_is_a_line(sigma: float) -> None:
    # A decay over 2000 steps bends by A (50/2000)²/12 = 1e-4 in a window: nothing against 0.05/√50 = 7e-3.
    true = [2.0 * math.exp(-k / 2000) for k in range(1001)]
    found, _, _ = scores(true, sigma, 50, 200)
    assert abs(fmean(found)) < 0.3  # 1/√200 = 0.07 is the standard error of this mean
    assert 0.6 < math.sqrt(fmean(z * z for z in found)) < 1.2  # below 1: the error holds a bend that noise might hide


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_the_last_losss_own_error_is_that_of_least_squares(sigma: float) -> None:
    """σ √(1/n + (K − x̄)²/Σ(x − x̄)²) of the line through n losses, at K, and nothing of the start's.

    With σ² from second differences, mean (y_{i−1} − 2y_i + y_{i+1})²/6, wherever the whole window is taken and nothing
    in it looks like curvature; elsewhere the error is honest by its scores.
    """
    count, line = 400, [2.0 - 0.004 * k for k in range(400)]
    x = [float(k) for k in range(count - 50, count)]
    lever = math.sqrt(1 / 50 + (count - fmean(x)) ** 2 / sum((k - fmean(x)) ** 2 for k in x))
    off, errors, whole = [], [], 0
    for seed in range(200):
        losses = [a + b for a, b in zip(line, normal(seed, count, sigma), strict=True)]
        found = drop(*windows(losses, 50), count)
        off.append(found.last - (2.0 - 0.004 * count))
        errors.append(found.last_error)
        assert found.last_error < found.standard_error
        end = extrapolate(list(range(count - 50, count)), losses[-50:], count)
        if len(end.weights) == 50 and end.bias_squared == 0:
            whole += 1
            y = losses[-50:]
            told = math.sqrt(fmean((y[i - 1] - 2 * y[i] + y[i + 1]) ** 2 for i in range(1, 49)) / 6)
            assert found.last_error == pytest.approx(told * lever, rel=1e-9)
    assert whole > 50, "a parabola through noise is no taller than noise makes it in about two draws of three"
    assert 0.8 < math.sqrt(fmean((o / e) ** 2 for o, e in zip(off, errors, strict=True))) < 1.5


def test_the_last_losss_own_error_is_in_the_values() -> None:
    run = Recorded()
    noise = normal(3, 60, 0.1)
    for k in range(60):
        run.meter.record_loss(1.0 - 0.01 * k + noise[k])
        run.step()
    steps = list(range(10, 60))
    end = extrapolate(steps, [1.0 - 0.01 * k + noise[k] for k in steps], 60)
    spread = end.variance * sum(w * w for w in end.weights.values()) + end.bias_squared
    assert run.values()["loss_se"] == pytest.approx(math.sqrt(spread), rel=1e-6)


def test_curvature_that_noise_can_not_hide_is_in_the_standard_error() -> None:
    # A decay over 60 steps: the line through 50 of them is off by A (50/60)²/12 = 0.12, six times its noise.
    true = [2.0 * math.exp(-k / 60) for k in range(401)]
    found, estimates, _ = scores(true, 0.05, 50, 200)
    assert math.sqrt(fmean(z * z for z in found)) < 2
    assert abs(fmean(estimates) - (true[0] - true[-1])) < 2.0 * (50 / 60) ** 2 / 12


def test_a_bend_that_noise_hides_is_in_the_standard_error() -> None:
    """0.3·e^{−k/5} under noise of 0.1: a line through all of 50 losses starts at 0.08, and no bend stands out."""
    true = [0.3 * math.exp(-0.2 * k) for k in range(201)]
    found, _, errors = scores(true, 0.1, 50, 100)
    # 100 draws at 0.9: fewer than 81 once in 700. Without what may be hidden about 68.
    assert sum(abs(z) < 2 for z in found) >= 81
    assert fmean(errors) < 0.15


def test_the_hidden_bend_is_the_farthest_shorter_line_at_the_start_alone() -> None:
    true = [0.3 * math.exp(-0.2 * k) for k in range(201)]
    losses = [a + b for a, b in zip(true, normal(5, 201, 0.1), strict=True)]
    steps = list(range(201))
    start, end = extrapolate(steps[:50], losses[:50], 0), extrapolate(steps[-50:], losses[-50:], 200)
    shorter = [n for n in (25, 12, 6, 3) if n < len(start.weights)]
    assert shorter, "another seed: the shortest window was chosen"
    lines = [
        torch.linalg.lstsq(line_of(n), torch.tensor(losses[:n], dtype=torch.float64)[:, None]).solution for n in shorter
    ]
    far = max((float(line[0]) - start.value) ** 2 for line in lines)
    assert start.hidden_squared == pytest.approx(far, rel=1e-9)
    assert far > start.bias_squared
    found = drop((steps[:50], losses[:50]), (steps[-50:], losses[-50:]), 200)
    own = start.error_squared - start.bias_squared
    assert found.standard_error == pytest.approx(math.sqrt(own + far + end.error_squared), rel=1e-9)


def line_of(count: int) -> Tensor:
    return torch.stack([torch.ones(count), torch.arange(float(count))], 1).double()


def errors_at_the_end(noise: Callable[[torch.Generator], Tensor]) -> float:
    """Root mean square error of the loss after 50 flat ones with mean 0, over 400 windows."""
    generator = torch.Generator().manual_seed(0)
    values = [extrapolate(list(range(50)), noise(generator).tolist(), 50).value for _ in range(400)]
    return math.sqrt(fmean(value * value for value in values))


def test_noise_alone_hardly_ever_passes_for_a_bend() -> None:
    """The line through all 50 is off by 2σ/√50; what is chosen may be by a third more.

    In some windows the last three losses lie apart by chance, or a parabola fits. At three standard errors instead of
    five that makes 1.4 of it.
    """
    assert errors_at_the_end(lambda g: torch.randn(50, generator=g).double()) < 1.33 * 2 / math.sqrt(50)


def test_hard_batches_in_a_row_are_no_bend() -> None:
    """One loss of 17 is up to 1.5 too high; σ 0.26 in all. Where noise counts from the whole window alone: 2.0."""

    def noise(generator: torch.Generator) -> Tensor:
        hard = (torch.rand(50, generator=generator) < 0.06) * torch.rand(50, generator=generator) * 1.5
        return (0.15 * torch.randn(50, generator=generator) + hard - 0.045).double()

    assert errors_at_the_end(noise) < 1.6 * 2 * 0.26 / math.sqrt(50)


def test_a_step_down_within_the_last_window_is_in_the_error() -> None:
    """The rate fell twelve steps ago, and the loss with it: two standard errors hold it, in 90 of 100 and more."""
    generator = torch.Generator().manual_seed(3)
    held = 0
    for _ in range(200):
        losses = 0.1 * torch.randn(50, generator=generator).double()
        losses[:-12] += 1.0
        end = extrapolate(list(range(50)), losses.tolist(), 50)
        held += abs(end.value) < 2.0 * math.sqrt(end.error_squared)
    assert held >= 180


def test_a_quiet_start_has_a_small_error() -> None:
    """What may be hidden is of the size of the noise: 1e-4 here, of a drop of 0.3."""
    true = [0.3 * math.exp(-0.02 * k) for k in range(201)]
    found, _, errors = scores(true, 1e-4, 50, 50)
    assert sum(abs(z) < 2 for z in found) >= 37  # 50 draws at 0.9: fewer once in 400
    assert max(errors) < 0.01 * 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "rate"), DROPS)
def test_how_often_the_loss_drop_is_covered(steps: int, rate: float) -> None:
    found = drops(steps, rate, draws=400, seed=1)
    assert found["covered"] >= found["least"] == 342


@pytest.mark.parametrize("last", [20, 49, 70])
def test_overlapping_windows_are_no_independent_ones(last: int) -> None:
    # Both ends read the same noise where K < window (20, 49) or the windows overlap (70).
    true = [1.0 - 0.002 * k for k in range(last + 1)]
    found, estimates, stated = scores(true, 0.1, 50, 500)
    spread, errors = pstdev(estimates), []
    for seed, error in enumerate(stated):  # without what a bend might hide
        losses = [a + b for a, b in zip(true, normal(seed, len(true), 0.1), strict=True)]
        start = extrapolate(*_without_jumps(list(range(50))[: last + 1], losses[:50]), 0)
        errors.append(math.sqrt(error**2 - max(0.0, start.hidden_squared - start.bias_squared)))
    found = [z * error / seen for z, error, seen in zip(found, stated, errors, strict=True)]
    # Five hundred draws know their spread to 3.2 %; an error that is itself drawn, from 21 losses or more
    # and by the window that suits them, may be off by its own 1/√(2·20) = 16 %.
    assert math.sqrt(fmean(e * e for e in errors)) == pytest.approx(spread, rel=0.25)
    assert abs(fmean(found)) < 0.3
    assert 0.8 < math.sqrt(fmean(z * z for z in found)) < 1.5


def test_taking_them_for_independent_would_be_wrong() -> None:
    # One line through all of 21 losses: the drop is slope · K, with variance K² σ²/Σx²; two independent ends
    # would have 2σ² (1/n + x̄²/Σx²): 0.355 against 0.519.
    n, last = 21, 20
    squares = sum((k - last / 2) ** 2 for k in range(n))
    together, apart = last**2 / squares, 2 * (1 / n + (last / 2) ** 2 / squares)
    assert apart < 0.7 * together
    line = extrapolate(list(range(n)), [1.0 - 0.01 * k for k in range(n)], 0)
    if len(line.weights) == n:  # the window that was taken is the whole one
        assert sum(w * w for w in line.weights.values()) == pytest.approx(apart / 2, rel=1e-9)


# ---- what is not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 21, 49])
def test_a_loss_that_is_not_finite_makes_the_drop_undefined(bad: float, place: int) -> None:
    losses = [1.0 - 0.001 * k + n for k, n in enumerate(normal(0, 300, 0.01))]
    for spoiled in (place, 299 - place):
        broken = [bad if k == spoiled else loss for k, loss in enumerate(losses)]
        found = drop(*windows(broken, 50), 299)
        assert math.isnan(found.value), spoiled
    outside = [bad if k == 150 else loss for k, loss in enumerate(losses)]
    assert math.isfinite(drop(*windows(outside, 50), 299).value), "between the windows nobody reads it"


def test_without_losses_nothing_is_known() -> None:
    found = drop(([], []), ([], []), 10)
    assert math.isnan(found.value)
    assert math.isnan(found.standard_error)


# ---- windows -------------------------------------------------------------------------------------------


def read(kept: LossWindows) -> tuple[dict[int, float], dict[int, float]]:
    """Step → loss of both windows; a step that occurs twice fails."""
    assert kept.tensor is not None
    first, last = kept.windows(kept.tensor)
    for steps, losses in (first, last):
        assert len(set(steps)) == len(steps) == len(losses)
    return dict(zip(*first, strict=True)), dict(zip(*last, strict=True))


@given(st.integers(2, 9), st.lists(st.integers(0, 3), max_size=40))
def test_the_windows_hold_the_first_and_the_last(size: int, gaps: list[int]) -> None:
    # Gaps between recorded steps; a gap of 0 is a second loss for the same step.
    kept, naive, step = LossWindows(size), {}, 0
    for number, gap in enumerate(gaps):
        step += gap
        naive[step] = float(number)
        kept.record(torch.tensor(float(number)), step)
    if not gaps:
        assert kept.tensor is None
        return
    first, last = read(kept)
    assert first == dict(list(naive.items())[:size])
    assert last == dict(list(naive.items())[-size:])


def test_a_late_loss_of_an_earlier_step_replaces_it_too() -> None:
    kept = LossWindows(4)
    for number, step in enumerate([0, 1, 2, 1]):
        kept.record(torch.tensor(float(number)), step)
    assert read(kept) == ({0: 0.0, 1: 3.0, 2: 2.0}, {0: 0.0, 1: 3.0, 2: 2.0})


@pytest.mark.parametrize("stop", [0, 1, 3, 7, 20])
def test_windows_are_saved_and_restored(stop: int) -> None:
    whole, part = LossWindows(5), LossWindows(5)
    losses = normal(1, 24, 1.0)
    for step, loss in enumerate(losses):
        if step == stop:
            state = copy.deepcopy(part.state_dict())
            part.record(torch.tensor(99.0), step)  # what follows does not reach into a saved state
            part = LossWindows(5)
            part.load_state_dict(state, CPU)
        whole.record(torch.tensor(loss, dtype=torch.float64), step)
        part.record(torch.tensor(loss, dtype=torch.float64), step)
        assert read(part) == read(whole)


# ---- through the meter ---------------------------------------------------------------------------------


class Recorded:
    """A meter on a run of `steps` steps that records what `loss_at(k)` gives before each step."""

    def __init__(self, loss_window: int = 50) -> None:
        self.weight = nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)
        self.meter = TrajectoryMeter(self.optimizer, loss_window=loss_window)

    def loss(self, value: float) -> None:
        self.meter.record_loss(torch.tensor(value, dtype=torch.float64))

    def step(self) -> None:
        self.weight.grad = torch.ones(2)
        self.optimizer.step()

    def values(self) -> dict[str, float]:
        found = self.meter.compute()
        self.meter.close()
        return found


def test_a_loss_after_the_last_step_belongs_to_the_last_weights() -> None:
    run = Recorded()
    for k in range(30):
        run.loss(2.0 - 0.01 * k)
        run.step()
    run.loss(2.0 - 0.01 * 30)
    values = run.values()
    assert values["loss"] == pytest.approx(1.7, rel=1e-12)
    assert values["loss_drop"] == pytest.approx(0.3, rel=1e-10)


@pytest.mark.mode("a plain loop with accumulated gradients", "measured")
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_several_losses_before_one_step_count_as_their_mean(parts: int) -> None:
    run = Recorded()
    for k in range(30):
        for part in range(parts):  # spread by 3 about the line
            run.loss(2.0 - 0.01 * k + 3.0 * (part - (parts - 1) / 2))
        run.step()
    for part in range(parts):
        run.loss(1.7 + part - (parts - 1) / 2)
    values = run.values()
    assert values["loss_drop"] == pytest.approx(0.3, rel=1e-10)
    assert values["loss"] == pytest.approx(1.7, rel=1e-10)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_batch_that_overflowed_is_not_in_the_mean(bad: float) -> None:
    """A loss scaler skipped it: the next batch is at the same weights."""
    run = Recorded()
    for k in range(30):
        if k in (0, 7, 29):
            run.loss(bad)
        run.loss(2.0 - 0.01 * k)
        run.step()
    assert run.values()["loss_drop"] == pytest.approx(0.3, rel=1e-10)


def test_a_closures_later_evaluations_are_at_other_weights() -> None:
    """LBFGS evaluates the loss again as it moves; in the closure the first one is at θ_k."""
    weight = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=4)
    meter = TrajectoryMeter(optimizer, loss_window=2)
    firsts: list[float] = []
    for _ in range(5):
        calls: list[float] = []

        def closure(calls: list[float] = calls) -> Tensor:
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            meter.record_loss(loss)
            calls.append(float(loss.detach()))
            return loss

        optimizer.step(closure)
        assert len(calls) > 2
        firsts.append(calls[0])
    drop = meter.compute()["loss_drop"]
    meter.close()
    assert drop == pytest.approx(firsts[0] - (2 * firsts[-1] - firsts[-2]), rel=1e-12)


def test_a_loss_between_two_optimizers_is_replaced_by_the_next_steps() -> None:
    """Recorded before each of two steps that make one: the first of them is at the joint step's start."""
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([w], lr=0.1) for w in weights]
    meter = TrajectoryMeter(optimizers)
    for k in range(30):
        for offset, weight, optimizer in zip((0.0, 50.0), weights, optimizers, strict=True):
            meter.record_loss(torch.tensor(2.0 - 0.01 * k + offset, dtype=torch.float64))
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    meter.record_loss(torch.tensor(1.7, dtype=torch.float64))
    values = meter.compute()
    meter.close()
    assert values["loss"] == pytest.approx(1.7, rel=1e-10)
    assert values["loss_drop"] == pytest.approx(0.3, rel=1e-10)


@pytest.mark.parametrize("skipped", [{0}, {0, 1}, {4}, {11}])
def test_a_fused_step_that_was_skipped_has_no_loss(skipped: set[int]) -> None:
    """Its loss is often infinite; nothing is read to know it."""
    weight = nn.Parameter(torch.full((3,), 2.0))
    optimizer = torch.optim.SGD([weight], lr=0.01, fused=True)
    meter = TrajectoryMeter(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for k in range(12):
        optimizer.zero_grad()
        meter.record_loss(math.inf if k in skipped else 2.0 - 0.01 * k)
        loss = weight.square().sum() * (math.inf if k in skipped else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    values = meter.compute()
    meter.close()
    assert values["loss_drop"] == pytest.approx(0.12, rel=1e-10)
    assert values["elapsed"] == 12 - len(skipped)


def test_steps_without_a_loss() -> None:
    run = Recorded(loss_window=10)
    for k in range(90):
        if k % 3 == 1:
            run.loss(2.0 - 0.01 * k)
        run.step()
    values = run.values()
    assert values["loss_drop"] == pytest.approx(0.9, rel=1e-10)


def test_a_number_is_kept_as_it_is() -> None:
    run = Recorded()
    for k in range(30):
        run.meter.record_loss(2.0 - 0.01 * k)  # a Python float has 53 bits
        run.step()
    assert run.values()["loss_drop"] == pytest.approx(0.3, rel=1e-10)


def test_a_loss_that_is_recorded_late_keeps_its_step() -> None:
    run = Recorded()
    for k in range(30):
        run.step()
        run.meter.record_loss(torch.tensor(2.0 - 0.01 * k, dtype=torch.float64), step=k)
    assert run.values()["loss_drop"] == pytest.approx(0.3, rel=1e-10)


def test_a_loss_may_be_complex_shaped_or_part_of_a_graph() -> None:
    run = Recorded()
    for k in range(8):
        graph = nn.Parameter(torch.tensor([2.0 - 0.25 * k]))
        run.meter.record_loss(graph * 1.0)  # (1,), requires grad
        run.step()
    values = run.values()
    assert values["loss_drop"] == pytest.approx(2.0, rel=1e-10)


def test_a_nan_loss_is_recorded_and_the_run_goes_on() -> None:
    run = Recorded(loss_window=5)
    for k in range(20):
        run.meter.record_loss(math.nan if k == 2 else 1.0)
        run.step()
    values = run.values()
    for name in ("loss_drop", "conversion", "efficiency"):
        assert math.isnan(values[name])
        assert "finite" in run.meter.reasons[name]
    assert math.isfinite(values["action"])


# ---- probes --------------------------------------------------------------------------------------------


def test_a_probe_pairs_its_batches() -> None:
    first = torch.tensor([3.0, 1.0, 2.0, 6.0], dtype=torch.float64)
    last = torch.tensor([2.0, 0.5, 1.5, 4.0], dtype=torch.float64)
    found = paired_drop(torch.stack([first, last]))
    # Differences 1, ½, ½, 2: mean 1, squared deviations 0 + ¼ + ¼ + 1 = 3/2, variance ½, over 4.
    assert found.value == 1.0
    assert found.standard_error == pytest.approx(math.sqrt(0.5 / 4), rel=1e-12)
    assert (found.first, found.last) == (3.0, 2.0)
    # 2, ½, 3/2, 4 about 2: squared deviations 0 + 9/4 + ¼ + 4 = 13/2, over 3, over 4.
    assert found.last_error == pytest.approx(math.sqrt(6.5 / 3 / 4), rel=1e-12)


def test_one_batch_has_no_standard_error() -> None:
    found = paired_drop(torch.tensor([[2.0], [0.5]]))
    assert found.value == 1.5
    assert math.isnan(found.standard_error)
    assert math.isnan(found.last_error)


def test_pairing_takes_the_batches_own_differences_out() -> None:
    # Batches differ by 10, the drop by 0.1 between them: unpaired means would be known to 10/√8 only.
    generator = torch.Generator().manual_seed(0)
    level = 10 * torch.randn(8, generator=generator, dtype=torch.float64)
    change = 0.1 * torch.randn(8, generator=generator, dtype=torch.float64)
    assert paired_drop(torch.stack([level + 1, level + change])).standard_error < 0.1


def test_a_probe_takes_the_place_of_the_windows() -> None:
    run = Recorded()
    for _ in range(4):
        run.meter.record_loss(7.0)
        run.step()
    first: Tensor = torch.tensor([3.0, 4.0])
    run.meter.record_probe(first, torch.tensor([1.0, 1.0]))
    values = run.values()
    assert values["loss_drop"] == 2.5
    assert values["loss_drop_se"] == pytest.approx(0.5, rel=1e-6)  # differences 2 and 3: std √½, over √2
    assert values["loss_se"] == 0.0, "both batches have the loss 1"
    assert values["loss"] == 1.0
