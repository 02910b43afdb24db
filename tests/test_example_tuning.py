"""The experiments on the tuning numbers against plain torch and plain formulas, and their page against both."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_this_process import run_example, run_here
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parents[1]
SCRIPTS, DOCS = ROOT / "examples" / "tuning", ROOT / "docs"
SMALLEST, EVERY, LOOKS = 16, 16, 5
Parts = dict[str, list[dict[str, Any]]]


def read(folder: Path) -> Parts:
    return dict(json.loads((folder / "tuning.json").read_text("utf-8")))


def rows(parts: Parts, part: str, **key: Any) -> list[dict[str, Any]]:
    return [row for row in parts[part] if key.items() <= row.items()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tuning") / "out"
    run_example(SCRIPTS / "sweep.py", output)
    run_example(SCRIPTS / "headroom.py", output)
    return output


@pytest.fixture(scope="module")
def found(quick: Path) -> Parts:
    return read(quick)


@pytest.fixture(scope="module")
def full() -> Parts:
    return read(DOCS)


# --- a run by hand


def train_blobs(seed: int, rate: float, steps: int) -> tuple[list[torch.Tensor], list[float]]:
    """Gradients of each step, and the loss of the 512 points that are held out every 16 steps, the first included."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(10, (4512,), generator=draw)
    x = torch.randn(10, 20, generator=draw)[y] + 1.5 * torch.randn(4512, 20, generator=draw)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer, order = torch.optim.Adam(model.parameters(), rate), torch.Generator().manual_seed(1000 * seed + SMALLEST)
    gradients, looks = [], []
    for step in range(steps + 1):
        if step % EVERY == 0:
            looks.append(cross_entropy(model(x[4000:]), y[4000:]).item())
        index = torch.randint(4000, (SMALLEST,), generator=order)
        optimizer.zero_grad()
        cross_entropy(model(x[index]), y[index]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
        optimizer.step()
    return gradients[:steps], looks


def test_a_prediction_by_hand(found: Parts) -> None:
    """B_c = B Σ (‖g_k‖² − g_k·g_{k−1}) / Σ g_k·g_{k−1} of 100 steps of Adam; steps by means of five looks."""
    (level,) = rows(found, "levels", optimizer="Adam")
    runs = [r for r in rows(found, "runs", optimizer="Adam", batch=SMALLEST) if r["far"]]
    best = min(runs, key=lambda run: run["far"])
    gradients, looks = train_blobs(0, best["rate"], best["steps"])
    overlap = sum(float(g @ before) for g, before in zip(gradients[1:100], gradients, strict=False))
    squares = sum(float(g @ g) for g in gradients[1:100])
    critical = SMALLEST * (squares - overlap) / overlap
    assert best["critical_batch_size"] == pytest.approx(critical, rel=1e-4)  # float32 sums
    smooth = np.convolve(looks, np.ones(LOOKS) / LOOKS, "valid")
    needed = np.interp(-level["far"], -smooth, EVERY * (2.0 + np.arange(len(smooth))))
    assert best["far"] == pytest.approx(needed, rel=1e-5)
    predicted = rows(found, "predictions", optimizer="Adam", level="far")
    assert [row["batch"] for row in predicted] == [32, 64]
    for row in predicted:
        counted = min(r["far"] for r in rows(found, "runs", optimizer="Adam", batch=row["batch"]) if r["far"])
        said = needed * (1 + critical / row["batch"]) / (1 + critical / SMALLEST)
        assert row["ratio_short"] == pytest.approx(said / counted, rel=1e-4)


def test_what_is_in_the_file_is_not_run_again(quick: Path, found: Parts, tmp_path: Path) -> None:
    """A run that is missing is, and comes out as it was."""
    missing = rows(found, "runs", optimizer="SGD", batch=64)[0]
    kept = {**found, "runs": [row for row in found["runs"] if row != missing]}
    kept["levels"] = [{**level, "marked": True} for level in found["levels"]]
    output = tmp_path / "out"
    output.mkdir()
    (output / "tuning.json").write_text(json.dumps(kept), "utf-8")
    run_example(SCRIPTS / "sweep.py", output)
    again = read(output)
    assert again["runs"] == [*kept["runs"], missing]
    assert {**again, "runs": []} == {**kept, "runs": []}


def test_each_batch_size_is_tuned_inside_its_grid(full: Parts) -> None:
    """The best rate has a slower one on both sides."""
    assert all(is_inside(full, row) for row in full["predictions"])


def is_inside(parts: Parts, row: dict[str, Any]) -> bool:
    mine = rows(parts, "runs", **{name: row[name] for name in ("task", "optimizer", "seed", "batch")})
    return min(r["rate"] for r in mine) < row["rate"] < max(r["rate"] for r in mine)


def test_headroom_is_followed_as_it_is_said(full: Parts, found: Parts) -> None:
    for case in full["headroom"] + found["headroom"]:
        parts = full if case in full["headroom"] else found
        key = {name: case[name] for name in ("task", "optimizer", "rate")}
        (before,) = rows(parts, "headroom_runs", **key)
        assert (case["headroom"], case["far_before"]) == (before["step_headroom"], before["far"])
        if case["factor"] is None:
            continue
        if case["headroom"] is None:
            assert "curvature" in before["step_headroom_reason"]
        assert case["factor"] == pytest.approx(min(case["headroom"] or 4.0, 4.0))
        same = {name: case[name] for name in ("task", "optimizer")}
        rates = {r["rate"]: r for r in rows(parts, "headroom_runs", **same)}
        after = rates[min(rates, key=lambda rate: abs(math.log(rate / (case["rate"] * case["factor"]))))]
        assert after["rate"] == pytest.approx(case["rate"] * case["factor"], rel=1e-5)
        assert (case["near_after"], case["far_after"]) == (after["near"], after["far"])


# --- the committed numbers


def test_the_committed_predictions_follow_from_the_runs(full: Parts) -> None:
    for row in full["predictions"]:
        mine = rows(full, "runs", **{name: row[name] for name in ("task", "optimizer", "seed")})
        best = {
            batch: min((r for r in mine if r["batch"] == batch and r[row["level"]]), key=lambda r: r[row["level"]])
            for batch in (SMALLEST, row["batch"])
        }
        first, needed = (best[batch][row["level"]] for batch in (SMALLEST, row["batch"]))
        critical = best[SMALLEST]["critical_batch_size"]
        assert (row["first"], row["needed"], row["critical_short"]) == (first, needed, critical)
        said = first * (1 + critical / row["batch"]) / (1 + critical / SMALLEST)
        assert row["ratio_short"] == pytest.approx(said / needed, rel=1e-5)


def test_what_the_page_promises(full: Parts) -> None:
    """Plain SGD by the B_c of the run itself; a headroom that is told above 1."""
    of_sgd = [row["ratio_whole"] for row in rows(full, "predictions", optimizer="SGD")]
    factors = [math.exp(abs(math.log(ratio))) for ratio in of_sgd]
    assert (len(factors), round(max(factors), 2)) == (108, 1.99)
    assert np.median(factors) < 1.25
    told = [case for case in full["headroom"] if case["headroom"] and case["factor"] and case["factor"] > 1]
    assert len(told) == 13
    for level in ("near", "far"):
        assert all(case[f"{level}_after"] < case[f"{level}_before"] for case in told)


def test_the_page_has_the_tables_of_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text((DOCS / "tuning.json").read_text("utf-8"), "utf-8")
    script = SCRIPTS / "shown.py"
    done = run_here(
        lambda: runpy.run_path(str(script), run_name="__main__"), [str(script), "--output", str(tmp_path)], tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    page = (DOCS / "tuning.md").read_text("utf-8")
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) == 4
    for table in tables:
        assert table in page
    for folder in (tmp_path, DOCS):
        assert (folder / "tuning.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
