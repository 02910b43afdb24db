"""W₂ between groups of replicas, against the best of all pairings tried one by one."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison_cases import decay, description, straight

from lightning_speedlimit import RunRecord, compare
from lightning_speedlimit.record import SKETCH_SIZE
from lightning_speedlimit.report import runs as runs_module


def sketch(place: Any) -> np.ndarray:
    """A displacement with these first coordinates."""
    found = np.zeros(SKETCH_SIZE, dtype=np.float32)
    found[: len(place)] = place
    return found


def run(place: Any, **settings: Any) -> RunRecord:
    """A run that moves straight to a place, which it reaches at step 100; a sketch at every tenth step."""
    record = RunRecord(description(**settings))
    for k in range(10, 101, 10):
        row = {"elapsed": float(k), "action": 0.01 * k, "loss": decay(50)(k), "loss_drop": 1 - decay(50)(k)}
        record.append(k, {**row, "loss_se": 0.0})
        record.add_sketch(k, sketch(np.asarray(place) * k / 100))
    return record


def brute_force(x: np.ndarray, y: np.ndarray) -> float:
    """W₂² = min over permutations of mean |x_i − y_π(i)|²."""
    return min(
        float(np.mean([np.sum((x[i] - y[j]) ** 2) for i, j in enumerate(pairing)]))
        for pairing in itertools.permutations(range(len(y)))
    )


@pytest.mark.parametrize("count", [3, 4])
def test_distances_are_those_of_the_best_pairing(count: int) -> None:
    generator = np.random.default_rng(count)
    x, y = generator.normal(0, 1, (count, 5)), generator.normal(0.5, 1, (count, 5))
    found = compare({"x": [run(place) for place in x], "y": [run(place) for place in y]}, at=math.exp(-2))
    (distance,) = found.distances
    assert (distance.first, distance.second) == ("x", "y")
    truth = math.sqrt(brute_force(x, y))
    single = 1e-6  # sketches are float32
    assert distance.wasserstein2 == pytest.approx(truth, rel=single)
    assert distance.lower <= truth * (1 + single)
    assert distance.lower == pytest.approx(truth, rel=1e-3), "so small a cloud is solved exactly"
    pairs = [np.sum((a - b) ** 2) for cloud in (x, y) for a, b in itertools.combinations(cloud, 2)]
    assert distance.within == pytest.approx(math.sqrt(np.mean(pairs)), rel=single)


def test_groups_of_other_sizes() -> None:
    """Two against one copied place each: the mean over all, for every pairing is alike."""
    x, y = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 2.0]]
    (distance,) = compare({"x": [run(p) for p in x], "y": [run(p) for p in y]}, at=math.exp(-2)).distances
    assert distance.wasserstein2 == pytest.approx(math.sqrt(5), rel=1e-6)
    assert distance.within == 0


def test_sketches_nearest_to_where_the_runs_are_compared() -> None:
    groups = {"x": [run([4.0]), run([4.0])], "y": [run([0.0, 3.0]), run([0.0, 3.0])]}
    for step, nearest in ((100, 100), (57, 60), (53, 50), (3, 10)):
        (distance,) = compare(groups, by="step", at=step).distances
        assert distance.wasserstein2 == pytest.approx(5 * nearest / 100, rel=1e-6), step


def test_groups_that_have_none() -> None:
    pair = [run([1.0]), run([2.0])]
    bare = [straight(range(10, 101, 10), decay(time)) for time in (48, 50)]
    at = decay(50)(100) + 1e-9
    assert compare({"x": pair, "y": run([3.0])}, at=at).distances == (), "a single run is no cloud"
    assert compare({"x": pair, "y": bare}, at=0.2).distances == (), "no sketches"
    half = [run([1.0]), bare[1]]
    assert compare({"x": pair, "y": half}, at=0.2).distances == (), "no sketches of one of them"
    short = [run([1.0]), run([2.0])]
    assert compare({"x": pair, "y": short}, at=0.01).distances == (), "nobody was there"
    found = compare({"x": pair, "y": short, "z": bare}, at=0.2).distances
    assert [(d.first, d.second) for d in found] == [("x", "y")], "the others are compared all the same"


def test_of_many_groups_there_are_none() -> None:
    groups = {f"g{i}": [run([float(i)]), run([float(i)])] for i in range(13)}
    twelve = compare(dict(list(groups.items())[:12]), by="step").distances
    assert len(twelve) == 66
    assert compare(groups, by="step").distances == ()


def test_sketches_that_were_left_out_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in (("x_seed0", [1.0]), ("x_seed1", [1.0]), ("y_seed0", [3.0]), ("y_seed1", [3.0])):
        run(place).save(tmp_path / name)
    monkeypatch.setattr(runs_module, "KEEP_SKETCHES", 1)
    found = compare(tmp_path, by="step")
    assert all(not len(point.run.record.sketch_steps) for group in found.groups for point in group.points)
    assert found.distances[0].wasserstein2 == pytest.approx(2, rel=1e-6)
