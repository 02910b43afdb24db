"""The experiment on initial weights against plain torch, and its page."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from paper_cases import page, run_experiment
from plain_networks import cnn, descend, fcn, jacobian, published
from torch import Tensor, nn

NAME = "initial_weights"
GROUPS = [(s, m, i) for s in ("CIFAR-10", "Fashion-MNIST") for m in ("FCN", "CNN") for i in ("PyTorch", "He")]
COUNT = 4  # images of the shortened run


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp(NAME) / "out"
    return run_experiment(NAME, output, "--seeds", "0", "1") | {"folder": output / "data"}


class Pair(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.a, self.b = copy.deepcopy(network), copy.deepcopy(network)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5**0.5 * self.a(x) - 0.5**0.5 * self.b(x)


@pytest.mark.parametrize("model", ["FCN", "CNN"])
def test_trainings_and_shares_are_those_of_plain_torch(quick: dict[str, Any], model: str) -> None:
    """f − f_0 on targets y is f on targets y + f_0: the copy's training, by another route."""
    key = {"set": "Fashion-MNIST", "model": model, "start": "PyTorch", "seed": 1}
    (run,) = [run for run in quick["runs"] if key.items() <= run.items()]
    x, y = (part.double() for part in published(quick["folder"], "fashion-mnist", COUNT, 1))
    torch.manual_seed(1)
    network = (fcn(784, 64) if model == "FCN" else cnn(1, 28, 8)).double()
    start = network(x).detach()
    left, singular, _ = torch.linalg.svd(jacobian(network, x), full_matrices=False)
    rates = 2 / y.numel() * singular.square()
    lr = 0.1 / rates[0].item()
    marks = [round(time / 0.1) for time in run["times"]]
    assert run["elapsed"] == pytest.approx([lr * mark for mark in marks], rel=1e-5)
    ways = {"usual": (network, y), "copy": (network, y + start)} | (
        {"twin": (Pair(network), y)} if model == "FCN" else {}
    )
    assert ("twin" in run) == (model == "FCN")
    for name, (made, targets) in ways.items():
        found = [row[:2] for row in descend(copy.deepcopy(made), x, targets, lr, marks)]
        np.testing.assert_allclose(run[name], found, rtol=2e-5)  # six digits
    t = lr * torch.tensor(marks)[:, None]
    moving = rates > 1e-12 * rates[0]

    def flow(residual: Tensor) -> Tensor:
        strength = 2 / y.numel() * (left.T @ residual.flatten()).square()
        squared = (torch.expm1(-rates * t).square() * strength / rates)[:, moving].sum(1)
        return torch.stack([squared, -0.5 * (torch.expm1(-2 * rates * t) * strength).sum(1)], 1)

    usual, zero = flow(start - y), flow(-y)
    shares = 1 - torch.cat([zero / usual, (zero[:, :1] / zero[:, 1:]) / (usual[:, :1] / usual[:, 1:])], 1)
    np.testing.assert_allclose(run["predicted"], shares, rtol=1e-4, atol=1e-6)


def test_all_groups_are_there(quick: dict[str, Any], full: dict[str, Any]) -> None:
    for found, seeds in ((quick, 2), (full, 5)):
        for group in GROUPS:
            assert len(of(found, group)) == seeds


# --- the full run and its page


def of(found: dict[str, Any], group: tuple[str, str, str]) -> list[dict[str, Any]]:
    return [run for run in found["runs"] if (run["set"], run["model"], run["start"]) == group]


def shares(runs: list[dict[str, Any]], zero: str = "copy") -> np.ndarray:
    """(seeds, times, 3): of W₂², Q, η."""
    usual, other = (np.array([run[name] for run in runs]) for name in ("usual", zero))
    both = other / usual
    return 1 - np.concatenate([both, both[..., :1] / both[..., 1:]], -1)


def error(values: np.ndarray) -> Any:
    return values.std(0, ddof=1) / len(values) ** 0.5


def signed(text: str) -> str:
    return text.replace("-", "−")


def test_the_pages_figures_stand_in_the_result_file(full: dict[str, Any]) -> None:
    text, counts = page(NAME), np.zeros(3, int)
    assert f"({NAME}.png)" in text
    for group in GROUPS:
        runs = of(full, group)
        measured, said = shares(runs), np.array([run["predicted"] for run in runs])
        times = runs[0]["times"]
        for time in (1, 10):
            at = times.index(time)
            cells = [
                f"{measured[:, at, i].mean():.3f} ± {error(measured)[at, i]:.3f} ({said[:, at, i].mean():.3f})"
                for i in range(3)
            ]
            assert f"| {', '.join(group)} | {time} | {signed(' | '.join(cells))} |" in text
        at = [times.index(time) for time in (1, 3, 10)]
        counts[0] += np.abs((measured - said).mean(0)[at, :2]).max() <= 0.05
        usual, zero = (
            np.array([[w / q / t for (w, q), t in zip(run[name], run["elapsed"], strict=True)] for run in runs])[:, -1]
            for name in ("usual", "copy")
        )
        gain = zero - usual
        counts[1] += gain.mean() > 2 * error(gain)
        cells = f"{usual.mean():.3f} | {zero.mean():.3f} | {gain.mean():+.3f} ± {error(gain):.3f}"
        assert f"| {', '.join(group)} | {signed(cells)} |" in text
        if group[1] == "FCN":
            twin, frozen = (np.array([run[name] for run in runs])[:, -1] for name in ("twin", "copy"))
            off = (twin / frozen - 1).mean(0)
            counts[2] += np.abs(off).max() <= 0.05
            assert f"| {', '.join(group)} | {signed(f'{100 * off[0]:+.1f} % | {100 * off[1]:+.1f} %')} |" in text
    for number, (count, total) in enumerate(zip(counts, (8, 8, 4), strict=True), 1):
        assert f"| {number} | {count} of {total} |" in text
    assert f"{sum(run['seconds'] for run in full['runs']):.0f} processor seconds" in text
