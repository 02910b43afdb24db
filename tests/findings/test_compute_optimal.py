"""The width that is best for its compute: a run by hand, thresholds by trying all, and the page against its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from findings_cases import page, read_rows, scripts
from torch.nn.functional import cross_entropy

NAME = "compute_optimal"
SHORTENED = ("--seeds", "0")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def module() -> Iterator[SimpleNamespace]:
    with scripts(NAME, "sets") as found:
        yield found


def test_a_run_is_what_plain_sums_say(output: Path, module: SimpleNamespace) -> None:
    """Adam past its budgets: each loss is the mean of five looks, and D, ℓ and A are those of the updates."""
    (row,) = [row for row in read_rows(output / f"{NAME}.json")["runs"] if row["width"] == 4]
    data = module.sets.load("fashion-mnist", output / "data", held=500)
    torch.manual_seed(0)
    sizes = (784, 4, 4, 10)
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    network = torch.nn.Sequential(torch.nn.Flatten(), layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    count = sum(a * b + b for a, b in pairwise(sizes))
    assert row["steps"] == [round(budget / count) for budget in module.compute_optimal.QUICK_BUDGETS]
    optimizer, draw = torch.optim.Adam(network.parameters(), row["rate"]), torch.Generator().manual_seed(1000)
    path = [torch.cat([w.detach().flatten() for w in network.parameters()]).double()]
    losses = [np.nan]
    for _ in range(row["steps"][-1]):
        index = torch.randint(len(data.inputs), (64,), generator=draw)
        optimizer.zero_grad()
        cross_entropy(network(data.inputs[index]), data.targets[index]).backward()
        optimizer.step()
        path.append(torch.cat([w.detach().flatten() for w in network.parameters()]).double())
        losses.append(cross_entropy(network(data.held_inputs), data.held_targets).item())
    u = torch.stack(path).diff(dim=0)
    for at, steps in enumerate(row["steps"]):
        near = [losses[step] for step in sorted({round(steps * part) for part in (0.9, 0.925, 0.95, 0.975, 1)})]
        assert row["loss"][at] == pytest.approx(np.mean(near), rel=1e-4)
        lengths, displacement = u[:steps].norm(dim=1), u[:steps].sum(0).norm()
        # Updates are differences of float32 weights: 1e-4 of the displacement.
        assert row["straightness"][at] == pytest.approx((displacement / lengths.sum()).item() ** 2, rel=5e-4)
        steady = lengths.sum() ** 2 / (steps * lengths.square().sum())
        assert row["steadiness"][at] == pytest.approx(steady.item(), rel=5e-4)


def test_a_threshold_is_the_best_of_all(module: SimpleNamespace) -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        larger = draw.random(15) < 0.4
        larger[:2] = [True, False]
        values = draw.normal(size=15) + larger
        cut, sign = module.compute_optimal.threshold(list(values), list(larger))

        def right(cut: float, sign: int, values: Any = values, larger: Any = larger) -> float:
            said = sign * values > sign * cut
            return float((said[larger].mean() + (~said[~larger]).mean()) / 2)

        tried = [right(middle, s) for s in (1, -1) for middle in np.sort(values)[:-1] + np.diff(np.sort(values)) / 2]
        assert right(cut, sign) == pytest.approx(max(tried))


def test_what_tells_all_apart_and_what_tells_nothing(module: SimpleNamespace) -> None:
    """Made up: straightness falls with the width, in all budgets alike, and conversion is the same for all."""
    points = [
        {"net": "MLP", "budget": budget, "width": width, "seed": seed, "loss": (np.log2(width / 16)) ** 2 + budget}
        | dict.fromkeys((*module.compute_optimal.NUMBERS, module.compute_optimal.RIVAL), 1.0)
        | {"straightness": 1 / width, "compute": 10.0**budget, "steps": 10}
        for budget in (1, 2, 3)
        for width in (4, 8, 16, 32)
        for seed in (0, 1)
    ]
    assert {row["width"] for row in module.compute_optimal.optimal(points)} == {16}
    found = {row["number"]: row for row in module.compute_optimal.told(points)}
    assert (found["straightness"]["right"], found["straightness"]["least"]) == (1, 1)
    assert found["straightness"]["budgets"] == 3
    assert found["conversion"]["right"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))


# --- the committed numbers


def test_the_optimum_is_the_lowest_loss(full: Row) -> None:
    losses: dict[tuple[str, int], dict[int, list[float]]] = {}
    for row in full["runs"]:
        for budget, loss in zip(row["budget"], row["loss"], strict=True):
            losses.setdefault((row["net"], budget), {}).setdefault(row["width"], []).append(loss)
    for row in full["optimal"]:
        means = {width: np.mean(found) for width, found in losses[row["net"], row["budget"]].items()}
        assert all(len(found) == 5 for found in losses[row["net"], row["budget"]].values())
        assert row["loss"] == pytest.approx(min(means.values()), rel=1e-5)
        assert means[row["width"]] == min(means.values())
        assert row["inside"] is (min(means) < row["width"] < max(means))


def test_the_page_has_the_tables_of_the_numbers(module: SimpleNamespace, full: Row) -> None:
    text = page(NAME)
    assert f"({NAME}.png)" in text
    tables = module.compute_optimal.optimal_table(full["optimal"]), module.compute_optimal.told_table(full["told"])
    for line in "\n".join(tables).splitlines():
        assert " ".join(line.split()) in text
    spent = sum(row["seconds"] for part in ("tuning", "runs") for row in full[part])
    assert f"{spent:,.0f} s of processor time" in text


def test_what_the_page_says_in_words(full: Row) -> None:
    text = page(NAME)
    inside = {
        net: [row for row in full["optimal"] if row["net"] == net and row["inside"]] for net in ("MLP", "transformer")
    }
    first, *_, last = (row["efficiency"] for row in inside["MLP"])
    assert f"efficiency falls from {first:.3f} to {last:.3f} while compute grows by 8" in text
    assert [row["compute"] / inside["MLP"][0]["compute"] for row in inside["MLP"]] == pytest.approx(
        [1, 2, 4, 8], rel=0.01
    )
    fewer, more = (row["efficiency"] for row in inside["transformer"])
    assert f"two budgets are within 15 %, {fewer:.3f} and {more:.3f}, and fall too" in text
    assert more < fewer < 1.15 / 0.85 * more
    assert len({row["width"] for row in inside["transformer"]}) == 1
    told = {(row["net"], row["number"]): row for row in full["told"]}
    assert told["MLP", "steadiness"]["least"] < 0.8 <= told["transformer", "steadiness"]["least"]

    def right(name: str, net: str, what: str = "right") -> str:
        return f"{told[net, name][what]:.0%}".replace("%", " %")

    said = f"steadiness is right in {right('steadiness', 'MLP')} of the MLPs' runs and in"
    said += f" {right('steadiness', 'transformer')} of the transformers', mean over budgets, but in"
    assert f"{said} {right('steadiness', 'MLP', 'least')} of the MLPs' worst budget" in text
    both = {name for _, name in told if min(told[net, name]["right"] for net in inside) >= 0.8}
    assert both == {"steadiness", "samples per parameter"}
    assert f"do better, in {right('samples per parameter', 'MLP')}." in text
    said = f"efficiency is right in {right('efficiency', 'transformer')} too, but in {right('efficiency', 'MLP')}"
    assert said in text
    assert f"Samples per parameter are right in {right('samples per parameter', 'transformer')} here" in text


def test_efficiency_rises_through_the_optimum(module: SimpleNamespace, full: Row) -> None:
    """From the narrower to the wider neighbour of the optimal width, in all budgets but one."""
    points, rises = module.compute_optimal.spread(full["runs"]), []
    for row in (row for row in full["optimal"] if row["inside"]):
        here = [p for p in points if (p["net"], p["budget"]) == (row["net"], row["budget"])]
        widths = sorted({p["width"] for p in here})
        at = widths.index(row["width"])
        means = [np.mean([p["efficiency"] for p in here if p["width"] == w]) for w in widths[at - 1 : at + 2]]
        rises.append(bool(means[0] < means[1] < means[2]))
    assert (sum(rises), len(rises)) == (5, 6)
    assert "in five budgets of six" in page(NAME)


def test_a_cut_of_logarithms_on_the_page(module: SimpleNamespace, full: Row) -> None:
    """Samples per parameter of the transformers' two budgets: each cut by the middle of the other's logarithms."""
    name = "samples per parameter"
    points = [p for p in module.compute_optimal.spread(full["runs"]) if p["net"] == "transformer"]
    best = {row["budget"]: row["width"] for row in full["optimal"] if row["net"] == "transformer" and row["inside"]}
    small = {b: [p[name] for p in points if p["budget"] == b and p["width"] < best[b]] for b in best}
    large = {b: [p[name] for p in points if p["budget"] == b and p["width"] > best[b]] for b in best}
    for here, other in (tuple(best), tuple(best)[::-1]):
        assert min(small[other]) / max(large[other]) == pytest.approx(65, abs=1)
        cut = np.sqrt(min(small[other]) * max(large[other]))
        assert max(large[here]) < cut < min(small[here])
    assert "a factor of some 65 apart" in page(NAME)
