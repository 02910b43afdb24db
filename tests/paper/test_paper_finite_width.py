"""The experiment on finite widths against plain torch with all pixels, and its page."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from paper_cases import page, run_experiment
from plain_networks import cnn, descend, jacobian, published
from torch import Tensor, nn

NAME = "finite_width"
QUICK = {"FCN": 6, "CNN": 4}  # images


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp(NAME) / "out"
    return run_experiment(NAME, output, "--seeds", "0", "1") | {"folder": output / "data"}


def he(layers: list[nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    for layer in layers:  # drawn once by PyTorch, in the order of their making
        layer.reset_parameters()
    with torch.no_grad():
        for layer in layers:
            drawn = torch.empty_like(layer.weight, dtype=torch.float32)
            layer.weight.data = drawn.normal_(0, (2 / layer.weight[0].numel()) ** 0.5).double()
            layer.bias.data = torch.zeros_like(layer.bias, dtype=torch.float64)


def with_all_pixels(width: int, seed: int, x: Tensor) -> nn.Sequential:
    """The FCN as people have it, 3072 inputs: its first weights are those of the coordinates, in the images' span."""
    count = len(x)
    layers = [nn.Linear(count, width), nn.Linear(width, width), nn.Linear(width, 10)]
    he(layers, seed)
    basis = torch.linalg.qr(x.flatten(1).T)[0]
    whole = nn.Linear(3072, width, dtype=torch.float64)
    whole.weight.data = (count / 3072) ** 0.5 * layers[0].weight.data @ basis.T
    whole.bias.data = layers[0].bias.data
    return nn.Sequential(nn.Flatten(), whole, nn.ReLU(), layers[1], nn.ReLU(), layers[2])


@pytest.mark.parametrize("model", ["FCN", "CNN"])
def test_departures_are_those_of_plain_descent(quick: dict[str, Any], model: str) -> None:
    runs = [run for run in quick["runs"] if run["model"] == model]
    assert len(runs) == 4
    for run in runs[::3]:  # the narrow one of the first seed, the wide one of the second
        x, y = (part.double() for part in published(quick["folder"], "cifar10", QUICK[model], run["seed"]))
        if model == "FCN":
            network = with_all_pixels(run["width"], run["seed"], x)
        else:
            network = cnn(3, 32, run["width"])
            he([part for part in network if hasattr(part, "weight")], run["seed"])
        matrix = jacobian(network, x)
        left, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
        rates = 2 / y.numel() * singular.square()
        strength = 2 / y.numel() * (left.T @ (network(x) - y).detach().flatten()).square()
        lr = 0.1 / rates[0].item()
        marks = [round(time / 0.1) for time in run["times"]]
        left_over = (1 - lr * rates) ** torch.tensor(marks)[:, None]
        moving = rates > 1e-12 * rates[0]
        moved = ((1 - left_over).square() * strength / rates)[:, moving].sum(1)
        fallen = 0.5 * ((1 - left_over.square()) * strength).sum(1)
        predicted = moved / fallen / (lr * torch.tensor(marks))
        assert run["predicted"] == pytest.approx(predicted.tolist(), rel=1e-5)  # six digits
        rows = zip(marks, descend(network, x, y, lr, marks), strict=True)
        real = torch.tensor([squared / drop / (lr * step) for step, (squared, drop, _) in rows])
        assert run["efficiency"] == pytest.approx(real.tolist(), rel=1e-5)
        assert run["departure"] == pytest.approx((real / predicted - 1).abs().max().item(), rel=1e-4, abs=1e-7)
        now = jacobian(network, x)
        before, after = matrix @ matrix.T, now @ now.T
        assert run["kernel_moved"] == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-4)


# --- the full run and its page


def column(full: dict[str, Any], model: str, name: str) -> tuple[list[int], np.ndarray]:
    runs = [run for run in full["runs"] if run["model"] == model]
    widths = sorted({run["width"] for run in runs})
    return widths, np.array([[abs(run[name]) for run in runs if run["width"] == width] for width in widths])


def slope(widths: list[int], values: np.ndarray) -> tuple[float, float]:
    """Mean over seeds of the line's slope, and its standard error."""
    each = np.polyfit(np.log(widths), np.log(values), 1)[0]
    return each.mean(), each.std(ddof=1) / len(each) ** 0.5


def signed(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def test_each_seed_has_each_width(full: dict[str, Any]) -> None:
    for model, widths in (("FCN", [32, 64, 128, 256, 512, 1024, 2048]), ("CNN", [4, 8, 16, 32, 64])):
        found, values = column(full, model, "departure")
        assert found == widths
        assert values.shape == (len(widths), 5)
        moved = column(full, model, "kernel_moved")[1].mean(1)
        assert all(late < early for early, late in pairwise(moved))


def test_the_pages_figures_stand_in_the_result_file(full: dict[str, Any]) -> None:
    text = page(NAME)
    assert f"({NAME}.png)" in text
    names = ("departure", "kernel_moved", "wasserstein2_squared", "loss_drop")
    for model in ("FCN", "CNN"):
        columns = [column(full, model, name) for name in names]
        for k, width in enumerate(columns[0][0]):
            rows = [100 * values[k] for _, values in columns]
            cells = [f"{row.mean():.3g} ± {row.std(ddof=1) / 5**0.5:.2g}" for row in rows]
            assert f"| {model} {width} | {' | '.join(cells)} |" in text
        each = [slope(*pair) for pair in columns]
        assert f"| {model}, slope | {' | '.join(f'{signed(a)} ± {b:.2f}' for a, b in each)} |" in text
        verdicts = [abs(mean + 1) <= 2 * error for mean, error in each[:2]]
        verdicts.append(bool((columns[0][1][-1] < 0.05).all()))
        for number, stands in enumerate(verdicts, 1):
            assert f"| {number}, {model} | {'holds' if stands else 'fails'} |" in text
    assert f"{sum(run['seconds'] for run in full['runs']):.0f} processor seconds" in text
