"""W₂² between samples against W₂² between the populations that they come from: above it, and down to it as N grows.

Two samples of one population are apart too: E W₂² is of order log log N / N on a line, log N / N in the plane, for
Gaussians. A shift c of the population adds |c|² and a noise of mean 0, 2 ⟨c, x̄ − ȳ⟩ (standard deviation
2 |c| √(2/N)), which is taken out here: W₂²(x, y + c) is the W₂² of the centred samples plus |ȳ − x̄ + c|².
"""

import math

import pytest
import torch
from transport_cases import Draw
from transport_reference import by_assignment, direct_costs

from lightning_speedlimit.transport import gaussian_wasserstein2_squared, wasserstein2_squared

SHIFT = {1: torch.tensor([1.5]).double(), 2: torch.tensor([1.5, -0.5]).double()}


def excess(n: int, d: int, seed: int) -> float:
    """Sampled W₂² − |c|² − 2 ⟨c, ȳ − x̄⟩: what sampling adds on average."""
    draw, shift = Draw(1000 * n + seed), SHIFT[d]
    x, y = draw.normal(n, d), draw.normal(n, d)
    found = wasserstein2_squared(x, y + shift)
    assert found.converged
    return found.value - (shift @ shift).item() - 2 * ((y.mean(0) - x.mean(0)) @ shift).item()


@pytest.mark.parametrize("d", [1, 2])
def test_samples_are_farther_apart_than_populations_and_less_so_as_they_grow(d: int) -> None:
    means = []
    for n in (16, 64, 256):
        sampled = torch.tensor([excess(n, d, seed) for seed in range(20)])
        error = (sampled.std() / math.sqrt(len(sampled))).item()
        assert sampled.min() > 0  # W₂² between the unshifted samples
        assert sampled.mean() > 4 * error  # the bias is no noise
        means.append(sampled.mean().item())
    # Four times the particles: less than half of the bias (a quarter but for logarithms); its mean of 20 is known to
    # 10-20 %.
    assert means[1] < 0.5 * means[0]
    assert means[2] < 0.5 * means[1]


@pytest.mark.parametrize("d", [1, 2])
def test_large_samples_tend_to_the_shift(d: int) -> None:
    n, shift = 500, SHIFT[d]
    expected = (shift @ shift).item()
    draw = Draw(d)
    x, y = draw.normal(n, d), draw.normal(n, d) + shift
    found = wasserstein2_squared(x, y).value
    # Four standard deviations of 2 ⟨c, ȳ − x̄⟩, and the bias above, at most 0.1 here
    noise = 4 * 2 * math.sqrt(expected * 2 / n)
    assert expected - noise < found < expected + noise + 0.1


def test_scaled_populations_on_a_line() -> None:
    # N(0, 1) and N(0, 4): (2 − 1)² = 1. Sorted samples against quantiles: off by O(√(1/N)).
    draw = Draw(0)
    n = 500
    x, y = draw.normal(n, 1), 2 * draw.normal(n, 1)
    cov = lambda value: torch.tensor([[value]], dtype=torch.float64)  # noqa: E731
    zero = torch.zeros(1)
    expected = gaussian_wasserstein2_squared(zero, cov(1.0), zero, cov(4.0))
    assert expected == pytest.approx(1.0, rel=1e-13)
    # The standard deviations 1 and 2 are known to 1/√(2N) of themselves: (2 − 1)² to 2 √5/√(2N) = 0.14; three of them
    assert wasserstein2_squared(x, y).value == pytest.approx(expected, abs=0.42)


def test_high_dimensions_are_mostly_bias() -> None:
    # Two samples of one population of 32 dimensions: its W₂² is 0, the sampled one about as large as a cloud's spread.
    draw = Draw(0)
    x, y = draw.normal(400, 32), draw.normal(400, 32)
    found = wasserstein2_squared(x, y).value
    nearest = torch.cdist(x, y).square().min(1).values.mean().item()
    assert found >= nearest > 20  # no plan is cheaper than everyone's nearest; 2 · 32 apart on average


@pytest.mark.slow
def test_the_figure_in_the_docs() -> None:
    # Means of 2,048 samples: 2 ⟨c, ȳ − x̄⟩ has a standard deviation of 0.35, hence 2 %.
    for seed in range(2):
        draw = Draw(seed)
        x, y = draw.normal(2048, 32), draw.normal(2048, 32) + 1
        expected = by_assignment(direct_costs(x, y))
        assert expected == pytest.approx(61.3, rel=0.02)
        found = wasserstein2_squared(x, y)
        assert found.value == pytest.approx(expected, rel=1e-9)
        assert found.lower <= expected <= found.upper
