"""Critical batch size, step headroom, noise share: by definition, by closed forms, and how far off they say to be."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lightning_speedlimit import RunRecord, TrajectoryMeter
from lightning_speedlimit.record.latest import latest
from lightning_speedlimit.record.log_steps import too_few
from lightning_speedlimit.record.tuning import Tuning, is_plain_sgd
from lightning_speedlimit.report import advise

Values = npt.NDArray[np.float64]
SCATTER = {"work": 0.05, "gradient": 0.5}
PLAIN = {"optimizers": [{"class": "SGD", "groups": [{"lr": 0.1, "momentum": 0.0}]}]}
ADAM = {"optimizers": [{"class": "Adam", "groups": [{"lr": 1e-3}]}]}


def columns(draw: np.random.Generator, rows: int = 20, every: int = 10, **means: float) -> dict[str, Values]:
    """Steps whose works and overlaps scatter around their means, added up to rows; losses known to 0.01."""
    known = {"work_ito": 0.3, "work_anti_ito": 0.1, "drop": 0.12, "gradient_signal": 0.5, "gradient_noise": 2.0} | means
    found = {"step": np.arange(1, rows + 1) * every, "samples": np.arange(1.0, rows + 1) * every * 32.0}
    for name in ("work_ito", "work_anti_ito", "gradient_signal", "gradient_noise"):
        found[name] = draw.normal(known[name], SCATTER[name.split("_")[0]], rows * every).cumsum()[every - 1 :: every]
    loss = draw.normal(0.0, 0.01, rows + 1)
    found["loss_drop"] = loss[0] - loss[1:] + known["drop"] * found["step"]
    found |= {"loss_se": np.full(rows, 0.01), "loss_drop_se": np.full(rows, 0.01 * math.sqrt(2))}
    return found


def without_overlap(data: dict[str, Values]) -> dict[str, Values]:
    return {name: column for name, column in data.items() if not name.startswith("gradient")}


TRUTH = {"noise_share": 1 - 0.14 / 0.3, "step_headroom": 0.14 / 0.04}


def test_values_are_by_definition() -> None:
    data = columns(np.random.default_rng(0))
    work, anti, drop = (data[n][14] - data[n][4] for n in ("work_ito", "work_anti_ito", "loss_drop"))
    found = Tuning(without_overlap(data), PLAIN, 4, 14).values
    slope = 2 * drop - anti
    assert found["noise_share"].value == pytest.approx((work - slope) / work)
    assert found["step_headroom"].value == pytest.approx(slope / (2 * (drop - anti)))
    assert found["critical_batch_size"].value == pytest.approx(32 * (work - slope) / slope)
    signal, noise = (data[n][14] - data[n][4] for n in ("gradient_signal", "gradient_noise"))
    del data["samples"]
    data["tokens"] = 7.0 * data["step"]
    assert Tuning(data, ADAM, 4, 14).critical_batch_size.value == pytest.approx(7 * noise / signal)


@pytest.mark.parametrize("run", [PLAIN, ADAM], ids=["works", "overlap"])
def test_two_standard_errors_hold_the_truth(run: dict[str, Any]) -> None:
    """0.954, less what a variance from 38 second differences and a ratio's skewness cost: 0.88 to 0.995 of 400."""
    draw, held = np.random.default_rng(1), dict.fromkeys(("noise_share", "step_headroom", "critical_batch_size"), 0)
    truth = TRUTH | {"critical_batch_size": 32 * (0.16 / 0.14 if run is PLAIN else 4.0)}
    for _ in range(400):
        data = columns(draw, rows=40, every=20)
        for name, found in Tuning(data if run is ADAM else without_overlap(data), run).values.items():
            held[name] += abs(found.value - truth[name]) <= 2 * found.standard_error
    assert all(352 <= count <= 398 for count in held.values()), held


def test_rows_of_unequal_length_weigh_as_their_steps() -> None:
    """The error of Σ x over independent steps is √K σ, however they are cut into rows."""
    draw, cuts = np.random.default_rng(2), np.cumsum([3, 40, 7, 100, 1, 60, 200, 5, 9, 75])
    stated = []
    for _ in range(300):
        steps = draw.normal(0.3, 0.3, cuts[-1])
        data = {"step": cuts, "work_ito": steps.cumsum()[cuts - 1], "work_anti_ito": np.zeros(10)}
        data |= {"loss_drop": 0.05 * cuts, "loss_drop_se": np.zeros(10)}
        stated.append(Tuning(data, PLAIN).noise_share)
    # 1 − S/W with S = 2d exact: its error is S/W² √K σ.
    slope, work = 0.1 * cuts[-1], 0.3 * cuts[-1]
    wanted = slope / work**2 * math.sqrt(cuts[-1]) * 0.3
    assert np.mean([t.standard_error**2 for t in stated]) ** 0.5 == pytest.approx(wanted, rel=0.1)
    assert np.std([t.value for t in stated]) == pytest.approx(wanted, rel=0.15)


def test_few_rows_borrow_from_the_rows_before() -> None:
    data = columns(np.random.default_rng(3))
    one = Tuning(data, ADAM, 15, 16).critical_batch_size
    rates = np.diff(data["gradient_noise"][8:17]) - one.value / 32 * np.diff(data["gradient_signal"][8:17])
    signal = data["gradient_signal"][16] - data["gradient_signal"][15]
    variance = np.mean(np.diff(rates, 2) ** 2) / 6
    assert one.standard_error == pytest.approx(32 * math.sqrt(variance) / signal)


def undefined(data: dict[str, Values], run: dict[str, Any], **changes: Any) -> dict[str, str]:
    found = Tuning(data | changes, run).values
    assert all(math.isnan(t.value) == bool(t.reason) == math.isnan(t.standard_error) for t in found.values())
    return {name: t.reason for name, t in found.items()}


def test_what_cannot_be_told_says_why() -> None:
    data = columns(np.random.default_rng(4))
    works = without_overlap(data)
    assert set(undefined(data, ADAM).values()) == {""}
    assert "overlap of neighbouring gradients was not recorded" in undefined(works, ADAM)["critical_batch_size"]
    assert "batch size is not known" in undefined(data, ADAM, samples=data["step"] * math.nan)["critical_batch_size"]
    assert "loss_drop is NaN" in undefined(works, PLAIN, loss_drop=data["step"] * math.nan)["noise_share"]
    level = undefined(works, PLAIN, loss_drop=data["work_anti_ito"] / 2)["critical_batch_size"]
    assert "slope along the updates can't be told from 0" in level
    straight = undefined(works, PLAIN, loss_drop=data["work_anti_ito"])
    assert "curvature along the updates can't be told from 0" in straight["step_headroom"]
    assert "no work was done" in undefined(works, PLAIN, work_ito=-data["work_ito"])["noise_share"]
    three = {n: c[:3] for n, c in data.items()}
    assert "4 log steps are needed, got 3: " in undefined(three, ADAM)["step_headroom"]
    nothing = {n: c[:0] for n, c in data.items()}
    assert set(undefined(nothing, ADAM)) == {"critical_batch_size", "step_headroom", "noise_share"}


@pytest.mark.parametrize(
    ("rows", "steps", "versions", "cure"),
    [
        (3, 150, {"pytorch_lightning": "2"}, "log more often, as with Trainer(log_every_n_steps=10), or train longer"),
        (3, 150, {"lightning": "2"}, "log more often, as with Trainer(log_every_n_steps=10), or train longer"),
        (1, 500, {"transformers": "5"}, "log more often, as with TrainingArguments(logging_steps=50), or train longer"),
        (3, 10_000, {}, "log more often, as with a row every 1000 steps, or train longer"),
        (2, 5, {}, "log more often, as with a row every step, or train longer"),
        (3, 3, {"pytorch_lightning": "2"}, "train longer"),
        (2, 3, {"pytorch_lightning": "2"}, "train longer"),
        (0, math.nan, {}, "train longer"),
    ],
)
def test_too_few_rows_are_told_with_what_to_set(rows: int, steps: float, versions: dict[str, str], cure: str) -> None:
    assert too_few(4, rows, steps, {"versions": versions}) == f"4 log steps are needed, got {rows}: {cure}"


@pytest.mark.parametrize(
    ("name", "run", "changes", "reason"),
    [
        ("critical_batch_size", ADAM, {"gradient_signal": -1.0}, "neighbouring gradients oppose each other"),
        ("critical_batch_size", PLAIN, {"loss_drop": -1.0}, "the updates raised the mean loss"),
        ("step_headroom", PLAIN, {"work_anti_ito": 3.0}, "the loss bends downwards along the updates"),
    ],
)
def test_what_is_clearly_below_0_is_no_matter_of_a_longer_run(
    name: str, run: dict[str, Any], changes: dict[str, float], reason: str
) -> None:
    data = columns(np.random.default_rng(4))
    data = data if run is ADAM else without_overlap(data)
    told = undefined(data, run, **{name: factor * data[name] for name, factor in changes.items()})[name]
    assert reason in told
    assert "+/-" in told
    assert "a longer run" not in told


@pytest.mark.parametrize("lr", [0.02, 0.4])
def test_nesterov_near_the_edge_of_stability_says_what_is_the_matter(lr: float) -> None:
    """A step goes along its own batch's noise, and the next gradient takes it back. Edge: lr·h = 2(1 + β)/(1 + 2β)."""
    torch.manual_seed(0)
    weights = nn.Parameter(torch.ones(50))
    optimizer = torch.optim.SGD([weights], lr=lr, momentum=0.9, nesterov=True)
    meter = TrajectoryMeter(optimizer)
    record = RunRecord(meter.description())
    for step in range(1, 161):
        loss = 1.5 * (weights + 0.3 * torch.randn(50)).square().sum()  # curvature 3: the edge is at 0.45
        meter.record_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 8 == 0:
            record.take(meter, {"samples": 8.0 * step})
    found = record.tuning(0, 160)["critical_batch_size"]
    if lr == 0.02:
        assert found.value > 0
    else:
        assert "neighbouring gradients oppose each other" in found.reason
        assert "smaller learning rate" in found.reason


def test_a_stretch_ends_after_it_begins() -> None:
    data = columns(np.random.default_rng(5))
    with pytest.raises(ValueError, match="a stretch got rows 4 to 4"):
        Tuning(data, ADAM, 4, 4)


def test_the_latest_are_of_as_many_rows_as_it_takes() -> None:
    data = columns(np.random.default_rng(6), rows=64, every=2, work_anti_ito=0.06)
    found = latest(data, ADAM)
    lengths = [1, 2, 4, 8, 16, 32]
    for name, limit in (("critical_batch_size", 0.3), ("step_headroom", 0.3), ("noise_share", None)):
        tuned = [getattr(Tuning(data, ADAM, 63 - length), name) for length in lengths]
        enough = [t.standard_error <= (0.1 if limit is None else limit * t.value) for t in tuned]
        assert found[name] == tuned[enough.index(True)]
    assert not enough[0], "one row is too few here"


def test_what_was_lost_to_others_is_no_noise() -> None:
    """Of the drop 0.3 a step, decay made 0.2: the updates' own balance is that of a drop of 0.1."""
    data = columns(np.random.default_rng(8), drop=0.3)
    decay = {"work_decay": 0.2 * data["step"]}
    less = Tuning(data | {"loss_drop": data["loss_drop"] - decay["work_decay"]}, ADAM).values
    assert Tuning(data | decay, ADAM).values == less


def test_the_last_update_has_met_no_gradient_yet() -> None:
    """a is of the steps that have: of all W it is a · W over the work of these, met = 2 work_stratonovich − a."""
    data = without_overlap(columns(np.random.default_rng(15)))
    met = data["work_ito"] - 3.0
    data["work_stratonovich"] = 0.5 * (met + data["work_anti_ito"])
    work, anti, drop = (float(data[name][-1]) for name in ("work_ito", "work_anti_ito", "loss_drop"))
    found = Tuning(data, PLAIN).noise_share
    assert found.value == pytest.approx(1 - 2 * drop / work + anti / float(met[-1]))


def test_a_full_batch_has_no_noise() -> None:
    run = ADAM | {"batches_per_epoch": 4, "accumulate_grad_batches": 4}
    found = Tuning(columns(np.random.default_rng(9)), run).values
    assert found["noise_share"].value == 0.0
    assert "each step sees all data" in found["critical_batch_size"].reason
    other = Tuning(columns(np.random.default_rng(9)), run | {"accumulate_grad_batches": 3}).values
    assert other["noise_share"].value > 0.0


def test_gradients_that_are_more_alike_than_chance_have_no_critical_batch() -> None:
    found = Tuning(columns(np.random.default_rng(10), gradient_noise=-1.0), ADAM).critical_batch_size
    assert math.isnan(found.value)
    assert "no noise can be told" in found.reason


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_so_few_rows_say_so_without_a_warning(rows: int) -> None:
    record = RunRecord({"batch_size": 8})
    for step in range(1, rows + 1):
        sums = {"work_ito": 1.0, "work_anti_ito": 0.5, "loss_drop": 0.4, "gradient_noise": 1.0, "gradient_signal": 1.0}
        record.append(step, {"samples": 8.0 * step, **{name: value * step for name, value in sums.items()}})
    for told in advise(record).critical_batch_size, record.tuning()["critical_batch_size"]:
        assert math.isnan(told.standard_error)
        assert told.reason == f"4 log steps are needed, got {rows}: train longer"


@pytest.mark.parametrize("jump", [1.0, 16.0])
def test_a_batch_that_changes_midway(jump: float) -> None:
    data = columns(np.random.default_rng(11))
    data["samples"] = np.where(data["step"] <= 100, 1.0, jump).cumsum() * 320.0
    whole, half = Tuning(data, ADAM), Tuning(data, ADAM, 11)
    assert ("the batch size changed" in whole.critical_batch_size.reason) == (jump > 1)
    assert half.critical_batch_size.value > 0 or jump > 1  # eight rows tell its error, some with the smaller batch


def test_a_row_before_the_first_step_is_the_start() -> None:
    data = columns(np.random.default_rng(12))
    early = {name: np.concatenate([[0], column]) for name, column in data.items()}
    assert Tuning(early, ADAM).values == Tuning(data, ADAM).values
    assert Tuning(early, ADAM, 0).values == Tuning(data, ADAM).values
    assert Tuning(early, ADAM, 5, 15).values == Tuning(data, ADAM, 4, 14).values
    record = RunRecord(ADAM)
    record.append(0, {"samples": 0.0, "work_ito": 0.0})
    assert all(math.isnan(t.value) for t in record.tuning().values())


@pytest.mark.parametrize("window", [2, 50])
def test_losses_of_unknown_error_tell_nothing(window: int) -> None:
    data = without_overlap(columns(np.random.default_rng(13)))
    del data["loss_drop_se"]
    if window == 2:
        data["loss_drop_se"] = 0.0 * data["loss_se"]  # two losses have none
    found = Tuning(data, PLAIN | {"loss_window": window}).values
    assert all("how far the losses are known" in t.reason for t in found.values())


def test_while_the_first_window_fills_the_start_is_uncertain() -> None:
    data, run = columns(np.random.default_rng(14)), ADAM | {"loss_window": 100}
    data["loss_drop_se"] = 100 * data["loss_se"]
    early, late = Tuning(data, run, 5, 15).noise_share, Tuning(data, run, 10, 19).noise_share
    assert early.standard_error > 3 * late.standard_error


def test_even_all_rows_may_be_too_few() -> None:
    found = latest(columns(np.random.default_rng(7), rows=5, every=1, drop=0.06, work_ito=0.2), ADAM)
    assert math.isnan(found["noise_share"].value)
    assert "even of all steps" in found["noise_share"].reason


@pytest.mark.parametrize(
    ("run", "plain"),
    [
        (PLAIN, True),
        (ADAM, False),
        ({"optimizers": [{"class": "SGD", "groups": [{"momentum": 0.9}]}]}, False),
        ({"optimizers": [*PLAIN["optimizers"], *ADAM["optimizers"]]}, False),
        ({"optimizers": []}, False),
        ({}, False),
    ],
)
def test_plain_sgd_is_told_from_what_was_run(run: dict[str, Any], plain: bool) -> None:
    assert is_plain_sgd(run) == plain


# --- closed form: a linear slope F with noise of known covariance


def noisy_slope(optimizer: str, steps: int = 4000, every: int = 100) -> RunRecord:
    """L = F·θ; g = F + ε, ε of variance 4 in each of 30 coordinates: at batch 16 tr Σ = 16 · 30 · 4, ‖F‖² = 30."""
    torch.manual_seed(0)
    theta = nn.Parameter(torch.zeros(30, dtype=torch.float64))
    stepper: Optimizer = SGD([theta], lr=0.01) if optimizer == "sgd" else Adam([theta], lr=0.01)
    meter = TrajectoryMeter(stepper)
    record = RunRecord(meter.description())
    for k in range(1, steps + 1):
        meter.record_loss(theta.detach().sum())
        theta.grad = torch.ones_like(theta) + 2.0 * torch.randn_like(theta)
        stepper.step()
        if k % every == 0:
            record.append(k, {**meter.compute(), "samples": 16.0 * k})
    meter.close()
    return record


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_slope_with_known_noise(optimizer: str) -> None:
    found = noisy_slope(optimizer).tuning()
    size = found["critical_batch_size"]
    assert size.standard_error < 0.05 * size.value
    assert size.value == pytest.approx(16 * 30 * 4 / 30, abs=3 * size.standard_error)
    assert "curvature" in found["step_headroom"].reason
    if optimizer == "sgd":
        assert found["noise_share"].value == pytest.approx(0.8, abs=3 * found["noise_share"].standard_error)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_row_at_each_step_tells_as_much(optimizer: str) -> None:
    """At step 1 no step has met the next gradient: what is NaN there is a sum of none."""
    each, some = (noisy_slope(optimizer, steps=300, every=every).tuning() for every in (1, 10))
    for name in ("critical_batch_size", "noise_share"):
        assert each[name].value == pytest.approx(some[name].value, rel=1e-12), name
        assert each[name].standard_error > 0.0, name


def test_headroom_of_a_parabola() -> None:
    """½h θ² falls most by a step of rate 1/h: (1/h − lr/2)/(lr/2)·½ … = 1/(lr h) at each step, lr h = 0.03."""
    theta = 0.97 ** np.arange(41.0)
    data = {"step": np.arange(1, 41), "loss_drop": 0.5 * (1 - theta[1:] ** 2)}
    data["work_anti_ito"] = (0.03 * theta[1:] * theta[:-1]).cumsum()
    data["work_ito"], data["loss_drop_se"] = (0.03 * theta[:-1] ** 2).cumsum(), np.zeros(40)
    found = Tuning(data, PLAIN).values
    assert found["step_headroom"].value == pytest.approx(1 / 0.03, rel=1e-9)
    assert found["noise_share"].value == pytest.approx(0.0, abs=1e-12)


# --- in a record


def test_rows_and_summary_carry_them() -> None:
    record = noisy_slope("adam", steps=1000)
    row = record.tune()
    assert row["critical_batch_size"] == latest(record.columns, record.run)["critical_batch_size"].value
    assert record.columns["critical_batch_size_se"][-1] == row["critical_batch_size_se"]
    assert "curvature" in record.reasons["step_headroom"]
    summary, whole = record.summary(), record.tuning()
    assert summary.critical_batch_size == whole["critical_batch_size"].value != row["critical_batch_size"]
    assert summary.critical_batch_size_se == whole["critical_batch_size"].standard_error
    assert f"critical batch        {summary.critical_batch_size:.1f}" in str(summary)


@pytest.mark.parametrize(("after", "to"), [(150, None), (0, 150), (999, None)])
def test_a_stretch_is_between_rows(after: int, to: int | None) -> None:
    with pytest.raises(ValueError, match=r"tuning got .*, wanted the step of a row"):
        noisy_slope("sgd", steps=400).tuning(after, to)


# --- without replacement: samples of one epoch come once each


def of_quadratic(each: int, epochs: int, *, once: bool) -> tuple[dict[str, Values], dict[str, float]]:
    """SGD on ½ mean |θ − x|² by plain numpy, in `each` batches of 16 an epoch; columns, and the truth of the steps."""
    draw, batch, lr = np.random.default_rng(5), 16, 1e-4
    data, theta = draw.normal(size=(batch * each, 6)), np.full(6, 0.35)
    gradients, thetas, order = [], [theta], np.arange(len(data))
    for k in range(each * epochs):
        order = draw.permutation(len(data)) if k % each == 0 else order
        rows = order[k % each * batch :][:batch] if once else draw.integers(len(data), size=batch)
        gradients.append(theta - data[rows].mean(0))
        theta = theta - lr * gradients[-1]
        thetas.append(theta)
    g, away = np.array(gradients), np.array(thetas) - data.mean(0)
    squares, met = (g**2).sum(1), (g[1:] * g[:-1]).sum(1)
    sums = {"work_ito": lr * squares, "work_anti_ito": lr * np.append(met, 0.0)}
    sums["work_stratonovich"] = lr * np.append(met + squares[:-1], 0.0) / 2
    sums |= {"gradient_signal": np.append(0.0, met), "gradient_noise": np.append(0.0, squares[1:] - met)}
    at = np.arange(10 * each, len(g) + 1, 10 * each)
    found = {name: column.cumsum()[at - 1] for name, column in sums.items()}
    losses = (away**2).sum(1) / 2
    found |= {"step": at, "samples": 16.0 * at, "loss_drop": losses[0] - losses[at], "loss_drop_se": np.zeros(len(at))}
    scatter, signal = len(g) * data.var(0).sum() / batch, (away[:-1] ** 2).sum()
    noise = scatter * (1 - once / each)  # of a batch that shares no sample with the others of its epoch
    truth = {"noise_share": noise / squares.sum(), "step_headroom": signal / (lr * squares.sum())}
    return found, truth | {"critical_batch_size": batch * scatter / signal}


@pytest.mark.parametrize(("each", "epochs"), [(3, 3000), (8, 1000), (40, 300)])
@pytest.mark.parametrize("once", [True, False], ids=["once", "with replacement"])
def test_batches_that_share_no_sample_are_told_from_independent_ones(each: int, epochs: int, once: bool) -> None:
    """5 %: about three standard errors of Σ g_k·g_{k−1} over these steps."""
    data, truth = of_quadratic(each, epochs, once=once)
    run = {"batch_size": 16, "samples_without_replacement": 16 * each} if once else {}
    found = Tuning(without_overlap(data), PLAIN | run).values
    by_gradients = Tuning(data, ADAM | run).critical_batch_size.value
    assert by_gradients == pytest.approx(truth["critical_batch_size"], rel=0.05)
    for name in ("noise_share", "critical_batch_size"):
        assert found[name].value == pytest.approx(truth[name], rel=0.05), name
    if once and each < 40:
        taken_for_independent = Tuning(without_overlap(data), PLAIN), Tuning(data, ADAM)
        wrong = [tuning.critical_batch_size.value / truth["critical_batch_size"] for tuning in taken_for_independent]
        assert all(abs(ratio - 1) > 0.08 for ratio in wrong), wrong


def test_a_step_that_sees_most_of_an_epoch_is_left_as_it_is() -> None:
    data = without_overlap(columns(np.random.default_rng(0)))
    most, some = (PLAIN | {"batch_size": 32, "samples_without_replacement": samples} for samples in (40, 320))
    assert Tuning(data, most).values == Tuning(data, PLAIN).values
    assert Tuning(data, some).values != Tuning(data, PLAIN).values


@pytest.mark.parametrize(("start", "size"), [(None, 32), (9, 96)])
def test_of_a_run_whose_batch_size_changed_a_stretch_has_its_own(start: int | None, size: int) -> None:
    """The run's mean is that of neither: 64."""
    data = without_overlap(columns(np.random.default_rng(0)))
    data["samples"] = np.where(data["step"] <= 100, 320.0, 960.0).cumsum()
    run, stop = PLAIN | {"samples_without_replacement": 640}, 9 if start is None else -1
    changed = run | {"batch_size": None, "samples_per_step": 64}
    assert Tuning(data, changed, start, stop).values == Tuning(data, run | {"batch_size": size}, start, stop).values
    assert Tuning(data, changed).noise_share == Tuning(data, run | {"batch_size": 64}).noise_share


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("each", [10, 50])
def test_momentum_gathers_what_batches_of_an_epoch_have_in_common(each: int, nesterov: bool) -> None:
    """On a linear loss, by plain numpy: there is no curvature, and the noise in W is known. Steps of β = 0.8."""
    draw, beta, samples = np.random.default_rng(3), 0.8, 4 * each
    data = draw.normal(size=(samples, 200))
    force = np.full(200, 0.3) + data.mean(0)
    noise = []
    for _ in range(6000 // each):
        order = draw.permutation(samples).reshape(each, 4)
        noise += list(data[order].mean(1) - data.mean(0))
    noises, updates, memory = np.array(noise), [], np.zeros(200)
    for n in noises:
        memory = beta * memory + force + n
        updates.append(force + n + beta * memory if nesterov else memory)
    u = np.array(updates)
    work, following = ((force + noises) * u).sum(1), (force + noises[1:]) * u[:-1]
    sums = {"work_ito": work, "work_anti_ito": np.append(following.sum(1), 0.0), "loss_drop": (force * u).sum(1)}
    sums["work_stratonovich"] = (sums["work_anti_ito"] + np.append(work[:-1], 0.0)) / 2
    at = np.arange(each, len(u) + 1, each)
    found = {name: column.cumsum()[at - 1] for name, column in sums.items()}
    found |= {"step": at, "loss_drop_se": np.zeros(len(at))}
    settings = {"momentum": beta, "nesterov": nesterov}
    run = {"optimizers": [{"class": "SGD", "groups": [settings]}], "batch_size": 4}
    tuning = Tuning(found, run | {"samples_without_replacement": samples})
    truth = (noises * u).sum() / work.sum()
    assert abs(tuning.noise_share.value - truth) < 4 * tuning.noise_share.standard_error
    assert math.isnan(tuning.step_headroom.value), "there is no curvature to be told"
    plain = Tuning(found, run)
    assert abs(plain.noise_share.value - truth) > 4 * plain.noise_share.standard_error, "taken for independent"


FAMILY = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.8, 0.999), eps=30.0),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, 0.999), eps=30.0, weight_decay=0.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3, betas=(0.8, 0.999), eps=30.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.8, eps=30.0),
}


@pytest.mark.parametrize("name", FAMILY)
def test_optimizers_that_average_gradients_gather_it_too(name: str) -> None:
    """torch's own steps on a linear loss, 20 batches an epoch; eps is so large that the mobility hardly changes."""
    draw, each = torch.Generator().manual_seed(3), 20
    data = torch.randn(4 * each, 200, generator=draw, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))
    optimizer, mean = FAMILY[name]([weight]), data.mean(0) - 0.3
    forces, updates = [], []
    for _ in range(200):
        for rows in torch.randperm(len(data), generator=draw).view(each, 4):
            before, weight.grad = weight.detach().clone(), data[rows].mean(0) - 0.3
            optimizer.step()
            forces.append(-weight.grad)
            updates.append(weight.detach() - before)
    f, u = torch.stack(forces), torch.stack(updates)
    work, anti = (f * u).sum(1), torch.cat([(f[1:] * u[:-1]).sum(1), torch.zeros(1, dtype=f.dtype)])
    stratonovich = (anti + torch.cat([work[:-1], torch.zeros(1, dtype=f.dtype)])) / 2
    sums = {"work_ito": work, "work_anti_ito": anti, "work_stratonovich": stratonovich, "loss_drop": -(u @ mean)}
    at = np.arange(each, len(u) + 1, each)
    found = {key: column.cumsum(0).numpy()[at - 1] for key, column in sums.items()}
    found |= {"step": at, "loss_drop_se": np.zeros(len(at))}
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in optimizer.defaults.items() if k != "foreach"}
    run = {"optimizers": [{"class": name, "groups": [settings]}], "batch_size": 4}
    tuning = Tuning(found, run | {"samples_without_replacement": len(data)})
    truth = float(((f + mean) * u).sum() / work.sum())
    assert abs(tuning.noise_share.value - truth) < 4 * tuning.noise_share.standard_error
    assert math.isnan(tuning.step_headroom.value), "there is no curvature to be told"
    plain = Tuning(found, run).noise_share
    assert abs(plain.value - truth) > 4 * plain.standard_error, "taken for independent"
