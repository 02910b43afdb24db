"""The critical batch size through a run, and batches that follow it, against plain torch; the page and its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from findings_cases import DOCS, read_rows, scripts
from torch.nn.functional import cross_entropy

NAME = "noise_and_batch"
STRETCHES = (0, 30), (30, 60)


@pytest.fixture(scope="module")
def used() -> Iterator[SimpleNamespace]:
    with scripts("sets", "trainings", "noise_and_batch_runs", "noise_and_batch_shown") as found:
        yield SimpleNamespace(**vars(found), runs=found.noise_and_batch_runs, shown=found.noise_and_batch_shown)


@pytest.fixture(scope="module")
def pictures(used: SimpleNamespace, output: Path) -> Any:
    return used.sets.load("fashion-mnist", output / "data", 500)


# --- the law


def by_hand(data: Any, steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Plain SGD: θ around each step, −gradient of each batch, and the loss of all 500 pictures around each step."""
    torch.manual_seed(0)
    layers = (
        torch.nn.Linear(784, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )
    network = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    weights, draw = list(network.parameters()), torch.Generator().manual_seed(1000)

    def flat(parts: Any) -> torch.Tensor:
        return torch.cat([part.detach().flatten() for part in parts]).double()

    places, forces, losses = [flat(weights)], [], []
    for _ in range(steps):
        losses.append(cross_entropy(network(data.inputs), data.targets).item())
        index = torch.randint(500, (32,), generator=draw)
        gradient = torch.autograd.grad(cross_entropy(network(data.inputs[index]), data.targets[index]), weights)
        forces.append(-flat(gradient))
        with torch.no_grad():
            for w, g in zip(weights, gradient, strict=True):
                w -= 0.1 * g
        places.append(flat(weights))
    losses.append(cross_entropy(network(data.inputs), data.targets).item())
    return places, forces, losses


def test_noise_over_signal_is_that_of_plain_torch(output: Path, pictures: Any) -> None:
    """B·N/S, N = W − S, S = 2d − a; the first stretch, as the last step of a meter has not met its next gradient."""
    (row,) = (
        row for row in read_rows(output / "noise_and_batch.json")["law"]
        if (row["optimizer"], row["rate"], row["batch"]) == ("SGD", 0.1, 32)
    )  # fmt: skip
    places, forces, losses = by_hand(pictures, 60)
    for stretch, (begin, end) in enumerate(STRETCHES):
        updates = [places[k + 1] - places[k] for k in range(begin, end)]
        work = sum(float(forces[begin + i] @ u) for i, u in enumerate(updates))
        # A row knows Σ f_{k+1}·u_k of the steps before its last one, and completes it in proportion to the work.
        known = range(max(begin - 1, 0), end - 1)
        met = sum(float(forces[k] @ (places[k + 1] - places[k])) for k in known)
        signal = sum(float(forces[k + 1] @ (places[k + 1] - places[k])) for k in known) * work / met
        slope = 2 * (losses[begin] - losses[end]) - signal
        # float32 losses, of which differences are taken
        assert row[f"told_{stretch}"] == pytest.approx(32 * (work - slope) / slope, rel=2e-3)


@pytest.mark.parametrize("all_of_it", [True, False])
def test_moments_are_those_of_one_gradient_after_the_other(
    used: SimpleNamespace, pictures: Any, monkeypatch: pytest.MonkeyPatch, all_of_it: bool
) -> None:
    """Exact where all samples are taken; without bias where some are."""
    few = used.sets.Set(
        "few", pictures.inputs[:24], pictures.targets[:24], *(pictures.inputs[:1], pictures.targets[:1])
    )
    run = used.trainings.Run(
        used.trainings.Training("fashion-mnist", "MLP", "SGD", 0.1, 8, 4, 0, net_options={"width": 6}),
        few,
        measured=False,
    )
    parameters = list(run.network.parameters())
    each = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(run.loss(torch.tensor([i])), parameters)]).double()
        for i in range(24)
    ])  # fmt: skip
    force = float(each.mean(0).square().sum())
    scatter = float(each.square().sum() / 24) - force
    draw = torch.Generator().manual_seed(0)
    if all_of_it:
        assert used.runs.gradient_moments(run, draw) == pytest.approx((scatter, force), rel=1e-4)
        return
    monkeypatch.setattr(used.runs, "MEAN_OF", 8)
    found = np.array([used.runs.gradient_moments(run, draw) for _ in range(400)])
    errors = found.std(0, ddof=1) / 20
    assert np.all(np.abs(found.mean(0) - [scatter, force]) < 4 * errors)  # four standard errors, fixed seed
    assert errors[1] < 0.1 * force, "else the comparison says nothing"


def test_the_error_of_a_ratio_is_that_of_repeating_it(used: SimpleNamespace) -> None:
    draw = np.random.default_rng(0)
    found = []
    for _ in range(1000):
        y = 1 + 0.5 * draw.uniform(-1, 1, 30)
        found.append(used.runs.ratio_of_means(list(zip(3 * y + draw.normal(size=30), y, strict=True))))
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(3, abs=0.03)
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)  # the spread of 1,000 is known to 2 %


def test_overlaps_are_those_of_plain_torch(used: SimpleNamespace, pictures: Any) -> None:
    """Plain SGD of one layer, so that θ_k can be written out."""
    training = used.trainings.Training(
        "fashion-mnist", "MLP", "SGD", 0.05, 16, 12, 3, net_options={"width": 6, "depth": 1}
    )
    found = used.runs.measured_overlap(training, pictures, 12)
    run = used.trainings.Run(training, pictures, measured=False)
    weights, draw = list(run.network.parameters()), torch.Generator().manual_seed(1003)
    forces, own = [], []
    for _ in range(13):
        forces.append([g.clone() for g in torch.autograd.grad(run.loss(torch.arange(500)), weights)])
        index = torch.randint(500, (16,), generator=draw)
        own.append(torch.autograd.grad(run.loss(index), weights))
        with torch.no_grad():
            for w, g in zip(weights, own[-1], strict=True):
                w -= 0.05 * g

    def product(one: Any, other: Any) -> float:
        return sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))

    squares = sum(product(forces[k], forces[k]) for k in (4, 8, 12))
    for name, before in (("full", forces), ("own", own)):
        assert found[name] == pytest.approx(
            sum(product(forces[k], before[k - 1]) for k in (4, 8, 12)) / squares,
            rel=3e-4,  # float32 gradients in other orders of 500 pictures: 1.1e-4 on a processor with AVX-512
        )


# --- schedules


def fed(used: SimpleNamespace, pictures: Any, policy: str) -> Any:
    training = used.trainings.Training("fashion-mnist", "MLP", "Adam", 1e-3, 16, 60, 0, net_options={"width": 8})
    run = used.runs.Fed(training, pictures, policy)
    run.to(-math.inf, 1000.0)
    return run


@pytest.mark.parametrize("policy", ["24", "blind", "root", "share"])
def test_the_batch_follows_its_policy(used: SimpleNamespace, pictures: Any, policy: str) -> None:
    run = fed(used, pictures, policy)
    sizes, ends = np.diff(run.samples)[:60], [16, 24, 36, 54]
    assert math.sqrt((len(run.samples) - 1) * run.samples[-1]) >= 1000, "that is where it stops"
    assert len(sizes) == 60
    stretches = [set(part.tolist()) for part in np.split(sizes, ends)]
    assert all(len(sizes_of_one) == 1 for sizes_of_one in stretches), "a batch changes at the end of a stretch only"
    found = [sizes_of_one.pop() for sizes_of_one in stretches]
    if policy == "24":
        assert found == [24] * 5
    elif policy == "blind":
        assert found == [16, 8, 12, 18, 27]
    else:
        wanted, last = [16], 16
        for critical in run.critical[1:]:
            rule = math.sqrt(64 * critical) if policy == "root" else critical / 2
            last = last if math.isnan(critical) else min(1024, max(8, round(rule)))
            wanted.append(last)
        assert found == wanted[:5]
        assert any(map(math.isfinite, run.critical[:5])), "else nothing was followed"


def test_the_excess_is_read_off_the_line_between_constant_batches(used: SimpleNamespace) -> None:
    def place(steps: float, samples: float) -> dict[str, float]:
        return {"steps_to": steps, "samples_to": samples}

    constant = [place(400, 1600), place(100, 6400)]
    assert used.shown.excess(place(200, 3200), constant) == pytest.approx(1, rel=1e-2)  # upon it, in the middle
    assert used.shown.excess(place(100, 1600), constant) == pytest.approx(2, rel=1e-2)  # half of both
    assert used.shown.excess(place(400, 6400), constant) == pytest.approx(0.5, rel=1e-2)
    # steps · samples = 640,000 on the line: x = s/200 = 640,000/(1600 s) at s = 283
    assert used.shown.excess(place(200, 1600), constant) == pytest.approx(math.sqrt(2), rel=2e-2)
    assert used.shown.excess(place(50, 6400), constant) == pytest.approx(2)  # no further than the largest batch
    assert math.isnan(used.shown.excess({"steps_to": None, "samples_to": None}, constant))


def test_what_theory_allows(used: SimpleNamespace) -> None:
    """Nothing where B_c stays; of two stretches, γ by hand."""
    row = {"policy": "root", "critical": [None, 100.0, 100.0, 100.0]}
    assert used.shown.promised(row) == pytest.approx(1)
    row = {"policy": "root", "critical": [None, 16.0, 1600.0]}
    first, second = 16 / (1 + 16 / 16), 8 / (1 + 1600 / 32)  # batch 16, then √(64 · 16) = 32
    gamma = (4 * first + 40 * second) ** 2 / ((first + second) * (16 * first + 1600 * second))
    assert used.shown.promised(row) == pytest.approx(2 / (1 + math.sqrt(gamma)))


# --- the page


@pytest.mark.parametrize("which", ["quick", "full"])
def test_no_run_is_missing(which: str, request: pytest.FixtureRequest) -> None:
    rows = request.getfixturevalue(which)
    if which == "quick":
        assert (len(rows["law"]), len(rows["schedules"])) == (5, 5)
        return
    for part, names in (
        ("law", ("data", "net", "optimizer", "rate", "batch")),
        ("schedules", ("data", "net", "policy")),
    ):
        seeds: dict[Any, list[int]] = {}
        for row in rows[part]:
            seeds.setdefault(tuple(row[name] for name in names), []).append(row["seed"])
        assert all(found == [0, 1, 2, 3, 4] for found in seeds.values())


def test_the_page_has_the_tables_of_the_numbers(used: SimpleNamespace) -> None:
    rows, page = read_rows(DOCS / "noise_and_batch.json"), (DOCS / "noise_and_batch.md").read_text("utf-8")
    law, planes = used.shown.law_cells(rows["law"]), used.shown.schedule_cells(rows["schedules"])
    tables = used.shown.law_table(law), used.shown.stretch_table(law), used.shown.overlap_table(rows["overlap"])
    for table in (used.shown.verdicts(law, planes), *tables, used.shown.schedule_table(planes)):
        assert table in page
    seconds = math.fsum(row["seconds"] for part in rows.values() for row in part)
    assert f"{seconds:,.0f} processor seconds" in page
