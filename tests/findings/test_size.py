"""Efficiency against width and depth: a run with plain sums, the search for rates, fits by numpy, and the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from findings_cases import ROOT, read_rows, scripts
from torch.nn.functional import cross_entropy

NAME, PAGES = "size", ROOT / "docs" / "paper"
SHORTENED = ("--seeds", "1")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def module() -> Iterator[SimpleNamespace]:
    with scripts(NAME, "sets") as found:
        yield found


def test_a_run_is_what_plain_sums_say(output: Path, module: SimpleNamespace) -> None:
    """Heavy ball until the mean of five looks, five steps apart, is at the level; D, ℓ and A of its updates."""
    rows = read_rows(output / f"{NAME}.json")["runs"]
    (row,) = [row for row in rows if (row["net"], row["width"], row["depth"]) == ("MLP", 16, 1)]
    data = module.sets.load("fashion-mnist", output / "data", 10_000, 500)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(784, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
    )
    weights, draw = list(network.parameters()), torch.Generator().manual_seed(1000)
    speeds, updates, looks = [torch.zeros_like(w) for w in weights], [], []
    start = torch.cat([w.detach().flatten() for w in weights]).double().norm()
    for step in range(1000):
        if step % 5 == 0:
            looks.append(cross_entropy(network(data.held_inputs), data.held_targets).item())
            if len(looks) >= 5 and np.mean(looks[-5:]) <= module.size.QUICK["MLP"]:
                break
        index = torch.randint(len(data.inputs), (64,), generator=draw)
        found = torch.autograd.grad(cross_entropy(network(data.inputs[index]), data.targets[index]), weights)
        with torch.no_grad():
            for w, v, g in zip(weights, speeds, found, strict=True):
                v.mul_(0.9).add_(g)
                w -= row["rate"] * v
        updates.append(-row["rate"] * torch.cat([v.flatten() for v in speeds]).double())
    u = torch.stack(updates)
    path, action, displacement = u.norm(dim=1).sum(), u.square().sum(), u.sum(0).norm()
    wanted = {
        "steps": len(u),
        "displacement": displacement,
        "relative_displacement": displacement / start,
        "straightness": displacement**2 / path**2,
        "steadiness": path**2 / (len(u) * action),
        "kinematic_efficiency": displacement**2 / (len(u) * action),
    }
    # Updates are differences of float32 weights: 1e-4 of the displacement.
    assert {name: row[name] for name in wanted} == {k: pytest.approx(float(v), rel=2e-4) for k, v in wanted.items()}


def test_fits_find_the_power_law_that_was_put_in(module: SimpleNamespace) -> None:
    """And the errors are those of leaving one size out, by numpy's own fit."""
    draw = np.random.default_rng(0)
    rows = [
        {"net": "MLP", "width": w, "depth": d, "rate": 0.1, "arrived": True}
        | dict.fromkeys(module.size.FITTED, 3 * w**0.5 / d)
        | {"efficiency": 3 * w**0.5 / d * draw.lognormal(0, 0.1)}
        for w in (16, 32, 64, 128)
        for d in (1, 2, 3, 4)
    ]
    fits = {fit["quantity"]: fit for fit in module.size.exponents(rows, "MLP")}
    exact = fits["steps"]
    assert (exact["width"], exact["depth"]) == pytest.approx((0.5, -1))
    assert (exact["width_se"], exact["depth_se"]) == pytest.approx((0, 0), abs=1e-9)
    points = np.log([[row["width"], row["depth"], row["efficiency"]] for row in rows])

    def slopes(keep: np.ndarray) -> np.ndarray:
        centred = points[keep] - points[keep].mean(0)
        return np.linalg.solve(centred[:, :2].T @ centred[:, :2], centred[:, :2].T @ centred[:, 2])

    left = np.array([slopes(np.arange(16) != out) for out in range(16)])
    noisy = fits["efficiency"]
    assert [noisy["width"], noisy["depth"]] == pytest.approx(slopes(np.arange(16) >= 0))
    assert [noisy["width_se"], noisy["depth_se"]] == pytest.approx(
        ((15 / 16) * ((left - left.mean(0)) ** 2).sum(0)) ** 0.5
    )


def test_rates_are_the_best_of_their_neighbours(parts: Row) -> None:
    for row in parts["runs"]:
        size = {name: row[name] for name in ("net", "width", "depth")}
        tried = {r["rate"]: r["steps"] for r in parts["tuning"] if size.items() <= r.items()}
        best = tried[row["rate"]]
        assert best is not None
        for neighbour in (row["rate"] / 2, row["rate"] * 2):
            steps = tried[min(tried, key=lambda rate: abs(rate - neighbour))]
            assert steps is None or steps >= best


def test_the_grid_is_whole(full: Row) -> None:
    for net, widths in (("MLP", (16, 32, 64, 128)), ("CNN", (2, 4, 8, 16))):
        for width in widths:
            for depth in (1, 2, 3, 4):
                size = {"net": net, "width": width, "depth": depth}
                seeds = [row["seed"] for row in full["runs"] if size.items() <= row.items()]
                corner = width in (widths[0], widths[3]) and depth in (1, 4)
                assert seeds == list(range(5 if corner else 3))


def test_the_page_has_the_tables_of_the_numbers(module: SimpleNamespace, full: Row) -> None:
    text = re.sub(r"\s+", " ", (PAGES / f"{NAME}.md").read_text(encoding="utf-8"))
    assert f"({NAME}.png)" in text
    finding, three = module.size, ("width", "depth", "rate")
    tables = [finding.size_table(full["runs"]), finding.exponent_table(full["exponents"])]
    for line in "\n".join([*tables, finding.exponent_table(full["with rate"], three)]).splitlines():
        assert " ".join(line.split()) in text
    spent = sum(row["seconds"] for part in ("tuning", "runs") for row in full[part])
    assert f"{spent:,.0f} s of processor time" in text


def test_what_the_page_says_in_words(full: Row) -> None:
    text = re.sub(r"\s+", " ", (PAGES / f"{NAME}.md").read_text(encoding="utf-8")).replace("−", "-")
    fits = {part: {(fit["net"], fit["quantity"]): fit for fit in full[part]} for part in ("exponents", "with rate")}
    mlp, cnn = (fits["exponents"][net, "efficiency"] for net in ("MLP", "CNN"))
    assert f"as depth^{mlp['depth']:.2f} (MLP) and depth^{cnn['depth']:.2f} (CNN)" in text
    assert f"as width^{mlp['width']:.2f} and width^{cnn['width']:.2f}" in text
    for fit in (mlp, cnn):
        for by in ("width", "depth"):
            assert max(abs(fit[by] + sign * fit[f"{by}_half"]) for sign in (-1, 1)) > 0.1
            assert abs(fit[by]) > fit[f"{by}_half"]
    names = "displacement", "relative_displacement"
    widths = {name: [fits["exponents"][net, name] for net in ("MLP", "CNN")] for name in names}
    said = [f"{fit['width']:.2f}" for name in names for fit in widths[name]]
    assert "the exponents are in their bands, {} and {}, {} and {},".format(*said) in text
    assert all(abs(fit["width"]) < 0.1 for fit in widths["displacement"])
    assert all(abs(fit["width"] + 0.5) < 0.15 for fit in widths["relative_displacement"])
    for name in names:
        for net in ("MLP", "CNN"):
            fit = fits["with rate"][net, name]
            assert f"width^{fit['width']:.2f} ± {fit['width_half']:.2f}" in text
    assert all(row["arrived"] for row in full["runs"])
    cells = dict[tuple[str, int, int], list[int]]()
    for row in full["runs"]:
        cells.setdefault((row["net"], row["width"], row["depth"]), []).append(row["steps"])
    steps = [np.mean(found) for found in cells.values()]
    assert f"{min(steps):.0f} to {max(steps):.0f} steps away" in text
