"""The experiment on real images against plain torch on made-up ones, the kernel of a chain, and the page."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from subprocess import run
from typing import Any

import numpy as np
import pytest
import torch
from in_this_process import run_here
from paper_cases import ROOT, page, run_experiment
from plain_networks import cnn, descend, fcn, jacobian, published
from torch import Tensor, nn

NAME = "real_images"
SCRIPTS = ROOT / "examples" / "paper"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp(NAME) / "out"
    return run_experiment(NAME, output, "--seeds", "0") | {"folder": output / "data"}


@pytest.fixture(scope="module")
def own_kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found, script = dict[str, Any](), SCRIPTS / "own_kernel.py"
    run_here(lambda: found.update(runpy.run_path(str(script))), [str(script)], tmp_path_factory.mktemp("kernel"))
    return found


def one(found: dict[str, Any], part: str, **key: Any) -> dict[str, Any]:
    (row,) = [row for row in found[part] if key.items() <= row.items()]
    return row


# --- the shortened run


@pytest.mark.parametrize("model", ["FCN", "CNN"])
def test_squared_error_and_its_kernel_are_those_of_plain_torch(quick: dict[str, Any], model: str) -> None:
    x, y = (
        published(quick["folder"], "mnist", 12, 0) if model == "FCN" else published(quick["folder"], "cifar10", 16, 0)
    )
    row = one(quick, "squared error", model=model, batch=len(x))
    torch.manual_seed(0)
    network = fcn(784, 64) if model == "FCN" else cnn(3, 32, 8)
    start = [part.detach().clone() for part in network.parameters()]
    matrix = jacobian(network, x)
    some = matrix[: 10 * min(10, len(x))]
    lr = 0.1 / (2 / len(some) * torch.linalg.matrix_norm(some, 2).item() ** 2)
    assert row["learning_rate"] == pytest.approx(lr, rel=1e-4)  # float32 here, float64 there
    residual = (network(x) - y).detach().double().flatten()
    marks = row["cumulative"]["step"]
    values = descend(network, x, y, row["learning_rate"], marks)
    # small steps amplify no rounding: float32's 1e-7 of weights and losses that are far larger than their changes
    for name, i in (("squared_displacement", 0), ("loss_drop", 1)):
        assert row["cumulative"][name] == pytest.approx([row[i] for row in values], rel=2e-3)
    moved = [(p.detach() - s).double() for p, s in zip(network.parameters(), start, strict=True)]
    # weights and biases of a layer follow each other; the halves of the run are weighed by what they moved
    shares = [sum(part.square().sum().item() for part in moved[k : k + 2]) for k in range(0, len(moved), 2)]
    assert len(shares) == len(row["layers"]["before"]) == len(row["layers"]["after"]) == (5 if model == "FCN" else 4)
    assert sum(row["layers"]["after"]) == pytest.approx(1, abs=1e-5)
    left, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
    rates, strength = 2 / y.numel() * singular.square(), 2 / y.numel() * (left.T @ residual).square()
    t = lr * torch.tensor(marks)[:, None]
    moving = rates > 1e-9 * rates[0]
    squared = (torch.expm1(-rates * t).square() * strength / rates)[:, moving].sum(1)
    drop = -0.5 * (torch.expm1(-2 * rates * t) * strength).sum(1)
    own = one(quick, "kernel", model=model)
    assert own["predicted"] == pytest.approx((squared / drop / t[:, 0]).tolist(), rel=1e-3)
    assert own["residual_share_of_first_modes"] == pytest.approx(
        (strength[:10].sum() / strength.sum()).item(), rel=1e-2
    )


def test_shares_of_layers_and_participation(quick: dict[str, Any]) -> None:
    """Up to the log step at the middle, which plain descent reaches again."""
    row = one(quick, "squared error", model="FCN", batch=12)
    x, y = published(quick["folder"], "mnist", 12, 0)
    torch.manual_seed(0)
    network = fcn(784, 64)
    start = [part.detach().clone() for part in network.parameters()]
    descend(network, x, y, row["learning_rate"], [row["marked"]])
    moved = [(p.detach() - s).double().square() for p, s in zip(network.parameters(), start, strict=True)]
    layers = [moved[k].sum() + moved[k + 1].sum() for k in range(0, len(moved), 2)]
    total = sum(part.sum() for part in moved)
    assert row["layers"]["before"] == pytest.approx([(part / total).item() for part in layers], rel=2e-3)
    fourth, count = sum(part.square().sum() for part in moved), sum(part.numel() for part in moved)
    assert row["participation"]["before"] == pytest.approx((total**2 / (count * fourth)).item(), rel=2e-3)


def test_cross_entropy_is_that_of_a_plain_loop(quick: dict[str, Any]) -> None:
    """Batches of 16, shuffled anew in each pass over 48 images; η is of the first pass' first 32."""
    row = one(quick, "cross entropy", model="CNN")
    x, y = published(quick["folder"], "cifar10", 48, 0)
    torch.manual_seed(0)
    network = cnn(3, 32, 8)
    start = nn.utils.parameters_to_vector(network.parameters()).detach()
    draw, last = torch.Generator().manual_seed(0), row["cumulative"]["step"][-1]

    def batches() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(48, generator=draw).split(16)

    seen: list[Tensor] = []
    for index in batches():
        if len(seen) == last:
            break
        seen.append(index)
        loss = nn.functional.cross_entropy(network(x[index]), y[index].argmax(1))
        for p, g in zip(network.parameters(), torch.autograd.grad(loss, list(network.parameters())), strict=True):
            p.data -= row["learning_rate"] * g
    moved = nn.utils.parameters_to_vector(network.parameters()).detach() - start
    assert row["cumulative"]["squared_displacement"][-1] == pytest.approx(
        moved.double().square().sum().item(), rel=2e-3
    )
    right = network(x).argmax(1) == y.argmax(1)
    assert row["accuracy"] == pytest.approx(right.double().mean().item(), rel=1e-5)  # six digits
    torch.manual_seed(0)
    fresh, probe = cnn(3, 32, 8), torch.cat(seen[:2])
    losses = [nn.functional.cross_entropy(net(x[probe]), y[probe].argmax(1)).item() for net in (fresh, network)]
    assert row["cumulative"]["loss_drop"][-1] == pytest.approx(losses[0] - losses[1], rel=2e-2)


def test_the_kernel_of_a_chain_is_that_of_its_jacobian(own_kernel: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network, x = fcn(12, 7).double(), torch.randn(5, 3, 2, 2).double()
    matrix = jacobian(network, x)
    np.testing.assert_allclose(own_kernel["tangent_kernel"](network, x), matrix @ matrix.T, rtol=1e-10, atol=1e-12)
    biased = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, 3)).double()  # not a chain of Linear layers
    matrix = jacobian(biased, x)
    np.testing.assert_allclose(own_kernel["tangent_kernel"](biased, x), matrix @ matrix.T, rtol=1e-10, atol=1e-12)


def test_a_folder_without_the_set_is_said(tmp_path: Path) -> None:
    script = SCRIPTS / f"{NAME}.py"
    command = [str(script), "--quick", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    done = run_here(lambda: runpy.run_path(str(script), run_name="__main__"), command, tmp_path)
    assert done.returncode == 1
    assert "must hold CIFAR-10" in done.stderr
    done = run_here(lambda: runpy.run_path(str(script), run_name="__main__"), [str(script)], tmp_path)
    assert done.returncode == 2
    assert "wanted --data with the folder of cifar10/, mnist/ and fashion-mnist/" in done.stderr


def test_without_a_folder_make_says_what_it_skips() -> None:
    done = run(
        ["make", "-s", "-o", ".venv/.stamp", "paper", "PAPER=", "DATA="], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"skipped: {NAME}, which needs real images: make paper DATA=folder" in done.stdout


# --- the full run and its page


def signed(text: str) -> str:
    return text.replace("-", "−")


def stretches(row: dict[str, Any]) -> str:
    return ", ".join(f"{a}–{b} ({'undefined' if e is None else f'{e:.3f}'})" for a, b, e in row["regimes"])


def title(row: dict[str, Any]) -> str:
    return f"{row['set']}, {row['model']}"


def whole(full: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in full["squared error"] if row["batch"] == row["examples"]]


def short_and_less_optimal(row: dict[str, Any]) -> bool:
    (_, end, first), (_, _, second) = (row["regimes"] + 2 * [(0, 0, None)])[:2]
    return None not in (first, second) and end <= 0.1 * row["regimes"][-1][1] and first < second


def run_of(full: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in whole(full) if all(row[name] == own[name] for name in ("set", "model", "seed")))


def off(full: dict[str, Any], own: dict[str, Any], until: int | None = None) -> tuple[float, float]:
    """Largest |η measured/predicted − 1| up to a step, if not said the boundary, or step 50; and that at the end."""
    row = run_of(full, own)
    found = row["cumulative"]
    step = np.array(found["step"])
    eta = np.array(found["squared_displacement"]) / (row["learning_rate"] * step * np.array(found["loss_drop"]))
    ratio = eta / np.array(own["predicted"]) - 1
    return np.abs(ratio[step <= (until or row["boundary"] or 50)]).max(), ratio[-1]


def test_runs_of_the_page(full: dict[str, Any]) -> None:
    text = page(NAME)
    assert f"({NAME}.png)" in text
    for row in full["squared error"]:
        low = row["trough"]
        cells = f"{row['loss_at_mark']:.4f} of {row['first_loss']:.4f}", f"{low['efficiency']:.3f}", str(low["step"])
        if row["batch"] < row["examples"]:
            exact = stretches({"regimes": row["regimes_with_exact_losses"]})
            assert f"| {title(row)} | {stretches(row)} | {exact} | {row['conversion']:.3f} |" in text
            continue
        assert f"| {title(row)}, {row['seed']} | {stretches(row)} | {' | '.join(cells)} | {low['rise']:.2f} |" in text
        if row["boundary"]:
            found = [row["directions"][side] for side in ("before", "after")]
            shares = [f"{side[name]:.2f}" for side in found for name in ("loss_drop", "squared_displacement")]
            spread = [f"{row['participation'][side] * row['parameters']:.0f}" for side in ("before", "after")]
            assert f"| {title(row)}, {row['seed']} | {signed(' | '.join(shares))} | {' | '.join(spread)} |" in text
        if row["boundary"] and row["seed"] == 0:
            layers = [", ".join(f"{share:.2f}" for share in row["layers"][side]) for side in ("before", "after")]
            assert f"| {title(row)} | {' | '.join(layers)} |" in text
    for row in full["cross entropy"]:
        low, alone = row["trough"], 1 / (row["cumulative"]["step"][-1] * row["conversion"])
        cells = f"{row['loss_at_mark']:.3f} of {row['first_loss']:.3f}", f"{low['efficiency']:.3f}", str(low["step"])
        more = f"{row['efficiency']:.3f} | {row['conversion']:.3f} | {alone:.2f} | {100 * row['accuracy']:.0f} %"
        name = f"{row['model']}, batches of {row['batch']}, {row['seed']}"
        assert f"| {name} | {stretches(row)} | {' | '.join(cells)} | {low['rise']:.2f} | {more} |" in text


def test_kernels_of_the_page(full: dict[str, Any]) -> None:
    text = page(NAME)
    assert len(full["kernel"]) == len(whole(full)) == 18
    for own in full["kernel"]:
        fit, (early, late) = own["fit"], off(full, own)
        to_50, _ = off(full, own, 50)
        first = f"{run_of(full, own)['gap']:.0f} | {100 * early:.1f} % | {100 * to_50:.0f} % | {100 * late:+.0f} %"
        slopes = f"{own['slope']:.2f} | {own['slope_of_powers']:.2f}"
        powers = f"{fit['a']:.2f} | {fit['b']:.2f} | {fit['first']}–{fit['last']}"
        assert f"| {title(own)}, {own['seed']} | {signed(first)} | {powers} | {signed(slopes)} |" in text
    later = [
        run_of(full, own)["cumulative"]["step"][np.argmin(own["predicted"])] / run_of(full, own)["trough"]["step"]
        for own in full["kernel"]
    ]
    assert f"{min(later):.1f} to {max(later):.1f} times later" in text


def test_means_over_the_seeds_of_the_page(full: dict[str, Any]) -> None:
    """With the standard errors of three."""
    text, found = page(NAME), dict[str, list[tuple[float, ...]]]()
    for own in full["kernel"]:
        fit, slope = own["fit"], own["slope"]
        values = 100 * off(full, own)[1], fit["a"], fit["b"], slope, slope - own["slope_of_powers"]
        found.setdefault(title(own), []).append(values)
    assert len(found) == 6
    for name, rows in found.items():
        (late, *others) = ((fmean(values), stdev(values) / 3**0.5) for values in zip(*rows, strict=True))
        cells = f"{late[0]:+.0f} ± {late[1]:.0f} %", *(f"{mean:.2f} ± {error:.2f}" for mean, error in others)
        assert f"| {name} | {signed(' | '.join(cells))} |" in text


def test_verdicts_of_the_page(full: dict[str, Any]) -> None:
    text = page(NAME)
    held = [row for row in whole(full) if row["boundary"]]
    departures = [off(full, own) for own in full["kernel"]]
    large = [row for row in full["cross entropy"] if row["batch"] == 500]
    counts = {
        "1": [short_and_less_optimal(row) for row in whole(full)],
        "2": [min(row["directions"]["before"].values()) >= 0.9 for row in held],
        "3, early": [early <= 0.1 for early, _ in departures],
        "3, at the end": [abs(late) > 0.1 for _, late in departures],
        "4": [abs(own["slope"] - own["slope_of_powers"]) <= 0.1 for own in full["kernel"]],
        "5": [short_and_less_optimal(row) for row in large],
    }
    for name, found in counts.items():
        assert f"| {name} | {sum(found)} of {len(found)} |" in text
    spent = sum(row["seconds"] for part in ("squared error", "kernel", "cross entropy") for row in full[part])
    assert f"{spent:.0f} processor seconds" in text
