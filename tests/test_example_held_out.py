"""The experiment on held-out advice against plain torch and plain formulas, and its page against both."""

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
SCRIPT = SCRIPTS / "held_out.py"
PIECES = ("noise", "headroom", "larger batch", "smaller batch", "smaller rate")
LOOKED, LOOKS = 40, 5
Row = dict[str, Any]
Parts = dict[str, list[Row]]


def read(folder: Path) -> Parts:
    return dict(json.loads((folder / "held_out.json").read_text("utf-8")))


def rows(parts: Parts, part: str, **key: Any) -> list[Row]:
    return [row for row in parts[part] if key.items() <= row.items()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("held_out") / "out"
    run_example(SCRIPT, output, "--seeds", "0")
    return output


@pytest.fixture(scope="module", params=["quick", "committed"])
def parts(request: pytest.FixtureRequest) -> Parts:
    return read(request.getfixturevalue("quick") if request.param == "quick" else DOCS)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return names_of(SCRIPTS / "held_out_tasks.py", tmp_path_factory.mktemp("tasks"))


def names_of(script: Path, folder: Path) -> dict[str, Any]:
    found = dict[str, Any]()
    run_here(lambda: found.update(runpy.run_path(str(script))), [str(script)], folder)
    return found


# --- a run by hand


def train_blobs(row: Row, steps: int) -> tuple[list[torch.Tensor], list[float], int]:
    """Gradients of each step, and the loss of the 512 points that are held out: before, and every so many steps."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(10, (4512,), generator=draw)
    x = torch.randn(10, 20, generator=draw)[y] + 1.5 * torch.randn(4512, 20, generator=draw)
    torch.manual_seed(row["seed"])
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    weights, moved = list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()]
    draw, every = torch.Generator().manual_seed(1000 * row["seed"] + row["batch"]), row["steps"] // LOOKED or 1
    order, gradients, looks = torch.empty(0, dtype=torch.int64), [], []
    for step in range(steps + 1):
        if step % every == 0:
            looks.append(cross_entropy(model(x[4000:]), y[4000:]).item())
        if len(order) < row["batch"]:
            order = torch.cat([order, torch.randperm(4000, generator=draw)])
        index, order = order[: row["batch"]], order[row["batch"] :]
        shaken = x[index] + 0.1 * torch.randn((row["batch"], 20), generator=draw)
        found = torch.autograd.grad(cross_entropy(model(shaken), y[index]), weights)
        found = [g + 5e-4 * p.detach() for g, p in zip(found, weights, strict=True)]  # with coupled decay
        gradients.append(torch.cat([g.flatten() for g in found]).double())
        rate = row["rate"] * min(1.0, (step + 1) / (0.05 * row["steps"]))
        with torch.no_grad():
            for p, v, g in zip(weights, moved, found, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(rate * v)
    return gradients[:steps], looks, every


def came_down(looks: list[float], every: int, level: float) -> float:
    """The step at which the mean of five looks first came down to the level, on the straight line between two."""
    smooth = np.convolve(looks, np.ones(LOOKS) / LOOKS, "valid")
    i = int(np.flatnonzero(smooth <= level + 1e-9)[0])
    share = (smooth[i - 1] - level) / (smooth[i - 1] - smooth[i])
    return float(every * (i + 1 + share))


def test_a_larger_batch_by_hand(quick: Path) -> None:
    """What is promised, (1 + r/4)/(1 + r) with r = Σ (‖g_k‖² − g_k·g_{k−1}) / Σ g_k·g_{k−1}, and what is counted."""
    parts = read(quick)
    (case,) = rows(parts, "cases", piece="larger batch")
    assert case["followed"]
    (before,) = rows(parts, "runs", batch=case["batch"], rate=case["rate"], level=None)
    gradients, looks, every = train_blobs(before, before["steps"])
    overlap = sum(float(g @ last) for g, last in zip(gradients[1:], gradients, strict=False))
    ratio = (sum(float(g @ g) for g in gradients[1:]) - overlap) / overlap
    assert case["promised"] == pytest.approx((1 + ratio / 4) / (1 + ratio), rel=1e-4)  # float32 sums
    level = float(np.mean(looks[-LOOKS:]))
    assert before["end"] == pytest.approx(level, rel=1e-5)
    first = came_down(looks, every, level)
    key = {"batch": case["to_batch"], "rate": case["to_rate"], "level": before["end"]}
    (after,) = rows(parts, "runs", **key)
    _, looks, every = train_blobs(after, after["ended"])
    second = came_down(looks, every, level)
    # Where a level is passed slowly, its sixth digit moves the step.
    assert (case["before"], case["after"]) == (pytest.approx(first, rel=1e-3), pytest.approx(second, rel=1e-3))
    assert case["ratio"] == pytest.approx(case["after"] / case["before"], rel=1e-5)


def test_what_is_in_the_file_is_not_run_again(quick: Path, tmp_path: Path) -> None:
    """A run that is missing is, and comes out as it was."""
    found = read(quick)
    missing = [row for row in found["runs"] if row["level"] is not None][-1]
    kept = [{**row, "marked": True} for row in found["runs"] if row != missing]
    output = tmp_path / "out"
    output.mkdir()
    (output / "held_out.json").write_text(json.dumps({"runs": kept}), "utf-8")
    run_example(SCRIPT, output, "--seeds", "0")
    again = read(output)
    assert again["runs"] == [*kept, missing]
    assert again["cases"] == found["cases"]


# --- trained as people do


def test_crops_and_mirrors_show_the_same_picture(tasks: dict[str, Any]) -> None:
    """Each shown picture is a window of the padded one, or its mirror; both happen, and not to all alike."""
    images = torch.randint(1, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shown = tasks["cropped_and_flipped"](images, torch.Generator().manual_seed(1))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    found = []
    for picture, wide in zip(((shown / 4 + 0.5) * 255).round().numpy(), padded, strict=True):
        windows = {
            (dy, dx, turned): wide[:, dy : dy + 32, dx : dx + 32][:, :, :: -1 if turned else 1]
            for dy in range(9)
            for dx in range(9)
            for turned in (False, True)
        }
        (place,) = [place for place, window in windows.items() if np.array_equal(window, picture)]
        found.append(place)
    assert {turned for _, _, turned in found} == {False, True}
    assert all(len({place[axis] for place in found}) > 4 for axis in (0, 1))


def test_a_run_with_norms_a_cosine_and_clipping(tasks: dict[str, Any]) -> None:
    """Rates fall as ½(1 + cos πk/K), gradients are cut to the norm, and the losses are those of running means."""

    def model() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 10))

    plain = next(tasks["points"]())
    task = type(plain.task)(**{**vars(plain.task), "model": model})
    problem = tasks["Problem"](task, "momentum", 0.05, tasks["momentum"], tasks["cosine"], clip=0.5)
    run = tasks["Run"](problem, tasks["Trial"]("blobs", "momentum", 32, 0.05, 0, 40))
    rates, modes = [], set()
    run.model.register_forward_pre_hook(lambda module, _: modes.add(module.training))
    for _ in range(40):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.advance()
    assert modes == {True}
    modes.clear()
    loss = run.evaluate()
    assert modes == {False}
    assert run.model.training
    assert rates == pytest.approx([0.025 * (1 + math.cos(math.pi * k / 40)) for k in range(40)])
    norm = run.model[1]
    with torch.no_grad():
        hidden = run.model[0](task.held_inputs)
        hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        assert loss == pytest.approx(cross_entropy(run.model[2](hidden), task.held_targets).item(), rel=1e-5)
    columns = run.record.columns
    assert columns["step"][-1] == 40
    assert columns["samples"][-1] == 40 * 32
    assert np.all(columns["grad_norm_clipped"] <= 0.5 * (1 + 1e-5))
    assert columns["grad_norm"].max() > 0.5
    assert (run.record.run["batch_norm_layers"], run.record.run["lr_schedules"]) == (1, ["cosine"])
    run.meter.close()


# --- the rules


def test_advice_is_followed_as_it_is_said(parts: Parts) -> None:
    assert {case["piece"] for case in parts["cases"]} == set(PIECES)
    for case in parts["cases"]:
        before = of(parts, case)
        assert case["followed"] is told(case, before)
        if not case["followed"]:
            assert "helped" not in case
            continue
        batch, rates = followed(case)
        assert case["to_batch"] == batch
        assert any(case["to_rate"] == pytest.approx(case["rate"] * rate, rel=0.01) for rate in rates)  # three digits


def of(parts: Parts, case: Row) -> Row:
    """The run that a case is about."""
    key = {name: case[name] for name in ("task", "optimizer", "seed", "batch", "rate")}
    (found,) = rows(parts, "runs", **key, level=None)
    return found


def told(case: Row, before: Row) -> bool:
    if case["piece"] == "headroom":
        return before["step_headroom"] is not None and before["step_headroom"] - before["step_headroom_se"] > 1
    if case["piece"] in ("noise", "smaller rate"):
        return bool(before["noise_advice" if case["piece"] == "noise" else "divergence_advice"])
    return case["promised"] is not None and case["promised"] <= 0.9


def followed(case: Row) -> tuple[int, tuple[float, ...]]:
    """The batch, and the multiples of the rate that may have been chosen."""
    b = case["batch"]
    if case["piece"] == "headroom":
        return b, (min(case["step_headroom"], 4.0),)
    return {
        "noise": (4 * b, (1.0,)),
        "smaller rate": (b, (0.25,)),
        "larger batch": (4 * b, (0.5, 1.0, 2.0, 4.0, 8.0)),
        "smaller batch": (b // 4, (0.125, 0.25, 0.5, 1.0, 2.0)),
    }[case["piece"]]


def test_costs_are_those_of_the_runs(parts: Parts) -> None:
    """The best of the rates that were tried; steps where steps are promised, and samples where samples are."""
    for case in [case for case in parts["cases"] if case["followed"] and case["piece"] != "smaller rate"]:
        before, per_step = of(parts, case), case["piece"] == "smaller batch"
        key = {name: case[name] for name in ("task", "optimizer", "seed")}
        spanned = before["steps"] * (4 if per_step else 1)
        tried = rows(parts, "runs", **key, batch=case["to_batch"], steps=spanned, level=before["end"])
        if "batch" not in case["piece"]:
            tried = rows({"": tried}, "", rate=case["to_rate"])
        reached = [row["passed"] * (row["batch"] if per_step else 1) for row in tried if row["passed"] is not None]
        assert case["before"] == pytest.approx(before["passed"] * (before["batch"] if per_step else 1), rel=1e-5)
        assert case["after"] == (pytest.approx(min(reached), rel=1e-5) if reached else None)
        assert case["helped"] is bool(reached and case["after"] < case["before"])
        if reached:
            assert case["ratio"] == pytest.approx(case["after"] / case["before"], rel=1e-5)


def test_the_settings_are_the_best_of_their_grids(parts: Parts) -> None:
    """The run whose batch is changed ended lowest; the rate of the search has a worse one on both sides."""
    for case in [case for case in parts["cases"] if case["piece"] in ("larger batch", "smaller batch")]:
        key = {name: case[name] for name in ("task", "optimizer", "seed", "batch")}
        ends = {row["rate"]: row["end"] or math.inf for row in rows(parts, "runs", **key, level=None)}
        assert len(ends) in (3, 4)
        assert min(ends, key=ends.__getitem__) == case["rate"]
        searched = list(rows(parts, "runs", task=case["task"], optimizer=case["optimizer"], seed=100))
        best = min(searched, key=lambda row: row["end"] or math.inf)["rate"]
        assert min(row["rate"] for row in searched) < best < max(row["rate"] for row in searched)
        tried = rows(parts, "cases", piece="headroom", **{n: case[n] for n in ("task", "optimizer", "seed")})
        assert [row["rate"] / best for row in tried] == pytest.approx([2.0**k for k in range(-5, 1)], rel=0.01)


def test_what_failed_is_shown(quick: Path, tmp_path: Path) -> None:
    """As a row of its own, and in the counts: a loss that is not come to, and a cost that rose."""
    names, cases = names_of(SCRIPT, tmp_path), read(quick)["cases"]
    assert names["failure_table"](cases) == "None that was followed failed."
    (case,) = rows({"": cases}, "", piece="smaller batch")
    never = {**case, "after": None, "ratio": None, "helped": False}
    more = {**case, "seed": 1, "after": 2 * case["before"], "ratio": 2.0, "helped": False}
    *_, first, second = names["failure_table"]([case, never, more]).splitlines()
    assert first.startswith("| smaller batch | blobs, momentum | 0 | 1024, 0.08 |")
    assert first.endswith(f"| 256, 0.04 | {case['before']:,.0f} | never |")
    assert second.endswith(f"| {2 * case['before']:,.0f} |")
    said = f"1 of 3; 2.00, {case['ratio']:.2f} to never; said {case['promised']:.2f}"
    assert f"| smaller batch | 3 of 3 | samples | {said} | {said} |" in names["verdict_table"]([case, never, more])


# --- the committed numbers


def test_the_page_has_the_tables_of_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "held_out.json").write_text((DOCS / "held_out.json").read_text("utf-8"), "utf-8")
    arguments = [str(SCRIPT), "--shown", "--output", str(tmp_path)]
    done = run_here(lambda: runpy.run_path(str(SCRIPT), run_name="__main__"), arguments, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    page = (DOCS / "tuning.md").read_text("utf-8")
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) == 2
    for table in tables:
        assert table in page


def test_what_is_advised_helped() -> None:
    """In 8 of 10 cases and more, each; and the page on diagnosis says in how many."""
    parts, page = read(DOCS), " ".join((DOCS / "diagnosis.md").read_text("utf-8").split())
    counts = {}
    for piece in PIECES:
        made = rows(parts, "cases", piece=piece, followed=True)
        counts[piece] = f"{sum(case['helped'] for case in made)} of {len(made)}"
        assert sum(case["helped"] for case in made) >= 0.8 * len(made) > 0
    noise, headroom, larger, smaller, rate = counts.values()
    assert f"and {noise} on [held-out tasks]" in page
    assert f"fewer steps, in {headroom} on the held-out tasks" in page
    assert f"a quarter of the rate**, in {rate}" in page
    assert f"× 4 for fewer steps in {larger}, × ¼ for fewer samples in {smaller}" in page
    saved = [1 - case["ratio"] for case in rows(parts, "cases", piece="headroom", followed=True)]
    assert min(saved) > 1 / 8, "what the page on tuning says of the headroom"
