"""Linear regression and the perceptron: against training them, and against moments in full matrices."""

import math
from itertools import pairwise

import pytest
import torch
from theory_cases import bures, descend, diffuse, draw, extrapolated
from torch import Tensor, nn

from lightning_speedlimit.theory import Curve, langevin, linear_regression, perceptron

INPUTS, TARGETS, START = draw(1, 12, 5), draw(2, 12), draw(3, 5)
DEFICIENT = torch.cat([draw(4, 12, 2) @ draw(5, 2, 4), torch.zeros(12, 1, dtype=torch.float64)], 1)  # rank 2 of 5


def at(curve: Curve) -> tuple[float, float, float]:
    return curve.wasserstein2_squared.item(), curve.entropy_production.item(), curve.efficiency.item()


def train(
    model: nn.Linear, loss: nn.Module, inputs: Tensor, targets: Tensor, lr: float, steps: int
) -> tuple[float, float]:
    """(squared displacement, loss drop) of plain gradient descent with torch's own optimizer and loss."""
    optimizer, start = torch.optim.SGD(model.parameters(), lr=lr), model.weight.detach().clone()
    first = loss(model(inputs), targets).item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
    return (model.weight - start).square().sum().item(), first - loss(model(inputs), targets).item()


def linear(weights: Tensor) -> nn.Linear:
    """x ↦ xw with w (d, C), to be trained."""
    layer = nn.Linear(*weights.shape, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weights.T)
    return layer


@pytest.mark.parametrize("inputs", [INPUTS, INPUTS[:3], DEFICIENT], ids=["tall", "wide", "deficient"])
def test_gradient_descent_follows_to_first_order(inputs: Tensor) -> None:
    """Halving the learning rate halves the error."""
    targets, time = draw(6, len(inputs), 2), 0.4
    weights = draw(7, 5, 2)
    expected = at(linear_regression(inputs, targets, time, weights=weights))
    errors = []
    for steps in (100, 200, 400, 800):
        squared, drop = train(linear(weights), HalfSum(), inputs, targets, time / steps, steps)
        found = (squared, drop, squared / (time * drop))
        errors.append([abs(x / y - 1) for x, y in zip(found, expected, strict=True)])
    for which in range(3):
        e = [error[which] for error in errors]
        orders = [math.log2(a / b) for a, b in pairwise(e)]
        assert orders[-1] == pytest.approx(1, abs=0.05), (which, orders)  # 1 + O(lr λ), 0.02 at 400 steps
        assert e[-1] < 0.01


@pytest.mark.parametrize("inputs", [INPUTS, INPUTS[:3], DEFICIENT], ids=["tall", "wide", "deficient"])
def test_direct_integration(inputs: Tensor) -> None:
    targets, weights, time = draw(6, len(inputs), 2), draw(7, 5, 2), 0.4  # λ·time = 15 at most
    jacobian = torch.kron(inputs, torch.eye(2, dtype=torch.float64))
    squared, work = extrapolated(lambda n: descend(jacobian, targets.flatten(), weights.flatten(), time, n)).tolist()
    found = at(linear_regression(inputs, targets, time, weights=weights))
    assert found == pytest.approx((squared, work, squared / (time * work)), rel=1e-6)


class HalfSum(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum()


def test_mean_reduction_is_mseloss() -> None:
    targets, weights, time = draw(6, 12, 2), draw(7, 5, 2), 2.0

    def run(steps: int) -> Tensor:
        return torch.tensor(train(linear(weights), nn.MSELoss(), INPUTS, targets, time / steps, steps))

    squared, drop = extrapolated(run, (150, 300, 600)).tolist()  # lr λ = 0.04 in the coarsest: third order, 1e-5
    curve = linear_regression(INPUTS, targets, time, weights=weights, reduction="mean")
    assert at(curve) == pytest.approx((squared, drop, squared / (time * drop)), rel=1e-5)


def test_many_starts() -> None:
    """Gaussian starts: E‖Δw‖² over draws, the transport in full matrices, and langevin at T = 0."""
    std, time = 0.7, 0.15
    hessian = INPUTS.T @ INPUTS
    best = torch.linalg.solve(hessian, INPUTS.T @ TARGETS)
    shrink = torch.linalg.matrix_exp(-time * hessian)
    cov = std**2 * torch.eye(5, dtype=torch.float64)
    squared = bures(START - best, cov, shrink @ (START - best), shrink @ cov @ shrink)
    starts = START - best
    drop = 0.5 * (starts @ (hessian - shrink @ hessian @ shrink) @ starts)
    drop = (drop + 0.5 * std**2 * (hessian - shrink @ hessian @ shrink).trace()).item()
    found = at(linear_regression(INPUTS, TARGETS, time, weights=START, std=std))
    assert found == pytest.approx((squared, drop, squared / (time * drop)), rel=1e-11)  # eigenbases of 5 × 5

    # The map is the same for all starts, so pairing is the optimum also where they are not Gaussian: uniform.
    # (Any distribution: here W₂² = mean of the squared displacements, to its standard error.)
    uniform = (torch.rand(200_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * std
    moved = ((START - best + uniform * 12**0.5) @ (shrink - torch.eye(5, dtype=torch.float64))).square().sum(1)
    assert found[0] == pytest.approx(moved.mean().item(), abs=4 * moved.std().item() / 200_000**0.5)


def test_outputs_add() -> None:
    targets, weights, times = draw(6, 12, 2), draw(7, 5, 2), [0.01, 0.5]
    both = linear_regression(INPUTS, targets, times, weights=weights, std=0.7)
    single = [linear_regression(INPUTS, targets[:, c], times, weights=weights[:, c], std=0.7) for c in (0, 1)]
    for name in ("wasserstein2_squared", "entropy_production"):
        expected = getattr(single[0], name) + getattr(single[1], name)
        torch.testing.assert_close(getattr(both, name), expected, rtol=1e-13, atol=0)


def test_orthogonal_inputs_by_hand() -> None:
    # X = diag(1, 2), y = (3, 1), w_0 = 0: r = −y, λ = 1, 4.
    t = 0.25
    curve = linear_regression(torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([3.0, 1.0]), t)
    squared = 9 * (1 - math.exp(-t)) ** 2 + (1 - math.exp(-4 * t)) ** 2 / 4
    drop = 0.5 * (9 * (1 - math.exp(-2 * t)) + (1 - math.exp(-8 * t)))
    assert at(curve) == pytest.approx((squared, drop, squared / (t * drop)), rel=1e-13)


def test_nan_where_the_start_is_the_end() -> None:
    assert linear_regression(INPUTS, torch.zeros(12), 1.0).efficiency.isnan()


@pytest.mark.parametrize("inputs", [INPUTS, INPUTS[:3], DEFICIENT], ids=["tall", "wide", "deficient"])
@pytest.mark.parametrize(("heat", "decay"), [(0.0, 0.0), (0.0, 0.5), (0.3, 0.0), (0.3, 0.5)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_perceptron_by_its_moments(inputs: Tensor, heat: float, decay: float, reduction: str) -> None:
    labels, std, time = TARGETS[: len(inputs)].sign(), 0.6, 0.35
    scale = 1.0 if reduction == "sum" else 2 / len(inputs)
    x = inputs / 5**0.5
    hessian = scale * x.T @ x + decay * torch.eye(5, dtype=torch.float64)
    best = torch.linalg.pinv(hessian, rtol=1e-12) @ (scale * x.T @ labels)
    cov = std**2 * torch.eye(5, dtype=torch.float64)
    steps = (250, 500, 1000)  # h·time = 5 at most: the error is a tenth of the 6e-8 of STEPS at 15
    squared, work = extrapolated(lambda n: diffuse(hessian, START - best, cov, heat, time, n), steps).tolist()
    curve = perceptron(
        inputs, labels, time, weights=START, std=std, temperature=heat, weight_decay=decay, reduction=reduction
    )
    assert at(curve) == pytest.approx((squared, work, squared / (time * work)), rel=1e-6)


def test_cold_perceptron_is_linear_regression() -> None:
    times = torch.logspace(-2, 2, 5)
    cold = perceptron(INPUTS, TARGETS, times, weights=START, std=0.4)
    regression = linear_regression(INPUTS / 5**0.5, TARGETS, times, weights=START, std=0.4)
    for name in ("wasserstein2_squared", "entropy_production", "efficiency"):
        torch.testing.assert_close(getattr(cold, name), getattr(regression, name), rtol=1e-12, atol=0)


def test_directions_without_inputs() -> None:
    """One input direction of 4: three diffuse freely without decay, and shrink by the decay's rate with it."""
    inputs, weights, times = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([1.0, 2.0, -1.0, 0.5]), [0.1, 3.0]
    options = {"weights": weights, "std": 0.5, "temperature": 0.2}
    free = perceptron(inputs, torch.tensor([3.0]), times, **options)  # h = 4/4, minimum at w = 3
    expected = langevin([1.0, 0.0, 0.0, 0.0], [1.0 - 3.0, 0.0, 0.0, 0.0], 0.5, 0.2, times)
    decayed = perceptron(inputs, torch.tensor([3.0]), times, weight_decay=0.5, **options)
    expected_decayed = langevin([1.5, 0.5, 0.5, 0.5], [1.0 - 3.0 / 1.5, 2.0, -1.0, 0.5], 0.5, 0.2, times)
    for found, by_hand in ((free, expected), (decayed, expected_decayed)):
        for name in ("wasserstein2_squared", "entropy_production", "efficiency"):
            torch.testing.assert_close(getattr(found, name), getattr(by_hand, name), rtol=1e-13, atol=0)


def test_small_ranks_move() -> None:
    """σ = 1e-10 is no rounding of 1: W₂² = Σ y²/σ² in the end."""
    found = at(linear_regression(torch.diag(torch.tensor([1.0, 1e-10], dtype=torch.float64)), TARGETS[:2], 1e30))
    squared, drop = (TARGETS[0] ** 2 + 1e20 * TARGETS[1] ** 2).item(), 0.5 * TARGETS[:2].square().sum().item()
    assert found == pytest.approx((squared, drop, squared / (1e30 * drop)), rel=1e-13, abs=0)


def test_rounded_ranks_do_not_move() -> None:
    """Rank 2 of 5, where rounding leaves σ ~ 1e-16: after an age the weights are those of least norm, X⁺y."""
    assert torch.linalg.svdvals(DEFICIENT)[2] > 0
    inverse = torch.linalg.pinv(DEFICIENT, rtol=1e-12)
    squared, drop = (inverse @ TARGETS).square().sum().item(), 0.5 * (TARGETS @ DEFICIENT @ inverse @ TARGETS).item()
    curve = linear_regression(DEFICIENT, TARGETS, 1e40)
    assert at(curve) == pytest.approx((squared, drop, squared / (1e40 * drop)), rel=1e-12, abs=0)
