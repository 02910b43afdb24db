"""The experiment on the plane of samples and action against plain torch, and its page against its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from findings_cases import read_rows, scripts
from shown_again import shown_again
from trained_by_hand import ByHand

NAME = "frontier"
OPTIMIZERS = ("SGD", "momentum", "Nesterov", "RMSprop", "Adam", "AdamW")
Row = dict[str, Any]
Parts = dict[str, list[Row]]


@pytest.fixture(scope="module")
def frontier() -> Iterator[SimpleNamespace]:
    with scripts("frontier_shown") as found:
        yield found.frontier_shown


def test_a_run_by_hand(output: Path, quick: Parts) -> None:
    """Nesterov: v ← 0.9 v + g, u = −lr (g + 0.9 v), until the mean of five looks is at the level."""
    (level,) = quick["levels"]
    row = next(r for r in quick["grid"] if r["name"] == "Nesterov" and r["batch"] == 16 and r["samples"] is not None)
    run, v, moved, action, path = ByHand(output, row["seed"]), 0.0, 0.0, 0.0, 0.0
    looks, every = [run.held_loss()], row["steps"] // (row["steps"] // 16)
    for step in range(1, row["steps"] + 1):
        g = run.gradient()
        v = 0.9 * v + g
        u = -row["rate"] * (g + 0.9 * v)
        run.move(u)
        moved, action, path = moved + u, action + float(u @ u), path + float(u.norm())
        if step % every == 0:
            looks.append(run.held_loss())
            if len(looks) >= 5 and np.mean(looks[-5:]) <= level["level"]:
                break
    assert (row["steps_taken"], row["samples"]) == (step, 16 * step)
    assert row["action"] == pytest.approx(action, rel=1e-4)
    squared = float(torch.as_tensor(moved).square().sum())
    assert row["displacement"] == pytest.approx(math.sqrt(squared), rel=1e-4)
    assert row["kinematic_efficiency"] == pytest.approx(squared / (step * action), rel=1e-4)
    assert row["straightness"] == pytest.approx(squared / path**2, rel=1e-4)


def test_samples_and_action_are_bought_by_more_than_the_distance(parts: Parts) -> None:
    """τ·A ≥ D² of each run; and what is not come to is not measured."""
    for row in [row for part in ("grid", "corners", "far") for row in parts[part]]:
        if row["samples"] is None:
            assert row["action"] is None
            continue
        assert row["samples"] == row["batch"] * row["steps_taken"]
        bought = row["steps_taken"] * row["action"]
        assert bought >= row["displacement"] ** 2
        assert row["kinematic_efficiency"] == pytest.approx(row["displacement"] ** 2 / bought, rel=1e-4)
        assert row["product"] == pytest.approx(row["samples"] * row["action"], rel=1e-4)


def test_corners_are_the_best_of_the_grid(parts: Parts) -> None:
    """On other seeds than the grid's."""
    for task in dict.fromkeys((row["data"], row["net"]) for row in parts["grid"]):
        for name in OPTIMIZERS:
            own = [r for r in parts["grid"] if (r["data"], r["net"]) == task and r["name"] == name]
            reached = [row for row in own if row["samples"] is not None]
            wanted = {
                (best["rate"], best["batch"])
                for what in ("samples", "action", "product")
                for best in [min(reached, key=lambda row, what=what: row[what])]
            }
            corners = [r for r in parts["corners"] if (r["data"], r["net"]) == task and r["name"] == name]
            assert {(row["rate"], row["batch"]) for row in corners} == wanted
            assert not {row["seed"] for row in corners} & {row["seed"] for row in own}


# --- the law


def corner(frontier: SimpleNamespace, name: str, samples: float, action: float, squared: float = 1.0) -> Any:
    values = {"samples": samples, "action": action, "bought": 10 * action, "kinematic_efficiency": 0.3}
    means = {what: frontier.Mean(value, 0.0, 5) for what, value in values.items()}
    return frontier.Corner("task", name, 0.1, 16, 5, 5, means)


def test_the_law_of_those_that_none_beats(frontier: SimpleNamespace) -> None:
    """action = 100/samples² of three corners; one above it is beaten and not fitted."""
    front = [corner(frontier, "Adam", s, 100 / s**2) for s in (1.0, 2.0, 10.0)]
    beaten = corner(frontier, "SGD", 2.0, 75.0)
    assert frontier.unbeaten([*front, beaten]) == front
    law = frontier.law(front)
    assert (law.p, law.factor, law.scatter) == (pytest.approx(2), pytest.approx(100), pytest.approx(1))
    assert beaten["action"] / law.action(beaten["samples"]) == pytest.approx(3)
    assert math.isnan(frontier.law(front[:1]).p)


def test_a_corner_that_most_seeds_do_not_come_to_is_none(frontier: SimpleNamespace) -> None:
    known = {"data": "d", "net": "n", "name": "SGD", "rate": 0.1, "batch": 16, "samples": 160, "steps_taken": 10}
    known |= dict.fromkeys(frontier.MEASURED, 1.0) | {"product": 160.0}
    lost = known | dict.fromkeys([*frontier.MEASURED, "samples", "steps_taken", "product"])
    (found,) = frontier.gathered([known, known, lost])
    assert (found.came, found.of, found["samples"], found["bought"]) == (2, 3, 160, 10)
    assert frontier.gathered([known, lost, lost]) == []


# --- the committed numbers


def test_the_page_has_the_tables_of_the_numbers(full: Parts, tmp_path: Path) -> None:
    """Nothing is trained: all rows are there."""
    shown_again("frontier", tmp_path, tables=4)
    assert read_rows(tmp_path / "out" / "frontier.json") == full


def test_within_a_factor_of_two_is_above_and_below(frontier: SimpleNamespace, full: Parts) -> None:
    """By hand from the rows' law: an optimizer far below it is not near."""
    planes = frontier.planes(full["grid"], full["corners"])
    near = {(p.task, name): found for p in planes for name, found in zip(p.over, p.near, strict=True)}
    found = {name for (task, name), inside in near.items() if inside and task == "fashion-mnist MLP"}
    assert found == {"momentum", "Nesterov"}
    (mlp, _) = planes
    assert not near[mlp.task, "Adam"]
    assert mlp.over["Adam"] < 0.5


def test_five_seeds_for_what_is_compared(full: Parts) -> None:
    for part in ("corners", "far"):
        groups = dict[tuple[Any, ...], set[int]]()
        for row in full[part]:
            groups.setdefault(tuple(row[k] for k in ("data", "net", "name", "rate", "batch")), set()).add(row["seed"])
        assert all(seeds == {1, 2, 3, 4, 5} for seeds in groups.values())
