"""Who needs warm-up, and what the first twentieth of a run says of it, against plain torch; the page by its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from findings_cases import DOCS, read_rows, scripts
from torch.nn.functional import cross_entropy

NAME = "warm_up"


@pytest.fixture(scope="module")
def used() -> Iterator[SimpleNamespace]:
    with scripts("sets", "trainings", "warm_up_runs", "warm_up_shown") as found:
        yield SimpleNamespace(**vars(found), runs=found.warm_up_runs, shown=found.warm_up_shown)


# --- a run by hand


def train_by_hand(data: Any, rate: float, warm: float) -> dict[str, float]:
    """Adam, 40 steps; W, a and d of the first four, and the held-out loss at the end."""
    torch.manual_seed(1)
    layers = (
        torch.nn.Linear(784, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )
    network = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    weights, draw = list(network.parameters()), torch.Generator().manual_seed(1001)
    optimizer = torch.optim.Adam(weights, rate)

    def flat(parts: Any) -> torch.Tensor:
        return torch.cat([part.detach().flatten() for part in parts]).double()

    @torch.no_grad()
    def loss() -> float:
        return cross_entropy(network(data.inputs), data.targets).item()

    forces, updates, found = [], [], {"drop": loss()}
    for step in range(40):
        index = torch.randint(500, (32,), generator=draw)
        optimizer.zero_grad()
        cross_entropy(network(data.inputs[index]), data.targets[index]).backward()
        forces.append(-flat(w.grad for w in weights))
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / max(1, 40 * warm)) * (1 - step / 40)
        before = flat(weights)
        optimizer.step()
        updates.append(flat(weights) - before)
        if step == 3:
            found["drop"] -= loss()
    found["work"] = sum(float(forces[k] @ updates[k]) for k in range(4))
    met = sum(float(forces[k] @ updates[k]) for k in range(3))  # the fourth has not met its next gradient
    found["signal"] = sum(float(forces[k + 1] @ updates[k]) for k in range(3)) * found["work"] / met
    lengths = torch.stack(updates).norm(dim=1)
    found["steadiness"] = float(lengths.sum() ** 2 / (40 * lengths.square().sum()))
    with torch.no_grad():
        found["loss"] = cross_entropy(network(data.held_inputs), data.held_targets).item()
    return found


def test_a_row_is_that_of_plain_torch(used: SimpleNamespace, output: Path) -> None:
    data = used.sets.load("fashion-mnist", output / "data", 500)
    rows = read_rows(output / "warm_up.json")["runs"]
    (row,) = (r for r in rows if (r["network"], r["optimizer"], r["power"], r["seed"]) == ("MLP", "Adam", 0, 1))
    without, with_it = (train_by_hand(data, row["rate"], warm) for warm in (0.0, 0.1))
    # 40 steps of float32 whose sums are in another order
    for name in ("work", "signal", "drop"):
        assert row[name] == pytest.approx(without[name], rel=2e-3), name
    for percent, wanted in (("0", without), ("10", with_it)):
        assert row[f"loss_{percent}"] == pytest.approx(wanted["loss"], rel=1e-2)
        assert row[f"steadiness_{percent}"] == pytest.approx(wanted["steadiness"], rel=1e-2)


def test_a_mean_loss_leaves_the_norms_as_they_were(used: SimpleNamespace, output: Path) -> None:
    data = used.sets.load("cifar10", output / "data", 100)
    training = used.trainings.Training("cifar10", "CNN", "Adam", 1e-3, 25, 4, 0, net_options={"norm": True})
    run = used.trainings.Run(training, data, measured=False)
    before = [buffer.clone() for buffer in run.network.buffers()]
    found = used.runs.mean_loss(run, torch.arange(100))
    assert all(torch.equal(*pair) for pair in zip(before, run.network.buffers(), strict=True))
    with torch.no_grad():
        parts = [cross_entropy(run.network(data.inputs[i : i + 25]), data.targets[i : i + 25]) for i in (0, 25, 50, 75)]
    assert found == pytest.approx(float(sum(parts)) / 4, rel=1e-6)


@pytest.mark.parametrize(("loss", "wanted"), [(1.5, 1.5), (9.0, 2.3), (math.nan, 2.3), (math.inf, 2.3)])
def test_a_loss_is_at_most_that_of_the_start(used: SimpleNamespace, loss: float, wanted: float) -> None:
    assert used.runs.capped(loss, 2.3) == wanted


# --- what is made of the rows


def setting(used: SimpleNamespace, gains: list[float], drops: list[float], signal: float = 0.5, **more: Any) -> Any:
    rows = [
        {"loss_0": 1.0, "loss_10": 1.0 - gain, "drop": drop, "signal": signal, "work": 2.0, "start": 2.3}
        | {"steadiness_early": 0.9, "longest_early": 0.1}
        for gain, drop in zip(gains, drops, strict=True)
    ]
    return used.shown.Setting(
        *(more.get(n, d) for n, d in (("network", "MLP"), ("optimizer", "Adam"), ("power", 0))), rows
    )


def test_what_is_needed_and_what_is_told(used: SimpleNamespace) -> None:
    sure, unsure, small = [0.1, 0.11, 0.12], [0.3, -0.2, 0.1], [0.005, 0.006, 0.005]
    assert [setting(used, gains, [1.0] * 3).needed for gains in (sure, unsure, small)] == [True, False, False]
    # h = (2 · 0.75 − 0.5)/(2 · 0.25) = 2: no need. A loss that rose, with no curvature to be seen: told.
    fell, rose, bounced = (setting(used, sure, [d] * 3, a) for d, a in ((0.75, 0.5), (-0.1, -0.05), (-0.1, -0.3)))
    assert fell.headroom.value == pytest.approx(2)
    assert fell.headroom.error == pytest.approx(0)
    assert [one.told for one in (fell, rose, bounced)] == [False, True, True]
    # As likely up as down: told, as its error is wide.
    assert setting(used, sure, [0.5, -0.4, 0.1], -0.5).told
    assert not setting(used, sure, [0.4, 0.4, 0.4], 0.5).told  # fell, with no curvature to be seen
    assert setting(used, sure, [math.nan, 0.4, 0.4], 0.5).told  # a loss that is not finite


def test_a_threshold_divides_what_can_be_divided(used: SimpleNamespace) -> None:
    bad = [setting(used, [0.1, 0.11], [d] * 2) for d in (-0.3, -0.1, 0.1)]
    good = [setting(used, [-0.1, -0.11], [d] * 2) for d in (0.3, 0.5)]
    score = used.shown.SCORES["conversion"]
    limit = used.shown.threshold(bad + good, score)
    assert limit == pytest.approx((0.1 + 0.3) / 2 / 2.0)
    right = used.shown.Right.of(bad + good, lambda s: not score(s) >= limit)
    assert (right.of_needed, right.of_others, right.balanced, right.holds) == ((3, 3), (2, 2), 1.0, True)
    assert used.shown.singly(bad + good, lambda s: not score(s) >= limit).counted == (10, 10)
    wrong = used.shown.Right.of(bad + good, lambda s: False)
    assert (wrong.counted, wrong.balanced, wrong.holds) == ((2, 5), 0.5, False)


# --- the page


def test_no_run_is_missing() -> None:
    seeds: dict[Any, list[int]] = {}
    for row in read_rows(DOCS / "warm_up.json")["runs"]:
        seeds.setdefault((row["network"], row["optimizer"], row["power"]), []).append(row["seed"])
    assert all(found == [0, 1, 2, 3, 4] for found in seeds.values())


def test_the_page_has_the_tables_of_the_numbers(used: SimpleNamespace) -> None:
    parts, page = read_rows(DOCS / "warm_up.json"), (DOCS / "warm_up.md").read_text("utf-8")
    settings = used.shown.settings_of(parts["runs"])
    made = ("verdict", "threshold", "gain", "tuned", "course")
    tables = [getattr(used.shown, f"{name}_table")(settings) for name in made]
    for table in (*tables, used.shown.length_table(parts["runs"], parts["lengths"])):
        assert table in page
    seconds = math.fsum(row["seconds"] for part in parts.values() for row in part)
    assert f"{seconds:,.0f} processor seconds" in page
