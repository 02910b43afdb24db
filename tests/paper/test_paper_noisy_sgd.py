"""Noisy SGD against the flow, shortened, against plain tensors; and its page."""

from __future__ import annotations

import importlib
import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from in_this_process import run_here
from paper_cases import DOCS, ROOT, committed, page, run_experiment
from torch.nn.functional import cross_entropy

SCRIPT = ROOT / "examples" / "paper" / "noisy_sgd.py"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("noisy_sgd") / "out"


@pytest.fixture(scope="module")
def quick(output: Path) -> dict[str, list[Row]]:
    return run_experiment("noisy_sgd", output)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    path, known = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(SCRIPT.parent)]
    try:
        yield importlib.import_module("noisy_sgd")
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "examples")):
                del sys.modules[name]


def rows(parts: dict[str, list[Row]], part: str, **key: Any) -> list[Row]:
    return [row for row in parts[part] if key.items() <= row.items()]


def pictures(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """80 of the published bytes, with mean 0 and variance 1."""
    files = [np.fromfile(folder / "data" / "cifar10" / f"data_batch_{k}.bin", np.uint8) for k in range(1, 6)]
    whole = np.concatenate([file.reshape(-1, 3073) for file in files])
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:80].numpy()
    pixels = torch.from_numpy(whole[chosen, 1:].astype(np.float32)).reshape(-1, 3, 32, 32)
    return (pixels - pixels.mean()) / pixels.std(), torch.from_numpy(whole[chosen, 0].astype(np.int64))


def descend(x: torch.Tensor, y: torch.Tensor, steps: int, batch: int, seed: int) -> tuple[torch.Tensor, Row]:
    """θ of each step (steps + 1, P) of the MLP, and the works of its gradients."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(3072, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU())
    network = torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(16, 10))
    weights, draw = list(network.parameters()), torch.Generator().manual_seed(1000 * seed + batch)
    places = [torch.cat([p.detach().flatten() for p in weights]).double()]
    begun, work = cross_entropy(network(x), y).item(), 0.0
    for _ in range(steps):
        index = torch.randint(80, (batch,), generator=draw) if batch else slice(None)
        found = torch.autograd.grad(cross_entropy(network(x[index]), y[index]), weights)
        work += 0.4 / steps * sum(float(g.double().square().sum()) for g in found)
        with torch.no_grad():
            for p, g in zip(weights, found, strict=True):
                p.sub_(0.4 / steps * g)
        places.append(torch.cat([p.detach().flatten() for p in weights]).double())
    drop = begun - cross_entropy(network(x), y).item()
    return torch.stack(places), {"drop": drop, "work": work}


def test_the_mlp_by_plain_tensors(quick: dict[str, list[Row]], output: Path) -> None:
    """Distances, scatter and bias of two seeds, and their η = D²/(T·drop), straightness and conversion."""
    x, y = pictures(output)
    flow, _ = descend(x, y, 24, 0, 0)
    unit = float((flow[-1] - flow[0]).norm())
    (row,) = rows(quick, "noisy", net="MLP", steps=4, batch=32)
    ends = []
    for seed in range(2):
        path, said = descend(x, y, 4, 32, seed)
        ends.append(path[-1])
        length, straight = float(path.diff(dim=0).norm(dim=1).sum()), float((path[-1] - path[0]).norm())
        # float32 weights and sums, some 1e-5 of them; the drop is a difference of two losses near each other.
        assert row["distance"][seed] == pytest.approx(float((path[-1] - flow[-1]).norm()) / unit, rel=1e-3)
        assert row["straightness"][seed] == pytest.approx(straight**2 / length**2, rel=1e-3)
        assert row["drop"][seed] == pytest.approx(said["drop"], rel=1e-3)
        assert row["efficiency"][seed] == pytest.approx(straight**2 / (0.4 * said["drop"]), rel=1e-3)
        assert row["conversion"][seed] == pytest.approx(said["drop"] / said["work"], rel=1e-3)
    half = float((ends[0] - ends[1]).square().sum()) / 2  # the variance of two
    assert row["scatter"] == pytest.approx(math.sqrt(half) / unit, rel=1e-3)
    mean = float(((ends[0] + ends[1]) / 2 - flow[-1]).square().sum())
    assert row["bias_squared"] == pytest.approx((mean - half / 2) / unit**2, abs=1e-3)
    (full,) = rows(quick, "full batch", net="MLP", steps=2)
    path, _ = descend(x, y, 2, 0, 0)
    assert full["distance"] == pytest.approx(float((path[-1] - flow[-1]).norm()) / unit, rel=1e-3)


def test_sharpness_is_the_largest_eigenvalue(quick: dict[str, list[Row]], output: Path, script: ModuleType) -> None:
    """Of a network small enough for its whole Hessian; power iteration comes from below."""
    x, y = pictures(output)
    x = x[:, :1, ::8, ::8].reshape(80, 16)
    torch.manual_seed(1)
    start = object.__new__(script.Start)
    start.network = torch.nn.Linear(16, 10)
    start.data = script.Set("", x, y, x, y)

    def loss(weights: torch.Tensor) -> torch.Tensor:
        return cross_entropy(x @ weights[:160].reshape(10, 16).T + weights[160:], y)

    at = torch.cat([p.detach().flatten() for p in start.network.parameters()])
    largest = float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, at))[-1])
    assert 0.95 * largest <= start.sharpness(40) <= largest * (1 + 1e-5)


def test_a_statement_can_fail(quick: dict[str, list[Row]], script: ModuleType) -> None:
    """Each, when the numbers are such; and all stand for numbers that they describe."""
    flow = {"net": "MLP", "rate": 0.005, "sharpness": [5.0, 10.0], "drop": 1.0, "efficiency": 0.5}
    full = [{"net": "MLP", "rate": rate, "distance": far} for rate, far in ((0.01, 0.01), (0.1, 0.09), (0.3, 0.2))]
    noisy = [
        {
            "net": "MLP",
            "rate": rate,
            "batch": batch,
            "scatter": math.sqrt(rate / batch),
            "drop": [0.95, 0.97],
            "conversion": [0.3, 0.4],
            "efficiency": [0.5 * (1 + rate / batch)],
        }
        for rate in (0.01, 0.1, 0.3)
        for batch in (32, 128)
    ]
    parts = {"flow": [flow], "full batch": full, "noisy": noisy}
    assert all(script.verdicts(parts, "MLP").values())
    noisy[-1] |= {"drop": [0.1], "conversion": [0.9], "efficiency": [9.0], "scatter": 7.0}  # not gentle: not meant
    assert all(script.verdicts(parts, "MLP").values())
    for row, name, value, statement in (
        (noisy[2], "scatter", 0.3, "1 scatter"),
        (full[1], "distance", 0.11, "2 full batch"),
        (full[2], "distance", 0.09, "2 full batch"),
        (noisy[0], "drop", [0.85], "3 loss drop"),
        (noisy[0], "conversion", [0.6], "4 conversion"),
        (noisy[0], "efficiency", [0.6], "5 efficiency"),
    ):
        before, row[name] = row[name], value
        assert [n for n, holds in script.verdicts(parts, "MLP").items() if not holds] == [statement]
        row[name] = before


def test_the_page_has_what_the_file_says(tmp_path: Path) -> None:
    """Its tables are those that the script prints of the file, and so are the numbers between them."""
    found = committed("noisy_sgd")
    (tmp_path / "noisy_sgd.json").write_text((DOCS / "noisy_sgd.json").read_text("utf-8"), "utf-8")
    arguments = [str(SCRIPT), "--shown", "--data", str(tmp_path), "--output", str(tmp_path)]
    done = run_here(lambda: runpy.run_path(str(SCRIPT), run_name="__main__"), arguments, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    whole, said = (DOCS / "noisy_sgd.md").read_text("utf-8"), page("noisy_sgd")
    tables = [part for part in done.stdout.split("\n\n") if part.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert table in whole
    sharp = {row["net"]: row["sharpness"] for row in found["flow"]}
    first, last = ([f"{each[at]:.3g}" for each in sharp.values()] for at in (0, -1))
    assert f"{last[0]} (MLP) and {last[1]} (CNN), at θ₀ {first[0]} and {first[1]}" in said
    assert all(max(each) == each[-1] for each in sharp.values())
    grown = [f"{each[-1] / each[0]:.0f}" for each in sharp.values()]
    assert f"λ grows {grown[0]} and {grown[1]} times over the flow" in said
    assert f"{sum(row['seconds'] for part in found.values() for row in part):.0f} s of processor time" in said
    drops = {row["net"]: row["drop"] for row in found["flow"]}

    def lost(net: str, steps: int, batch: int | None) -> float:
        """% of the flow's loss drop."""
        key = {"net": net, "steps": steps} | ({"batch": batch} if batch else {})
        (row,) = rows(found, "noisy" if batch else "full batch", **key)
        return 100 * (1 - float(np.mean(row["drop"])) / drops[net])

    three = [f"{lost('MLP', 32, batch):.0f}" for batch in (32, 128, 512)]
    assert f"the MLP loses {three[0]}, {three[1]} and {three[2]} %" in said
    assert f"the CNN loses {lost('CNN', 32, 512):.0f} % and more" in said
    assert f"the CNN's drop is {lost('CNN', 32, None):.0f} % too small at 5.1" in said
    assert f"{lost('MLP', 101, 32):.0f} % smaller at lr·λ = 0.76 (MLP) and {lost('CNN', 320, 32):.1f} % at 0.51" in said
    assert f"within {lost('MLP', 320, 512):.1g} and {lost('MLP', 320, 32):.0f} % of the flow's" in said
