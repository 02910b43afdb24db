"""Measuring one step of each block of n: unbiased, honest about its error, never at a fixed stride."""

import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

SAMPLED = ("action", "path_length", "work_ito", "work_action")
STANDARD_ERRORS = {f"{name}_se" for name in SAMPLED} | {
    "kinematic_efficiency_se",
    "straightness_se",
    "efficiency_action_se",
}


def drawn_steps(steps: int, **options: Any) -> list[int]:
    """The steps that a meter measures."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=0.1)
    meter = TrajectoryMeter(optimizer, **options)
    found = []
    for k in range(steps):
        weight.grad = torch.ones(1)
        before = meter.measured
        optimizer.step()
        found += [k] * (meter.measured - before)
    meter.close()
    return found


# ---- which steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "seed"), [(2, 0), (3, 1), (7, 2)])
def test_one_step_of_each_block(every: int, seed: int) -> None:
    blocks = 300
    found = drawn_steps(every * blocks, measure_every_n_steps=every, seed=seed)
    assert [k // every for k in found] == list(range(blocks))
    places = Counter(k % every for k in found)
    # Each place is drawn with probability 1/n: binomial, four standard deviations.
    for place in range(every):
        spread = math.sqrt(blocks * (1 / every) * (1 - 1 / every))
        assert places[place] == pytest.approx(blocks / every, abs=4 * spread)
    assert len({b - a for a, b in pairwise(found)}) > 1, "no fixed stride"


def test_seeds_draw_different_steps_and_one_seed_the_same() -> None:
    drawn = [drawn_steps(60, measure_every_n_steps=3, seed=seed) for seed in range(4)]
    assert len({tuple(steps) for steps in drawn}) == 4
    assert drawn_steps(60, measure_every_n_steps=3, seed=2) == drawn[2]


def test_the_global_generators_neither_matter_nor_move() -> None:
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    first = drawn_steps(60, measure_every_n_steps=3)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(2)
    assert drawn_steps(60, measure_every_n_steps=3) == first


# ---- values --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """One noisy run seen by a meter that measures everything and by many that sample."""

    full: dict[str, float]
    sampled: list[dict[str, float]]


@cache
def noisy_run(
    kind: type[Optimizer],
    every: int,
    steps: int,
    meters: int,
    data_seed: int = 0,
    options: tuple[tuple[str, Any], ...] = (("lr", 0.02),),
    noise: float = 1.0,
) -> Sampled:
    """Linear regression with noisy gradients; K is a multiple of n, so that every block is whole."""
    assert steps % every == 0
    generator = torch.Generator().manual_seed(data_seed)
    weight = nn.Parameter(torch.randn(30, generator=generator, dtype=torch.float64))
    bias = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
    optimizer = kind([weight, bias], **dict(options))
    full = TrajectoryMeter(optimizer)
    samples = [TrajectoryMeter(optimizer, measure_every_n_steps=every, seed=seed) for seed in range(meters)]
    curvature = torch.linspace(0.2, 2, 30, dtype=torch.float64)
    for _ in range(steps):
        weight.grad = curvature * weight.detach() + noise * torch.randn(30, generator=generator, dtype=torch.float64)
        bias.grad = bias.detach() + noise * torch.randn(5, generator=generator, dtype=torch.float64)
        optimizer.step()
    found = Sampled(full.compute(), [meter.compute() for meter in samples])
    for meter in (full, *samples):
        meter.close()
    return found


OPTIONS = {
    SGD: (("lr", 0.02),),
    Adam: (("lr", 0.02),),
    AdamW: (("lr", 0.02), ("weight_decay", 0.5)),
}


RUNS = pytest.mark.parametrize(("kind", "every"), [(SGD, 5), (Adam, 2), (AdamW, 5)])


@RUNS
def test_sums_are_unbiased(kind: type[Optimizer], every: int) -> None:
    meters = 24
    run = noisy_run(kind, every, 100, meters, options=OPTIONS[kind])
    for name in (*SAMPLED, "work_anti_ito", "work_stratonovich"):
        values = [sample[name] for sample in run.sampled]
        # Four standard errors of the mean over the seeds.
        assert fmean(values) == pytest.approx(run.full[name], abs=4 * stdev(values) / meters**0.5), name
        assert stdev(values) > 0


@RUNS
def test_standard_errors_cover(kind: type[Optimizer], every: int) -> None:
    # Error over stated error, for 3 runs × 16 seeds. Its rms should be √((n − 1)/n): the draw is without
    # replacement from a block of n. Twenty to fifty sampled steps know their variance to 15-20 %.
    for name in SAMPLED:
        scores = []
        for data_seed in range(3):
            run = noisy_run(kind, every, 100, 16 if data_seed else 24, data_seed, OPTIONS[kind])
            scores += [(s[name] - run.full[name]) / s[f"{name}_se"] for s in run.sampled[:16]]
        rms = math.sqrt(fmean(score**2 for score in scores))
        assert 0.5 < rms < 1.6, name


def test_a_trend_is_not_taken_for_noise() -> None:
    # Gradient descent without noise on one mode: ‖u_k‖² falls by e^{−4} over the run. What one draw in a
    # block of 5 misses is 5 % of the local value; the spread of all draws about their mean is 90 %.
    def run(seed: int) -> tuple[float, float, float, float]:
        weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = SGD([weight], lr=0.01)
        meter = TrajectoryMeter(optimizer, measure_every_n_steps=5, seed=seed)
        squares, drawn = [], []
        for _ in range(200):
            weight.grad = weight.detach().clone()
            before, measured = weight.item(), meter.measured
            optimizer.step()
            squares.append((weight.item() - before) ** 2)
            if meter.measured > measured:
                drawn.append(squares[-1])
        values = meter.compute()
        meter.close()
        spread = len(squares) / len(drawn) ** 0.5 * stdev(drawn)  # if the draws were independent of the time
        return values["action"], sum(squares), values["action_se"], spread

    results = [run(seed) for seed in range(24)]
    scores = [(found - true) / error for found, true, error, _ in results]
    # Within a block of 5 a slope s has the variance s²(5² − 1)/12 = 2s². Neighbours differ by 5s and two such
    # variances: half the mean square is 14.5 s². The error is 0.37 of what is stated, on the safe side; 24
    # draws know it to 14 %, times four.
    assert math.sqrt(fmean(s * s for s in scores)) == pytest.approx(math.sqrt(2 / 14.5), rel=0.58)
    assert fmean(error for _, _, error, _ in results) < 0.2 * fmean(spread for *_, spread in results)


def test_displacement_is_exact() -> None:
    run = noisy_run(Adam, 2, 100, 24, options=OPTIONS[Adam])
    # A state function: the same subtraction of the same weights, whatever was measured in between.
    assert {sample["displacement"] for sample in run.sampled} == {run.full["displacement"]}
    assert {sample["elapsed"] for sample in run.sampled} == {100.0}


def test_weighted_displacement_of_decoupled_decay() -> None:
    # Σ (Δθ_i + Σ lr w θ_k)²/m_i from one step in five: θ_k and μ are smooth from step to step, so that a few
    # percent are left. With w = 0.5 the decay's part is about half of the whole motion.
    run = noisy_run(AdamW, 5, 200, 8, options=OPTIONS[AdamW], noise=0.3)
    full = run.full["efficiency_action"] * run.full["work_action"]
    for sample in run.sampled:
        assert sample["efficiency_action"] * sample["work_action"] == pytest.approx(full, rel=0.05)


def test_the_weighted_displacement_would_be_off_without_the_decay() -> None:
    # The same run, with its decay taken for a motion of the force: what the test above can tell apart.
    options = OPTIONS[AdamW]
    run = noisy_run(AdamW, 5, 200, 8, options=options, noise=0.3)
    full = run.full["efficiency_action"] * run.full["work_action"]
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(30, generator=generator, dtype=torch.float64))
    bias = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
    optimizer = AdamW([weight, bias], **dict(options))
    meter = TrajectoryMeter(optimizer)
    start = weight.detach().clone(), bias.detach().clone()
    curvature = torch.linspace(0.2, 2, 30, dtype=torch.float64)
    for _ in range(200):
        weight.grad = curvature * weight.detach() + 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)
        bias.grad = bias.detach() + 0.3 * torch.randn(5, generator=generator, dtype=torch.float64)
        optimizer.step()
    naive = sum(
        float(((p.detach() - s) ** 2 / meter.accumulated_mobility(p)).sum())
        for p, s in zip((weight, bias), start, strict=True)
    )
    meter.close()
    assert abs(naive / full - 1) > 0.1


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("clip", [False, True])
def test_gradient_norms_are_of_the_last_step_that_was_looked_at(decay: float, clip: bool) -> None:
    """Of a measured one, or of the one after it: with what clipped that one, and without the L2 term."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(9, generator=generator, dtype=torch.float64))
    optimizer = SGD([weight], lr=0.3, weight_decay=decay)
    meter = TrajectoryMeter(optimizer, measure_every_n_steps=5)
    known = (math.nan, math.nan)
    looked = 0
    for _ in range(40):
        weight.grad = torch.randn(9, generator=generator, dtype=torch.float64)
        raw = float(weight.grad.norm())
        before, waiting = meter.measured, looked == 1
        meter.observe_gradients()
        if clip:
            nn.utils.clip_grad_norm_([weight], 0.5)
        clipped = float(weight.grad.norm())
        optimizer.step()
        looked = 1 if meter.measured > before else 2 if waiting else 0
        known = (raw, clipped) if looked else known
        values = meter.compute()
        assert (values["grad_norm"], values["grad_norm_clipped"]) == pytest.approx(known, rel=1e-12, nan_ok=True)
    meter.close()


# ---- an alternating run --------------------------------------------------------------------------------

SMALL = 1 / 19  # ((1 + r)/2)²/r² = 100 for r = 1/19: what a stride of 2 that meets the small steps would report


def alternating(fixed: bool, seed: int = 0) -> dict[str, float]:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = SGD([weight], lr=1.0)
    meter = TrajectoryMeter(optimizer, measure_every_n_steps=2, seed=seed)
    if fixed:
        meter._joint.measuring = lambda: meter.steps % 2 == 1  # type: ignore[method-assign]
    for k in range(400):
        weight.grad = -torch.ones_like(weight) * (1.0 if k % 2 == 0 else SMALL)
        optimizer.step()
    values = meter.compute()
    meter.close()
    return values


def test_a_fixed_stride_would_report_an_efficiency_of_a_hundred() -> None:
    assert alternating(fixed=True)["kinematic_efficiency"] == pytest.approx(100, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_drawn_step_gives_a_sane_efficiency(seed: int) -> None:
    values = alternating(fixed=False, seed=seed)
    true = ((1 + SMALL) / 2) ** 2 / ((1 + SMALL**2) / 2)
    # The action is a mean of 200 draws that are 1 or r² with equal odds: a relative error of 1/√200 = 7 %;
    # four of them.
    assert values["kinematic_efficiency"] == pytest.approx(true, rel=4 / 200**0.5)
    assert abs(values["kinematic_efficiency"] - true) < 4 * values["kinematic_efficiency_se"]


# ---- resuming, short runs, keys ------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 10, 13, 14])
def test_a_resumed_run_draws_the_same_steps(stop: int) -> None:
    def step(weight: nn.Parameter, optimizer: Optimizer, k: int) -> None:
        weight.grad = torch.full((2,), float(k + 1), dtype=torch.float64)
        optimizer.step()

    options: dict[str, Any] = {"measure_every_n_steps": 4, "seed": 3}
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SGD([weight], lr=0.1)
    whole = TrajectoryMeter(optimizer, **options)
    meter = TrajectoryMeter(optimizer, **options)
    for k in range(32):
        if k == stop:
            state = meter.state_dict()
            meter.close()
            meter = TrajectoryMeter(optimizer, **options)
            meter.load_state_dict(state)
        step(weight, optimizer, k)
        assert meter.measured == whole.measured, k
    resumed, expected = meter.compute(), whole.compute()
    meter.close()
    whole.close()
    assert resumed == pytest.approx(expected, rel=1e-12, nan_ok=True)  # float64 sums in the same order


def short_run(every: int, seed: int) -> tuple[dict[str, float], dict[str, str], int]:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SGD([weight], lr=0.5)
    meter = TrajectoryMeter(optimizer, measure_every_n_steps=every, seed=seed)
    for _ in range(10):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
    values = meter.compute()
    meter.close()
    return values, meter.reasons, meter.measured


def test_a_block_longer_than_the_run() -> None:
    runs = [short_run(20, seed) for seed in range(12)]
    assert {measured for *_, measured in runs} == {0, 1}, "the draw falls into the run or behind it"
    for values, _, measured in runs:
        assert values["displacement"] == pytest.approx(5 * 2**0.5, rel=1e-12)
        if measured:  # all steps are alike: one tells of all
            assert values["path_length"] == pytest.approx(5 * 2**0.5, rel=1e-12)
            assert values["kinematic_efficiency"] == pytest.approx(1, rel=1e-12)
            assert math.isnan(values["action_se"]), "one draw has no spread"


def test_without_a_measured_step_sums_are_undefined() -> None:
    values, reasons, _ = next(run for run in (short_run(20, seed) for seed in range(12)) if run[2] == 0)
    for name in (*SAMPLED, "straightness", "kinematic_efficiency", "efficiency_action"):
        assert math.isnan(values[name]), name
        assert "measured" in reasons[name], name


def test_standard_errors_only_where_steps_are_sampled() -> None:
    run = noisy_run(SGD, 2, 100, 4)
    assert STANDARD_ERRORS.isdisjoint(run.full)
    for sample in run.sampled:
        assert set(sample) >= STANDARD_ERRORS
        assert all(sample[name] > 0 for name in STANDARD_ERRORS)


def test_what_needs_no_sampling_has_no_error_where_the_sums_overflow() -> None:
    weight = nn.Parameter(torch.zeros(300))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    meter = TrajectoryMeter(optimizer, measure_every_n_steps=2)
    for step in range(12):
        weight.grad = torch.full((300,), 1e25 if step == 8 else 1.0)
        optimizer.step()
        weight.grad = torch.full((300,), -1e25 if step == 8 else 1.0)
        optimizer.step()
    values = meter.compute()
    assert math.isfinite(values["displacement"])
    assert values["displacement_se"] == 0.0
