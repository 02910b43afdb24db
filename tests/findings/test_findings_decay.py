"""The experiment on decay against plain torch and a quadratic that is known, and its page against its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from findings_cases import SCRIPTS, read_rows, scripts
from shown_again import shown_again
from trained_by_hand import ByHand

NAME = "decay"
SCRIPT = SCRIPTS / "decay.py"
PACES = ("constant", "linear", "cosine", "constant speed", "falling speed")
Row = dict[str, Any]
Parts = dict[str, list[Row]]


@pytest.fixture(scope="module")
def decay() -> Iterator[SimpleNamespace]:
    """The names of its modules."""
    with scripts("decay_runs", "decay_shown") as found:
        yield SimpleNamespace(**vars(found.decay_shown) | vars(found.decay_runs))


# --- runs by hand


def test_constant_speed_by_hand(output: Path, quick: Parts) -> None:
    """Normalized gradient descent: its end, D²/(K·A) with A = K·length², and its action over the steps."""
    row = next(r for r in quick["schedules"] if r["pace"] == "constant speed" and r["optimizer"] == "SGD")
    run, moved, looks = ByHand(output, row["seed"]), torch.zeros(1, dtype=torch.float64), []
    for step in range(1, row["steps"] + 1):
        g = run.gradient()
        update = -row["rate"] * g / g.norm()
        run.move(update)
        moved = moved + update
        if step % (row["steps"] // 50 or 1) == 0:
            looks.append(run.held_loss())
    assert row["end"] == pytest.approx(np.mean(looks[-5:]), rel=1e-4)
    action = row["steps"] * row["rate"] ** 2
    assert row["action"] == pytest.approx(action, rel=1e-4)
    assert row["kinematic_efficiency"] == pytest.approx(float(moved @ moved) / (row["steps"] * action), rel=1e-4)
    assert row["actions"][-1] == pytest.approx(row["action"], rel=1e-4)


def test_a_gain_by_hand(output: Path, quick: Parts) -> None:
    """Two runs with the same batches, one of them decayed; W, and d − a, of the stretch before."""
    row = next(r for r in quick["gains"] if r["optimizer"] == "SGD")
    tail, before = row["tail"], row["steps"] - row["tail"]
    every, ends, works = max(1, tail // 25), [], dict[int, float]()
    for decayed in (False, True):
        run, losses, work = ByHand(output, row["seed"]), [], 0.0
        for step in range(row["steps"]):
            g = run.gradient()
            rate = row["rate"] * min(1.0, 1.0 - (step - before) / tail if decayed else 1.0)
            run.move(-rate * g)
            work += rate * float(g @ g)
            works.setdefault(step + 1, work)
            if step + 1 > row["steps"] - tail // 5 and (step + 1) % every == 0:
                run.gradient(torch.arange(500))
                losses.append(run.loss.item())
        ends.append(losses[-1] if decayed else float(np.mean(losses)))
    assert row["gain"] == pytest.approx(ends[0] - ends[1], abs=2e-5)
    assert row["work"] == pytest.approx(works[before] - works[before - tail], rel=1e-4)
    # N = W + a − 2d and C = 2(d − a): W = N + C/2 + d.
    assert row["work"] == pytest.approx(row["noise"] + row["curvature"] / 2 + row["drop"], abs=1e-4)


# --- what it rests on


@pytest.mark.parametrize("name", ["SGD", "momentum", "Adam"])
def test_the_length_of_the_step_to_come(decay: SimpleNamespace, name: str) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(5, 3)
    make = {
        "SGD": lambda p: torch.optim.SGD(p, 0.3),
        "momentum": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9),
        "Adam": lambda p: torch.optim.Adam(p, 0.3, betas=(0.8, 0.95), eps=0.1),
    }
    optimizer = make[name](net.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.randn(7, 5)).square().sum().backward()
        before = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()
        told = decay.direction_length(optimizer)
        optimizer.step()
        moved = torch.nn.utils.parameters_to_vector(net.parameters()).detach() - before
        assert told == pytest.approx(float(moved.norm()) / 0.3, rel=1e-5)


def test_what_is_promised_on_a_quadratic(decay: SimpleNamespace) -> None:
    """L = ½ h x², SGD with noise σ on its gradient: 20,000 runs, whose W, N, C and d are means over them."""
    h, rate, sigma, before, tail, runs = 0.8, 0.25, 1.5, 60, 20, 20_000
    draw = np.random.default_rng(0)
    x, losses, work, confirmed, update = np.full(runs, 0.3), [], 0.0, 0.0, np.zeros(runs)
    for step in range(before + 1):
        g = h * x + sigma * draw.normal(size=runs)
        losses.append(float(np.mean(h * x * x)) / 2)
        if step > before - tail:
            confirmed -= float(np.mean(g * update))
        if step == before:
            break
        update = -rate * g
        if step >= before - tail:
            work += rate * float(np.mean(g * g))
        x = x + update
    drop = losses[before - tail] - losses[before]
    balance = decay.Balance(tail, work, drop, work + confirmed - 2 * drop, 2 * (drop - confirmed))
    told = decay.promised(balance, 0.0, before, tail)
    ends = []
    for decayed in (False, True):
        own = x
        for step in range(tail):
            s = 1.0 - step / tail if decayed else 1.0
            own = own - s * rate * (h * own + sigma * draw.normal(size=runs))
        ends.append(float(np.mean(h * own * own)) / 2)
    # Means of squares of normals: √(2/runs) = 1 % of each end, and W − 2d + a of a stretch as well.
    assert told.gain == pytest.approx(ends[0] - ends[1], rel=0.05)
    assert told.noise == pytest.approx(told.gain, rel=0.05)
    assert told.simple == pytest.approx(rate * sigma**2 / 4, rel=0.05)
    exact = rate * sigma**2 / (2 * (2 - rate * h))  # at rest
    assert losses[-1] == pytest.approx(exact, rel=0.04)


def test_what_the_flow_gives_up_is_taken_off(decay: SimpleNamespace) -> None:
    """Of a loss that falls by the same with each step; and nothing is promised where no noise is told."""
    tail, slope = 10, 0.01
    told = decay.promised(decay.Balance(100, 2.0, 100 * slope, 1.0, 0.1), 0.0, 300, tail)
    assert told.noise - told.gain == pytest.approx(slope * sum(step / tail for step in range(tail)))
    for noise, curvature in ((-1.0, 0.1), (1.0, -0.1)):
        assert math.isnan(decay.promised(decay.Balance(100, 2.0, 1.0, noise, curvature), 0.0, 300, tail).gain)


def test_equal_loss_is_the_worst_end(decay: SimpleNamespace) -> None:
    """Of two straight courses, 1 → 0.5 and 1 → 0, the second passes ½ in the middle, by a quarter of its action."""
    looks = np.linspace(0, 1, 51)
    courses = {"constant": 1 - looks / 2, "linear": 1 - looks}
    rows = [
        {
            "pace": pace,
            "seed": 0,
            "steps": 100,
            "end": float(np.mean(losses[-5:])),
            "losses": losses.tolist(),
            "actions": (looks[2::2] ** 2).tolist(),
        }
        for pace, losses in courses.items()
    ]
    slow, fast = decay.at_equal_loss(rows)
    # Windows of five looks: the slower course's last one is about step 96.
    assert (slow["passed"], fast["passed"]) == (pytest.approx(96), pytest.approx(48))
    assert fast["paid"] == pytest.approx(0.48**2)


# --- the rules


def settings(parts: Parts) -> Iterator[list[Row]]:
    keys = dict.fromkeys((row["data"], row["net"], row["optimizer"]) for row in parts["schedules"])
    for key in keys:
        yield [row for row in parts["schedules"] if (row["data"], row["net"], row["optimizer"]) == key]


def test_each_step_of_constant_speed_is_as_long(parts: Parts) -> None:
    for row in parts["schedules"]:
        if row["pace"] == "constant speed":
            assert row["steadiness"] == pytest.approx(1, abs=2e-5)
            assert row["action"] == pytest.approx(row["steps"] * row["rate"] ** 2, rel=1e-4)
        elif row["pace"] == "falling speed":
            steps = row["steps"]
            lengths = row["rate"] * (1 - np.arange(steps) / steps)
            assert row["action"] == pytest.approx(float(lengths @ lengths), rel=1e-4)


def test_all_schedules_have_the_same_steps_and_seeds(parts: Parts) -> None:
    for rows in settings(parts):
        seeds = {pace: [row["seed"] for row in rows if row["pace"] == pace] for pace in PACES}
        assert len({tuple(own) for own in seeds.values()}) == 1
        assert len({row["steps"] for row in rows}) == 1
        for pace in PACES:
            assert len({row["rate"] for row in rows if row["pace"] == pace}) == 1


# --- the committed numbers


def test_each_peak_is_the_best_of_factors_of_two(full: Parts) -> None:
    """On a seed that no statement is made of; both neighbours are worse."""
    for rows in settings(full):
        for pace in PACES:
            rate = next(row["rate"] for row in rows if row["pace"] == pace)
            key = {name: rows[0][name] for name in ("data", "net", "optimizer")} | {"pace": pace, "seed": 100}
            found = {r["rate"]: r["end"] or math.inf for r in full["search"] if key.items() <= r.items()}
            assert min(found, key=found.__getitem__) == rate
            for neighbour in (rate / 2, rate * 2):
                assert any(other == pytest.approx(neighbour, rel=1e-4) for other in found)  # six digits
        assert {row["seed"] for row in rows} == {0, 1, 2, 3, 4}


def test_the_page_has_the_tables_of_the_numbers(full: Parts, tmp_path: Path) -> None:
    """Nothing is trained: all rows are there."""
    shown_again("decay", tmp_path, tables=4)
    assert read_rows(tmp_path / "out" / "decay.json") == full
