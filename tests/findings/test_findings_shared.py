"""What the findings' scripts share, against plain numpy, plain torch and scipy."""

from __future__ import annotations

import argparse
import math
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from findings_cases import ROOT, scripts
from in_this_process import run_here
from scipy import stats
from torch.nn.functional import cross_entropy


@pytest.fixture(scope="module")
def shared() -> Iterator[SimpleNamespace]:
    with scripts("sets", "nets", "trainings") as found:
        yield found


@pytest.fixture(scope="module")
def data(shared: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    shared.sets.synthesize(folder)
    return folder


def some(shared: SimpleNamespace, **changed: Any) -> Any:
    plain = {"data": "mnist", "net": "MLP", "optimizer": "momentum", "rate": 0.05, "batch": 16, "steps": 12, "seed": 3}
    return shared.trainings.Training(**(plain | {"net_options": {"width": 8, "depth": 1}} | changed))


# --- sets


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion-mnist"])
def test_pictures_are_the_published_bytes(shared: SimpleNamespace, data: Path, name: str) -> None:
    found = shared.sets.load(name, data, 300, held=50)
    if name == "cifar10":
        files = [np.fromfile(data / name / f"data_batch_{k}.bin", np.uint8).reshape(-1, 3073) for k in range(1, 6)]
        whole = np.concatenate(files)
        pixels, kinds = whole[:, 1:].reshape(-1, 3, 32, 32), whole[:, 0]
    else:
        pixels = np.fromfile(data / name / "train-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 1, 28, 28)
        kinds = np.fromfile(data / name / "train-labels-idx1-ubyte", np.uint8)[8:]
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(0)).numpy()[:300]
    chosen = pixels[order].astype(np.float64)
    wanted = (chosen - chosen.mean()) / chosen.std(ddof=1)
    # float32 sums of a million numbers: 1e-6 of their size, some units of contrast at most.
    np.testing.assert_allclose(found.inputs.numpy(), wanted, atol=2e-5)
    assert found.targets.tolist() == kinds[order].tolist()
    assert found.held_inputs.shape[0] == 50


def test_the_sets_that_are_made_up_can_be_learnt_but_not_at_once(shared: SimpleNamespace, data: Path) -> None:
    """Neither chance nor 0: the nearest class mean is right in more than a third and less than all of the pictures."""
    for name in ("cifar10", "mnist", "fashion-mnist"):
        found = shared.sets.load(name, data)
        means = torch.stack([found.inputs[found.targets == k].mean(0) for k in range(10)]).flatten(1)
        nearest = torch.cdist(found.held_inputs.flatten(1), means).argmin(1)
        right = (nearest == found.held_targets).float().mean().item()
        assert 0.33 < right < 0.999, name


def test_both_texts_share_no_window(shared: SimpleNamespace, data: Path) -> None:
    one, other = (shared.sets.load(name, data, 500) for name in ("text", "other text"))
    assert one.inputs.shape == other.inputs.shape == (500, 16)
    assert torch.equal(one.inputs[:, 1:], one.targets[:, :-1])
    assert not torch.equal(one.inputs, other.inputs)


# --- trainings


def by_hand(shared: SimpleNamespace, training: Any, data: Any, order: int) -> tuple[torch.Tensor, list[float]]:
    """Heavy ball on batches drawn with replacement, written out."""
    torch.manual_seed(training.seed)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    weights = list(network.parameters())
    speeds = [torch.zeros_like(w) for w in weights]
    draw, losses = torch.Generator().manual_seed(1000 + order), []
    for step in range(training.steps):
        index = torch.randint(len(data.inputs), (training.batch,), generator=draw)
        loss = cross_entropy(network(data.inputs[index]), data.targets[index])
        losses.append(loss.item())
        rate = training.rate * min(1, (step + 1) / (0.25 * training.steps)) * (1 - step / training.steps)
        with torch.no_grad():
            for w, v, g in zip(weights, speeds, torch.autograd.grad(loss, weights), strict=True):
                v.mul_(0.9).add_(g + 1e-3 * w)
                w -= rate * v
    return torch.cat([w.detach().flatten() for w in weights]).double(), losses


@pytest.mark.parametrize("order", [None, 7])
def test_a_run_is_that_of_plain_torch(shared: SimpleNamespace, data: Path, order: int | None) -> None:
    pictures = shared.sets.load("mnist", data, 200)
    training = some(shared, schedule="linear", warm_up=0.25, decay=1e-3)
    run = shared.trainings.Run(training, pictures, order=order)
    losses = [run.advance() for _ in range(training.steps)]
    weights, wanted = by_hand(shared, training, pictures, training.seed if order is None else order)
    # The same float32 operations but for the order of two additions in a step.
    torch.testing.assert_close(shared.trainings.flat(run.network), weights, rtol=1e-5, atol=1e-6)
    assert losses == pytest.approx(wanted, rel=1e-5)


def test_an_epoch_shows_each_picture_once(shared: SimpleNamespace, data: Path) -> None:
    run = shared.trainings.Run(some(shared, epochs=True, batch=50), shared.sets.load("mnist", data, 200))
    seen = torch.cat([next(run._batches) for _ in range(4)])
    assert sorted(seen.tolist()) == list(range(200))
    assert run.record.run["batches_per_epoch"] == 4


def test_measuring_changes_nothing(shared: SimpleNamespace, data: Path) -> None:
    pictures = shared.sets.load("mnist", data, 200)
    ends = [
        shared.trainings.flat(shared.trainings.Run(some(shared), pictures, measured=measured).go().network)
        for measured in (True, False)
    ]
    assert torch.equal(*ends)


def test_a_level_is_reached_by_the_mean_of_five_looks(shared: SimpleNamespace, data: Path) -> None:
    """Not by fewer, which the smoothed loss does not have: one look a step, and a level that all of them are below."""
    run = shared.trainings.Run(some(shared), shared.sets.load("mnist", data, 200)).go(looks=12, level=10.0)
    assert (run.step, run.course.passed(10.0)) == (4, 2.0)


def test_a_key_names_what_is_not_usual(shared: SimpleNamespace) -> None:
    plain = some(shared, net_options={})
    assert set(plain.key) == {"data", "net", "optimizer", "rate", "batch", "steps", "seed"}
    assert some(shared, net_options={}, warm_up=0.1).key == plain.key | {"warm_up": 0.1}


# --- rows and statistics


def lab(shared: SimpleNamespace, folder: Path) -> Any:
    return shared.lab.Lab("some", shared.lab.Options(True, folder, folder, argparse.Namespace()))


def test_rows_are_computed_once(shared: SimpleNamespace, tmp_path: Path) -> None:
    asked: list[int] = []

    def compute(key: Any) -> dict[str, float]:
        asked.append(key["seed"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"value": key["seed"] / 3, "unknown": math.nan}

    keys = [{"seed": seed, "net_options": {"width": 4}} for seed in range(3)]
    with pytest.raises(KeyboardInterrupt):
        lab(shared, tmp_path).rows("runs", keys, compute)
    found = lab(shared, tmp_path).rows("runs", keys, compute)
    assert asked == [0, 1, 1, 2]
    assert [(row["value"], row["unknown"]) for row in found] == [(0.0, None), (0.333333, None), (0.666667, None)]
    assert lab(shared, tmp_path).seconds == pytest.approx(sum(row["seconds"] for row in found))


def test_a_row_of_an_unusual_training_is_not_that_of_the_usual_one(shared: SimpleNamespace, tmp_path: Path) -> None:
    keys = [some(shared, warm_up=0.1).key, some(shared).key]
    rows = lab(shared, tmp_path).rows("runs", keys, lambda key: {"value": key.get("warm_up", 0.0)})
    assert [row["value"] for row in rows] == [0.1, 0.0]


def test_rows_hold_what_they_hold_in_the_file(shared: SimpleNamespace, tmp_path: Path) -> None:
    """Tensors and nested values too, so that a run that goes on has the numbers of one that did not stop."""
    values = {"powers": {"a": 1 / 3, "b": math.nan}, "curve": torch.tensor([[2 / 3], [math.inf]], dtype=torch.float64)}
    keys = [{"set": name, "seed": seed} for name in ("one", "other") for seed in (0, 1)]
    found = lab(shared, tmp_path).rows("runs", keys, lambda key: values)
    assert (found[0]["powers"], found[0]["curve"]) == ({"a": 0.333333, "b": None}, [[0.666667], [None]])
    again = lab(shared, tmp_path)
    assert again.of("runs") == found
    assert again.of("runs", set="other", seed=1) == found[3:]
    assert again.of("runs", seed=2) == again.of("kernels") == []


def test_mean_is_that_of_scipy(shared: SimpleNamespace) -> None:
    values = [1.0, 2.0, 4.0, None, math.nan, 4.5]
    found, known = shared.lab.mean_of(values), [1.0, 2.0, 4.0, 4.5]
    wanted = stats.t.interval(0.95, 3, loc=np.mean(known), scale=stats.sem(known))
    assert (found.value, found.error, found.count) == pytest.approx((np.mean(known), stats.sem(known), 4))
    assert found.interval() == pytest.approx(wanted)
    assert math.isnan(shared.lab.mean_of([2.0]).error)
    assert shared.lab.mean_of([None]).count == 0


@pytest.mark.parametrize("arguments", [[], ["--data", ""]])
def test_no_folder_of_data_is_an_error_that_names_the_cure(
    shared: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["some.py", *arguments])
    with pytest.raises(SystemExit):
        shared.lab.begin("Something.")
    assert "wanted --data" in capsys.readouterr().err


# --- how these tests are run


def test_what_a_script_changes_in_its_neighbours_does_not_stay(tmp_path: Path) -> None:
    """Modules of the script's own folder and of the other examples: the next script would find them changed."""
    folders = [tmp_path / "examples" / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[1] / "lent_to_scripts.py").write_text("KNOWN = []\n")
    (folders[0] / "script.py").write_text(
        f"import sys; sys.path.append({str(folders[1])!r}); import lent_to_scripts as lent\n"
        "lent.KNOWN.append(1); print(len(lent.KNOWN))\n"
    )
    script = str(folders[0] / "script.py")
    said = [run_here(lambda: runpy.run_path(script), [script], tmp_path).stdout for _ in range(2)]
    assert said == ["1\n", "1\n"]


def test_experiments_with_slow_tests_are_there() -> None:
    """A file that is renamed would bring its shortened run back among the fast tests."""
    tests = ROOT / "tests"
    names = runpy.run_path(str(tests / "conftest.py"))["LONG"]
    assert names == {name for name in names if list(tests.glob(f"*/test_{name}.py"))}
